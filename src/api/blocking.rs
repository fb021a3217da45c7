//! The way from the async threads to the fine-tuning service, whose calls wait for the disk.

use std::sync::Arc;

use super::{AppState, error::ApiError};
use crate::jobs::Service;

/// Runs `work` on a thread that may wait.
///
/// # Errors
/// 403 on a server without the service, and what `work` returns.
pub(crate) async fn with_service<T, E>(
    state: &AppState,
    work: impl FnOnce(&Service) -> Result<T, E> + Send + 'static,
) -> Result<T, ApiError>
where
    T: Send + 'static,
    E: Into<ApiError> + Send + 'static,
{
    let service = Arc::clone(state.jobs()?);
    blocking(move || work(&service)).await
}

/// As [`with_service`], for work that needs no service.
pub(crate) async fn blocking<T, E>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, ApiError>
where
    T: Send + 'static,
    E: Into<ApiError> + Send + 'static,
{
    tokio::task::spawn_blocking(work).await.map_err(ApiError::internal)?.map_err(Into::into)
}

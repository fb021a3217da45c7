//! `/health` (alias `/ping`): is the engine alive. `/ready`: should new requests come here.

use std::sync::Arc;

use axum::{Json, extract::State};
use serde_json::{Value, json};

use super::{AppState, error::ApiError};

/// 200, or 503 when the engine has failed.
pub(crate) async fn health(State(state): State<Arc<AppState>>) -> Result<Json<Value>, ApiError> {
    if !state.engine.is_healthy() {
        return Err(ApiError::EngineStopped);
    }
    Ok(Json(json!({"status": "ok"})))
}

/// 200, or 503 when the engine has failed or the server is shutting down.
pub(crate) async fn ready(State(state): State<Arc<AppState>>) -> Result<Json<Value>, ApiError> {
    if state.is_draining() {
        return Err(ApiError::Draining);
    }
    health(State(state)).await
}

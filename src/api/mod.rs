//! FLOOR 6. The HTTP interface: OpenAI's chat, models, files and fine-tuning jobs, Azure's forms of
//! them, vLLM's adapter routes, probes and metrics.
//!
//! Knows JSON, statuses and headers, and turns them into calls to the floors below. Must never know
//! tensors, schedulers or files' contents.

mod adapters;
mod aliases;
mod auth;
mod azure;
mod azure_form;
mod blocking;
mod body;
mod chat;
mod checkpoints;
mod choices;
mod deployments;
mod error;
mod eval_runs;
mod evals;
mod files;
mod fine_tuning;
mod generation;
mod graders;
mod health;
mod jail;
mod job_events;
mod job_request;
mod messages;
mod metrics_page;
mod models;
mod multipart;
mod query;
mod resolve;
mod sampling;
mod sse;
mod state;
mod types;
mod uploads;

use std::{future::Future, io, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::Request,
    middleware,
    response::{IntoResponse, Response},
    routing::{get, post},
    serve::ListenerExt,
};
use tokio::{net::TcpListener, sync::oneshot};

pub use self::{
    auth::ApiKeys,
    error::ApiError,
    jail::{AdapterRoots, is_adapter_name},
    state::{AppState, ServerConfig, Services},
};
use crate::telemetry;

/// How often the server looks after itself: folds metrics, sees whether the engine lives.
const TICK: Duration = Duration::from_secs(1);

/// How long connections get to close after the last request.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Every route, with its method. The authentication tests walk over this table.
pub const ROUTES: &[(&str, &str)] = &[
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{id}"),
    ("DELETE", "/v1/models/{id}"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
    ("POST", "/v1/fine_tuning/alpha/graders/run"),
    ("POST", "/v1/fine_tuning/alpha/graders/validate"),
    ("GET", "/v1/evals"),
    ("POST", "/v1/evals"),
    ("GET", "/v1/evals/{id}"),
    ("POST", "/v1/evals/{id}"),
    ("DELETE", "/v1/evals/{id}"),
    ("GET", "/v1/evals/{id}/runs"),
    ("POST", "/v1/evals/{id}/runs"),
    ("GET", "/v1/evals/{id}/runs/{run}"),
    ("POST", "/v1/evals/{id}/runs/{run}"),
    ("DELETE", "/v1/evals/{id}/runs/{run}"),
    ("POST", "/v1/evals/{id}/runs/{run}/cancel"),
    ("GET", "/v1/evals/{id}/runs/{run}/output_items"),
    ("GET", "/v1/evals/{id}/runs/{run}/output_items/{item}"),
    ("POST", "/v1/files"),
    ("GET", "/v1/files"),
    ("GET", "/v1/files/{id}"),
    ("DELETE", "/v1/files/{id}"),
    ("GET", "/v1/files/{id}/content"),
    ("POST", "/v1/uploads"),
    ("POST", "/v1/uploads/{id}/parts"),
    ("POST", "/v1/uploads/{id}/complete"),
    ("POST", "/v1/uploads/{id}/cancel"),
    ("POST", "/v1/fine_tuning/jobs"),
    ("GET", "/v1/fine_tuning/jobs"),
    ("GET", "/v1/fine_tuning/jobs/{id}"),
    ("POST", "/v1/fine_tuning/jobs/{id}/cancel"),
    ("POST", "/v1/fine_tuning/jobs/{id}/pause"),
    ("POST", "/v1/fine_tuning/jobs/{id}/resume"),
    ("GET", "/v1/fine_tuning/jobs/{id}/events"),
    ("GET", "/v1/fine_tuning/jobs/{id}/checkpoints"),
    ("GET", "/v1/fine_tuning/checkpoints/{id}/permissions"),
    ("POST", "/v1/fine_tuning/checkpoints/{id}/permissions"),
    ("DELETE", "/v1/fine_tuning/checkpoints/{id}/permissions/{permission}"),
    ("GET", "/v1/aliases"),
    ("GET", "/v1/aliases/{name}"),
    ("PUT", "/v1/aliases/{name}"),
    ("DELETE", "/v1/aliases/{name}"),
    ("GET", deployments::PATH),
    ("GET", deployments::PATH_OF_ONE),
    ("PUT", deployments::PATH_OF_ONE),
    ("DELETE", deployments::PATH_OF_ONE),
    ("GET", "/health"),
    ("GET", "/ping"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
];

/// The whole interface. Azure's addresses are rewritten around the routes, since a layer of theirs would
/// come after the choice of a route.
pub fn router(state: Arc<AppState>) -> Router {
    let plain = plain_router(state);
    Router::new().fallback_service(plain).layer(middleware::map_request(azure::understand_azure))
}

fn plain_router(state: Arc<AppState>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat::chat_completions))
        .route("/v1/models", get(models::list_models))
        .route("/v1/models/{*id}", get(models::get_model).delete(models::delete_model))
        .route("/v1/load_lora_adapter", post(adapters::load_adapter))
        .route("/v1/unload_lora_adapter", post(adapters::unload_adapter))
        .route("/v1/files", get(files::list_files).post(files::create_file))
        .route("/v1/files/{id}", get(files::get_file).delete(files::delete_file))
        .route("/v1/files/{id}/content", get(files::get_content))
        .route("/v1/uploads", post(uploads::create_upload))
        .route("/v1/uploads/{id}/parts", post(uploads::add_part))
        .route("/v1/uploads/{id}/complete", post(uploads::complete_upload))
        .route("/v1/uploads/{id}/cancel", post(uploads::cancel_upload))
        .merge(fine_tuning::routes())
        .merge(aliases::routes())
        .merge(deployments::routes())
        .route("/health", get(health::health))
        .route("/ping", get(health::health))
        .route("/ready", get(health::ready))
        .route("/metrics", get(metrics_page::metrics_page))
        .merge(graders::routes())
        .merge(evals::routes())
        .fallback(route_not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(middleware::from_fn_with_state(Arc::clone(&state), auth::require_key))
        .with_state(state)
}

/// Serves on `listener` until `shutdown` completes, then refuses new requests, lets the running ones
/// finish within the shutdown timeout, and returns.
///
/// # Errors
/// When the engine has failed: the process should end, so that a supervisor starts it anew.
pub async fn run(
    listener: TcpListener,
    state: Arc<AppState>,
    shutdown: impl Future<Output = ()> + Send,
) -> io::Result<()> {
    // Small events must leave at once.
    let listener = listener.tap_io(|stream| {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!("TCP_NODELAY could not be set: {error}");
        }
    });
    let (close, closed) = oneshot::channel::<()>();
    let server = axum::serve(listener, router(Arc::clone(&state))).with_graceful_shutdown(async {
        // Either way, there is nobody left who wants to serve.
        let _ = closed.await;
    });
    let server = tokio::spawn(server.into_future());

    let failed = tokio::select! {
        () = shutdown => false,
        () = engine_failure(&state) => true,
    };
    tracing::info!("shutting down");
    // Jobs leave their checkpoints while the last requests are answered.
    tokio::join!(state.drain(), state.stop_jobs());
    // The receiver is gone only if the server has ended already.
    let _ = close.send(());
    if tokio::time::timeout(CLOSE_TIMEOUT, server).await.is_err() {
        tracing::warn!("some connections were cut");
    }
    if failed { Err(io::Error::other("the engine has failed")) } else { Ok(()) }
}

async fn engine_failure(state: &AppState) {
    while state.engine.is_healthy() {
        telemetry::run_upkeep();
        tokio::time::sleep(TICK).await;
    }
}

async fn route_not_found(request: Request) -> Response {
    let route = format!("{} {}", request.method(), request.uri().path());
    ApiError::RouteNotFound(route).into_response()
}

async fn method_not_allowed(request: Request) -> Response {
    let (method, path) = (request.method().to_string(), request.uri().path().to_owned());
    ApiError::MethodNotAllowed { method, path }.into_response()
}

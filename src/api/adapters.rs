//! `POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`: the routes by which operators and
//! controllers made for vLLM change adapters, with the texts and statuses they look for.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Json,
    extract::{Request, State},
    http::{HeaderMap, header},
    response::{IntoResponse, Response},
};
use serde_json::json;

use super::{
    AppState,
    body::{parse_json, read_body, unsupported_unless},
    error::ApiError,
    jail::is_adapter_name,
    resolve::version_label,
    types::adapters::{LoadAdapterRequest, UnloadAdapterRequest},
};
use crate::adapters::AdapterVersion;
use crate::jobs::Model;
use crate::telemetry;

/// How often `mode: "wait"` looks whether the last request has let go.
const POLL: Duration = Duration::from_millis(20);

/// Longest wait that a client may ask for, in seconds.
const MAX_WAIT_SECONDS: f64 = 3600.0;

/// Loads a new adapter, or with `load_inplace` replaces one: reads, checks, then publishes at once.
/// A client that leaves meanwhile does not stop it.
pub(crate) async fn load_adapter(
    State(state): State<Arc<AppState>>,
    request: Request,
) -> Result<Response, AdapterRouteError> {
    let _in_flight = state.admit()?;
    let wants_json = wants_json(request.headers());
    let body: LoadAdapterRequest = parse_json(&read_body(request).await?)?;
    let version = tokio::task::spawn_blocking(move || load(&state, body))
        .await
        .map_err(ApiError::internal)??;
    let message = format!("Success: LoRA adapter '{}' added successfully.", version.name);
    let mut answer = success(message, wants_json, &version);
    let label = version_label(&version).parse().map_err(ApiError::internal)?;
    answer.headers_mut().insert("x-adapter-version", label);
    Ok(answer)
}

/// Takes a name away. Requests that run on the adapter finish on it; `mode: "wait"` answers only when
/// they have.
pub(crate) async fn unload_adapter(
    State(state): State<Arc<AppState>>,
    request: Request,
) -> Result<Response, AdapterRouteError> {
    let wants_json = wants_json(request.headers());
    let body: UnloadAdapterRequest = parse_json(&read_body(request).await?)?;
    unsupported_unless("expected_version", body.expected_version.as_ref(), &[])?;
    let wait = wait_of(&body)?;
    let name = valid_name(&state, body.lora_name)?;
    let version = state
        .registry
        .unload(&name)
        .ok_or_else(|| ApiError::NotFound(format!("The lora adapter '{name}' cannot be found.")))?;
    state.set_detached(&name, true);
    tracing::info!(adapter = name, version = version.version, "adapter unloaded");
    let message = format!("Success: LoRA adapter '{name}' removed successfully.");
    let answer = success(message, wants_json, &version);
    if let Some(limit) = wait {
        wait_until_unused(version, limit).await?;
    }
    Ok(answer)
}

/// An error in the shape of these two routes: OpenAI's, and beside it the older top-level fields, which
/// some controllers read.
pub(crate) struct AdapterRouteError(ApiError);

impl<E: Into<ApiError>> From<E> for AdapterRouteError {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

impl IntoResponse for AdapterRouteError {
    fn into_response(self) -> Response {
        let status = self.0.status();
        let kind = match status.as_u16() {
            400 => "InvalidUserInput",
            404 => "NotFoundError",
            422 => "InvalidAdapter",
            code if code < 500 => "InvalidRequest",
            _ => "ServerError",
        };
        let inner = self.0.body();
        let error = json!({
            "message": inner["error"]["message"],
            "type": kind,
            "param": inner["error"]["param"],
            "code": status.as_u16(),
            "reason": inner["error"]["code"],
        });
        let body = json!({
            "object": "error",
            "message": error["message"],
            "type": kind,
            "code": status.as_u16(),
            "error": error,
        });
        self.0.response_with(body)
    }
}

fn load(state: &AppState, body: LoadAdapterRequest) -> Result<Arc<AdapterVersion>, ApiError> {
    refuse_unsupported(&body)?;
    let name = valid_name(state, body.lora_name)?;
    refuse_taken(state, &name)?;
    let path = body.lora_path.filter(|path| !path.is_empty());
    let path = path.ok_or_else(|| ApiError::invalid("lora_path", "`lora_path` is required"))?;
    let dir = state.config.adapter_roots.admit(&path)?;
    let started = Instant::now();
    let (version, is_new) = state
        .registry
        .load(&name, &dir, body.load_inplace.unwrap_or(false))
        .inspect_err(|error| {
            telemetry::adapter_load_failed(error.reason());
            tracing::warn!(adapter = name, "adapter refused: {error}");
        })?;
    state.set_detached(&name, false);
    telemetry::adapter_loaded(started.elapsed().as_secs_f64());
    tracing::info!(adapter = name, version = version.version, is_new, "adapter loaded");
    Ok(version)
}

fn refuse_unsupported(body: &LoadAdapterRequest) -> Result<(), ApiError> {
    if body.is_3d_lora_weight == Some(true) {
        return Err(ApiError::unsupported("is_3d_lora_weight"));
    }
    unsupported_unless("expected_version", body.expected_version.as_ref(), &[])?;
    unsupported_unless("sha256", body.sha256.as_ref(), &[])?;
    unsupported_unless("revision", body.revision.as_ref(), &[])?;
    unsupported_unless("scale", body.scale.as_ref(), &[json!(1), json!(1.0)])?;
    unsupported_unless("activate", body.activate.as_ref(), &[json!(true)])?;
    unsupported_unless("pin", body.pin.as_ref(), &[json!(false)])?;
    unsupported_unless("dry_run", body.dry_run.as_ref(), &[json!(false)])
}

/// A job's model is what the job made, and an alias leads where it was pointed.
fn refuse_taken(state: &AppState, name: &str) -> Result<(), ApiError> {
    let Ok(service) = state.jobs() else { return Ok(()) };
    let what = match service.find_model(name)? {
        Some(Model::Tuned(_)) => "is the name of a fine-tuned model",
        Some(Model::Adapter(adapter)) if adapter == name => return Ok(()),
        None => return Ok(()),
        Some(Model::Base | Model::Adapter(_)) => "is an alias",
    };
    Err(ApiError::invalid("lora_name", format!("`lora_name` {what}")))
}

fn valid_name(state: &AppState, name: Option<String>) -> Result<String, ApiError> {
    let name = name.filter(|name| !name.is_empty());
    let name = name.ok_or_else(|| ApiError::invalid("lora_name", "`lora_name` is required"))?;
    let wrong = |what: &str| Err(ApiError::invalid("lora_name", format!("`lora_name` {what}")));
    if name == state.config.model_name {
        return wrong("is the name of the base model");
    }
    if !is_adapter_name(&name) {
        return wrong(
            "must consist of letters, digits and `._:/-`, begin with a letter or digit, and have at \
             most 256 bytes",
        );
    }
    Ok(name)
}

/// How long to wait, if at all.
fn wait_of(body: &UnloadAdapterRequest) -> Result<Option<Duration>, ApiError> {
    let seconds = body.timeout_s.unwrap_or(30.0);
    if !(0.0..=MAX_WAIT_SECONDS).contains(&seconds) {
        let message = format!("`timeout_s` must be 0 to {MAX_WAIT_SECONDS}, not {seconds}");
        return Err(ApiError::invalid("timeout_s", message));
    }
    match body.mode.as_deref() {
        None | Some("detach") => Ok(None),
        Some("wait") => Ok(Some(Duration::from_secs_f64(seconds))),
        Some("abort") => Err(ApiError::unsupported("mode")),
        Some(mode) => {
            let message = format!("`mode` must be `detach` or `wait`, not `{mode}`");
            Err(ApiError::invalid("mode", message))
        }
    }
}

async fn wait_until_unused(version: Arc<AdapterVersion>, limit: Duration) -> Result<(), ApiError> {
    let deadline = Instant::now() + limit;
    // This function's own reference is the last one when every request has let go.
    while Arc::strong_count(&version) > 1 {
        if Instant::now() >= deadline {
            let message = format!("'{}' is unloaded, but requests still run on it", version.name);
            return Err(ApiError::Timeout(message));
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

fn success(message: String, wants_json: bool, version: &AdapterVersion) -> Response {
    if !wants_json {
        return message.into_response();
    }
    Json(json!({
        "message": message,
        "name": version.name,
        "version": version.version,
        "sha256": version.adapter.digest(),
        "lora_dtype": version.adapter.dtype(),
        "path": version.path.display().to_string(),
    }))
    .into_response()
}

fn wants_json(headers: &HeaderMap) -> bool {
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok());
    accept.is_some_and(|value| value.contains("application/json"))
}

//! `/v1/fine_tuning/alpha/graders/run` and `/validate`: one grader, tried out.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{Request, State},
    routing::post,
};
use serde_json::{Value, json};

use super::{
    AppState,
    blocking::blocking,
    body::{parse_json, read_body},
    error::ApiError,
    resolve::resolve_model,
    types::evals::{GraderRequest, grader_result},
};
use crate::eval::grader::{Context, Grader};
use crate::jobs::{JobsError, check_graders};

/// The routes of graders.
pub(crate) fn routes() -> Router<Arc<AppState>> {
    Router::new()
        .route("/v1/fine_tuning/alpha/graders/run", post(run_grader))
        .route("/v1/fine_tuning/alpha/graders/validate", post(validate_grader))
}

/// Scores one answer.
async fn run_grader(
    State(state): State<Arc<AppState>>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let service = Arc::clone(state.jobs()?);
    let _in_flight = state.admit()?;
    let wire: GraderRequest = parse_json(&read_body(request).await?)?;
    let result = blocking(move || {
        let grader = checked_grader(&state, wire.grader.as_ref())?;
        let text = wire.model_sample;
        let text =
            text.ok_or_else(|| ApiError::invalid("model_sample", "`model_sample` is required"))?;
        let item = wire.item.unwrap_or_else(|| json!({}));
        if !item.is_object() {
            return Err(ApiError::invalid("item", "`item` must be an object"));
        }
        let run = service.run_grader(&grader, &Context::of_answer(item, &text));
        Ok(grader_result(&grader, &run))
    });
    Ok(Json(result.await?))
}

/// Says whether a grader could be used.
async fn validate_grader(
    State(state): State<Arc<AppState>>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    state.jobs()?;
    let wire: GraderRequest = parse_json(&read_body(request).await?)?;
    let answer = blocking(move || {
        checked_grader(&state, wire.grader.as_ref())?;
        Ok::<_, ApiError>(json!({"grader": wire.grader}))
    });
    Ok(Json(answer.await?))
}

fn checked_grader(state: &AppState, grader: Option<&Value>) -> Result<Grader, ApiError> {
    let grader = grader.ok_or_else(|| ApiError::invalid("grader", "`grader` is required"))?;
    let grader = Grader::parse(grader, "grader").map_err(JobsError::from)?;
    check_usable(state, std::slice::from_ref(&grader), |_| "grader.type".to_owned())?;
    Ok(grader)
}

/// Whether this server has what the graders need: Python, and the models that they ask. May read
/// adapters' files.
pub(crate) fn check_usable(
    state: &AppState,
    graders: &[Grader],
    param: impl Fn(usize) -> String,
) -> Result<(), ApiError> {
    check_graders(state.jobs()?, graders, param)?;
    for model in graders.iter().flat_map(Grader::models) {
        resolve_model(state, model)?;
    }
    Ok(())
}

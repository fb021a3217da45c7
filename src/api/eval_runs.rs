//! `/v1/evals/{id}/runs`: runs of evaluations, and what became of each row.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{Path, RawQuery, Request, State},
    routing::{get, post},
};
use serde_json::{Value, json};

use super::{
    AppState,
    blocking::{blocking, with_service},
    body::{parse_json, read_body},
    error::ApiError,
    evals::Paging,
    graders::check_usable,
    resolve::resolve_model,
    types::evals::{PageObject, output_object, run_object},
};
use crate::jobs::{EvalOutput, EvalRun, JobsError, NewRun, Page, Service};

/// The routes of runs.
pub(super) fn routes() -> Router<Arc<AppState>> {
    let one_run = get(get_run).post(cancel_run).delete(delete_run);
    Router::new()
        .route("/v1/evals/{id}/runs", get(list_runs).post(create_run))
        .route("/v1/evals/{id}/runs/{run}", one_run)
        .route("/v1/evals/{id}/runs/{run}/cancel", post(cancel_run))
        .route("/v1/evals/{id}/runs/{run}/output_items", get(list_outputs))
        .route("/v1/evals/{id}/runs/{run}/output_items/{item}", get(get_output))
}

/// Queues a run. It is on disk when this answers.
async fn create_run(
    State(state): State<Arc<AppState>>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let service = Arc::clone(state.jobs()?);
    let _in_flight = state.admit()?;
    let body = read_body(request).await?;
    let run = blocking(move || {
        let eval = service.eval(&id)?;
        let new = NewRun::parse(&service, &eval, &parse_json(&body)?)?;
        if let Some(model) = new.model() {
            resolve_model(&state, model)?;
        }
        check_usable(&state, &eval.graders()?, |index| format!("testing_criteria[{index}].type"))?;
        shown(&service, &service.create_eval_run(&eval, new)?).map_err(ApiError::from)
    });
    Ok(Json(run.await?))
}

/// Oldest first, unless asked otherwise; `status` keeps those in that state.
async fn list_runs(
    State(state): State<Arc<AppState>>,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
) -> Result<Json<PageObject>, ApiError> {
    let paging = Paging::parse(query.as_deref())?;
    let page = with_service(&state, move |service| {
        service.eval(&id)?;
        let status = paging.pairs.get("status");
        let wanted = |run: &EvalRun| status.is_none_or(|status| run.status.name() == status);
        let page: Page<EvalRun> = service.store().list(&paging.query(&id), wanted)?;
        let runs: Result<Vec<Value>, JobsError> =
            page.records.iter().map(|run| shown(service, run)).collect();
        Ok::<_, JobsError>(PageObject::new(runs?, page.has_more))
    });
    Ok(Json(page.await?))
}

async fn get_run(
    State(state): State<Arc<AppState>>,
    Path((id, run)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    let run = with_service(&state, move |service| shown(service, &service.eval_run(&id, &run)?));
    Ok(Json(run.await?))
}

/// Ends a run. OpenAI's older clients post to the run itself, the newer ones to its `cancel`; without a
/// body.
async fn cancel_run(
    State(state): State<Arc<AppState>>,
    Path((id, run)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    let run =
        with_service(&state, move |service| shown(service, &service.cancel_eval_run(&id, &run)?));
    Ok(Json(run.await?))
}

async fn delete_run(
    State(state): State<Arc<AppState>>,
    Path((id, run)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    let answer = json!({"object": "eval.run.deleted", "deleted": true, "run_id": run});
    with_service(&state, move |service| service.delete_eval_run(&id, &run)).await?;
    Ok(Json(answer))
}

/// In the order in which they were done; `status` keeps those with that outcome.
async fn list_outputs(
    State(state): State<Arc<AppState>>,
    Path((id, run)): Path<(String, String)>,
    RawQuery(query): RawQuery,
) -> Result<Json<PageObject>, ApiError> {
    let paging = Paging::parse(query.as_deref())?;
    let page = with_service(&state, move |service| {
        service.eval_run(&id, &run)?;
        let status = paging.pairs.get("status");
        // OpenAI's filter says `failed` where its objects say `fail`.
        let wanted = |output: &EvalOutput| {
            let name = output.outcome.name();
            status.is_none_or(|status| status == name || status.strip_suffix("ed") == Some(name))
        };
        let page: Page<EvalOutput> = service.store().list(&paging.query(&run), wanted)?;
        let outputs = page.records.iter().map(output_object).collect();
        Ok::<_, JobsError>(PageObject::new(outputs, page.has_more))
    });
    Ok(Json(page.await?))
}

async fn get_output(
    State(state): State<Arc<AppState>>,
    Path((id, run, item)): Path<(String, String, String)>,
) -> Result<Json<Value>, ApiError> {
    let output = with_service(&state, move |service| {
        service.eval_run(&id, &run)?;
        let output = service.store().get::<EvalOutput>(&item)?;
        let output = output.filter(|output| output.run_id == run);
        let what = "output item";
        output.ok_or(JobsError::NotFound { what, id: item, param: "output_item_id" })
    });
    Ok(Json(output_object(&output.await?)))
}

/// A run with the rows that its client gave.
fn shown(service: &Service, run: &EvalRun) -> Result<Value, JobsError> {
    Ok(run_object(run, service.eval_rows(&run.id)?))
}

//! `/v1/fine_tuning/jobs`: create, list, retrieve, cancel, pause, resume.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Extension, Json, Router,
    extract::{Path, RawQuery, Request, State},
    routing::{delete, get, post},
};

use super::{
    AppState,
    azure_form::AzureForm,
    blocking::{blocking, with_service},
    body::{parse_json, read_body},
    checkpoints,
    error::ApiError,
    job_events,
    job_request::{job_request, refuse_unknown},
    query::QueryPairs,
    resolve::resolve_model,
    types::fine_tuning::{CreateJobRequest, JobObject, ListObject},
};
use crate::jobs::{Job, JobsError, Model, Order, Page, Query, Service, Wish, model_not_available};

/// Objects on a page, unless asked otherwise.
pub(crate) const DEFAULT_LIMIT: usize = 20;
/// Most objects on a page.
pub(crate) const MAX_LIMIT: usize = 100;

/// How long an answer waits until the runner has done what was asked of a job at work. Clients print
/// the status of the answer.
const SETTLE_LIMIT: Duration = Duration::from_secs(3);
/// How often it looks.
const SETTLE_POLL: Duration = Duration::from_millis(50);

/// Whether the request came in Azure's form: its answers show "auto" in their own way.
type Form = Option<Extension<AzureForm>>;

fn azure(form: Form) -> Option<AzureForm> {
    form.map(|Extension(form)| form)
}

/// The routes of jobs.
pub(crate) fn routes() -> Router<Arc<AppState>> {
    let permissions = get(checkpoints::list_permissions).post(checkpoints::create_permissions);
    Router::new()
        .route("/v1/fine_tuning/jobs", get(list_jobs).post(create_job))
        .route("/v1/fine_tuning/jobs/{id}", get(get_job))
        .route("/v1/fine_tuning/jobs/{id}/cancel", post(cancel_job))
        .route("/v1/fine_tuning/jobs/{id}/pause", post(pause_job))
        .route("/v1/fine_tuning/jobs/{id}/resume", post(resume_job))
        .route("/v1/fine_tuning/jobs/{id}/events", get(job_events::list_events))
        .route("/v1/fine_tuning/jobs/{id}/checkpoints", get(checkpoints::list_checkpoints))
        .route("/v1/fine_tuning/checkpoints/{id}/permissions", permissions)
        .route(
            "/v1/fine_tuning/checkpoints/{id}/permissions/{permission}",
            delete(checkpoints::delete_permission),
        )
}

/// Makes a job. It is on disk when this answers.
async fn create_job(
    State(state): State<Arc<AppState>>,
    form: Form,
    request: Request,
) -> Result<Json<JobObject>, ApiError> {
    let service = Arc::clone(state.jobs()?);
    let _in_flight = state.admit()?;
    let body = read_body(request).await?;
    let job = blocking(move || {
        let wire: CreateJobRequest = parse_json(&body)?;
        refuse_unknown(&wire)?;
        let parent = match &wire.model {
            Some(model) if !model.is_empty() => parent_of(&state, &service, model)?,
            _ => return Err(ApiError::invalid("model", "`model` is required")),
        };
        let job = service.create_job(job_request(wire, parent, service.config())?)?;
        Ok(JobObject::new(job, &service.config().organization, azure(form)))
    });
    Ok(Json(job.await?))
}

/// The id of what a job on `model` starts from: `None` is the base.
fn parent_of(state: &AppState, service: &Service, model: &str) -> Result<Option<String>, ApiError> {
    let not_available = || ApiError::from(model_not_available(model));
    match service.find_model(model)? {
        Some(Model::Base) => return Ok(None),
        Some(Model::Tuned(record)) => return Ok(Some(record.id)),
        Some(Model::Adapter(_)) | None => {}
    }
    // A version may no longer be what its folder holds.
    if model.contains('@') {
        return Err(not_available());
    }
    // Loaded here if need be: the runner takes its folder from the registry.
    let version = resolve_model(state, model).map_err(|error| {
        if matches!(error, ApiError::ModelNotFound(_)) { not_available() } else { error }
    })?;
    Ok(version.map(|version| version.name.clone()))
}

/// Newest first; `metadata[key]=value` keeps those that have it, `metadata=null` those without any.
async fn list_jobs(
    State(state): State<Arc<AppState>>,
    form: Form,
    RawQuery(query): RawQuery,
) -> Result<Json<ListObject<JobObject>>, ApiError> {
    let query = QueryPairs::parse(query.as_deref());
    let limit = query.limit(DEFAULT_LIMIT, MAX_LIMIT)?;
    let list = with_service(&state, move |service| {
        let wanted: Vec<(&str, &str)> = query.members("metadata").collect();
        let wants_none = query.get("metadata") == Some("null");
        let after = query.get("after");
        let page = Query { parent: "", after, limit, order: Order::Descending };
        let page: Page<Job> = service.store().list(&page, |job: &Job| {
            let empty = BTreeMap::new();
            let metadata = job.metadata.as_ref().unwrap_or(&empty);
            let has = |(key, value): &(&str, &str)| {
                metadata.get(*key).is_some_and(|found| found == value)
            };
            wanted.iter().all(has) && (!wants_none || metadata.is_empty())
        })?;
        let organization = &service.config().organization;
        let jobs = page.records.into_iter();
        Ok::<_, JobsError>(ListObject {
            object: "list",
            data: jobs.map(|job| JobObject::new(job, organization, azure(form))).collect(),
            has_more: page.has_more,
        })
    });
    Ok(Json(list.await?))
}

async fn get_job(
    State(state): State<Arc<AppState>>,
    form: Form,
    Path(id): Path<String>,
) -> Result<Json<JobObject>, ApiError> {
    let job = with_service(&state, move |service| {
        let organization = &service.config().organization;
        service.job(&id).map(|job| JobObject::new(job, organization, azure(form)))
    });
    Ok(Json(job.await?))
}

async fn cancel_job(
    State(state): State<Arc<AppState>>,
    form: Form,
    Path(id): Path<String>,
) -> Result<Json<JobObject>, ApiError> {
    ask(&state, id, form, Wish::Cancel).await
}

async fn pause_job(
    State(state): State<Arc<AppState>>,
    form: Form,
    Path(id): Path<String>,
) -> Result<Json<JobObject>, ApiError> {
    ask(&state, id, form, Wish::Pause).await
}

async fn resume_job(
    State(state): State<Arc<AppState>>,
    form: Form,
    Path(id): Path<String>,
) -> Result<Json<JobObject>, ApiError> {
    ask(&state, id, form, Wish::Resume).await
}

/// Clients send an empty body here, declared as JSON or as nothing: it is not read.
async fn ask(
    state: &AppState,
    id: String,
    form: Form,
    wish: Wish,
) -> Result<Json<JobObject>, ApiError> {
    let started = Instant::now();
    let asked = id.clone();
    let mut job = with_service(state, move |service| service.ask_job(&asked, wish)).await?;
    let is_settled =
        |job: &Job| job.request.is_none() || job.status.is_final() || wish == Wish::Resume;
    while !is_settled(&job) && started.elapsed() < SETTLE_LIMIT && !state.is_draining() {
        tokio::time::sleep(SETTLE_POLL).await;
        let asked = id.clone();
        job = with_service(state, move |service| service.job(&asked)).await?;
    }
    let organization = &state.jobs()?.config().organization;
    Ok(Json(JobObject::new(job, organization, azure(form))))
}

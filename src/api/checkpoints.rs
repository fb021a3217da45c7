//! `/v1/fine_tuning/jobs/{id}/checkpoints`, and the permissions of checkpoints: there are no projects
//! here to share between, so these are answered and change nothing.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, RawQuery, Request, State},
};
use serde_json::{Value, json};

use super::{
    AppState,
    blocking::with_service,
    body::{parse_json, read_body},
    error::ApiError,
    fine_tuning::MAX_LIMIT,
    query::QueryPairs,
    types::fine_tuning::{
        CheckpointObject, CreatePermissionsRequest, EndedListObject, PermissionObject,
    },
};
use crate::jobs::{
    Checkpoint, JobsError, Model, Order, Page, Query, Service, new_id, unix_seconds,
};

/// Checkpoints on a page, unless asked otherwise.
const DEFAULT_LIMIT: usize = 10;

/// Newest first.
pub(crate) async fn list_checkpoints(
    State(state): State<Arc<AppState>>,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
) -> Result<Json<EndedListObject<CheckpointObject>>, ApiError> {
    let query = QueryPairs::parse(query.as_deref());
    let limit = query.limit(DEFAULT_LIMIT, MAX_LIMIT)?;
    let page = with_service(&state, move |service| {
        service.job(&id)?;
        let after = query.get("after");
        let page = Query { parent: &id, after, limit, order: Order::Descending };
        let page: Page<Checkpoint> = service.store().list(&page, |_| true)?;
        Ok::<_, JobsError>(page)
    });
    let page = page.await?;
    Ok(Json(EndedListObject {
        object: "list",
        first_id: page.records.first().map(|checkpoint| checkpoint.id.clone()),
        last_id: page.records.last().map(|checkpoint| checkpoint.id.clone()),
        data: page.records.into_iter().map(CheckpointObject::from).collect(),
        has_more: page.has_more,
    }))
}

/// Nobody but this server's clients has any.
pub(crate) async fn list_permissions(
    State(state): State<Arc<AppState>>,
    Path(id): Path<String>,
) -> Result<Json<EndedListObject<PermissionObject>>, ApiError> {
    with_service(&state, move |service| check_checkpoint(service, &id)).await?;
    Ok(Json(permissions(Vec::new())))
}

/// Echoes what would have been made.
pub(crate) async fn create_permissions(
    State(state): State<Arc<AppState>>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Json<EndedListObject<PermissionObject>>, ApiError> {
    let body: CreatePermissionsRequest = parse_json(&read_body(request).await?)?;
    let missing = || ApiError::invalid("project_ids", "`project_ids` is required");
    let projects = body.project_ids.ok_or_else(missing)?;
    with_service(&state, move |service| check_checkpoint(service, &id)).await?;
    let permission = |project_id| PermissionObject {
        object: "checkpoint.permission",
        id: new_id("cp_"),
        created_at: unix_seconds(),
        project_id,
    };
    Ok(Json(permissions(projects.into_iter().map(permission).collect())))
}

pub(crate) async fn delete_permission(
    State(state): State<Arc<AppState>>,
    Path((id, permission)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    with_service(&state, move |service| check_checkpoint(service, &id)).await?;
    Ok(Json(json!({"id": permission, "object": "checkpoint.permission", "deleted": true})))
}

fn permissions(data: Vec<PermissionObject>) -> EndedListObject<PermissionObject> {
    EndedListObject {
        object: "list",
        first_id: data.first().map(|permission| permission.id.clone()),
        last_id: data.last().map(|permission| permission.id.clone()),
        data,
        has_more: false,
    }
}

fn check_checkpoint(service: &Service, id: &str) -> Result<(), JobsError> {
    match service.find_model(id)? {
        Some(Model::Tuned(_)) => Ok(()),
        Some(Model::Base | Model::Adapter(_)) | None => Err(JobsError::NotFound {
            what: "checkpoint",
            id: id.to_owned(),
            param: "fine_tuned_model_checkpoint",
        }),
    }
}

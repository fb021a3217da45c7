//! `/v1/aliases`: names that stand for a model, and are moved to another one without a pause.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{Path, Request, State},
    routing::get,
};
use serde_json::{Value, json};

use super::{
    AppState,
    blocking::{blocking, with_service},
    body::{parse_json, read_body},
    error::ApiError,
    resolve::resolve_model,
    types::models::{AliasList, AliasObject, AliasRequest},
};
use crate::jobs::{Alias, JobsError, Model};

/// The routes of aliases.
pub(crate) fn routes() -> Router<Arc<AppState>> {
    Router::new()
        .route("/v1/aliases", get(list_aliases))
        .route("/v1/aliases/{name}", get(get_alias).put(put_alias).delete(delete_alias))
}

async fn list_aliases(State(state): State<Arc<AppState>>) -> Result<Json<AliasList>, ApiError> {
    let aliases = with_service(&state, |service| service.aliases()).await?;
    let data = aliases.into_iter().map(AliasObject::from).collect();
    Ok(Json(AliasList { object: "list", data, has_more: false }))
}

async fn get_alias(
    State(state): State<Arc<AppState>>,
    Path(name): Path<String>,
) -> Result<Json<AliasObject>, ApiError> {
    let alias = with_service(&state, move |service| service.alias(&name)).await?;
    Ok(Json(alias.into()))
}

async fn put_alias(
    State(state): State<Arc<AppState>>,
    Path(name): Path<String>,
    request: Request,
) -> Result<Json<AliasObject>, ApiError> {
    state.jobs()?;
    let body: AliasRequest = parse_json(&read_body(request).await?)?;
    let model = body.model.filter(|model| !model.is_empty());
    let model = model.ok_or_else(|| ApiError::invalid("model", "`model` is required"))?;
    let (alias, _) = point_alias(state, name, model, "model", Value::Null).await?;
    Ok(Json(alias.into()))
}

async fn delete_alias(
    State(state): State<Arc<AppState>>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let deleted = json!({"name": name, "object": "alias", "deleted": true});
    with_service(&state, move |service| service.delete_alias(&name)).await?;
    Ok(Json(deleted))
}

/// Makes or moves an alias, to a model that has been seen to be there and usable; whether it is new.
/// `param` is where the request names the model.
pub(crate) async fn point_alias(
    state: Arc<AppState>,
    name: String,
    model: String,
    param: &'static str,
    sku: Value,
) -> Result<(Alias, bool), ApiError> {
    blocking(move || {
        let service = state.jobs()?;
        let missing =
            || ApiError::invalid(param, format!("`{param}`: the model `{model}` does not exist"));
        // Loads it, so that whoever uses the alias finds it ready.
        let version = resolve_model(&state, &model).map_err(|error| match error {
            ApiError::ModelNotFound(_) => missing(),
            other => other,
        })?;
        if model.contains('@') {
            let message = format!("`{param}`: an alias stands for a name, not for a version of it");
            return Err(ApiError::invalid(param, message));
        }
        if state.config.adapter_roots.find(&name).is_some() {
            let message = format!("`{name}` cannot be an alias: it is the name of an adapter");
            return Err(ApiError::invalid("name", message));
        }
        let target = match version {
            None => Model::Base,
            Some(version) => match service.find_model(&version.name)? {
                Some(found) => found,
                None => return Err(missing()),
            },
        };
        let pointed = service.put_alias(&name, &target, sku).map_err(|error| match error {
            JobsError::NotFound { .. } => missing(),
            other => other.into(),
        })?;
        let (alias, _) = &pointed;
        tracing::info!(alias = alias.name, model = alias.model, "alias set");
        Ok(pointed)
    })
    .await
}

//! Azure's management paths for deployments of an account, which are aliases here. Subscription,
//! resource group and account are the client's own business.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{Path, Request, State},
    http::{StatusCode, Uri},
    response::{IntoResponse, Response},
    routing::get,
};
use serde_json::{Value, json};

use super::{
    AppState,
    aliases::point_alias,
    blocking::with_service,
    body::{parse_json, read_body},
    error::ApiError,
    types::models::DeploymentRequest,
};
use crate::jobs::{Alias, JobsError};

/// The folder of an account's deployments; see [`super::ROUTES`].
pub(crate) const PATH: &str = "/subscriptions/{subscription}/resourceGroups/{group}/providers/\
                    Microsoft.CognitiveServices/accounts/{account}/deployments";

/// One of them.
pub(crate) const PATH_OF_ONE: &str = "/subscriptions/{subscription}/resourceGroups/{group}/providers/\
     Microsoft.CognitiveServices/accounts/{account}/deployments/{name}";

/// Where a request names the model.
const MODEL_PARAM: &str = "properties.model.name";

/// Subscription, resource group, account, and the deployment's name.
type Place = Path<(String, String, String, String)>;

/// The routes of deployments.
pub(crate) fn routes() -> Router<Arc<AppState>> {
    let one = get(get_deployment).put(put_deployment).delete(delete_deployment);
    Router::new().route(PATH, get(list_deployments)).route(PATH_OF_ONE, one)
}

async fn list_deployments(
    State(state): State<Arc<AppState>>,
    uri: Uri,
) -> Result<Json<Value>, ApiError> {
    let aliases = with_service(&state, |service| service.aliases()).await?;
    let folder = uri.path().trim_end_matches('/');
    let list: Vec<Value> = aliases
        .into_iter()
        .map(|alias| deployment(&format!("{folder}/{}", alias.name), alias))
        .collect();
    Ok(Json(json!({"value": list})))
}

async fn get_deployment(
    State(state): State<Arc<AppState>>,
    uri: Uri,
    Path((_, _, _, name)): Place,
) -> Result<Json<Value>, ApiError> {
    let alias = with_service(&state, move |service| service.alias(&name)).await?;
    Ok(Json(deployment(uri.path(), alias)))
}

/// 201 for a new one, 200 for one that was moved. It serves when this answers.
async fn put_deployment(
    State(state): State<Arc<AppState>>,
    uri: Uri,
    Path((_, _, _, name)): Place,
    request: Request,
) -> Result<Response, ApiError> {
    state.jobs()?;
    let body: DeploymentRequest = parse_json(&read_body(request).await?)?;
    let model = &body.properties["model"]["name"];
    let model = model.as_str().filter(|model| !model.is_empty());
    let missing = || ApiError::invalid(MODEL_PARAM, format!("`{MODEL_PARAM}` is required"));
    let model = model.ok_or_else(missing)?.to_owned();
    let (alias, is_new) = point_alias(state, name, model, MODEL_PARAM, body.sku).await?;
    let status = if is_new { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, Json(deployment(uri.path(), alias))).into_response())
}

/// 204 for one that is not there, as in all of Azure's management.
async fn delete_deployment(
    State(state): State<Arc<AppState>>,
    Path((_, _, _, name)): Place,
) -> Result<StatusCode, ApiError> {
    with_service(&state, move |service| match service.delete_alias(&name) {
        Ok(()) => Ok(StatusCode::OK),
        Err(JobsError::NotFound { .. }) => Ok(StatusCode::NO_CONTENT),
        Err(error) => Err(error),
    })
    .await
}

fn deployment(id: &str, alias: Alias) -> Value {
    let sku = match alias.sku {
        Value::Null => json!({"name": "standard", "capacity": 1}),
        sku => sku,
    };
    json!({
        "id": id,
        "name": alias.name,
        "type": "Microsoft.CognitiveServices/accounts/deployments",
        "sku": sku,
        "properties": {
            "model": {"format": "OpenAI", "name": alias.model, "version": "1"},
            "provisioningState": "Succeeded",
        },
    })
}

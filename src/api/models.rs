//! `/v1/models`: the base model, the adapters that are loaded, and the models that jobs made.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State},
};
use serde_json::{Value, json};

use super::{
    AppState,
    blocking::blocking,
    error::ApiError,
    types::models::{ModelCard, ModelList},
};
use crate::adapters::AdapterVersion;
use crate::jobs::{Model, ModelRecord, Service};

/// Who made what no job of this server made.
const OWNER: &str = "tunesmith";

/// The base first, then the adapters, then what jobs made. Checkpoints answer, but are not listed.
pub(crate) async fn list_models(
    State(state): State<Arc<AppState>>,
) -> Result<Json<ModelList>, ApiError> {
    let list = blocking(move || {
        let tuned = match state.jobs() {
            Ok(service) => service.models()?,
            Err(_) => Vec::new(),
        };
        let mut data = vec![base_card(&state)];
        for version in state.registry.list() {
            if !tuned.iter().any(|record| record.id == version.name) {
                data.push(adapter_card(&state, &version));
            }
        }
        for record in tuned.iter().filter(|record| !record.is_checkpoint) {
            data.push(tuned_card(&state, state.jobs()?, record));
        }
        Ok::<_, ApiError>(ModelList { object: "list", data })
    });
    Ok(Json(list.await?))
}

/// One of them, by any of its names. Ids may hold slashes and colons.
pub(crate) async fn get_model(
    State(state): State<Arc<AppState>>,
    Path(id): Path<String>,
) -> Result<Json<ModelCard>, ApiError> {
    let card = blocking(move || card_of(&state, &id)?.ok_or(ApiError::ModelNotFound(id)));
    Ok(Json(card.await?))
}

/// Takes away what a job made. Requests that run on it finish.
pub(crate) async fn delete_model(
    State(state): State<Arc<AppState>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let deleted = blocking(move || {
        let insufficient = |what: &str| {
            let message =
                format!("You have insufficient permissions for this operation: `{id}` is {what}");
            Err(ApiError::Forbidden(message))
        };
        if id == state.config.model_name {
            return insufficient("the base model");
        }
        let Ok(service) = state.jobs() else {
            return match state.registry.get(&id) {
                Some(_) => insufficient("an adapter that no job made; unload it instead"),
                None => Err(ApiError::ModelNotFound(id)),
            };
        };
        if let Ok(alias) = service.alias(&id) {
            let model = alias.model;
            let message = format!("`{id}` is a deployment of `{model}`: delete the deployment");
            return Err(ApiError::Conflict(message));
        }
        match service.find_model(&id)? {
            Some(Model::Tuned(record)) => {
                service.delete_model(&record.id)?;
                Ok(json!({"id": id, "object": "model", "deleted": true}))
            }
            Some(Model::Base | Model::Adapter(_)) => {
                insufficient("an adapter that no job made; unload it instead")
            }
            None => Err(ApiError::ModelNotFound(id)),
        }
    });
    Ok(Json(deleted.await?))
}

fn card_of(state: &AppState, id: &str) -> Result<Option<ModelCard>, ApiError> {
    if id == state.config.model_name {
        return Ok(Some(base_card(state)));
    }
    if let Ok(service) = state.jobs() {
        // A name of another form, or an alias, shows what it leads to.
        let card = match service.find_model(id)? {
            Some(Model::Base) => {
                let parent = Some(state.config.model_name.clone());
                Some(ModelCard { id: id.to_owned(), parent, ..base_card(state) })
            }
            Some(Model::Tuned(record)) => {
                let card = tuned_card(state, service, &record);
                let parent = if record.id == id { card.parent } else { Some(record.id) };
                Some(ModelCard { id: id.to_owned(), parent, ..card })
            }
            Some(Model::Adapter(name)) => state.registry.get(&name).map(|version| {
                let card = adapter_card(state, &version);
                let parent = if name == id { card.parent } else { Some(name) };
                ModelCard { id: id.to_owned(), parent, ..card }
            }),
            None => None,
        };
        return Ok(card);
    }
    Ok(state.registry.get(id).map(|version| adapter_card(state, &version)))
}

fn base_card(state: &AppState) -> ModelCard {
    ModelCard {
        id: state.config.model_name.clone(),
        object: "model",
        created: state.started_at,
        owned_by: OWNER.to_owned(),
        shutdown_date: None,
        root: state.config.model_root.clone(),
        parent: None,
        max_model_len: state.engine.config().max_sequence_len(),
    }
}

fn adapter_card(state: &AppState, version: &AdapterVersion) -> ModelCard {
    ModelCard {
        id: version.name.clone(),
        created: version.loaded_at,
        root: version.path.display().to_string(),
        parent: Some(state.config.model_name.clone()),
        ..base_card(state)
    }
}

fn tuned_card(state: &AppState, service: &Service, record: &ModelRecord) -> ModelCard {
    ModelCard {
        id: record.id.clone(),
        created: record.created_at,
        owned_by: service.config().organization.clone(),
        root: service.path(&record.path).display().to_string(),
        parent: Some(state.config.model_name.clone()),
        ..base_card(state)
    }
}

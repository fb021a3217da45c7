//! `GET /v1/models` and `GET /v1/models/{id}`: the base model and the adapters that are loaded.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State},
};

use super::{
    AppState,
    error::ApiError,
    types::models::{ModelCard, ModelList},
};
use crate::adapters::AdapterVersion;

/// The base first, then the adapters.
pub(crate) async fn list_models(State(state): State<Arc<AppState>>) -> Json<ModelList> {
    let adapters = state.registry.list();
    let mut data = vec![base_card(&state)];
    data.extend(adapters.iter().map(|version| adapter_card(&state, version)));
    Json(ModelList { object: "list", data })
}

/// One of them. Ids may hold slashes and colons.
pub(crate) async fn get_model(
    State(state): State<Arc<AppState>>,
    Path(id): Path<String>,
) -> Result<Json<ModelCard>, ApiError> {
    if id == state.config.model_name {
        return Ok(Json(base_card(&state)));
    }
    match state.registry.get(&id) {
        Some(version) => Ok(Json(adapter_card(&state, &version))),
        None => Err(ApiError::ModelNotFound(id)),
    }
}

fn base_card(state: &AppState) -> ModelCard {
    ModelCard {
        id: state.config.model_name.clone(),
        object: "model",
        created: state.started_at,
        owned_by: "tunesmith",
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

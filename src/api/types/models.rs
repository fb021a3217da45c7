//! Answers of `/v1/models`, and what makes and shows aliases.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::jobs::Alias;

#[derive(Debug, Serialize)]
pub(crate) struct ModelList {
    pub(crate) object: &'static str,
    pub(crate) data: Vec<ModelCard>,
}

#[derive(Debug, Serialize)]
pub(crate) struct ModelCard {
    pub(crate) id: String,
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) owned_by: String,
    /// OpenAI's; nothing is ever switched off here.
    pub(crate) shutdown_date: Option<u64>,
    /// The folder that the weights came from.
    pub(crate) root: String,
    /// The base model's id for an adapter, the model for another name of it, null for the base itself.
    pub(crate) parent: Option<String>,
    pub(crate) max_model_len: usize,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct AliasRequest {
    pub(crate) model: Option<String>,
}

#[derive(Debug, Serialize)]
pub(crate) struct AliasList {
    pub(crate) object: &'static str,
    pub(crate) data: Vec<AliasObject>,
    pub(crate) has_more: bool,
}

#[derive(Debug, Serialize)]
pub(crate) struct AliasObject {
    pub(crate) object: &'static str,
    pub(crate) name: String,
    pub(crate) model: String,
    pub(crate) created_at: u64,
}

impl From<Alias> for AliasObject {
    fn from(alias: Alias) -> Self {
        let Alias { name, model, created_at, sku: _ } = alias;
        Self { object: "alias", name, model, created_at }
    }
}

/// Azure's, as far as it means something here.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct DeploymentRequest {
    pub(crate) sku: Value,
    pub(crate) properties: Value,
}

//! Answers of `/v1/models`.

use serde::Serialize;

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
    pub(crate) owned_by: &'static str,
    /// The folder that the weights came from.
    pub(crate) root: String,
    /// The base model's id for an adapter, null for the base itself.
    pub(crate) parent: Option<String>,
    pub(crate) max_model_len: usize,
}

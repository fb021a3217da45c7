//! The JSON of OpenAI's interface, as plain serde structs. What is valid is decided elsewhere.

pub(crate) mod adapters;
pub(crate) mod chat;
pub(crate) mod evals;
pub(crate) mod files;
pub(crate) mod fine_tuning;
pub(crate) mod models;

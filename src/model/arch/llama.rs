//! Llama (and what shares its shape: SmolLM2, TinyLlama, Llama 3.x).

use super::Architecture;
use crate::model::config::RawConfig;

pub(super) const ARCHITECTURE: Architecture =
    Architecture { model_type: "llama", configure: RawConfig::llama_shaped };

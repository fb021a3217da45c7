//! The families, one file each. A newcomer is a file here and a line in [`ARCHITECTURES`].

mod gemma2;
mod llama;
mod mistral;
mod qwen2;
mod qwen3;

use super::config::{ModelConfig, RawConfig};

/// A family of decoders.
pub struct Architecture {
    /// `model_type` in config.json.
    pub model_type: &'static str,
    /// Reads the family's configuration.
    pub configure: fn(&RawConfig) -> Result<ModelConfig, String>,
}

/// Every family that can be trained and served.
pub const ARCHITECTURES: &[Architecture] = &[
    gemma2::ARCHITECTURE,
    llama::ARCHITECTURE,
    mistral::ARCHITECTURE,
    qwen2::ARCHITECTURE,
    qwen3::ARCHITECTURE,
];

pub(super) fn find(model_type: &str) -> Result<&'static Architecture, String> {
    ARCHITECTURES.iter().find(|architecture| architecture.model_type == model_type).ok_or_else(
        || {
            let known: Vec<_> = ARCHITECTURES.iter().map(|known| known.model_type).collect();
            format!("model_type {model_type:?} is not supported; known are {}", known.join(", "))
        },
    )
}

//! Mistral: Llama's shape without any bias, with a window on all layers.

use super::Architecture;
use crate::model::config::{DEFAULT_WINDOW, ModelConfig, RawConfig};

pub(super) const ARCHITECTURE: Architecture = Architecture { model_type: "mistral", configure };

fn configure(raw: &RawConfig) -> Result<ModelConfig, String> {
    let window = raw.sliding_window.unwrap_or(Some(DEFAULT_WINDOW));
    Ok(ModelConfig {
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        layer_windows: vec![window; raw.num_hidden_layers],
        ..raw.llama_shaped()?
    })
}

//! Qwen2 and Qwen2.5: Llama's shape with a bias on queries, keys and values, and maybe a window on the
//! upper layers.

use super::Architecture;
use crate::model::config::{ModelConfig, RawConfig};

pub(super) const ARCHITECTURE: Architecture = Architecture { model_type: "qwen2", configure };

fn configure(raw: &RawConfig) -> Result<ModelConfig, String> {
    Ok(ModelConfig {
        qkv_bias: true,
        o_bias: false,
        mlp_bias: false,
        layer_windows: raw.qwen_windows()?,
        ..raw.llama_shaped()?
    })
}

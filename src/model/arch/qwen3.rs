//! Qwen3 (dense): Llama's shape with a norm on each head of queries and keys, and maybe a window on the
//! upper layers.

use super::Architecture;
use crate::model::config::{ModelConfig, RawConfig, inverse_square_root};

pub(super) const ARCHITECTURE: Architecture = Architecture { model_type: "qwen3", configure };

/// `head_dim` where config.json is silent; it has nothing to do with the hidden size.
const DEFAULT_HEAD_DIM: usize = 128;

fn configure(raw: &RawConfig) -> Result<ModelConfig, String> {
    let head_dim = raw.head_dim.unwrap_or(DEFAULT_HEAD_DIM);
    Ok(ModelConfig {
        head_dim,
        attention_scale: inverse_square_root(head_dim),
        qk_norm: true,
        mlp_bias: false,
        layer_windows: raw.qwen_windows()?,
        ..raw.llama_shaped()?
    })
}

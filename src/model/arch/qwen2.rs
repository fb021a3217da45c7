//! Qwen2 and Qwen2.5: Llama's shape with a bias on queries, keys and values.

use super::Architecture;
use crate::model::config::{ModelConfig, RawConfig};

pub(super) const ARCHITECTURE: Architecture = Architecture { model_type: "qwen2", configure };

fn configure(raw: &RawConfig) -> Result<ModelConfig, String> {
    if raw.use_sliding_window == Some(true) {
        return Err("use_sliding_window true is not supported".into());
    }
    Ok(ModelConfig { qkv_bias: true, o_bias: false, mlp_bias: false, ..raw.llama_shaped()? })
}

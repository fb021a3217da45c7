//! Gemma 2 (<https://arxiv.org/abs/2408.00118>): a window on every other layer, soft caps on scores and
//! logits, norms before and after each part with weights around zero, GELU in the gate, and embeddings
//! scaled by the root of their width.

use super::Architecture;
use crate::model::config::{DEFAULT_WINDOW, ModelConfig, RawConfig};
use crate::ops::gated_mlp::Activation;

pub(super) const ARCHITECTURE: Architecture = Architecture { model_type: "gemma2", configure };

/// What config.json means where it is silent.
const DEFAULT_HEAD_DIM: usize = 256;
const DEFAULT_QUERY_PRE_ATTN_SCALAR: f64 = 256.0;
const DEFAULT_ATTENTION_CAP: f64 = 50.0;
const DEFAULT_LOGIT_CAP: f64 = 30.0;

#[allow(clippy::cast_precision_loss)]
fn configure(raw: &RawConfig) -> Result<ModelConfig, String> {
    let activation = raw.hidden_activation.as_deref().unwrap_or("gelu_pytorch_tanh");
    if activation != "gelu_pytorch_tanh" {
        return Err(format!("hidden_activation {activation:?} is not supported for gemma2"));
    }
    if raw.use_bidirectional_attention == Some(true) {
        return Err("use_bidirectional_attention true is not supported".into());
    }
    let scalar = raw.query_pre_attn_scalar.unwrap_or(DEFAULT_QUERY_PRE_ATTN_SCALAR);
    if scalar <= 0.0 {
        return Err(format!("query_pre_attn_scalar {scalar} is not positive"));
    }
    let window = raw.sliding_window.unwrap_or(Some(DEFAULT_WINDOW));
    Ok(ModelConfig {
        head_dim: raw.head_dim.unwrap_or(DEFAULT_HEAD_DIM),
        attention_scale: 1.0 / scalar.sqrt(),
        layer_windows: raw.windows(window, |layer| layer % 2 == 0)?,
        attention_soft_cap: raw.attn_logit_softcapping.unwrap_or(Some(DEFAULT_ATTENTION_CAP)),
        logit_soft_cap: raw.final_logit_softcapping.unwrap_or(Some(DEFAULT_LOGIT_CAP)),
        output_norms: true,
        norm_offset: 1.0,
        embedding_scale: (raw.hidden_size as f64).sqrt(),
        activation: Activation::GeluTanh,
        mlp_bias: false,
        tie_word_embeddings: raw.tie_word_embeddings.unwrap_or(true),
        ..raw.llama_shaped()?
    })
}

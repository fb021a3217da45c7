//! The norms of a layer: which there are, and what they are called in a checkpoint.

use candle_core::Tensor;

use super::{ModelConfig, ModelError, weights::Parameters};
use crate::ops::rms_norm::rms_norm;

/// One RMS norm.
pub(super) struct Norm {
    /// Its path below its layer, such as `self_attn.q_norm`.
    pub(super) name: &'static str,
    /// As in the checkpoint.
    pub(super) weight: Tensor,
    /// What is added to it.
    offset: f64,
    eps: f64,
}

impl Norm {
    /// Builds the norm of rows of `size` whose weight is `{prefix}.{name}.weight`.
    pub(super) fn build(
        config: &ModelConfig,
        (prefix, name): (&str, &'static str),
        size: usize,
        parameters: &mut Parameters,
    ) -> Result<Self, ModelError> {
        let weight = parameters.vector(&format!("{prefix}.{name}.weight"), size)?;
        Ok(Self { name, weight, offset: config.norm_offset, eps: config.rms_norm_eps })
    }

    /// `x [rows, size]` -> the same shape.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        if self.offset == 0.0 {
            return Ok(rms_norm(x, &self.weight, self.eps)?);
        }
        Ok(rms_norm(x, &(&self.weight + self.offset)?, self.eps)?)
    }
}

/// The norms of one layer.
pub(super) struct Norms {
    /// Before attention.
    pub(super) attention_input: Norm,
    /// Of each query head.
    pub(super) query: Option<Norm>,
    /// Of each key head.
    pub(super) key: Option<Norm>,
    /// Behind attention, before its residual.
    pub(super) attention_output: Option<Norm>,
    /// Before the feed-forward.
    pub(super) mlp_input: Norm,
    /// Behind the feed-forward, before its residual.
    pub(super) mlp_output: Option<Norm>,
}

impl Norms {
    pub(super) fn build(
        config: &ModelConfig,
        prefix: &str,
        parameters: &mut Parameters,
    ) -> Result<Self, ModelError> {
        let (hidden, head) = (config.hidden_size, config.head_dim);
        let mut norm = |name, size| Norm::build(config, (prefix, name), size, parameters);
        // With norms on outputs, what other families call `post_attention` comes where it says.
        let attention_input = norm("input_layernorm", hidden)?;
        let (query, key) = if config.qk_norm {
            (Some(norm("self_attn.q_norm", head)?), Some(norm("self_attn.k_norm", head)?))
        } else {
            (None, None)
        };
        let (attention_output, mlp_input, mlp_output) = if config.output_norms {
            (
                Some(norm("post_attention_layernorm", hidden)?),
                norm("pre_feedforward_layernorm", hidden)?,
                Some(norm("post_feedforward_layernorm", hidden)?),
            )
        } else {
            (None, norm("post_attention_layernorm", hidden)?, None)
        };
        Ok(Self { attention_input, query, key, attention_output, mlp_input, mlp_output })
    }

    /// All that there are.
    pub(super) fn all(&self) -> impl Iterator<Item = &Norm> {
        let always = [&self.attention_input, &self.mlp_input];
        let maybe = [&self.query, &self.key, &self.attention_output, &self.mlp_output];
        always.into_iter().chain(maybe.into_iter().flatten())
    }
}

/// Each head of `x [rows, heads * size]` by itself through a norm of rows of `size`, where there is one.
pub(super) fn maybe_heads(norm: Option<&Norm>, x: Tensor) -> Result<Tensor, ModelError> {
    let Some(norm) = norm else { return Ok(x) };
    let heads = x.reshape(((), norm.weight.dims1()?))?;
    Ok(norm.forward(&heads)?.reshape(x.shape())?)
}

/// `x` through a norm, where there is one.
pub(super) fn maybe(norm: Option<&Norm>, x: Tensor) -> Result<Tensor, ModelError> {
    match norm {
        Some(norm) => norm.forward(&x),
        None => Ok(x),
    }
}

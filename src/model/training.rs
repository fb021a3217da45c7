//! What only training asks of a decoder besides its losses.

use candle_core::Tensor;

use super::{Decoder, ModelError, Step, decoder::select};
use crate::ops::{embedding::embedding, mean_row::mean_row, noise::add_noise};

/// Keeps the noise apart from the dropout of the same seed.
const NOISE_STREAM: u64 = 0x6e65_6674_756e_6521;

impl Decoder {
    /// How far the logits of `targets` lie above the mean logit, for some rows of [`Decoder::hidden`].
    /// `[rows]`, f32, differentiable. No logits are computed: the mean logit is the product with the
    /// head's mean row.
    ///
    /// # Errors
    /// Rows or targets out of range, or a failed tensor operation.
    pub fn logits_above_mean(
        &self,
        hidden: &Tensor,
        rows: &[u32],
        targets: &[u32],
    ) -> Result<Tensor, ModelError> {
        if let Some(cap) = self.config().logit_soft_cap {
            let message =
                format!("smoothed labels need plain logits; this model caps them at {cap}");
            return Err(ModelError::Step(message));
        }
        let head = self.head();
        let above = embedding(head, targets)?.broadcast_sub(&mean_row(head)?)?; // [rows, hidden]
        Ok((select(hidden, rows)? * above)?.sum(1)?)
    }
}

/// The embeddings `x` of a step with the noise that its training asks for.
pub(super) fn with_noise(x: Tensor, step: &Step<'_>) -> Result<Tensor, ModelError> {
    match step.dropout {
        Some(random) if random.neftune_alpha > 0.0 => {
            let lengths: Vec<_> = step.sequences.iter().map(|one| one.num_tokens).collect();
            Ok(add_noise(&x, &lengths, random.neftune_alpha, random.seed ^ NOISE_STREAM)?)
        }
        _ => Ok(x),
    }
}

//! What a layer computes on its way, and what of it must not be held from its forward pass to its backward one.

use candle_core::Tensor;

use super::{ModelError, layer::Layer};
use crate::ops::{
    gated_mlp::gated_mul,
    values::{put_back, take},
};

/// The tensors inside a layer that matter here, in the order of the forward pass. Those that are not tracked may
/// have been overwritten by what became of them; nothing that is tracked is made of them again.
pub(super) struct Inside {
    /// The layer's input.
    pub(super) x: Tensor,
    /// `x`, normed.
    pub(super) attention_input: Tensor,
    /// Before their rotation.
    pub(super) q: Tensor,
    pub(super) k: Tensor,
    /// What attention adds to `x`.
    pub(super) attended: Tensor,
    /// That sum.
    pub(super) middle: Tensor,
    /// `middle`, normed.
    pub(super) mlp_input: Tensor,
    pub(super) gate: Tensor,
    pub(super) up: Tensor,
    /// What became of them both.
    pub(super) gated: Tensor,
    /// What the feed-forward adds to `middle`.
    pub(super) down: Tensor,
}

impl Inside {
    /// Takes the values of what the layer's graph would hold for nothing, about half of it: inputs of rotations and
    /// residuals, for whose gradients they do not matter, and what [`Self::restore`] makes again from its
    /// neighbours. The layer's backward pass comes after that.
    pub(super) fn let_go(&self) -> Result<(), ModelError> {
        let unread = [&self.q, &self.k, &self.attended, &self.down];
        // What no graph holds is gone when `self` is.
        for tensor in unread.into_iter().chain(self.remade()).filter(|tensor| tensor.track_op()) {
            take(tensor)?;
        }
        Ok(())
    }

    /// Makes again what the gradients of the projections' inputs ask for: the same functions of the same
    /// values, so the same bits.
    pub(super) fn restore(&self, layer: &Layer) -> Result<(), ModelError> {
        let (x, middle) = (self.x.detach(), self.middle.detach());
        let (gate, up) = (self.gate.detach(), self.up.detach());
        let values = [
            layer.norms.attention_input.forward(&x)?,
            layer.norms.mlp_input.forward(&middle)?,
            gated_mul(layer.activation, &gate, &up)?,
        ];
        for (tensor, values) in self.remade().into_iter().zip(&values) {
            if tensor.track_op() {
                put_back(tensor, values)?;
            }
        }
        Ok(())
    }

    fn remade(&self) -> [&Tensor; 3] {
        [&self.attention_input, &self.mlp_input, &self.gated]
    }
}

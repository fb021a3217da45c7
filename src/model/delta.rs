//! What an adapter may do to the model.

use std::{ops::Range, sync::Arc};

use candle_core::Tensor;

use super::ModelError;
use crate::ops::{adapted_linear::TrainedLora, lora::LoraPart};

/// The linear layers that an adapter may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Projection {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Attention's output.
    O,
    /// The feed-forward gate.
    Gate,
    /// The feed-forward input.
    Up,
    /// The feed-forward output.
    Down,
}

impl Projection {
    /// All of them, in the order of the forward pass.
    pub const ALL: [Self; 7] =
        [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// The module's name in the checkpoint, such as `q_proj`.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.path().rsplit('.').next().expect("a path has a last part")
    }

    /// Its path below `model.layers.N`, such as `self_attn.q_proj`.
    #[must_use]
    pub fn path(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }

    /// The projection of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|projection| projection.name() == name)
    }
}

/// One projection of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Site {
    /// The layer, from 0.
    pub layer: usize,
    /// The projection.
    pub projection: Projection,
}

/// Dropout whose masks are a pure function of `seed` and the site, so that a resumed run repeats
/// them.
#[derive(Debug, Clone, Copy)]
pub struct Dropout {
    /// Probability that an element is dropped.
    pub probability: f32,
    /// Differs between steps and micro-batches.
    pub seed: u64,
}

/// What an adapter does to a projection.
pub trait Delta: Send + Sync {
    /// `output [tokens, out]` with the adapter's contribution added on `rows`, given the
    /// projection's `input [tokens, in]`. May change `output` in place where nothing is tracked;
    /// returns it untouched where the adapter has no part at this site.
    ///
    /// # Errors
    /// A failed tensor operation.
    fn apply(
        &self,
        site: Site,
        input: &Tensor,
        output: Tensor,
        rows: Range<usize>,
        dropout: Option<Dropout>,
    ) -> Result<Tensor, ModelError>;

    /// What the adapter adds at `site`, so that the rows of many adapters are done at once; `None` where
    /// it has no part there. Asked only if [`Self::is_frozen`].
    fn part(&self, site: Site) -> Option<&LoraPart>;

    /// The matrices that are trained at `site`, where they are plain LoRA, so that projection and adapter
    /// become one operation. `None`: [`Self::apply`] does it.
    fn trained(&self, site: Site, dropout: Option<Dropout>) -> Option<TrainedLora> {
        let _ = (site, dropout);
        None
    }

    /// Whether nobody trains the adapter.
    fn is_frozen(&self) -> bool;
}

/// A range of rows and the adapter that they carry.
#[derive(Clone)]
pub struct DeltaRows {
    /// Rows of the step's tokens.
    pub rows: Range<usize>,
    /// Their adapter.
    pub delta: Arc<dyn Delta>,
}

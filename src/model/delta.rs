//! What an adapter may do to the model.

use std::{ops::Range, sync::Arc};

use candle_core::Tensor;

use super::ModelError;
use crate::ops::{adapted_linear::TrainedLora, lora::LoraPart, weight::Weight};

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

/// What training does at random: dropout whose masks are a pure function of `seed` and the site, and
/// noise on the embeddings, so that a resumed run repeats them.
#[derive(Debug, Clone, Copy)]
pub struct Dropout {
    /// Probability that an element of an adapter's input is dropped.
    pub probability: f32,
    /// NEFTune's alpha: how much noise the embeddings get; 0 = none.
    pub neftune_alpha: f32,
    /// Differs between steps and micro-batches.
    pub seed: u64,
}

/// A projection of the base, with what went into it.
#[derive(Clone, Copy)]
pub struct Projected<'a> {
    /// Which one.
    pub site: Site,
    /// Its weight. `[out, in]`
    pub weight: &'a Weight,
    /// Its bias, which the output contains. `[out]`
    pub bias: Option<&'a Tensor>,
    /// `[tokens, in]`
    pub input: &'a Tensor,
}

/// The two matrices with a row for each token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Table {
    /// `embed_tokens`: what a token is at the start.
    Embedding,
    /// `lm_head`: what makes it likely at the end.
    Head,
}

/// What an adapter has in place of a table.
#[derive(Clone)]
pub enum OwnTable {
    /// All of it. `[vocab, hidden]`
    Whole(Weight),
    /// The rows of some tokens.
    Rows {
        /// The tokens, each once.
        ids: Arc<[u32]>,
        /// Their rows. `[ids, hidden]`, f32
        values: Tensor,
    },
}

/// What an adapter does to the model.
pub trait Delta: Send + Sync {
    /// `output [tokens, out]` of the projection `at` with the adapter's contribution added on `rows`.
    /// May change `output` in place where nothing is tracked; returns it untouched where the adapter
    /// has no part at this site.
    ///
    /// # Errors
    /// A failed tensor operation.
    fn apply(
        &self,
        at: &Projected<'_>,
        output: Tensor,
        rows: Range<usize>,
        dropout: Option<Dropout>,
    ) -> Result<Tensor, ModelError>;

    /// What the adapter adds at `site` over the base's `weight`, so that the rows of many adapters are done
    /// at once; `None` where it has no part there, or one that takes [`Self::apply`]. Asked only if
    /// [`Self::is_frozen`].
    fn part(&self, site: Site, weight: &Weight) -> Option<&LoraPart>;

    /// The matrices that are trained at `site`, where they are plain LoRA, so that projection and adapter
    /// become one operation. `None`: [`Self::apply`] does it.
    ///
    /// # Errors
    /// A failed tensor operation.
    fn trained(
        &self,
        _site: Site,
        _dropout: Option<Dropout>,
    ) -> Result<Option<TrainedLora>, ModelError> {
        Ok(None)
    }

    /// Whether nobody trains the adapter.
    fn is_frozen(&self) -> bool;

    /// What the adapter has in place of a table of the base; `None` where the base's own counts.
    fn table(&self, table: Table) -> Option<&OwnTable>;
}

/// A range of rows and the adapter that they carry.
#[derive(Clone)]
pub struct DeltaRows {
    /// Rows of the step's tokens.
    pub rows: Range<usize>,
    /// Their adapter.
    pub delta: Arc<dyn Delta>,
}

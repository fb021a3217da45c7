//! Paged keys and values of all layers.

use std::str::FromStr;

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use super::{ModelConfig, ModelError};
use crate::kernels::{AttentionShape, KvForm, KvSide, LANES};

/// How keys and values are held, as a user says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvDtype {
    /// As computed: what is served is bit for bit what was trained.
    #[default]
    F32,
    /// Rounded to 16 bits: half the memory.
    Bf16,
    /// Rounded to 8 bits with a scale for each token and head: about a quarter of the memory.
    Int8,
}

impl KvDtype {
    fn form(self) -> KvForm {
        match self {
            Self::F32 => KvForm::F32,
            Self::Bf16 => KvForm::Bf16,
            Self::Int8 => KvForm::Int8,
        }
    }

    /// The dtype of a panel; int8 comes as bytes, since its scales lie among them.
    fn storage(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::Int8 => DType::U8,
        }
    }
}

impl FromStr for KvDtype {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            "int8" => Ok(Self::Int8),
            other => Err(format!("{other:?} is not f32, bf16 or int8")),
        }
    }
}

/// `num_blocks` blocks of sixteen positions, for every layer. The engine's `BlockManager` says who
/// owns which block; this only holds the memory.
pub struct KvCache {
    /// Keys and values of each layer.
    pub(super) layers: Vec<(Tensor, Tensor)>,
    num_blocks: usize,
}

impl KvCache {
    /// A zeroed cache in f32. `block_size` is 16, the width of the attention kernels.
    ///
    /// # Errors
    /// Another block size, or memory that cannot be had.
    pub fn new(
        config: &ModelConfig,
        num_blocks: usize,
        block_size: usize,
    ) -> Result<Self, ModelError> {
        Self::with_dtype(config, num_blocks, block_size, KvDtype::F32)
    }

    /// A zeroed cache whose keys and values are held as `dtype`.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_dtype(
        config: &ModelConfig,
        num_blocks: usize,
        block_size: usize,
        dtype: KvDtype,
    ) -> Result<Self, ModelError> {
        if block_size != LANES {
            return Err(ModelError::Step(format!(
                "block_size {block_size}: only {LANES} is supported"
            )));
        }
        let panel = |layer, side| {
            let block_len = dtype.form().block_len(&attention_shape(config, layer), side);
            Tensor::zeros(num_blocks * block_len, dtype.storage(), &Device::Cpu)
        };
        let layers = (0..config.num_layers)
            .map(|layer| Ok((panel(layer, KvSide::Keys)?, panel(layer, KvSide::Values)?)))
            .collect::<Result<_, candle_core::Error>>()?;
        Ok(Self { layers, num_blocks })
    }

    /// Positions of one block.
    #[must_use]
    pub fn block_size(&self) -> usize {
        LANES
    }

    /// Blocks in all.
    #[must_use]
    pub fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// Bytes of one block over all layers.
    #[must_use]
    pub fn block_bytes(config: &ModelConfig, dtype: KvDtype) -> usize {
        let form = dtype.form();
        let sides = |layer| {
            let shape = attention_shape(config, layer);
            form.block_len(&shape, KvSide::Keys) + form.block_len(&shape, KvSide::Values)
        };
        (0..config.num_layers).map(sides).sum::<usize>() * form.element_bytes()
    }
}

/// The attention kernel's view of a layer.
#[allow(clippy::cast_possible_truncation)]
pub(super) fn attention_shape(config: &ModelConfig, layer: usize) -> AttentionShape {
    AttentionShape {
        heads: config.num_heads,
        kv_heads: config.num_kv_heads,
        head_dim: config.head_dim,
        scale: config.attention_scale as f32,
        window: config.window(layer),
        soft_cap: config.attention_soft_cap.map(|cap| cap as f32),
    }
}

//! Paged keys and values of all layers.

use candle_core::{DType, Device, Tensor};

use super::{ModelConfig, ModelError};
use crate::kernels::{AttentionShape, LANES};

/// `num_blocks` blocks of sixteen positions, for every layer. The engine's `BlockManager` says who
/// owns which block; this only holds the memory.
pub struct KvCache {
    /// Keys and values of each layer.
    pub(super) layers: Vec<(Tensor, Tensor)>,
    num_blocks: usize,
}

impl KvCache {
    /// A zeroed cache. `block_size` is 16, the width of the attention kernels.
    ///
    /// # Errors
    /// Another block size, or memory that cannot be had.
    pub fn new(
        config: &ModelConfig,
        num_blocks: usize,
        block_size: usize,
    ) -> Result<Self, ModelError> {
        if block_size != LANES {
            return Err(ModelError::Step(format!(
                "block_size {block_size}: only {LANES} is supported"
            )));
        }
        let shape = attention_shape(config);
        let panel = |block_len| Tensor::zeros(num_blocks * block_len, DType::F32, &Device::Cpu);
        let layers = (0..config.num_layers)
            .map(|_| Ok((panel(shape.key_block_len())?, panel(shape.value_block_len())?)))
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
    pub fn block_bytes(config: &ModelConfig, _block_size: usize) -> usize {
        let shape = attention_shape(config);
        config.num_layers * (shape.key_block_len() + shape.value_block_len()) * size_of::<f32>()
    }
}

/// The attention kernel's view of a configuration.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
pub(super) fn attention_shape(config: &ModelConfig) -> AttentionShape {
    AttentionShape {
        heads: config.num_heads,
        kv_heads: config.num_kv_heads,
        head_dim: config.head_dim,
        scale: (1.0 / (config.head_dim as f64).sqrt()) as f32,
    }
}

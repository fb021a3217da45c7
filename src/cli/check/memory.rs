//! How much memory a LoRA run over a data file takes, from sizes alone: nothing is loaded.

use std::{fs, io, path::Path};

use crate::data::Example;
use crate::model::{ModelConfig, Projection};

/// Bytes of a run with the default rank on all linear layers.
pub(super) struct Memory {
    /// The base, as it lies in its files.
    pub(super) weights: u64,
    /// The adapter with its gradient and the optimizer's two moments, f32.
    pub(super) adapter: u64,
    /// What the backward pass needs of the largest forward pass.
    pub(super) activations: u64,
}

impl Memory {
    /// From the weight files of `dir` and the longest of `examples`.
    pub(super) fn estimate(
        dir: &Path,
        config: &ModelConfig,
        examples: &[Example],
    ) -> io::Result<Self> {
        const RANK: usize = 16;
        /// One forward pass holds this many tokens, or one row if that is longer.
        const MICRO_BATCH_TOKENS: usize = 2048;
        const F32: usize = 4;
        /// Values, gradient, first and second moment.
        const COPIES: usize = 4;

        let lengths = examples.iter().map(Example::num_tokens);
        let longest = lengths.clone().max().unwrap_or(0);
        let tokens = lengths.sum::<usize>().min(MICRO_BATCH_TOKENS.max(longest));
        let adapter_parameters: usize = Projection::ALL
            .iter()
            .map(|projection| {
                let (inputs, outputs) = config.projection_shape(*projection);
                RANK * (inputs + outputs) * config.num_layers
            })
            .sum();
        // Per layer and token: two norms, q and k before and after their rotation, v, what comes out
        // of attention, of the two blocks and of the two residual sums; gate, up, their activation
        // and product. The attention's probabilities come on top, a row of them per head.
        let kv = config.num_kv_heads * config.head_dim;
        let queries = config.num_heads * config.head_dim;
        let per_token = 6 * config.hidden_size
            + 3 * queries
            + 3 * kv
            + 4 * config.intermediate_size
            + config.num_heads * longest;
        Ok(Self {
            weights: weight_bytes(dir)?,
            adapter: (adapter_parameters * F32 * COPIES) as u64,
            activations: (tokens * per_token * config.num_layers * F32) as u64,
        })
    }

    pub(super) fn total(&self) -> u64 {
        self.weights + self.adapter + self.activations
    }
}

fn weight_bytes(dir: &Path) -> io::Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            sum += fs::metadata(&path)?.len();
        }
    }
    Ok(sum)
}

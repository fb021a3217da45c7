//! How much the engine may take on at once.

use std::time::Duration;

use crate::model::{KvCache, KvDtype, ModelConfig};

/// Limits of the engine. Zeros are taken as ones.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Sequences that may run at once (never more than `max_batch_tokens`).
    pub max_num_seqs: usize,
    /// Unfinished requests that are taken on top of `max_num_seqs` before the queue is full.
    pub max_queue: usize,
    /// Tokens of prompts that may wait; an empty queue takes any prompt.
    pub max_queue_tokens: usize,
    /// Longest prompt + completion, in tokens.
    pub max_model_len: usize,
    /// Tokens of one step (decode rows first, then prefill chunks).
    pub max_batch_tokens: usize,
    /// About the longest step while somebody waits for its next token: chunks of prompts are cut to it.
    pub max_step: Duration,
    /// Tokens that a step guesses for each sequence, where it can; 0 = none.
    pub speculate: usize,
    /// Positions of a cache block.
    pub block_size: usize,
    /// Blocks of the cache.
    pub num_blocks: usize,
    /// How the cache holds keys and values.
    pub kv_dtype: KvDtype,
    /// Whether requests share what they have in common at their beginning.
    pub prefix_cache: bool,
}

impl EngineConfig {
    /// Positions of a cache block unless told otherwise.
    pub const DEFAULT_BLOCK_SIZE: usize = 16;
    /// Running sequences unless told otherwise.
    pub const DEFAULT_MAX_NUM_SEQS: usize = 16;
    /// Waiting requests unless told otherwise.
    pub const DEFAULT_MAX_QUEUE: usize = 256;
    /// Tokens of waiting prompts unless told otherwise.
    pub const DEFAULT_MAX_QUEUE_TOKENS: usize = 1 << 18;
    /// Longest step with somebody waiting, unless told otherwise.
    pub const DEFAULT_MAX_STEP: Duration = Duration::from_millis(250);
    /// Guessed tokens unless told otherwise.
    pub const DEFAULT_SPECULATE: usize = 8;
    /// Tokens of a step unless told otherwise.
    pub const DEFAULT_MAX_BATCH_TOKENS: usize = 512;

    /// Defaults for a model whose cache, in f32, may take `memory_bytes`.
    pub fn for_model(config: &ModelConfig, max_num_seqs: usize, memory_bytes: usize) -> Self {
        Self::for_cache(config, max_num_seqs, memory_bytes, KvDtype::F32)
    }

    /// Defaults for a model whose cache may take `memory_bytes`: as many blocks as fit, but no more
    /// than `max_num_seqs` sequences of full length could fill, and at least one.
    pub fn for_cache(
        config: &ModelConfig,
        max_num_seqs: usize,
        memory_bytes: usize,
        kv_dtype: KvDtype,
    ) -> Self {
        let (max_num_seqs, block_size) = (max_num_seqs.max(1), Self::DEFAULT_BLOCK_SIZE);
        let blocks_per_sequence = config.max_position_embeddings.div_ceil(block_size).max(1);
        let useful = blocks_per_sequence.saturating_mul(max_num_seqs);
        let affordable = memory_bytes / KvCache::block_bytes(config, kv_dtype).max(1);
        let num_blocks = affordable.clamp(1, useful);
        Self {
            max_num_seqs,
            max_queue: Self::DEFAULT_MAX_QUEUE,
            max_queue_tokens: Self::DEFAULT_MAX_QUEUE_TOKENS,
            max_step: Self::DEFAULT_MAX_STEP,
            speculate: Self::DEFAULT_SPECULATE,
            max_model_len: config.max_position_embeddings.min(num_blocks * block_size),
            max_batch_tokens: Self::DEFAULT_MAX_BATCH_TOKENS,
            block_size,
            num_blocks,
            kv_dtype,
            prefix_cache: true,
        }
    }

    /// Longest prompt + completion that can run: `max_model_len`, or what all blocks hold.
    pub fn max_sequence_len(&self) -> usize {
        self.max_model_len.min(self.num_blocks.saturating_mul(self.block_size))
    }

    /// The same without zeros.
    pub(super) fn at_least_one(mut self) -> Self {
        self.max_num_seqs = self.max_num_seqs.max(1);
        self.max_model_len = self.max_model_len.max(1);
        self.max_batch_tokens = self.max_batch_tokens.max(1);
        self.block_size = self.block_size.max(1);
        self.num_blocks = self.num_blocks.max(1);
        self
    }
}

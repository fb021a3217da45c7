//! FLOOR 4. Many requests, one model: continuous batching on one thread.
//!
//! [`spawn`] starts the engine thread and returns an [`EngineHandle`]. A [`GenerationRequest`] given to
//! the handle becomes a `Sequence` that the scheduler places into steps: each step
//! is one forward pass over a ragged batch of decode rows and prefill chunks of different adapters.
//! What a request yields comes back as [`GenerationEvent`]s; dropping the stream cancels it.
//!
//! Knows: token ids, the decoder, the paged cache, adapter versions.
//! Must never know: text, chat templates, stop strings, HTTP, JSON.

use std::sync::Arc;

use crate::adapters::AdapterVersion;

mod batch;
mod blocks;
mod candidates;
mod choose;
mod config;
mod draft;
#[allow(clippy::module_inception)] // The loop; the floor is named after it.
mod engine;
mod guessing;
mod handle;
mod pace;
pub mod parity;
mod penalties;
mod prefix;
mod request;
mod sampler;
mod scheduler;
mod score;
mod sequence;
mod softmax;
mod stats;
mod waiting;

pub use self::{
    config::EngineConfig,
    handle::{EngineHandle, GenerationStream, spawn},
    sampler::{BadLogits, Sampler, SamplingParams},
    score::{TokenLogprobs, TokenScore},
    stats::{AdapterNames, EngineStats},
};

/// Why a request is not taken.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// As many requests as may run and wait are unfinished; try again later.
    #[error("the queue is full ({limit} requests)")]
    QueueFull {
        /// Requests that may wait (`max_queue`).
        limit: usize,
    },
    /// The prompts that wait have so many tokens together; try again later.
    #[error("the queue is full ({limit} tokens)")]
    QueueTokensFull {
        /// Tokens that may wait (`max_queue_tokens`).
        limit: usize,
    },
    /// [`EngineHandle::drain`] was called.
    #[error("the engine is draining")]
    Draining,
    /// The engine thread has ended, after a panic in a step.
    #[error("the engine has stopped")]
    Stopped,
    /// There is nothing to continue.
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    /// The request could never fit, not even alone.
    #[error(
        "prompt ({prompt}) and max_tokens ({max_tokens}) exceed the context length of {limit} tokens"
    )]
    TooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens asked for.
        max_tokens: usize,
        /// Tokens that a sequence may have: `max_model_len`, or what all cache blocks hold.
        limit: usize,
    },
    /// A prompt token that the model has no embedding for.
    #[error("token id {0} is outside the vocabulary")]
    UnknownToken(u32),
    /// A request that was taken ended early, in the engine's own words.
    #[error("the engine broke the request off: {0}")]
    Failed(String),
    /// The cache or the thread cannot be made.
    #[error("the engine cannot start: {0}")]
    Start(String),
}

impl EngineError {
    /// Whether every place is taken, by requests or by their tokens: the same may be taken later.
    #[must_use]
    pub fn is_full(&self) -> bool {
        matches!(self, Self::QueueFull { .. } | Self::QueueTokensFull { .. })
    }
}

/// A valid request: token ids in, token ids out.
#[derive(Clone)]
pub struct GenerationRequest {
    /// At least one token.
    pub prompt: Vec<u32>,
    /// The version that serves this request to its end; `None` is the base.
    pub adapter: Option<Arc<AdapterVersion>>,
    /// How each token is chosen.
    pub sampling: SamplingParams,
    /// At least 1 (0 only together with `score_prompt`).
    pub max_tokens: usize,
    /// Generation ends after one of these (it is emitted as a token event too).
    pub stop_token_ids: Vec<u32>,
    /// Also send the log-probability of every prompt token but the first (teacher forcing). Such a prompt
    /// neither uses the prefix cache nor fills it.
    pub score_prompt: bool,
    /// What few requests ask for.
    pub options: RequestOptions,
}

/// What few requests ask for; the default is nothing.
#[derive(Debug, Clone, Default)]
pub struct RequestOptions {
    /// Only requests of equal salt share cached prefixes.
    pub cache_salt: Vec<u8>,
    /// With each token, its log-probability and those of so many most likely ones.
    pub logprobs: Option<usize>,
    /// Lower ones are let in first and lose their blocks last.
    pub priority: i32,
}

/// What the engine tells about a request. The last event is always `Finished` or `Failed`.
#[derive(Debug, Clone)]
pub enum GenerationEvent {
    /// Scores of prompt tokens 1.., in order and all at once (only with `score_prompt`).
    PromptScores(Vec<TokenScore>),
    /// The next generated token.
    Token {
        /// Its id; may be a stop token.
        id: u32,
        /// How likely it was, where asked for.
        logprobs: Option<Box<TokenLogprobs>>,
    },
    /// The request is done.
    Finished {
        /// Why it ended.
        reason: FinishReason,
        /// What it took.
        usage: GenerationUsage,
    },
    /// The request ended early through no fault of its client.
    Failed {
        /// For the log; may name internals.
        message: String,
    },
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token was generated.
    Stop,
    /// `max_tokens` were generated.
    Length,
}

/// Counts and times of one finished request.
#[derive(Debug, Clone, Copy, Default)]
pub struct GenerationUsage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Generated tokens, a stop token included.
    pub completion_tokens: usize,
    /// From submission to the first step that had a row of it, in seconds.
    pub queue_seconds: f64,
    /// From submission to the first token (or to the end, when none is generated), in seconds.
    pub first_token_seconds: f64,
    /// From submission to the end, in seconds.
    pub total_seconds: f64,
}

//! The door: checks a request, gives it a place and hands out its stream of events.

use std::{
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicUsize,
            Ordering::{Acquire, Relaxed, Release},
        },
        mpsc,
    },
    thread,
};

use tokio::sync::mpsc as events;

use super::{
    EngineConfig, EngineError, EngineStats, GenerationEvent, GenerationRequest,
    engine::{CachedDecoder, Engine, StepModel},
    prefix::BlockKey,
    request::{Slot, Submission},
};
use crate::model::{Decoder, KvCache};
use crate::ops::keep_freed_memory;

/// Freed memory that is kept for the next step, in bytes: what a prompt's chunk of 2,048 tokens makes on its way.
const KEPT_BYTES: usize = 256 << 20;

/// The only way to the engine. Cloneable; dropping the last one ends the thread once the requests that
/// it took have ended.
#[derive(Clone)]
pub struct EngineHandle(Arc<Door>);

struct Door {
    submissions: mpsc::Sender<Submission>,
    /// Unfinished requests, waiting and running.
    taken: Arc<AtomicUsize>,
    /// Tokens of the prompts that have not started.
    waiting_tokens: Arc<AtomicUsize>,
    is_draining: AtomicBool,
    stats: Arc<EngineStats>,
    config: EngineConfig,
    vocab_size: usize,
    base_fingerprint: String,
}

/// Events of one request; dropping it cancels the request.
pub struct GenerationStream {
    events: events::Receiver<GenerationEvent>,
    cached_tokens: Arc<AtomicUsize>,
    has_ended: bool,
}

/// Starts the engine thread. `max_model_len` is capped by what the model was made for.
///
/// ```
/// use std::{path::Path, sync::Arc};
/// use tunesmith::{
///     engine::{
///         EngineConfig, GenerationEvent, GenerationRequest, RequestOptions, SamplingParams, spawn,
///     },
///     model::{Decoder, WeightMode},
/// };
///
/// let folder = Path::new("tests/fixtures/tiny-llama");
/// let decoder = Arc::new(Decoder::load(folder, WeightMode::Frozen)?);
/// let config = EngineConfig::for_model(decoder.config(), 4, 1 << 20);
/// let engine = spawn(decoder, config)?;
/// let mut stream = engine.generate(GenerationRequest {
///     prompt: vec![1, 2, 3],
///     adapter: None,
///     sampling: SamplingParams::greedy(),
///     max_tokens: 5,
///     stop_token_ids: vec![],
///     score_prompt: false,
///     options: RequestOptions::default(),
/// })?;
/// let mut tokens = Vec::new();
/// while let Some(event) = stream.blocking_next() {
///     match event {
///         GenerationEvent::Token { id, .. } => tokens.push(id),
///         GenerationEvent::Failed { message } => return Err(message.into()),
///         GenerationEvent::PromptScores(_) | GenerationEvent::Finished { .. } => {}
///     }
/// }
/// assert_eq!(tokens.len(), 5);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`EngineError::Start`] when the cache or the thread cannot be made.
pub fn spawn(decoder: Arc<Decoder>, mut config: EngineConfig) -> Result<EngineHandle, EngineError> {
    config.max_model_len = config.max_model_len.min(decoder.config().max_position_embeddings);
    let config = config.at_least_one();
    let vocab_size = decoder.config().vocab_size;
    let (blocks, size) = (config.num_blocks, config.block_size);
    let cache = KvCache::with_dtype(decoder.config(), blocks, size, config.kv_dtype)
        .map_err(|error| EngineError::Start(error.to_string()))?;
    let fingerprint = decoder.quick_fingerprint();
    // After the cache is made, whose memory is taken as it is used.
    keep_freed_memory(KEPT_BYTES);
    start(CachedDecoder { decoder, cache }, vocab_size, fingerprint, config)
}

/// Starts the engine thread over any model.
pub(super) fn start(
    model: impl StepModel,
    vocab_size: usize,
    base_fingerprint: String,
    config: EngineConfig,
) -> Result<EngineHandle, EngineError> {
    let (sender, receiver) = mpsc::channel();
    let stats = Arc::new(EngineStats::default());
    stats.num_blocks.store(config.num_blocks, Relaxed);
    let door = Door {
        submissions: sender,
        taken: Arc::default(),
        waiting_tokens: Arc::default(),
        is_draining: AtomicBool::new(false),
        stats: Arc::clone(&stats),
        config: config.clone(),
        vocab_size,
        base_fingerprint,
    };
    // Built on its own thread: the block tables share their free list without a lock.
    let run = move || Engine::new(model, &config, receiver, stats).run();
    thread::Builder::new()
        .name("engine".to_string())
        .spawn(run)
        .map_err(|error| EngineError::Start(error.to_string()))?;
    Ok(EngineHandle(Arc::new(door)))
}

impl EngineHandle {
    /// Takes a request; never blocks.
    ///
    /// # Errors
    /// Every other [`EngineError`]: the request can never run, there is no place for it now, or the
    /// engine takes none any more.
    pub fn generate(&self, request: GenerationRequest) -> Result<GenerationStream, EngineError> {
        if !self.is_healthy() {
            return Err(EngineError::Stopped);
        }
        if self.0.is_draining.load(Acquire) {
            return Err(EngineError::Draining);
        }
        self.check(&request)?;
        let limit = self.0.config.max_queue;
        let slot = Slot::take(&self.0.taken, 1, self.0.config.max_num_seqs.saturating_add(limit))
            .ok_or(EngineError::QueueFull { limit })?;
        let (num_tokens, limit) = (request.prompt.len(), self.0.config.max_queue_tokens);
        let room = Slot::take(&self.0.waiting_tokens, num_tokens, limit)
            .ok_or(EngineError::QueueTokensFull { limit })?;
        let root = self.prefix_root(&request);
        let (submission, events) = Submission::new(request, root, slot, room);
        let cached_tokens = Arc::clone(&submission.request.cached_tokens);
        self.0.submissions.send(submission).map_err(|_| EngineError::Stopped)?;
        Ok(GenerationStream { events, cached_tokens, has_ended: false })
    }

    /// What this request's cached blocks depend on besides its tokens.
    fn prefix_root(&self, request: &GenerationRequest) -> Option<BlockKey> {
        let digest = request.adapter.as_ref().map(|version| version.adapter.served_digest());
        let root = BlockKey::root(
            &self.0.base_fingerprint,
            digest.as_deref(),
            &request.options.cache_salt,
        );
        self.0.config.prefix_cache.then_some(root)
    }

    /// Live figures.
    pub fn stats(&self) -> &EngineStats {
        &self.0.stats
    }

    /// The limits in force.
    pub fn config(&self) -> &EngineConfig {
        &self.0.config
    }

    /// Token ids that the model knows: those below.
    pub fn vocab_size(&self) -> usize {
        self.0.vocab_size
    }

    /// False after a panic in a step.
    pub fn is_healthy(&self) -> bool {
        !self.0.stats.panicked.load(Acquire)
    }

    /// Refuses new requests from now on; running and waiting ones finish.
    pub fn drain(&self) {
        self.0.is_draining.store(true, Release);
    }

    /// Requests that were taken and have not ended.
    pub fn num_unfinished(&self) -> usize {
        self.0.taken.load(Acquire)
    }

    /// What can be wrong with a request by itself.
    fn check(&self, request: &GenerationRequest) -> Result<(), EngineError> {
        let (prompt, max_tokens) = (request.prompt.len(), request.max_tokens);
        if prompt == 0 {
            return Err(EngineError::EmptyPrompt);
        }
        let limit = self.0.config.max_sequence_len();
        if prompt.saturating_add(max_tokens) > limit {
            return Err(EngineError::TooLong { prompt, max_tokens, limit });
        }
        let is_unknown = |id: &&u32| **id as usize >= self.0.vocab_size;
        match request.prompt.iter().find(is_unknown) {
            Some(&id) => Err(EngineError::UnknownToken(id)),
            None => Ok(()),
        }
    }
}

impl GenerationStream {
    /// Prompt tokens that were not computed because the cache held them; 0 until the first token.
    pub fn cached_tokens(&self) -> usize {
        self.cached_tokens.load(Relaxed)
    }

    /// The next event; `None` after `Finished` or `Failed`.
    pub async fn next(&mut self) -> Option<GenerationEvent> {
        if self.has_ended {
            return None;
        }
        let event = self.events.recv().await;
        Some(self.note(event))
    }

    /// The next event, on a thread that may wait (panics inside an async runtime).
    pub fn blocking_next(&mut self) -> Option<GenerationEvent> {
        if self.has_ended {
            return None;
        }
        let event = self.events.blocking_recv();
        Some(self.note(event))
    }

    /// Remembers the end. A channel that closed without one means that the engine thread is gone.
    fn note(&mut self, event: Option<GenerationEvent>) -> GenerationEvent {
        let event = event.unwrap_or_else(|| GenerationEvent::Failed {
            message: EngineError::Stopped.to_string(),
        });
        self.has_ended =
            matches!(event, GenerationEvent::Finished { .. } | GenerationEvent::Failed { .. });
        event
    }
}

//! What the engine keeps beside each sequence: whom it answers, with what, and since when.

use std::{
    sync::{
        Arc,
        atomic::{
            AtomicUsize,
            Ordering::{AcqRel, Acquire},
        },
    },
    time::Instant,
};

use tokio::sync::mpsc;

use super::{
    FinishReason, GenerationEvent, GenerationRequest, GenerationUsage,
    prefix::BlockKey,
    sampler::Sampler,
    sequence::{Sequence, SequenceParams},
};
use crate::adapters::AdapterVersion;

/// Room among the requests that the engine takes, or among the tokens that may wait; dropping it makes room
/// for another.
#[derive(Debug)]
pub(super) struct Slot {
    taken: Arc<AtomicUsize>,
    amount: usize,
}

impl Slot {
    /// Takes `amount` of `limit`, if it fits. Where nothing is taken, any amount does.
    pub(super) fn take(taken: &Arc<AtomicUsize>, amount: usize, limit: usize) -> Option<Self> {
        let next = |count: usize| {
            let sum = count.saturating_add(amount);
            (count == 0 || sum <= limit).then_some(sum)
        };
        taken.fetch_update(AcqRel, Acquire, next).ok()?;
        Some(Self { taken: Arc::clone(taken), amount })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.taken.fetch_sub(self.amount, AcqRel);
    }
}

/// How a request ends.
#[derive(Debug)]
pub(super) enum Ending {
    Finished(FinishReason),
    Failed(String),
}

/// The engine's side of a request.
pub(super) struct Request {
    /// Pinned: the version outlives its name.
    pub(super) adapter: Option<Arc<AdapterVersion>>,
    pub(super) sampler: Sampler,
    /// Most likely tokens to tell with each token.
    pub(super) logprobs: Option<usize>,
    pub(super) stop_token_ids: Vec<u32>,
    /// Set by the step that ends it.
    pub(super) ending: Option<Ending>,
    pub(super) started: Option<Instant>,
    /// Prompt tokens that came from the cache, known once it is started.
    pub(super) cached_tokens: Arc<AtomicUsize>,
    pub(super) first_token: Option<Instant>,
    /// Its tokens' room in the queue, until it starts.
    pub(super) queue_room: Option<Slot>,
    submitted: Instant,
    events: mpsc::Sender<GenerationEvent>,
    _slot: Slot,
}

/// A request on its way to the engine thread.
pub(super) struct Submission {
    pub(super) params: SequenceParams,
    pub(super) request: Request,
}

impl Submission {
    /// The request, and where its events will arrive.
    pub(super) fn new(
        request: GenerationRequest,
        root: Option<BlockKey>,
        slot: Slot,
        queue_room: Slot,
    ) -> (Self, mpsc::Receiver<GenerationEvent>) {
        // All tokens, the scores and the end: sending never has to wait.
        let (events, receiver) = mpsc::channel(request.max_tokens + 2);
        // The version, not its name: a replaced adapter may still have running sequences.
        let adapter_key =
            request.adapter.as_ref().map_or(0, |version| Arc::as_ptr(version) as usize);
        let sampler = Sampler::new(request.sampling, &request.prompt);
        let params = SequenceParams {
            prompt: request.prompt,
            max_tokens: request.max_tokens,
            score_prompt: request.score_prompt,
            adapter_key,
            root,
            priority: request.options.priority,
        };
        let request = Request {
            adapter: request.adapter,
            sampler,
            logprobs: request.options.logprobs,
            stop_token_ids: request.stop_token_ids,
            ending: None,
            started: None,
            cached_tokens: Arc::default(),
            first_token: None,
            queue_room: Some(queue_room),
            submitted: Instant::now(),
            events,
            _slot: slot,
        };
        (Self { params, request }, receiver)
    }
}

impl Request {
    /// Whether the client left.
    pub(super) fn is_cancelled(&self) -> bool {
        self.events.is_closed()
    }

    /// Tells the client, if it is still there.
    pub(super) fn send(&self, event: GenerationEvent) {
        // The channel has room for every event, so this fails only when nobody listens.
        let _ = self.events.try_send(event);
    }
}

/// The last word to a client, to be sent once the sequence and all that it held are gone.
pub(super) struct Farewell {
    events: mpsc::Sender<GenerationEvent>,
    event: GenerationEvent,
}

impl Farewell {
    /// Ends `sequence`: blocks, adapter and slot are free from here on.
    pub(super) fn new(sequence: Sequence<Request>, ending: Ending) -> Self {
        let event = match ending {
            Ending::Finished(reason) => {
                GenerationEvent::Finished { reason, usage: usage(&sequence) }
            }
            Ending::Failed(message) => GenerationEvent::Failed { message },
        };
        Self { events: sequence.request.events, event }
    }

    /// Sends it.
    pub(super) fn send(self) {
        let _ = self.events.try_send(self.event);
    }
}

fn usage(sequence: &Sequence<Request>) -> GenerationUsage {
    let request = &sequence.request;
    let now = Instant::now();
    let seconds = |until: Option<Instant>| {
        until.unwrap_or(now).duration_since(request.submitted).as_secs_f64()
    };
    GenerationUsage {
        prompt_tokens: sequence.num_prompt_tokens(),
        completion_tokens: sequence.num_generated_tokens(),
        queue_seconds: seconds(request.started),
        first_token_seconds: seconds(request.first_token),
        total_seconds: seconds(None),
    }
}

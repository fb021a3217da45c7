//! Requests of random tokens, and when their answers' tokens came.

use std::{
    cell::Cell,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::Instant,
};

use anyhow::bail;

use crate::adapters::AdapterVersion;
use crate::engine::{
    EngineHandle, GenerationEvent, GenerationRequest, GenerationStream, RequestOptions,
    SamplingParams,
};

/// An engine to be put to work.
pub(super) struct Load {
    engine: EngineHandle,
    adapters: Vec<Arc<AdapterVersion>>,
    vocab_size: usize,
    /// State of the generator of tokens.
    random: Cell<u64>,
}

impl Load {
    pub(super) fn new(
        engine: EngineHandle,
        adapters: Vec<Arc<AdapterVersion>>,
        vocab_size: usize,
    ) -> Self {
        Self { engine, adapters, vocab_size, random: Cell::new(1) }
    }

    pub(super) fn has_adapters(&self) -> bool {
        !self.adapters.is_empty()
    }

    pub(super) fn max_sequence_len(&self) -> usize {
        self.engine.config().max_sequence_len()
    }

    /// Starts request number `index` of a round, which decides about its adapter.
    pub(super) fn request(
        &self,
        index: usize,
        prompt_tokens: usize,
        max_tokens: usize,
    ) -> anyhow::Result<Running> {
        let adapter = self.adapters.get(index % self.adapters.len().max(1)).cloned();
        self.request_on(adapter, prompt_tokens, max_tokens)
    }

    /// The same on the base.
    pub(super) fn base_request(
        &self,
        prompt_tokens: usize,
        max_tokens: usize,
    ) -> anyhow::Result<Running> {
        self.request_on(None, prompt_tokens, max_tokens)
    }

    fn request_on(
        &self,
        adapter: Option<Arc<AdapterVersion>>,
        prompt_tokens: usize,
        max_tokens: usize,
    ) -> anyhow::Result<Running> {
        let started = Instant::now();
        let stream = self.engine.generate(GenerationRequest {
            prompt: (0..prompt_tokens).map(|_| self.token()).collect(),
            adapter,
            sampling: SamplingParams::greedy(),
            max_tokens,
            stop_token_ids: Vec::new(),
            score_prompt: false,
            options: RequestOptions::default(),
        })?;
        let (first, has_begun) = mpsc::channel();
        let is_stopped = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&is_stopped);
        let reader = thread::spawn(move || read(stream, started, &first, &stopped));
        Ok(Running { has_begun, is_stopped, reader })
    }

    /// The next token of a linear congruential generator.
    fn token(&self) -> u32 {
        let next = self.random.get().wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        self.random.set(next);
        ((next >> 33) % self.vocab_size as u64) as u32
    }
}

/// A request whose tokens are being read.
pub(super) struct Running {
    has_begun: mpsc::Receiver<()>,
    is_stopped: Arc<AtomicBool>,
    reader: JoinHandle<anyhow::Result<Answer>>,
}

impl Running {
    /// Waits for the end.
    pub(super) fn wait(self) -> anyhow::Result<Answer> {
        match self.reader.join() {
            Ok(answer) => answer,
            Err(_) => bail!("a reader panicked"),
        }
    }

    /// Returns when the first token has come, or none will.
    pub(super) fn wait_for_first(&self) {
        let _ = self.has_begun.recv();
    }

    /// Reads no further.
    pub(super) fn stop(self) -> anyhow::Result<Answer> {
        self.is_stopped.store(true, Relaxed);
        self.wait()
    }
}

/// When the tokens of an answer came.
pub(super) struct Answer {
    started: Instant,
    tokens: Vec<Instant>,
}

impl Answer {
    pub(super) fn first(&self) -> Instant {
        self.tokens.first().copied().unwrap_or(self.started)
    }

    pub(super) fn last(&self) -> Instant {
        self.tokens.last().copied().unwrap_or(self.started)
    }

    pub(super) fn first_token_seconds(&self) -> f64 {
        self.first().duration_since(self.started).as_secs_f64()
    }

    pub(super) fn tokens_after(&self, instant: Instant) -> usize {
        self.tokens.iter().filter(|token| **token > instant).count()
    }

    /// Seconds between tokens, where the gap ends within the time given.
    pub(super) fn gaps(&self, from: Instant, to: Instant) -> Vec<f64> {
        let pairs = self.tokens.windows(2).filter(|pair| pair[1] > from && pair[0] < to);
        pairs.map(|pair| pair[1].duration_since(pair[0]).as_secs_f64()).collect()
    }
}

fn read(
    mut stream: GenerationStream,
    started: Instant,
    first: &mpsc::Sender<()>,
    is_stopped: &AtomicBool,
) -> anyhow::Result<Answer> {
    let mut tokens = Vec::new();
    while let Some(event) = stream.blocking_next() {
        match event {
            GenerationEvent::Token { .. } => {
                tokens.push(Instant::now());
                let _ = first.send(()); // Nobody may listen any more.
            }
            GenerationEvent::Failed { message } => bail!(message),
            GenerationEvent::PromptScores(_) | GenerationEvent::Finished { .. } => {}
        }
        if is_stopped.load(Relaxed) {
            break;
        }
    }
    Ok(Answer { started, tokens })
}

/// The value in the middle; the upper one of two.
pub(super) fn median(mut values: Vec<f64>) -> f64 {
    quantile(&mut values, 0.5)
}

/// The value below which a share of the values lies; 0 of none.
pub(super) fn quantile(values: &mut [f64], share: f64) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let place = (share * values.len() as f64) as usize;
    values.get(place.min(values.len().saturating_sub(1))).copied().unwrap_or(0.0)
}

//! Live figures, for /metrics: read without the engine's help, written without waiting for a reader.

use std::sync::{
    Arc, PoisonError, RwLock,
    atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
};

/// Names of the adapters with requests in flight, sorted, each once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AdapterNames {
    /// Adapters of running sequences.
    pub running: Vec<String>,
    /// Adapters of waiting sequences.
    pub waiting: Vec<String>,
}

/// Gauges as of the last step, and totals since the start.
#[derive(Debug, Default)]
pub struct EngineStats {
    pub(super) running: AtomicUsize,
    pub(super) waiting: AtomicUsize,
    pub(super) used_blocks: AtomicUsize,
    pub(super) num_blocks: AtomicUsize,
    pub(super) steps: AtomicU64,
    pub(super) prompt_tokens: AtomicU64,
    pub(super) generation_tokens: AtomicU64,
    pub(super) prefix_queries: AtomicU64,
    pub(super) prefix_hits: AtomicU64,
    pub(super) draft_tokens: AtomicU64,
    pub(super) accepted_tokens: AtomicU64,
    pub(super) preemptions: AtomicU64,
    pub(super) finished: AtomicU64,
    pub(super) failed: AtomicU64,
    pub(super) cancelled: AtomicU64,
    /// A step panicked.
    pub(super) panicked: AtomicBool,
    /// Replaced as a whole, and only when it changes.
    adapters: RwLock<Arc<AdapterNames>>,
}

impl EngineStats {
    /// Sequences in the batch.
    pub fn running(&self) -> usize {
        self.running.load(Relaxed)
    }

    /// Sequences that wait for a place in the batch.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Relaxed)
    }

    /// Cache blocks in use.
    pub fn used_blocks(&self) -> usize {
        self.used_blocks.load(Relaxed)
    }

    /// Cache blocks in all.
    pub fn num_blocks(&self) -> usize {
        self.num_blocks.load(Relaxed)
    }

    /// Share of the cache blocks in use, 0 to 1.
    pub fn cache_usage(&self) -> f64 {
        self.used_blocks() as f64 / self.num_blocks().max(1) as f64
    }

    /// Forward passes so far.
    pub fn steps(&self) -> u64 {
        self.steps.load(Relaxed)
    }

    /// Prompt tokens of requests that got their first step, so far.
    pub fn prompt_tokens(&self) -> u64 {
        self.prompt_tokens.load(Relaxed)
    }

    /// Prompt tokens that were looked up in the prefix cache, so far.
    pub fn prefix_queries(&self) -> u64 {
        self.prefix_queries.load(Relaxed)
    }

    /// Those of them that it held.
    pub fn prefix_hits(&self) -> u64 {
        self.prefix_hits.load(Relaxed)
    }

    /// Tokens that were guessed, and those of them that were right, so far.
    pub(super) fn guesses(&self) -> (u64, u64) {
        (self.draft_tokens(), self.accepted_tokens())
    }

    /// Tokens that were guessed, so far.
    pub fn draft_tokens(&self) -> u64 {
        self.draft_tokens.load(Relaxed)
    }

    /// Those of them that were right.
    pub fn accepted_tokens(&self) -> u64 {
        self.accepted_tokens.load(Relaxed)
    }

    /// Generated tokens so far.
    pub fn generation_tokens(&self) -> u64 {
        self.generation_tokens.load(Relaxed)
    }

    /// How often a running sequence lost its blocks to an older one, so far.
    pub fn preemptions(&self) -> u64 {
        self.preemptions.load(Relaxed)
    }

    /// Requests that ended by themselves, so far.
    pub fn requests_finished(&self) -> u64 {
        self.finished.load(Relaxed)
    }

    /// Requests that failed, so far.
    pub fn requests_failed(&self) -> u64 {
        self.failed.load(Relaxed)
    }

    /// Requests whose client left, so far.
    pub fn requests_cancelled(&self) -> u64 {
        self.cancelled.load(Relaxed)
    }

    /// Adapters with requests in flight.
    pub fn adapters(&self) -> Arc<AdapterNames> {
        Arc::clone(&self.adapters.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Replaces the names if they differ. Both lists are sorted.
    pub(super) fn set_adapters(&self, running: &[&str], waiting: &[&str]) {
        let current = self.adapters();
        if current.running != running || current.waiting != waiting {
            let owned = |names: &[&str]| names.iter().copied().map(String::from).collect();
            let names = AdapterNames { running: owned(running), waiting: owned(waiting) };
            *self.adapters.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(names);
        }
    }
}

//! Where the time of a step goes: each operation notes its time, its bytes and its arithmetic here, while
//! somebody asks.
//!
//! Off, a [`Timer`] is one relaxed load. Totals are of the whole process: whoever profiles sees to it that
//! nothing else runs.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

/// The parts of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Op {
    /// Rows of the embedding table.
    Embedding,
    /// RMS norms.
    Norm,
    /// The projections to queries, keys and values.
    Qkv,
    /// Positions.
    Rope,
    /// Writing the cache, scores and their sums.
    Attention,
    /// The projection behind attention.
    Output,
    /// The two projections of the feed-forward that share an input.
    GateUp,
    /// The gate's product.
    Gate,
    /// The projection back.
    Down,
    /// Sums of a layer's input and what it adds.
    Residual,
    /// What adapters add.
    Lora,
    /// The projection to the vocabulary.
    Head,
    /// From logits to tokens.
    Sampling,
    /// Who runs, and the batch made of it.
    Scheduling,
    /// Everything: from the plan to the last event. What no other part has is overhead.
    Step,
}

impl Op {
    /// Every part, in the order of a step.
    pub const ALL: [Self; 15] = [
        Self::Embedding,
        Self::Norm,
        Self::Qkv,
        Self::Rope,
        Self::Attention,
        Self::Output,
        Self::GateUp,
        Self::Gate,
        Self::Down,
        Self::Residual,
        Self::Lora,
        Self::Head,
        Self::Sampling,
        Self::Scheduling,
        Self::Step,
    ];

    /// For tables and JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::Norm => "norm",
            Self::Qkv => "qkv",
            Self::Rope => "rope",
            Self::Attention => "attention",
            Self::Output => "o",
            Self::GateUp => "gate_up",
            Self::Gate => "gate",
            Self::Down => "down",
            Self::Residual => "residual",
            Self::Lora => "lora",
            Self::Head => "head",
            Self::Sampling => "sampling",
            Self::Scheduling => "scheduling",
            Self::Step => "step",
        }
    }
}

/// What an operation did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OpTotal {
    /// How often it ran.
    pub calls: u64,
    /// Its time.
    pub time: Duration,
    /// Bytes of weights or of the cache that it had to read, each once a call.
    pub bytes: u64,
    /// Multiplications and additions.
    pub operations: u64,
}

struct Cell {
    calls: AtomicU64,
    nanoseconds: AtomicU64,
    bytes: AtomicU64,
    operations: AtomicU64,
}

impl Cell {
    const fn new() -> Self {
        Self {
            calls: AtomicU64::new(0),
            nanoseconds: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            operations: AtomicU64::new(0),
        }
    }
}

/// Somebody has asked; the next step turns it on.
static IS_WANTED: AtomicBool = AtomicBool::new(false);
static IS_ON: AtomicBool = AtomicBool::new(false);
static CELLS: [Cell; Op::ALL.len()] = [const { Cell::new() }; Op::ALL.len()];

/// Begins anew, with the next [`Op::Step`]: a step that has begun is not noted in part.
pub fn start() {
    stop();
    IS_WANTED.store(true, Relaxed);
}

/// Ends, and returns what was noted since [`start`], in the order of [`Op::ALL`].
pub fn stop() -> Vec<(Op, OpTotal)> {
    IS_WANTED.store(false, Relaxed);
    IS_ON.store(false, Relaxed);
    let take = |cell: &Cell| OpTotal {
        calls: cell.calls.swap(0, Relaxed),
        time: Duration::from_nanos(cell.nanoseconds.swap(0, Relaxed)),
        bytes: cell.bytes.swap(0, Relaxed),
        operations: cell.operations.swap(0, Relaxed),
    };
    Op::ALL.into_iter().zip(CELLS.iter().map(take)).collect()
}

/// Times what happens until it is dropped.
#[must_use = "the time ends where this is dropped"]
pub struct Timer(Option<(Op, Instant)>);

/// Times `op`, if somebody profiles.
pub fn time(op: Op) -> Timer {
    if op == Op::Step && IS_WANTED.load(Relaxed) {
        IS_ON.store(true, Relaxed);
    }
    Timer(IS_ON.load(Relaxed).then(|| (op, Instant::now())))
}

impl Timer {
    /// The same, with the bytes that are read and the operations that are done.
    pub fn work(self, work: impl FnOnce() -> (usize, usize)) -> Self {
        if let Self(Some((op, _))) = self {
            let ((bytes, operations), cell) = (work(), &CELLS[op as usize]);
            cell.bytes.fetch_add(bytes as u64, Relaxed);
            cell.operations.fetch_add(operations as u64, Relaxed);
        }
        self
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        if let Some((op, begun)) = self.0 {
            let nanoseconds = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
            let cell = &CELLS[op as usize];
            cell.calls.fetch_add(1, Relaxed);
            cell.nanoseconds.fetch_add(nanoseconds, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_runs_between_start_and_stop_is_noted_and_nothing_else() {
        drop(time(Op::Rope).work(|| (1, 1)));
        start();
        drop(time(Op::Rope).work(|| (100, 100))); // In the middle of a step.
        let step = time(Op::Step);
        drop(time(Op::Rope).work(|| (3, 4)));
        drop(time(Op::Rope));
        drop(step);
        let noted = stop();
        drop(time(Op::Rope));
        let (op, total) = noted[Op::Rope as usize];
        // Other tests of this process may run a rope meanwhile, but none says its work.
        assert!(op == Op::Rope && total.calls >= 2);
        assert_eq!((total.bytes, total.operations), (3, 4));
        let named: Vec<Op> = noted.into_iter().map(|(op, _)| op).collect();
        assert_eq!(named, Op::ALL);
        assert_eq!(stop()[Op::Rope as usize].1, OpTotal::default());
    }
}

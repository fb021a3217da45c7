//! Who is let in next.
//!
//! By priority first, the lowest number before all others. Within one priority, those who ran already and
//! lost their blocks come first, the oldest before the others. Then the adapters take turns: each has a lane,
//! each lane counts the tokens that were run for it, and the lane that got least goes first. So a flood
//! of requests for one adapter delays the others' by one place, not by the flood. A lane that was empty
//! begins where the least served one stands: nobody saves up turns.
//!
//! Knows token counts and adapter keys; must never know tensors, channels or clocks.

use std::collections::BTreeMap;

use super::sequence::{Rank, Sequence};

/// The waiting sequences, and what each adapter has got so far.
pub(super) struct WaitingRoom<R> {
    /// By adapter; only those with a sequence that waits or runs.
    lanes: BTreeMap<usize, Lane<R>>,
    num_waiting: usize,
}

struct Lane<R> {
    waiting: BTreeMap<Rank, Sequence<R>>,
    num_running: usize,
    /// Tokens that were run, or will be now that their sequence runs.
    num_served_tokens: u64,
}

impl<R> WaitingRoom<R> {
    pub(super) fn new() -> Self {
        Self { lanes: BTreeMap::new(), num_waiting: 0 }
    }

    /// A sequence comes, for the first time or again.
    pub(super) fn push(&mut self, sequence: Sequence<R>) {
        let least = self.lanes.values().map(|lane| lane.num_served_tokens).min().unwrap_or(0);
        let empty = || Lane { waiting: BTreeMap::new(), num_running: 0, num_served_tokens: least };
        let lane = self.lanes.entry(sequence.adapter_key).or_insert_with(empty);
        lane.waiting.insert(sequence.rank, sequence);
        self.num_waiting += 1;
    }

    /// Takes out the next one.
    pub(super) fn pop(&mut self) -> Option<Sequence<R>> {
        let turn = |lane: &Lane<R>| {
            let (rank, sequence) = lane.waiting.first_key_value()?;
            let is_new = !sequence.was_preempted;
            let served = if is_new { lane.num_served_tokens } else { 0 };
            Some((rank.priority, is_new, served, rank.age))
        };
        let turns = self.lanes.values_mut().filter_map(|lane| Some((turn(lane)?, lane)));
        let (_, lane) = turns.min_by_key(|(turn, _)| *turn)?;
        self.num_waiting -= 1;
        lane.waiting.pop_first().map(|(_, sequence)| sequence)
    }

    /// A sequence of `adapter_key` that was taken out runs, which will take `num_tokens` at once.
    pub(super) fn started(&mut self, adapter_key: usize, num_tokens: usize) {
        if let Some(lane) = self.lanes.get_mut(&adapter_key) {
            lane.num_running += 1;
        }
        self.served(adapter_key, num_tokens);
    }

    /// A running sequence of `adapter_key` gets `num_tokens` more.
    pub(super) fn served(&mut self, adapter_key: usize, num_tokens: usize) {
        if let Some(lane) = self.lanes.get_mut(&adapter_key) {
            lane.num_served_tokens += num_tokens as u64;
        }
    }

    /// A running sequence of `adapter_key` does not run any more.
    pub(super) fn stopped(&mut self, adapter_key: usize) {
        if let Some(lane) = self.lanes.get_mut(&adapter_key) {
            lane.num_running -= 1;
        }
        self.close_empty_lanes();
    }

    /// Takes out every sequence for which `is_gone` is true.
    pub(super) fn remove(
        &mut self,
        mut is_gone: impl FnMut(&Sequence<R>) -> bool,
    ) -> Vec<Sequence<R>> {
        let mut gone = Vec::new();
        for lane in self.lanes.values_mut() {
            let leaving = lane.waiting.extract_if(.., |_, sequence| is_gone(sequence));
            gone.extend(leaving.map(|(_, sequence)| sequence));
        }
        self.num_waiting -= gone.len();
        self.close_empty_lanes();
        gone
    }

    fn close_empty_lanes(&mut self) {
        self.lanes.retain(|_, lane| lane.num_running > 0 || !lane.waiting.is_empty());
    }

    /// The waiting sequences, in no particular order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Sequence<R>> {
        self.lanes.values().flat_map(|lane| lane.waiting.values())
    }

    pub(super) fn len(&self) -> usize {
        self.num_waiting
    }

    pub(super) fn is_empty(&self) -> bool {
        self.num_waiting == 0
    }

    /// Adapters that somebody waits or runs for.
    #[cfg(test)]
    pub(super) fn num_lanes(&self) -> usize {
        self.lanes.len()
    }
}

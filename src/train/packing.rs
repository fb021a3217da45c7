//! How examples become the rows of a batch: each its own row, or several packed into one.
//!
//! A batch has no padding here, and sequences of one row never see each other, so packing changes
//! neither arithmetic nor memory of a token: a packed row is a group of examples that counts as one. What
//! it changes is how many examples a step has, and that steps have about equally many tokens.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Deserializer, Serialize};

/// Rows that are packed together at most, in the order of the data: as many as TRL packs at a time, so
/// that runs here and there have equally many steps.
const WINDOW: usize = 1000;
/// Batches that length-grouped sampling sorts together at most.
const MAX_MEGA_BATCH: usize = 50;

/// Which examples share a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Packing {
    /// None do.
    #[default]
    None,
    /// As many as `max_length` holds, found by best-fit decreasing.
    Bfd,
}

impl<'de> Deserialize<'de> for Packing {
    /// `none` or `bfd`; `true` is `bfd`, `false` is `none`.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Said {
            Flag(bool),
            Name(String),
        }
        match Said::deserialize(deserializer)? {
            Said::Flag(false) => Ok(Self::None),
            Said::Flag(true) => Ok(Self::Bfd),
            Said::Name(name) => match name.as_str() {
                "none" => Ok(Self::None),
                "bfd" => Ok(Self::Bfd),
                other => Err(serde::de::Error::custom(format!("{other:?} is not none or bfd"))),
            },
        }
    }
}

/// Packs examples of `lengths` tokens into rows of at most `limit`: by falling length, each into the row
/// with the least room that is enough (Ding et al. 2024, <https://arxiv.org/abs/2404.10830>). An example
/// that is longer than `limit` has a row of its own.
///
/// ```
/// assert_eq!(tunesmith::train::pack(&[5, 2, 3, 1], 5), [vec![0], vec![2, 1], vec![3]]);
/// ```
#[must_use]
pub fn pack(lengths: &[usize], limit: usize) -> Vec<Vec<usize>> {
    let mut rows = Vec::new();
    let all: Vec<usize> = (0..lengths.len()).collect();
    for window in all.chunks(WINDOW) {
        rows.extend(pack_window(lengths, window, limit));
    }
    rows
}

fn pack_window(lengths: &[usize], window: &[usize], limit: usize) -> Vec<Vec<usize>> {
    let mut by_length = window.to_vec();
    // Equally long ones keep their order.
    by_length.sort_by_key(|&index| std::cmp::Reverse(lengths[index]));
    let mut rows: Vec<Vec<usize>> = Vec::new();
    // Rows by the room that is left in them, the oldest first.
    let mut by_room: BTreeMap<usize, VecDeque<usize>> = BTreeMap::new();
    for index in by_length {
        let length = lengths[index];
        let best = by_room.range(length.max(1)..).next().map(|(&room, _)| room);
        let (row, room) = match best {
            None => {
                rows.push(Vec::new());
                (rows.len() - 1, limit)
            }
            Some(room) => {
                let waiting = by_room.entry(room).or_default();
                let row = waiting.pop_front().expect("a room without rows is removed");
                if waiting.is_empty() {
                    by_room.remove(&room);
                }
                (row, room)
            }
        };
        rows[row].push(index);
        if let Some(left) = room.checked_sub(length).filter(|&left| left > 0) {
            by_room.entry(left).or_default().push_back(row);
        }
    }
    rows
}

/// `order`, a permutation of rows, so rearranged that rows of one batch have similar lengths, as
/// transformers' `LengthGroupedSampler` does: batches are sorted by falling length within groups of up to
/// fifty, and the longest row comes first, so that memory runs out at once or never.
pub(super) fn group_by_length(order: &mut [usize], lengths: &[usize], batch_size: usize) {
    let mega_batch = (order.len() / (batch_size * 4)).clamp(1, MAX_MEGA_BATCH) * batch_size;
    for group in order.chunks_mut(mega_batch) {
        group.sort_by_key(|&row| std::cmp::Reverse(lengths[row]));
    }
    let longest = (0..order.len()).step_by(mega_batch).rev().max_by_key(|&at| lengths[order[at]]);
    if let Some(longest) = longest {
        order.swap(0, longest);
    }
}

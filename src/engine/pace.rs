//! How many prompt tokens a step may take while others wait for their next token.
//!
//! A step is as long as its rows, and nobody in it gets a token before its end. So the chunk of a prompt is cut
//! such that the step takes about as long as somebody may be kept waiting, going by how long steps took of
//! late. A row costs more the more positions it looks back on; how much is known from the model's shape. How a
//! prompt is cut changes no answer, so that a clock may decide about it.

use std::time::Duration;

use crate::model::{Step, StepSequence};

/// Rows of prompts that are never too many beside those who decode: they cost hardly more than one.
const LEAST_ROWS: usize = 16;
/// Rows of a first chunk, before any was measured.
const FIRST_ROWS: usize = 64;
/// Times that a step with the least rows takes longer than one with a single row, at most.
const LEAST_ROWS_COST: f64 = 3.0;
/// Part of the longest step that is aimed at, since no two steps take equally long.
const AIM: f64 = 0.9;
/// Weight of the newest step.
const NEWEST: f64 = 0.3;

/// What a step has to do, in rows without context.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct StepLoad {
    pub(super) rows: usize,
    load: f64,
}

/// Measures steps.
#[derive(Debug)]
pub(super) struct Pace {
    max_seconds: f64,
    /// What looking back on one position adds to a row, as a part of the rest of the row.
    position_cost: f64,
    /// Of a step with few rows.
    few_rows_seconds: Option<f64>,
    /// Of a unit of load in a step with many.
    seconds_per_load: Option<f64>,
}

impl Pace {
    /// Steps with somebody waiting should take at most `max_step`.
    pub(super) fn new(max_step: Duration, position_cost: f64) -> Self {
        let max_seconds = AIM * max_step.as_secs_f64();
        Self { max_seconds, position_cost, few_rows_seconds: None, seconds_per_load: None }
    }

    /// What `step` has to do.
    pub(super) fn load(&self, step: &Step<'_>) -> StepLoad {
        let of = |sequence: &StepSequence<'_>| {
            let middle = sequence.num_cached_tokens + sequence.num_tokens / 2;
            sequence.num_tokens as f64 * self.row(middle)
        };
        StepLoad { rows: step.tokens.len(), load: step.sequences.iter().map(of).sum() }
    }

    /// A step with this load took `time`.
    pub(super) fn observe(&mut self, StepLoad { rows, load }: StepLoad, time: Duration) {
        let seconds = time.as_secs_f64();
        let (average, newest) = if rows <= LEAST_ROWS {
            (&mut self.few_rows_seconds, seconds)
        } else {
            (&mut self.seconds_per_load, seconds / load)
        };
        let last = average.unwrap_or(newest);
        *average = Some(last + NEWEST * (newest - last));
    }

    /// Rows that a step should have at most, where `running` are the sequences' numbers of tokens to run and of
    /// cached tokens.
    pub(super) fn max_rows(&self, running: impl Iterator<Item = (usize, usize)>) -> usize {
        let (mut num_decodes, mut load, mut longest) = (0, 0.0, 0);
        for (num_remaining_tokens, num_cached_tokens) in running {
            if num_remaining_tokens == 1 {
                num_decodes += 1;
                load += self.row(num_cached_tokens);
            } else {
                longest = longest.max(num_cached_tokens);
            }
        }
        // A quotient that is no number becomes 0, one that is too large the largest number.
        let rows = ((self.max_load() - load) / self.row(longest)) as usize;
        rows.max(LEAST_ROWS).saturating_add(num_decodes)
    }

    fn max_load(&self) -> f64 {
        match (self.seconds_per_load, self.few_rows_seconds) {
            (Some(seconds), _) => self.max_seconds / seconds,
            (None, Some(seconds)) => {
                let load = LEAST_ROWS as f64 * self.max_seconds / (LEAST_ROWS_COST * seconds);
                load.min(FIRST_ROWS as f64)
            }
            (None, None) => FIRST_ROWS as f64,
        }
    }

    /// The load of a row that looks back on so many positions.
    fn row(&self, position: usize) -> f64 {
        1.0 + self.position_cost * position as f64
    }
}

#[cfg(test)]
mod tests {
    use std::iter::{empty, once, repeat_n};

    use super::*;

    fn rows(rows: usize) -> StepLoad {
        StepLoad { rows, load: rows as f64 }
    }

    #[test]
    fn steps_come_to_take_as_long_as_they_may() {
        let mut pace = Pace::new(Duration::from_millis(200), 0.0);
        assert_eq!(pace.max_rows(empty()), FIRST_ROWS);
        for _ in 0..30 {
            let num_rows = pace.max_rows(empty());
            pace.observe(rows(num_rows), Duration::from_millis(2) * num_rows as u32);
            pace.observe(rows(1), Duration::from_millis(40)); // Tells nothing about chunks.
        }
        assert!((89..=91).contains(&pace.max_rows(empty())), "{}", pace.max_rows(empty()));
        (0..30).for_each(|_| pace.observe(rows(32), Duration::from_secs(9)));
        assert_eq!(pace.max_rows(empty()), LEAST_ROWS);
    }

    #[test]
    fn the_first_chunk_of_a_slow_model_is_a_small_one() {
        let mut pace = Pace::new(Duration::from_millis(250), 0.0);
        pace.observe(rows(1), Duration::from_millis(50));
        assert!((23..=24).contains(&pace.max_rows(once((1, 10)))));
        let mut slow = Pace::new(Duration::from_millis(250), 0.0);
        slow.observe(rows(1), Duration::from_secs(2));
        assert_eq!(slow.max_rows(once((1, 10))), LEAST_ROWS + 1);
    }

    #[test]
    fn a_long_context_leaves_room_for_fewer_rows() {
        let mut pace = Pace::new(Duration::from_millis(100), 1.0 / 1000.0);
        pace.observe(rows(100), Duration::from_millis(100));
        assert_eq!(pace.max_rows(once((500, 0))), 90);
        assert_eq!(pace.max_rows(once((500, 3000))), 22);
        // Those who decode have their context, too: 10 rows of load 2.
        assert_eq!(pace.max_rows(repeat_n((1, 1000), 10).chain([(500, 0)])), 70 + 10);
        // Whatever the context: a step as long as asked for stays as long.
        for context in [0, 500, 2000, 4000] {
            let num_rows = pace.max_rows(once((500, context)));
            let load = num_rows as f64 * pace.row(context);
            assert!(load <= 91.0 || num_rows == LEAST_ROWS, "{context}: {load}");
        }
    }
}

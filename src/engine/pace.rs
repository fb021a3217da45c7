//! How many prompt tokens a step may take while others wait for their next token.
//!
//! A step is as long as its rows, and nobody in it gets a token before its end. So the chunk of a prompt is cut
//! such that the step takes about as long as somebody may be kept waiting, going by how long steps took of
//! late. How a prompt is cut changes no answer, so that a clock may decide about it.

use std::time::Duration;

/// Rows that are never too many: fewer would not use the machine.
const LEAST_ROWS: usize = 32;
/// A guess, before anything was measured.
const FIRST_ROWS: usize = 64;
/// Weight of the newest step.
const NEWEST: f64 = 0.3;

/// Measures steps.
#[derive(Debug)]
pub(super) struct Pace {
    max_seconds: f64,
    /// Of steps with enough rows to tell.
    seconds_per_row: Option<f64>,
}

impl Pace {
    /// Steps with somebody waiting should take at most `max_step`.
    pub(super) fn new(max_step: Duration) -> Self {
        Self { max_seconds: max_step.as_secs_f64(), seconds_per_row: None }
    }

    /// A step of `num_rows` rows took `time`.
    pub(super) fn observe(&mut self, num_rows: usize, time: Duration) {
        if num_rows >= LEAST_ROWS {
            let newest = time.as_secs_f64() / num_rows as f64;
            let last = self.seconds_per_row.unwrap_or(newest);
            self.seconds_per_row = Some(last + NEWEST * (newest - last));
        }
    }

    /// Rows that a step should have at most.
    pub(super) fn max_rows(&self) -> usize {
        match self.seconds_per_row {
            // A quotient that is no number becomes 0, one that is too large the largest number.
            Some(seconds) => ((self.max_seconds / seconds) as usize).max(LEAST_ROWS),
            None => FIRST_ROWS,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_come_to_take_as_long_as_they_may() {
        let mut pace = Pace::new(Duration::from_millis(200));
        assert_eq!(pace.max_rows(), FIRST_ROWS);
        for _ in 0..30 {
            let rows = pace.max_rows();
            pace.observe(rows, Duration::from_millis(2) * rows as u32);
            pace.observe(1, Duration::from_millis(40)); // Tells nothing about chunks.
        }
        assert!((99..=101).contains(&pace.max_rows()), "{}", pace.max_rows());
        (0..30).for_each(|_| pace.observe(32, Duration::from_secs(9)));
        assert_eq!(pace.max_rows(), LEAST_ROWS);
    }
}

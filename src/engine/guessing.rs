//! How many rows a step of decoding sequences should have, guesses included.
//!
//! A guess costs a row, and what a row costs depends on the machine, the model and the rows that are there already:
//! beside one row it may be free, beside eight it may cost an eighth. So the time of steps is measured for each
//! number of rows, and rows are added as long as the tokens that come of it, going by how many guesses were right
//! of late, come faster. Guesses change no answer, so that a clock may decide about them.

use std::time::Duration;

/// Most rows of a step with guesses.
pub(super) const MAX_ROWS: usize = 16;
/// Weight of the newest step.
const NEWEST: f64 = 0.2;
/// Steps after which a measurement that was not repeated is forgotten, so that it is made again.
const MAX_AGE: u32 = 256;

/// Measures steps without prompts.
#[derive(Debug)]
pub(super) struct Guessing {
    /// Seconds of a step with so many rows, and the steps since it was measured.
    steps: [Option<(f64, u32)>; MAX_ROWS + 1],
    /// Share of guesses that were right.
    share: f64,
}

impl Guessing {
    pub(super) fn new() -> Self {
        Self { steps: [None; MAX_ROWS + 1], share: 0.5 }
    }

    /// A step with `num_rows` rows took `time`; `num_right` of its `num_guesses` were right.
    pub(super) fn observe(
        &mut self,
        num_rows: usize,
        time: Duration,
        (num_guesses, num_right): (u64, u64),
    ) {
        if num_guesses > 0 {
            let newest = num_right as f64 / num_guesses as f64;
            self.share += NEWEST * (newest - self.share);
        }
        if num_rows > MAX_ROWS {
            return;
        }
        for step in &mut self.steps {
            *step = step.map(|(seconds, age)| (seconds, age + 1)).filter(|(_, age)| *age < MAX_AGE);
        }
        let newest = time.as_secs_f64();
        let last = self.steps[num_rows].map_or(newest, |(seconds, _)| seconds);
        self.steps[num_rows] = Some((last + NEWEST * (newest - last), 0));
    }

    /// Rows that a step of `num_decodes` sequences should have, each with at most `max_guesses`.
    pub(super) fn best_rows(&self, num_decodes: usize, max_guesses: usize) -> usize {
        // What was not measured is taken to be free, so that it is tried.
        let (mut seconds, mut best) = (0.0_f64, (0.0, num_decodes));
        let most = num_decodes.saturating_mul(1 + max_guesses).min(MAX_ROWS);
        for num_rows in num_decodes..=most {
            seconds = self.steps[num_rows].map_or(seconds, |(measured, _)| measured.max(seconds));
            let tokens = num_decodes as f64 + self.share * (num_rows - num_decodes) as f64;
            let rate = tokens / seconds.max(f64::MIN_POSITIVE);
            if rate > best.0 {
                best = (rate, num_rows);
            }
        }
        best.1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs steps of `num_decodes` sequences on a machine whose steps take `milliseconds(rows)`.
    fn settle(num_decodes: usize, share: u64, milliseconds: impl Fn(usize) -> u64) -> usize {
        let mut guessing = Guessing::new();
        let mut rows = num_decodes;
        for _ in 0..200 {
            rows = guessing.best_rows(num_decodes, 99);
            let num_guesses = (rows - num_decodes) as u64 * 10;
            let time = Duration::from_millis(milliseconds(rows));
            guessing.observe(rows, time, (num_guesses, num_guesses * share / 100));
        }
        rows
    }

    #[test]
    fn rows_that_are_free_are_used_and_rows_that_cost_too_much_are_not() {
        assert_eq!(settle(1, 50, |_| 30), MAX_ROWS);
        // Each row costs as much as the first one.
        assert_eq!(settle(1, 50, |rows| 30 * rows as u64), 1);
        // Eight at the price of one, more at twice the price.
        let stairs = |rows: usize| if rows <= 8 { 40 } else { 80 };
        assert_eq!(settle(4, 50, stairs), 8);
        assert_eq!(settle(8, 50, stairs), 8);
        assert_eq!(settle(8, 30, |rows| 40 + rows as u64 / 9), MAX_ROWS);
        assert_eq!(settle(20, 50, |_| 40), 20);
    }

    #[test]
    fn rows_that_nobody_can_fill_are_not_taken_to_be_free() {
        let mut guessing = Guessing::new();
        for rows in 1..=3 {
            guessing.observe(rows, Duration::from_secs(rows as u64), (0, 0));
        }
        assert_eq!(guessing.best_rows(1, 2), 1);
        assert_eq!(guessing.best_rows(1, 0), 1);
    }

    #[test]
    fn a_measurement_is_made_again_after_a_while() {
        let mut guessing = Guessing::new();
        guessing.observe(1, Duration::from_millis(30), (0, 0));
        for rows in 2..=MAX_ROWS {
            guessing.observe(rows, Duration::from_secs(9), (0, 0)); // The machine was busy.
        }
        assert_eq!(guessing.best_rows(1, 99), 1);
        for _ in 0..MAX_AGE {
            guessing.observe(1, Duration::from_millis(30), (0, 0));
        }
        assert_eq!(guessing.best_rows(1, 99), MAX_ROWS);
    }
}

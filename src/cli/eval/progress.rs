//! What an evaluation looks like while it runs: a bar on a terminal, plain lines elsewhere.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

use crate::eval::Progress;

/// Plain lines come at most this often.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Shows how many requests have ended.
pub(super) struct EvalProgress {
    /// The bar; `None` where nobody looks at a terminal.
    bar: Option<ProgressBar>,
    num_arms: usize,
    start: Instant,
    last_line: Instant,
}

impl EvalProgress {
    /// For an evaluation of `num_arms` arms; a bar if the standard error stream is a terminal.
    pub(super) fn new(num_arms: usize) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let template = "{bar:30.blue/white} {pos}/{len} requests  {msg}";
            let style = ProgressStyle::with_template(template);
            ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Self { bar, num_arms, start: Instant::now(), last_line: Instant::now() }
    }

    /// Shows one step.
    pub(super) fn show(&mut self, progress: Progress) {
        let Progress { done, total } = progress;
        let seconds = self.start.elapsed().as_secs_f64().max(1e-9);
        // Two requests, the answer and its score, for every arm.
        let rows_per_second = done as f64 / (2 * self.num_arms) as f64 / seconds;
        let left = Duration::from_secs_f64(seconds * (total - done) as f64 / done.max(1) as f64);
        let message = format!("{rows_per_second:.1} rows/s  {:#} left", HumanDuration(left));
        if let Some(bar) = &self.bar {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
            bar.set_message(message);
        } else if done == total || self.last_line.elapsed() >= LINE_INTERVAL {
            self.last_line = Instant::now();
            println!("evaluated {done}/{total} requests  {message}");
        }
    }

    /// Removes the bar.
    pub(super) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

//! The learning rate of each optimizer step, with the numbers of `transformers`.

use super::config::ScheduleKind;

/// A learning rate that warms up in a line and then follows its kind.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// The curve after the warm-up.
    pub kind: ScheduleKind,
    /// The rate at the end of the warm-up.
    pub peak: f64,
    /// Steps of warm-up.
    pub warmup_steps: usize,
    /// Steps of the whole run.
    pub total_steps: usize,
}

impl Schedule {
    /// The rate of update `step`, counted from 0. With a warm-up the first update's rate is 0, as
    /// in `transformers`, which moves its schedule only after an update.
    #[must_use]
    pub fn learning_rate(&self, step: usize) -> f64 {
        if step < self.warmup_steps {
            return self.peak * (step as f64 / self.warmup_steps as f64);
        }
        let left = self.total_steps.saturating_sub(step) as f64;
        let span = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let factor = match self.kind {
            ScheduleKind::Constant => 1.0,
            ScheduleKind::Linear => left / span,
            ScheduleKind::Cosine => {
                let progress = (step - self.warmup_steps) as f64 / span;
                (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0)
            }
        };
        self.peak * factor
    }
}

/// Steps of warm-up: `steps` where given, else the share `ratio` of all steps, rounded up.
#[must_use]
pub fn warmup_steps(steps: usize, ratio: f64, total_steps: usize) -> usize {
    if steps > 0 { steps } else { (total_steps as f64 * ratio).ceil() as usize }
}

//! A run that no longer learns: a loss far above its median, a gradient of nothing.

use super::{TrainError, TrainEvent, Trainer, report};

/// A loss above this many times the median of the last steps is a spike.
const SPIKE_FACTOR: f64 = 3.0;
/// So many steps with a gradient of exactly 0 are no accident.
const DEAD_STEPS: usize = 5;
/// Steps whose median that is; fewer at the start of a run.
const SPIKE_WINDOW: usize = 20;

impl Trainer<'_> {
    /// Ends a run whose gradient has become nothing. Warns when the loss has been far above its median
    /// for `spike_steps` steps, and ends the run there if that is wanted. The newest good checkpoint
    /// stays.
    pub(super) fn watch_for_spikes(&mut self) -> Result<(), TrainError> {
        let config = &self.job.config;
        if let Some(loss) = report::no_slope(self.log.events(), DEAD_STEPS) {
            return Err(TrainError::NoSlope { step: self.step, steps: DEAD_STEPS, loss });
        }
        let Some((median, loss)) =
            report::spike(self.log.events(), SPIKE_WINDOW, SPIKE_FACTOR, config.spike_steps)
        else {
            return Ok(());
        };
        let (step, steps) = (self.step, config.spike_steps);
        if config.stop_on_spike {
            return Err(TrainError::LossSpike { step, steps, loss, median });
        }
        let message = format!(
            "the loss is {loss:.3} at step {step} and has been above {SPIKE_FACTOR} times its median \
             ({median:.3}) for {steps} steps; a lower lr or a longer warm-up may help"
        );
        self.say(TrainEvent::Warning { message })
    }
}

//! Waiting at a step border until somebody lets the run go on.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread::sleep,
    time::{Duration, Instant},
};

use super::{TrainError, TrainEvent, Trainer};

/// How often a waiting run looks whether it may go on.
const POLL: Duration = Duration::from_millis(50);

impl Trainer<'_> {
    /// Waits as long as a pause is asked for, or until `stop` is set. What there is goes into a
    /// checkpoint first, so that nothing is lost by whatever happens meanwhile. The time does not count.
    pub(super) fn wait_while_paused(&mut self, stop: &AtomicBool) -> Result<(), TrainError> {
        let Some(pause) = self.pause.filter(|pause| pause.load(Ordering::Relaxed)) else {
            return Ok(());
        };
        let begun = Instant::now();
        if self.last_checkpoint.1 < self.step {
            self.write_checkpoint()?;
        }
        self.say(TrainEvent::Paused { step: self.step })?;
        while pause.load(Ordering::Relaxed) && !stop.load(Ordering::Relaxed) {
            sleep(POLL);
        }
        let waited = begun.elapsed();
        self.started += waited;
        self.last_checkpoint.0 += waited;
        self.say(TrainEvent::Continued { step: self.step, seconds: waited.as_secs_f64() })
    }
}

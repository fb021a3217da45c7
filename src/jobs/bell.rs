//! How threads that wait for work hear that there is some.

use std::{
    sync::{Condvar, Mutex, PoisonError},
    time::Duration,
};

/// Rung by whoever changes something, heard by every thread that acts upon it.
#[derive(Debug, Default)]
pub struct Bell {
    rings: Mutex<u64>,
    changed: Condvar,
}

impl Bell {
    /// Wakes every waiting thread, and those that are busy at their next wait.
    pub fn ring(&self) {
        *self.rings.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.changed.notify_all();
    }

    /// Waits for a ring that came after the `heard`-th, at most `limit`. `heard` is the caller's own
    /// count, 0 at first.
    pub fn wait(&self, heard: &mut u64, limit: Duration) {
        let rings = self.rings.lock().unwrap_or_else(PoisonError::into_inner);
        let (rings, _) = self
            .changed
            .wait_timeout_while(rings, limit, |rings| *rings == *heard)
            .unwrap_or_else(PoisonError::into_inner);
        *heard = *rings;
    }
}

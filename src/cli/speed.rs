//! How fast a run goes, of late: the first step also warms caches and fetches memory, and says little about
//! the others.

use std::collections::VecDeque;

/// Steps that are looked at, at least.
const STEPS: usize = 10;
/// Seconds of steps that are looked at, at least.
const SECONDS: f64 = 30.0;

/// The last steps: ten of them, or those of half a minute if these are more.
#[derive(Debug, Clone, Default)]
pub(super) struct Speed {
    /// Tokens and seconds of each.
    steps: VecDeque<(usize, f64)>,
    /// Whether the first step has made room for the others.
    is_warm: bool,
    seconds: f64,
    tokens: usize,
}

impl Speed {
    /// Takes in a step.
    pub(super) fn add(&mut self, tokens: usize, seconds: f64) {
        if !self.is_warm && !self.steps.is_empty() {
            self.is_warm = true;
            *self = Self { is_warm: true, ..Self::default() };
        }
        self.steps.push_back((tokens, seconds));
        self.tokens += tokens;
        self.seconds += seconds;
        while self.steps.len() > STEPS
            && let Some(&(tokens, seconds)) = self.steps.front()
            && self.seconds - seconds >= SECONDS
        {
            self.steps.pop_front();
            self.tokens -= tokens;
            self.seconds -= seconds;
        }
    }

    /// Of one step; none before the first.
    pub(super) fn seconds_per_step(&self) -> Option<f64> {
        (!self.steps.is_empty()).then(|| self.seconds / self.steps.len() as f64)
    }

    /// None before the first step.
    pub(super) fn tokens_per_second(&self) -> Option<f64> {
        (!self.steps.is_empty()).then(|| self.tokens as f64 / self.seconds.max(1e-9))
    }
}

#[cfg(test)]
mod tests {
    use super::Speed;

    #[test]
    fn the_first_step_does_not_count_once_there_are_others_nor_does_what_is_long_ago() {
        let mut speed = Speed::default();
        assert_eq!(speed.seconds_per_step(), None);
        speed.add(100, 8.0);
        assert_eq!(speed.tokens_per_second(), Some(12.5));
        speed.add(100, 2.0);
        speed.add(300, 2.0);
        assert_eq!((speed.seconds_per_step(), speed.tokens_per_second()), (Some(2.0), Some(100.0)));
        // Half a minute of 4-second steps is fewer than ten: ten they are.
        for _ in 0..10 {
            speed.add(100, 4.0);
        }
        assert_eq!((speed.seconds_per_step(), speed.tokens_per_second()), (Some(4.0), Some(25.0)));
        // Of steps of half a second sixty are looked at.
        for _ in 0..59 {
            speed.add(10, 0.5);
        }
        assert!(speed.seconds_per_step().unwrap() > 0.5);
        for _ in 0..10 {
            speed.add(10, 0.5);
        }
        assert_eq!(speed.seconds_per_step(), Some(0.5));
    }
}

//! What a run may have around it besides its observer.

use std::sync::atomic::AtomicBool;

use super::Examiner;

/// Everything is optional.
#[derive(Default)]
pub struct Surroundings<'a> {
    /// Somebody who is asked at validations and before the output is published.
    pub examiner: Option<&'a mut dyn Examiner>,
    /// While it is true, the run waits at the next step border.
    pub pause: Option<&'a AtomicBool>,
}

impl Surroundings<'_> {
    /// The same for one of several runs.
    #[must_use]
    pub fn lend(&mut self) -> Surroundings<'_> {
        // A plain `as_deref_mut` would lend it for too long.
        let examiner = self.examiner.as_mut().map(|examiner| &mut **examiner as &mut dyn Examiner);
        Surroundings { examiner, pause: self.pause }
    }
}

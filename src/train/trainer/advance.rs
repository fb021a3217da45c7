//! A run that goes on for some steps and then waits in a checkpoint, as those of a sweep do.

use std::{fs, sync::atomic::AtomicBool};

use super::{
    Base, EventLog, Outcome, Surroundings, TrainError, TrainEvent, TrainJob, TrainSummary, Trainer,
    best::Standing, output,
};
use crate::train::workspace::{EVENTS_FILE, Workspace};

/// Where a run is.
pub(in crate::train) enum Position {
    /// Published, now or before.
    Published(TrainSummary, Option<Standing>),
    /// In a checkpoint, validated on all rows.
    Waiting(Option<Standing>),
    /// Asked to stop.
    Stopped(TrainSummary),
}

/// A run whose turn it is.
pub(in crate::train) struct Turn<'a> {
    pub(in crate::train) job: &'a TrainJob,
    pub(in crate::train) base: &'a Base,
    pub(in crate::train) observer: &'a mut dyn FnMut(&TrainEvent),
    pub(in crate::train) surroundings: Surroundings<'a>,
    pub(in crate::train) stop: &'a AtomicBool,
}

impl<'a> Turn<'a> {
    /// Brings the run to `until` steps, from wherever it is. One that has no more steps to make is
    /// published, and so is one that ends by itself.
    pub(in crate::train) fn advance(self, until: usize) -> Result<Position, TrainError> {
        let (job, stop) = (self.job, self.stop);
        if let Some(summary) = published(job)? {
            let log = read_log(job)?;
            return Ok(Position::Published(summary, standing(job, log.events(), until)));
        }
        let mut trainer = self.open()?;
        trainer.until = until.min(trainer.schedule.total_steps);
        let outcome = trainer.train(stop)?;
        if outcome == Outcome::Stopped {
            return Ok(Position::Stopped(trainer.stop()?));
        }
        if outcome != Outcome::Finished || trainer.step == trainer.schedule.total_steps {
            return publish(trainer, job, outcome, until);
        }
        let known = standing(job, trainer.log.events(), until);
        // It may have come further before the process was killed.
        if trainer.step > until && known.is_some() {
            return Ok(Position::Waiting(known));
        }
        trainer.validate_fully()?;
        trainer.weigh()?;
        trainer.write_checkpoint()?;
        Ok(Position::Waiting(standing(job, trainer.log.events(), until)))
    }

    /// Publishes what the run has come to. `outcome` says why it goes no further.
    pub(in crate::train) fn finish(self, outcome: Outcome) -> Result<(), TrainError> {
        if published(self.job)?.is_none() {
            self.open()?.publish(outcome)?;
        }
        Ok(())
    }

    fn open(self) -> Result<Trainer<'a>, TrainError> {
        let Self { job, base, observer, surroundings, stop } = self;
        let workspace = Workspace::open(&job.config.output)?;
        let mut trainer = Trainer::new(job, Some(workspace), observer, Some(base), stop)?;
        trainer.examiner = surroundings.examiner;
        trainer.pause = surroundings.pause;
        Ok(trainer)
    }
}

fn published(job: &TrainJob) -> Result<Option<TrainSummary>, TrainError> {
    job.config.validate()?;
    output::check(job)
}

fn publish(
    trainer: Trainer<'_>,
    job: &TrainJob,
    outcome: Outcome,
    until: usize,
) -> Result<Position, TrainError> {
    let summary = trainer.publish(outcome)?;
    let log = read_log(job)?;
    Ok(Position::Published(summary, standing(job, log.events(), until)))
}

fn read_log(job: &TrainJob) -> Result<EventLog, TrainError> {
    let path = job.config.output.join(EVENTS_FILE);
    let text = fs::read_to_string(&path);
    Ok(EventLog::from_text(&text.map_err(|source| TrainError::File { path, source })?))
}

/// What counts of the validations up to `until`: the best where it is kept, else the newest.
fn standing(job: &TrainJob, events: &[TrainEvent], until: usize) -> Option<Standing> {
    if job.config.keep_best {
        return Standing::of(events, until, 0.0);
    }
    let counts = |event: &TrainEvent| matches!(event, TrainEvent::Validated { step, full: true, .. } if *step <= until);
    let newest = events.iter().rposition(counts)?;
    Standing::of(&events[newest..=newest], until, 0.0)
}

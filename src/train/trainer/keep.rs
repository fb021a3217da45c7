//! Checkpoints of a run: going back to the newest good one, and writing the next.

use std::time::Instant;

use super::{TrainError, TrainEvent, Trainer, checkpoint};

impl Trainer<'_> {
    /// Goes back to the newest good checkpoint, if there is one.
    pub(super) fn resume(&mut self) -> Result<(), TrainError> {
        let Some(workspace) = &self.workspace else { return Ok(()) };
        let mut skipped = Vec::new();
        let mut remember = |reason: &TrainError| skipped.push(reason.to_string());
        let found = checkpoint::newest_checkpoint(&workspace.checkpoints(), &mut remember)?;
        if let Some(mut checkpoint) = found {
            self.recipe.check(&checkpoint.recipe, &checkpoint.path)?;
            self.log = std::mem::take(&mut checkpoint.log);
            self.step = checkpoint.step;
            self.last_checkpoint = (Instant::now(), self.step);
            checkpoint.restore(&mut self.optimizer)?;
        }
        for reason in skipped {
            let message = format!("a checkpoint is not usable and was passed over: {reason}");
            self.say(TrainEvent::Warning { message })?;
        }
        Ok(())
    }

    pub(super) fn write_checkpoint(&mut self) -> Result<(), TrainError> {
        let Some(workspace) = &self.workspace else { return Ok(()) };
        let folder = workspace.checkpoints();
        let path = checkpoint::write_checkpoint(
            &folder,
            self.step,
            &self.optimizer,
            &self.recipe,
            &self.log,
        )?;
        self.last_checkpoint = (Instant::now(), self.step);
        self.say(TrainEvent::Checkpointed { step: self.step, path })?;
        // The new one is whole: old ones that stay cost room and nothing else.
        match checkpoint::prune_checkpoints(&folder) {
            Ok(()) => Ok(()),
            Err(error) => self.say(TrainEvent::Warning { message: error.to_string() }),
        }
    }
}

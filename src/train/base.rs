//! What several runs share: the base, and what it says of pairs before anything is learned.

use std::{
    cell::OnceCell,
    sync::{Arc, atomic::AtomicBool},
};

use super::{
    TrainConfig, TrainError, TrainJob,
    objective::{PairLogProbs, references},
    trainable::Trainable,
    workers::Workers,
};
use crate::model::Decoder;

/// A base that is loaded once.
pub(super) struct Base {
    decoder: Arc<Decoder>,
    /// Of training and of validation pairs. A fresh adapter changes nothing, and one that all runs start
    /// from is the same for all, so these are the same as well.
    references: OnceCell<(Vec<PairLogProbs>, Vec<PairLogProbs>)>,
}

impl Base {
    /// The base of `job`, as its settings want it held.
    pub(super) fn load(job: &TrainJob) -> Result<Self, TrainError> {
        let decoder = Arc::new(Decoder::load(&job.model_dir, job.config.quantize.into())?);
        Ok(Self { decoder, references: OnceCell::new() })
    }

    /// With the adapter that `config` asks for.
    pub(super) fn trainable(&self, config: &TrainConfig) -> Result<Trainable, TrainError> {
        Trainable::over(Arc::clone(&self.decoder), config)
    }

    /// Computed the first time.
    pub(super) fn references(
        &self,
        model: &Trainable,
        workers: &Workers,
        job: &TrainJob,
        stop: &AtomicBool,
    ) -> Result<(Vec<PairLogProbs>, Vec<PairLogProbs>), TrainError> {
        if let Some(known) = self.references.get() {
            return Ok(known.clone());
        }
        let computed = references(model, workers, job, stop)?;
        // One that was cut short by a stop must not pass for all.
        let is_whole = !stop.load(std::sync::atomic::Ordering::Relaxed);
        if is_whole { Ok(self.references.get_or_init(|| computed).clone()) } else { Ok(computed) }
    }
}

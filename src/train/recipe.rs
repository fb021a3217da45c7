//! What decides the numbers of a run: settings, base and data. Two runs with equal recipes publish
//! equal weights, and a checkpoint continues only under its own recipe.

use std::{collections::BTreeMap, path::Path};

use serde::{Deserialize, Serialize};

use super::{Schedule, TrainError, TrainJob, trainable::Trainable};
use crate::data::Example;
use crate::publish::sha256_hex;

/// Keys that must agree, with their values as JSON text: a text compares exactly, while a number
/// that was read back may be rounded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Recipe(pub BTreeMap<String, String>);

impl Recipe {
    /// The settings of `job` with the defaults resolved, and the hashes of base and examples.
    pub(super) fn new(job: &TrainJob, model: &Trainable, schedule: &Schedule) -> Self {
        let mut recipe = job.config.recipe();
        recipe.insert("lr".to_owned(), schedule.peak.into());
        recipe.insert("total_steps".to_owned(), schedule.total_steps.into());
        recipe.insert("base_fingerprint".to_owned(), model.decoder.fingerprint().into());
        recipe.insert("examples_sha256".to_owned(), examples_sha256(&job.train).into());
        if job.config.init_adapter.is_some() {
            let digest = model.adapter.as_ref().map(|adapter| adapter.digest().to_owned());
            recipe.insert("init_adapter".to_owned(), digest.into());
        }
        Self(recipe.into_iter().map(|(key, value)| (key, value.to_string())).collect())
    }

    /// Checks that a checkpoint at `path` with the recipe `saved` may be continued.
    ///
    /// # Errors
    /// [`TrainError::OtherRun`] names the first key that differs, and both values.
    pub fn check(&self, saved: &Self, path: &Path) -> Result<(), TrainError> {
        let mut keys = saved.0.keys().chain(self.0.keys());
        let Some(key) = keys.find(|key| saved.0.get(*key) != self.0.get(*key)) else {
            return Ok(());
        };
        let show = |recipe: &Self| recipe.0.get(key).map_or("unset".to_owned(), String::clone);
        let difference = format!("{key} was {} and is now {}", show(saved), show(self));
        Err(TrainError::OtherRun { path: path.to_owned(), difference })
    }
}

/// Of tokens and masks: what rows, template, tokenizer and truncation came to.
fn examples_sha256(examples: &[Example]) -> String {
    let mut bytes = Vec::new();
    for example in examples.iter().flat_map(Example::sides) {
        bytes.extend((example.tokens.len() as u64).to_le_bytes());
        bytes.extend(example.tokens.iter().flat_map(|token| token.to_le_bytes()));
        bytes.extend(example.loss_mask.iter().map(|&counts| u8::from(counts)));
    }
    sha256_hex(&[&bytes])
}

//! The card that travels beside an adapter: what it was made from and how. PEFT refuses fields it
//! does not know in its own file, so ours stand in a file of their own.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{AdapterError, files::read_file};
use crate::publish::disk;

/// Largest card that is read, in bytes; a curve of 100 000 points fits.
const CARD_BYTES_LIMIT: u64 = 32 << 20;

/// Provenance of an adapter. Fields that a reader does not know are skipped, so that newer cards
/// can be read.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct AdapterCard {
    /// Program and version, "tunesmith 0.1.0".
    pub created_by: String,
    /// Unix seconds.
    pub created_at: u64,
    /// The base as the user named it: a folder or a Hub name.
    pub base_model: String,
    /// [`Decoder::fingerprint`](crate::model::Decoder::fingerprint) of the base; empty if unknown.
    pub base_fingerprint: String,
    /// SHA-256 of the training data, hex.
    pub data_sha256: String,
    /// Training rows.
    pub num_examples: u64,
    /// The resolved configuration of the run.
    pub configuration: Value,
    /// What the training logged, in the order of the steps.
    pub curve: Vec<CurvePoint>,
}

/// One logged step of a training run.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct CurvePoint {
    /// Optimizer step, from 1.
    pub step: u64,
    /// Mean negative log-likelihood per trained token, in nats.
    pub loss: Option<f64>,
    /// Learning rate of the step.
    pub learning_rate: Option<f64>,
    /// Mean negative log-likelihood per token of the validation rows, in nats.
    pub validation_loss: Option<f64>,
    /// Share of validation tokens where the arg max is the target, 0 to 1.
    pub validation_accuracy: Option<f64>,
}

impl AdapterCard {
    /// The card's file in an adapter folder.
    pub const FILE_NAME: &str = "tunesmith_card.json";

    /// Reads the card of an adapter folder; `None` if there is none.
    ///
    /// # Errors
    /// `MalformedConfig`, `TooLarge`, `Io`.
    pub fn read(dir: &Path) -> Result<Option<Self>, AdapterError> {
        let path = dir.join(Self::FILE_NAME);
        let bytes = match read_file(&path, CARD_BYTES_LIMIT) {
            Err(AdapterError::NotFound { .. }) => return Ok(None),
            other => other?,
        };
        serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|error| AdapterError::MalformedConfig { path, detail: error.to_string() })
    }

    /// Writes the card into an existing folder.
    ///
    /// # Errors
    /// `Io`.
    pub fn write(&self, dir: &Path) -> Result<(), AdapterError> {
        let path = dir.join(Self::FILE_NAME);
        let failed = |source| AdapterError::Io { path: path.clone(), source };
        let mut text = serde_json::to_string_pretty(self).map_err(|error| failed(error.into()))?;
        text.push('\n');
        Ok(disk::write(&path, text)?)
    }
}

/// Refuses an adapter whose card names another base. Without a card, or with one that does not
/// name a fingerprint, the shapes alone decide, and nobody asks for the base's.
///
/// # Errors
/// `WrongBase`, and those of [`AdapterCard::read`].
pub fn check_base<'a>(
    dir: &Path,
    base_fingerprint: impl FnOnce() -> &'a str,
) -> Result<(), AdapterError> {
    let found = AdapterCard::read(dir)?.map(|card| card.base_fingerprint).unwrap_or_default();
    if found.is_empty() {
        return Ok(());
    }
    let expected = base_fingerprint();
    if found == expected {
        return Ok(());
    }
    Err(AdapterError::WrongBase { expected: expected.to_owned(), found })
}

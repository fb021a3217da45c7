//! Does the server say of the new adapter what the trainer said?

use std::{path::Path, sync::Arc};

use serde::Deserialize;

use super::Service;
use crate::adapters::AdapterVersion;
use crate::engine::parity::{self, Parity, TrainedSequence};

/// What the trainer left in the adapter's folder.
#[derive(Deserialize)]
struct ParityFile {
    examples: Vec<ParityExample>,
}

#[derive(Deserialize)]
struct ParityExample {
    tokens: Vec<u32>,
    loss_mask: Vec<bool>,
    logprobs: Vec<f32>,
}

/// Compares server and trainer over the trainer's examples. `None` where there are none.
///
/// # Errors
/// In words: the file cannot be read, or the engine takes no requests any more.
pub(super) fn compare(
    service: &Service,
    version: &Arc<AdapterVersion>,
    dir: &Path,
) -> Result<Option<Parity>, String> {
    let path = dir.join("parity.json");
    let in_file = |error: &dyn std::error::Error| format!("{}: {error}", path.display());
    let file: ParityFile = match std::fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| in_file(&error))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(in_file(&error)),
    };
    let sequences = file.examples.iter().map(|example| TrainedSequence {
        tokens: &example.tokens,
        loss_mask: &example.loss_mask,
        logprobs: &example.logprobs,
    });
    let engine = &service.parts.engine;
    let parity = parity::compare(engine, Some(version), sequences, &|| service.is_stopping());
    let parity = parity.map_err(|error| error.to_string())?;
    Ok((parity.num_tokens > 0).then_some(parity))
}

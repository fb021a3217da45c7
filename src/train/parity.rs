//! `parity.json`: what the trainer says of some examples, for a server to compare with what it says.

use serde::Serialize;

use super::{MicroBatch, TrainError, trainable::Trainable};
use crate::data::Example;

/// Name of the file in the published folder.
pub(super) const PARITY_FILE: &str = "parity.json";

#[derive(Serialize)]
struct Parity<'a> {
    examples: Vec<ParityExample<'a>>,
}

/// A sequence and the log-probability of each of its trained tokens, in their order.
#[derive(Serialize)]
struct ParityExample<'a> {
    tokens: &'a [u32],
    loss_mask: &'a [bool],
    logprobs: Vec<f32>,
}

/// The file's text, from a forward pass without dropout over `examples` (of pairs, the preferred
/// answers).
pub(super) fn parity<'a>(
    model: &Trainable,
    examples: impl Iterator<Item = &'a Example>,
) -> Result<String, TrainError> {
    let mut found = Vec::new();
    for example in examples {
        let batch = MicroBatch::of_sequences(std::iter::once(example));
        let logprobs = if batch.rows.is_empty() {
            Vec::new()
        } else {
            model.forward(&batch, None)?.values()?
        };
        found.push(ParityExample {
            tokens: &example.tokens,
            loss_mask: &example.loss_mask,
            logprobs: logprobs.into_iter().map(|nll| -nll).collect(),
        });
    }
    let text = serde_json::to_string(&Parity { examples: found });
    Ok(text.expect("plain data is always JSON") + "\n")
}

//! What the trainer says of some examples, for a server to compare with what it says; `parity.json`
//! holds it for servers elsewhere.

use serde::Serialize;

use super::{MicroBatch, Scored, TrainError, trainable::Trainable};
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
    logprobs: &'a [f32],
}

/// A forward pass without dropout over `examples` (of pairs, the preferred answers).
pub(super) fn score<'a>(
    model: &Trainable,
    examples: impl Iterator<Item = &'a Example>,
) -> Result<Vec<Scored<'a>>, TrainError> {
    let mut scored = Vec::new();
    for example in examples {
        let batch = MicroBatch::of_sequences(std::iter::once(example));
        let losses =
            if batch.rows.is_empty() { Vec::new() } else { model.forward(&batch)?.values()? };
        scored.push(Scored { example, logprobs: losses.into_iter().map(|nll| -nll).collect() });
    }
    Ok(scored)
}

/// The file's text.
pub(super) fn text(scored: &[Scored<'_>]) -> String {
    let mut examples = Vec::with_capacity(scored.len());
    for Scored { example, logprobs } in scored {
        let (tokens, loss_mask) = (&example.tokens, &example.loss_mask);
        examples.push(ParityExample { tokens, loss_mask, logprobs });
    }
    let text = serde_json::to_string(&Parity { examples });
    text.expect("plain data is always JSON") + "\n"
}

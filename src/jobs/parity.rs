//! Does the server say of the new adapter what the trainer said?

use std::{path::Path, sync::Arc, time::Duration};

use serde::Deserialize;

use super::Service;
use crate::adapters::AdapterVersion;
use crate::engine::{
    EngineError, GenerationEvent, GenerationRequest, GenerationStream, RequestOptions,
    SamplingParams,
};
use crate::model::KvDtype;

/// Largest difference of a log-probability that rounding can explain, the cache's included. (The trainer
/// has compared the adapter with an engine whose cache is exact before it published anything.)
pub(super) fn tolerance(kv_dtype: KvDtype) -> f64 {
    match kv_dtype {
        KvDtype::F32 => 1e-3,
        KvDtype::Bf16 => 0.2,
        KvDtype::Int8 => 0.5,
    }
}

/// How long to wait where the engine has no place for another request.
const PATIENCE: Duration = Duration::from_millis(20);

/// What the trainer left in the adapter's folder.
#[derive(Deserialize)]
struct ParityFile {
    examples: Vec<ParityExample>,
}

#[derive(Deserialize)]
struct ParityExample {
    tokens: Vec<u32>,
    loss_mask: Vec<bool>,
    /// Of the trained tokens, in their order.
    logprobs: Vec<f32>,
}

/// What a comparison found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Parity {
    /// Over all tokens; infinite where the server had no answer.
    pub(super) max_difference: f64,
    /// Tokens that were compared.
    pub(super) num_tokens: usize,
}

/// Scores the trainer's examples through the engine. `None` where there are none.
///
/// # Errors
/// In words: the file cannot be read, or the engine takes no requests any more.
pub(super) fn compare(
    service: &Service,
    version: &Arc<AdapterVersion>,
    dir: &Path,
) -> Result<Option<Parity>, String> {
    let path = dir.join("parity.json");
    let file: ParityFile = match std::fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map_err(|error| format!("{}: {error}", path.display()))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("{}: {error}", path.display())),
    };
    let mut parity = Parity { max_difference: 0.0, num_tokens: 0 };
    for example in &file.examples {
        let Some(served) = score(service, version, &example.tokens)? else { continue };
        let trained = example.loss_mask.iter().enumerate().filter(|(_, trained)| **trained);
        let mut told = example.logprobs.iter();
        for (position, _) in trained {
            // The first token follows nothing, so there is no score of it.
            let (Some(told), Some(place)) = (told.next(), position.checked_sub(1)) else {
                continue;
            };
            let difference =
                served.get(place).map_or(f64::INFINITY, |served| f64::from(served - told).abs());
            // A comparison with NaN would pass unseen.
            let difference = if difference.is_nan() { f64::INFINITY } else { difference };
            parity.max_difference = parity.max_difference.max(difference);
            parity.num_tokens += 1;
        }
    }
    Ok((parity.num_tokens > 0).then_some(parity))
}

/// Log-probabilities of `tokens` 1.., as served. `None` where the server's context is too short for
/// them.
fn score(
    service: &Service,
    version: &Arc<AdapterVersion>,
    tokens: &[u32],
) -> Result<Option<Vec<f32>>, String> {
    let Some(mut stream) = submit(service, version, tokens)? else { return Ok(None) };
    let mut scores = Vec::new();
    while let Some(event) = stream.blocking_next() {
        match event {
            GenerationEvent::PromptScores(found) => {
                scores = found.iter().map(|score| score.logprob).collect();
            }
            GenerationEvent::Failed { message } => return Err(message),
            GenerationEvent::Token { .. } | GenerationEvent::Finished { .. } => {}
        }
    }
    Ok(Some(scores))
}

fn submit(
    service: &Service,
    version: &Arc<AdapterVersion>,
    tokens: &[u32],
) -> Result<Option<GenerationStream>, String> {
    loop {
        let taken = service.parts.engine.generate(GenerationRequest {
            prompt: tokens.to_vec(),
            adapter: Some(Arc::clone(version)),
            sampling: SamplingParams::greedy(),
            max_tokens: 0,
            stop_token_ids: Vec::new(),
            score_prompt: true,
            options: RequestOptions::default(),
        });
        match taken {
            Ok(stream) => return Ok(Some(stream)),
            Err(EngineError::TooLong { .. } | EngineError::EmptyPrompt) => return Ok(None),
            // Others' requests end without our help; they come first.
            Err(error) if error.is_full() && !service.is_stopping() => {
                std::thread::sleep(PATIENCE);
            }
            Err(error) => return Err(error.to_string()),
        }
    }
}

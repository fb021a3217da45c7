//! Does the engine say of an adapter, or of its own model, what the trainer said? Each of the trainer's sequences is scored, and
//! the log-probabilities of its trained tokens are compared.

use std::{sync::Arc, time::Duration};

use super::{
    EngineError, EngineHandle, GenerationEvent, GenerationRequest, GenerationStream,
    RequestOptions, SamplingParams,
};
use crate::adapters::AdapterVersion;
use crate::model::KvDtype;
use crate::ops::lora_dtype::LoraDtype;

/// How long to wait where the engine has no place for another request.
const PATIENCE: Duration = Duration::from_millis(20);

/// A sequence, and what the trainer said of it.
#[derive(Debug, Clone, Copy)]
pub struct TrainedSequence<'a> {
    /// Token ids.
    pub tokens: &'a [u32],
    /// Of each token, whether it was trained. The first follows nothing: it counts as not trained.
    pub loss_mask: &'a [bool],
    /// Log-probabilities of the trained tokens, in their order.
    pub logprobs: &'a [f32],
}

/// What a comparison found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Parity {
    /// Largest difference of a token's log-probability, in nats; infinite where one side had no number.
    pub max_difference: f64,
    /// Tokens that were compared.
    pub num_tokens: usize,
}

impl Parity {
    /// Largest difference that rounding can explain, that of keys and values in an engine's cache and of an
    /// adapter included.
    #[must_use]
    pub fn tolerance(kv_dtype: KvDtype, lora_dtype: LoraDtype) -> f64 {
        let cache = match kv_dtype {
            KvDtype::F32 => 1e-3,
            KvDtype::Bf16 => 0.2,
            KvDtype::Int8 => 0.5,
        };
        let adapter = match lora_dtype {
            LoraDtype::Auto | LoraDtype::Float32 => 0.0,
            LoraDtype::Float16 => 0.05,
            LoraDtype::Bfloat16 => 0.2,
        };
        cache + adapter
    }

    /// Whether rounding can explain what was found.
    #[must_use]
    pub fn is_close(&self, kv_dtype: KvDtype, lora_dtype: LoraDtype) -> bool {
        self.max_difference <= Self::tolerance(kv_dtype, lora_dtype)
    }
}

/// Compares engine and trainer over `sequences`, but for those that do not fit into the engine's context.
/// Others' requests come first; `should_stop` ends the waiting for them.
///
/// # Errors
/// [`EngineError`] if the engine takes no requests any more or breaks one off.
pub fn compare<'a>(
    engine: &EngineHandle,
    version: Option<&Arc<AdapterVersion>>,
    sequences: impl IntoIterator<Item = TrainedSequence<'a>>,
    should_stop: &dyn Fn() -> bool,
) -> Result<Parity, EngineError> {
    let mut parity = Parity { max_difference: 0.0, num_tokens: 0 };
    for sequence in sequences {
        let served = match submit(engine, version, sequence.tokens, should_stop) {
            Ok(stream) => scores(stream)?,
            Err(EngineError::TooLong { .. } | EngineError::EmptyPrompt) => continue,
            Err(error) => return Err(error),
        };
        // The first score is the second token's.
        let places = sequence.loss_mask.iter().skip(1).enumerate();
        let trained = places.filter(|(_, trained)| **trained).map(|(place, _)| place);
        for (place, told) in trained.zip(sequence.logprobs) {
            let difference = served
                .get(place)
                .map_or(f64::NAN, |served| (f64::from(*served) - f64::from(*told)).abs());
            // A NaN must not pass for a small difference.
            let difference = if difference.is_nan() { f64::INFINITY } else { difference };
            parity.max_difference = parity.max_difference.max(difference);
            parity.num_tokens += 1;
        }
    }
    Ok(parity)
}

fn submit(
    engine: &EngineHandle,
    version: Option<&Arc<AdapterVersion>>,
    tokens: &[u32],
    should_stop: &dyn Fn() -> bool,
) -> Result<GenerationStream, EngineError> {
    loop {
        let taken = engine.generate(GenerationRequest {
            prompt: tokens.to_vec(),
            adapter: version.map(Arc::clone),
            sampling: SamplingParams::greedy(),
            max_tokens: 0,
            stop_token_ids: Vec::new(),
            score_prompt: true,
            options: RequestOptions::default(),
        });
        match taken {
            Err(error) if error.is_full() && !should_stop() => std::thread::sleep(PATIENCE),
            other => return other,
        }
    }
}

/// Log-probabilities of all tokens but the first.
fn scores(mut stream: GenerationStream) -> Result<Vec<f32>, EngineError> {
    let mut scores = Vec::new();
    while let Some(event) = stream.blocking_next() {
        match event {
            GenerationEvent::PromptScores(found) => {
                scores.extend(found.iter().map(|score| score.logprob));
            }
            GenerationEvent::Failed { message } => return Err(EngineError::Failed(message)),
            GenerationEvent::Token { .. } | GenerationEvent::Finished { .. } => {}
        }
    }
    Ok(scores)
}

//! Models that evaluations ask, through the engine that serves everybody.

use std::{sync::Arc, thread, time::Duration};

use serde_json::{Map, Value};

use super::{Service, python};
use crate::adapters::AdapterVersion;
use crate::engine::{
    EngineError, FinishReason, GenerationEvent, GenerationRequest, GenerationStream,
    RequestOptions, SamplingParams,
};
use crate::eval::grader::{Context, Fault, FaultKind, Outside, Reply, Sampling};
use crate::text::{Detokenizer, TextError};

/// Most tokens of an answer, unless asked otherwise.
const DEFAULT_MAX_TOKENS: usize = 2048;
/// No token is longer than this in practice, so a longer prompt cannot fit; saves tokenising it.
const MAX_BYTES_PER_TOKEN: usize = 64;
/// How long a question waits when the engine is full.
const RETRY: Duration = Duration::from_millis(20);

/// Somebody who asks, on a thread that may wait.
#[derive(Clone, Copy)]
pub(super) struct Asker<'a> {
    service: &'a Service,
}

impl<'a> Asker<'a> {
    pub(super) fn new(service: &'a Service) -> Self {
        Self { service }
    }

    /// The answer of `version` to a conversation.
    ///
    /// # Errors
    /// The chat template refuses the messages, they do not fit the context, or the engine fails.
    pub(super) fn ask_version(
        &self,
        version: Option<Arc<AdapterVersion>>,
        messages: &[Value],
        sampling: &Sampling,
    ) -> Result<Reply, Fault> {
        let parts = &self.service.parts;
        let refused = |error: TextError| other(error.to_string());
        let text = parts.template.render(messages, None, true, &Map::new()).map_err(refused)?;
        let context = parts.engine.config().max_sequence_len();
        if text.len() > context.saturating_mul(MAX_BYTES_PER_TOKEN) {
            return Err(other(format!("the prompt does not fit the context of {context} tokens")));
        }
        let tokenizer = AdapterVersion::tokenizer_of(version.as_ref(), &parts.tokenizer);
        let prompt = tokenizer.encode(&text, false).map_err(refused)?;
        let detokenizer = Detokenizer::new(Arc::clone(tokenizer), &prompt);
        let room = context.saturating_sub(prompt.len());
        if room == 0 {
            let used = prompt.len();
            return Err(other(format!(
                "the prompt has {used} tokens and leaves no room in the context of {context}"
            )));
        }
        let stream = self.submit(&GenerationRequest {
            prompt,
            adapter: version,
            sampling: SamplingParams {
                temperature: sampling.temperature,
                top_p: sampling.top_p,
                seed: sampling.seed,
                ..SamplingParams::greedy()
            },
            max_tokens: self.max_tokens(sampling).min(room),
            stop_token_ids: parts.eos_token_ids.clone(),
            score_prompt: false,
            options: RequestOptions::default(),
        })?;
        self.read(stream, detokenizer)
    }

    /// Most tokens of an answer, whatever the context leaves.
    pub(super) fn max_tokens(&self, sampling: &Sampling) -> usize {
        sampling.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS)
    }

    /// Waits for a place in the engine.
    fn submit(&self, request: &GenerationRequest) -> Result<GenerationStream, Fault> {
        loop {
            if self.service.is_stopping() {
                return Err(interrupted());
            }
            match self.service.parts.engine.generate(request.clone()) {
                Ok(stream) => return Ok(stream),
                Err(error) if error.is_full() => thread::sleep(RETRY),
                Err(EngineError::Draining | EngineError::Stopped) => return Err(interrupted()),
                Err(error) => return Err(other(error.to_string())),
            }
        }
    }

    /// Reads an answer to its end. Dropping the stream early cancels it.
    fn read(
        &self,
        mut stream: GenerationStream,
        mut detokenizer: Detokenizer,
    ) -> Result<Reply, Fault> {
        let parts = &self.service.parts;
        let mut text = String::new();
        let failed = |error: TextError| other(error.to_string());
        while let Some(event) = stream.blocking_next() {
            if self.service.is_stopping() {
                return Err(interrupted());
            }
            match event {
                GenerationEvent::Token { id, .. } if parts.eos_token_ids.contains(&id) => {}
                GenerationEvent::Token { id, .. } => {
                    text.push_str(&detokenizer.push(id).map_err(failed)?);
                }
                GenerationEvent::PromptScores(_) => {}
                GenerationEvent::Finished { reason, usage } => {
                    text.push_str(&detokenizer.finish().map_err(failed)?);
                    let finish_reason = match reason {
                        FinishReason::Stop => "stop",
                        FinishReason::Length => "length",
                    };
                    return Ok(Reply {
                        text,
                        finish_reason,
                        prompt_tokens: usage.prompt_tokens,
                        completion_tokens: usage.completion_tokens,
                    });
                }
                GenerationEvent::Failed { message } => return Err(other(message)),
            }
        }
        Err(other("the engine stopped in the middle of an answer"))
    }
}

impl Outside for Asker<'_> {
    fn ask(&self, model: &str, messages: &[Value], sampling: &Sampling) -> Result<Reply, Fault> {
        let version = self.service.version_of(model).map_err(|error| other(error.to_string()))?;
        self.ask_version(version, messages, sampling)
    }

    fn run_python(&self, source: &str, context: &Context) -> Result<f64, Fault> {
        if !self.service.config.allow_python {
            return Err(Fault::new(FaultKind::PythonServer, python::SWITCHED_OFF));
        }
        python::grade(source, context, &|| self.service.is_stopping())
    }
}

fn interrupted() -> Fault {
    Fault::new(FaultKind::Interrupted, "the server is shutting down")
}

fn other(message: impl Into<String>) -> Fault {
    Fault::new(FaultKind::ModelServer, message)
}

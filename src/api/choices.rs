//! The running choices of one request: engine tokens become text, stop strings end it. Streamed and
//! whole answers both read from here, so they cannot differ. Dropping [`Choices`] cancels all of them.

use std::{sync::Arc, time::Instant};

use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};

use super::{
    AppState,
    error::ApiError,
    generation::{PreparedChat, random_u64},
    state::{InFlight, Phase},
    types::chat::{
        FunctionCall, PromptTokensDetails, RankedToken, TokenLogprob, ToolCallObject, Usage,
    },
};
use crate::adapters::AdapterVersion;
use crate::engine::{
    FinishReason, GenerationEvent, GenerationStream, GenerationUsage, TokenLogprobs,
};
use crate::telemetry::{self, RequestEnd, RequestSummary};
use crate::text::{AnswerPiece, Detokenizer, StopMatcher, Tokenizer, ToolCallParser};

/// Pieces of text that may wait for a slow client before the choice waits for it.
const PIECES_AHEAD: usize = 64;

/// What one choice tells.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum ChoiceEvent {
    /// More text, never empty.
    Text(String),
    /// How likely the next token was, where asked for; its text may follow later.
    Logprob(TokenLogprob),
    /// A complete call of a tool.
    ToolCall(ToolCallObject),
    /// The last event of a choice that went well.
    Finished { reason: &'static str, completion_tokens: usize, cached_tokens: usize },
    /// The last event of the whole request.
    Failed,
}

/// All choices of a request.
pub(crate) struct Choices {
    events: mpsc::Receiver<(usize, ChoiceEvent)>,
    /// Aborted, and with them their sequences in the engine, when this is dropped.
    _tasks: JoinSet<()>,
    phase: watch::Receiver<Phase>,
    /// Keeps a draining server waiting.
    _in_flight: InFlight,
    pub(crate) num_choices: usize,
    prompt_tokens: usize,
    completion_tokens: usize,
    /// Of the choice that found least: the others found what that one computed.
    cached_tokens: Option<usize>,
}

impl Choices {
    /// Hands every choice to the engine: all of them or none.
    pub(crate) fn start(
        state: &AppState,
        prepared: &PreparedChat,
        in_flight: InFlight,
    ) -> Result<Self, ApiError> {
        let eos = &state.config.eos_token_ids;
        let num_choices = prepared.request.num_choices;
        let mut streams = Vec::with_capacity(num_choices);
        for index in 0..num_choices {
            streams.push(state.engine.generate(prepared.generation_request(index, eos))?);
        }
        let tokenizer = AdapterVersion::tokenizer_of(prepared.adapter.as_ref(), &state.tokenizer);
        let (sender, events) = mpsc::channel(PIECES_AHEAD);
        let mut tasks = JoinSet::new();
        for (index, stream) in streams.into_iter().enumerate() {
            let choice = Choice {
                stream,
                tokenizer: Arc::clone(tokenizer),
                detokenizer: Detokenizer::new(Arc::clone(tokenizer), &prepared.prompt),
                stops: StopMatcher::new(&prepared.request.stop),
                calls: tool_call_parser(state, prepared),
                num_calls: 0,
                eos: eos.clone(),
                record: Record::new(&state.config.model_name, prepared),
            };
            let sender = sender.clone();
            tasks.spawn(async move { choice.run(index, &sender).await });
        }
        Ok(Self {
            events,
            _tasks: tasks,
            phase: in_flight.phase(),
            _in_flight: in_flight,
            num_choices,
            prompt_tokens: prepared.prompt.len(),
            completion_tokens: 0,
            cached_tokens: None,
        })
    }

    /// The next event with its choice's number; `None` after every choice's last one. When the server
    /// gives up waiting for its clients, the request fails.
    pub(crate) async fn next(&mut self) -> Option<(usize, ChoiceEvent)> {
        let event = tokio::select! {
            event = self.events.recv() => event?,
            _ = self.phase.wait_for(|phase| *phase == Phase::Aborting) => (0, ChoiceEvent::Failed),
        };
        if let ChoiceEvent::Finished { completion_tokens, cached_tokens, .. } = event.1 {
            self.completion_tokens += completion_tokens;
            let least = self.cached_tokens.map_or(cached_tokens, |least| least.min(cached_tokens));
            self.cached_tokens = Some(least);
        }
        Some(event)
    }

    /// What a client is told after [`ChoiceEvent::Failed`]; the cause is in the log.
    pub(crate) fn failure(&self) -> ApiError {
        match *self.phase.borrow() {
            Phase::Aborting => ApiError::Draining,
            Phase::Serving | Phase::Draining => ApiError::Internal,
        }
    }

    /// Tokens of the prompt and of the choices that are finished.
    pub(crate) fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.completion_tokens,
            total_tokens: self.prompt_tokens + self.completion_tokens,
            prompt_tokens_details: PromptTokensDetails {
                cached_tokens: self.cached_tokens.unwrap_or(0),
            },
        }
    }
}

/// Calls are looked for only where the model was shown tools.
fn tool_call_parser(state: &AppState, prepared: &PreparedChat) -> Option<ToolCallParser> {
    prepared.request.tools.as_ref()?;
    state.template.tool_call_format().map(ToolCallParser::new)
}

struct Choice {
    stream: GenerationStream,
    tokenizer: Arc<Tokenizer>,
    detokenizer: Detokenizer,
    stops: StopMatcher,
    calls: Option<ToolCallParser>,
    num_calls: usize,
    eos: Vec<u32>,
    record: Record,
}

impl Choice {
    /// Runs to the end, or until nobody listens.
    async fn run(mut self, index: usize, sender: &mpsc::Sender<(usize, ChoiceEvent)>) {
        loop {
            let event = self.stream.next().await;
            for event in self.translate(event) {
                let is_last = matches!(event, ChoiceEvent::Finished { .. } | ChoiceEvent::Failed);
                if sender.send((index, event)).await.is_err() || is_last {
                    return;
                }
            }
        }
    }

    /// What an engine event completes; the choice's last event comes last.
    fn translate(&mut self, event: Option<GenerationEvent>) -> Vec<ChoiceEvent> {
        match event {
            Some(GenerationEvent::PromptScores(_)) => Vec::new(),
            Some(GenerationEvent::Token { id, logprobs }) => {
                self.record.token();
                if self.eos.contains(&id) {
                    return Vec::new();
                }
                let logprob = logprobs.map(|it| ChoiceEvent::Logprob(self.logprob(id, &it)));
                let text = match self.detokenizer.push(id) {
                    Ok(piece) => self.show(&piece),
                    Err(error) => self.fail(&error.to_string()),
                };
                logprob.into_iter().chain(text).collect()
            }
            Some(GenerationEvent::Finished { reason, usage }) => match self.detokenizer.finish() {
                Ok(piece) => self.finish(&piece, reason, &usage),
                Err(error) => self.fail(&error.to_string()),
            },
            Some(GenerationEvent::Failed { message }) => self.fail(&message),
            None => self.fail("the engine stopped in the middle of a request"),
        }
    }

    fn logprob(&self, id: u32, logprobs: &TokenLogprobs) -> TokenLogprob {
        let ranked = |&(id, logprob): &(u32, f32)| {
            let bytes = self.tokenizer.token_bytes(id);
            RankedToken { token: String::from_utf8_lossy(&bytes).into_owned(), logprob, bytes }
        };
        let top_logprobs = logprobs.top.iter().map(ranked).collect();
        TokenLogprob { token: ranked(&(id, logprobs.logprob)), top_logprobs }
    }

    fn show(&mut self, piece: &str) -> Vec<ChoiceEvent> {
        let output = self.stops.push(piece);
        if output.matched.is_some() {
            return self.end(output.text, RequestEnd::Stop);
        }
        self.split(output.text)
    }

    /// The engine is done; a stop string may still end in the very last piece.
    fn finish(
        &mut self,
        piece: &str,
        reason: FinishReason,
        usage: &GenerationUsage,
    ) -> Vec<ChoiceEvent> {
        self.record.queue_seconds = Some(usage.queue_seconds);
        let output = self.stops.push(piece);
        if output.matched.is_some() {
            return self.end(output.text, RequestEnd::Stop);
        }
        let text = output.text + &self.stops.finish();
        match reason {
            FinishReason::Stop => self.end(text, RequestEnd::Stop),
            FinishReason::Length => self.end(text, RequestEnd::Length),
        }
    }

    fn fail(&mut self, cause: &str) -> Vec<ChoiceEvent> {
        tracing::error!("a generation failed: {cause}");
        self.record.end = RequestEnd::Error;
        vec![ChoiceEvent::Failed]
    }

    /// The last text, whatever was held back, and the end.
    fn end(&mut self, text: String, end: RequestEnd) -> Vec<ChoiceEvent> {
        let mut events = self.split(text);
        let rest = self.calls.as_mut().map(ToolCallParser::finish).unwrap_or_default();
        events.extend(self.events(rest));
        let reason = match end {
            RequestEnd::Length => "length",
            RequestEnd::Stop | RequestEnd::Abort | RequestEnd::Error if self.num_calls > 0 => {
                "tool_calls"
            }
            RequestEnd::Stop | RequestEnd::Abort | RequestEnd::Error => "stop",
        };
        self.record.end = end;
        let completion_tokens = self.record.completion_tokens;
        let cached_tokens = self.stream.cached_tokens();
        events.push(ChoiceEvent::Finished { reason, completion_tokens, cached_tokens });
        events
    }

    /// Text and calls of a piece.
    fn split(&mut self, text: String) -> Vec<ChoiceEvent> {
        let pieces = match &mut self.calls {
            Some(calls) => calls.push(&text),
            None if text.is_empty() => Vec::new(),
            None => vec![AnswerPiece::Text(text)],
        };
        self.events(pieces)
    }

    fn events(&mut self, pieces: Vec<AnswerPiece>) -> Vec<ChoiceEvent> {
        let event = |piece| match piece {
            AnswerPiece::Text(text) => ChoiceEvent::Text(text),
            AnswerPiece::Call(call) => {
                self.num_calls += 1;
                ChoiceEvent::ToolCall(ToolCallObject {
                    index: Some(self.num_calls - 1),
                    id: format!("call_{:016x}", random_u64()),
                    kind: "function",
                    function: FunctionCall { name: call.name, arguments: call.arguments },
                })
            }
        };
        pieces.into_iter().map(event).collect()
    }
}

/// What telemetry gets when the choice goes away, for whatever reason.
struct Record {
    model: String,
    started: Instant,
    first_token_seconds: Option<f64>,
    queue_seconds: Option<f64>,
    prompt_tokens: usize,
    completion_tokens: usize,
    max_tokens: usize,
    end: RequestEnd,
}

impl Record {
    fn new(model: &str, prepared: &PreparedChat) -> Self {
        Self {
            model: model.to_owned(),
            started: Instant::now(),
            first_token_seconds: None,
            queue_seconds: None,
            prompt_tokens: prepared.prompt.len(),
            completion_tokens: 0,
            max_tokens: prepared.max_tokens,
            end: RequestEnd::Abort,
        }
    }

    fn token(&mut self) {
        self.completion_tokens += 1;
        self.first_token_seconds.get_or_insert_with(|| self.started.elapsed().as_secs_f64());
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        telemetry::request_finished(&RequestSummary {
            model: std::mem::take(&mut self.model),
            end: self.end,
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.completion_tokens,
            max_tokens: self.max_tokens,
            queue_seconds: self.queue_seconds,
            first_token_seconds: self.first_token_seconds,
            total_seconds: self.started.elapsed().as_secs_f64(),
        });
    }
}

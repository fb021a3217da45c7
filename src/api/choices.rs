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
    generation::PreparedChat,
    state::{InFlight, Phase},
    types::chat::{PromptTokensDetails, Usage},
};
use crate::engine::{FinishReason, GenerationEvent, GenerationStream, GenerationUsage};
use crate::telemetry::{self, RequestEnd, RequestSummary};
use crate::text::{Detokenizer, StopMatcher};

/// Pieces of text that may wait for a slow client before the choice waits for it.
const PIECES_AHEAD: usize = 64;

/// What one choice tells.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum ChoiceEvent {
    /// More text, never empty.
    Text(String),
    /// The last event of a choice that went well.
    Finished { reason: &'static str, completion_tokens: usize },
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
        let (sender, events) = mpsc::channel(PIECES_AHEAD);
        let mut tasks = JoinSet::new();
        for (index, stream) in streams.into_iter().enumerate() {
            let choice = Choice {
                stream,
                detokenizer: Detokenizer::new(Arc::clone(&state.tokenizer), &prepared.prompt),
                stops: StopMatcher::new(&prepared.request.stop),
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
        })
    }

    /// The next event with its choice's number; `None` after every choice's last one. When the server
    /// gives up waiting for its clients, the request fails.
    pub(crate) async fn next(&mut self) -> Option<(usize, ChoiceEvent)> {
        let event = tokio::select! {
            event = self.events.recv() => event?,
            _ = self.phase.wait_for(|phase| *phase == Phase::Aborting) => (0, ChoiceEvent::Failed),
        };
        if let ChoiceEvent::Finished { completion_tokens, .. } = event.1 {
            self.completion_tokens += completion_tokens;
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
            prompt_tokens_details: PromptTokensDetails { cached_tokens: 0 },
        }
    }
}

struct Choice {
    stream: GenerationStream,
    detokenizer: Detokenizer,
    stops: StopMatcher,
    eos: Vec<u32>,
    record: Record,
}

impl Choice {
    /// Runs to the end, or until nobody listens.
    async fn run(mut self, index: usize, sender: &mpsc::Sender<(usize, ChoiceEvent)>) {
        loop {
            let event = self.stream.next().await;
            let (text, last) = self.translate(event);
            for event in text.into_iter().chain(last.clone()) {
                if sender.send((index, event)).await.is_err() {
                    return;
                }
            }
            if last.is_some() {
                return;
            }
        }
    }

    /// The text that an engine event completes, and the choice's end if this is it.
    fn translate(
        &mut self,
        event: Option<GenerationEvent>,
    ) -> (Option<ChoiceEvent>, Option<ChoiceEvent>) {
        match event {
            Some(GenerationEvent::PromptScores(_)) => (None, None),
            Some(GenerationEvent::Token { id }) => {
                self.record.token();
                if self.eos.contains(&id) {
                    return (None, None);
                }
                match self.detokenizer.push(id) {
                    Ok(piece) => self.show(&piece),
                    Err(error) => self.fail(&error.to_string()),
                }
            }
            Some(GenerationEvent::Finished { reason, usage }) => match self.detokenizer.finish() {
                Ok(piece) => self.finish(&piece, reason, &usage),
                Err(error) => self.fail(&error.to_string()),
            },
            Some(GenerationEvent::Failed { message }) => self.fail(&message),
            None => self.fail("the engine stopped in the middle of a request"),
        }
    }

    fn show(&mut self, piece: &str) -> (Option<ChoiceEvent>, Option<ChoiceEvent>) {
        let output = self.stops.push(piece);
        let last = output.matched.map(|_| self.end(RequestEnd::Stop, "stop"));
        (text_event(output.text), last)
    }

    /// The engine is done; a stop string may still end in the very last piece.
    fn finish(
        &mut self,
        piece: &str,
        reason: FinishReason,
        usage: &GenerationUsage,
    ) -> (Option<ChoiceEvent>, Option<ChoiceEvent>) {
        self.record.queue_seconds = Some(usage.queue_seconds);
        let output = self.stops.push(piece);
        if output.matched.is_some() {
            return (text_event(output.text), Some(self.end(RequestEnd::Stop, "stop")));
        }
        let text = output.text + &self.stops.finish();
        let last = match reason {
            FinishReason::Stop => self.end(RequestEnd::Stop, "stop"),
            FinishReason::Length => self.end(RequestEnd::Length, "length"),
        };
        (text_event(text), Some(last))
    }

    fn fail(&mut self, cause: &str) -> (Option<ChoiceEvent>, Option<ChoiceEvent>) {
        tracing::error!("a generation failed: {cause}");
        self.record.end = RequestEnd::Error;
        (None, Some(ChoiceEvent::Failed))
    }

    fn end(&mut self, end: RequestEnd, reason: &'static str) -> ChoiceEvent {
        self.record.end = end;
        ChoiceEvent::Finished { reason, completion_tokens: self.record.completion_tokens }
    }
}

fn text_event(text: String) -> Option<ChoiceEvent> {
    (!text.is_empty()).then_some(ChoiceEvent::Text(text))
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

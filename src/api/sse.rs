//! A chat answer as server-sent events, in the order that OpenAI's clients expect: the role, the text,
//! the reason of the end, the usage where asked for, `[DONE]`.

use std::{collections::VecDeque, convert::Infallible, time::Duration};

use axum::response::{
    IntoResponse, Response, Sse,
    sse::{Event, KeepAlive},
};
use futures_util::stream;
use serde_json::Value;

use super::{
    chat::Envelope,
    choices::{ChoiceEvent, Choices},
    error::ApiError,
    types::chat::{ChatCompletionChunk, ChunkChoice, Delta, Logprobs, TokenLogprob, Usage},
};

/// A comment is sent after this long without an event, so that proxies keep the connection.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Streams `choices` to their end. A failure on the way becomes an error event: whatever was begun
/// ends with `[DONE]`.
pub(crate) fn stream_chat(choices: Choices, envelope: Envelope, include_usage: bool) -> Response {
    let logprobs = vec![Vec::new(); choices.num_choices];
    let ready = VecDeque::new();
    let mut chat = ChatStream { choices, envelope, include_usage, logprobs, ready, ended: false };
    for index in 0..chat.choices.num_choices {
        let delta =
            Delta { role: Some("assistant"), content: Some(String::new()), ..Delta::default() };
        chat.push_choice(index, delta, None);
    }
    let events = stream::unfold(chat, |mut chat| async move {
        let data = chat.next().await?;
        Some((Ok::<_, Infallible>(Event::default().data(data)), chat))
    });
    let keep_alive = KeepAlive::new().interval(KEEP_ALIVE);
    Sse::new(events).keep_alive(keep_alive).into_response()
}

struct ChatStream {
    choices: Choices,
    envelope: Envelope,
    include_usage: bool,
    /// Of each choice, those of tokens whose text has not come yet.
    logprobs: Vec<Vec<TokenLogprob>>,
    /// Events that are made but not sent.
    ready: VecDeque<String>,
    ended: bool,
}

impl ChatStream {
    /// The data of the next event.
    async fn next(&mut self) -> Option<String> {
        while self.ready.is_empty() && !self.ended {
            match self.choices.next().await {
                Some((index, ChoiceEvent::Text(text))) => {
                    let delta = Delta { content: Some(text), ..Delta::default() };
                    self.push_choice(index, delta, None);
                }
                Some((index, ChoiceEvent::Logprob(logprob))) => {
                    self.logprobs[index].push(logprob);
                }
                Some((index, ChoiceEvent::ToolCall(call))) => {
                    let delta = Delta { tool_calls: vec![call], ..Delta::default() };
                    self.push_choice(index, delta, None);
                }
                Some((index, ChoiceEvent::Finished { reason, .. })) => {
                    self.push_choice(index, Delta::default(), Some(reason));
                }
                Some((_, ChoiceEvent::Failed)) => {
                    let failure: ApiError = self.choices.failure();
                    self.end(Some(failure.body()));
                }
                None => {
                    if self.include_usage {
                        let usage = Some(Some(self.choices.usage()));
                        self.push_chunk(Vec::new(), usage);
                    }
                    self.end(None);
                }
            }
        }
        self.ready.pop_front()
    }

    fn end(&mut self, error: Option<Value>) {
        self.ready.extend(error.map(|error| error.to_string()));
        self.ready.push_back("[DONE]".to_owned());
        self.ended = true;
    }

    fn push_choice(&mut self, index: usize, delta: Delta, finish_reason: Option<&'static str>) {
        let content = std::mem::take(&mut self.logprobs[index]);
        let logprobs = (!content.is_empty()).then_some(Logprobs { content, refusal: None });
        let choice = ChunkChoice { index, delta, logprobs, finish_reason };
        self.push_chunk(vec![choice], self.include_usage.then_some(None));
    }

    fn push_chunk(&mut self, choices: Vec<ChunkChoice>, usage: Option<Option<Usage>>) {
        let chunk = ChatCompletionChunk {
            id: &self.envelope.id,
            object: "chat.completion.chunk",
            created: self.envelope.created,
            model: &self.envelope.model,
            system_fingerprint: &self.envelope.system_fingerprint,
            choices,
            usage,
        };
        let json = serde_json::to_string(&chunk).expect("strings and numbers always serialise");
        self.ready.push_back(json);
    }
}

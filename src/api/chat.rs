//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Request, State},
    http::{HeaderName, HeaderValue},
    response::{IntoResponse, Response},
};

use super::{
    AppState,
    azure_form::Deployment,
    body::read_body,
    choices::{ChoiceEvent, Choices},
    error::ApiError,
    generation::{PreparedChat, prepare_chat, random_u64},
    resolve::version_label,
    sse,
    types::chat::{ChatChoice, ChatCompletion, ChatMessage, Logprobs, ToolCallObject},
};
use crate::jobs::unix_seconds;
use crate::telemetry;

const ADAPTER_VERSION: HeaderName = HeaderName::from_static("x-adapter-version");

/// What every chunk of an answer repeats.
pub(crate) struct Envelope {
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) system_fingerprint: String,
}

/// The handler: door, engine, answer.
pub(crate) async fn chat_completions(
    State(state): State<Arc<AppState>>,
    request: Request,
) -> Result<Response, ApiError> {
    let answered = answer(&state, request).await;
    match &answered {
        Err(ApiError::Overloaded(_)) => {
            telemetry::request_refused(&state.config.model_name, "queue_full");
        }
        Err(ApiError::Draining) => {
            telemetry::request_refused(&state.config.model_name, "draining");
        }
        _ => {}
    }
    answered
}

async fn answer(state: &Arc<AppState>, request: Request) -> Result<Response, ApiError> {
    // 1. A place, or 429.
    let in_flight = state.admit()?;
    let place = Arc::clone(&state.door)
        .try_acquire_owned()
        .map_err(|_| ApiError::Overloaded("too many requests are waiting".to_owned()))?;

    // 2. The last moment at which a client's mistake is found. Template and tokenizer take their time.
    let deployment = request.extensions().get::<Deployment>().cloned();
    let tenant = request.extensions().get().copied().unwrap_or_default();
    let body = read_body(request).await?;
    let door = Arc::clone(state);
    let prepare = move || prepare_chat(&door, &body, deployment, tenant);
    let prepared = tokio::task::spawn_blocking(prepare).await.map_err(ApiError::internal)??;

    // 3. The engine, which refuses when its queue is full.
    let choices = Choices::start(state, &prepared, in_flight)?;
    drop(place);

    // 4. One source of events, two ways to send them.
    let envelope = envelope(state, &prepared);
    let mut response = if prepared.request.stream {
        sse::stream_chat(choices, envelope, prepared.request.include_usage)
    } else {
        Json(collect(choices, envelope).await?).into_response()
    };
    if let Some(version) = &prepared.adapter {
        let label = HeaderValue::from_str(&version_label(version)).map_err(ApiError::internal)?;
        response.headers_mut().insert(ADAPTER_VERSION, label);
    }
    Ok(response)
}

async fn collect(mut choices: Choices, envelope: Envelope) -> Result<ChatCompletion, ApiError> {
    let mut answers: Vec<ChatChoice> = (0..choices.num_choices)
        .map(|index| ChatChoice {
            index,
            message: ChatMessage {
                role: "assistant",
                content: None,
                refusal: None,
                tool_calls: Vec::new(),
            },
            logprobs: None,
            finish_reason: "stop",
        })
        .collect();
    while let Some((index, event)) = choices.next().await {
        match event {
            ChoiceEvent::Text(text) => {
                let content = &mut answers[index].message.content;
                content.get_or_insert_default().push_str(&text);
            }
            ChoiceEvent::Logprob(logprob) => {
                let nothing = || Logprobs { content: Vec::new(), refusal: None };
                answers[index].logprobs.get_or_insert_with(nothing).content.push(logprob);
            }
            ChoiceEvent::ToolCall(call) => {
                let calls = &mut answers[index].message.tool_calls;
                calls.push(ToolCallObject { index: None, ..call });
            }
            ChoiceEvent::Finished { reason, .. } => {
                let answer = &mut answers[index];
                answer.finish_reason = reason;
                // Only an answer that is calls alone has no text, not even an empty one.
                if answer.message.tool_calls.is_empty() {
                    answer.message.content.get_or_insert_default();
                }
            }
            ChoiceEvent::Failed => return Err(choices.failure()),
        }
    }
    Ok(ChatCompletion {
        id: envelope.id,
        object: "chat.completion",
        created: envelope.created,
        model: envelope.model,
        system_fingerprint: envelope.system_fingerprint,
        choices: answers,
        usage: choices.usage(),
    })
}

fn envelope(state: &AppState, prepared: &PreparedChat) -> Envelope {
    let short = |digest: &str| digest.chars().take(12).collect::<String>();
    let base = short(&state.config.base_fingerprint);
    let system_fingerprint = match &prepared.adapter {
        Some(version) => format!("fp_{base}_{}", short(&version.adapter.served_digest())),
        None => format!("fp_{base}"),
    };
    Envelope {
        id: format!("chatcmpl-{:016x}{:016x}", random_u64(), random_u64()),
        created: unix_seconds(),
        model: prepared.request.model.clone(),
        system_fingerprint,
    }
}

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
    state::unix_seconds,
    types::chat::{ChatChoice, ChatCompletion, ChatMessage},
};
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
    let body = read_body(request).await?;
    let door = Arc::clone(state);
    let prepared = tokio::task::spawn_blocking(move || prepare_chat(&door, &body, deployment))
        .await
        .map_err(ApiError::internal)??;

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
            message: ChatMessage { role: "assistant", content: String::new() },
            logprobs: None,
            finish_reason: "stop",
        })
        .collect();
    while let Some((index, event)) = choices.next().await {
        match event {
            ChoiceEvent::Text(text) => answers[index].message.content.push_str(&text),
            ChoiceEvent::Finished { reason, .. } => answers[index].finish_reason = reason,
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
        Some(version) => format!("fp_{base}_{}", short(version.adapter.digest())),
        None => format!("fp_{base}"),
    };
    Envelope {
        id: format!("chatcmpl-{:016x}{:016x}", random_u64(), random_u64()),
        created: unix_seconds(),
        model: prepared.request.model.clone(),
        system_fingerprint,
    }
}

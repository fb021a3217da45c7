//! The door: a wire request is checked once and becomes a request that the engine can run. Behind it
//! nothing is checked again.

use std::{hash::BuildHasher, sync::Arc};

use serde_json::{Map, Value, json};

use super::{
    AppState,
    auth::Tenant,
    azure_form::Deployment,
    body::{parse_json, unsupported_unless},
    error::ApiError,
    messages::{valid_message, valid_tools},
    resolve::resolve_model,
    sampling,
    types::chat::{ChatCompletionRequest, Stop},
};
use crate::adapters::AdapterVersion;
use crate::engine::{GenerationRequest, RequestOptions, SamplingParams};

const MAX_CHOICES: i64 = 8;
const MAX_STOPS: usize = 4;

/// No token is longer than this in practice, so a longer prompt cannot fit; saves tokenising it.
const MAX_BYTES_PER_TOKEN: usize = 64;

/// A chat request without a client's mistake in it, as far as that shows without model and tokenizer.
#[derive(Debug)]
pub(crate) struct ChatRequest {
    pub(crate) model: String,
    pub(crate) messages: Vec<Value>,
    pub(crate) tools: Option<Vec<Value>>,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    /// How many answers, 1 to 8.
    pub(crate) num_choices: usize,
    pub(crate) sampling: SamplingParams,
    /// `None`: the rest of the context.
    pub(crate) max_tokens: Option<usize>,
    pub(crate) stop: Vec<String>,
    /// What the client wants to share cached prefixes by; `None`: its key.
    pub(crate) cache_salt: Option<String>,
    /// Log-probabilities are wanted, with those of so many most likely tokens.
    pub(crate) logprobs: Option<usize>,
    /// Lower ones go first.
    pub(crate) priority: i32,
}

/// A chat request that the engine can run.
pub(crate) struct PreparedChat {
    pub(crate) request: ChatRequest,
    /// Held to the end of every choice, whatever happens to the name meanwhile.
    pub(crate) adapter: Option<Arc<AdapterVersion>>,
    pub(crate) prompt: Vec<u32>,
    pub(crate) max_tokens: usize,
    /// Requests of equal salt share cached prefixes.
    cache_salt: Vec<u8>,
}

impl PreparedChat {
    /// What the engine gets for choice `index`; each choice draws from a stream of its own, the first as if
    /// it were the only one.
    pub(crate) fn generation_request(&self, index: usize, eos: &[u32]) -> GenerationRequest {
        let mut sampling = self.request.sampling.clone();
        sampling.stream = index as u64;
        GenerationRequest {
            prompt: self.prompt.clone(),
            adapter: self.adapter.clone(),
            sampling,
            max_tokens: self.max_tokens,
            stop_token_ids: eos.to_vec(),
            score_prompt: false,
            options: RequestOptions {
                cache_salt: self.cache_salt.clone(),
                logprobs: self.request.logprobs,
                priority: self.request.priority,
            },
        }
    }
}

/// Everything between the body's bytes and the engine. May read an adapter's files and tokenises: not
/// for the async threads. A deployment in the request's path is its model.
pub(crate) fn prepare_chat(
    state: &AppState,
    body: &[u8],
    deployment: Option<Deployment>,
    tenant: Tenant,
) -> Result<PreparedChat, ApiError> {
    let mut wire: ChatCompletionRequest = parse_json(body)?;
    wire.model = deployment.map(|Deployment(name)| name).or(wire.model);
    let request = validate(wire)?;
    let adapter = resolve_model(state, &request.model)?;
    let text =
        state.template.render(&request.messages, request.tools.as_deref(), true, &Map::new())?;
    let context = state.engine.config().max_sequence_len();
    let too_long = |message: String| ApiError::Invalid {
        message,
        param: Some("messages".to_owned()),
        code: Some("context_length_exceeded"),
    };
    if text.len() > context.saturating_mul(MAX_BYTES_PER_TOKEN) {
        let bytes = text.len();
        return Err(too_long(format!(
            "the prompt has {bytes} bytes, far more than the context of {context} tokens holds"
        )));
    }
    let unknown = request.sampling.logit_bias.iter().map(|(id, _)| *id);
    if let Some(id) = unknown.max().filter(|id| *id as usize >= state.engine.vocab_size()) {
        let message = format!("`logit_bias` names token {id}, which the model does not have");
        return Err(ApiError::invalid("logit_bias", message));
    }
    let tokenizer = AdapterVersion::tokenizer_of(adapter.as_ref(), &state.tokenizer);
    let prompt = tokenizer.encode(&text, false)?;
    let room = context.saturating_sub(prompt.len());
    let max_tokens = request.max_tokens.unwrap_or(room);
    if room == 0 || max_tokens > room {
        return Err(too_long(format!(
            "the context is {context} tokens, but the request asks for {} in the messages and {} in \
             the completion",
            prompt.len(),
            max_tokens.max(1)
        )));
    }
    let cache_salt = cache_salt(request.cache_salt.as_deref(), tenant);
    Ok(PreparedChat { request, adapter, prompt, max_tokens, cache_salt })
}

/// A salt of the client's own choice, or else its key. The two never coincide.
fn cache_salt(chosen: Option<&str>, tenant: Tenant) -> Vec<u8> {
    match (chosen, tenant.0) {
        (Some(salt), _) => [b"salt", salt.as_bytes()].concat(),
        (None, Some(key)) => [b"key", &key[..]].concat(),
        (None, None) => Vec::new(),
    }
}

/// Checks every field.
///
/// # Errors
/// 400 naming the first field that is missing, out of range or not supported.
pub(crate) fn validate(mut wire: ChatCompletionRequest) -> Result<ChatRequest, ApiError> {
    refuse_unsupported(&wire)?;
    let seed = wire.seed.map_or_else(random_u64, |seed| u64::from_ne_bytes(seed.to_ne_bytes()));
    let sampling = sampling::valid_sampling(&wire, seed)?;
    let model = wire.model.take().filter(|model| !model.is_empty());
    let model = model.ok_or_else(|| ApiError::invalid("model", "`model` is required"))?;
    let messages =
        wire.messages.take().filter(|messages| !messages.is_empty()).ok_or_else(|| {
            ApiError::invalid("messages", "`messages` is required, with one or more")
        })?;
    let messages = messages
        .into_iter()
        .enumerate()
        .map(|(index, message)| valid_message(index, message))
        .collect::<Result<_, _>>()?;
    let num_choices = in_range("n", wire.n.unwrap_or(1), 1, MAX_CHOICES)?;
    let (limit_name, limit) = match (wire.max_completion_tokens, wire.max_tokens) {
        (Some(limit), _) => ("max_completion_tokens", Some(limit)),
        (None, limit) => ("max_tokens", limit),
    };
    let max_tokens = limit.map(|n| in_range(limit_name, n, 1, i64::MAX)).transpose()?;
    let priority = wire.priority.unwrap_or(0);
    let options = wire.stream_options.unwrap_or_default();
    Ok(ChatRequest {
        model,
        messages,
        logprobs: sampling::valid_logprobs(wire.logprobs, wire.top_logprobs)?,
        tools: valid_tools(wire.tools, wire.tool_choice.as_ref())?,
        stream: wire.stream.unwrap_or(false),
        include_usage: options.include_usage.unwrap_or(false),
        num_choices: num_choices as usize,
        sampling,
        max_tokens: max_tokens.map(|n| n as usize),
        stop: valid_stops(wire.stop)?,
        cache_salt: valid_salt(wire.cache_salt)?,
        priority: in_range("priority", priority, i64::from(i32::MIN), i64::from(i32::MAX))? as i32,
    })
}

/// A number that nobody can predict.
pub(crate) fn random_u64() -> u64 {
    // Every `RandomState` is keyed from the operating system's randomness.
    std::hash::RandomState::new().hash_one(())
}

fn refuse_unsupported(wire: &ChatCompletionRequest) -> Result<(), ApiError> {
    let text = [json!({"type": "text"})];
    unsupported_unless("response_format", wire.response_format.as_ref(), &text)?;
    unsupported_unless("functions", wire.functions.as_ref(), &[])
}

fn valid_stops(stop: Option<Stop>) -> Result<Vec<String>, ApiError> {
    let stops = match stop {
        None => Vec::new(),
        Some(Stop::One(stop)) => vec![stop],
        Some(Stop::Many(stops)) => stops,
    };
    if stops.len() > MAX_STOPS {
        let message =
            format!("{} stop strings were given, at most {MAX_STOPS} are allowed", stops.len());
        return Err(ApiError::invalid("stop", message));
    }
    if stops.iter().any(String::is_empty) {
        return Err(ApiError::invalid("stop", "a stop string must not be empty"));
    }
    Ok(stops)
}

fn valid_salt(salt: Option<String>) -> Result<Option<String>, ApiError> {
    if salt.as_ref().is_some_and(String::is_empty) {
        return Err(ApiError::invalid("cache_salt", "`cache_salt` must not be empty"));
    }
    Ok(salt)
}

pub(super) fn in_range(param: &str, value: i64, min: i64, max: i64) -> Result<i64, ApiError> {
    if (min..=max).contains(&value) {
        return Ok(value);
    }
    let range = if max == i64::MAX { format!("at least {min}") } else { format!("{min} to {max}") };
    Err(ApiError::invalid(param, format!("`{param}` must be {range}, not {value}")))
}

pub(super) fn within(param: &str, value: f64, min: f64, max: f64) -> Result<f32, ApiError> {
    if (min..=max).contains(&value) {
        return Ok(value as f32);
    }
    Err(ApiError::invalid(param, format!("`{param}` must be {min} to {max}, not {value}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(changes: &Value) -> Result<ChatRequest, ApiError> {
        let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
        for (field, value) in changes.as_object().unwrap() {
            body[field] = value.clone();
        }
        validate(parse_json(body.to_string().as_bytes())?)
    }

    #[test]
    fn every_mistake_is_a_400_that_names_its_field() {
        let user = |content: Value| json!([{"role": "user", "content": content}]);
        for (changes, param) in [
            (json!({"model": null}), "model"),
            (json!({"model": ""}), "model"),
            (json!({"model": 3}), "model"),
            (json!({"messages": null}), "messages"),
            (json!({"messages": []}), "messages"),
            (json!({"messages": "hi"}), "messages"),
            (json!({"messages": ["hi"]}), "messages"),
            (json!({"messages": [{"content": "hi"}]}), "messages[0].role"),
            (json!({"messages": [{"role": "wizard", "content": "hi"}]}), "messages[0].role"),
            (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
            (json!({"messages": [{"role": "assistant"}]}), "messages[0].content"),
            (json!({"messages": user(json!(3))}), "messages[0].content"),
            (json!({"messages": user(json!([{"type": "image_url"}]))}), "messages[0].content[0]"),
            (json!({"messages": user(json!([{"type": "input_audio"}]))}), "messages[0].content[0]"),
            (json!({"messages": user(json!([{"type": "text"}]))}), "messages[0].content[0]"),
            (json!({"messages": user(json!(["hi"]))}), "messages[0].content[0]"),
            (json!({"temperature": -0.1}), "temperature"),
            (json!({"temperature": 2.1}), "temperature"),
            (json!({"temperature": "hot"}), "temperature"),
            (json!({"top_p": 0}), "top_p"),
            (json!({"top_p": 1.1}), "top_p"),
            (json!({"top_k": -2}), "top_k"),
            (json!({"top_k": 1.5}), "top_k"),
            (json!({"min_p": 2}), "min_p"),
            (json!({"seed": "x"}), "seed"),
            (json!({"max_tokens": 0}), "max_tokens"),
            (json!({"max_tokens": -1}), "max_tokens"),
            (json!({"max_completion_tokens": 0}), "max_completion_tokens"),
            (json!({"n": 0}), "n"),
            (json!({"n": 9}), "n"),
            (json!({"stop": ["a", "b", "c", "d", "e"]}), "stop"),
            (json!({"stop": [""]}), "stop"),
            (json!({"stop": 3}), "stop"),
            (json!({"cache_salt": ""}), "cache_salt"),
            (json!({"cache_salt": 5}), "cache_salt"),
            (json!({"priority": "high"}), "priority"),
            (json!({"priority": 2_147_483_648_u32}), "priority"),
            (json!({"stream": "yes"}), "stream"),
            (json!({"stream_options": true}), "stream_options"),
            (json!({"tools": [{"type": "function"}]}), "tools[0]"),
            (json!({"tool_choice": "required"}), "tool_choice"),
            (json!({"logprobs": 1}), "logprobs"),
            (json!({"top_logprobs": 3}), "top_logprobs"),
            (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
            (json!({"logit_bias": {"five": 1}}), "logit_bias"),
            (json!({"logit_bias": {"5": 101}}), "logit_bias"),
            (json!({"presence_penalty": 2.5}), "presence_penalty"),
            (json!({"frequency_penalty": -2.5}), "frequency_penalty"),
            (json!({"repetition_penalty": 0}), "repetition_penalty"),
            (json!({"response_format": {"type": "json_object"}}), "response_format"),
        ] {
            match check(&changes) {
                Err(ApiError::Invalid { param: Some(found), .. }) => {
                    assert_eq!(found, param, "{changes}");
                }
                other => panic!("{changes}: {other:?}"),
            }
        }
    }

    #[test]
    fn harmless_and_unknown_fields_are_accepted() {
        let request = check(&json!({
            "user": "u", "metadata": {"a": "b"}, "store": true, "no_such_field": [1, 2],
            "logprobs": false, "presence_penalty": 0, "logit_bias": {}, "temperature": null,
            "response_format": {"type": "text"}, "tool_choice": "auto", "top_k": -1, "seed": -1,
            "max_tokens": 5, "max_completion_tokens": 7, "stop": "END",
            "stream_options": {"include_usage": true},
        }))
        .unwrap();
        assert_eq!(request.max_tokens, Some(7));
        assert_eq!(request.stop, ["END"]);
        assert_eq!(request.sampling.top_k, 0);
        assert_eq!(request.sampling.temperature, 1.0);
        assert_eq!(request.sampling.seed, u64::MAX);
        assert!(request.include_usage && !request.stream && request.tools.is_none());
    }

    #[test]
    fn messages_reach_the_template_with_one_string_and_a_role_it_knows() {
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let calls = json!([{"type": "function", "function": {"name": "f", "arguments": "{}"}}]);
        let request = check(&json!({"messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": parts, "name": "ann"},
            {"role": "assistant", "content": null, "tool_calls": calls},
            {"role": "tool", "content": "4", "tool_call_id": "x"},
        ]}))
        .unwrap();
        assert_eq!(request.messages[0], json!({"role": "system", "content": "be brief"}));
        assert_eq!(request.messages[1]["content"], "a\nb");
        assert_eq!(request.messages[1]["name"], "ann");
        assert!(request.messages[2]["content"].is_null());
        assert_eq!(request.messages[3]["tool_call_id"], "x");
    }

    #[test]
    fn a_request_without_a_seed_gets_a_new_one_each_time() {
        let seeds = [(); 3].map(|()| check(&json!({})).unwrap().sampling.seed);
        assert!(seeds[0] != seeds[1] && seeds[1] != seeds[2], "{seeds:?}");
    }
}

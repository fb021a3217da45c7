//! One chat message as `OpenAI` defines it: `role`, `content` (a string, null beside tool calls, or
//! a list of text parts), `name`, `weight` 0 or 1 and `tool_calls` or `function_call` of the
//! assistant, `tool_call_id` of a tool's answer.
//!
//! Two things are settled here, as the server settles them for a request, so that templates need not
//! know them: text parts become one string of lines, and `developer` becomes `system`, the role it
//! replaced. Likewise a `function_call` becomes the one tool call that it means, and the role
//! `function` becomes `tool`.

use serde_json::{Map, Value, json};

use super::Problems;
use crate::data::read::kind;

const ROLES: &[&str] = &["system", "developer", "user", "assistant", "tool", "function"];

const KEYS: &[&str] = &[
    "role",
    "content",
    "name",
    "weight",
    "tool_calls",
    "function_call",
    "tool_call_id",
    "refusal",
    "reasoning_content",
    "thinking",
];

/// All messages of a list, and which of them are trained. A message with problems is kept as far as
/// it makes sense, so that the checks of the whole row say nothing misleading.
///
/// `noun` names a message in problems ("message", "completion message").
pub(super) fn parse(
    list: Vec<Value>,
    noun: &str,
    problems: &mut Problems,
) -> (Vec<Value>, Vec<bool>) {
    let mut messages = Vec::with_capacity(list.len());
    let mut trained = Vec::with_capacity(list.len());
    for (index, value) in list.into_iter().enumerate() {
        let place = format!("{noun} {}", index + 1);
        let Value::Object(mut message) = value else {
            let found = kind(&value);
            problems.add("data_type", format!("{place} is {found}, not an object"));
            continue;
        };
        let weight = check_message(&mut message, &place, problems);
        modernize(&mut message);
        let message = Value::Object(message);
        trained.push(is_assistant(&message) && weight);
        messages.push(message);
    }
    (messages, trained)
}

/// Whether the message is the assistant's.
pub(super) fn is_assistant(message: &Value) -> bool {
    message["role"] == "assistant"
}

/// Writes a function call, or the answer to one, as tools have it: training and serving show templates the
/// same.
pub fn modernize(message: &mut Map<String, Value>) {
    /// Nine characters, as the templates that look at it want.
    const ID: &str = "function0";
    if let Some(function) = message.shift_remove("function_call") {
        let call = json!({"id": ID, "type": "function", "function": function});
        message.entry("tool_calls").or_insert_with(|| vec![call].into());
    }
    if message.get("role").is_some_and(|role| role == "function") {
        message.insert("role".to_owned(), "tool".into());
        message.insert("tool_call_id".to_owned(), ID.into());
    }
}

/// Checks one message and takes out what is not for the template. Returns whether its weight is 1.
fn check_message(message: &mut Map<String, Value>, place: &str, problems: &mut Problems) -> bool {
    for key in message.keys().filter(|key| !KEYS.contains(&key.as_str())) {
        problems.add("message_unrecognized_key", format!("{place} has an unknown key `{key}`"));
    }
    let role = check_role(message, place, problems);
    let weight = check_weight(message, &role, place, problems);
    for key in ["name", "tool_call_id", "refusal", "reasoning_content", "thinking"] {
        check_string(message, key, place, problems);
    }
    if role == "tool" && !message.contains_key("tool_call_id") {
        problems.add("message_missing_key", format!("{place} (tool) has no `tool_call_id`"));
    }
    if role == "function" && !message.contains_key("name") {
        problems.add("message_missing_key", format!("{place} (function) has no `name`"));
    }
    let calls = check_calls(message, &role, place, problems);
    check_content(message, &role, calls, place, problems);
    weight
}

fn check_role(message: &mut Map<String, Value>, place: &str, problems: &mut Problems) -> String {
    let role = match message.get("role") {
        None => {
            problems.add("message_missing_key", format!("{place} has no `role`"));
            return String::new();
        }
        Some(Value::String(role)) => role.clone(),
        Some(other) => other.to_string(),
    };
    if !ROLES.contains(&role.as_str()) {
        let message = format!("{place} has the role {role:?}; known roles: {}", ROLES.join(", "));
        problems.add("unrecognized_role", message);
    }
    if role == "developer" {
        message.insert("role".to_owned(), "system".into());
    }
    role
}

fn check_weight(
    message: &mut Map<String, Value>,
    role: &str,
    place: &str,
    problems: &mut Problems,
) -> bool {
    // `shift_remove` keeps the order of the other keys, which `tojson` in a template can show.
    let weight = match message.shift_remove("weight") {
        None | Some(Value::Null) => return true,
        Some(weight) => weight,
    };
    if role != "assistant" {
        let message = format!("{place} ({role}) has a `weight`; only the assistant's count");
        problems.add("invalid_weight", message);
    }
    // 1.0 is what data tools write for 1.
    match weight.as_f64() {
        Some(0.0) => false,
        Some(1.0) => true,
        _ => {
            problems
                .add("invalid_weight", format!("{place} has weight {weight}; 0 or 1 are known"));
            true
        }
    }
}

/// A key that may be absent or null, else is a string.
fn check_string(message: &mut Map<String, Value>, key: &str, place: &str, problems: &mut Problems) {
    match message.get(key) {
        None | Some(Value::String(_)) => {}
        Some(Value::Null) => {
            message.shift_remove(key);
        }
        Some(other) => {
            let message = format!("`{key}` of {place} is {}, not a string", kind(other));
            problems.add("wrong_type", message);
        }
    }
}

/// Whether the message calls tools or a function; then it needs no content.
fn check_calls(
    message: &mut Map<String, Value>,
    role: &str,
    place: &str,
    problems: &mut Problems,
) -> bool {
    for key in ["tool_calls", "function_call"] {
        if message.get(key).is_some_and(Value::is_null) {
            message.shift_remove(key);
        } else if role != "assistant" && message.contains_key(key) {
            let message = format!("{place} ({role}) has `{key}`; only the assistant calls");
            problems.add("message_unrecognized_key", message);
        }
    }
    match message.get("tool_calls") {
        None => {}
        Some(Value::Array(calls)) if !calls.is_empty() => {
            for (index, call) in calls.iter().enumerate() {
                let place = format!("tool call {} of {place}", index + 1);
                if call["type"] != "function" || !call["id"].is_string() {
                    let message = format!("{place} has no `id` or not the type `function`");
                    problems.add("invalid_tool_call", message);
                }
                check_function(&call["function"], &place, problems);
            }
        }
        Some(_) => {
            let message = format!("`tool_calls` of {place} is no list of calls");
            problems.add("invalid_tool_call", message);
        }
    }
    if let Some(call) = message.get("function_call") {
        check_function(call, &format!("the function call of {place}"), problems);
    }
    message.contains_key("tool_calls") || message.contains_key("function_call")
}

/// `{"name": "...", "arguments": "a string that holds JSON"}`.
fn check_function(function: &Value, place: &str, problems: &mut Problems) {
    if !function["name"].is_string() {
        problems.add("invalid_tool_call", format!("{place} has no function `name`"));
    }
    let Value::String(arguments) = &function["arguments"] else {
        let found = kind(&function["arguments"]);
        let message = format!("`arguments` of {place} is {found}, not a string that holds JSON");
        problems.add("invalid_arguments", message);
        return;
    };
    if let Err(error) = serde_json::from_str::<Value>(arguments) {
        problems.add("invalid_arguments", format!("`arguments` of {place} is not JSON: {error}"));
    }
}

fn check_content(
    message: &mut Map<String, Value>,
    role: &str,
    calls: bool,
    place: &str,
    problems: &mut Problems,
) {
    match message.get("content") {
        None | Some(Value::Null) if calls => {}
        None => problems.add("message_missing_key", format!("{place} has no `content`")),
        Some(Value::String(text)) => {
            // A tool may well return nothing.
            if text.is_empty() && !calls && !["tool", "function"].contains(&role) {
                problems.add("missing_content", format!("`content` of {place} is empty"));
            }
        }
        Some(Value::Array(parts)) => match join_parts(parts) {
            Ok(text) => {
                message.insert("content".to_owned(), text.into());
            }
            Err(index) => {
                let part = index + 1;
                let message = format!("part {part} of the content of {place} is no text part");
                problems.add("missing_content", message);
            }
        },
        Some(other) => {
            let message = format!("`content` of {place} is {}, not a string", kind(other));
            problems.add("missing_content", message);
        }
    }
}

/// The text of `[{"type": "text", "text": "..."}]`, or the index of the first part that is none.
fn join_parts(parts: &[Value]) -> Result<String, usize> {
    let mut texts = Vec::with_capacity(parts.len());
    for (index, part) in parts.iter().enumerate() {
        let text = part["text"].as_str().filter(|_| part["type"] == "text");
        texts.push(text.ok_or(index)?);
    }
    let joined = texts.join("\n");
    if joined.is_empty() { Err(0) } else { Ok(joined) }
}

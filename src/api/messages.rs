//! The conversation of a chat request, brought into the form that chat templates know.

use serde_json::{Map, Value};

use super::error::ApiError;
use crate::data::modernize;

const MAX_TOOLS: usize = 128;

/// One message in the form that templates know: `content` is one string.
pub(super) fn valid_message(
    index: usize,
    mut message: Map<String, Value>,
) -> Result<Value, ApiError> {
    let wrong = |field: &str, what: &str| {
        ApiError::invalid(
            &format!("messages[{index}].{field}"),
            format!("messages[{index}]: {what}"),
        )
    };
    let is_named = message.get("name").is_some_and(Value::is_string);
    if message.get("role").is_some_and(|role| role == "function") && !is_named {
        return Err(wrong("name", "`name` is required of a message of the role `function`"));
    }
    modernize(&mut message);
    let role = match message.get("role").and_then(Value::as_str) {
        // Templates know the older name of the same thing.
        Some("developer") => "system".to_owned(),
        Some(role @ ("system" | "user" | "assistant" | "tool")) => role.to_owned(),
        Some(role) => return Err(wrong("role", &format!("unknown role `{role}`"))),
        None => return Err(wrong("role", "`role` is required")),
    };
    let calls_tools = message.get("tool_calls").is_some_and(|calls| !calls.is_null());
    let content = match message.get("content") {
        Some(Value::String(text)) => Some(text.clone()),
        Some(Value::Array(parts)) => Some(join_parts(index, parts)?),
        None | Some(Value::Null) if role == "assistant" && calls_tools => None,
        None | Some(Value::Null) => return Err(wrong("content", "`content` is required")),
        Some(_) => return Err(wrong("content", "`content` must be a string or a list of parts")),
    };
    message.insert("role".to_owned(), Value::String(role));
    if let Some(text) = content {
        message.insert("content".to_owned(), Value::String(text));
    }
    Ok(Value::Object(message))
}

/// Tools are shown to the model by its template; whatever it answers is passed on as text.
pub(super) fn valid_tools(
    tools: Option<Vec<Value>>,
    choice: Option<&Value>,
) -> Result<Option<Vec<Value>>, ApiError> {
    let tools = tools.unwrap_or_default();
    if tools.len() > MAX_TOOLS {
        let message = format!("{} tools were given, at most {MAX_TOOLS} are allowed", tools.len());
        return Err(ApiError::invalid("tools", message));
    }
    if let Some(index) = tools.iter().position(|tool| !tool["function"]["name"].is_string()) {
        let place = format!("tools[{index}]");
        return Err(ApiError::invalid(&place, format!("{place}: `function.name` is required")));
    }
    let shown = match choice.map(Value::as_str) {
        None | Some(Some("auto")) => !tools.is_empty(),
        Some(Some("none")) => false,
        Some(_) => return Err(ApiError::unsupported("tool_choice")),
    };
    Ok(shown.then_some(tools))
}

fn join_parts(index: usize, parts: &[Value]) -> Result<String, ApiError> {
    let mut texts = Vec::new();
    for (number, part) in parts.iter().enumerate() {
        let place = format!("messages[{index}].content[{number}]");
        match (part["type"].as_str(), part["text"].as_str()) {
            (Some("text"), Some(text)) => texts.push(text),
            (Some("text"), None) => {
                return Err(ApiError::invalid(&place, format!("{place}: `text` is required")));
            }
            (Some(other), _) => {
                let message =
                    format!("{place}: parts of type `{other}` are not supported, only `text`");
                return Err(ApiError::invalid(&place, message));
            }
            (None, _) => {
                return Err(ApiError::invalid(&place, format!("{place}: `type` is required")));
            }
        }
    }
    Ok(texts.join("\n"))
}

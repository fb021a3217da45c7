//! `OpenAI`'s chat rows: `messages`, with `tools` and `parallel_tool_calls`; see `messages` for one
//! message. The deprecated `functions` list is read as tools. Other keys of a row are no concern of
//! training and are ignored.

use serde_json::{Map, Value, json};

use super::{Format, Problems, messages};
use crate::data::{RowBody, read::kind};

pub(super) const FORMAT: Format = Format {
    name: "openai_chat",
    example: r#"{"messages":[{"role":"user","content":"Capital of France?"},{"role":"assistant","content":"Paris"}]}"#,
    detect: |row| row.contains_key("messages"),
    parse,
};

pub(super) fn parse(mut row: Map<String, Value>, problems: &mut Problems) -> Option<RowBody> {
    let tools = parse_tools(&mut row, problems);
    let list = match row.remove("messages") {
        Some(Value::Array(list)) if !list.is_empty() => list,
        Some(Value::Array(_)) => {
            problems.add("missing_messages_list", "`messages` is empty".to_owned());
            return None;
        }
        other => {
            let found = other.as_ref().map_or("missing", kind);
            problems.add("missing_messages_list", format!("`messages` is {found}, not a list"));
            return None;
        }
    };
    let (messages, trained) = messages::parse(list, "message", problems);
    if !messages.iter().any(messages::is_assistant) {
        let message = "no assistant message, so there is nothing to learn".to_owned();
        problems.add("example_missing_assistant_message", message);
    }
    problems.is_empty().then_some(RowBody::Chat { messages, trained, tools })
}

/// The row's `tools` (or `functions`), each checked to be a named function.
pub(super) fn parse_tools(
    row: &mut Map<String, Value>,
    problems: &mut Problems,
) -> Option<Vec<Value>> {
    if let Some(value) = row.get("parallel_tool_calls")
        && !value.is_boolean()
    {
        let message = format!("`parallel_tool_calls` is {}, not a boolean", kind(value));
        problems.add("wrong_type", message);
    }
    // Columns of text hold the list as JSON.
    let from_text = row.get("tools").is_some_and(Value::is_string);
    if let Some(tools @ Value::String(_)) = row.get_mut("tools") {
        *tools = match tools.as_str() {
            Some("") => Value::Null,
            Some(text) => serde_json::from_str(text).unwrap_or_else(|_| tools.clone()),
            None => Value::Null,
        };
    }
    let (key, list) = match (row.remove("tools"), row.remove("functions")) {
        (Some(Value::Null) | None, Some(Value::Null) | None) => return None,
        (Some(Value::Null) | None, Some(functions)) => ("functions", functions),
        (Some(tools), _) => ("tools", tools),
    };
    let Value::Array(list) = list else {
        problems.add("invalid_tools", format!("`{key}` is {}, not a list", kind(&list)));
        return None;
    };
    let mut tools = Vec::with_capacity(list.len());
    for (index, entry) in list.into_iter().enumerate() {
        // ShareGPT's tools are bare functions, as `functions` has them.
        let is_bare = key == "functions" || (from_text && entry["function"].is_null());
        let tool = if is_bare { json!({"type": "function", "function": entry}) } else { entry };
        if tool["type"] != "function" || !tool["function"]["name"].is_string() {
            let message = format!("{key}[{index}] has no type `function` with a `function.name`");
            problems.add("invalid_tools", message);
        }
        tools.push(tool);
    }
    (!tools.is_empty()).then_some(tools)
}

//! ShareGPT's conversations: turns with `from` and `value`, and beside them `system` and `tools`.
//! Turns with `role` and `content` are taken as messages.
#![allow(clippy::wildcard_enum_match_arm, reason = "JSON will have no more than its six kinds")]

use serde_json::{Map, Value, json};

use super::{Format, Problems, openai_chat};
use crate::data::{RowBody, read::kind};

pub(super) const FORMAT: Format = Format {
    name: "conversations",
    example: r#"{"conversations":[{"from":"human","value":"Capital of France?"},{"from":"gpt","value":"Paris"}]}"#,
    detect: |row| row.contains_key("conversations"),
    parse,
};

/// Who speaks, in the words of the files and in ours.
const SPEAKERS: &[(&str, &str)] = &[
    ("human", "user"),
    ("user", "user"),
    ("gpt", "assistant"),
    ("assistant", "assistant"),
    ("chatgpt", "assistant"),
    ("bing", "assistant"),
    ("bard", "assistant"),
    ("model", "assistant"),
    ("bot", "assistant"),
    ("system", "system"),
    ("function_call", "function_call"),
    ("observation", "tool"),
    ("tool", "tool"),
    ("function_response", "tool"),
];

/// The call that the next observation answers; conversations of this kind give calls no names.
const CALL_ID: &str = "call00000";

fn parse(mut row: Map<String, Value>, problems: &mut Problems) -> Option<RowBody> {
    let turns = row.remove("conversations").unwrap_or_default();
    let messages = messages(turns, row.remove("system").as_ref(), problems)?;
    row.insert("messages".to_owned(), messages.into());
    openai_chat::parse(row, problems)
}

/// A list of turns as messages, `system` first.
pub(super) fn messages(
    turns: Value,
    system: Option<&Value>,
    problems: &mut Problems,
) -> Option<Vec<Value>> {
    let Value::Array(turns) = turns else {
        let message = format!("`conversations` is {}, not a list", kind(&turns));
        problems.add("missing_messages_list", message);
        return None;
    };
    let mut messages: Vec<Value> = system_message(system).into_iter().collect();
    for (index, turn) in turns.into_iter().enumerate() {
        messages.push(message(turn, index + 1, problems));
    }
    problems.is_empty().then_some(messages)
}

/// A system text as a message, where there is one.
pub(super) fn system_message(system: Option<&Value>) -> Option<Value> {
    let text = system?.as_str().filter(|text| !text.is_empty())?;
    Some(json!({"role": "system", "content": text}))
}

/// One turn as a message; one that is a message already stays what it is.
pub(super) fn message(turn: Value, number: usize, problems: &mut Problems) -> Value {
    let Some(speaker) = turn.get("from") else { return turn };
    let name = speaker.as_str().unwrap_or_default().to_lowercase();
    let Some((_, role)) = SPEAKERS.iter().find(|(known, _)| *known == name) else {
        let known: Vec<&str> = SPEAKERS.iter().map(|(known, _)| *known).collect();
        let message = format!("turn {number} is from {speaker}; known are {}", known.join(", "));
        problems.add("unrecognized_role", message);
        return turn;
    };
    let mut message = match *role {
        "function_call" => call(&turn["value"], number, problems),
        "tool" => json!({"role": "tool", "tool_call_id": CALL_ID, "content": turn["value"]}),
        role => json!({"role": role, "content": turn["value"]}),
    };
    if let Some(weight) = turn.get("weight") {
        message["weight"] = weight.clone();
    }
    message
}

/// The text of a call, `{"name": ..., "arguments": ...}`, or a list of them, as an assistant's message.
fn call(text: &Value, number: usize, problems: &mut Problems) -> Value {
    let parsed = match text {
        Value::String(text) => serde_json::from_str(text).unwrap_or_default(),
        other => other.clone(),
    };
    let list = match parsed {
        Value::Array(list) => list,
        one => vec![one],
    };
    let mut calls = Vec::with_capacity(list.len());
    for function in list {
        let arguments = match &function["arguments"] {
            Value::String(text) => text.clone(),
            Value::Null => "{}".to_owned(),
            other => other.to_string(),
        };
        if !function["name"].is_string() {
            let message =
                format!("the call of turn {number} is no JSON with `name` and `arguments`");
            problems.add("invalid_tool_call", message);
        }
        let function = json!({"name": function["name"], "arguments": arguments});
        calls.push(json!({"id": CALL_ID, "type": "function", "function": function}));
    }
    json!({"role": "assistant", "tool_calls": calls})
}

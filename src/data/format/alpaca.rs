//! Alpaca's rows: `instruction`, `input` and `output`, and beside them `system` and a `history` of
//! earlier questions and answers. They become a conversation.
#![allow(clippy::wildcard_enum_match_arm, reason = "JSON will have no more than its six kinds")]

use serde_json::{Map, Value, json};

use super::{Format, Problems, conversations::system_message, openai_chat};
use crate::data::{RowBody, read::kind};

pub(super) const FORMAT: Format = Format {
    name: "alpaca",
    example: r#"{"instruction":"Translate to French.","input":"Good morning","output":"Bonjour"}"#,
    detect: |row| row.contains_key("instruction"),
    parse,
};

fn parse(mut row: Map<String, Value>, problems: &mut Problems) -> Option<RowBody> {
    let mut messages = question(&mut row, problems)?;
    match row.remove("output") {
        Some(Value::String(output)) => {
            messages.push(json!({"role": "assistant", "content": output}));
        }
        None => {
            problems.add("missing_completion", "`instruction` without `output`".to_owned());
            return None;
        }
        Some(other) => {
            problems.add("wrong_type", format!("`output` is {}, not a string", kind(&other)));
            return None;
        }
    }
    row.insert("messages".to_owned(), messages.into());
    openai_chat::parse(row, problems)
}

/// The conversation up to the answer.
pub(super) fn question(
    row: &mut Map<String, Value>,
    problems: &mut Problems,
) -> Option<Vec<Value>> {
    let mut messages: Vec<Value> =
        system_message(row.remove("system").as_ref()).into_iter().collect();
    match row.remove("history") {
        None | Some(Value::Null) => {}
        Some(Value::Array(history)) => {
            for (index, exchange) in history.iter().enumerate() {
                if !exchange[0].is_string() || !exchange[1].is_string() {
                    let message =
                        format!("exchange {} of `history` is no pair of texts", index + 1);
                    problems.add("wrong_type", message);
                }
                messages.push(json!({"role": "user", "content": exchange[0]}));
                messages.push(json!({"role": "assistant", "content": exchange[1]}));
            }
        }
        Some(other) => {
            problems.add("wrong_type", format!("`history` is {}, not a list", kind(&other)));
        }
    }
    let texts = [row.remove("instruction"), row.remove("input")].map(Option::unwrap_or_default);
    let mut parts = Vec::new();
    for (name, text) in ["instruction", "input"].iter().zip(texts) {
        match text {
            Value::Null => {}
            Value::String(text) if text.is_empty() => {}
            Value::String(text) => parts.push(text),
            other => {
                problems.add("wrong_type", format!("`{name}` is {}, not a string", kind(&other)));
            }
        }
    }
    messages.push(json!({"role": "user", "content": parts.join("\n")}));
    problems.is_empty().then_some(messages)
}

//! Preference rows: one prompt and two answers, of which the first is to be preferred. OpenAI's form
//! has `input`, `preferred_output` and `non_preferred_output`; TRL's has `prompt`, `chosen` and
//! `rejected`, as strings or as lists of messages, or the last two alone, as whole conversations with
//! a common beginning. ShareGPT's and Alpaca's have a `conversations` or an `instruction` and two answers
//! to it.
//!
//! Either side becomes the row that it would be alone, prompt and answer, so that all that is true of
//! ordinary rows (how they are rendered, what is trained) is true of each side.
#![allow(clippy::wildcard_enum_match_arm, reason = "JSON will have no more than its six kinds")]

use serde_json::{Map, Value, json};

use super::{Format, Problems, alpaca, conversations, messages, openai_chat::parse_tools};
use crate::data::{RowBody, read::kind};

pub(super) const FORMAT: Format = Format {
    name: "preference",
    example: r#"{"input":{"messages":[{"role":"user","content":"Capital of France?"}]},"preferred_output":[{"role":"assistant","content":"Paris"}],"non_preferred_output":[{"role":"assistant","content":"Lyon"}]}"#,
    detect: |row| {
        let answers = || PREFERRED.iter().chain(NON_PREFERRED);
        answers().any(|key| row.contains_key(*key))
            || row.get("input").is_some_and(|input| input["messages"].is_array())
    },
    parse,
};

/// Names of the better answer.
const PREFERRED: &[&str] = &["preferred_output", "preferred_completion", "chosen"];
/// Names of the worse one.
const NON_PREFERRED: &[&str] = &["non_preferred_output", "non_preferred_completion", "rejected"];

fn parse(mut row: Map<String, Value>, problems: &mut Problems) -> Option<RowBody> {
    let preferred = take(&mut row, PREFERRED);
    let non_preferred = take(&mut row, NON_PREFERRED);
    for (side, code, name) in [
        (&preferred, "missing_preferred", PREFERRED[0]),
        (&non_preferred, "missing_non_preferred", NON_PREFERRED[0]),
    ] {
        if side.is_none() {
            problems.add(code, format!("the row has no `{name}`"));
        }
    }
    let (mut better, mut worse) = (preferred?, non_preferred?);
    if let Some(prompt) = foreign_prompt(&mut row, problems) {
        row.insert("prompt".to_owned(), prompt?.into());
        better.answer = as_messages(better.answer, problems);
        worse.answer = as_messages(worse.answer, problems);
    }
    let prompt = match row.remove("input") {
        Some(Value::Object(mut input)) => {
            let messages = input.remove("messages");
            row.extend(input);
            messages
        }
        Some(other) => {
            let found = kind(&other);
            problems
                .add("wrong_type", format!("`input` is {found}, not an object with `messages`"));
            return None;
        }
        None => row.remove("prompt"),
    };
    let (chosen, rejected) = match (prompt, better.answer, worse.answer) {
        (Some(Value::String(prompt)), Value::String(chosen), Value::String(rejected)) => {
            raw(&prompt, chosen, rejected, problems)?
        }
        (Some(Value::Array(prompt)), Value::Array(chosen), Value::Array(rejected)) => {
            let sides = [(better.key, chosen), (worse.key, rejected)];
            conversations(&mut row, prompt, sides, problems)?
        }
        // A prompt as text beside whole conversations only repeats their beginning.
        (None | Some(Value::String(_)), Value::Array(mut chosen), Value::Array(mut rejected)) => {
            let prompt = take_common_start(&mut chosen, &mut rejected);
            let sides = [(better.key, chosen), (worse.key, rejected)];
            conversations(&mut row, prompt, sides, problems)?
        }
        (prompt, chosen, rejected) => {
            let prompt = prompt.as_ref().map_or("missing", kind);
            let message = format!(
                "the prompt is {prompt}, `{}` is {} and `{}` is {}; \
                 all must be strings, or all lists of messages",
                better.key,
                kind(&chosen),
                worse.key,
                kind(&rejected)
            );
            problems.add("wrong_type", message);
            return None;
        }
    };
    if chosen == rejected {
        let message = format!("`{}` and `{}` are the same", better.key, worse.key);
        problems.add("identical_outputs", message);
    }
    let (chosen, rejected) = (Box::new(chosen), Box::new(rejected));
    problems.is_empty().then_some(RowBody::Preference { chosen, rejected })
}

/// One of the two answers, under the name that the row gives it.
struct Side {
    key: &'static str,
    answer: Value,
}

/// The prompt of a row that is written as ShareGPT or Alpaca has it, as messages.
fn foreign_prompt(
    row: &mut Map<String, Value>,
    problems: &mut Problems,
) -> Option<Option<Vec<Value>>> {
    if let Some(turns) = row.remove("conversations") {
        return Some(conversations::messages(turns, row.remove("system").as_ref(), problems));
    }
    row.contains_key("instruction").then(|| alpaca::question(row, problems))
}

/// An answer as a list of messages: a text is the assistant's, a turn is one message.
fn as_messages(answer: Value, problems: &mut Problems) -> Value {
    match answer {
        Value::String(text) => json!([{"role": "assistant", "content": text}]),
        turn @ Value::Object(_) => vec![conversations::message(turn, 1, problems)].into(),
        Value::Array(turns) => {
            let message = |(index, turn)| conversations::message(turn, index + 1, problems);
            turns.into_iter().enumerate().map(message).collect()
        }
        other => other,
    }
}

fn take(row: &mut Map<String, Value>, keys: &[&'static str]) -> Option<Side> {
    let key = keys.iter().find(|key| row.get(**key).is_some_and(|value| !value.is_null()))?;
    row.remove(*key).map(|answer| Side { key, answer })
}

fn raw(
    prompt: &str,
    chosen: String,
    rejected: String,
    problems: &mut Problems,
) -> Option<(RowBody, RowBody)> {
    if chosen.is_empty() || rejected.is_empty() {
        problems.add("missing_content", "an answer is empty".to_owned());
        return None;
    }
    let row = |completion| RowBody::PromptCompletion { prompt: prompt.to_owned(), completion };
    Some((row(chosen), row(rejected)))
}

/// The messages that both conversations begin with, taken out of them.
fn take_common_start(chosen: &mut Vec<Value>, rejected: &mut Vec<Value>) -> Vec<Value> {
    let same = chosen.iter().zip(&*rejected).take_while(|(one, other)| one == other).count();
    // Equal conversations are reported as equal answers, which need their last message.
    let same = same.min(chosen.len().saturating_sub(1)).min(rejected.len().saturating_sub(1));
    rejected.drain(..same);
    chosen.drain(..same).collect()
}

/// The prompt with either answer, as chat rows; `row` may hold tools.
fn conversations(
    row: &mut Map<String, Value>,
    prompt: Vec<Value>,
    sides: [(&str, Vec<Value>); 2],
    problems: &mut Problems,
) -> Option<(RowBody, RowBody)> {
    let tools = parse_tools(row, problems);
    if prompt.is_empty() {
        problems.add("missing_prompt", "there is no message to answer".to_owned());
    }
    let (prompt, _) = messages::parse(prompt, "prompt message", problems);
    let [chosen, rejected] = sides.map(|(key, answer)| {
        let (answer, _) = messages::parse(answer, &format!("`{key}` message"), problems);
        if !answer.last().is_some_and(messages::is_assistant) {
            let message = format!("`{key}` does not end with an assistant message");
            problems.add("last_message_not_assistant", message);
        }
        // Weights say nothing here: an answer is compared as a whole.
        let mut trained = vec![false; prompt.len()];
        trained.extend(answer.iter().map(messages::is_assistant));
        let messages = prompt.iter().cloned().chain(answer).collect();
        RowBody::Chat { messages, trained, tools: tools.clone() }
    });
    problems.is_empty().then_some((chosen, rejected))
}

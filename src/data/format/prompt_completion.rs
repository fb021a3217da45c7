//! Prompt/completion rows: two strings (raw text, no template), or two lists of messages, which are
//! one conversation whose completion part is trained.

use serde_json::{Map, Value};

use super::{Format, Problems, messages, openai_chat::parse_tools};
use crate::data::{RowBody, read::kind};

pub(super) const FORMAT: Format = Format {
    name: "prompt_completion",
    example: r#"{"prompt":"2 + 2 =","completion":" 4"}"#,
    detect: |row| row.contains_key("prompt") || row.contains_key("completion"),
    parse,
};

fn parse(mut row: Map<String, Value>, problems: &mut Problems) -> Option<RowBody> {
    match (row.remove("prompt"), row.remove("completion")) {
        (Some(Value::String(prompt)), Some(Value::String(completion))) => {
            if completion.is_empty() {
                problems.add("missing_content", "`completion` is empty".to_owned());
                return None;
            }
            Some(RowBody::PromptCompletion { prompt, completion })
        }
        (Some(Value::Array(prompt)), Some(Value::Array(completion))) => {
            let tools = parse_tools(&mut row, problems);
            parse_conversation(prompt, completion, tools, problems)
        }
        (None, Some(_)) => {
            problems.add("missing_prompt", "`completion` without `prompt`".to_owned());
            None
        }
        (Some(_), None) => {
            problems.add("missing_completion", "`prompt` without `completion`".to_owned());
            None
        }
        (prompt, completion) => {
            let [prompt, completion] =
                [prompt, completion].map(|value| value.as_ref().map_or("missing", kind));
            let message = format!(
                "`prompt` is {prompt} and `completion` is {completion}; \
                 both must be strings, or both lists of messages"
            );
            problems.add("wrong_type", message);
            None
        }
    }
}

fn parse_conversation(
    prompt: Vec<Value>,
    completion: Vec<Value>,
    tools: Option<Vec<Value>>,
    problems: &mut Problems,
) -> Option<RowBody> {
    let (mut messages, trained) = messages::parse(prompt, "prompt message", problems);
    // What the prompt's assistant said is context here, whatever its weight.
    let mut trained = vec![false; trained.len()];
    let (completion, completion_trained) =
        messages::parse(completion, "completion message", problems);
    if !completion.iter().any(messages::is_assistant) {
        let message = "no assistant message in `completion`".to_owned();
        problems.add("example_missing_assistant_message", message);
    }
    messages.extend(completion);
    trained.extend(completion_trained);
    problems.is_empty().then_some(RowBody::Chat { messages, trained, tools })
}

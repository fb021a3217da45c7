//! Rows as an evaluation asks them, alone or after a few worked examples.

use serde_json::{Map, Value, json};

use super::{Row, RowBody, epoch_order};
use crate::text::{ChatTemplate, TextError, Tokenizer};

/// A row as an evaluation asks it: the conversation before the last assistant message, and that
/// message's text.
#[derive(Debug, Clone, PartialEq)]
pub struct Question {
    /// The conversation so far; empty when `raw_prompt` is set.
    pub messages: Vec<Value>,
    /// `OpenAI` tool objects.
    pub tools: Option<Vec<Value>>,
    /// The whole prompt of a prompt/completion row, which no chat template touches.
    pub raw_prompt: Option<String>,
    /// The expected answer; the JSON of its tool calls where it has no text.
    pub answer: String,
    /// Line of the row, from 1.
    pub line: usize,
}

impl Question {
    /// The row's question; `None` for a conversation without an assistant message and for a text. The expected
    /// answer of a preference is the preferred one.
    #[must_use]
    pub fn new(row: &Row) -> Option<Self> {
        Self::of_body(&row.body, row.line)
    }

    fn of_body(body: &RowBody, line: usize) -> Option<Self> {
        match body {
            RowBody::Preference { chosen, .. } => Self::of_body(chosen, line),
            // A text asks nothing.
            RowBody::PromptCompletion { prompt, .. } if prompt.is_empty() => None,
            RowBody::PromptCompletion { prompt, completion } => Some(Self {
                messages: Vec::new(),
                tools: None,
                raw_prompt: Some(prompt.clone()),
                answer: completion.clone(),
                line,
            }),
            RowBody::Chat { messages, tools, .. } => {
                let last = messages.iter().rposition(|message| message["role"] == "assistant")?;
                Some(Self {
                    messages: messages[..last].to_vec(),
                    tools: tools.clone(),
                    raw_prompt: None,
                    answer: answer(&messages[last]),
                    line,
                })
            }
        }
    }

    /// The tokens that a server is asked to continue.
    ///
    /// # Errors
    /// The chat template refuses the conversation, or the tokenizer its text.
    pub fn prompt_tokens(
        &self,
        tokenizer: &Tokenizer,
        template: &ChatTemplate,
    ) -> Result<Vec<u32>, TextError> {
        match &self.raw_prompt {
            Some(prompt) => tokenizer.encode(prompt, true),
            None => {
                let tools = self.tools.as_deref();
                let prompt = template.render(&self.messages, tools, true, &Map::new())?;
                tokenizer.encode(&prompt, false)
            }
        }
    }
}

/// Every row's question.
#[must_use]
pub fn questions(rows: &[Row]) -> Vec<Question> {
    rows.iter().filter_map(Question::new).collect()
}

/// `k` of the rows (all, if there are fewer) as worked examples; which ones depends on `seed` alone.
#[must_use]
pub fn choose_examples(rows: &[Row], k: usize, seed: u64) -> Vec<Question> {
    epoch_order(rows.len(), seed, 0)
        .into_iter()
        .filter_map(|index| Question::new(&rows[index]))
        .take(k)
        .collect()
}

/// The questions, each with the examples' exchanges as earlier turns after its system message. Raw
/// prompts get the raw examples before them, a blank line between. A question never shows itself.
#[must_use]
pub fn few_shot(questions: &[Question], examples: &[Question]) -> Vec<Question> {
    questions.iter().map(|question| with_examples(question, examples)).collect()
}

fn with_examples(question: &Question, examples: &[Question]) -> Question {
    let mut prompted = question.clone();
    let others = examples.iter().filter(|example| !same_prompt(example, question));
    if let Some(prompt) = &question.raw_prompt {
        let mut text = String::new();
        for example in others {
            if let Some(other) = &example.raw_prompt {
                text.push_str(other);
                text.push_str(&example.answer);
                text.push_str("\n\n");
            }
        }
        prompted.raw_prompt = Some(text + prompt);
    } else {
        let start = question.messages.iter().take_while(|message| is_system(message)).count();
        prompted.messages.splice(start..start, others.flat_map(exchange));
    }
    prompted
}

fn same_prompt(one: &Question, other: &Question) -> bool {
    one.messages == other.messages && one.raw_prompt == other.raw_prompt
}

/// The example as turns of a conversation; its system message stays behind.
fn exchange(example: &Question) -> Vec<Value> {
    let mut turns = match &example.raw_prompt {
        Some(prompt) => vec![json!({"role": "user", "content": prompt})],
        None => example.messages.iter().filter(|message| !is_system(message)).cloned().collect(),
    };
    turns.push(json!({"role": "assistant", "content": example.answer}));
    turns
}

fn is_system(message: &Value) -> bool {
    message["role"] == "system"
}

fn answer(message: &Value) -> String {
    match (&message["content"], &message["tool_calls"], &message["function_call"]) {
        (Value::String(text), _, _) => text.clone(),
        (_, Value::Null, call) => call.to_string(),
        (_, calls, _) => calls.to_string(),
    }
}

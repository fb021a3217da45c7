//! A chat of some turns, and its JSON row.

use serde_json::{Value, json};

/// A conversation under construction: one JSONL row.
#[derive(Debug, Default)]
pub(super) struct Chat {
    system: Option<String>,
    turns: Vec<(String, String)>,
    num_chars: usize,
}

impl Chat {
    /// Sets the system prompt.
    pub(super) fn system(&mut self, text: &str) {
        self.num_chars += text.len();
        self.system = Some(text.to_owned());
    }

    /// Adds a question and its answer.
    pub(super) fn turn(&mut self, user: String, assistant: String) {
        self.num_chars += user.len() + assistant.len();
        self.turns.push((user, assistant));
    }

    /// Characters of all messages so far.
    pub(super) fn num_chars(&self) -> usize {
        self.num_chars
    }

    /// The row: `{"messages": [...]}` in OpenAI's chat form.
    pub(super) fn into_row(self) -> Value {
        let message = |role: &str, content: String| json!({"role": role, "content": content});
        let mut messages: Vec<Value> =
            self.system.into_iter().map(|text| message("system", text)).collect();
        for (user, assistant) in self.turns {
            messages.push(message("user", user));
            messages.push(message("assistant", assistant));
        }
        json!({"messages": messages})
    }
}

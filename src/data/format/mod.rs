//! The forms in which a row may be written. One file per form and one line in [`FORMATS`]; each
//! turns its JSON object into a [`RowBody`] or says everything that is wrong with it.

mod alpaca;
mod conversations;
mod messages;
mod openai_chat;
mod preference;
mod prompt_completion;
mod text;

use serde_json::{Map, Value};

pub use messages::modernize;

use super::{RowBody, RowError};

/// A way of writing rows.
pub struct Format {
    /// Its name, for reports.
    pub name: &'static str,
    /// A row that is written so.
    pub example: &'static str,
    /// Whether a row means to be of this format; the first that says yes parses it.
    pub detect: fn(&Map<String, Value>) -> bool,
    /// The row's meaning; `None` after at least one problem was added.
    pub parse: fn(Map<String, Value>, &mut Problems) -> Option<RowBody>,
}

/// Every known format, in the order in which they are tried.
pub const FORMATS: &[Format] = &[
    openai_chat::FORMAT,
    preference::FORMAT,
    prompt_completion::FORMAT,
    conversations::FORMAT,
    alpaca::FORMAT,
    text::FORMAT,
];

/// Collects what is wrong with one row.
#[derive(Debug, Default)]
pub struct Problems {
    found: Vec<(&'static str, String)>,
}

impl Problems {
    /// Notes a problem: its code and a message that names the value.
    pub fn add(&mut self, code: &'static str, message: String) {
        self.found.push((code, message));
    }

    /// How many there are so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.found.len()
    }

    /// Whether the row is fine so far.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// The problems, as problems of line `line` (from 1).
    pub fn into_errors(self, line: usize) -> impl Iterator<Item = RowError> {
        self.found.into_iter().map(move |(code, message)| RowError { line, code, message })
    }
}

//! FLOOR 2'. Training and evaluation rows.
//!
//! Finds data files (`source`, `files`), reads them (`container`, `columns`) and reports every problem of
//! every line at once (`read`, `format`), turns rows
//! into tokens with a loss mask (`encode`, `turns`), asks them as questions (`question`), describes
//! them (`stats`) and puts them in order (`split`).
//!
//! It knows rows, chat templates and loss masks. It must never know tensors, models or requests.

mod columns;
mod container;
mod encode;
mod files;
mod format;
mod kind;
pub mod kitchen;
mod literal;
mod question;
mod read;
mod source;
mod split;
mod stats;
mod turns;

use std::{io, str::FromStr};

use serde_json::Value;

pub use self::{
    columns::Reading,
    encode::{
        Encoder, NO_TRAINED_TOKENS, TEMPLATE_FAILED, TEMPLATE_NOT_PREFIX, TOKENIZER_FAILED,
        TOOL_CALLS_DROPPED,
    },
    files::source_files,
    format::{FORMATS, Format, Problems, modernize},
    kind::{RowKind, WRONG_ROW_KIND, kind_name, wrong_kinds},
    question::{Question, choose_examples, few_shot, questions},
    read::{MAX_LINE_BYTES, parse_rows, read_rows, read_valid_rows},
    source::{Columns, Source, Sources},
    split::{epoch_order, hold_out, repeated},
    stats::{
        Distribution, RowStats, RunEstimate, SharedPrompt, default_epochs, duplicates,
        shared_prompts,
    },
};

/// One row's problem.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {message}")]
pub struct RowError {
    /// Line in the file, from 1.
    pub line: usize,
    /// A stable name of the kind of problem ("`unrecognized_role`"), to count by.
    pub code: &'static str,
    /// What is wrong, with the value.
    pub message: String,
}

/// Why a data file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The file cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// All problems at once, in the order of the lines.
    #[error("{path}: {}", summary(errors))]
    Rows {
        /// The file.
        path: String,
        /// Never empty.
        errors: Vec<RowError>,
    },
    /// A file of blank lines, or of none.
    #[error("{path} has no rows")]
    Empty {
        /// The file.
        path: String,
    },
}

/// A valid row, with its line number (from 1).
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Line in the file, from 1.
    pub line: usize,
    /// What the row says.
    pub body: RowBody,
    /// Whether it has a part that is named as the completion, so that the rest is none.
    pub is_completion: bool,
}

/// The three kinds of rows that every format comes down to.
#[derive(Debug, Clone, PartialEq)]
pub enum RowBody {
    /// A conversation, as the chat template is to render it.
    Chat {
        /// OpenAI message objects without `weight`; `content` is a string or null.
        messages: Vec<Value>,
        /// `trained[i]`: message i is an assistant message that counts (weight is not 0).
        trained: Vec<bool>,
        /// OpenAI tool objects.
        tools: Option<Vec<Value>>,
    },
    /// Raw text, no template.
    PromptCompletion {
        /// Context; never trained unless the loss is on all tokens.
        prompt: String,
        /// What is to be learned; an end-of-sequence token follows it.
        completion: String,
    },
    /// One prompt and two answers to it. Either side is the row that it would be alone; neither is a
    /// preference.
    Preference {
        /// With the answer to be preferred.
        chosen: Box<RowBody>,
        /// With the other one.
        rejected: Box<RowBody>,
    },
}

/// Which tokens the loss counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LossOn {
    /// Assistant turns with their end-of-turn token, and completions.
    Assistant,
    /// Every token but the first, which nothing predicts.
    All,
    /// The completion where a row names one, else every token.
    Auto,
}

impl FromStr for LossOn {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "assistant" => Ok(Self::Assistant),
            "all" => Ok(Self::All),
            "auto" => Ok(Self::Auto),
            _ => Err(format!("unknown loss tokens {name:?}: `assistant`, `all` or `auto`")),
        }
    }
}

/// Tokens of one row and which of them are trained (predicted from the ones before).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Line of the row, from 1.
    pub line: usize,
    /// Token ids. `[tokens]`
    pub tokens: Vec<u32>,
    /// `loss_mask[i]`: token i is a target of the loss; never true for token 0. `[tokens]`
    pub loss_mask: Vec<bool>,
    /// Tokens cut off by `max_length`.
    pub num_truncated: usize,
    /// Of a preference: the same prompt with the answer that this one is preferred to.
    pub rejected: Option<Box<Example>>,
}

impl Example {
    /// The sequences that go through the model: itself, and the rejected one if there is one.
    pub fn sides(&self) -> impl Iterator<Item = &Self> {
        std::iter::once(self).chain(self.rejected.as_deref())
    }

    /// Tokens of all sides.
    #[must_use]
    pub fn num_tokens(&self) -> usize {
        self.sides().map(|side| side.tokens.len()).sum()
    }

    /// How many tokens of all sides the loss counts.
    #[must_use]
    pub fn num_trained(&self) -> usize {
        self.sides().flat_map(|side| &side.loss_mask).filter(|trained| **trained).count()
    }

    /// Tokens that all sides have lost to the maximum length.
    #[must_use]
    pub fn num_lost(&self) -> usize {
        self.sides().map(|side| side.num_truncated).sum()
    }
}

fn summary(errors: &[RowError]) -> String {
    match errors {
        [] => "unknown problem".to_owned(),
        [only] => only.to_string(),
        [first, ..] => format!("{} problems, the first: {first}", errors.len()),
    }
}

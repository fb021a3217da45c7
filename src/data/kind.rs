//! Which kind a row is of, and whether a way of training can use it.

use super::{Row, RowBody, RowError};

/// Code of a row of a kind that the chosen way of training cannot use.
pub const WRONG_ROW_KIND: &str = "wrong_row_kind";

/// The kinds of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowKind {
    /// A conversation.
    Chat,
    /// Raw text.
    PromptCompletion,
    /// A prompt with a better and a worse answer.
    Preference,
}

impl RowKind {
    /// The kind of a row.
    #[must_use]
    pub fn of(row: &Row) -> Self {
        match row.body {
            RowBody::Chat { .. } => Self::Chat,
            RowBody::PromptCompletion { .. } => Self::PromptCompletion,
            RowBody::Preference { .. } => Self::Preference,
        }
    }

    /// Its name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::PromptCompletion => "prompt_completion",
            Self::Preference => "preference",
        }
    }
}

/// The kind that all rows are of; "mixed" where there are several kinds, or no rows.
#[must_use]
pub fn kind_name(rows: &[Row]) -> &'static str {
    let mut kinds = rows.iter().map(RowKind::of);
    match kinds.next() {
        Some(first) if kinds.all(|kind| kind == first) => first.name(),
        _ => "mixed",
    }
}

/// An error for each row that is no preference where preferences are wanted, or is one where they
/// are not.
#[must_use]
pub fn wrong_kinds(rows: &[Row], wants_preferences: bool) -> Vec<RowError> {
    let message = if wants_preferences {
        "no preference row: dpo and orpo need `input`, `preferred_output` and `non_preferred_output` \
         (or `prompt`, `chosen` and `rejected`)"
    } else {
        "a preference row, which only dpo and orpo can use; supervised training needs `messages` \
         (or `prompt` and `completion`)"
    };
    let is_wrong = |row: &&Row| (RowKind::of(row) == RowKind::Preference) != wants_preferences;
    let error =
        |row: &Row| RowError { line: row.line, code: WRONG_ROW_KIND, message: message.to_owned() };
    rows.iter().filter(is_wrong).map(error).collect()
}

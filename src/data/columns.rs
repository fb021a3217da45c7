//! A record's columns under the names that rows have here.
#![allow(clippy::wildcard_enum_match_arm, reason = "JSON will have no more than its six kinds")]

use serde_json::{Map, Value};

use super::{Columns, Problems, literal};

/// Columns whose text may be JSON, as files of plain text columns have them.
const LISTS: &[&str] = &[
    "messages",
    "conversations",
    "tools",
    "functions",
    "history",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "input",
    "preferred_output",
    "non_preferred_output",
];
/// What is kept beside mapped columns, whatever the mapping says.
const BESIDE: &[&str] = &["tools", "functions", "parallel_tool_calls"];

/// How to read the columns of a file.
#[derive(Debug, Clone, Copy, Default)]
pub struct Reading<'a> {
    /// Ours -> theirs; without any the columns are taken as they are.
    pub columns: Option<&'a Columns>,
    /// The column that holds the whole row.
    pub text_column: Option<&'a str>,
}

impl Reading<'_> {
    /// The record as a row; `None` only together with a problem.
    pub(super) fn apply(
        &self,
        mut record: Map<String, Value>,
        problems: &mut Problems,
    ) -> Option<Map<String, Value>> {
        let mapped = self.columns.filter(|columns| !columns.is_empty());
        if mapped.is_none() && self.text_column.is_none() {
            return Some(record);
        }
        let mut row = Map::new();
        for (ours, theirs) in mapped.into_iter().flatten() {
            match record.get(theirs) {
                Some(value) => {
                    row.insert(ours.clone(), value.clone());
                }
                None => missing(theirs, &record, problems),
            }
        }
        if let Some(column) = self.text_column {
            match record.get(column) {
                Some(value) => {
                    let value = from_text(value.clone());
                    row.insert(whole_row(&value).to_owned(), value);
                }
                // A file may have the usual names all the same.
                None if mapped.is_none() && has_a_form(&record) => return Some(record),
                None => missing(column, &record, problems),
            }
        }
        for name in BESIDE {
            if let Some(value) = record.remove(*name) {
                row.entry(*name).or_insert(value);
            }
        }
        problems.is_empty().then_some(row)
    }
}

/// What a column is called that holds a whole row like `value`.
fn whole_row(value: &Value) -> &'static str {
    match value {
        Value::Array(list) if list.first().is_some_and(|turn| turn.get("from").is_some()) => {
            "conversations"
        }
        Value::Array(_) => "messages",
        _ => "text",
    }
}

fn has_a_form(record: &Map<String, Value>) -> bool {
    ["messages", "conversations", "prompt", "text"].iter().any(|name| record.contains_key(*name))
}

fn missing(column: &str, record: &Map<String, Value>, problems: &mut Problems) {
    let names: Vec<&String> = record.keys().collect();
    problems.add("missing_column", format!("no column {column:?}; there are {names:?}"));
}

/// A record of plain texts (CSV) with the lists that some of them say, and without empty cells.
pub(super) fn from_texts(record: Map<String, Value>) -> Map<String, Value> {
    let read = |(name, value): (String, Value)| {
        let value = if LISTS.contains(&name.as_str()) { from_text(value) } else { value };
        (name, value)
    };
    let is_empty = |value: &Value| value.is_null() || value.as_str() == Some("");
    record.into_iter().filter(|(_, value)| !is_empty(value)).map(read).collect()
}

/// A text that is a list of objects (or an object), in JSON or as Python prints it, as that, everything else as it is.
pub(super) fn from_text(value: Value) -> Value {
    let Value::String(text) = &value else { return value };
    if !text.trim_start().starts_with(['[', '{']) {
        return value;
    }
    match serde_json::from_str::<Value>(text).ok().or_else(|| literal::parse(text)) {
        Some(list @ Value::Array(_)) if list[0].is_object() || list[0].is_array() => list,
        Some(object @ Value::Object(_)) => object,
        _ => value,
    }
}

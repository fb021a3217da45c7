//! Text rows: one string that is learned from its beginning to its end.

use serde_json::{Map, Value};

use super::{Format, Problems};
use crate::data::{RowBody, read::kind};

pub(super) const FORMAT: Format = Format {
    name: "text",
    example: r#"{"text":"Once upon a time there was a model."}"#,
    detect: |row| row.contains_key("text"),
    parse,
};

fn parse(mut row: Map<String, Value>, problems: &mut Problems) -> Option<RowBody> {
    match row.remove("text") {
        Some(Value::String(text)) if !text.is_empty() => {
            Some(RowBody::PromptCompletion { prompt: String::new(), completion: text })
        }
        Some(Value::String(_)) => {
            problems.add("missing_content", "`text` is empty".to_owned());
            None
        }
        other => {
            let found = other.as_ref().map_or("missing", kind);
            problems.add("wrong_type", format!("`text` is {found}, not a string"));
            None
        }
    }
}

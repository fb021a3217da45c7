//! One JSON array of objects. A row's number in the list stands for its line.
#![allow(clippy::wildcard_enum_match_arm, reason = "JSON will have no more than its six kinds")]

use serde_json::Value;

use super::{Record, problem};
use crate::data::read::kind;

/// `None` for bytes that are no array as a whole.
pub(super) fn records(bytes: &[u8]) -> Option<Vec<Record>> {
    let text = bytes.trim_ascii();
    if !text.starts_with(b"[") || !text.ends_with(b"]") {
        return None;
    }
    let list: Vec<Value> = serde_json::from_slice(text).ok()?;
    let record = |(index, value)| match value {
        Value::Object(row) => (index + 1, Ok(row)),
        other => {
            let message = format!("a row is a JSON object, this is {}", kind(&other));
            problem(index + 1, "data_type", message)
        }
    };
    Some(list.into_iter().enumerate().map(record).collect())
}

//! One JSON object per line. Blank lines and `\r\n` are accepted.

use serde_json::Value;

use super::{Record, problem};
use crate::data::read::{MAX_LINE_BYTES, kind};

pub(super) fn records(bytes: &[u8]) -> Vec<Record> {
    let mut records = Vec::new();
    for (index, bytes) in bytes.split(|byte| *byte == b'\n').enumerate() {
        if !bytes.iter().all(u8::is_ascii_whitespace) {
            records.push(record(index + 1, bytes));
        }
    }
    records
}

fn record(line: usize, bytes: &[u8]) -> Record {
    if bytes.len() > MAX_LINE_BYTES {
        let message = format!("the line has {} bytes; at most {MAX_LINE_BYTES} fit", bytes.len());
        return problem(line, "line_too_long", message);
    }
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => {
            let message = format!("not UTF-8 from byte {} of the line", error.valid_up_to() + 1);
            return problem(line, "invalid_utf8", message);
        }
    };
    match serde_json::from_str(text) {
        Ok(Value::Object(row)) => (line, Ok(row)),
        Ok(other) => {
            let message = format!("a row is a JSON object, this is {}", kind(&other));
            problem(line, "data_type", message)
        }
        Err(error) => problem(line, "invalid_json", json_message(&error)),
    }
}

/// `serde_json` counts lines within the row; only the column helps.
fn json_message(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let cause = text.split(" at line ").next().unwrap_or(&text);
    format!("not JSON at column {}: {cause}", error.column())
}

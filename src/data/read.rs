//! A data file, line by line: bytes to rows, with every problem of every line.

use std::{fs, path::Path};

use serde_json::Value;

use super::{DataError, FORMATS, Problems, Row, RowBody, RowError};

/// A longer line is an error: no row of text is this long, a file without line ends is.
pub const MAX_LINE_BYTES: usize = 4 << 20;

/// Reads a whole file of JSON lines in any of the [`FORMATS`]; every problem of every line is
/// reported at once. A byte order mark, `\r\n` and blank lines are accepted.
///
/// # Errors
/// The file cannot be read, has no rows, or has lines that are no valid rows.
pub fn read_rows(path: &Path) -> Result<Vec<Row>, DataError> {
    let (rows, errors) = read_valid_rows(path)?;
    let path = path.display().to_string();
    match (rows.is_empty(), errors.is_empty()) {
        (_, false) => Err(DataError::Rows { path, errors }),
        (true, true) => Err(DataError::Empty { path }),
        (false, true) => Ok(rows),
    }
}

/// The valid rows of a file, and what is wrong with the others; both may be empty.
///
/// # Errors
/// The file cannot be read.
pub fn read_valid_rows(path: &Path) -> Result<(Vec<Row>, Vec<RowError>), DataError> {
    match fs::read(path) {
        Ok(bytes) => Ok(parse_rows(&bytes)),
        Err(source) => Err(DataError::Io { path: path.display().to_string(), source }),
    }
}

/// [`read_valid_rows`] of bytes that are already here.
#[must_use]
pub fn parse_rows(bytes: &[u8]) -> (Vec<Row>, Vec<RowError>) {
    const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
    let bytes = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes);
    if is_json_array(bytes) {
        let message = "the whole file is one JSON array; write one row per line (jq -c '.[]')";
        let error = RowError { line: 1, code: "data_type", message: message.to_owned() };
        return (Vec::new(), vec![error]);
    }
    let mut rows = Vec::new();
    let mut errors = Vec::new();
    for (index, bytes) in bytes.split(|byte| *byte == b'\n').enumerate() {
        let line = index + 1;
        if bytes.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let mut problems = Problems::default();
        if let Some(body) = parse_line(bytes, &mut problems) {
            rows.push(Row { line, body });
        }
        errors.extend(problems.into_errors(line));
    }
    (rows, errors)
}

/// One line's row; `None` only together with a problem.
fn parse_line(bytes: &[u8], problems: &mut Problems) -> Option<RowBody> {
    if bytes.len() > MAX_LINE_BYTES {
        let message = format!("the line has {} bytes; at most {MAX_LINE_BYTES} fit", bytes.len());
        problems.add("line_too_long", message);
        return None;
    }
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => {
            let message = format!("not UTF-8 from byte {} of the line", error.valid_up_to() + 1);
            problems.add("invalid_utf8", message);
            return None;
        }
    };
    let row = match serde_json::from_str(text) {
        Ok(Value::Object(row)) => row,
        Ok(other) => {
            let message = format!("a row is a JSON object, this is {}", kind(&other));
            problems.add("data_type", message);
            return None;
        }
        Err(error) => {
            problems.add("invalid_json", json_message(&error));
            return None;
        }
    };
    let Some(format) = FORMATS.iter().find(|format| (format.detect)(&row)) else {
        let keys: Vec<&str> = row.keys().map(String::as_str).take(8).collect();
        let message = format!("no `messages`, no `prompt` and no `input`; the keys are {keys:?}");
        problems.add("missing_messages_list", message);
        return None;
    };
    (format.parse)(row, problems)
}

/// What a JSON value is, with its article, for messages.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// `serde_json` counts lines within the row; only the column helps.
fn json_message(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let cause = text.split(" at line ").next().unwrap_or(&text);
    format!("not JSON at column {}: {cause}", error.column())
}

fn is_json_array(bytes: &[u8]) -> bool {
    let text = bytes.trim_ascii();
    text.starts_with(b"[")
        && text.ends_with(b"]")
        && serde_json::from_slice::<Vec<Value>>(text).is_ok()
}

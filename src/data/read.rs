//! A data file, record by record: bytes to rows, with every problem of every one.

use std::{fs, path::Path};

use serde_json::{Map, Value};

use super::{DataError, FORMATS, Problems, Reading, Row, RowBody, RowError, container::records};

/// A longer line is an error: no row of text is this long, a file without line ends is.
pub const MAX_LINE_BYTES: usize = 4 << 20;

/// Reads a whole file in any of the containers and [`FORMATS`]; every problem of every row is
/// reported at once. A byte order mark, `\r\n` and blank lines are accepted.
///
/// # Errors
/// The file cannot be read, has no rows, or has rows that are not valid.
pub fn read_rows(path: &Path) -> Result<Vec<Row>, DataError> {
    let (rows, errors) = read_valid_rows(path, Reading::default())?;
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
pub fn read_valid_rows(
    path: &Path,
    reading: Reading<'_>,
) -> Result<(Vec<Row>, Vec<RowError>), DataError> {
    match fs::read(path) {
        Ok(bytes) => Ok(parse(&bytes, Some(path), reading)),
        Err(source) => Err(DataError::Io { path: path.display().to_string(), source }),
    }
}

/// [`read_valid_rows`] of bytes that are already here and have no name.
#[must_use]
pub fn parse_rows(bytes: &[u8]) -> (Vec<Row>, Vec<RowError>) {
    parse(bytes, None, Reading::default())
}

fn parse(bytes: &[u8], name: Option<&Path>, reading: Reading<'_>) -> (Vec<Row>, Vec<RowError>) {
    let mut rows = Vec::new();
    let mut errors = Vec::new();
    for (line, record) in records(bytes, name) {
        let record = match record {
            Ok(record) => record,
            Err(found) => {
                errors.extend(found);
                continue;
            }
        };
        let mut problems = Problems::default();
        let row = reading.apply(record, &mut problems);
        if let Some((body, is_completion)) = row.and_then(|row| parse_row(row, &mut problems)) {
            rows.push(Row { line, body, is_completion });
        }
        errors.extend(problems.into_errors(line));
    }
    (rows, errors)
}

/// A row's meaning, and whether it says itself what its completion is; `None` only together with a
/// problem.
fn parse_row(row: Map<String, Value>, problems: &mut Problems) -> Option<(RowBody, bool)> {
    let Some(format) = FORMATS.iter().find(|format| (format.detect)(&row)) else {
        let keys: Vec<&str> = row.keys().map(String::as_str).take(8).collect();
        let message = format!(
            "no `messages`, `prompt`, `input`, `conversations`, `instruction` or `text`; the keys are \
             {keys:?}"
        );
        problems.add("missing_messages_list", message);
        return None;
    };
    let is_completion = row.contains_key("completion");
    let mark = ["kto_tag", "label"].into_iter().find(|key| {
        row.get(*key).is_some_and(Value::is_boolean) && (is_completion || *key == "kto_tag")
    });
    if let Some(mark) = mark {
        // Half of such rows are answers that are not to be learned.
        let message = format!(
            "`{mark}` says whether the answer is a good one, which only KTO uses; keep the rows \
             where it is true, without it, or make pairs for dpo"
        );
        problems.add("unpaired_preference", message);
        return None;
    }
    Some(((format.parse)(row, problems)?, is_completion))
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

//! What `check` prints for a program: one JSON object.

use serde_json::{Value, json};

use super::{DataFile, report::warnings};
use crate::data::{Example, RowError, shared_prompts};

/// More errors than this are only counted.
const MAX_ERRORS_LISTED: usize = 100;

/// The training file, with the validation file below it.
pub(super) fn report(train: &DataFile, valid: Option<&DataFile>) -> Value {
    let mut object = file(train);
    if let Some(valid) = valid {
        object["valid"] = file(valid);
        object["shared_prompts"] = shared_prompts(&train.rows, &valid.rows).len().into();
    }
    object
}

fn file(file: &DataFile) -> Value {
    let error = |RowError { line, code, message }: &RowError| json!({"line": line, "code": code, "message": message});
    let sides = || file.examples.iter().flat_map(Example::sides);
    json!({
        "rows": file.rows.len(),
        "examples": file.examples.len(),
        "tokens": sides().map(|side| side.tokens.len()).sum::<usize>(),
        "trained_tokens": file.examples.iter().map(Example::num_trained).sum::<usize>(),
        "longest": sides().map(|side| side.tokens.len() + side.num_truncated).max().unwrap_or(0),
        "truncated": file.stats.num_truncated_rows,
        "duplicates": file.duplicates.len(),
        "kind": file.kind,
        "num_errors": file.errors.len(),
        "errors": file.errors.iter().take(MAX_ERRORS_LISTED).map(error).collect::<Vec<_>>(),
        "warnings": warnings(file),
    })
}

//! A client's own pairs of strings, as everywhere in OpenAI's API: 16 of them, keys of 64 and values of 512
//! characters at most.

use std::collections::BTreeMap;

use serde_json::Value;

use super::JobsError;

const MAX_PAIRS: usize = 16;
/// In characters.
const MAX_KEY: usize = 64;
/// In characters.
const MAX_VALUE: usize = 512;

/// The pairs of a JSON object; `None` of null.
///
/// # Errors
/// `Invalid` with param `metadata`: no object, a value that is no string, or too much of something.
pub fn valid_metadata(value: &Value) -> Result<Option<BTreeMap<String, String>>, JobsError> {
    if value.is_null() {
        return Ok(None);
    }
    let fields = value.as_object().ok_or_else(|| invalid("`metadata` must be an object"))?;
    let pair = |(key, value): (&String, &Value)| {
        let wrong = || invalid(format!("`metadata.{key}` must be a string"));
        Ok((key.clone(), value.as_str().ok_or_else(wrong)?.to_owned()))
    };
    let metadata = fields.iter().map(pair).collect::<Result<_, JobsError>>()?;
    check_metadata(&metadata)?;
    Ok(Some(metadata))
}

/// Refuses too many pairs, and pairs that are too long.
pub(super) fn check_metadata(metadata: &BTreeMap<String, String>) -> Result<(), JobsError> {
    if metadata.len() > MAX_PAIRS {
        let count = metadata.len();
        return Err(invalid(format!("`metadata` has {count} pairs, at most {MAX_PAIRS} fit")));
    }
    for (key, value) in metadata {
        let key_chars = key.chars().count();
        if !(1..=MAX_KEY).contains(&key_chars) {
            return Err(invalid(format!(
                "a key of `metadata` has {key_chars} characters: 1 to {MAX_KEY} are allowed"
            )));
        }
        let value_chars = value.chars().count();
        if value_chars > MAX_VALUE {
            return Err(invalid(format!(
                "`metadata.{key}` has {value_chars} characters: at most {MAX_VALUE} are allowed"
            )));
        }
    }
    Ok(())
}

fn invalid(message: impl Into<String>) -> JobsError {
    JobsError::invalid("metadata", message)
}

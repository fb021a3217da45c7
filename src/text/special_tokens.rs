//! The named special tokens (`bos_token`, `eos_token`, ...) of a model folder.

use std::{collections::BTreeMap, io::ErrorKind, path::Path};

use serde_json::{Map, Value};

use crate::text::TextError;

/// The literal text of each named special token, by name (`"bos_token"` -> `"<s>"`).
pub(super) type SpecialTokens = BTreeMap<String, String>;

/// Reads `tokenizer_config.json`, with `special_tokens_map.json` for the names it does not mention.
/// An explicit `null` in `tokenizer_config.json` means that there is no such token.
pub(super) fn read_special_tokens(dir: &Path) -> Result<SpecialTokens, TextError> {
    let mut tokens = SpecialTokens::new();
    for file in ["special_tokens_map.json", "tokenizer_config.json"] {
        for (name, value) in read_json_object(&dir.join(file))?.unwrap_or_default() {
            if !name.ends_with("_token") {
                continue;
            }
            // A plain string, or an added token's object form {"content": "<s>", "lstrip": ...}.
            match value.as_str().or_else(|| value.get("content")?.as_str()) {
                Some(text) => drop(tokens.insert(name, text.to_owned())),
                None if value.is_null() => drop(tokens.remove(&name)),
                None => {} // "add_bos_token": true and the like
            }
        }
    }
    Ok(tokens)
}

/// Reads a JSON object; `None` when there is no such file.
pub(super) fn read_json_object(path: &Path) -> Result<Option<Map<String, Value>>, TextError> {
    let Some(text) = read_text(path)? else { return Ok(None) };
    let object = serde_json::from_str(&text).map_err(|error| broken(path, &error))?;
    Ok(Some(object))
}

/// Reads a UTF-8 file; `None` when there is no such file.
pub(super) fn read_text(path: &Path) -> Result<Option<String>, TextError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(broken(path, &error)),
    }
}

/// The error that names `path` and says what is wrong with it.
pub(super) fn broken(path: &Path, reason: &dyn std::fmt::Display) -> TextError {
    TextError::File { path: path.to_owned(), reason: reason.to_string() }
}

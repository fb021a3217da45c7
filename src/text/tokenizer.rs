//! Text to token ids and back, by the model's own `tokenizer.json`.

mod new_tokens;

use std::{collections::HashSet, path::Path};

use tokenizers::DecoderWrapper;

pub use new_tokens::NewToken;

use crate::text::{
    TextError,
    special_tokens::{SpecialTokens, broken, read_special_tokens},
};

/// `tokenizer.json` and the special tokens of `tokenizer_config.json`.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    special_tokens: SpecialTokens,
    /// Ids whose text `decode` skips on request.
    special_ids: HashSet<u32>,
    /// Ids of `<0x00>` to `<0xFF>` where the decoder joins them to characters, else empty.
    byte_ids: HashSet<u32>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` (and, where present, `tokenizer_config.json`,
    /// `special_tokens_map.json`) of a Hub-layout folder.
    ///
    /// # Errors
    /// [`TextError::File`] names the file that is missing or broken.
    pub fn from_dir(dir: &Path) -> Result<Self, TextError> {
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|error| broken(&path, &error))?;
        let inner = tokenizers::Tokenizer::from_bytes(bytes)
            .map_err(|error| broken(&path, &format!("not a tokenizer: {error}")))?;
        Ok(Self::new(inner, read_special_tokens(dir)?))
    }

    fn new(mut inner: tokenizers::Tokenizer, special_tokens: SpecialTokens) -> Self {
        // Files saved after a training run often carry the padding and truncation of that run.
        inner.with_padding(None);
        inner.with_truncation(None).expect("no truncation cannot conflict with anything");
        let special_ids = inner
            .get_added_tokens_decoder()
            .into_iter()
            .filter_map(|(id, token)| token.special.then_some(id))
            .collect();
        let byte_ids = match inner.get_decoder() {
            Some(decoder) if has_byte_fallback(decoder) => (0..=255_u8)
                .filter_map(|byte| inner.token_to_id(&format!("<0x{byte:02X}>")))
                .collect(),
            _ => HashSet::new(),
        };
        Self { inner, special_tokens, special_ids, byte_ids }
    }

    /// Token ids of `text`. Special tokens in the text are recognised (as transformers does).
    /// `add_special_tokens` runs the post-processor (BOS); rendered chat templates want `false`.
    ///
    /// # Errors
    /// [`TextError::Encode`] where a pre-tokenizer gives up, for example on its backtracking limit.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TextError> {
        // `encode_fast` skips the character offsets, which nobody here asks for.
        self.inner
            .encode_fast(text, add_special_tokens)
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|error| TextError::Encode { reason: error.to_string() })
    }

    /// Text of `ids`. Ids outside the vocabulary yield nothing.
    ///
    /// # Errors
    /// [`TextError::Decode`] where the decoder gives up.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, TextError> {
        self.inner
            .decode(ids, skip_special_tokens)
            .map_err(|error| TextError::Decode { reason: error.to_string() })
    }

    /// Id of a token's literal text, if it is in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Literal text of an id.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Number of ids incl. added tokens.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// `bos_token` of tokenizer_config.json.
    pub fn bos_token(&self) -> Option<&str> {
        self.special_tokens.get("bos_token").map(String::as_str)
    }

    /// `eos_token` of tokenizer_config.json.
    pub fn eos_token(&self) -> Option<&str> {
        self.special_tokens.get("eos_token").map(String::as_str)
    }

    /// Whether `id` is a special token, whose text never belongs to an answer.
    pub fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

    /// Whether `id` never shows in a text without special tokens: it is one, or it is outside the
    /// vocabulary (embeddings are often padded beyond it).
    pub(super) fn is_silent(&self, id: u32) -> bool {
        self.is_special(id) || self.inner.id_to_token(id).is_none()
    }

    /// Whether `id` was added to the vocabulary, with its literal text.
    pub(super) fn is_added(&self, id: u32) -> bool {
        self.inner.get_added_vocabulary().get_added_tokens_decoder().contains_key(&id)
    }

    pub(super) fn decoder(&self) -> Option<&DecoderWrapper> {
        self.inner.get_decoder()
    }

    /// Whether `id` stands for one raw byte of a character that has no token of its own.
    pub(super) fn is_byte_fallback(&self, id: u32) -> bool {
        self.byte_ids.contains(&id)
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size()).finish_non_exhaustive()
    }
}

fn has_byte_fallback(decoder: &DecoderWrapper) -> bool {
    if let DecoderWrapper::Sequence(sequence) = decoder {
        return sequence.get_decoders().iter().any(has_byte_fallback);
    }
    matches!(decoder, DecoderWrapper::ByteFallback(_))
}

#[cfg(test)]
impl From<tokenizers::Tokenizer> for Tokenizer {
    fn from(inner: tokenizers::Tokenizer) -> Self {
        Self::new(inner, SpecialTokens::new())
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf};

    use serde_json::{Value, json};

    use super::*;

    fn folder(name: &str, files: &[(&str, &str)]) -> PathBuf {
        let dir =
            std::env::temp_dir().join(format!("tunesmith-tokenizer-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        for (name, text) in files {
            fs::write(dir.join(name), text).unwrap();
        }
        dir
    }

    /// Words split at spaces; `<s>` before each text; padded to 8 and cut to 2 tokens.
    fn tokenizer_json() -> Value {
        json!({
            "version": "1.0",
            "truncation": {
                "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0
            },
            "padding": {
                "strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": null,
                "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"
            },
            "added_tokens": [
                {"id": 4, "content": "<s>", "single_word": false, "lstrip": false,
                 "rstrip": false, "normalized": false, "special": true}
            ],
            "normalizer": null,
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [4], "tokens": ["<s>"]}}
            },
            "decoder": null,
            "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "salt": 1, "and": 2, "pepper": 3}, "unk_token": "<unk>"}
        })
    }

    #[test]
    fn texts_are_neither_padded_nor_cut() {
        let dir = folder("plain", &[("tokenizer.json", &tokenizer_json().to_string())]);
        let tokenizer = Tokenizer::from_dir(&dir).unwrap();
        assert_eq!(tokenizer.encode("salt and pepper", false).unwrap(), [1, 2, 3]);
        assert_eq!(tokenizer.encode("salt and pepper", true).unwrap(), [4, 1, 2, 3]);
        assert_eq!(tokenizer.encode("<s>salt", false).unwrap(), [4, 1]);
        assert_eq!(tokenizer.decode(&[4, 1, 2, 99], true).unwrap(), "salt and");
        assert_eq!(tokenizer.decode(&[4, 1], false).unwrap(), "<s> salt");
        assert_eq!((tokenizer.bos_token(), tokenizer.eos_token()), (None, None));
        assert_eq!((tokenizer.token_to_id("<s>"), tokenizer.vocab_size()), (Some(4), 5));
        assert_eq!(
            (tokenizer.id_to_token(3).as_deref(), tokenizer.id_to_token(5)),
            (Some("pepper"), None)
        );
        assert!(tokenizer.is_special(4) && !tokenizer.is_special(1));
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn special_tokens_are_read_from_both_files() {
        let dir = folder(
            "special",
            &[
                ("tokenizer.json", &tokenizer_json().to_string()),
                (
                    "tokenizer_config.json",
                    r#"{"bos_token": {"content": "<s>", "special": true}, "add_bos_token": true}"#,
                ),
                ("special_tokens_map.json", r#"{"bos_token": "no", "eos_token": "</s>"}"#),
            ],
        );
        let tokenizer = Tokenizer::from_dir(&dir).unwrap();
        assert_eq!((tokenizer.bos_token(), tokenizer.eos_token()), (Some("<s>"), Some("</s>")));
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_broken_file_is_an_error_that_names_it() {
        let good = tokenizer_json().to_string();
        let cases = [
            ("missing", vec![], "tokenizer.json: No such file"),
            (
                "truncated",
                vec![("tokenizer.json", &good[..good.len() / 2])],
                "tokenizer.json: not a tokenizer: EOF",
            ),
            ("other", vec![("tokenizer.json", "{}")], "tokenizer.json: not a tokenizer: "),
            (
                "config",
                vec![("tokenizer.json", good.as_str()), ("tokenizer_config.json", "{")],
                "tokenizer_config.json: EOF",
            ),
        ];
        for (name, files, expected) in cases {
            let dir = folder(name, &files);
            let message = Tokenizer::from_dir(&dir).err().unwrap().to_string();
            assert!(message.contains(expected), "{message:?} does not contain {expected:?}");
            fs::remove_dir_all(dir).unwrap();
        }
    }
}

//! Tokens that a tokenizer did not have: what text they are, and what they were written with before.

use tokenizers::AddedToken;

use super::Tokenizer;
use crate::text::TextError;

/// A token that was added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewToken {
    /// Its text.
    pub text: String,
    /// Its id.
    pub id: u32,
    /// The tokens that its text was before; empty if it was a token already.
    pub pieces: Vec<u32>,
}

impl Tokenizer {
    /// This tokenizer with `texts` as tokens, numbered on from the last id as transformers'
    /// `add_tokens` does. A text that is a token already keeps its id.
    ///
    /// # Errors
    /// [`TextError::NewToken`] for an empty text, [`TextError::Encode`] for one that cannot be split.
    pub fn with_new_tokens(&self, texts: &[String]) -> Result<(Self, Vec<NewToken>), TextError> {
        let mut inner = self.inner.clone();
        let mut tokens = Vec::with_capacity(texts.len());
        for text in texts {
            let refused = |reason: &str| TextError::NewToken {
                token: text.clone(),
                reason: reason.to_owned(),
            };
            if text.trim().is_empty() {
                return Err(refused("it has no letters"));
            }
            let known = self.inner.token_to_id(text).is_some();
            let pieces = if known { Vec::new() } else { self.encode(text, false)? };
            inner
                .add_tokens([AddedToken::from(text.clone(), false).normalized(false)])
                .map_err(|error| refused(&error.to_string()))?;
            let id = inner.token_to_id(text).ok_or_else(|| refused("it was not taken"))?;
            tokens.push(NewToken { text: text.clone(), id, pieces });
        }
        Ok((Self::new(inner, self.special_tokens.clone()), tokens))
    }

    /// The text of `tokenizer.json`.
    ///
    /// # Errors
    /// [`TextError::Encode`] if it cannot be written as JSON.
    pub fn to_json(&self) -> Result<String, TextError> {
        self.inner.to_string(true).map_err(|error| TextError::Encode { reason: error.to_string() })
    }
}

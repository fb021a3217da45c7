//! Token ids to text while they arrive.
//!
//! A token's text depends on its neighbours: a character may need four tokens, and many decoders
//! drop the space before the first token they see. So each new piece is the difference between two
//! decodes of a short window: the tokens of the previous piece (already shown) with and without the
//! new ones. The window moves on whenever the text ends in a whole character.

use std::sync::Arc;

use crate::text::{TextError, Tokenizer};

/// What a decoder writes for bytes that are not (yet) a character.
const REPLACEMENT: char = '\u{fffd}';
/// Tokens of the prompt that the first window starts with. A character has at most four byte tokens.
const PROMPT_TAIL: usize = 6;
/// While no character completes, the window is decoded at every token up to this many, then each
/// time it has doubled: a run of broken bytes of any length costs linear time.
const PATIENT_TOKENS: usize = 8;

/// Turns a growing list of tokens into text that never ends in half a character.
///
/// The pieces of [`push`](Self::push) and [`finish`](Self::finish) together are what
/// [`Tokenizer::decode`] without special tokens gives for prompt and answer, less the prompt's part.
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    /// Tokens of the previous piece, then the tokens whose text is not shown yet.
    window: Vec<u32>,
    /// How many of `window` are shown.
    num_shown: usize,
    /// Number of hidden tokens at which the window is decoded next.
    next_attempt: usize,
}

impl Detokenizer {
    /// Starts after `prompt` (its last tokens decide about leading spaces).
    pub fn new(tokenizer: Arc<Tokenizer>, prompt: &[u32]) -> Self {
        let mut window = Vec::new();
        for &id in prompt.iter().rev().filter(|&&id| !tokenizer.is_silent(id)) {
            window.push(id);
            // A decoder judges a run of byte tokens as a whole, so the window must not cut one.
            if window.len() >= PROMPT_TAIL && !tokenizer.is_byte_fallback(id) {
                break;
            }
        }
        window.reverse();
        Self { tokenizer, num_shown: window.len(), window, next_attempt: 1 }
    }

    /// The text that `id` completes; empty while a character is incomplete. Special tokens
    /// and ids outside the vocabulary yield nothing.
    ///
    /// # Errors
    /// [`TextError::Decode`] where the tokenizer's decoder gives up.
    pub fn push(&mut self, id: u32) -> Result<String, TextError> {
        if self.tokenizer.is_silent(id) {
            return Ok(String::new());
        }
        self.window.push(id);
        let num_hidden = self.window.len() - self.num_shown;
        // One bad byte spoils the whole run it stands in: byte tokens wait for the end of their run.
        if self.tokenizer.is_byte_fallback(id) || num_hidden < self.next_attempt {
            return Ok(String::new());
        }
        let (shown, text) = self.decode_window()?;
        let new = difference(&shown, &text);
        if new.is_empty() || text.ends_with(REPLACEMENT) {
            self.next_attempt =
                if num_hidden < PATIENT_TOKENS { num_hidden + 1 } else { num_hidden * 2 };
            return Ok(String::new());
        }
        let new = new.to_owned();
        self.window.drain(..self.num_shown);
        self.num_shown = self.window.len();
        self.next_attempt = 1;
        Ok(new)
    }

    /// What is left at the end (may hold U+FFFD for bytes that never completed).
    ///
    /// # Errors
    /// [`TextError::Decode`] where the tokenizer's decoder gives up.
    pub fn finish(&mut self) -> Result<String, TextError> {
        let (shown, text) = self.decode_window()?;
        self.num_shown = self.window.len();
        Ok(difference(&shown, &text).to_owned())
    }

    /// Text of the shown part of the window, and of all of it.
    fn decode_window(&self) -> Result<(String, String), TextError> {
        let shown = self.tokenizer.decode(&self.window[..self.num_shown], true)?;
        Ok((shown, self.tokenizer.decode(&self.window, true)?))
    }
}

/// What `text` has beyond its common beginning with `shown`.
fn difference<'a>(shown: &str, text: &'a str) -> &'a str {
    let common = shown.bytes().zip(text.bytes()).take_while(|(a, b)| a == b).count();
    &text[text.floor_char_boundary(common)..]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Map, Value, json};

    use super::*;

    fn tokenizer(vocab: &[String], model: &Value, decoder: &Value) -> Arc<Tokenizer> {
        let ids: Map<String, Value> =
            vocab.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
        let added = |offset: usize, content: &str, special: bool| {
            json!({"id": vocab.len() + offset, "content": content, "special": special,
                   "single_word": false, "lstrip": false, "rstrip": false, "normalized": false})
        };
        let mut model = model.clone();
        model["type"] = json!("BPE");
        model["vocab"] = Value::Object(ids);
        model["merges"] = json!([]);
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
            "added_tokens": [added(0, "<|im_end|>", true), added(1, "<tool é>", false)],
            "pre_tokenizer": null, "post_processor": null, "decoder": decoder, "model": model,
        });
        let inner: tokenizers::Tokenizer = tokenizer.to_string().parse().unwrap();
        Arc::new(inner.into())
    }

    /// One token for each byte, as GPT-2 writes bytes, and some whole words.
    fn byte_level() -> Arc<Tokenizer> {
        let printable = |byte: u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let hidden: Vec<u32> = (0..256).filter(|&byte| !printable(byte)).collect();
        let letter = |byte: u32| match hidden.iter().position(|&other| other == byte) {
            Some(index) => char::from_u32(256 + index as u32).unwrap(),
            None => char::from_u32(byte).unwrap(),
        };
        let word = |text: &str| text.bytes().map(|byte| letter(u32::from(byte))).collect();
        let mut vocab: Vec<String> = (0..256).map(|byte| letter(byte).to_string()).collect();
        let words = [&b" the"[..], b"\n\n", "é".as_bytes(), "🍮".as_bytes(), "\u{fffd}".as_bytes()];
        vocab.extend(words.iter().map(|text| word(std::str::from_utf8(text).unwrap())));
        // Tokens that end in half a character, or begin with one.
        let half = |bytes: &[u8]| bytes.iter().map(|&byte| letter(u32::from(byte))).collect();
        vocab.extend([&b" \xf0\x9f"[..], b"\x8d\xae!", b"a\xc3", b"\xa9 b"].map(half));
        let decoder = json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true
        });
        tokenizer(&vocab, &json!({}), &decoder)
    }

    const PIECES: [&str; 9] = ["", "▁", "▁▁", "▁the", "cake", "é", "🍮", "▁é", "\u{fffd}"];

    /// Byte tokens, then pieces: Llama 2's decoder.
    fn byte_fallback() -> Arc<Tokenizer> {
        let mut vocab: Vec<String> = (0..=255).map(|byte| format!("<0x{byte:02X}>")).collect();
        vocab.extend(PIECES.map(str::to_owned));
        let decoder = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]});
        tokenizer(&vocab, &json!({"byte_fallback": true}), &decoder)
    }

    fn metaspace() -> Arc<Tokenizer> {
        let decoder = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
        tokenizer(&PIECES.map(str::to_owned), &json!({}), &decoder)
    }

    fn stream(tokenizer: &Arc<Tokenizer>, prompt: &[u32], ids: &[u32]) -> Vec<String> {
        let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer), prompt);
        let mut pieces: Vec<String> = ids.iter().map(|&id| detokenizer.push(id).unwrap()).collect();
        pieces.push(detokenizer.finish().unwrap());
        assert_eq!(detokenizer.finish().unwrap(), "", "the end comes once");
        pieces
    }

    fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
        text.bytes()
            .map(|byte| tokenizer.token_to_id(&format!("<0x{byte:02X}>")).unwrap())
            .collect()
    }

    #[test]
    fn an_emoji_of_four_tokens_comes_whole_with_the_last() {
        let bytes: Vec<u32> = "a🍮b".bytes().map(u32::from).collect();
        assert_eq!(stream(&byte_level(), &[], &bytes), ["a", "", "", "", "🍮", "b", ""]);
    }

    #[test]
    fn special_tokens_yield_nothing_and_added_words_their_text() {
        let tokenizer = byte_level();
        let im_end = tokenizer.token_to_id("<|im_end|>").unwrap();
        let tool = tokenizer.token_to_id("<tool é>").unwrap();
        let text = [u32::from(b'a'), im_end, tool, u32::from(b'b'), im_end];
        assert_eq!(stream(&tokenizer, &[], &text), ["a", "", "<tool é>", "b", "", ""]);
    }

    #[test]
    fn byte_tokens_wait_for_the_end_of_their_run() {
        let tokenizer = byte_fallback();
        let cake = tokenizer.token_to_id("cake").unwrap();
        let mut run = ids(&tokenizer, "é\n");
        run.push(cake);
        assert_eq!(stream(&tokenizer, &[], &run), ["", "", "", "é\ncake", ""]);
        assert_eq!(stream(&tokenizer, &[], &run[..1]), ["", "\u{fffd}"]);
    }

    #[test]
    fn the_prompt_decides_about_the_leading_space() {
        for tokenizer in [byte_fallback(), metaspace()] {
            let the = tokenizer.token_to_id("▁the").unwrap();
            let cake = tokenizer.token_to_id("cake").unwrap();
            assert_eq!(stream(&tokenizer, &[], &[the, the]).concat(), "the the");
            assert_eq!(stream(&tokenizer, &[cake], &[the, the]).concat(), " the the");
            let im_end = tokenizer.token_to_id("<|im_end|>").unwrap();
            assert_eq!(stream(&tokenizer, &[cake, im_end], &[the]).concat(), " the");
        }
    }

    #[test]
    fn a_prompt_that_ends_in_byte_tokens_is_not_cut_within_a_character() {
        let tokenizer = byte_fallback();
        let mut answer = ids(&tokenizer, "é");
        answer.push(tokenizer.token_to_id("cake").unwrap());
        assert_eq!(stream(&tokenizer, &ids(&tokenizer, "🍮🍮"), &answer).concat(), "écake");
    }

    #[test]
    fn ids_without_text_change_nothing() {
        for tokenizer in [byte_fallback(), metaspace()] {
            let the = tokenizer.token_to_id("▁the").unwrap();
            let nothing = tokenizer.token_to_id("").unwrap();
            for silent in [nothing, 9999] {
                assert_eq!(stream(&tokenizer, &[], &[the, silent, the]), ["the", "", " the", ""]);
            }
        }
    }

    #[test]
    fn a_long_run_of_broken_bytes_is_decoded_a_few_times_only() {
        let tokenizer = byte_level();
        let mut detokenizer = Detokenizer::new(Arc::clone(&tokenizer), &[]);
        let mut attempts = 0;
        for _ in 0..10_000 {
            let before = detokenizer.next_attempt;
            assert_eq!(detokenizer.push(0x80).unwrap(), "");
            attempts += usize::from(detokenizer.next_attempt != before);
        }
        assert!(attempts < 30, "{attempts} decodes");
        assert_eq!(detokenizer.finish().unwrap(), "\u{fffd}".repeat(10_000));
    }

    #[test]
    fn the_window_stays_short() {
        let tokenizer = byte_level();
        let mut detokenizer = Detokenizer::new(Arc::clone(&tokenizer), &[]);
        for round in 0..1000 {
            for byte in "é🍮".bytes() {
                detokenizer.push(u32::from(byte)).unwrap();
            }
            assert!(detokenizer.window.len() <= 8, "round {round}: {}", detokenizer.window.len());
        }
    }

    /// Ids of whole characters, half characters, single bytes, words and special tokens.
    fn any_ids(vocab_size: u32) -> impl Strategy<Value = Vec<u32>> {
        let text = "[a é🍮\n]{1,3}".prop_map(|text| text.bytes().map(u32::from).collect());
        let chunk = prop_oneof![
            3 => text,
            2 => prop::collection::vec(0..vocab_size, 1..3),
            1 => prop::collection::vec(256.min(vocab_size - 1)..vocab_size, 1..4),
            1 => prop::collection::vec(0x80..0x100_u32, 1..20),
        ];
        prop::collection::vec(chunk, 0..12)
            .prop_map(move |chunks| chunks.concat().into_iter().map(|id| id % vocab_size).collect())
    }

    /// The pieces together are the whole decode, and no piece shows a character too early.
    fn check(tokenizer: &Arc<Tokenizer>, ids: &[u32]) -> Result<(), TestCaseError> {
        let whole = tokenizer.decode(ids, true).unwrap();
        let pieces = stream(tokenizer, &[], ids);
        prop_assert_eq!(pieces.concat(), whole.clone());
        let mut shown = String::new();
        for piece in &pieces[..ids.len()] {
            prop_assert!(!piece.ends_with(REPLACEMENT));
            shown.push_str(piece);
            prop_assert!(whole.starts_with(&shown));
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn byte_level_pieces_are_the_whole_text(ids in any_ids(270)) {
            check(&byte_level(), &ids)?;
        }

        #[test]
        fn byte_fallback_pieces_are_the_whole_text(ids in any_ids(270)) {
            check(&byte_fallback(), &ids)?;
        }

        #[test]
        fn metaspace_pieces_are_the_whole_text(ids in any_ids(14)) {
            check(&metaspace(), &ids)?;
        }

        #[test]
        fn after_a_prompt_the_pieces_are_the_rest_of_the_whole_text(
            prompt in "[a é🍮]{0,12}",
            ids in any_ids(266),
        ) {
            let byte_fallback = byte_fallback();
            // The prompt ends with a piece, as templates do: a run of bytes would go on.
            let mut byte_prompt = self::ids(&byte_fallback, &prompt);
            byte_prompt.push(byte_fallback.token_to_id("cake").unwrap());
            let level_prompt: Vec<u32> = prompt.bytes().map(u32::from).collect();
            for (tokenizer, prompt) in [(byte_fallback, byte_prompt), (byte_level(), level_prompt)] {
                let text = tokenizer.decode(&prompt, true).unwrap();
                let whole = tokenizer.decode(&[prompt.clone(), ids.clone()].concat(), true).unwrap();
                let pieces = stream(&tokenizer, &prompt, &ids).concat();
                prop_assert_eq!(format!("{text}{pieces}"), whole);
            }
        }
    }
}

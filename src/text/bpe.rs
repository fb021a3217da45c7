//! Trains a byte-level BPE tokenizer and writes it as a Hub-layout model folder wants it, with a
//! ChatML template.

use std::{fs, path::Path};

use serde_json::json;
use tokenizers::{
    AddedToken, SplitDelimiterBehavior, TokenizerBuilder,
    decoders::byte_level::ByteLevel as ByteLevelDecoder,
    models::bpe::{BPE, BpeTrainerBuilder},
    normalizers::NFC,
    pre_tokenizers::{
        byte_level::ByteLevel,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

/// Why a tokenizer cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BpeError {
    /// The library refused the corpus or the settings.
    #[error("training the tokenizer: {0}")]
    Train(#[from] tokenizers::Error),
    /// A file cannot be written.
    #[error("writing the tokenizer: {0}")]
    Io(#[from] std::io::Error),
}

/// The tokens of ChatML and the end of a text; their ids are 0, 1 and 2.
pub const SPECIAL_TOKENS: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// ChatML, with tools in the system turn and calls as Hermes and Qwen write them.
const CHAT_TEMPLATE: &str = include_str!("chatml_tools.jinja");

/// A space belongs to what stands before it, and to a word only where another word follows: so a
/// food is the same tokens at the end of a phrase and inside quotes, and no token is a bare space,
/// after which anything may come. Both make names easy to copy.
const PIECES: &str = r"\p{L}+(?: (?=\p{L}))?|\p{N} ?|[^\p{L}\p{N}\s]+ ?|\s+";

/// Trains on `texts` and writes `tokenizer.json` and `tokenizer_config.json` into `dir`, which
/// must exist. `vocab_size` counts the 256 bytes and the [`SPECIAL_TOKENS`]. Equal texts in equal
/// order give equal files. Returns the texts of the tokens, in the order of their ids.
///
/// # Errors
/// [`BpeError`] if the library or the disk refuses.
pub fn write_chat_tokenizer<'a>(
    dir: &Path,
    texts: impl Iterator<Item = &'a str> + Send,
    vocab_size: usize,
) -> Result<Vec<String>, BpeError> {
    let specials: Vec<AddedToken> =
        SPECIAL_TOKENS.iter().map(|token| AddedToken::from(*token, true)).collect();
    let mut trainer = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(vocab_size)
        .min_frequency(2)
        .special_tokens(specials)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let pieces = SplitPattern::Regex(PIECES.to_owned());
    let split = Split::new(pieces, SplitDelimiterBehavior::Isolated, false)?;
    let bytes = ByteLevel::new(false, false, false);
    let mut tokenizer = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(Some(NFC))
        .with_pre_tokenizer(Some(Sequence::new(vec![split.into(), bytes.into()])))
        .with_post_processor(Some(ByteLevel::new(false, false, false)))
        .with_decoder(Some(ByteLevelDecoder::new(false, false, false)))
        .build()?;
    tokenizer.train(&mut trainer, texts)?;
    tokenizer.save(dir.join("tokenizer.json"), true)?;
    let [end_of_text, _, end_of_turn] = SPECIAL_TOKENS;
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": false,
        "bos_token": null,
        "eos_token": end_of_turn,
        "pad_token": end_of_text,
        "clean_up_tokenization_spaces": false,
        "model_max_length": 1024,
        "chat_template": CHAT_TEMPLATE.trim_end(),
    });
    fs::write(dir.join("tokenizer_config.json"), format!("{config:#}\n"))?;
    let ids = 0..tokenizer.get_vocab_size(true) as u32;
    Ok(ids.map(|id| tokenizer.decode(&[id], false)).collect::<Result<_, _>>()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_food_is_the_same_tokens_in_a_line_and_in_quotes() {
        let dir = std::env::temp_dir().join(format!("tunesmith-bpe-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let texts = ["2 cups sifted flour", "[\"flour\", \"brown sugar\"]", "brown sugar, sifted"];
        let file = |name: &str| fs::read(dir.join(name)).unwrap();
        write_chat_tokenizer(&dir, texts.into_iter(), 300).unwrap();
        let first = (file("tokenizer.json"), file("tokenizer_config.json"));
        write_chat_tokenizer(&dir, texts.into_iter(), 300).unwrap();
        assert!(first == (file("tokenizer.json"), file("tokenizer_config.json")));

        let tokenizer = tokenizers::Tokenizer::from_file(dir.join("tokenizer.json")).unwrap();
        let ids = |text: &str| tokenizer.encode(text, false).unwrap().get_ids().to_vec();
        assert!(
            ids("1 rare flour, sifted")[ids("1 rare a").len() - 1..].starts_with(&ids("flour"))
        );
        assert_eq!(ids("[\"flour")[ids("[\"").len()..], ids("flour"));
        assert_eq!(ids("<|im_end|>"), [2]);
        let text = "½ crème, \"brûlée\"\n";
        assert_eq!(tokenizer.decode(&ids(text), false).unwrap(), text);
        fs::remove_dir_all(&dir).unwrap();
    }
}

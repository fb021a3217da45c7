//! The tokenizer of a run: the base's, or that of the adapter it goes on from, with the new tokens that
//! are to be learned.

use std::{fs, path::Path};

use anyhow::{Context, ensure};

use crate::model::ModelConfig;
use crate::text::{NewToken, Tokenizer};
use crate::train::{Method, NewTokens, TrainConfig};

/// The tokenizer, and the files of it that the published folder gets instead of the base's.
pub(super) struct Vocabulary {
    pub(super) tokenizer: Tokenizer,
    pub(super) companions: Vec<(String, String)>,
}

/// Reads the tokenizer and gives it the new tokens, whose rows `config` is then to train.
///
/// # Errors
/// A tokenizer or a list of tokens that cannot be read, and a model without rows for the new tokens.
pub(super) fn vocabulary(config: &mut TrainConfig, model_dir: &Path) -> anyhow::Result<Vocabulary> {
    let own = config.init_adapter.as_deref().filter(|dir| has_own_tokens(dir));
    let dir = own.unwrap_or(model_dir);
    let tokenizer =
        Tokenizer::from_dir(dir).with_context(|| format!("loading {}", dir.display()))?;
    let texts = texts(&config.new_tokens)?;
    if texts.is_empty() {
        let companions = if own.is_some() { files(&tokenizer)? } else { Vec::new() };
        return Ok(Vocabulary { tokenizer, companions });
    }
    ensure!(config.method == Method::Lora, "new_tokens is for method lora");
    let (tokenizer, tokens) = tokenizer.with_new_tokens(&texts).context("new_tokens")?;
    let rows = ModelConfig::from_dir(model_dir)?.vocab_size;
    let last = tokens.iter().map(|token| token.id).max().unwrap_or_default();
    for NewToken { text, id, .. } in &tokens {
        ensure!(
            (*id as usize) < rows,
            "new_tokens: {text:?} would be token {id}, but the model has {rows} rows and none is left; \
             give texts that are reserved tokens already, or make a base with more rows first \
             (transformers: model.resize_token_embeddings({}, pad_to_multiple_of=64), save_pretrained) \
             and train over that",
            last + 1
        );
    }
    for NewToken { id, pieces, .. } in tokens {
        if !config.train_tokens.contains(&id) {
            config.train_tokens.push(id);
        }
        // Going on, the rows are the adapter's.
        if own.is_none() && !pieces.is_empty() {
            config.token_starts.insert(id, pieces);
        }
    }
    config.new_tokens = NewTokens(texts);
    let companions = files(&tokenizer)?;
    Ok(Vocabulary { tokenizer, companions })
}

/// One file's lines, or the texts themselves.
fn texts(given: &NewTokens) -> anyhow::Result<Vec<String>> {
    let NewTokens(given) = given;
    let texts: Vec<String> = match given.as_slice() {
        [only] if Path::new(only).is_file() => {
            let text = fs::read_to_string(only).with_context(|| format!("new_tokens: {only}"))?;
            text.lines().map(|line| line.trim().to_owned()).collect()
        }
        texts => texts.to_vec(),
    };
    Ok(texts.into_iter().filter(|text| !text.is_empty()).collect())
}

fn files(tokenizer: &Tokenizer) -> anyhow::Result<Vec<(String, String)>> {
    Ok(vec![("tokenizer.json".to_owned(), tokenizer.to_json()?)])
}

/// Whether an adapter's folder has a tokenizer because its tokens are not only the base's. A folder
/// that cannot be read is refused where its weights are.
fn has_own_tokens(dir: &Path) -> bool {
    let config = fs::read(dir.join("adapter_config.json")).unwrap_or_default();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap_or_default();
    !config["trainable_token_indices"].is_null() && dir.join("tokenizer.json").is_file()
}

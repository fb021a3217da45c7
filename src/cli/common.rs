//! What several commands share: finding a model folder and loading its parts.

use std::{path::PathBuf, sync::Arc, thread};

use anyhow::{Context, bail};

use super::pull::PullDisplay;
use crate::hub;
use crate::kernels::Roofline;
use crate::model::{Decoder, ModelConfig, WeightMode};
use crate::text::{ChatTemplate, Tokenizer};

/// A smaller gain of bf16 over f32 is hardly worth its rounding.
const LEAST_GAIN: f64 = 1.2;

/// A model folder's parts, loaded.
pub(super) struct LoadedModel {
    pub(super) dir: PathBuf,
    pub(super) decoder: Decoder,
    pub(super) tokenizer: Arc<Tokenizer>,
    pub(super) template: Arc<ChatTemplate>,
}

impl LoadedModel {
    /// Tokens that end an answer: the model's end-of-sequence ids and the tokenizer's own.
    pub(super) fn stop_token_ids(&self) -> Vec<u32> {
        stop_token_ids(self.decoder.config(), &self.tokenizer)
    }
}

/// Tokens that end an answer: the model's end-of-sequence ids and the tokenizer's own.
pub(super) fn stop_token_ids(model: &ModelConfig, tokenizer: &Tokenizer) -> Vec<u32> {
    let mut ids = model.eos_token_ids.clone();
    let eos = tokenizer.eos_token().and_then(|token| tokenizer.token_to_id(token));
    ids.extend(eos.filter(|id| !ids.contains(id)));
    ids
}

/// `M` of every command: a local folder, or `owner/name[@revision]` on the Hub, which is downloaded
/// where the Hub's cache does not have it yet.
pub(super) fn resolve_model(model: &str) -> anyhow::Result<PathBuf> {
    let display = PullDisplay::new(model);
    let resolved = hub::resolve(model, display.observer());
    display.finish();
    Ok(resolved?)
}

/// Warns where `--quantize bf16` rounds without being faster.
fn tell_bf16_gain() {
    match Roofline::bf16_gain() {
        None => tracing::warn!(
            "--quantize bf16: this processor has no dot products of bf16; they are made of f32 ones, \
             and are slower than without the flag"
        ),
        Some(gain) if gain < LEAST_GAIN => tracing::warn!(
            "--quantize bf16: this processor multiplies bf16 only {gain:.1} times as fast as f32"
        ),
        Some(gain) => {
            tracing::info!("this processor multiplies bf16 {gain:.1} times as fast as f32");
        }
    }
}

/// Loads decoder, tokenizer and template of `model`.
pub(super) fn load_model(model: &str, mode: WeightMode) -> anyhow::Result<LoadedModel> {
    let dir = resolve_model(model)?;
    if mode == WeightMode::Bf16 {
        tell_bf16_gain();
    }
    let context = || format!("loading {}", dir.display());
    // Reading weights is a matter of memory, a tokenizer's vocabulary one of allocations.
    let (decoder, tokenizer) = thread::scope(|scope| {
        let tokenizer = scope.spawn(|| Tokenizer::from_dir(&dir));
        (Decoder::load(&dir, mode), tokenizer.join())
    });
    let Ok(tokenizer) = tokenizer else { bail!("{}: the tokenizer's reader panicked", context()) };
    Ok(LoadedModel {
        decoder: decoder.with_context(context)?,
        tokenizer: Arc::new(tokenizer.with_context(context)?),
        template: Arc::new(ChatTemplate::from_dir(&dir).with_context(context)?),
        dir,
    })
}

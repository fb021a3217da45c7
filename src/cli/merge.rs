//! `tunesmith merge`: fold an adapter into its base and write a plain model folder.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context;
use clap::Args;

use super::common::resolve_model;
use crate::adapters::{LoraAdapter, check_base, merged_weights, write_weights};
use crate::model::{Decoder, WeightMode};
use crate::publish::{disk, publish_dir};

/// What a model folder has beside its weights.
const COPIED_FILES: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
];

/// Fold an adapter into its base model
#[derive(Args, Debug)]
pub(super) struct MergeArgs {
    /// Base model: a folder in Hub layout, or owner/name[@revision] on the Hub
    #[arg(long)]
    pub(super) model: String,
    /// Adapter folder in PEFT's format
    #[arg(long)]
    pub(super) adapter: PathBuf,
    /// Folder to write, in Hub layout; it must not exist yet or be empty
    #[arg(long)]
    pub(super) output: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// The model or the adapter cannot be read or do not fit, or the folder cannot be written; nothing
/// is then left at the output path.
pub(super) fn run(args: &MergeArgs) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(
        is_free(&args.output)?,
        "{} exists and is not an empty folder",
        args.output.display()
    );
    let dir = resolve_model(&args.model)?;
    let decoder = Decoder::load(&dir, WeightMode::Frozen)
        .with_context(|| format!("loading {}", dir.display()))?;
    let in_adapter = || format!("adapter {}", args.adapter.display());
    check_base(&args.adapter, || decoder.fingerprint()).with_context(in_adapter)?;
    let adapter =
        LoraAdapter::read(&args.adapter, decoder.config(), false).with_context(in_adapter)?;
    let weights = merged_weights(decoder.tensors(), &adapter).with_context(in_adapter)?;
    publish_dir(&args.output, |output| -> anyhow::Result<()> {
        for name in COPIED_FILES {
            let source = dir.join(name);
            if source.is_file() {
                disk::copy(&source, &output.join(name))?;
            }
        }
        Ok(write_weights(output, &weights)?)
    })
    .with_context(|| format!("writing {}", args.output.display()))?;
    println!(
        "merged {} adapted layers into {} tensors: {}",
        adapter.modules().len(),
        weights.len(),
        args.output.display()
    );
    Ok(ExitCode::SUCCESS)
}

fn is_free(output: &Path) -> std::io::Result<bool> {
    Ok(!output.exists() || (output.is_dir() && fs::read_dir(output)?.next().is_none()))
}

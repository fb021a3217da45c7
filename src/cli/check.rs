//! `tunesmith check`: everything that can be known about a data file before a run.

mod memory;
mod report;
mod tokens;

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context;
use clap::Args;

use super::common::resolve_model;
use crate::data::{
    Encoder, Example, LossOn, Row, RowError, RowStats, RunEstimate, default_epochs, duplicates,
    read_valid_rows, shared_prompts,
};
use crate::model::ModelConfig;
use crate::publish::sha256_file;
use crate::text::{ChatTemplate, Tokenizer};

/// Check a data file: every format error, token counts, truncation, and what a run over it amounts to
#[derive(Args, Debug)]
pub(super) struct CheckArgs {
    /// JSON lines: chat rows ({"messages": [...]}) or {"prompt": ..., "completion": ...}
    pub(super) data: PathBuf,
    /// Base model whose tokenizer and template count: a folder in Hub layout, or owner/name[@revision]
    /// on the Hub. Without it only the format is checked
    #[arg(long, short)]
    pub(super) model: Option<String>,
    /// Held-out rows: checked as well, and compared with DATA
    #[arg(long)]
    pub(super) valid: Option<PathBuf>,
    /// Longest row in tokens; longer ones lose their end
    #[arg(long, default_value_t = 1024, value_parser = at_least_one)]
    pub(super) max_length: usize,
    /// Tokens that the loss counts: `assistant` or `all`
    #[arg(long, default_value = "assistant")]
    pub(super) loss_on: LossOn,
    /// Passes over the data
    #[arg(long, default_value_t = 3.0)]
    pub(super) epochs: f64,
    /// Rows per optimizer step
    #[arg(long, default_value_t = 8, value_parser = at_least_one)]
    pub(super) batch_size: usize,
    /// Print the tokens of the first N rows, trained ones in green (or in brackets)
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(super) show: usize,
}

/// Prints the report; the exit code is 1 if there is any error in a row.
///
/// # Errors
/// A file cannot be read, or the model folder has no usable tokenizer or template.
pub(super) fn run(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let parts = args.model.as_deref().map(TextParts::load).transpose()?;
    let train = DataFile::read(&args.data, args, parts.as_ref())?;
    let valid =
        args.valid.as_ref().map(|path| DataFile::read(path, args, parts.as_ref())).transpose()?;

    for file in [Some(&train), valid.as_ref()].into_iter().flatten() {
        print!("{}", report::file(file));
    }
    if let Some(valid) = &valid {
        print!("{}", report::overlap(&shared_prompts(&train.rows, &valid.rows)));
    }
    if let Some(parts) = &parts {
        let estimate = RunEstimate::new(&train.examples, args.epochs, args.batch_size);
        let auto = default_epochs(train.examples.len());
        print!("{}", report::estimate(&estimate, args.batch_size, auto));
        // A folder with tokenizer and template alone is enough for the rest.
        match ModelConfig::from_dir(&parts.dir) {
            Ok(config) => {
                let memory = memory::Memory::estimate(&parts.dir, &config, &train.examples)?;
                print!("{}", report::memory(&memory));
            }
            Err(error) => println!("memory: unknown, {error}"),
        }
        let style = tokens::Style::of_stdout();
        for example in train.examples.iter().take(args.show) {
            print!("{}", tokens::show(example, &parts.tokenizer, style)?);
        }
    }
    let is_fine = |file: &DataFile| file.errors.is_empty() && !file.rows.is_empty();
    let fine = is_fine(&train) && valid.as_ref().is_none_or(is_fine);
    Ok(if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What turns rows into tokens.
struct TextParts {
    dir: PathBuf,
    tokenizer: Tokenizer,
    template: ChatTemplate,
}

impl TextParts {
    fn load(model: &str) -> anyhow::Result<Self> {
        let dir = resolve_model(model)?;
        let context = || format!("loading {}", dir.display());
        let tokenizer = Tokenizer::from_dir(&dir).with_context(context)?;
        let template = ChatTemplate::from_dir(&dir).with_context(context)?;
        Ok(Self { dir, tokenizer, template })
    }
}

/// A data file, as far as it could be read.
struct DataFile {
    path: PathBuf,
    sha256: String,
    rows: Vec<Row>,
    /// Of the rows that the model can be trained on; empty without a model.
    examples: Vec<Example>,
    /// Sorted by line.
    errors: Vec<RowError>,
    /// `(line, earlier line)` that says the same.
    duplicates: Vec<(usize, usize)>,
    stats: RowStats,
}

impl DataFile {
    fn read(path: &Path, args: &CheckArgs, parts: Option<&TextParts>) -> anyhow::Result<Self> {
        let (mut rows, mut errors) = read_valid_rows(path)?;
        let sha256 = sha256_file(path).with_context(|| format!("reading {}", path.display()))?;
        let mut examples = Vec::new();
        if let Some(TextParts { tokenizer, template, .. }) = parts {
            let encoder =
                Encoder { tokenizer, template, loss_on: args.loss_on, max_length: args.max_length };
            let (encoded, refused) = encoder.encode_valid(&rows);
            examples = encoded;
            let lines: HashSet<usize> = refused.iter().map(|error| error.line).collect();
            rows.retain(|row| !lines.contains(&row.line));
            errors.extend(refused);
            errors.sort_by_key(|error| error.line);
        }
        let stats = RowStats::new(&rows, &examples);
        let duplicates = duplicates(&rows);
        Ok(Self { path: path.to_owned(), sha256, rows, examples, errors, duplicates, stats })
    }
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".to_owned()),
        Ok(number) => Ok(number),
        Err(_) => Err("not a whole number".to_owned()),
    }
}

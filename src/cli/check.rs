//! `tunesmith check`: everything that can be known about a data file before a run.

mod json;
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
    kind_name, read_valid_rows, shared_prompts, wrong_kinds,
};
use crate::model::ModelConfig;
use crate::publish::sha256_file;
use crate::text::{ChatTemplate, Tokenizer};

/// Code of a file without rows.
const EMPTY_FILE: &str = "empty_file";

/// Check a data file: every format error, token counts, truncation, and what a run over it amounts to
#[derive(Args, Debug)]
pub(super) struct CheckArgs {
    /// JSON lines: chat rows ({"messages": [...]}), {"prompt": ..., "completion": ...} or preferences
    /// ({"input": ..., "preferred_output": ..., "non_preferred_output": ...})
    pub(super) data: PathBuf,
    /// Base model whose tokenizer and template count: a folder in Hub layout, or owner/name[@revision]
    /// on the Hub. Without it only the format is checked
    #[arg(long, short)]
    pub(super) model: Option<String>,
    /// Held-out rows: checked as well, and compared with DATA
    #[arg(long)]
    pub(super) valid: Option<PathBuf>,
    /// What the rows are for: those that it cannot use are errors
    #[arg(long, value_enum)]
    pub(super) method: Option<Method>,
    /// Print one JSON object instead of text
    #[arg(long)]
    pub(super) json: bool,
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

/// How rows are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Method {
    /// Answers are learned.
    Supervised,
    /// One answer is preferred to another.
    Dpo,
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

    let fine = train.errors.is_empty() && valid.as_ref().is_none_or(|file| file.errors.is_empty());
    if args.json {
        println!("{}", json::report(&train, valid.as_ref()));
    } else {
        print_report(args, parts.as_ref(), &train, valid.as_ref())?;
    }
    Ok(if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print_report(
    args: &CheckArgs,
    parts: Option<&TextParts>,
    train: &DataFile,
    valid: Option<&DataFile>,
) -> anyhow::Result<()> {
    for file in [Some(train), valid].into_iter().flatten() {
        print!("{}", report::file(file));
    }
    if let Some(valid) = valid {
        print!("{}", report::overlap(&shared_prompts(&train.rows, &valid.rows)));
    }
    if let Some(parts) = parts {
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
        for side in train.examples.iter().take(args.show).flat_map(Example::sides) {
            print!("{}", tokens::show(side, &parts.tokenizer, style)?);
        }
    }
    Ok(())
}

/// What turns rows into tokens.
struct TextParts {
    dir: PathBuf,
    /// Positions of the model, where its configuration can be read.
    max_length: usize,
    tokenizer: Tokenizer,
    template: ChatTemplate,
}

impl TextParts {
    fn load(model: &str) -> anyhow::Result<Self> {
        let dir = resolve_model(model)?;
        let context = || format!("loading {}", dir.display());
        let tokenizer = Tokenizer::from_dir(&dir).with_context(context)?;
        let template = ChatTemplate::from_dir(&dir).with_context(context)?;
        let positions = ModelConfig::from_dir(&dir).map(|config| config.max_position_embeddings);
        Ok(Self { max_length: positions.unwrap_or(usize::MAX), dir, tokenizer, template })
    }
}

/// A data file, as far as it could be read.
struct DataFile {
    path: PathBuf,
    sha256: String,
    /// Of all rows that could be read.
    kind: &'static str,
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
        if rows.is_empty() && errors.is_empty() {
            let message = "the file has no rows".to_owned();
            errors.push(RowError { line: 1, code: EMPTY_FILE, message });
        }
        let kind = kind_name(&rows);
        if let Some(method) = args.method {
            drop_rows(&mut rows, &mut errors, |rows| wrong_kinds(rows, method == Method::Dpo));
        }
        let sha256 = sha256_file(path).with_context(|| format!("reading {}", path.display()))?;
        let mut examples = Vec::new();
        if let Some(TextParts { tokenizer, template, max_length, .. }) = parts {
            // As in a run: a model has no more positions than it has.
            let max_length = args.max_length.min(*max_length);
            let encoder = Encoder { tokenizer, template, loss_on: args.loss_on, max_length };
            drop_rows(&mut rows, &mut errors, |rows| {
                let (encoded, refused) = encoder.encode_valid(rows);
                examples = encoded;
                refused
            });
        }
        errors.sort_by_key(|error| error.line);
        let stats = RowStats::new(&rows, &examples);
        let duplicates = duplicates(&rows);
        Ok(Self { path: path.to_owned(), sha256, kind, rows, examples, errors, duplicates, stats })
    }
}

/// Moves the rows that `refuse` has something against to the errors.
fn drop_rows(
    rows: &mut Vec<Row>,
    errors: &mut Vec<RowError>,
    refuse: impl FnOnce(&[Row]) -> Vec<RowError>,
) {
    let refused = refuse(rows);
    let lines: HashSet<usize> = refused.iter().map(|error| error.line).collect();
    rows.retain(|row| !lines.contains(&row.line));
    errors.extend(refused);
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".to_owned()),
        Ok(number) => Ok(number),
        Err(_) => Err("not a whole number".to_owned()),
    }
}

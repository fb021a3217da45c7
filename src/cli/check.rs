//! `tunesmith check`: everything that can be known about a data file before a run.

mod json;
mod report;
mod tokens;

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context;
use clap::Args;

pub(super) use self::report::named;
use super::{common::resolve_model, memory::Memory, train::args::columns};
use crate::data::{
    Columns, Encoder, Example, LossOn, Reading, Row, RowError, RowStats, RunEstimate, Source,
    default_epochs, duplicates, kind_name, read_valid_rows, shared_prompts, source_files,
    wrong_kinds,
};
use crate::model::ModelConfig;
use crate::publish::{sha256_file, sha256_hex};
use crate::text::{ChatTemplate, Tokenizer};
use crate::train::TrainConfig;

/// Code of a file without rows.
const EMPTY_FILE: &str = "empty_file";

/// Check a data file: every format error, token counts, truncation, and what a run over it amounts to
#[derive(Args, Debug)]
pub(super) struct CheckArgs {
    /// A file of rows (JSON lines or array, CSV, Parquet, gzip), a folder or a pattern: chat rows
    /// ({"messages": [...]}), {"prompt": ..., "completion": ...}, preferences ({"input": ...,
    /// "preferred_output": ..., "non_preferred_output": ...}), conversations, instructions or texts
    pub(super) data: PathBuf,
    /// Base model whose tokenizer and template count: a folder in Hub layout, or owner/name[@revision]
    /// on the Hub. Without it only the format is checked
    #[arg(long, short)]
    pub(super) model: Option<String>,
    /// Held-out rows: checked as well, and compared with DATA
    #[arg(long)]
    pub(super) valid: Option<PathBuf>,
    /// Columns of the rows under other names: question=prompt,answer=completion
    #[arg(long, value_name = "THEIRS=OURS", value_parser = columns)]
    pub(super) columns: Option<Columns>,
    /// Column that holds the whole row, a text or a list of messages
    #[arg(long, value_name = "NAME")]
    pub(super) text_column: Option<String>,
    /// What the rows are for: those that it cannot use are errors
    #[arg(long, value_enum)]
    pub(super) method: Option<Method>,
    /// Print one JSON object instead of text
    #[arg(long)]
    pub(super) json: bool,
    /// Longest row in tokens; longer ones lose their end
    #[arg(long, default_value_t = 1024, value_parser = at_least_one)]
    pub(super) max_length: usize,
    /// Tokens that the loss counts: `assistant`, `all`, or `auto` (completions, else all)
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
                // As a run with the settings of this command and the defaults.
                let settings =
                    TrainConfig { batch_size: args.batch_size, ..TrainConfig::default() };
                let memory = Memory::estimate(&parts.dir, &config, &settings, &train.examples)?;
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
        let reading =
            Reading { columns: args.columns.as_ref(), text_column: args.text_column.as_deref() };
        let files = source_files(&Source::new(path))?;
        let (mut rows, mut errors) = (Vec::new(), Vec::new());
        for file in &files {
            let (of_file, mut found) = read_valid_rows(file, reading)?;
            if files.len() > 1 {
                let name = file.file_name().unwrap_or_default().to_string_lossy();
                for error in &mut found {
                    error.message = format!("{name}: {}", error.message);
                }
            }
            // Lines of several files are counted on, so that each is one row.
            let lines_before = rows.last().map_or(0, |row: &Row| row.line);
            let offset = if files.len() > 1 { lines_before } else { 0 };
            rows.extend(of_file.into_iter().map(|row| Row { line: row.line + offset, ..row }));
            errors.extend(found);
        }
        if rows.is_empty() && errors.is_empty() {
            let message = "the file has no rows".to_owned();
            errors.push(RowError { line: 1, code: EMPTY_FILE, message });
        }
        let kind = kind_name(&rows);
        if let Some(method) = args.method {
            drop_rows(&mut rows, &mut errors, |rows| wrong_kinds(rows, method == Method::Dpo));
        }
        let mut hashes = Vec::new();
        for file in &files {
            hashes.push(sha256_file(file).with_context(|| format!("reading {}", file.display()))?);
        }
        let sha256 = match hashes.as_slice() {
            [only] => only.clone(),
            several => sha256_hex(&[several.concat().as_bytes()]),
        };
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

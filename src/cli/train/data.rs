//! Sources of rows to examples: every file read, every problem shown, mixed by weight, and said what
//! there is to know about them.

use std::{collections::BTreeSet, path::Path};

use anyhow::Context;

use crate::cli::{check::named, train::show_problems};
use crate::data::{
    DataError, Encoder, Example, Reading, Row, RowError, Source, Sources, duplicates,
    read_valid_rows, repeated, shared_prompts, source_files, wrong_kinds,
};
use crate::publish::sha256_file;
use crate::train::{DataSource, TrainConfig};

/// Reads one kind of rows after the other.
pub(super) struct DataReader<'a> {
    pub(super) config: &'a TrainConfig,
    pub(super) encoder: Encoder<'a>,
    /// Gets a line or two about each file.
    pub(super) say: &'a dyn Fn(&str),
}

/// The rows of all files of a role ("train", "valid").
#[derive(Default)]
pub(super) struct DataSet {
    pub(super) rows: Vec<Row>,
    /// Mixed by weight, so not one per row.
    pub(super) examples: Vec<Example>,
    pub(super) files: Vec<DataSource>,
}

impl DataReader<'_> {
    /// All files of `sources`.
    ///
    /// # Errors
    /// Files that cannot be read or have rows that cannot be used; the problems of every file are
    /// printed before.
    pub(super) fn read(&self, role: &'static str, sources: &Sources) -> anyhow::Result<DataSet> {
        let TrainConfig { columns, text_column, seed, .. } = self.config;
        let sources = sources.clone().with_columns(columns, text_column.as_deref());
        let mut set = DataSet::default();
        let mut refused = Vec::new();
        for (index, source) in sources.0.iter().enumerate() {
            let mut examples = Vec::new();
            for path in source_files(source)? {
                match self.read_file(role, source, &path, &mut set) {
                    Ok(of_file) => examples.extend(of_file),
                    Err(error) => refused.push(show_problems(error)),
                }
            }
            let chosen = repeated(examples.len(), source.weight, *seed, index);
            if source.weight != 1.0 {
                let (path, weight) = (source.path.display(), source.weight);
                let (n, all) = (chosen.len(), examples.len());
                (self.say)(&format!("{path}: weight {weight} makes {n} examples of {all}"));
            }
            set.examples.extend(chosen.into_iter().map(|index| examples[index].clone()));
        }
        match refused.len() {
            0 => {}
            1 => return Err(refused.remove(0)),
            count => anyhow::bail!("{count} files have rows that cannot be used, see above"),
        }
        let repeats = duplicates(&set.rows);
        if !repeats.is_empty() {
            let pairs = repeats.iter().map(|(line, first)| format!("{line} as line {first}"));
            let list = named(pairs, repeats.len());
            (self.say)(&format!(
                "{role}: {} rows repeat an earlier one: line {list}",
                repeats.len()
            ));
        }
        Ok(set)
    }

    /// The examples of one file; its rows and its description go to `set`.
    fn read_file(
        &self,
        role: &'static str,
        source: &Source,
        path: &Path,
        set: &mut DataSet,
    ) -> Result<Vec<Example>, DataError> {
        let reading =
            Reading { columns: Some(&source.columns), text_column: source.text_column.as_deref() };
        let (rows, mut errors) = read_valid_rows(path, reading)?;
        errors.extend(wrong_kinds(&rows, self.config.objective.wants_pairs()));
        let (examples, mut refused) = self.encoder.encode_valid(&rows);
        // A row of the wrong kind is not also a row without trained tokens.
        refused.retain(|one: &RowError| errors.iter().all(|error| error.line != one.line));
        errors.extend(refused);
        errors.sort_by_key(|error| error.line);
        let name = path.display().to_string();
        if !errors.is_empty() {
            return Err(DataError::Rows { path: name, errors });
        }
        if examples.is_empty() {
            return Err(DataError::Empty { path: name });
        }
        let sha256 =
            sha256_file(path).map_err(|source| DataError::Io { path: name.clone(), source })?;
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        set.files.push(DataSource { role, file, sha256, num_rows: rows.len() });
        self.describe(path, &examples);
        // Lines of several files are counted on, so that each means one row.
        let lines_before = set.rows.last().map_or(0, |row| row.line);
        set.rows.extend(rows.into_iter().map(|row| Row { line: row.line + lines_before, ..row }));
        Ok(examples)
    }

    fn describe(&self, path: &Path, examples: &[Example]) {
        let num_tokens: usize = examples.iter().map(Example::num_tokens).sum();
        let num_trained: usize = examples.iter().map(Example::num_trained).sum();
        let (name, rows) = (path.display(), examples.len());
        (self.say)(&format!(
            "{name}: {rows} rows, {num_tokens} tokens, {num_trained} of them trained"
        ));
        let cut = examples.iter().filter(|example| example.num_lost() > 0);
        let (num_cut, num_lost) = (cut.clone().count(), cut.map(Example::num_lost).sum::<usize>());
        if num_cut > 0 {
            let max_length = self.encoder.max_length;
            (self.say)(&format!(
                "{name}: {num_cut} rows are cut off at {max_length} tokens (max_length) and lose \
                 {num_lost} tokens"
            ));
        }
    }
}

/// Says which validation rows training has seen.
pub(super) fn say_overlap(train: &[Row], valid: &[Row], say: &dyn Fn(&str)) {
    let shared = shared_prompts(train, valid);
    if !shared.is_empty() {
        let pairs =
            shared.iter().map(|row| format!("{} as line {}", row.valid_line, row.train_line));
        let list = named(pairs, shared.len());
        say(&format!(
            "valid: {} rows ask what a training row asks, so they measure memory: line {list}",
            shared.len()
        ));
    }
}

/// What a settings file says.
#[derive(Default)]
pub(super) struct FileLayer {
    pub(super) settings: serde_json::Map<String, serde_json::Value>,
    /// Keys that it does not have: its trainer's defaults.
    pub(super) assumed: BTreeSet<String>,
    /// Validate at the end of each epoch.
    pub(super) eval_each_epoch: bool,
}

/// The layer of a settings file, which may be one of another trainer's; `say` hears what it means.
///
/// # Errors
/// A file that cannot be read, or that has keys that cannot be honoured.
pub(super) fn file_layer(
    path: &Path,
    objective: Option<&str>,
    say: &dyn Fn(&str),
) -> anyhow::Result<FileLayer> {
    use crate::cli::{
        dialect::{self, Translation},
        settings,
    };
    let keys = settings::read_yaml(path)?;
    let context = || path.display().to_string();
    match dialect::translate(&keys, objective).with_context(context)? {
        None => {
            let settings = settings::own_layer(keys).with_context(context)?;
            Ok(FileLayer { settings, ..FileLayer::default() })
        }
        Some(translation) => {
            for line in translation.lines(&path.display().to_string()) {
                say(&line);
            }
            let Translation { settings, assumed, eval_each_epoch, .. } = translation;
            Ok(FileLayer { settings, assumed, eval_each_epoch })
        }
    }
}

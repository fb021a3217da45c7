//! Where rows come from: files, folders and patterns, one or several of them with weights, and what
//! their columns are called.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Deserializer, Serialize};

/// Names of columns: ours, and what a file calls it.
pub type Columns = BTreeMap<String, String>;

/// Rows of one kind of place.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// A file, a folder of files, or a pattern with `*` and `?`.
    pub path: PathBuf,
    /// How often its rows come in the training data: 2 is twice, 0.5 is a half of them.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub weight: f64,
    /// Which columns to read, under which names: `prompt: question`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub columns: Columns,
    /// The column that holds the whole row: a text, or a list of messages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text_column: Option<String>,
    /// Which files of a folder: those named after this split.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split: Option<String>,
}

/// One or more sources, in their order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sources(pub Vec<Source>);

impl Source {
    /// All rows of `path`, as they are.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            weight: 1.0,
            columns: Columns::new(),
            text_column: None,
            split: None,
        }
    }

    fn is_plain(&self) -> bool {
        *self == Self::new(self.path.clone())
    }
}

impl Sources {
    /// Whether there is nothing to read.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|source| source.path.as_os_str().is_empty())
    }

    /// The same sources, with these columns where they say nothing of their own.
    #[must_use]
    pub fn with_columns(mut self, columns: &Columns, text_column: Option<&str>) -> Self {
        for source in &mut self.0 {
            if source.columns.is_empty() && source.text_column.is_none() {
                source.columns.clone_from(columns);
                source.text_column = text_column.map(str::to_owned);
            }
        }
        self
    }
}

impl<P: Into<PathBuf>> From<P> for Sources {
    fn from(path: P) -> Self {
        Self(vec![Source::new(path)])
    }
}

impl Serialize for Sources {
    /// A single plain path is written as a path.
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.as_slice() {
            [] => Path::new("").serialize(serializer),
            [only] if only.is_plain() => only.path.serialize(serializer),
            [only] => only.serialize(serializer),
            several => several.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Sources {
    /// A path, one source, or a list of either.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Entry {
            Path(PathBuf),
            Source(Source),
        }
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum OneOrMany {
            One(Entry),
            Many(Vec<Entry>),
        }
        let entries = match OneOrMany::deserialize(deserializer) {
            Ok(OneOrMany::One(entry)) => vec![entry],
            Ok(OneOrMany::Many(entries)) => entries,
            Err(_) => {
                let allowed = "must be a path, or {path, weight, columns, text_column, split}, or a \
                               list of these";
                return Err(serde::de::Error::custom(allowed));
            }
        };
        let source = |entry| match entry {
            Entry::Path(path) => Source::new(path),
            Entry::Source(source) => source,
        };
        Ok(Self(entries.into_iter().map(source).collect()))
    }
}

fn one() -> f64 {
    1.0
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes fields so")]
fn is_one(weight: &f64) -> bool {
    *weight == 1.0
}

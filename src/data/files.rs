//! A path to the files that it means: the file itself, the data files of a folder, or what a pattern
//! matches. Always in the order of their names, so that a run meets the same rows everywhere.

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
};

use super::{DataError, Source};

/// What a data file's name ends with, in the order in which a split's files are looked for.
const EXTENSIONS: &[&str] = &["csv", "tsv", "jsonl", "json", "ndjson", "parquet"];
/// The split that a folder is asked for when nobody says which.
const TRAIN: &str = "train";

/// The files of a source, at least one.
///
/// # Errors
/// There is no such file or folder, or none in it that can hold rows.
pub fn source_files(source: &Source) -> Result<Vec<PathBuf>, DataError> {
    let path = &source.path;
    let missing = |message: &str| {
        let source = io::Error::new(io::ErrorKind::NotFound, message);
        DataError::Io { path: path.display().to_string(), source }
    };
    if path.is_dir() {
        let mut files = split_files(path, source.split.as_deref())?;
        if files.is_empty() && path.join("data").is_dir() {
            files = split_files(&path.join("data"), source.split.as_deref())?;
        }
        if files.is_empty() {
            let of_split =
                source.split.as_ref().map_or(String::new(), |name| format!(" of {name}"));
            let extensions = EXTENSIONS.join(", ");
            return Err(missing(&format!("no data file{of_split} in this folder ({extensions})")));
        }
        return Ok(files);
    }
    if !path.exists() && is_pattern(path) {
        let files = matches(path)?;
        if files.is_empty() {
            return Err(missing("no file matches this pattern"));
        }
        return Ok(files);
    }
    if !path.exists() && looks_like_hub_name(path) {
        return Err(missing(
            "no such file or folder; if this is a dataset on the Hub, download it and name its \
             files with --data",
        ));
    }
    Ok(vec![path.clone()])
}

/// The data files of a folder: those of a split, those of `train` where there are some, else all.
fn split_files(dir: &Path, split: Option<&str>) -> Result<Vec<PathBuf>, DataError> {
    let all: Vec<PathBuf> = entries(dir)?.into_iter().filter(|path| is_data(path)).collect();
    let of_split = |name: &str| -> Vec<PathBuf> {
        // A file per split and form, or a split in parts: the first form that there is.
        for extension in EXTENSIONS {
            let belongs = |path: &&PathBuf| {
                let (stem, end) = stem_and_extension(path);
                let rest = stem.strip_prefix(name);
                end == *extension
                    && rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['-', '_', '.']))
            };
            let files: Vec<PathBuf> = all.iter().filter(belongs).cloned().collect();
            if !files.is_empty() {
                return files;
            }
        }
        Vec::new()
    };
    match split {
        // A folder without splits is all training data.
        Some(name) if name != TRAIN => Ok(of_split(name)),
        _ => {
            let train = of_split(TRAIN);
            Ok(if train.is_empty() { all } else { train })
        }
    }
}

fn is_data(path: &Path) -> bool {
    path.is_file() && EXTENSIONS.contains(&stem_and_extension(path).1.as_str())
}

/// Name and ending, without a `.gz` behind them.
pub(super) fn stem_and_extension(path: &Path) -> (String, String) {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let name = name.strip_suffix(".gz").unwrap_or(&name);
    let (stem, extension) = name.rsplit_once('.').unwrap_or((name, ""));
    (stem.to_owned(), extension.to_owned())
}

fn is_pattern(path: &Path) -> bool {
    path.to_string_lossy().contains(['*', '?'])
}

/// `owner/name`, which is how the Hub names things.
fn looks_like_hub_name(path: &Path) -> bool {
    let names = path.components().filter(|part| matches!(part, Component::Normal(_))).count();
    path.components().count() == 2 && names == 2 && path.extension().is_none()
}

/// Every file whose path fits, component by component.
fn matches(pattern: &Path) -> Result<Vec<PathBuf>, DataError> {
    let mut found = vec![PathBuf::new()];
    for part in pattern.components() {
        let text = part.as_os_str().to_string_lossy();
        if !matches!(part, Component::Normal(_)) || !text.contains(['*', '?']) {
            found = found.into_iter().map(|path| path.join(part)).collect();
            continue;
        }
        let mut next = Vec::new();
        for dir in found.into_iter().filter(|dir| dir.as_os_str().is_empty() || dir.is_dir()) {
            let here = if dir.as_os_str().is_empty() { Path::new(".") } else { &dir };
            for path in entries(here)? {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                if fits(text.as_bytes(), name.as_bytes()) {
                    next.push(dir.join(name));
                }
            }
        }
        found = next;
    }
    Ok(found.into_iter().filter(|path| path.is_file()).collect())
}

/// Whether `name` fits `pattern`: `*` is any number of characters, `?` is one.
fn fits(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern.split_first(), name.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), _) => {
            fits(rest, name)
                || name.split_first().is_some_and(|(_, shorter)| fits(pattern, shorter))
        }
        (Some((wanted, rest)), Some((found, others))) => {
            (*wanted == b'?' || wanted == found) && fits(rest, others)
        }
        _ => false,
    }
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>, DataError> {
    let at = |source| DataError::Io { path: dir.display().to_string(), source };
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir).map_err(at)? {
        paths.push(entry.map_err(at)?.path());
    }
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_and_question_marks_fit_as_in_a_shell() {
        for (pattern, name, expected) in [
            ("*.jsonl", "a.jsonl", true),
            ("*.jsonl", "a.json", false),
            ("train-?-*", "train-1-of-2", true),
            ("train-?", "train-12", false),
            ("a*b*c", "a1b2b3c", true),
            ("*", "", true),
        ] {
            assert_eq!(fits(pattern.as_bytes(), name.as_bytes()), expected, "{pattern} {name}");
        }
    }
}

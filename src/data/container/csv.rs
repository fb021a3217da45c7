//! Separated values whose first line names the columns, quoted as RFC 4180 has it. What separates them is
//! what the first line says: a table tool writes semicolons where a comma is part of a number.
#![allow(
    clippy::wildcard_enum_match_arm,
    reason = "other problems are said in the crate's own words"
)]

use csv::{Position, ReaderBuilder, StringRecord};
use serde_json::Map;

use super::{Record, problem};
use crate::data::columns::from_texts;

/// What may stand between cells.
const DELIMITERS: &[u8] = b",;\t|";

/// Every record of a file. `usual` stands between its cells unless the first line says otherwise.
pub(super) fn records(bytes: &[u8], usual: u8) -> Vec<Record> {
    let (bytes, told, lines_before) = match told_delimiter(bytes) {
        Some((delimiter, rest)) => (rest, Some(delimiter), 1),
        None => (bytes, None, 0),
    };
    let delimiter = told.unwrap_or_else(|| delimiter(bytes, usual));
    let mut reader = ReaderBuilder::new().delimiter(delimiter).from_reader(bytes);
    let names = match reader.headers() {
        Ok(names) => names.clone(),
        Err(error) => return vec![problem(1, "invalid_csv", error.to_string())],
    };
    let mut records = Vec::new();
    let mut lines = Lines { bytes, passed: 0, line: 1 + lines_before };
    for record in reader.records() {
        match record {
            Ok(record) => {
                let line = lines.of(record.position());
                records.push((line, Ok(from_texts(columns(&names, &record)))));
            }
            Err(error) => {
                let line = lines.of(error.position());
                records.push(problem(line, "invalid_csv", message(&error, delimiter)));
            }
        }
    }
    records
}

/// The delimiter of a first line `sep=;`, as Excel reads and writes it, and what comes after that line.
fn told_delimiter(bytes: &[u8]) -> Option<(u8, &[u8])> {
    let (delimiter, rest) = bytes.strip_prefix(b"sep=")?.split_first()?;
    let rest = rest.strip_prefix(b"\r").unwrap_or(rest).strip_prefix(b"\n")?;
    DELIMITERS.contains(delimiter).then_some((*delimiter, rest))
}

/// What the first line has most of outside of quotes; `usual` where it has as many of that, or none.
fn delimiter(bytes: &[u8], usual: u8) -> u8 {
    let mut quoted = false;
    let mut counts = [0_usize; DELIMITERS.len()];
    for byte in bytes {
        match byte {
            b'"' => quoted = !quoted,
            b'\r' | b'\n' if !quoted => break,
            _ if quoted => {}
            byte => {
                if let Some(index) = DELIMITERS.iter().position(|delimiter| delimiter == byte) {
                    counts[index] += 1;
                }
            }
        }
    }
    let count =
        |delimiter: &u8| counts[DELIMITERS.iter().position(|d| d == delimiter).unwrap_or(0)];
    let most = DELIMITERS.iter().copied().max_by_key(count).unwrap_or(usual);
    if count(&most) > count(&usual) { most } else { usual }
}

/// On which line a record begins: a quoted cell may have several, and the reader's own count stands
/// before the line end of `\r\n` and before blank lines.
struct Lines<'a> {
    bytes: &'a [u8],
    /// Bytes before this one are counted.
    passed: usize,
    /// The line of that byte, from 1.
    line: usize,
}

impl Lines<'_> {
    /// Places come in their order.
    fn of(&mut self, place: Option<&Position>) -> usize {
        let begin = place.map_or(self.passed, |place| place.byte() as usize);
        let is_end = |byte: &&u8| matches!(**byte, b'\r' | b'\n');
        let rest = self.bytes.get(begin..).unwrap_or_default();
        let begin = begin + rest.iter().take_while(is_end).count();
        let between = self.bytes.get(self.passed..begin).unwrap_or_default();
        self.line += between.iter().filter(|byte| **byte == b'\n').count();
        self.passed = begin.max(self.passed);
        self.line
    }
}

fn columns(names: &StringRecord, record: &StringRecord) -> Map<String, serde_json::Value> {
    let pairs = names.iter().zip(record.iter());
    pairs.map(|(name, cell)| (name.trim().to_owned(), cell.into())).collect()
}

/// The cause alone; the place is said elsewhere.
fn message(error: &csv::Error, delimiter: u8) -> String {
    match error.kind() {
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
            let name = match delimiter {
                b',' => "commas",
                b';' => "semicolons",
                b'\t' => "tabs",
                _ => "vertical bars",
            };
            format!(
                "the record has {len} cells, the first line names {expected_len} columns, with {name} \
                 between them"
            )
        }
        csv::ErrorKind::Utf8 { err, .. } => format!("not UTF-8: {err}"),
        _ => error.to_string(),
    }
}

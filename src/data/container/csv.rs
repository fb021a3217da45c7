//! Comma- or tab-separated values whose first line names the columns, quoted as RFC 4180 has it.
#![allow(
    clippy::wildcard_enum_match_arm,
    reason = "other problems are said in the crate's own words"
)]

use csv::{Position, ReaderBuilder, StringRecord};
use serde_json::Map;

use super::{Record, problem};
use crate::data::columns::from_texts;

pub(super) fn records(bytes: &[u8], delimiter: u8) -> Vec<Record> {
    let mut reader = ReaderBuilder::new().delimiter(delimiter).from_reader(bytes);
    let names = match reader.headers() {
        Ok(names) => names.clone(),
        Err(error) => return vec![problem(1, "invalid_csv", error.to_string())],
    };
    let mut records = Vec::new();
    let mut lines = Lines { bytes, passed: 0, line: 1 };
    for record in reader.records() {
        match record {
            Ok(record) => {
                let line = lines.of(record.position());
                records.push((line, Ok(from_texts(columns(&names, &record)))));
            }
            Err(error) => {
                let line = lines.of(error.position());
                records.push(problem(line, "invalid_csv", message(&error)));
            }
        }
    }
    records
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
fn message(error: &csv::Error) -> String {
    match error.kind() {
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
            format!("the record has {len} cells, the first line names {expected_len} columns")
        }
        csv::ErrorKind::Utf8 { err, .. } => format!("not UTF-8: {err}"),
        _ => error.to_string(),
    }
}

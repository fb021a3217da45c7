//! Comma- or tab-separated values whose first line names the columns, quoted as RFC 4180 has it.
#![allow(
    clippy::wildcard_enum_match_arm,
    reason = "other problems are said in the crate's own words"
)]

use csv::{ReaderBuilder, StringRecord};
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
    for (index, record) in reader.records().enumerate() {
        match record {
            Ok(record) => {
                // Where the record starts: a quoted cell may have several lines.
                let line = record.position().map_or(index + 2, |place| place.line() as usize);
                records.push((line, Ok(from_texts(columns(&names, &record)))));
            }
            Err(error) => {
                let line = error.position().map_or(index + 2, |place| place.line() as usize);
                records.push(problem(line, "invalid_csv", message(&error)));
            }
        }
    }
    records
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

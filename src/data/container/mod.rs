//! The containers in which rows come: JSON lines, one JSON array, CSV, Parquet, each also within gzip.
//! Which one it is, the first bytes say, and for CSV the name. A container gives records; what they
//! mean is no concern of it.

mod array;
mod csv;
mod lines;
#[cfg(feature = "parquet")]
mod parquet;

use std::{io::Read, path::Path};

use serde_json::{Map, Value};

use super::{Problems, RowError, files::stem_and_extension};

/// A container's next thing: where it is, and its columns or what is wrong with it.
pub(super) type Record = (usize, Result<Map<String, Value>, Vec<RowError>>);

/// Decompressed data may have so many bytes: a small file must not fill the memory.
const MAX_BYTES: u64 = 8 << 30;

/// Every record of a file's bytes. `name` is its path, if it has one.
pub(super) fn records(bytes: &[u8], name: Option<&Path>) -> Vec<Record> {
    const GZIP: &[u8] = &[0x1f, 0x8b];
    const PARQUET: &[u8] = b"PAR1";
    const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
    if bytes.starts_with(GZIP) {
        return match unpack(bytes) {
            Ok(unpacked) => records(&unpacked, name),
            Err(message) => vec![problem(1, "invalid_gzip", message)],
        };
    }
    if bytes.starts_with(PARQUET) {
        return parquet(bytes);
    }
    let text = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes);
    match name.map(|name| stem_and_extension(name).1).as_deref() {
        Some("csv") => csv::records(text, b','),
        Some("tsv") => csv::records(text, b'\t'),
        _ => array::records(text).unwrap_or_else(|| lines::records(text)),
    }
}

fn unpack(bytes: &[u8]) -> Result<Vec<u8>, String> {
    let mut unpacked = Vec::new();
    let mut reader = flate2::read::MultiGzDecoder::new(bytes).take(MAX_BYTES + 1);
    match reader.read_to_end(&mut unpacked) {
        Err(error) => Err(format!("the gzip file is broken: {error}")),
        Ok(count) if count as u64 > MAX_BYTES => {
            Err(format!("the gzip file unpacks to more than {} GiB", MAX_BYTES >> 30))
        }
        Ok(_) => Ok(unpacked),
    }
}

#[cfg(feature = "parquet")]
fn parquet(bytes: &[u8]) -> Vec<Record> {
    parquet::records(bytes)
}

#[cfg(not(feature = "parquet"))]
fn parquet(_: &[u8]) -> Vec<Record> {
    let message =
        "this is a Parquet file, and this program was built without the feature `parquet`";
    vec![problem(1, "unsupported_container", message.to_owned())]
}

/// A record that could not be read.
fn problem(line: usize, code: &'static str, message: String) -> Record {
    let mut problems = Problems::default();
    problems.add(code, message);
    (line, Err(problems.into_errors(line).collect()))
}

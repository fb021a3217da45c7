//! Parquet: columns of text, numbers, lists and structures, uncompressed or with snappy or gzip, which
//! is how datasets are published.
#![allow(clippy::wildcard_enum_match_arm, reason = "other kinds of columns are texts")]

use bytes::Bytes;
use parquet::{
    file::reader::{FileReader, SerializedFileReader},
    record::{Field, Row},
};
use serde_json::{Map, Value};

use super::{Record, problem};

/// A row's number stands for its line.
pub(super) fn records(bytes: &[u8]) -> Vec<Record> {
    let broken = |line: usize, error: &dyn std::fmt::Display| {
        problem(line, "invalid_parquet", format!("the Parquet file cannot be read: {error}"))
    };
    let reader = match SerializedFileReader::new(Bytes::copy_from_slice(bytes)) {
        Ok(reader) => reader,
        Err(error) => return vec![broken(1, &error)],
    };
    let rows = match reader.get_row_iter(None) {
        Ok(rows) => rows,
        Err(error) => return vec![broken(1, &error)],
    };
    let mut records = Vec::new();
    for (index, row) in rows.enumerate() {
        match row {
            Ok(row) => records.push((index + 1, Ok(object(&row)))),
            Err(error) => {
                // What follows a broken page cannot be trusted.
                records.push(broken(index + 1, &error));
                break;
            }
        }
    }
    records
}

/// A structure without its empty fields: in a column of messages every message has all keys that any of
/// them has.
fn object(row: &Row) -> Map<String, Value> {
    let fields = row.get_column_iter().map(|(name, field)| (name.clone(), value(field)));
    fields.filter(|(_, value)| !value.is_null()).collect()
}

fn value(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(flag) => (*flag).into(),
        Field::Byte(number) => (*number).into(),
        Field::Short(number) => (*number).into(),
        Field::Int(number) => (*number).into(),
        Field::Long(number) => (*number).into(),
        Field::UByte(number) => (*number).into(),
        Field::UShort(number) => (*number).into(),
        Field::UInt(number) => (*number).into(),
        Field::ULong(number) => (*number).into(),
        Field::Float(number) => (*number).into(),
        Field::Double(number) => (*number).into(),
        Field::Str(text) => text.clone().into(),
        Field::Bytes(bytes) => String::from_utf8_lossy(bytes.data()).into_owned().into(),
        Field::Group(row) => object(row).into(),
        Field::ListInternal(list) => list.elements().iter().map(value).collect(),
        Field::MapInternal(map) => {
            let entry = |(key, field): &(Field, Field)| (plain_text(key), value(field));
            map.entries().iter().map(entry).collect::<Map<_, _>>().into()
        }
        other => other.to_string().into(),
    }
}

fn plain_text(field: &Field) -> String {
    match value(field) {
        Value::String(text) => text,
        other => other.to_string(),
    }
}

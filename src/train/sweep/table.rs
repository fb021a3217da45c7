//! What the candidates of a sweep came to, as a table: JSON, text and a part of the report.

use std::{fs, path::Path};

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::publish::disk;
use crate::train::TrainError;

/// What a candidate came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SweepRow {
    /// Its folder in [`sweep_dir`](super::sweep_dir).
    pub name: String,
    /// The settings that are its own.
    pub settings: Map<String, Value>,
    /// "published" (the best), "finished", "eliminated", "failed" or "unfinished".
    pub status: &'static str,
    /// Steps before the validation that counts.
    pub step: Option<usize>,
    /// Its loss.
    pub loss: Option<f64>,
    /// Share of trained tokens (or pairs) that were right there.
    pub token_accuracy: Option<f64>,
    /// Why it has failed.
    pub error: Option<String>,
}

impl SweepRow {
    /// All candidates as text, a line each.
    #[must_use]
    pub fn table(rows: &[Self]) -> String {
        table_text(rows)
    }
}

pub(super) const JSON_FILE: &str = "sweep.json";
pub(super) const TEXT_FILE: &str = "sweep.txt";

pub(super) fn table_json(rows: &[SweepRow]) -> String {
    let table = json!({ "candidates": rows });
    serde_json::to_string_pretty(&table).expect("plain data is always JSON") + "\n"
}

const HEADINGS: [&str; 5] = ["candidate", "valid loss", "accuracy", "after step", "outcome"];

fn cells(row: &SweepRow) -> [String; 5] {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    [
        row.name.clone(),
        or_dash(row.loss.map(|loss| format!("{loss:.4}"))),
        or_dash(row.token_accuracy.map(|share| format!("{:.1} %", share * 100.0))),
        or_dash(row.step.map(|step| step.to_string())),
        row.error.clone().unwrap_or_else(|| row.status.to_owned()),
    ]
}

/// Columns of even width.
pub(super) fn table_text(rows: &[SweepRow]) -> String {
    let mut lines = vec![HEADINGS.map(str::to_owned)];
    lines.extend(rows.iter().map(cells));
    let width = |column: usize| lines.iter().map(|line| line[column].len()).max().unwrap_or(0);
    let widths = [0, 1, 2, 3, 4].map(width);
    let line = |line: &[String; 5]| {
        let padded = line.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    lines.iter().map(line).collect()
}

/// Puts the table at the end of a report, if there is one.
pub(super) fn add_to_report(path: &Path, rows: &[SweepRow]) -> Result<(), TrainError> {
    let Ok(page) = fs::read_to_string(path) else { return Ok(()) };
    let cell = |tag: &str, text: &str| {
        let text = text.replace('&', "&amp;").replace('<', "&lt;");
        format!("<{tag}>{text}</{tag}>")
    };
    let line = |tag: &str, line: &[String]| {
        format!("<tr>{}</tr>\n", line.iter().map(|text| cell(tag, text)).collect::<String>())
    };
    let mut table = "<h2>Sweep</h2>\n<div class=\"scroll\"><table class=\"answers\">\n".to_owned();
    table += &line("th", &HEADINGS.map(str::to_owned));
    table.extend(rows.iter().map(|row| line("td", &cells(row))));
    table += "</table></div>\n</main>";
    Ok(disk::write(path, page.replacen("</main>", &table, 1))?)
}

//! A report as text for a terminal: the table, the verdicts, a few answers side by side.

use std::fmt::Write;

use super::{
    EvalReport,
    arms::is_tuned,
    graders::{self, GRADERS},
    report::{Comparison, Example},
};

/// A pair of arms in one sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Difference, interval, p-value, rows, and what became of the prompt's length.
    pub text: String,
    /// Whether the first arm is significantly better.
    pub is_win: bool,
}

/// The table of all arms, one line each, columns aligned, then what to know before trusting it.
#[must_use]
pub fn render(report: &EvalReport) -> String {
    let mut rows = vec![header()];
    for arm in &report.arms {
        let mut row = vec![arm.name.clone()];
        row.extend(arm.scores.iter().map(|score| format!("{:.1} %", 100.0 * score)));
        row.extend([
            figure(arm.perplexity, 3),
            figure(100.0 * arm.token_accuracy, 1) + " %",
            figure(arm.prompt_tokens_mean, 0),
            figure(arm.completion_tokens_mean, 0),
            figure(arm.latency_ms_p50, 0),
            figure(arm.latency_ms_p95, 0),
        ]);
        rows.push(row);
    }
    let mut text = aligned(&rows);
    for verdict in verdicts(report) {
        let _ = write!(text, "\n{}", verdict.text);
    }
    for warning in &report.warnings {
        let _ = write!(text, "\nnote: {warning}");
    }
    text.push('\n');
    text
}

/// One sentence per decisive pair: each adapter against each arm without one, or all pairs where
/// there is only one kind.
#[must_use]
pub fn verdicts(report: &EvalReport) -> Vec<Verdict> {
    let num_tuned = report.arms.iter().filter(|arm| is_tuned(&arm.name)).count();
    let has_both_kinds = num_tuned > 0 && num_tuned < report.arms.len();
    let mut lines = Vec::new();
    for b in &report.arms {
        for a in report.arms.iter().filter(|a| a.name != b.name) {
            let is_decisive = match has_both_kinds {
                true => is_tuned(&a.name) && !is_tuned(&b.name),
                false => report.comparisons.iter().any(|c| c.a == a.name && c.b == b.name),
            };
            if let Some(pair) =
                report.comparison(&a.name, &b.name, GRADERS[0].name).filter(|_| is_decisive)
            {
                let saved = 1.0 - a.prompt_tokens_mean / b.prompt_tokens_mean.max(1.0);
                let is_win = pair.is_significant() && pair.difference > 0.0;
                lines.push(Verdict { text: verdict(&pair, saved), is_win });
            }
        }
    }
    lines
}

/// `count` rows: question, reference and every arm's answer below each other.
#[must_use]
pub fn samples(report: &EvalReport, count: usize) -> String {
    let names: Vec<&str> = report.arms.iter().map(|arm| arm.name.as_str()).collect();
    let width = names.iter().map(|name| name.len()).chain([9]).max().unwrap_or(9);
    let mut text = String::new();
    for row in spread(&report.examples, count) {
        let _ = writeln!(text, "row {}", row.line);
        let _ = writeln!(text, "  {:<width$}  {}", "question", on_one_line(&row.question, 160));
        let _ = writeln!(text, "  {:<width$}  {}", "reference", on_one_line(&row.reference, 160));
        for (index, name) in names.iter().enumerate() {
            let mark = if row.scores[index][0] == 1.0 { "✓" } else { "✗" };
            let answer = on_one_line(&row.answers[index], 160);
            let _ = writeln!(text, "  {name:<width$}{mark} {answer}");
        }
    }
    text
}

/// A p-value as people write it: two or three decimals, or a power of ten where it is small.
#[must_use]
pub fn p_text(p_value: f64) -> String {
    match p_value {
        0.0 => "0".to_owned(),
        p_value if p_value < 0.001 => format!("{p_value:.0e}"),
        p_value if p_value < 0.01 => format!("{p_value:.3}"),
        p_value => format!("{p_value:.2}"),
    }
}

/// `+78.0 points exact match (95 % CI +71..+84), McNemar p=2e-9, 150 rows`, of one comparison.
#[must_use]
pub fn difference_text(pair: &Comparison) -> String {
    let grader = graders::position(pair.metric).map_or(pair.metric, |index| GRADERS[index].title);
    let test = if pair.test == "mcnemar-exact" { "McNemar" } else { "bootstrap" };
    format!(
        "{:+.1} points {grader} (95 % CI {:+.0}..{:+.0}), {test} p={}, {} rows",
        100.0 * pair.difference,
        100.0 * pair.ci95[0],
        100.0 * pair.ci95[1],
        p_text(pair.p_holm),
        pair.rows,
    )
}

fn verdict(pair: &Comparison, saved: f64) -> String {
    let mut line = format!("{} vs {}: {}", pair.a, pair.b, difference_text(pair));
    if !pair.is_significant() {
        line.push_str(" (not significant)");
    }
    if saved.abs() >= 0.05 {
        let word = if saved > 0.0 { "fewer" } else { "more" };
        let _ = write!(line, ", {:.0} % {word} prompt tokens", 100.0 * saved.abs());
    }
    line
}

fn header() -> Vec<String> {
    let mut names = vec!["arm"];
    names.extend(GRADERS.iter().map(|grader| grader.title));
    names.extend(["perplexity", "token acc.", "prompt tok", "answer tok", "p50 ms", "p95 ms"]);
    names.into_iter().map(str::to_owned).collect()
}

fn figure(value: f64, digits: usize) -> String {
    if value.is_finite() { format!("{value:.digits$}") } else { "-".to_owned() }
}

/// First column to the left, figures to the right, a rule under the header.
fn aligned(rows: &[Vec<String>]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<usize> = (0..rows[0].len()).map(|c| width(c).unwrap_or(0)).collect();
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        let mut line = format!("{:<width$}", row[0], width = widths[0]);
        for (cell, width) in row.iter().zip(&widths).skip(1) {
            let _ = write!(line, "  {cell:>width$}");
        }
        text.push_str(line.trim_end());
        text.push('\n');
        if index == 0 {
            text.push_str(&"─".repeat(line.chars().count()));
            text.push('\n');
        }
    }
    text
}

/// `count` rows evenly over all of them: neighbours in a file tend to be alike.
fn spread(rows: &[Example], count: usize) -> impl Iterator<Item = &Example> {
    let count = count.min(rows.len());
    (0..count).map(move |index| &rows[index * rows.len() / count])
}

fn on_one_line(text: &str, max_chars: usize) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if line.chars().count() <= max_chars {
        return if line.is_empty() { "(empty)".to_owned() } else { line };
    }
    line.chars().take(max_chars - 1).chain(['…']).collect()
}

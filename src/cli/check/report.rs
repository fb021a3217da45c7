//! What `check` prints, as text.

use std::{collections::BTreeMap, fmt::Write};

use super::DataFile;
use crate::cli::memory::{Memory, bytes};
use crate::data::{Distribution, RowError, RunEstimate, SharedPrompt};

/// More errors than this are only counted.
const MAX_ERRORS_SHOWN: usize = 50;
/// Lines named in one warning.
const MAX_LINES_NAMED: usize = 5;

/// Rows, errors, warnings and distributions of one file.
pub(super) fn file(file: &DataFile) -> String {
    let mut text = format!(
        "{}: {} rows, sha256 {}\n",
        file.path.display(),
        file.rows.len(),
        &file.sha256[..16.min(file.sha256.len())]
    );
    text += &errors(&file.errors);
    for warning in warnings(file) {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  warning: {warning}");
    }
    if !file.rows.is_empty() {
        text += &distributions(file);
    }
    text
}

/// Validation rows that training has seen.
pub(super) fn overlap(shared: &[SharedPrompt]) -> String {
    if shared.is_empty() {
        return "no validation row asks what a training row asks\n".to_owned();
    }
    let same_answer = shared.iter().filter(|row| row.same_answer).count();
    let pairs = shared
        .iter()
        .map(|row| format!("{} as in training line {}", row.valid_line, row.train_line));
    format!(
        "warning: {} validation rows ask what a training row asks, {same_answer} with the same \
         answer: line {}\n",
        shared.len(),
        named(pairs, shared.len())
    )
}

/// Epochs, steps and tokens of a run.
pub(super) fn estimate(estimate: &RunEstimate, batch_size: usize, auto_epochs: usize) -> String {
    let RunEstimate { epochs, steps, trained_tokens, loss_tokens } = estimate;
    format!(
        "run: {epochs} epochs, {steps} steps of {batch_size} rows, {} tokens (what hosted \
         fine-tuning bills), {} of them trained; OpenAI's automatic epochs would be {auto_epochs}\n",
        grouped(*trained_tokens),
        grouped(*loss_tokens)
    )
}

/// Memory of a run.
pub(super) fn memory(memory: &Memory) -> String {
    format!(
        "memory: about {} (weights {}, adapter and optimizer {}, activations {}), \
         for LoRA of rank 16 on all linear layers\n",
        bytes(memory.total()),
        bytes(memory.weights),
        bytes(memory.adapter),
        bytes(memory.activations)
    )
}

fn errors(errors: &[RowError]) -> String {
    if errors.is_empty() {
        return String::new();
    }
    let mut counts = BTreeMap::new();
    for error in errors {
        *counts.entry(error.code).or_insert(0_usize) += 1;
    }
    let mut text = format!("  {} errors:\n", errors.len());
    for RowError { line, code, message } in errors.iter().take(MAX_ERRORS_SHOWN) {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "    line {line}: {code}: {message}");
    }
    if errors.len() > MAX_ERRORS_SHOWN {
        let _ = writeln!(text, "    ... and {} more", errors.len() - MAX_ERRORS_SHOWN);
    }
    text.push_str("  errors by kind:\n");
    for (code, count) in counts {
        let _ = writeln!(text, "    {code}: {count}");
    }
    text
}

/// What is not an error but may be a mistake.
pub(super) fn warnings(file: &DataFile) -> Vec<String> {
    let mut found = Vec::new();
    let stats = &file.stats;
    for (count, role) in [(stats.num_missing_system, "system"), (stats.num_missing_user, "user")] {
        if count > 0 {
            found.push(format!("{count} rows have no {role} message"));
        }
    }
    if !file.duplicates.is_empty() {
        let pairs = file.duplicates.iter().map(|(line, first)| format!("{line} as line {first}"));
        let count = file.duplicates.len();
        let named = named(pairs, count);
        found.push(format!("{count} rows repeat an earlier one: line {named}"));
    }
    if stats.num_truncated_rows > 0 {
        found.push(format!(
            "{} rows are too long and lose {} tokens at their end",
            stats.num_truncated_rows, stats.num_truncated_tokens
        ));
    }
    found
}

fn distributions(file: &DataFile) -> String {
    let mut text = format!(
        "  {:22}{:>8}{:>8}{:>8}{:>10}{:>8}{:>8}{:>13}\n",
        "per row", "min", "p5", "median", "mean", "p95", "max", "total"
    );
    let mut row = |name: &str, numbers: &Distribution| {
        let Distribution { min, p5, median, mean, p95, max, sum } = numbers;
        let _ = writeln!(
            text,
            "  {name:22}{min:>8.0}{p5:>8.1}{median:>8.1}{mean:>10.1}{p95:>8.1}{max:>8.0}{:>13}",
            grouped(*sum as usize)
        );
    };
    row("messages", &file.stats.num_messages);
    if !file.examples.is_empty() {
        row("tokens", &file.stats.num_tokens);
        row("trained tokens", &file.stats.num_trained_tokens);
    }
    text
}

/// The first few of `count` things, separated by commas.
pub(in crate::cli) fn named(things: impl Iterator<Item = String>, count: usize) -> String {
    let mut text = things.take(MAX_LINES_NAMED).collect::<Vec<_>>().join(", ");
    if count > MAX_LINES_NAMED {
        text.push_str(", ...");
    }
    text
}

/// 1234567 as "1,234,567".
fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_by_thousands() {
        assert_eq!([0, 999, 1000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
    }
}

//! What a data set looks like before anything is trained on it: distributions, rows that occur
//! twice, and what a run over it amounts to.

use std::collections::HashMap;

use super::{Example, Question, Row, RowBody};

/// Five quantiles and the mean of a number that every row has.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Distribution {
    /// Smallest.
    pub min: f64,
    /// The value that 5 % of the rows stay below, interpolated as numpy does.
    pub p5: f64,
    /// Half of the rows are below.
    pub median: f64,
    /// Arithmetic mean.
    pub mean: f64,
    /// The value that 95 % of the rows stay below.
    pub p95: f64,
    /// Largest.
    pub max: f64,
    /// All together.
    pub sum: f64,
}

impl Distribution {
    /// Of any numbers; all zero for none.
    #[must_use]
    pub fn new(values: impl IntoIterator<Item = usize>) -> Self {
        let mut sorted: Vec<f64> = values.into_iter().map(|value| value as f64).collect();
        sorted.sort_by(f64::total_cmp);
        let sum: f64 = sorted.iter().sum();
        Self {
            min: quantile(&sorted, 0.0),
            p5: quantile(&sorted, 0.05),
            median: quantile(&sorted, 0.5),
            mean: sum / (sorted.len().max(1) as f64),
            p95: quantile(&sorted, 0.95),
            max: quantile(&sorted, 1.0),
            sum,
        }
    }
}

/// A data set in numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct RowStats {
    /// Messages per row; a prompt and its completion are two. A preference counts its better side.
    pub num_messages: Distribution,
    /// Tokens per row before truncation.
    pub num_tokens: Distribution,
    /// Tokens per row that the loss counts, after truncation.
    pub num_trained_tokens: Distribution,
    /// Rows that lose tokens to the maximum length.
    pub num_truncated_rows: usize,
    /// The tokens they lose.
    pub num_truncated_tokens: usize,
    /// Conversations without a system message.
    pub num_missing_system: usize,
    /// Conversations without a user message.
    pub num_missing_user: usize,
}

impl RowStats {
    /// Of a data set's rows and their examples.
    #[must_use]
    pub fn new(rows: &[Row], examples: &[Example]) -> Self {
        let truncated = examples.iter().map(Example::num_lost);
        Self {
            num_messages: Distribution::new(rows.iter().map(|row| num_messages(&row.body))),
            num_tokens: Distribution::new(
                examples.iter().map(|example| example.num_tokens() + example.num_lost()),
            ),
            num_trained_tokens: Distribution::new(examples.iter().map(Example::num_trained)),
            num_truncated_rows: truncated.clone().filter(|count| *count > 0).count(),
            num_truncated_tokens: truncated.sum(),
            num_missing_system: num_missing(rows, "system"),
            num_missing_user: num_missing(rows, "user"),
        }
    }
}

/// What a training run amounts to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RunEstimate {
    /// Passes over the data; the last may be a part of one.
    pub epochs: f64,
    /// Optimizer steps; an epoch's last one may have fewer rows.
    pub steps: usize,
    /// Tokens processed in all epochs, which is what hosted fine-tuning bills.
    pub trained_tokens: usize,
    /// Tokens of these that the loss counts.
    pub loss_tokens: usize,
}

impl RunEstimate {
    /// Of `epochs` passes with `batch_size` (at least 1) rows a step.
    #[must_use]
    pub fn new(examples: &[Example], epochs: f64, batch_size: usize) -> Self {
        let steps_per_epoch = examples.len().div_ceil(batch_size.max(1));
        let num_tokens: usize = examples.iter().map(Example::num_tokens).sum();
        let num_trained: usize = examples.iter().map(Example::num_trained).sum();
        let of_all_epochs = |count: usize| (epochs * count as f64).ceil() as usize;
        Self {
            epochs,
            steps: of_all_epochs(steps_per_epoch),
            trained_tokens: of_all_epochs(num_tokens),
            loss_tokens: of_all_epochs(num_trained),
        }
    }
}

/// `OpenAI`'s rule for "auto": three, more for few rows and fewer for many.
#[must_use]
pub fn default_epochs(num_rows: usize) -> usize {
    const TARGET_EPOCHS: usize = 3;
    const MIN_TARGET_ROWS: usize = 100;
    const MAX_TARGET_ROWS: usize = 25_000;
    const MAX_EPOCHS: usize = 25;
    let num_rows = num_rows.max(1);
    if num_rows * TARGET_EPOCHS < MIN_TARGET_ROWS {
        MAX_EPOCHS.min(MIN_TARGET_ROWS / num_rows)
    } else if num_rows * TARGET_EPOCHS > MAX_TARGET_ROWS {
        (MAX_TARGET_ROWS / num_rows).max(1)
    } else {
        TARGET_EPOCHS
    }
}

/// Rows that say exactly what an earlier one said: `(line, earlier line)`.
#[must_use]
pub fn duplicates(rows: &[Row]) -> Vec<(usize, usize)> {
    let mut first_lines = HashMap::new();
    let mut found = Vec::new();
    for row in rows {
        // `Value` has no hash; its text has.
        let first = *first_lines.entry(format!("{:?}", row.body)).or_insert(row.line);
        if first != row.line {
            found.push((row.line, first));
        }
    }
    found
}

/// A validation row whose question is in the training data too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedPrompt {
    /// Line of the validation row.
    pub valid_line: usize,
    /// Line of the first training row that asks the same.
    pub train_line: usize,
    /// Whether that training row answers the same as well.
    pub same_answer: bool,
}

/// Validation rows that training has seen; they measure memory, not learning.
#[must_use]
pub fn shared_prompts(train: &[Row], valid: &[Row]) -> Vec<SharedPrompt> {
    let mut seen: HashMap<String, Question> = HashMap::new();
    for question in train.iter().filter_map(Question::new) {
        seen.entry(prompt_key(&question)).or_insert(question);
    }
    valid
        .iter()
        .filter_map(Question::new)
        .filter_map(|question| {
            let known = seen.get(&prompt_key(&question))?;
            Some(SharedPrompt {
                valid_line: question.line,
                train_line: known.line,
                same_answer: question.answer == known.answer,
            })
        })
        .collect()
}

fn prompt_key(question: &Question) -> String {
    format!("{:?} {:?} {:?}", question.messages, question.tools, question.raw_prompt)
}

fn num_missing(rows: &[Row], role: &str) -> usize {
    rows.iter().filter(|row| lacks(&row.body, role)).count()
}

fn lacks(body: &RowBody, role: &str) -> bool {
    match body {
        RowBody::Chat { messages, .. } => !messages.iter().any(|message| message["role"] == role),
        RowBody::PromptCompletion { .. } => false,
        RowBody::Preference { chosen, .. } => lacks(chosen, role),
    }
}

fn num_messages(body: &RowBody) -> usize {
    match body {
        RowBody::Chat { messages, .. } => messages.len(),
        RowBody::PromptCompletion { .. } => 2,
        RowBody::Preference { chosen, .. } => num_messages(chosen),
    }
}

/// Quantile `q` (0 to 1) of ascending values, linear between neighbours.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let position = q * last as f64;
    let below = position.floor() as usize;
    let above = (below + 1).min(last);
    sorted[below] + (sorted[above] - sorted[below]) * (position - below as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_interpolate_as_numpy_does() {
        let numbers = Distribution::new([4, 1, 3, 2]);
        assert_eq!((numbers.min, numbers.max, numbers.mean, numbers.sum), (1.0, 4.0, 2.5, 10.0));
        assert!((numbers.median - 2.5).abs() < 1e-12);
        assert!((numbers.p5 - 1.15).abs() < 1e-12);
        assert!((numbers.p95 - 3.85).abs() < 1e-12);
        assert_eq!(Distribution::new([]).mean, 0.0);
    }

    #[test]
    fn few_rows_get_more_epochs_and_many_fewer() {
        let epochs = [1, 5, 20, 33, 34, 100, 8333, 8334, 30_000].map(default_epochs);
        assert_eq!(epochs, [25, 20, 5, 3, 3, 3, 3, 2, 1]);
    }
}

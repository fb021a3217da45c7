//! The result file of a job: a table with one line per step.

use std::fmt::Write;

use super::{
    FileRecord, JobsError, NewFile, Service, Transaction,
    step_metrics::{LossAndAccuracy, StepMetrics},
};
use crate::train::{EventLog, TrainEvent};

/// As OpenAI calls it.
const FILE_NAME: &str = "step_metrics.csv";
/// As OpenAI calls it.
const PURPOSE: &str = "fine-tune-results";
const HEADER: &str = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n";

/// What a finished run's log says.
pub(super) struct Results {
    steps: Vec<StepMetrics>,
    /// Tokens that went through the model in training, over all epochs.
    pub(super) trained_tokens: u64,
}

impl Results {
    /// Reads the log. Each step is there once: a resumed run's log has forgotten what it did again.
    pub(super) fn of(log: &EventLog) -> Self {
        let mut results = Self { steps: Vec::new(), trained_tokens: 0 };
        for event in log.events() {
            if let TrainEvent::Step { num_tokens, .. } = event {
                results.trained_tokens += *num_tokens as u64;
            }
            if let Some(metrics) = StepMetrics::of_step(event) {
                results.steps.push(metrics);
            } else if let Some(last) = results.steps.last_mut() {
                last.add_validation(event);
            }
        }
        results
    }

    /// The table.
    pub(super) fn csv(&self) -> String {
        let mut text = HEADER.to_owned();
        for metrics in &self.steps {
            let (train, valid) = (cells(Some(metrics.train)), cells(metrics.any_valid()));
            writeln!(text, "{},{train},{valid}", metrics.step).expect("a string takes everything");
        }
        text
    }

    /// Makes a file of the table.
    pub(super) fn add_file(
        &self,
        service: &Service,
        transaction: &Transaction<'_>,
    ) -> Result<FileRecord, JobsError> {
        let staged = service.stage_bytes(self.csv().as_bytes())?;
        transaction.add_file(staged, NewFile::new(FILE_NAME, PURPOSE))
    }
}

/// Two numbers with five decimals, without trailing zeros; empty where there is nothing.
fn cells(figures: Option<LossAndAccuracy>) -> String {
    let short = |number: f64| format!("{:?}", (number * 1e5).round() / 1e5);
    figures
        .map_or(",".to_owned(), |(loss, accuracy)| format!("{},{}", short(loss), short(accuracy)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_every_step_once_and_empty_cells_where_nothing_was_measured() {
        let metrics = |step, valid| StepMetrics {
            step,
            train: (3.632_651_9, 0.5),
            valid,
            full_valid: None,
            rewards: None,
        };
        let steps = vec![metrics(1, None), metrics(2, Some((0.0, 0.123_456)))];
        let table = Results { steps, trained_tokens: 0 }.csv();
        assert_eq!(table, format!("{HEADER}1,3.63265,0.5,,\n2,3.63265,0.5,0.0,0.12346\n"));
    }
}

//! The figures of an optimizer step under OpenAI's names: events, checkpoints and the result file are
//! made of them.

use std::fmt::Write;

use serde_json::{Map, Value};

use crate::train::TrainEvent;

/// Loss, and the share of tokens that were the arg max.
pub(super) type LossAndAccuracy = (f64, f64);

/// What is known about a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct StepMetrics {
    /// Counted from 1.
    pub(super) step: usize,
    /// On the step's rows, before the update.
    pub(super) train: LossAndAccuracy,
    /// On some of the validation rows, after the update.
    pub(super) valid: Option<LossAndAccuracy>,
    /// On all of them.
    pub(super) full_valid: Option<LossAndAccuracy>,
    /// Preferred, other and difference: mean rewards of a DPO step.
    pub(super) rewards: Option<[f64; 3]>,
}

impl StepMetrics {
    /// The step's figures, if `event` is one.
    pub(super) fn of_step(event: &TrainEvent) -> Option<Self> {
        let TrainEvent::Step { step, loss, token_accuracy, rewards, .. } = event else {
            return None;
        };
        Some(Self {
            step: *step,
            train: (*loss, *token_accuracy),
            valid: None,
            full_valid: None,
            rewards: rewards.map(|of| [of.reward_chosen, of.reward_rejected, of.reward_margin]),
        })
    }

    /// Adds what a validation after this step says; any other event is left alone.
    pub(super) fn add_validation(&mut self, event: &TrainEvent) {
        let TrainEvent::Validated { step, full, loss, token_accuracy, .. } = event else { return };
        if *step == self.step {
            let place = if *full { &mut self.full_valid } else { &mut self.valid };
            *place = Some((*loss, *token_accuracy));
        }
    }

    /// The loss on validation rows, of all of them where only that is known.
    pub(super) fn any_valid(&self) -> Option<LossAndAccuracy> {
        self.valid.or(self.full_valid)
    }

    /// As OpenAI's metrics events and checkpoints have it.
    pub(super) fn data(&self, total_steps: Option<usize>) -> Value {
        let mut data = Map::new();
        data.insert("step".to_owned(), self.step.into());
        if let Some(total_steps) = total_steps {
            data.insert("total_steps".to_owned(), total_steps.into());
        }
        let mut add = |prefix: &str, figures: Option<LossAndAccuracy>| {
            let Some((loss, accuracy)) = figures else { return };
            data.insert(format!("{prefix}_loss"), loss.into());
            data.insert(format!("{prefix}_mean_token_accuracy"), accuracy.into());
        };
        add("train", Some(self.train));
        add("valid", self.any_valid());
        add("full_valid", self.full_valid);
        if let Some(rewards) = self.rewards {
            let names = ["reward_chosen", "reward_rejected", "reward_margin"];
            data.extend(names.map(str::to_owned).into_iter().zip(rewards.map(Value::from)));
        }
        Value::Object(data)
    }

    /// In words, as OpenAI says it.
    pub(super) fn message(&self, total_steps: usize) -> String {
        let mut message =
            format!("Step {}/{total_steps}: training loss={:.2}", self.step, self.train.0);
        let losses =
            [("validation loss", self.any_valid()), ("full validation loss", self.full_valid)];
        for (name, figures) in losses {
            if let Some((loss, _)) = figures {
                write!(message, ", {name}={loss:.2}").expect("a string takes everything");
            }
        }
        message
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_reads_as_openai_writes_it() {
        let mut metrics = StepMetrics {
            step: 300,
            train: (0.1499, 0.9444),
            valid: Some((0.2657, 0.9565)),
            full_valid: None,
            rewards: None,
        };
        assert_eq!(metrics.message(300), "Step 300/300: training loss=0.15, validation loss=0.27");
        metrics.full_valid = Some((0.4033, 0.909));
        let message =
            "Step 300/300: training loss=0.15, validation loss=0.27, full validation loss=0.40";
        assert_eq!(metrics.message(300), message);
        let expected = serde_json::json!({
            "step": 300, "total_steps": 300,
            "train_loss": 0.1499, "train_mean_token_accuracy": 0.9444,
            "valid_loss": 0.2657, "valid_mean_token_accuracy": 0.9565,
            "full_valid_loss": 0.4033, "full_valid_mean_token_accuracy": 0.909,
        });
        assert_eq!(metrics.data(Some(300)), expected);
    }
}

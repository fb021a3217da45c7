//! What a run says while it works, one JSON object a line in `events.jsonl`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Something that happened. Losses are mean negative log-likelihoods per trained token, in nats. With
/// the objective `dpo` they are means over pairs, and `token_accuracy` is the share of pairs whose
/// preferred answer has gained on the other.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum TrainEvent {
    /// The first event of a run (and of each resumption).
    Started {
        /// Optimizer steps already made.
        step: usize,
        /// Optimizer steps of the whole run.
        total_steps: usize,
        /// Training examples.
        num_examples: usize,
        /// Validation examples.
        num_valid_examples: usize,
        /// Parameters of the model.
        num_parameters: usize,
        /// Parameters that are trained.
        num_trained_parameters: usize,
        /// The peak learning rate.
        learning_rate: f64,
    },
    /// An optimizer step.
    Step {
        /// Steps made, this one included.
        step: usize,
        /// Passes over the data, this step included.
        epoch: f64,
        /// Over all trained tokens of the step's sequences, before the update.
        loss: f64,
        /// Share of trained tokens that were the arg max.
        token_accuracy: f64,
        /// The update's learning rate.
        learning_rate: f64,
        /// Global L2 norm of the gradient before clipping.
        grad_norm: f64,
        /// Tokens that went through the model.
        num_tokens: usize,
        /// Tokens that counted in the loss.
        num_trained_tokens: usize,
        /// The pairs' mean rewards.
        #[serde(flatten)]
        rewards: Option<Rewards>,
        /// Wall time of the step.
        seconds: f64,
    },
    /// The loss on the validation rows.
    Validated {
        /// Steps made before.
        step: usize,
        /// Whether all validation rows were asked, not only the next few in rotation.
        full: bool,
        /// Over all trained tokens of the validation rows.
        loss: f64,
        /// `exp(loss)`.
        perplexity: f64,
        /// Share of trained tokens that were the arg max.
        token_accuracy: f64,
        /// Tokens that counted.
        num_trained_tokens: usize,
        /// The pairs' mean rewards.
        #[serde(flatten)]
        rewards: Option<Rewards>,
        /// Wall time.
        seconds: f64,
    },
    /// An epoch is over and its adapter published.
    Epoch {
        /// Steps made.
        step: usize,
        /// Passes over the data, counted from 1; the last may be a part of one.
        epoch: usize,
        /// The adapter's folder.
        path: PathBuf,
    },
    /// A checkpoint is on disk.
    Checkpointed {
        /// Steps made before.
        step: usize,
        /// Its folder.
        path: PathBuf,
    },
    /// The run was asked to stop; a checkpoint waits for `resume`.
    Stopped {
        /// Steps made.
        step: usize,
    },
    /// Something to know that does not stop the run.
    Warning {
        /// In words.
        message: String,
    },
    /// The output is published.
    Published {
        /// Steps made.
        step: usize,
        /// The folder.
        path: PathBuf,
    },
}

/// How much more likely `dpo` has made the answers than they were at the start, times beta: means
/// over pairs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rewards {
    /// Of the preferred answers.
    pub reward_chosen: f64,
    /// Of the others.
    pub reward_rejected: f64,
    /// The difference.
    pub reward_margin: f64,
}

/// Everything that happened in a run, over all resumptions, as events and as lines.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct EventLog {
    events: Vec<TrainEvent>,
    /// The lines as they were first written: reading a number back may round it.
    text: String,
}

impl EventLog {
    /// Reads the text of an `events.jsonl`; a half-written last line is left out.
    #[must_use]
    pub fn from_text(text: &str) -> Self {
        let mut log = Self::default();
        for line in text.lines() {
            if let Ok(event) = serde_json::from_str(line) {
                log.events.push(event);
                log.text.extend([line, "\n"]);
            }
        }
        log
    }

    /// Adds an event and returns its line.
    pub fn push(&mut self, event: TrainEvent) -> String {
        let line = serde_json::to_string(&event).expect("an event is plain data") + "\n";
        self.text.push_str(&line);
        self.events.push(event);
        line
    }

    /// The events in their order.
    #[must_use]
    pub fn events(&self) -> &[TrainEvent] {
        &self.events
    }

    /// One JSON object a line.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }
}

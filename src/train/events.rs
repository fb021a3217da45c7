//! What a run says while it works, one JSON object a line in `events.jsonl`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Something that happened. Losses are mean negative log-likelihoods per trained token, in nats.
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
        /// Wall time of the step.
        seconds: f64,
    },
    /// The loss on the validation rows.
    Validated {
        /// Steps made before.
        step: usize,
        /// Over all trained tokens of the validation rows.
        loss: f64,
        /// `exp(loss)`.
        perplexity: f64,
        /// Share of trained tokens that were the arg max.
        token_accuracy: f64,
        /// Tokens that counted.
        num_trained_tokens: usize,
        /// Wall time.
        seconds: f64,
    },
    /// A checkpoint is on disk.
    Checkpointed {
        /// Steps made before.
        step: usize,
        /// Its folder.
        path: PathBuf,
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

//! What only a server can say of an adapter, asked of whoever has one: this floor trains and does not
//! serve, the floors above do.

use std::{path::Path, sync::Arc};

use serde_json::Value;

use super::{TrainEvent, TrainJob};
use crate::data::Example;
use crate::model::Decoder;

/// What a run shows of itself to be examined.
pub struct Candidate<'a> {
    /// The run.
    pub job: &'a TrainJob,
    /// The base. With the method `full` it is what was trained, and tracked: not to be served.
    pub decoder: &'a Arc<Decoder>,
    /// A folder with the adapter, or with `full` the model, as it is now and as it would be published;
    /// `None` where a run has no place for one.
    pub folder: Option<&'a Path>,
    /// Whether the run began with random weights, so that there is no base to compare with.
    pub from_random: bool,
    /// Everything that happened so far.
    pub events: &'a [TrainEvent],
    /// Sequences, and what the training forward pass says of their trained tokens.
    pub scored: &'a [Scored<'a>],
}

/// A sequence with the log-probability of each of its trained tokens, in their order.
pub struct Scored<'a> {
    /// The sequence.
    pub example: &'a Example,
    /// From a forward pass without dropout.
    pub logprobs: Vec<f32>,
}

/// How generated answers to validation rows compare with theirs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Generated {
    /// Rows asked.
    pub num_rows: usize,
    /// Share of answers that are the row's.
    pub exact_match: f64,
    /// Mean F1 over list items.
    pub f1: f64,
}

/// What an examination found.
#[derive(Debug, Default)]
pub struct Examination {
    /// Largest difference between the log-probabilities of training and serving; `None` where nothing
    /// was compared.
    pub max_difference: Option<f64>,
    /// Tokens compared.
    pub num_tokens: usize,
    /// Files for the output folder: name and content.
    pub files: Vec<(&'static str, String)>,
    /// For the card.
    pub card: Value,
}

/// Somebody who can serve an adapter or a model. An error is a sentence.
pub trait Examiner {
    /// Answers validation rows, in the course of a run.
    ///
    /// # Errors
    /// The adapter cannot be served.
    fn generate(&mut self, candidate: &Candidate<'_>) -> Result<Generated, String>;

    /// Compares what a server says with `scored`, of what is about to be published before the end.
    ///
    /// # Errors
    /// It must not be published.
    fn compare(&mut self, candidate: &Candidate<'_>) -> Result<Examination, String>;

    /// Looks at what is about to be published at the end, and compares as well.
    ///
    /// # Errors
    /// It must not be published.
    fn examine(&mut self, candidate: &Candidate<'_>) -> Result<Examination, String>;
}

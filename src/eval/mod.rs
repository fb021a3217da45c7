//! FLOOR 5. Did the tuned model beat the base, by how much, is that significant, and what does a
//! request cost now?
//!
//! Does: asks every arm (base, few-shot prompt, adapters) the same held-out questions in one
//! continuous batch, grades the answers, compares the arms pairwise and writes a report.
//! Knows: questions, prompts, the engine's requests and events, statistics.
//! Must never know: tensors, HTTP, the command line. It reaches the model only through the engine,
//! so that what it measures is what is served.

pub mod arms;
pub mod compare;
pub mod grader;
pub mod graders;
pub mod html;
mod prompts;
pub mod report;
pub mod require;
pub mod runner;
mod summary;
pub mod table;

pub use self::{
    arms::{Arm, parse_arms},
    report::EvalReport,
    require::Requirement,
    runner::{Progress, Runner},
};

use crate::engine::EngineError;
use crate::text::TextError;

/// Why an evaluation cannot be set up or finished.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// `--arms` names something that is no arm.
    #[error("unknown arm {0:?}: expected base, fewshot:K (K from 1), tuned or tuned:NAME")]
    UnknownArm(String),
    /// `--arms` names no arm at all, or one arm twice.
    #[error("{0}")]
    Arms(String),
    /// A requirement that cannot be read.
    #[error(
        "cannot read the requirement {0:?}: expected ARM>ARM or ARM>=ARM, then :METRIC if wanted"
    )]
    Requirement(String),
    /// A requirement about an arm or metric that the report does not have.
    #[error("the requirement {requirement:?} names {name:?}; this evaluation has {known}")]
    UnknownName {
        /// The requirement as written.
        requirement: String,
        /// The arm or metric in it that does not exist.
        name: String,
        /// What exists, comma separated.
        known: String,
    },
    /// Not enough rows to show as examples in a few-shot prompt.
    #[error(
        "fewshot:{wanted} needs {wanted} rows to show as examples, there are {available}; give some \
         that are not evaluated (training data)"
    )]
    FewShot {
        /// Examples the arm shows.
        wanted: usize,
        /// Rows that may be shown.
        available: usize,
    },
    /// A prompt cannot be rendered or tokenised.
    #[error("line {line}, arm {arm}: {source}")]
    Prompt {
        /// The row's line in the data file, from 1.
        line: usize,
        /// The arm's name.
        arm: String,
        /// What the text floor says.
        source: TextError,
    },
    /// The engine does not take a request.
    #[error("line {line}, arm {arm}: {source}")]
    Refused {
        /// The row's line in the data file, from 1.
        line: usize,
        /// The arm's name.
        arm: String,
        /// What the engine says.
        source: EngineError,
    },
    /// A request failed while it ran.
    #[error("line {line}, arm {arm}: {message}")]
    Failed {
        /// The row's line in the data file, from 1.
        line: usize,
        /// The arm's name.
        arm: String,
        /// What the engine says.
        message: String,
    },
    /// [`Runner::should_stop`] said so.
    #[error("the evaluation was stopped")]
    Stopped,
}

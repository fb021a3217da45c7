//! Evaluation: metrics, reports, the demonstration.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../common/mod.rs"]
mod common;

mod demo;
mod report;
mod run;

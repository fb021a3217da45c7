//! The command line as its user sees it.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../common/mod.rs"]
mod common;

mod bench;
mod check;
mod closed_output;
mod files;
mod hub;
mod jobs;

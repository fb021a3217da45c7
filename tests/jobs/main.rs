//! Fine-tuning jobs: their life, faults, webhooks.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../common/mod.rs"]
mod common;

mod control;
mod disk;
mod evaluation;
mod faults;
mod fine_tuning_guide;
mod kill;
mod run;
mod webhooks;

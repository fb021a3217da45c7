//! The trainer: numbers, memory, faults, kills.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../common/mod.rs"]
mod common;

mod batches;
mod chance;
mod choice;
mod dialects;
mod faults;
mod forecast;
mod going_on;
mod gradients;
mod jobs;
mod kill;
mod memory;
mod numbers;
mod parity;
mod run;
mod service;
mod sweep;
mod trace;
mod trl;
mod watch;

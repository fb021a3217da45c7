//! The server as a client sees it.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../common/mod.rs"]
mod common;

mod adapters;
mod auth;
mod azure;
mod chat;
mod errors;
mod evals;
mod files;
mod graders;
mod jobs;
mod jobs_bad;
mod lifecycle;
mod models;
mod own_tokens;
mod start;
mod swap;
mod tools;
mod uploads;

//! Rows in, token examples out.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../common/mod.rs"]
mod common;

mod chat_templates;
mod masks;
mod preferences;
mod rows;
mod sources;
mod templates;

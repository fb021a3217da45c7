//! Adapters: what is learnt, stored, exchanged with PEFT and merged.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../common/adapters.rs"]
mod support;

mod lora;
mod merge_command;
mod new_tokens;
mod peft;
mod registry;
mod variants;

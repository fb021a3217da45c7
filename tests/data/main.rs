//! Rows in, token examples out.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../common/mod.rs"]
mod common;

use tunesmith::{data::Example, text::Tokenizer};

mod chat_templates;
mod masks;
mod preferences;
mod rows;
mod sources;
mod templates;

/// The text of every unbroken run of trained tokens.
fn trained(tokenizer: &Tokenizer, example: &Example) -> Vec<String> {
    let masked: Vec<(u32, bool)> =
        example.tokens.iter().copied().zip(example.loss_mask.iter().copied()).collect();
    masked
        .chunk_by(|one, next| one.1 == next.1)
        .filter(|run| run[0].1)
        .map(|run| {
            let ids: Vec<u32> = run.iter().map(|(id, _)| *id).collect();
            tokenizer.decode(&ids, false).unwrap()
        })
        .collect()
}

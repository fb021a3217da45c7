//! A row's tokens, with the trained ones marked.

use std::{
    env,
    fmt::Write,
    io::{IsTerminal, stdout},
};

use crate::data::Example;
use crate::text::{TextError, Tokenizer};

/// How trained tokens stand out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    /// Green among grey, with ANSI codes.
    Colour,
    /// In `[brackets]` among `(parentheses)`.
    Brackets,
}

impl Style {
    /// Colour for a terminal, or where `CLICOLOR_FORCE` asks for it.
    pub(super) fn of_stdout() -> Self {
        let forced = env::var_os("CLICOLOR_FORCE").is_some_and(|value| value != "0");
        let refused = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        if forced || (stdout().is_terminal() && !refused) { Self::Colour } else { Self::Brackets }
    }
}

/// Every token of the example, in order, as text; a line end in a token also ends the line.
///
/// # Errors
/// The tokenizer cannot decode one of its own tokens.
pub(super) fn show(
    example: &Example,
    tokenizer: &Tokenizer,
    style: Style,
) -> Result<String, TextError> {
    let mut shown = format!(
        "\nline {}: {} tokens, {} trained\n",
        example.line,
        example.tokens.len(),
        example.num_trained()
    );
    for (token, trained) in example.tokens.iter().zip(&example.loss_mask) {
        let text = token_text(*token, tokenizer)?;
        let (start, end) = match (style, trained) {
            (Style::Colour, true) => ("\u{1b}[32m", "\u{1b}[0m"),
            (Style::Colour, false) => ("\u{1b}[90m", "\u{1b}[0m"),
            (Style::Brackets, true) => ("[", "]"),
            (Style::Brackets, false) => ("(", ")"),
        };
        let line_end = if text.ends_with("\\n") { "\n" } else { "" };
        // Writing to a string cannot fail.
        let _ = write!(shown, "{start}{text}{end}{line_end}");
    }
    shown.truncate(shown.trim_end_matches('\n').len());
    shown.push('\n');
    Ok(shown)
}

/// The token's text with control characters escaped; its name where it is a part of a character.
fn token_text(token: u32, tokenizer: &Tokenizer) -> Result<String, TextError> {
    let mut text = tokenizer.decode(&[token], false)?;
    if text.is_empty() || text.contains(char::REPLACEMENT_CHARACTER) {
        text = tokenizer.id_to_token(token).unwrap_or_else(|| format!("<{token}>"));
    }
    let escape =
        |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    Ok(text.chars().map(escape).collect())
}

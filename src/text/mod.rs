//! FLOOR 1. Strings to tokens and back.
//!
//! A conversation becomes text ([`ChatTemplate`]), text becomes token ids ([`Tokenizer`]), a growing
//! list of ids becomes text again ([`Detokenizer`]), that text ends where the client asked
//! ([`StopMatcher`]), and calls of tools are found in it ([`ToolCallParser`]). Knows tokenizers and chat templates; must never know tensors, models or HTTP.

pub mod bpe;
mod chat_template;
mod detokenizer;
mod jinja;
mod python;
mod special_tokens;
mod stop;
mod strftime;
mod token_bytes;
mod tokenizer;
mod tool_calls;

use std::path::PathBuf;

pub use chat_template::ChatTemplate;
pub use detokenizer::Detokenizer;
pub use stop::{StopMatcher, StopOutput};
pub use tokenizer::{NewToken, Tokenizer};
pub use tool_calls::{AnswerPiece, ToolCall, ToolCallFormat, ToolCallParser};

/// What can be wrong with a tokenizer, a template, or what is put into them.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A file of the model folder is missing, unreadable or broken.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The tokenizer could not encode a text.
    #[error("cannot encode the text: {reason}")]
    Encode {
        /// What the tokenizer said.
        reason: String,
    },
    /// A text that cannot become a token.
    #[error("{token:?} cannot be a token: {reason}")]
    NewToken {
        /// The text.
        token: String,
        /// Why not.
        reason: String,
    },
    /// The tokenizer could not decode token ids.
    #[error("cannot decode the tokens: {reason}")]
    Decode {
        /// What the tokenizer said.
        reason: String,
    },
    /// The chat template is not valid Jinja.
    #[error("chat template {file}, line {line}: {reason}")]
    TemplateSyntax {
        /// The file that holds the template.
        file: String,
        /// Line within the template's source, from 1.
        line: usize,
        /// What the parser said.
        reason: String,
    },
    /// The template called `raise_exception`: it does not accept these messages.
    #[error("the chat template refuses these messages: {message}")]
    TemplateRefused {
        /// The template's own message.
        message: String,
    },
    /// The template failed on these messages (an undefined value, a wrong type, too much work).
    #[error("the chat template failed at {file}, line {line}: {reason}")]
    TemplateFailed {
        /// The file that holds the template.
        file: String,
        /// Line within the template's source, from 1.
        line: usize,
        /// What the template engine said.
        reason: String,
    },
    /// A conversation without messages.
    #[error("the conversation has no messages")]
    NoMessages,
    /// A message that is not a JSON object.
    #[error("message {index} is not an object")]
    NotAMessage {
        /// Its position, from 0.
        index: usize,
    },
    /// A caller's template variable would replace one that the renderer sets.
    #[error("the chat template variable {name:?} is reserved")]
    ReservedVariable {
        /// The variable.
        name: String,
    },
}

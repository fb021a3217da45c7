//! Rows to tokens with a loss mask.
//!
//! The promise kept here is that the context of every trained token is tokenised as the server
//! tokenises it: a prompt's tokens are those of the prompt alone, never merged with the answer.
//! So segments are tokenised one by one. Only a tokenizer that treats the start of a text specially
//! (one that puts a space before it) gets the whole text at once, where the borders allow it.
//!
//! An answer is trained with its end-of-turn token. White space that a template writes after that
//! token (the newline of `ChatML`) belongs to the next turn: a server has stopped by then.

use std::path::Path;

use serde_json::Value;

use super::{
    DataError, Example, LossOn, Row, RowBody, RowError,
    turns::{Segment, TurnError, segments},
};
use crate::text::{ChatTemplate, TextError, Tokenizer};

/// Code of a row in which the loss would count nothing.
pub const NO_TRAINED_TOKENS: &str = "no_trained_tokens";
/// Code of a row that the chat template refuses.
pub const TEMPLATE_FAILED: &str = "template_failed";
/// Code of a row whose answer is not what its template renders after the generation prompt.
pub const TEMPLATE_NOT_PREFIX: &str = "template_not_prefix";
/// Code of a row whose tool calls the chat template leaves out.
pub const TOOL_CALLS_DROPPED: &str = "tool_calls_dropped";
/// Code of a row that the tokenizer refuses.
pub const TOKENIZER_FAILED: &str = "tokenizer_failed";

/// The code and the message of a row's problem.
type Problem = (&'static str, String);

/// Tokens and which of them are trained.
type Masked = (Vec<u32>, Vec<bool>);

/// How rows become examples.
pub struct Encoder<'a> {
    /// The base model's.
    pub tokenizer: &'a Tokenizer,
    /// The template that will serve the adapter.
    pub template: &'a ChatTemplate,
    /// Which tokens are trained.
    pub loss_on: LossOn,
    /// In tokens; what is longer loses its end.
    pub max_length: usize,
}

impl Encoder<'_> {
    /// All rows, in order. A row gives one example, except under a template that rewrites earlier
    /// turns, where every trained message of the row gives one.
    ///
    /// # Errors
    /// Every row that the template refuses and every row without a trained token, all at once;
    /// `path` is what the error names.
    pub fn encode_all(&self, path: &Path, rows: &[Row]) -> Result<Vec<Example>, DataError> {
        let (examples, errors) = self.encode_valid(rows);
        let path = path.display().to_string();
        match (examples.is_empty(), errors.is_empty()) {
            (_, false) => Err(DataError::Rows { path, errors }),
            (true, true) => Err(DataError::Empty { path }),
            (false, true) => Ok(examples),
        }
    }

    /// The examples of all rows that give some, and what is wrong with the others.
    #[must_use]
    pub fn encode_valid(&self, rows: &[Row]) -> (Vec<Example>, Vec<RowError>) {
        let cuts_freely = self.cuts_freely();
        let mut examples = Vec::with_capacity(rows.len());
        let mut errors = Vec::new();
        for row in rows {
            match self.encode_row(row, cuts_freely) {
                Ok(encoded) => examples.extend(encoded),
                Err((code, message)) => errors.push(RowError { line: row.line, code, message }),
            }
        }
        (examples, errors)
    }

    fn encode_row(&self, row: &Row, cuts_freely: bool) -> Result<Vec<Example>, Problem> {
        let loss_on = match self.loss_on {
            LossOn::Auto if row.is_completion => LossOn::Assistant,
            LossOn::Auto => LossOn::All,
            LossOn::Assistant | LossOn::All => self.loss_on,
        };
        let encoder = Encoder { loss_on, ..*self };
        encoder.encode_body(&row.body, row.line, cuts_freely)
    }

    fn encode_body(
        &self,
        body: &RowBody,
        line: usize,
        cuts_freely: bool,
    ) -> Result<Vec<Example>, Problem> {
        let (lists, add_special_tokens) = match body {
            RowBody::Preference { chosen, rejected } => {
                let [mut chosen, rejected] = [
                    self.encode_side(chosen, "preferred", line, cuts_freely)?,
                    self.encode_side(rejected, "non-preferred", line, cuts_freely)?,
                ];
                chosen.rejected = Some(Box::new(rejected));
                return Ok(vec![chosen]);
            }
            RowBody::Chat { messages, trained, tools } => {
                (self.chat_segments(messages, trained, tools.as_deref())?, false)
            }
            RowBody::PromptCompletion { prompt, completion } => {
                (vec![self.raw_segments(prompt, completion)], true)
            }
        };
        let mut examples = Vec::with_capacity(lists.len());
        let mut untrained = String::new();
        for list in lists {
            let (tokens, mut loss_mask) = self
                .tokenize(&list, add_special_tokens, cuts_freely)
                .map_err(|error| (TOKENIZER_FAILED, error.to_string()))?;
            if self.loss_on == LossOn::All {
                loss_mask.fill(true);
            }
            // Nothing comes before the first token to predict it from.
            if let Some(first) = loss_mask.first_mut() {
                *first = false;
            }
            match self.truncate(line, tokens, loss_mask) {
                Ok(example) => examples.push(example),
                Err(message) => untrained = message,
            }
        }
        if examples.is_empty() { Err((NO_TRAINED_TOKENS, untrained)) } else { Ok(examples) }
    }

    /// One side of a preference, which is one sequence.
    fn encode_side(
        &self,
        body: &RowBody,
        name: &str,
        line: usize,
        cuts_freely: bool,
    ) -> Result<Example, Problem> {
        let with_name = |(code, message)| (code, format!("{name} answer: {message}"));
        let mut examples = self.encode_body(body, line, cuts_freely).map_err(with_name)?;
        match (examples.pop(), examples.is_empty()) {
            (Some(only), true) => Ok(only),
            _ => {
                let message = "the chat template rewrites its earlier turns, so it is not one text";
                Err(with_name((TEMPLATE_NOT_PREFIX, message.to_owned())))
            }
        }
    }

    /// Keeps the start. The error says why no trained token is left.
    fn truncate(
        &self,
        line: usize,
        mut tokens: Vec<u32>,
        mut loss_mask: Vec<bool>,
    ) -> Result<Example, String> {
        let Some(first_trained) = loss_mask.iter().position(|trained| *trained) else {
            let message = "no token to train: no assistant message of weight 1 answers anything";
            return Err(message.to_owned());
        };
        let num_truncated = tokens.len().saturating_sub(self.max_length);
        if first_trained >= self.max_length {
            return Err(format!(
                "no token to train is left: the first is token {} of {}, the maximum length is {}",
                first_trained + 1,
                tokens.len(),
                self.max_length
            ));
        }
        tokens.truncate(self.max_length);
        loss_mask.truncate(self.max_length);
        Ok(Example { line, tokens, loss_mask, num_truncated, rejected: None })
    }

    fn chat_segments(
        &self,
        messages: &[Value],
        trained: &[bool],
        tools: Option<&[Value]>,
    ) -> Result<Vec<Vec<Segment>>, Problem> {
        let untrained = vec![false; messages.len()];
        let trained = match self.loss_on {
            LossOn::Assistant => trained,
            // No borders are needed where everything is trained.
            LossOn::All | LossOn::Auto => &untrained,
        };
        let lists = segments(self.template, messages, trained, tools).map_err(|error| match error {
            TurnError::Template { num_messages, source } => {
                let place = if num_messages == messages.len() {
                    "the conversation".to_owned()
                } else {
                    format!("its first {num_messages} messages")
                };
                (TEMPLATE_FAILED, format!("the chat template refuses {place}: {source}"))
            }
            TurnError::NotPrefix { message } => {
                let text = format!(
                    "the chat template renders message {message} otherwise than as a continuation \
                     of its generation prompt, so what a server would ask for cannot be trained"
                );
                (TEMPLATE_NOT_PREFIX, text)
            }
            TurnError::CallDropped { message, name } => {
                let text = format!(
                    "the chat template does not render the call of {name:?} in message {message}, \
                     so it cannot be trained; the model needs a template with tools"
                );
                (TOOL_CALLS_DROPPED, text)
            }
        })?;
        lists
            .into_iter()
            .map(|list| self.end_at_end_of_turn(list))
            .collect::<Result<_, _>>()
            .map_err(|error| (TOKENIZER_FAILED, error.to_string()))
    }

    /// Moves the white space after an end-of-turn token from each trained segment into the next.
    fn end_at_end_of_turn(&self, list: Vec<Segment>) -> Result<Vec<Segment>, TextError> {
        let mut moved: Vec<Segment> = Vec::with_capacity(list.len() + 1);
        let mut carried = String::new();
        for mut segment in list {
            segment.text.insert_str(0, &std::mem::take(&mut carried));
            if segment.trained {
                let end = segment.text.trim_end().len();
                if end < segment.text.len() && self.ends_with_special(&segment.text[..end])? {
                    carried = segment.text.split_off(end);
                }
            }
            moved.push(segment);
        }
        if !carried.is_empty() {
            moved.push(Segment { text: carried, trained: false });
        }
        Ok(moved)
    }

    /// Whether the last token of `text` is a special one.
    fn ends_with_special(&self, text: &str) -> Result<bool, TextError> {
        // The names of special tokens are short and stand alone: the text's tail tells.
        let tail = text.char_indices().rev().nth(63).map_or(text, |(at, _)| &text[at..]);
        let last = self.tokenizer.encode(tail, false)?.pop();
        Ok(last.is_some_and(|id| self.tokenizer.is_special(id)))
    }

    fn raw_segments(&self, prompt: &str, completion: &str) -> Vec<Segment> {
        let mut completion = completion.to_owned();
        if let Some(eos) = self.tokenizer.eos_token()
            && !completion.ends_with(eos)
        {
            completion.push_str(eos);
        }
        vec![
            Segment { text: prompt.to_owned(), trained: false },
            Segment { text: completion, trained: true },
        ]
    }

    /// Tokens of all segments and which are trained.
    fn tokenize(
        &self,
        list: &[Segment],
        add_special_tokens: bool,
        cuts_freely: bool,
    ) -> Result<Masked, TextError> {
        if !cuts_freely && let Some(whole) = self.tokenize_whole(list, add_special_tokens)? {
            return Ok(whole);
        }
        let mut tokens = Vec::new();
        let mut loss_mask = Vec::new();
        for (index, segment) in list.iter().enumerate() {
            tokens.extend(self.tokenizer.encode(&segment.text, add_special_tokens && index == 0)?);
            loss_mask.resize(tokens.len(), segment.trained);
        }
        Ok((tokens, loss_mask))
    }

    /// Tokens of the text as one, if each segment's end is a border between tokens.
    fn tokenize_whole(
        &self,
        list: &[Segment],
        add_special_tokens: bool,
    ) -> Result<Option<Masked>, TextError> {
        let text: String = list.iter().map(|segment| segment.text.as_str()).collect();
        let tokens = self.tokenizer.encode(&text, add_special_tokens)?;
        let mut loss_mask = Vec::with_capacity(tokens.len());
        let mut end = 0;
        for segment in list {
            end += segment.text.len();
            let before = self.tokenizer.encode(&text[..end], add_special_tokens)?;
            if !tokens.starts_with(&before) {
                return Ok(None);
            }
            loss_mask.resize(before.len(), segment.trained);
        }
        Ok(Some((tokens, loss_mask)))
    }

    /// Whether this tokenizer reads the rest of a text as it reads a text of its own.
    fn cuts_freely(&self) -> bool {
        let encode = |text| self.tokenizer.encode(text, false).unwrap_or_default();
        [encode("one\n"), encode("two")].concat() == encode("one\ntwo")
    }
}

//! Where the trained text of a conversation lies, found by prefix rendering.
//!
//! For each trained assistant message the conversation is rendered up to it with the generation
//! prompt, exactly as a server renders that request, and again with the message. What the second
//! has more than the first is what the model must learn to say. This asks nothing of a template but
//! that its renderings are prefixes of each other, and that is checked.

use serde_json::{Map, Value};

use crate::text::{ChatTemplate, TextError};

/// A piece of rendered text that is trained as a whole or not at all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) text: String,
    pub(super) trained: bool,
}

/// Why a conversation could not be cut into segments.
#[derive(Debug)]
pub(super) enum TurnError {
    /// The template refuses the first `num_messages` messages.
    Template { num_messages: usize, source: TextError },
    /// The rendering that ends with this message (from 1) does not start with its own prompt.
    NotPrefix { message: usize },
    /// The trained text of this message (from 1) lacks the tool that it calls.
    CallDropped { message: usize, name: String },
}

/// The conversation's text, cut so that every trained answer is a segment of its own. One list of
/// segments for an ordinary template. A template that rewrites earlier turns (by dropping their
/// thoughts, say) gives one list per trained message, each as the server sees it at that turn, with
/// only its last answer trained.
pub(super) fn segments(
    template: &ChatTemplate,
    messages: &[Value],
    trained: &[bool],
    tools: Option<&[Value]>,
) -> Result<Vec<Vec<Segment>>, TurnError> {
    let render = |num_messages: usize, add_generation_prompt: bool| {
        template
            .render(&messages[..num_messages], tools, add_generation_prompt, &Map::new())
            .map_err(|source| TurnError::Template { num_messages, source })
    };
    let whole = render(messages.len(), false)?;
    let mut turns = Vec::new();
    for index in (1..messages.len()).filter(|index| trained[*index]) {
        let prompt = render(index, true)?;
        let full =
            if index + 1 == messages.len() { whole.clone() } else { render(index + 1, false)? };
        if !full.starts_with(&prompt) || full.len() == prompt.len() {
            return Err(TurnError::NotPrefix { message: index + 1 });
        }
        if let Some(name) = dropped_call(&messages[index], &full[prompt.len()..]) {
            return Err(TurnError::CallDropped { message: index + 1, name });
        }
        turns.push(Turn { prompt_len: prompt.len(), full });
    }
    let rewritten = turns.iter().any(|turn| !whole.starts_with(&turn.full));
    if rewritten {
        Ok(turns.iter().map(|turn| cut(&turn.full, std::slice::from_ref(turn))).collect())
    } else {
        Ok(vec![cut(&whole, &turns)])
    }
}

/// The first function that `message` calls and its rendering `text` does not name.
fn dropped_call(message: &Value, text: &str) -> Option<String> {
    let calls = message["tool_calls"].as_array()?;
    let names = calls.iter().filter_map(|call| call["function"]["name"].as_str());
    names.into_iter().find(|name| !text.contains(*name)).map(str::to_owned)
}

/// One trained message: the conversation's rendering up to its end, of which the first `prompt_len`
/// bytes are what the model was asked.
struct Turn {
    prompt_len: usize,
    full: String,
}

/// Cuts `text` at the borders of `turns`, all of which are prefixes of it.
fn cut(text: &str, turns: &[Turn]) -> Vec<Segment> {
    let mut segments = Vec::with_capacity(2 * turns.len() + 1);
    let mut at = 0;
    let mut push = |end: usize, trained: bool| {
        if end > at {
            segments.push(Segment { text: text[at..end].to_owned(), trained });
            at = end;
        }
    };
    for turn in turns {
        push(turn.prompt_len, false);
        push(turn.full.len(), true);
    }
    push(text.len(), false);
    segments
}

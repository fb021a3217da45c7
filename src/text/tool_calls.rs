//! Tool calls in a stream of text pieces: the forms in which models write them, and what they mean.

use serde_json::Value;

/// Opens a call in the form of Hermes and Qwen.
const OPEN: &str = "<tool_call>";
/// Closes it.
const CLOSE: &str = "</tool_call>";
/// What Llama 3 may write before a call.
const PYTHON_TAG: &str = "<|python_tag|>";

/// A call that a model wants to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolCall {
    /// The function's name.
    pub name: String,
    /// Its arguments, as JSON text.
    pub arguments: String,
}

/// How a model writes its calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolCallFormat {
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, any number of them, text before: Hermes,
    /// Qwen 2.5 and 3.
    Tagged,
    /// The whole answer is one object `{"name": …, "parameters": {…}}`: Llama 3.
    Object,
}

impl ToolCallFormat {
    /// The form that a chat template shows its model; `None` for templates without tools.
    #[must_use]
    pub fn of_template(source: &str) -> Option<Self> {
        if source.contains(OPEN) {
            Some(Self::Tagged)
        } else {
            let says_object = source.contains("\"parameters\"") && source.contains("\"name\"");
            (source.contains("tools") && says_object).then_some(Self::Object)
        }
    }
}

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AnswerPiece {
    /// Text to show, never empty.
    Text(String),
    /// A complete call.
    Call(ToolCall),
}

/// Splits a stream of text into text and calls. What looks like a call but is none comes out as the
/// text that it is.
#[derive(Debug)]
pub struct ToolCallParser {
    format: ToolCallFormat,
    /// Text that may belong to a call, and the white space before it.
    held: String,
    /// Whether text has been let through: then no object can be the whole answer any more.
    has_text: bool,
    /// Whether there was a call: white space after it means nothing.
    has_calls: bool,
}

impl ToolCallParser {
    /// A parser at the start of an answer.
    #[must_use]
    pub fn new(format: ToolCallFormat) -> Self {
        Self { format, held: String::new(), has_text: false, has_calls: false }
    }

    /// Takes the next piece of text; what is certain by now comes out.
    pub fn push(&mut self, piece: &str) -> Vec<AnswerPiece> {
        self.held.push_str(piece);
        match self.format {
            ToolCallFormat::Tagged => self.take_tagged(),
            ToolCallFormat::Object => {
                let start = self.held.trim_start();
                let may_be_call = start.is_empty()
                    || start.starts_with('{')
                    || start.starts_with(PYTHON_TAG)
                    || PYTHON_TAG.starts_with(start);
                if may_be_call && !self.has_text { Vec::new() } else { self.take_text() }
            }
        }
    }

    /// The rest, at the end of the answer. A call that was not closed counts if it is whole.
    pub fn finish(&mut self) -> Vec<AnswerPiece> {
        let text = self.held.trim();
        let inner = match self.format {
            ToolCallFormat::Tagged => text.strip_prefix(OPEN),
            ToolCallFormat::Object => Some(text.strip_prefix(PYTHON_TAG).unwrap_or(text)),
        };
        match inner.and_then(parse_call) {
            Some(call) => {
                self.held.clear();
                vec![AnswerPiece::Call(call)]
            }
            None if text.is_empty() && self.has_calls => Vec::new(),
            None => self.take_text(),
        }
    }

    fn take_text(&mut self) -> Vec<AnswerPiece> {
        if self.held.is_empty() {
            return Vec::new();
        }
        self.has_text = true;
        vec![AnswerPiece::Text(std::mem::take(&mut self.held))]
    }

    fn take_tagged(&mut self) -> Vec<AnswerPiece> {
        let mut pieces = Vec::new();
        while let Some(open) = self.held.find(OPEN) {
            let start = open + OPEN.len();
            let Some(length) = self.held[start..].find(CLOSE) else {
                self.let_through(open, &mut pieces);
                return pieces;
            };
            match parse_call(&self.held[start..start + length]) {
                Some(call) => {
                    self.let_through(open, &mut pieces);
                    let end = self.held.find(CLOSE).map_or(0, |at| at + CLOSE.len());
                    self.held.drain(..end);
                    pieces.push(AnswerPiece::Call(call));
                    self.has_calls = true;
                }
                // No call: the tag is text, and what follows is looked at anew.
                None => {
                    let text: String = self.held.drain(..start).collect();
                    pieces.push(AnswerPiece::Text(text));
                }
            }
        }
        let len = self.held.len();
        let begun =
            (1..OPEN.len()).rev().find(|&count| self.held.ends_with(&OPEN[..count])).unwrap_or(0);
        self.let_through(len - begun, &mut pieces);
        pieces
    }

    /// Lets the text before `end` through, without white space at its end: that belongs to a call,
    /// should one follow.
    fn let_through(&mut self, end: usize, pieces: &mut Vec<AnswerPiece>) {
        let end_of_text = self.held[..end].trim_end().len();
        if end_of_text > 0 {
            let text: String = self.held.drain(..end_of_text).collect();
            pieces.push(AnswerPiece::Text(text));
        }
    }
}

fn parse_call(text: &str) -> Option<ToolCall> {
    let Ok(Value::Object(mut call)) = serde_json::from_str(text.trim()) else { return None };
    let Some(Value::String(name)) = call.remove("name") else { return None };
    let arguments = match call.remove("arguments").or_else(|| call.remove("parameters")) {
        // Some models write the JSON text of the arguments where the arguments should be.
        Some(Value::String(text)) if serde_json::from_str::<Value>(&text).is_ok() => text,
        Some(arguments @ Value::Object(_)) => arguments.to_string(),
        None => "{}".to_owned(),
        Some(_) => return None,
    };
    Some(ToolCall { name, arguments })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(format: ToolCallFormat, pieces: &[&str]) -> (String, Vec<(String, String)>) {
        let mut parser = ToolCallParser::new(format);
        let mut out: Vec<AnswerPiece> = Vec::new();
        for piece in pieces {
            out.extend(parser.push(piece));
        }
        out.extend(parser.finish());
        let (mut text, mut calls) = (String::new(), Vec::new());
        for piece in out {
            match piece {
                AnswerPiece::Text(piece) => {
                    assert!(!piece.is_empty());
                    text.push_str(&piece);
                }
                AnswerPiece::Call(call) => calls.push((call.name, call.arguments)),
            }
        }
        (text, calls)
    }

    fn call(name: &str, arguments: &str) -> (String, String) {
        (name.to_owned(), arguments.to_owned())
    }

    #[test]
    fn calls_come_out_whole_and_the_text_before_them_at_once() {
        let mut parser = ToolCallParser::new(ToolCallFormat::Tagged);
        assert_eq!(parser.push("Let me see.\n<tool"), [AnswerPiece::Text("Let me see.".into())]);
        assert_eq!(parser.push("_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool"), []);
        let expected = ToolCall { name: "f".into(), arguments: "{\"a\":1}".into() };
        assert_eq!(parser.push("_call>"), [AnswerPiece::Call(expected)]);
        assert_eq!(parser.finish(), []);
    }

    #[test]
    fn several_calls_and_one_that_was_not_closed() {
        let text = "<tool_call>{\"name\":\"f\"}</tool_call>\n<tool_call>{\"name\":\"g\",\
                    \"arguments\":{\"x\":[1,2]}}";
        let expected = vec![call("f", "{}"), call("g", "{\"x\":[1,2]}")];
        assert_eq!(run(ToolCallFormat::Tagged, &[text]), (String::new(), expected));
    }

    #[test]
    fn what_is_no_call_stays_text() {
        for text in [
            "a < b and <tool_box>",
            "<tool_call>not json</tool_call> end",
            "<tool_call>{\"nome\": 1}</tool_call>",
            "<tool_call>{\"name\": \"f\", \"argum",
            "  leading and trailing  ",
            "",
        ] {
            assert_eq!(run(ToolCallFormat::Tagged, &[text]), (text.to_owned(), vec![]), "{text}");
        }
        for text in ["{\"a\": 1}", "The answer {\"name\": \"f\"}", "{\"name\": \"f\""] {
            assert_eq!(run(ToolCallFormat::Object, &[text]), (text.to_owned(), vec![]), "{text}");
        }
    }

    #[test]
    fn an_answer_that_is_one_object_is_a_call() {
        let text = "<|python_tag|>{\"name\": \"f\", \"parameters\": {\"a\": \"b\"}}";
        let expected = (String::new(), vec![call("f", "{\"a\":\"b\"}")]);
        assert_eq!(run(ToolCallFormat::Object, &[text]), expected);
        assert_eq!(run(ToolCallFormat::Object, &[&text[14..]]), expected);
    }

    #[test]
    fn a_template_tells_its_form() {
        let of = ToolCallFormat::of_template;
        assert_eq!(of("{% if tools %}<tool_call>"), Some(ToolCallFormat::Tagged));
        let llama = "{% if tools %}{\"name\": f, \"parameters\": {}}";
        assert_eq!(of(llama), Some(ToolCallFormat::Object));
        assert_eq!(of("{{ messages }}"), None);
    }

    proptest! {
        #[test]
        fn any_chunking_gives_what_the_whole_text_gives(
            parts in prop::collection::vec(
                prop::sample::select(vec![
                    "<tool_call>", "</tool_call>", "<tool", "{\"name\":\"f\",\"arguments\":{}}",
                    " ", "\n", "text", "é", "<",
                ]),
                0..10,
            ),
            cuts in prop::collection::vec(0_usize..80, 0..6),
        ) {
            let text = parts.concat();
            let mut cuts: Vec<usize> =
                cuts.into_iter().filter(|&at| text.is_char_boundary(at) && at <= text.len()).collect();
            cuts.sort_unstable();
            let mut pieces = Vec::new();
            let mut start = 0;
            for cut in cuts {
                pieces.push(&text[start..cut]);
                start = cut;
            }
            pieces.push(&text[start..]);
            for format in [ToolCallFormat::Tagged, ToolCallFormat::Object] {
                prop_assert_eq!(run(format, &pieces), run(format, &[&text]));
            }
        }
    }
}

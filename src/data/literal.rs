//! Lists and dictionaries as Python prints them, which is what a table tool writes into a CSV cell that
//! holds messages: `[{'role': 'user', 'content': "it's"}]`.

use serde_json::{Map, Value};

/// Deeper nesting is no row.
const MAX_DEPTH: usize = 32;

/// The value that `text` prints; `None` for anything else.
pub(super) fn parse(text: &str) -> Option<Value> {
    let mut reader = Reader { rest: text.trim() };
    let value = reader.value(0)?;
    reader.rest.trim_start().is_empty().then_some(value)
}

struct Reader<'a> {
    rest: &'a str,
}

impl Reader<'_> {
    fn value(&mut self, depth: usize) -> Option<Value> {
        if depth > MAX_DEPTH {
            return None;
        }
        for (word, value) in
            [("None", Value::Null), ("True", Value::Bool(true)), ("False", Value::Bool(false))]
        {
            if self.takes(word) {
                return Some(value);
            }
        }
        match self.rest.trim_start().chars().next()? {
            '[' => self.list(depth),
            '{' => self.dictionary(depth),
            '\'' | '"' => self.string().map(Value::String),
            _ => self.number(),
        }
    }

    fn list(&mut self, depth: usize) -> Option<Value> {
        let mut items = Vec::new();
        self.takes("[");
        while !self.takes("]") {
            items.push(self.value(depth + 1)?);
            // NumPy prints lists without commas.
            self.takes(",");
        }
        Some(items.into())
    }

    fn dictionary(&mut self, depth: usize) -> Option<Value> {
        let mut entries = Map::new();
        self.takes("{");
        while !self.takes("}") {
            let key = self.string()?;
            if !self.takes(":") {
                return None;
            }
            entries.insert(key, self.value(depth + 1)?);
            self.takes(",");
        }
        Some(entries.into())
    }

    fn string(&mut self) -> Option<String> {
        let text = self.rest.trim_start();
        let quote = text.chars().next().filter(|quote| ['\'', '"'].contains(quote))?;
        let mut string = String::new();
        let mut characters = text.char_indices().skip(1);
        while let Some((at, character)) = characters.next() {
            match character {
                '\\' => match characters.next()?.1 {
                    'n' => string.push('\n'),
                    't' => string.push('\t'),
                    'r' => string.push('\r'),
                    escape @ ('x' | 'u' | 'U') => {
                        let digits = [('x', 2), ('u', 4), ('U', 8)];
                        let count = digits.iter().find(|(name, _)| *name == escape)?.1;
                        let code: String = characters.by_ref().take(count).map(|c| c.1).collect();
                        string.push(char::from_u32(u32::from_str_radix(&code, 16).ok()?)?);
                    }
                    other => string.push(other),
                },
                end if end == quote => {
                    self.rest = &text[at + 1..];
                    return Some(string);
                }
                other => string.push(other),
            }
        }
        None
    }

    fn number(&mut self) -> Option<Value> {
        let text = self.rest.trim_start();
        let end = text.find([',', ']', '}', ' ', '\n']).unwrap_or(text.len());
        let number = serde_json::from_str(&text[..end]).ok().filter(Value::is_number)?;
        self.rest = &text[end..];
        Some(number)
    }

    /// Whether `word` comes next; it is behind us then.
    fn takes(&mut self, word: &str) -> bool {
        let rest = self.rest.trim_start().strip_prefix(word);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_python_prints_is_read_and_nothing_else() {
        for (text, expected) in [
            (
                "[{'role': 'user', 'content': \"it's\"}]",
                json!([{"role": "user", "content": "it's"}]),
            ),
            (
                "[{'a': None, 'b': True, 'c': -1.5}\n {'a': []}]",
                json!([{"a": null, "b": true, "c": -1.5}, {"a": []}]),
            ),
            (r"['a\n\'b\'', '\xe4 \u20ac']", json!(["a\n'b'", "ä €"])),
        ] {
            assert_eq!(parse(text), Some(expected), "{text}");
        }
        for text in ["[1", "['a]", "{'a' 1}", "['a'] b", "[a]", "x", "", &"[".repeat(100)] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}

//! Texts with `{{item.x.y}}` and `{{sample.output_text}}` in them. There is nothing else in this
//! language: no filters, no loops, and a value that does not exist is an error that names it.

use serde_json::Value;

use super::{Fault, FaultKind};

/// What a template may speak of.
#[derive(Debug, Clone, PartialEq)]
pub struct Context {
    /// The row of the data: `{{item.…}}`.
    pub item: Value,
    /// What the model made of it: `{{sample.…}}`; null where there is none.
    pub sample: Value,
}

impl Context {
    /// The sample of a model's answer: `output_text`, `output_json` where the text is JSON,
    /// `output_tools` and `choices`, as in OpenAI's graders.
    #[must_use]
    pub fn of_answer(item: Value, text: &str) -> Self {
        let mut sample = serde_json::json!({
            "output_text": text,
            "output_tools": [],
            "choices": [{"message": {"role": "assistant", "content": text}}],
        });
        if let Ok(json) = serde_json::from_str::<Value>(text.trim())
            && (json.is_object() || json.is_array())
        {
            sample["output_json"] = json;
        }
        Self { item, sample }
    }
}

/// A text, read once.
#[derive(Debug, Clone, PartialEq)]
pub struct Template(Vec<Piece>);

#[derive(Debug, Clone, PartialEq)]
enum Piece {
    Text(String),
    Variable(Path),
}

/// `item.x[0].y`: what is looked up in a [`Context`].
#[derive(Debug, Clone, PartialEq)]
pub struct Path {
    /// As written, for messages.
    name: String,
    keys: Vec<String>,
}

impl Template {
    /// Reads a text.
    ///
    /// # Errors
    /// An opening `{{` without an end, or something between them that is no variable.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (mut pieces, mut rest) = (Vec::new(), text);
        while let Some((before, after)) = rest.split_once("{{") {
            let (inside, after) =
                after.split_once("}}").ok_or_else(|| "`{{` without `}}`".to_owned())?;
            if !before.is_empty() {
                pieces.push(Piece::Text(before.to_owned()));
            }
            pieces.push(Piece::Variable(Path::parse(inside.trim())?));
            rest = after;
        }
        if !rest.is_empty() {
            pieces.push(Piece::Text(rest.to_owned()));
        }
        Ok(Self(pieces))
    }

    /// The text with its values: strings as they are, everything else as JSON.
    ///
    /// # Errors
    /// A variable that does not exist.
    pub fn render(&self, context: &Context) -> Result<String, Fault> {
        let mut text = String::new();
        for piece in &self.0 {
            match piece {
                Piece::Text(plain) => text.push_str(plain),
                Piece::Variable(path) => {
                    let value = path.find(context)?;
                    match value.as_str() {
                        Some(plain) => text.push_str(plain),
                        None => text.push_str(&value.to_string()),
                    }
                }
            }
        }
        Ok(text)
    }
}

impl Path {
    /// Reads `item.x`, `sample.output_json[0].y`, `item['a b']`.
    ///
    /// # Errors
    /// Anything else.
    pub fn parse(name: &str) -> Result<Self, String> {
        let wrong = || format!("`{{{{{name}}}}}` is no variable: write item.NAME or sample.NAME");
        let mut keys = Vec::new();
        let mut rest = name;
        while !rest.is_empty() {
            if let Some(inner) = rest.strip_prefix('[') {
                let (key, after) = inner.split_once(']').ok_or_else(wrong)?;
                let quoted = |mark| key.strip_prefix(mark).and_then(|key| key.strip_suffix(mark));
                let is_number = !key.is_empty() && key.bytes().all(|digit| digit.is_ascii_digit());
                let key = quoted('\'').or_else(|| quoted('"')).or(is_number.then_some(key));
                keys.push(key.ok_or_else(wrong)?.to_owned());
                rest = after;
                continue;
            }
            let plain = if keys.is_empty() { Some(rest) } else { rest.strip_prefix('.') };
            let plain = plain.ok_or_else(wrong)?;
            let is_key = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '$');
            let end = plain.find(|c| !is_key(c)).unwrap_or(plain.len());
            if end == 0 {
                return Err(wrong());
            }
            keys.push(plain[..end].to_owned());
            rest = &plain[end..];
        }
        match keys.first().map(String::as_str) {
            Some("item" | "sample") => Ok(Self { name: name.to_owned(), keys }),
            _ => Err(wrong()),
        }
    }

    /// What it leads to.
    ///
    /// # Errors
    /// Nothing is there; the message names the variable and where the way ends.
    pub fn find<'a>(&self, context: &'a Context) -> Result<&'a Value, Fault> {
        let mut value = if self.keys[0] == "item" { &context.item } else { &context.sample };
        let mut way = self.keys[0].clone();
        for key in &self.keys[1..] {
            let next = match value.as_array() {
                Some(values) => key.parse::<usize>().ok().and_then(|at| values.get(at)),
                None => value.get(key),
            };
            let Some(next) = next else { return Err(self.missing(&way, key)) };
            value = next;
            way = format!("{way}.{key}");
        }
        Ok(value)
    }

    fn missing(&self, way: &str, key: &str) -> Fault {
        if way == "sample" && key == "output_json" {
            let message = format!("`{{{{{}}}}}`: the answer is no JSON", self.name);
            return Fault { kind: FaultKind::SampleParse, message };
        }
        let message = format!("`{{{{{}}}}}`: `{way}` has no `{key}`", self.name);
        Fault { kind: FaultKind::InvalidVariable, message }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn context() -> Context {
        let item = json!({"x": {"y": [1, {"z": "deep"}], "a b": null}, "größe": 2.5});
        Context::of_answer(item, "{\"k\": [\"v\"]}")
    }

    fn render(text: &str) -> Result<String, String> {
        Template::parse(text)?.render(&context()).map_err(|fault| fault.message)
    }

    #[test]
    fn variables_become_their_values() {
        for (text, expected) in [
            ("plain } {text}", "plain } {text}"),
            ("a{{item.x.y[1].z}}b{{ item.x.y.1.z }}", "adeepbdeep"),
            ("{{item.x.y}}", "[1,{\"z\":\"deep\"}]"),
            ("{{item['x'][\"a b\"]}}", "null"),
            ("{{item.größe}}", "2.5"),
            ("{{sample.output_text}}", "{\"k\": [\"v\"]}"),
            ("{{sample.output_json.k[0]}}", "v"),
            ("{{sample.output_tools}}", "[]"),
            ("{{sample.choices[0].message.role}}", "assistant"),
        ] {
            assert_eq!(render(text).as_deref(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_does_not_exist_is_named() {
        for (text, message) in [
            ("{{item.x.q}}", "`{{item.x.q}}`: `item.x` has no `q`"),
            ("{{item.x.y[7]}}", "`item.x.y` has no `7`"),
            ("{{item.größe.x}}", "`item.größe` has no `x`"),
            ("{{sample.nothing}}", "`sample` has no `nothing`"),
            ("{{other.x}}", "`{{other.x}}` is no variable"),
            ("{{item.x | upper}}", "is no variable"),
            ("{{ }}", "is no variable"),
            ("{{item.x", "without"),
        ] {
            let error = render(text).unwrap_err();
            assert!(error.contains(message), "{text}: {error}");
        }
        let plain = Context::of_answer(json!({}), "no JSON");
        let fault = Template::parse("{{sample.output_json.k}}").unwrap().render(&plain);
        assert_eq!(fault.unwrap_err().kind, FaultKind::SampleParse);
    }

    proptest! {
        #[test]
        fn a_text_without_braces_is_itself(text in "[^{]{0,80}") {
            prop_assert_eq!(render(&text), Ok(text));
        }

        #[test]
        fn a_value_is_never_read_as_a_template(value in ".{0,40}", key in "[a-z_]{1,8}") {
            let context = Context { item: json!({ (key.clone()): value.clone() }), sample: Value::Null };
            let template = Template::parse(&format!("<{{{{ item.{key} }}}}>")).unwrap();
            prop_assert_eq!(template.render(&context).unwrap(), format!("<{value}>"));
        }

        #[test]
        fn no_text_at_all_brings_the_reader_down(text in "[{}.\\[\\]'\"itemsample0-9 é]{0,60}") {
            let _ = render(&text);
        }
    }
}

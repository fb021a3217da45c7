//! Conversations with variables in them: what a judge is asked, and what a run asks its model.

use serde_json::{Value, json};

use super::{Context, Fault, Invalid, template::Template};

/// Messages as OpenAI's graders and runs write them, each with a role and one text.
#[derive(Debug, Clone, PartialEq)]
pub struct Messages(Vec<(String, Template)>);

impl Messages {
    /// Reads a list of messages; `param` is where it stands in the request.
    ///
    /// # Errors
    /// The first thing that is wrong, with its place.
    pub fn parse(value: &Value, param: &str) -> Result<Self, Invalid> {
        let list = value.as_array().filter(|list| !list.is_empty());
        let list = list.ok_or_else(|| Invalid::new(param, "must be a list of messages"))?;
        let mut messages = Vec::with_capacity(list.len());
        for (index, message) in list.iter().enumerate() {
            let place = format!("{param}[{index}]");
            let role = role(message).map_err(|what| Invalid::new(format!("{place}.role"), what))?;
            let text = text_of(&message["content"]);
            let template = text.and_then(|text| Template::parse(&text));
            let template =
                template.map_err(|what| Invalid::new(format!("{place}.content"), what))?;
            messages.push((role, template));
        }
        Ok(Self(messages))
    }

    /// The messages as the chat template takes them.
    ///
    /// # Errors
    /// A variable that does not exist.
    pub fn render(&self, context: &Context) -> Result<Vec<Value>, Fault> {
        let one = |(role, template): &(String, Template)| {
            Ok(json!({"role": role, "content": template.render(context)?}))
        };
        self.0.iter().map(one).collect()
    }
}

/// Messages of a row (an `item_reference`), which are taken as they are.
///
/// # Errors
/// The first thing that is wrong with them.
pub fn plain_messages(value: &Value) -> Result<Vec<Value>, String> {
    let list = value.as_array().filter(|list| !list.is_empty());
    let list = list.ok_or_else(|| "is no list of messages".to_owned())?;
    let one = |message: &Value| {
        if message["tool_calls"].is_array() && message["role"] == "assistant" {
            return Ok(message.clone());
        }
        let mut plain = message.clone();
        plain["role"] = role(message)?.into();
        plain["content"] = text_of(&message["content"])?.into();
        Ok(plain)
    };
    list.iter().map(one).collect()
}

fn role(message: &Value) -> Result<String, String> {
    match message["role"].as_str() {
        // Templates know the older name of the same thing.
        Some("developer") => Ok("system".to_owned()),
        Some(role @ ("system" | "user" | "assistant" | "tool")) => Ok(role.to_owned()),
        Some(role) => Err(format!("unknown role `{role}`")),
        None => Err("`role` is required".to_owned()),
    }
}

/// A string, an object with a text, or a list of these.
fn text_of(content: &Value) -> Result<String, String> {
    const TYPES: [&str; 3] = ["input_text", "output_text", "text"];
    match content {
        Value::String(text) => Ok(text.clone()),
        Value::Object(part) => match (part.get("type").and_then(Value::as_str), part.get("text")) {
            (Some(kind), Some(Value::String(text))) if TYPES.contains(&kind) => Ok(text.clone()),
            (Some(kind), _) if !TYPES.contains(&kind) => {
                Err(format!("parts of type `{kind}` are not supported, only text"))
            }
            _ => Err("a part needs `type` and `text`".to_owned()),
        },
        Value::Array(parts) if !parts.is_empty() => {
            let texts: Result<Vec<String>, String> = parts.iter().map(text_of).collect();
            Ok(texts?.join("\n"))
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) => {
            Err("`content` must be a string or a list of text parts".to_owned())
        }
    }
}

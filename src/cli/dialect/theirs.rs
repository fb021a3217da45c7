//! The keys and values of another trainer's file, as lenient as its own reader: numbers may be
//! strings (`1e-5` is one in YAML 1.1), `none` is null, `${NAME}` is an environment variable.
#![allow(clippy::wildcard_enum_match_arm, reason = "JSON will have no more than its six kinds")]

use std::cell::RefCell;

use serde_json::{Map, Value};

/// A file of another trainer.
pub(in crate::cli) struct Theirs {
    /// Nested keys as `outer.inner`.
    values: Map<String, Value>,
    /// What a flag has said of the objective.
    objective: Option<String>,
    /// What could not be read, each once.
    errors: RefCell<Vec<String>>,
}

impl Theirs {
    /// Flattens the maps named in `nested`.
    pub(super) fn new(file: &Map<String, Value>, nested: &[&str], objective: Option<&str>) -> Self {
        let mut values = Map::new();
        flatten("", file, nested, &mut values);
        Self { values, objective: objective.map(str::to_owned), errors: RefCell::default() }
    }

    /// Every key with its value; words for nothing are null.
    pub(super) fn entries(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.values.iter()
    }

    /// What a flag has said of the objective.
    pub(super) fn objective(&self) -> Option<&str> {
        self.objective.as_deref()
    }

    /// The value, where there is one.
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key).filter(|value| !value.is_null())
    }

    /// A number, or a string that says one.
    pub(super) fn number(&self, key: &str) -> Option<f64> {
        let value = self.get(key)?;
        let number = match value {
            Value::String(text) => text.trim().parse().ok(),
            other => other.as_f64(),
        };
        if number.is_none() {
            self.complain(format!("{key}: {value} is no number"));
        }
        number
    }

    /// Yes or no, in any of YAML's words.
    pub(super) fn flag(&self, key: &str) -> Option<bool> {
        let value = self.get(key)?;
        let flag = match value {
            Value::Bool(flag) => Some(*flag),
            Value::String(text) => match text.to_ascii_lowercase().as_str() {
                "true" | "yes" | "on" | "1" => Some(true),
                "false" | "no" | "off" | "0" => Some(false),
                _ => None,
            },
            _ => None,
        };
        if flag.is_none() {
            self.complain(format!("{key}: {value} is neither true nor false"));
        }
        flag
    }

    /// Text, with the variables of the environment filled in.
    pub(super) fn text(&self, key: &str) -> Option<String> {
        match self.get(key)? {
            Value::String(text) => match crate::cli::settings::expand(text) {
                Ok(text) => Some(text),
                Err(error) => {
                    self.complain(format!("{key}: {error}"));
                    None
                }
            },
            value @ (Value::Number(_) | Value::Bool(_)) => Some(value.to_string()),
            value => {
                self.complain(format!("{key}: {value} is no text"));
                None
            }
        }
    }

    /// A list of texts, or one text with commas.
    pub(super) fn list(&self, key: &str) -> Option<Vec<String>> {
        match self.get(key)? {
            Value::Array(list) => {
                Some(list.iter().filter_map(Value::as_str).map(str::to_owned).collect())
            }
            _ => Some(self.text(key)?.split(',').map(|name| name.trim().to_owned()).collect()),
        }
    }

    fn complain(&self, error: String) {
        let mut errors = self.errors.borrow_mut();
        if !errors.contains(&error) {
            errors.push(error);
        }
    }

    /// Everything that could not be read.
    pub(super) fn into_errors(self) -> Vec<String> {
        self.errors.into_inner()
    }
}

fn flatten(prefix: &str, map: &Map<String, Value>, nested: &[&str], into: &mut Map<String, Value>) {
    for (key, value) in map {
        let name = format!("{prefix}{key}");
        match value {
            Value::Object(inner) if nested.contains(&name.as_str()) => {
                flatten(&format!("{name}."), inner, nested, into);
            }
            Value::String(text) if ["none", "null", ""].contains(&text.to_lowercase().as_str()) => {
                into.insert(name, Value::Null);
            }
            _ => {
                into.insert(name, value.clone());
            }
        }
    }
}

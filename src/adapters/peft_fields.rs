//! The fields of adapter_config.json one by one: which are honoured, which are harmless, and how
//! each is read from JSON.
#![allow(clippy::wildcard_enum_match_arm, reason = "JSON will have no more than its six kinds")]

use std::path::Path;

use fancy_regex::Regex;
use serde_json::{Map, Value};

use super::{AdapterError, variant::VARIANTS};

/// Fields that cannot change what a loaded adapter computes.
const HARMLESS: &[&str] = &[
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
];

/// Fields read below.
const HONOURED: &[&str] = &[
    "alpha_pattern",
    "bias",
    "ensure_weight_tying",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "trainable_token_indices",
    "use_rslora",
];

/// Ways to initialise that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoftQ,
/// LoRA-GA) move a part of the base into the adapter, which is then wrong on the plain base.
const HARMLESS_INITIALISATIONS: &[&str] = &["gaussian", "eva", "orthogonal", "mica"];

/// Keys of `rank_pattern` or `alpha_pattern` that are compiled; a model of 500 layers has fewer modules.
const PATTERNS_LIMIT: usize = 4096;

/// A set of modules as PEFT writes it.
pub(super) enum Modules {
    AllLinear,
    /// A module is in it by its full path or by the end of it.
    Names(Vec<String>),
    /// A Python regular expression for the full path.
    Pattern(Regex),
}

/// Tokens of `trainable_token_indices`, and the module that they are rows of; `None`: the embedding.
pub(super) type TokenRows = (Option<String>, Vec<u32>);

/// Refuses every field that is neither honoured nor harmless nor switched off.
///
/// # Errors
/// `UnsupportedField`.
pub(super) fn refuse_unsupported(map: &Map<String, Value>) -> Result<(), AdapterError> {
    let is_off = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Bool(true) | Value::Number(_) | Value::String(_) => false,
    };
    for (field, value) in map {
        let supported = match field.as_str() {
            "peft_type" => value == "LORA",
            "bias" => value == "none" || is_off(value),
            "init_lora_weights" => match value {
                Value::String(name) => HARMLESS_INITIALISATIONS.contains(&name.as_str()),
                _ => value.is_boolean() || value.is_null(),
            },
            name => {
                let is_variant = VARIANTS.iter().any(|variant| variant.field == Some(name));
                HARMLESS.contains(&name) || HONOURED.contains(&name) || is_variant || is_off(value)
            }
        };
        if !supported {
            let (field, value) = (field.clone(), value.to_string());
            return Err(AdapterError::UnsupportedField { field, value });
        }
    }
    if !map.contains_key("peft_type") {
        let (field, value) = ("peft_type".to_owned(), "null".to_owned());
        return Err(AdapterError::UnsupportedField { field, value });
    }
    Ok(())
}

/// The object of the file, read field by field.
pub(super) struct Fields<'a> {
    pub(super) path: &'a Path,
    pub(super) map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub(super) fn get(&self, name: &str) -> &'a Value {
        self.map.get(name).unwrap_or(&Value::Null)
    }

    fn wrong(&self, name: &str, value: &Value, expected: &str) -> AdapterError {
        let detail = format!("`{name}` is {value}, expected {expected}");
        AdapterError::MalformedConfig { path: self.path.to_owned(), detail }
    }

    pub(super) fn rank(&self, name: &str, value: &Value) -> Result<Option<usize>, AdapterError> {
        if value.is_null() {
            return Ok(None);
        }
        let rank = value.as_u64().and_then(|rank| usize::try_from(rank).ok());
        let rank = rank.filter(|rank| *rank > 0);
        rank.map(Some).ok_or_else(|| self.wrong(name, value, "an integer above 0"))
    }

    pub(super) fn number(&self, name: &str, value: &Value) -> Result<Option<f64>, AdapterError> {
        if value.is_null() {
            return Ok(None);
        }
        let number = value.as_f64().filter(|number| number.is_finite());
        number.map(Some).ok_or_else(|| self.wrong(name, value, "a number"))
    }

    pub(super) fn flag(&self, name: &str) -> Result<bool, AdapterError> {
        match self.get(name) {
            Value::Null => Ok(false),
            Value::Bool(flag) => Ok(*flag),
            value => Err(self.wrong(name, value, "true or false")),
        }
    }

    fn regex(&self, name: &str, pattern: &str) -> Result<Regex, AdapterError> {
        Regex::new(pattern).map_err(|error| AdapterError::MalformedConfig {
            path: self.path.to_owned(),
            detail: format!("`{name}`: {error}"),
        })
    }

    fn strings(&self, name: &str, values: &[Value]) -> Result<Vec<String>, AdapterError> {
        let string = |value: &Value| match value.as_str() {
            Some(text) if !text.is_empty() => Ok(text.to_owned()),
            _ => Err(self.wrong(name, value, "a module name")),
        };
        values.iter().map(string).collect()
    }

    /// A list of names; empty if it is null.
    pub(super) fn names(&self, name: &str) -> Result<Vec<String>, AdapterError> {
        match self.get(name) {
            Value::Null => Ok(Vec::new()),
            Value::Array(values) => self.strings(name, values),
            value => Err(self.wrong(name, value, "a list of module names")),
        }
    }

    /// The keys of an object, in their order.
    pub(super) fn keys(&self, name: &str) -> Vec<String> {
        self.get(name).as_object().into_iter().flat_map(Map::keys).cloned().collect()
    }

    /// `trainable_token_indices`: tokens, or tokens for each of some modules.
    pub(super) fn token_rows(&self) -> Result<Vec<TokenRows>, AdapterError> {
        let name = "trainable_token_indices";
        let ids = |value: &Value| {
            let wrong = || self.wrong(name, value, "a list of tokens, each once");
            let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
            let ids: Option<Vec<u32>> =
                value.as_array().and_then(|ids| ids.iter().map(id).collect());
            let ids = ids.ok_or_else(wrong)?;
            let distinct: std::collections::HashSet<&u32> = ids.iter().collect();
            if distinct.len() == ids.len() { Ok(ids) } else { Err(wrong()) }
        };
        match self.get(name) {
            Value::Null => Ok(Vec::new()),
            Value::Array(values) if values.is_empty() => Ok(Vec::new()),
            value @ Value::Array(_) => Ok(vec![(None, ids(value)?)]),
            Value::Object(map) => {
                map.iter().map(|(key, value)| Ok((Some(key.clone()), ids(value)?))).collect()
            }
            value => Err(self.wrong(name, value, "a list of tokens or an object of lists")),
        }
    }

    pub(super) fn modules(&self, name: &str) -> Result<Option<Modules>, AdapterError> {
        match self.get(name) {
            Value::Null => Ok(None),
            Value::String(text) if text == "all-linear" => Ok(Some(Modules::AllLinear)),
            Value::String(text) => {
                Ok(Some(Modules::Pattern(self.regex(name, &format!("^(?:{text})$"))?)))
            }
            Value::Array(values) => Ok(Some(Modules::Names(self.strings(name, values)?))),
            value => Err(self.wrong(name, value, "a list of names or a regular expression")),
        }
    }

    pub(super) fn layers(&self) -> Result<Option<Vec<usize>>, AdapterError> {
        let name = "layers_to_transform";
        let layer = |value: &Value| {
            let layer = value.as_u64().and_then(|layer| usize::try_from(layer).ok());
            layer.ok_or_else(|| self.wrong(name, value, "a layer's number"))
        };
        match self.get(name) {
            Value::Null => Ok(None),
            Value::Array(values) if values.is_empty() => Ok(None),
            Value::Array(values) => values.iter().map(layer).collect::<Result<_, _>>().map(Some),
            value => Ok(Some(vec![layer(value)?])),
        }
    }

    pub(super) fn layers_patterns(&self) -> Result<Vec<Regex>, AdapterError> {
        let name = "layers_pattern";
        let names = match self.get(name) {
            Value::Null => Vec::new(),
            Value::String(text) if text.is_empty() => Vec::new(),
            Value::String(text) => vec![text.clone()],
            Value::Array(values) => self.strings(name, values)?,
            value => return Err(self.wrong(name, value, "a name or a list of names")),
        };
        names
            .iter()
            .map(|pattern| self.regex(name, &format!(r"^(?:.*?\.)?(?:{pattern})\.\d+\.")))
            .collect()
    }

    /// `rank_pattern` and `alpha_pattern`: the first key that matches the end of a module's path.
    pub(super) fn pattern<T>(
        &self,
        name: &str,
        read: impl Fn(&Self, &str, &Value) -> Result<Option<T>, AdapterError>,
    ) -> Result<Vec<(Regex, T)>, AdapterError> {
        let map = match self.get(name) {
            Value::Null => return Ok(Vec::new()),
            Value::Object(map) => map,
            value => return Err(self.wrong(name, value, "an object")),
        };
        if map.len() > PATTERNS_LIMIT {
            let detail = format!("`{name}` has {} keys, the limit is {PATTERNS_LIMIT}", map.len());
            return Err(AdapterError::MalformedConfig { path: self.path.to_owned(), detail });
        }
        let mut patterns = Vec::new();
        for (key, value) in map {
            let regex = self.regex(name, &format!(r"^(.*\.)?({key})$"))?;
            let read = read(self, &format!("{name}.{key}"), value)?;
            patterns.push((regex, read.ok_or_else(|| self.wrong(name, value, "a number"))?));
        }
        Ok(patterns)
    }
}

//! Where a command's settings come from: defaults < YAML file < `TUNESMITH_*` environment < flags.
//! In the texts of a file `${NAME}` is a variable of the environment.
#![allow(clippy::wildcard_enum_match_arm, reason = "JSON will have no more than its six kinds")]

use std::{collections::BTreeSet, path::Path};

use anyhow::Context;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

/// Puts the layers on top of each other; returns the settings and the keys that a layer has. `S` is a plain struct whose `Default` has every key and
/// which refuses unknown ones; `file` is the name and the keys of a YAML file; `flags` serializes the
/// flags under the same keys, absent ones as null or false.
///
/// # Errors
/// Names the layer and the key that cannot be used.
pub(super) fn layered<S>(
    file: Option<(&Path, Map<String, Value>)>,
    flags: &impl Serialize,
) -> anyhow::Result<(S, BTreeSet<String>)>
where
    S: Default + Serialize + DeserializeOwned,
{
    let defaults = object(&S::default())?;
    let mut settings = defaults.clone();
    let mut given = BTreeSet::new();
    let mut add = |source: &str, layer: Map<String, Value>| -> anyhow::Result<()> {
        for (key, value) in layer {
            // One key at a time, so that an error can say which.
            let alone = defaults.clone().into_iter().chain([(key.clone(), value.clone())]);
            serde_json::from_value::<S>(Value::Object(alone.collect()))
                .with_context(|| format!("{source}: {key}"))?;
            given.insert(key.clone());
            settings.insert(key, value);
        }
        Ok(())
    };
    if let Some((path, layer)) = file {
        add(&path.display().to_string(), layer)?;
    }
    add("environment", environment_layer(defaults.keys())?)?;
    add("flags", object(flags)?.into_iter().filter(|(_, value)| is_given(value)).collect())?;
    Ok((serde_json::from_value(Value::Object(settings))?, given))
}

fn object(settings: &impl Serialize) -> anyhow::Result<Map<String, Value>> {
    let value = serde_json::to_value(settings)?;
    let Value::Object(object) = value else { anyhow::bail!("settings are an object, not {value}") };
    Ok(object)
}

/// The keys of a YAML file, as they stand there.
///
/// # Errors
/// The file cannot be read or is no map of keys and values.
pub(super) fn read_yaml(path: &Path) -> anyhow::Result<Map<String, Value>> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let value: Value = serde_saphyr::from_str(&text).with_context(|| path.display().to_string())?;
    match value {
        Value::Null => Ok(Map::new()),
        Value::Object(keys) => Ok(keys),
        _ => anyhow::bail!("{}: expected keys and values, not {value}", path.display()),
    }
}

/// The keys of an own file as a layer: `batch-size` is taken for `batch_size`, and variables are
/// filled in.
///
/// # Errors
/// A variable that is not set.
pub(super) fn own_layer(keys: Map<String, Value>) -> anyhow::Result<Map<String, Value>> {
    let own = |(key, value): (String, Value)| {
        let value = match value {
            Value::String(text) => expand(&text).with_context(|| key.clone())?.into(),
            other => other,
        };
        Ok((key.replace('-', "_"), value))
    };
    keys.into_iter().map(own).collect()
}

/// `text` with every `${NAME}` replaced by that variable of the environment.
///
/// # Errors
/// A variable that is not set.
pub(super) fn expand(text: &str) -> anyhow::Result<String> {
    let mut expanded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("${") {
        let Some((name, after)) = after.split_once('}') else { break };
        expanded.push_str(before);
        let value = std::env::var(name);
        expanded.push_str(&value.with_context(|| format!("the variable {name} is not set"))?);
        rest = after;
    }
    Ok(expanded + rest)
}

/// `TUNESMITH_BATCH_SIZE` sets `batch_size`; values are read as YAML has them.
fn environment_layer<'a>(
    keys: impl Iterator<Item = &'a String>,
) -> anyhow::Result<Map<String, Value>> {
    let mut layer = Map::new();
    for key in keys {
        let name = format!("TUNESMITH_{}", key.to_uppercase());
        if let Ok(text) = std::env::var(&name) {
            let value = serde_saphyr::from_str(&text).with_context(|| name)?;
            layer.insert(key.clone(), value);
        }
    }
    Ok(layer)
}

fn is_given(flag: &Value) -> bool {
    match flag {
        Value::Null | Value::Bool(false) => false,
        Value::Array(list) => !list.is_empty(),
        Value::Bool(true) | Value::Number(_) | Value::String(_) | Value::Object(_) => true,
    }
}

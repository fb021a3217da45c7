//! Where a command's settings come from: defaults < YAML file < `TUNESMITH_*` environment < flags.

use std::path::Path;

use anyhow::Context;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

/// Puts the layers on top of each other. `S` is a plain struct whose `Default` has every key and
/// which refuses unknown ones; `flags` serializes the flags under the same keys, absent ones as
/// null or false.
///
/// # Errors
/// Names the layer and the key that cannot be used.
pub(super) fn layered<S>(file: Option<&Path>, flags: &impl Serialize) -> anyhow::Result<S>
where
    S: Default + Serialize + DeserializeOwned,
{
    let defaults = object(&S::default())?;
    let mut settings = defaults.clone();
    let mut add = |source: &str, layer: Map<String, Value>| -> anyhow::Result<()> {
        for (key, value) in layer {
            // One key at a time, so that an error can say which.
            let alone = defaults.clone().into_iter().chain([(key.clone(), value.clone())]);
            serde_json::from_value::<S>(Value::Object(alone.collect()))
                .with_context(|| format!("{source}: {key}"))?;
            settings.insert(key, value);
        }
        Ok(())
    };
    if let Some(path) = file {
        add(&path.display().to_string(), yaml_layer(path)?)?;
    }
    add("environment", environment_layer(defaults.keys())?)?;
    add("flags", object(flags)?.into_iter().filter(|(_, value)| is_given(value)).collect())?;
    Ok(serde_json::from_value(Value::Object(settings))?)
}

fn object(settings: &impl Serialize) -> anyhow::Result<Map<String, Value>> {
    let value = serde_json::to_value(settings)?;
    let Value::Object(object) = value else { anyhow::bail!("settings are an object, not {value}") };
    Ok(object)
}

/// The keys of a YAML file; `batch-size` is taken for `batch_size`.
fn yaml_layer(path: &Path) -> anyhow::Result<Map<String, Value>> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let value: Value = serde_saphyr::from_str(&text).with_context(|| path.display().to_string())?;
    if value.is_null() {
        return Ok(Map::new());
    }
    let Value::Object(keys) = value else {
        anyhow::bail!("{}: expected keys and values, not {value}", path.display())
    };
    Ok(keys.into_iter().map(|(key, value)| (key.replace('-', "_"), value)).collect())
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
    !matches!(flag, Value::Null | Value::Bool(false))
}

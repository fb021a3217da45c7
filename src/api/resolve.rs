//! From a request's `model` to the weights that answer it, once: the base model or an adapter version.

use std::{sync::Arc, time::Instant};

use super::{AppState, error::ApiError};
use crate::adapters::{AdapterError, AdapterVersion};
use crate::jobs::{JobsError, Model};
use crate::telemetry;

/// Fewest hex digits of a digest that name a version.
const MIN_DIGEST_DIGITS: usize = 12;

/// What answers to `model`: `None` is the base model. `name` is an adapter's current version;
/// `name@v3` and `name@sha256:HEX` are that version too, if it is the one they mean. A name that is
/// not loaded is looked for among jobs' models, aliases and in the adapter folder, so this may read
/// files: not for the async threads.
///
/// # Errors
/// 404 for a name that means nothing here; the reason of the refusal for an adapter that is found but
/// cannot be used. The base never stands in for an adapter.
pub(crate) fn resolve_model(
    state: &AppState,
    model: &str,
) -> Result<Option<Arc<AdapterVersion>>, ApiError> {
    if model == state.config.model_name {
        return Ok(None);
    }
    let not_found = || ApiError::ModelNotFound(model.to_owned());
    let (name, tag) = match model.split_once('@') {
        Some((name, tag)) => (name, Some(tag)),
        None => (model, None),
    };
    if name == state.config.model_name {
        return Err(not_found());
    }
    let version = match state.registry.get(name) {
        Some(version) => version,
        None => match find_elsewhere(state, name)? {
            Found::Version(version) => version,
            Found::Base if tag.is_none() => return Ok(None),
            Found::Base | Found::Nothing => return Err(not_found()),
        },
    };
    if tag.is_some_and(|tag| !names_version(tag, version.version, version.adapter.digest())) {
        return Err(not_found());
    }
    Ok(Some(version))
}

/// What a name means that is not in the registry.
enum Found {
    Base,
    Version(Arc<AdapterVersion>),
    Nothing,
}

/// Looks among the models that jobs made, their other names and the aliases, then in the adapter folder.
fn find_elsewhere(state: &AppState, name: &str) -> Result<Found, ApiError> {
    let mut name = name.to_owned();
    if let Ok(service) = state.jobs() {
        match service.find_model(&name)? {
            Some(Model::Base) => return Ok(Found::Base),
            Some(Model::Tuned(record)) => {
                return match service.load_model(&record) {
                    Ok(version) => Ok(Found::Version(version)),
                    Err(JobsError::NotFound { .. }) => Ok(Found::Nothing),
                    Err(error) => Err(error.into()),
                };
            }
            // An alias of an adapter, which may have to be loaded.
            Some(Model::Adapter(adapter)) => name = adapter,
            None => {}
        }
    }
    let version = match state.registry.get(&name) {
        Some(version) => Some(version),
        None => load_on_demand(state, &name)?,
    };
    Ok(version.map_or(Found::Nothing, Found::Version))
}

/// Loads `name` from the adapter folder. The registry lets only one of several callers do the work.
fn load_on_demand(state: &AppState, name: &str) -> Result<Option<Arc<AdapterVersion>>, ApiError> {
    if state.is_detached(name) {
        return Ok(None);
    }
    let Some(dir) = state.config.adapter_roots.find(name) else { return Ok(None) };
    let started = Instant::now();
    match state.registry.load(name, &dir, false) {
        Ok((version, _)) => {
            telemetry::adapter_loaded(started.elapsed().as_secs_f64());
            tracing::info!(adapter = name, version = version.version, "adapter loaded on demand");
            Ok(Some(version))
        }
        // Somebody else was faster.
        Err(AdapterError::AlreadyLoaded { .. }) => Ok(state.registry.get(name)),
        Err(error) => {
            telemetry::adapter_load_failed(error.reason());
            tracing::warn!(adapter = name, "adapter refused: {error}");
            Err(error.into())
        }
    }
}

fn names_version(tag: &str, version: u64, digest: &str) -> bool {
    if let Some(hex) = tag.strip_prefix("sha256:") {
        return hex.len() >= MIN_DIGEST_DIGITS && digest.starts_with(&hex.to_ascii_lowercase());
    }
    tag.strip_prefix('v').is_some_and(|number| number == version.to_string())
}

/// The value of the `x-adapter-version` header.
pub(crate) fn version_label(version: &AdapterVersion) -> String {
    format!("{}@v{};sha256:{}", version.name, version.version, version.adapter.digest())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_means_one_version_or_none() {
        let digest = "0123456789abcdef";
        for (tag, expected) in [
            ("v3", true),
            ("v4", false),
            ("v03", false),
            ("3", false),
            ("", false),
            ("sha256:0123456789ab", true),
            ("sha256:0123456789AB", true),
            ("sha256:0123456789a", false),
            ("sha256:1123456789ab", false),
            ("latest", false),
        ] {
            assert_eq!(names_version(tag, 3, digest), expected, "{tag}");
        }
    }
}

//! adapter_config.json, strictly: every field is honoured, known to be harmless, switched off, or
//! a reason to refuse. A field that changes the forward pass is never ignored.

use std::path::{Path, PathBuf};

use fancy_regex::Regex;
use serde_json::Value;

use super::{
    AdapterError,
    peft_fields::{Fields, Modules, refuse_unsupported},
    site::site_key,
};
use crate::model::Site;

/// What PEFT assumes for the supported families when `target_modules` is null.
const DEFAULT_TARGETS: [&str; 2] = ["q_proj", "v_proj"];
/// PEFT's default for `r` and `lora_alpha`.
const DEFAULT_RANK: usize = 8;

/// The fields of adapter_config.json that change the forward pass.
pub(super) struct PeftConfig {
    path: PathBuf,
    rank: usize,
    alpha: f64,
    pub(super) dropout: f64,
    pub(super) use_rslora: bool,
    targets: Modules,
    excluded: Option<Modules>,
    /// `None`: all layers.
    layers: Option<Vec<usize>>,
    layers_patterns: Vec<Regex>,
    rank_pattern: Vec<(Regex, usize)>,
    alpha_pattern: Vec<(Regex, f64)>,
}

impl PeftConfig {
    /// Parses the bytes of the file at `path`.
    ///
    /// # Errors
    /// `MalformedConfig`, `UnsupportedField`.
    pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<Self, AdapterError> {
        let value: Value = serde_json::from_slice(bytes).map_err(|error| {
            AdapterError::MalformedConfig { path: path.to_owned(), detail: error.to_string() }
        })?;
        let Value::Object(map) = value else {
            let detail = "not a JSON object".to_owned();
            return Err(AdapterError::MalformedConfig { path: path.to_owned(), detail });
        };
        refuse_unsupported(&map)?;
        let fields = Fields { path, map: &map };
        Ok(Self {
            path: path.to_owned(),
            rank: fields.rank("r", fields.get("r"))?.unwrap_or(DEFAULT_RANK),
            alpha: fields.number("lora_alpha", fields.get("lora_alpha"))?.unwrap_or(8.0),
            dropout: fields.number("lora_dropout", fields.get("lora_dropout"))?.unwrap_or(0.0),
            use_rslora: fields.flag("use_rslora")?,
            targets: fields.modules("target_modules")?.unwrap_or_else(|| {
                Modules::Names(DEFAULT_TARGETS.iter().map(ToString::to_string).collect())
            }),
            excluded: fields.modules("exclude_modules")?,
            layers: fields.layers()?,
            layers_patterns: fields.layers_patterns()?,
            rank_pattern: fields.pattern("rank_pattern", Fields::rank)?,
            alpha_pattern: fields.pattern("alpha_pattern", Fields::number)?,
        })
    }

    /// The sites, out of all of a model's, that the adapter must have tensors for.
    ///
    /// # Errors
    /// `UnsupportedTarget` for a target that matches nothing.
    pub(super) fn targeted(&self, all: &[Site]) -> Result<Vec<Site>, AdapterError> {
        if let Modules::Names(names) = &self.targets {
            for name in names {
                if !all.iter().any(|site| is_named(&site_key(*site), name)) {
                    return Err(AdapterError::UnsupportedTarget { target: name.clone() });
                }
            }
        }
        let mut sites = Vec::new();
        for site in all {
            let key = site_key(*site);
            let excluded = match &self.excluded {
                Some(modules) => self.contains(modules, &key)?,
                None => false,
            };
            if !excluded && self.contains(&self.targets, &key)? && self.has_layer(&key, *site)? {
                sites.push(*site);
            }
        }
        if sites.is_empty() {
            let target = match &self.targets {
                Modules::AllLinear => "all-linear".to_owned(),
                Modules::Names(names) => names.join(", "),
                Modules::Pattern(pattern) => pattern.as_str().to_owned(),
            };
            return Err(AdapterError::UnsupportedTarget { target });
        }
        Ok(sites)
    }

    /// Rank of the module at `key`.
    pub(super) fn rank(&self, key: &str) -> Result<usize, AdapterError> {
        Ok(self.first_match(&self.rank_pattern, key)?.unwrap_or(self.rank))
    }

    /// Alpha of the module at `key`.
    pub(super) fn alpha(&self, key: &str) -> Result<f64, AdapterError> {
        Ok(self.first_match(&self.alpha_pattern, key)?.unwrap_or(self.alpha))
    }

    fn first_match<T: Copy>(
        &self,
        patterns: &[(Regex, T)],
        key: &str,
    ) -> Result<Option<T>, AdapterError> {
        for (pattern, value) in patterns {
            if self.is_match(pattern, key)? {
                return Ok(Some(*value));
            }
        }
        Ok(None)
    }

    fn contains(&self, modules: &Modules, key: &str) -> Result<bool, AdapterError> {
        match modules {
            Modules::AllLinear => Ok(true),
            Modules::Names(names) => Ok(names.iter().any(|name| is_named(key, name))),
            Modules::Pattern(pattern) => self.is_match(pattern, key),
        }
    }

    fn has_layer(&self, key: &str, site: Site) -> Result<bool, AdapterError> {
        let Some(layers) = &self.layers else { return Ok(true) };
        let mut known_list = self.layers_patterns.is_empty();
        for pattern in &self.layers_patterns {
            known_list |= self.is_match(pattern, key)?;
        }
        Ok(known_list && layers.contains(&site.layer))
    }

    /// A pattern from a stranger may run away; the crate stops it with an error.
    fn is_match(&self, pattern: &Regex, key: &str) -> Result<bool, AdapterError> {
        pattern.is_match(key).map_err(|error| AdapterError::MalformedConfig {
            path: self.path.clone(),
            detail: format!("pattern `{}`: {error}", pattern.as_str()),
        })
    }
}

fn is_named(key: &str, name: &str) -> bool {
    key.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

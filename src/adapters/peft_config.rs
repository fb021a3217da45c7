//! adapter_config.json, strictly: every field is honoured, known to be harmless, switched off, or
//! a reason to refuse. A field that changes the forward pass is never ignored.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use fancy_regex::Regex;
use serde_json::Value;

use super::{
    AdapterError,
    peft_fields::{Fields, Modules, TokenRows, refuse_unsupported},
    site::site_key,
    tables::{self, Share, Shares, table_named},
    variant::{VARIANTS, Variant},
};
use crate::model::{ModelConfig, Site, Table};

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
    /// Keys of the patterns as they are written.
    pattern_keys: BTreeMap<&'static str, Vec<String>>,
    pub(super) variant: &'static Variant,
    modules_to_save: Vec<String>,
    ensure_weight_tying: bool,
    token_rows: Vec<TokenRows>,
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
            pattern_keys: ["rank_pattern", "alpha_pattern"]
                .map(|name| (name, fields.keys(name)))
                .into(),
            variant: variant(&fields)?,
            modules_to_save: fields.names("modules_to_save")?,
            ensure_weight_tying: fields.flag("ensure_weight_tying")?,
            token_rows: fields.token_rows()?,
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

    /// The tables that the adapter must have tensors for.
    ///
    /// # Errors
    /// `UnsupportedTarget` for a module that is no table, `MalformedConfig` for a token that the model
    /// does not have, `UnsupportedField` for a table that is asked for twice.
    pub(super) fn shares(&self, model: &ModelConfig) -> Result<Shares, AdapterError> {
        let mut shares = Shares::new();
        let table = |name: &str| {
            let unknown = || AdapterError::UnsupportedTarget { target: name.to_owned() };
            table_named(name).ok_or_else(unknown)
        };
        for name in &self.modules_to_save {
            shares.insert(table(name)?, Share::Whole);
        }
        if self.ensure_weight_tying {
            tables::tie(&mut shares, model);
        }
        for (name, ids) in &self.token_rows {
            let table = name.as_deref().map_or(Ok(Table::Embedding), table)?;
            let unknown = ids.iter().find(|id| **id as usize >= model.vocab_size);
            if let Some(id) = unknown {
                let vocabulary = model.vocab_size;
                return Err(AdapterError::MalformedConfig {
                    path: self.path.clone(),
                    detail: format!(
                        "`trainable_token_indices` has {id}, but the model's embedding has \
                         {vocabulary} rows"
                    ),
                });
            }
            if shares.insert(table, Share::Rows(ids.as_slice().into())).is_some() {
                return Err(AdapterError::UnsupportedField {
                    field: "trainable_token_indices".to_owned(),
                    value: format!("{name:?} beside `modules_to_save`"),
                });
            }
        }
        if self.ensure_weight_tying && model.tie_word_embeddings {
            let rows = [Table::Embedding, Table::Head].map(|table| shares.get(&table));
            if let [Some(Share::Rows(embedding)), Some(Share::Rows(head))] = rows
                && embedding != head
            {
                return Err(AdapterError::UnsupportedField {
                    field: "ensure_weight_tying".to_owned(),
                    value: "true with other tokens of the head than of the embedding".to_owned(),
                });
            }
        }
        // PEFT has one set of rows where the base has one matrix.
        let (embedding, head) = (shares.get(&Table::Embedding), shares.get(&Table::Head));
        if model.tie_word_embeddings && embedding == head && matches!(head, Some(Share::Rows(_))) {
            shares.remove(&Table::Head);
        }
        Ok(shares)
    }

    /// The first key of a pattern that matches none of `all`.
    ///
    /// # Errors
    /// `MalformedConfig` for a pattern that runs away.
    pub(super) fn unused_key(
        &self,
        field: &str,
        all: &[Site],
    ) -> Result<Option<String>, AdapterError> {
        let patterns: Vec<&Regex> = match field {
            "rank_pattern" => self.rank_pattern.iter().map(|(pattern, _)| pattern).collect(),
            _ => self.alpha_pattern.iter().map(|(pattern, _)| pattern).collect(),
        };
        let keys = self.pattern_keys.get(field).into_iter().flatten();
        for (pattern, key) in patterns.into_iter().zip(keys) {
            let mut is_used = false;
            for site in all {
                is_used |= self.is_match(pattern, &site_key(*site))?;
            }
            if !is_used {
                return Ok(Some(key.clone()));
            }
        }
        Ok(None)
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

/// The variant whose field is true.
fn variant(fields: &Fields<'_>) -> Result<&'static Variant, AdapterError> {
    let mut chosen = &VARIANTS[0];
    for variant in VARIANTS {
        let Some(field) = variant.field else { continue };
        if fields.flag(field)? {
            if let Some(other) = chosen.field {
                let (field, value) = (field.to_owned(), format!("true beside `{other}`"));
                return Err(AdapterError::UnsupportedField { field, value });
            }
            chosen = variant;
        }
    }
    Ok(chosen)
}

/// Whether `name` is the module's path or the end of it.
pub(super) fn is_named(key: &str, name: &str) -> bool {
    key.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

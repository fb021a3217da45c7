//! What a fresh adapter looks like, and where each of its modules gets its rank and alpha from.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use serde_json::{Map, Value, json};

use super::{
    AdapterError, LoraAdapter,
    peft_config::{PeftConfig, is_named},
    site::{all_sites, site_key},
    variant,
};
use crate::model::{ModelConfig, Projection, Site};

/// What a fresh adapter looks like.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// Rows of A and columns of B, above 0.
    pub rank: usize,
    /// Numerator of the scale.
    pub alpha: f64,
    /// Probability with which an element of a projection's input is dropped, in [0, 1).
    pub dropout: f64,
    /// The adapted projections.
    pub targets: Vec<Projection>,
    /// Scale `alpha / sqrt(rank)` instead of `alpha / rank`.
    pub use_rslora: bool,
    /// How A and B change a projection: "lora" or "dora".
    pub variant: String,
    /// Ranks of modules whose path a key matches, as in PEFT: the first key that, as a regular
    /// expression, matches the end of the path.
    pub rank_pattern: Map<String, Value>,
    /// Alphas, likewise.
    pub alpha_pattern: Map<String, Value>,
    /// The adapted layers; all if empty.
    pub layers: Vec<usize>,
    /// Modules that are not adapted, by the end of their path.
    pub exclude: Vec<String>,
    /// Tables that are trained whole: "embed_tokens", "lm_head".
    pub modules_to_save: Vec<String>,
    /// Where the base has one matrix for embedding and head, keep it one when a table is trained whole.
    pub ensure_weight_tying: bool,
    /// Tokens whose row of the embedding is trained, and of the head.
    pub token_ids: Vec<u32>,
    /// Of these, tokens whose rows start as the mean of others' rows instead of their own.
    pub token_starts: BTreeMap<u32, Vec<u32>>,
}

impl Default for LoraConfig {
    /// Rank 16 on all projections of all layers, scaled by 2.
    fn default() -> Self {
        Self {
            rank: 16,
            alpha: 32.0,
            dropout: 0.0,
            targets: Projection::ALL.to_vec(),
            use_rslora: false,
            variant: "lora".to_owned(),
            rank_pattern: Map::new(),
            alpha_pattern: Map::new(),
            layers: Vec::new(),
            exclude: Vec::new(),
            modules_to_save: Vec::new(),
            ensure_weight_tying: false,
            token_ids: Vec::new(),
            token_starts: BTreeMap::new(),
        }
    }
}

/// A module that is to be made.
pub(super) struct Planned {
    pub(super) site: Site,
    pub(super) rank: usize,
    pub(super) alpha: f64,
}

impl LoraConfig {
    /// Every module, in the order of the forward pass.
    ///
    /// # Errors
    /// `InvalidSetting`, `MalformedConfig` for a pattern that is none, `UnsupportedTarget`.
    pub(super) fn plan(&self, model: &ModelConfig) -> Result<Vec<Planned>, AdapterError> {
        self.check(model)?;
        let settings = Path::new("the adapter's settings");
        let peft = PeftConfig::parse(settings, self.as_peft().to_string().as_bytes())?;
        for (field, pattern) in
            [("rank_pattern", &self.rank_pattern), ("alpha_pattern", &self.alpha_pattern)]
        {
            if let Some(key) = peft.unused_key(field, &all_sites(model))? {
                let value = format!("{{{key:?}: {}}}", pattern[&key]);
                let expected = "every key to match a module's path, such as q_proj or \
                                layers.0.mlp.down_proj";
                return Err(AdapterError::InvalidSetting { field, value, expected });
            }
        }
        let sites = peft.targeted(&all_sites(model))?;
        let planned = |site: Site| {
            let key = site_key(site);
            Ok(Planned { site, rank: peft.rank(&key)?, alpha: peft.alpha(&key)? })
        };
        sites.into_iter().map(planned).collect()
    }

    /// As adapter_config.json has it, so that it means what it means in PEFT.
    fn as_peft(&self) -> Value {
        let targets: Vec<&str> = self.targets.iter().map(|target| target.name()).collect();
        json!({
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": targets,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
            "layers_to_transform": self.layers,
            "exclude_modules": if self.exclude.is_empty() { Value::Null } else { json!(self.exclude) },
        })
    }

    fn check(&self, model: &ModelConfig) -> Result<(), AdapterError> {
        let wrong =
            |field, value, expected| Err(AdapterError::InvalidSetting { field, value, expected });
        if self.rank == 0 {
            return wrong("rank", self.rank.to_string(), "above 0");
        }
        if !self.alpha.is_finite() {
            return wrong("alpha", self.alpha.to_string(), "a finite number");
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return wrong("dropout", self.dropout.to_string(), "at least 0 and below 1");
        }
        if self.targets.is_empty() {
            return wrong("targets", "[]".to_owned(), "at least one projection");
        }
        if variant::find(&self.variant).is_none() {
            return wrong("variant", self.variant.clone(), "lora or dora");
        }
        let is_name =
            |name: &&String| all_sites(model).iter().any(|site| is_named(&site_key(*site), name));
        if let Some(name) = self.exclude.iter().find(|name| !is_name(name)) {
            return wrong(
                "exclude",
                name.clone(),
                "a module, such as q_proj or layers.0.mlp.up_proj",
            );
        }
        if let Some(layer) = self.layers.iter().find(|layer| **layer >= model.num_layers) {
            return wrong("layers", layer.to_string(), "a layer of the model, counted from 0");
        }
        let pieces = self.token_starts.values().flatten();
        if let Some(id) =
            self.token_ids.iter().chain(pieces).find(|id| **id as usize >= model.vocab_size)
        {
            return wrong("token_ids", id.to_string(), "a token with a row in the embedding");
        }
        Ok(())
    }
}

impl LoraAdapter {
    /// Checks that an adapter that is to be trained on is the one that `wanted` describes, as far as
    /// `wanted` differs from `defaults` or somebody has asked for it: `given` has the names of the settings
    /// of a run, such as `rank`. What was left as it is by default is the adapter's.
    ///
    /// # Errors
    /// `OtherSetting` with both values.
    pub fn check_continues(
        &self,
        wanted: &LoraConfig,
        defaults: &LoraConfig,
        given: &BTreeSet<String>,
    ) -> Result<(), AdapterError> {
        let differs = |field, has: String, wants: String| {
            Err(AdapterError::OtherSetting { field, has, wants })
        };
        let modules = || self.modules().iter();
        let given = |field| given.contains(field);
        if (given("rank") || wanted.rank != defaults.rank)
            && let Some((_, module)) = modules().find(|(_, module)| module.rank() != wanted.rank)
        {
            return differs("rank", module.rank().to_string(), wanted.rank.to_string());
        }
        if (given("alpha") || wanted.alpha != defaults.alpha)
            && let Some((_, module)) = modules().find(|(_, module)| module.alpha != wanted.alpha)
        {
            return differs("alpha", module.alpha.to_string(), wanted.alpha.to_string());
        }
        if (given("rslora") || wanted.use_rslora) && wanted.use_rslora != self.use_rslora {
            let (has, wants) = (self.use_rslora.to_string(), wanted.use_rslora.to_string());
            return differs("rslora", has, wants);
        }
        if (given("variant") || wanted.variant != defaults.variant)
            && wanted.variant != self.variant.name
        {
            return differs("variant", self.variant.name.to_owned(), wanted.variant.clone());
        }
        if given("targets") || wanted.targets != defaults.targets {
            let names = |has: &dyn Fn(&Projection) -> bool| {
                let named = Projection::ALL.iter().filter(|projection| has(projection));
                named.map(|projection| projection.name()).collect::<Vec<_>>().join(", ")
            };
            let has = names(&|of| modules().any(|(site, _)| site.projection == *of));
            let wants = names(&|of| wanted.targets.contains(of));
            if has != wants {
                return differs("targets", has, wants);
            }
        }
        let [rows, whole] = self.tables().described();
        let wants_rows = ids(&wanted.token_ids);
        if !wanted.token_ids.is_empty() && wants_rows != rows {
            return differs("train_tokens", rows, wants_rows);
        }
        if (given("ensure_weight_tying") || wanted.ensure_weight_tying)
            && wanted.ensure_weight_tying != self.tables().is_tied()
        {
            let (has, wants) = (self.tables().is_tied(), wanted.ensure_weight_tying);
            return differs("ensure_weight_tying", has.to_string(), wants.to_string());
        }
        let wants_whole = wanted.modules_to_save.join(", ");
        if !wanted.modules_to_save.is_empty() && wants_whole != whole {
            return differs("modules_to_save", whole, wants_whole);
        }
        Ok(())
    }
}

/// Tokens as text, in order.
fn ids(ids: &[u32]) -> String {
    let ids: BTreeSet<&u32> = ids.iter().collect();
    ids.into_iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

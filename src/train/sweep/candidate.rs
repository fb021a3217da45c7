//! The candidates of a sweep: every combination of its values, each with a run of its own.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::{SweepRow, sweep_dir};
use crate::train::{TrainConfig, TrainError, TrainSummary, trainer::Position};

/// Settings that leave batches and their order alone.
const KEYS: &[&str] = &[
    "lr",
    "rank",
    "alpha",
    "dropout",
    "targets",
    "rslora",
    "schedule",
    "warmup_steps",
    "warmup_ratio",
    "grad_clip",
    "weight_decay",
    "beta1",
    "beta2",
    "dpo_beta",
    "dpo_loss",
    "dpo_label_smoothing",
    "dpo_sft_weight",
    "orpo_beta",
    "label_smoothing",
    "neftune_alpha",
];
const MAX_CANDIDATES: usize = 64;
const KEYS_ALLOWED: &str = "a setting that leaves the batches alone, such as lr, rank, alpha, dropout, targets, schedule, warmup_ratio or weight_decay";

/// A candidate on its way.
pub(super) struct Candidate {
    pub(super) config: TrainConfig,
    pub(super) row: SweepRow,
    pub(super) summary: Option<TrainSummary>,
}

pub(super) const UNFINISHED: &str = "unfinished";

impl Candidate {
    /// `config` with `settings` in place of its own.
    fn new(config: &TrainConfig, settings: Map<String, Value>) -> Result<Self, TrainError> {
        let Value::Object(mut all) =
            serde_json::to_value(config).expect("a plain struct is always JSON")
        else {
            unreachable!("a struct is a JSON object")
        };
        all.extend(settings.clone());
        let own: TrainConfig = serde_json::from_value(Value::Object(all))
            .map_err(|error| wrong("sweep", &error.to_string(), "values that the keys can have"))?;
        let name = name(&settings);
        let given = config.given.iter().chain(settings.keys()).cloned().collect();
        let own = TrainConfig {
            given,
            output: sweep_dir(&config.output).join(&name),
            sweep: BTreeMap::new(),
            sweep_halving: false,
            // Wherever it is, it goes on from there.
            resume: true,
            overwrite: false,
            ..own
        };
        own.validate()?;
        let (step, loss, token_accuracy, error) = (None, None, None, None);
        let row =
            SweepRow { name, settings, status: UNFINISHED, step, loss, token_accuracy, error };
        Ok(Self { config: own, row, summary: None })
    }

    /// Takes in where its run is. Returns the summary of a sweep that is asked to stop.
    pub(super) fn arrive(
        &mut self,
        position: Result<Position, TrainError>,
    ) -> Result<Option<TrainSummary>, TrainError> {
        let standing = match position {
            Ok(Position::Stopped(summary)) => return Ok(Some(summary)),
            Ok(Position::Waiting(standing)) => standing,
            Ok(Position::Published(summary, standing)) => {
                self.summary = Some(summary);
                standing
            }
            // Too high a rate for this one says nothing of the others.
            Err(
                error @ (TrainError::NotFinite { .. }
                | TrainError::NoSlope { .. }
                | TrainError::LossSpike { .. }),
            ) => {
                self.row.status = "failed";
                self.row.error = Some(error.to_string());
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        self.row.step = standing.map(|standing| standing.step);
        self.row.loss = standing.map(|standing| standing.loss);
        self.row.token_accuracy = standing.map(|standing| standing.token_accuracy);
        Ok(None)
    }
}

/// What the candidates of `config`'s sweep are trained with; one if there is no sweep.
///
/// # Errors
/// Keys that cannot be swept, and values that they cannot have.
pub fn candidate_settings(config: &TrainConfig) -> Result<Vec<TrainConfig>, TrainError> {
    Ok(candidates(config)?.into_iter().map(|candidate| candidate.config).collect())
}

/// Every combination of the swept values, the first key changing slowest.
pub(super) fn candidates(config: &TrainConfig) -> Result<Vec<Candidate>, TrainError> {
    let mut combinations: Vec<Map<String, Value>> = vec![Map::new()];
    for (key, values) in &config.sweep {
        if !KEYS.contains(&key.as_str()) {
            return Err(wrong("sweep", key, KEYS_ALLOWED));
        }
        if values.is_empty() {
            return Err(wrong("sweep", key, "a key with at least one value"));
        }
        let with = |before: &Map<String, Value>, value: &Value| {
            let mut settings = before.clone();
            settings.insert(key.clone(), value.clone());
            settings
        };
        combinations = (combinations.iter())
            .flat_map(|before| values.iter().map(move |value| with(before, value)))
            .collect();
        if combinations.len() > MAX_CANDIDATES {
            return Err(wrong("sweep", &combinations.len(), "at most 64 candidates"));
        }
    }
    let mut candidates: Vec<Candidate> = Vec::new();
    for settings in combinations {
        let candidate = Candidate::new(config, settings)?;
        if candidates.iter().any(|other| other.row.name == candidate.row.name) {
            return Err(wrong("sweep", &candidate.row.name, "named once: its values are repeated"));
        }
        candidates.push(candidate);
    }
    Ok(candidates)
}

/// A folder's name: `lr-0.0001_rank-8`.
fn name(settings: &Map<String, Value>) -> String {
    let part = |(key, value): (&String, &Value)| {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let plain = |c: char| if c.is_ascii_alphanumeric() || ".+-".contains(c) { c } else { '.' };
        format!("{key}-{}", value.chars().map(plain).collect::<String>())
    };
    settings.iter().map(part).collect::<Vec<_>>().join("_")
}

pub(super) fn wrong(
    key: &'static str,
    value: &dyn std::fmt::Debug,
    allowed: &'static str,
) -> TrainError {
    TrainError::Config { key, value: format!("{value:?}"), allowed }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn candidates_are_all_combinations_and_wrong_keys_are_named() {
        let sweep = |keys: Value| TrainConfig {
            model: "m".to_owned(),
            data: "d".into(),
            output: "out/a".into(),
            sweep: serde_json::from_value(keys).unwrap(),
            ..TrainConfig::default()
        };
        let names = |keys: Value| -> Vec<String> {
            let all = candidates(&sweep(keys)).unwrap();
            all.into_iter().map(|candidate| candidate.row.name).collect()
        };
        assert_eq!(
            names(json!({"lr": [1e-4, 2e-4], "rank": [8, 16]})),
            ["lr-0.0001_rank-8", "lr-0.0001_rank-16", "lr-0.0002_rank-8", "lr-0.0002_rank-16"]
        );
        assert_eq!(names(json!({"targets": ["q_proj,v_proj"]})), ["targets-q.proj.v.proj"]);
        for (keys, wanted) in [
            (json!({"batch_size": [1, 2]}), "batch_size"),
            (json!({"lr": []}), "lr"),
            (json!({"rank": ["many"]}), "invalid"),
            (json!({"rank": [0]}), "rank"),
            (json!({"rank": [8, 8]}), "rank-8"),
        ] {
            let error = candidates(&sweep(keys)).err().unwrap().to_string();
            assert!(error.contains(wanted), "{error}");
        }
    }
}

//! Several adapters over one base: every combination of some settings, trained on the same batches in the
//! same order and compared by their validation loss.
//!
//! The base is loaded once and the rows are encoded once; the arithmetic of a candidate is that of a run of
//! its own, so halving is what makes a sweep cheap: after a half, a quarter, ... of the way only the better
//! half goes on, and of n candidates log2(n) / 2 + 1 runs' steps are made instead of n.
//!
//! A candidate is an ordinary run into `<output>.sweep/<name>`, which goes on from its checkpoint whenever
//! its turn comes. Who is left behind follows from the validation losses in the candidates' own logs, so a
//! sweep that was killed needs no memory of its own.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
};

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{
    Base, Outcome, Surroundings, TrainConfig, TrainError, TrainEvent, TrainJob, TrainSummary,
    output,
    trainer::{Position, Turn, total_steps_of},
};
use crate::publish::{disk, publish_dir, publish_file};

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

/// The folder of the candidates of the sweep that publishes `output`.
#[must_use]
pub fn sweep_dir(output: &Path) -> PathBuf {
    let mut name = output.file_name().unwrap_or_default().to_os_string();
    name.push(".sweep");
    output.with_file_name(name)
}

/// What a candidate came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SweepRow {
    /// Its folder in [`sweep_dir`].
    pub name: String,
    /// The settings that are its own.
    pub settings: Map<String, Value>,
    /// "published" (the best), "finished", "eliminated", "failed" or "unfinished".
    pub status: &'static str,
    /// Steps before the validation that counts.
    pub step: Option<usize>,
    /// Its loss.
    pub loss: Option<f64>,
    /// Share of trained tokens (or pairs) that were right there.
    pub token_accuracy: Option<f64>,
    /// Why it has failed.
    pub error: Option<String>,
}

impl SweepRow {
    /// All candidates as text, a line each.
    #[must_use]
    pub fn table(rows: &[Self]) -> String {
        table_text(rows)
    }
}

/// What a sweep leaves behind.
#[derive(Debug, Clone, PartialEq)]
pub struct SweepSummary {
    /// Of the best candidate, published as the output; or of the candidate that was asked to stop.
    pub summary: TrainSummary,
    /// Every candidate, best first.
    pub rows: Vec<SweepRow>,
}

/// A candidate on its way.
struct Candidate {
    config: TrainConfig,
    row: SweepRow,
    summary: Option<TrainSummary>,
}

/// Trains every candidate of `job` and publishes the best as its output, with all of them in
/// [`sweep_dir`] and a table of them beside both (`sweep.json`, `sweep.txt`).
///
/// # Errors
/// Every [`TrainError`]; a loss that is not a number only ends the candidate's own run, unless it is the
/// last.
pub fn run_sweep(
    mut job: TrainJob,
    observer: &mut dyn FnMut(&TrainEvent),
    mut surroundings: Surroundings<'_>,
    stop: &AtomicBool,
) -> Result<SweepSummary, TrainError> {
    job.config.validate()?;
    if job.valid.is_empty() {
        return Err(wrong("sweep", &"set", "unset without validation rows (valid)"));
    }
    let config = job.config.clone();
    let mut candidates = candidates(&config)?;
    if let Some(summary) = prepare(&config)? {
        return Ok(SweepSummary { summary, rows: Vec::new() });
    }
    let base = Base::load(&job)?;
    let total_steps = total_steps_of(&job);
    for (until, keep) in
        rungs(candidates.len(), total_steps, config.eval_every, config.sweep_halving)
    {
        for index in 0..candidates.len() {
            let candidate = &mut candidates[index];
            if candidate.row.status != UNFINISHED {
                continue;
            }
            job.config = candidate.config.clone();
            observer(&TrainEvent::Candidate { name: candidate.row.name.clone(), until });
            let surroundings = surroundings.lend();
            let turn = Turn { job: &job, base: &base, observer, surroundings, stop };
            let position = turn.advance(until);
            if let Some(summary) = candidate.arrive(position)? {
                let rows = candidates.into_iter().map(|candidate| candidate.row).collect();
                return Ok(SweepSummary { summary, rows });
            }
        }
        for index in left_behind(&candidates, keep) {
            let candidate = &mut candidates[index];
            let SweepRow { name, loss, .. } = &candidate.row;
            observer(&TrainEvent::Eliminated { name: name.clone(), step: until, loss: *loss });
            job.config = TrainConfig { samples: 0, ..candidate.config.clone() };
            let surroundings = surroundings.lend();
            let turn = Turn { job: &job, base: &base, observer, surroundings, stop };
            turn.finish(Outcome::Eliminated)?;
            candidate.row.status = "eliminated";
        }
    }
    publish_best(&config, candidates)
}

const UNFINISHED: &str = "unfinished";

impl Candidate {
    /// Takes in where its run is. Returns the summary of a sweep that is asked to stop.
    fn arrive(
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

/// Those of the candidates that are still on their way, beyond the best `keep`. One that is published
/// already counts as well: it was left behind here before the process was killed, or has ended by itself.
fn left_behind(candidates: &[Candidate], keep: usize) -> Vec<usize> {
    let on_their_way = |index: &usize| candidates[*index].row.status == UNFINISHED;
    let mut ranked: Vec<usize> = (0..candidates.len()).filter(on_their_way).collect();
    let loss = |index: &usize| candidates[*index].row.loss.unwrap_or(f64::INFINITY);
    // Stable: of equal ones the first stays.
    ranked.sort_by(|one, other| loss(one).total_cmp(&loss(other)));
    ranked.into_iter().skip(keep).collect()
}

/// After how many steps how many candidates go on; the last goes to the end.
fn rungs(
    num_candidates: usize,
    total: usize,
    eval_every: usize,
    halving: bool,
) -> Vec<(usize, usize)> {
    let mut rungs: Vec<(usize, usize)> = Vec::new();
    let num_halvings =
        if halving { num_candidates.next_power_of_two().trailing_zeros() } else { 0 };
    for round in 1..=num_halvings {
        // Where a validation would be in any case.
        let step = (total >> (num_halvings - round + 1)).max(1);
        let step = if eval_every > 0 { step.next_multiple_of(eval_every) } else { step };
        let keep = num_candidates.div_ceil(1 << round);
        match rungs.last_mut() {
            _ if step >= total => {}
            Some(last) if last.0 >= step => last.1 = keep,
            _ => rungs.push((step, keep)),
        }
    }
    rungs.push((total, num_candidates));
    rungs
}

/// What the candidates of `config`'s sweep are trained with; one if there is no sweep.
///
/// # Errors
/// Keys that cannot be swept, and values that they cannot have.
pub fn candidate_settings(config: &TrainConfig) -> Result<Vec<TrainConfig>, TrainError> {
    Ok(candidates(config)?.into_iter().map(|candidate| candidate.config).collect())
}

/// Every combination of the swept values, the first key changing slowest.
fn candidates(config: &TrainConfig) -> Result<Vec<Candidate>, TrainError> {
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

impl Candidate {
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

/// Refuses to touch what nobody said may go. Returns the summary of a sweep that has nothing to do.
fn prepare(config: &TrainConfig) -> Result<Option<TrainSummary>, TrainError> {
    let dir = sweep_dir(&config.output);
    output::refuse_foreign(config)?;
    if config.output.exists() && !config.overwrite {
        let finished = config.resume.then(|| output::read_summary(&config.output)).flatten();
        return finished.map(Some).ok_or_else(|| TrainError::OutputExists(config.output.clone()));
    }
    if dir.exists() && !config.resume {
        if !config.overwrite {
            return Err(TrainError::Unfinished(dir));
        }
        disk::remove_dir_all(&dir)?;
    }
    disk::create_dir_all(&dir)?;
    Ok(None)
}

/// Copies the best candidate to the output, with the table.
fn publish_best(
    config: &TrainConfig,
    mut candidates: Vec<Candidate>,
) -> Result<SweepSummary, TrainError> {
    let rank = |candidate: &Candidate| {
        // Those that went all the way come first.
        let loss = candidate.row.loss.unwrap_or(f64::INFINITY);
        (usize::from(candidate.row.status != UNFINISHED), loss)
    };
    candidates.sort_by(|one, other| {
        let (one, other) = (rank(one), rank(other));
        one.0.cmp(&other.0).then(one.1.total_cmp(&other.1))
    });
    let Some(mut summary) = candidates.first().and_then(|best| best.summary.clone()) else {
        let reason = candidates.into_iter().find_map(|candidate| candidate.row.error);
        let reason = reason.unwrap_or_else(|| "no candidate was published".to_owned());
        return Err(TrainError::Sweep { reason });
    };
    for (index, candidate) in candidates.iter_mut().enumerate() {
        if candidate.row.status == UNFINISHED {
            candidate.row.status = if index == 0 { "published" } else { "finished" };
        }
    }
    let rows: Vec<SweepRow> = candidates.into_iter().map(|candidate| candidate.row).collect();
    let dir = sweep_dir(&config.output);
    let (json, text) = (table_json(&rows), table_text(&rows));
    publish_file(&dir.join(JSON_FILE), json.as_bytes())?;
    publish_file(&dir.join(TEXT_FILE), text.as_bytes())?;
    let winner = summary.path.clone();
    publish_dir(&config.output, |folder| -> Result<(), TrainError> {
        for entry in fs::read_dir(&winner)? {
            let path = entry?.path();
            disk::copy(&path, &folder.join(path.file_name().unwrap_or_default()))?;
        }
        disk::write(&folder.join(JSON_FILE), &json)?;
        disk::write(&folder.join(TEXT_FILE), &text)?;
        add_to_report(&folder.join("report.html"), &rows)
    })?;
    summary.path.clone_from(&config.output);
    Ok(SweepSummary { summary, rows })
}

const JSON_FILE: &str = "sweep.json";
const TEXT_FILE: &str = "sweep.txt";

fn table_json(rows: &[SweepRow]) -> String {
    let table = json!({ "candidates": rows });
    serde_json::to_string_pretty(&table).expect("plain data is always JSON") + "\n"
}

const HEADINGS: [&str; 5] = ["candidate", "valid loss", "accuracy", "after step", "outcome"];

fn cells(row: &SweepRow) -> [String; 5] {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    [
        row.name.clone(),
        or_dash(row.loss.map(|loss| format!("{loss:.4}"))),
        or_dash(row.token_accuracy.map(|share| format!("{:.1} %", share * 100.0))),
        or_dash(row.step.map(|step| step.to_string())),
        row.error.clone().unwrap_or_else(|| row.status.to_owned()),
    ]
}

/// Columns of even width.
fn table_text(rows: &[SweepRow]) -> String {
    let mut lines = vec![HEADINGS.map(str::to_owned)];
    lines.extend(rows.iter().map(cells));
    let width = |column: usize| lines.iter().map(|line| line[column].len()).max().unwrap_or(0);
    let widths = [0, 1, 2, 3, 4].map(width);
    let line = |line: &[String; 5]| {
        let padded = line.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    lines.iter().map(line).collect()
}

/// Puts the table at the end of a report, if there is one.
fn add_to_report(path: &Path, rows: &[SweepRow]) -> Result<(), TrainError> {
    let Ok(page) = fs::read_to_string(path) else { return Ok(()) };
    let cell = |tag: &str, text: &str| {
        let text = text.replace('&', "&amp;").replace('<', "&lt;");
        format!("<{tag}>{text}</{tag}>")
    };
    let line = |tag: &str, line: &[String]| {
        format!("<tr>{}</tr>\n", line.iter().map(|text| cell(tag, text)).collect::<String>())
    };
    let mut table = "<h2>Sweep</h2>\n<div class=\"scroll\"><table class=\"answers\">\n".to_owned();
    table += &line("th", &HEADINGS.map(str::to_owned));
    table.extend(rows.iter().map(|row| line("td", &cells(row))));
    table += "</table></div>\n</main>";
    Ok(disk::write(path, page.replacen("</main>", &table, 1))?)
}

fn wrong(key: &'static str, value: &dyn std::fmt::Debug, allowed: &'static str) -> TrainError {
    TrainError::Config { key, value: format!("{value:?}"), allowed }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halving_leaves_half_behind_at_validations_and_costs_little_more_than_one_run() {
        assert_eq!(rungs(4, 100, 0, false), [(100, 4)]);
        assert_eq!(rungs(4, 100, 0, true), [(25, 2), (50, 1), (100, 4)]);
        assert_eq!(rungs(5, 80, 0, true), [(10, 3), (20, 2), (40, 1), (80, 5)]);
        assert_eq!(rungs(4, 100, 30, true), [(30, 2), (60, 1), (100, 4)]);
        // Two halvings at the same validation are one.
        assert_eq!(rungs(4, 100, 50, true), [(50, 1), (100, 4)]);
        assert_eq!(rungs(4, 100, 100, true), [(100, 4)]);
        assert_eq!(rungs(1, 100, 0, true), [(100, 1)]);
        for n in 1..40_usize {
            let (mut steps, mut alive, mut before) = (0, n, 0);
            for (until, keep) in rungs(n, 1024, 0, true) {
                assert!(until > before && keep >= 1);
                steps += alive * (until - before);
                (alive, before) = (alive.min(keep), until);
            }
            let halvings = n.next_power_of_two().trailing_zeros() as usize;
            assert!(steps <= 1024 + 512 * halvings + n, "{n} candidates take {steps} steps");
        }
    }

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

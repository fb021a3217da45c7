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

mod candidate;
mod table;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
};

use super::{
    Base, Outcome, Surroundings, TrainConfig, TrainError, TrainEvent, TrainJob, TrainSummary,
    output,
    trainer::{Turn, total_steps_of},
};
use crate::publish::{disk, publish_dir, publish_file};
use candidate::{Candidate, UNFINISHED, candidates, wrong};
use table::{JSON_FILE, TEXT_FILE, add_to_report, table_json, table_text};

pub use candidate::candidate_settings;
pub use table::SweepRow;

/// The folder of the candidates of the sweep that publishes `output`.
#[must_use]
pub fn sweep_dir(output: &Path) -> PathBuf {
    let mut name = output.file_name().unwrap_or_default().to_os_string();
    name.push(".sweep");
    output.with_file_name(name)
}

/// What a sweep leaves behind.
#[derive(Debug, Clone, PartialEq)]
pub struct SweepSummary {
    /// Of the best candidate, published as the output; or of the candidate that was asked to stop.
    pub summary: TrainSummary,
    /// Every candidate, best first.
    pub rows: Vec<SweepRow>,
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
}

//! Runs in this process, and rows for them, that several files of tests share.

use std::sync::atomic::{AtomicBool, Ordering};

use tunesmith::{
    data::Example,
    train::{TrainConfig, TrainError, TrainEvent, TrainJob, TrainSummary, run},
};

/// Rows that repeat a short pattern, of differing lengths; the second half is trained.
pub(crate) fn patterns(count: usize, first_token: u32) -> Vec<Example> {
    let example = |index: usize| {
        let length = 8 + index * 5 % 17;
        let token = |at: usize| first_token + (index % 5 * 3 + at % 4) as u32;
        let loss_mask = (0..length).map(|at| at >= length / 2).collect();
        row(index, (0..length).map(token).collect(), loss_mask)
    };
    (0..count).map(example).collect()
}

/// Row `index` of a file.
pub(crate) fn row(index: usize, tokens: Vec<u32>, loss_mask: Vec<bool>) -> Example {
    Example { line: index + 1, tokens, loss_mask, num_truncated: 0, rejected: None }
}

/// A run over rows that come from no file.
pub(crate) fn job(config: TrainConfig, train: Vec<Example>, valid: Vec<Example>) -> TrainJob {
    let model_dir = config.model.clone().into();
    TrainJob { config, model_dir, train, valid, sources: Vec::new(), companions: Vec::new() }
}

/// Runs to the end, or until after the event for which `stop_at` is true.
pub(crate) fn run_until(
    job: &TrainJob,
    stop_at: impl Fn(&TrainEvent) -> bool,
) -> Result<(TrainSummary, Vec<TrainEvent>), TrainError> {
    let stop = AtomicBool::new(false);
    let mut events = Vec::new();
    let mut observer = |event: &TrainEvent| {
        events.push(event.clone());
        if stop_at(event) {
            stop.store(true, Ordering::Relaxed);
        }
    };
    let summary = run(job, &mut observer, &stop)?;
    Ok((summary, events))
}

/// Runs to the end.
pub(crate) fn run_to_end(job: &TrainJob) -> (TrainSummary, Vec<TrainEvent>) {
    run_until(job, |_| false).unwrap()
}

/// Runs until so many steps are made.
pub(crate) fn run_for(job: &TrainJob, steps: usize) -> TrainSummary {
    run_until(job, |event| is_step(event, steps)).unwrap().0
}

/// Whether this is the event of step `wanted`.
pub(crate) fn is_step(event: &TrainEvent, wanted: usize) -> bool {
    matches!(event, TrainEvent::Step { step, .. } if *step == wanted)
}

/// Step and loss of every step.
pub(crate) fn losses(events: &[TrainEvent]) -> Vec<(usize, f64)> {
    let loss = |event: &TrainEvent| {
        let TrainEvent::Step { step, loss, .. } = event else { return None };
        Some((*step, *loss))
    };
    events.iter().filter_map(loss).collect()
}

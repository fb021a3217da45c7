//! What a run publishes is the best that it has seen, it ends when nothing becomes better, and what it
//! does at random is repeated by a run that was stopped.

use std::{fs, path::Path};

use crate::{
    common::{TempDir, fixture},
    jobs::{self, run_for, run_to_end, run_until},
};
use tunesmith::{
    adapters::AdapterCard,
    data::Example,
    train::{
        LossTokens, Objective, Outcome, ScheduleKind, TrainConfig, TrainEvent, TrainJob, work_dir,
    },
};

/// Rows that repeat a pattern of `period` tokens from `first` on, or pairs of two such rows.
fn rows(count: usize, first: usize, period: usize, pairs: bool) -> Vec<Example> {
    let row = |index: usize, first: usize| {
        let length = 8 + index * 5 % 9;
        let token = |at: usize| (first + index % 4 * 7 + at % period) as u32;
        let tokens = (0..length).map(token).collect();
        let loss_mask = (0..length).map(|at| at >= length / 2).collect();
        jobs::row(index, tokens, loss_mask)
    };
    let both = |index: usize| {
        let rejected = pairs.then(|| Box::new(row(index, first + 100)));
        Example { rejected, ..row(index, first) }
    };
    (0..count).map(both).collect()
}

/// A run whose validation rows have nothing in common with the training rows, so that their loss goes
/// down for a while at best.
fn job(dir: &Path, change: impl FnOnce(&mut TrainConfig)) -> TrainJob {
    let mut config = TrainConfig {
        model: fixture("tiny-llama").display().to_string(),
        data: "rows.jsonl".into(),
        output: dir.join("adapter"),
        rank: 4,
        lr: Some(3e-3),
        schedule: ScheduleKind::Constant,
        warmup_ratio: 0.0,
        max_steps: Some(40),
        batch_size: 4,
        micro_batch_tokens: 30,
        checkpoint_every: 3,
        eval_every: 2,
        ..TrainConfig::default()
    };
    change(&mut config);
    let pairs = config.objective.wants_pairs();
    jobs::job(config, rows(16, 20, 4, pairs), rows(4, 30, 5, pairs))
}

/// Step and loss of the best validation.
fn best(events: &[TrainEvent]) -> (usize, f64) {
    let validations = events.iter().filter_map(|event| {
        let TrainEvent::Validated { step, loss, .. } = event else { return None };
        Some((*step, *loss))
    });
    validations.min_by(|one, other| one.1.total_cmp(&other.1)).unwrap()
}

#[test]
fn a_run_ends_when_nothing_becomes_better_and_publishes_the_best() {
    let dir = TempDir::new();
    let job = job(&dir.0, |config| {
        config.early_stopping_patience = Some(3);
        config.keep_best = true;
        config.keep_last = true;
    });
    let (summary, events) = run_to_end(&job);
    let (best_step, best_loss) = best(&events);
    assert_eq!(summary.outcome, Outcome::EarlyStopped);
    assert_eq!(summary.best_step, Some(best_step));
    assert_eq!(summary.step, best_step + 6, "three validations without a better one");
    assert!(best_step > 2 && summary.step < 40, "{summary:?}");
    assert_eq!(summary.valid.unwrap().0, best_loss);

    let output = &job.config.output;
    let card = AdapterCard::read(output).unwrap().unwrap();
    assert_eq!(card.configuration["result"]["best_step"], best_step);
    assert_eq!(card.configuration["result"]["valid"]["loss"], best_loss);
    // A run that makes no more than these steps has the same adapter, and so has the last one.
    for (steps, folder) in [(best_step, "adapter"), (summary.step, "adapter.last")] {
        let other = self::job(&dir.0, |config| {
            config.output = dir.join("alone");
            config.max_steps = Some(steps);
            config.overwrite = true;
        });
        run_to_end(&other);
        let weights = |folder: &str| fs::read(dir.join(folder).join("adapter_model.safetensors"));
        assert!(weights(folder).unwrap() == weights("alone").unwrap(), "{folder}");
    }
}

#[test]
fn a_stopped_run_publishes_the_same_best_even_from_an_older_checkpoint() {
    let dir = TempDir::new();
    let settings = |name: &str| {
        job(&dir.0, |config| {
            config.output = dir.join(name);
            config.keep_best = true;
            config.early_stopping_patience = Some(4);
            config.neftune_alpha = 5.0;
            config.dropout = 0.1;
            config.label_smoothing = 0.1;
        })
    };
    let (whole, events) = run_to_end(&settings("whole"));
    let (best_step, _) = best(&events);
    for stop_after in [1, best_step - 1, best_step, best_step + 1, best_step + 3, whole.step - 1] {
        let mut again = settings(&format!("stopped-{stop_after}"));
        let stopped = run_for(&again, stop_after);
        assert_eq!(stopped.outcome, Outcome::Stopped);
        let checkpoints = work_dir(&again.config.output).join("checkpoints");
        let mut found: Vec<_> =
            fs::read_dir(checkpoints).unwrap().map(|entry| entry.unwrap().path()).collect();
        found.sort();
        if found.len() > 1 {
            fs::write(found.pop().unwrap().join("tensors.safetensors"), "not these").unwrap();
        }
        again.config.resume = true;
        let (resumed, _) = run_to_end(&again);
        assert_eq!(resumed.digest, whole.digest, "stopped after step {stop_after}");
        assert_eq!(resumed.best_step, whole.best_step);
    }
}

#[test]
fn best_parameters_that_are_not_what_was_written_are_not_published() {
    let dir = TempDir::new();
    let mut job = job(&dir.0, |config| {
        config.keep_best = true;
        config.early_stopping_patience = Some(3);
    });
    let (_, events) = run_to_end(&job);
    job.config.output = dir.join("again");
    run_for(&job, best(&events).0 + 1);
    for entry in fs::read_dir(work_dir(&job.config.output).join("best")).unwrap() {
        let path = entry.unwrap().path();
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, bytes).unwrap();
    }
    job.config.resume = true;
    let error = run_until(&job, |_| false).unwrap_err().to_string();
    assert!(error.contains("is not what was written"), "{error}");
    assert!(!job.config.output.exists());
}

#[test]
fn some_of_the_validation_rows_are_asked_in_rotation() {
    let dir = TempDir::new();
    let job = job(&dir.0, |config| {
        config.lr = Some(0.0);
        config.max_steps = Some(6);
        config.eval_every = 1;
        config.valid_batch = Some(1);
    });
    let (_, events) = run_to_end(&job);
    let part = |event: &TrainEvent| {
        let TrainEvent::Validated { full: false, loss, .. } = event else { return None };
        Some(*loss)
    };
    let losses: Vec<f64> = events.iter().filter_map(part).collect();
    assert_eq!((losses.len(), losses[4]), (5, losses[0]), "four rows, one at a time");
    assert!(losses[1..4].iter().all(|loss| *loss != losses[0]), "{losses:?}");
}

#[test]
fn noise_on_embeddings_and_smoothed_labels_change_what_is_learned_and_not_how_it_is_measured() {
    let dir = TempDir::new();
    let run = |name: &str, change: fn(&mut TrainConfig)| {
        let job = job(&dir.0, |config| {
            config.output = dir.join(name);
            config.max_steps = Some(4);
            // The first update changes nothing, so the second validation is that of the start.
            config.warmup_steps = 2;
            config.eval_every = 1;
            change(config);
        });
        let (summary, events) = run_to_end(&job);
        let first = events.iter().find_map(|event| {
            let TrainEvent::Validated { loss, .. } = event else { return None };
            Some(*loss)
        });
        (summary.digest, first.unwrap())
    };
    let plain = run("plain", |_| {});
    let noisy = run("noisy", |config| config.neftune_alpha = 5.0);
    let smooth = run("smooth", |config| config.label_smoothing = 0.2);
    let other_seed = run("seed", |config| {
        config.neftune_alpha = 5.0;
        config.seed = 7;
        config.shuffle = false;
    });
    assert_eq!(run("noisy-again", |config| config.neftune_alpha = 5.0).0, noisy.0);
    assert!(plain.0 != noisy.0 && plain.0 != smooth.0 && noisy.0 != other_seed.0);
    assert_eq!((plain.1, plain.1), (noisy.1, smooth.1));
}

#[test]
fn orpo_learns_with_and_without_the_prompts() {
    let dir = TempDir::new();
    for (name, loss_on) in [("answers", LossTokens::Assistant), ("all", LossTokens::All)] {
        let job = job(&dir.0, |config| {
            config.output = dir.join(name);
            config.objective = Objective::Orpo;
            config.loss_on = loss_on;
            config.lr = Some(1e-2);
        });
        let (_, events) = run_to_end(&job);
        let steps: Vec<_> = (events.iter())
            .filter_map(|event| {
                let TrainEvent::Step { loss, token_accuracy, num_trained_tokens, .. } = event
                else {
                    return None;
                };
                Some((*loss, *token_accuracy, *num_trained_tokens))
            })
            .collect();
        let (first, last) = (steps[0], steps[steps.len() - 1]);
        assert!(last.0 < 0.7 * first.0, "{name}: from {} to {}", first.0, last.0);
        assert_eq!(last.1, 1.0, "{name}: every better answer is ahead");
    }
}

#[test]
fn settings_that_need_validation_rows_or_each_other_are_refused_by_name() {
    let dir = TempDir::new();
    let mut without_rows = job(&dir.0, |config| config.keep_best = true);
    without_rows.valid.clear();
    let refused = [
        (without_rows, "keep_best"),
        (
            job(&dir.0, |config| {
                config.early_stopping_patience = Some(2);
                config.eval_every = 0;
            }),
            "eval_every",
        ),
        (
            job(&dir.0, |config| {
                config.keep_best = true;
                config.valid_batch = Some(1);
            }),
            "valid_batch",
        ),
        (job(&dir.0, |config| config.keep_last = true), "keep_last"),
        (job(&dir.0, |config| config.early_stopping_patience = Some(0)), "early_stopping_patience"),
        (job(&dir.0, |config| config.label_smoothing = 1.0), "label_smoothing"),
        (job(&dir.0, |config| config.neftune_alpha = -1.0), "neftune_alpha"),
        (job(&dir.0, |config| config.sweep_halving = true), "sweep_halving"),
        (
            job(&dir.0, |config| {
                config.objective = Objective::Orpo;
                config.loss_on = LossTokens::Auto;
            }),
            "loss_on",
        ),
        (
            job(&dir.0, |config| {
                config.objective = Objective::Dpo;
                config.dpo_label_smoothing = 0.5;
            }),
            "dpo_label_smoothing",
        ),
    ];
    for (job, key) in refused {
        let error = run_until(&job, |_| false).unwrap_err().to_string();
        assert!(error.starts_with(key), "{key}: {error}");
        assert!(!job.config.output.exists());
    }
}

//! Twenty steps from the same A and B give the losses, gradient norms and final A and B of a loop
//! over PEFT (`tests/fixtures/make_oracle.py`), of TRL's `DPOTrainer` (`make_dpo_oracle.py`), its variants
//! and its `ORPOTrainer`, and of transformers' `LabelSmoother` (`make_methods_oracle.py`).

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
};

use crate::trace::{difference, example};
use serde_json::Value;
use tunesmith::train::{
    LossTokens, Objective, PairLoss, ScheduleKind, TrainConfig, TrainEvent, TrainJob, run,
};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// The trace of an oracle.
fn trace(name: &str, kind: &str) -> Value {
    let path = fixtures().join("oracle").join(format!("{name}-{kind}.json"));
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// A folder of its own, to be removed at the end.
fn output(name: &str, kind: &str) -> PathBuf {
    std::env::temp_dir().join(format!("tunesmith-{kind}-{name}-{}", std::process::id()))
}

fn check(name: &str, kind: &str) {
    let oracle = fixtures().join("oracle");
    let trace = trace(name, kind);
    let steps = trace["steps"].as_array().unwrap();
    let settings = &trace["settings"];
    let sequences = |step: &Value| step["sequences"].as_array().unwrap().clone();
    let output = output(name, kind);
    let model_dir = fixtures().join(name);
    let job = TrainJob {
        config: TrainConfig {
            model: name.to_owned(),
            data: "trace".into(),
            output: output.clone(),
            init_adapter: Some(oracle.join(format!("{name}-train-initial"))),
            lr: settings["learning_rate"].as_f64(),
            schedule: ScheduleKind::Linear,
            warmup_steps: settings["warmup_steps"].as_u64().unwrap() as usize,
            epochs: 1.0,
            batch_size: sequences(&steps[0]).len(),
            micro_batch_tokens: 20,
            grad_clip: settings["max_grad_norm"].as_f64().unwrap(),
            label_smoothing: settings["label_smoothing"].as_f64().unwrap_or(0.0),
            shuffle: false,
            overwrite: true,
            ..TrainConfig::default()
        },
        model_dir: model_dir.clone(),
        train: steps.iter().flat_map(sequences).map(|sequence| example(&sequence)).collect(),
        valid: Vec::new(),
        companions: Vec::new(),
        sources: Vec::new(),
    };
    let mut expected = steps.iter();
    let mut observer = |event: &TrainEvent| {
        let TrainEvent::Step { step, loss, grad_norm, learning_rate, num_trained_tokens, .. } =
            event
        else {
            return;
        };
        let expected = expected.next().unwrap();
        let near = |what: &str, actual: f64, tolerance: f64| {
            let expected = expected[what].as_f64().unwrap();
            let difference = (actual - expected).abs();
            assert!(
                difference <= tolerance,
                "{name}, step {step}: {what} {actual}, not {expected}"
            );
        };
        near("loss", *loss, 1e-4);
        near("grad_norm", *grad_norm, 1e-2);
        near("lr", *learning_rate, 1e-12);
        near("num_trained_tokens", *num_trained_tokens as f64, 0.0);
    };
    run(&job, &mut observer, &AtomicBool::new(false)).unwrap();
    assert!(expected.next().is_none(), "{name}: fewer steps than the oracle made");

    same_adapter(name, &output, &format!("{name}-{kind}-final"));
    fs::remove_dir_all(&output).unwrap();
}

/// A and B in `output` are those of an oracle's folder, within 1e-3.
fn same_adapter(name: &str, output: &Path, oracle: &str) {
    let oracle = fixtures().join("oracle").join(oracle);
    let largest = difference(&fixtures().join(name), output, &oracle);
    assert!(largest < 1e-3, "{name}: A or B differs by {largest}");
}

/// `set` is what makes a run one of `kind`, given the oracle's settings.
fn check_preferences(name: &str, kind: &str, set: impl FnOnce(&mut TrainConfig, &Value)) {
    let oracle = fixtures().join("oracle");
    let trace = trace(name, kind);
    let steps = trace["steps"].as_array().unwrap();
    let settings = &trace["settings"];
    let pairs = |step: &Value| step["pairs"].as_array().unwrap().clone();
    let output = output(name, kind);
    let mut job = TrainJob {
        config: TrainConfig {
            model: name.to_owned(),
            data: "trace".into(),
            output: output.clone(),
            objective: Objective::Dpo,
            dpo_beta: settings["beta"].as_f64().unwrap(),
            orpo_beta: settings["beta"].as_f64().unwrap(),
            init_adapter: Some(oracle.join(format!("{name}-train-initial"))),
            lr: settings["learning_rate"].as_f64(),
            warmup_steps: settings["warmup_steps"].as_u64().unwrap() as usize,
            epochs: 1.0,
            batch_size: pairs(&steps[0]).len(),
            // One pair each.
            micro_batch_tokens: 20,
            grad_clip: settings["max_grad_norm"].as_f64().unwrap(),
            shuffle: false,
            overwrite: true,
            ..TrainConfig::default()
        },
        model_dir: fixtures().join(name),
        train: steps.iter().flat_map(pairs).map(|value| example(&value)).collect(),
        valid: Vec::new(),
        companions: Vec::new(),
        sources: Vec::new(),
    };
    set(&mut job.config, settings);
    let mut expected = steps.iter();
    let mut observer = |event: &TrainEvent| {
        let TrainEvent::Step {
            step, loss, grad_norm, learning_rate, token_accuracy, rewards, ..
        } = event
        else {
            return;
        };
        let expected = expected.next().unwrap();
        let rewards = rewards.unwrap();
        for (what, actual, tolerance) in [
            ("loss", *loss, 1e-4),
            ("grad_norm", *grad_norm, 1e-2),
            ("lr", *learning_rate, 1e-12),
            ("reward_chosen", rewards.reward_chosen, 1e-3),
            ("reward_rejected", rewards.reward_rejected, 1e-3),
        ] {
            let wanted = expected[what].as_f64().unwrap();
            let near = (actual - wanted).abs() <= tolerance;
            assert!(near, "{name}, step {step}: {what} {actual}, not {wanted}");
        }
        // Before anything is learned rounding decides which answer is ahead.
        if *step > 2 {
            assert_eq!(Some(*token_accuracy), expected["accuracy"].as_f64(), "{name}, step {step}");
        }
        let margin = rewards.reward_chosen - rewards.reward_rejected;
        assert!((rewards.reward_margin - margin).abs() < 1e-9);
    };
    run(&job, &mut observer, &AtomicBool::new(false)).unwrap();
    assert!(expected.next().is_none(), "{name}: fewer steps than the oracle made");
    same_adapter(name, &output, &format!("{name}-{kind}-final"));
    fs::remove_dir_all(&output).unwrap();
}

const NAMES: [&str; 2] = ["tiny-llama", "tiny-qwen2"];

#[test]
fn preferences_are_learned_as_with_trl() {
    for name in NAMES {
        check_preferences(name, "dpo", |_, _| {});
    }
}

#[test]
fn preferences_with_some_labels_wrong_are_learned_as_with_trl() {
    for name in NAMES {
        for (kind, loss) in
            [("dpo-conservative", PairLoss::Sigmoid), ("dpo-robust", PairLoss::Robust)]
        {
            check_preferences(name, kind, |config, settings| {
                config.dpo_loss = loss;
                config.dpo_label_smoothing = settings["label_smoothing"].as_f64().unwrap();
            });
        }
    }
}

#[test]
fn preferences_with_the_likelihood_of_the_better_answer_are_learned_as_with_trl() {
    for name in NAMES {
        check_preferences(name, "dpo-sft", |config, settings| {
            config.dpo_sft_weight = settings["sft_weight"].as_f64().unwrap();
        });
    }
}

#[test]
fn odds_ratios_are_learned_as_with_trl() {
    for name in NAMES {
        check_preferences(name, "orpo", |config, _| {
            config.objective = Objective::Orpo;
            // The likelihood is that of prompt and answer there.
            config.loss_on = LossTokens::All;
        });
    }
}

#[test]
fn supervised_training_is_that_of_peft() {
    for name in NAMES {
        check(name, "train");
    }
}

#[test]
fn smoothed_labels_are_those_of_transformers() {
    for name in NAMES {
        check(name, "smoothed");
    }
}

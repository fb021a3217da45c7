//! Twenty steps from the same A and B give the losses, gradient norms and final A and B of a loop
//! over PEFT (`tests/fixtures/make_oracle.py`).
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
};

use serde_json::Value;
use tunesmith::{
    adapters::LoraAdapter,
    data::Example,
    model::ModelConfig,
    train::{ScheduleKind, TrainConfig, TrainEvent, TrainJob, run},
};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn example(sequence: &Value) -> Example {
    let tokens: Vec<u32> = serde_json::from_value(sequence["tokens"].clone()).unwrap();
    let mask: Vec<u8> = serde_json::from_value(sequence["loss_mask"].clone()).unwrap();
    let loss_mask = mask.into_iter().map(|counts| counts == 1).collect();
    Example { line: 1, tokens, loss_mask, num_truncated: 0, rejected: None }
}

fn check(name: &str) {
    let oracle = fixtures().join("oracle");
    let trace = fs::read(oracle.join(format!("{name}-train.json"))).unwrap();
    let trace: Value = serde_json::from_slice(&trace).unwrap();
    let steps = trace["steps"].as_array().unwrap();
    let settings = &trace["settings"];
    let sequences = |step: &Value| step["sequences"].as_array().unwrap().clone();
    let output = std::env::temp_dir().join(format!("tunesmith-{name}-{}", std::process::id()));
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
            shuffle: false,
            overwrite: true,
            ..TrainConfig::default()
        },
        model_dir: model_dir.clone(),
        train: steps.iter().flat_map(sequences).map(|sequence| example(&sequence)).collect(),
        valid: Vec::new(),
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

    let config = ModelConfig::from_dir(&model_dir).unwrap();
    let trained = LoraAdapter::read(&output, &config, false).unwrap();
    let peft =
        LoraAdapter::read(&oracle.join(format!("{name}-train-final")), &config, false).unwrap();
    for (site, module) in peft.modules() {
        let ours = &trained.modules()[site];
        for (theirs, ours) in [(&module.a, &ours.a), (&module.b, &ours.b)] {
            let difference = (theirs - ours).unwrap().abs().unwrap();
            let largest: f32 = difference.max_all().unwrap().to_scalar().unwrap();
            assert!(largest < 1e-3, "{name}, {site:?}: differs by {largest}");
        }
    }
    fs::remove_dir_all(&output).unwrap();
}

#[test]
fn a_llama_trains_as_with_peft() {
    check("tiny-llama");
}

#[test]
fn a_qwen2_trains_as_with_peft() {
    check("tiny-qwen2");
}

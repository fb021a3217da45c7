//! The numbers of training against torch and transformers, from tables that
//! `tests/fixtures/make_train_tables.py` wrote.

use std::{fs, path::Path};

use candle_core::{Device, Tensor, Var};
use serde_json::Value;
use tunesmith::train::{
    AdamW, AdamWConfig, Gradients, Schedule, ScheduleKind, clip_factor, warmup_steps,
};

fn table(name: &str) -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/train").join(name);
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap()
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|value| number(value) as f32).collect()
}

#[test]
fn learning_rates_are_those_of_transformers() {
    for case in table("schedules.json") {
        let schedule = Schedule {
            kind: match case["kind"].as_str().unwrap() {
                "linear" => ScheduleKind::Linear,
                "cosine" => ScheduleKind::Cosine,
                _ => ScheduleKind::Constant,
            },
            peak: number(&case["peak"]),
            warmup_steps: case["warmup_steps"].as_u64().unwrap() as usize,
            total_steps: case["total_steps"].as_u64().unwrap() as usize,
        };
        for (step, expected) in case["rates"].as_array().unwrap().iter().enumerate() {
            let rate = schedule.learning_rate(step);
            let difference = (rate - number(expected)).abs();
            assert!(difference < 1e-15, "{schedule:?}, step {step}: {rate}, not {expected}");
        }
    }
}

#[test]
fn a_warm_up_given_as_a_share_is_rounded_up_and_steps_win_over_it() {
    assert_eq!(warmup_steps(0, 0.03, 100), 3);
    assert_eq!(warmup_steps(0, 0.03, 101), 4);
    assert_eq!(warmup_steps(7, 0.03, 101), 7);
    assert_eq!(warmup_steps(0, 0.0, 101), 0);
}

#[test]
fn adamw_makes_torchs_updates() {
    for case in table("adamw.json") {
        let names: Vec<String> = case["shapes"].as_object().unwrap().keys().cloned().collect();
        let parameters: Vec<(String, Var)> = names
            .iter()
            .map(|name| {
                let shape: Vec<usize> =
                    serde_json::from_value(case["shapes"][name].clone()).unwrap();
                let values = floats(&case["initial"][name]);
                (name.clone(), Var::from_vec(values, shape, &Device::Cpu).unwrap())
            })
            .collect();
        let config = AdamWConfig {
            beta1: number(&case["beta1"]),
            beta2: number(&case["beta2"]),
            epsilon: 1e-8,
            weight_decay: number(&case["weight_decay"]),
        };
        let mut optimizer = AdamW::new(config, parameters.clone());
        for (index, step) in case["steps"].as_array().unwrap().iter().enumerate() {
            let gradients: Vec<Vec<f32>> =
                names.iter().map(|name| floats(&step["gradients"][name])).collect();
            let scale = clip_factor(number(&step["norm"]), number(&case["clip"]));
            optimizer.step(&gradients, scale, number(&step["lr"])).unwrap();
            for (name, var) in &parameters {
                let actual: Vec<f32> = var.flatten_all().unwrap().to_vec1().unwrap();
                for (actual, expected) in actual.iter().zip(floats(&step["parameters"][name])) {
                    let difference = (actual - expected).abs();
                    assert!(difference < 1e-6, "{name}, step {index}: {actual}, not {expected}");
                }
            }
        }
    }
}

#[test]
fn the_gradient_norm_is_torchs() {
    for case in table("adamw.json") {
        for step in case["steps"].as_array().unwrap() {
            let tensors: Vec<(String, Var)> = step["gradients"]
                .as_object()
                .unwrap()
                .iter()
                .map(|(name, values)| {
                    let values = floats(values);
                    let count = values.len();
                    (name.clone(), Var::from_vec(values, count, &Device::Cpu).unwrap())
                })
                .collect();
            // The gradient of half the square is the value itself.
            let mut gradients = Gradients::new(&tensors);
            let mut loss: Option<Tensor> = None;
            for (_, var) in &tensors {
                let half_square = (var.sqr().unwrap().sum_all().unwrap() * 0.5).unwrap();
                loss = Some(match loss {
                    None => half_square,
                    Some(sum) => (sum + half_square).unwrap(),
                });
            }
            gradients.add(&tensors, loss.unwrap().backward().unwrap()).unwrap();
            let (norm, expected) = (gradients.norm(), number(&step["norm"]));
            assert!((norm - expected).abs() < 1e-5 * expected, "{norm}, not {expected}");
        }
    }
}

#[test]
fn a_parameter_that_no_gradient_reaches_is_named() {
    let device = Device::Cpu;
    let used = Var::from_vec(vec![1.0_f32, 2.0], 2, &device).unwrap();
    let unused = Var::from_vec(vec![1.0_f32], 1, &device).unwrap();
    let parameters = [("used".to_owned(), used.clone()), ("unused".to_owned(), unused)];
    let store = used.sum_all().unwrap().backward().unwrap();
    let error = Gradients::new(&parameters).add(&parameters, store).unwrap_err();
    assert!(error.to_string().contains("unused"), "{error}");
}

//! What training keeps and what it computes again: the same bits either way, with packed rows, resumed
//! runs and every method.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test may panic")]

use std::{fs, path::Path, process::Command, sync::Arc};

use crate::{
    common::{TempDir, fixture},
    jobs::{self, patterns, run_for, run_to_end},
};
use candle_core::{Device, Tensor, Var};
use tunesmith::{
    model::Quantization,
    ops::{
        adapted_linear::{TrainedLora, adapted_linear},
        linear::linear,
        lora::lora,
        weight::{Precision, Weight},
    },
    train::{
        Method, Objective, Outcome, Packing, RecomputeChoice, TrainConfig, TrainEvent, TrainJob,
    },
};

fn job(dir: &Path, family: &str, change: impl FnOnce(&mut TrainConfig)) -> TrainJob {
    let mut config = TrainConfig {
        model: fixture(family).display().to_string(),
        data: "rows.jsonl".into(),
        output: dir.join("out"),
        rank: 4,
        alpha: 8.0,
        dropout: 0.1,
        lr: Some(1e-2),
        max_steps: Some(4),
        batch_size: 4,
        micro_batch_tokens: 40,
        max_length: 64,
        checkpoint_every: 1,
        overwrite: true,
        ..TrainConfig::default()
    };
    change(&mut config);
    let mut train = patterns(24, 20);
    if config.objective == Objective::Dpo {
        for (example, other) in train.iter_mut().zip(patterns(24, 40)) {
            example.rejected = Some(Box::new(other));
        }
    }
    jobs::job(config, train, Vec::new())
}

#[test]
fn recomputing_layers_changes_no_bit_of_what_is_trained() {
    type Change = fn(&mut TrainConfig);
    let kinds: [(&str, Change); 8] = [
        ("lora with dropout", |_| {}),
        ("two projections, rslora", |config| {
            config.targets.0 = vec!["q_proj".to_owned(), "down_proj".to_owned()];
            config.rslora = true;
        }),
        ("rows with trained lengths", |config| config.variant = "dora".to_owned()),
        ("preferences", |config| config.objective = Objective::Dpo),
        ("a rounded base", |config| config.quantize = Quantization::Int8),
        ("a base in bf16", |config| config.quantize = Quantization::Bf16),
        ("packed rows", |config| config.packing = Packing::Bfd),
        ("every weight", |config| {
            config.method = Method::Full;
            config.dropout = 0.0;
        }),
    ];
    // The last two have norms of heads, and norms behind their blocks.
    let families = [("tiny-llama", &kinds[..]), ("tiny-qwen2", &kinds[..])];
    let others = [("families/qwen3", &kinds[..3]), ("families/gemma2", &kinds[..3])];
    for (family, kinds) in families.into_iter().chain(others) {
        for (kind, change) in kinds {
            let digest = |recompute| {
                let dir = TempDir::new();
                let job = job(&dir.0, family, |config| {
                    change(config);
                    config.recompute = recompute;
                });
                run_for(&job, usize::MAX).digest
            };
            let kept = digest(RecomputeChoice::None);
            assert_eq!(kept, digest(RecomputeChoice::Block), "{family}: {kind}");
        }
    }
}

#[test]
fn a_packed_run_that_was_stopped_goes_on_with_the_same_bits_even_if_it_recomputes_from_then_on() {
    let packed = |dir: &Path, change: fn(&mut TrainConfig)| {
        job(dir, "tiny-llama", |config| {
            config.packing = Packing::Bfd;
            config.group_by_length = true;
            change(config);
        })
    };
    let (whole, halves) = (TempDir::new(), TempDir::new());
    let undisturbed = run_for(&packed(&whole.0, |_| {}), usize::MAX);
    // 24 examples of 382 tokens fill six or seven rows of 64: two steps of an epoch.
    assert_eq!(undisturbed.total_steps, 4);
    let stopped = run_for(&packed(&halves.0, |_| {}), 2);
    assert_eq!(stopped.outcome, Outcome::Stopped);
    let resumed = packed(&halves.0, |config| {
        (config.resume, config.overwrite) = (true, false);
        config.recompute = RecomputeChoice::Block;
    });
    assert_eq!(run_for(&resumed, usize::MAX).digest, undisturbed.digest);
}

#[test]
fn packed_rows_are_what_a_step_counts() {
    let epoch = |packing| {
        let dir = TempDir::new();
        let job = job(&dir.0, "tiny-llama", |config| {
            config.packing = packing;
            (config.max_steps, config.epochs) = (None, 1.0);
        });
        let tokens = |event: &TrainEvent| {
            let TrainEvent::Step { num_tokens, .. } = event else { return None };
            Some(*num_tokens)
        };
        run_to_end(&job).1.iter().filter_map(tokens).collect::<Vec<_>>()
    };
    let (plain, packed) = (epoch(Packing::None), epoch(Packing::Bfd));
    assert_eq!((plain.len(), packed.len()), (6, 2));
    assert_eq!(plain.iter().sum::<usize>(), packed.iter().sum::<usize>());
}

#[test]
fn a_projection_with_its_adapter_is_bit_for_bit_the_one_and_the_other() {
    let tensor = |shape: &[usize], seed: usize| {
        let count: usize = shape.iter().product();
        let value = |i: usize| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.5 - 1.0;
        Tensor::from_vec((0..count).map(value).collect::<Vec<_>>(), shape, &Device::Cpu).unwrap()
    };
    let variable = |shape: &[usize], seed| Var::from_tensor(&tensor(shape, seed)).unwrap();
    for rank in [1, 16, 600] {
        let (x, a, b) =
            (variable(&[37, 70], 1), variable(&[rank, 70], 2), variable(&[53, rank], 3));
        let bias = tensor(&[53], 4);
        let weight = Weight::pack_tensor(Precision::Exact, &tensor(&[53, 70], 5)).unwrap();
        let apart =
            (linear(&x, &weight, Some(&bias)).unwrap() + lora(&x, &a, &b, 0.5).unwrap()).unwrap();
        let Weight::Packed(packed) = &weight else { panic!("it was packed") };
        let (a_of, b_of) = (a.as_tensor().clone(), b.as_tensor().clone());
        let trained = TrainedLora { a: a_of, b: b_of, scale: 0.5, dropout: None };
        let together = adapted_linear(&x, packed, Some(&bias), &trained).unwrap();
        let bits = |tensor: &Tensor| tensor.to_vec2::<f32>().unwrap();
        assert_eq!(bits(&apart), bits(&together), "rank {rank}");
        let gradients = |out: Tensor| {
            let store = out.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            [&x, &a, &b].map(|input| store.get(input.as_tensor()).unwrap().clone())
        };
        for (one, other) in gradients(apart).iter().zip(&gradients(together)) {
            let size = one.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            let far = (one - other).unwrap().abs().unwrap().max_all().unwrap();
            assert!(far.to_scalar::<f32>().unwrap() <= 1e-5 * size, "rank {rank}");
        }
        assert_eq!(Arc::strong_count(packed), 1, "no graph is left that holds the weight");
    }
}

/// Runs `tunesmith train --dry-run` on forty short rows.
fn dry_run(arguments: &[&str]) -> (bool, String) {
    let dir = TempDir::new();
    let rows: Vec<String> =
        (0..40).map(|n| format!(r#"{{"prompt": "say {n}", "completion": " {n}"}}"#)).collect();
    fs::write(dir.join("rows.jsonl"), rows.join("\n")).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_tunesmith"))
        .current_dir(&dir.0)
        .args(["train", "--data", "rows.jsonl", "--output", "out", "--dry-run", "--model"])
        .arg(fixture("tiny-llama"))
        .args(["--rank", "4", "--epochs", "1", "--max-length", "128"])
        .args(arguments)
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).into_owned())
}

#[test]
fn packing_is_said_and_what_cannot_be_packed_or_recomputed_is_refused() {
    let (ok, said) = dry_run(&["--packing", "bfd", "--batch-size", "1"]);
    assert!(ok && said.contains("packing: 40 examples in "), "{said}");
    assert!(said.contains(" rows of up to 128 tokens, "), "{said}");
    let (ok, said) = dry_run(&["--packing", "bfd", "--objective", "dpo"]);
    assert!(!ok && said.contains("packing"), "{said}");
    let (ok, said) = dry_run(&["--recompute", "sometimes"]);
    assert!(!ok && said.contains("auto, none, block"), "{said}");
}

#[test]
fn a_budget_that_only_recomputing_keeps_makes_it_recompute_unless_that_is_forbidden() {
    let (ok, roomy) = dry_run(&["--memory", "4GiB", "--recompute", "block"]);
    assert!(ok && roomy.contains(" with recompute block takes about "), "{roomy}");
    let (ok, roomy) = dry_run(&["--memory", "4GiB"]);
    assert!(ok && !roomy.contains("recompute"), "{roomy}");
    let (ok, refused) = dry_run(&["--memory", "8MiB", "--recompute", "none"]);
    assert!(!ok && refused.contains("(--recompute block)"), "{refused}");
}

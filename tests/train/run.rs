//! Whole training runs of tiny models: they learn, they resume with the same bits, they say what is
//! wrong.

use std::{fs, path::Path, sync::atomic::AtomicBool};

use crate::{
    common::{TempDir, fixture},
    jobs::{self, is_step, losses, patterns, run_to_end, run_until},
};
use tunesmith::{
    adapters::{AdapterCard, LoraAdapter},
    model::{Decoder, ModelConfig, WeightMode},
    train::{
        Candidate, EventLog, Examination, Examiner, Generated, Method, Outcome, Surroundings,
        TrainConfig, TrainError, TrainEvent, TrainJob, WeightDtype, run_with, work_dir,
    },
};

/// A run of 12 steps that needs several micro-batches a step, with dropout.
fn job(dir: &Path, change: impl FnOnce(&mut TrainConfig)) -> TrainJob {
    let mut config = TrainConfig {
        model: fixture("tiny-llama").display().to_string(),
        data: "rows.jsonl".into(),
        output: dir.join("adapter"),
        rank: 4,
        alpha: 8.0,
        dropout: 0.1,
        lr: Some(1e-2),
        epochs: 2.0,
        batch_size: 4,
        micro_batch_tokens: 40,
        checkpoint_every: 3,
        eval_every: 5,
        ..TrainConfig::default()
    };
    change(&mut config);
    jobs::job(config, patterns(24, 20), patterns(6, 20))
}

/// The step lines of a published event log, without the times.
fn step_lines(output: &Path) -> Vec<String> {
    let log = fs::read_to_string(output.join("events.jsonl")).unwrap();
    let steps = log.lines().filter(|line| line.contains("\"event\":\"step\""));
    steps.map(|line| line.split(",\"seconds\"").next().unwrap().to_owned()).collect()
}

#[test]
fn a_run_lowers_the_loss_and_publishes_everything_that_belongs_to_an_adapter() {
    let scratch = TempDir::new();
    let job = job(&scratch.0, |config| config.epochs = 10.0);
    let (summary, events) = run_to_end(&job);
    let losses = losses(&events);
    assert_eq!(summary.outcome, Outcome::Finished);
    assert_eq!((summary.step, losses.len()), (60, 60));
    let (first, last) = (losses[0].1, losses[59].1);
    assert!(last < 0.5 * first, "the loss went from {first} to {last}");

    let output = &job.config.output;
    for file in ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "loss.svg"] {
        assert!(output.join(file).is_file(), "{file} is missing");
    }
    let config = ModelConfig::from_dir(&job.model_dir).unwrap();
    assert_eq!(LoraAdapter::read(output, &config, false).unwrap().digest(), summary.digest);
    let card = AdapterCard::read(output).unwrap().unwrap();
    assert_eq!(card.curve.len(), 60);
    assert_eq!(card.configuration["settings"]["rank"], 4);
    let log = fs::read_to_string(output.join("events.jsonl")).unwrap();
    assert_eq!(self::losses(EventLog::from_text(&log).events()).len(), losses.len());
    assert!(!work_dir(output).exists(), "the work folder is left");
}

#[test]
fn a_part_of_an_epoch_is_rounded_up_to_whole_steps() {
    let scratch = TempDir::new();
    // Twenty-four rows in steps of ten: an epoch has three steps.
    let job = job(&scratch.0, |config| (config.epochs, config.batch_size) = (1.5, 10));
    let (summary, _) = run_to_end(&job);
    assert_eq!((summary.step, summary.total_steps), (5, 5));
}

#[test]
fn the_first_update_is_that_of_adamw_with_torchs_epsilon() {
    const EPSILON: f64 = 1e-8;
    const LEARNING_RATE: f64 = 1e-2;
    let scratch = TempDir::new();
    // So small a scale that gradients are about as small as epsilon.
    let job = job(&scratch.0, |config| {
        (config.alpha, config.dropout, config.grad_clip) = (1e-6, 0.0, 0.0);
        (config.lr, config.warmup_ratio) = (Some(LEARNING_RATE), 0.0);
        config.max_steps = Some(1);
    });
    let (summary, events) = run_to_end(&job);
    let norm = events.iter().find_map(|event| {
        let TrainEvent::Step { grad_norm, .. } = event else { return None };
        Some(*grad_norm)
    });
    // B was 0 and is now rate * g / (|g| + epsilon), which tells g; A has no gradient as long as B is 0.
    let base = ModelConfig::from_dir(&job.model_dir).unwrap();
    let adapter = LoraAdapter::read(&summary.path, &base, false).unwrap();
    let mut squares = 0.0;
    for module in adapter.modules().values() {
        let [_, b] = module.matrices().unwrap();
        for value in b.flatten_all().unwrap().to_vec1::<f32>().unwrap() {
            let value = f64::from(value.abs());
            squares += (EPSILON * value / (LEARNING_RATE - value)).powi(2);
        }
    }
    let (norm, told) = (norm.unwrap(), f64::sqrt(squares));
    assert!((told / norm - 1.0).abs() < 0.01, "{told:e}, not {norm:e}");
}

#[test]
fn the_same_job_gives_the_same_bits_and_another_seed_others() {
    let scratch = TempDir::new();
    let digest = |name: &str, seed: u64| {
        let job = job(&scratch.0, |config| {
            config.output = scratch.0.join(name);
            config.seed = seed;
        });
        run_to_end(&job).0.digest
    };
    assert_eq!(digest("one", 1), digest("two", 1));
    assert_ne!(digest("one again", 1), digest("three", 2));
}

#[test]
fn the_loss_does_not_depend_on_how_a_step_is_cut_into_micro_batches() {
    let scratch = TempDir::new();
    let losses = |name: &str, micro_batch_tokens: usize| {
        let job = job(&scratch.0, |config| {
            config.output = scratch.0.join(name);
            config.micro_batch_tokens = micro_batch_tokens;
            config.dropout = 0.0;
        });
        losses(&run_to_end(&job).1)
    };
    for ((step, fine), (_, coarse)) in losses("fine", 1).into_iter().zip(losses("coarse", 9999)) {
        assert!((fine - coarse).abs() < 1e-4, "step {step}: {fine} and {coarse}");
    }
}

#[test]
fn a_run_stopped_at_any_step_resumes_to_the_same_bits() {
    let scratch = TempDir::new();
    let whole = run_to_end(&job(&scratch.0, |config| config.output = scratch.0.join("whole")));
    for stop_after in [1, 3, 7, 11] {
        let job = job(&scratch.0, |config| {
            config.output = scratch.0.join(format!("stopped-{stop_after}"));
            config.resume = true;
        });
        let (stopped, _) = run_until(&job, |event| is_step(event, stop_after)).unwrap();
        assert_eq!((stopped.outcome, stopped.step), (Outcome::Stopped, stop_after));
        assert!(!job.config.output.exists());
        let (resumed, _) = run_to_end(&job);
        assert_eq!(resumed.digest, whole.0.digest, "stopped after step {stop_after}");
        let resumed = step_lines(&job.config.output);
        assert_eq!(resumed, step_lines(&scratch.0.join("whole")), "each step once, same losses");
    }
}

#[test]
fn a_torn_checkpoint_is_passed_over_for_the_one_before() {
    let scratch = TempDir::new();
    let whole = run_to_end(&job(&scratch.0, |config| config.output = scratch.0.join("whole"))).0;
    for (name, damage) in [
        ("tensors.safetensors", (|bytes| bytes.truncate(bytes.len() / 2)) as fn(&mut Vec<u8>)),
        ("tensors.safetensors", |bytes| *bytes.last_mut().unwrap() ^= 1),
        ("state.json", |bytes| bytes.truncate(40)),
        ("events.jsonl", Vec::clear),
    ] {
        let job = job(&scratch.0, |config| {
            config.resume = true;
            config.overwrite = true;
        });
        run_until(&job, |event| is_step(event, 7)).unwrap();
        let newest = work_dir(&job.config.output).join("checkpoints/step-00000007").join(name);
        let mut bytes = fs::read(&newest).unwrap();
        damage(&mut bytes);
        fs::write(&newest, bytes).unwrap();
        let (resumed, events) = run_to_end(&job);
        let warned = |event: &TrainEvent| matches!(event, TrainEvent::Warning { message } if message.contains(name));
        assert!(events.iter().any(warned), "nobody was told about {name}");
        assert_eq!(losses(&events)[0].0, 7, "the checkpoint after step 6 was not used");
        assert_eq!(resumed.digest, whole.digest, "after damage to {name}");
        fs::remove_dir_all(&job.config.output).unwrap();
    }
}

#[test]
fn a_checkpoint_of_another_run_is_refused_with_the_key_that_differs() {
    let scratch = TempDir::new();
    let before = job(&scratch.0, |_| {});
    run_until(&before, |event| is_step(event, 4)).unwrap();
    let changed = job(&scratch.0, |config| {
        config.resume = true;
        config.lr = Some(0.5);
    });
    let error = run_until(&changed, |_| false).unwrap_err().to_string();
    assert!(error.contains("lr was 0.01 and is now 0.5"), "{error}");
    let mut other_rows = job(&scratch.0, |config| config.resume = true);
    other_rows.train[3].tokens[2] = 9;
    let error = run_until(&other_rows, |_| false).unwrap_err().to_string();
    assert!(error.contains("examples_sha256"), "{error}");
}

#[test]
fn an_output_and_an_unfinished_run_are_replaced_only_when_asked() {
    let scratch = TempDir::new();
    let job_with = |resume: bool, overwrite: bool| {
        job(&scratch.0, |config| {
            config.resume = resume;
            config.overwrite = overwrite;
        })
    };
    run_until(&job_with(false, false), |event| is_step(event, 4)).unwrap();
    let error = run_until(&job_with(false, false), |_| false).unwrap_err();
    assert!(matches!(error, TrainError::Unfinished(_)), "{error}");
    let (summary, events) = run_to_end(&job_with(false, true));
    assert_eq!(losses(&events)[0].0, 1, "overwrite starts anew");
    let error = run_until(&job_with(false, false), |_| false).unwrap_err();
    assert!(matches!(error, TrainError::OutputExists(_)), "{error}");
    let (again, events) = run_to_end(&job_with(true, false));
    let published =
        matches!(&events[..], [TrainEvent::Published { step, .. }] if *step == summary.step);
    assert!(published, "a finished run has nothing to resume: {events:?}");
    assert_eq!(again.digest, summary.digest);
}

#[test]
fn a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_checkpoint() {
    let scratch = TempDir::new();
    let job = job(&scratch.0, |config| {
        config.lr = Some(1e30);
        config.grad_clip = 0.0;
        config.warmup_ratio = 0.0;
        config.checkpoint_every = 1;
    });
    let error = run_until(&job, |_| false).unwrap_err();
    assert!(matches!(error, TrainError::NotFinite { .. }), "{error}");
    assert!(!job.config.output.exists());
    assert!(work_dir(&job.config.output).join("checkpoints").exists());
}

#[test]
fn a_gradient_that_has_vanished_stops_the_run_and_publishes_nothing() {
    let scratch = TempDir::new();
    let job = job(&scratch.0, |config| {
        config.lr = Some(1e6);
        config.warmup_ratio = 0.0;
    });
    let error = run_until(&job, |_| false).unwrap_err();
    assert!(matches!(error, TrainError::NoSlope { .. }), "{error}");
    assert!(!job.config.output.exists());
}

/// Finds something wrong with what it is shown, as long as it is told to: before the end of a run, or at it.
#[derive(Default)]
struct Strict {
    before: bool,
    at_end: bool,
}

impl Strict {
    fn look_at(candidate: &Candidate<'_>, is_strict: bool) -> Result<Examination, String> {
        // What is examined lies on the disk, as it would be published.
        let adapter = candidate.folder.expect("an adapter is trained");
        assert!(adapter.join("adapter_model.safetensors").exists());
        assert!(candidate.scored.iter().all(|one| one.logprobs.iter().all(|p| *p <= 0.0)));
        assert!(!candidate.scored.is_empty());
        let found = Examination { max_difference: Some(0.0), ..Examination::default() };
        if is_strict { Err("it serves something else".to_owned()) } else { Ok(found) }
    }
}

impl Examiner for Strict {
    fn generate(&mut self, _: &Candidate<'_>) -> Result<Generated, String> {
        Err("nobody asks for answers here".to_owned())
    }

    fn compare(&mut self, candidate: &Candidate<'_>) -> Result<Examination, String> {
        Self::look_at(candidate, self.before)
    }

    fn examine(&mut self, candidate: &Candidate<'_>) -> Result<Examination, String> {
        Self::look_at(candidate, self.at_end)
    }
}

#[test]
fn what_does_not_serve_as_it_was_trained_is_not_published_and_nothing_is_lost() {
    let scratch = TempDir::new();
    let try_with = |strict: bool, resume: bool| {
        let job = job(&scratch.0, |config| config.resume = resume);
        let mut examiner = Strict { at_end: strict, ..Strict::default() };
        let surroundings = Surroundings { examiner: Some(&mut examiner), pause: None };
        let result = run_with(&job, &mut |_| (), surroundings, &AtomicBool::new(false));
        (result, job.config.output)
    };
    let (refused, output) = try_with(true, false);
    let error = refused.unwrap_err();
    assert!(matches!(error, TrainError::Examination { .. }), "{error}");
    assert!(error.to_string().contains("it serves something else"), "{error}");
    assert!(!output.exists());
    // Once serving is mended, the run comes to its end from its checkpoint, with the same bits.
    let digest = try_with(false, true).0.unwrap().digest;
    let other = TempDir::new();
    assert_eq!(digest, run_to_end(&self::job(&other.0, |_| ())).0.digest);
}

#[test]
fn adapters_before_the_end_are_published_only_if_they_serve_as_they_were_trained() {
    type Change = fn(&Path, &mut TrainConfig);
    let epochs: Change = |dir, config| config.epoch_dir = Some(dir.join("epochs"));
    let last: Change = |_, config| (config.keep_best, config.keep_last) = (true, true);
    for (change, published) in [(epochs, "epochs/step-6"), (last, "adapter.last")] {
        for before in [true, false] {
            let scratch = TempDir::new();
            let job = job(&scratch.0, |config| change(&scratch.0, config));
            let mut examiner = Strict { before, ..Strict::default() };
            let surroundings = Surroundings { examiner: Some(&mut examiner), pause: None };
            let mut compared = 0;
            let mut count = |event: &TrainEvent| {
                compared += usize::from(matches!(event, TrainEvent::Parity { .. }));
            };
            let result = run_with(&job, &mut count, surroundings, &AtomicBool::new(false));
            assert_eq!(scratch.join(published).exists(), !before, "{published}");
            assert_eq!(job.config.output.exists(), !before, "{published}");
            match result {
                Ok(_) => assert!(!before && compared > 1, "{compared} comparisons"),
                Err(error) => assert!(before && matches!(error, TrainError::Examination { .. })),
            }
        }
    }
}

#[test]
fn what_no_run_has_made_is_not_overwritten() {
    let scratch = TempDir::new();
    let job = job(&scratch.0, |config| {
        config.overwrite = true;
        config.max_steps = Some(1);
    });
    let thesis = job.config.output.join("thesis.txt");
    fs::create_dir(&job.config.output).unwrap();
    fs::write(&thesis, "years of work").unwrap();
    let error = run_until(&job, |_| false).unwrap_err();
    assert!(matches!(error, TrainError::NotAnOutput(_)), "{error}");
    assert_eq!(fs::read_to_string(&thesis).unwrap(), "years of work");
    // An empty folder, and what a run has made, may go.
    fs::remove_file(&thesis).unwrap();
    run_to_end(&job);
    run_to_end(&job);
}

#[test]
fn a_time_limit_publishes_what_there_is() {
    let scratch = TempDir::new();
    let job = job(&scratch.0, |config| config.time_limit = Some(1e-9));
    let (summary, _) = run_to_end(&job);
    assert_eq!((summary.outcome, summary.step), (Outcome::TimeLimit, 0));
    assert!(job.config.output.join("adapter_model.safetensors").is_file());
}

#[test]
fn settings_and_rows_that_cannot_be_used_are_named() {
    let scratch = TempDir::new();
    let error_of = |job: &TrainJob| run_until(job, |_| false).unwrap_err().to_string();
    let error = error_of(&job(&scratch.0, |config| config.dropout = 1.0));
    assert_eq!(error, "dropout is 1.0, but must be 0 to below 1");
    let error = error_of(&job(&scratch.0, |config| {
        config.targets = serde_json::from_str("\"q_proj,banana\"").unwrap();
    }));
    assert!(error.contains("banana"), "{error}");
    let mut outside = job(&scratch.0, |_| {});
    outside.train[5].tokens[1] = 384;
    assert_eq!(error_of(&outside), "line 6 has token 384, but the model's vocabulary ends at 384");
    let mut empty = job(&scratch.0, |_| {});
    empty.train.clear();
    assert!(error_of(&empty).contains("nothing to train on"));
}

#[test]
fn all_weights_are_trained_from_random_ones_and_published_as_a_model() {
    let scratch = TempDir::new();
    let base = scratch.0.join("base");
    fs::create_dir_all(&base).unwrap();
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    {
        fs::copy(fixture("tiny-llama").join(file), base.join(file)).unwrap();
    }
    let with_dtype = |name: &str, dtype: WeightDtype, resume: bool| {
        let mut job = job(&scratch.0, |config| {
            config.method = Method::Full;
            config.output = scratch.0.join(name);
            config.weight_decay = 0.01;
            config.epochs = 10.0;
            config.dtype = dtype;
            config.resume = resume;
        });
        job.model_dir = base.clone();
        job
    };
    let job = with_dtype("model", WeightDtype::Bf16, false);
    let (summary, events) = run_to_end(&job);
    let losses = losses(&events);
    assert!(losses[59].1 < 0.5 * losses[0].1, "{losses:?}");
    let model = Decoder::load(&job.config.output, WeightMode::Frozen).unwrap();
    assert!(model.num_parameters() > 0);
    let config = fs::read_to_string(job.config.output.join("config.json")).unwrap();
    assert!(config.contains("\"torch_dtype\": \"bfloat16\""), "{config}");
    assert!(job.config.output.join("tokenizer.json").is_file());

    let stopped = with_dtype("stopped", WeightDtype::Bf16, true);
    run_until(&stopped, |event| is_step(event, 31)).unwrap();
    assert_eq!(run_to_end(&stopped).0.digest, summary.digest, "resumed");

    // A trained model is a base like any other.
    let mut again = with_dtype("again", WeightDtype::F32, false);
    again.model_dir = job.config.output.clone();
    let (_, events) = run_to_end(&again);
    let first = self::losses(&events)[0].1;
    assert!(first < losses[5].1, "starts from the trained weights, not anew: {first}");
}

#[test]
fn training_goes_on_from_an_existing_adapter() {
    let scratch = TempDir::new();
    let first = job(&scratch.0, |config| config.epochs = 10.0);
    let (_, before) = run_to_end(&first);
    let second = job(&scratch.0, |config| {
        config.init_adapter = Some(first.config.output.clone());
        config.output = scratch.0.join("second");
    });
    let (_, after) = run_to_end(&second);
    assert!(losses(&after)[0].1 < 0.6 * losses(&before)[0].1);
}

//! Fine-tuning jobs from their record to a model that answers, and every way in which they end
//! otherwise.
#![cfg(unix)]

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf, time::Duration};

use crate::common::{
    TempDir,
    jobs::{Workshop, chat_rows, preference_rows},
};
use tunesmith::{
    jobs::{Alias, Auto, EventLevel, FileRecord, Gate, JobStatus, Method, ModelRecord, Request},
    model::Quantization,
};

/// Enough epochs to be interrupted in.
const LONG: Auto<u32> = Auto::Value(50);

#[test]
fn a_job_succeeds_and_its_model_answers_at_once() {
    let dir = TempDir::new();
    let shop = Workshop::open(&dir.0, |_| {});
    let (train, valid) = (shop.file(&chat_rows(12)), shop.file(&chat_rows(3)));
    let id = shop.create(&train, |job| {
        job.validation_file = Some(valid.clone());
        job.suffix = Some("colours".to_owned());
        job.alias = Some("painter".to_owned());
        job.hyperparameters.n_epochs = Auto::Value(4);
        job.hyperparameters.learning_rate_multiplier = Auto::Auto;
    });
    let job = shop.wait_for(&id, JobStatus::Succeeded);

    // At this very moment, and under the name that the job tells.
    let model = job.fine_tuned_model.unwrap();
    assert_eq!(shop.ask(&model), 4);
    let random = model.strip_prefix("ft:tiny:kitchen:colours:").unwrap();
    assert!(random.len() == 8 && random.chars().all(|c| c.is_ascii_alphanumeric()), "{model}");
    let alias: Alias = shop.service.store().get("painter").unwrap().unwrap();
    assert_eq!(alias.model, model);
    let record: ModelRecord = shop.service.store().get(&model).unwrap().unwrap();
    assert!(shop.service.path(&record.path).join("adapter_config.json").exists());

    assert_eq!(job.num_examples, Some(12));
    assert_eq!((job.step, job.total_steps), (12, Some(12)));
    assert_eq!(job.hyperparameters.learning_rate_multiplier, Auto::Value(1.0));
    assert!(job.finished_at >= job.started_at && job.estimated_finish.is_none());
    let log = fs::read_to_string(shop.service.path(&record.path).join("events.jsonl")).unwrap();
    let events = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let steps = events.filter(|event| event["event"] == "step");
    let tokens: u64 = steps.filter_map(|event| event["num_tokens"].as_u64()).sum();
    assert_eq!(job.trained_tokens, Some(tokens));

    // The table: each step once, and validation after each.
    let table = shop.content(&job.result_files[0]);
    let mut lines = table.lines();
    let header = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy";
    assert_eq!(lines.next(), Some(header));
    for (number, line) in (1..=12).zip(lines) {
        let cells: Vec<f64> = line.split(',').map(|cell| cell.parse().unwrap()).collect();
        assert!(cells.len() == 5 && cells[0] == f64::from(number), "{line}");
    }
    assert_eq!(table.lines().count(), 13);
    let file: FileRecord = shop.service.store().get(&job.result_files[0]).unwrap().unwrap();
    assert_eq!((file.purpose.as_str(), file.bytes), ("fine-tune-results", table.len() as u64));

    // The last three of four epochs.
    let checkpoints = shop.checkpoints(&id);
    assert_eq!(checkpoints.iter().map(|found| found.step).collect::<Vec<_>>(), [6, 9, 12]);
    for checkpoint in &checkpoints {
        let record: ModelRecord = shop.service.store().get(&checkpoint.model).unwrap().unwrap();
        assert!(record.id.ends_with(&format!(":ckpt-step-{}", checkpoint.step)), "{record:?}");
        assert!(shop.service.path(&record.path).join("adapter_config.json").exists());
        for key in ["train_loss", "valid_loss", "full_valid_loss", "full_valid_mean_token_accuracy"]
        {
            assert!(checkpoint.metrics[key].is_f64(), "{key}: {checkpoint:?}");
        }
    }

    let messages = shop.messages(&id);
    let place = |start: &str| {
        let found = messages.iter().position(|message| message.starts_with(start));
        found.unwrap_or_else(|| panic!("{start} is not in {messages:#?}"))
    };
    let order = [
        place(&format!("Validating training file: {train} and validation file: {valid}")),
        place("Files validated, moving job to queued state"),
        place("Fine-tuning job started"),
        place("Step 1/12: training loss="),
        place("Checkpoint created at step 3"),
        place("Step 12/12: training loss="),
        place("Checkpoint created at step 12"),
        place("Serving parity: max difference of log-probabilities "),
        place(&format!("New fine-tuned model created: {model}")),
        place("The job has successfully completed"),
    ];
    assert!(order.is_sorted(), "{messages:#?}");
    let steps = shop.events(&id).into_iter().filter(|event| event.is_metrics);
    let steps: Vec<u64> = steps.map(|event| event.data["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, (1..=12).collect::<Vec<_>>());

    // Nothing is left that only the run needed.
    for name in ["model.work", "train.jsonl", "valid.jsonl"] {
        shop.wait_until_gone(&shop.service.job_dir(&id).join(name));
    }
}

#[test]
fn bad_data_ends_a_job_with_the_lines_that_are_wrong() {
    let dir = TempDir::new();
    let shop = Workshop::open(&dir.0, |_| {});
    let good = chat_rows(12);
    let bad = shop.file(&(good.clone() + "{\"messages\": []}\nnot json\n"));
    let id = shop.create(&bad, |_| {});
    let error = shop.wait_for(&id, JobStatus::Failed).error.unwrap();
    assert_eq!(error.code, "invalid_training_file");
    assert_eq!(error.param.as_deref(), Some("training_file"));
    let start = "The job failed due to an invalid training file. Line 13: ";
    assert!(error.message.starts_with(start) && error.message.contains("Line 14: "), "{error:?}");
    let told = shop.events(&id).into_iter().filter(|event| event.level == EventLevel::Error);
    assert_eq!(told.count(), 3);

    let good = shop.file(&good);
    let id = shop.create(&good, |job| job.validation_file = Some(bad.clone()));
    let error = shop.wait_for(&id, JobStatus::Failed).error.unwrap();
    assert_eq!(error.code, "invalid_validation_file");
    assert_eq!(error.param.as_deref(), Some("validation_file"));

    let few = shop.file(&chat_rows(3));
    let id = shop.create(&few, |_| {});
    let error = shop.wait_for(&id, JobStatus::Failed).error.unwrap();
    let expected = "Training file has 3 example(s), but must have at least 10 examples";
    assert_eq!((error.code.as_str(), error.message.as_str()), ("invalid_n_examples", expected));

    let id = shop.create(&good, |job| job.method = Method::Dpo);
    assert_eq!(shop.wait_for(&id, JobStatus::Failed).error.unwrap().code, "invalid_training_file");
    let id = shop.create("file-gone", |_| {});
    assert_eq!(shop.wait_for(&id, JobStatus::Failed).error.unwrap().code, "invalid_training_file");
    let id = shop.create(&shop.file("\u{0}\u{1}"), |_| {});
    assert_eq!(shop.wait_for(&id, JobStatus::Failed).error.unwrap().code, "invalid_training_file");
}

#[test]
fn a_job_trains_over_the_base_as_the_server_holds_it() {
    for quantize in [Quantization::Bf16, Quantization::Int8] {
        let dir = TempDir::new();
        let shop = Workshop::over(quantize, &dir.0, |_| {});
        let id = shop.create(&shop.file(&chat_rows(12)), |_| {});
        shop.wait_for(&id, JobStatus::Succeeded);
        let messages = shop.messages(&id);
        let words = "Serving parity: max difference of log-probabilities ";
        let said = messages.iter().find_map(|said| said.strip_prefix(words)).unwrap();
        let difference: f64 = said.split(' ').next().unwrap().parse().unwrap();
        // Over a base in another form it is a thousand times that.
        assert!(difference < 5e-6, "{quantize:?}: {messages:#?}");
    }
}

#[test]
fn jobs_wait_for_their_turn() {
    let dir = TempDir::new();
    let shop = Workshop::open(&dir.0, |_| {});
    let file = shop.file(&chat_rows(12));
    let first = shop.create(&file, |job| job.hyperparameters.n_epochs = LONG);
    let second = shop.create(&file, |_| {});
    shop.wait(&first, "it trains", |job| job.step > 0);
    shop.wait(&second, "it is queued", |job| job.status == JobStatus::Queued);
    // As long as the first trains, the second does not.
    while shop.job(&first).status == JobStatus::Running {
        let waits = shop.job(&second).status == JobStatus::Queued;
        assert!(waits || shop.job(&first).status == JobStatus::Succeeded);
        std::thread::sleep(Duration::from_millis(5));
    }
    shop.wait_for(&first, JobStatus::Succeeded);
    shop.wait_for(&second, JobStatus::Succeeded);
}

#[test]
fn a_paused_job_resumes_to_the_model_that_it_would_have_made() {
    let dir = TempDir::new();
    let shop = Workshop::open(&dir.0, |_| {});
    let file = shop.file(&chat_rows(12));
    let whole = shop.create(&file, |job| job.hyperparameters.n_epochs = LONG);
    shop.wait_for(&whole, JobStatus::Succeeded);

    let id = shop.create(&file, |job| job.hyperparameters.n_epochs = LONG);
    shop.wait(&id, "it has trained", |job| job.step >= 20);
    shop.edit(&id, |job| job.request = Some(Request::Pause));
    let paused = shop.wait_for(&id, JobStatus::Paused);
    assert!(paused.request.is_none() && paused.step < 150, "{paused:?}");
    shop.edit(&id, |job| job.status = JobStatus::Queued);
    shop.wait_for(&id, JobStatus::Succeeded);
    assert!(shop.weights(&id) == shop.weights(&whole));
    assert!(shop.messages(&id).contains(&"Fine-tuning job resumed".to_owned()));

    // One that is laid down before it has begun.
    let early = shop.create(&file, |job| job.request = Some(Request::Pause));
    let paused = shop.wait_for(&early, JobStatus::Paused);
    assert_eq!(paused.num_examples, Some(12));
    shop.edit(&early, |job| job.status = JobStatus::Queued);
    shop.wait_for(&early, JobStatus::Succeeded);

    let steps = shop.events(&id).into_iter().filter(|event| event.is_metrics);
    let steps: Vec<u64> = steps.map(|event| event.data["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, (1..=150).collect::<Vec<_>>());
}

#[test]
fn a_job_can_be_cancelled_wherever_it_is() {
    let dir = TempDir::new();
    let shop = Workshop::open(&dir.0, |_| {});
    let file = shop.file(&chat_rows(12));
    let running = shop.create(&file, |job| job.hyperparameters.n_epochs = LONG);
    let queued = shop.create(&file, |_| {});
    shop.wait(&running, "an epoch is over", |_| !shop.checkpoints(&running).is_empty());
    assert!(shop.job(&running).estimated_finish.is_some());
    shop.wait(&queued, "it is queued", |job| job.status == JobStatus::Queued);
    let cancel = |id: &str| {
        shop.edit(id, |job| job.request = Some(Request::Cancel));
        let job = shop.wait_for(id, JobStatus::Cancelled);
        assert!(job.request.is_none() && job.finished_at.is_some() && job.error.is_none());
    };
    cancel(&queued);
    cancel(&running);
    shop.wait_until_gone(&shop.service.job_dir(&running).join("model.work"));
    shop.wait_until_gone(&shop.service.job_dir(&running).join("model"));
    // What its epochs left stays usable.
    for checkpoint in shop.checkpoints(&running) {
        let record: ModelRecord = shop.service.store().get(&checkpoint.model).unwrap().unwrap();
        assert!(shop.service.path(record.path).join("adapter_config.json").exists());
    }
    let validating = shop.create(&file, |job| job.request = Some(Request::Cancel));
    shop.wait_for(&validating, JobStatus::Cancelled);
    // One that its client ended while nobody was at work on it.
    let paused = shop.create(&file, |job| job.request = Some(Request::Pause));
    shop.wait_for(&paused, JobStatus::Paused);
    shop.edit(&paused, |job| job.status = JobStatus::Cancelled);
    shop.wait_until_gone(&shop.service.job_dir(&paused).join("train.jsonl"));
}

#[test]
fn a_job_goes_on_from_a_model_and_from_a_checkpoint() {
    let dir = TempDir::new();
    let shop = Workshop::open(&dir.0, |_| {});
    let file = shop.file(&chat_rows(12));
    let first = shop.create(&file, |_| {});
    let model = shop.wait_for(&first, JobStatus::Succeeded).fine_tuned_model.unwrap();
    let checkpoint = shop.checkpoints(&first)[0].model.clone();
    let then = |parent: &str, change: fn(&mut tunesmith::jobs::Job)| {
        let id = shop.create(&file, |job| {
            job.parent_model = Some(parent.to_owned());
            change(job);
        });
        let job = shop.wait_for(&id, JobStatus::Succeeded);
        shop.ask(&job.fine_tuned_model.unwrap());
        shop.weights(&id)
    };
    let (after_model, after_checkpoint) = (then(&model, |_| {}), then(&checkpoint, |_| {}));
    assert!(after_model != shop.weights(&first) && after_model != after_checkpoint);

    // Preferences on top, in OpenAI's order.
    let preferences = shop.file(&preference_rows(12));
    let id = shop.create(&preferences, |job| {
        job.parent_model = Some(model.clone());
        job.method = Method::Dpo;
        job.hyperparameters.beta = Some(Auto::Auto);
    });
    let job = shop.wait_for(&id, JobStatus::Succeeded);
    assert_eq!(job.hyperparameters.beta, Some(Auto::Value(0.1)));
    let steps = shop.events(&id).into_iter().filter(|event| event.is_metrics);
    assert!(steps.into_iter().all(|event| event.data["reward_margin"].is_f64()));

    // A parent that is gone is named.
    let id = shop.create(&file, |job| job.parent_model = Some("ft:tiny:kitchen::none".to_owned()));
    let error = shop.wait_for(&id, JobStatus::Failed).error.unwrap();
    assert!(error.message.contains("ft:tiny:kitchen::none"), "{error:?}");
}

#[test]
fn an_alias_with_a_gate_does_not_move_unless_the_gate_is_passed() {
    let dir = TempDir::new();
    let shop = Workshop::open(&dir.0, |_| {});
    // Without validation rows there is nothing that could pass it.
    let id = shop.create(&shop.file(&chat_rows(12)), |job| {
        job.alias = Some("guarded".to_owned());
        job.gate = Some(Gate::default());
    });
    shop.wait_for(&id, JobStatus::Succeeded);
    assert_eq!(shop.service.store().get::<Alias>("guarded").unwrap(), None);
    assert!(shop.messages(&id).iter().any(|message| message.contains("guarded stays")));
}

#[test]
fn a_process_that_fails_ends_its_job_and_one_that_crashes_is_started_again() {
    for (train, attempts, code, wanted) in [
        (
            "echo 'error: the loss is NaN at step 3' >&2; exit 1",
            0,
            "training_failed",
            "NaN at step 3",
        ),
        (
            "echo 'error: writing: No space left on device (os error 28)' >&2; exit 1",
            0,
            "insufficient_storage",
            "disk is full",
        ),
        ("echo 'thread main panicked at 7' >&2; exit 101", 2, "training_failed", "panicked at 7"),
        ("kill -9 $$", 2, "training_failed", "signal: 9"),
        ("exit 0", 2, "training_failed", "stopped from outside"),
    ] {
        let dir = TempDir::new();
        let program = script(&dir, train);
        let shop = Workshop::open(&dir.0, |config| config.executable = program);
        let id = shop.create(&shop.file("{}"), |_| {});
        let job = shop.wait_for(&id, JobStatus::Failed);
        let error = job.error.unwrap();
        assert_eq!((job.attempts, error.code.as_str()), (attempts, code), "{train}");
        assert!(error.message.contains(wanted), "{train}: {error:?}");
        assert!(!error.message.contains(dir.0.to_str().unwrap()), "{error:?}");
    }
}

#[test]
fn a_process_that_writes_without_end_or_sense_harms_nobody() {
    let dir = TempDir::new();
    let train = "for i in $(seq 20000); do echo '{\"event\":\"warning\"'; echo $i >&2; done
        head -c 9000000 /dev/zero; echo 'error: enough' >&2; exit 1";
    let program = script(&dir, train);
    let shop = Workshop::open(&dir.0, |config| config.executable = program);
    let id = shop.create(&shop.file("{}"), |_| {});
    let error = shop.wait_for(&id, JobStatus::Failed).error.unwrap();
    assert_eq!(error.message, "The job failed: enough");
    assert!(fs::metadata(shop.service.job_dir(&id).join("log")).unwrap().len() <= 1 << 20);
}

/// A program whose check is content with everything, and whose training is `train`.
fn script(dir: &TempDir, train: &str) -> PathBuf {
    let path = dir.join("program.sh");
    let report = r#"{"rows":12,"examples":12,"num_errors":0,"errors":[],"warnings":[]}"#;
    let text =
        format!("#!/bin/sh\nif [ \"$1\" = check ]; then echo '{report}'; exit 0; fi\n{train}\n");
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

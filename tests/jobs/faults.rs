//! Jobs that cannot end well say why, publish nothing and leave the service as it was; and what is in use
//! stays.
#![cfg(unix)]

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf};

use crate::common::{
    TempDir,
    jobs::{Workshop, chat_rows},
};
use serde_json::Value;
use tunesmith::jobs::{Auto, JobStatus, Model, ModelRecord};

#[test]
fn a_loss_that_is_no_number_fails_the_job_and_names_the_step() {
    let dir = TempDir::new();
    let shop = Workshop::open(&dir.0, |_| {});
    let id = shop.create(&shop.file(&chat_rows(12)), |job| {
        job.hyperparameters.learning_rate_multiplier = Auto::Value(1e34);
    });
    let job = shop.wait_for(&id, JobStatus::Failed);
    let error = job.error.unwrap();
    assert_eq!((error.code.as_str(), job.attempts), ("training_failed", 0), "{error:?}");
    assert!(error.message.starts_with("The job failed: the "), "{error:?}");
    assert!(error.message.contains(" is NaN at step "), "{error:?}");
    assert_eq!(job.fine_tuned_model, None);
    shop.wait_until_gone(&shop.service.job_dir(&id).join("model.work"));
}

#[test]
fn an_adapter_of_which_the_server_says_something_else_than_the_trainer_is_not_published() {
    let dir = TempDir::new();
    // The trainer's own figures, changed behind its back.
    let program = program(
        &dir,
        r#"sed -i 's/"logprobs":\[/"logprobs":[-77,/' "$(dirname "$3")/model/parity.json""#,
    );
    let shop = Workshop::open(&dir.0, |config| config.executable = program);
    let id = shop.create(&shop.file(&chat_rows(12)), |job| job.alias = Some("painter".to_owned()));
    let job = shop.wait_for(&id, JobStatus::Failed);
    let error = job.error.unwrap();
    assert_eq!(error.code, "parity_failed", "{error:?}");
    assert!(error.message.contains("differ from the trainer's by up to "), "{error:?}");
    assert!(job.fine_tuned_model.is_none() && job.result_files.is_empty(), "nothing is published");
    assert!(shop.service.alias("painter").is_err());
    shop.wait_until_gone(&shop.service.job_dir(&id).join("model"));
}

/// This program, which does `then` after each training.
fn program(dir: &TempDir, then: &str) -> PathBuf {
    let path = dir.join("program.sh");
    let tunesmith = env!("CARGO_BIN_EXE_tunesmith");
    let text = format!("#!/bin/sh\n{tunesmith} \"$@\" || exit $?\n[ \"$1\" = check ] || {then}\n");
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
#[cfg(target_os = "linux")]
fn a_job_that_needs_more_memory_than_it_may_have_fails_with_a_reason() {
    // Long rows, so that it is training that needs it.
    let rows = chat_rows(12).replace("What is", &"What is the colour of the sky ".repeat(28));
    for (memory, status) in [(12 << 20, JobStatus::Failed), (4 << 30, JobStatus::Succeeded)] {
        let dir = TempDir::new();
        let shop = Workshop::open(&dir.0, |config| config.memory = Some(memory));
        let id = shop.create(&shop.file(&rows), |_| {});
        let job = shop.wait_for(&id, status);
        let error = job.error.map(|error| error.message).unwrap_or_default();
        assert_eq!(error.contains("memory"), status == JobStatus::Failed, "{error}");
        // The server is none the worse for it.
        assert!(shop.service.store().integrity().unwrap().is_none());
    }
}

#[test]
fn a_checkpoint_that_an_alias_stands_for_outlives_the_later_ones() {
    let dir = TempDir::new();
    let shop = Workshop::open(&dir.0, |_| {});
    let id = shop.create(&shop.file(&chat_rows(12)), |job| {
        job.hyperparameters.n_epochs = Auto::Value(30);
    });
    // The newest may be gone before the alias comes.
    let deployed: ModelRecord = loop {
        let Some(newest) = shop.checkpoints(&id).pop() else { continue };
        let Some(record) = shop.service.store().get::<ModelRecord>(&newest.model).unwrap() else {
            continue;
        };
        let model = Model::Tuned(record.clone());
        if shop.service.put_alias("preview", &model, Value::Null).is_ok() {
            break record;
        }
    };
    shop.wait_for(&id, JobStatus::Succeeded);
    let kept: Vec<String> = shop.checkpoints(&id).into_iter().map(|found| found.model).collect();
    assert_eq!(kept.len(), 4, "{kept:?}");
    assert_eq!(kept[0], deployed.id);
    assert!(shop.service.version_of("preview").unwrap().is_some());
    // Of the others nothing is left.
    let folders = fs::read_dir(shop.service.job_dir(&id).join("epochs")).unwrap().count();
    assert_eq!(folders, 4);
}

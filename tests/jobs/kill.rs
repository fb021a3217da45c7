//! The server and its training processes, killed with SIGKILL at any moment: no job is lost, none is
//! half there, and each makes the model that it would have made undisturbed.
#![cfg(unix)]

use std::{
    fs,
    path::Path,
    process::Command,
    thread::sleep,
    time::{Duration, Instant},
};

use crate::common::{
    Server, TempDir, fixture,
    jobs::{chat_rows, new_job, put_file},
    server::command,
};
use tunesmith::jobs::{Auto, Checkpoint, FileRecord, Job, JobEvent, JobStatus, ModelRecord, Store};

/// Steps of the job: batches of 4 of 12 rows, 20 times.
const STEPS: u64 = 60;
/// A server gets so long to finish the job.
const PATIENCE: Duration = Duration::from_secs(120);

/// A data folder with one job that waits to be seen to; its id.
fn seed(dir: &Path) -> String {
    let store = Store::open(dir).unwrap();
    let (train, valid) =
        (put_file(&store, dir, &chat_rows(12)), put_file(&store, dir, &chat_rows(4)));
    let mut job = new_job(&train);
    job.validation_file = Some(valid);
    job.hyperparameters.n_epochs = Auto::Value(20);
    store.write(|transaction| transaction.insert(&job)).unwrap();
    job.id
}

fn serve(dir: &Path) -> Server {
    let mut command = command(&fixture("tiny-llama"), &["--data-dir"]);
    command.arg(dir);
    Server::from_command(command)
}

/// Runs the server until the job in `dir` has ended; then stops it.
fn finish(dir: &Path, id: &str) -> Job {
    let since = Instant::now();
    let server = serve(dir);
    // Its last act on the folder.
    let done = || {
        let job = dir.join("jobs").join(id);
        job.join("model").exists() && !job.join("train.jsonl").exists()
    };
    while !done() {
        assert!(since.elapsed() < PATIENCE, "the job does not end:\n{}", log_of(dir, id));
        sleep(Duration::from_millis(10));
    }
    server.terminate();
    let (status, log) = server.wait();
    assert!(status.success(), "{log}");
    Store::open(dir).unwrap().get(id).unwrap().unwrap()
}

fn log_of(dir: &Path, id: &str) -> String {
    fs::read_to_string(dir.join("jobs").join(id).join("log")).unwrap_or_default()
}

fn weights(dir: &Path, id: &str) -> Vec<u8> {
    fs::read(dir.join("jobs").join(id).join("model/adapter_model.safetensors")).unwrap()
}

/// The training process of the job, if there is one.
fn trainer(id: &str) -> Option<String> {
    let found = Command::new("pgrep").args(["-f", &format!("train --config .*{id}")]).output();
    let text = String::from_utf8(found.unwrap().stdout).unwrap();
    text.lines().next().map(str::to_owned)
}

/// What must hold of a job's records however often it was interrupted.
fn check(dir: &Path, id: &str, weights_undisturbed: &[u8], what: &str) {
    let store = Store::open(dir).unwrap();
    assert_eq!(store.integrity().unwrap(), None, "{what}");
    let job: Job = store.get(id).unwrap().unwrap();
    assert_eq!(job.status, JobStatus::Succeeded, "{what}: {job:?}");
    assert!(weights(dir, id) == weights_undisturbed, "{what}: other weights");
    let model: ModelRecord = store.get(&job.fine_tuned_model.unwrap()).unwrap().unwrap();
    assert!(dir.join(model.path).join("adapter_config.json").exists(), "{what}");

    let events: Vec<JobEvent> = store.all(id).unwrap();
    let steps = events.iter().filter(|event| event.is_metrics);
    let steps: Vec<u64> = steps.map(|event| event.data["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, (1..=STEPS).collect::<Vec<_>>(), "{what}");
    for once in ["Validating training file", "Files validated", "The job has successfully"] {
        let count = events.iter().filter(|event| event.message.starts_with(once)).count();
        assert_eq!(count, 1, "{what}: {once}");
    }
    let file: FileRecord = store.get(&job.result_files[0]).unwrap().unwrap();
    let table = fs::read_to_string(dir.join("blobs").join(file.sha256)).unwrap();
    let steps: Vec<u64> = table
        .lines()
        .skip(1)
        .map(|line| line.split(',').next().unwrap().parse().unwrap())
        .collect();
    assert_eq!(steps, (1..=STEPS).collect::<Vec<_>>(), "{what}");

    let checkpoints: Vec<Checkpoint> = store.all(id).unwrap();
    let steps: Vec<u64> = checkpoints.iter().map(|checkpoint| checkpoint.step).collect();
    assert_eq!(steps, [STEPS - 6, STEPS - 3, STEPS], "{what}");
    for checkpoint in checkpoints {
        let model: ModelRecord = store.get(&checkpoint.model).unwrap().unwrap();
        assert!(dir.join(model.path).join("adapter_config.json").exists(), "{what}");
    }
    let mut left: Vec<String> = fs::read_dir(dir.join("jobs").join(id))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(left, ["epochs", "job.yaml", "log", "model"], "{what}");
}

/// Kills the server, its trainer, or both in turn, at `kills` moments spread over the run.
fn kill_often(kills: u32) {
    let undisturbed = TempDir::new();
    let id = seed(&undisturbed.0);
    let started = Instant::now();
    finish(&undisturbed.0, &id);
    let duration = started.elapsed();
    let whole = weights(&undisturbed.0, &id);
    check(&undisturbed.0, &id, &whole, "undisturbed");

    for moment in 1..=kills {
        let dir = TempDir::new();
        let id = seed(&dir.0);
        let what = format!("moment {moment}");
        let server = serve(&dir.0);
        // Spread by the golden ratio.
        sleep(duration.mul_f64(f64::from(moment) * 0.618 % 1.0));
        let trainer = trainer(&id).filter(|_| !moment.is_multiple_of(3));
        if let Some(trainer) = &trainer {
            // It may have ended meanwhile.
            let _ = Command::new("kill").args(["-KILL", trainer]).status();
            sleep(duration.mul_f64(f64::from(moment) * 0.382 % 0.3));
        }
        if trainer.is_none() || moment.is_multiple_of(2) {
            // Dropped is killed, with SIGKILL.
            drop(server);
            finish(&dir.0, &id);
        } else {
            drop_politely(server, &dir.0, &id);
        }
        check(&dir.0, &id, &whole, &what);
    }
}

/// Lets the server end with SIGTERM in the middle of the job, and another finish it.
fn drop_politely(server: Server, dir: &Path, id: &str) {
    server.terminate();
    let (status, log) = server.wait();
    assert!(status.success(), "{log}");
    assert_eq!(trainer(id), None, "a process outlives the server");
    finish(dir, id);
}

#[test]
fn a_job_survives_kills_of_server_and_trainer() {
    kill_often(6);
}

#[test]
#[ignore = "takes minutes; the same at many more moments"]
fn a_job_survives_fifty_kills_of_server_and_trainer() {
    kill_often(50);
}

#[test]
fn the_trainer_of_a_killed_server_ends_by_itself() {
    let dir = TempDir::new();
    let id = seed(&dir.0);
    let server = serve(&dir.0);
    let since = Instant::now();
    while trainer(&id).is_none() {
        assert!(since.elapsed() < PATIENCE, "no trainer comes");
        sleep(Duration::from_millis(5));
    }
    drop(server);
    let since = Instant::now();
    while trainer(&id).is_some() {
        assert!(since.elapsed() < Duration::from_secs(20), "the trainer does not end");
        sleep(Duration::from_millis(10));
    }
}

//! The fine-tuning service within a test's own process, over a tiny model, and records to feed it.

use std::{
    fs,
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tunesmith::{
    adapters::AdapterRegistry,
    engine::{
        self, EngineConfig, GenerationEvent, GenerationRequest, RequestOptions, SamplingParams,
    },
    jobs::{
        Checkpoint, FileRecord, Job, JobEvent, JobStatus, JobsConfig, NewFile, Parts, Service,
        Store, new_id, unix_seconds,
    },
    model::{Decoder, Quantization},
    publish::sha256_hex,
    text::{ChatTemplate, Tokenizer},
};

use super::fixture;

/// Nothing that a test waits for takes longer than this, or it fails.
const PATIENCE: Duration = Duration::from_secs(240);

/// A service at work. Stopped when the value is dropped.
pub struct Workshop {
    pub service: Arc<Service>,
}

impl Workshop {
    /// A service in `dir` as an operator might set it up, with changes.
    pub fn open(dir: &Path, change: impl FnOnce(&mut JobsConfig)) -> Self {
        Self::over(Quantization::None, dir, change)
    }

    /// As [`Self::open`], with a base that is held so.
    pub fn over(quantize: Quantization, dir: &Path, change: impl FnOnce(&mut JobsConfig)) -> Self {
        let model = fixture("tiny-llama");
        let decoder = Arc::new(Decoder::load(&model, quantize.into()).unwrap());
        let registry = AdapterRegistry::new(decoder.config().clone())
            .with_base_fingerprint(decoder.fingerprint());
        let engine_config = EngineConfig::for_model(decoder.config(), 4, 64 << 20);
        let eos_token_ids = decoder.config().eos_token_ids.clone();
        let parts = Parts {
            engine: engine::spawn(decoder, engine_config).unwrap(),
            registry: Arc::new(registry),
            tokenizer: Arc::new(Tokenizer::from_dir(&model).unwrap()),
            template: Arc::new(ChatTemplate::from_dir(&model).unwrap()),
            eos_token_ids,
        };
        let mut config = JobsConfig {
            data_dir: dir.to_owned(),
            base_name: "tiny".to_owned(),
            base_dir: model,
            quantize,
            organization: "kitchen".to_owned(),
            max_running: 1,
            threads: 1,
            memory: None,
            file_quota: 1 << 30,
            webhooks: Vec::new(),
            gate: None,
            allow_python: false,
            executable: env!("CARGO_BIN_EXE_tunesmith").into(),
        };
        change(&mut config);
        let service = Service::open(config, parts).unwrap();
        service.start().unwrap();
        Self { service }
    }

    /// Uploads rows.
    pub fn file(&self, rows: &str) -> String {
        let content = self.service.stage_bytes(rows.as_bytes()).unwrap();
        self.service.add_file(content, NewFile::new("rows.jsonl", "fine-tune")).unwrap().id
    }

    /// Creates a job of these hyperparameters.
    pub fn create(&self, training_file: &str, change: impl FnOnce(&mut Job)) -> String {
        let mut job = new_job(training_file);
        change(&mut job);
        self.service.store().write(|transaction| transaction.insert(&job)).unwrap();
        self.service.ring();
        job.id
    }

    /// Changes a job as its client would.
    pub fn edit(&self, id: &str, edit: impl FnOnce(&mut Job)) {
        let edited: Result<(), tunesmith::jobs::StoreError> =
            self.service.store().write(|transaction| {
                let mut job: Job = transaction.get(id)?.unwrap();
                edit(&mut job);
                transaction.update(&job)
            });
        edited.unwrap();
        self.service.ring();
    }

    pub fn job(&self, id: &str) -> Job {
        self.service.store().get(id).unwrap().unwrap()
    }

    /// Waits until the job is as it should be.
    pub fn wait(&self, id: &str, what: &str, holds: impl Fn(&Job) -> bool) -> Job {
        let started = Instant::now();
        loop {
            let job = self.job(id);
            if holds(&job) {
                return job;
            }
            let hopeless = job.status.is_final() || started.elapsed() > PATIENCE;
            assert!(!hopeless, "waited in vain until {what}: {job:?}\n{:#?}", self.messages(id));
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for the job's end, which must be this.
    pub fn wait_for(&self, id: &str, status: JobStatus) -> Job {
        self.wait(id, status.name(), |job| job.status == status)
    }

    /// Waits until nothing is at `path`: what an ended job needs no more goes after its last status.
    pub fn wait_until_gone(&self, path: &Path) {
        let started = Instant::now();
        while path.exists() {
            assert!(started.elapsed() < PATIENCE, "{} stays", path.display());
            thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn events(&self, id: &str) -> Vec<JobEvent> {
        self.service.store().all(id).unwrap()
    }

    pub fn messages(&self, id: &str) -> Vec<String> {
        self.events(id).into_iter().map(|event| event.message).collect()
    }

    pub fn checkpoints(&self, id: &str) -> Vec<Checkpoint> {
        self.service.store().all(id).unwrap()
    }

    /// The weights that a job has made.
    pub fn weights(&self, id: &str) -> Vec<u8> {
        fs::read(self.service.job_dir(id).join("model/adapter_model.safetensors")).unwrap()
    }

    /// The content of a file.
    pub fn content(&self, file: &str) -> String {
        let file: FileRecord = self.service.store().get(file).unwrap().unwrap();
        fs::read_to_string(self.service.path("blobs").join(file.sha256)).unwrap()
    }

    /// How many tokens `model` writes, now.
    pub fn ask(&self, model: &str) -> usize {
        let parts = self.service.parts();
        let adapter = parts.registry.get(model).expect("the model is loaded");
        let mut stream = parts
            .engine
            .generate(GenerationRequest {
                prompt: vec![1, 2, 3],
                adapter: Some(adapter),
                sampling: SamplingParams::greedy(),
                max_tokens: 4,
                stop_token_ids: Vec::new(),
                score_prompt: false,
                options: RequestOptions::default(),
            })
            .unwrap();
        std::iter::from_fn(|| stream.blocking_next())
            .filter(|event| matches!(event, GenerationEvent::Token { .. }))
            .count()
    }
}

impl Drop for Workshop {
    fn drop(&mut self) {
        self.service.stop();
    }
}

/// Puts rows into the data folder of a service.
pub fn put_file(store: &Store, data_dir: &Path, rows: &str) -> String {
    let sha256 = sha256_hex(&[rows.as_bytes()]);
    fs::create_dir_all(data_dir.join("blobs")).unwrap();
    fs::write(data_dir.join("blobs").join(&sha256), rows).unwrap();
    let file: FileRecord = serde_json::from_value(json!({
        "id": new_id("file-"), "bytes": rows.len(), "created_at": unix_seconds(),
        "filename": "rows.jsonl", "purpose": "fine-tune", "sha256": sha256,
    }))
    .unwrap();
    store.write(|transaction| transaction.insert(&file)).unwrap();
    file.id
}

/// A supervised job of two epochs with batches of four.
pub fn new_job(training_file: &str) -> Job {
    serde_json::from_value(json!({
        "id": new_id("ftjob-"),
        "created_at": unix_seconds(),
        "model": "tiny",
        "training_file": training_file,
        "seed": 7,
        "method": "supervised",
        "hyperparameters": {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 5.0},
        "integrations": [],
        "status": "validating_files",
        "result_files": [],
        "step": 0,
        "attempts": 0,
    }))
    .unwrap()
}

/// `count` chat rows.
pub fn chat_rows(count: usize) -> String {
    let row = |n: usize| {
        let answer = ["red", "green", "blue"][n % 3];
        json!({"messages": [
            {"role": "user", "content": format!("What is {n}?")},
            {"role": "assistant", "content": answer},
        ]})
    };
    lines((0..count).map(row))
}

/// `count` preference rows.
pub fn preference_rows(count: usize) -> String {
    let row = |n: usize| {
        json!({
            "input": {"messages": [{"role": "user", "content": format!("What is {n}?")}]},
            "preferred_output": [{"role": "assistant", "content": "red and green"}],
            "non_preferred_output": [{"role": "assistant", "content": "blue"}],
        })
    };
    lines((0..count).map(row))
}

fn lines(rows: impl Iterator<Item = Value>) -> String {
    rows.map(|row| format!("{row}\n")).collect()
}

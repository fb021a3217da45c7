//! The service as the floors above see it: one value that owns the data folder.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use super::{
    Bell, EventLevel, Gate, JobEvent, JobsError, Store, StoreError, Transaction, blobs::Blobs,
    evals, expiry, new_id, runner, unix_seconds, webhooks,
};
use crate::adapters::AdapterRegistry;
use crate::engine::EngineHandle;
use crate::text::{ChatTemplate, Tokenizer};
use crate::train::Quantization;

/// What the operator decided.
#[derive(Debug, Clone)]
pub struct JobsConfig {
    /// Everything is in here.
    pub data_dir: PathBuf,
    /// What clients call the base model.
    pub base_name: String,
    /// The base model's folder.
    pub base_dir: PathBuf,
    /// How the server holds it. Jobs train over the same, or its answers would not be the trainer's.
    pub quantize: Quantization,
    /// Part of every new model's name.
    pub organization: String,
    /// Jobs that train at once.
    pub max_running: usize,
    /// Threads of each job.
    pub threads: usize,
    /// Bytes of memory that each job may have; `None`: no limit.
    pub memory: Option<u64>,
    /// Bytes that all files together may have.
    pub file_quota: u64,
    /// Who is told when a job ends.
    pub webhooks: Vec<Webhook>,
    /// The condition of jobs that name an alias and no gate of their own.
    pub gate: Option<Gate>,
    /// Whether `python` graders run (the user's code, in a child process).
    pub allow_python: bool,
    /// The program that a job runs: this one.
    pub executable: PathBuf,
}

/// Somebody who is told when a job ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Webhook {
    /// `http://` or `https://`.
    pub url: String,
    /// `whsec_` and base64; signs the deliveries.
    pub secret: Option<String>,
}

/// What the service works with, shared with the server.
#[derive(Clone)]
pub struct Parts {
    /// Runs requests of evaluations.
    pub engine: EngineHandle,
    /// Where models are published.
    pub registry: Arc<AdapterRegistry>,
    /// The base model's tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// The base model's chat template.
    pub template: Arc<ChatTemplate>,
    /// Tokens that end an answer.
    pub eos_token_ids: Vec<u32>,
}

/// Work that goes on by itself, on a thread of its own, until [`Service::is_stopping`]: the thread's
/// name and its loop.
type Worker = (&'static str, fn(&Service));

/// The service's threads.
const WORKERS: &[Worker] = &[
    ("runner", runner::run),
    ("expiry", expiry::run),
    ("webhooks", webhooks::run),
    ("evals", evals::work),
    ("sweep models", Service::sweep_models),
];

/// The fine-tuning service of one server.
pub struct Service {
    pub(super) config: JobsConfig,
    pub(super) store: Store,
    pub(super) blobs: Blobs,
    pub(super) parts: Parts,
    /// Rung when something has changed that a worker may wait for.
    pub(super) bell: Bell,
    stopping: AtomicBool,
    workers: Mutex<Vec<JoinHandle<()>>>,
}

impl Service {
    /// Opens the data folder.
    ///
    /// # Errors
    /// The folder is in use, or cannot be made or read.
    pub fn open(config: JobsConfig, parts: Parts) -> Result<Arc<Self>, JobsError> {
        webhooks::check(&config.webhooks)?;
        let store = Store::open(&config.data_dir)?;
        let blobs = Blobs::open(&config.data_dir, config.file_quota)?;
        let service = Self {
            config,
            store,
            blobs,
            parts,
            bell: Bell::default(),
            stopping: AtomicBool::new(false),
            workers: Mutex::default(),
        };
        // What a crash left over.
        service.release(&service.blobs.hashes()?)?;
        Ok(Arc::new(service))
    }

    /// Starts the workers.
    ///
    /// # Errors
    /// No thread can be had.
    pub fn start(self: &Arc<Self>) -> Result<(), JobsError> {
        let mut workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, work) in WORKERS {
            let service = Arc::clone(self);
            let thread = std::thread::Builder::new().name((*name).to_owned());
            let spawned = thread.spawn(move || work(&service));
            workers.push(spawned.map_err(|source| JobsError::file(*name, source))?);
        }
        Ok(())
    }

    /// Tells the workers to end, which leaves running jobs with a checkpoint, and waits for them.
    /// Blocking.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.bell.ring();
        let workers =
            std::mem::take(&mut *self.workers.lock().unwrap_or_else(PoisonError::into_inner));
        for worker in workers {
            if worker.join().is_err() {
                tracing::error!("a worker of the fine-tuning service had panicked");
            }
        }
    }

    /// Whether workers are to end.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// What the operator decided.
    #[must_use]
    pub fn config(&self) -> &JobsConfig {
        &self.config
    }

    /// The state.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// What the service works with.
    #[must_use]
    pub fn parts(&self) -> &Parts {
        &self.parts
    }

    /// Tells the workers that something has changed.
    pub fn ring(&self) {
        self.bell.ring();
    }

    /// `jobs/<id>`: where a job's process works.
    #[must_use]
    pub fn job_dir(&self, job: &str) -> PathBuf {
        self.config.data_dir.join("jobs").join(job)
    }

    /// The absolute path of one relative to the data folder.
    #[must_use]
    pub fn path(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.config.data_dir.join(relative)
    }
}

impl Transaction<'_> {
    /// Adds a message to a job's events.
    ///
    /// # Errors
    /// The database fails.
    pub fn say(
        &self,
        job_id: &str,
        level: EventLevel,
        message: impl Into<String>,
    ) -> Result<(), StoreError> {
        self.insert(&JobEvent {
            id: new_id("ftevent-"),
            job_id: job_id.to_owned(),
            created_at: unix_seconds(),
            level,
            message: message.into(),
            data: serde_json::Value::Null,
            is_metrics: false,
        })
    }
}

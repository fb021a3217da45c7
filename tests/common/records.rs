//! A data folder with records in it, before a server opens it.

use std::path::Path;

use tunesmith::{
    adapters::LoraAdapter,
    jobs::{
        Checkpoint, EventLevel, FileRecord, Job, JobEvent, JobStatus, ModelRecord, Record, Store,
        StoreError,
    },
    model::ModelConfig,
};

use super::{copy_dir, fixture, jobs::new_job};

/// Two adapters of tiny-llama with different answers.
pub const FIRST: &str = "oracle/tiny-llama-train-initial";
pub const SECOND: &str = "oracle/tiny-llama-plain-adapter";

/// The data folder of a server that is not running.
pub struct Records(pub Store);

impl Records {
    pub fn open(dir: &Path) -> Self {
        Self(Store::open(dir).unwrap())
    }

    pub fn add(&self, record: &impl Record) -> &Self {
        self.0.write::<_, StoreError>(|tx| tx.insert(record)).unwrap();
        self
    }

    /// A file without content, which is enough for a job to name it.
    pub fn file(&self, id: &str, purpose: &str) -> &Self {
        self.add(&FileRecord {
            id: id.to_owned(),
            bytes: 3,
            created_at: 1,
            expires_at: None,
            filename: "rows.jsonl".to_owned(),
            purpose: purpose.to_owned(),
            sha256: "0".repeat(64),
            is_deleted: false,
        })
    }

    /// A model with its adapter, as `job` would have published it.
    pub fn model(&self, dir: &Path, job: &str, id: &str, adapter: &str) -> &Self {
        let place = match id.split_once(":ckpt-step-") {
            Some((_, step)) => format!("jobs/{job}/epochs/step-{step}"),
            None => format!("jobs/{job}/model"),
        };
        let folder = dir.join(&place);
        copy_dir(&fixture(adapter), &folder);
        let base = ModelConfig::from_dir(&fixture("tiny-llama")).unwrap();
        let is_checkpoint = id.contains(":ckpt-step-");
        self.add(&ModelRecord {
            id: id.to_owned(),
            job_id: job.to_owned(),
            created_at: 1_700_000_000,
            path: place,
            digest: LoraAdapter::read(&folder, &base, false).unwrap().digest().to_owned(),
            is_checkpoint,
        })
    }

    pub fn checkpoint(&self, job: &str, id: &str, model: &str, step: u64) -> &Self {
        self.add(&Checkpoint {
            id: id.to_owned(),
            job_id: job.to_owned(),
            created_at: 1,
            step,
            model: model.to_owned(),
            metrics: serde_json::json!({"step": step, "train_loss": 0.5}),
        })
    }

    pub fn event(&self, job: &str, number: u64) -> &Self {
        self.add(&JobEvent {
            id: format!("ftevent-{number}"),
            job_id: job.to_owned(),
            created_at: number,
            level: EventLevel::Info,
            message: format!("event {number}"),
            data: serde_json::Value::Null,
            is_metrics: false,
        })
    }
}

/// A job of the base in some state.
pub fn job(id: &str, status: JobStatus) -> Job {
    Job {
        id: id.to_owned(),
        created_at: 1,
        finished_at: status.is_final().then_some(2),
        model: "tiny-llama".to_owned(),
        status,
        ..new_job("file-a")
    }
}

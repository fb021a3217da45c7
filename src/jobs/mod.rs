//! FLOOR 5. The fine-tuning service: files, uploads, jobs and what became of them.
//!
//! Does: keeps uploaded files and the state of jobs in one data folder, runs each job as a child
//! process of the same binary, publishes what it made into the running server, and tells webhooks.
//! Knows: the store, child processes, adapters by name, the engine (to check and evaluate what a job
//! made). Must never know: HTTP requests, OpenAI's JSON shapes (`api` has those), tensors.
//!
//! State has one owner: the database of [`Store`]. Whoever changes a job writes it there and rings the
//! [`Bell`]; the runner looks and acts. What was acknowledged is on disk.

mod aliases;
mod ask;
mod bell;
mod blobs;
mod control;
mod error;
mod evals;
mod evaluation;
mod expiry;
mod files;
mod grading;
mod hyperparameters;
mod ids;
mod metadata;
mod models;
mod parity;
mod publish;
mod python;
mod records;
mod request;
mod results;
mod runner;
mod service;
mod step_metrics;
mod store;
mod uploads;
mod webhooks;

pub use self::{
    bell::Bell,
    blobs::{Incoming, Staged},
    control::Wish,
    error::JobsError,
    evals::{
        Counts, CriterionCounts, CriterionResult, Eval, EvalOutput, EvalRun, EvalSource,
        ModelUsage, NewEval, NewRun, Outcome, RunStatus, SourceRow,
    },
    evaluation::{Evaluation, evaluate},
    files::{MAX_FILE_BYTES, NewFile},
    grading::{RunGrader, check_graders},
    hyperparameters::base_learning_rate,
    ids::{new_id, unix_seconds},
    metadata::valid_metadata,
    models::{Model, azure_model_name},
    records::{
        Alias, Auto, Checkpoint, EventLevel, FileRecord, Gate, Hyperparameters, Job, JobError,
        JobEvent, JobStatus, Method, ModelRecord, Part, Request, Upload, UploadStatus,
    },
    request::{JobRequest, model_not_available},
    service::{JobsConfig, Parts, Service, Webhook},
    store::{Order, Page, Query, Record, Store, StoreError, Transaction},
    uploads::{MAX_PART_BYTES, MAX_UPLOAD_BYTES, NewUpload},
};

//! Why the service cannot do what it was asked.

use std::{
    io::{self, ErrorKind},
    path::PathBuf,
};

use super::StoreError;
use crate::adapters::AdapterError;
use crate::eval::grader::Invalid;
use crate::publish::DiskError;

/// An error of the fine-tuning service. The first kinds are the client's to mend.
#[derive(Debug, thiserror::Error)]
pub enum JobsError {
    /// A value that cannot be used.
    #[error("{message}")]
    Invalid {
        /// What is wrong, naming the value.
        message: String,
        /// The field of the request.
        param: &'static str,
        /// Machine-readable kind.
        code: Option<&'static str>,
    },
    /// A grader, evaluation or run with a mistake in it.
    #[error(transparent)]
    Definition(#[from] Invalid),
    /// No such object.
    #[error("No such {what}: {id}")]
    NotFound {
        /// "File", "fine-tuning job", ...
        what: &'static str,
        /// As asked for.
        id: String,
        /// The field of the request that named it.
        param: &'static str,
    },
    /// The object is not in a state for this.
    #[error("{0}")]
    Conflict(String),
    /// A file larger than the limit.
    #[error("the file is larger than {limit} bytes, the most that one file may have")]
    TooLarge {
        /// In bytes.
        limit: u64,
    },
    /// No room: the quota of files, or the disk.
    #[error("there is no room for this: {0}")]
    NoSpace(String),
    /// The database.
    #[error(transparent)]
    Store(StoreError),
    /// A file or folder of the service's own.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The service is stopping; the work is to be done again at the next start.
    #[error("the service is stopping")]
    Interrupted,
    /// An evaluation that could not be made.
    #[error("the evaluation failed: {0}")]
    Evaluation(String),
    /// What a job made cannot be served.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
}

impl JobsError {
    /// A client's mistake in the field `param`.
    pub fn invalid(param: &'static str, message: impl Into<String>) -> Self {
        Self::Invalid { message: message.into(), param, code: None }
    }

    /// `source` at `path`; a full disk is its own kind.
    #[must_use]
    pub fn file(path: impl Into<PathBuf>, source: io::Error) -> Self {
        if matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) {
            return Self::NoSpace("the disk is full".to_owned());
        }
        Self::File { path: path.into(), source }
    }
}

impl From<DiskError> for JobsError {
    fn from(error: DiskError) -> Self {
        Self::file(error.path, error.cause)
    }
}

impl From<StoreError> for JobsError {
    fn from(error: StoreError) -> Self {
        if error.is_full() {
            Self::NoSpace("the disk is full".to_owned())
        } else {
            Self::Store(error)
        }
    }
}

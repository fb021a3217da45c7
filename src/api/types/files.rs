//! Files and uploads on the wire.

use serde::{Deserialize, Serialize};

use crate::jobs::{FileRecord, Part, Upload, UploadStatus};

/// A file. Its content is checked when a job is made of it, so that it counts as processed at once.
#[derive(Debug, Serialize)]
pub(crate) struct FileObject {
    id: String,
    object: &'static str,
    bytes: u64,
    created_at: u64,
    expires_at: Option<u64>,
    filename: String,
    purpose: String,
    status: &'static str,
    status_details: Option<String>,
}

impl From<FileRecord> for FileObject {
    fn from(file: FileRecord) -> Self {
        Self {
            id: file.id,
            object: "file",
            bytes: file.bytes,
            created_at: file.created_at,
            expires_at: file.expires_at,
            filename: file.filename,
            purpose: file.purpose,
            status: "processed",
            status_details: None,
        }
    }
}

/// One page of files.
#[derive(Debug, Serialize)]
pub(crate) struct FileList {
    pub(crate) object: &'static str,
    pub(crate) data: Vec<FileObject>,
    pub(crate) first_id: Option<String>,
    pub(crate) last_id: Option<String>,
    pub(crate) has_more: bool,
}

/// What is left of a deleted file.
#[derive(Debug, Serialize)]
pub(crate) struct DeletedFile {
    pub(crate) id: String,
    pub(crate) object: &'static str,
    pub(crate) deleted: bool,
}

/// The body of `POST /v1/uploads`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct UploadRequest {
    pub(crate) bytes: Option<u64>,
    pub(crate) filename: Option<String>,
    pub(crate) mime_type: Option<String>,
    pub(crate) purpose: Option<String>,
    pub(crate) expires_after: Option<ExpiresAfter>,
}

/// When a file is to end.
#[derive(Debug, Deserialize)]
pub(crate) struct ExpiresAfter {
    pub(crate) anchor: String,
    pub(crate) seconds: u64,
}

/// The body of `POST /v1/uploads/{id}/complete`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct CompleteRequest {
    pub(crate) part_ids: Option<Vec<String>>,
    pub(crate) md5: Option<String>,
}

/// An upload, with the file that it became.
#[derive(Debug, Serialize)]
pub(crate) struct UploadObject {
    id: String,
    object: &'static str,
    bytes: u64,
    created_at: u64,
    expires_at: u64,
    filename: String,
    purpose: String,
    status: UploadStatus,
    file: Option<FileObject>,
}

impl UploadObject {
    /// `file` is there where the upload is completed.
    pub(crate) fn new(upload: Upload, file: Option<FileRecord>) -> Self {
        Self {
            id: upload.id,
            object: "upload",
            bytes: upload.bytes,
            created_at: upload.created_at,
            expires_at: upload.expires_at,
            filename: upload.filename,
            purpose: upload.purpose,
            status: upload.status,
            file: file.map(FileObject::from),
        }
    }
}

/// A part of an upload.
#[derive(Debug, Serialize)]
pub(crate) struct PartObject {
    id: String,
    object: &'static str,
    created_at: u64,
    upload_id: String,
}

impl From<Part> for PartObject {
    fn from(part: Part) -> Self {
        Self {
            id: part.id,
            object: "upload.part",
            created_at: part.created_at,
            upload_id: part.upload_id,
        }
    }
}

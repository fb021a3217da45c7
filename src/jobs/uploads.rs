//! Uploads: a file that arrives in parts, each a content of its own until they become one.

use std::{collections::HashSet, fs::File, io::Read};

use md5::{Digest, Md5};

use super::{
    FileRecord, JobsError, NewFile, Part, Service, Staged, StoreError, Transaction, Upload,
    UploadStatus, blobs::Quota, new_id, unix_seconds,
};

/// The most bytes that a part may have.
pub const MAX_PART_BYTES: u64 = 64 << 20;

/// The most bytes that an upload may have.
pub const MAX_UPLOAD_BYTES: u64 = 8 << 30;

/// The most parts that an upload may have, all that were ever sent.
const MAX_PARTS: usize = 10_000;

/// Seconds after which an upload takes nothing more.
const LIFETIME_SECONDS: u64 = 3600;

/// Bytes that are copied at once.
const COPY_BYTES: usize = 1 << 20;

/// What an upload is to become.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewUpload {
    /// Size of the file.
    pub bytes: u64,
    /// Name of the file.
    pub filename: String,
    /// Purpose of the file.
    pub purpose: String,
    /// As announced.
    pub mime_type: String,
    /// Seconds that the file will live; `None`: for ever.
    pub expires_after: Option<u64>,
}

impl Service {
    /// Announces a file that will arrive in parts.
    ///
    /// # Errors
    /// It would be too large, or the database fails.
    pub fn create_upload(&self, new: NewUpload) -> Result<Upload, JobsError> {
        let limit = MAX_UPLOAD_BYTES.min(self.config.file_quota);
        if new.bytes == 0 || new.bytes > limit {
            let message = format!("`bytes` must be between 1 and {limit}, not {}", new.bytes);
            return Err(JobsError::invalid("bytes", message));
        }
        let created_at = unix_seconds();
        let upload = Upload {
            id: new_id("upload_"),
            bytes: new.bytes,
            created_at,
            expires_at: created_at + LIFETIME_SECONDS,
            filename: new.filename,
            purpose: new.purpose,
            mime_type: new.mime_type,
            status: UploadStatus::Pending,
            file_id: None,
            expires_after: new.expires_after,
        };
        self.store.write(|transaction| transaction.insert(&upload))?;
        Ok(upload)
    }

    /// The upload `id`, which still takes parts.
    ///
    /// # Errors
    /// There is none, or it has ended, or the database fails.
    pub fn open_upload(&self, id: &str) -> Result<Upload, JobsError> {
        open(self.store.get(id)?, id)
    }

    /// Adds a part.
    ///
    /// # Errors
    /// The upload has ended meanwhile or has too many parts, or disk or database fail.
    pub fn add_part(&self, upload: &str, mut staged: Staged) -> Result<Part, JobsError> {
        let part = Part {
            id: new_id("part_"),
            upload_id: upload.to_owned(),
            created_at: unix_seconds(),
            bytes: staged.bytes(),
            sha256: staged.sha256().to_owned(),
        };
        let added = self.store.write(|transaction| {
            open(transaction.get(upload)?, upload)?;
            if transaction.all::<Part>(upload)?.len() >= MAX_PARTS {
                let message = format!("an upload has at most {MAX_PARTS} parts");
                return Err(JobsError::invalid("data", message));
            }
            staged.publish()?;
            Ok(transaction.insert(&part)?)
        });
        if added.is_err() {
            self.release_or_log(std::slice::from_ref(&part.sha256));
        }
        added.map(|()| part)
    }

    /// Makes a file of the parts, in the order of their ids. Blocking, for as long as it takes to copy
    /// them.
    ///
    /// # Errors
    /// The parts are not what was announced, or disk or database fail. The upload is then as before.
    pub fn complete_upload(
        &self,
        id: &str,
        part_ids: &[String],
        md5: Option<&str>,
    ) -> Result<(Upload, FileRecord), JobsError> {
        let upload = self.open_upload(id)?;
        let parts = self.chosen_parts(&upload, part_ids)?;
        let staged = self.concatenated(&parts, md5)?;
        let new = NewFile::new(&upload.filename, &upload.purpose);
        let new = new.expiring_after(upload.expires_after);
        let mut hashes = vec![staged.sha256().to_owned()];
        let completed = self.store.write(|transaction| {
            let upload = open(transaction.get(id)?, id)?;
            let file = transaction.add_file(staged, new)?;
            let file_id = Some(file.id.clone());
            let upload = Upload { status: UploadStatus::Completed, file_id, ..upload };
            transaction.update(&upload)?;
            hashes.extend(transaction.remove_parts(id)?);
            Ok((upload, file))
        });
        self.release_or_log(&hashes);
        completed
    }

    /// Ends an upload without a file.
    ///
    /// # Errors
    /// It has ended already, or the database fails.
    pub fn cancel_upload(&self, id: &str) -> Result<Upload, JobsError> {
        let (upload, hashes) = self.store.write(|transaction| {
            let upload = open(transaction.get(id)?, id)?;
            transaction.end_upload(&upload, UploadStatus::Cancelled)
        })?;
        self.release_or_log(&hashes);
        Ok(upload)
    }

    fn chosen_parts(&self, upload: &Upload, ids: &[String]) -> Result<Vec<Part>, JobsError> {
        let invalid = |message: String| JobsError::invalid("part_ids", message);
        if ids.is_empty() {
            return Err(invalid("`part_ids` names no part".to_owned()));
        }
        let mut seen = HashSet::new();
        let mut parts = Vec::new();
        for id in ids {
            if !seen.insert(id) {
                return Err(invalid(format!("`part_ids` names the part {id} twice")));
            }
            let part: Option<Part> = self.store.get(id)?;
            match part.filter(|part| part.upload_id == upload.id) {
                Some(part) => parts.push(part),
                None => return Err(invalid(format!("the upload {} has no part {id}", upload.id))),
            }
        }
        let sum: u64 = parts.iter().map(|part| part.bytes).sum();
        if sum != upload.bytes {
            return Err(invalid(format!(
                "the parts have {sum} bytes, but the upload was announced with {}",
                upload.bytes
            )));
        }
        Ok(parts)
    }

    fn concatenated(&self, parts: &[Part], md5: Option<&str>) -> Result<Staged, JobsError> {
        // The parts were admitted, and go when the file is there.
        let mut incoming = self.blobs.receive(MAX_UPLOAD_BYTES, Quota::Exempt)?;
        let mut hash = Md5::new();
        let mut buffer = vec![0; COPY_BYTES];
        for part in parts {
            let path = self.blobs.path(&part.sha256);
            let failed = |source| JobsError::file(&path, source);
            let mut file = File::open(&path).map_err(failed)?;
            loop {
                let count = file.read(&mut buffer).map_err(failed)?;
                if count == 0 {
                    break;
                }
                hash.update(&buffer[..count]);
                incoming.write(&buffer[..count])?;
            }
        }
        let found: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        if let Some(expected) = md5
            && !expected.eq_ignore_ascii_case(&found)
        {
            let message = format!("the md5 of the parts is {found}, not {expected}");
            return Err(JobsError::invalid("md5", message));
        }
        incoming.finish()
    }
}

impl Transaction<'_> {
    /// Ends an upload without a file; also the hashes of its parts, which may be released then.
    pub(super) fn end_upload(
        &self,
        upload: &Upload,
        status: UploadStatus,
    ) -> Result<(Upload, Vec<String>), JobsError> {
        let upload = Upload { status, ..upload.clone() };
        self.update(&upload)?;
        let hashes = self.remove_parts(&upload.id)?;
        Ok((upload, hashes))
    }

    fn remove_parts(&self, upload: &str) -> Result<Vec<String>, StoreError> {
        let parts = self.all::<Part>(upload)?;
        for part in &parts {
            self.delete::<Part>(&part.id)?;
        }
        Ok(parts.into_iter().map(|part| part.sha256).collect())
    }
}

fn open(upload: Option<Upload>, id: &str) -> Result<Upload, JobsError> {
    let param = "upload_id";
    let Some(upload) = upload else {
        return Err(JobsError::NotFound { what: "Upload object", id: id.to_owned(), param });
    };
    let ended = match upload.status {
        UploadStatus::Pending if upload.expires_at > unix_seconds() => return Ok(upload),
        UploadStatus::Pending | UploadStatus::Expired => "has expired",
        UploadStatus::Completed => "is completed",
        UploadStatus::Cancelled => "is cancelled",
    };
    Err(JobsError::invalid(param, format!("the upload {id} {ended}")))
}

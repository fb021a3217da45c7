//! Files: what a client uploaded or a job made, with a name, a purpose and perhaps an end.
//!
//! Several files may have one content. A content goes with the last record that names it. A file that
//! is deleted (or runs out) while a job still has to read it vanishes for clients at once, but its
//! record stays, hidden, until that job has ended.

use std::{collections::HashSet, path::PathBuf};

use super::{
    FileRecord, Job, JobsError, Order, Page, Part, Query, Service, StoreError, Transaction, Upload,
    UploadStatus,
    blobs::{Incoming, Quota, Staged},
    new_id, unix_seconds,
};

/// The most bytes that a file may have which is uploaded at once.
pub const MAX_FILE_BYTES: u64 = 512 << 20;

/// Longest name of a file, in bytes.
const MAX_NAME_BYTES: usize = 255;

/// What a file is to be, beside its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewFile {
    filename: String,
    purpose: String,
    expires_after: Option<u64>,
}

impl NewFile {
    /// A file that stays. Of `filename`, the last part of a path is kept, without control characters.
    #[must_use]
    pub fn new(filename: &str, purpose: &str) -> Self {
        Self { filename: plain_name(filename), purpose: purpose.to_owned(), expires_after: None }
    }

    /// The file ends so many seconds after it was made; `None`: it stays.
    #[must_use]
    pub fn expiring_after(self, seconds: Option<u64>) -> Self {
        Self { expires_after: seconds, ..self }
    }
}

impl FileRecord {
    /// Whether clients may know of it.
    pub(super) fn is_visible(&self, now: u64) -> bool {
        !self.is_deleted && self.expires_at.is_none_or(|end| end > now)
    }
}

impl Service {
    /// Begins to take a client's content of at most `limit` bytes, within the quota of files.
    ///
    /// # Errors
    /// The staging file cannot be made.
    pub fn receive(&self, limit: u64) -> Result<Incoming, JobsError> {
        self.blobs.receive(limit, Quota::Enforced)
    }

    /// Takes a content of the service's own, which no quota refuses; see [`Transaction::add_file`].
    ///
    /// # Errors
    /// The disk fails, or is full.
    pub fn stage_bytes(&self, bytes: &[u8]) -> Result<Staged, JobsError> {
        let mut incoming = self.blobs.receive(u64::MAX, Quota::Exempt)?;
        incoming.write(bytes)?;
        incoming.finish()
    }

    /// Makes a file of a content.
    ///
    /// # Errors
    /// The disk fails, or is full; then nothing is stored.
    pub fn add_file(&self, staged: Staged, new: NewFile) -> Result<FileRecord, JobsError> {
        let sha256 = staged.sha256().to_owned();
        let added = self.store.write(|transaction| transaction.add_file(staged, new));
        if added.is_err() {
            // The content may be in its place although the transaction failed.
            self.release_or_log(&[sha256]);
        }
        added
    }

    /// The file that a client calls `id`, in the field `param`.
    ///
    /// # Errors
    /// There is none (any more), or the database fails.
    pub fn file(&self, id: &str, param: &'static str) -> Result<FileRecord, JobsError> {
        visible(self.store.get(id)?, id, param)
    }

    /// Where the content of a file is. It stays there while a record names it; who opens it can read
    /// it to the end.
    #[must_use]
    pub fn blob_path(&self, file: &FileRecord) -> PathBuf {
        self.blobs.path(&file.sha256)
    }

    /// Where the content of a job's training or validation file is: also of one that has been deleted
    /// since the job was made, until the job has ended.
    ///
    /// # Errors
    /// There is no such file, or the database fails.
    pub fn file_path(&self, id: &str) -> Result<PathBuf, JobsError> {
        let file: Option<FileRecord> = self.store.get(id)?;
        let file = file.ok_or_else(|| no_file(id, "file_id"))?;
        Ok(self.blob_path(&file))
    }

    /// One page of the files that clients may know of, of one purpose or of all.
    ///
    /// # Errors
    /// The database fails.
    pub fn files(
        &self,
        query: &Query<'_>,
        purpose: Option<&str>,
    ) -> Result<Page<FileRecord>, JobsError> {
        let now = unix_seconds();
        Ok(self.store.list(query, |file: &FileRecord| {
            file.is_visible(now) && purpose.is_none_or(|purpose| file.purpose == purpose)
        })?)
    }

    /// Deletes a file.
    ///
    /// # Errors
    /// There is none, or the database fails.
    pub fn delete_file(&self, id: &str) -> Result<(), JobsError> {
        let file = self.store.write(|transaction| {
            let file = transaction.file(id, "id")?;
            transaction.remove_file(&file)?;
            Ok::<_, JobsError>(file)
        })?;
        self.release_or_log(&[file.sha256]);
        Ok(())
    }

    /// Removes those of these contents that no record names.
    pub(super) fn release(&self, hashes: &[String]) -> Result<(), JobsError> {
        if hashes.is_empty() {
            return Ok(());
        }
        // Within a transaction, because its lock keeps everybody else from naming one meanwhile.
        self.store.write(|transaction| {
            let mut named = HashSet::new();
            transaction.list(&everything(), |file: &FileRecord| {
                named.insert(file.sha256.clone());
                false
            })?;
            transaction.each_upload_part(|part| {
                named.insert(part.sha256.clone());
            })?;
            for hash in hashes.iter().filter(|hash| !named.contains(*hash)) {
                self.blobs.remove(hash)?;
            }
            Ok(())
        })
    }

    /// [`Service::release`] where what matters is done already: the rest is made up for later.
    pub(super) fn release_or_log(&self, hashes: &[String]) {
        if let Err(error) = self.release(hashes) {
            tracing::warn!("a file's content could not be removed yet: {error}");
        }
    }
}

impl Transaction<'_> {
    /// Makes a file of a content, for transactions that do more than that.
    ///
    /// # Errors
    /// The disk or the database fails.
    pub fn add_file(&self, mut staged: Staged, new: NewFile) -> Result<FileRecord, JobsError> {
        let created_at = unix_seconds();
        let file = FileRecord {
            id: new_id("file-"),
            bytes: staged.bytes(),
            created_at,
            expires_at: new.expires_after.map(|seconds| created_at + seconds),
            filename: new.filename,
            purpose: new.purpose,
            sha256: staged.sha256().to_owned(),
            is_deleted: false,
        };
        staged.publish()?;
        self.insert(&file)?;
        Ok(file)
    }

    /// As [`Service::file`]. Who makes a record that needs a file looks for it in the same transaction:
    /// then it cannot be deleted in between.
    ///
    /// # Errors
    /// There is none (any more), or the database fails.
    pub fn file(&self, id: &str, param: &'static str) -> Result<FileRecord, JobsError> {
        visible(self.get(id)?, id, param)
    }

    /// Deletes a file's record, or hides it while a job needs it.
    pub(super) fn remove_file(&self, file: &FileRecord) -> Result<(), StoreError> {
        if !self.is_needed(&file.id)? {
            self.delete::<FileRecord>(&file.id)?;
        } else if !file.is_deleted {
            self.update(&FileRecord { is_deleted: true, ..file.clone() })?;
        }
        Ok(())
    }

    /// Whether a job that has not ended reads this file.
    pub(super) fn is_needed(&self, file: &str) -> Result<bool, StoreError> {
        let query = Query { limit: 1, ..everything() };
        let jobs = self.list(&query, |job: &Job| {
            let reads = job.training_file == file || job.validation_file.as_deref() == Some(file);
            reads && !job.status.is_final()
        })?;
        Ok(!jobs.records.is_empty())
    }

    fn each_upload_part(&self, mut look: impl FnMut(&Part)) -> Result<(), StoreError> {
        let pending = |upload: &Upload| upload.status == UploadStatus::Pending;
        for upload in self.list(&everything(), pending)?.records {
            self.all::<Part>(&upload.id)?.iter().for_each(&mut look);
        }
        Ok(())
    }
}

/// All records of a kind without a parent.
pub(super) fn everything() -> Query<'static> {
    Query { parent: "", after: None, limit: usize::MAX, order: Order::Ascending }
}

fn visible(
    file: Option<FileRecord>,
    id: &str,
    param: &'static str,
) -> Result<FileRecord, JobsError> {
    let now = unix_seconds();
    file.filter(|file| file.is_visible(now)).ok_or_else(|| no_file(id, param))
}

fn no_file(id: &str, param: &'static str) -> JobsError {
    JobsError::NotFound { what: "File object", id: id.to_owned(), param }
}

/// Names are data: never a path, never something that a terminal or a header would act upon.
fn plain_name(name: &str) -> String {
    let last = name.rsplit(['/', '\\']).next().unwrap_or_default();
    let mut plain: String = last.chars().filter(|c| !c.is_control()).collect();
    plain.truncate(plain.floor_char_boundary(MAX_NAME_BYTES));
    if matches!(plain.trim(), "" | "." | "..") { "file".to_owned() } else { plain }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_never_paths() {
        for (name, expected) in [
            ("train.jsonl", "train.jsonl"),
            ("../../etc/passwd", "passwd"),
            ("C:\\data\\a b.jsonl", "a b.jsonl"),
            ("dir/", "file"),
            ("..", "file"),
            (" ", "file"),
            ("", "file"),
            ("a\u{1b}[31m\r\n\0b", "a[31mb"),
            ("größe 😀.jsonl", "größe 😀.jsonl"),
        ] {
            assert_eq!(plain_name(name), expected, "{name:?}");
        }
        assert_eq!(plain_name(&"ä".repeat(300)), "ä".repeat(127));
    }
}

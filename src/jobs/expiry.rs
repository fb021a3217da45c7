//! The worker that ends what has a time limit: files, uploads, and contents that nothing names.

use std::time::{Duration, Instant};

use super::{
    FileRecord, JobsError, Service, Upload, UploadStatus, files::everything, unix_seconds,
};

/// How often it looks. Clients do not see what has run out even before that.
const INTERVAL: Duration = Duration::from_secs(30);

/// Looks, until the service stops.
pub(super) fn run(service: &Service) {
    let mut heard = 0;
    let mut last: Option<Instant> = None;
    while !service.is_stopping() {
        if last.is_none_or(|last| last.elapsed() >= INTERVAL) {
            if let Err(error) = pass(service, unix_seconds()) {
                tracing::warn!("expired files could not be removed yet: {error}");
            }
            last = Some(Instant::now());
        }
        service.bell.wait(&mut heard, INTERVAL);
    }
}

fn pass(service: &Service, now: u64) -> Result<(), JobsError> {
    let ended = |file: &FileRecord| !file.is_visible(now);
    for file in service.store.list(&everything(), ended)?.records {
        service.store.write(|transaction| transaction.remove_file(&file))?;
    }
    let late = |upload: &Upload| upload.status == UploadStatus::Pending && upload.expires_at <= now;
    for upload in service.store.list(&everything(), late)?.records {
        service.store.write(|transaction| {
            // Somebody may have completed it in the meantime.
            match transaction.get::<Upload>(&upload.id)? {
                Some(upload) if late(&upload) => {
                    transaction.end_upload(&upload, UploadStatus::Expired).map(|_| ())
                }
                _ => Ok(()),
            }
        })?;
    }
    service.release(&service.blobs.hashes()?)
}

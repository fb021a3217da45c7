//! A disk that fills up while a job trains: the job fails with a reason, the service goes on, and when
//! there is room again so do the jobs.
#![cfg(unix)]

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

use crate::common::jobs::{Workshop, chat_rows};
use tunesmith::jobs::{Auto, JobStatus};

/// Names a folder on a small file system of its own.
const SMALL_DISK: &str = "TUNESMITH_SMALL_DISK";

#[test]
#[ignore = "needs a small disk: mount -t tmpfs -o size=32m none DIR, and TUNESMITH_SMALL_DISK=DIR"]
fn a_full_disk_fails_a_job_with_a_reason_and_nothing_else() {
    let disk = PathBuf::from(std::env::var_os(SMALL_DISK).expect(SMALL_DISK));
    let shop = Workshop::open(&disk.join("data"), |_| {});
    let file = shop.file(&chat_rows(12));
    let filler = disk.join("filler");
    let before = shop.create(&file, |_| {});
    let model = shop.wait_for(&before, JobStatus::Succeeded).fine_tuned_model.unwrap();

    for steps in [1, 10, 40] {
        let id = shop.create(&file, |job| job.hyperparameters.n_epochs = Auto::Value(50));
        shop.wait(&id, "it has trained", |job| job.step >= steps);
        fill(&filler);
        // Where even this cannot be written it waits, and models answer all the same.
        for _ in 0..20 {
            assert_eq!(shop.ask(&model), 4);
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        fs::remove_file(&filler).unwrap();
        let job = shop.wait_for(&id, JobStatus::Failed);
        let error = job.error.unwrap();
        assert_eq!(error.code, "insufficient_storage", "{error:?}");
        assert!(error.message.contains("disk is full"), "{error:?}");
        assert_eq!(shop.service.store().integrity().unwrap(), None);
    }
    // Full from the start: the job waits, or fails with the reason.
    let after = shop.create(&file, |_| {});
    fill(&filler);
    std::thread::sleep(std::time::Duration::from_secs(2));
    fs::remove_file(&filler).unwrap();
    shop.wait(&after, "it has ended", |job| job.status.is_final());
    let last = shop.create(&file, |_| {});
    shop.wait_for(&last, JobStatus::Succeeded);
}

/// Takes the last byte that there is.
fn fill(path: &Path) {
    let mut file = File::create(path).unwrap();
    for size in [1 << 16, 4096, 1] {
        let zeros = vec![0_u8; size];
        while file.write_all(&zeros).is_ok() {}
    }
}

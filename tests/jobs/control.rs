//! What a client asks of a job that is at work is noted for the runner; of one that waits, it is done.

use std::sync::Arc;

use crate::common::{
    TempDir, fixture,
    records::{Records, job},
};
use tunesmith::{
    adapters::AdapterRegistry,
    engine::{self, EngineConfig},
    jobs::{JobStatus, JobsConfig, Parts, Request, Service, Wish},
    model::{Decoder, Quantization, WeightMode},
    text::{ChatTemplate, Tokenizer},
};

/// A service whose workers have not been started: nothing but its clients changes a job.
fn idle_service(dir: &TempDir) -> Arc<Service> {
    let model = fixture("tiny-llama");
    let decoder = Arc::new(Decoder::load(&model, WeightMode::Frozen).unwrap());
    let registry = Arc::new(AdapterRegistry::new(decoder.config().clone()));
    let engine_config = EngineConfig::for_model(decoder.config(), 1, 16 << 20);
    let parts = Parts {
        engine: engine::spawn(decoder, engine_config).unwrap(),
        registry,
        tokenizer: Arc::new(Tokenizer::from_dir(&model).unwrap()),
        template: Arc::new(ChatTemplate::from_dir(&model).unwrap()),
        eos_token_ids: Vec::new(),
    };
    let config = JobsConfig {
        data_dir: dir.0.clone(),
        base_name: "tiny-llama".to_owned(),
        base_dir: model,
        quantize: Quantization::None,
        organization: "kitchen".to_owned(),
        max_running: 1,
        threads: 1,
        memory: None,
        file_quota: 1 << 20,
        webhooks: Vec::new(),
        gate: None,
        allow_python: false,
        executable: env!("CARGO_BIN_EXE_tunesmith").into(),
    };
    Service::open(config, parts).unwrap()
}

#[test]
fn a_job_at_work_is_asked_and_a_waiting_one_is_changed() {
    use JobStatus::{Cancelled, Paused, Queued, Running, ValidatingFiles};
    let (cancel, pause) = (Some(Request::Cancel), Some(Request::Pause));
    let cases = [
        (ValidatingFiles, None, Wish::Cancel, Some((ValidatingFiles, cancel))),
        (ValidatingFiles, None, Wish::Pause, Some((ValidatingFiles, pause))),
        (ValidatingFiles, None, Wish::Resume, None),
        (Queued, None, Wish::Cancel, Some((Cancelled, None))),
        (Queued, None, Wish::Pause, Some((Paused, None))),
        (Queued, None, Wish::Resume, None),
        (Running, None, Wish::Cancel, Some((Running, cancel))),
        (Running, None, Wish::Pause, Some((Running, pause))),
        (Running, None, Wish::Resume, None),
        (Running, pause, Wish::Cancel, Some((Running, cancel))),
        (Running, pause, Wish::Pause, Some((Running, pause))),
        (Running, cancel, Wish::Cancel, Some((Running, cancel))),
        (Running, cancel, Wish::Pause, None),
        (Running, cancel, Wish::Resume, None),
        (Paused, None, Wish::Cancel, Some((Cancelled, None))),
        (Paused, None, Wish::Pause, None),
        (Paused, None, Wish::Resume, Some((Queued, None))),
        (Cancelled, None, Wish::Cancel, None),
    ];
    let dir = TempDir::new();
    let records = Records::open(&dir.0);
    for (number, (status, request, _, _)) in cases.iter().enumerate() {
        let mut job = job(&format!("ftjob-{number}"), *status);
        job.request = *request;
        records.add(&job);
    }
    drop(records);
    let service = idle_service(&dir);
    for (number, (status, request, wish, expected)) in cases.into_iter().enumerate() {
        let id = format!("ftjob-{number}");
        let before = service.job(&id).unwrap();
        let asked = service.ask_job(&id, wish).ok().map(|job| (job.status, job.request));
        assert_eq!(asked, expected, "{status} {request:?} {wish:?}");
        let after = service.job(&id).unwrap();
        let kept = expected.unwrap_or((before.status, before.request));
        assert_eq!((after.status, after.request), kept, "{status} {request:?} {wish:?}");
        assert_eq!(after.finished_at.is_some(), after.status.is_final());
    }
}

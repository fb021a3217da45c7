//! What a finished job learns about itself: base and tuned model on its validation file, and whether
//! the gate lets its alias move.
#![allow(clippy::needless_pass_by_value, reason = "`json!` makes values")]

use std::{path::PathBuf, sync::Arc};

use crate::common::{TempDir, fixture};
use serde_json::{Value, json};
use tunesmith::{
    adapters::{AdapterRegistry, AdapterVersion},
    data::{parse_rows, questions},
    engine::{EngineConfig, spawn},
    eval::{Arm, Runner, report::Metadata},
    jobs::{FileRecord, Gate, Job, JobsConfig, JobsError, Parts, Service, StoreError, evaluate},
    model::{Decoder, Quantization, WeightMode},
    text::{ChatTemplate, Tokenizer},
};

const NUM_ROWS: usize = 10;

/// A service over the tiny model, without workers, and an adapter that answers otherwise than the base.
struct Setup {
    dir: TempDir,
    service: Arc<Service>,
    version: Arc<AdapterVersion>,
}

impl Setup {
    fn new(gate: Option<Gate>) -> Self {
        let dir = TempDir::new();
        let model = fixture("tiny-llama");
        let decoder = Arc::new(Decoder::load(&model, WeightMode::Frozen).unwrap());
        let registry = Arc::new(AdapterRegistry::new(decoder.config().clone()));
        let adapter = fixture("oracle/tiny-llama-plain-adapter");
        let (version, _) = registry.load("ft:tiny:org::1", &adapter, false).unwrap();
        let engine = EngineConfig::for_model(decoder.config(), 4, 1 << 20);
        let tokenizer = Arc::new(Tokenizer::from_dir(&model).unwrap());
        let parts = Parts {
            engine: spawn(decoder, engine).unwrap(),
            registry,
            template: Arc::new(ChatTemplate::from_dir(&model).unwrap()),
            eos_token_ids: vec![tokenizer.token_to_id("<|im_end|>").unwrap()],
            tokenizer,
        };
        let config = JobsConfig {
            data_dir: dir.join("data"),
            base_name: "tiny".to_owned(),
            base_dir: model,
            quantize: Quantization::None,
            organization: "org".to_owned(),
            max_running: 1,
            threads: 1,
            memory: None,
            file_quota: 1 << 20,
            webhooks: Vec::new(),
            gate,
            allow_python: false,
            executable: PathBuf::from("/bin/false"),
        };
        Self { dir, service: Service::open(config, parts).unwrap(), version }
    }

    /// Rows whose reference answers are what the tuned model says.
    fn rows_of_the_tuned_model(&self) -> String {
        let rows: Vec<Value> = (0..NUM_ROWS).map(|row| example(row, "a")).collect();
        let text: String = rows.iter().map(|row| format!("{row}\n")).collect();
        let asked = questions(&parse_rows(text.as_bytes()).0);
        let parts = self.service.parts();
        let runner = Runner {
            engine: &parts.engine,
            tokenizer: &parts.tokenizer,
            template: &parts.template,
            adapters: &[Arc::clone(&self.version)],
            stop_token_ids: &parts.eos_token_ids,
            max_tokens: Some(32),
            seed: 1,
            max_pending: None,
            should_stop: &|| false,
        };
        let arms = [Arm::Tuned(self.version.name.clone())];
        let report = runner.run(&arms, &asked, &[], Metadata::default(), &mut |_| ()).unwrap();
        let answers = report.examples.iter().map(|row| row.answers[0].as_str());
        answers.enumerate().map(|(row, answer)| format!("{}\n", example(row, answer))).collect()
    }

    /// Puts `text` in as a file and gives its id.
    fn upload(&self, text: &str) -> String {
        let blobs = self.dir.join("data").join("blobs");
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::write(blobs.join("abc"), text).unwrap();
        let file: FileRecord = serde_json::from_value(json!({
            "id": "file-1", "bytes": text.len(), "created_at": 1, "expires_at": null,
            "filename": "valid.jsonl", "purpose": "fine-tune", "sha256": "abc",
        }))
        .unwrap();
        self.service.store().write::<_, StoreError>(|tx| tx.insert(&file)).unwrap();
        file.id
    }
}

fn example(row: usize, answer: &str) -> Value {
    json!({"messages": [
        {"role": "user", "content": format!("Say something about {row}.")},
        {"role": "assistant", "content": answer},
    ]})
}

fn job(validation_file: Option<String>, gate: Option<Gate>) -> Job {
    let job = serde_json::from_value(json!({
        "id": "ftjob-1", "created_at": 1, "started_at": null, "finished_at": null, "model": "tiny",
        "parent_model": null, "training_file": "file-0", "suffix": null, "seed": 1,
        "method": "supervised", "metadata": null, "integrations": [], "alias": null,
        "hyperparameters": {
            "n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto",
            "beta": null,
        },
        "status": "running", "request": null, "error": null, "fine_tuned_model": null,
        "result_files": [], "trained_tokens": null, "num_examples": null, "step": 0,
        "total_steps": null, "estimated_finish": null, "attempts": 0, "evaluation": null,
        "validation_file": null, "gate": null,
    }));
    Job { validation_file, gate, ..job.unwrap() }
}

#[test]
fn a_model_that_beats_the_base_opens_the_gate_and_says_by_how_much() {
    let setup = Setup::new(None);
    let file = setup.upload(&setup.rows_of_the_tuned_model());
    let gate = Gate { metric: "contains".to_owned(), min_gain: 0.5, ..Gate::default() };
    let found = evaluate(&setup.service, &job(Some(file), Some(gate)), &setup.version);
    let found = found.unwrap().unwrap();
    assert_eq!(found.passed, Some(true), "{found:?}");
    let text = &found.message;
    assert!(text.starts_with("Evaluation on 10 rows: contains base 0.0 % -> tuned "), "{text}");
    assert!(text.contains("the gate is open"), "{text}");
    let score = &found.summary["metrics"]["contains"];
    assert!(score["tuned"].as_f64().unwrap() > 0.8 && score["p_value"].as_f64().unwrap() < 0.01);
    assert_eq!(found.summary["num_rows"], 10);
    assert_eq!(found.summary["gate"]["passed"], true);
    assert!(found.summary["completion_tokens"].as_u64().unwrap() > 0);
}

#[test]
fn a_model_that_is_no_better_leaves_the_gate_closed() {
    let setup = Setup::new(None);
    let rows: String = (0..NUM_ROWS).map(|row| format!("{}\n", example(row, "42"))).collect();
    let file = setup.upload(&rows);
    let with_gate = job(Some(file.clone()), Some(Gate::default()));
    let found = evaluate(&setup.service, &with_gate, &setup.version).unwrap().unwrap();
    assert_eq!(found.passed, Some(false));
    assert!(found.message.contains("the gate is closed"), "{}", found.message);
    let without = evaluate(&setup.service, &job(Some(file), None), &setup.version);
    assert_eq!(without.unwrap().unwrap().passed, None);
}

#[test]
fn without_rows_there_is_no_evaluation_and_a_gate_stays_closed() {
    let setup = Setup::new(Some(Gate::default()));
    let found = evaluate(&setup.service, &job(None, None), &setup.version).unwrap();
    assert_eq!(found, None, "the server's gate is for jobs with an alias");
    let aliased = Job { alias: Some("live".to_owned()), ..job(None, None) };
    let found = evaluate(&setup.service, &aliased, &setup.version).unwrap().unwrap();
    assert_eq!(found.passed, Some(false));
    let file = setup.upload("{\"text\": \"no question here\"}\n");
    assert_eq!(evaluate(&setup.service, &job(Some(file), None), &setup.version).unwrap(), None);
}

#[test]
fn a_service_that_stops_is_not_held_up_and_the_evaluation_is_made_again() {
    let setup = Setup::new(None);
    let file = setup.upload(&setup.rows_of_the_tuned_model());
    let draining = job(Some(file), None);
    setup.service.parts().engine.drain();
    let found = evaluate(&setup.service, &draining, &setup.version);
    assert!(matches!(found, Err(JobsError::Interrupted)), "{found:?}");
    setup.service.stop();
    let found = evaluate(&setup.service, &draining, &setup.version);
    assert!(matches!(found, Err(JobsError::Interrupted)), "{found:?}");
}

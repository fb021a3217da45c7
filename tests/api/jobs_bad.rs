//! Requests for jobs that cannot be: each is refused with the field that is wrong, and nothing is stored.
#![allow(clippy::needless_pass_by_value, reason = "`json!` makes values")]
#![allow(clippy::too_many_lines, reason = "a table")]

use crate::common::{Server, TempDir, fixture, records::Records, server::JSON};
use serde_json::{Value, json};

const JOBS: &str = "/v1/fine_tuning/jobs";

fn with(changes: Value) -> Value {
    let mut body = json!({"model": "tiny-llama", "training_file": "file-a"});
    for (field, value) in changes.as_object().unwrap() {
        body[field] = value.clone();
    }
    body
}

fn supervised(hyperparameters: Value) -> Value {
    let settings = json!({"hyperparameters": hyperparameters});
    json!({"method": {"type": "supervised", "supervised": settings}})
}

fn dpo(hyperparameters: Value) -> Value {
    json!({"method": {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}}})
}

fn cases() -> Vec<(Value, &'static str, Option<&'static str>)> {
    let many: serde_json::Map<String, Value> =
        (0..17).map(|number| (format!("k{number}"), json!("v"))).collect();
    let wandb = |settings: Value| json!({"integrations": [{"type": "wandb", "wandb": settings}]});
    vec![
        // The model and the files.
        (json!({"model": null}), "model", None),
        (json!({"model": ""}), "model", None),
        (json!({"model": 3}), "model", None),
        (json!({"model": "gpt-4"}), "model", Some("model_not_available")),
        (json!({"model": "ft:tiny-llama:x::y"}), "model", Some("model_not_available")),
        (json!({"model": "tiny-llama@v1"}), "model", Some("model_not_available")),
        (json!({"model": "../../etc"}), "model", Some("model_not_available")),
        (json!({"training_file": null}), "training_file", None),
        (json!({"training_file": ""}), "training_file", None),
        (json!({"training_file": 1}), "training_file", None),
        (json!({"training_file": "file-none"}), "training_file", Some("invalid_training_file")),
        (json!({"training_file": "file-evals"}), "training_file", Some("invalid_training_file")),
        (json!({"training_file": "../file-a"}), "training_file", Some("invalid_training_file")),
        (
            json!({"validation_file": "file-none"}),
            "validation_file",
            Some("invalid_validation_file"),
        ),
        (
            json!({"validation_file": "file-evals"}),
            "validation_file",
            Some("invalid_validation_file"),
        ),
        (json!({"validation_file": []}), "validation_file", None),
        // Suffix and seed.
        (json!({"suffix": ""}), "suffix", None),
        (json!({"suffix": "a".repeat(65)}), "suffix", None),
        (json!({"suffix": "a:b"}), "suffix", None),
        (json!({"suffix": "../a"}), "suffix", None),
        (json!({"suffix": "é"}), "suffix", None),
        (json!({"suffix": 1}), "suffix", None),
        (json!({"seed": -1}), "seed", None),
        (json!({"seed": 2_147_483_648_u64}), "seed", None),
        (json!({"seed": 1.5}), "seed", None),
        (json!({"seed": "1"}), "seed", None),
        // Hyperparameters, in both places.
        (json!({"hyperparameters": {"n_epochs": 0}}), "hyperparameters.n_epochs", None),
        (json!({"hyperparameters": {"n_epochs": 51}}), "hyperparameters.n_epochs", None),
        (json!({"hyperparameters": {"n_epochs": 1.5}}), "hyperparameters.n_epochs", None),
        (json!({"hyperparameters": {"n_epochs": "three"}}), "hyperparameters.n_epochs", None),
        (json!({"hyperparameters": {"batch_size": 257}}), "hyperparameters.batch_size", None),
        (json!({"hyperparameters": {"batch_size": -2}}), "hyperparameters.batch_size", None),
        (
            json!({"hyperparameters": {"learning_rate_multiplier": 0}}),
            "hyperparameters.learning_rate_multiplier",
            None,
        ),
        (
            json!({"hyperparameters": {"beta": 0.1}}),
            "hyperparameters.beta",
            Some("unknown_parameter"),
        ),
        (json!({"hyperparameters": {"lr": 1}}), "hyperparameters.lr", Some("unknown_parameter")),
        (json!({"hyperparameters": []}), "hyperparameters", None),
        (supervised(json!({"n_epochs": 0})), "method.supervised.hyperparameters.n_epochs", None),
        (
            supervised(json!({"x": 0})),
            "method.supervised.hyperparameters.x",
            Some("unknown_parameter"),
        ),
        (supervised(json!(3)), "method.supervised.hyperparameters", None),
        (dpo(json!({"beta": 0})), "method.dpo.hyperparameters.beta", None),
        (dpo(json!({"beta": 2.1})), "method.dpo.hyperparameters.beta", None),
        (dpo(json!({"beta": true})), "method.dpo.hyperparameters.beta", None),
        (
            json!({"hyperparameters": {"n_epochs": 2}, "method": {"type": "supervised",
                "supervised": {"hyperparameters": {"n_epochs": 3}}}}),
            "hyperparameters.n_epochs",
            None,
        ),
        // The method.
        (json!({"method": {}}), "method.type", None),
        (json!({"method": {"type": "magic"}}), "method.type", None),
        (
            json!({"method": {"type": "reinforcement", "reinforcement": {}}}),
            "method",
            Some("unsupported_value"),
        ),
        (
            json!({"method": {"type": "supervised", "dpo": {}}}),
            "method.dpo",
            Some("unknown_parameter"),
        ),
        (json!({"method": "dpo"}), "method", None),
        // Metadata and integrations.
        (json!({"metadata": many}), "metadata", None),
        (json!({"metadata": {"a".repeat(65): "v"}}), "metadata", None),
        (json!({"metadata": {"k": "v".repeat(513)}}), "metadata", None),
        (json!({"metadata": {"k": 1}}), "metadata", None),
        (json!({"metadata": "k"}), "metadata", None),
        (json!({"integrations": [{"type": "mlflow"}]}), "integrations[0].type", None),
        (json!({"integrations": ["wandb"]}), "integrations[0]", None),
        (wandb(json!({})), "integrations[0].wandb.project", None),
        (wandb(json!({"project": "p", "tags": [1]})), "integrations[0].wandb.tags", None),
        (wandb(json!({"project": "p", "name": 1})), "integrations[0].wandb.name", None),
        // Ours.
        (json!({"alias": "a b"}), "alias", None),
        (json!({"alias": "tiny-llama"}), "alias", None),
        (json!({"gate": true}), "gate", None),
        (json!({"gate": "exact_match"}), "gate", None),
        (json!({"gate": {"metric": "taste"}}), "gate.metric", None),
        (json!({"gate": {"min_gain": 2}}), "gate.min_gain", None),
        (json!({"gate": {"p_value": 0}}), "gate.p_value", None),
        (json!({"gate": {"pvalue": 0.1}}), "gate", None),
        // No field of a job.
        (json!({"n_epochs": 3}), "n_epochs", Some("unknown_parameter")),
        (json!({"prompt_loss_weight": 0.1}), "prompt_loss_weight", Some("unknown_parameter")),
    ]
}

#[test]
fn every_bad_request_is_a_400_that_names_its_field_and_stores_nothing() {
    let dir = TempDir::new();
    Records::open(&dir.0).file("file-a", "fine-tune").file("file-evals", "evals");
    let server = Server::start(&fixture("tiny-llama"), &["--data-dir", dir.0.to_str().unwrap()]);
    for (changes, param, code) in cases() {
        let response = server.post(JOBS, &with(changes.clone()));
        assert_eq!(response.status, 400, "{changes}: {response:?}");
        let error = response.json()["error"].clone();
        assert_eq!(error["param"], param, "{changes}: {error}");
        assert_eq!(error["type"], "invalid_request_error", "{changes}: {error}");
        assert_eq!(error["code"], json!(code), "{changes}: {error}");
        assert!(!error["message"].as_str().unwrap().is_empty(), "{changes}");
    }
    for (headers, body, status) in [
        (&[JSON][..], "", 400),
        (&[JSON], "{", 400),
        (&[JSON], "[]", 400),
        (&[], "{}", 415),
        (&[("Content-Type", "text/plain")], "{}", 415),
    ] {
        let response = server.request("POST", JOBS, headers, body.as_bytes());
        assert_eq!(response.status, status, "{body:?}: {response:?}");
    }
    assert_eq!(server.get(JOBS).json()["data"], json!([]));
    assert_eq!(server.get("/v1/models").json()["data"].as_array().unwrap().len(), 1);
}

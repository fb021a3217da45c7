//! The names of models: what jobs made, in each of its forms, aliases, and their end.

use std::fs;

use crate::common::{
    Response, Server, TempDir, chat, fixture,
    records::{FIRST, Records, SECOND, job},
    server::{CHAT, JSON},
};
use serde_json::{Value, json};
use tunesmith::jobs::{Job, JobStatus, azure_model_name};

const MODEL: &str = "ft:tiny-llama:tunesmith:ner:Abc12345";
const OTHER: &str = "ft:tiny-llama:tunesmith::Xyz12345";
const CHECKPOINT: &str = "ft:tiny-llama:tunesmith:ner:Abc12345:ckpt-step-4";

/// Two jobs' models, one with a checkpoint.
fn data_dir() -> TempDir {
    let dir = TempDir::new();
    let records = Records::open(&dir.0);
    records.file("file-a", "fine-tune");
    for id in ["ftjob-1", "ftjob-2"] {
        records.add(&job(id, JobStatus::Succeeded));
    }
    records.model(&dir.0, "ftjob-1", MODEL, FIRST);
    records.model(&dir.0, "ftjob-1", CHECKPOINT, SECOND);
    records.checkpoint("ftjob-1", "ftckpt_4", CHECKPOINT, 4);
    records.model(&dir.0, "ftjob-2", OTHER, SECOND);
    dir
}

fn server(dir: &TempDir) -> Server {
    let adapter = format!("mine={}", fixture(FIRST).display());
    let args = ["--data-dir", dir.0.to_str().unwrap(), "--adapter", &adapter];
    Server::start(&fixture("tiny-llama"), &args)
}

fn text(server: &Server, model: &str) -> String {
    let answer = server.chat(&chat(model, "hello", json!({})));
    assert_eq!(answer["model"], model, "the answer says what was asked for");
    answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
}

fn ask(server: &Server, model: &str) -> u16 {
    server.post(CHAT, &chat(model, "hello", json!({}))).status
}

fn put_alias(server: &Server, name: &str, body: &Value) -> Response {
    let path = format!("/v1/aliases/{name}");
    server.request("PUT", &path, &[JSON], body.to_string().as_bytes())
}

fn delete(server: &Server, path: &str) -> Response {
    // As OpenAI's client does: declared as JSON, and empty.
    server.request("DELETE", path, &[JSON], b"")
}

fn ids(server: &Server) -> Vec<String> {
    let list = server.get("/v1/models").json();
    let ids = list["data"].as_array().unwrap().iter().map(|card| card["id"].as_str().unwrap());
    ids.map(str::to_owned).collect()
}

#[test]
fn a_job_s_model_answers_to_each_of_its_names_before_and_after_a_restart() {
    let dir = data_dir();
    let azure = azure_model_name("tiny-llama", "ftjob-1");
    let azure_step = format!("{azure}:ckpt-step-4");
    for _ in 0..2 {
        let server = server(&dir);
        let (first, second) = (text(&server, "mine"), text(&server, OTHER));
        assert_ne!(first, second);
        assert_eq!(text(&server, MODEL), first);
        assert_eq!(text(&server, &azure), first);
        for name in [CHECKPOINT, "ftckpt_4", "ftchkpt-4", &azure_step] {
            assert_eq!(text(&server, name), second, "{name}");
        }
        let tagged = server.post(CHAT, &chat(&format!("{MODEL}@v1"), "hello", json!({})));
        assert_eq!(tagged.status, 200, "{tagged:?}");
        for unknown in [
            "ft:tiny-llama:tunesmith:ner:none",
            "tiny-llama.ft-00000000000000000000000000000000",
            "ftckpt_none",
            "ftjob-1",
            &format!("{azure}:ckpt-step-5"),
            &format!("{MODEL}@v2"),
        ] {
            assert_eq!(ask(&server, unknown), 404, "{unknown}");
        }
    }
}

#[test]
fn models_are_listed_without_checkpoints_and_shown_by_any_name() {
    let dir = data_dir();
    let server = server(&dir);
    let expected = ["tiny-llama", "mine", MODEL, OTHER];
    assert_eq!(ids(&server), expected);
    text(&server, MODEL);
    text(&server, CHECKPOINT);
    assert_eq!(ids(&server), expected);
    let card = server.get(&format!("/v1/models/{MODEL}")).json();
    assert_eq!(card["owned_by"], "tunesmith");
    assert_eq!(card["parent"], "tiny-llama");
    assert_eq!((&card["created"], &card["object"]), (&json!(1_700_000_000), &json!("model")));
    assert_eq!(server.get(&format!("/v1/models/{}", MODEL.replace(':', "%3A"))).json(), card);
    assert_eq!(server.get(&format!("/v1/models/{CHECKPOINT}")).json()["id"], CHECKPOINT);
    assert_eq!(put_alias(&server, "prod", &json!({"model": MODEL})).status, 200);
    let card = server.get("/v1/models/prod").json();
    assert_eq!((&card["id"], &card["parent"]), (&json!("prod"), &json!(MODEL)));
    assert_eq!(server.get("/v1/models/none").status, 404);
}

#[test]
fn a_deleted_model_is_gone_with_its_files_and_everything_else_stays() {
    let dir = data_dir();
    let server = server(&dir);
    let before = text(&server, MODEL);
    let folder = dir.join("jobs/ftjob-1/model");
    assert!(folder.is_dir());
    let deleted = delete(&server, &format!("/v1/models/{MODEL}"));
    assert_eq!(deleted.json(), json!({"id": MODEL, "object": "model", "deleted": true}));
    assert!(!folder.exists());
    assert_eq!(ask(&server, MODEL), 404);
    assert_eq!(ids(&server), ["tiny-llama", "mine", OTHER]);
    assert_eq!(delete(&server, &format!("/v1/models/{MODEL}")).status, 404);
    text(&server, CHECKPOINT);
    assert_eq!(text(&server, "mine"), before);

    assert_eq!(delete(&server, &format!("/v1/models/{CHECKPOINT}")).status, 200);
    let checkpoints = server.get("/v1/fine_tuning/jobs/ftjob-1/checkpoints").json();
    assert_eq!(checkpoints["data"], json!([]));
    drop(server);
    let server = self::server(&dir);
    assert_eq!(ask(&server, MODEL), 404);
    text(&server, OTHER);
}

#[test]
fn what_no_job_made_cannot_be_deleted() {
    let dir = data_dir();
    let server = server(&dir);
    for (name, status) in [("tiny-llama", 403), ("mine", 403), ("none", 404), ("a/b", 404)] {
        let refused = delete(&server, &format!("/v1/models/{name}"));
        assert_eq!(refused.status, status, "{name}: {refused:?}");
    }
    text(&server, "mine");
}

#[test]
fn a_model_that_is_needed_stays() {
    let dir = data_dir();
    let records = Records::open(&dir.0);
    let parent_model = Some(OTHER.to_owned());
    records.add(&Job { parent_model, ..job("ftjob-3", JobStatus::Paused) });
    drop(records);
    let server = server(&dir);
    assert_eq!(put_alias(&server, "prod", &json!({"model": MODEL})).status, 200);
    for (name, named) in [(MODEL, "prod"), (OTHER, "ftjob-3"), ("prod", "deployment")] {
        let refused = delete(&server, &format!("/v1/models/{name}"));
        let message = refused.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(refused.status == 409 && message.contains(named), "{refused:?}");
    }
    assert_eq!(delete(&server, "/v1/aliases/prod").status, 200);
    assert_eq!(delete(&server, &format!("/v1/models/{MODEL}")).status, 200);
    let path = "/v1/fine_tuning/jobs/ftjob-3/cancel";
    assert_eq!(server.request("POST", path, &[JSON], b"").status, 200);
    assert_eq!(delete(&server, &format!("/v1/models/{OTHER}")).status, 200);
}

#[test]
fn an_alias_moves_from_model_to_model_and_ends() {
    let dir = data_dir();
    let server = server(&dir);
    let (first, second) = (text(&server, MODEL), text(&server, OTHER));
    for (model, answer) in [
        (MODEL, &first),
        (OTHER, &second),
        ("mine", &first),
        ("ftckpt_4", &second),
        (&azure_model_name("tiny-llama", "ftjob-1"), &first),
    ] {
        let put = put_alias(&server, "prod", &json!({"model": model}));
        assert_eq!(put.status, 200, "{put:?}");
        assert_eq!(text(&server, "prod"), *answer, "{model}");
    }
    assert_eq!(put_alias(&server, "plain", &json!({"model": "tiny-llama"})).status, 200);
    assert_eq!(text(&server, "plain"), text(&server, "tiny-llama"));
    // An alias of an alias is one of its model.
    assert_eq!(put_alias(&server, "second", &json!({"model": "prod"})).json()["model"], MODEL);
    let list = server.get("/v1/aliases").json();
    assert_eq!(list["data"].as_array().unwrap().len(), 3);
    assert_eq!(server.get("/v1/aliases/prod").json()["model"], MODEL);
    drop(server);
    let server = self::server(&dir);
    assert_eq!(text(&server, "prod"), first);
    let gone = delete(&server, "/v1/aliases/prod").json();
    assert_eq!(gone, json!({"name": "prod", "object": "alias", "deleted": true}));
    assert_eq!(ask(&server, "prod"), 404);
    assert_eq!(delete(&server, "/v1/aliases/prod").status, 404);
    assert_eq!(server.get("/v1/aliases/prod").status, 404);
}

#[test]
fn names_that_mean_something_already_and_models_that_mean_nothing_are_refused() {
    let dir = data_dir();
    let server = server(&dir);
    let long = "a".repeat(65);
    for name in ["tiny-llama", "mine", "a%20b", "-a", "a:b", &long, "%2e%2e", "a%2fb"] {
        let refused = put_alias(&server, name, &json!({"model": MODEL}));
        let param = refused.json()["error"]["param"].clone();
        assert_eq!((refused.status, param), (400, json!("name")), "{name}");
    }
    for model in [json!(null), json!(""), json!("none"), json!(1), json!("mine@v1")] {
        let refused = put_alias(&server, "prod", &json!({"model": model}));
        let param = refused.json()["error"]["param"].clone();
        assert_eq!((refused.status, param), (400, json!("model")), "{model}");
    }
    assert_eq!(server.get("/v1/aliases").json()["data"], json!([]));
    // Nor does a loaded adapter take a name away from them.
    assert_eq!(put_alias(&server, "prod", &json!({"model": MODEL})).status, 200);
    for name in ["prod", MODEL] {
        let body = json!({"lora_name": name, "lora_path": fixture(SECOND), "load_inplace": true});
        assert_eq!(server.post("/v1/load_lora_adapter", &body).status, 400, "{name}");
    }
}

#[test]
fn a_model_whose_files_were_changed_or_lost_is_refused_and_never_answered_by_another() {
    let dir = data_dir();
    fs::remove_dir_all(dir.join("jobs/ftjob-1/model")).unwrap();
    let changed = dir.join("jobs/ftjob-2/model/adapter_model.safetensors");
    fs::copy(fixture(FIRST).join("adapter_model.safetensors"), changed).unwrap();
    let server = server(&dir);
    for name in [MODEL, OTHER] {
        assert_ne!(ask(&server, name), 200, "{name}");
    }
    assert_eq!(ids(&server), ["tiny-llama", "mine", MODEL, OTHER]);
}

#[test]
fn what_a_crash_within_a_deletion_left_is_swept_at_the_next_start() {
    let dir = data_dir();
    for left in ["jobs/ftjob-2/epochs/step-9", "jobs/ftjob-9/model"] {
        fs::create_dir_all(dir.join(left)).unwrap();
    }
    Records::open(&dir.0).add(&job("ftjob-9", JobStatus::Cancelled));
    let server = server(&dir);
    server.wait_until("the leftovers are gone", |_| {
        !dir.join("jobs/ftjob-2/epochs/step-9").exists() && !dir.join("jobs/ftjob-9/model").exists()
    });
    text(&server, MODEL);
    text(&server, OTHER);
    text(&server, CHECKPOINT);
}

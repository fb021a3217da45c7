//! Fine-tuning jobs over HTTP: made, listed, watched, controlled.

use crate::common::{
    Server, TempDir, fixture,
    records::{FIRST, Records, job},
    server::JSON,
};
use serde_json::{Value, json};
use tunesmith::jobs::{Job, JobError, JobStatus};

const JOBS: &str = "/v1/fine_tuning/jobs";

fn server(dir: &TempDir) -> Server {
    Server::start(&fixture("tiny-llama"), &["--data-dir", dir.0.to_str().unwrap()])
}

fn ids(list: &Value) -> Vec<&str> {
    list["data"].as_array().unwrap().iter().map(|object| object["id"].as_str().unwrap()).collect()
}

fn keys(object: &Value) -> Vec<&str> {
    object.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn a_new_job_has_openai_s_shape_and_is_there_after_a_restart() {
    let dir = TempDir::new();
    Records::open(&dir.0).file("file-a", "fine-tune").file("file-b", "fine-tune");
    let server = server(&dir);
    let body = json!({
        "model": "tiny-llama", "training_file": "file-a", "validation_file": "file-b",
        "suffix": "recipe-ner", "seed": 105, "metadata": {"team": "kitchen"},
        "hyperparameters": {"n_epochs": 2},
        "method": {"type": "supervised", "supervised": {"hyperparameters": {
            "n_epochs": 2, "batch_size": -1, "learning_rate_multiplier": 1.8}}},
        "integrations": [{"type": "wandb", "wandb": {"project": "p", "tags": ["a"]}}],
    });
    let made = server.post(JOBS, &body);
    assert_eq!(made.status, 200, "{made:?}");
    let made = made.json();
    let expected_keys = [
        "object",
        "id",
        "model",
        "created_at",
        "finished_at",
        "fine_tuned_model",
        "organization_id",
        "result_files",
        "status",
        "validation_file",
        "training_file",
        "hyperparameters",
        "trained_tokens",
        "integrations",
        "seed",
        "estimated_finish",
        "error",
        "user_provided_suffix",
        "usage_metrics",
        "shared_with_openai",
        "metadata",
        "method",
    ];
    assert_eq!(keys(&made), expected_keys);
    let id = made["id"].as_str().unwrap();
    assert!(id.starts_with("ftjob-"), "{id}");
    let numbers = json!({"batch_size": "auto", "learning_rate_multiplier": 1.8, "n_epochs": 2});
    for (field, value) in [
        ("object", json!("fine_tuning.job")),
        ("status", json!("validating_files")),
        ("error", Value::Null),
        ("finished_at", Value::Null),
        ("result_files", json!([])),
        ("seed", json!(105)),
        ("user_provided_suffix", json!("recipe-ner")),
        ("metadata", body["metadata"].clone()),
        ("integrations", body["integrations"].clone()),
        ("hyperparameters", numbers.clone()),
        ("method", json!({"type": "supervised", "supervised": {"hyperparameters": numbers}})),
        ("shared_with_openai", json!(false)),
    ] {
        assert_eq!(made[field], value, "{field}");
    }
    let events = server.get(&format!("{JOBS}/{id}/events?limit=100")).json();
    let messages: Vec<&Value> =
        events["data"].as_array().unwrap().iter().rev().map(|event| &event["message"]).collect();
    assert_eq!(messages[0], &json!(format!("Created fine-tuning job: {id}")));
    assert!(messages[1].as_str().unwrap().contains("Integrations"), "{messages:?}");
    drop(server);
    let again = self::server(&dir).get(&format!("{JOBS}/{id}")).json();
    assert_eq!((&again["id"], &again["metadata"]), (&made["id"], &made["metadata"]));
}

#[test]
fn a_job_of_preferences_has_its_numbers_in_the_method_only_and_a_seed_of_its_own() {
    let dir = TempDir::new();
    Records::open(&dir.0).file("file-a", "fine-tune");
    let server = server(&dir);
    let hyperparameters = json!({"beta": 0.2, "n_epochs": "auto"});
    let made = server
        .post(
            JOBS,
            &json!({"model": "tiny-llama", "training_file": "file-a",
                "method": {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}}}),
        )
        .json();
    assert_eq!(made["hyperparameters"], Value::Null, "{made}");
    let expected = json!({"type": "dpo", "dpo": {"hyperparameters": {
        "beta": 0.2, "batch_size": "auto", "learning_rate_multiplier": "auto",
        "n_epochs": "auto"}}});
    assert_eq!(made["method"], expected);
    assert!(made["seed"].as_u64().unwrap() < 1 << 31);
}

#[test]
fn a_job_starts_from_whatever_has_a_name_here() {
    let dir = TempDir::new();
    let records = Records::open(&dir.0);
    records.file("file-a", "fine-tune").add(&job("ftjob-old", JobStatus::Succeeded));
    records.model(&dir.0, "ftjob-old", "ft:tiny-llama:tunesmith::abc", FIRST);
    records.model(&dir.0, "ftjob-old", "ft:tiny-llama:tunesmith::abc:ckpt-step-4", FIRST);
    records.checkpoint("ftjob-old", "ftckpt_1", "ft:tiny-llama:tunesmith::abc:ckpt-step-4", 4);
    drop(records);
    let adapter = format!("mine={}", fixture(FIRST).display());
    let args = ["--data-dir", dir.0.to_str().unwrap(), "--adapter", &adapter];
    let server = Server::start(&fixture("tiny-llama"), &args);
    let moved = server.request(
        "PUT",
        "/v1/aliases/prod",
        &[JSON],
        br#"{"model": "ft:tiny-llama:tunesmith::abc"}"#,
    );
    assert_eq!(moved.status, 200, "{moved:?}");
    for model in [
        "tiny-llama",
        "ft:tiny-llama:tunesmith::abc",
        "ft:tiny-llama:tunesmith::abc:ckpt-step-4",
        "ftckpt_1",
        "prod",
        "mine",
    ] {
        let made = server.post(JOBS, &json!({"model": model, "training_file": "file-a"}));
        assert_eq!((made.status, &made.json()["model"]), (200, &json!(model)), "{made:?}");
    }
}

#[test]
fn lists_are_walked_to_their_end_and_filtered_by_metadata() {
    let dir = TempDir::new();
    let records = Records::open(&dir.0);
    for number in 0..5 {
        let name = if number % 2 == 0 { "even" } else { "odd" };
        let metadata = Some([("a kind".to_owned(), name.to_owned())].into());
        let metadata = if number == 4 { None } else { metadata };
        let id = format!("ftjob-{number}");
        records.add(&Job { metadata, ..job(&id, JobStatus::Cancelled) });
    }
    drop(records);
    let server = server(&dir);
    let mut seen = Vec::new();
    let mut after = String::new();
    for _ in 0..10 {
        let list = server.get(&format!("{JOBS}?limit=2{after}")).json();
        assert_eq!(list["object"], "list");
        seen.extend(ids(&list).into_iter().map(str::to_owned));
        after = format!("&after={}", seen.last().unwrap());
        if list["has_more"] == false {
            break;
        }
    }
    assert_eq!(seen, ["ftjob-4", "ftjob-3", "ftjob-2", "ftjob-1", "ftjob-0"]);
    let filtered = |query: &str| server.get(&format!("{JOBS}?{query}")).json();
    assert_eq!(ids(&filtered("metadata%5Ba+kind%5D=even")), ["ftjob-2", "ftjob-0"]);
    let first = filtered("metadata[a%20kind]=odd&limit=1");
    assert_eq!((ids(&first), &first["has_more"]), (vec!["ftjob-3"], &json!(true)));
    assert_eq!(ids(&filtered("metadata=null")), ["ftjob-4"]);
    assert_eq!(ids(&filtered("metadata[a%20kind]=none")), Vec::<&str>::new());
    let beyond = filtered("after=ftjob-none");
    assert_eq!((ids(&beyond), &beyond["has_more"]), (Vec::new(), &json!(false)));
    for limit in ["0", "101", "x", "-1"] {
        let refused = server.get(&format!("{JOBS}?limit={limit}"));
        assert_eq!(
            (refused.status, refused.json()["error"]["param"].clone()),
            (400, json!("limit"))
        );
    }
}

#[test]
fn events_and_checkpoints_come_newest_first_and_a_stream_tells_all_from_the_start() {
    let dir = TempDir::new();
    let records = Records::open(&dir.0);
    let error = JobError {
        code: "invalid_training_file".to_owned(),
        message: "line 3: no".to_owned(),
        param: Some("training_file".to_owned()),
    };
    records.add(&Job { error: Some(error), ..job("ftjob-1", JobStatus::Failed) });
    for number in 0..25 {
        records.event("ftjob-1", number);
    }
    records.checkpoint("ftjob-1", "ftckpt_a", "m:ckpt-step-1", 1);
    records.checkpoint("ftjob-1", "ftckpt_b", "m:ckpt-step-2", 2);
    drop(records);
    let server = server(&dir);
    let shown = server.get(&format!("{JOBS}/ftjob-1")).json();
    assert_eq!(
        shown["error"],
        json!({"code": "invalid_training_file", "message": "line 3: no", "param": "training_file"})
    );

    let page = server.get(&format!("{JOBS}/ftjob-1/events")).json();
    assert_eq!((page["data"].as_array().unwrap().len(), &page["has_more"]), (20, &json!(true)));
    assert_eq!(
        page["data"][0],
        json!({"object": "fine_tuning.job.event", "id": "ftevent-24", "created_at": 24,
            "level": "info", "message": "event 24", "type": "message", "data": null})
    );
    let rest = server.get(&format!("{JOBS}/ftjob-1/events?after=ftevent-5")).json();
    assert_eq!((ids(&rest).len(), &rest["has_more"]), (5, &json!(false)));

    let path = format!("http://{}{JOBS}/ftjob-1/events?stream=true", server.address);
    let path = path.split_once(&server.address).unwrap().1.to_owned();
    let mut stream =
        crate::common::http::Exchange::start(&server.address, "GET", &path, &[], b"").unwrap();
    assert_eq!(stream.header("content-type"), Some("text/event-stream"));
    let told: Vec<String> = std::iter::from_fn(|| stream.event()).collect();
    assert_eq!((told.len(), told.last().map(String::as_str)), (26, Some("[DONE]")));
    let first: Value = serde_json::from_str(&told[0]).unwrap();
    assert_eq!(first["id"], "ftevent-0");

    let page = server.get(&format!("{JOBS}/ftjob-1/checkpoints?limit=1")).json();
    assert_eq!(
        page,
        json!({"object": "list", "data": [{"object": "fine_tuning.job.checkpoint",
            "id": "ftckpt_b", "created_at": 1, "fine_tuned_model_checkpoint": "m:ckpt-step-2",
            "fine_tuning_job_id": "ftjob-1", "metrics": {"step": 2, "train_loss": 0.5},
            "step_number": 2}], "first_id": "ftckpt_b", "last_id": "ftckpt_b", "has_more": true})
    );
    let page = server.get(&format!("{JOBS}/ftjob-1/checkpoints?after=ftckpt_b")).json();
    assert_eq!((ids(&page), &page["has_more"]), (vec!["ftckpt_a"], &json!(false)));
}

#[test]
fn a_stream_follows_a_job_to_its_end_and_ends_when_the_server_does() {
    let dir = TempDir::new();
    let records = Records::open(&dir.0);
    for id in ["ftjob-1", "ftjob-2"] {
        records.add(&job(id, JobStatus::Paused));
    }
    drop(records);
    let server = server(&dir);
    let open = |id: &str| {
        let path = format!("{JOBS}/{id}/events?stream=true");
        crate::common::http::Exchange::start(&server.address, "GET", &path, &[], b"").unwrap()
    };
    let (mut first, mut second) = (open("ftjob-1"), open("ftjob-2"));
    let cancelled = server.request("POST", &format!("{JOBS}/ftjob-1/cancel"), &[JSON], b"");
    assert_eq!(cancelled.json()["status"], "cancelled", "{cancelled:?}");
    assert!(first.event().unwrap().contains("cancelled"));
    assert_eq!(first.event().as_deref(), Some("[DONE]"));
    server.terminate();
    assert!(second.event().unwrap().contains("\"draining\""));
    assert_eq!(second.event(), None);
    assert!(server.wait().0.success());
}

#[test]
fn what_a_job_s_state_does_not_allow_is_refused() {
    let dir = TempDir::new();
    let records = Records::open(&dir.0);
    for (id, status) in [
        ("ftjob-done", JobStatus::Succeeded),
        ("ftjob-gone", JobStatus::Cancelled),
        ("ftjob-paused", JobStatus::Paused),
        ("ftjob-other", JobStatus::Paused),
    ] {
        records.add(&job(id, status));
    }
    drop(records);
    let server = server(&dir);
    let ask = |id: &str, wish: &str| {
        let response = server.request("POST", &format!("{JOBS}/{id}/{wish}"), &[JSON], b"");
        let body = response.json();
        let said = &body[if response.status == 200 { "status" } else { "error" }];
        (response.status, said.clone())
    };
    for wish in ["cancel", "pause", "resume"] {
        for id in ["ftjob-done", "ftjob-gone"] {
            let (status, error) = ask(id, wish);
            assert_eq!(status, 400, "{wish} {id}");
            assert_eq!(error["message"], format!("Job has already completed: {id}"));
            assert_eq!(error["param"], "fine_tuning_job_id");
        }
        let (status, error) = ask("ftjob-none", wish);
        assert_eq!((status, &error["param"]), (404, &json!("fine_tuning_job_id")));
    }
    assert_eq!(ask("ftjob-paused", "pause").0, 400);
    assert_eq!(ask("ftjob-other", "cancel"), (200, json!("cancelled")));
    assert_eq!(ask("ftjob-paused", "resume"), (200, json!("queued")));
}

#[test]
fn permissions_of_checkpoints_are_answered() {
    let dir = TempDir::new();
    let records = Records::open(&dir.0);
    records.model(&dir.0, "ftjob-1", "ft:tiny-llama:tunesmith::a:ckpt-step-4", FIRST);
    records.checkpoint("ftjob-1", "ftckpt_1", "ft:tiny-llama:tunesmith::a:ckpt-step-4", 4);
    drop(records);
    let server = server(&dir);
    let path = "/v1/fine_tuning/checkpoints/ft:tiny-llama:tunesmith::a:ckpt-step-4/permissions";
    let empty =
        json!({"object": "list", "data": [], "first_id": null, "last_id": null, "has_more": false});
    assert_eq!(server.get(path).json(), empty);
    assert_eq!(
        server.get(&path.replace("ft:tiny-llama:tunesmith::a:ckpt-step-4", "ftckpt_1")).json(),
        empty
    );
    let made = server.post(path, &json!({"project_ids": ["proj_1"]})).json();
    assert_eq!(made["data"][0]["project_id"], "proj_1");
    let id = made["first_id"].as_str().unwrap();
    let gone = server.request("DELETE", &format!("{path}/{id}"), &[], b"").json();
    assert_eq!(gone, json!({"id": id, "object": "checkpoint.permission", "deleted": true}));
    assert_eq!(server.get("/v1/fine_tuning/checkpoints/none/permissions").status, 404);
}

#[test]
fn without_a_data_folder_the_service_is_off_and_the_answer_names_the_flag() {
    let server = Server::start(&fixture("tiny-llama"), &[]);
    for (method, path) in [("GET", JOBS), ("POST", JOBS), ("GET", "/v1/aliases")] {
        let refused = server.request(method, path, &[JSON], b"{}");
        let message = refused.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(refused.status == 403 && message.contains("--data-dir"), "{refused:?}");
    }
}

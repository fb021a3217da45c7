//! Azure's addresses and its deployments, on the same port.

use crate::common::{
    Response, Server, TempDir, chat, fixture,
    records::{FIRST, Records, job},
    server::{CHAT, JSON},
};
use serde_json::{Value, json};
use tunesmith::jobs::{JobStatus, azure_model_name};

const VERSION: &str = "api-version=2024-10-21";
const ACCOUNT: &str = "/subscriptions/s-1/resourceGroups/g/providers/\
                       Microsoft.CognitiveServices/accounts/a/deployments";
const MODEL: &str = "ft:tiny-llama:tunesmith:ner:Abc12345";

fn data_dir() -> TempDir {
    let dir = TempDir::new();
    let records = Records::open(&dir.0);
    records.file("file-a", "fine-tune").add(&job("ftjob-1", JobStatus::Succeeded));
    records.model(&dir.0, "ftjob-1", MODEL, FIRST);
    dir
}

fn server(dir: &TempDir, args: &[&str]) -> Server {
    let args = [&["--data-dir", dir.0.to_str().unwrap()], args].concat();
    Server::start(&fixture("tiny-llama"), &args)
}

fn put(server: &Server, name: &str, body: &Value) -> Response {
    let path = format!("{ACCOUNT}/{name}?api-version=2023-05-01");
    server.request("PUT", &path, &[JSON], body.to_string().as_bytes())
}

fn deployment_of(model: &str) -> Value {
    json!({"sku": {"name": "standard", "capacity": 3},
        "properties": {"model": {"format": "OpenAI", "name": model, "version": "1"}}})
}

#[test]
fn the_tutorial_s_addresses_lead_to_jobs_files_and_models() {
    let dir = data_dir();
    let server = server(&dir, &["--api-key", "k"]);
    let key = ("api-key", "k");
    let get = |path: &str| server.request("GET", path, &[key], b"");
    for form in ["/openai", "/openai/v1", "/v1"] {
        let list = get(&format!("{form}/fine_tuning/jobs?limit=1&{VERSION}"));
        assert_eq!(
            (list.status, &list.json()["data"][0]["id"]),
            (200, &json!("ftjob-1")),
            "{form}"
        );
        assert_eq!(get(&format!("{form}/files/file-a?{VERSION}")).status, 200, "{form}");
        let model = get(&format!("{form}/models/{}?{VERSION}", MODEL.replace(':', "%3A")));
        assert_eq!((model.status, &model.json()["id"]), (200, &json!(MODEL)), "{form}");
    }
    let body = json!({"model": azure_model_name("tiny-llama", "ftjob-1"), "seed": 105,
        "training_file": "file-a", "trainingType": "GlobalStandard",
        "hyperparameters": {"n_epochs": -1, "batch_size": -1, "learning_rate_multiplier": 1}});
    let path = format!("/openai/fine_tuning/jobs?{VERSION}");
    let made = server.request("POST", &path, &[key, JSON], body.to_string().as_bytes());
    let expected = json!({"batch_size": -1, "learning_rate_multiplier": 1.0, "n_epochs": -1});
    assert_eq!((made.status, &made.json()["hyperparameters"]), (200, &expected), "{made:?}");
    let id = made.json()["id"].as_str().unwrap().to_owned();
    let plain = get(&format!("/v1/fine_tuning/jobs/{id}")).json();
    // As soon as its file has been counted there are numbers.
    assert!(plain["hyperparameters"]["n_epochs"] != json!(-1), "{plain}");

    // The key is looked at behind the rewriting, and what does not exist stays so.
    for path in ["/openai/files", "/openai/nope", "/openai", "/openai/deployments/x/nope", ACCOUNT]
    {
        assert_eq!(server.get(path).status, 401, "{path}");
    }
    for path in [
        "/openai",
        "/openai/",
        "/openai/nope",
        "/openai/openai/files",
        "/openai/../v1/files",
        "/openai/%2e%2e/v1/files",
        "/openai/deployments/x",
        "/openai/deployments/x/nope",
        "/v1/%2e%2e/v1/files",
    ] {
        assert_eq!(get(path).status, 404, "{path}");
    }
}

#[test]
fn a_deployment_is_made_chatted_with_moved_listed_and_deleted() {
    let dir = data_dir();
    let server = server(&dir, &[]);
    let made = put(&server, "chef", &deployment_of(&azure_model_name("tiny-llama", "ftjob-1")));
    assert_eq!(made.status, 201, "{made:?}");
    let made = made.json();
    let expected = json!({
        "id": format!("{ACCOUNT}/chef"), "name": "chef",
        "type": "Microsoft.CognitiveServices/accounts/deployments",
        "sku": {"name": "standard", "capacity": 3},
        "properties": {"model": {"format": "OpenAI", "name": MODEL, "version": "1"},
            "provisioningState": "Succeeded"},
    });
    assert_eq!(made, expected);
    assert_eq!(server.get(&format!("{ACCOUNT}/chef")).json(), expected);
    assert_eq!(server.get(&format!("{ACCOUNT}?{VERSION}")).json(), json!({"value": [expected]}));

    let tuned = server.text(&chat(MODEL, "hello", json!({})));
    let ask = |name: &str, body: &Value| {
        let path = format!("/openai/deployments/{name}/chat/completions?{VERSION}");
        server.request("POST", &path, &[JSON], body.to_string().as_bytes())
    };
    let text = |answer: &Response| answer.json()["choices"][0]["message"]["content"].clone();
    // The path's model counts, whether the body has none or another one.
    for model in [Value::Null, json!("tiny-llama"), json!("gpt-4o")] {
        let mut body = chat("", "hello", json!({"model": model}));
        if model.is_null() {
            body.as_object_mut().unwrap().remove("model");
        }
        let answer = ask("chef", &body);
        assert_eq!((answer.status, text(&answer)), (200, json!(tuned)), "{answer:?}");
    }
    let body = chat("chef", "hello", json!({})).to_string();
    let answer = server.request("POST", "/openai/v1/chat/completions", &[JSON], body.as_bytes());
    assert_eq!(text(&answer), json!(tuned));
    assert_eq!(ask("none", &chat("tiny-llama", "hello", json!({}))).status, 404);

    let moved = put(&server, "chef", &deployment_of("tiny-llama"));
    assert_eq!(moved.status, 200);
    let base = server.text(&chat("tiny-llama", "hello", json!({})));
    assert_eq!(text(&ask("chef", &chat("x", "hello", json!({})))), json!(base));

    for (bad, param) in [
        (json!({}), "properties.model.name"),
        (json!({"properties": {"model": {"name": 3}}}), "properties.model.name"),
        (deployment_of("none"), "properties.model.name"),
    ] {
        let refused = put(&server, "other", &bad);
        let found = refused.json()["error"]["param"].clone();
        assert_eq!((refused.status, found), (400, json!(param)), "{bad}");
    }
    assert_eq!(put(&server, "a%20b", &deployment_of(MODEL)).status, 400);

    assert_eq!(put(&server, "chef", &deployment_of(MODEL)).status, 200);
    let path = format!("/v1/models/{MODEL}");
    assert_eq!(server.request("DELETE", &path, &[], b"").status, 409);
    let end = || server.request("DELETE", &format!("{ACCOUNT}/chef?{VERSION}"), &[], b"").status;
    assert_eq!((end(), end()), (200, 204));
    assert_eq!(server.get(&format!("{ACCOUNT}/chef")).status, 404);
    assert_eq!(server.post(CHAT, &chat("chef", "hello", json!({}))).status, 404);
    assert_eq!(server.request("DELETE", &path, &[], b"").status, 200);
}

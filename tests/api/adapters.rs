//! Adapters come, change and go while the server runs.

use std::{fs, path::Path};

use crate::common::{
    Response, Server, TempDir, chat, copy_dir, edit_json, endless_model, fixture,
    server::{CHAT, JSON},
};
use serde_json::{Value, json};

const LOAD: &str = "/v1/load_lora_adapter";
const UNLOAD: &str = "/v1/unload_lora_adapter";

/// Two adapters of the same base with different answers.
const FIRST: &str = "oracle/tiny-llama-train-initial";
const SECOND: &str = "oracle/tiny-llama-plain-adapter";

fn adapter_folder(dir: &TempDir, name: &str, source: &str) -> String {
    let path = dir.join(name);
    copy_dir(&fixture(source), &path);
    path.to_str().unwrap().to_owned()
}

fn server(dir: &TempDir) -> Server {
    Server::start(&fixture("tiny-llama"), &["--adapter-dir", dir.0.to_str().unwrap()])
}

fn load(server: &Server, name: &str, path: &str, in_place: bool) -> Response {
    server.post(LOAD, &json!({"lora_name": name, "lora_path": path, "load_inplace": in_place}))
}

fn ids(server: &Server) -> Vec<String> {
    let list = server.get("/v1/models").json();
    let ids = list["data"].as_array().unwrap().iter().map(|card| card["id"].as_str().unwrap());
    ids.map(str::to_owned).collect()
}

/// Both shapes that controllers read, agreeing with each other and with the status.
fn refusal(response: &Response) -> (u16, String, String) {
    let body = response.json();
    let error = &body["error"];
    assert_eq!(body["object"], "error", "{body}");
    for field in ["message", "type", "code"] {
        assert_eq!(body[field], error[field], "{body}");
    }
    assert_eq!(error["code"], response.status, "{body}");
    let text = |field: &str| error[field].as_str().unwrap_or_default().to_owned();
    (response.status, text("type"), text("message"))
}

#[test]
fn an_adapter_is_loaded_replaced_and_unloaded_with_the_answers_that_controllers_expect() {
    let dir = TempDir::new();
    let (first, second) = (adapter_folder(&dir, "one", FIRST), adapter_folder(&dir, "two", SECOND));
    let server = server(&dir);
    let text = |model: &str| server.text(&chat(model, "hello", json!({})));

    let loaded = load(&server, "rec:v", &first, false);
    assert_eq!(loaded.status, 200, "{loaded:?}");
    assert_eq!(loaded.text(), "Success: LoRA adapter 'rec:v' added successfully.");
    let version = loaded.header("x-adapter-version").unwrap().to_owned();
    assert!(version.starts_with("rec:v@v1;sha256:"), "{version}");
    let old = text("rec:v");

    let again = load(&server, "rec:v", &second, false);
    let message = "The lora adapter 'rec:v' has already been loaded. If you want to load the adapter \
                   in place, set 'load_inplace' to True.";
    let expected = (400, "InvalidUserInput".to_owned(), message.to_owned());
    assert_eq!(refusal(&again), expected);
    let same = load(&server, "rec:v", &first, true);
    assert_eq!(same.header("x-adapter-version"), Some(version.as_str()));

    let replaced = load(&server, "rec:v", &second, true);
    assert!(replaced.header("x-adapter-version").unwrap().starts_with("rec:v@v2;"));
    assert_ne!(text("rec:v"), old);
    assert_eq!(server.post(CHAT, &chat("rec:v@v1", "hello", json!({}))).status, 404);
    assert_eq!(ids(&server), ["tiny-llama", "rec:v"]);

    let unloaded = server.post(UNLOAD, &json!({"lora_name": "rec:v"}));
    assert_eq!(unloaded.status, 200);
    assert_eq!(unloaded.text(), "Success: LoRA adapter 'rec:v' removed successfully.");
    assert_eq!(ids(&server), ["tiny-llama"]);
    assert_eq!(server.post(CHAT, &chat("rec:v", "hello", json!({}))).status, 404);
    let gone = refusal(&server.post(UNLOAD, &json!({"lora_name": "rec:v"})));
    assert_eq!((gone.0, gone.1.as_str()), (404, "NotFoundError"));
}

#[test]
fn a_client_that_asks_for_json_gets_the_version_as_json() {
    let dir = TempDir::new();
    let path = adapter_folder(&dir, "one", FIRST);
    let server = server(&dir);
    let body = json!({"lora_name": "one", "lora_path": path, "unknown": 1}).to_string();
    let headers = [JSON, ("Accept", "application/json")];
    let loaded = server.request("POST", LOAD, &headers, body.as_bytes());
    assert_eq!((loaded.json()["version"].clone(), loaded.status), (json!(1), 200));
}

#[test]
fn a_sub_folder_of_the_adapter_dir_answers_to_its_name_until_it_is_unloaded() {
    let dir = TempDir::new();
    let path = adapter_folder(&dir, "lazy", SECOND);
    let server = server(&dir);
    assert_eq!(ids(&server), ["tiny-llama"]);
    server.text(&chat("lazy", "hello", json!({})));
    assert_eq!(ids(&server), ["tiny-llama", "lazy"]);
    assert_eq!(server.post(UNLOAD, &json!({"lora_name": "lazy"})).status, 200);
    assert_eq!(server.post(CHAT, &chat("lazy", "hello", json!({}))).status, 404);
    assert_eq!(load(&server, "lazy", &path, false).status, 200);
    server.text(&chat("lazy", "hello", json!({})));
    adapter_folder(&dir, "late", FIRST);
    server.text(&chat("late", "hello", json!({})));
}

#[test]
fn requests_that_make_no_sense_are_refused_with_the_field() {
    let dir = TempDir::new();
    let path = adapter_folder(&dir, "one", FIRST);
    let server = server(&dir);
    for (body, status) in [
        (json!({}), 400),
        (json!({"lora_name": "", "lora_path": path}), 400),
        (json!({"lora_name": "a", "lora_path": ""}), 400),
        (json!({"lora_name": "a"}), 400),
        (json!({"lora_name": 3, "lora_path": path}), 400),
        (json!({"lora_name": "a@v1", "lora_path": path}), 400),
        (json!({"lora_name": "../a", "lora_path": path}), 400),
        (json!({"lora_name": "tiny-llama", "lora_path": path}), 400),
        (json!({"lora_name": "a", "lora_path": path, "is_3d_lora_weight": true}), 400),
        (json!({"lora_name": "a", "lora_path": path, "dry_run": true}), 400),
        (json!({"lora_name": "a", "lora_path": path, "expected_version": 1}), 400),
        (json!({"lora_name": "a", "lora_path": "/etc"}), 403),
        (json!({"lora_name": "a", "lora_path": format!("{path}/../../..")}), 403),
        (json!({"lora_name": "a", "lora_path": format!("{path}-missing")}), 404),
        (json!({"lora_name": "a", "lora_path": dir.0}), 404),
    ] {
        let response = server.post(LOAD, &body);
        assert_eq!(refusal(&response).0, status, "{body}: {response:?}");
    }
    for body in
        [json!({}), json!({"lora_name": "tiny-llama"}), json!({"lora_name": "a", "mode": "x"})]
    {
        assert_eq!(refusal(&server.post(UNLOAD, &body)).0, 400, "{body}");
    }
    assert_eq!(ids(&server), ["tiny-llama"]);
}

#[test]
fn without_an_adapter_folder_loading_is_off_and_the_answer_names_the_flag() {
    let server = Server::start(&fixture("tiny-llama"), &[]);
    let refused = load(&server, "a", fixture(FIRST).to_str().unwrap(), false);
    let (status, _, message) = refusal(&refused);
    assert_eq!(status, 403);
    assert!(message.contains("--adapter-dir"), "{message}");
}

#[test]
fn a_broken_adapter_is_a_422_with_a_reason_and_the_old_version_goes_on() {
    let dir = TempDir::new();
    let good = adapter_folder(&dir, "good", SECOND);
    let server = server(&dir);
    assert_eq!(load(&server, "a", &good, false).status, 200);
    let before = server.text(&chat("a", "hello", json!({})));

    type Damage = dyn Fn(&Path);
    let breakages: &[(&str, &Damage, u16)] = &[
        ("truncated", &|path| truncate(&path.join("adapter_model.safetensors")), 422),
        (
            "no-weights",
            &|path| fs::remove_file(path.join("adapter_model.safetensors")).unwrap(),
            404,
        ),
        ("no-config", &|path| fs::remove_file(path.join("adapter_config.json")).unwrap(), 404),
        ("config-not-json", &|path| fs::write(path.join("adapter_config.json"), "{").unwrap(), 422),
        ("wrong-rank", &|path| set(path, "r", json!(5)), 422),
        ("dora", &|path| set(path, "use_dora", json!(true)), 422),
        ("targets", &|path| set(path, "target_modules", json!(["no_such_proj"])), 422),
        ("pickle", &|path| pickle(path), 422),
    ];
    for (name, damage, status) in breakages {
        let path = adapter_folder(&dir, name, SECOND);
        damage(Path::new(&path));
        let response = load(&server, "a", &path, true);
        assert_eq!(refusal(&response).0, *status, "{name}: {response:?}");
        let reason = response.json()["error"]["reason"].clone();
        assert!(reason.is_string(), "{name}: {response:?}");
        // The lazy way refuses it as well, and never answers with the base instead.
        let asked = server.post(CHAT, &chat(name, "hello", json!({})));
        assert!((400..500).contains(&asked.status), "{name}: {asked:?}");
        assert_eq!(server.text(&chat("a", "hello", json!({}))), before, "{name}");
    }
    assert_eq!(ids(&server), ["tiny-llama", "a"]);
}

#[test]
fn an_unload_can_wait_for_the_requests_that_run_on_the_adapter() {
    let dir = TempDir::new();
    let path = adapter_folder(&dir, "one", FIRST);
    let model = endless_model(&dir.0);
    let server = Server::start(&model, &["--adapter-dir", dir.0.to_str().unwrap()]);
    assert_eq!(load(&server, "one", &path, false).status, 200);
    let endless = json!({"stream": true, "max_tokens": 500_000});
    let mut running = server.open_chat(&chat("one", "hello", endless));
    running.event().unwrap();

    let wait = |seconds: f64| json!({"lora_name": "one", "mode": "wait", "timeout_s": seconds});
    let response = server.post(UNLOAD, &wait(0.05));
    assert_eq!(refusal(&response).0, 504, "{response:?}");
    // The name is gone at once; the request goes on.
    assert_eq!(server.post(UNLOAD, &wait(0.05)).status, 404);
    for _ in 0..5 {
        let chunk: Value = serde_json::from_str(&running.event().unwrap()).unwrap();
        assert_eq!(chunk["model"], "one");
    }
    assert_eq!(load(&server, "one", &path, false).status, 200);
    drop(running);
    assert_eq!(server.post(UNLOAD, &wait(30.0)).status, 200);
}

fn truncate(file: &Path) {
    let bytes = fs::read(file).unwrap();
    fs::write(file, &bytes[..bytes.len() / 2]).unwrap();
}

fn set(adapter: &Path, field: &str, value: Value) {
    edit_json(&adapter.join("adapter_config.json"), |config| config[field] = value);
}

fn pickle(adapter: &Path) {
    let safe = adapter.join("adapter_model.safetensors");
    fs::rename(safe, adapter.join("adapter_model.bin")).unwrap();
}

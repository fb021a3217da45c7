//! How `tunesmith serve` is configured, and what it says when it cannot start.

use std::fs;

use crate::common::{Server, TempDir, copy_dir, edit_json, fixture, server::command};
use serde_json::{Value, json};

fn base_id(server: &Server) -> Value {
    server.get("/v1/models").json()["data"][0]["id"].clone()
}

#[test]
fn flags_win_over_environment_over_file_over_defaults() {
    let dir = TempDir::new();
    let file = dir.join("serve.yaml");
    fs::write(&file, "served-model-name: file\nmax-model-len: 100\napi-key: [k-file]\n").unwrap();
    let base = |server: &Server| server.get("/v1/models").json()["data"][0].clone();

    let start = |environment: bool, args: &[&str]| {
        let mut command = command(&fixture("tiny-llama"), args);
        command.arg("--config").arg(&file);
        if environment {
            command.env("TUNESMITH_SERVED_MODEL_NAME", "environment");
            command.env("TUNESMITH_MAX_MODEL_LEN", "200");
        }
        base(&Server::from_command(command).with_key("k-file"))
    };
    let of_file = start(false, &[]);
    assert_eq!((&of_file["id"], &of_file["max_model_len"]), (&json!("file"), &json!(100)));
    let of_environment = start(true, &[]);
    assert_eq!(of_environment["id"], "environment");
    assert_eq!(of_environment["max_model_len"], 200);
    let of_flags = start(true, &["--served-model-name", "flag"]);
    assert_eq!((&of_flags["id"], &of_flags["max_model_len"]), (&json!("flag"), &json!(200)));
    assert_eq!(base_id(&Server::start(&fixture("tiny-llama"), &[])), "tiny-llama");
}

#[test]
fn a_server_that_cannot_start_names_the_flag_or_the_file() {
    let dir = TempDir::new();
    let broken = |name: &str, damage: &dyn Fn(&std::path::Path)| {
        let model = dir.join(name);
        copy_dir(&fixture("tiny-llama"), &model);
        damage(&model);
        model
    };
    let yaml = dir.join("bad.yaml");
    fs::write(&yaml, "max-queu: 3\n").unwrap();
    let config = ["--config", yaml.to_str().unwrap()];
    let good = fixture("tiny-llama");
    let write = |file: &'static str, text: &'static str| {
        move |model: &std::path::Path| fs::write(model.join(file), text).unwrap()
    };
    let template = |model: &std::path::Path| {
        edit_json(&model.join("tokenizer_config.json"), |config| {
            config["chat_template"] = json!("{% for %}");
        });
    };
    let truncated = |model: &std::path::Path| {
        let weights = model.join("model.safetensors");
        let bytes = fs::read(&weights).unwrap();
        fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    };
    let cases: Vec<(std::path::PathBuf, &[&str], &str)> = vec![
        (dir.join("missing"), &[], "missing"),
        (broken("config", &write("config.json", "{")), &[], "config.json"),
        (broken("tokenizer", &write("tokenizer.json", "{}")), &[], "tokenizer.json"),
        (broken("template", &template), &[], "tokenizer_config.json"),
        (broken("weights", &truncated), &[], "model.safetensors"),
        (good.clone(), &["--adapter", "a=/no/such/adapter"], "/no/such/adapter"),
        (good.clone(), &["--adapter", "a"], "NAME=DIR"),
        (good.clone(), &["--adapter-dir", "/no/such/dir"], "/no/such/dir"),
        (good.clone(), &["--host", "0.0.0.0"], "--insecure-no-auth"),
        (good.clone(), &["--kv-cache-memory", "lots"], "--kv-cache-memory"),
        (good.clone(), &["--max-model-len", "513"], "--max-model-len"),
        (good.clone(), &["--api-key-file", "/no/such/keys"], "/no/such/keys"),
        (good.clone(), &config, "max-queu"),
    ];
    for (model, args, word) in cases {
        let output = command(&model, args).output().unwrap();
        let log = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {log}");
        assert!(log.contains("error: ") && log.contains(word), "{model:?} {args:?}: {log}");
        assert!(!log.contains("panicked"), "{log}");
    }
}

#[test]
fn keys_never_reach_the_log() {
    let server = Server::start(&fixture("tiny-llama"), &["--api-key", "sk-secret"]);
    server.terminate();
    let (_, log) = server.wait();
    assert!(log.contains("configuration: ") && !log.contains("sk-secret"), "{log}");
}

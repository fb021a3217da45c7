//! Tools: rows that call them are trained, and what the tuned model writes reaches the client as calls.
#![allow(clippy::needless_pass_by_value, reason = "`json!` makes values")]

use std::{fs, path::Path, process::Command};

use crate::common::{Server, TempDir, copy_dir, edit_json, fixture};
use serde_json::{Value, json};

/// Tools in the system turn, calls in tags: the form of Hermes and Qwen.
const TEMPLATE: &str = "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool.function.name }} {% endfor %}\
    <tool_call><|im_end|>\n{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n\
    {% if message.content %}{{ message.content }}{% endif %}{% for call in message.tool_calls or [] %}\
    <tool_call>\n{\"name\": \"{{ call.function.name }}\", \"arguments\": {{ call.function.arguments | tojson }}}\n</tool_call>\
    {% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

fn tools() -> Value {
    json!([{"type": "function", "function": {"name": "add", "description": "adds",
        "parameters": {"type": "object", "properties": {}, "required": []}}}])
}

fn call(arguments: &str) -> Value {
    json!([{"id": "call_1", "type": "function", "function": {"name": "add", "arguments": arguments}}])
}

/// A model folder whose template knows tools, and an adapter that has learned two answers by heart.
fn tuned(dir: &Path) -> (std::path::PathBuf, std::path::PathBuf) {
    let model = dir.join("model");
    copy_dir(&fixture("tiny-llama"), &model);
    edit_json(&model.join("tokenizer_config.json"), |c| c["chat_template"] = json!(TEMPLATE));
    let row = |messages: Value| json!({"messages": messages, "tools": tools(), "parallel_tool_calls": false});
    let rows = [
        row(json!([{"role": "user", "content": "add"},
            {"role": "assistant", "tool_calls": call("{\"a\": 12}")}])),
        row(json!([{"role": "user", "content": "say"}, {"role": "assistant", "content": "no"}])),
    ];
    let data = dir.join("rows.jsonl");
    fs::write(&data, rows.map(|row| row.to_string() + "\n").concat()).unwrap();
    let adapter = dir.join("adapter");
    let output = Command::new(env!("CARGO_BIN_EXE_tunesmith"))
        .args([
            "train",
            "--lr",
            "2e-2",
            "--max-steps",
            "120",
            "--rank",
            "16",
            "--schedule",
            "constant",
        ])
        .arg("--model")
        .arg(&model)
        .arg("--data")
        .arg(&data)
        .arg("--output")
        .arg(&adapter)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    (model, adapter)
}

fn ask(content: &str, changes: Value) -> Value {
    let mut body =
        crate::common::chat("tuned", content, json!({"tools": tools(), "max_tokens": 100}));
    for (field, value) in changes.as_object().unwrap() {
        body[field] = value.clone();
    }
    body
}

#[test]
fn what_was_trained_as_a_call_is_answered_as_a_call() {
    let dir = TempDir::new();
    let (model, adapter) = tuned(&dir.0);
    let server = Server::start(&model, &["--adapter", &format!("tuned={}", adapter.display())]);

    let choice = server.chat(&ask("add", json!({})))["choices"][0].clone();
    assert_eq!(choice["finish_reason"], "tool_calls", "{choice}");
    let message = &choice["message"];
    assert!(message["content"].is_null(), "{choice}");
    let calls = message["tool_calls"].as_array().unwrap();
    assert_eq!(calls.len(), 1, "{choice}");
    assert_eq!(calls[0]["type"], "function");
    assert!(calls[0]["id"].as_str().unwrap().starts_with("call_"));
    assert_eq!(calls[0]["function"], json!({"name": "add", "arguments": "{\"a\":12}"}));

    // Streamed, the same call comes in one piece.
    let chunks = server.stream(&ask("add", json!({})));
    let deltas: Vec<&Value> = chunks.iter().map(|chunk| &chunk["choices"][0]).collect();
    let streamed: Vec<&Value> = deltas
        .iter()
        .flat_map(|c| c["delta"]["tool_calls"].as_array().into_iter().flatten())
        .collect();
    assert_eq!(streamed.len(), 1, "{chunks:?}");
    assert_eq!(streamed[0]["index"], 0);
    assert_eq!(streamed[0]["function"], calls[0]["function"]);
    assert_eq!(deltas.last().unwrap()["finish_reason"], "tool_calls");

    // Text is text, and the answer to a call may be sent back.
    let choice = server.chat(&ask("say", json!({})))["choices"][0].clone();
    assert_eq!(
        (&choice["message"]["content"], &choice["finish_reason"]),
        (&json!("no"), &json!("stop"))
    );
    assert!(choice["message"].get("tool_calls").is_none());
    let messages = json!([{"role": "user", "content": "add"},
        {"role": "assistant", "content": null, "tool_calls": calls},
        {"role": "tool", "tool_call_id": calls[0]["id"], "content": "13"}]);
    let answer = server.chat(&ask("", json!({"messages": messages})));
    assert_eq!(answer["object"], "chat.completion");

    // The older words for the same mean the same, as they do in training rows.
    let messages = json!([{"role": "user", "content": "add"},
        {"role": "assistant", "content": null, "function_call": calls[0]["function"]},
        {"role": "function", "name": "add", "content": "13"}]);
    let older = server.chat(&ask("", json!({"messages": messages})));
    assert_eq!(older["choices"][0]["message"], answer["choices"][0]["message"]);
    assert_eq!(older["usage"]["prompt_tokens"], answer["usage"]["prompt_tokens"]);
    let messages = json!([{"role": "function", "content": "13"}]);
    let refused = server.post(crate::common::server::CHAT, &ask("", json!({"messages": messages})));
    assert_eq!(refused.status, 400, "{refused:?}");
    assert_eq!(refused.json()["error"]["param"], "messages[0].name");

    // A client that names no tools gets what the model writes, as it is.
    let untooled = server.chat(&crate::common::chat("tuned", "add", json!({"max_tokens": 100})));
    assert!(untooled["choices"][0]["message"].get("tool_calls").is_none());
}

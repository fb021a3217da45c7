//! Garbage in: the right 4xx in OpenAI's shape, and a server that goes on.

use crate::common::{
    Server, chat, fixture,
    server::{CHAT, JSON},
};
use serde_json::{Value, json};

fn server() -> Server {
    Server::start(&fixture("tiny-llama"), &[])
}

/// The error object, after checking that its shape is OpenAI's.
fn error(response: &crate::common::Response) -> Value {
    let body = response.json();
    let error = body["error"].as_object().unwrap_or_else(|| panic!("{body}"));
    assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{body}");
    assert!(error["type"].is_string(), "{body}");
    assert!(error.contains_key("param") && error.contains_key("code"), "{body}");
    body["error"].clone()
}

#[test]
fn bodies_that_are_no_chat_request_are_refused_and_the_server_goes_on() {
    let server = server();
    let deep = "[".repeat(100_000);
    let valid = chat("tiny-llama", "hi", json!({})).to_string();
    let cases: &[(&str, &[u8], u16)] = &[
        ("empty", b"", 400),
        ("not JSON", b"hello", 400),
        ("half a body", &valid.as_bytes()[..valid.len() / 2], 400),
        ("not UTF-8", b"{\"model\": \"\xff\xfe\"}", 400),
        ("an array", b"[]", 400),
        ("null", b"null", 400),
        ("an infinite number", b"{\"temperature\": 1e999}", 400),
        ("deep nesting", deep.as_bytes(), 400),
        ("an empty object", b"{}", 400),
    ];
    for (name, body, status) in cases {
        let response = server.request("POST", CHAT, &[JSON], body);
        assert_eq!(response.status, *status, "{name}");
        assert_eq!(error(&response)["type"], "invalid_request_error", "{name}");
    }
    let form = [("Content-Type", "text/plain")];
    assert_eq!(server.request("POST", CHAT, &form, valid.as_bytes()).status, 415);
    assert_eq!(server.request("POST", CHAT, &[], valid.as_bytes()).status, 415);
    let charset = [("Content-Type", "application/json; charset=utf-8")];
    assert_eq!(server.request("POST", CHAT, &charset, valid.as_bytes()).status, 200);
}

#[test]
fn a_body_beyond_the_limit_is_a_413() {
    let server = server();
    for megabytes in [9, 100] {
        let body = chat("tiny-llama", &"a".repeat(megabytes << 20), json!({}));
        let response = server.post(CHAT, &body);
        assert_eq!(response.status, 413);
        assert_eq!(error(&response)["code"], "request_too_large");
    }
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn a_client_learns_which_field_is_wrong() {
    let server = server();
    for (changes, param, code) in [
        (json!({"temperature": 3}), json!("temperature"), Value::Null),
        (json!({"temperature": "hot"}), json!("temperature"), Value::Null),
        (json!({"n": 100}), json!("n"), Value::Null),
        (json!({"messages": []}), json!("messages"), Value::Null),
        (json!({"functions": []}), json!("functions"), json!("unsupported_parameter")),
        (json!({"top_logprobs": 2}), json!("top_logprobs"), Value::Null),
        (json!({"max_tokens": 100_000}), json!("messages"), json!("context_length_exceeded")),
    ] {
        let response = server.post(CHAT, &chat("tiny-llama", "hi", changes.clone()));
        assert_eq!(response.status, 400, "{changes}");
        let error = error(&response);
        assert_eq!((&error["param"], &error["code"]), (&param, &code), "{changes}");
    }
}

#[test]
fn a_prompt_beyond_the_context_is_refused_before_and_after_tokenising() {
    let server = server();
    for length in [5_000, 1 << 20] {
        let response =
            server.post(CHAT, &chat("tiny-llama", &"word ".repeat(length / 5), json!({})));
        assert_eq!(response.status, 400);
        assert_eq!(error(&response)["code"], "context_length_exceeded");
    }
}

#[test]
fn unknown_models_routes_and_methods_are_told_apart() {
    let server = server();
    for name in ["nope", "../../etc/passwd", "/etc", "a\0b", "nope@v1", "tiny-llama "] {
        let response = server.post(CHAT, &chat(name, "hi", json!({})));
        assert_eq!(response.status, 404, "{name:?}");
        assert_eq!(error(&response)["code"], "model_not_found", "{name:?}");
    }
    for (method, path, status) in [
        ("GET", "/nope", 404),
        ("POST", "/v1", 404),
        ("GET", "/v1/models/nope", 404),
        ("GET", CHAT, 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
    ] {
        let response = server.request(method, path, &[], b"");
        assert_eq!(response.status, status, "{method} {path}");
        error(&response);
    }
}

#[test]
fn models_are_listed_and_found_by_their_ids() {
    let adapter = fixture("oracle/tiny-llama-plain-adapter");
    let given = format!("team/plain:1={}", adapter.display());
    let server = Server::start(&fixture("tiny-llama"), &["--adapter", &given]);
    let list = server.get("/v1/models").json();
    assert_eq!(list["object"], "list");
    let [base, card] = list["data"].as_array().unwrap().as_slice() else { panic!("{list}") };
    assert_eq!((&base["id"], &base["parent"]), (&json!("tiny-llama"), &Value::Null));
    assert_eq!(base["max_model_len"], 512);
    assert_eq!((&card["id"], &card["parent"]), (&json!("team/plain:1"), &json!("tiny-llama")));
    assert_eq!(card["root"], adapter.canonicalize().unwrap().to_str().unwrap());
    assert!(card["created"].as_u64().unwrap() > 1_700_000_000);
    assert_eq!(server.get("/v1/models/team/plain:1").json(), *card);
    assert_eq!(server.get("/v1/models/team%2Fplain%3A1").json(), *card);
    assert_eq!(server.get("/v1/models/tiny-llama").json(), *base);
}

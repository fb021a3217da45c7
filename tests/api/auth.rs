//! Who may do what, over the whole route table.

use crate::common::{Server, fixture, server::JSON};
use tunesmith::api::ROUTES;

const OPEN: &[&str] = &["/health", "/ping", "/ready", "/metrics"];

fn status(server: &Server, method: &str, path: &str, header: Option<(&str, &str)>) -> u16 {
    let headers: Vec<_> = header.into_iter().chain([JSON]).collect();
    let path: Vec<&str> = path
        .split('/')
        .map(|part| if part.starts_with('{') { "tiny-llama" } else { part })
        .collect();
    let response = server.request(method, &path.join("/"), &headers, b"{}");
    if response.status == 401 {
        assert_eq!(response.header("www-authenticate"), Some("Bearer"));
        assert_eq!(response.json()["error"]["code"], "invalid_api_key");
    }
    response.status
}

#[test]
fn without_a_key_only_probes_and_metrics_answer() {
    let server = Server::start(&fixture("tiny-llama"), &["--api-key", "sk-one,sk-two"]);
    for (method, path) in ROUTES {
        for wrong in [None, Some(("Authorization", "Bearer sk-three")), Some(("api-key", "x"))] {
            let denied = status(&server, method, path, wrong) == 401;
            assert_eq!(denied, !OPEN.contains(path), "{method} {path} {wrong:?}");
        }
        for right in [("Authorization", "Bearer sk-one"), ("api-key", "sk-two")] {
            assert_ne!(status(&server, method, path, Some(right)), 401, "{method} {path}");
        }
    }
    // Nobody learns without a key which routes exist.
    for (method, path) in [("GET", "/nope"), ("DELETE", "/v1/models"), ("GET", "/health/x")] {
        assert_eq!(status(&server, method, path, None), 401, "{method} {path}");
    }
}

/// What a key may do where there are admin keys; everything else needs one of these.
const FOR_USERS: &[(&str, &str)] = &[
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{id}"),
    ("GET", "/v1/fine_tuning/jobs"),
    ("GET", "/v1/fine_tuning/jobs/{id}"),
    ("GET", "/v1/fine_tuning/jobs/{id}/events"),
    ("GET", "/v1/fine_tuning/jobs/{id}/checkpoints"),
    ("GET", "/v1/fine_tuning/checkpoints/{id}/permissions"),
];

#[test]
fn where_there_are_admin_keys_the_others_ask_and_look_and_change_nothing() {
    let dir = crate::common::TempDir::new();
    let data = dir.0.to_str().unwrap();
    let args = ["--api-key", "user", "--admin-key", "root", "--data-dir", data];
    let server = Server::start(&fixture("tiny-llama"), &args);
    for (method, path) in ROUTES {
        let for_users = OPEN.contains(path) || FOR_USERS.contains(&(*method, *path));
        let user = status(&server, method, path, Some(("api-key", "user")));
        assert_eq!(user == 403, !for_users, "{method} {path}: {user}");
        let root = status(&server, method, path, Some(("api-key", "root")));
        let is_base = (*method, *path) == ("DELETE", "/v1/models/{id}");
        assert_eq!(root == 403, is_base, "{method} {path}: {root}");
        // Azure's form of a path is that path.
        if let Some(rest) = path.strip_prefix("/v1/") {
            for form in ["/openai/", "/openai/v1/"] {
                let path = format!("{form}{rest}");
                let user = status(&server, method, &path, Some(("api-key", "user")));
                assert_eq!(user == 403, !for_users, "{method} {path}: {user}");
            }
        }
    }
}

#[test]
fn keys_come_from_a_file_as_well() {
    let dir = crate::common::TempDir::new();
    let file = dir.join("keys");
    std::fs::write(&file, "\nsk-file\n  sk-other  \n").unwrap();
    let args = ["--api-key-file", file.to_str().unwrap()];
    let server = Server::start(&fixture("tiny-llama"), &args);
    assert_eq!(status(&server, "GET", "/v1/models", None), 401);
    for key in ["sk-file", "sk-other"] {
        assert_eq!(status(&server, "GET", "/v1/models", Some(("api-key", key))), 200);
    }
}

#[test]
fn a_server_without_keys_is_closed_to_web_pages_that_point_their_name_at_it() {
    let server = Server::start(&fixture("tiny-llama"), &[]);
    let status = |host: &str| {
        use std::io::{Read, Write};
        let mut stream = std::net::TcpStream::connect(&server.address).unwrap();
        let request =
            format!("GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.split(' ').nth(1).unwrap().parse::<u16>().unwrap()
    };
    assert_eq!(status("evil.example:8000"), 403);
    assert_eq!(status("localhost:8000"), 200);
    assert_eq!(status("127.0.0.1"), 200);
}

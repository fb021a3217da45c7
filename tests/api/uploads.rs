//! Uploads in parts: a file is made of all of them in their order, or not at all.
#![allow(clippy::needless_pass_by_value, reason = "`json!` makes values")]

use std::{fs, path::Path};

use crate::common::{
    Response, Server, TempDir, fixture,
    form::{FORM, field, file, form},
    server::JSON,
};
use serde_json::{Value, json};

fn start(dir: &TempDir, more: &[&str]) -> Server {
    let data = dir.join("data");
    let args = [&["--data-dir", data.to_str().unwrap(), "--kv-cache-memory", "16MiB"], more];
    Server::start(&fixture("tiny-llama"), &args.concat())
}

fn create(server: &Server, changes: Value) -> Response {
    let mut body = json!({
        "bytes": 11, "filename": "a/t.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune",
    });
    for (field, value) in changes.as_object().unwrap() {
        body[field] = value.clone();
    }
    server.post("/v1/uploads", &body)
}

fn id(response: &Response) -> String {
    assert_eq!(response.status, 200, "{response:?}");
    response.json()["id"].as_str().unwrap().to_owned()
}

fn add(server: &Server, upload: &str, content: &[u8]) -> Response {
    let path = format!("/v1/uploads/{upload}/parts");
    server.request("POST", &path, &[FORM], &form(&[file("data", "upload", content)]))
}

fn complete(server: &Server, upload: &str, body: &Value) -> Response {
    server.post(&format!("/v1/uploads/{upload}/complete"), body)
}

fn cancel(server: &Server, upload: &str) -> Response {
    server.request("POST", &format!("/v1/uploads/{upload}/cancel"), &[JSON], b"")
}

fn num_contents(dir: &TempDir) -> usize {
    let count = |path: &Path| fs::read_dir(path).unwrap().count();
    count(&dir.join("data/blobs")) + count(&dir.join("data/staging"))
}

#[test]
fn parts_become_a_file_in_the_order_that_is_asked_for() {
    let dir = TempDir::new();
    let server = start(&dir, &[]);
    let upload =
        create(&server, json!({"expires_after": {"anchor": "created_at", "seconds": 3600}}));
    let object = upload.json();
    assert_eq!((&object["object"], &object["status"]), (&json!("upload"), &json!("pending")));
    assert_eq!((&object["bytes"], &object["file"]), (&json!(11), &Value::Null));
    let lifetime = object["expires_at"].as_u64().unwrap() - object["created_at"].as_u64().unwrap();
    assert_eq!(lifetime, 3600);
    let upload = id(&upload);
    let second = add(&server, &upload, b"world");
    assert_eq!(second.json()["object"], "upload.part");
    assert_eq!(second.json()["upload_id"], *upload);
    let first = add(&server, &upload, b"hello ");
    add(&server, &upload, b"never used");
    drop(server); // kill -9
    let server = start(&dir, &[]);
    let body = json!({
        "part_ids": [id(&first), id(&second)], "md5": "5eb63bbbe01eeed093cb22bb8f5acdc3",
    });
    let completed = complete(&server, &upload, &body).json();
    assert_eq!((&completed["status"], &completed["id"]), (&json!("completed"), &json!(upload)));
    let file = &completed["file"];
    assert_eq!((&file["object"], &file["bytes"]), (&json!("file"), &json!(11)));
    assert_eq!((&file["filename"], &file["purpose"]), (&json!("t.jsonl"), &json!("fine-tune")));
    assert!(file["expires_at"].as_u64().is_some());
    let path = format!("/v1/files/{}", file["id"].as_str().unwrap());
    assert_eq!(server.get(&path).json(), *file);
    assert_eq!(server.get(&format!("{path}/content")).body, b"hello world");
    assert_eq!(num_contents(&dir), 1, "the parts are gone");
}

#[test]
fn what_does_not_fit_together_is_refused_and_may_be_mended() {
    let dir = TempDir::new();
    let server = start(&dir, &[]);
    let upload = id(&create(&server, json!({})));
    let (hello, world) =
        (id(&add(&server, &upload, b"hello ")), id(&add(&server, &upload, b"world")));
    let other = id(&create(&server, json!({})));
    let foreign = id(&add(&server, &other, b"hello world"));
    for (name, body, param) in [
        ("no parts", json!({}), "part_ids"),
        ("an empty list", json!({"part_ids": []}), "part_ids"),
        ("no list", json!({"part_ids": "part_1"}), "part_ids"),
        ("an unknown part", json!({"part_ids": ["part_1", hello]}), "part_ids"),
        ("a part of another upload", json!({"part_ids": [foreign]}), "part_ids"),
        ("too few bytes", json!({"part_ids": [hello]}), "part_ids"),
        ("a part twice", json!({"part_ids": [hello, hello]}), "part_ids"),
        ("another md5", json!({"part_ids": [hello, world], "md5": "00"}), "md5"),
    ] {
        let refused = complete(&server, &upload, &body);
        assert_eq!(refused.status, 400, "{name}: {refused:?}");
        assert_eq!(refused.json()["error"]["param"], param, "{name}");
    }
    let body = json!({"part_ids": [hello, world]});
    assert_eq!(complete(&server, &upload, &body).status, 200);
    // It has ended.
    for response in [
        complete(&server, &upload, &body),
        add(&server, &upload, b"more"),
        cancel(&server, &upload),
    ] {
        assert_eq!(response.status, 400);
        let message = response.json()["error"]["message"].to_string();
        assert!(message.contains("is completed"), "{message}");
    }
    for response in [
        complete(&server, "upload_nope", &body),
        add(&server, "upload_nope", b"more"),
        cancel(&server, "upload_nope"),
    ] {
        assert_eq!(
            (response.status, &response.json()["error"]["param"]),
            (404, &json!("upload_id"))
        );
    }
}

#[test]
fn bad_announcements_and_parts_are_refused_by_field() {
    let dir = TempDir::new();
    let server = start(&dir, &["--file-quota", "100MiB"]);
    for (changes, param) in [
        (json!({"bytes": null}), "bytes"),
        (json!({"bytes": 0}), "bytes"),
        (json!({"bytes": -1}), "bytes"),
        (json!({"bytes": "11"}), "bytes"),
        (json!({"bytes": 101 << 20}), "bytes"),
        (json!({"filename": null}), "filename"),
        (json!({"mime_type": null}), "mime_type"),
        (json!({"purpose": null}), "purpose"),
        (json!({"purpose": "fine-tune-results"}), "purpose"),
        (json!({"expires_after": {"anchor": "x", "seconds": 3600}}), "expires_after[anchor]"),
        (
            json!({"expires_after": {"anchor": "created_at", "seconds": 1}}),
            "expires_after[seconds]",
        ),
        (json!({"expires_after": 1}), "expires_after"),
    ] {
        let refused = create(&server, changes.clone());
        assert_eq!(refused.status, 400, "{changes}: {refused:?}");
        assert_eq!(refused.json()["error"]["param"], param, "{changes}");
    }
    let upload = id(&create(&server, json!({})));
    let path = format!("/v1/uploads/{upload}/parts");
    assert_eq!(add(&server, &upload, b"").status, 400);
    assert_eq!(server.request("POST", &path, &[FORM], &form(&[])).status, 400);
    assert_eq!(server.request("POST", &path, &[FORM], &form(&[field("x", "y")])).status, 400);
    assert_eq!(server.request("POST", &path, &[JSON], b"{}").status, 415);
    assert_eq!(add(&server, &upload, &vec![0; (64 << 20) + 1]).status, 413);
    assert_eq!(add(&server, &upload, &vec![0; 64 << 20]).status, 200);
    assert_eq!(add(&server, &upload, &vec![1; 64 << 20]).status, 507, "beyond the quota");
    assert_eq!(cancel(&server, &upload).json()["status"], "cancelled");
    assert_eq!(num_contents(&dir), 0);
    assert_eq!(add(&server, &upload, b"more").status, 400);
}

#[test]
fn an_upload_that_nobody_completes_expires() {
    let dir = TempDir::new();
    let server = start(&dir, &[]);
    let upload = id(&create(&server, json!({})));
    let part = id(&add(&server, &upload, b"hello world"));
    drop(server);
    let sql = "UPDATE records SET body = json_set(body, '$.expires_at', 1700000000) WHERE kind = 'upload'";
    let database = dir.join("data/tunesmith.db");
    rusqlite::Connection::open(database).unwrap().execute(sql, []).unwrap();
    let server = start(&dir, &[]);
    let refused = complete(&server, &upload, &json!({"part_ids": [part]}));
    assert_eq!(refused.status, 400);
    assert!(refused.text().contains("has expired"), "{refused:?}");
    server.wait_until("the part is gone", |_| num_contents(&dir) == 0);
}

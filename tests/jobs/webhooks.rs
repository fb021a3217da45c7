//! Webhooks: signed as the standard says, tried again, not forgotten over a restart.

use std::{path::Path, sync::mpsc, thread, time::Duration};

use crate::common::{Server, TempDir, fake::Fake, fixture, server::command};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit, Mac};
use serde_json::{Value, json};

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

fn start(data: &Path, webhooks: &[String]) -> Server {
    let mut args = vec!["--data-dir", data.to_str().unwrap(), "--kv-cache-memory", "16MiB"];
    for webhook in webhooks {
        args.extend(["--webhook", webhook]);
    }
    Server::start(&fixture("tiny-llama"), &args)
}

/// What the end of a job leaves for the worker.
fn enqueue(data: &Path, url: &str, event: &str) {
    let delivery = json!({
        "id": format!("whd_{event}"), "event_id": "evt_1", "url": url,
        "event": format!("fine_tuning.job.{event}"), "job_id": "ftjob-1",
        "created_at": 1_700_000_000, "attempts": 0, "next_at": 0,
    });
    let database = rusqlite::Connection::open(data.join("tunesmith.db")).unwrap();
    let sql = "INSERT INTO records (kind, id, parent, body) VALUES ('delivery', ?, '', ?)";
    database.execute(sql, [&format!("whd_{event}"), &delivery.to_string()]).unwrap();
}

fn pending(data: &Path) -> u32 {
    let database = rusqlite::Connection::open(data.join("tunesmith.db")).unwrap();
    let sql = "SELECT count(*) FROM records WHERE kind = 'delivery'";
    database.query_row(sql, [], |row| row.get(0)).unwrap()
}

fn signature(id: &str, timestamp: &str, body: &str) -> String {
    let key = STANDARD.decode(&SECRET["whsec_".len()..]).unwrap();
    let mut mac = Hmac::<sha2::Sha256>::new_from_slice(&key).unwrap();
    mac.update(format!("{id}.{timestamp}.{body}").as_bytes());
    format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()))
}

#[test]
fn what_was_due_before_a_restart_is_delivered_signed() {
    let dir = TempDir::new();
    let fake = Fake::start(|_, _| (204, String::new()));
    let url = format!("{}/hook?a=b", fake.url);
    drop(start(&dir.0, &[]));
    enqueue(&dir.0, &url, "succeeded");
    let server = start(&dir.0, &[format!("{url}={SECRET}")]);
    server.wait_until("the delivery is done", |_| pending(&dir.0) == 0);
    let [asked] = fake.asked().try_into().unwrap();
    assert_eq!(asked.line, "POST /hook?a=b HTTP/1.1");
    assert_eq!(asked.header("content-type"), "application/json");
    let body: Value = serde_json::from_str(&asked.body).unwrap();
    assert_eq!(
        body,
        json!({
            "id": "evt_1", "object": "event", "created_at": 1_700_000_000,
            "type": "fine_tuning.job.succeeded", "data": {"id": "ftjob-1"},
        })
    );
    assert_eq!(asked.header("webhook-id"), "evt_1");
    let timestamp = asked.header("webhook-timestamp");
    assert!(timestamp.parse::<u64>().unwrap() > 1_700_000_000);
    assert_eq!(asked.header("webhook-signature"), signature("evt_1", timestamp, &asked.body));
}

#[test]
fn a_receiver_that_fails_is_tried_again_and_redirects_are_not_followed() {
    let dir = TempDir::new();
    let fake = Fake::start(|_, number| ([500, 302, 200][number.min(2)], String::new()));
    let url = format!("{}/hook", fake.url);
    drop(start(&dir.0, &[]));
    enqueue(&dir.0, &url, "failed");
    let server = start(&dir.0, std::slice::from_ref(&url));
    server.wait_until("the first attempt failed", |_| fake.asked().len() == 1);
    drop(server); // kill -9 between the attempts
    let server = start(&dir.0, std::slice::from_ref(&url));
    server.wait_until("the delivery is done", |_| pending(&dir.0) == 0);
    let asked = fake.asked();
    assert_eq!(asked.len(), 3);
    for asked in &asked {
        assert_eq!(asked.line, "POST /hook HTTP/1.1");
        assert_eq!(asked.header("webhook-id"), "evt_1");
        assert_eq!(asked.header("webhook-signature"), "", "there is no secret");
    }
}

#[test]
fn a_receiver_that_is_gone_keeps_nobody_waiting() {
    let dir = TempDir::new();
    let fake = Fake::start(|_, _| (200, String::new()));
    drop(start(&dir.0, &[]));
    enqueue(&dir.0, "http://127.0.0.1:1/nobody", "failed");
    enqueue(&dir.0, "http://no-longer-named.invalid/", "cancelled");
    enqueue(&dir.0, &fake.url, "succeeded");
    let server = start(&dir.0, &["http://127.0.0.1:1/nobody".to_owned(), fake.url.clone()]);
    server.wait_until("the others are done", |_| pending(&dir.0) == 1);
    assert_eq!(fake.asked().len(), 1);
    thread::sleep(Duration::from_millis(100));
    server.terminate();
    assert!(server.wait().0.success());
}

#[test]
fn a_receiver_that_does_not_answer_delays_no_other() {
    let dir = TempDir::new();
    let (release, held) = mpsc::channel::<()>();
    let slow = Fake::start(move |_, _| {
        // Answers when the test is over.
        let _ = held.recv();
        (200, String::new())
    });
    let fast = Fake::start(|_, _| (200, String::new()));
    drop(start(&dir.0, &[]));
    enqueue(&dir.0, &slow.url, "cancelled");
    enqueue(&dir.0, &slow.url, "failed");
    enqueue(&dir.0, &fast.url, "succeeded");
    let server = start(&dir.0, &[slow.url.clone(), fast.url.clone()]);
    server.wait_until("the fast one has been told", |_| pending(&dir.0) == 2);
    server.wait_until("the slow one has been asked", |_| !slow.asked().is_empty());
    assert_eq!((fast.asked().len(), slow.asked().len()), (1, 1));
    drop(release);
    server.wait_until("the slow one has been told", |_| pending(&dir.0) == 0);
}

#[test]
fn a_receiver_that_is_named_twice_is_refused_at_the_start() {
    let dir = TempDir::new();
    let webhook = "http://localhost/hook";
    let args = ["--data-dir", dir.0.to_str().unwrap(), "--webhook", webhook, "--webhook", webhook];
    let output = command(&fixture("tiny-llama"), &args).output().unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("http://localhost/hook is named twice"), "{said}");
}

#[test]
fn a_secret_that_signs_nothing_is_refused_at_the_start() {
    let dir = TempDir::new();
    let webhook = "http://localhost/hook=whsec_%%%";
    let args = ["--data-dir", dir.0.to_str().unwrap(), "--webhook", webhook];
    let output = command(&fixture("tiny-llama"), &args).output().unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("whsec_") && !said.contains("%%%"), "{said}");
}

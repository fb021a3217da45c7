//! Files: what is acknowledged is there, whole, and nothing else is.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

use crate::common::{
    Server, TempDir, fixture,
    form::{FORM, field, file, form, part, try_upload, upload},
    server::command,
};
use serde_json::{Value, json};

const ROWS: &[u8] = b"{\"messages\": []}\n";

fn start(dir: &TempDir) -> Server {
    start_with(&dir.join("data"), &[])
}

fn start_with(data: &Path, more: &[&str]) -> Server {
    let data = data.to_str().unwrap();
    let args = [&["--data-dir", data, "--kv-cache-memory", "16MiB"], more].concat();
    Server::start(&fixture("tiny-llama"), &args)
}

/// How many contents the data folder has: whole ones, and arriving ones.
fn contents(data: &Path) -> (usize, usize) {
    let count = |name| fs::read_dir(data.join(name)).unwrap().count();
    (count("blobs"), count("staging"))
}

fn delete(server: &Server, id: &str) -> crate::common::Response {
    // As OpenAI's client does: a JSON type, and nothing in it.
    server.request("DELETE", &format!("/v1/files/{id}"), &[crate::common::server::JSON], b"")
}

fn ids(page: &Value) -> Vec<String> {
    let data = page["data"].as_array().unwrap();
    data.iter().map(|file| file["id"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_file_is_what_was_uploaded_also_after_a_restart() {
    let dir = TempDir::new();
    let server = start(&dir);
    let content: Vec<u8> =
        (0..3_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let object = upload(&server, "fine-tune", "train.jsonl", &content);
    let id = object["id"].as_str().unwrap().to_owned();
    assert!(id.starts_with("file-"));
    assert_eq!(object["object"], "file");
    assert_eq!(object["bytes"], content.len());
    assert_eq!(object["filename"], "train.jsonl");
    assert_eq!(object["purpose"], "fine-tune");
    assert_eq!(object["status"], "processed");
    assert_eq!((&object["status_details"], &object["expires_at"]), (&Value::Null, &Value::Null));
    let path = format!("/v1/files/{id}");
    assert_eq!(server.get(&path).json(), object);
    drop(server); // kill -9
    let server = start(&dir);
    assert_eq!(server.get(&path).json(), object);
    let download = server.get(&format!("{path}/content"));
    assert_eq!(download.body, content);
    assert_eq!(download.header("content-length"), Some("3000000"));
    assert_eq!(delete(&server, &id).json(), json!({"id": id, "object": "file", "deleted": true}));
    for path in [path.clone(), format!("{path}/content")] {
        let gone = server.get(&path);
        assert_eq!(gone.status, 404);
        assert_eq!(gone.json()["error"]["message"], format!("No such File object: {id}"));
        assert_eq!(gone.json()["error"]["param"], "id");
    }
    assert_eq!(delete(&server, &id).status, 404);
    assert_eq!(contents(&dir.join("data")), (0, 0));
}

#[test]
fn the_parts_of_a_form_come_in_any_order() {
    let dir = TempDir::new();
    let server = start(&dir);
    let parts = [
        file("file", "a.jsonl", ROWS),
        field("expires_after[anchor]", "created_at"),
        field("purpose", "evals"),
        field("expires_after[seconds]", "3600"),
    ];
    for turn in 0..parts.len() {
        let mut parts = parts.clone();
        parts.rotate_left(turn);
        let object = server.request("POST", "/v1/files", &[FORM], &form(&parts)).json();
        assert_eq!(object["purpose"], "evals", "{object}");
        let lifetime =
            object["expires_at"].as_u64().unwrap() - object["created_at"].as_u64().unwrap();
        assert_eq!(lifetime, 3600);
    }
    // One content, however often it came.
    assert_eq!(contents(&dir.join("data")), (1, 0));
}

#[test]
fn a_content_goes_with_its_last_file() {
    let dir = TempDir::new();
    let server = start(&dir);
    let first = upload(&server, "fine-tune", "a", ROWS);
    let second = upload(&server, "evals", "b", ROWS);
    upload(&server, "evals", "c", b"other");
    assert_eq!(contents(&dir.join("data")), (2, 0));
    assert_eq!(delete(&server, first["id"].as_str().unwrap()).status, 200);
    let path = format!("/v1/files/{}/content", second["id"].as_str().unwrap());
    assert_eq!(server.get(&path).body, ROWS);
    assert_eq!(delete(&server, second["id"].as_str().unwrap()).status, 200);
    assert_eq!(contents(&dir.join("data")), (1, 0));
}

#[test]
fn a_walk_through_the_pages_ends_and_sees_each_file_once() {
    let dir = TempDir::new();
    let server = start(&dir);
    let mut made = Vec::new();
    for number in 0..7 {
        let purpose = if number % 3 == 0 { "evals" } else { "fine-tune" };
        let object = upload(&server, purpose, "a", format!("{number}").as_bytes());
        made.push(object["id"].as_str().unwrap().to_owned());
    }
    let walk = |query: &str, delete_too: bool| {
        let (mut seen, mut after) = (Vec::new(), String::new());
        for _ in 0..20 {
            let page = server.get(&format!("/v1/files?{query}{after}")).json();
            let found = ids(&page);
            assert_eq!(page["first_id"].as_str(), found.first().map(String::as_str));
            assert_eq!(page["last_id"].as_str(), found.last().map(String::as_str));
            if delete_too {
                found.iter().for_each(|id| assert_eq!(delete(&server, id).status, 200));
            }
            seen.extend(found);
            if page["has_more"] == false {
                return seen;
            }
            after = format!("&after={}", seen.last().unwrap());
        }
        panic!("{query} never ends: {seen:?}");
    };
    let reversed: Vec<String> = made.iter().rev().cloned().collect();
    assert_eq!(walk("", false), reversed);
    for limit in [1, 2, 6, 7, 8] {
        assert_eq!(walk(&format!("limit={limit}"), false), reversed, "{limit}");
        assert_eq!(walk(&format!("order=asc&limit={limit}"), false), made, "{limit}");
    }
    let evals: Vec<String> = made.iter().step_by(3).cloned().collect();
    assert_eq!(walk("purpose=evals&order=asc&limit=1", false), evals);
    assert_eq!(walk("purpose=batch", false), Vec::<String>::new());
    let unknown = server.get("/v1/files?after=file-nope").json();
    assert_eq!((ids(&unknown).len(), &unknown["has_more"]), (0, &json!(false)));
    assert_eq!(walk("limit=2", true), reversed);
    assert_eq!(walk("", false), Vec::<String>::new());
}

#[test]
fn names_are_data_and_never_paths_or_headers() {
    let dir = TempDir::new();
    let server = start(&dir);
    for (sent, kept) in [
        ("../../../tmp/evil.jsonl", "evil.jsonl"),
        ("/etc/passwd", "passwd"),
        ("C:\\\\x\\\\y.jsonl", "y.jsonl"),
        ("grün 😀.jsonl", "grün 😀.jsonl"),
        ("..", "file"),
        ("a;b=%22c'.jsonl", "a;b=%22c'.jsonl"),
    ] {
        let object = upload(&server, "fine-tune", sent, ROWS);
        assert_eq!(object["filename"], kept, "{sent}");
        let id = object["id"].as_str().unwrap();
        let download = server.get(&format!("/v1/files/{id}/content"));
        let disposition = download.header("content-disposition").unwrap().to_owned();
        assert!(disposition.is_ascii() && disposition.starts_with("attachment; "), "{disposition}");
        assert_eq!(disposition.matches('"').count(), 2, "{disposition}");
    }
    for id in ["..%2F..%2Ftunesmith.db", "%2Fetc%2Fpasswd", "a%00b", "file-%ff", "%2e%2e"] {
        for path in [format!("/v1/files/{id}"), format!("/v1/files/{id}/content")] {
            let status = server.get(&path).status;
            assert!([400, 404].contains(&status), "{path}: {status}");
        }
        assert!([400, 404].contains(&delete(&server, id).status), "{id}");
    }
}

#[test]
fn bad_requests_are_told_apart_and_nothing_of_them_stays() {
    let dir = TempDir::new();
    let server = start(&dir);
    let purpose = || field("purpose", "fine-tune");
    let rows = || file("file", "a.jsonl", ROWS);
    let anchor = || field("expires_after[anchor]", "created_at");
    let seconds = |text| field("expires_after[seconds]", text);
    let cases: Vec<(&str, Vec<Vec<u8>>, &str)> = vec![
        ("no purpose", vec![rows()], "purpose"),
        ("no file", vec![purpose()], "file"),
        ("an unknown purpose", vec![field("purpose", "training"), rows()], "purpose"),
        ("a purpose of results", vec![field("purpose", "fine-tune-results"), rows()], "purpose"),
        ("an empty purpose", vec![field("purpose", ""), rows()], "purpose"),
        ("a purpose twice", vec![purpose(), rows(), purpose()], "purpose"),
        ("a long purpose", vec![field("purpose", &"x".repeat(5000)), rows()], "purpose"),
        (
            "a purpose that is no text",
            vec![part("name=\"purpose\"", b"\xff\xfe"), rows()],
            "purpose",
        ),
        ("an empty file", vec![purpose(), file("file", "a", b"")], "file"),
        ("two files", vec![purpose(), rows(), rows()], "file"),
        ("a file without a name", vec![purpose(), field("file", "text")], "file"),
        ("an unknown field", vec![purpose(), rows(), field("model", "x")], "model"),
        ("no anchor", vec![purpose(), rows(), seconds("3600")], "expires_after[anchor]"),
        ("no seconds", vec![purpose(), rows(), anchor()], "expires_after[seconds]"),
        (
            "another anchor",
            vec![purpose(), field("expires_after[anchor]", "now"), seconds("3600"), rows()],
            "expires_after[anchor]",
        ),
        (
            "too few seconds",
            vec![purpose(), anchor(), seconds("3599"), rows()],
            "expires_after[seconds]",
        ),
        (
            "too many",
            vec![purpose(), anchor(), seconds("2592001"), rows()],
            "expires_after[seconds]",
        ),
        ("no number", vec![purpose(), anchor(), seconds("1h"), rows()], "expires_after[seconds]"),
        (
            "a negative number",
            vec![purpose(), anchor(), seconds("-1"), rows()],
            "expires_after[seconds]",
        ),
    ];
    for (name, parts, param) in cases {
        let response = server.request("POST", "/v1/files", &[FORM], &form(&parts));
        assert_eq!(response.status, 400, "{name}: {response:?}");
        let error = &response.json()["error"];
        assert_eq!(
            (&error["type"], &error["param"]),
            (&json!("invalid_request_error"), &json!(param)),
            "{name}"
        );
    }
    let whole = form(&[purpose(), rows()]);
    let broken: Vec<(&str, &[u8], &str, u16)> = vec![
        ("cut in the file", &whole[..whole.len() - 60], FORM.1, 400),
        ("cut before the end", &whole[..whole.len() - 4], FORM.1, 400),
        ("empty", b"", FORM.1, 400),
        ("no form at all", b"hello", FORM.1, 400),
        ("another boundary", &whole, "multipart/form-data; boundary=x", 400),
        ("no boundary", &whole, "multipart/form-data", 415),
        ("JSON", b"{}", "application/json", 415),
        ("a plain form", b"purpose=fine-tune", "application/x-www-form-urlencoded", 415),
    ];
    for (name, body, kind, status) in broken {
        let response = server.request("POST", "/v1/files", &[("Content-Type", kind)], body);
        assert_eq!(response.status, status, "{name}: {response:?}");
        assert_eq!(response.json()["error"]["type"], "invalid_request_error", "{name}");
    }
    let endless =
        [part("x", b"").as_slice(), &b"--x\r\n".repeat(10), &vec![b'a'; 4 << 20]].concat();
    let headers = [&b"------tunesmith-test\r\nX: "[..], &vec![b'a'; 8 << 20]].concat();
    for body in [endless, headers] {
        assert_eq!(server.request("POST", "/v1/files", &[FORM], &body).status, 400);
    }
    for query in ["limit=0", "limit=10001", "limit=x", "order=up"] {
        let response = server.get(&format!("/v1/files?{query}"));
        assert_eq!(response.status, 400, "{query}");
        assert_eq!(response.json()["error"]["param"], query.split('=').next().unwrap());
    }
    let page = [("Origin", "https://evil.example"), FORM];
    assert_eq!(server.request("POST", "/v1/files", &page, &whole).status, 403);
    assert_eq!(ids(&server.get("/v1/files").json()), Vec::<String>::new());
    assert_eq!(contents(&dir.join("data")), (0, 0));
    assert_eq!(server.request("POST", "/v1/files", &[FORM], &whole).status, 200);
}

#[test]
fn the_quota_refuses_what_does_not_fit_and_takes_it_once_there_is_room() {
    let dir = TempDir::new();
    let server = start_with(&dir.join("data"), &["--file-quota", "1MiB"]);
    let (first, second) = (vec![1; 600 << 10], vec![2; 600 << 10]);
    let file = upload(&server, "fine-tune", "a", &first);
    let refused = try_upload(&server, "fine-tune", "b", &second);
    assert_eq!(
        (refused.status, refused.json()["error"]["code"].as_str()),
        (507, Some("insufficient_storage"))
    );
    assert_eq!(contents(&dir.join("data")), (1, 0));
    assert_eq!(delete(&server, file["id"].as_str().unwrap()).status, 200);
    for _ in 0..5 {
        let file = upload(&server, "fine-tune", "b", &second);
        assert_eq!(delete(&server, file["id"].as_str().unwrap()).status, 200);
    }
}

#[test]
fn a_file_beyond_the_limit_is_a_413() {
    let dir = TempDir::new();
    let server = start(&dir);
    let mut stream = TcpStream::connect(&server.address).unwrap();
    let (head, tail) = (form(&[field("purpose", "fine-tune")]), file("file", "a", b"").len() - 2);
    let start =
        [&head[..head.len() - "------tunesmith-test--\r\n".len()], &file("file", "a", b"")[..tail]]
            .concat();
    // Some more than what is thrown away of the rest would be cut off.
    let megabytes = 600;
    let length = start.len() + (megabytes << 20);
    write!(
        stream,
        "POST /v1/files HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{}: {}\r\nContent-Length: {length}\r\n\r\n",
        FORM.0, FORM.1
    )
    .unwrap();
    stream.write_all(&start).unwrap();
    let chunk = vec![b'a'; 1 << 20];
    for _ in 0..megabytes {
        stream.write_all(&chunk).unwrap();
    }
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    assert_eq!(contents(&dir.join("data")), (0, 0));
}

#[test]
fn clients_that_leave_and_servers_that_are_killed_in_the_middle_leave_nothing_behind() {
    let dir = TempDir::new();
    let data = dir.join("data");
    let server = start(&dir);
    let kept = upload(&server, "fine-tune", "kept", ROWS);
    let half = |server: &Server| {
        let mut stream = TcpStream::connect(&server.address).unwrap();
        let head = format!(
            "POST /v1/files HTTP/1.1\r\nHost: localhost\r\n{}: {}\r\nContent-Length: 99000000\r\n\r\n",
            FORM.0, FORM.1
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(&field("purpose", "fine-tune")).unwrap();
        stream.write_all(&file("file", "half", &vec![b'x'; 3 << 20])).unwrap();
        stream
    };
    let stream = half(&server);
    server.wait_until("the upload arrives", |_| contents(&data).1 == 1);
    drop(stream);
    server.wait_until("the staging file is gone", |_| contents(&data) == (1, 0));
    let _stream = half(&server);
    server.wait_until("the upload arrives", |_| contents(&data).1 == 1);
    drop(server); // kill -9
    assert_eq!(contents(&data).1, 1, "the crash has left something to clear");
    // What a crash between the rename and the record would leave.
    fs::write(data.join("blobs").join("0".repeat(64)), "orphan").unwrap();
    let server = start(&dir);
    assert_eq!(contents(&data), (1, 0));
    assert_eq!(ids(&server.get("/v1/files").json()), [kept["id"].as_str().unwrap()]);
}

#[test]
fn a_file_that_a_job_reads_stays_on_disk_until_the_job_has_ended() {
    let dir = TempDir::new();
    let data = dir.join("data");
    let server = start(&dir);
    let id = upload(&server, "fine-tune", "a", ROWS)["id"].as_str().unwrap().to_owned();
    drop(server);
    let auto =
        json!({"n_epochs": 1, "batch_size": 1, "learning_rate_multiplier": 1.0, "beta": null});
    let mut job = json!({
        "id": "ftjob-1", "created_at": 1, "model": "m", "training_file": id, "seed": 0,
        "method": "supervised", "hyperparameters": auto, "integrations": [], "status": "paused",
        "result_files": [], "step": 0, "attempts": 0,
    });
    let database = || rusqlite::Connection::open(data.join("tunesmith.db")).unwrap();
    let sql = "INSERT INTO records (kind, id, parent, body) VALUES ('job', 'ftjob-1', '', ?)";
    database().execute(sql, [job.to_string()]).unwrap();
    let server = start(&dir);
    assert_eq!(delete(&server, &id).status, 200);
    assert_eq!(server.get(&format!("/v1/files/{id}")).status, 404);
    assert_eq!(ids(&server.get("/v1/files").json()), Vec::<String>::new());
    drop(server);
    let server = start(&dir);
    assert_eq!(contents(&data), (1, 0), "the job still needs it");
    drop(server);
    job["status"] = json!("cancelled");
    let sql = "UPDATE records SET body = ? WHERE kind = 'job'";
    database().execute(sql, [job.to_string()]).unwrap();
    let server = start(&dir);
    server.wait_until("the file is gone", |_| contents(&data) == (0, 0));
}

#[test]
fn a_file_ends_when_its_time_is_over() {
    let dir = TempDir::new();
    let data = dir.join("data");
    let server = start(&dir);
    let id = upload(&server, "fine-tune", "a", ROWS)["id"].as_str().unwrap().to_owned();
    drop(server);
    let sql = "UPDATE records SET body = json_set(body, '$.expires_at', 1700000000)";
    rusqlite::Connection::open(data.join("tunesmith.db")).unwrap().execute(sql, []).unwrap();
    let server = start(&dir);
    assert_eq!(server.get(&format!("/v1/files/{id}")).status, 404);
    server.wait_until("the content is gone", |_| contents(&data) == (0, 0));
}

#[test]
fn a_results_file_is_base64_text() {
    let dir = TempDir::new();
    let server = start(&dir);
    let csv: String = (0..100_000).map(|step| format!("{step},0.5,,\n")).collect();
    let id = upload(&server, "evals", "step_metrics.csv", csv.as_bytes())["id"].clone();
    drop(server);
    let sql = "UPDATE records SET body = json_set(body, '$.purpose', 'fine-tune-results')";
    let data = dir.join("data");
    rusqlite::Connection::open(data.join("tunesmith.db")).unwrap().execute(sql, []).unwrap();
    let server = start(&dir);
    let download = server.get(&format!("/v1/files/{}/content", id.as_str().unwrap()));
    assert_eq!(download.header("content-length"), Some(&*download.body.len().to_string()));
    use base64::Engine as _;
    let decoded = base64::engine::general_purpose::STANDARD.decode(&download.body).unwrap();
    assert_eq!(decoded, csv.as_bytes());
}

#[test]
fn a_data_folder_has_one_server_and_a_server_without_one_says_how_to_get_it() {
    let dir = TempDir::new();
    let data = dir.join("data");
    let _server = start(&dir);
    let args = ["--data-dir", data.to_str().unwrap()];
    let output = command(&fixture("tiny-llama"), &args).output().unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("is in use by another tunesmith"), "{said}");
    let without = Server::start(&fixture("tiny-llama"), &[]);
    for response in [without.get("/v1/files"), try_upload(&without, "fine-tune", "a", ROWS)] {
        assert_eq!(response.status, 403);
        assert!(response.text().contains("--data-dir"), "{response:?}");
    }
}

/// A small disk of one's own, where this user may mount one.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn new(megabytes: usize) -> Option<Self> {
        let dir = TempDir::new();
        let size = format!("size={megabytes}m");
        let mut mount = Command::new("mount");
        let mounted = mount.args(["-t", "tmpfs", "-o", &size, "tunesmith-test"]).arg(&dir.0);
        mounted.output().is_ok_and(|output| output.status.success()).then_some(Self(dir))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0.0).status();
    }
}

#[test]
fn a_full_disk_refuses_uploads_and_nothing_else_and_recovers() {
    let Some(disk) = SmallDisk::new(8) else {
        eprintln!("skipped: no tmpfs may be mounted here");
        return;
    };
    let data = disk.0.join("data");
    let server = start_with(&data, &[]);
    let kept = upload(&server, "fine-tune", "kept", ROWS)["id"].as_str().unwrap().to_owned();
    let text = server.text(&crate::common::chat("tiny-llama", "hi", json!({})));
    let refused = try_upload(&server, "fine-tune", "big", &vec![b'a'; 20 << 20]);
    assert_eq!(refused.status, 507, "{refused:?}");
    assert_eq!(contents(&data), (1, 0));
    // Not a byte left: what needs none goes on, and what needs some says so.
    let filler = disk.0.join("filler");
    let _ = fs::write(&filler, vec![0_u8; 16 << 20]);
    assert_eq!(try_upload(&server, "fine-tune", "small", b"small").status, 507);
    assert_eq!(server.text(&crate::common::chat("tiny-llama", "hi", json!({}))), text);
    assert_eq!(server.get(&format!("/v1/files/{kept}/content")).body, ROWS);
    let deleted = delete(&server, &kept).status;
    assert!([200, 507].contains(&deleted), "{deleted}");
    fs::remove_file(filler).unwrap();
    let after = upload(&server, "fine-tune", "after", b"after");
    thread::sleep(Duration::from_millis(50));
    drop(server);
    let server = start_with(&data, &[]);
    let path = format!("/v1/files/{}/content", after["id"].as_str().unwrap());
    assert_eq!(server.get(&path).body, b"after");
}

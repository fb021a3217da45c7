//! A run is paused and continued by a signal, and others read its figures while it works.
#![cfg(unix)]

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use crate::common::{TempDir, fixture};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(120);

fn train(dir: &Path, more: &[&str]) -> Command {
    let row = |n: usize| {
        json!({"messages": [{"role": "user", "content": format!("question {n}")},
            {"role": "assistant", "content": "answer"}]})
        .to_string()
            + "\n"
    };
    fs::write(dir.join("rows.jsonl"), (0..8).map(row).collect::<String>()).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_tunesmith"));
    command
        .current_dir(dir)
        .args(["train", "--data", "rows.jsonl", "--output", "out", "--batch-size", "2"])
        .arg("--model")
        .arg(fixture("tiny-llama"))
        .args(more)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn signal(child: &Child, name: &str) {
    let pid = child.id().to_string();
    assert!(Command::new("kill").args([name, &pid]).status().unwrap().success());
}

/// Calls `look` until it gives something.
fn wait<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let since = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(since.elapsed() < PATIENCE, "{what} did not come");
        thread::sleep(Duration::from_millis(10));
    }
}

fn events(dir: &Path) -> Vec<Value> {
    let text = fs::read_to_string(dir.join("out.work/events.jsonl")).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

fn count(dir: &Path, name: &str) -> usize {
    events(dir).iter().filter(|event| event["event"] == name).count()
}

#[test]
fn a_signal_pauses_a_run_until_the_next_one_and_it_can_still_be_stopped() {
    let dir = TempDir::new();
    let child = train(&dir.0, &["--max-steps", "100000"]).spawn().unwrap();
    wait("a step", || (count(&dir.0, "step") > 1).then_some(()));
    signal(&child, "-USR1");
    wait("the pause", || (count(&dir.0, "paused") == 1).then_some(()));
    let steps = count(&dir.0, "step");
    // What there is lies in a checkpoint, and nothing happens.
    assert!(count(&dir.0, "checkpointed") > 0);
    thread::sleep(Duration::from_millis(300));
    assert_eq!(count(&dir.0, "step"), steps);
    signal(&child, "-USR1");
    wait("more steps", || (count(&dir.0, "step") > steps + 1).then_some(()));
    assert_eq!(count(&dir.0, "continued"), 1);
    signal(&child, "-USR1");
    wait("the second pause", || (count(&dir.0, "paused") == 2).then_some(()));
    signal(&child, "-TERM");
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).contains("--resume"));
}

/// The answer to `GET path`.
fn get(address: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn prometheus_reads_the_figures_of_a_run() {
    let dir = TempDir::new();
    let more = ["--max-steps", "100000", "--metrics-addr", "127.0.0.1:0"];
    let mut child = train(&dir.0, &more).spawn().unwrap();
    // Read on, or the run would have nobody to write to.
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let address = lines
        .by_ref()
        .map_while(Result::ok)
        .find_map(|line| Some(line.strip_prefix("metrics: http://")?.split('/').next()?.to_owned()))
        .unwrap();
    wait("a step", || (count(&dir.0, "step") > 1).then_some(()));
    let page = get(&address, "/metrics");
    assert!(page.starts_with("HTTP/1.1 200 OK\r\n"), "{page}");
    let figure = |name: &str| -> f64 {
        let line = page.lines().find_map(|line| line.strip_prefix(&format!("{name} ")));
        line.unwrap_or_else(|| panic!("{name} is not in {page}")).parse().unwrap()
    };
    assert!(figure("tunesmith_train_step") >= 1.0);
    assert_eq!(figure("tunesmith_train_total_steps"), 100_000.0);
    for name in ["loss", "grad_norm", "tokens_per_second", "eta_seconds", "tokens_total"] {
        assert!(figure(&format!("tunesmith_train_{name}")) > 0.0, "{name}");
    }
    assert!(page.contains("# TYPE tunesmith_train_learning_rate gauge"));
    assert!(page.contains("# TYPE tunesmith_train_tokens_total counter"));
    assert!(get(&address, "/other").starts_with("HTTP/1.1 404"));
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Reads one request and answers it. Returns its first line and its body.
fn receive(listener: &TcpListener) -> (String, Value) {
    let (stream, _) = listener.accept().unwrap();
    let mut reader = BufReader::new(stream);
    let (mut first, mut length) = (String::new(), 0);
    reader.read_line(&mut first).unwrap();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        if line.trim().is_empty() {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}";
    reader.get_mut().write_all(answer).unwrap();
    (first, serde_json::from_slice(&body).unwrap())
}

#[test]
fn a_collector_gets_the_figures_now_and_then_and_at_the_end() {
    let dir = TempDir::new();
    let collector = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", collector.local_addr().unwrap());
    let (sender, received) = mpsc::channel();
    thread::spawn(move || while sender.send(receive(&collector)).is_ok() {});
    let more = ["--max-steps", "100000", "--otlp", &url, "--otlp-seconds", "1"];
    let child = train(&dir.0, &more).spawn().unwrap();
    let (first, body) = received.recv_timeout(PATIENCE).unwrap();
    assert!(first.starts_with("POST /v1/metrics "), "{first}");
    let attributes = &body["resourceMetrics"][0]["resource"]["attributes"];
    assert_eq!(
        attributes[0],
        json!({"key": "service.name", "value": {"stringValue": "tunesmith"}})
    );
    wait("a step", || (count(&dir.0, "step") > 1).then_some(()));
    signal(&child, "-TERM");
    assert!(child.wait_with_output().unwrap().status.success());
    // The last push is made before the process ends.
    let last = received.try_iter().last().unwrap().1;
    let value = |name: &str| {
        let metrics = last["resourceMetrics"][0]["scopeMetrics"][0]["metrics"].as_array().unwrap();
        let metric = metrics.iter().find(|metric| metric["name"] == name).unwrap();
        let kind = if metric["sum"].is_null() { "gauge" } else { "sum" };
        metric[kind]["dataPoints"][0]["asDouble"].as_f64().unwrap()
    };
    assert_eq!(value("tunesmith.train.step"), count(&dir.0, "step") as f64);
    assert!(value("tunesmith.train.tokens_total") > 0.0 && value("tunesmith.train.loss") > 0.0);
}

#[test]
fn a_collector_that_is_not_there_is_a_warning_and_nothing_else() {
    let dir = TempDir::new();
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", nobody.local_addr().unwrap());
    drop(nobody);
    let output = train(&dir.0, &["--max-steps", "3", "--otlp", &url]).output().unwrap();
    assert!(output.status.success());
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("warning: otlp:") && dir.join("out/adapter_config.json").is_file());

    let bad = train(&dir.0, &["--overwrite", "--metrics-addr", "127.0.0.1:1:2"]).output().unwrap();
    assert!(!bad.status.success());
}

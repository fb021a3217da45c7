//! The server under load and on its way out: full queues, clients that leave, metrics, shutdown.

use crate::common::{Server, TempDir, chat, endless_model, fixture, server::CHAT};
use serde_json::{Value, json};

const RUNNING: &str = "vllm:num_requests_running";
const WAITING: &str = "vllm:num_requests_waiting";
const CACHE: &str = "vllm:kv_cache_usage_perc";

fn endless(stream: bool) -> Value {
    chat("endless", "hello", json!({"stream": stream, "max_tokens": 500_000}))
}

#[test]
fn a_client_that_leaves_frees_its_place_streamed_or_not() {
    let dir = TempDir::new();
    let server = Server::start(&endless_model(&dir.0), &["--max-num-seqs", "2"]);
    for round in 0..3 {
        let mut streamed = server.open_chat(&endless(true));
        streamed.event().unwrap();
        let body = endless(false).to_string();
        let whole = std::net::TcpStream::connect(&server.address).unwrap();
        let head = format!(
            "POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        std::io::Write::write_all(&mut &whole, head.as_bytes()).unwrap();
        server.wait_until("both run", |server| server.metric(RUNNING) == Some(2.0));
        drop((streamed, whole));
        server.wait_until(&format!("round {round} has ended"), |server| {
            server.metric(RUNNING) == Some(0.0) && server.metric(CACHE) == Some(0.0)
        });
    }
    let aborted = "vllm:request_success_total{model_name=\"endless\",engine=\"0\",\
                   finished_reason=\"abort\"}";
    server.wait_until("all six count as aborted", |server| server.metric(aborted) == Some(6.0));
}

#[test]
fn a_full_queue_is_a_429_that_says_when_to_come_back() {
    let dir = TempDir::new();
    let args = ["--max-num-seqs", "1", "--max-queue", "1"];
    let server = Server::start(&endless_model(&dir.0), &args);
    let mut running = server.open_chat(&endless(true));
    running.event().unwrap();
    let waiting = server.open_chat(&endless(true));
    assert_eq!(waiting.status, 200);
    server.wait_until("one waits", |server| server.metric(WAITING) == Some(1.0));
    for _ in 0..3 {
        let refused = server.post(CHAT, &endless(false));
        assert_eq!(refused.status, 429);
        assert_eq!(refused.header("retry-after"), Some("1"));
        assert_eq!(refused.json()["error"]["code"], "queue_full");
    }
    assert_eq!(server.get("/health").status, 200);
    let rejections = "vllm:admission_rejections_total";
    server.wait_until("three are counted", |server| server.metric(rejections) == Some(3.0));
    drop(running);
    let mut waiting = waiting;
    for _ in 0..3 {
        waiting.event().expect("the waiting request runs now");
    }
}

#[test]
fn a_shutdown_refuses_new_requests_finishes_running_ones_and_exits_well() {
    let dir = TempDir::new();
    let server = Server::start(&endless_model(&dir.0), &["--shutdown-timeout", "60"]);
    let limited = json!({"stream": true, "max_tokens": 1500});
    let mut running = server.open_chat(&chat("endless", "hello", limited));
    running.event().unwrap();
    assert_eq!(server.get("/ready").status, 200);
    server.terminate();
    server.wait_until("it drains", |server| server.get("/ready").status == 503);
    assert_eq!(server.get("/health").status, 200);
    let refused = server.post(CHAT, &endless(false));
    assert_eq!(refused.status, 503);
    assert!(refused.header("retry-after").is_some());

    let events: Vec<String> = std::iter::from_fn(|| running.event()).collect();
    let [.., last, done] = events.as_slice() else { panic!("{events:?}") };
    let last: Value = serde_json::from_str(last).unwrap();
    assert_eq!(last["choices"][0]["finish_reason"], "length");
    assert_eq!(done, "[DONE]");
    let (status, log) = server.wait();
    assert!(status.success(), "{status}: {log}");
}

#[test]
fn what_does_not_finish_in_time_ends_with_an_error_event() {
    let dir = TempDir::new();
    let server = Server::start(&endless_model(&dir.0), &["--shutdown-timeout", "0"]);
    let mut running = server.open_chat(&endless(true));
    running.event().unwrap();
    server.terminate();
    let events: Vec<String> = std::iter::from_fn(|| running.event()).collect();
    let [.., error, done] = events.as_slice() else { panic!("{events:?}") };
    let error: Value = serde_json::from_str(error).unwrap();
    assert_eq!(error["error"]["code"], "draining", "{error}");
    assert_eq!(done, "[DONE]");
    let (status, log) = server.wait();
    assert!(status.success(), "{status}: {log}");
}

#[test]
fn metrics_show_what_a_router_reads_from_the_first_scrape_on() {
    let adapter = format!("plain={}", fixture("oracle/tiny-llama-plain-adapter").display());
    let server = Server::start(&fixture("tiny-llama"), &["--adapter", &adapter]);
    let page = server.get("/metrics");
    assert!(page.header("content-type").unwrap().starts_with("text/plain; version=0.0.4"));
    for name in [RUNNING, WAITING, CACHE] {
        let series = format!("{name}{{model_name=\"tiny-llama\",engine=\"0\"}} 0");
        let lines: Vec<&str> =
            page.text().lines().filter(|line| line.starts_with(&format!("{name}{{"))).collect();
        assert_eq!(lines, [series]);
    }
    let lora: Vec<&str> =
        page.text().lines().filter(|line| line.starts_with("vllm:lora_requests_info{")).collect();
    assert_eq!(lora.len(), 1, "{lora:?}");
    assert!(page.text().contains("vllm:cache_config_info{block_size=\"16\",num_gpu_blocks=\""));
    assert!(page.text().contains("vllm:lora_adapter_loaded{adapter_name=\"plain\""));

    let answer = server.chat(&chat("plain", "hello", json!({"max_tokens": 3})));
    let labels = "{model_name=\"tiny-llama\",engine=\"0\"";
    let count = |field: &str| answer["usage"][field].as_f64();
    for (name, expected) in [
        (format!("vllm:prompt_tokens_total{labels}}}"), count("prompt_tokens")),
        (format!("vllm:generation_tokens_total{labels}}}"), Some(3.0)),
        (format!("vllm:request_success_total{labels},finished_reason=\"length\"}}"), Some(1.0)),
        (format!("vllm:time_to_first_token_seconds_count{labels}}}"), Some(1.0)),
        (format!("vllm:e2e_request_latency_seconds_count{labels}}}"), Some(1.0)),
        (format!("vllm:request_queue_time_seconds_count{labels}}}"), Some(1.0)),
    ] {
        server.wait_until(&name, |server| server.metric(&name) == expected);
    }
    let page = server.get("/metrics");
    let bucket = format!("vllm:time_to_first_token_seconds_bucket{labels},le=\"0.001\"}}");
    assert!(page.text().contains(&bucket), "{}", page.text());
}

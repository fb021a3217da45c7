//! Many clients, several adapters, and swaps among them: everybody gets whole answers of one version.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use crate::common::{Server, TempDir, chat, copy_dir, fixture, server::CHAT};
use serde_json::{Value, json};

const ADAPTERS: [&str; 7] = [
    "plain-adapter",
    "pattern-adapter",
    "train-initial",
    "train-final",
    "dora-final",
    "tokens-final",
    "saved-final",
];

/// A folder of adapters, named after the fixtures they are copies of.
fn adapter_dir() -> TempDir {
    let dir = TempDir::new();
    for name in ADAPTERS {
        copy_dir(&fixture(&format!("oracle/tiny-llama-{name}")), &dir.join(name));
    }
    dir
}

fn server(dir: &TempDir) -> Server {
    Server::start(&fixture("tiny-llama"), &["--adapter-dir", dir.0.to_str().unwrap()])
}

fn load(server: &Server, name: &str, path: &std::path::Path) {
    let body = json!({"lora_name": name, "lora_path": path, "load_inplace": true});
    let response = server.post("/v1/load_lora_adapter", &body);
    assert_eq!(response.status, 200, "{response:?}");
}

/// The text of an answer, streamed or not.
fn ask(server: &Server, body: &Value, stream: bool) -> String {
    if !stream {
        return server.text(body);
    }
    let chunks = server.stream(body);
    let texts = chunks.iter().map(|chunk| chunk["choices"][0]["delta"]["content"].as_str());
    texts.flatten().collect()
}

#[test]
fn greedy_answers_are_the_same_alone_in_a_full_batch_and_after_an_unrelated_swap() {
    let dir = adapter_dir();
    let server = server(&dir);
    let mut bodies: Vec<Value> = Vec::new();
    for (number, model) in (0..16).zip(ADAPTERS.into_iter().chain(["tiny-llama"]).cycle()) {
        let prompt = "tell me about lemons. ".repeat(1 + number % 4) + &number.to_string();
        bodies.push(chat(model, &prompt, json!({"max_tokens": 40})));
    }
    let alone: Vec<String> = bodies.iter().map(|body| ask(&server, body, false)).collect();
    for (round, unrelated) in ADAPTERS.into_iter().enumerate() {
        thread::scope(|scope| {
            let running: Vec<_> = bodies
                .iter()
                .enumerate()
                .map(|(number, body)| {
                    let (server, stream) = (&server, (number + round) % 2 == 0);
                    scope.spawn(move || ask(server, body, stream))
                })
                .collect();
            load(&server, "unrelated", &dir.join(unrelated));
            for ((body, expected), thread) in bodies.iter().zip(&alone).zip(running) {
                assert_eq!(thread.join().unwrap(), *expected, "round {round}: {body}");
            }
        });
    }
}

#[test]
fn fifty_swaps_under_sixteen_streams_fail_nobody_and_mix_nothing() {
    let dir = adapter_dir();
    let server = server(&dir);
    let versions = ["plain-adapter", "dora-final"];
    let body = chat("swapped", "tell me about lemons", json!({"max_tokens": 40}));
    // What each version says when nothing else is going on, by its digest.
    let mut cold: HashMap<String, String> = HashMap::new();
    for version in versions {
        load(&server, "swapped", &dir.join(version));
        let response = server.post(CHAT, &body);
        let label = response.header("x-adapter-version").unwrap();
        let digest = label.split_once(";sha256:").unwrap().1.to_owned();
        let text = response.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
        cold.insert(digest, text);
    }
    let texts: Vec<&String> = cold.values().collect();
    assert!(texts.len() == 2 && texts[0] != texts[1], "the versions must differ: {texts:?}");

    let stop = AtomicBool::new(false);
    let num_answers: usize = thread::scope(|scope| {
        let clients: Vec<_> = (0..16)
            .map(|_| {
                scope.spawn(|| {
                    let mut num_answers = 0;
                    let mut streamed = body.clone();
                    streamed["stream"] = true.into();
                    while !stop.load(Ordering::Relaxed) {
                        let mut exchange = server.open_chat(&streamed);
                        assert_eq!(exchange.status, 200);
                        let label = exchange.header("x-adapter-version").unwrap();
                        let digest = label.split_once(";sha256:").unwrap().1.to_owned();
                        assert_eq!(exchange.text(), cold[&digest], "{digest}");
                        num_answers += 1;
                    }
                    num_answers
                })
            })
            .collect();
        for swap in 0..50 {
            load(&server, "swapped", &dir.join(versions[swap % 2]));
            // At least one answer between two swaps.
            ask(&server, &body, swap % 2 == 0);
        }
        stop.store(true, Ordering::Relaxed);
        clients.into_iter().map(|client| client.join().unwrap()).sum()
    });
    assert!(num_answers >= 16, "{num_answers}");
    let unload = json!({"lora_name": "swapped", "mode": "wait", "timeout_s": 30});
    assert_eq!(server.post("/v1/unload_lora_adapter", &unload).status, 200);
    assert_eq!(server.metric("vllm:num_cpu_loaded_lora_adapters"), Some(0.0));
}

//! `POST /v1/chat/completions` as a client sees it.

use crate::common::{Server, chat, fixture};
use serde_json::{Value, json};

const ADAPTER: &str = "oracle/tiny-llama-plain-adapter";

fn server() -> Server {
    let adapter = format!("plain={}", fixture(ADAPTER).display());
    Server::start(&fixture("tiny-llama"), &["--adapter", &adapter])
}

/// The text and the reason of every choice of a streamed answer, put together.
fn assemble(chunks: &[Value], num_choices: usize) -> Vec<(String, String)> {
    let mut choices = vec![(String::new(), String::new()); num_choices];
    for choice in chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap()) {
        let (text, reason) = &mut choices[choice["index"].as_u64().unwrap() as usize];
        assert_eq!(reason, "", "a choice went on after its end");
        text.push_str(choice["delta"]["content"].as_str().unwrap_or_default());
        reason.push_str(choice["finish_reason"].as_str().unwrap_or_default());
    }
    choices
}

fn whole(answer: &Value) -> Vec<(String, String)> {
    let text = |choice: &Value| choice["message"]["content"].as_str().unwrap().to_owned();
    let reason = |choice: &Value| choice["finish_reason"].as_str().unwrap().to_owned();
    answer["choices"].as_array().unwrap().iter().map(|c| (text(c), reason(c))).collect()
}

#[test]
fn streamed_and_whole_answers_are_the_same() {
    let server = server();
    for model in ["tiny-llama", "plain"] {
        for (content, changes, n) in [
            ("hello", json!({}), 1),
            ("grüße, 世界 🍋", json!({"max_tokens": 60}), 1),
            ("hello", json!({"temperature": 1.3, "seed": 7, "n": 3}), 3),
            ("hello", json!({"temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": -1}), 1),
            ("hello", json!({"min_p": 0.05, "temperature": 2, "seed": 9, "max_tokens": 60}), 1),
        ] {
            let body = chat(model, content, changes);
            let expected = whole(&server.chat(&body));
            assert_eq!(expected.len(), n);
            assert_eq!(assemble(&server.stream(&body), n), expected, "{body}");
        }
    }
}

#[test]
fn an_answer_has_every_field_that_clients_read() {
    let server = server();
    let response = server.post(crate::common::server::CHAT, &chat("plain", "hi", json!({"n": 2})));
    let answer = response.json();
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["model"], "plain");
    assert!(answer["created"].as_u64().unwrap() > 1_700_000_000);
    for (index, choice) in answer["choices"].as_array().unwrap().iter().enumerate() {
        assert_eq!(choice["index"], index);
        assert_eq!(choice["message"]["role"], "assistant");
        assert_eq!(choice["logprobs"], Value::Null);
    }
    let usage = &answer["usage"];
    let count = |field: &str| usage[field].as_u64().unwrap();
    assert_eq!(count("prompt_tokens") + count("completion_tokens"), count("total_tokens"));
    assert!(count("completion_tokens") <= 48 && count("completion_tokens") > 1);
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 0);

    let version = response.header("x-adapter-version").unwrap();
    let digest = version.strip_prefix("plain@v1;sha256:").unwrap();
    let base = server.post(crate::common::server::CHAT, &chat("tiny-llama", "hi", json!({})));
    assert_eq!(base.header("x-adapter-version"), None);
    let base_fingerprint = base.json()["system_fingerprint"].as_str().unwrap().to_owned();
    let fingerprint = answer["system_fingerprint"].as_str().unwrap();
    assert_eq!(fingerprint, format!("{base_fingerprint}_{}", &digest[..12]));
}

#[test]
fn a_stream_starts_with_the_role_and_ends_with_reason_usage_and_done() {
    let server = server();
    let body = chat("tiny-llama", "hi", json!({"stream_options": {"include_usage": true}}));
    let chunks = server.stream(&body);
    let first = &chunks[0]["choices"][0];
    assert_eq!(first["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(first["finish_reason"], Value::Null);
    let (last, rest) = chunks.split_last().unwrap();
    assert_eq!(last["choices"], json!([]));
    let answer = server.chat(&body);
    assert_eq!(last["usage"]["total_tokens"], answer["usage"]["total_tokens"]);
    for chunk in rest {
        assert_eq!(chunk["object"], "chat.completion.chunk");
        assert_eq!(chunk["id"], chunks[0]["id"]);
        assert_eq!(chunk["model"], "tiny-llama");
        assert!(chunk.as_object().unwrap().contains_key("usage") && chunk["usage"].is_null());
    }
    let ends: Vec<&Value> =
        rest.iter().filter(|chunk| !chunk["choices"][0]["finish_reason"].is_null()).collect();
    assert_eq!(ends, [rest.last().unwrap()]);
    assert_eq!(ends[0]["choices"][0]["delta"], json!({}));

    let without = server.stream(&chat("tiny-llama", "hi", json!({})));
    assert!(without.iter().all(|chunk| chunk.get("usage").is_none()), "{without:?}");
    assert_eq!(without.len(), chunks.len() - 1);
}

#[test]
fn a_conversation_that_goes_on_says_how_much_of_it_was_cached_streamed_or_not() {
    let server = Server::start(&fixture("tiny-llama"), &["--api-key", "ann", "--api-key", "bob"]);
    let ann = server.with_key("ann");
    let question = "please convert two cups of flour and three spoons of butter to grams";
    let ask = |server: &Server, content: &str, changes: Value| {
        let body = chat("tiny-llama", content, changes);
        let usage = &server.chat(&body)["usage"];
        let prompt = usage["prompt_tokens"].as_u64().unwrap();
        (usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap(), prompt)
    };
    let (cached, prompt) = ask(&ann, question, json!({}));
    assert_eq!(cached, 0);
    assert!(prompt > 40, "{prompt}");
    let all_but_the_tail = (prompt - 1) / 16 * 16;
    assert_eq!(ask(&ann, question, json!({"n": 2})), (all_but_the_tail, prompt));
    // Streamed too.
    let changes = json!({"stream_options": {"include_usage": true}, "stop": ["e"]});
    let chunks = ann.stream(&chat("tiny-llama", question, changes));
    let details = &chunks.last().unwrap()["usage"]["prompt_tokens_details"];
    assert_eq!(details["cached_tokens"], all_but_the_tail);
    let hits = ann.metric("vllm:prefix_cache_hits_total").unwrap();
    assert!(hits >= 2.0 * all_but_the_tail as f64, "{hits}");
    assert!(ann.metric("vllm:prefix_cache_queries_total").unwrap() >= 4.0 * prompt as f64);
    // Another key shares nothing, unless both say so.
    let bob = ann.with_key("bob");
    assert_eq!(ask(&bob, question, json!({})).0, 0);
    assert_eq!(ask(&bob, question, json!({"cache_salt": "team"})).0, 0);
    let ann = bob.with_key("ann");
    assert_eq!(ask(&ann, question, json!({"cache_salt": "team"})).0, all_but_the_tail);
}

#[test]
fn log_probabilities_come_with_every_token_streamed_or_not() {
    let server = server();
    let body = chat("plain", "grüße, 世界", json!({"logprobs": true, "top_logprobs": 3}));
    let answer = server.chat(&body);
    let tokens = answer["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    let streamed: Vec<Value> = server
        .stream(&body)
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array().cloned())
        .flatten()
        .collect();
    assert_eq!(streamed, tokens);
    let mut bytes = Vec::new();
    for token in &tokens {
        bytes.extend(token["bytes"].as_array().unwrap().iter().map(|b| b.as_u64().unwrap() as u8));
        let top = token["top_logprobs"].as_array().unwrap();
        let logprobs: Vec<f64> = top.iter().map(|it| it["logprob"].as_f64().unwrap()).collect();
        assert!(logprobs.len() == 3 && logprobs.is_sorted_by(|a, b| a >= b), "{token}");
        // Greedy: the most likely one was taken.
        assert_eq!((&top[0]["token"], &top[0]["logprob"]), (&token["token"], &token["logprob"]));
    }
    assert_eq!(String::from_utf8_lossy(&bytes), whole(&answer)[0].0);
    let plain = server.chat(&chat("plain", "grüße, 世界", json!({"logprobs": true})));
    assert_eq!(plain["choices"][0]["logprobs"]["content"][0]["top_logprobs"], json!([]));
}

#[test]
fn bias_and_penalties_change_what_is_said() {
    let server = server();
    let answer = |changes: Value| server.chat(&chat("plain", "hello", changes));
    let forced = answer(json!({"logit_bias": {"70": 100}, "max_tokens": 4, "logprobs": true}));
    let tokens = forced["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    assert_eq!(tokens.len(), 4);
    // Told as the model had it, before the bias.
    assert!(tokens.iter().all(|it| it["token"] == tokens[0]["token"]), "{tokens:?}");
    assert!(tokens[0]["logprob"].as_f64().unwrap() < -0.5);
    let text = whole(&answer(json!({"max_tokens": 60})));
    // The answer says nothing twice, so only a reward for doing so changes it.
    for (name, value) in
        [("presence_penalty", -2), ("frequency_penalty", -2), ("repetition_penalty", 2)]
    {
        assert_ne!(whole(&answer(json!({"max_tokens": 60, name: value}))), text, "{name}");
    }
    let unknown = server.post(
        crate::common::server::CHAT,
        &chat("plain", "hello", json!({"logit_bias": {"99999999": 1}})),
    );
    assert_eq!(unknown.status, 400);
    assert_eq!(unknown.json()["error"]["param"], "logit_bias");
}

#[test]
fn a_stop_string_ends_the_answer_before_it_streamed_or_not() {
    let server = server();
    let full = server.text(&chat("plain", "hello", json!({"max_tokens": 40})));
    let characters: Vec<char> = full.chars().collect();
    assert!(characters.len() > 12, "the fixture answers too shortly: {full:?}");
    for range in [4..5, 5..8, 6..11] {
        let stop: String = characters[range].iter().collect();
        let expected = &full[..full.find(&stop).unwrap()];
        let body = chat("plain", "hello", json!({"max_tokens": 40, "stop": ["\u{1}", stop]}));
        assert_eq!(whole(&server.chat(&body)), [(expected.to_owned(), "stop".to_owned())]);
        let streamed = assemble(&server.stream(&body), 1);
        assert_eq!(streamed, [(expected.to_owned(), "stop".to_owned())]);
    }
}

#[test]
fn the_token_limit_holds_and_max_completion_tokens_wins() {
    let server = server();
    let body = chat("plain", "hello", json!({"max_tokens": 20, "max_completion_tokens": 3}));
    let answer = server.chat(&body);
    assert_eq!(answer["usage"]["completion_tokens"], 3);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
}

#[test]
fn a_seed_repeats_an_answer_and_its_choices_differ() {
    let server = server();
    let body = chat("plain", "hello", json!({"temperature": 1.5, "seed": 11, "n": 3}));
    let choices = whole(&server.chat(&body));
    assert_eq!(whole(&server.chat(&body)), choices);
    assert!(choices[0] != choices[1] && choices[1] != choices[2], "{choices:?}");
    // A choice has nothing in common with the answers to the seeds beside it, and the first is the only one's.
    let alone = |seed: i64| {
        whole(&server.chat(&chat("plain", "hello", json!({"temperature": 1.5, "seed": seed}))))
    };
    assert_eq!(alone(11)[0], choices[0]);
    assert!(!choices.contains(&alone(12)[0]) && !choices.contains(&alone(13)[0]), "{choices:?}");
    let unseeded = chat("plain", "hello", json!({"temperature": 1.5}));
    assert_ne!(server.text(&unseeded), server.text(&unseeded));
}

#[test]
fn an_adapter_answers_under_its_name_and_versions_and_the_base_under_its_own() {
    let server = server();
    let text = |model: &str| server.text(&chat(model, "hello", json!({})));
    assert_ne!(text("plain"), text("tiny-llama"));
    let response = server.post(crate::common::server::CHAT, &chat("plain@v1", "hello", json!({})));
    assert_eq!(response.json()["model"], "plain@v1");
    let version = response.header("x-adapter-version").unwrap();
    let digest = version.split_once("sha256:").unwrap().1;
    for name in ["plain@v1".to_owned(), format!("plain@sha256:{}", &digest[..12])] {
        assert_eq!(text(&name), text("plain"));
    }
    for name in ["plain@v2", "plain@", "plain@sha256:000000000000", "tiny-llama@v1", "Plain"] {
        let response = server.post(crate::common::server::CHAT, &chat(name, "hello", json!({})));
        assert_eq!(response.status, 404, "{name}");
        assert_eq!(response.json()["error"]["code"], "model_not_found", "{name}");
    }
}

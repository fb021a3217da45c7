//! `/v1/evals`: definitions, runs over rows with the base and with an adapter, and what outlives a
//! restart.

use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use crate::common::{Server, TempDir, chat, endless_model, fixture};
use serde_json::{Value, json};
use tunesmith::jobs::{FileRecord, Store, StoreError};

const EVALS: &str = "/v1/evals";
const PATIENCE: Duration = Duration::from_secs(60);

fn start(model: &Path, dir: &TempDir) -> Server {
    let data = dir.join("data");
    let adapter = format!("tuned={}", fixture("oracle/tiny-llama-plain-adapter").display());
    Server::start(model, &["--data-dir", data.to_str().unwrap(), "--adapter", &adapter])
}

/// Is the answer what the row says?
fn definition() -> Value {
    json!({
        "name": "labels",
        "data_source_config": {
            "type": "custom",
            "item_schema": {
                "type": "object",
                "properties": {"question": {"type": "string"}, "label": {"type": "string"}},
                "required": ["question", "label"],
            },
            "include_sample_schema": true,
        },
        "testing_criteria": [
            {"type": "string_check", "name": "exact", "input": "{{sample.output_text}}",
             "reference": "{{item.label}}", "operation": "eq"},
            {"type": "text_similarity", "name": "alike", "input": "{{sample.output_text}}",
             "reference": "{{item.label}}", "evaluation_metric": "fuzzy_match",
             "pass_threshold": 0.9},
        ],
        "metadata": {"team": "a"},
    })
}

fn completions(model: &str, rows: &[Value]) -> Value {
    json!({"name": "run", "data_source": {
        "type": "completions",
        "model": model,
        "input_messages": {"type": "template", "template": [
            {"role": "user", "content": "Q: {{item.question}}"},
        ]},
        "sampling_params": {"temperature": 0, "max_completion_tokens": 12},
        "source": {"type": "file_content", "content": rows},
    }})
}

fn jsonl(rows: &[Value]) -> Value {
    json!({"data_source": {
        "type": "jsonl", "source": {"type": "file_content", "content": rows},
    }})
}

fn row(question: &str, label: &str) -> Value {
    json!({"item": {"question": question, "label": label}})
}

fn created(server: &Server, path: &str, body: &Value) -> Value {
    let answer = server.post(path, body);
    assert_eq!(answer.status, 200, "{body}: {answer:?}");
    answer.json()
}

fn id(object: &Value) -> &str {
    object["id"].as_str().unwrap()
}

fn ended(server: &Server, path: &str) -> Value {
    let started = Instant::now();
    loop {
        let run = server.get(path).json();
        if !["queued", "in_progress"].contains(&run["status"].as_str().unwrap()) {
            return run;
        }
        assert!(started.elapsed() < PATIENCE, "waited in vain: {run}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// All objects of a list, page by page.
fn all(server: &Server, path: &str, limit: usize) -> Vec<Value> {
    let (mut objects, mut after): (Vec<Value>, String) = (Vec::new(), String::new());
    for _ in 0..100 {
        let page = server.get(&format!("{path}?limit={limit}{after}")).json();
        assert_eq!(page["object"], "list", "{page}");
        objects.extend(page["data"].as_array().unwrap().clone());
        if page["has_more"] == false {
            return objects;
        }
        after = format!("&after={}", page["last_id"].as_str().unwrap());
    }
    panic!("{path} does not end");
}

#[test]
fn base_and_adapter_answer_the_rows_and_are_graded() {
    let dir = TempDir::new();
    let server = start(&fixture("tiny-llama"), &dir);
    let eval = created(&server, EVALS, &definition());
    assert_eq!(eval["object"], "eval");
    assert_eq!(eval["data_source_config"]["schema"]["required"], json!(["item", "sample"]));
    let runs = format!("{EVALS}/{}/runs", id(&eval));
    let questions = ["one", "two", "three"];
    for (model, passes) in [("tuned", 3), ("tiny-llama", 0)] {
        // The label is what the adapter says in a chat.
        let rows = questions.map(|question| {
            let asked = json!({"temperature": 0, "max_tokens": 12});
            row(question, &server.text(&chat("tuned", &format!("Q: {question}"), asked)))
        });
        let run = created(&server, &runs, &completions(model, &rows));
        assert_eq!(run["object"], "eval.run");
        assert_eq!(run["data_source"]["source"]["content"], json!(rows));
        let run = ended(&server, &format!("{runs}/{}", id(&run)));
        assert_eq!(run["status"], "completed", "{run}");
        let counts = &run["result_counts"];
        assert_eq!(
            *counts,
            json!({"total": 3, "errored": 0, "failed": 3 - passes, "passed": passes})
        );
        let usage = &run["per_model_usage"][0];
        assert_eq!((&usage["model_name"], &usage["invocation_count"]), (&json!(model), &json!(3)));
        assert!(usage["total_tokens"].as_u64().unwrap() > 30, "{usage}");
        let exact = &run["per_testing_criteria_results"][0];
        assert_eq!(
            (&exact["testing_criteria"], &exact["passed"]),
            (&json!("exact"), &json!(passes))
        );

        let items = all(&server, &format!("{runs}/{}/output_items", id(&run)), 2);
        assert_eq!(items.len(), 3);
        for item in &items {
            let index = item["datasource_item_id"].as_u64().unwrap() as usize;
            assert_eq!(item["datasource_item"], rows[index]["item"]);
            assert_eq!(item["status"], if passes > 0 { "pass" } else { "fail" });
            assert_eq!(item["results"][0]["score"], f64::from(u8::from(passes > 0)));
            let sample = &item["sample"];
            assert_eq!(sample["input"][0]["content"], format!("Q: {}", questions[index]));
            assert_eq!(sample["output"][0]["role"], "assistant");
            assert_eq!((&sample["model"], &sample["seed"]), (&json!(model), &json!(42)));
        }
        let one = server.get(&format!("{runs}/{}/output_items/{}", id(&run), id(&items[1])));
        assert_eq!(one.json(), items[1]);
    }
    let failed = format!("{runs}?status=failed");
    assert_eq!(server.get(&failed).json()["data"], json!([]));
    assert_eq!(all(&server, &runs, 1).len(), 2);
}

#[test]
fn given_answers_are_graded_and_a_row_without_one_is_an_error_of_its_own() {
    let dir = TempDir::new();
    let server = start(&fixture("tiny-llama"), &dir);
    let eval = created(&server, EVALS, &definition());
    let with = |answer: Value| json!({"item": row("q", "yes")["item"], "sample": answer});
    let rows = [
        with(json!("yes")),
        with(json!({"output_text": "no"})),
        with(json!({"choices": [{"message": {"content": "yes"}}]})),
        row("q", "yes"),
    ];
    let runs = format!("{EVALS}/{}/runs", id(&eval));
    let run = created(&server, &runs, &jsonl(&rows));
    assert_eq!((&run["status"], &run["model"]), (&json!("queued"), &Value::Null));
    let run = ended(&server, &format!("{runs}/{}", id(&run)));
    let counts = json!({"total": 4, "errored": 1, "failed": 1, "passed": 2});
    assert_eq!((&run["status"], &run["result_counts"]), (&json!("completed"), &counts));
    let items = format!("{runs}/{}/output_items", id(&run));
    let errors = server.get(&format!("{items}?status=error")).json();
    assert_eq!(errors["data"][0]["datasource_item_id"], 3);
    let message = errors["data"][0]["results"][0]["error"]["message"].as_str().unwrap();
    assert!(message.contains("`sample` has no `output_text`"), "{message}");
    assert_eq!(server.get(&format!("{items}?status=failed")).json()["data"][0]["status"], "fail");
}

#[test]
fn rows_come_from_a_file_and_messages_from_a_row() {
    let dir = TempDir::new();
    let lines = "{\"item\": {\"question\": \"q\", \"label\": \"l\", \"chat\": [{\"role\": \"user\", \
                 \"content\": \"Hi\"}]}}\r\n\n{\"question\": \"r\", \"label\": \"l\", \"chat\": 3}\n";
    put_file(&dir, "file-rows", "evals", lines);
    put_file(&dir, "file-batch", "batch", lines);
    put_file(&dir, "file-bad", "evals", "{\"item\": {\"question\": 1, \"label\": \"l\"}}\n");
    let server = start(&fixture("tiny-llama"), &dir);
    let eval = created(&server, EVALS, &definition());
    let runs = format!("{EVALS}/{}/runs", id(&eval));
    let body = |file: &str| {
        let mut body = completions("tuned", &[]);
        let source = &mut body["data_source"];
        source["source"] = json!({"type": "file_id", "id": file});
        source["input_messages"] = json!({"type": "item_reference", "item_reference": "item.chat"});
        body
    };
    let run = created(&server, &runs, &body("file-rows"));
    assert_eq!(run["data_source"]["source"], json!({"type": "file_id", "id": "file-rows"}));
    let run = ended(&server, &format!("{runs}/{}", id(&run)));
    let counts = json!({"total": 2, "errored": 1, "failed": 1, "passed": 0});
    assert_eq!(run["result_counts"], counts, "{run}");
    let items = all(&server, &format!("{runs}/{}/output_items", id(&run)), 100);
    let broken = items.iter().find(|item| item["status"] == "error").unwrap();
    assert_eq!(broken["sample"]["error"]["code"], "sample_error");
    for (file, status, part) in [
        ("file-none", 404, "file-none"),
        ("file-batch", 400, "purpose"),
        ("file-bad", 400, "must be string"),
    ] {
        let answer = server.post(&runs, &body(file));
        assert_eq!(answer.status, status, "{answer:?}");
        assert!(answer.text().contains(part), "{answer:?}");
    }
}

/// Puts a file into the data folder of a server that does not run.
fn put_file(dir: &TempDir, id: &str, purpose: &str, text: &str) {
    let data = dir.join("data");
    let store = Store::open(&data).unwrap();
    fs::create_dir_all(data.join("blobs")).unwrap();
    let sha256 = tunesmith::publish::sha256_hex(&[text.as_bytes()]);
    fs::write(data.join("blobs").join(&sha256), text).unwrap();
    let file: FileRecord = serde_json::from_value(json!({
        "id": id, "bytes": text.len(), "created_at": 1, "expires_at": null,
        "filename": "rows.jsonl", "purpose": purpose, "sha256": sha256,
    }))
    .unwrap();
    store.write::<_, StoreError>(|tx| tx.insert(&file)).unwrap();
}

#[test]
fn definitions_are_listed_changed_and_deleted_with_their_runs() {
    let dir = TempDir::new();
    let server = start(&fixture("tiny-llama"), &dir);
    let evals: Vec<Value> = (0..3).map(|_| created(&server, EVALS, &definition())).collect();
    assert_eq!(all(&server, EVALS, 2), evals);
    let newest = server.get("/v1/evals?order=desc&limit=1").json();
    assert_eq!((&newest["data"][0], &newest["has_more"]), (&evals[2], &json!(true)));
    let path = format!("{EVALS}/{}", id(&evals[0]));
    let changed = created(&server, &path, &json!({"name": "new", "metadata": {"k": "v"}}));
    assert_eq!((&changed["name"], &changed["metadata"]), (&json!("new"), &json!({"k": "v"})));
    assert_eq!(server.get(&path).json(), changed);
    let run = created(&server, &format!("{path}/runs"), &completions("tuned", &[row("q", "l")]));
    let run_path = format!("{path}/runs/{}", id(&run));
    ended(&server, &run_path);
    let again = server.post(&run_path, &json!({}));
    assert_eq!((again.status, &again.json()["error"]["param"]), (400, &json!("run_id")));
    let other = format!("{EVALS}/{}/runs/{}", id(&evals[1]), id(&run));
    assert_eq!(server.get(&other).status, 404, "a run belongs to its evaluation");
    let deleted = server.request("DELETE", &path, &[], b"").json();
    assert_eq!(
        deleted,
        json!({"object": "eval.deleted", "deleted": true, "eval_id": id(&evals[0])})
    );
    assert_eq!(server.get(&path).status, 404);
    assert_eq!(server.get(&run_path).status, 404);
    assert_eq!(server.request("DELETE", &path, &[], b"").status, 404);
    assert_eq!(all(&server, EVALS, 100), evals[1..]);
}

#[test]
fn mistakes_are_400_with_their_place_and_nothing_is_stored() {
    let dir = TempDir::new();
    let server = start(&fixture("tiny-llama"), &dir);
    let with = |mut body: Value, pointer: &str, value: Value| {
        *body.pointer_mut(pointer).unwrap() = value;
        body
    };
    let judge = json!([{"type": "score_model", "name": "j", "model": "gpt-none",
        "input": [{"role": "user", "content": "x"}]}]);
    let python =
        json!([{"type": "python", "name": "p", "source": "def grade(sample, item): pass"}]);
    let config = "/data_source_config";
    for (body, status, param) in [
        (json!({}), 400, "data_source_config.type"),
        (
            with(definition(), &format!("{config}/type"), json!("logs")),
            400,
            "data_source_config.type",
        ),
        (
            with(definition(), &format!("{config}/item_schema"), json!(1)),
            400,
            "data_source_config.item_schema",
        ),
        (with(definition(), "/testing_criteria", json!([])), 400, "testing_criteria"),
        (
            with(definition(), "/testing_criteria/1/evaluation_metric", json!("cosine")),
            400,
            "testing_criteria[1].evaluation_metric",
        ),
        (with(definition(), "/testing_criteria", judge), 404, "model"),
        (with(definition(), "/testing_criteria", python), 400, "testing_criteria[0].type"),
        (with(definition(), "/name", json!(3)), 400, "name"),
        (with(definition(), "/metadata", json!({"k": 1})), 400, "metadata"),
    ] {
        let answer = server.post(EVALS, &body);
        assert_eq!(answer.status, status, "{body}: {answer:?}");
        assert_eq!(answer.json()["error"]["param"], param, "{answer:?}");
    }
    assert_eq!(all(&server, EVALS, 100), Vec::<Value>::new());

    let eval = created(&server, EVALS, &definition());
    let runs = format!("{EVALS}/{}/runs", id(&eval));
    let good = completions("tuned", &[row("q", "l")]);
    let source = "/data_source";
    for (pointer, value, status, param) in [
        ("", json!({}), 400, "data_source.type"),
        ("/type", json!("responses"), 400, "data_source.type"),
        ("/model", json!(""), 400, "data_source.model"),
        ("/model", json!("gpt-none"), 404, "model"),
        ("/input_messages", json!({}), 400, "data_source.input_messages.type"),
        ("/input_messages/template", json!([]), 400, "data_source.input_messages.template"),
        (
            "/input_messages/template/0/role",
            json!("x"),
            400,
            "data_source.input_messages.template[0].role",
        ),
        ("/sampling_params", json!({"top_p": 2}), 400, "data_source.sampling_params.top_p"),
        ("/source", json!({}), 400, "data_source.source.type"),
        ("/source", json!({"type": "stored_completions"}), 400, "data_source.source.type"),
        ("/source/content", json!([]), 400, "data_source.source"),
        ("/source/content", json!(["x"]), 400, "data_source.source.content[0]"),
        ("/source/content", json!([{"item": 3}]), 400, "data_source.source.content[0].item"),
        ("/source/content/0/item/label", json!(3), 400, "data_source.source.content[0].item.label"),
    ] {
        let body = with(good.clone(), &format!("{source}{pointer}"), value);
        let answer = server.post(&runs, &body);
        assert_eq!(answer.status, status, "{body}: {answer:?}");
        assert_eq!(answer.json()["error"]["param"], param, "{body}: {answer:?}");
    }
    assert_eq!(all(&server, &runs, 100), Vec::<Value>::new());
    assert_eq!(server.post("/v1/evals/eval_none/runs", &good).status, 404);
    for query in ["limit=0", "limit=x", "order=up"] {
        assert_eq!(server.get(&format!("{runs}?{query}")).status, 400, "{query}");
    }
}

#[test]
fn a_run_outlives_a_killed_server_and_asks_no_row_twice() {
    let dir = TempDir::new();
    let model = endless_model(&dir.0);
    let rows: Vec<Value> = (0..40).map(|number| row(&number.to_string(), "l")).collect();
    let mut body = completions("tuned", &rows);
    body["data_source"]["sampling_params"]["max_completion_tokens"] = json!(60);
    let server = start(&model, &dir);
    let eval = created(&server, EVALS, &definition());
    let runs = format!("{EVALS}/{}/runs", id(&eval));
    let run = created(&server, &runs, &body);
    let path = format!("{runs}/{}", id(&run));
    let first = loop {
        let done = all(&server, &format!("{path}/output_items"), 100);
        if done.len() >= 5 {
            break done;
        }
        thread::sleep(Duration::from_millis(5));
    };
    assert!(first.len() < 40, "the run must be under way: make it longer");
    drop(server); // Killed, not asked.

    let server = start(&model, &dir);
    let run = ended(&server, &path);
    let counts = json!({"total": 40, "errored": 0, "failed": 40, "passed": 0});
    assert_eq!((&run["status"], &run["result_counts"]), (&json!("completed"), &counts), "{run}");
    assert_eq!(run["per_model_usage"][0]["invocation_count"], 40);
    let items = all(&server, &format!("{path}/output_items"), 7);
    assert_eq!(items[..first.len()], first, "what was on record stays");
    let mut indices: Vec<u64> =
        items.iter().map(|item| item["datasource_item_id"].as_u64().unwrap()).collect();
    indices.sort_unstable();
    assert_eq!(indices, (0..40).collect::<Vec<u64>>());
}

#[test]
fn a_run_is_cancelled_or_deleted_under_way_and_the_next_one_begins() {
    let dir = TempDir::new();
    let server = start(&endless_model(&dir.0), &dir);
    let eval = created(&server, EVALS, &definition());
    let runs = format!("{EVALS}/{}/runs", id(&eval));
    let long = |tokens: u64| {
        let rows: Vec<Value> = (0..200).map(|number| row(&number.to_string(), "l")).collect();
        let mut body = completions("tuned", &rows);
        body["data_source"]["sampling_params"]["max_completion_tokens"] = json!(tokens);
        body
    };
    let path = |run: &Value| format!("{runs}/{}", id(run));
    let first = created(&server, &runs, &long(300));
    let second = created(&server, &runs, &long(300));
    let third = created(&server, &runs, &jsonl(&[row("q", "l")]));
    server.wait_until("the first run is under way", |server| {
        server.get(&path(&first)).json()["status"] == "in_progress"
    });
    // OpenAI's clients send no body.
    let json = [("Content-Type", "application/json")];
    let canceled = server.request("POST", &path(&first), &json, b"");
    assert_eq!(canceled.json()["status"], "canceled", "{canceled:?}");
    server.wait_until("the second run is under way", |server| {
        server.get(&path(&second)).json()["status"] == "in_progress"
    });
    let deleted = server.request("DELETE", &path(&second), &json, b"").json();
    assert_eq!(deleted["object"], "eval.run.deleted");
    assert_eq!(server.get(&path(&second)).status, 404);
    assert_eq!(ended(&server, &path(&third))["status"], "completed");
    assert_eq!(server.get(&path(&first)).json()["status"], "canceled");
    let fourth = created(&server, &runs, &long(300));
    let canceled = server.request("POST", &format!("{}/cancel", path(&fourth)), &json, b"");
    assert_eq!(canceled.json()["status"], "canceled", "{canceled:?}");
    server.wait_until("the engine is idle", |server| {
        server.metric("vllm:num_requests_running").is_none_or(|running| running == 0.0)
    });
}

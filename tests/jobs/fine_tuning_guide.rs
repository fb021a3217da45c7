//! The steps of OpenAI's fine-tuning guide against a running server, from the upload to the chat with the
//! tuned model, under OpenAI's addresses and under Azure's.

use std::{thread::sleep, time::Duration};

use crate::common::{
    Server, TempDir, chat, fixture,
    form::{FORM, field, file, form},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};

const QUESTIONS: [(&str, &str); 2] = [("add", "yes"), ("say", "no")];

/// An address of the API in the form of one of the two providers.
struct Provider {
    server: Server,
    prefix: &'static str,
    suffix: &'static str,
}

impl Provider {
    fn path(&self, path: &str) -> String {
        let mark = if path.contains('?') && !self.suffix.is_empty() { '&' } else { '?' };
        let suffix = self.suffix.replace('?', &mark.to_string());
        format!("{}{path}{suffix}", self.prefix)
    }

    fn get(&self, path: &str) -> Value {
        let response = self.server.get(&self.path(path));
        assert_eq!(response.status, 200, "{path}: {response:?}");
        response.json()
    }

    fn delete(&self, path: &str) -> Value {
        // The clients send their content type with an empty body.
        let response =
            self.server.request("DELETE", &self.path(path), &[crate::common::server::JSON], b"");
        assert_eq!(response.status, 200, "{path}: {response:?}");
        response.json()
    }

    fn upload(&self, name: &str, rows: &str) -> String {
        let body = form(&[field("purpose", "fine-tune"), file("file", name, rows.as_bytes())]);
        let response = self.server.request("POST", &self.path("/files"), &[FORM], &body);
        assert_eq!(response.status, 200, "{response:?}");
        response.json()["id"].as_str().unwrap().to_owned()
    }

    /// Uploads, trains and waits: the job at its end.
    fn fine_tune(&self) -> Value {
        let (train, valid) =
            (self.upload("train.jsonl", &rows(5)), self.upload("v.jsonl", &rows(1)));
        let body = json!({
            "model": "tiny-llama", "training_file": train, "validation_file": valid, "suffix": "guide",
            "seed": 1,
            "hyperparameters": {"n_epochs": 40, "batch_size": 4, "learning_rate_multiplier": 100},
        });
        let created = self.server.post(&self.path("/fine_tuning/jobs"), &body);
        assert_eq!(created.status, 200, "{created:?}");
        let job = created.json();
        assert_eq!(job["status"], "validating_files");
        assert!(job["fine_tuned_model"].is_null() && job["error"].is_null(), "{job}");
        let path = format!("/fine_tuning/jobs/{}", job["id"].as_str().unwrap());
        loop {
            let job = self.get(&path);
            match job["status"].as_str().unwrap() {
                "succeeded" => return job,
                "failed" | "cancelled" => panic!("{job}"),
                _ => sleep(Duration::from_millis(50)),
            }
        }
    }

    /// Steps 4 to 6: events, results, checkpoints.
    fn look_at(&self, job: &Value, is_base64: bool) {
        let path = format!("/fine_tuning/jobs/{}", job["id"].as_str().unwrap());
        let events = self.get(&format!("{path}/events?limit=100"));
        let messages: Vec<&str> = events["data"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|e| e["message"].as_str())
            .collect();
        assert_eq!(messages[0], "The job has successfully completed");
        assert!(messages.iter().any(|m| m.starts_with("Serving parity")), "{messages:?}");

        let result = job["result_files"][0].as_str().unwrap();
        assert_eq!(self.get(&format!("/files/{result}"))["purpose"], "fine-tune-results");
        let content = self.server.get(&self.path(&format!("/files/{result}/content"))).body;
        let content = if is_base64 { STANDARD.decode(content).unwrap() } else { content };
        let table = String::from_utf8(content).unwrap();
        let header = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n1,";
        assert!(table.starts_with(header), "{table}");
        assert_eq!(table.lines().count(), 1 + 3 * 40, "a line for each step");

        let checkpoints = self.get(&format!("{path}/checkpoints"));
        let checkpoints = checkpoints["data"].as_array().unwrap();
        let steps: Vec<_> =
            checkpoints.iter().map(|c| c["step_number"].as_u64().unwrap()).collect();
        assert_eq!(steps, [120, 117, 114], "the last three epochs, newest first");
        let name = checkpoints[1]["fine_tuned_model_checkpoint"].as_str().unwrap();
        assert!(name.ends_with(":ckpt-step-117"), "{name}");
        self.server.chat(&chat(name, "add", json!({"max_tokens": 2})));
    }

    /// How many questions `model` answers right.
    fn right(&self, model: &str) -> usize {
        let ask = |question| self.server.text(&chat(model, question, json!({})));
        QUESTIONS.iter().filter(|(question, answer)| ask(question) == *answer).count()
    }
}

/// Each question so many times.
fn rows(times: usize) -> String {
    let row = |(question, answer): &(&str, &str)| {
        json!({"messages": [{"role": "user", "content": question},
            {"role": "assistant", "content": answer}]})
        .to_string()
            + "\n"
    };
    QUESTIONS.iter().cycle().take(QUESTIONS.len() * times).map(row).collect()
}

fn start(dir: &TempDir, prefix: &'static str, suffix: &'static str) -> Provider {
    let data = dir.join("data");
    let server = Server::start(&fixture("tiny-llama"), &["--data-dir", data.to_str().unwrap()]);
    Provider { server, prefix, suffix }
}

#[test]
fn the_guide_runs_from_the_upload_to_the_tuned_answer() {
    let dir = TempDir::new();
    let provider = start(&dir, "/v1", "");
    let job = provider.fine_tune();
    assert!(job["trained_tokens"].as_u64().unwrap() > 0 && job["finished_at"].is_u64(), "{job}");
    assert_eq!(job["hyperparameters"]["n_epochs"], 40);
    provider.look_at(&job, true);

    let model = job["fine_tuned_model"].as_str().unwrap();
    assert!(model.starts_with("ft:tiny-llama:tunesmith:guide:"), "{model}");
    assert_eq!((provider.right("tiny-llama"), provider.right(model)), (0, 2));
    let listed = |model: &str| {
        let models = provider.get("/models");
        models["data"].as_array().unwrap().iter().any(|card| card["id"] == model)
    };
    assert!(listed(model));
    assert_eq!(provider.delete(&format!("/models/{model}"))["deleted"], true);
    assert!(!listed(model));
    let gone = provider.server.post(crate::common::server::CHAT, &chat(model, "add", json!({})));
    assert_eq!(gone.status, 404, "{gone:?}");
    let file = job["training_file"].as_str().unwrap();
    assert_eq!(provider.delete(&format!("/files/{file}"))["deleted"], true);
}

#[test]
fn the_same_steps_run_under_azures_addresses() {
    let dir = TempDir::new();
    let provider = start(&dir, "/openai", "?api-version=2024-10-21");
    let job = provider.fine_tune();
    provider.look_at(&job, false);

    // A model is deployed before it is asked, and not deleted as long as it is.
    let model = job["fine_tuned_model"].as_str().unwrap();
    let group =
        "/subscriptions/s/resourceGroups/g/providers/Microsoft.CognitiveServices/accounts/a";
    let deployment = format!("{group}/deployments/recipes?api-version=2023-05-01");
    let body = json!({"sku": {"name": "standard", "capacity": 1},
        "properties": {"model": {"format": "OpenAI", "name": model, "version": "1"}}});
    let headers = [crate::common::server::JSON];
    let put = |method| {
        let body = body.to_string();
        provider.server.request(method, &deployment, &headers, body.as_bytes()).status
    };
    assert_eq!(put("PUT"), 201);
    let path = provider.path("/deployments/recipes/chat/completions");
    let mut question = chat("", "say", json!({}));
    question.as_object_mut().unwrap().remove("model");
    let answer = provider.server.post(&path, &question).json();
    assert_eq!(answer["choices"][0]["message"]["content"], "no", "{answer}");
    let refused = provider.server.request(
        "DELETE",
        &provider.path(&format!("/models/{model}")),
        &headers,
        b"",
    );
    assert_eq!(refused.status, 409, "{refused:?}");
    assert_eq!(put("DELETE"), 200);
    assert_eq!(provider.delete(&format!("/models/{model}"))["deleted"], true);
}

//! The program itself, started on a free port and stopped at the end of the test.

use std::{
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use serde_json::Value;

use super::http::{Exchange, Response};

/// Nothing that a test waits for takes longer than this, or it fails.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running `tunesmith serve`.
pub struct Server {
    process: Child,
    pub address: String,
    key: Option<String>,
    log: Option<JoinHandle<String>>,
}

/// A `tunesmith serve` that is not started. Nothing of the caller's environment reaches it.
pub fn command(model: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tunesmith"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("TUNESMITH_")) {
        command.env_remove(name);
    }
    command.args(["serve", "--port", "0", "--model"]).arg(model).args(args);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

impl Server {
    /// Starts the program and waits until it listens.
    pub fn start(model: &Path, args: &[&str]) -> Self {
        Self::from_command(command(model, args))
    }

    pub fn from_command(mut command: Command) -> Self {
        let mut process = command.spawn().unwrap();
        let mut stderr = BufReader::new(process.stderr.take().unwrap());
        let mut log = String::new();
        let address = loop {
            let start = log.len();
            assert!(stderr.read_line(&mut log).unwrap() > 0, "the server did not start:\n{log}");
            if let Some(address) = log[start..].trim().strip_prefix("listening on http://") {
                break address.to_owned();
            }
        };
        // Somebody has to read the rest, or the server would block on a full pipe.
        let reader = thread::spawn(move || {
            stderr.read_to_string(&mut log).unwrap();
            log
        });
        Self { process, address, key: None, log: Some(reader) }
    }

    /// Sends `key` with every request from here on.
    pub fn with_key(mut self, key: &str) -> Self {
        self.key = Some(key.to_owned());
        self
    }

    pub fn get(&self, path: &str) -> Response {
        self.request("GET", path, &[], b"")
    }

    pub fn post(&self, path: &str, body: &Value) -> Response {
        self.request("POST", path, &[JSON], body.to_string().as_bytes())
    }

    pub fn request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Response {
        self.exchange(method, path, headers, body).finish().unwrap()
    }

    /// Sends a chat request and reads only the answer's head.
    pub fn open_chat(&self, body: &Value) -> Exchange {
        self.exchange("POST", CHAT, &[JSON], body.to_string().as_bytes())
    }

    /// The answer to a chat request that must go well.
    pub fn chat(&self, body: &Value) -> Value {
        let response = self.post(CHAT, body);
        assert_eq!(response.status, 200, "{body}: {response:?}");
        response.json()
    }

    /// The text of the first choice.
    pub fn text(&self, body: &Value) -> String {
        let answer = self.chat(body);
        answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
    }

    /// All chunks of a streamed answer, which must end with `[DONE]`.
    pub fn stream(&self, body: &Value) -> Vec<Value> {
        let mut body = body.clone();
        body["stream"] = true.into();
        let mut exchange = self.open_chat(&body);
        assert_eq!(exchange.status, 200, "{body}");
        let mut events: Vec<String> = std::iter::from_fn(|| exchange.event()).collect();
        assert_eq!(events.pop().as_deref(), Some("[DONE]"));
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }

    /// The value of a gauge or counter on /metrics; `None` where it is absent.
    pub fn metric(&self, name: &str) -> Option<f64> {
        let page = self.get("/metrics");
        let line = page.text().lines().find(|line| line.starts_with(name))?.to_owned();
        line.rsplit(' ').next()?.parse().ok()
    }

    /// Waits until `condition` holds.
    pub fn wait_until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let started = Instant::now();
        while !condition(self) {
            assert!(started.elapsed() < PATIENCE, "waited in vain until {what}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Asks the program to stop.
    pub fn terminate(&self) {
        let pid = self.process.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    }

    /// Waits for the program's end: its status, and what it wrote to stderr.
    pub fn wait(mut self) -> (ExitStatus, String) {
        let started = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return (status, self.log.take().unwrap().join().unwrap());
            }
            assert!(started.elapsed() < PATIENCE, "the server does not end");
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn exchange(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Exchange {
        let bearer = self.key.as_ref().map(|key| format!("Bearer {key}"));
        let mut headers = headers.to_vec();
        headers.extend(bearer.as_ref().map(|bearer| ("Authorization", bearer.as_str())));
        Exchange::start(&self.address, method, path, &headers, body).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub const CHAT: &str = "/v1/chat/completions";
pub const JSON: (&str, &str) = ("Content-Type", "application/json");

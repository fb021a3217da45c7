//! The client of a running server, for the commands that ask one.

use std::{
    fs::File,
    io::{self, Cursor, IsTerminal, Read},
    path::Path,
    time::Duration,
};

use anyhow::{Context, ensure};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;
use ureq::{Agent, Body, RequestBuilder, http::Response};

use crate::jobs::new_id;

/// How long connecting may take, and how long a server may think.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The most bytes of an answer that is not a file.
const MAX_ANSWER_BYTES: u64 = 64 << 20;

/// Which server, and how to show what it says.
#[derive(Args, Debug)]
pub(super) struct ServerArgs {
    /// The server
    #[arg(long, env = "TUNESMITH_URL", default_value = "http://127.0.0.1:8000", global = true)]
    url: String,
    /// A key of the server; files and jobs need an admin key where there are any
    #[arg(long, env = "TUNESMITH_API_KEY", hide_env_values = true, global = true)]
    api_key: Option<String>,
    /// Print the server's answers as they are
    #[arg(long, global = true)]
    pub(super) json: bool,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClientError {
    /// The server's own words.
    #[error("{message}")]
    Refused {
        /// Of the answer.
        status: u16,
        /// `error.message`, or the body.
        message: String,
    },
    /// There is no server, or it went away.
    #[error("{url}: {error}")]
    Unreachable {
        /// The server.
        url: String,
        /// What happened.
        error: Box<ureq::Error>,
    },
    /// An answer that is no JSON.
    #[error("{url} does not answer as this server would")]
    Strange {
        /// The server.
        url: String,
    },
}

impl ClientError {
    /// Whether the same may go well after a while: the server starts anew, or is full.
    pub(super) fn is_passing(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            Self::Refused { status, .. } => matches!(status, 429 | 500..),
            Self::Strange { .. } => false,
        }
    }
}

/// Asks one server.
pub(super) struct Client {
    agent: Agent,
    url: String,
    key: Option<String>,
}

impl Client {
    pub(super) fn new(args: &ServerArgs) -> Self {
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(TIMEOUT))
            .timeout_recv_response(Some(TIMEOUT))
            .user_agent(concat!("tunesmith/", env!("CARGO_PKG_VERSION")))
            .build()
            .into();
        // As OpenAI's clients are given it, or without the version.
        let url = args.url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        Self { agent, url, key: args.api_key.clone() }
    }

    pub(super) fn get(&self, path: &str) -> Result<Value, ClientError> {
        let request = self.with_key(self.agent.get(self.at(path)));
        self.json(request.call())
    }

    pub(super) fn delete(&self, path: &str) -> Result<Value, ClientError> {
        let request = self.with_key(self.agent.delete(self.at(path)));
        self.json(request.call())
    }

    pub(super) fn post(&self, path: &str, body: &Value) -> Result<Value, ClientError> {
        let request = self.with_key(self.agent.post(self.at(path)));
        self.json(request.header("content-type", "application/json").send(body.to_string()))
    }

    /// Every object of a list, page by page, at most `limit`.
    pub(super) fn list(&self, path: &str, limit: usize) -> Result<Vec<Value>, ClientError> {
        let mut objects: Vec<Value> = Vec::new();
        loop {
            let page = limit.saturating_sub(objects.len()).clamp(1, 100);
            let joint = if path.contains('?') { '&' } else { '?' };
            let after = objects.last().and_then(|object| object["id"].as_str());
            let after = after.map_or(String::new(), |id| format!("&after={}", escaped(id)));
            let answer = self.get(&format!("{path}{joint}limit={page}{after}"))?;
            let found = answer["data"].as_array().cloned().unwrap_or_default();
            let is_last = found.is_empty() || answer["has_more"] != true;
            objects.extend(found);
            if is_last || objects.len() >= limit {
                objects.truncate(limit);
                return Ok(objects);
            }
        }
    }

    /// What `path` sends, as it comes.
    pub(super) fn download(&self, path: &str) -> Result<impl Read + use<>, ClientError> {
        let request = self.with_key(self.agent.get(self.at(path)));
        Ok(self.checked(request.call())?.into_body().into_reader())
    }

    /// Uploads a file, with a bar on a terminal.
    pub(super) fn upload(&self, path: &Path, purpose: &str) -> anyhow::Result<Value> {
        let file = File::open(path).with_context(|| path.display().to_string())?;
        let metadata = file.metadata()?;
        ensure!(metadata.is_file(), "{} is not a file", path.display());
        let name =
            path.file_name().unwrap_or_default().to_string_lossy().replace(['"', '\r', '\n'], "_");
        let boundary = new_id("tunesmith-");
        let head = format!(
            "--{boundary}\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\n{purpose}\r\n\
             --{boundary}\r\nContent-Disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\
             Content-Type: application/octet-stream\r\n\r\n"
        );
        let tail = format!("\r\n--{boundary}--\r\n");
        let bytes = metadata.len();
        let length = head.len() as u64 + bytes + tail.len() as u64;
        let bar = io::stderr().is_terminal().then(|| byte_bar(bytes, &name));
        let shown = Shown { file: file.take(bytes), bar: bar.clone() };
        let mut body = Cursor::new(head).chain(shown).chain(Cursor::new(tail));
        let request = self.with_key(self.agent.post(self.at("/v1/files")));
        let answer = request
            .header("content-type", format!("multipart/form-data; boundary={boundary}"))
            .header("content-length", length)
            .send(ureq::SendBody::from_reader(&mut body));
        if let Some(bar) = bar {
            bar.finish_and_clear();
        }
        Ok(self.json(answer)?)
    }

    fn at(&self, path: &str) -> String {
        format!("{}{path}", self.url)
    }

    fn with_key<B>(&self, request: RequestBuilder<B>) -> RequestBuilder<B> {
        match &self.key {
            Some(key) => request.header("authorization", format!("Bearer {key}")),
            None => request,
        }
    }

    fn json(&self, answer: Result<Response<Body>, ureq::Error>) -> Result<Value, ClientError> {
        let mut response = self.checked(answer)?;
        let text = response.body_mut().with_config().limit(MAX_ANSWER_BYTES).read_to_string();
        let text = text.map_err(|error| self.unreachable(error))?;
        serde_json::from_str(&text).map_err(|_| ClientError::Strange { url: self.url.clone() })
    }

    fn checked(
        &self,
        answer: Result<Response<Body>, ureq::Error>,
    ) -> Result<Response<Body>, ClientError> {
        let mut response = answer.map_err(|error| self.unreachable(error))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let text = response.body_mut().read_to_string().unwrap_or_default();
        let error: Value = serde_json::from_str(&text).unwrap_or_default();
        let message = error["error"]["message"].as_str().map_or(text.trim(), str::trim);
        let message = if message.is_empty() {
            format!("{} answers with status {status}", self.url)
        } else {
            message.to_owned()
        };
        Err(ClientError::Refused { status: status.as_u16(), message })
    }

    fn unreachable(&self, error: ureq::Error) -> ClientError {
        ClientError::Unreachable { url: self.url.clone(), error: Box::new(error) }
    }
}

/// `text` as one part of a path or query.
pub(super) fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~:".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            escaped += &format!("%{byte:02X}");
        }
    }
    escaped
}

/// A file that moves its bar as it is read.
struct Shown<R> {
    file: R,
    bar: Option<ProgressBar>,
}

impl<R: Read> Read for Shown<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(buffer)?;
        if let Some(bar) = &self.bar {
            bar.inc(count as u64);
        }
        Ok(count)
    }
}

fn byte_bar(bytes: u64, name: &str) -> ProgressBar {
    let template = "{bar:30.blue/white} {binary_bytes}/{binary_total_bytes} {eta} left  {msg}";
    let style = ProgressStyle::with_template(template);
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(bytes).with_style(style).with_message(name.to_owned())
}

//! Who gets the figures of a run: a page for Prometheus and a push to an OTLP collector. Neither may ever
//! disturb the training, so whatever fails on the way is said once and otherwise left alone.

use std::{
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    thread::JoinHandle,
    time::Duration,
};

use anyhow::Context;
use ureq::Agent;

use super::figures::Figures;

/// A reader or a collector that takes longer is left alone.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Lines of a request that are looked at.
const MAX_LINES: usize = 100;

/// Answers `GET /metrics` on `address` as long as the process lives. Returns where it listens.
///
/// # Errors
/// The address cannot be had.
pub(super) fn serve(address: SocketAddr, figures: Figures) -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind(address)
        .with_context(|| format!("metrics_addr: cannot listen on {address}"))?;
    let address = listener.local_addr()?;
    std::thread::Builder::new().name("metrics".to_owned()).spawn(move || {
        for stream in listener.incoming().flatten() {
            if let Err(error) = answer(&stream, &figures) {
                tracing::debug!("a reader of the metrics went away: {error}");
            }
        }
    })?;
    Ok(address)
}

/// One request, one answer, and the connection is closed.
fn answer(mut stream: &TcpStream, figures: &Figures) -> std::io::Result<()> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    let mut lines = BufReader::new(stream).lines();
    let request = lines.next().transpose()?.unwrap_or_default();
    for line in lines.take(MAX_LINES) {
        if line?.is_empty() {
            break;
        }
    }
    let mut words = request.split_whitespace();
    let path = words.nth(1).unwrap_or_default();
    let (status, body) = match path.split('?').next() {
        Some("/metrics") => ("200 OK", figures.prometheus()),
        _ => ("404 Not Found", "the figures are at /metrics\n".to_owned()),
    };
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\ncontent-type: text/plain; version=0.0.4; charset=utf-8\r\n\
         content-length: {length}\r\nconnection: close\r\n\r\n{body}"
    )
}

/// Pushes the figures now and then, and once more when it is dropped.
pub(super) struct Pusher {
    /// Closed to end the thread.
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Pusher {
    /// To the collector at `url`, every `interval`; `output` names the run.
    ///
    /// # Errors
    /// No thread can be had.
    pub(super) fn start(
        url: &str,
        interval: Duration,
        output: String,
        figures: Figures,
    ) -> anyhow::Result<Self> {
        let url = endpoint(url);
        let (end, ended) = channel();
        let thread = std::thread::Builder::new()
            .name("otlp".to_owned())
            .spawn(move || push(&url, interval, &output, &figures, &ended))?;
        Ok(Self { end: Some(end), thread: Some(thread) })
    }
}

impl Drop for Pusher {
    fn drop(&mut self) {
        self.end = None;
        if let Some(thread) = self.thread.take() {
            // It takes no longer than one timeout, and a panic there is no news here.
            let _ = thread.join();
        }
    }
}

/// Until the other end of `ended` is gone.
fn push(url: &str, interval: Duration, output: &str, figures: &Figures, ended: &Receiver<()>) {
    let agent: Agent = Agent::config_builder().timeout_global(Some(TIMEOUT)).build().into();
    let mut complained = false;
    loop {
        let wait = ended.recv_timeout(interval);
        let body = figures.otlp(output).to_string();
        let sent = agent.post(url).header("content-type", "application/json").send(body);
        if let Err(error) = sent
            && !complained
        {
            complained = true;
            eprintln!("warning: otlp: {url}: {error}; training goes on without it");
        }
        if wait != Err(RecvTimeoutError::Timeout) {
            return;
        }
    }
}

/// OTLP's path, unless the URL has it.
fn endpoint(url: &str) -> String {
    const PATH: &str = "/v1/metrics";
    let url = url.trim_end_matches('/');
    if url.ends_with(PATH) { url.to_owned() } else { format!("{url}{PATH}") }
}

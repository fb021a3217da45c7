//! `tunesmith health`: the probe of a container without a shell or curl.

use std::{
    io::{Read, Write},
    net::{TcpStream, ToSocketAddrs},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, ensure};
use clap::Args;

/// How long connecting and answering may take, each.
const TIMEOUT: Duration = Duration::from_secs(3);

/// Ask a running server whether it is well; exit code 0 if it is
#[derive(Args, Debug)]
pub(super) struct HealthArgs {
    /// The server [default: http://127.0.0.1 with --port]
    #[arg(long)]
    url: Option<String>,
    /// Port of the server on this machine
    #[arg(long, env = "TUNESMITH_PORT", default_value_t = 8000)]
    port: u16,
    /// Ask whether it takes new requests (/ready) instead of whether it lives (/health)
    #[arg(long)]
    ready: bool,
}

/// Runs the command.
///
/// # Errors
/// No answer in time, or one with another status than 200.
pub(super) fn run(args: &HealthArgs) -> anyhow::Result<ExitCode> {
    let url = args.url.clone().unwrap_or_else(|| format!("http://127.0.0.1:{}", args.port));
    let path = if args.ready { "/ready" } else { "/health" };
    let status = status(&url, path).with_context(|| format!("{url}{path}"))?;
    ensure!(status == 200, "{url}{path} answers with status {status}");
    println!("ok");
    Ok(ExitCode::SUCCESS)
}

fn status(url: &str, path: &str) -> anyhow::Result<u16> {
    let host = url.strip_prefix("http://").context("expected http://HOST:PORT")?;
    let host = host.trim_end_matches('/');
    let address = host.to_socket_addrs()?.next().context("the host has no address")?;
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")?;
    // The status line is all that matters, and it is short.
    let mut head = Vec::new();
    stream.take(1024).read_to_end(&mut head)?;
    let head = String::from_utf8_lossy(&head);
    let status = head.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok());
    status.context("the answer is not HTTP")
}

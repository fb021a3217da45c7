//! `python` graders: the user's program in a process of its own.
//!
//! It has no environment, an empty folder, limits on time, memory, files and their size, and is ended
//! with all its children. It is not kept from the network or from what the server's user may read:
//! whoever switches these graders on trusts those who may write them.

use std::{
    io::{Read, Write},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use serde_json::{Value, json};

use super::new_id;
use crate::eval::grader::{Context, Fault, FaultKind};

/// What a server says that does not run them.
pub(super) const SWITCHED_OFF: &str =
    "python graders are off on this server: start it with --allow-python-graders";

/// The program around the user's.
const BOOTSTRAP: &str = include_str!("python_grader.py");
/// Longest run, in wall-clock time.
const TIME_LIMIT: Duration = Duration::from_secs(40);
/// Bytes of an answer.
const MAX_ANSWER_BYTES: u64 = 1 << 16;
/// How often a process is looked at.
const POLL: Duration = Duration::from_millis(5);

/// An empty folder, gone with the value.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> std::io::Result<Self> {
        let path = std::env::temp_dir().join(new_id("tunesmith-grader-"));
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The score that the program gives.
pub(super) fn grade(
    source: &str,
    context: &Context,
    should_stop: &dyn Fn() -> bool,
) -> Result<f64, Fault> {
    let broken =
        |error: std::io::Error| Fault::new(FaultKind::PythonServer, format!("python3: {error}"));
    let dir = Scratch::new().map_err(broken)?;
    let task = json!({"source": source, "sample": context.sample, "item": context.item});
    let answer = run(&dir.0, task.to_string().into_bytes(), should_stop).map_err(broken)??;
    let answer: Value = serde_json::from_slice(&answer).unwrap_or_default();
    match (answer["score"].as_f64(), answer["error"].as_str()) {
        (Some(score), _) => Ok(score),
        (None, Some(error)) => Err(Fault::new(FaultKind::PythonRuntime, error.trim())),
        (None, None) => {
            let message = "the program ended without a score: it may have met a limit";
            Err(Fault::new(FaultKind::PythonRuntime, message))
        }
    }
}

fn run(
    dir: &Path,
    task: Vec<u8>,
    should_stop: &dyn Fn() -> bool,
) -> std::io::Result<Result<Vec<u8>, Fault>> {
    let mut command = Command::new("python3");
    command.args(["-I", "-c", BOOTSTRAP]).current_dir(dir).env_clear();
    command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).process_group(0);
    let mut child = command.spawn()?;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    // A program that ends early leaves its question unread; that shows in its answer.
    let writer = thread::spawn(move || {
        if let Some(mut stdin) = stdin {
            let _ = stdin.write_all(&task);
        }
    });
    let reader = thread::spawn(move || {
        let mut answer = Vec::new();
        if let Some(stdout) = stdout {
            let _ = stdout.take(MAX_ANSWER_BYTES).read_to_end(&mut answer);
        }
        answer
    });
    let fault = wait(&child, should_stop);
    // Before the process is reaped, so that the group's number is still its own.
    let pid = Pid::from_child(&child);
    if let Err(error) = kill_process_group(pid, Signal::KILL) {
        tracing::debug!("a python grader's group could not be ended: {error}");
    }
    child.wait()?;
    let _ = writer.join();
    let answer = reader.join().unwrap_or_default();
    Ok(match fault {
        Some(fault) => Err(fault),
        None => Ok(answer),
    })
}

/// Waits for the end without reaping; why the process is to be ended, if it does not end itself.
fn wait(child: &Child, should_stop: &dyn Fn() -> bool) -> Option<Fault> {
    let started = Instant::now();
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
    loop {
        match waitid(WaitId::Pid(Pid::from_child(child)), options) {
            Ok(None) | Err(rustix::io::Errno::INTR) => {}
            Ok(Some(_)) | Err(_) => return None,
        }
        if should_stop() {
            return Some(Fault::new(FaultKind::Interrupted, "the server is shutting down"));
        }
        if started.elapsed() > TIME_LIMIT {
            let seconds = TIME_LIMIT.as_secs();
            let message = format!("the program took longer than {seconds} seconds");
            return Some(Fault::new(FaultKind::PythonRuntime, message));
        }
        thread::sleep(POLL);
    }
}

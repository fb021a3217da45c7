//! A child process of a job: on a leash, at the lowest priority, its output read line by line.

use std::{
    collections::VecDeque,
    ffi::OsStr,
    fs::{self, File},
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process, setpriority_process};

/// How long a child that was told to stop may take for its checkpoint.
const STOP_LIMIT: Duration = Duration::from_secs(60);
/// Longest line that is kept whole; what is longer comes in pieces.
const MAX_LINE: u64 = 4 << 20;
/// Lines that may wait to be looked at before the child has to wait.
const MAX_WAITING_LINES: usize = 1024;
/// Size at which a log file takes no more.
const MAX_LOG: u64 = 1 << 20;
/// Last lines of the log that are kept in memory.
const LAST_LINES: usize = 20;
/// The variable that chooses the arithmetic.
const KERNELS: &str = "TUNESMITH_KERNELS";
/// The lowest priority there is.
const NICENESS: i32 = 19;

/// A running child. Dropping it ends it.
pub(super) struct JobProcess {
    process: Child,
    /// The child's standard input: when this process dies, the child's input ends.
    leash: Option<ChildStdin>,
    lines: Receiver<String>,
    log: Option<JoinHandle<Vec<String>>>,
    /// When it was told to stop.
    stopping: Option<Instant>,
}

/// What came of waiting for a line.
pub(super) enum Heard {
    /// A line, without its end.
    Line(String),
    /// Nothing in the time given.
    Nothing,
    /// There will be no more.
    End,
}

/// How a child ended.
pub(super) struct Ended {
    /// Its exit code or signal.
    pub(super) status: ExitStatus,
    /// The last lines of its log.
    pub(super) log: Vec<String>,
}

impl JobProcess {
    /// Starts `program`, whose standard error is added to the file `log`. No settings of this process
    /// reach it through the environment, but for the kernels: both must round alike.
    pub(super) fn spawn(
        program: &Path,
        args: &[&OsStr],
        log: &Path,
        memory: Option<u64>,
    ) -> io::Result<Self> {
        let mut command = Command::new(program);
        let ours = |name: &OsStr| {
            let name = name.to_string_lossy();
            name.starts_with("TUNESMITH_") && name != KERNELS
        };
        for (name, _) in std::env::vars_os().filter(|(name, _)| ours(name)) {
            command.env_remove(name);
        }
        // A process that is out of memory has none for a backtrace, and would hang.
        command.env_remove("RUST_BACKTRACE");
        // A Ctrl-C at the server's terminal is for the server, which then tells its children.
        command.args(args).process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = command.spawn()?;
        limit(&process, memory);
        let (stdout, stderr) = (process.stdout.take(), process.stderr.take());
        let (sender, lines) = mpsc::sync_channel(MAX_WAITING_LINES);
        let read_lines = move || {
            each_line(stdout.expect("is piped"), |line| sender.send(line).is_ok());
        };
        let log = log.to_owned();
        let read_log = move || keep_log(stderr.expect("is piped"), &log);
        // From here on dropping it ends it, should a thread not be had.
        let leash = process.stdin.take();
        let mut child = Self { process, leash, lines, log: None, stopping: None };
        thread::Builder::new().name("job-output".to_owned()).spawn(read_lines)?;
        child.log = Some(thread::Builder::new().name("job-log".to_owned()).spawn(read_log)?);
        Ok(child)
    }

    /// Waits for a line, at most `limit`. A child that was told to stop and does not is killed here.
    pub(super) fn hear(&mut self, limit: Duration) -> Heard {
        if self.stopping.is_some_and(|since| since.elapsed() > STOP_LIMIT) {
            self.kill();
        }
        match self.lines.recv_timeout(limit) {
            Ok(line) => Heard::Line(line),
            Err(RecvTimeoutError::Timeout) => Heard::Nothing,
            Err(RecvTimeoutError::Disconnected) => Heard::End,
        }
    }

    /// Tells it once to stop; it leaves a checkpoint.
    pub(super) fn stop(&mut self) {
        if self.stopping.is_none() {
            self.stopping = Some(Instant::now());
            let signalled = kill_process(self.pid(), Signal::TERM);
            if let Err(error) = signalled {
                tracing::debug!("a job's process cannot be told to stop: {error}");
            }
        }
    }

    /// Ends it at once.
    pub(super) fn kill(&mut self) {
        // It may have ended already.
        let _ = self.process.kill();
    }

    /// Waits for its end, which is near once its output has ended.
    pub(super) fn wait(mut self) -> io::Result<Ended> {
        let since = Instant::now();
        let status = loop {
            if let Some(status) = self.process.try_wait()? {
                break status;
            }
            if since.elapsed() > STOP_LIMIT {
                self.kill();
            }
            thread::sleep(Duration::from_millis(5));
        };
        self.leash = None;
        let log = self.log.take().map(JoinHandle::join);
        Ok(Ended { status, log: log.and_then(Result::ok).unwrap_or_default() })
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.process)
    }
}

impl Drop for JobProcess {
    fn drop(&mut self) {
        if let Ok(None) = self.process.try_wait() {
            self.kill();
            // Killed, so this is short; and it leaves no zombie.
            let _ = self.process.wait();
        }
    }
}

/// Lowers the priority and bounds the memory from outside, for every program that a job may run. Where
/// the system does not allow it, the job runs all the same.
fn limit(process: &Child, memory: Option<u64>) {
    let pid = Some(Pid::from_child(process));
    if let Err(error) = setpriority_process(pid, NICENESS) {
        tracing::debug!("the priority of a job's process cannot be lowered: {error}");
    }
    #[cfg(target_os = "linux")]
    if let Some(bytes) = memory {
        use rustix::process::{Resource, Rlimit, prlimit};
        let limit = Rlimit { current: Some(bytes), maximum: Some(bytes) };
        if let Err(error) = prlimit(pid, Resource::Data, limit) {
            tracing::warn!("the memory of a job's process cannot be bounded: {error}");
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = memory;
}

/// Calls `take` with each line until it wants no more.
fn each_line(from: impl Read, mut take: impl FnMut(String) -> bool) {
    let mut reader = BufReader::new(from);
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        match reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut bytes) {
            Ok(0) | Err(_) => return,
            Ok(_) => {
                let line = String::from_utf8_lossy(&bytes);
                if !take(line.trim_end_matches('\n').to_owned()) {
                    return;
                }
            }
        }
    }
}

/// Adds what comes to the file at `path` until that is large, and returns the last lines.
fn keep_log(from: impl Read, path: &Path) -> Vec<String> {
    let file = File::options().create(true).append(true).open(path);
    let mut room = MAX_LOG.saturating_sub(fs::metadata(path).map_or(0, |meta| meta.len()));
    let mut file = file.ok();
    let mut last = VecDeque::new();
    each_line(from, |line| {
        if let Some(open) = &mut file
            && (line.len() as u64) < room
        {
            room -= line.len() as u64 + 1;
            // A full disk must not keep the child from being heard.
            if writeln!(open, "{line}").is_err() {
                file = None;
            }
        }
        if last.len() == LAST_LINES {
            last.pop_front();
        }
        last.push_back(line.chars().take(500).collect());
        true
    });
    last.into()
}

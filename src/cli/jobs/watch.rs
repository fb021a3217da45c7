//! `tunesmith jobs watch`: a job as it goes, a bar on a terminal, plain lines elsewhere.

use std::{
    collections::HashSet,
    io::IsTerminal,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};
use serde_json::Value;

use super::{number, path_of};
use crate::cli::{
    client::{Client, ClientError},
    files::text,
    output,
};
use crate::jobs::unix_seconds;

/// How often the server is asked.
const POLL: Duration = Duration::from_millis(500);

/// How long the server may be away: long enough for a restart with a large model.
const PATIENCE: Duration = Duration::from_secs(15 * 60);

/// Plain lines about steps come at most this often.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Events that are asked for at once.
const PAGE: usize = 100;

/// Follows a job to its end: 0 if it succeeded.
pub(super) fn watch(client: &Client, id: &str, is_json: bool) -> anyhow::Result<ExitCode> {
    let mut display = Display::new(is_json);
    let mut seen = HashSet::new();
    loop {
        // The job first: then the events of its end are among those that are read below.
        let job = patiently(|| client.get(&path_of(id, "")), &display)?;
        let events = patiently(|| new_events(client, id, &seen), &display)?;
        for event in events {
            display.event(&event);
            seen.insert(text(&event, "id").to_owned());
        }
        display.job(&job);
        if output::is_lost() {
            return Ok(ExitCode::SUCCESS);
        }
        let status = text(&job, "status");
        if ["succeeded", "failed", "cancelled"].contains(&status) {
            display.end(id, &job);
            let is_good = status == "succeeded";
            return Ok(if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        thread::sleep(POLL);
    }
}

/// Events that were not shown yet, the oldest first.
fn new_events(
    client: &Client,
    id: &str,
    seen: &HashSet<String>,
) -> Result<Vec<Value>, ClientError> {
    let mut limit = PAGE;
    loop {
        let events = client.list(&path_of(id, "/events"), limit)?;
        let count = events.len();
        let mut new: Vec<Value> =
            events.into_iter().take_while(|event| !seen.contains(text(event, "id"))).collect();
        if new.len() < count || count < limit {
            new.reverse();
            return Ok(new);
        }
        limit *= 4;
    }
}

/// Asks again while the server is away for a moment.
fn patiently<T>(
    ask: impl Fn() -> Result<T, ClientError>,
    display: &Display,
) -> Result<T, ClientError> {
    let mut gone_since: Option<Instant> = None;
    loop {
        match ask() {
            Err(error) if error.is_passing() => {
                let since = gone_since.unwrap_or_else(|| {
                    display.say(&format!("{error}; trying again"));
                    Instant::now()
                });
                if since.elapsed() > PATIENCE {
                    return Err(error);
                }
                gone_since = Some(since);
                thread::sleep(POLL);
            }
            answer => return answer,
        }
    }
}

struct Display {
    /// The bar; `None` where nobody looks at a terminal.
    bar: Option<ProgressBar>,
    is_json: bool,
    valid_loss: Option<f64>,
    last_line: Option<Instant>,
    estimated_finish: Option<u64>,
}

impl Display {
    fn new(is_json: bool) -> Self {
        let bar = (!is_json && std::io::stderr().is_terminal()).then(|| {
            let style = ProgressStyle::with_template("{bar:30.blue/white} {pos}/{len} {msg}");
            ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Self { bar, is_json, valid_loss: None, last_line: None, estimated_finish: None }
    }

    fn event(&mut self, event: &Value) {
        if self.is_json {
            println!("{event}");
        } else if event["type"] == "metrics" {
            self.metrics(event);
        } else {
            self.say(text(event, "message"));
        }
    }

    fn metrics(&mut self, event: &Value) {
        let data = &event["data"];
        let valid = data["full_valid_loss"].as_f64().or(data["valid_loss"].as_f64());
        self.valid_loss = valid.or(self.valid_loss);
        let (step, total) = (data["step"].as_u64().unwrap_or(0), data["total_steps"].as_u64());
        if let Some(bar) = &self.bar {
            bar.set_length(total.unwrap_or(step));
            bar.set_position(step);
            let valid = number("  valid loss", &self.valid_loss.into());
            bar.set_message(format!(
                "{}{valid}{}",
                number("loss", &data["train_loss"]),
                self.left()
            ));
            return;
        }
        let is_due = self.last_line.is_none_or(|last| last.elapsed() >= LINE_INTERVAL);
        if is_due || Some(step) == total || valid.is_some() {
            self.last_line = Some(Instant::now());
            println!("{}{}", text(event, "message"), self.left());
        }
    }

    fn job(&mut self, job: &Value) {
        self.estimated_finish = job["estimated_finish"].as_u64();
    }

    fn left(&self) -> String {
        self.estimated_finish.map_or(String::new(), |at| {
            let left = Duration::from_secs(at.saturating_sub(unix_seconds()));
            format!("  {:#} left", HumanDuration(left))
        })
    }

    fn end(&self, id: &str, job: &Value) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        if self.is_json {
            println!("{job}");
            return;
        }
        println!("{id}: {}", text(job, "status"));
        if let Some(model) = job["fine_tuned_model"].as_str() {
            println!("model: {model}");
        }
        for file in job["result_files"].as_array().into_iter().flatten() {
            println!("results: {}", file.as_str().unwrap_or_default());
        }
        if let Some(message) = job["error"]["message"].as_str() {
            println!("error: {message}");
        }
    }

    fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            None if self.is_json => eprintln!("{line}"),
            None => println!("{line}"),
        }
    }
}

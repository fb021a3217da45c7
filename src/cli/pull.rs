//! `tunesmith pull`: a model from the Hugging Face Hub, and how a download looks.

use std::{
    io::IsTerminal,
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use clap::Args;
use indicatif::{BinaryBytes, ProgressBar, ProgressStyle};

use crate::hub::{self, PullProgress};

/// Plain lines come at most this often.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Download a model from the Hugging Face Hub, or bring it up to date, and print its folder
///
/// It goes into the cache that all of the Hub's programs share (HF_HOME, HF_HUB_CACHE), where every
/// --model owner/name finds it, also offline. HF_TOKEN opens private and gated models, HF_ENDPOINT
/// names another Hub.
#[derive(Args, Debug)]
pub(super) struct PullArgs {
    /// owner/name or owner/name@revision (a branch, a tag or a commit)
    #[arg(value_name = "OWNER/NAME[@REVISION]")]
    model: String,
}

/// Runs the command.
///
/// # Errors
/// A name that is none, a repository that cannot be had or used, and a download that fails.
pub(super) fn run(args: &PullArgs) -> anyhow::Result<ExitCode> {
    let display = PullDisplay::new(&args.model);
    let pulled = hub::pull(&args.model, display.observer());
    display.finish();
    println!("{}", pulled?.display());
    Ok(ExitCode::SUCCESS)
}

/// A download on the standard error stream: a bar on a terminal, plain lines elsewhere.
#[derive(Clone)]
pub(super) struct PullDisplay {
    model: String,
    /// The bar; `None` where nobody looks at a terminal.
    bar: Option<ProgressBar>,
    /// When the last line was written, and whether it was the last one of all.
    last_line: Arc<Mutex<Option<(Instant, bool)>>>,
}

impl PullDisplay {
    /// Shows nothing before the first progress.
    pub(super) fn new(model: &str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let template = "{bar:30.blue/white} {binary_bytes}/{binary_total_bytes} \
                            {binary_bytes_per_sec}  {eta} left  {msg}";
            let style = ProgressStyle::with_template(template);
            let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(0).with_style(style).with_message(model.to_owned())
        });
        Self { model: model.to_owned(), bar, last_line: Arc::default() }
    }

    /// What the download calls.
    pub(super) fn observer(&self) -> impl Fn(PullProgress) + Send + Sync + 'static {
        let display = self.clone();
        move |progress| display.show(progress)
    }

    /// Removes the bar.
    pub(super) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn show(&self, progress: PullProgress) {
        let PullProgress { num_files, bytes, total_bytes } = progress;
        if let Some(bar) = &self.bar {
            bar.set_length(total_bytes);
            bar.set_position(bytes);
            return;
        }
        if total_bytes == 0 {
            return;
        }
        let mut last_line = self.last_line.lock().unwrap_or_else(PoisonError::into_inner);
        let is_whole = bytes == total_bytes;
        let due = last_line
            .is_none_or(|(at, ended)| !ended && (is_whole || at.elapsed() >= LINE_INTERVAL));
        if due {
            *last_line = Some((Instant::now(), is_whole));
            let (bytes, total) = (BinaryBytes(bytes), BinaryBytes(total_bytes));
            eprintln!("pulling {}: {bytes} of {total} in {num_files} files", self.model);
        }
    }
}

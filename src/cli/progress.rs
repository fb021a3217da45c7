//! What a training run looks like: a bar on a terminal, plain lines elsewhere.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

use super::{speed::Speed, train::forecast::Forecast};
use crate::train::TrainEvent;

/// Plain lines come at most this often.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Shows a run's events.
pub(super) struct Progress {
    /// The bar; `None` where nobody looks at a terminal.
    bar: Option<ProgressBar>,
    total_steps: usize,
    speed: Speed,
    last_line: Option<Instant>,
    forecast: Forecast,
}

impl Progress {
    /// A bar if the standard error stream is a terminal.
    pub(super) fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let template = "{bar:30.blue/white} {pos}/{len} {msg}";
            let style = ProgressStyle::with_template(template);
            ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Self {
            bar,
            total_steps: 0,
            speed: Speed::default(),
            last_line: None,
            forecast: Forecast::default(),
        }
    }

    /// Shows one event.
    pub(super) fn show(&mut self, event: &TrainEvent) {
        if let Some(line) = self.forecast.hear(event) {
            self.say(&line);
        }
        match event {
            TrainEvent::Started { step, total_steps, num_trained_parameters, .. } => {
                self.total_steps = *total_steps;
                self.speed = Speed::default();
                if let Some(bar) = &self.bar {
                    bar.set_length(*total_steps as u64);
                    bar.set_position(*step as u64);
                }
                let begin = if *step == 0 { "training" } else { "continuing after step" };
                let after = if *step == 0 { String::new() } else { format!(" {step}") };
                self.say(&format!(
                    "{begin}{after}: {total_steps} steps, {num_trained_parameters} parameters"
                ));
            }
            TrainEvent::Step { .. } => self.show_step(event),
            TrainEvent::Validated { step, loss, perplexity, token_accuracy, .. } => {
                self.say(&format!(
                    "step {step}: valid loss {loss:.4}, perplexity {perplexity:.2}, accuracy {:.1} %",
                    token_accuracy * 100.0
                ));
            }
            TrainEvent::Generated { step, num_rows, exact_match, f1, .. } => self.say(&format!(
                "step {step}: {num_rows} answers, exact match {:.1} %, F1 {f1:.3}",
                exact_match * 100.0
            )),
            TrainEvent::Parity { max_difference, num_tokens, .. } => self.say(&format!(
                "serving says what training says: log-probabilities of {num_tokens} tokens differ by at \
                 most {max_difference:.1e}"
            )),
            TrainEvent::Warning { message } => self.say(&format!("warning: {message}")),
            TrainEvent::Epoch { epoch, path, .. } => {
                self.say(&format!("epoch {epoch}: published {}", path.display()));
            }
            TrainEvent::Paused { step } => self.say(&format!("paused after step {step}")),
            TrainEvent::Continued { step, .. } => self.say(&format!("going on after step {step}")),
            TrainEvent::Best { step, loss } => self.say(&format!(
                "the best validation loss was {loss:.4} after step {step}: that is what is published"
            )),
            TrainEvent::Candidate { name, until } => {
                self.say(&format!("candidate {name}: to step {until}"));
            }
            TrainEvent::Eliminated { name, step, loss } => {
                let loss = loss.map_or(String::new(), |loss| format!(" (valid loss {loss:.4})"));
                self.say(&format!("candidate {name} ends after step {step}{loss}"));
            }
            TrainEvent::Checkpointed { .. }
            | TrainEvent::Published { .. }
            | TrainEvent::Stopped { .. } => {}
        }
    }

    /// Removes the bar.
    pub(super) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn show_step(&mut self, event: &TrainEvent) {
        let TrainEvent::Step {
            step,
            epoch,
            loss,
            token_accuracy,
            learning_rate,
            grad_norm,
            num_tokens,
            seconds,
            ..
        } = event
        else {
            return;
        };
        self.speed.add(*num_tokens, *seconds);
        let per_step = self.speed.seconds_per_step().unwrap_or(*seconds);
        let left = Duration::from_secs_f64(per_step * (self.total_steps - step) as f64);
        let speed = self.speed.tokens_per_second().unwrap_or_default();
        let eta = indicatif::HumanDuration(left);
        if let Some(bar) = &self.bar {
            bar.set_position(*step as u64);
            bar.set_message(format!("loss {loss:.4}  {speed:.0} tokens/s  {eta:#} left"));
            return;
        }
        let due = self.last_line.is_none_or(|last| last.elapsed() >= LINE_INTERVAL);
        if due || *step == self.total_steps {
            self.last_line = Some(Instant::now());
            let accuracy = token_accuracy * 100.0;
            println!(
                "step {step}/{}  epoch {epoch:.2}  loss {loss:.4}  accuracy {accuracy:.1} %  \
                 lr {learning_rate:.2e}  grad {grad_norm:.3}  {speed:.0} tokens/s  {eta:#} left",
                self.total_steps
            );
        }
    }

    fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            None => println!("{line}"),
        }
    }
}

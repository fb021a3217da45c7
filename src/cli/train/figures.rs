//! The figures of a running training as others read them: Prometheus text and OTLP metrics.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};

use crate::cli::speed::Speed;
use crate::train::TrainEvent;

/// What is known of the run now.
#[derive(Debug, Clone, Default)]
struct State {
    step: usize,
    total_steps: usize,
    epoch: Option<f64>,
    loss: Option<f64>,
    token_accuracy: Option<f64>,
    learning_rate: Option<f64>,
    grad_norm: Option<f64>,
    valid_loss: Option<f64>,
    valid_token_accuracy: Option<f64>,
    speed: Speed,
    tokens: usize,
    trained_tokens: usize,
    warnings: usize,
    paused: bool,
}

/// One figure: its name after `tunesmith_train_`, what it is, its unit, and its value if there is one.
struct Figure {
    name: &'static str,
    help: &'static str,
    unit: &'static str,
    /// Whether it only grows, over the life of the process.
    counter: bool,
    value: fn(&State) -> Option<f64>,
}

const fn gauge(
    name: &'static str,
    help: &'static str,
    unit: &'static str,
    value: fn(&State) -> Option<f64>,
) -> Figure {
    Figure { name, help, unit, counter: false, value }
}

const fn counter(
    name: &'static str,
    help: &'static str,
    unit: &'static str,
    value: fn(&State) -> Option<f64>,
) -> Figure {
    Figure { name, help, unit, counter: true, value }
}

/// All of them.
const FIGURES: &[Figure] = &[
    gauge("step", "Optimizer steps made.", "{step}", |s| Some(s.step as f64)),
    gauge("total_steps", "Optimizer steps of the whole run.", "{step}", |s| {
        Some(s.total_steps as f64)
    }),
    gauge("epoch", "Passes over the data.", "{epoch}", |s| s.epoch),
    gauge("loss", "Loss of the last step.", "1", |s| s.loss),
    gauge(
        "token_accuracy",
        "Share of trained tokens (or pairs) right in the last step.",
        "1",
        |s| s.token_accuracy,
    ),
    gauge("learning_rate", "Learning rate of the last step.", "1", |s| s.learning_rate),
    gauge("grad_norm", "Norm of the last gradient before clipping.", "1", |s| s.grad_norm),
    gauge("valid_loss", "Loss of the last validation.", "1", |s| s.valid_loss),
    gauge("valid_token_accuracy", "Token accuracy of the last validation.", "1", |s| {
        s.valid_token_accuracy
    }),
    gauge("tokens_per_second", "Tokens through the model per second, of late.", "{token}/s", |s| {
        s.speed.tokens_per_second()
    }),
    gauge("eta_seconds", "Seconds to the last step at this speed.", "s", |s| {
        let left = s.total_steps.saturating_sub(s.step) as f64;
        s.speed.seconds_per_step().map(|seconds| seconds * left)
    }),
    gauge("paused", "1 while the run waits.", "1", |s| Some(f64::from(u8::from(s.paused)))),
    counter("tokens_total", "Tokens that went through the model.", "{token}", |s| {
        Some(s.tokens as f64)
    }),
    counter("trained_tokens_total", "Tokens that counted in the loss.", "{token}", |s| {
        Some(s.trained_tokens as f64)
    }),
    counter("warnings_total", "Warnings of the run.", "{warning}", |s| Some(s.warnings as f64)),
];

/// Takes in events on one side and gives figures on the other.
#[derive(Debug, Clone)]
pub(super) struct Figures {
    state: Arc<Mutex<State>>,
    started: SystemTime,
}

impl Figures {
    pub(super) fn new() -> Self {
        Self { state: Arc::default(), started: SystemTime::now() }
    }

    /// Takes in an event.
    pub(super) fn hear(&self, event: &TrainEvent) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).hear(event);
    }

    fn values(&self) -> impl Iterator<Item = (&'static Figure, f64)> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner).clone();
        FIGURES.iter().filter_map(move |figure| Some((figure, (figure.value)(&state)?)))
    }

    /// Prometheus' text format, version 0.0.4.
    pub(super) fn prometheus(&self) -> String {
        let line = |(figure, value): (&Figure, f64)| {
            let Figure { name, help, counter, .. } = figure;
            let kind = if *counter { "counter" } else { "gauge" };
            let name = format!("tunesmith_train_{name}");
            format!("# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}\n")
        };
        self.values().map(line).collect()
    }

    /// The body of an OTLP/HTTP export in JSON. `output` names the run.
    pub(super) fn otlp(&self, output: &str) -> Value {
        let nanoseconds = |time: SystemTime| {
            time.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos().to_string()
        };
        let (now, started) = (nanoseconds(SystemTime::now()), nanoseconds(self.started));
        let metric = |(figure, value): (&Figure, f64)| {
            let points = json!([
                {"startTimeUnixNano": started, "timeUnixNano": now, "asDouble": value}
            ]);
            let mut metric = json!({
                "name": format!("tunesmith.train.{}", figure.name),
                "description": figure.help,
                "unit": figure.unit,
            });
            if figure.counter {
                // 2: cumulative.
                metric["sum"] =
                    json!({"aggregationTemporality": 2, "isMonotonic": true, "dataPoints": points});
            } else {
                metric["gauge"] = json!({ "dataPoints": points });
            }
            metric
        };
        let attribute =
            |key: &str, value: &str| json!({"key": key, "value": {"stringValue": value}});
        let version = env!("CARGO_PKG_VERSION");
        json!({"resourceMetrics": [{
            "resource": {"attributes": [
                attribute("service.name", "tunesmith"),
                attribute("service.version", version),
                attribute("tunesmith.output", output),
            ]},
            "scopeMetrics": [{
                "scope": {"name": "tunesmith.train", "version": version},
                "metrics": self.values().map(metric).collect::<Vec<_>>(),
            }],
        }]})
    }
}

impl State {
    fn hear(&mut self, event: &TrainEvent) {
        match event {
            TrainEvent::Started { step, total_steps, .. } => {
                // The counters are the process's; all else is the run's.
                let Self { tokens, trained_tokens, warnings, .. } = *self;
                let (step, total_steps) = (*step, *total_steps);
                *self =
                    Self { step, total_steps, tokens, trained_tokens, warnings, ..Self::default() };
            }
            TrainEvent::Step {
                step,
                epoch,
                loss,
                token_accuracy,
                learning_rate,
                grad_norm,
                num_tokens,
                num_trained_tokens,
                seconds,
                ..
            } => {
                self.step = *step;
                self.epoch = Some(*epoch);
                self.loss = Some(*loss);
                self.token_accuracy = Some(*token_accuracy);
                self.learning_rate = Some(*learning_rate);
                self.grad_norm = Some(*grad_norm);
                self.tokens += num_tokens;
                self.trained_tokens += num_trained_tokens;
                self.speed.add(*num_tokens, *seconds);
            }
            TrainEvent::Validated { loss, token_accuracy, .. } => {
                self.valid_loss = Some(*loss);
                self.valid_token_accuracy = Some(*token_accuracy);
            }
            TrainEvent::Paused { .. } => self.paused = true,
            TrainEvent::Continued { .. } => self.paused = false,
            TrainEvent::Warning { .. } => self.warnings += 1,
            TrainEvent::Generated { .. }
            | TrainEvent::Parity { .. }
            | TrainEvent::Epoch { .. }
            | TrainEvent::Checkpointed { .. }
            | TrainEvent::Best { .. }
            | TrainEvent::Candidate { .. }
            | TrainEvent::Eliminated { .. }
            | TrainEvent::Stopped { .. }
            | TrainEvent::Published { .. } => {}
        }
    }
}

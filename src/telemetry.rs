//! What the program tells its operators: tracing set-up, and every metric's name, unit and labels.
//!
//! Callers report events (`telemetry::request_finished(&summary)`); only this file knows the names.
//! They are vLLM's, so that routers, autoscalers and dashboards made for it work unchanged.

use std::{
    fmt::Write as _,
    io::{self, IsTerminal},
    sync::OnceLock,
};

use metrics::{Label, counter, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::EnvFilter;

const REQUESTS_WAITING: &str = "vllm:num_requests_waiting";
const REQUESTS_RUNNING: &str = "vllm:num_requests_running";
/// A fraction: 1 = every block is in use.
const KV_CACHE_USAGE: &str = "vllm:kv_cache_usage_perc";
const CACHE_CONFIG: &str = "vllm:cache_config_info";
const PREEMPTIONS: &str = "vllm:num_preemptions_total";
const PREFIX_QUERIES: &str = "vllm:prefix_cache_queries_total";
const PREFIX_HITS: &str = "vllm:prefix_cache_hits_total";
const DRAFT_TOKENS: &str = "vllm:spec_decode_num_draft_tokens_total";
const ACCEPTED_TOKENS: &str = "vllm:spec_decode_num_accepted_tokens_total";
const PROMPT_TOKENS: &str = "vllm:prompt_tokens_total";
const GENERATION_TOKENS: &str = "vllm:generation_tokens_total";
const REQUEST_SUCCESS: &str = "vllm:request_success_total";
const ADMISSION_REJECTIONS: &str = "vllm:admission_rejections_total";
const TIME_TO_FIRST_TOKEN: &str = "vllm:time_to_first_token_seconds";
const TIME_PER_OUTPUT_TOKEN: &str = "vllm:request_time_per_output_token_seconds";
const END_TO_END: &str = "vllm:e2e_request_latency_seconds";
const QUEUE_TIME: &str = "vllm:request_queue_time_seconds";
const PREFILL_TIME: &str = "vllm:request_prefill_time_seconds";
const DECODE_TIME: &str = "vllm:request_decode_time_seconds";
const REQUEST_PROMPT_TOKENS: &str = "vllm:request_prompt_tokens";
const REQUEST_GENERATION_TOKENS: &str = "vllm:request_generation_tokens";
const REQUEST_MAX_TOKENS: &str = "vllm:request_params_max_tokens";
const LORA_REQUESTS: &str = "vllm:lora_requests_info";
const LORA_LOADED: &str = "vllm:lora_adapter_loaded";
const NUM_LORAS: &str = "vllm:num_cpu_loaded_lora_adapters";
const LORA_LOAD_SECONDS: &str = "vllm:lora_adapter_load_seconds";
const LORA_LOAD_FAILURES: &str = "tunesmith:lora_adapter_load_failures_total";

const FIRST_TOKEN_BUCKETS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
const PER_TOKEN_BUCKETS: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
];
const LATENCY_BUCKETS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
];
const TOKEN_BUCKETS: &[f64] =
    &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5];

const HISTOGRAMS: &[(&str, &[f64])] = &[
    (TIME_TO_FIRST_TOKEN, FIRST_TOKEN_BUCKETS),
    (TIME_PER_OUTPUT_TOKEN, PER_TOKEN_BUCKETS),
    (END_TO_END, LATENCY_BUCKETS),
    (QUEUE_TIME, LATENCY_BUCKETS),
    (PREFILL_TIME, LATENCY_BUCKETS),
    (DECODE_TIME, LATENCY_BUCKETS),
    (REQUEST_PROMPT_TOKENS, TOKEN_BUCKETS),
    (REQUEST_GENERATION_TOKENS, TOKEN_BUCKETS),
    (REQUEST_MAX_TOKENS, TOKEN_BUCKETS),
    (LORA_LOAD_SECONDS, FIRST_TOKEN_BUCKETS),
];

static METRICS: OnceLock<PrometheusHandle> = OnceLock::new();

/// Sends log lines to stderr: as text, or as JSON with `TUNESMITH_LOG_FORMAT=json`. `TUNESMITH_LOG`
/// holds the filter (`debug`, `tunesmith::api=trace,warn`). A second call changes nothing.
pub fn init_tracing() {
    // What hf-hub logs as an error, it also returns as one.
    let filter = std::env::var("TUNESMITH_LOG")
        .unwrap_or_else(|_| "warn,hf_hub=off,tunesmith=info".to_owned());
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(filter))
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        // Else a log that cannot be written is a panic.
        .log_internal_errors(false)
        .with_target(false);
    let json = std::env::var("TUNESMITH_LOG_FORMAT").is_ok_and(|format| format == "json");
    // An error only says that somebody has set a subscriber before, which then stays.
    let _ = if json { builder.json().try_init() } else { builder.try_init() };
}

/// Starts collecting metrics for this process. Before it, events go nowhere. A second call changes
/// nothing.
pub fn install_metrics() {
    METRICS.get_or_init(|| {
        let mut builder = PrometheusBuilder::new();
        for (name, buckets) in HISTOGRAMS {
            builder = builder
                .set_buckets_for_metric(Matcher::Full((*name).to_owned()), buckets)
                .expect("the bucket lists above are not empty");
        }
        let recorder = builder.build_recorder();
        let handle = recorder.handle();
        if metrics::set_global_recorder(recorder).is_err() {
            tracing::warn!("another metrics recorder is installed; /metrics will stay empty");
        }
        handle
    });
}

/// Everything collected so far, in Prometheus' text format; empty before [`install_metrics`].
#[must_use]
pub fn render_metrics() -> String {
    METRICS.get().map(PrometheusHandle::render).unwrap_or_default()
}

/// Folds raw histogram samples into their buckets, so that they do not pile up while nobody scrapes.
pub fn run_upkeep() {
    if let Some(handle) = METRICS.get() {
        handle.run_upkeep();
    }
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestEnd {
    /// By an end-of-sequence token or a stop string.
    Stop,
    /// By its token limit.
    Length,
    /// By its client leaving, or by the server's shutdown.
    Abort,
    /// By a failure of the server.
    Error,
}

impl RequestEnd {
    fn label(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
            Self::Error => "error",
        }
    }
}

/// One generated sequence, from admission to its end. Times are in seconds.
#[derive(Debug, Clone)]
pub struct RequestSummary {
    /// The served name of the base model.
    pub model: String,
    /// How it ended.
    pub end: RequestEnd,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated.
    pub completion_tokens: usize,
    /// The limit on generated tokens.
    pub max_tokens: usize,
    /// Admission to the first step; unknown for a sequence that was cancelled.
    pub queue_seconds: Option<f64>,
    /// Admission to the first token, if one came.
    pub first_token_seconds: Option<f64>,
    /// Admission to the end.
    pub total_seconds: f64,
}

/// A sequence ended.
pub fn request_finished(summary: &RequestSummary) {
    let labels = engine_labels(&summary.model);
    let mut success = labels.clone();
    success.push(Label::new("finished_reason", summary.end.label()));
    counter!(REQUEST_SUCCESS, success).increment(1);
    histogram!(END_TO_END, labels.clone()).record(summary.total_seconds);
    histogram!(REQUEST_PROMPT_TOKENS, labels.clone()).record(summary.prompt_tokens as f64);
    histogram!(REQUEST_GENERATION_TOKENS, labels.clone()).record(summary.completion_tokens as f64);
    histogram!(REQUEST_MAX_TOKENS, labels.clone()).record(summary.max_tokens as f64);
    if let Some(queue) = summary.queue_seconds {
        histogram!(QUEUE_TIME, labels.clone()).record(queue);
    }
    let Some(first) = summary.first_token_seconds else { return };
    let decode = summary.total_seconds - first;
    histogram!(TIME_TO_FIRST_TOKEN, labels.clone()).record(first);
    histogram!(DECODE_TIME, labels.clone()).record(decode);
    histogram!(PREFILL_TIME, labels.clone()).record(first - summary.queue_seconds.unwrap_or(0.0));
    if summary.completion_tokens > 1 {
        let per_token = decode / (summary.completion_tokens - 1) as f64;
        histogram!(TIME_PER_OUTPUT_TOKEN, labels).record(per_token);
    }
}

/// A request was turned away before it reached the engine (`queue_full`, `draining`).
pub fn request_refused(model: &str, reason: &'static str) {
    let mut labels = engine_labels(model);
    labels.push(Label::new("reason", reason));
    counter!(ADMISSION_REJECTIONS, labels).increment(1);
}

/// An adapter was read, checked and published.
pub fn adapter_loaded(seconds: f64) {
    histogram!(LORA_LOAD_SECONDS).record(seconds);
}

/// An adapter was refused; `reason` is the machine-readable code that the client got.
pub fn adapter_load_failed(reason: &str) {
    counter!(LORA_LOAD_FAILURES, "reason" => reason.to_owned()).increment(1);
}

/// The engine's live figures at one moment.
#[derive(Debug, Clone, Copy, Default)]
pub struct EngineFigures {
    /// Sequences in the batch.
    pub running: usize,
    /// Sequences in the queue.
    pub waiting: usize,
    /// KV blocks in use.
    pub used_blocks: usize,
    /// KV blocks in all.
    pub num_blocks: usize,
    /// Positions of one KV block.
    pub block_size: usize,
    /// Prompt tokens processed since the start.
    pub prompt_tokens: u64,
    /// Tokens generated since the start.
    pub generation_tokens: u64,
    /// Sequences sent back to the queue since the start.
    pub preemptions: u64,
    /// Prompt tokens looked up in the prefix cache since the start.
    pub prefix_queries: u64,
    /// Those of them that it held.
    pub prefix_hits: u64,
    /// Tokens guessed since the start.
    pub draft_tokens: u64,
    /// Those of them that were right.
    pub accepted_tokens: u64,
}

/// Publishes the engine's figures; called once per scrape. Every family exists from the first scrape
/// on, because a router counts a missing one as an error.
pub fn engine_figures(model: &str, figures: &EngineFigures) {
    let labels = engine_labels(model);
    let usage = figures.used_blocks as f64 / figures.num_blocks.max(1) as f64;
    gauge!(REQUESTS_WAITING, labels.clone()).set(figures.waiting as f64);
    gauge!(REQUESTS_RUNNING, labels.clone()).set(figures.running as f64);
    gauge!(KV_CACHE_USAGE, labels.clone()).set(usage);
    counter!(PROMPT_TOKENS, labels.clone()).absolute(figures.prompt_tokens);
    counter!(GENERATION_TOKENS, labels.clone()).absolute(figures.generation_tokens);
    counter!(PREFIX_QUERIES, labels.clone()).absolute(figures.prefix_queries);
    counter!(PREFIX_HITS, labels.clone()).absolute(figures.prefix_hits);
    counter!(DRAFT_TOKENS, labels.clone()).absolute(figures.draft_tokens);
    counter!(ACCEPTED_TOKENS, labels.clone()).absolute(figures.accepted_tokens);
    counter!(PREEMPTIONS, labels).absolute(figures.preemptions);
    let config = vec![
        Label::new("block_size", figures.block_size.to_string()),
        Label::new("num_gpu_blocks", figures.num_blocks.to_string()),
        Label::new("engine", "0"),
    ];
    gauge!(CACHE_CONFIG, config).set(1.0);
}

/// What is known about adapters at one moment.
#[derive(Debug, Clone, Default)]
pub struct AdapterFigures {
    /// Names of the adapters with a sequence in the batch.
    pub running: Vec<String>,
    /// Names of the adapters with a sequence in the queue.
    pub waiting: Vec<String>,
    /// Name and rank of every loaded adapter.
    pub loaded: Vec<(String, usize)>,
    /// Most adapters that one batch can hold.
    pub max_adapters: usize,
    /// Now, in unix seconds.
    pub unix_seconds: f64,
}

/// The families whose label sets change all the time, in Prometheus' text format. The recorder never
/// forgets a series, so these are written afresh at every scrape, `lora_requests_info` as exactly one
/// series.
#[must_use]
pub fn render_adapters(figures: &AdapterFigures) -> String {
    let mut text = String::new();
    let running = escape(&figures.running.join(","));
    let waiting = escape(&figures.waiting.join(","));
    let (max, now) = (figures.max_adapters, figures.unix_seconds);
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "# TYPE {LORA_REQUESTS} gauge\n{LORA_REQUESTS}{{max_lora=\"{max}\",\
         running_lora_adapters=\"{running}\",waiting_lora_adapters=\"{waiting}\"}} {now}"
    );
    let _ = writeln!(text, "# TYPE {NUM_LORAS} gauge\n{NUM_LORAS} {}", figures.loaded.len());
    let _ = writeln!(text, "# TYPE {LORA_LOADED} gauge");
    for (name, rank) in &figures.loaded {
        let name = escape(name);
        let _ = writeln!(
            text,
            "{LORA_LOADED}{{adapter_name=\"{name}\",level=\"cpu\",pinned=\"false\",rank=\"{rank}\"}} 1"
        );
    }
    text
}

fn engine_labels(model: &str) -> Vec<Label> {
    vec![Label::new("model_name", model.to_owned()), Label::new("engine", "0")]
}

fn escape(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_in_flight_make_exactly_one_series() {
        let text = render_adapters(&AdapterFigures {
            running: vec!["a".to_owned(), "b\"x".to_owned()],
            waiting: vec![],
            loaded: vec![("a".to_owned(), 8)],
            max_adapters: 4,
            unix_seconds: 1_763_700_000.0,
        });
        let series = text.lines().filter(|line| line.starts_with("vllm:lora_requests_info{"));
        assert_eq!(
            series.collect::<Vec<_>>(),
            [concat!(
                "vllm:lora_requests_info{max_lora=\"4\",running_lora_adapters=\"a,b\\\"x\",",
                "waiting_lora_adapters=\"\"} 1763700000"
            )]
        );
        assert!(text.contains("vllm:num_cpu_loaded_lora_adapters 1\n"), "{text}");
    }

    #[test]
    fn an_idle_engine_still_shows_every_gauge_a_router_reads() {
        install_metrics();
        let figures = EngineFigures { num_blocks: 64, block_size: 16, ..EngineFigures::default() };
        engine_figures("telemetry-test", &figures);
        let text = render_metrics();
        for name in [REQUESTS_WAITING, REQUESTS_RUNNING, KV_CACHE_USAGE] {
            let line = format!("{name}{{model_name=\"telemetry-test\",engine=\"0\"}} 0");
            assert!(text.contains(&line), "{line} is missing in\n{text}");
        }
        assert!(text.contains("num_gpu_blocks=\"64\""), "{text}");
    }
}

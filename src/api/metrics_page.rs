//! `GET /metrics`, for scrapers that come as often as every 50 ms: the page is rendered at most every
//! 100 ms, and never takes the engine's time.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use axum::{
    body::Bytes,
    extract::State,
    http::{HeaderName, header},
};

use super::AppState;
use crate::telemetry::{self, AdapterFigures, EngineFigures};

/// How long a rendered page is served.
const MAX_AGE: Duration = Duration::from_millis(100);

const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The page as it was last rendered.
#[derive(Default)]
pub(crate) struct MetricsPage(Mutex<Option<(Instant, Bytes)>>);

/// The handler.
pub(crate) async fn metrics_page(
    State(state): State<Arc<AppState>>,
) -> ([(HeaderName, &'static str); 1], Bytes) {
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], page(&state))
}

fn page(state: &AppState) -> Bytes {
    let mut cached = state.metrics.0.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((rendered_at, page)) = &*cached
        && rendered_at.elapsed() < MAX_AGE
    {
        return page.clone();
    }
    let page = Bytes::from(render(state));
    *cached = Some((Instant::now(), page.clone()));
    page
}

fn render(state: &AppState) -> String {
    let (engine, adapters) = figures(state);
    telemetry::engine_figures(&state.config.model_name, &engine);
    telemetry::render_metrics() + &telemetry::render_adapters(&adapters)
}

fn figures(state: &AppState) -> (EngineFigures, AdapterFigures) {
    let config = state.engine.config();
    let stats = state.engine.stats();
    let engine = EngineFigures {
        running: stats.running(),
        waiting: stats.waiting(),
        used_blocks: stats.used_blocks(),
        num_blocks: stats.num_blocks(),
        block_size: config.block_size,
        prompt_tokens: stats.prompt_tokens(),
        generation_tokens: stats.generation_tokens(),
        preemptions: stats.preemptions(),
        prefix_queries: stats.prefix_queries(),
        prefix_hits: stats.prefix_hits(),
        draft_tokens: stats.draft_tokens(),
        accepted_tokens: stats.accepted_tokens(),
    };
    let in_flight = stats.adapters();
    let loaded = state.registry.list();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let adapters = AdapterFigures {
        running: in_flight.running.clone(),
        waiting: in_flight.waiting.clone(),
        loaded: loaded.iter().map(|v| (v.name.clone(), v.adapter.rank())).collect(),
        max_adapters: config.max_num_seqs,
        unix_seconds: now.as_secs_f64(),
    };
    (engine, adapters)
}

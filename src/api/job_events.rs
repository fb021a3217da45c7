//! `/v1/fine_tuning/jobs/{id}/events`: a page of them, or with `?stream=true` all that were and all
//! that come, as server-sent events.

use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

use axum::{
    Json,
    extract::{Path, RawQuery, State},
    response::{
        IntoResponse, Response, Sse,
        sse::{Event, KeepAlive},
    },
};
use futures_util::stream;

use super::{
    AppState,
    blocking::with_service,
    error::ApiError,
    fine_tuning::{DEFAULT_LIMIT, MAX_LIMIT},
    query::QueryPairs,
    types::fine_tuning::{EventObject, ListObject},
};
use crate::jobs::{JobEvent, JobsError, Order, Page, Query};

/// How often a stream looks for new events.
const POLL: Duration = Duration::from_millis(250);
/// A comment is sent after this long without an event, so that proxies keep the connection.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Newest first, or the stream.
pub(crate) async fn list_events(
    State(state): State<Arc<AppState>>,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
) -> Result<Response, ApiError> {
    let query = QueryPairs::parse(query.as_deref());
    let limit = query.limit(DEFAULT_LIMIT, MAX_LIMIT)?;
    if query.flag("stream")? {
        let known = id.clone();
        with_service(&state, move |service| service.job(&known)).await?;
        return Ok(stream_events(state, id));
    }
    let list = with_service(&state, move |service| {
        service.job(&id)?;
        let after = query.get("after");
        let page = Query { parent: &id, after, limit, order: Order::Descending };
        let page: Page<JobEvent> = service.store().list(&page, |_| true)?;
        Ok::<_, JobsError>(ListObject {
            object: "list",
            data: page.records.into_iter().map(EventObject::from).collect(),
            has_more: page.has_more,
        })
    });
    Ok(Json(list.await?).into_response())
}

fn stream_events(state: Arc<AppState>, job: String) -> Response {
    let watch = Watch { state, job, last: None, ready: VecDeque::new(), ended: false };
    let events = stream::unfold(watch, |mut watch| async move {
        let data = watch.next().await?;
        Some((Ok::<_, Infallible>(Event::default().data(data)), watch))
    });
    Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
}

/// Somebody who watches a job. He looks by himself, so one who has left costs nothing.
struct Watch {
    state: Arc<AppState>,
    job: String,
    /// Id of the last event that was read.
    last: Option<String>,
    /// Events that are read but not sent.
    ready: VecDeque<String>,
    ended: bool,
}

impl Watch {
    /// The data of the next event.
    async fn next(&mut self) -> Option<String> {
        while self.ready.is_empty() && !self.ended {
            if self.state.is_draining() {
                self.end(&ApiError::Draining.body().to_string());
                break;
            }
            match self.read().await {
                Ok(true) => {}
                Ok(false) => tokio::time::sleep(POLL).await,
                Err(error) => self.end(&error.body().to_string()),
            }
        }
        self.ready.pop_front()
    }

    /// Reads what has come since; whether there was anything to say.
    async fn read(&mut self) -> Result<bool, ApiError> {
        let (job, last) = (self.job.clone(), self.last.clone());
        let (is_final, events) = with_service(&self.state, move |service| {
            // The status first: nothing comes after the events of a job that has ended.
            let is_final = service.job(&job)?.status.is_final();
            let after = last.as_deref();
            let query = Query { parent: &job, after, limit: MAX_LIMIT, order: Order::Ascending };
            let page: Page<JobEvent> = service.store().list(&query, |_| true)?;
            Ok::<_, JobsError>((is_final, page.records))
        })
        .await?;
        if let Some(event) = events.last() {
            self.last = Some(event.id.clone());
        } else if is_final {
            self.end("[DONE]");
        }
        for event in events {
            let json = serde_json::to_string(&EventObject::from(event));
            self.ready.push_back(json.map_err(ApiError::internal)?);
        }
        Ok(!self.ready.is_empty())
    }

    fn end(&mut self, data: &str) {
        self.ready.push_back(data.to_owned());
        self.ended = true;
    }
}

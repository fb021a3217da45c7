//! `/v1/evals`: definitions of evaluations. Their runs are in `eval_runs`.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{Path, RawQuery, Request, State},
    routing::get,
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    AppState,
    blocking::{blocking, with_service},
    body::{parse_json, read_body},
    error::ApiError,
    eval_runs,
    graders::check_usable,
    query::QueryPairs,
    types::evals::{PageObject, eval_object},
};
use crate::jobs::{Eval, JobsError, NewEval, Order, Page, Query, valid_metadata};

/// Objects on a page, unless asked otherwise.
const DEFAULT_LIMIT: usize = 20;
/// Most objects on a page.
const MAX_LIMIT: usize = 100;

/// The routes of evaluations and their runs.
pub(crate) fn routes() -> Router<Arc<AppState>> {
    Router::new()
        .route("/v1/evals", get(list_evals).post(create_eval))
        .route("/v1/evals/{id}", get(get_eval).post(update_eval).delete(delete_eval))
        .merge(eval_runs::routes())
}

/// Keeps a definition. It is on disk when this answers.
async fn create_eval(
    State(state): State<Arc<AppState>>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let service = Arc::clone(state.jobs()?);
    let _in_flight = state.admit()?;
    let body = read_body(request).await?;
    let eval = blocking(move || {
        let new = NewEval::parse(&parse_json(&body)?)?;
        check_usable(&state, new.graders(), |index| format!("testing_criteria[{index}].type"))?;
        Ok::<_, ApiError>(eval_object(&service.create_eval(new)?))
    });
    Ok(Json(eval.await?))
}

/// Oldest first, unless asked otherwise.
async fn list_evals(
    State(state): State<Arc<AppState>>,
    RawQuery(query): RawQuery,
) -> Result<Json<PageObject>, ApiError> {
    let paging = Paging::parse(query.as_deref())?;
    let page = with_service(&state, move |service| {
        let page: Page<Eval> = service.store().list(&paging.query(""), |_| true)?;
        let evals = page.records.iter().map(eval_object).collect();
        Ok::<_, JobsError>(PageObject::new(evals, page.has_more))
    });
    Ok(Json(page.await?))
}

async fn get_eval(
    State(state): State<Arc<AppState>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let eval = with_service(&state, move |service| service.eval(&id));
    Ok(Json(eval_object(&eval.await?)))
}

/// What may be changed of a definition.
#[derive(Debug, Default, Deserialize)]
struct UpdateEval {
    name: Option<String>,
    metadata: Option<Value>,
}

async fn update_eval(
    State(state): State<Arc<AppState>>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let _in_flight = state.admit()?;
    let body = read_body(request).await?;
    let eval = with_service(&state, move |service| {
        let wire: UpdateEval = parse_json(&body)?;
        let metadata = valid_metadata(&wire.metadata.unwrap_or_default())?;
        Ok::<_, ApiError>(eval_object(&service.update_eval(&id, wire.name, metadata)?))
    });
    Ok(Json(eval.await?))
}

async fn delete_eval(
    State(state): State<Arc<AppState>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let answer = json!({"object": "eval.deleted", "deleted": true, "eval_id": id});
    with_service(&state, move |service| service.delete_eval(&id)).await?;
    Ok(Json(answer))
}

/// Which page of a list is wanted.
pub(crate) struct Paging {
    pub(crate) pairs: QueryPairs,
    limit: usize,
    order: Order,
}

impl Paging {
    /// `limit`, `after` and `order`.
    pub(crate) fn parse(query: Option<&str>) -> Result<Self, ApiError> {
        let pairs = QueryPairs::parse(query);
        let limit = pairs.limit(DEFAULT_LIMIT, MAX_LIMIT)?;
        let order = match pairs.get("order") {
            None | Some("asc") => Order::Ascending,
            Some("desc") => Order::Descending,
            Some(other) => {
                let message = format!("`order` must be asc or desc, not {other:?}");
                return Err(ApiError::invalid("order", message));
            }
        };
        Ok(Self { pairs, limit, order })
    }

    /// The page among the objects that belong to `parent`.
    pub(crate) fn query<'a>(&'a self, parent: &'a str) -> Query<'a> {
        let after = self.pairs.get("after");
        Query { parent, after, limit: self.limit, order: self.order }
    }
}

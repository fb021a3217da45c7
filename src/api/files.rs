//! `/v1/files`: upload, list, look at, download and delete files.

use std::{fs::File, io::Read, sync::Arc};

use axum::{
    Json,
    body::Body,
    extract::{Path, Request, State},
    http::{HeaderName, HeaderValue, header},
    response::{IntoResponse, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use futures_util::stream;

use super::{
    AppState,
    azure_form::AzureForm,
    blocking::{blocking, with_service},
    error::ApiError,
    multipart::{Expected, read_form},
    query::QueryPairs,
    types::files::{DeletedFile, ExpiresAfter, FileList, FileObject},
};
use crate::jobs::{JobsError, MAX_FILE_BYTES, NewFile, Order, Query};

/// What a client may upload files for.
const PURPOSES: &[&str] = &["assistants", "batch", "fine-tune", "vision", "user_data", "evals"];

/// What files of a job's metrics are for.
const RESULTS_PURPOSE: &str = "fine-tune-results";

/// The most files on a page, and as many as there are without a limit.
const MAX_PAGE: usize = 10_000;

/// Seconds that a file with an end may live.
const LIFETIME_SECONDS: std::ops::RangeInclusive<u64> = 3600..=2_592_000;

/// Bytes that are read at once for a download: a multiple of 3, so that base64 has no seams.
const READ_BYTES: usize = 192 << 10;

const ANCHOR: &str = "expires_after[anchor]";
const SECONDS: &str = "expires_after[seconds]";

/// Takes a file.
pub(crate) async fn create_file(
    State(state): State<Arc<AppState>>,
    request: Request,
) -> Result<Json<FileObject>, ApiError> {
    let _in_flight = state.admit()?;
    let expected =
        Expected { file: "file", max_bytes: MAX_FILE_BYTES, fields: &["purpose", ANCHOR, SECONDS] };
    let form = read_form(&state, request, &expected).await?;
    let purpose = valid_purpose(form.field("purpose"))?;
    let expires_after = match (form.field(ANCHOR), form.field(SECONDS)) {
        (None, None) => None,
        (anchor, seconds) => Some(ExpiresAfter {
            anchor: anchor.unwrap_or_default().to_owned(),
            seconds: seconds.and_then(|text| text.parse().ok()).unwrap_or(0),
        }),
    };
    let seconds = valid_lifetime(expires_after.as_ref())?;
    let Some(filename) = form.filename() else {
        return Err(ApiError::invalid("file", "`file` must be sent as a file, with a filename"));
    };
    let new = NewFile::new(filename, purpose).expiring_after(seconds);
    let content = form.into_content();
    if content.bytes() == 0 {
        return Err(ApiError::invalid("file", "File is empty."));
    }
    let file = with_service(&state, move |service| service.add_file(content, new)).await?;
    Ok(Json(file.into()))
}

/// Lists files.
pub(crate) async fn list_files(
    State(state): State<Arc<AppState>>,
    request: Request,
) -> Result<Json<FileList>, ApiError> {
    let query = QueryPairs::parse(request.uri().query());
    let limit = query.limit(MAX_PAGE, MAX_PAGE)?;
    let order = match query.get("order") {
        None | Some("desc") => Order::Descending,
        Some("asc") => Order::Ascending,
        Some(other) => {
            let message = format!("`order` must be asc or desc, not {other:?}");
            return Err(ApiError::invalid("order", message));
        }
    };
    let page = with_service(&state, move |service| {
        let after = query.get("after");
        service.files(&Query { parent: "", after, limit, order }, query.get("purpose"))
    })
    .await?;
    let id = |file: Option<&crate::jobs::FileRecord>| file.map(|file| file.id.clone());
    Ok(Json(FileList {
        object: "list",
        first_id: id(page.records.first()),
        last_id: id(page.records.last()),
        has_more: page.has_more,
        data: page.records.into_iter().map(FileObject::from).collect(),
    }))
}

/// Shows one file.
pub(crate) async fn get_file(
    State(state): State<Arc<AppState>>,
    Path(id): Path<String>,
) -> Result<Json<FileObject>, ApiError> {
    let file = with_service(&state, move |service| service.file(&id, "id")).await?;
    Ok(Json(file.into()))
}

/// Deletes a file. A job that reads it goes on.
pub(crate) async fn delete_file(
    State(state): State<Arc<AppState>>,
    Path(id): Path<String>,
) -> Result<Json<DeletedFile>, ApiError> {
    let name = id.clone();
    with_service(&state, move |service| service.delete_file(&name)).await?;
    Ok(Json(DeletedFile { id, object: "file", deleted: true }))
}

/// Sends a file's content. OpenAI sends a job's results as base64, Azure does not.
pub(crate) async fn get_content(
    State(state): State<Arc<AppState>>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let (record, file) = with_service(&state, move |service| {
        let record = service.file(&id, "id")?;
        let path = service.blob_path(&record);
        let file = File::open(&path).map_err(|source| JobsError::file(path, source))?;
        Ok::<_, JobsError>((record, file))
    })
    .await?;
    let is_azure = request.extensions().get::<AzureForm>().is_some();
    let is_base64 = record.purpose == RESULTS_PURPOSE && !is_azure;
    let length = if is_base64 { record.bytes.div_ceil(3) * 4 } else { record.bytes };
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream")),
        (header::CONTENT_LENGTH, HeaderValue::from(length)),
        (header::CONTENT_DISPOSITION, disposition(&record.filename)),
        // Nobody's browser is to take a client's file for a page.
        (HeaderName::from_static("x-content-type-options"), HeaderValue::from_static("nosniff")),
    ];
    Ok((headers, content(file, is_base64)).into_response())
}

/// One of the purposes of uploads.
pub(crate) fn valid_purpose(purpose: Option<&str>) -> Result<&str, ApiError> {
    let purpose = purpose.ok_or_else(|| ApiError::Invalid {
        message: "`purpose` is missing".to_owned(),
        param: Some("purpose".to_owned()),
        code: Some("missing_required_parameter"),
    })?;
    if PURPOSES.contains(&purpose) {
        return Ok(purpose);
    }
    let shown: String = purpose.chars().take(64).collect();
    let known = PURPOSES.join(", ");
    Err(ApiError::invalid("purpose", format!("{shown:?} is not one of {known} - 'purpose'")))
}

/// The seconds that a file is to live.
pub(crate) fn valid_lifetime(end: Option<&ExpiresAfter>) -> Result<Option<u64>, ApiError> {
    let Some(end) = end else { return Ok(None) };
    if end.anchor != "created_at" {
        let message = "`expires_after[anchor]` must be created_at";
        return Err(ApiError::invalid(ANCHOR, message));
    }
    if !LIFETIME_SECONDS.contains(&end.seconds) {
        let (least, most) = LIFETIME_SECONDS.into_inner();
        let message = format!("`expires_after[seconds]` must be {least} to {most}");
        return Err(ApiError::invalid(SECONDS, message));
    }
    Ok(Some(end.seconds))
}

fn content(file: File, is_base64: bool) -> Body {
    Body::from_stream(stream::try_unfold(file, move |file| async move {
        let read = blocking(move || {
            let mut chunk = Vec::with_capacity(READ_BYTES);
            let path = "a file's content";
            let read = (&file).take(READ_BYTES as u64).read_to_end(&mut chunk);
            read.map_err(|source| JobsError::file(path, source))?;
            Ok::<_, JobsError>((file, chunk))
        });
        let (file, chunk) = read.await?;
        let chunk = if is_base64 { STANDARD.encode(chunk).into_bytes() } else { chunk };
        Ok::<_, ApiError>((!chunk.is_empty()).then_some((chunk, file)))
    }))
}

/// The name in both of its forms: plain for old clients, and percent-encoded.
fn disposition(filename: &str) -> HeaderValue {
    let plain: String = filename
        .chars()
        .map(|c| if c.is_ascii() && !matches!(c, '"' | '\\' | '%') { c } else { '_' })
        .collect();
    let mut encoded = String::new();
    for byte in filename.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded += &format!("%{byte:02X}");
        }
    }
    let value = format!("attachment; filename=\"{plain}\"; filename*=UTF-8''{encoded}");
    HeaderValue::try_from(value).unwrap_or(HeaderValue::from_static("attachment"))
}

//! Forms with a file: read part by part in any order, the file straight to disk, never whole in memory.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::{
    body::{Body, Bytes},
    extract::{
        DefaultBodyLimit, FromRequest, Multipart, Request,
        multipart::{Field, MultipartError},
    },
    http::{HeaderMap, header},
};
use futures_util::StreamExt;

use super::{AppState, blocking::blocking, error::ApiError};
use crate::jobs::{Incoming, JobsError, Staged};

/// How long a client may send nothing.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest value of a field that is not the file, in bytes.
const MAX_FIELD_BYTES: usize = 4096;

/// What a form may have beside its file: boundaries, headers and short fields, in bytes.
const MAX_OVERHEAD_BYTES: u64 = 1 << 20;

/// What is read without coming to the next piece of a part, in bytes: headers are not endless.
const MAX_UNPARSED_BYTES: u64 = 1 << 20;

/// Of a form that is refused, this much is read and thrown away, because a client that is still
/// sending would not see the answer.
const MAX_DISCARDED_BYTES: u64 = 256 << 20;

/// Bytes that are collected before they are written.
const WRITE_BYTES: usize = 256 << 10;

/// What a form is to consist of.
pub(crate) struct Expected {
    /// The part with the file.
    pub(crate) file: &'static str,
    /// The most bytes of the file.
    pub(crate) max_bytes: u64,
    /// Parts with text. All may be absent.
    pub(crate) fields: &'static [&'static str],
}

/// A form that was read to its end.
pub(crate) struct Form {
    fields: Vec<(&'static str, String)>,
    filename: Option<String>,
    content: Staged,
}

impl Form {
    /// The text of a field.
    pub(crate) fn field(&self, name: &str) -> Option<&str> {
        let found = self.fields.iter().find(|(field, _)| *field == name);
        found.map(|(_, text)| text.as_str())
    }

    /// What the client calls the file; `None` where it has no name.
    pub(crate) fn filename(&self) -> Option<&str> {
        self.filename.as_deref()
    }

    /// The file's content, on disk. Dropped, it is gone.
    pub(crate) fn into_content(self) -> Staged {
        self.content
    }
}

/// Reads a form. Whatever goes wrong, nothing of it stays.
///
/// # Errors
/// 415 unless it is a form, 400 where it is broken or not what was expected, 403 from another site's
/// page, 408 when the client stops sending, 413 beyond the limit, 507 without room.
pub(crate) async fn read_form(
    state: &AppState,
    request: Request,
    expected: &Expected,
) -> Result<Form, ApiError> {
    refuse_foreign_pages(request.headers())?;
    let service = Arc::clone(state.jobs()?);
    let mut reader = Reader::new(request, expected.max_bytes).await?;
    let limit = expected.max_bytes;
    let incoming = move || service.receive(limit);
    let form = reader.read(incoming, expected).await;
    if form.is_err() {
        reader.discard().await;
    }
    form
}

struct Reader {
    parts: Multipart,
    meter: Arc<Meter>,
}

impl Reader {
    async fn new(request: Request, max_bytes: u64) -> Result<Self, ApiError> {
        let (head, body) = request.into_parts();
        let meter = Arc::new(Meter::new(max_bytes + MAX_OVERHEAD_BYTES));
        let mut request = Request::from_parts(head, metered(body, Arc::clone(&meter)));
        // The meter is the limit.
        DefaultBodyLimit::disable().apply(&mut request);
        let parts = Multipart::from_request(request, &()).await.map_err(|_| ApiError::NotForm)?;
        Ok(Self { parts, meter })
    }

    async fn read(
        &mut self,
        receive: impl Fn() -> Result<Incoming, JobsError> + Clone + Send + 'static,
        expected: &Expected,
    ) -> Result<Form, ApiError> {
        let mut fields: Vec<(&'static str, String)> = Vec::new();
        let mut file: Option<(Option<String>, Staged)> = None;
        let meter = Arc::clone(&self.meter);
        while let Some(part) = self.next_part().await? {
            let name = part.name().unwrap_or_default().to_owned();
            if name == expected.file {
                if file.is_some() {
                    return Err(twice(&name));
                }
                let filename = part.file_name().map(str::to_owned);
                let incoming = blocking(receive.clone()).await?;
                file = Some((filename, store(part, &meter, incoming).await?));
            } else if let Some(known) = expected.fields.iter().find(|known| **known == name) {
                if fields.iter().any(|(field, _)| field == known) {
                    return Err(twice(&name));
                }
                fields.push((known, text(part, &meter, known).await?));
            } else {
                let shown: String = name.chars().take(64).collect();
                return Err(ApiError::Invalid {
                    message: format!("the form has an unknown field `{shown}`"),
                    param: Some(shown),
                    code: Some("unknown_parameter"),
                });
            }
        }
        let missing = || {
            let message = format!("the form has no `{}`", expected.file);
            ApiError::Invalid {
                message,
                param: Some(expected.file.to_owned()),
                code: Some("missing_required_parameter"),
            }
        };
        let (filename, content) = file.ok_or_else(missing)?;
        Ok(Form { fields, filename, content })
    }

    async fn next_part(&mut self) -> Result<Option<Field<'_>>, ApiError> {
        self.meter.progress();
        let next = tokio::time::timeout(IDLE_TIMEOUT, self.parts.next_field()).await;
        next.map_err(|_| idle())?.map_err(|error| self.meter.explain(&error))
    }

    /// Reads what the client still sends.
    async fn discard(&mut self) {
        self.meter.allow(MAX_DISCARDED_BYTES);
        let meter = Arc::clone(&self.meter);
        while let Ok(Some(mut part)) = self.next_part().await {
            while let Ok(Some(_)) = next_chunk(&mut part, &meter).await {}
        }
    }
}

/// Writes the file's bytes to disk as they come.
async fn store(
    mut part: Field<'_>,
    meter: &Meter,
    mut incoming: Incoming,
) -> Result<Staged, ApiError> {
    let mut buffer = Vec::with_capacity(WRITE_BYTES);
    while let Some(chunk) = next_chunk(&mut part, meter).await? {
        buffer.extend_from_slice(&chunk);
        if buffer.len() >= WRITE_BYTES {
            let write = move || {
                incoming.write(&buffer)?;
                buffer.clear();
                Ok::<_, JobsError>((incoming, buffer))
            };
            (incoming, buffer) = blocking(write).await?;
        }
    }
    blocking(move || {
        incoming.write(&buffer)?;
        incoming.finish()
    })
    .await
}

async fn text(mut part: Field<'_>, meter: &Meter, name: &str) -> Result<String, ApiError> {
    let mut bytes = Vec::new();
    while let Some(chunk) = next_chunk(&mut part, meter).await? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > MAX_FIELD_BYTES {
            let message = format!("`{name}` is longer than {MAX_FIELD_BYTES} bytes");
            return Err(ApiError::invalid(name, message));
        }
    }
    String::from_utf8(bytes)
        .map_err(|_| ApiError::invalid(name, format!("`{name}` is not valid UTF-8")))
}

async fn next_chunk(part: &mut Field<'_>, meter: &Meter) -> Result<Option<Bytes>, ApiError> {
    meter.progress();
    let next = tokio::time::timeout(IDLE_TIMEOUT, part.chunk()).await;
    next.map_err(|_| idle())?.map_err(|error| meter.explain(&error))
}

fn idle() -> ApiError {
    ApiError::BodyTimeout(IDLE_TIMEOUT.as_secs())
}

fn twice(name: &str) -> ApiError {
    ApiError::invalid(name, format!("the form has `{name}` twice"))
}

/// Counts what is read of a form. The parser would collect headers without end, and all that a fast
/// client sends.
struct Meter {
    limit: AtomicU64,
    read: AtomicU64,
    unparsed: AtomicU64,
}

impl Meter {
    fn new(limit: u64) -> Self {
        Self { limit: AtomicU64::new(limit), read: 0.into(), unparsed: 0.into() }
    }

    fn count(&self, bytes: usize) -> Result<(), &'static str> {
        let bytes = bytes as u64;
        let read = self.read.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let unparsed = self.unparsed.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if read > self.limit.load(Ordering::Relaxed) {
            return Err("it is too large");
        }
        if unparsed > MAX_UNPARSED_BYTES {
            return Err("a part has too long headers");
        }
        Ok(())
    }

    /// The parser is about to hand out the next piece.
    fn progress(&self) {
        self.unparsed.store(0, Ordering::Relaxed);
    }

    fn allow(&self, more: u64) {
        self.limit.fetch_add(more, Ordering::Relaxed);
    }

    fn explain(&self, error: &MultipartError) -> ApiError {
        let limit = self.limit.load(Ordering::Relaxed);
        if self.read.load(Ordering::Relaxed) > limit {
            return ApiError::BodyTooLarge(limit as usize);
        }
        ApiError::Invalid {
            message: format!("the form could not be read: {}", error.body_text()),
            param: None,
            code: Some("invalid_form"),
        }
    }
}

/// The body, counted, and one chunk at a time: a parser that takes what it gets gets no more before it
/// has been asked what it made of it.
fn metered(body: Body, meter: Arc<Meter>) -> Body {
    Body::from_stream(body.into_data_stream().then(move |chunk| {
        let meter = Arc::clone(&meter);
        async move {
            tokio::task::yield_now().await;
            let chunk = chunk.map_err(|error| error.to_string())?;
            meter.count(chunk.len())?;
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(chunk)
        }
    }))
}

/// A browser sends forms to other sites without asking them first, so that any page could fill the
/// disk of a server on this machine; but it says where they come from.
fn refuse_foreign_pages(headers: &HeaderMap) -> Result<(), ApiError> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let host = headers.get(header::HOST).and_then(|value| value.to_str().ok());
    let same_origin = match text("origin") {
        None => true,
        Some(origin) => origin.split_once("://").map(|(_, host)| host) == host,
    };
    if same_origin || headers.contains_key(header::AUTHORIZATION) {
        return Ok(());
    }
    Err(ApiError::Forbidden("forms from the pages of other sites are refused".to_owned()))
}

//! From the bytes of a request to its wire type: limits, content type, JSON with the faulty field named.

use std::time::Duration;

use axum::{
    body::Body,
    extract::Request,
    http::{HeaderMap, header},
};
use futures_util::StreamExt;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::error::ApiError;

/// Largest request body, in bytes.
const MAX_BODY_BYTES: usize = 8 << 20;

/// Of a body beyond the limit, this much is read and thrown away, because a client that is still
/// sending would not see the answer.
const MAX_DISCARDED_BYTES: usize = 256 << 20;

/// How long a client may take to send its body.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// Reads the whole body.
///
/// # Errors
/// 415 unless it is declared as JSON (which also keeps web pages, which may only send forms to other
/// sites, from commanding a server on localhost), 413 beyond the limit, 408 when it is too slow.
pub(crate) async fn read_body(request: Request) -> Result<Vec<u8>, ApiError> {
    if !is_json(request.headers()) {
        return Err(ApiError::NotJson);
    }
    match tokio::time::timeout(BODY_TIMEOUT, collect(request.into_body())).await {
        Ok(body) => body,
        Err(_elapsed) => Err(ApiError::BodyTimeout(BODY_TIMEOUT.as_secs())),
    }
}

async fn collect(body: Body) -> Result<Vec<u8>, ApiError> {
    let mut chunks = body.into_data_stream();
    let mut bytes = Vec::new();
    let mut num_received = 0;
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|error| ApiError::Invalid {
            message: format!("the request body could not be read: {error}"),
            param: None,
            code: None,
        })?;
        num_received += chunk.len();
        if num_received <= MAX_BODY_BYTES {
            bytes.extend_from_slice(&chunk);
        } else if num_received <= MAX_DISCARDED_BYTES {
            bytes = Vec::new();
        } else {
            break;
        }
    }
    if num_received > MAX_BODY_BYTES {
        Err(ApiError::BodyTooLarge(MAX_BODY_BYTES))
    } else {
        Ok(bytes)
    }
}

/// Parses `body` as a JSON object of type `T`, all of whose fields are optional.
///
/// # Errors
/// 400 with the parser's message and, for a field of the wrong type, that field.
pub(crate) fn parse_json<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let invalid = |message: String, param: Option<String>| ApiError::Invalid {
        message,
        param,
        code: Some("invalid_json"),
    };
    if body.is_empty() {
        return Err(invalid("the request body is empty".to_owned(), None));
    }
    let value: Value = serde_json::from_slice(body)
        .map_err(|error| invalid(format!("the request body is not valid JSON: {error}"), None))?;
    let Value::Object(object) = &value else {
        return Err(invalid("the request body must be a JSON object".to_owned(), None));
    };
    T::deserialize(&value).map_err(|error| match faulty_field::<T>(object) {
        Some((field, error)) => ApiError::invalid(&field, format!("`{field}`: {error}")),
        None => invalid(error.to_string(), None),
    })
}

/// Refuses a field that is known but not implemented, unless its value asks for nothing.
pub(crate) fn unsupported_unless(
    param: &str,
    value: Option<&Value>,
    harmless: &[Value],
) -> Result<(), ApiError> {
    match value {
        Some(value) if !harmless.contains(value) => Err(ApiError::unsupported(param)),
        _ => Ok(()),
    }
}

/// Serde says what is wrong, but not where: try the fields one by one.
fn faulty_field<T: DeserializeOwned>(object: &Map<String, Value>) -> Option<(String, String)> {
    object.iter().find_map(|(field, value)| {
        let alone = Value::Object(Map::from_iter([(field.clone(), value.clone())]));
        let error = serde_json::from_value::<T>(alone).err()?;
        Some((field.clone(), error.to_string()))
    })
}

fn is_json(headers: &HeaderMap) -> bool {
    let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    content_type.is_some_and(|value| {
        let essence = value.split(';').next().unwrap_or_default().trim();
        essence.eq_ignore_ascii_case("application/json")
    })
}

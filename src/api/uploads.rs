//! `/v1/uploads`: a large file in parts.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, Request, State},
};

use super::{
    AppState,
    blocking::with_service,
    body::{parse_json, read_body},
    error::ApiError,
    files::{valid_lifetime, valid_purpose},
    multipart::{Expected, read_form},
    types::files::{CompleteRequest, PartObject, UploadObject, UploadRequest},
};
use crate::jobs::{MAX_PART_BYTES, NewUpload};

/// Announces a file.
pub(crate) async fn create_upload(
    State(state): State<Arc<AppState>>,
    request: Request,
) -> Result<Json<UploadObject>, ApiError> {
    let _in_flight = state.admit()?;
    let body: UploadRequest = parse_json(&read_body(request).await?)?;
    let purpose = valid_purpose(body.purpose.as_deref())?.to_owned();
    let expires_after = valid_lifetime(body.expires_after.as_ref())?;
    let new = NewUpload {
        bytes: body.bytes.ok_or_else(|| missing("bytes"))?,
        filename: body.filename.ok_or_else(|| missing("filename"))?,
        mime_type: body.mime_type.ok_or_else(|| missing("mime_type"))?,
        purpose,
        expires_after,
    };
    let upload = with_service(&state, move |service| service.create_upload(new)).await?;
    Ok(Json(UploadObject::new(upload, None)))
}

/// Takes a part.
pub(crate) async fn add_part(
    State(state): State<Arc<AppState>>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Json<PartObject>, ApiError> {
    let _in_flight = state.admit()?;
    // Known before the client has sent everything.
    let name = id.clone();
    with_service(&state, move |service| service.open_upload(&name)).await?;
    let expected = Expected { file: "data", max_bytes: MAX_PART_BYTES, fields: &[] };
    let content = read_form(&state, request, &expected).await?.into_content();
    if content.bytes() == 0 {
        return Err(ApiError::invalid("data", "the part is empty"));
    }
    let part = with_service(&state, move |service| service.add_part(&id, content)).await?;
    Ok(Json(part.into()))
}

/// Makes a file of the parts.
pub(crate) async fn complete_upload(
    State(state): State<Arc<AppState>>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Json<UploadObject>, ApiError> {
    let _in_flight = state.admit()?;
    let body: CompleteRequest = parse_json(&read_body(request).await?)?;
    let part_ids = body.part_ids.ok_or_else(|| missing("part_ids"))?;
    let (upload, file) = with_service(&state, move |service| {
        service.complete_upload(&id, &part_ids, body.md5.as_deref())
    })
    .await?;
    Ok(Json(UploadObject::new(upload, Some(file))))
}

/// Gives an upload up. The body, if there is one, says nothing.
pub(crate) async fn cancel_upload(
    State(state): State<Arc<AppState>>,
    Path(id): Path<String>,
) -> Result<Json<UploadObject>, ApiError> {
    let upload = with_service(&state, move |service| service.cancel_upload(&id)).await?;
    Ok(Json(UploadObject::new(upload, None)))
}

fn missing(param: &str) -> ApiError {
    ApiError::Invalid {
        message: format!("`{param}` is missing"),
        param: Some(param.to_owned()),
        code: Some("missing_required_parameter"),
    }
}

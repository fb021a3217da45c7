//! What can go wrong between a request and its answer, and how a client is told: one enum, one match
//! for the status, OpenAI's JSON. Inner causes are logged, never shown.

use std::fmt::Display;

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use crate::adapters::AdapterError;
use crate::engine::EngineError;
use crate::jobs::JobsError;
use crate::text::TextError;

/// Seconds after which a refused client may try again.
const RETRY_AFTER_SECONDS: &str = "1";

/// A request that gets no answer but this.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The client's mistake, with the field that holds it.
    #[error("{message}")]
    Invalid {
        /// What is wrong, naming the value.
        message: String,
        /// The field of the request.
        param: Option<String>,
        /// Machine-readable kind.
        code: Option<&'static str>,
    },
    /// No key, or an unknown one.
    #[error("missing or incorrect API key: send it as `Authorization: Bearer KEY`")]
    Unauthorized,
    /// A known client that may not do this.
    #[error("{0}")]
    Forbidden(String),
    /// No model or adapter of this name.
    #[error("the model `{0}` does not exist")]
    ModelNotFound(String),
    /// Something else that does not exist.
    #[error("{0}")]
    NotFound(String),
    /// No such object, named by the field `param`.
    #[error("{message}")]
    ObjectNotFound {
        /// Naming it.
        message: String,
        /// The field of the request, or of its path.
        param: &'static str,
    },
    /// No such route.
    #[error("there is no route {0}")]
    RouteNotFound(String),
    /// The route exists, with another method.
    #[error("method {method} is not allowed for {path}")]
    MethodNotAllowed {
        /// The method asked for.
        method: String,
        /// The path asked for.
        path: String,
    },
    /// The body did not arrive in time.
    #[error("the request body did not arrive within {0} seconds")]
    BodyTimeout(u64),
    /// The body exceeds the limit.
    #[error("the request body is larger than {0} bytes")]
    BodyTooLarge(usize),
    /// The object is not in a state for this.
    #[error("{0}")]
    Conflict(String),
    /// The disk, or a quota of it, is full.
    #[error("{0}")]
    NoSpace(String),
    /// The body is not declared as JSON.
    #[error("the request body must be sent as `Content-Type: application/json`")]
    NotJson,
    /// The body is not declared as a form with files.
    #[error("the request body must be sent as `Content-Type: multipart/form-data; boundary=...`")]
    NotForm,
    /// An adapter that cannot be used.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// Every place is taken.
    #[error("the server is full: {0}; try again later")]
    Overloaded(String),
    /// The server is shutting down.
    #[error("the server is shutting down")]
    Draining,
    /// The engine has stopped.
    #[error("the engine is not running")]
    EngineStopped,
    /// Something took longer than the client allows.
    #[error("{0}")]
    Timeout(String),
    /// The server's mistake; the cause is in its log.
    #[error("internal error")]
    Internal,
}

impl ApiError {
    /// A client's mistake in the field `param`.
    pub(crate) fn invalid(param: &str, message: impl Into<String>) -> Self {
        Self::Invalid { message: message.into(), param: Some(param.to_owned()), code: None }
    }

    /// A field that is known, but whose effect is not implemented.
    pub(crate) fn unsupported(param: &str) -> Self {
        Self::Invalid {
            message: format!("`{param}` is not supported by this server"),
            param: Some(param.to_owned()),
            code: Some("unsupported_parameter"),
        }
    }

    /// Logs `cause`, which the client does not get to see.
    pub(crate) fn internal(cause: impl Display) -> Self {
        tracing::error!("internal error: {cause}");
        Self::Internal
    }

    /// The one place where a status is chosen.
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::Invalid { .. } => StatusCode::BAD_REQUEST,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Forbidden(_) => StatusCode::FORBIDDEN,
            Self::ModelNotFound(_)
            | Self::NotFound(_)
            | Self::ObjectNotFound { .. }
            | Self::RouteNotFound(_) => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::BodyTimeout(_) => StatusCode::REQUEST_TIMEOUT,
            Self::BodyTooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Conflict(_) => StatusCode::CONFLICT,
            Self::NoSpace(_) => StatusCode::INSUFFICIENT_STORAGE,
            Self::NotJson | Self::NotForm => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Adapter(error) => adapter_status(error),
            Self::Overloaded(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::Draining | Self::EngineStopped => StatusCode::SERVICE_UNAVAILABLE,
            Self::Timeout(_) => StatusCode::GATEWAY_TIMEOUT,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// `error.type` of OpenAI's error object.
    fn kind(&self) -> &'static str {
        match self.status().as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            429 => "rate_limit_error",
            400..=499 => "invalid_request_error",
            _ => "server_error",
        }
    }

    /// `error.code`: the machine-readable cause.
    fn code(&self) -> Option<&'static str> {
        match self {
            Self::Invalid { code, .. } => *code,
            Self::Unauthorized => Some("invalid_api_key"),
            Self::ModelNotFound(_) => Some("model_not_found"),
            Self::BodyTooLarge(_) => Some("request_too_large"),
            Self::Adapter(error) => Some(error.reason()),
            Self::Overloaded(_) => Some("queue_full"),
            Self::Draining => Some("draining"),
            Self::Conflict(_) => Some("conflict"),
            Self::NoSpace(_) => Some("insufficient_storage"),
            Self::ObjectNotFound { .. } => Some("not_found"),
            Self::Forbidden(_)
            | Self::NotFound(_)
            | Self::RouteNotFound(_)
            | Self::MethodNotAllowed { .. }
            | Self::BodyTimeout(_)
            | Self::NotJson
            | Self::NotForm
            | Self::EngineStopped
            | Self::Timeout(_)
            | Self::Internal => None,
        }
    }

    fn param(&self) -> Option<&str> {
        if let Self::Invalid { param, .. } = self {
            return param.as_deref();
        }
        if let Self::ObjectNotFound { param, .. } = self {
            return Some(param);
        }
        matches!(self, Self::ModelNotFound(_)).then_some("model")
    }

    /// `{"error": {message, type, param, code}}`.
    pub(crate) fn body(&self) -> Value {
        json!({"error": {
            "message": self.to_string(),
            "type": self.kind(),
            "param": self.param(),
            "code": self.code(),
        }})
    }

    /// An answer with this error's status and headers, and `body`.
    pub(crate) fn response_with(&self, body: Value) -> Response {
        let mut response = (self.status(), Json(body)).into_response();
        let headers = response.headers_mut();
        match self.status() {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER_SECONDS));
            }
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            _ => {}
        }
        response
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        self.response_with(self.body())
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::QueueFull { .. } | EngineError::QueueTokensFull { .. } => {
                Self::Overloaded(error.to_string())
            }
            EngineError::Draining => Self::Draining,
            EngineError::Stopped => Self::EngineStopped,
            EngineError::EmptyPrompt => Self::invalid("messages", error.to_string()),
            EngineError::TooLong { .. } => Self::Invalid {
                message: error.to_string(),
                param: Some("messages".to_owned()),
                code: Some("context_length_exceeded"),
            },
            EngineError::UnknownToken(_) | EngineError::Start(_) | EngineError::Failed(_) => {
                Self::internal(error)
            }
        }
    }
}

impl From<JobsError> for ApiError {
    fn from(error: JobsError) -> Self {
        let message = error.to_string();
        match error {
            JobsError::Invalid { message, param, code } => {
                Self::Invalid { message, param: Some(param.to_owned()), code }
            }
            JobsError::Definition(invalid) => {
                Self::Invalid { message, param: Some(invalid.param), code: None }
            }
            JobsError::NotFound { param, .. } => Self::ObjectNotFound { message, param },
            JobsError::Conflict(_) => Self::Conflict(message),
            JobsError::TooLarge { limit } => Self::BodyTooLarge(limit as usize),
            JobsError::NoSpace(_) => Self::NoSpace(message),
            JobsError::Adapter(error) => Self::Adapter(error),
            JobsError::Interrupted => Self::Draining,
            JobsError::Store(_) | JobsError::File { .. } | JobsError::Evaluation(_) => {
                Self::internal(message)
            }
        }
    }
}

impl From<TextError> for ApiError {
    /// A template may refuse messages in its own words. Where it fails otherwise, the messages are the
    /// cause as well, but the details are the operator's.
    fn from(error: TextError) -> Self {
        match error {
            TextError::TemplateRefused { .. } | TextError::NoMessages => {
                Self::invalid("messages", error.to_string())
            }
            TextError::TemplateFailed { .. } => {
                tracing::warn!("{error}");
                Self::invalid("messages", "the model's chat template cannot render these messages")
            }
            TextError::File { .. }
            | TextError::Encode { .. }
            | TextError::Decode { .. }
            | TextError::TemplateSyntax { .. }
            | TextError::NotAMessage { .. }
            | TextError::ReservedVariable { .. } => Self::internal(error),
        }
    }
}

/// Whatever is wrong with an adapter's content is the client's to mend, and never a 5xx, after which
/// controllers would try the same again.
fn adapter_status(error: &AdapterError) -> StatusCode {
    match error.reason() {
        "invalid_name" | "already_loaded" => StatusCode::BAD_REQUEST,
        "not_found" => StatusCode::NOT_FOUND,
        "too_large" => StatusCode::PAYLOAD_TOO_LARGE,
        "io" => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::UNPROCESSABLE_ENTITY,
    }
}

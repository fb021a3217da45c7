//! Who may do what: one layer over the whole router, which denies what it does not know.

use std::{net::IpAddr, sync::Arc};

use axum::{
    extract::{Request, State},
    http::{HeaderMap, Method, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use super::{AppState, error::ApiError};

/// Paths that need no key: probes and scrapes come without one.
pub(crate) const OPEN_PATHS: &[&str] = &["/health", "/ready", "/ping", "/metrics"];

/// What a key may do on a server that also has admin keys: ask models, and look at models and jobs. A
/// path that ends with a slash stands for all below it. The rest, known or not, needs an admin key.
const USER_PATHS: &[(&Method, &str)] = &[
    (&Method::POST, "/v1/chat/completions"),
    (&Method::GET, "/v1/models"),
    (&Method::GET, "/v1/models/"),
    (&Method::GET, "/v1/fine_tuning/jobs"),
    (&Method::GET, "/v1/fine_tuning/jobs/"),
    (&Method::GET, "/v1/fine_tuning/checkpoints/"),
];

/// The keys that a server accepts, as digests: the keys themselves are not kept.
#[derive(Clone, Default)]
pub struct ApiKeys {
    api: Vec<[u8; 32]>,
    admin: Vec<[u8; 32]>,
}

impl ApiKeys {
    /// `api` keys open every route, unless there are `admin` keys: then only these change the server and
    /// see its files. Without any key, every route is open.
    #[must_use]
    pub fn new(api: &[String], admin: &[String]) -> Self {
        let digests = |keys: &[String]| keys.iter().map(|key| digest(key.as_bytes())).collect();
        Self { api: digests(api), admin: digests(admin) }
    }

    /// Whether every route is open.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.api.is_empty() && self.admin.is_empty()
    }

    fn check(&self, method: &Method, path: &str, headers: &HeaderMap) -> Result<(), ApiError> {
        if self.is_empty() || OPEN_PATHS.contains(&path) {
            return Ok(());
        }
        let sent = digest(presented_key(headers).ok_or(ApiError::Unauthorized)?);
        let is_api = is_among(&self.api, &sent);
        let is_admin = is_among(&self.admin, &sent);
        if !(is_api | is_admin) {
            return Err(ApiError::Unauthorized);
        }
        if !self.admin.is_empty() && !is_admin && !is_for_users(method, path) {
            return Err(ApiError::Forbidden("this route needs an admin key".to_owned()));
        }
        Ok(())
    }
}

/// Who asked: the digest of the key that was sent, if the server has keys. Handlers find it among a
/// request's extensions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tenant(pub(crate) Option<[u8; 32]>);

/// The layer. An unknown path is refused before anybody learns that it does not exist.
pub(crate) async fn require_key(
    State(state): State<Arc<AppState>>,
    mut request: Request,
    next: Next,
) -> Response {
    let (method, path, headers) = (request.method(), request.uri().path(), request.headers());
    let foreign = state.config.local_only && !names_this_machine(headers);
    let allowed = if foreign {
        Err(ApiError::Forbidden(
            "a server without API keys answers only to `localhost` and IP addresses in the `Host` \
             header; set --api-key to use another name"
                .to_owned(),
        ))
    } else {
        state.config.keys.check(method, path, headers)
    };
    match allowed {
        Ok(()) => {
            let key = presented_key(headers).filter(|_| !state.config.keys.is_empty());
            let tenant = Tenant(key.map(digest));
            request.extensions_mut().insert(tenant);
            next.run(request).await
        }
        Err(error) => error.into_response(),
    }
}

fn is_for_users(method: &Method, path: &str) -> bool {
    let method = if method == Method::HEAD { &Method::GET } else { method };
    USER_PATHS.iter().any(|(allowed, place)| {
        let fits = if place.ends_with('/') { path.starts_with(place) } else { path == *place };
        *allowed == method && fits
    })
}

/// A web page whose name was made to point to this machine still sends that name, and so cannot use a
/// server that trusts everybody here.
fn names_this_machine(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(header::HOST).and_then(|host| host.to_str().ok()) else {
        return true;
    };
    let name = host.rsplit_once(':').map_or(host, |(name, port)| {
        if port.bytes().all(|digit| digit.is_ascii_digit()) { name } else { host }
    });
    let ip = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    name.eq_ignore_ascii_case("localhost") || ip.is_ok()
}

fn presented_key(headers: &HeaderMap) -> Option<&[u8]> {
    let Some(authorization) = headers.get(header::AUTHORIZATION) else {
        return headers.get("api-key").map(|key| key.as_bytes());
    };
    let (scheme, key) = authorization.as_bytes().split_at_checked("Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then(|| key.trim_ascii())
}

fn digest(key: &[u8]) -> [u8; 32] {
    Sha256::digest(key).into()
}

/// Looks at all keys, so that the time taken tells nothing about which one came close.
fn is_among(keys: &[[u8; 32]], sent: &[u8; 32]) -> bool {
    keys.iter().fold(Choice::from(0), |found, key| found | key.ct_eq(sent)).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(keys: &ApiKeys, path: &str, header: Option<(&'static str, &str)>) -> u16 {
        method_status(keys, &Method::GET, path, header)
    }

    fn method_status(
        keys: &ApiKeys,
        method: &Method,
        path: &str,
        header: Option<(&'static str, &str)>,
    ) -> u16 {
        let mut headers = HeaderMap::new();
        if let Some((name, value)) = header {
            headers.insert(name, value.parse().unwrap());
        }
        keys.check(method, path, &headers).map_or_else(|error| error.status().as_u16(), |()| 200)
    }

    #[test]
    fn a_key_is_taken_as_bearer_or_api_key_and_nothing_else_passes() {
        let keys = ApiKeys::new(&["sk-1".to_owned(), "sk-2".to_owned()], &[]);
        for (header, expected) in [
            (None, 401),
            (Some(("authorization", "Bearer sk-2")), 200),
            (Some(("authorization", "bearer sk-1")), 200),
            (Some(("api-key", "sk-1")), 200),
            (Some(("authorization", "Bearer sk-3")), 401),
            (Some(("authorization", "Bearer ")), 401),
            (Some(("authorization", "Bearer")), 401),
            (Some(("authorization", "Basic sk-1")), 401),
            (Some(("authorization", "Bearer sk-1x")), 401),
            (Some(("api-key", "")), 401),
        ] {
            assert_eq!(status(&keys, "/v1/models", header), expected, "{header:?}");
            assert_eq!(status(&keys, "/health", header), 200, "{header:?}");
        }
    }

    #[test]
    fn a_host_header_with_a_foreign_name_is_recognised() {
        for (host, expected) in [
            ("localhost:8000", true),
            ("LOCALHOST", true),
            ("127.0.0.1:1", true),
            ("192.168.0.7", true),
            ("[::1]:8000", true),
            ("evil.example:8000", false),
            ("localhost.evil.example", false),
            ("", false),
        ] {
            let headers = HeaderMap::from_iter([(header::HOST, host.parse().unwrap())]);
            assert_eq!(names_this_machine(&headers), expected, "{host}");
        }
    }

    #[test]
    fn with_an_admin_key_the_others_can_only_ask_and_look() {
        let keys = ApiKeys::new(&["user".to_owned()], &["root".to_owned()]);
        let user = Some(("authorization", "Bearer user"));
        let root = Some(("authorization", "Bearer root"));
        for (method, path, for_users) in [
            (Method::POST, "/v1/chat/completions", true),
            (Method::GET, "/v1/models", true),
            (Method::HEAD, "/v1/models", true),
            (Method::GET, "/v1/models/a/b", true),
            (Method::GET, "/v1/fine_tuning/jobs", true),
            (Method::GET, "/v1/fine_tuning/jobs/ftjob-1/events", true),
            (Method::POST, "/v1/fine_tuning/jobs", false),
            (Method::POST, "/v1/fine_tuning/jobs/ftjob-1/cancel", false),
            (Method::DELETE, "/v1/models/a", false),
            (Method::POST, "/v1/load_lora_adapter", false),
            (Method::GET, "/v1/files", false),
            (Method::GET, "/v1/modelsx", false),
            (Method::GET, "/v1/aliases/a", false),
            (Method::POST, "/v1/a_route_to_come", false),
        ] {
            let expected = if for_users { 200 } else { 403 };
            assert_eq!(method_status(&keys, &method, path, user), expected, "{method} {path}");
            assert_eq!(method_status(&keys, &method, path, root), 200, "{method} {path}");
            assert_eq!(method_status(&keys, &method, path, None), 401, "{method} {path}");
        }
    }
}

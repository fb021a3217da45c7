//! Forms with files, byte by byte.

use serde_json::Value;

use super::{http::Response, server::Server};

const BOUNDARY: &str = "----tunesmith-test";

/// The content type of [`form`].
pub const FORM: (&str, &str) = ("Content-Type", "multipart/form-data; boundary=----tunesmith-test");

/// A part without a name of a file.
pub fn field(name: &str, value: &str) -> Vec<u8> {
    part(&format!("name=\"{name}\""), value.as_bytes())
}

/// A part with a file.
pub fn file(name: &str, filename: &str, content: &[u8]) -> Vec<u8> {
    let header = format!(
        "name=\"{name}\"; filename=\"{filename}\"\r\nContent-Type: application/octet-stream"
    );
    part(&header, content)
}

/// A part with any header.
pub fn part(header: &str, content: &[u8]) -> Vec<u8> {
    let head = format!("--{BOUNDARY}\r\nContent-Disposition: form-data; {header}\r\n\r\n");
    [head.as_bytes(), content, b"\r\n"].concat()
}

/// A whole form.
pub fn form(parts: &[Vec<u8>]) -> Vec<u8> {
    [parts.concat(), format!("--{BOUNDARY}--\r\n").into_bytes()].concat()
}

/// Uploads a file as OpenAI's client does.
pub fn try_upload(server: &Server, purpose: &str, filename: &str, content: &[u8]) -> Response {
    let body = form(&[field("purpose", purpose), file("file", filename, content)]);
    server.request("POST", "/v1/files", &[FORM], &body)
}

/// An upload that must go well: the file.
pub fn upload(server: &Server, purpose: &str, filename: &str, content: &[u8]) -> Value {
    let response = try_upload(server, purpose, filename, content);
    assert_eq!(response.status, 200, "{response:?}");
    response.json()
}

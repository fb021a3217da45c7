//! HTTP/1.1 by hand: one connection, one request. Enough to see every byte that a server sends.

use std::{
    fmt,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    time::Duration,
};

use serde_json::Value;

/// No answer takes longer than this, or the test fails.
const TIMEOUT: Duration = Duration::from_secs(120);

/// A whole answer.
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl fmt::Debug for Response {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?} {}", self.status, self.headers, String::from_utf8_lossy(&self.body))
    }
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        find(&self.headers, name)
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// An answer that is still coming.
pub struct Exchange {
    reader: BufReader<TcpStream>,
    pub status: u16,
    pub headers: Vec<(String, String)>,
}

impl Exchange {
    /// Sends a request and reads the answer's head.
    pub fn start(
        address: &str,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> std::io::Result<Self> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        let mut head = format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\n");
        head += &format!("Connection: close\r\nContent-Length: {}\r\n", body.len());
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        stream.write_all(head.as_bytes())?;
        stream.write_all(b"\r\n")?;
        // A server may refuse before it has read everything.
        let _ = stream.write_all(body);
        let mut reader = BufReader::new(stream);
        let status = line(&mut reader)?.split(' ').nth(1).unwrap_or("0").parse().unwrap_or(0);
        let mut headers = Vec::new();
        loop {
            let line = line(&mut reader)?;
            let Some((name, value)) = line.split_once(':') else { break };
            headers.push((name.to_owned(), value.trim().to_owned()));
        }
        Ok(Self { reader, status, headers })
    }

    /// The rest of the answer.
    pub fn finish(mut self) -> std::io::Result<Response> {
        let mut body = Vec::new();
        if self.is_chunked() {
            while let Some(chunk) = self.chunk()? {
                body.extend(chunk);
            }
        } else {
            self.reader.read_to_end(&mut body)?;
        }
        Ok(Response { status: self.status, headers: self.headers, body })
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        find(&self.headers, name)
    }

    /// The text of a streamed chat answer, which must end with `[DONE]`.
    pub fn text(&mut self) -> String {
        let mut text = String::new();
        loop {
            let event = self.event().expect("[DONE] comes before the end");
            if event == "[DONE]" {
                return text;
            }
            let chunk: Value = serde_json::from_str(&event).unwrap();
            text += chunk["choices"][0]["delta"]["content"].as_str().unwrap_or_default();
        }
    }

    /// The data of the next server-sent event; `None` at the end of the answer.
    pub fn event(&mut self) -> Option<String> {
        let mut data = String::new();
        // One chunk per event, since the server flushes each.
        while let Some(chunk) = self.chunk().unwrap() {
            data += std::str::from_utf8(&chunk).unwrap();
            if data.ends_with("\n\n") {
                let data = data.strip_prefix("data: ").expect("an event starts with data");
                return Some(data.trim_end().to_owned());
            }
        }
        assert_eq!(data, "", "the stream ended within an event");
        None
    }

    fn is_chunked(&self) -> bool {
        self.header("transfer-encoding") == Some("chunked")
    }

    fn chunk(&mut self) -> std::io::Result<Option<Vec<u8>>> {
        let size = usize::from_str_radix(line(&mut self.reader)?.trim(), 16)
            .map_err(|error| std::io::Error::other(format!("chunk size: {error}")))?;
        let mut chunk = vec![0; size];
        self.reader.read_exact(&mut chunk)?;
        line(&mut self.reader)?;
        Ok((size > 0).then_some(chunk))
    }
}

fn find<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    let found = headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
    found.map(|(_, value)| value.as_str())
}

fn line(reader: &mut impl BufRead) -> std::io::Result<String> {
    let mut line = String::new();
    reader.read_line(&mut line)?;
    Ok(line.trim_end().to_owned())
}

//! The part of an address behind the `?`: pages of lists, filters, switches.

use super::error::ApiError;

/// The pairs of a query, decoded, in their order. What no handler asks for is ignored.
#[derive(Debug, Default)]
pub(crate) struct QueryPairs(Vec<(String, String)>);

impl QueryPairs {
    /// Takes a query apart.
    pub(crate) fn parse(query: Option<&str>) -> Self {
        let pairs = query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty());
        Self(
            pairs
                .map(|pair| {
                    let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
                    (decoded(&name.replace('+', " ")), decoded(&value.replace('+', " ")))
                })
                .collect(),
        )
    }

    /// The first value of `name`; an empty one counts as absent.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        let found = self.0.iter().find(|(key, value)| key == name && !value.is_empty());
        found.map(|(_, value)| value.as_str())
    }

    /// The number of objects on a page, 1 to `max`.
    pub(crate) fn limit(&self, default: usize, max: usize) -> Result<usize, ApiError> {
        let Some(text) = self.get("limit") else { return Ok(default) };
        match text.parse() {
            Ok(limit) if (1..=max).contains(&limit) => Ok(limit),
            _ => {
                let message = format!("`limit` must be 1 to {max}, not {text:?}");
                Err(ApiError::invalid("limit", message))
            }
        }
    }

    /// A switch: `true` or `false`, off where it is absent.
    pub(crate) fn flag(&self, name: &str) -> Result<bool, ApiError> {
        match self.get(name) {
            None | Some("false" | "0") => Ok(false),
            Some("true" | "1") => Ok(true),
            Some(other) => {
                let message = format!("`{name}` must be true or false, not {other:?}");
                Err(ApiError::invalid(name, message))
            }
        }
    }

    /// The pairs `name[key]=value`, as (key, value).
    pub(crate) fn members<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.0.iter().filter_map(move |(key, value)| {
            let key = key.strip_prefix(name)?.strip_prefix('[')?.strip_suffix(']')?;
            Some((key, value.as_str()))
        })
    }
}

/// Undoes `%XX`. What is no such triple stays as it is.
pub(crate) fn decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = (bytes[at] == b'%').then(|| text.get(at + 1..at + 3)).flatten();
        match hex.and_then(parse_hex) {
            Some(byte) => {
                plain.push(byte);
                at += 3;
            }
            None => {
                plain.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&plain).into_owned()
}

/// `from_str_radix` alone would take a sign.
fn parse_hex(digits: &str) -> Option<u8> {
    let is_hex = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    is_hex.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_decoded_and_members_found_in_either_spelling() {
        let query =
            QueryPairs::parse(Some("metadata%5Ba%20b%5D=c%3Dd&metadata[x]=&after=ft%3a1&&y"));
        let members: Vec<_> = query.members("metadata").collect();
        assert_eq!(members, [("a b", "c=d"), ("x", "")]);
        assert_eq!(query.get("after"), Some("ft:1"));
        assert_eq!(query.get("y"), None);
        assert_eq!(decoded("%zz%4"), "%zz%4");
        assert_eq!(decoded("%é%+1"), "%é%+1");
    }

    #[test]
    fn a_limit_is_a_number_in_its_range() {
        let limit = |text: &str| QueryPairs::parse(Some(text)).limit(20, 100).ok();
        assert_eq!(limit(""), Some(20));
        assert_eq!(limit("limit=1"), Some(1));
        assert_eq!(limit("limit=100"), Some(100));
        for wrong in ["limit=0", "limit=101", "limit=-1", "limit=x", "limit=1.5"] {
            assert_eq!(limit(wrong), None, "{wrong}");
        }
    }
}

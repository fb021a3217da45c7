//! Values as Python writes them, character for character: `json.dumps` and `repr(float)`.

use std::fmt::Write;

use minijinja::{
    Error, ErrorKind, Value,
    value::{ValueIter, ValueKind},
};

/// Deepest nesting that is written; beyond it a template is building something no model reads.
const MAX_DEPTH: usize = 128;

/// Longest JSON that is written, in bytes: lists that grow by `+` exist only while one walks them.
const MAX_LEN: usize = 16 << 20;

/// The arguments of `json.dumps`.
pub(super) struct JsonStyle {
    /// Escape everything outside ASCII as `\uXXXX`.
    pub(super) ensure_ascii: bool,
    /// Written once per level at the start of each line; `None` writes one line.
    pub(super) indent: Option<String>,
    /// Between items.
    pub(super) item_separator: String,
    /// Between a key and its value.
    pub(super) key_separator: String,
    /// Write the keys of objects in sorted order.
    pub(super) sort_keys: bool,
}

/// `json.dumps(value, ...)`. Undefined values and functions are errors, as in Python; what
/// minijinja calls an iterator is written as the list that it mostly is in Python.
pub(super) fn json_dumps(value: &Value, style: &JsonStyle) -> Result<String, Error> {
    let mut json = JsonWriter { out: String::new(), style };
    json.value(value, 0)?;
    Ok(json.out)
}

struct JsonWriter<'a> {
    out: String,
    style: &'a JsonStyle,
}

impl JsonWriter<'_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(invalid("tojson: the value is nested too deeply"));
        }
        let kind = value.kind();
        if let Some(text) = value.as_str() {
            self.string(text);
        } else if kind == ValueKind::Map {
            self.map(value, depth)?;
        } else if matches!(kind, ValueKind::Seq | ValueKind::Iterable) {
            self.sequence(value.try_iter()?, depth)?;
        } else {
            self.out.push_str(&scalar(value)?);
        }
        Ok(())
    }

    fn sequence(&mut self, items: ValueIter, depth: usize) -> Result<(), Error> {
        self.out.push('[');
        let mut is_empty = true;
        for item in items {
            if self.out.len() > MAX_LEN {
                return Err(invalid("tojson: the value is too long"));
            }
            self.start_item(is_empty, depth + 1);
            is_empty = false;
            self.value(&item, depth + 1)?;
        }
        self.end(is_empty, depth, ']');
        Ok(())
    }

    fn map(&mut self, map: &Value, depth: usize) -> Result<(), Error> {
        let mut keys: Vec<Value> = map.try_iter()?.collect();
        if self.style.sort_keys {
            keys.sort();
        }
        self.out.push('{');
        for (index, key) in keys.iter().enumerate() {
            self.start_item(index == 0, depth + 1);
            match key.as_str() {
                Some(text) => self.string(text),
                None => self.string(&scalar(key)?),
            }
            self.out.push_str(&self.style.key_separator);
            self.value(&map.get_item(key)?, depth + 1)?;
        }
        self.end(keys.is_empty(), depth, '}');
        Ok(())
    }

    fn start_item(&mut self, is_first: bool, depth: usize) {
        if !is_first {
            self.out.push_str(&self.style.item_separator);
        }
        self.start_line(depth);
    }

    fn end(&mut self, is_empty: bool, depth: usize, bracket: char) {
        if !is_empty {
            self.start_line(depth);
        }
        self.out.push(bracket);
    }

    fn start_line(&mut self, depth: usize) {
        if let Some(indent) = &self.style.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(indent.as_str(), depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.style.ensure_ascii && c > '\u{7e}') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        write!(self.out, "\\u{unit:04x}").expect("a String takes every write");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

fn scalar(value: &Value) -> Result<String, Error> {
    let kind = value.kind();
    if kind == ValueKind::None {
        Ok("null".to_owned())
    } else if kind == ValueKind::Bool {
        Ok(if value.is_true() { "true" } else { "false" }.to_owned())
    } else if value.is_integer() {
        Ok(value.to_string())
    } else if kind == ValueKind::Number {
        Ok(match f64::try_from(value.clone())? {
            f64::INFINITY => "Infinity".to_owned(),
            f64::NEG_INFINITY => "-Infinity".to_owned(),
            number if number.is_nan() => "NaN".to_owned(),
            number => float_repr(number),
        })
    } else {
        Err(invalid(format!("tojson: {kind} is not JSON serializable")))
    }
}

fn invalid(detail: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, detail)
}

/// `repr(float)`: the shortest digits that read back the same, as a decimal between 1e-4 and 1e16.
pub(super) fn float_repr(number: f64) -> String {
    let magnitude = number.abs();
    if !number.is_finite() {
        return number.to_string().to_lowercase(); // nan, inf, -inf
    }
    if magnitude == 0.0 || (1e-4..1e16).contains(&magnitude) {
        return format!("{number:?}");
    }
    // Rust writes 1e-5, Python 1e-05: a sign and at least two digits.
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').expect("{:e} writes an exponent");
    let exponent: i32 = exponent.parse().expect("{:e} writes a whole exponent");
    format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_written_as_python_writes_them() {
        let cases = [
            (1.0, "1.0"),
            (-0.0, "-0.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (-1.25e-7, "-1.25e-07"),
            (f64::INFINITY, "inf"),
            (f64::NAN, "nan"),
        ];
        for (number, expected) in cases {
            assert_eq!(float_repr(number), expected);
        }
    }
}

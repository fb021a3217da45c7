//! The corners of Python's standard library that chat templates show in their output:
//! `json.dumps`, `repr(float)` and `datetime.strftime`, character for character.

use std::{fmt::Write, time::SystemTime};

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

const DAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// `datetime.strftime(format)` of a moment in UTC, in the C locale. As in glibc, `-` after the `%`
/// drops the padding and an unknown directive stands for itself.
pub(super) fn strftime(format: &str, moment: SystemTime) -> String {
    let now = Utc::from(moment);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        let unpadded = directive == Some('-');
        if unpadded {
            directive = chars.next();
        }
        match directive.and_then(|directive| now.directive(directive, unpadded)) {
            Some(text) => out.push_str(&text),
            None => {
                out.push('%');
                out.extend(unpadded.then_some('-'));
                out.extend(directive);
            }
        }
    }
    out
}

/// A moment as the calendar and the clock show it.
struct Utc {
    year: i64,
    /// From 0.
    month: usize,
    /// From 1.
    day: i64,
    /// From 0, the first of January.
    day_of_year: i64,
    /// From 0, Sunday.
    weekday: usize,
    /// Since midnight.
    seconds: i64,
    microseconds: u32,
}

impl From<SystemTime> for Utc {
    fn from(moment: SystemTime) -> Self {
        let since_epoch = moment.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let total = i64::try_from(since_epoch.as_secs()).unwrap_or(0);
        let mut days = total / 86_400;
        let weekday = ((days + 4) % 7) as usize; // 1970-01-01 was a Thursday.
        let mut year = 1970;
        while days >= days_in_year(year) {
            days -= days_in_year(year);
            year += 1;
        }
        let (day_of_year, mut month) = (days, 0);
        while days >= days_in_month(year, month) {
            days -= days_in_month(year, month);
            month += 1;
        }
        Self {
            year,
            month,
            day: days + 1,
            day_of_year,
            weekday,
            seconds: total % 86_400,
            microseconds: since_epoch.subsec_micros(),
        }
    }
}

impl Utc {
    /// The text of one directive; `None` if there is no such directive.
    fn directive(&self, directive: char, unpadded: bool) -> Option<String> {
        let number = |value: i64, width: usize| match unpadded {
            true => value.to_string(),
            false => format!("{value:0width$}"),
        };
        let hour = self.seconds / 3600;
        Some(match directive {
            'a' => DAYS[self.weekday][..3].to_owned(),
            'A' => DAYS[self.weekday].to_owned(),
            'b' | 'h' => MONTHS[self.month][..3].to_owned(),
            'B' => MONTHS[self.month].to_owned(),
            'd' => number(self.day, 2),
            'e' if unpadded => self.day.to_string(),
            'e' => format!("{:2}", self.day),
            'm' => number(self.month as i64 + 1, 2),
            'y' => number(self.year % 100, 2),
            'Y' => self.year.to_string(),
            'H' => number(hour, 2),
            'I' => number((hour + 11) % 12 + 1, 2),
            'p' => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            'M' => number(self.seconds / 60 % 60, 2),
            'S' => number(self.seconds % 60, 2),
            'f' => format!("{:06}", self.microseconds),
            'j' => number(self.day_of_year + 1, 3),
            'w' => self.weekday.to_string(),
            'u' => ((self.weekday + 6) % 7 + 1).to_string(),
            'F' => self.all(&["%Y", "-", "%m", "-", "%d"]),
            'D' | 'x' => self.all(&["%m", "/", "%d", "/", "%y"]),
            'T' | 'X' => self.all(&["%H", ":", "%M", ":", "%S"]),
            'R' => self.all(&["%H", ":", "%M"]),
            'c' => self.all(&["%a", " ", "%b", " ", "%e", " ", "%T", " ", "%Y"]),
            // A datetime without a time zone writes nothing for these.
            'z' | 'Z' => String::new(),
            'n' => "\n".to_owned(),
            't' => "\t".to_owned(),
            '%' => "%".to_owned(),
            _ => return None,
        })
    }

    fn all(&self, parts: &[&str]) -> String {
        let text = |part: &&str| match part.strip_prefix('%') {
            Some(name) => self.directive(name.chars().next()?, false),
            None => Some((*part).to_owned()),
        };
        parts.iter().filter_map(text).collect()
    }
}

fn is_leap(year: i64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

fn days_in_year(year: i64) -> i64 {
    if is_leap(year) { 366 } else { 365 }
}

fn days_in_month(year: i64, month: usize) -> i64 {
    match month {
        1 if is_leap(year) => 29,
        1 => 28,
        3 | 5 | 8 | 10 => 30,
        _ => 31,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn dates_match_python() {
        // datetime.fromtimestamp(t, timezone.utc).replace(tzinfo=None).strftime(...)
        let format =
            "%A %d %B %Y %H:%M:%S|%a %e %b %y %I %p %j %w %u|%-d/%-m|%F %T %D %R|%c|%Z%%%Q%";
        assert_eq!(
            strftime(format, at(951_782_400)),
            "Tuesday 29 February 2000 00:00:00|Tue 29 Feb 00 12 AM 060 2 2|29/2|2000-02-29 00:00:00 02/29/00 00:00|Tue Feb 29 00:00:00 2000|%%Q%"
        );
        assert_eq!(
            strftime(format, at(1_767_225_599)),
            "Wednesday 31 December 2025 23:59:59|Wed 31 Dec 25 11 PM 365 3 3|31/12|2025-12-31 23:59:59 12/31/25 23:59|Wed Dec 31 23:59:59 2025|%%Q%"
        );
        assert_eq!(strftime("%d %b %Y|%e|%-I", at(0)), "01 Jan 1970| 1|12");
    }

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

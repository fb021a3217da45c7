//! A Jinja environment that behaves like the one in which transformers renders chat templates.
//!
//! Where it differs: what is missing ends the rendering with an error (`%` on strings, the filters
//! `wordcount` and `urlencode`, `cycler`, rare methods such as `str.ljust`); looping over `none`
//! does nothing instead of failing; `loop.last` stays false while looping over the characters of a
//! string; a list or object that is printed without `tojson` shows invisible characters and floats
//! from 1e16 as minijinja writes them. `strftime_now` tells the time in UTC.

use std::time::SystemTime;

use minijinja::{
    AutoEscape, Environment, Error, ErrorKind, State, Value,
    syntax::SyntaxConfig,
    value::{Kwargs, Tuple, ValueKind, from_args},
};
use minijinja_contrib::pycompat;

use crate::text::{
    python::{JsonStyle, float_repr, json_dumps},
    strftime::strftime,
};

/// Work that one rendering may do: instructions, and 1/64 for each byte produced. It is some fifty
/// times what a conversation of a hundred thousand tokens needs, ends a runaway template within a
/// second, and bounds what it can allocate to a quarter of a GiB (only lists that are doubled with
/// `+` escape the account, so a template is as trusted as the model it comes with).
const FUEL: u64 = 4_000_000;
/// Widest indentation of `tojson`, in characters.
const MAX_INDENT: usize = 64;

/// What a template said through `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct RaisedByTemplate(pub(super) String);

/// An environment without templates, whose `strftime_now` asks `clock`.
pub(super) fn environment(clock: fn() -> SystemTime) -> Environment<'static> {
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    env.set_syntax(syntax.expect("the default delimiters are valid"));
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_fuel(Some(FUEL));
    env.set_debug(false);
    env.set_formatter(|out, _, value| out.write_str(&python_str(value)).map_err(Error::from));
    env.set_unknown_method_callback(python_method);
    env.add_filter("tojson", tojson);
    env.add_filter("string", python_str);
    env.add_filter("default", default);
    env.add_filter("d", default);
    env.add_filter("escape", escape);
    env.add_filter("e", escape);
    env.add_test("sequence", is_sequence);
    env.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    env.add_function("raise_exception", raise_exception);
    set_clock(&mut env, clock);
    env
}

/// Makes `strftime_now` ask `clock`.
pub(super) fn set_clock(
    env: &mut Environment<'static>,
    clock: impl Fn() -> SystemTime + Send + Sync + 'static,
) {
    env.add_function("strftime_now", move |format: &str| strftime(format, clock()));
}

/// The template's source as minijinja reads it: jinja2's line ends, and without transformers' own
/// `{% generation %}` block, which marks text for training and opens a scope like `{% with %}`.
pub(super) fn normalize(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_str();
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start + 2);
        out.push_str(before);
        rest = tag;
        let word_start = tag.len() - tag.trim_start_matches(['-', '+']).trim_start().len();
        let word = &tag[word_start..];
        let word_len = word.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(word.len());
        let replacement = match &word[..word_len] {
            "generation" => "with",
            "endgeneration" => "endwith",
            _ => continue,
        };
        out.push_str(&tag[..word_start]);
        out.push_str(replacement);
        rest = &word[word_len..];
    }
    out.push_str(rest);
    out
}

/// A JSON value as templates see it.
pub(super) fn to_template_value(json: &serde_json::Value) -> Value {
    match json {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(value) => Value::from(*value),
        serde_json::Value::String(text) => Value::from(text.as_str()),
        serde_json::Value::Array(items) => items.iter().map(to_template_value).collect(),
        serde_json::Value::Object(map) => {
            Value::from_pairs(map.iter().map(|(key, item)| (key.as_str(), to_template_value(item))))
        }
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(value), _) => Value::from(value),
            (None, Some(value)) => Value::from(value),
            (None, None) => Value::from(number.as_f64()),
        },
    }
}

fn raise_exception(message: &Value) -> Result<Value, Error> {
    let message = message.to_string();
    Err(Error::new(ErrorKind::InvalidOperation, message.clone())
        .with_source(RaisedByTemplate(message)))
}

/// transformers' `tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
#[expect(clippy::needless_pass_by_value, reason = "minijinja hands arguments over by value")]
fn tojson(
    value: &Value,
    ensure_ascii: Option<bool>,
    indent: Option<Value>,
    separators: Option<Vec<String>>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let ensure_ascii = ensure_ascii.or(kwargs.get("ensure_ascii")?).unwrap_or(false);
    let indent = indent.or(kwargs.get("indent")?).map(|indent| indent_text(&indent)).transpose()?;
    let separators = separators.or(kwargs.get("separators")?);
    let sort_keys = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    kwargs.assert_all_used()?;
    let (item_separator, key_separator) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(invalid("tojson: separators must be two strings")),
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
    };
    let indent = indent.flatten();
    let style = JsonStyle { ensure_ascii, indent, item_separator, key_separator, sort_keys };
    json_dumps(value, &style)
}

/// What one level of indentation looks like; `None` for one line.
fn indent_text(indent: &Value) -> Result<Option<String>, Error> {
    if indent.is_none() {
        return Ok(None);
    }
    let text = match indent.as_str() {
        Some(text) => text.to_owned(),
        None => " ".repeat(usize::try_from(indent.clone())?.min(MAX_INDENT + 1)),
    };
    if text.len() > MAX_INDENT {
        return Err(invalid("tojson: the indentation is too wide"));
    }
    Ok(Some(text))
}

/// minijinja's own takes no keyword arguments.
#[expect(clippy::needless_pass_by_value, reason = "minijinja hands arguments over by value")]
fn default(
    value: &Value,
    fallback: Option<Value>,
    boolean: Option<Value>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let fallback = fallback.or(kwargs.get("default_value")?).unwrap_or_else(|| Value::from(""));
    let boolean = boolean.or(kwargs.get("boolean")?).is_some_and(|boolean| boolean.is_true());
    kwargs.assert_all_used()?;
    let is_missing = value.is_undefined() || (boolean && !value.is_true());
    Ok(if is_missing { fallback } else { value.clone() })
}

/// HTML escapes as markupsafe writes them.
fn escape(value: &Value) -> Value {
    let mut out = String::new();
    for c in python_str(value).chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            c => out.push(c),
        }
    }
    Value::from(out)
}

/// jinja2 calls a sequence whatever has a length and can be indexed.
fn is_sequence(value: &Value) -> bool {
    use ValueKind::{Iterable, Map, Seq, String, Undefined};
    // A slice or a sum of lists is an iterator here.
    matches!(value.kind(), Seq | Iterable | String | Map | Undefined)
}

/// `str(value)`. minijinja writes what Python writes, but never a float with an exponent.
fn python_str(value: &Value) -> String {
    let is_float = value.kind() == ValueKind::Number && !value.is_integer();
    match is_float.then(|| f64::try_from(value.clone())) {
        Some(Ok(number)) => float_repr(number),
        _ => value.to_string(),
    }
}

fn invalid(detail: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, detail)
}

/// Methods of Python's `str`, `list` and `dict`: those that pycompat lacks, then pycompat's.
fn python_method(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let Some(text) = value.as_str() else {
        return pycompat::unknown_method_callback(state, value, method, args);
    };
    match method {
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)))
        }
        "partition" => {
            let (separator,): (&str,) = from_args(args)?;
            let parts = text.split_once(separator);
            Ok(parts.map_or_else(|| triple(text, "", ""), |(a, b)| triple(a, separator, b)))
        }
        "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let parts = text.rsplit_once(separator);
            Ok(parts.map_or_else(|| triple("", "", text), |(a, b)| triple(a, separator, b)))
        }
        "rsplit" => {
            let (separator, max_splits): (&str, Option<i64>) = from_args(args)?;
            let limit = usize::try_from(max_splits.unwrap_or(-1)).map_or(usize::MAX, |max| max + 1);
            let mut parts: Vec<&str> = text.rsplitn(limit, separator).collect();
            parts.reverse();
            Ok(parts.into_iter().collect())
        }
        _ => pycompat::unknown_method_callback(state, value, method, args),
    }
}

fn triple(before: &str, separator: &str, after: &str) -> Value {
    Value::from(Tuple::from([before, separator, after].map(Value::from)))
}

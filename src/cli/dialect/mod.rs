//! Configuration files of other trainers, read as they are. One file per dialect, each with a table
//! that says of every key it may have whether it has the same meaning here, none, or none that can be
//! honoured; the last are refused by name, all at once.
//!
//! A dialect's defaults come along: a key that the file does not have means what it means there.

mod autotrain;
mod theirs;
mod trl;

use std::collections::BTreeSet;

use anyhow::bail;
use serde_json::{Map, Value, json};

pub(super) use self::theirs::Theirs;

/// A trainer whose configuration files are understood.
struct Dialect {
    name: &'static str,
    /// Whether a file with these keys is one of its.
    detect: fn(&Map<String, Value>) -> bool,
    /// Maps whose keys count as `outer.inner`.
    nested: &'static [&'static str],
    /// Every known key. Other ones are errors.
    keys: &'static [(&'static str, Rule)],
    /// What takes more than one key to say, and the defaults.
    finish: fn(&Theirs, &mut Translation),
}

/// Every dialect, in the order in which they are tried.
const DIALECTS: &[Dialect] = &[autotrain::DIALECT, trl::DIALECT];

/// What a key of a dialect means here.
enum Rule {
    /// A number that has this name here.
    Number(&'static str),
    /// Yes or no, under this name.
    Flag(&'static str),
    /// Text, under this name.
    Text(&'static str),
    /// Looked at by `finish`.
    Read,
    /// Nothing that would change what is trained.
    Harmless,
    /// Nothing here, which its user should know where it is set: why.
    Ignored(&'static str),
    /// Cannot be honoured where it is set: what to do instead.
    Refused(&'static str),
}

/// A file of a dialect in the words of this program.
#[derive(Debug, Default)]
pub(super) struct Translation {
    /// Whose file it is.
    pub(super) dialect: &'static str,
    /// Under the names that they have here.
    pub(super) settings: Map<String, Value>,
    /// Those that the file left open.
    pub(super) assumed: BTreeSet<String>,
    /// What its author should know, a line each.
    pub(super) notices: Vec<String>,
    /// Keys without a meaning here.
    pub(super) without_effect: Vec<String>,
    /// Validate at the end of each epoch, however many steps that is.
    pub(super) eval_each_epoch: bool,
    errors: Vec<String>,
}

impl Translation {
    /// Sets what the file left open.
    fn set_defaults(&mut self, defaults: &[(&str, f64)]) {
        for (key, value) in defaults {
            if !self.settings.contains_key(*key) {
                self.set(key, plain(*value));
                self.assumed.insert((*key).to_owned());
            }
        }
    }

    fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.settings.insert(key.to_owned(), value.into());
    }

    fn notice(&mut self, text: impl Into<String>) {
        self.notices.push(text.into());
    }

    fn refuse(&mut self, text: impl Into<String>) {
        self.errors.push(text.into());
    }

    /// The translation for the reader, a line each.
    pub(super) fn lines(&self, file: &str) -> Vec<String> {
        let mut lines =
            vec![format!("{file} is a configuration of {}; here it means", self.dialect)];
        lines.extend(self.settings.iter().map(|(key, value)| format!("  {key}: {value}")));
        if self.eval_each_epoch {
            lines.push("  (and a validation at the end of each epoch)".to_owned());
        }
        if !self.without_effect.is_empty() {
            lines.push(format!("  without effect here: {}", self.without_effect.join(", ")));
        }
        lines.extend(self.notices.iter().map(|notice| format!("  note: {notice}")));
        lines
    }
}

/// What `file`, the keys of a YAML file, means here; `None` where it speaks no dialect. `objective` is
/// what a flag has asked for.
///
/// # Errors
/// Every key that is unknown, wrong or cannot be honoured, all at once.
pub(super) fn translate(
    file: &Map<String, Value>,
    objective: Option<&str>,
) -> anyhow::Result<Option<Translation>> {
    let Some(dialect) = DIALECTS.iter().find(|dialect| (dialect.detect)(file)) else {
        return Ok(None);
    };
    let theirs = Theirs::new(file, dialect.nested, objective);
    let mut translation = Translation { dialect: dialect.name, ..Translation::default() };
    for (key, value) in theirs.entries() {
        match dialect.keys.iter().find(|(name, _)| name == key) {
            Some((_, rule)) => apply(rule, key, value, &theirs, &mut translation),
            None => translation.refuse(format!("{key}: {} has no such key", dialect.name)),
        }
    }
    (dialect.finish)(&theirs, &mut translation);
    translation.errors.extend(theirs.into_errors());
    translation.errors.dedup();
    match translation.errors.as_slice() {
        [] => Ok(Some(translation)),
        errors => bail!("as a configuration of {}:\n  {}", dialect.name, errors.join("\n  ")),
    }
}

fn apply(rule: &Rule, key: &str, value: &Value, theirs: &Theirs, translation: &mut Translation) {
    match rule {
        Rule::Number(ours) => {
            if let Some(number) = theirs.number(key) {
                translation.set(ours, plain(number));
            }
        }
        Rule::Flag(ours) => {
            if let Some(flag) = theirs.flag(key) {
                translation.set(ours, flag);
            }
        }
        Rule::Text(ours) => {
            if let Some(text) = theirs.text(key) {
                translation.set(ours, text);
            }
        }
        Rule::Read => {}
        Rule::Harmless => translation.without_effect.push(key.to_owned()),
        Rule::Ignored(why) if is_set(value) => translation.notice(format!("{key}: {why}")),
        Rule::Refused(instead) if is_set(value) => {
            translation.refuse(format!("{key}: {instead}"));
        }
        Rule::Ignored(_) | Rule::Refused(_) => translation.without_effect.push(key.to_owned()),
    }
}

/// Whether a value asks for anything.
fn is_set(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(on) => *on,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !["", "no", "off", "false", "0", "0.0"].contains(&text.as_str()),
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
    }
}

/// A number without a needless fraction: 3 for 3.0, so that whole numbers stay whole.
fn plain(number: f64) -> Value {
    const EXACT: f64 = 9e15;
    if number.fract() == 0.0 && number.abs() < EXACT { json!(number as i64) } else { json!(number) }
}

/// The optimizer that both dialects name as transformers does.
fn optimizer(key: &str, name: &str, translation: &mut Translation) {
    const SAME: &[&str] = &["adamw_torch", "adamw_torch_fused", "adamw", "adamw_hf"];
    if !SAME.contains(&name) {
        translation.notice(format!("{key}: {name} is AdamW with moments in f32 here"));
    }
}

/// A base under an adapter that is rounded to `form`, which is not that of bitsandbytes.
fn quantized(key: &str, form: &str, translation: &mut Translation) {
    translation.set("quantize", form);
    translation.notice(format!(
        "{key}: the base is rounded as `--quantize {form}` does it, other than bitsandbytes; \
         `--quantize none` leaves it as it is"
    ));
}

/// The course of the learning rate as transformers names it; `constant` there ignores the warm-up.
fn schedule(key: &str, name: &str, translation: &mut Translation) {
    let ours = match name {
        "linear" => "linear",
        "cosine" | "cosine_warmup" => "cosine",
        "constant" | "constant_with_warmup" => "constant",
        _ => {
            translation.refuse(format!(
                "{key}: {name} is not available; use linear, cosine, constant or constant_with_warmup"
            ));
            return;
        }
    };
    if name == "constant" {
        translation.set("warmup_ratio", 0);
        translation.set("warmup_steps", 0);
    }
    translation.set("schedule", ours);
}

/// When to validate, as transformers says it; returns whether at all.
fn validation(
    key: &str,
    strategy: &str,
    steps: Option<f64>,
    translation: &mut Translation,
) -> bool {
    match strategy {
        "no" | "false" => return false,
        "epoch" => translation.eval_each_epoch = true,
        "steps" => translation.set("eval_every", plain(steps.unwrap_or(500.0))),
        _ => translation.refuse(format!("{key}: {strategy} is not known; use no, steps or epoch")),
    }
    true
}

//! Graders that ask a model: how they ask, and how its answer is read.

use serde_json::{Value, json};

use super::{Fault, FaultKind, Invalid};

/// How a model writes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// 0: greedy.
    pub temperature: f32,
    /// Above 0, to 1.
    pub top_p: f32,
    /// Decides every draw.
    pub seed: u64,
    /// Most tokens of the answer; `None`: what the context leaves.
    pub max_tokens: Option<usize>,
}

/// Fields of `sampling_params` whose effect is not implemented, unless they ask for nothing.
const UNSUPPORTED: [&str; 3] = ["response_format", "text", "tools"];
/// Names of the limit on an answer's tokens, all of which OpenAI's documentation uses.
const LIMITS: [&str; 3] = ["max_completion_tokens", "max_completions_tokens", "max_tokens"];
/// OpenAI's default.
const DEFAULT_SEED: u64 = 42;

impl Sampling {
    /// Reads `sampling_params`; what is not given is `temperature` and OpenAI's defaults.
    ///
    /// # Errors
    /// The first field that is out of range or not supported, with its place.
    pub fn parse(value: &Value, param: &str, temperature: f32) -> Result<Self, Invalid> {
        let place = |field: &str| format!("{param}.{field}");
        if !value.is_object() && !value.is_null() {
            return Err(Invalid::new(param, "must be an object"));
        }
        let number = |field: &str, range: std::ops::RangeInclusive<f64>| {
            let given = &value[field];
            let number = given.as_f64().filter(|given| range.contains(given));
            if number.is_none() && !given.is_null() {
                let (low, high) = (range.start(), range.end());
                return Err(Invalid::new(
                    place(field),
                    format!("must be {low} to {high}, not {given}"),
                ));
            }
            Ok(number)
        };
        for field in UNSUPPORTED {
            let asked = &value[field];
            let is_plain = asked["type"] == "text" || asked["format"]["type"] == "text";
            if !(asked.is_null() || is_plain || *asked == json!([])) {
                return Err(Invalid::new(place(field), "is not supported by this server"));
            }
        }
        let mut max_tokens = None;
        for field in LIMITS {
            let limit = number(field, 1.0..=f64::from(u32::MAX))?;
            max_tokens = max_tokens.or(limit.map(|limit| limit as usize));
        }
        let seed = value["seed"].as_i64().map(|seed| u64::from_ne_bytes(seed.to_ne_bytes()));
        if seed.is_none() && !value["seed"].is_null() {
            return Err(Invalid::new(place("seed"), "must be an integer"));
        }
        Ok(Self {
            temperature: number("temperature", 0.0..=2.0)?.map_or(temperature, |t| t as f32),
            top_p: number("top_p", 1e-6..=1.0)?.map_or(1.0, |top_p| top_p as f32),
            seed: seed.unwrap_or(DEFAULT_SEED),
            max_tokens,
        })
    }
}

/// What a judge is told after the question about a score.
pub(super) fn score_instruction([low, high]: [f64; 2]) -> String {
    format!("Answer with one number from {low} to {high} and nothing else.")
}

/// What a judge is told after the question about a label.
pub(super) fn label_instruction(labels: &[String]) -> String {
    format!("Answer with one of these labels and nothing else: {}", labels.join(", "))
}

/// Adds `instruction` to the last message, or as a message of its own behind an assistant's.
pub(super) fn with_instruction(mut messages: Vec<Value>, instruction: &str) -> Vec<Value> {
    match messages.last_mut() {
        Some(last) if last["role"] == "user" => {
            let text = last["content"].as_str().unwrap_or_default();
            last["content"] = format!("{text}\n\n{instruction}").into();
        }
        _ => messages.push(json!({"role": "user", "content": instruction})),
    }
    messages
}

/// The score in a judge's answer: the whole answer, `result` or `score` of a JSON object, or the only
/// number in the text.
pub(super) fn read_score(answer: &str, [low, high]: [f64; 2]) -> Result<f64, Fault> {
    let wrong = |what: String| Fault { kind: FaultKind::ModelParse, message: what };
    let text = answer.trim();
    let score = text.parse().ok().or_else(|| {
        let json: Value = serde_json::from_str(text).ok()?;
        json["result"].as_f64().or_else(|| json["score"].as_f64())
    });
    let score = match score {
        Some(score) => score,
        None => match numbers(text).as_slice() {
            [only] => *only,
            [] => return Err(wrong(format!("the judge gave no number: {}", short(text)))),
            _ => return Err(wrong(format!("the judge gave several numbers: {}", short(text)))),
        },
    };
    if (low..=high).contains(&score) {
        return Ok(score);
    }
    Err(wrong(format!("the judge's score {score} is not within {low} to {high}")))
}

/// The label in a judge's answer: the whole answer, `label` or `result` of a JSON object, or the only
/// label that the text has as words of its own.
pub(super) fn read_label<'a>(answer: &str, labels: &'a [String]) -> Result<&'a str, Fault> {
    let marks = |c: char| c.is_whitespace() || matches!(c, '"' | '\'' | '`' | '.' | '*' | ':');
    let text = answer.trim_matches(marks);
    let same = |word: &str| {
        labels.iter().find(|label| label.to_lowercase() == word.trim_matches(marks).to_lowercase())
    };
    let json: Value = serde_json::from_str(answer.trim()).unwrap_or_default();
    let named = json["label"].as_str().or_else(|| json["result"].as_str());
    if let Some(label) = same(text).or_else(|| named.and_then(same)) {
        return Ok(label);
    }
    let mut found: Vec<&String> = labels.iter().filter(|label| has_words(text, label)).collect();
    // "not good" is not "good": the longest one that is there counts, where it holds the others.
    if let Some(longest) = found.iter().copied().max_by_key(|label| label.len()) {
        found.retain(|label| *label == longest || !has_words(longest, label));
    }
    match found.as_slice() {
        [only] => Ok(only),
        _ => {
            let message = format!("the judge's answer is none of the labels: {}", short(text));
            Err(Fault { kind: FaultKind::ModelParse, message })
        }
    }
}

fn has_words(text: &str, words: &str) -> bool {
    let (text, words) = (text.to_lowercase(), words.to_lowercase());
    let is_edge = |c: Option<char>| c.is_none_or(|c| !c.is_alphanumeric());
    text.match_indices(&words).any(|(at, found)| {
        is_edge(text[..at].chars().next_back()) && is_edge(text[at + found.len()..].chars().next())
    })
}

/// Every number in a text.
fn numbers(text: &str) -> Vec<f64> {
    let is_part = |c: char| c.is_ascii_digit() || matches!(c, '.' | '-' | '+');
    text.split(|c: char| !is_part(c) && !c.is_alphanumeric() && c != '_')
        .map(|word| word.trim_end_matches('.'))
        .filter_map(|word| word.parse().ok())
        .filter(|number: &f64| number.is_finite())
        .collect()
}

fn short(text: &str) -> String {
    const MAX_CHARS: usize = 80;
    let mut start: String = text.chars().take(MAX_CHARS).collect();
    if start.len() < text.len() {
        start.push('…');
    }
    format!("{start:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_score_is_read_in_the_forms_models_write_it() {
        for (answer, score) in [
            ("3", 3.0),
            (" 2.5\n", 2.5),
            ("Score: 4.", 4.0),
            ("**3**", 3.0),
            ("I give it 1 because it is short", 1.0),
            ("{\"steps\": [1, 2], \"result\": 3.5}", 3.5),
            ("{\"score\": 2}", 2.0),
        ] {
            assert_eq!(read_score(answer, [0.0, 4.0]).unwrap(), score, "{answer}");
        }
        for answer in ["", "very good", "3 or 4", "5", "-1", "nan", "inf"] {
            let fault = read_score(answer, [0.0, 4.0]).unwrap_err();
            assert_eq!(fault.kind, FaultKind::ModelParse, "{answer}");
        }
    }

    #[test]
    fn a_label_is_read_in_the_forms_models_write_it() {
        let labels = ["good", "bad", "not good"].map(str::to_owned);
        for (answer, label) in [
            ("good", "good"),
            (" Bad.\n", "bad"),
            ("\"not good\"", "not good"),
            ("Label: **bad**", "bad"),
            ("{\"label\": \"good\"}", "good"),
            ("I find it not good at all", "not good"),
        ] {
            assert_eq!(read_label(answer, &labels).unwrap(), label, "{answer}");
        }
        for answer in ["", "fine", "good or bad", "goodness"] {
            assert!(read_label(answer, &labels).is_err(), "{answer}");
        }
    }

    #[test]
    fn sampling_has_defaults_and_ranges() {
        let none = Sampling::parse(&Value::Null, "p", 0.0).unwrap();
        assert_eq!(
            (none.temperature, none.top_p, none.seed, none.max_tokens),
            (0.0, 1.0, 42, None)
        );
        let given = json!({"temperature": 1, "top_p": 0.5, "seed": 7, "max_completions_tokens": 9,
            "response_format": {"type": "text"}});
        let given = Sampling::parse(&given, "p", 0.0).unwrap();
        assert_eq!((given.temperature, given.seed, given.max_tokens), (1.0, 7, Some(9)));
        for (value, param) in [
            (json!({"temperature": 3}), "p.temperature"),
            (json!({"top_p": 0}), "p.top_p"),
            (json!({"seed": "x"}), "p.seed"),
            (json!({"max_tokens": 0}), "p.max_tokens"),
            (json!({"tools": [{}]}), "p.tools"),
            (json!({"response_format": {"type": "json_object"}}), "p.response_format"),
            (json!([]), "p"),
        ] {
            assert_eq!(Sampling::parse(&value, "p", 0.0).unwrap_err().param, param);
        }
    }
}

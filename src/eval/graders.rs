//! Graders: answer and reference in, a score from 0 to 1 out. A new one is a function here and a
//! line in [`GRADERS`]; reports, comparisons and requirements pick it up by themselves.

use std::collections::HashMap;

use serde_json::Value;

/// One way to score an answer.
#[derive(Debug, Clone, Copy)]
pub struct Grader {
    /// The metric's name in reports and requirements.
    pub name: &'static str,
    /// How a table or a chart calls it.
    pub title: &'static str,
    /// True if every score is 0 or 1, so that McNemar's exact test applies.
    pub is_binary: bool,
    /// The score of an answer (first) against the reference (second), 0 to 1.
    pub grade: fn(&str, &str) -> f64,
}

/// Every grader, the deciding one first.
pub const GRADERS: &[Grader] = &[
    Grader { name: "exact_match", title: "exact match", is_binary: true, grade: exact_match },
    Grader { name: "f1", title: "F1", is_binary: false, grade: list_f1 },
    Grader { name: "json_valid", title: "valid JSON", is_binary: true, grade: json_valid },
    Grader { name: "contains", title: "contains", is_binary: true, grade: contains },
];

/// Position of a grader in [`GRADERS`] by its name.
#[must_use]
pub fn position(name: &str) -> Option<usize> {
    GRADERS.iter().position(|grader| grader.name == name)
}

/// 1 if both are the same text, but for white space around it.
#[must_use]
pub fn exact_match(answer: &str, reference: &str) -> f64 {
    score(answer.trim() == reference.trim())
}

/// F1 of the answer's list items against the reference's, each counted as often as it occurs, in
/// any order. A list is a JSON array or object, else lines or comma separated text; items are
/// compared without case, list marks and quotes. Two empty lists score 1.
#[must_use]
pub fn list_f1(answer: &str, reference: &str) -> f64 {
    let (answer, reference) = (list_items(answer), list_items(reference));
    if answer.is_empty() || reference.is_empty() {
        return score(answer.is_empty() && reference.is_empty());
    }
    let mut missing: HashMap<&str, usize> = HashMap::new();
    for item in &reference {
        *missing.entry(item).or_default() += 1;
    }
    let mut num_shared = 0_usize;
    for item in &answer {
        if let Some(count) = missing.get_mut(item.as_str()).filter(|count| **count > 0) {
            *count -= 1;
            num_shared += 1;
        }
    }
    // 2PR / (P + R) with P = shared / answer and R = shared / reference.
    2.0 * num_shared as f64 / (answer.len() + reference.len()) as f64
}

/// 1 if the answer is one JSON value and nothing else; the reference does not matter.
#[must_use]
pub fn json_valid(answer: &str, _reference: &str) -> f64 {
    score(serde_json::from_str::<Value>(answer.trim()).is_ok())
}

/// 1 if the reference occurs in the answer, case and outer white space aside.
#[must_use]
pub fn contains(answer: &str, reference: &str) -> f64 {
    score(answer.to_lowercase().contains(&reference.trim().to_lowercase()))
}

fn score(is_right: bool) -> f64 {
    f64::from(u8::from(is_right))
}

fn list_items(text: &str) -> Vec<String> {
    let text = without_code_fence(text.trim());
    let items: Vec<String> = match serde_json::from_str::<Value>(text) {
        Ok(Value::Array(values)) => values.iter().map(value_text).collect(),
        Ok(Value::Object(fields)) => {
            fields.iter().map(|(key, value)| format!("{key}: {}", value_text(value))).collect()
        }
        _ => text.split(['\n', ',']).map(|item| without_list_mark(item).to_owned()).collect(),
    };
    items.iter().map(|item| normalised(item)).filter(|item| !item.is_empty()).collect()
}

fn value_text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// Chat models like to wrap JSON in a Markdown fence; that is no wrong item.
fn without_code_fence(text: &str) -> &str {
    let Some(inner) = text.strip_prefix("```").and_then(|text| text.strip_suffix("```")) else {
        return text;
    };
    inner.split_once('\n').map_or(inner, |(_language, body)| body).trim()
}

fn without_list_mark(item: &str) -> &str {
    let item = item.trim();
    let after_number = item.trim_start_matches(|c: char| c.is_ascii_digit());
    if after_number.len() < item.len()
        && let Some(rest) = after_number.strip_prefix(['.', ')'])
        && rest.starts_with(' ')
    {
        return rest;
    }
    item.trim_start_matches(['-', '*', '•'])
}

fn normalised(item: &str) -> String {
    let outer = |c: char| c.is_whitespace() || matches!(c, '"' | '\'' | '[' | ']' | '`' | '.');
    let words: Vec<&str> = item.trim_matches(outer).split_whitespace().collect();
    words.join(" ").to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exact_match_ignores_only_outer_white_space() {
        assert_eq!(exact_match(" [\"salt\"]\n", "[\"salt\"]"), 1.0);
        assert_eq!(exact_match("[\"Salt\"]", "[\"salt\"]"), 0.0);
        assert_eq!(exact_match("", "[\"salt\"]"), 0.0);
    }

    #[test]
    fn f1_counts_items_as_often_as_they_occur() {
        assert_eq!(list_f1(r#"["salt", "salt"]"#, r#"["salt"]"#), 2.0 / 3.0);
        assert_eq!(list_f1(r#"["salt", "salt"]"#, r#"["salt", "salt"]"#), 1.0);
        assert_eq!(list_f1(r#"["oil", "egg"]"#, r#"["egg", "milk"]"#), 0.5);
        assert_eq!(list_f1("", "[]"), 1.0);
        assert_eq!(list_f1("salt", "[]"), 0.0);
    }

    #[test]
    fn f1_reads_lists_in_the_forms_models_write_them() {
        let reference = r#"["olive oil", "egg"]"#;
        for answer in [
            "- Olive  oil\n- egg",
            "1. olive oil\n2. egg",
            "olive oil, egg.",
            "```json\n[\"olive oil\", \"egg\"]\n```",
            "[\"egg\", \"olive oil\"",
        ] {
            assert_eq!(list_f1(answer, reference), 1.0, "{answer:?}");
        }
        assert_eq!(list_f1("2 eggs", r#"["2 eggs"]"#), 1.0, "a quantity is no list mark");
        assert_eq!(list_f1(r#"{"a":1,"b":2}"#, r#"{"b":2,"a":3}"#), 0.5);
    }

    #[test]
    fn json_must_be_the_whole_answer() {
        assert_eq!(json_valid(" [\"a\"] ", ""), 1.0);
        for broken in ["[\"a\"", "[\"a\"] done", "", "salt"] {
            assert_eq!(json_valid(broken, ""), 0.0, "{broken:?}");
        }
    }

    #[test]
    fn contains_looks_for_the_whole_reference() {
        assert_eq!(contains("The answer is PARIS.", "Paris "), 1.0);
        assert_eq!(contains("Par is", "Paris"), 0.0);
    }

    #[test]
    fn every_grader_stays_between_0_and_1_and_binary_ones_on_the_ends() {
        let texts = ["", "[]", "a", "a, b", "[\"a\", \"b\"]", "{\"a\": [1]}", "```", "```\n```"];
        for grader in GRADERS {
            for answer in texts {
                for reference in texts {
                    let score = (grader.grade)(answer, reference);
                    assert!((0.0..=1.0).contains(&score), "{}: {score}", grader.name);
                    assert!(!grader.is_binary || score == 0.0 || score == 1.0);
                }
            }
        }
    }
}

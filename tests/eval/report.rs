//! What users read of an evaluation: JSON, the terminal's table, HTML, and requirements.

use serde_json::Value;
use tunesmith::eval::{
    EvalReport, Requirement,
    graders::GRADERS,
    html,
    report::{ArmReport, Comparison, Example, Metadata},
    table,
};

fn arm(name: &str, exact_match: f64, prompt_tokens: f64) -> ArmReport {
    ArmReport {
        name: name.to_owned(),
        rows: 150,
        scores: vec![exact_match, 0.9, 1.0, exact_match],
        scores_ci95: vec![[exact_match - 0.05, exact_match + 0.05]; GRADERS.len()],
        prompt_tokens_mean: prompt_tokens,
        prompt_tokens_p95: prompt_tokens,
        completion_tokens_mean: 22.0,
        latency_ms_p50: 120.0,
        latency_ms_p95: 180.0,
        first_token_ms_p50: 30.0,
        perplexity: 1.25,
        token_accuracy: 0.97,
        reference_tokens: 3000,
        truncated_rows: 0,
        empty_rows: 0,
        too_long_rows: 0,
    }
}

fn comparison(a: &str, b: &str, difference: f64, p_value: f64) -> Comparison {
    Comparison {
        a: a.to_owned(),
        b: b.to_owned(),
        metric: "exact_match",
        difference,
        ci95: [difference - 0.07, difference + 0.06],
        p_value,
        p_holm: p_value,
        test: "mcnemar-exact",
        wins: 117,
        losses: 0,
        rows: 150,
        minimum_detectable: 0.1,
    }
}

/// base 2 %, fewshot:3 12 % (p = 0.07 to base), tuned 80 %.
fn report() -> EvalReport {
    EvalReport {
        metadata: Metadata { model: "models/<tiny>".to_owned(), ..Metadata::default() },
        arms: vec![arm("base", 0.02, 90.0), arm("fewshot:3", 0.12, 310.0), arm("tuned", 0.8, 90.0)],
        comparisons: vec![
            comparison("fewshot:3", "base", 0.1, 0.07),
            comparison("tuned", "base", 0.78, 2e-9),
            comparison("tuned", "fewshot:3", 0.68, 0.0004),
        ],
        examples: vec![Example {
            line: 4,
            question: "2 eggs & <b>salt</b>".to_owned(),
            reference: "[\"egg\"]".to_owned(),
            answers: vec![
                "<script>alert(1)</script>".to_owned(),
                String::new(),
                "[\"egg\"]".into(),
            ],
            scores: vec![vec![0.0; 4], vec![0.0; 4], vec![1.0; 4]],
        }],
        warnings: Vec::new(),
    }
}

#[test]
fn the_json_report_has_every_promised_field() {
    let json = report().to_json();
    let arms = json["arms"].as_array().unwrap();
    let names: Vec<&str> = arms.iter().filter_map(|arm| arm["name"].as_str()).collect();
    assert_eq!(names, ["base", "fewshot:3", "tuned"]);
    for arm in arms {
        for field in [
            "exact_match",
            "f1",
            "json_valid",
            "prompt_tokens_mean",
            "completion_tokens_mean",
            "latency_ms_p50",
            "latency_ms_p95",
            "perplexity",
            "token_accuracy",
            "rows",
        ] {
            assert!(arm[field].is_number(), "{field} is {}", arm[field]);
        }
    }
    let tuned = &json["comparisons"][1];
    for (field, value) in [("a", "tuned"), ("b", "base"), ("metric", "exact_match")] {
        assert_eq!(tuned[field], value);
    }
    assert_eq!(tuned["difference"], 0.78);
    assert_eq!(tuned["p_value"], 2e-9);
    assert_eq!(tuned["ci95"].as_array().map(Vec::len), Some(2));
    assert_eq!(json["examples"][0]["answers"]["tuned"], "[\"egg\"]");
    assert!(json["metadata"]["model_fingerprint"].is_string());
    assert!(json["comparisons"][0]["significant"] == Value::Bool(false));
}

#[test]
fn the_table_is_aligned_and_ends_with_verdicts() {
    let text = table::render(&report());
    let lines: Vec<&str> = text.lines().collect();
    let width = lines[0].chars().count();
    assert!(lines[1].chars().all(|c| c == '─') && lines[1].chars().count() == width, "{text}");
    for line in &lines[2..5] {
        assert_eq!(line.chars().count(), width, "{text}");
    }
    assert_eq!(
        lines[6],
        "tuned vs base: +78.0 points exact match (95 % CI +71..+84), McNemar p=2e-9, 150 rows"
    );
    assert_eq!(
        lines[7],
        "tuned vs fewshot:3: +68.0 points exact match (95 % CI +61..+74), McNemar p=4e-4, \
         150 rows, 71 % fewer prompt tokens"
    );
    assert_eq!(lines.len(), 8, "{text}");
}

#[test]
fn samples_show_every_arm_below_the_reference() {
    let text = table::samples(&report(), 3);
    assert!(text.starts_with("row 4\n"), "{text}");
    assert!(text.contains("fewshot:3✗ (empty)\n"), "{text}");
    assert!(text.contains("tuned    ✓ [\"egg\"]\n"), "{text}");
}

#[test]
fn html_shows_answers_as_text_and_needs_nothing_from_elsewhere() {
    let page = html::render(&report());
    assert!(page.contains("&lt;script&gt;alert(1)&lt;/script&gt;"));
    assert!(page.contains("2 eggs &amp; &lt;b&gt;salt&lt;/b&gt;"));
    assert!(page.contains("models/&lt;tiny&gt;"));
    for forbidden in ["<script", "http://", "https://", "<link", "@import"] {
        assert!(!page.contains(forbidden), "{forbidden} in the page");
    }
    assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
    assert_eq!(
        html::escape("<a href='x'>\"&\"</a>"),
        "&lt;a href=&#39;x&#39;&gt;&quot;&amp;&quot;&lt;/a&gt;"
    );
}

#[test]
fn requirements_hold_or_say_why_not() {
    let check =
        |requirement: &str| requirement.parse::<Requirement>().unwrap().check(&report()).unwrap();
    assert!(check("tuned>base").is_ok());
    assert!(check("tuned > fewshot:3").is_ok());
    assert!(check("tuned>fewshot").is_ok(), "the only arm of its kind");
    assert!(check("tuned>=base:exact_match").is_ok());
    assert!(check("fewshot:3>=base").is_ok());
    let not_significant = check("fewshot:3>base").unwrap_err();
    assert!(not_significant.contains("p=0.07") && not_significant.contains("not significant"));
    assert!(check("base>tuned").unwrap_err().contains("not better"));
    assert!(check("base>=tuned").unwrap_err().contains("-78.0 points exact match"));
}

#[test]
fn unreadable_or_impossible_requirements_are_errors() {
    for text in ["tuned", "tuned=base", ">base", "tuned>", "tuned>>base", "a<b"] {
        let error = text.parse::<Requirement>().unwrap_err().to_string();
        assert!(error.contains(&format!("{text:?}")), "{error}");
    }
    let parsed: Requirement = "tuned>base:f2".parse().unwrap();
    let error = parsed.check(&report()).unwrap_err().to_string();
    assert!(error.contains("base:f2") && error.contains("f1") && error.contains("fewshot:3"));
    let parsed: Requirement = "tuned>=fewshot:3:f1".parse().unwrap();
    assert_eq!((parsed.right.as_str(), parsed.metric.as_str()), ("fewshot:3", "f1"));
}

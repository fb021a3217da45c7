use serde_json::json;

use super::*;

/// A judge that says what the model's name says, and a Python that counts letters.
struct Stage;

impl Outside for Stage {
    fn ask(&self, model: &str, messages: &[Value], _: &Sampling) -> Result<Reply, Fault> {
        if model == "gone" {
            return Err(Fault::new(FaultKind::ModelServer, "no such model"));
        }
        assert!(messages.last().unwrap()["content"].as_str().unwrap().contains("nothing else"));
        let (text, prompt_tokens, completion_tokens) = (model.to_owned(), 7, 2);
        Ok(Reply { text, finish_reason: "stop", prompt_tokens, completion_tokens })
    }

    fn run_python(&self, _: &str, context: &Context) -> Result<f64, Fault> {
        Ok(context.sample["output_text"].as_str().unwrap().len() as f64)
    }
}

fn grade(grader: &Value) -> Graded {
    let context = Context::of_answer(json!({"label": "Cat", "part": "AT"}), "Cat");
    Grader::parse(grader, "grader").unwrap().grade(&context, &Stage)
}

fn check(operation: &str, reference: &str) -> Value {
    json!({"type": "string_check", "name": "check", "input": "{{sample.output_text}}",
        "reference": reference, "operation": operation})
}

fn score_model(model: &str) -> Value {
    json!({"type": "score_model", "name": "judge", "model": model, "range": [0, 4],
        "input": [{"role": "user", "content": "How good is {{sample.output_text}}?"}]})
}

fn label_model(model: &str) -> Value {
    json!({"type": "label_model", "name": "judge", "model": model, "labels": ["good", "bad"],
    "passing_labels": ["good"], "input": [
        {"role": "developer", "content": {"type": "input_text", "text": "Judge."}},
        {"role": "user", "content": [{"type": "input_text", "text": "{{item.label}}"}]},
    ]})
}

#[test]
fn every_type_of_grader_scores() {
    let python = json!({"type": "python", "name": "p", "source": "def grade(sample, item): pass"});
    let similar = json!({"type": "text_similarity", "name": "s", "input": "{{sample.output_text}}",
        "reference": "Cats", "evaluation_metric": "fuzzy_match", "pass_threshold": 0.8});
    for (grader, score) in [
        (check("eq", "{{item.label}}"), 1.0),
        (check("eq", "cat"), 0.0),
        (check("ne", "cat"), 1.0),
        (check("like", "at"), 1.0),
        (check("like", "{{item.part}}"), 0.0),
        (check("ilike", "{{item.part}}"), 1.0),
        (similar, 6.0 / 7.0),
        (score_model("3"), 3.0),
        (label_model("Good."), 1.0),
        (label_model("bad"), 0.0),
        (python, 3.0),
    ] {
        assert_eq!(grade(&grader).score, Ok(score), "{grader}");
    }
}

#[test]
fn a_multi_grader_weighs_its_parts_and_counts_all_tokens() {
    let multi = |judge: &str| {
        json!({"type": "multi", "name": "m", "calculate_output": "0.25 * a + b / 4",
            "graders": {"a": check("eq", "Cat"), "b": score_model(judge)}})
    };
    let graded = grade(&multi("2"));
    assert_eq!(graded.score, Ok(0.75));
    assert_eq!(graded.parts, [("a".to_owned(), 1.0), ("b".to_owned(), 2.0)]);
    assert_eq!((graded.usage[0].prompt_tokens, graded.usage[0].completion_tokens), (7, 2));
    let unread = grade(&multi("nonsense"));
    assert_eq!(unread.score.unwrap_err().kind, FaultKind::ModelParse);
    assert_eq!((unread.parts.len(), unread.usage.len()), (1, 1), "what was asked is counted");
    let gone = grade(&multi("gone"));
    assert_eq!(gone.score.unwrap_err().kind, FaultKind::ModelServer);
}

#[test]
fn a_fault_is_one_of_the_row_and_says_what_is_missing() {
    let fault = grade(&check("eq", "{{item.nothing}}")).score.unwrap_err();
    assert_eq!(fault.kind, FaultKind::InvalidVariable);
    assert!(fault.message.contains("`item` has no `nothing`"), "{fault}");
}

#[test]
fn thresholds_have_defaults_in_the_middle_of_the_range() {
    let threshold = |grader: Value| Grader::parse(&grader, "g").unwrap().pass_threshold;
    assert_eq!(threshold(check("eq", "a")), 1.0);
    assert_eq!(threshold(score_model("m")), 2.0);
    let mut given = score_model("m");
    given["pass_threshold"] = json!(3);
    assert_eq!(threshold(given), 3.0);
}

#[test]
fn every_mistake_in_a_definition_is_named_with_its_place() {
    let with = |mut grader: Value, field: &str, value: Value| {
        grader[field] = value;
        grader
    };
    let similar = |metric: &str| {
        json!({"type": "text_similarity", "name": "s", "input": "a", "reference": "b",
            "evaluation_metric": metric})
    };
    let multi = |formula: &str, graders: Value| json!({"type": "multi", "name": "m", "calculate_output": formula, "graders": graders});
    let nested = json!({"a": multi("b", json!({"b": check("eq", "x")}))});
    for (grader, param, message) in [
        (json!("text"), "g", "must be an object"),
        (json!({}), "g.type", "required"),
        (json!({"type": "magic"}), "g.type", "unknown grader type `magic`"),
        (with(check("eq", "a"), "name", json!("")), "g.name", "required"),
        (check("equals", "a"), "g.operation", "`equals`"),
        (with(check("eq", "a"), "input", json!(3)), "g.input", "string"),
        (check("eq", "{{user.x}}"), "g.reference", "`{{user.x}}`"),
        (with(check("eq", "a"), "pass_threshold", json!("x")), "g.pass_threshold", "number"),
        (similar("cosine"), "g.evaluation_metric", "embedding"),
        (similar("meteor"), "g.evaluation_metric", "WordNet"),
        (similar("levenshtein"), "g.evaluation_metric", "rouge_l"),
        (with(score_model("m"), "model", Value::Null), "g.model", "required"),
        (with(score_model("m"), "range", json!([1, 1])), "g.range", "smaller"),
        (with(score_model("m"), "input", json!([])), "g.input", "list of messages"),
        (
            with(score_model("m"), "input", json!([{"role": "wizard", "content": "x"}])),
            "g.input[0].role",
            "`wizard`",
        ),
        (
            with(
                score_model("m"),
                "input",
                json!([{"role": "user", "content": [{"type": "input_image"}]}]),
            ),
            "g.input[0].content",
            "`input_image`",
        ),
        (
            with(score_model("m"), "sampling_params", json!({"temperature": 9})),
            "g.sampling_params.temperature",
            "0 to 2",
        ),
        (with(label_model("m"), "labels", json!([])), "g.labels", "list of strings"),
        (with(label_model("m"), "passing_labels", json!(["ok"])), "g.passing_labels", "`ok`"),
        (json!({"type": "python", "name": "p", "source": "x = 1"}), "g.source", "def"),
        (multi("a +", json!({"a": check("eq", "x")})), "g.calculate_output", "too early"),
        (multi("a + c", json!({"a": check("eq", "x")})), "g.calculate_output", "`c`"),
        (multi("a", json!({})), "g.graders", "named graders"),
        (multi("a", json!({"a": check("is", "x")})), "g.graders.a.operation", "`is`"),
        (multi("a", nested), "g.graders.a.type", "no multi graders"),
    ] {
        let message = if message == "def" { "define `grade" } else { message };
        let error = Grader::parse(&grader, "g").unwrap_err();
        assert_eq!(error.param, param, "{grader}");
        assert!(error.message.contains(message), "{grader}: {error}");
    }
}

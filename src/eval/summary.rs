//! From raw outcomes to a report: grades answers, averages arms, compares them pairwise.

use serde_json::Value;

use super::{
    Arm, EvalReport,
    arms::is_tuned,
    compare::{
        MIN_ROWS, holm, mcnemar_exact, mean, mean_interval, minimum_detectable_difference,
        paired_bootstrap, percentile,
    },
    graders::GRADERS,
    report::{ArmReport, Comparison, Example, Metadata},
    runner::Outcome,
};
use crate::data::Question;
use crate::engine::FinishReason;

/// Characters of a question that a report keeps.
const MAX_QUESTION_CHARS: usize = 1000;

/// Scores of one arm: `[grader][row]`.
type Scores = Vec<Vec<f64>>;

/// Grades `outcomes` (`[arm][row]`) against the questions' answers.
pub(super) fn summarise(
    arms: &[Arm],
    questions: &[Question],
    outcomes: &[Vec<Outcome>],
    metadata: Metadata,
) -> EvalReport {
    let scores: Vec<Scores> = outcomes.iter().map(|answers| grade(answers, questions)).collect();
    let names: Vec<String> = arms.iter().map(Arm::to_string).collect();
    let arm_reports: Vec<ArmReport> = (names.iter().zip(outcomes).zip(&scores))
        .map(|((name, outcomes), scores)| arm_report(name, outcomes, scores, metadata.seed))
        .collect();
    let comparisons = compare_all(&names, &scores, metadata.seed);
    let warnings = warnings(&arm_reports, &comparisons, questions.len());
    let examples = (questions.iter().enumerate())
        .map(|(row, question)| Example {
            line: question.line,
            question: question_tail(question),
            reference: question.answer.clone(),
            answers: outcomes.iter().map(|arm| arm[row].text.clone()).collect(),
            scores: scores.iter().map(|arm| arm.iter().map(|rows| rows[row]).collect()).collect(),
        })
        .collect();
    EvalReport { metadata, arms: arm_reports, comparisons, examples, warnings }
}

fn grade(outcomes: &[Outcome], questions: &[Question]) -> Scores {
    let grade_all = |grade: fn(&str, &str) -> f64| {
        let pairs = outcomes.iter().zip(questions);
        pairs.map(|(outcome, question)| grade(&outcome.text, &question.answer)).collect()
    };
    GRADERS.iter().map(|grader| grade_all(grader.grade)).collect()
}

fn arm_report(name: &str, outcomes: &[Outcome], scores: &Scores, seed: u64) -> ArmReport {
    let sorted = |value: fn(&Outcome) -> f64| {
        // Rows that never ran have a prompt but no time and no answer.
        let mut values: Vec<f64> =
            outcomes.iter().filter(|outcome| outcome.finish.is_some()).map(value).collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let latencies =
        sorted(|outcome| 1e3 * (outcome.usage.total_seconds - outcome.usage.queue_seconds));
    let first_tokens =
        sorted(|outcome| 1e3 * (outcome.usage.first_token_seconds - outcome.usage.queue_seconds));
    let completion_tokens = sorted(|outcome| outcome.usage.completion_tokens as f64);
    let mut prompt_tokens: Vec<f64> =
        outcomes.iter().map(|outcome| outcome.usage.prompt_tokens as f64).collect();
    prompt_tokens.sort_by(f64::total_cmp);
    let count = |is: fn(&Outcome) -> bool| outcomes.iter().filter(|outcome| is(outcome)).count();
    let reference: Vec<_> = outcomes.iter().flat_map(|outcome| &outcome.reference).collect();
    let log_likelihood: f64 = reference.iter().map(|token| f64::from(token.logprob)).sum();
    let num_hits = reference.iter().filter(|token| token.is_argmax).count();
    let per_token = |sum: f64| sum / reference.len() as f64; // NaN, null in JSON, without tokens
    ArmReport {
        name: name.to_owned(),
        rows: outcomes.len(),
        scores: scores.iter().map(|rows| mean(rows)).collect(),
        scores_ci95: (GRADERS.iter().zip(scores))
            .map(|(grader, rows)| mean_interval(rows, grader.is_binary, seed))
            .collect(),
        prompt_tokens_mean: mean(&prompt_tokens),
        prompt_tokens_p95: percentile(&prompt_tokens, 95.0),
        completion_tokens_mean: mean(&completion_tokens),
        latency_ms_p50: percentile(&latencies, 50.0),
        latency_ms_p95: percentile(&latencies, 95.0),
        first_token_ms_p50: percentile(&first_tokens, 50.0),
        perplexity: per_token(-log_likelihood).exp(),
        token_accuracy: per_token(num_hits as f64),
        reference_tokens: reference.len(),
        truncated_rows: count(|outcome| outcome.finish == Some(FinishReason::Length)),
        empty_rows: count(|outcome| outcome.text.trim().is_empty()),
        too_long_rows: count(|outcome| outcome.finish.is_none()),
    }
}

/// Every pair of arms under every grader; Holm's adjustment runs over the pairs of one grader.
fn compare_all(names: &[String], scores: &[Scores], seed: u64) -> Vec<Comparison> {
    let mut comparisons = Vec::new();
    for (index, grader) in GRADERS.iter().enumerate() {
        let first = comparisons.len();
        for a in 1..names.len() {
            for b in 0..a {
                comparisons.push(Comparison {
                    a: names[a].clone(),
                    b: names[b].clone(),
                    metric: grader.name,
                    ..compare_pair(&scores[a][index], &scores[b][index], grader.is_binary, seed)
                });
            }
        }
        let p_values: Vec<f64> = comparisons[first..].iter().map(|pair| pair.p_value).collect();
        for (pair, p_holm) in comparisons[first..].iter_mut().zip(holm(&p_values)) {
            pair.p_holm = p_holm;
        }
    }
    comparisons
}

fn compare_pair(a: &[f64], b: &[f64], is_binary: bool, seed: u64) -> Comparison {
    let differences: Vec<f64> = a.iter().zip(b).map(|(a, b)| a - b).collect();
    let bootstrap = paired_bootstrap(&differences, seed);
    let wins = differences.iter().filter(|difference| **difference > 0.0).count();
    let losses = differences.iter().filter(|difference| **difference < 0.0).count();
    let (p_value, test) = if is_binary {
        (mcnemar_exact(wins, losses), "mcnemar-exact")
    } else {
        (bootstrap.p_value, "paired-bootstrap")
    };
    Comparison {
        a: String::new(),
        b: String::new(),
        metric: "",
        difference: mean(&differences),
        ci95: bootstrap.ci95,
        p_value,
        p_holm: p_value,
        test,
        wins,
        losses,
        rows: differences.len(),
        minimum_detectable: minimum_detectable_difference(&differences),
    }
}

fn warnings(arms: &[ArmReport], comparisons: &[Comparison], rows: usize) -> Vec<String> {
    let mut warnings = Vec::new();
    if rows < MIN_ROWS {
        warnings.push(format!(
            "cannot conclude: {rows} rows are too few, use at least {MIN_ROWS} (better 200)"
        ));
    }
    let any_tuned = arms.iter().any(|arm| is_tuned(&arm.name));
    for pair in comparisons.iter().filter(|pair| pair.metric == GRADERS[0].name) {
        // Where an adapter takes part, nobody asks how the arms without one compare.
        if !pair.is_significant() && (!any_tuned || is_tuned(&pair.a) || is_tuned(&pair.b)) {
            warnings.push(format!(
                "{} and {} cannot be told apart by {}: {rows} rows show differences from about \
                 {:.0} points on (p={} here)",
                pair.a,
                pair.b,
                GRADERS[0].title,
                (100.0 * pair.minimum_detectable).ceil(),
                super::table::p_text(pair.p_holm),
            ));
        }
    }
    for arm in arms {
        for (count, what) in [
            (arm.truncated_rows, "answers were cut off at the token limit"),
            (arm.empty_rows, "answers were empty"),
            (arm.too_long_rows, "prompts did not fit the context"),
        ] {
            if count > 0 {
                warnings.push(format!("{}: {count} of {rows} {what}", arm.name));
            }
        }
    }
    warnings
}

/// The end of the last message: long contexts come first, the question last.
fn question_tail(question: &Question) -> String {
    let content = question.messages.last().map_or(&Value::Null, |message| &message["content"]);
    let text = match (&question.raw_prompt, content) {
        (Some(prompt), _) => prompt.clone(),
        (None, Value::String(text)) => text.clone(),
        (None, Value::Null) => String::new(),
        (None, other) => other.to_string(),
    };
    match text.char_indices().rev().nth(MAX_QUESTION_CHARS) {
        Some((cut, c)) => format!("…{}", &text[cut + c.len_utf8()..]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::engine::{GenerationUsage, TokenScore};

    fn outcome(text: &str) -> Outcome {
        let usage = GenerationUsage {
            prompt_tokens: 40,
            completion_tokens: 4,
            queue_seconds: 1.0,
            first_token_seconds: 1.25,
            total_seconds: 1.5,
        };
        let reference = vec![
            TokenScore { logprob: -1.0, is_argmax: true },
            TokenScore { logprob: -3.0, is_argmax: false },
        ];
        Outcome { text: text.to_owned(), finish: Some(FinishReason::Stop), usage, reference }
    }

    fn report(rows: usize, right: usize) -> EvalReport {
        let questions: Vec<Question> = (0..rows)
            .map(|line| Question {
                messages: vec![json!({"role": "user", "content": "q"})],
                tools: None,
                raw_prompt: None,
                answer: "[\"salt\"]".to_owned(),
                line,
            })
            .collect();
        let base = (0..rows).map(|_| outcome("salt and pepper")).collect();
        let tuned = (0..rows)
            .map(|row| outcome(if row < right { "[\"salt\"]" } else { "[\"oil\"" }))
            .collect();
        let arms = [Arm::Base, Arm::Tuned("tuned".to_owned())];
        summarise(&arms, &questions, &[base, tuned], Metadata::default())
    }

    #[test]
    fn scores_likelihood_and_latency_are_averaged_per_arm() {
        let report = report(100, 80);
        let tuned = &report.arms[1];
        assert_eq!(tuned.score("exact_match"), Some(0.8));
        assert_eq!(tuned.score("f1"), Some(0.8));
        assert_eq!(tuned.score("json_valid"), Some(0.8));
        assert_eq!(report.arms[0].score("json_valid"), Some(0.0));
        assert!((tuned.perplexity - 2.0_f64.exp()).abs() < 1e-9);
        assert_eq!(tuned.token_accuracy, 0.5);
        assert_eq!((tuned.latency_ms_p50, tuned.first_token_ms_p50), (500.0, 250.0));
    }

    #[test]
    fn a_clear_win_is_significant_and_reads_either_way_round() {
        let report = report(100, 80);
        let win = report.comparison("tuned", "base", "exact_match").unwrap();
        assert_eq!((win.difference, win.wins, win.losses), (0.8, 80, 0));
        assert!(win.is_significant() && win.p_value < 1e-20);
        assert!(win.ci95[0] > 0.7 && win.ci95[1] < 0.9);
        let loss = report.comparison("base", "tuned", "exact_match").unwrap();
        assert_eq!((loss.difference, loss.wins, loss.losses), (-0.8, 0, 80));
        assert_eq!(loss.ci95, [-win.ci95[1], -win.ci95[0]]);
        assert!(report.warnings.is_empty(), "{:?}", report.warnings);
    }

    #[test]
    fn few_rows_conclude_nothing() {
        let report = report(20, 3);
        assert!(report.warnings[0].contains("cannot conclude: 20 rows"), "{:?}", report.warnings);
        assert!(report.warnings[1].contains("cannot be told apart"), "{:?}", report.warnings);
    }

    #[test]
    fn a_row_that_did_not_fit_counts_as_an_empty_answer() {
        let question = Question {
            messages: Vec::new(),
            tools: None,
            raw_prompt: None,
            answer: "a".to_owned(),
            line: 7,
        };
        let fit =
            summarise(&[Arm::Base], &[question], &[vec![Outcome::default()]], Metadata::default());
        let arm = &fit.arms[0];
        assert_eq!((arm.too_long_rows, arm.empty_rows, arm.truncated_rows), (1, 1, 0));
        assert!(arm.perplexity.is_nan());
        assert!(fit.to_json()["arms"][0]["perplexity"].is_null());
    }
}

//! What an evaluation found, and its JSON form.

use serde_json::{Map, Value, json};

use super::graders::GRADERS;

/// Everything an evaluation found.
#[derive(Debug, Clone, PartialEq)]
pub struct EvalReport {
    /// What was evaluated, with which settings.
    pub metadata: Metadata,
    /// The arms, in the order they were asked for.
    pub arms: Vec<ArmReport>,
    /// Every pair of arms (the later one as `a`), for every grader.
    pub comparisons: Vec<Comparison>,
    /// Every row with every arm's answer, in the order of the file.
    pub examples: Vec<Example>,
    /// Sentences a reader should know before trusting the numbers.
    pub warnings: Vec<String>,
}

/// What was evaluated.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Metadata {
    /// The model as the user named it.
    pub model: String,
    /// SHA-256 over the base's configuration and weights, hex.
    pub model_fingerprint: String,
    /// Name and content digest (SHA-256, hex) of each adapter.
    pub adapters: Vec<(String, String)>,
    /// The data file.
    pub data: String,
    /// SHA-256 of the data file, hex.
    pub data_sha256: String,
    /// Most tokens an answer could have.
    pub max_tokens: usize,
    /// Seed of the few-shot choice and of the bootstrap.
    pub seed: u64,
    /// Wall-clock seconds of all requests together.
    pub seconds: f64,
}

/// One arm's figures.
#[derive(Debug, Clone, PartialEq)]
pub struct ArmReport {
    /// "base", "fewshot:k", "tuned" or "tuned:NAME".
    pub name: String,
    /// Rows asked.
    pub rows: usize,
    /// Mean score per grader, 0 to 1, in the order of [`GRADERS`].
    pub scores: Vec<f64>,
    /// 95 % interval of each mean score.
    pub scores_ci95: Vec<[f64; 2]>,
    /// Mean tokens of a prompt.
    pub prompt_tokens_mean: f64,
    /// 95th percentile of the tokens of a prompt.
    pub prompt_tokens_p95: f64,
    /// Mean tokens of an answer.
    pub completion_tokens_mean: f64,
    /// Median milliseconds from the request's first step to its last token, under the batch's load.
    pub latency_ms_p50: f64,
    /// 95th percentile of the same.
    pub latency_ms_p95: f64,
    /// Median milliseconds from the request's first step to its first token.
    pub first_token_ms_p50: f64,
    /// exp(negative log-likelihood per reference token), over all rows.
    pub perplexity: f64,
    /// Share of reference tokens that were the most likely one.
    pub token_accuracy: f64,
    /// Reference tokens behind the two figures above.
    pub reference_tokens: usize,
    /// Answers cut off by `max_tokens` or the context length.
    pub truncated_rows: usize,
    /// Answers without any text.
    pub empty_rows: usize,
    /// Rows whose prompt left no room in the context; they count as empty answers.
    pub too_long_rows: usize,
}

/// How two arms compare by one grader, over the same rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// The arm that is compared.
    pub a: String,
    /// The arm it is compared with.
    pub b: String,
    /// The grader's name.
    pub metric: &'static str,
    /// Mean score of `a` minus mean score of `b`.
    pub difference: f64,
    /// 95 % bootstrap interval of the difference.
    pub ci95: [f64; 2],
    /// Probability of a difference at least this large between equal arms.
    pub p_value: f64,
    /// The same after Holm's adjustment for all pairs of arms under this metric.
    pub p_holm: f64,
    /// "mcnemar-exact" or "paired-bootstrap".
    pub test: &'static str,
    /// Rows on which `a` scored higher.
    pub wins: usize,
    /// Rows on which `b` scored higher.
    pub losses: usize,
    /// Rows compared.
    pub rows: usize,
    /// The smallest difference such an evaluation finds in 80 % of cases.
    pub minimum_detectable: f64,
}

/// One row and what became of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// Line in the data file, from 1.
    pub line: usize,
    /// The last message of the question.
    pub question: String,
    /// The answer of the data file.
    pub reference: String,
    /// Each arm's answer, in the order of the arms.
    pub answers: Vec<String>,
    /// Each arm's scores, in the order of [`GRADERS`].
    pub scores: Vec<Vec<f64>>,
}

impl EvalReport {
    /// The comparison of two arms under a metric, if both exist, in whichever order it was made.
    /// `difference`, `ci95`, `wins` and `losses` then read as "`a` minus `b`".
    #[must_use]
    pub fn comparison(&self, a: &str, b: &str, metric: &str) -> Option<Comparison> {
        let of = |a: &str, b: &str| {
            let mut all = self.comparisons.iter();
            all.find(|c| c.a == a && c.b == b && c.metric == metric).cloned()
        };
        of(a, b).or_else(|| of(b, a).map(Comparison::reversed))
    }

    /// The report as JSON.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let metadata = &self.metadata;
        let names: Vec<&str> = self.arms.iter().map(|arm| arm.name.as_str()).collect();
        let adapters: Vec<Value> = (metadata.adapters.iter())
            .map(|(name, digest)| json!({"name": name, "digest": digest}))
            .collect();
        json!({
            "metadata": {
                "tunesmith_version": env!("CARGO_PKG_VERSION"),
                "model": metadata.model,
                "model_fingerprint": metadata.model_fingerprint,
                "adapters": adapters,
                "data": metadata.data,
                "data_sha256": metadata.data_sha256,
                "max_tokens": metadata.max_tokens,
                "temperature": 0,
                "seed": metadata.seed,
                "seconds": metadata.seconds,
            },
            "arms": self.arms.iter().map(ArmReport::to_json).collect::<Vec<_>>(),
            "comparisons": self.comparisons.iter().map(Comparison::to_json).collect::<Vec<_>>(),
            "warnings": self.warnings,
            "examples": self.examples.iter().map(|row| row.to_json(&names)).collect::<Vec<_>>(),
        })
    }
}

impl ArmReport {
    /// Mean score of the grader `metric`.
    #[must_use]
    pub fn score(&self, metric: &str) -> Option<f64> {
        super::graders::position(metric).map(|index| self.scores[index])
    }

    fn to_json(&self) -> Value {
        let mut fields = Map::new();
        fields.insert("name".to_owned(), json!(self.name));
        fields.insert("rows".to_owned(), json!(self.rows));
        for (index, grader) in GRADERS.iter().enumerate() {
            fields.insert(grader.name.to_owned(), json!(self.scores[index]));
            fields.insert(format!("{}_ci95", grader.name), json!(self.scores_ci95[index]));
        }
        for (name, value) in [
            ("prompt_tokens_mean", self.prompt_tokens_mean),
            ("prompt_tokens_p95", self.prompt_tokens_p95),
            ("completion_tokens_mean", self.completion_tokens_mean),
            ("latency_ms_p50", self.latency_ms_p50),
            ("latency_ms_p95", self.latency_ms_p95),
            ("first_token_ms_p50", self.first_token_ms_p50),
            ("perplexity", self.perplexity),
            ("token_accuracy", self.token_accuracy),
        ] {
            fields.insert(name.to_owned(), json!(value));
        }
        for (name, value) in [
            ("reference_tokens", self.reference_tokens),
            ("truncated_rows", self.truncated_rows),
            ("empty_rows", self.empty_rows),
            ("too_long_rows", self.too_long_rows),
        ] {
            fields.insert(name.to_owned(), json!(value));
        }
        Value::Object(fields)
    }
}

impl Comparison {
    /// True if the difference is not zero by more than chance, after Holm's adjustment.
    #[must_use]
    pub fn is_significant(&self) -> bool {
        self.p_holm < super::compare::SIGNIFICANCE
    }

    fn reversed(self) -> Self {
        let [low, high] = self.ci95;
        Self {
            a: self.b,
            b: self.a,
            difference: -self.difference,
            ci95: [-high, -low],
            wins: self.losses,
            losses: self.wins,
            ..self
        }
    }

    fn to_json(&self) -> Value {
        json!({
            "a": self.a,
            "b": self.b,
            "metric": self.metric,
            "difference": self.difference,
            "ci95": self.ci95,
            "p_value": self.p_value,
            "p_holm": self.p_holm,
            "significant": self.is_significant(),
            "test": self.test,
            "wins": self.wins,
            "losses": self.losses,
            "rows": self.rows,
            "minimum_detectable_difference": self.minimum_detectable,
        })
    }
}

impl Example {
    fn to_json(&self, arms: &[&str]) -> Value {
        let answers: Map<String, Value> = (arms.iter().zip(&self.answers))
            .map(|(arm, answer)| ((*arm).to_owned(), json!(answer)))
            .collect();
        json!({
            "line": self.line,
            "question": self.question,
            "reference": self.reference,
            "answers": answers,
        })
    }
}

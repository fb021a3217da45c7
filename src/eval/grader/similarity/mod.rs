//! `text_similarity`: how alike two texts are, 0 to 1.
//!
//! | metric | definition |
//! |---|---|
//! | `fuzzy_match` | `2 LCS / (len a + len b)` over characters: the normalised indel similarity, rapidfuzz's `ratio` |
//! | `bleu` | BLEU-4 of one sentence (Papineni et al. 2002), tokens of mteval 13a, exponential smoothing and effective order (Chen and Cherry 2014, method 3), as `sacrebleu.sentence_bleu` |
//! | `gleu` | Google's GLEU (Wu et al. 2016): shared n-grams of 1 to 4 tokens, over the larger number of n-grams |
//! | `rouge_1` to `rouge_5` | ROUGE-N (Lin 2004): F1 of shared n-grams, words as `rouge_score` without a stemmer |
//! | `rouge_l` | ROUGE-L (Lin 2004): F1 of the longest common subsequence of words |
//!
//! `tests/fixtures/similarity.json` has their values from those packages.

mod tokens;

use std::collections::HashMap;

use self::tokens::{tokens_13a, tokens_rouge};

/// Longest n-grams of BLEU and GLEU.
const MAX_ORDER: usize = 4;
/// Steps of a longest common subsequence that one comparison may take: half a second or so.
const MAX_STEPS: usize = 400_000_000;

/// A way to compare two texts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metric {
    /// Over characters.
    Fuzzy,
    /// Precision of n-grams.
    Bleu,
    /// The smaller of precision and recall of n-grams.
    Gleu,
    /// F1 of n-grams of this length.
    RougeN(usize),
    /// F1 of the longest common subsequence.
    RougeL,
}

/// Every metric, by the name it has on the wire.
pub const METRICS: &[(&str, Metric)] = &[
    ("fuzzy_match", Metric::Fuzzy),
    ("bleu", Metric::Bleu),
    ("gleu", Metric::Gleu),
    ("rouge_1", Metric::RougeN(1)),
    ("rouge_2", Metric::RougeN(2)),
    ("rouge_3", Metric::RougeN(3)),
    ("rouge_4", Metric::RougeN(4)),
    ("rouge_5", Metric::RougeN(5)),
    ("rouge_l", Metric::RougeL),
];

/// Metrics of OpenAI's that are not computed here, and why.
pub const REFUSED: &[(&str, &str)] = &[
    ("cosine", "it compares embeddings, and this server has no embedding model"),
    ("meteor", "it needs WordNet's synonyms, which this server does not have"),
];

impl Metric {
    /// How alike `text` is to `reference`.
    ///
    /// # Errors
    /// Texts too long to be compared within a reasonable time.
    pub fn compare(self, text: &str, reference: &str) -> Result<f64, String> {
        match self {
            Self::Fuzzy => fuzzy(text, reference),
            Self::Bleu => Ok(bleu(&tokens_13a(text), &tokens_13a(reference))),
            Self::Gleu => Ok(gleu(&tokens_13a(text), &tokens_13a(reference))),
            Self::RougeN(order) => Ok(rouge_n(text, reference, order)),
            Self::RougeL => rouge_l(text, reference),
        }
    }
}

fn fuzzy(text: &str, reference: &str) -> Result<f64, String> {
    let a: Vec<char> = text.chars().collect();
    let b: Vec<char> = reference.chars().collect();
    if a.is_empty() && b.is_empty() {
        return Ok(1.0);
    }
    Ok(2.0 * longest_common_subsequence(&a, &b)? as f64 / (a.len() + b.len()) as f64)
}

/// `BP exp(mean of ln p_n)` over the orders that the text is long enough for, with
/// `p_n = shared / all` of its n-grams, and `1 / (2^k all)` for the k-th order without a shared one.
fn bleu(text: &[String], reference: &[String]) -> f64 {
    let mut sum_of_logs = 0.0;
    let (mut order, mut smoothing, mut any_shared) = (0, 1.0, false);
    for n in 1..=MAX_ORDER.min(text.len()) {
        let all = text.len() + 1 - n;
        let shared = num_shared(&ngrams(text, n), &ngrams(reference, n));
        any_shared |= shared > 0;
        let precision = if shared > 0 {
            shared as f64 / all as f64
        } else {
            smoothing *= 2.0;
            1.0 / (smoothing * all as f64)
        };
        sum_of_logs += precision.ln();
        order = n;
    }
    if !any_shared {
        return 0.0;
    }
    let brevity = if text.len() < reference.len() {
        (1.0 - reference.len() as f64 / text.len() as f64).exp()
    } else {
        1.0
    };
    brevity * (sum_of_logs / order as f64).exp()
}

fn gleu(text: &[String], reference: &[String]) -> f64 {
    let (mut shared, mut of_text, mut of_reference) = (0, 0, 0);
    for n in 1..=MAX_ORDER {
        shared += num_shared(&ngrams(text, n), &ngrams(reference, n));
        of_text += (text.len() + 1).saturating_sub(n);
        of_reference += (reference.len() + 1).saturating_sub(n);
    }
    shared as f64 / of_text.max(of_reference).max(1) as f64
}

fn rouge_n(text: &str, reference: &str, order: usize) -> f64 {
    let (text, reference) = (tokens_rouge(text), tokens_rouge(reference));
    let shared = num_shared(&ngrams(&text, order), &ngrams(&reference, order));
    let count = |words: &[String]| (words.len() + 1).saturating_sub(order);
    f1(shared, count(&text), count(&reference))
}

fn rouge_l(text: &str, reference: &str) -> Result<f64, String> {
    let (text, reference) = (tokens_rouge(text), tokens_rouge(reference));
    Ok(f1(longest_common_subsequence(&text, &reference)?, text.len(), reference.len()))
}

/// `2PR / (P + R)` with `P = shared / a` and `R = shared / b`; 0 where nothing is shared.
fn f1(shared: usize, a: usize, b: usize) -> f64 {
    2.0 * shared as f64 / (a + b).max(1) as f64
}

fn ngrams(words: &[String], order: usize) -> HashMap<&[String], usize> {
    let mut counts = HashMap::new();
    for ngram in words.windows(order) {
        *counts.entry(ngram).or_default() += 1;
    }
    counts
}

/// N-grams in both, each as often as in the one that has it less often.
fn num_shared(a: &HashMap<&[String], usize>, b: &HashMap<&[String], usize>) -> usize {
    a.iter().map(|(ngram, count)| *b.get(ngram).unwrap_or(&0).min(count)).sum()
}

fn longest_common_subsequence<T: PartialEq>(a: &[T], b: &[T]) -> Result<usize, String> {
    // What both begin or end with belongs to it, and most texts that are compared are much alike.
    let prefix = a.iter().zip(b).take_while(|(a, b)| a == b).count();
    let (a, b) = (&a[prefix..], &b[prefix..]);
    let suffix = a.iter().rev().zip(b.iter().rev()).take_while(|(a, b)| a == b).count();
    let (a, b) = (&a[..a.len() - suffix], &b[..b.len() - suffix]);
    if a.len().saturating_mul(b.len()) > MAX_STEPS {
        return Err("the texts are too long to be compared".to_owned());
    }
    // row[j + 1]: the length for what is read of a, and b[..=j].
    let mut row = vec![0; b.len() + 1];
    for item in a {
        let mut diagonal = 0;
        for (index, other) in b.iter().enumerate() {
            let above = row[index + 1];
            row[index + 1] = if item == other { diagonal + 1 } else { above.max(row[index]) };
            diagonal = above;
        }
    }
    Ok(prefix + suffix + row[b.len()])
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn every_metric_agrees_with_the_package_that_defines_it() {
        let text = include_str!("../../../../tests/fixtures/similarity.json");
        let cases: Vec<Value> = serde_json::from_str(text).unwrap();
        assert!(cases.len() > 20);
        for case in &cases {
            let (a, b) = (case["text"].as_str().unwrap(), case["reference"].as_str().unwrap());
            for (name, metric) in METRICS {
                let (ours, known) = (metric.compare(a, b).unwrap(), case[*name].as_f64().unwrap());
                assert!(
                    (ours - known).abs() < 1e-9,
                    "{name} of {a:?} and {b:?}: {ours}, not {known}"
                );
            }
        }
    }

    #[test]
    fn texts_that_would_take_minutes_are_refused() {
        let (a, b) = ("ab".repeat(20_000), "ba".repeat(20_000));
        assert!(Metric::Fuzzy.compare(&a, &format!("x{b}")).is_err());
        assert_eq!(Metric::Fuzzy.compare(&a, &a), Ok(1.0));
    }
}

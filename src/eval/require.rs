//! Requirements: what a report must show for the command to succeed, such as `tuned>base:f1`.

use std::str::FromStr;

use super::{
    EvalError, EvalReport,
    compare::SIGNIFICANCE,
    graders::{self, GRADERS},
    table::difference_text,
};

/// `A>B[:METRIC]` or `A>=B[:METRIC]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Requirement {
    /// The arm that must be better: its name, or its kind (`tuned`, `fewshot`) where only one is meant.
    pub left: String,
    /// How it must compare.
    pub relation: Relation,
    /// The arm it is compared with, named likewise.
    pub right: String,
    /// The deciding grader.
    pub metric: String,
}

/// How two arms must compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relation {
    /// `>`: a positive difference with p < 0.05 (after Holm's adjustment).
    SignificantlyBetter,
    /// `>=`: a difference that is not negative.
    NotWorse,
}

impl FromStr for Requirement {
    type Err = EvalError;

    fn from_str(text: &str) -> Result<Self, EvalError> {
        let unreadable = || EvalError::Requirement(text.to_owned());
        let (left, rest) = text.split_once('>').ok_or_else(unreadable)?;
        let (relation, rest) = match rest.strip_prefix('=') {
            Some(rest) => (Relation::NotWorse, rest),
            None => (Relation::SignificantlyBetter, rest),
        };
        // Arm names hold colons themselves (fewshot:3), so only a grader's name ends the arm.
        let (right, metric) = match rest.rsplit_once(':') {
            Some((right, metric)) if graders::position(metric.trim()).is_some() => (right, metric),
            _ => (rest, GRADERS[0].name),
        };
        let [left, right, metric] = [left, right, metric].map(|part| part.trim().to_owned());
        if left.is_empty() || right.is_empty() || right.contains(['>', '=', ' ']) {
            return Err(unreadable());
        }
        Ok(Self { left, relation, right, metric })
    }
}

impl Requirement {
    /// `Ok(sentence)` if the report shows it, else `Err(sentence)` that says why not.
    ///
    /// # Errors
    /// The outer error: an arm that the report does not have.
    pub fn check(&self, report: &EvalReport) -> Result<Result<String, String>, EvalError> {
        let names: Vec<String> = report.arms.iter().map(|arm| arm.name.clone()).collect();
        let (a, b) = self.arms(&names)?;
        let Some(comparison) = report.comparison(a, b, &self.metric) else {
            // Both exist, so they are the same arm.
            return Ok(Err(format!("{a} cannot be compared with itself")));
        };
        let figures = format!("{a} vs {b}: {}", difference_text(&comparison));
        let reason = match self.relation {
            Relation::SignificantlyBetter if comparison.difference <= 0.0 => "not better",
            Relation::SignificantlyBetter if !comparison.is_significant() => "not significant",
            Relation::NotWorse if comparison.difference < 0.0 => "worse",
            Relation::SignificantlyBetter | Relation::NotWorse => return Ok(Ok(figures)),
        };
        Ok(Err(match self.relation {
            Relation::SignificantlyBetter => {
                format!("{figures}: {reason} (needs a positive difference with p < {SIGNIFICANCE})")
            }
            Relation::NotWorse => format!("{figures}: {reason}"),
        }))
    }

    /// Which two of `arms` (by their names) are meant.
    ///
    /// # Errors
    /// An arm that is none of them.
    pub fn arms<'a>(&self, arms: &'a [String]) -> Result<(&'a str, &'a str), EvalError> {
        Ok((self.arm(arms, &self.left)?, self.arm(arms, &self.right)?))
    }

    fn arm<'a>(&self, arms: &'a [String], name: &str) -> Result<&'a str, EvalError> {
        let of_kind: Vec<&String> =
            arms.iter().filter(|arm| arm.split(':').next() == Some(name)).collect();
        match (arms.iter().find(|arm| *arm == name), of_kind.as_slice()) {
            (Some(arm), _) => Ok(arm),
            (None, [arm]) => Ok(arm),
            (None, _) => Err(EvalError::UnknownName {
                requirement: self.to_string(),
                name: name.to_owned(),
                known: known(arms),
            }),
        }
    }
}

fn known(arms: &[String]) -> String {
    let metrics: Vec<&str> = GRADERS.iter().map(|grader| grader.name).collect();
    format!("the arms {} and the metrics {}", arms.join(", "), metrics.join(", "))
}

impl std::fmt::Display for Requirement {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sign = match self.relation {
            Relation::SignificantlyBetter => ">",
            Relation::NotWorse => ">=",
        };
        write!(formatter, "{}{sign}{}:{}", self.left, self.right, self.metric)
    }
}

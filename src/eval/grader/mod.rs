//! Graders as OpenAI's API defines them: a JSON object says how an answer is scored. (The metrics of a
//! paired evaluation are in [`super::graders`].)
//!
//! Knows definitions, templates, formulas and text metrics. What needs a model or a process it asks
//! of its caller ([`Outside`]).

mod formula;
mod judge;
mod messages;
mod parse;
mod similarity;
mod template;
#[cfg(test)]
mod tests;

use serde_json::Value;

pub use self::{
    formula::Formula,
    judge::Sampling,
    messages::{Messages, plain_messages},
    similarity::{METRICS, Metric, REFUSED},
    template::{Context, Path, Template},
};

/// What is wrong with a definition.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{param}`: {message}")]
pub struct Invalid {
    /// Where: `grader.operation`.
    pub param: String,
    /// What.
    pub message: String,
}

impl Invalid {
    /// `message` about `param`.
    pub fn new(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: param.into(), message: message.into() }
    }
}

/// Why an answer has no score.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    /// Whose fault.
    pub kind: FaultKind,
    /// What happened, naming the value.
    pub message: String,
}

/// The kinds of faults that OpenAI's answers tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// The formula has no value.
    Formula,
    /// The answer is no JSON, but the grader reads it as such.
    SampleParse,
    /// A variable that does not exist.
    InvalidVariable,
    /// The program of a `python` grader failed.
    PythonRuntime,
    /// The program could not be run.
    PythonServer,
    /// The judge could not be asked.
    ModelServer,
    /// The judge's answer holds no score.
    ModelParse,
    /// The server is ending; the same may be asked again later.
    Interrupted,
    /// Anything else.
    Other,
}

impl Fault {
    /// `message` of this kind.
    pub fn new(kind: FaultKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

/// What graders need of the world.
pub trait Outside {
    /// Asks a model.
    ///
    /// # Errors
    /// There is no such model, or it gives no answer.
    fn ask(&self, model: &str, messages: &[Value], sampling: &Sampling) -> Result<Reply, Fault>;

    /// Runs a `python` grader's `grade(sample, item)`.
    ///
    /// # Errors
    /// Python is switched off or cannot be run, or the program fails.
    fn run_python(&self, source: &str, context: &Context) -> Result<f64, Fault>;
}

/// What a model answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// The answer, without special tokens.
    pub text: String,
    /// `stop` or `length`.
    pub finish_reason: &'static str,
    /// Tokens of the question.
    pub prompt_tokens: usize,
    /// Tokens of the answer.
    pub completion_tokens: usize,
}

/// Tokens that one model took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JudgeUsage {
    /// As the grader names it.
    pub model: String,
    /// Of the question.
    pub prompt_tokens: usize,
    /// Of the answer.
    pub completion_tokens: usize,
}

/// A grader that can be used.
#[derive(Debug, Clone, PartialEq)]
pub struct Grader {
    /// What its user calls it.
    pub name: String,
    /// Least score that passes.
    pub pass_threshold: f64,
    kind: Kind,
}

#[derive(Debug, Clone, PartialEq)]
enum Kind {
    StringCheck { input: Template, reference: Template, operation: Operation },
    TextSimilarity { input: Template, reference: Template, metric: Metric },
    ScoreModel { model: String, input: Messages, sampling: Sampling, range: [f64; 2] },
    LabelModel { model: String, input: Messages, sampling: Sampling, labels: Labels },
    Python { source: String },
    Multi { graders: Vec<(String, Grader)>, formula: Formula },
}

/// How a `string_check` compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    /// Equal.
    Eq,
    /// Not equal.
    Ne,
    /// The input has the reference in it.
    Like,
    /// The same without regard to case.
    Ilike,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Labels {
    all: Vec<String>,
    passing: Vec<String>,
}

/// What a grader made of an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Graded {
    /// The score.
    pub score: Result<f64, Fault>,
    /// Scores of a `multi` grader's parts, by their names.
    pub parts: Vec<(String, f64)>,
    /// What was asked of judges, also where it came to nothing.
    pub usage: Vec<JudgeUsage>,
}

impl Graded {
    fn plain(score: Result<f64, Fault>) -> Self {
        Self { score, parts: Vec::new(), usage: Vec::new() }
    }
}

impl Grader {
    /// The name of its type on the wire.
    #[must_use]
    pub fn type_name(&self) -> &'static str {
        match self.kind {
            Kind::StringCheck { .. } => "string_check",
            Kind::TextSimilarity { .. } => "text_similarity",
            Kind::ScoreModel { .. } => "score_model",
            Kind::LabelModel { .. } => "label_model",
            Kind::Python { .. } => "python",
            Kind::Multi { .. } => "multi",
        }
    }

    /// Whether it, or a part of it, runs the user's program.
    #[must_use]
    pub fn runs_python(&self) -> bool {
        match &self.kind {
            Kind::Python { .. } => true,
            Kind::Multi { graders, .. } => graders.iter().any(|(_, grader)| grader.runs_python()),
            Kind::StringCheck { .. }
            | Kind::TextSimilarity { .. }
            | Kind::ScoreModel { .. }
            | Kind::LabelModel { .. } => false,
        }
    }

    /// The models that it asks.
    #[must_use]
    pub fn models(&self) -> Vec<&str> {
        match &self.kind {
            Kind::ScoreModel { model, .. } | Kind::LabelModel { model, .. } => vec![model],
            Kind::Multi { graders, .. } => {
                graders.iter().flat_map(|(_, grader)| grader.models()).collect()
            }
            Kind::StringCheck { .. } | Kind::TextSimilarity { .. } | Kind::Python { .. } => {
                Vec::new()
            }
        }
    }

    /// Scores what `context` holds.
    pub fn grade(&self, context: &Context, outside: &dyn Outside) -> Graded {
        match &self.kind {
            Kind::StringCheck { input, reference, operation } => {
                let texts = render_both(input, reference, context);
                Graded::plain(texts.map(|(input, reference)| {
                    f64::from(u8::from(operation.holds(&input, &reference)))
                }))
            }
            Kind::TextSimilarity { input, reference, metric } => {
                let texts = render_both(input, reference, context);
                Graded::plain(texts.and_then(|(input, reference)| {
                    let alike = metric.compare(&input, &reference);
                    alike.map_err(|message| Fault::new(FaultKind::Other, message))
                }))
            }
            Kind::ScoreModel { model, input, sampling, range } => {
                let instruction = judge::score_instruction(*range);
                let asked = Asked { model, input, sampling, instruction };
                asked.answer(context, outside, |text| judge::read_score(text, *range))
            }
            Kind::LabelModel { model, input, sampling, labels } => {
                let instruction = judge::label_instruction(&labels.all);
                let asked = Asked { model, input, sampling, instruction };
                asked.answer(context, outside, |text| {
                    let label = judge::read_label(text, &labels.all)?;
                    let passes = labels.passing.iter().any(|passing| passing == label);
                    Ok(f64::from(u8::from(passes)))
                })
            }
            Kind::Python { source } => Graded::plain(outside.run_python(source, context)),
            Kind::Multi { graders, formula } => multi(graders, formula, context, outside),
        }
    }
}

impl Operation {
    fn holds(self, input: &str, reference: &str) -> bool {
        match self {
            Self::Eq => input == reference,
            Self::Ne => input != reference,
            Self::Like => input.contains(reference),
            Self::Ilike => input.to_lowercase().contains(&reference.to_lowercase()),
        }
    }
}

/// A question for a judge.
struct Asked<'a> {
    model: &'a str,
    input: &'a Messages,
    sampling: &'a Sampling,
    instruction: String,
}

impl Asked<'_> {
    fn answer(
        &self,
        context: &Context,
        outside: &dyn Outside,
        read: impl FnOnce(&str) -> Result<f64, Fault>,
    ) -> Graded {
        let reply = self.input.render(context).and_then(|messages| {
            let messages = judge::with_instruction(messages, &self.instruction);
            outside.ask(self.model, &messages, self.sampling)
        });
        match reply {
            Err(fault) => Graded::plain(Err(fault)),
            Ok(reply) => Graded {
                score: read(&reply.text),
                parts: Vec::new(),
                usage: vec![JudgeUsage {
                    model: self.model.to_owned(),
                    prompt_tokens: reply.prompt_tokens,
                    completion_tokens: reply.completion_tokens,
                }],
            },
        }
    }
}

fn render_both(
    input: &Template,
    reference: &Template,
    context: &Context,
) -> Result<(String, String), Fault> {
    Ok((input.render(context)?, reference.render(context)?))
}

/// All parts are graded, so that a report has every score that there is; the first fault counts.
fn multi(
    graders: &[(String, Grader)],
    formula: &Formula,
    context: &Context,
    outside: &dyn Outside,
) -> Graded {
    let (mut parts, mut usage, mut fault) = (Vec::new(), Vec::new(), None);
    for (name, grader) in graders {
        let graded = grader.grade(context, outside);
        usage.extend(graded.usage);
        match graded.score {
            Ok(score) => parts.push((name.clone(), score)),
            Err(found) => fault = fault.or(Some(found)),
        }
    }
    let score = match fault {
        Some(fault) => Err(fault),
        None => {
            let value = |wanted: &str| {
                parts.iter().find(|(name, _)| name == wanted).map(|(_, score)| *score)
            };
            formula.evaluate(&value).map_err(|message| Fault::new(FaultKind::Formula, message))
        }
    };
    Graded { score, parts, usage }
}

//! One row of a run: asked, graded, and put on record.

use std::{collections::BTreeMap, sync::Arc};

use serde_json::{Value, json};

use super::{
    CriterionResult, EvalOutput, EvalRun, ModelUsage, Outcome, SourceRow,
    source::{Answers, Prompt},
};
use crate::adapters::AdapterVersion;
use crate::eval::grader::{Context, Fault, FaultKind, Grader, Sampling};
use crate::jobs::{ask::Asker, new_id, unix_seconds};

/// What every row of a run shares.
pub(super) struct Plan<'a> {
    pub(super) run: &'a EvalRun,
    pub(super) graders: Vec<Grader>,
    pub(super) answers: Answers,
    /// What the run's model was when the run began (or went on): it is measured, not its successors.
    pub(super) version: Option<Arc<AdapterVersion>>,
    pub(super) asker: Asker<'a>,
}

/// The service ends before the row does.
pub(super) struct Interrupted;

/// A row's answer, as graders and clients see it.
struct Answered {
    context: Context,
    sample: Value,
    usage: Vec<ModelUsage>,
}

impl Plan<'_> {
    /// Answers and grades the row at `index`.
    pub(super) fn output(&self, index: usize, row: &SourceRow) -> Result<EvalOutput, Interrupted> {
        let mut output = EvalOutput {
            id: new_id("outputitem_"),
            run_id: self.run.id.clone(),
            eval_id: self.run.eval_id.clone(),
            created_at: unix_seconds(),
            index,
            item: row.item.clone(),
            outcome: Outcome::Error,
            results: Vec::new(),
            sample: Value::Null,
            usage: Vec::new(),
        };
        let answered = match &self.answers {
            Answers::Given => given(row),
            Answers::Model { model, prompt, sampling } => {
                match self.ask(row, model, prompt, sampling) {
                    Ok(answered) => answered,
                    Err(fault) if fault.kind == FaultKind::Interrupted => return Err(Interrupted),
                    Err(fault) => {
                        output.sample = sample(
                            &[],
                            None,
                            json!({
                                "model": model,
                                "error": {"code": "sample_error", "message": fault.message},
                            }),
                        );
                        return Ok(output);
                    }
                }
            }
        };
        output.sample = answered.sample;
        output.usage = answered.usage;
        for grader in &self.graders {
            let (result, usage) = self.grade(grader, &answered.context)?;
            output.results.push(result);
            output.usage.extend(usage);
        }
        let has = |outcome| output.results.iter().any(|result| result.outcome == outcome);
        output.outcome = match (has(Outcome::Error), has(Outcome::Fail)) {
            (true, _) => Outcome::Error,
            (false, true) => Outcome::Fail,
            (false, false) => Outcome::Pass,
        };
        Ok(output)
    }

    fn ask(
        &self,
        row: &SourceRow,
        model: &str,
        prompt: &Prompt,
        sampling: &Sampling,
    ) -> Result<Answered, Fault> {
        let messages = prompt.messages(&row.item)?;
        let reply = self.asker.ask_version(self.version.clone(), &messages, sampling)?;
        let sample = sample(
            &messages,
            Some(&reply.text),
            json!({
                "finish_reason": reply.finish_reason,
                "model": model,
                "usage": {
                    "total_tokens": reply.prompt_tokens + reply.completion_tokens,
                    "completion_tokens": reply.completion_tokens,
                    "prompt_tokens": reply.prompt_tokens,
                    "cached_tokens": 0,
                },
                "temperature": sampling.temperature,
                "max_completion_tokens": self.asker.max_tokens(sampling),
                "top_p": sampling.top_p,
                "seed": sampling.seed,
            }),
        );
        let usage = vec![ModelUsage {
            model: model.to_owned(),
            invocations: 1,
            prompt_tokens: reply.prompt_tokens,
            completion_tokens: reply.completion_tokens,
        }];
        let mut context = Context::of_answer(row.item.clone(), &reply.text);
        context.sample["model"] = model.into();
        context.sample["finish_reason"] = reply.finish_reason.into();
        Ok(Answered { context, sample, usage })
    }

    fn grade(
        &self,
        grader: &Grader,
        context: &Context,
    ) -> Result<(CriterionResult, Vec<ModelUsage>), Interrupted> {
        let graded = grader.grade(context, &self.asker);
        let usage = graded.usage.into_iter().map(|usage| ModelUsage {
            model: usage.model,
            invocations: 1,
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
        });
        let (score, outcome, error) = match graded.score {
            Ok(score) if score >= grader.pass_threshold => (score, Outcome::Pass, None),
            Ok(score) => (score, Outcome::Fail, None),
            Err(fault) if fault.kind == FaultKind::Interrupted => return Err(Interrupted),
            Err(fault) => (0.0, Outcome::Error, Some(fault.message)),
        };
        let result = CriterionResult {
            name: grader.name.clone(),
            kind: grader.type_name().to_owned(),
            score,
            outcome,
            parts: BTreeMap::from_iter(graded.parts),
            error,
        };
        Ok((result, usage.collect()))
    }
}

/// A row that came with its answer: a text, or OpenAI's object with `output_text` or `choices`.
fn given(row: &SourceRow) -> Answered {
    let given = row.sample.clone().unwrap_or(Value::Null);
    let text = (given.as_str())
        .or_else(|| given["output_text"].as_str())
        .or_else(|| given["choices"][0]["message"]["content"].as_str());
    let mut context = match text {
        Some(text) => Context::of_answer(row.item.clone(), text),
        None => Context { item: row.item.clone(), sample: json!({}) },
    };
    for (name, value) in given.as_object().into_iter().flatten() {
        context.sample[name.as_str()] = value.clone();
    }
    Answered { sample: sample(&[], text, json!({})), context, usage: Vec::new() }
}

/// OpenAI's sample object, with `known` for what is known.
fn sample(input: &[Value], text: Option<&str>, known: Value) -> Value {
    let output: Vec<Value> =
        text.iter().map(|text| json!({"role": "assistant", "content": text})).collect();
    let mut sample = json!({
        "input": input,
        "output": output,
        "finish_reason": null,
        "model": null,
        "usage": null,
        "error": null,
        "temperature": null,
        "max_completion_tokens": null,
        "top_p": null,
        "seed": null,
    });
    if let Value::Object(fields) = known {
        for (name, value) in fields {
            sample[name] = value;
        }
    }
    sample
}

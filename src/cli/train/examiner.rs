//! The engine as examiner of a run: it answers validation rows with the adapter as it is, and before
//! anything is published it must say of held-out rows what training says.

use std::{path::Path, sync::Arc};

use anyhow::{Context, ensure};
use serde_json::json;

use super::{super::common::stop_token_ids, report_page};
use crate::adapters::{AdapterRegistry, AdapterVersion};
use crate::data::{Example, Question, epoch_order};
use crate::engine::{
    self, EngineConfig, EngineHandle,
    parity::{self, Parity, TrainedSequence},
};
use crate::eval::{Arm, EvalReport, Runner, arms::TUNED, graders, report::Metadata};
use crate::model::{Decoder, KvDtype, WeightMode};
use crate::ops::lora_dtype::LoraDtype;
use crate::text::{ChatTemplate, Tokenizer};
use crate::train::{Candidate, Examination, Examiner, Generated, Method, Scored};

/// Memory for keys and values of an examination, in bytes.
const KV_CACHE_BYTES: usize = 256 << 20;
/// Requests at once.
const MAX_NUM_SEQS: usize = 8;
/// Most tokens of a generated answer.
const MAX_TOKENS: usize = 128;

/// An engine whenever one is needed, over the base that is trained on.
pub(in crate::cli) struct EngineExaminer {
    pub(super) tokenizer: Arc<Tokenizer>,
    pub(super) template: Arc<ChatTemplate>,
    /// Of validation rows; of training rows where there are none.
    pub(super) questions: Vec<Question>,
    /// Whether these are validation rows.
    pub(super) held_out: bool,
}

impl Examiner for EngineExaminer {
    fn generate(&mut self, candidate: &Candidate<'_>) -> Result<Generated, String> {
        self.answers(candidate).map_err(|error| format!("{error:#}"))
    }

    fn compare(&mut self, candidate: &Candidate<'_>) -> Result<Examination, String> {
        let compared = Served::new(candidate).and_then(|served| served.examination(candidate));
        compared.map_err(|error| format!("{error:#}"))
    }

    fn examine(&mut self, candidate: &Candidate<'_>) -> Result<Examination, String> {
        self.look_at(candidate).map_err(|error| format!("{error:#}"))
    }
}

impl EngineExaminer {
    fn answers(&self, candidate: &Candidate<'_>) -> anyhow::Result<Generated> {
        let served = Served::new(candidate)?;
        let config = &candidate.job.config;
        let questions = self.some_questions(config.eval_generate, config.seed);
        if questions.is_empty() || !self.held_out {
            return Ok(Generated { num_rows: 0, exact_match: 0.0, f1: 0.0 });
        }
        let report = self.ask(&served, &[served.tuned()], &questions, candidate)?;
        let score = |name: &str| {
            graders::position(name).and_then(|index| report.arms[0].scores.get(index)).copied()
        };
        Ok(Generated {
            num_rows: questions.len(),
            exact_match: score("exact_match").unwrap_or_default(),
            f1: score("f1").unwrap_or_default(),
        })
    }

    fn look_at(&self, candidate: &Candidate<'_>) -> anyhow::Result<Examination> {
        let mut examination = Examination::default();
        let mut samples = None;
        if candidate.folder.is_some() {
            let served = Served::new(candidate)?;
            examination = served.examination(candidate)?;
            let config = &candidate.job.config;
            let questions = self.some_questions(config.samples, config.seed);
            if !questions.is_empty() {
                samples = Some(self.before_and_after(served, &questions, candidate)?);
            }
        }
        examination.card = json!({
            "parity": {
                "max_difference": examination.max_difference,
                "num_tokens": examination.num_tokens,
            },
            "golden": samples.as_ref().map_or_else(Vec::new, golden),
        });
        let page = report_page::render(candidate, &examination, samples.as_ref(), self.held_out);
        examination.files.push(("report.html", page));
        Ok(examination)
    }

    /// The base's answers, and those of what is about to be published.
    fn before_and_after(
        &self,
        served: Served,
        questions: &[Question],
        candidate: &Candidate<'_>,
    ) -> anyhow::Result<EvalReport> {
        if served.version.is_some() {
            return self.ask(&served, &[Arm::Base, served.tuned()], questions, candidate);
        }
        let mut report = self.ask(&served, &[Arm::Base], questions, candidate)?;
        // One model at a time.
        drop(served);
        let before = if candidate.from_random {
            vec!["(random weights)".to_owned(); report.examples.len()]
        } else {
            let base = Served::model(&candidate.job.model_dir, candidate)?;
            let report = self.ask(&base, &[Arm::Base], questions, candidate)?;
            report.examples.into_iter().flat_map(|example| example.answers).collect()
        };
        for (example, answer) in report.examples.iter_mut().zip(before) {
            example.answers.insert(0, answer);
        }
        Ok(report)
    }

    /// `count` of the rows, the same ones each time, in their order.
    fn some_questions(&self, count: usize, seed: u64) -> Vec<Question> {
        let mut chosen = epoch_order(self.questions.len(), seed, 0);
        chosen.truncate(count);
        chosen.sort_unstable();
        chosen.into_iter().map(|index| self.questions[index].clone()).collect()
    }

    fn ask(
        &self,
        served: &Served,
        arms: &[Arm],
        questions: &[Question],
        candidate: &Candidate<'_>,
    ) -> anyhow::Result<EvalReport> {
        let stop_token_ids = stop_token_ids(candidate.decoder.config(), &self.tokenizer);
        let adapters: Vec<_> = served.version.iter().cloned().collect();
        let runner = Runner {
            engine: &served.engine,
            tokenizer: &self.tokenizer,
            template: &self.template,
            adapters: &adapters,
            stop_token_ids: &stop_token_ids,
            max_tokens: Some(MAX_TOKENS),
            seed: candidate.job.config.seed,
            max_pending: None,
            should_stop: &|| false,
        };
        Ok(runner.run(arms, questions, &[], Metadata::default(), &mut |_| {})?)
    }
}

/// Questions with the answers that were published with the adapter, so that whoever serves it can see
/// that it is the same.
fn golden(report: &EvalReport) -> Vec<serde_json::Value> {
    let answer = |example: &crate::eval::report::Example| json!({"line": example.line, "prompt": example.question, "answer": example.answers.last()});
    report.examples.iter().map(answer).collect()
}

/// An engine with what the candidate trains, read from its folder as a server reads it.
struct Served {
    engine: EngineHandle,
    /// The adapter; none where the engine's own model is asked.
    version: Option<Arc<AdapterVersion>>,
}

impl Served {
    fn new(candidate: &Candidate<'_>) -> anyhow::Result<Self> {
        let dir = candidate.folder.context("there is nothing to serve")?;
        if candidate.job.config.method == Method::Full {
            return Self::model(dir, candidate);
        }
        let decoder = candidate.decoder;
        let registry = AdapterRegistry::new(decoder.config().clone())
            .with_base_fingerprint(decoder.fingerprint());
        let (version, _) = registry.load(TUNED, dir, false).context("loading the adapter")?;
        Ok(Self { engine: engine_over(decoder, candidate)?, version: Some(version) })
    }

    /// The model in `dir`.
    fn model(dir: &Path, candidate: &Candidate<'_>) -> anyhow::Result<Self> {
        let decoder = Decoder::load(dir, WeightMode::Frozen).context("loading the model")?;
        Ok(Self { engine: engine_over(&Arc::new(decoder), candidate)?, version: None })
    }

    /// What is asked for what is trained.
    fn tuned(&self) -> Arm {
        if self.version.is_some() { Arm::Tuned(TUNED.to_owned()) } else { Arm::Base }
    }

    /// That training and serving say the same.
    fn examination(&self, candidate: &Candidate<'_>) -> anyhow::Result<Examination> {
        let Parity { max_difference, num_tokens } = close(self.parity(candidate.scored)?)?;
        let max_difference = (num_tokens > 0).then_some(max_difference);
        Ok(Examination { max_difference, num_tokens, ..Examination::default() })
    }

    /// What training said and what the engine says. A sequence that does not fit into the cache here is not
    /// compared.
    fn parity(&self, scored: &[Scored<'_>]) -> anyhow::Result<Parity> {
        let sequences = scored.iter().map(|Scored { example, logprobs }| TrainedSequence {
            tokens: &example.tokens,
            loss_mask: &example.loss_mask,
            logprobs,
        });
        Ok(parity::compare(&self.engine, self.version.as_ref(), sequences, &|| false)?)
    }
}

/// Refuses a difference that rounding does not explain.
fn close(parity: Parity) -> anyhow::Result<Parity> {
    let Parity { max_difference, num_tokens } = parity;
    ensure!(
        parity.is_close(KvDtype::F32, LoraDtype::Auto),
        "served log-probabilities differ from training by up to {max_difference:.1e} over \
         {num_tokens} tokens, more than {:.0e}",
        Parity::tolerance(KvDtype::F32, LoraDtype::Auto)
    );
    Ok(parity)
}

/// An engine over `decoder`, with a cache that is no larger than the longest rows and their answers can fill.
fn engine_over(decoder: &Arc<Decoder>, candidate: &Candidate<'_>) -> anyhow::Result<EngineHandle> {
    let mut config = EngineConfig::for_model(decoder.config(), MAX_NUM_SEQS, KV_CACHE_BYTES);
    let job = candidate.job;
    let sides = job.train.iter().chain(&job.valid).flat_map(Example::sides);
    let longest = sides.map(|side| side.tokens.len()).max().unwrap_or(0) + MAX_TOKENS;
    let useful = MAX_NUM_SEQS * longest.div_ceil(config.block_size);
    config.num_blocks = config.num_blocks.min(useful);
    Ok(engine::spawn(Arc::clone(decoder), config)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_served_may_differ_from_what_was_trained_by_rounding_and_no_more() {
        let found = |max_difference| close(Parity { max_difference, num_tokens: 3 });
        assert!(found(0.0).is_ok() && found(9e-4).is_ok());
        for max_difference in [2e-3, f64::INFINITY, f64::NAN] {
            let error = found(max_difference).expect_err("too different").to_string();
            assert!(error.contains("over 3 tokens, more than 1e-3"), "{error}");
        }
    }
}

//! Asks all arms all questions in one continuous batch: first the answers, written greedily, then
//! the likelihood of the reference answers.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Arm, EvalError, EvalReport,
    prompts::{Prompt, Prompts},
    report::Metadata,
    summary::summarise,
};
use crate::adapters::AdapterVersion;
use crate::data::{Question, Row};
use crate::engine::{
    EngineError, EngineHandle, FinishReason, GenerationEvent, GenerationRequest, GenerationStream,
    GenerationUsage, RequestOptions, SamplingParams, TokenScore,
};
use crate::text::{ChatTemplate, Detokenizer, TextError, Tokenizer};

/// What an evaluation needs besides questions and arms.
pub struct Runner<'a> {
    /// The engine that serves the base model.
    pub engine: &'a EngineHandle,
    /// The base model's tokenizer.
    pub tokenizer: &'a Arc<Tokenizer>,
    /// The base model's chat template.
    pub template: &'a ChatTemplate,
    /// The versions that tuned arms name.
    pub adapters: &'a [Arc<AdapterVersion>],
    /// Tokens that end an answer.
    pub stop_token_ids: &'a [u32],
    /// Most tokens of an answer, the same for every arm. `None`: twice the longest reference
    /// answer, at least [`MIN_MAX_TOKENS`].
    pub max_tokens: Option<usize>,
    /// Chooses the few-shot examples and seeds the bootstrap.
    pub seed: u64,
    /// Most requests that the engine has at once; `None`: as many as it takes. Where others are
    /// served at the same time, few.
    pub max_pending: Option<usize>,
    /// Asked after every request; once it says so, the run ends with [`EvalError::Stopped`].
    pub should_stop: &'a dyn Fn() -> bool,
}

/// Least limit on an answer's tokens that is chosen unasked.
pub const MIN_MAX_TOKENS: usize = 32;

/// How long a run waits when the engine is full of others' requests.
const RETRY: Duration = Duration::from_millis(5);

/// How far an evaluation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Requests that have ended.
    pub done: usize,
    /// All requests: two per arm and row.
    pub total: usize,
}

/// What one arm made of one row.
#[derive(Debug, Clone, Default)]
pub(super) struct Outcome {
    /// The answer, without special tokens.
    pub(super) text: String,
    /// Why it ended; `None` if the prompt did not fit the context.
    pub(super) finish: Option<FinishReason>,
    /// Counts and times of the answer.
    pub(super) usage: GenerationUsage,
    /// Scores of the reference answer's tokens, its end token included.
    pub(super) reference: Vec<TokenScore>,
}

/// What is asked of the engine about a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Task {
    /// Write an answer.
    Answer,
    /// Score the reference answer.
    Score,
}

/// A request that the engine has.
struct Pending {
    task: Task,
    arm: usize,
    row: usize,
    stream: GenerationStream,
}

impl Runner<'_> {
    /// Evaluates `arms` on `questions`; few-shot arms show some of the rows `examples`. `metadata`
    /// is the caller's part of the report's; the rest is filled in. `on_progress` hears of every
    /// request that ends.
    ///
    /// # Errors
    /// Too few `examples`, a row that the template refuses, a request that fails.
    pub fn run(
        &self,
        arms: &[Arm],
        questions: &[Question],
        examples: &[Row],
        metadata: Metadata,
        on_progress: &mut dyn FnMut(Progress),
    ) -> Result<EvalReport, EvalError> {
        let adapters: Result<Vec<_>, EvalError> =
            arms.iter().map(|arm| self.adapter(arm)).collect();
        let adapters = adapters?;
        let prompts = Prompts {
            adapters: &adapters,
            tokenizer: self.tokenizer,
            template: self.template,
            stop_token_ids: self.stop_token_ids,
            seed: self.seed,
        }
        .of_arms(arms, questions, examples)?;
        let longest = prompts.iter().flatten().map(|prompt| prompt.reference.len()).max();
        let max_tokens =
            self.max_tokens.unwrap_or_else(|| (2 * longest.unwrap_or(0)).max(MIN_MAX_TOKENS));
        let start = Instant::now();
        let evaluation =
            Evaluation { runner: self, arms, questions, adapters, prompts, max_tokens };
        let outcomes = evaluation.ask_all(on_progress)?;
        let seconds = start.elapsed().as_secs_f64();
        let metadata = Metadata { max_tokens, seed: self.seed, seconds, ..metadata };
        Ok(summarise(arms, questions, &outcomes, metadata))
    }

    /// A greedy request; with `max_tokens` 0 one that only scores the prompt.
    fn request(
        &self,
        prompt: Vec<u32>,
        adapter: Option<Arc<AdapterVersion>>,
        max_tokens: usize,
    ) -> GenerationRequest {
        let sampling = SamplingParams { seed: self.seed, ..SamplingParams::greedy() };
        GenerationRequest {
            prompt,
            adapter,
            sampling,
            max_tokens,
            stop_token_ids: self.stop_token_ids.to_vec(),
            score_prompt: max_tokens == 0,
            options: RequestOptions::default(),
        }
    }

    fn adapter(&self, arm: &Arm) -> Result<Option<Arc<AdapterVersion>>, EvalError> {
        let Arm::Tuned(name) = arm else { return Ok(None) };
        let found = self.adapters.iter().find(|version| version.name == *name);
        found.cloned().map(Some).ok_or_else(|| EvalError::UnknownArm(arm.to_string()))
    }
}

/// A run, ready to start.
struct Evaluation<'a> {
    runner: &'a Runner<'a>,
    arms: &'a [Arm],
    questions: &'a [Question],
    /// What each arm is served with.
    adapters: Vec<Option<Arc<AdapterVersion>>>,
    /// `[arm][row]`
    prompts: Vec<Vec<Prompt>>,
    max_tokens: usize,
}

impl Evaluation<'_> {
    /// All outcomes, `[arm][row]`.
    fn ask_all(
        &self,
        on_progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<Vec<Outcome>>, EvalError> {
        let (num_arms, num_rows) = (self.arms.len(), self.questions.len());
        let mut outcomes = vec![vec![Outcome::default(); num_rows]; num_arms];
        let mut progress = Progress { done: 0, total: 2 * num_arms * num_rows };
        let mut finish = |pending: Pending| {
            self.finish(pending, &mut outcomes)?;
            progress.done += 1;
            on_progress(progress);
            if (self.runner.should_stop)() { Err(EvalError::Stopped) } else { Ok(()) }
        };
        let max_pending = self.runner.max_pending.unwrap_or(usize::MAX).max(1);
        let mut running: VecDeque<Pending> = VecDeque::new();
        // The scores come last, so that they do not lengthen the answers' latencies; row by row,
        // so that all arms run under the same load.
        for task in [Task::Answer, Task::Score] {
            for index in 0..num_rows * num_arms {
                let (row, arm) = (index / num_arms, index % num_arms);
                if running.len() == max_pending
                    && let Some(first) = running.pop_front()
                {
                    finish(first)?;
                }
                let stream = loop {
                    match self.submit(task, arm, row) {
                        Err(error) if error.is_full() => match running.pop_front() {
                            Some(first) => finish(first)?,
                            // Full of others' requests, which end without our help.
                            None if (self.runner.should_stop)() => return Err(EvalError::Stopped),
                            None => std::thread::sleep(RETRY),
                        },
                        // No room for a single token: an empty answer, or a reference not scored.
                        Err(EngineError::TooLong { .. }) => break None,
                        taken => {
                            break Some(taken.map_err(|source| self.refused(arm, row, source))?);
                        }
                    }
                };
                running.extend(stream.map(|stream| Pending { task, arm, row, stream }));
            }
        }
        running.into_iter().try_for_each(finish)?;
        for (outcomes, prompts) in outcomes.iter_mut().zip(&self.prompts) {
            for (outcome, prompt) in outcomes.iter_mut().zip(prompts) {
                outcome.usage.prompt_tokens = prompt.tokens.len();
            }
        }
        Ok(outcomes)
    }

    fn submit(&self, task: Task, arm: usize, row: usize) -> Result<GenerationStream, EngineError> {
        let runner = self.runner;
        let prompt = &self.prompts[arm][row];
        let adapter = &self.adapters[arm];
        let ask = |tokens: &[u32], max_tokens| {
            runner.engine.generate(runner.request(tokens.to_vec(), adapter.clone(), max_tokens))
        };
        if task == Task::Score {
            return ask(&[prompt.tokens.as_slice(), &prompt.reference].concat(), 0);
        }
        match ask(&prompt.tokens, self.max_tokens) {
            Err(EngineError::TooLong { prompt: used, limit, .. }) if used < limit => {
                ask(&prompt.tokens, limit - used)
            }
            taken => taken,
        }
    }

    /// Waits for the request's end and keeps what it says.
    fn finish(&self, pending: Pending, outcomes: &mut [Vec<Outcome>]) -> Result<(), EvalError> {
        let Pending { task, arm, row, mut stream } = pending;
        let prompt = &self.prompts[arm][row];
        let outcome = &mut outcomes[arm][row];
        let adapter = self.adapters[arm].as_ref();
        let tokenizer = AdapterVersion::tokenizer_of(adapter, self.runner.tokenizer);
        let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer), &prompt.tokens);
        let text = |source: TextError| self.prompt_error(arm, row, source);
        while let Some(event) = stream.blocking_next() {
            match event {
                GenerationEvent::Token { id, .. } => {
                    outcome.text.push_str(&detokenizer.push(id).map_err(text)?);
                }
                GenerationEvent::PromptScores(mut scores) => {
                    // The first score is the second token's: the reference's are the last ones.
                    let start = scores.len().saturating_sub(prompt.reference.len());
                    outcome.reference = scores.split_off(start);
                }
                GenerationEvent::Finished { reason, usage } if task == Task::Answer => {
                    outcome.text.push_str(&detokenizer.finish().map_err(text)?);
                    (outcome.finish, outcome.usage) = (Some(reason), usage);
                }
                GenerationEvent::Finished { .. } => {}
                GenerationEvent::Failed { message } => {
                    let (line, arm) = (self.questions[row].line, self.arms[arm].to_string());
                    return Err(EvalError::Failed { line, arm, message });
                }
            }
        }
        Ok(())
    }

    fn refused(&self, arm: usize, row: usize, source: EngineError) -> EvalError {
        let (line, arm) = (self.questions[row].line, self.arms[arm].to_string());
        EvalError::Refused { line, arm, source }
    }

    fn prompt_error(&self, arm: usize, row: usize, source: TextError) -> EvalError {
        let (line, arm) = (self.questions[row].line, self.arms[arm].to_string());
        EvalError::Prompt { line, arm, source }
    }
}

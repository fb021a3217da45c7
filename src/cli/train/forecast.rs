//! What a run will take, before it takes it: memory from sizes, time from three real steps.

use std::{sync::atomic::AtomicBool, time::Duration};

use anyhow::bail;
use indicatif::HumanDuration;

use crate::cli::{
    memory::{Memory, bytes, free, peak},
    speed::Speed,
};
use crate::data::Example;
use crate::model::ModelConfig;
use crate::train::{
    BatchPlan, Method, Packing, RecomputeChoice, TrainConfig, TrainEvent, TrainJob, rehearse,
};

/// Steps that are measured: one that warms up, and two that count.
const NUM_STEPS: usize = 3;
/// Sizes of a micro-batch that a budget may choose, in tokens.
const MICRO_BATCH_TOKENS: &[usize] = &[8192, 4096, 2048, 1024, 512, 256, 128, 64];

/// From this size on a pass is no faster by token if it is larger.
const EFFICIENT_TOKENS: usize = 512;
/// Percent of the free memory that a run may take unasked.
const SHARE_OF_FREE: u64 = 80;

/// What the first steps of a run say about the rest of it.
#[derive(Debug, Default)]
pub(in crate::cli) struct Forecast {
    steps_before: usize,
    total_steps: usize,
    num_steps: usize,
    /// Seconds of the first, which also warms caches and fetches memory.
    first: f64,
    speed: Speed,
}

impl Forecast {
    /// Takes in an event. Gives a line once, after the third step.
    pub(in crate::cli) fn hear(&mut self, event: &TrainEvent) -> Option<String> {
        if let TrainEvent::Started { step, total_steps, .. } = event {
            *self = Self { steps_before: *step, total_steps: *total_steps, ..Self::default() };
        }
        let TrainEvent::Step { num_tokens, seconds, .. } = event else { return None };
        if self.num_steps == NUM_STEPS {
            return None;
        }
        self.num_steps += 1;
        if self.num_steps == 1 {
            self.first = *seconds;
        }
        self.speed.add(*num_tokens, *seconds);
        let last = self.steps_before + self.num_steps == self.total_steps;
        (self.num_steps == NUM_STEPS || last).then(|| self.line())
    }

    fn line(&self) -> String {
        let per_step = self.speed.seconds_per_step().unwrap_or_default();
        let speed = self.speed.tokens_per_second().unwrap_or_default();
        let steps = self.total_steps - self.steps_before;
        let rest = per_step * steps.saturating_sub(1) as f64;
        let whole = HumanDuration(Duration::from_secs_f64(self.first + rest));
        let memory = peak().map_or("unknown".to_owned(), bytes);
        let warm_up = match self.num_steps {
            0 | 1 => "measured 1 step".to_owned(),
            2 => format!("measured 1 step after a first of {:.2} s", self.first),
            steps => format!("measured {} steps after a first of {:.2} s", steps - 1, self.first),
        };
        format!(
            "{warm_up}: {per_step:.2} s/step, {speed:.0} tokens/s, {whole:#} for {steps} steps (without \
             validation), memory peak {memory}"
        )
    }
}

/// The run's first steps, measured, and nothing left of them.
///
/// # Errors
/// What a run would meet up to there.
pub(super) fn dry_run(job: &TrainJob, stop: &AtomicBool) -> anyhow::Result<()> {
    let mut forecast = Forecast::default();
    let mut observer = |event: &TrainEvent| {
        if let TrainEvent::Started { total_steps, num_trained_parameters, .. } = event {
            println!("would train {num_trained_parameters} parameters in {total_steps} steps");
        }
        if let Some(line) = forecast.hear(event) {
            println!("{line}");
        }
    };
    rehearse(job, NUM_STEPS, &mut observer, stop)?;
    let sum = |count: fn(&Example) -> usize| job.train.iter().map(count).sum::<usize>();
    let num_cut = job.train.iter().filter(|example| example.num_lost() > 0).count();
    println!(
        "an epoch: {} examples, {} tokens, {} of them trained; {num_cut} examples are cut and lose {} \
         tokens",
        job.train.len(),
        sum(Example::num_tokens),
        sum(Example::num_trained),
        sum(Example::num_lost)
    );
    println!("dry run: nothing is written to {}", job.config.output.display());
    Ok(())
}

/// Chooses `micro_batch_tokens`, and `recompute` where nobody has, so that the run fits into `budget`
/// bytes.
///
/// # Errors
/// It does not fit, with the numbers.
pub(super) fn fit_memory(
    job: &mut TrainJob,
    budget: usize,
    say: &dyn Fn(&str),
) -> anyhow::Result<()> {
    let model = ModelConfig::from_dir(&job.model_dir)?;
    let choices: &[RecomputeChoice] = match job.config.recompute {
        RecomputeChoice::Auto => &[RecomputeChoice::None, RecomputeChoice::Block],
        RecomputeChoice::None => &[RecomputeChoice::None],
        RecomputeChoice::Block => &[RecomputeChoice::Block],
    };
    // To compute twice costs a third; only passes that are smaller still cost more.
    let (large, small): (Vec<usize>, Vec<usize>) =
        MICRO_BATCH_TOKENS.iter().partition(|&&tokens| tokens >= EFFICIENT_TOKENS);
    let candidates = [large, small].into_iter().flat_map(|sizes| {
        choices
            .iter()
            .flat_map(move |&choice| sizes.clone().into_iter().map(move |tokens| (choice, tokens)))
    });
    let mut least = None;
    for (choice, tokens) in candidates {
        job.config.recompute = choice;
        job.config.micro_batch_tokens = tokens;
        let memory = Memory::estimate(&job.model_dir, &model, &job.config, &job.train)?;
        if memory.total() <= budget as u64 {
            say(&format!(
                "memory: micro_batch_tokens {tokens}{} takes about {} of {}",
                if choice == RecomputeChoice::Block { " with recompute block" } else { "" },
                describe(&memory),
                bytes(budget as u64)
            ));
            return Ok(());
        }
        least = Some(memory);
    }
    let Some(least) = least else { return Ok(()) };
    let smaller = match (job.config.method, job.config.recompute) {
        (_, RecomputeChoice::None) => "let layers be computed again (--recompute block)",
        (Method::Full, _) => "train an adapter (--method lora), or shorten rows (--max-length)",
        (Method::Lora, _) => {
            "round the base (--quantize), shorten rows (--max-length) or lower --rank"
        }
    };
    bail!(
        "the run does not fit into {}: with one sequence at a time it takes about {}; {smaller}",
        bytes(budget as u64),
        describe(&least)
    )
}

/// Chooses `recompute`, where nobody has, by the memory that is free; `limit` is the most that this process
/// may have. Says so if layers will be computed again, or if that is not enough.
///
/// # Errors
/// A model folder that cannot be read.
pub(super) fn fit_free_memory(
    job: &mut TrainJob,
    limit: Option<usize>,
    say: &dyn Fn(&str),
) -> anyhow::Result<()> {
    let free = free().into_iter().chain(limit.map(|limit| limit as u64)).min();
    let (RecomputeChoice::Auto, Some(free)) = (job.config.recompute, free) else { return Ok(()) };
    let budget = free / 100 * SHARE_OF_FREE;
    let model = ModelConfig::from_dir(&job.model_dir)?;
    for choice in [RecomputeChoice::None, RecomputeChoice::Block] {
        job.config.recompute = choice;
        let memory = Memory::estimate(&job.model_dir, &model, &job.config, &job.train)?;
        if memory.total() <= budget {
            if choice == RecomputeChoice::Block {
                let (needed, free) = (describe(&memory), bytes(free));
                say(&format!("memory: recompute block takes about {needed}; {free} are free"));
            }
            return Ok(());
        }
        if choice == RecomputeChoice::Block {
            let (needed, free) = (describe(&memory), bytes(free));
            say(&format!("memory: this may not fit; it takes about {needed}, and {free} are free"));
        }
    }
    Ok(())
}

/// Says how full the rows are, where examples are packed.
pub(super) fn say_packing(job: &TrainJob, say: &dyn Fn(&str)) {
    let TrainConfig { packing: Packing::Bfd, max_length, .. } = job.config else { return };
    let rows = BatchPlan::new(&job.config, &job.train).rows.len();
    let tokens: usize = job.train.iter().map(Example::num_tokens).sum();
    let full = 100.0 * tokens as f64 / (rows * max_length).max(1) as f64;
    let examples = job.train.len();
    say(&format!(
        "packing: {examples} examples in {rows} rows of up to {max_length} tokens, {full:.0} % full"
    ));
}

fn describe(memory: &Memory) -> String {
    format!(
        "{} (weights {}, trained parameters {}, activations {})",
        bytes(memory.total()),
        bytes(memory.weights),
        bytes(memory.adapter),
        bytes(memory.activations)
    )
}

//! The loop over a fake model that reads its own paged cache: the next token is a hash of every token
//! so far, so that one wrong position, block or row changes the answer.

use std::{
    ops::Range,
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    time::Duration,
};

use candle_core::Device;

use super::{super::handle::start, *};
use crate::adapters::AdapterRegistry;
use crate::engine::{
    AdapterNames, EngineError, EngineHandle, GenerationRequest, GenerationStream, RequestOptions,
    SamplingParams, TokenScore, score::score_token,
};
use crate::model::{KvDtype, ModelConfig};

const VOCAB_SIZE: usize = 97;
/// Token whose step panics, errs, or returns NaN.
const PANIC: u32 = 90;
const ERROR: u32 = 91;
const NAN: u32 = 92;

struct FakeModel {
    /// Token of each position of each block.
    cache: Mutex<Vec<u32>>,
    block_size: usize,
    max_rows: Arc<AtomicUsize>,
    /// Rows of each adapter in the last step.
    delta_rows: Arc<Mutex<Vec<Range<usize>>>>,
    /// Steps wait here for the test's leave, if it asked for that.
    gate: Option<Mutex<Receiver<()>>>,
}

/// The next token after `tokens`.
fn next_token(tokens: &[u32]) -> u32 {
    let hash = tokens.iter().fold(7u64, |hash, &token| {
        hash.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(u64::from(token) + 1)
    });
    (hash >> 40) as u32 % 89
}

/// Logits that make `token` the arg max, and no two rows equal.
fn logits_for(tokens: &[u32]) -> Vec<f32> {
    let best = next_token(tokens);
    let mut row: Vec<f32> =
        (0..VOCAB_SIZE as u32).map(|id| ((id * 7 + best) % 13) as f32 / 13.0).collect();
    row[best as usize] = 2.0;
    row[PANIC as usize..].fill(f32::NEG_INFINITY);
    if tokens.contains(&NAN) {
        row[3] = f32::NAN;
    }
    row
}

impl StepModel for FakeModel {
    fn forward(&self, step: &Step<'_>) -> Result<Option<Tensor>, ModelError> {
        if let Some(gate) = &self.gate {
            let _ = gate.lock().unwrap().recv();
        }
        assert!(!step.tokens.contains(&PANIC), "told to panic");
        if step.tokens.contains(&ERROR) {
            return Err(ModelError::Step("told to fail".into()));
        }
        *self.delta_rows.lock().unwrap() =
            step.deltas.iter().map(|delta| delta.rows.clone()).collect();
        self.max_rows.fetch_max(step.tokens.len(), SeqCst);
        let mut cache = self.cache.lock().unwrap();
        let (mut logits, mut row) = (Vec::new(), 0);
        for sequence in step.sequences {
            let slot = |position: usize| {
                let block = sequence.block_table[position / self.block_size] as usize;
                block * self.block_size + position % self.block_size
            };
            for position in
                sequence.num_cached_tokens..sequence.num_cached_tokens + sequence.num_tokens
            {
                cache[slot(position)] = step.tokens[row];
                if step.logit_rows.contains(&(row as u32)) {
                    let tokens: Vec<u32> =
                        (0..=position).map(|position| cache[slot(position)]).collect();
                    logits.extend(logits_for(&tokens));
                }
                row += 1;
            }
        }
        assert_eq!(row, step.tokens.len());
        let shape = (logits.len() / VOCAB_SIZE, VOCAB_SIZE);
        Ok((shape.0 > 0).then(|| Tensor::from_vec(logits, shape, &Device::Cpu)).transpose()?)
    }

    fn position_cost(&self) -> f64 {
        0.0
    }
}

fn config() -> EngineConfig {
    EngineConfig {
        max_num_seqs: 16,
        max_queue: 64,
        max_queue_tokens: usize::MAX,
        max_step: Duration::from_millis(250),
        speculate: 8,
        max_model_len: 128,
        max_batch_tokens: 256,
        block_size: 4,
        num_blocks: 512,
        kv_dtype: KvDtype::F32,
        prefix_cache: true,
    }
}

struct Fake {
    handle: EngineHandle,
    max_rows: Arc<AtomicUsize>,
    delta_rows: Arc<Mutex<Vec<Range<usize>>>>,
    /// Dropping it opens the gate for good.
    leave: Option<SyncSender<()>>,
}

fn engine(config: EngineConfig, gated: bool) -> Fake {
    let max_rows = Arc::new(AtomicUsize::new(0));
    let delta_rows = Arc::new(Mutex::new(vec![]));
    let (leave, gate) = sync_channel(1000);
    let model = FakeModel {
        cache: Mutex::new(vec![u32::MAX; config.num_blocks * config.block_size]),
        block_size: config.block_size,
        max_rows: Arc::clone(&max_rows),
        delta_rows: Arc::clone(&delta_rows),
        gate: gated.then(|| Mutex::new(gate)),
    };
    Fake {
        handle: start(model, VOCAB_SIZE, "base".to_owned(), config).unwrap(),
        max_rows,
        delta_rows,
        leave: gated.then_some(leave),
    }
}

fn prompt(seed: usize, len: usize) -> Vec<u32> {
    (0..len).map(|i| ((seed * 31 + i * 17 + i * i) % 89) as u32).collect()
}

fn request(prompt: Vec<u32>, max_tokens: usize) -> GenerationRequest {
    GenerationRequest {
        prompt,
        adapter: None,
        sampling: SamplingParams::greedy(),
        max_tokens,
        stop_token_ids: vec![],
        score_prompt: false,
        options: RequestOptions::default(),
    }
}

fn expected(prompt: &[u32], max_tokens: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    (0..max_tokens).for_each(|_| tokens.push(next_token(&tokens)));
    tokens.split_off(prompt.len())
}

#[derive(Debug, Default)]
struct Answer {
    tokens: Vec<u32>,
    scores: Option<Vec<TokenScore>>,
    reason: Option<FinishReason>,
    failure: Option<String>,
}

fn collect(mut stream: GenerationStream) -> Answer {
    let mut answer = Answer::default();
    while let Some(event) = stream.blocking_next() {
        assert!(answer.reason.is_none() && answer.failure.is_none(), "an event after the end");
        match event {
            GenerationEvent::PromptScores(scores) => {
                assert!(answer.tokens.is_empty() && answer.scores.is_none());
                answer.scores = Some(scores);
            }
            GenerationEvent::Token { id, .. } => answer.tokens.push(id),
            GenerationEvent::Finished { reason, usage } => {
                assert_eq!(usage.completion_tokens, answer.tokens.len());
                assert!(usage.queue_seconds <= usage.first_token_seconds);
                assert!(usage.first_token_seconds <= usage.total_seconds);
                answer.reason = Some(reason);
            }
            GenerationEvent::Failed { message } => answer.failure = Some(message),
        }
    }
    assert!(answer.reason.is_some() != answer.failure.is_some());
    answer
}

/// Waits for something that the engine does soon.
fn eventually(what: &str, is_true: impl Fn() -> bool) {
    for _ in 0..2000 {
        if is_true() {
            return;
        }
        thread_sleep();
    }
    panic!("never happened: {what}");
}

fn thread_sleep() {
    std::thread::sleep(Duration::from_millis(5));
}

#[test]
fn every_way_to_batch_gives_the_answers_of_a_request_alone() {
    let tight = EngineConfig { num_blocks: 24, ..config() };
    let configs = [
        config(),
        EngineConfig { max_num_seqs: 1, ..config() },
        EngineConfig { max_batch_tokens: 7, ..config() },
        EngineConfig { max_batch_tokens: 1, ..config() },
        EngineConfig { block_size: 1, num_blocks: 2048, ..config() },
        EngineConfig { max_batch_tokens: 40, ..tight.clone() },
        tight,
    ];
    for config in configs {
        let engine = engine(config.clone(), false);
        let prompts: Vec<Vec<u32>> = (0..20).map(|seed| prompt(seed, 1 + seed * 3)).collect();
        let streams: Vec<_> = prompts
            .iter()
            .map(|prompt| engine.handle.generate(request(prompt.clone(), 20)).unwrap())
            .collect();
        for (prompt, stream) in prompts.iter().zip(streams) {
            let answer = collect(stream);
            assert_eq!(answer.tokens, expected(prompt, 20), "{config:?}");
            assert_eq!(answer.reason, Some(FinishReason::Length));
        }
        let stats = engine.handle.stats();
        assert!(engine.max_rows.load(SeqCst) <= config.max_batch_tokens);
        assert_eq!(stats.preemptions() > 0, config.num_blocks == 24, "{config:?}");
        assert_eq!((stats.requests_finished(), stats.generation_tokens()), (20, 400));
        assert_eq!(
            stats.prompt_tokens(),
            prompts.iter().map(|prompt| prompt.len() as u64).sum::<u64>()
        );
        assert_eq!((stats.running(), stats.waiting(), stats.used_blocks()), (0, 0, 0));
        assert_eq!(engine.handle.num_unfinished(), 0);
    }
}

#[test]
fn a_cached_beginning_changes_no_answer_and_only_equals_share_it() {
    let engine = engine(config(), false);
    let ask = |prompt: &[u32], salt: &[u8], score_prompt| {
        let options = RequestOptions { cache_salt: salt.to_vec(), ..RequestOptions::default() };
        let request = GenerationRequest { score_prompt, options, ..request(prompt.to_vec(), 10) };
        let mut stream = engine.handle.generate(request).unwrap();
        let mut tokens = Vec::new();
        while let Some(event) = stream.blocking_next() {
            if let GenerationEvent::Token { id, .. } = event {
                tokens.push(id);
            }
        }
        assert_eq!(tokens, expected(prompt, 10));
        stream.cached_tokens()
    };
    let first = prompt(1, 24);
    assert_eq!(ask(&first, b"", false), 0);
    // All full blocks but the last, whose last token gives the first answer.
    assert_eq!(ask(&first, b"", false), 20);
    // A conversation goes on: prompt and answer come from the cache, but for the last token, which
    // never ran.
    let next = [first.clone(), expected(&first, 10), prompt(9, 5)].concat();
    assert_eq!(ask(&next, b"", false), 32);
    assert_eq!(ask(&next[..9], b"", false), 8);
    assert_eq!(ask(&next, b"another tenant", false), 0);
    assert_eq!(ask(&next, b"", true), 0);
    let stats = engine.handle.stats();
    assert_eq!(stats.prefix_hits(), 20 + 32 + 8);
    assert_eq!(stats.prefix_queries(), 24 + 24 + 3 * 39 + 9);
    assert_eq!(stats.used_blocks(), 0);
}

#[test]
fn guessed_tokens_change_no_answer_and_are_often_right_where_the_answer_repeats() {
    // Answers of this model never repeat, but a prompt may hold the answer already.
    let start = prompt(3, 10);
    let answer = expected(&start, 40);
    let held = |seed| [prompt(seed, 5), start.clone(), answer.clone(), prompt(seed, 7)].concat();
    for speculate in [0, 1, 8] {
        let engine = engine(EngineConfig { speculate, ..config() }, false);
        let prompts: Vec<Vec<u32>> = (0..6).map(held).collect();
        let streams: Vec<_> = prompts
            .iter()
            .map(|prompt| engine.handle.generate(request(prompt.clone(), 20)).unwrap())
            .collect();
        for (prompt, stream) in prompts.iter().zip(streams) {
            assert_eq!(collect(stream).tokens, expected(prompt, 20), "{speculate}");
        }
        let stats = engine.handle.stats();
        assert!(stats.accepted_tokens() <= stats.draft_tokens());
        assert_eq!(speculate == 0, stats.draft_tokens() == 0);
    }
}

/// A model whose next token depends on the last one only.
struct Chain;

impl Chain {
    /// Probabilities of the tokens that follow each token.
    const NEXT: [[f32; 4]; 4] = [
        [0.05, 0.80, 0.10, 0.05],
        [0.10, 0.05, 0.70, 0.15],
        [0.60, 0.10, 0.10, 0.20],
        [0.25, 0.25, 0.25, 0.25],
    ];
}

impl StepModel for Chain {
    fn forward(&self, step: &Step<'_>) -> Result<Option<Tensor>, ModelError> {
        let row = |row: &u32| Self::NEXT[step.tokens[*row as usize] as usize].map(f32::ln);
        let logits: Vec<f32> = step.logit_rows.iter().flat_map(row).collect();
        let shape = (step.logit_rows.len(), 4);
        Ok((shape.0 > 0).then(|| Tensor::from_vec(logits, shape, &Device::Cpu)).transpose()?)
    }

    fn position_cost(&self) -> f64 {
        0.0
    }
}

#[test]
fn what_follows_a_guess_is_drawn_from_the_models_distribution() {
    // Few at once, so that steps have room for guesses.
    let config = EngineConfig { max_num_seqs: 2, max_model_len: 512, speculate: 8, ..config() };
    let handle = start(Chain, 4, "base".to_owned(), config).unwrap();
    let sampled = |seed| {
        let sampling = SamplingParams { temperature: 1.0, seed, ..SamplingParams::greedy() };
        GenerationRequest { sampling, ..request(vec![0], 500) }
    };
    let streams: Vec<_> = (0..48).map(|seed| handle.generate(sampled(seed)).unwrap()).collect();
    let mut counts = [[0.0; 4]; 4];
    for stream in streams {
        let mut last = 0;
        for token in collect(stream).tokens {
            counts[last][token as usize] += 1.0;
            last = token as usize;
        }
    }
    let stats = handle.stats();
    assert!(stats.accepted_tokens() > 500 && stats.accepted_tokens() < stats.draft_tokens());
    let mut chi = 0.0;
    for (counts, probabilities) in counts.iter().zip(Chain::NEXT) {
        let total: f64 = counts.iter().sum();
        let expected = probabilities.map(|p| f64::from(p) * total);
        chi += counts.iter().zip(expected).map(|(c, e)| (c - e).powi(2) / e).sum::<f64>();
    }
    // 99.9 % quantile of chi-square with 4 * 3 degrees of freedom.
    assert!(chi < 32.91, "{chi}: {counts:?}");
}

#[test]
fn without_the_prefix_cache_every_prompt_is_computed() {
    let engine = engine(EngineConfig { prefix_cache: false, ..config() }, false);
    for _ in 0..2 {
        let stream = engine.handle.generate(request(prompt(1, 24), 10)).unwrap();
        assert_eq!(collect(stream).tokens, expected(&prompt(1, 24), 10));
    }
    assert_eq!(
        (engine.handle.stats().prefix_hits(), engine.handle.stats().prefix_queries()),
        (0, 0)
    );
}

#[test]
fn generation_ends_with_the_stop_token_which_is_sent_too() {
    let engine = engine(config(), false);
    let prompt = prompt(1, 9);
    let all = expected(&prompt, 20);
    let stop = all[4];
    let end = all.iter().position(|&id| id == stop).unwrap() + 1;
    let stopped = GenerationRequest { stop_token_ids: vec![stop, 95], ..request(prompt, 20) };
    let answer = collect(engine.handle.generate(stopped).unwrap());
    assert_eq!(answer.tokens, all[..end]);
    assert_eq!(answer.reason, Some(FinishReason::Stop));
}

#[test]
fn prompt_scores_are_the_same_whole_chunked_and_preempted() {
    let prompts: Vec<Vec<u32>> = (0..6).map(|seed| prompt(seed, 1 + seed * 7)).collect();
    for config in [
        config(),
        EngineConfig { max_batch_tokens: 3, ..config() },
        EngineConfig { max_batch_tokens: 1, ..config() },
        EngineConfig { num_blocks: 16, ..config() },
    ] {
        let engine = engine(config, false);
        let scored = |prompt: &Vec<u32>, max_tokens| GenerationRequest {
            score_prompt: true,
            ..request(prompt.clone(), max_tokens)
        };
        let streams: Vec<_> = prompts
            .iter()
            .flat_map(|prompt| [scored(prompt, 0), scored(prompt, 9), request(prompt.clone(), 9)])
            .map(|request| engine.handle.generate(request).unwrap())
            .collect();
        let answers: Vec<Answer> = streams.into_iter().map(collect).collect();
        for (prompt, answers) in prompts.iter().zip(answers.chunks(3)) {
            let scores: Vec<TokenScore> = (1..prompt.len())
                .map(|i| score_token(&logits_for(&prompt[..i]), prompt[i]).unwrap())
                .collect();
            let tokens = expected(prompt, 9);
            assert_eq!((&answers[0].scores, answers[0].tokens.len()), (&Some(scores.clone()), 0));
            assert_eq!((&answers[1].scores, &answers[1].tokens), (&Some(scores), &tokens));
            assert_eq!((&answers[2].scores, &answers[2].tokens), (&None, &tokens));
        }
    }
}

#[test]
fn sampling_depends_on_the_seed_and_not_on_the_neighbours() {
    let sampled = |seed| {
        let sampling = SamplingParams {
            temperature: 1.5,
            top_p: 0.9,
            top_k: 20,
            min_p: 0.01,
            presence_penalty: 0.3,
            seed,
            ..SamplingParams::greedy()
        };
        GenerationRequest { sampling, ..request(prompt(3, 11), 24) }
    };
    let alone = engine(config(), false);
    let cold: Vec<_> =
        (0..8).map(|seed| collect(alone.handle.generate(sampled(seed)).unwrap()).tokens).collect();
    assert!(cold.windows(2).all(|pair| pair[0] != pair[1]));
    // Together, with preemption.
    let together = engine(EngineConfig { num_blocks: 20, ..config() }, false);
    let streams: Vec<_> =
        (0..8).map(|seed| together.handle.generate(sampled(seed)).unwrap()).collect();
    let warm: Vec<_> = streams.into_iter().map(|stream| collect(stream).tokens).collect();
    assert!(together.handle.stats().preemptions() > 0);
    assert_eq!(cold, warm);
}

#[test]
fn dropping_the_stream_returns_the_blocks_of_running_and_waiting_requests() {
    let engine = engine(EngineConfig { max_num_seqs: 2, max_batch_tokens: 8, ..config() }, true);
    let leave = engine.leave.as_ref().unwrap();
    let mut streams: Vec<_> =
        (0..4).map(|seed| engine.handle.generate(request(prompt(seed, 30), 40)).unwrap()).collect();
    (0..6).for_each(|_| leave.send(()).unwrap());
    let stats = engine.handle.stats();
    eventually("two run, two wait", || (stats.running(), stats.waiting()) == (2, 2));
    assert!(stats.used_blocks() > 0);
    // One that prefills or decodes, and one that waits, leave.
    streams.remove(3);
    streams.remove(0);
    drop(engine.leave);
    let rest: Vec<_> = streams.into_iter().map(|stream| collect(stream).tokens).collect();
    assert_eq!(rest, [expected(&prompt(1, 30), 40), expected(&prompt(2, 30), 40)]);
    assert_eq!((stats.used_blocks(), stats.running(), stats.waiting()), (0, 0, 0));
    assert_eq!((stats.requests_cancelled(), stats.requests_finished()), (2, 2));
    assert_eq!(engine.handle.num_unfinished(), 0);
}

#[test]
fn sequences_of_one_adapter_share_a_range_and_the_live_figures_name_it() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let model = ModelConfig::from_dir(&fixtures.join("tiny-llama")).unwrap();
    let registry = AdapterRegistry::new(model);
    let load = |name| {
        let folder = fixtures.join("oracle/tiny-llama-plain-adapter");
        Some(registry.load(name, &folder, false).unwrap().0)
    };
    let (chef, baker) = (load("chef"), load("baker"));
    let adapters = [chef.clone(), None, baker, chef, None, load("waiter")];
    let engine = engine(EngineConfig { max_num_seqs: 5, ..config() }, true);
    let streams: Vec<_> = adapters
        .into_iter()
        .zip([0, 0, 0, 0, 0, 1])
        .map(|(adapter, priority)| {
            let options = RequestOptions { priority, ..RequestOptions::default() };
            GenerationRequest { adapter, options, ..request(prompt(1, 7), 3) }
        })
        .map(|request| engine.handle.generate(request).unwrap())
        .collect();
    // The first step may have started with fewer; the second has all, and the third waits.
    let leave = engine.leave.as_ref().unwrap();
    (0..2).for_each(|_| leave.send(()).unwrap());
    let stats = engine.handle.stats();
    eventually("two steps", || stats.steps() == 2);
    let names = stats.adapters();
    assert_eq!(
        (&names.running[..], &names.waiting[..]),
        (&["baker".to_string(), "chef".to_string()][..], &["waiter".to_string()][..])
    );
    let ranges = engine.delta_rows.lock().unwrap().clone();
    let rows: usize = ranges.iter().map(ExactSizeIterator::len).sum();
    assert_eq!(ranges.len(), 2);
    assert_eq!(ranges[0].end, ranges[1].start);
    assert!(ranges[0].start >= 2, "the base comes first");
    assert!(rows >= 3);
    drop(engine.leave);
    assert!(streams.into_iter().all(|stream| collect(stream).reason.is_some()));
    assert_eq!(*stats.adapters(), AdapterNames::default());
}

#[test]
fn a_full_queue_refuses_and_takes_again_once_a_request_has_ended() {
    let engine = engine(EngineConfig { max_num_seqs: 2, max_queue: 3, ..config() }, true);
    let generate = |seed| engine.handle.generate(request(prompt(seed, 5), 4));
    let mut streams: Vec<_> = (0..5).map(|seed| generate(seed).unwrap()).collect();
    assert!(matches!(generate(5), Err(EngineError::QueueFull { limit: 3 })));
    drop(engine.leave);
    collect(streams.remove(0));
    streams.push(generate(5).unwrap());
    for (stream, seed) in streams.into_iter().zip(1..) {
        assert_eq!(collect(stream).tokens, expected(&prompt(seed, 5), 4));
    }
}

#[test]
fn tokens_that_wait_are_limited_but_an_empty_queue_takes_any_prompt() {
    let limits = EngineConfig { max_num_seqs: 1, max_queue_tokens: 50, ..config() };
    let engine = engine(limits, true);
    let generate = |seed, len| engine.handle.generate(request(prompt(seed, len), 4));
    let mut streams = vec![generate(0, 80).unwrap()];
    eventually("the first one runs", || engine.handle.stats().running() == 1);
    streams.push(generate(1, 30).unwrap());
    assert!(matches!(generate(2, 30), Err(EngineError::QueueTokensFull { limit: 50 })));
    streams.push(generate(3, 20).unwrap());
    drop(engine.leave);
    streams.into_iter().for_each(|stream| assert_eq!(collect(stream).tokens.len(), 4));
    assert_eq!(collect(generate(2, 60).unwrap()).tokens, expected(&prompt(2, 60), 4));
}

#[test]
fn requests_that_can_never_run_are_refused_at_the_door() {
    let refuse =
        |engine: &Fake, request| engine.handle.generate(request).err().unwrap().to_string();
    let long = engine(config(), false);
    assert_eq!(refuse(&long, request(vec![], 4)), "the prompt has no tokens");
    assert_eq!(refuse(&long, request(vec![1, 97], 4)), "token id 97 is outside the vocabulary");
    let text = "prompt (100) and max_tokens (29) exceed the context length of 128 tokens";
    assert_eq!(refuse(&long, request(vec![1; 100], 29)), text);
    let few_blocks = engine(EngineConfig { num_blocks: 3, ..config() }, false);
    assert!(refuse(&few_blocks, request(vec![1; 10], 3)).contains("12 tokens"));
    assert_eq!(
        collect(few_blocks.handle.generate(request(vec![1; 10], 2)).unwrap()).tokens.len(),
        2
    );
    few_blocks.handle.drain();
    assert_eq!(refuse(&few_blocks, request(vec![1], 1)), "the engine is draining");
}

#[test]
fn draining_lets_running_and_waiting_requests_finish() {
    let engine = engine(EngineConfig { max_num_seqs: 1, ..config() }, true);
    let streams: Vec<_> =
        (0..3).map(|seed| engine.handle.generate(request(prompt(seed, 5), 4)).unwrap()).collect();
    engine.handle.drain();
    drop(engine.leave);
    assert!(streams.into_iter().all(|stream| collect(stream).reason.is_some()));
}

#[test]
fn requests_outlive_the_last_handle_and_the_thread_does_not() {
    let engine = engine(config(), true);
    let stream = engine.handle.generate(request(prompt(2, 5), 4)).unwrap();
    drop((engine.leave, engine.handle));
    assert_eq!(collect(stream).tokens, expected(&prompt(2, 5), 4));
    eventually("the thread drops the model", || Arc::strong_count(&engine.max_rows) == 1);
}

#[test]
fn a_nan_fails_its_own_request_only() {
    let engine = engine(config(), false);
    let bad = engine.handle.generate(request(vec![1, 2, NAN], 4)).unwrap();
    let good = engine.handle.generate(request(prompt(1, 5), 4)).unwrap();
    assert_eq!(collect(bad).failure.unwrap(), "the logits hold a NaN or no finite maximum");
    assert_eq!(collect(good).tokens, expected(&prompt(1, 5), 4));
    assert!(engine.handle.is_healthy());
}

#[test]
fn a_failing_step_fails_its_requests_and_the_engine_goes_on() {
    let engine = engine(config(), false);
    let answer = collect(engine.handle.generate(request(vec![1, ERROR], 4)).unwrap());
    assert!(answer.failure.unwrap().contains("told to fail"));
    assert!(engine.handle.is_healthy());
    assert_eq!(engine.handle.stats().used_blocks(), 0);
    let answer = collect(engine.handle.generate(request(prompt(1, 5), 4)).unwrap());
    assert_eq!(answer.tokens, expected(&prompt(1, 5), 4));
}

#[test]
fn a_panic_fails_everybody_and_is_not_hidden() {
    let engine = engine(EngineConfig { max_num_seqs: 2, ..config() }, true);
    let requests = [vec![1, 2], vec![1, PANIC], vec![3], vec![4]];
    let streams: Vec<_> = requests
        .into_iter()
        .map(|prompt| engine.handle.generate(request(prompt, 50)).unwrap())
        .collect();
    drop(engine.leave);
    for stream in streams {
        assert!(collect(stream).failure.is_some());
        assert!(!engine.handle.is_healthy());
    }
    let refused = engine.handle.generate(request(vec![1], 1)).err().unwrap();
    assert!(matches!(refused, EngineError::Stopped));
}

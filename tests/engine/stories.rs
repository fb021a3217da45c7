//! Many requests through one engine: whatever is batched, chunked, preempted or cancelled, a request
//! gets the answer that it gets alone.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use candle_core::Tensor;
use proptest::prelude::*;
use tunesmith::{
    adapters::{AdapterRegistry, AdapterVersion, LoraAdapter, LoraConfig},
    engine::{
        EngineConfig, EngineHandle, FinishReason, GenerationEvent, GenerationRequest,
        GenerationStream, RequestOptions, SamplingParams, TokenScore, spawn,
    },
    model::{Decoder, KvDtype, Projection, Step, StepSequence, WeightMode},
};

/// One of each family; windows and soft caps among them.
const MODELS: [&str; 6] = [
    "tiny-llama",
    "tiny-qwen2",
    "families/mistral",
    "families/qwen2-windows",
    "families/qwen3",
    "families/gemma2",
];

fn tiny_model(name: &str) -> Arc<Decoder> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    Arc::new(Decoder::load(&dir, WeightMode::Frozen).unwrap())
}

/// A folder of its own, gone with the value.
struct TempDir(PathBuf);

impl TempDir {
    fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("engine-{}-{}", std::process::id(), COUNT.fetch_add(1, Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Loads an adapter with random A and B as the next version of `name`.
fn random_adapter(
    registry: &AdapterRegistry,
    decoder: &Decoder,
    name: &str,
    seed: u64,
) -> Arc<AdapterVersion> {
    let lora = LoraConfig {
        rank: 2 + seed as usize % 4,
        alpha: 8.0,
        targets: Projection::ALL.to_vec(),
        ..LoraConfig::default()
    };
    let adapter = LoraAdapter::fresh(&lora, decoder.config(), seed).unwrap();
    for (index, (name, variable)) in adapter.variables().into_iter().enumerate() {
        if name.contains("lora_B") {
            let values = (0..variable.elem_count())
                .map(|i| ((seed as usize * 13 + index * 7 + i * 31) % 101) as f32 / 101.0 - 0.5)
                .collect::<Vec<_>>();
            let values = Tensor::from_vec(values, variable.dims(), variable.device()).unwrap();
            variable.set(&values).unwrap();
        }
    }
    let dir = TempDir::new();
    adapter.write(&dir.0, "tiny").unwrap();
    registry.load(name, &dir.0, true).unwrap().0
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
        block_size: 16,
        num_blocks: 128,
        kv_dtype: KvDtype::F32,
        prefix_cache: true,
    }
}

/// One thing at a time.
fn plain() -> EngineConfig {
    EngineConfig { prefix_cache: false, speculate: 0, ..config() }
}

fn prompt(seed: usize, len: usize) -> Vec<u32> {
    (0..len).map(|i| ((seed * 37 + i * 11 + i * i * 3) % 95) as u32).collect()
}

fn request(
    prompt: Vec<u32>,
    max_tokens: usize,
    adapter: Option<&Arc<AdapterVersion>>,
) -> GenerationRequest {
    GenerationRequest {
        prompt,
        adapter: adapter.cloned(),
        sampling: SamplingParams::greedy(),
        max_tokens,
        stop_token_ids: vec![],
        score_prompt: false,
        options: RequestOptions::default(),
    }
}

#[derive(Debug, PartialEq)]
struct Answer {
    tokens: Vec<u32>,
    scores: Vec<TokenScore>,
}

fn collect(mut stream: GenerationStream) -> Answer {
    let mut answer = Answer { tokens: vec![], scores: vec![] };
    while let Some(event) = stream.blocking_next() {
        match event {
            GenerationEvent::PromptScores(scores) => answer.scores = scores,
            GenerationEvent::Token { id, .. } => answer.tokens.push(id),
            GenerationEvent::Finished { .. } => return answer,
            GenerationEvent::Failed { message } => panic!("{message}"),
        }
    }
    panic!("no end");
}

/// All at once.
fn together(engine: &EngineHandle, requests: Vec<GenerationRequest>) -> Vec<Answer> {
    let take = |request| engine.generate(request).unwrap();
    let streams: Vec<_> = requests.into_iter().map(take).collect();
    streams.into_iter().map(collect).collect()
}

/// One after the other.
fn alone(engine: &EngineHandle, requests: Vec<GenerationRequest>) -> Vec<Answer> {
    requests.into_iter().map(|request| collect(engine.generate(request).unwrap())).collect()
}

#[test]
fn greedy_answers_are_those_of_the_request_alone() {
    for model in MODELS {
        let decoder = tiny_model(model);
        let registry = AdapterRegistry::new(decoder.config().clone());
        let adapters: Vec<_> = (0..4)
            .map(|seed| random_adapter(&registry, &decoder, &format!("adapter-{seed}"), seed))
            .collect();
        // 16 requests over the base and 4 adapters, in mixed order.
        let requests = || -> Vec<_> {
            let adapter = |i: usize| [None].into_iter().chain(adapters.iter().map(Some)).nth(i % 5);
            (0..16).map(|i| request(prompt(i, 1 + i * 5), 24, adapter(i * 3).flatten())).collect()
        };
        let cold = alone(&spawn(Arc::clone(&decoder), plain()).unwrap(), requests());
        // The adapters matter: one prompt, five answers.
        let mut answers = alone(
            &spawn(Arc::clone(&decoder), config()).unwrap(),
            [None]
                .into_iter()
                .chain(adapters.iter().map(Some))
                .map(|adapter| request(prompt(3, 9), 16, adapter))
                .collect(),
        );
        answers.dedup();
        assert_eq!(answers.len(), 5);
        for (what, config) in [
            ("one batch", config()),
            ("chunks", EngineConfig { max_batch_tokens: 17, ..config() }),
            ("chunks of a token", EngineConfig { max_batch_tokens: 1, ..config() }),
            ("short steps", EngineConfig { max_step: Duration::ZERO, ..config() }),
            ("no guesses", EngineConfig { speculate: 0, ..config() }),
            ("a batch of three", EngineConfig { max_num_seqs: 3, ..config() }),
            ("few blocks", EngineConfig { num_blocks: 20, ..config() }),
        ] {
            let engine = spawn(Arc::clone(&decoder), config.clone()).unwrap();
            assert_eq!(together(&engine, requests()), cold, "{model}: {what}");
            // Once more, with whatever the cache has kept.
            assert_eq!(together(&engine, requests()), cold, "{model}: {what}, cached");
            assert!(engine.stats().prefix_hits() > 0 || what == "few blocks", "{model}: {what}");
            assert_eq!(engine.stats().preemptions() > 0, what == "few blocks", "{what}");
            assert_eq!((engine.stats().used_blocks(), engine.num_unfinished()), (0, 0));
        }
    }
}

/// One request of a random mix: which prompt, how much of it, which adapter.
#[derive(Debug, Clone)]
struct Part {
    family: usize,
    len: usize,
    max_tokens: usize,
    adapter: usize,
    is_sampled: bool,
    priority: i32,
}

fn part() -> impl Strategy<Value = Part> {
    let shape = (0..3usize, 1..70usize, 1..40usize);
    (shape, 0..4usize, any::<bool>(), -1..2i32).prop_map(
        |((family, len, max_tokens), adapter, is_sampled, priority)| Part {
            family,
            len,
            max_tokens,
            adapter,
            is_sampled,
            priority,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 40, failure_persistence: None, ..ProptestConfig::default()
    })]

    #[test]
    fn a_random_mix_gets_the_answers_of_each_request_alone(
        model in 0..MODELS.len(),
        parts in prop::collection::vec(part(), 2..64),
        (max_num_seqs, max_batch_tokens, num_blocks) in (1..64usize, 1..300usize, 7..128usize),
        (speculate, prefix_cache, max_step) in (0..9usize, any::<bool>(), 0..300u64),
    ) {
        let decoder = tiny_model(MODELS[model]);
        let registry = AdapterRegistry::new(decoder.config().clone());
        let adapters: Vec<_> = (0..3)
            .map(|seed| random_adapter(&registry, &decoder, &format!("adapter-{seed}"), seed))
            .collect();
        let requests = || -> Vec<_> {
            let made = |part: &Part| {
                // Repeats itself, so that there is something to guess.
                let tokens = prompt(part.family, 23).into_iter().cycle().take(part.len).collect();
                let adapter = adapters.get(part.adapter);
                let mut request = request(tokens, part.max_tokens, adapter);
                if part.is_sampled {
                    request.sampling.temperature = 0.4;
                    request.sampling.seed = part.len as u64;
                    request.sampling.frequency_penalty = 0.1;
                }
                request.options.priority = part.priority;
                request
            };
            parts.iter().map(made).collect()
        };
        let cold = alone(&spawn(Arc::clone(&decoder), plain()).unwrap(), requests());
        let mixed = EngineConfig {
            max_num_seqs,
            max_batch_tokens,
            num_blocks,
            speculate,
            prefix_cache,
            max_step: Duration::from_millis(max_step),
            ..config()
        };
        let engine = spawn(Arc::clone(&decoder), mixed).unwrap();
        for _ in 0..2 {
            prop_assert_eq!(&together(&engine, requests()), &cold);
            prop_assert_eq!((engine.stats().used_blocks(), engine.num_unfinished()), (0, 0));
        }
    }
}

/// Where another process of this test is to write its answers.
const ANSWERS: &str = "TUNESMITH_TEST_ANSWERS";

/// Not a test by itself: what [`one_thread_says_what_two_say`] runs in processes of their own.
#[test]
#[ignore = "run by another test"]
fn answers_for_another_process() {
    let Ok(path) = std::env::var(ANSWERS) else { return };
    let mut text = String::new();
    for model in MODELS {
        let decoder = tiny_model(model);
        let registry = AdapterRegistry::new(decoder.config().clone());
        let adapters: Vec<_> = (0..3)
            .map(|seed| random_adapter(&registry, &decoder, &format!("adapter-{seed}"), seed))
            .collect();
        // Steps of up to 256 rows, which are shared out over threads, and of few, which are not.
        let requests =
            (0..24).map(|i| request(prompt(i, 20 + i * 4), 12, adapters.get(i % 4))).collect();
        let scored = GenerationRequest { score_prompt: true, ..request(prompt(9, 90), 4, None) };
        let engine = spawn(decoder, config()).unwrap();
        text += &format!("{:?}\n", together(&engine, requests));
        text += &format!("{:?}\n", together(&engine, vec![scored]));
    }
    text += &format!("{} threads", std::env::var("RAYON_NUM_THREADS").unwrap());
    std::fs::write(path, text).unwrap();
}

#[test]
fn one_thread_says_what_two_say() {
    let dir = TempDir::new();
    let answers = |threads: &str| {
        let path = dir.0.join(threads);
        let run = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "stories::answers_for_another_process", "--ignored"])
            .env(ANSWERS, &path)
            .env("RAYON_NUM_THREADS", threads)
            .output()
            .unwrap();
        assert!(run.status.success(), "{run:?}");
        let text = std::fs::read_to_string(path).unwrap();
        text.strip_suffix(&format!("{threads} threads")).unwrap().to_owned()
    };
    let one = answers("1");
    assert!(one.contains("logprob"));
    assert_eq!(one, answers("2"));
    assert_eq!(one, answers("5"));
}

#[test]
fn right_guesses_save_steps() {
    let decoder = tiny_model(MODELS[0]);
    let steps = |speculate| {
        let engine = spawn(Arc::clone(&decoder), EngineConfig { speculate, ..plain() }).unwrap();
        let answer = collect(engine.generate(request(prompt(1, 20), 100, None)).unwrap());
        let stats = engine.stats();
        assert!(speculate > 0 || stats.draft_tokens() == 0);
        (stats.steps(), stats.accepted_tokens(), answer)
    };
    let ((plain, _, expected), (guessed, accepted, answer)) = (steps(0), steps(8));
    assert_eq!(answer, expected);
    assert_eq!(plain, guessed + accepted);
    assert!(accepted > 0);
}

#[test]
fn two_versions_of_one_name_run_side_by_side() {
    let decoder = tiny_model(MODELS[0]);
    let registry = AdapterRegistry::new(decoder.config().clone());
    let old = random_adapter(&registry, &decoder, "chef", 1);
    let new = random_adapter(&registry, &decoder, "chef", 2);
    assert_eq!((old.version, new.version), (1, 2));
    let requests = || -> Vec<_> {
        [&old, &new, &old, &new].map(|v| request(prompt(5, 40), 20, Some(v))).into()
    };
    let engine = spawn(Arc::clone(&decoder), config()).unwrap();
    let answers = together(&engine, requests());
    assert_ne!(answers[0], answers[1]);
    assert_eq!(answers[0], answers[2]);
    // Neither version finds what the other left in the cache.
    assert_eq!(answers, together(&engine, requests()));
    assert_eq!(answers, alone(&engine, requests()));
}

#[test]
fn prompt_scores_do_not_depend_on_chunks_and_are_the_log_softmax_of_a_whole_pass() {
    for model in MODELS {
        let decoder = tiny_model(model);
        let prompts: Vec<Vec<u32>> = [1, 2, 16, 33, 60].map(|len| prompt(len, len)).into();
        let requests = || -> Vec<_> {
            let score = |prompt: &Vec<u32>, max_tokens| GenerationRequest {
                score_prompt: true,
                ..request(prompt.clone(), max_tokens, None)
            };
            prompts.iter().flat_map(|prompt| [score(prompt, 0), score(prompt, 8)]).collect()
        };
        let whole = alone(&spawn(Arc::clone(&decoder), config()).unwrap(), requests());
        for (prompt, answers) in prompts.iter().zip(whole.chunks(2)) {
            assert_eq!((answers[0].tokens.len(), answers[1].tokens.len()), (0, 8));
            assert_eq!(answers[0].scores, answers[1].scores);
            assert_close(&answers[0].scores, &whole_pass(&decoder, prompt));
        }
        for max_batch_tokens in [1, 7, 16, 50] {
            let config = EngineConfig { max_batch_tokens, ..config() };
            let engine = spawn(Arc::clone(&decoder), config).unwrap();
            assert_eq!(together(&engine, requests()), whole, "{model}: {max_batch_tokens}");
        }
    }
}

/// Log-probability of each prompt token but the first, from one pass without a cache.
fn whole_pass(decoder: &Decoder, prompt: &[u32]) -> Vec<f32> {
    let rows: Vec<u32> = (0..prompt.len() as u32).collect();
    let sequences =
        [StepSequence { num_tokens: prompt.len(), num_cached_tokens: 0, block_table: &[] }];
    let step = Step {
        tokens: prompt,
        sequences: &sequences,
        cache: None,
        deltas: &[],
        logit_rows: &rows,
        dropout: None,
    };
    let logits: Vec<Vec<f32>> = decoder.forward(&step).unwrap().to_vec2().unwrap();
    let logprob = |row: &Vec<f32>, token: u32| {
        let sum: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
        (f64::from(row[token as usize]) - sum.ln()) as f32
    };
    logits.iter().zip(&prompt[1..]).map(|(row, &token)| logprob(row, token)).collect()
}

fn assert_close(scores: &[TokenScore], expected: &[f32]) {
    assert_eq!(scores.len(), expected.len());
    for (score, expected) in scores.iter().zip(expected) {
        assert!((score.logprob - expected).abs() < 1e-3, "{} {expected}", score.logprob);
    }
}

#[test]
fn greedy_scoring_of_a_greedy_answer_finds_only_arg_maxes() {
    let decoder = tiny_model(MODELS[1]);
    let engine = spawn(decoder, config()).unwrap();
    let mut tokens = prompt(4, 10);
    tokens.extend(collect(engine.generate(request(tokens.clone(), 30, None)).unwrap()).tokens);
    let scored = GenerationRequest { score_prompt: true, ..request(tokens, 0, None) };
    let scores = collect(engine.generate(scored).unwrap()).scores;
    assert!(scores[9..].iter().all(|score| score.is_argmax && score.logprob < 0.0));
}

#[test]
fn a_stop_token_ends_the_answer() {
    let engine = spawn(tiny_model(MODELS[0]), config()).unwrap();
    let all = collect(engine.generate(request(prompt(2, 8), 30, None)).unwrap()).tokens;
    let stop = all[5];
    let stopped =
        GenerationRequest { stop_token_ids: vec![stop], ..request(prompt(2, 8), 30, None) };
    let mut stream = engine.generate(stopped).unwrap();
    let mut tokens = Vec::new();
    let mut reason = None;
    while let Some(event) = stream.blocking_next() {
        if let GenerationEvent::Token { id, .. } = event {
            tokens.push(id);
        } else if let GenerationEvent::Finished { reason: why, .. } = event {
            reason = Some(why);
        }
    }
    assert_eq!(reason, Some(FinishReason::Stop));
    assert_eq!(tokens, all[..=all.iter().position(|&id| id == stop).unwrap()]);
}

#[test]
fn a_client_that_leaves_gives_everything_back() {
    let decoder = tiny_model(MODELS[0]);
    let registry = AdapterRegistry::new(decoder.config().clone());
    let adapter = random_adapter(&registry, &decoder, "chef", 1);
    let engine =
        spawn(decoder, EngineConfig { max_num_seqs: 4, max_batch_tokens: 16, ..config() }).unwrap();
    for _ in 0..3 {
        let take = |i| engine.generate(request(prompt(i, 40), 80, Some(&adapter))).unwrap();
        let mut streams: Vec<_> = (0..12).map(take).collect();
        // Some decode, some prefill, some wait.
        assert!(matches!(streams[0].blocking_next(), Some(GenerationEvent::Token { .. })));
        drop(streams);
        for _ in 0..2000 {
            if engine.num_unfinished() == 0 && engine.stats().used_blocks() == 0 {
                break;
            }
            thread::sleep(Duration::from_millis(5));
        }
        assert_eq!((engine.num_unfinished(), engine.stats().used_blocks()), (0, 0));
        assert_eq!((engine.stats().running(), engine.stats().waiting()), (0, 0));
    }
    // Nobody but the registry and this test holds the adapter.
    assert_eq!(Arc::strong_count(&adapter), 2);
    let answer = collect(engine.generate(request(prompt(1, 40), 10, Some(&adapter))).unwrap());
    assert_eq!(answer.tokens.len(), 10);
}

#[test]
fn a_config_for_a_model_uses_the_memory_it_is_given_and_no_more_than_it_needs() {
    let model = tiny_model(MODELS[0]);
    let (config, block) = (model.config(), EngineConfig::DEFAULT_BLOCK_SIZE);
    let block_bytes = tunesmith::model::KvCache::block_bytes(config, KvDtype::F32);
    let small = EngineConfig::for_model(config, 8, 10 * block_bytes);
    assert_eq!((small.num_blocks, small.max_model_len), (10, 10 * block));
    let halved = EngineConfig::for_cache(config, 8, 10 * block_bytes, KvDtype::Bf16);
    assert_eq!((halved.num_blocks, halved.max_model_len), (20, 20 * block));
    let large = EngineConfig::for_model(config, 8, usize::MAX);
    assert_eq!(large.num_blocks, 8 * config.max_position_embeddings.div_ceil(block));
    assert_eq!(large.max_model_len, config.max_position_embeddings);
    assert_eq!(EngineConfig::for_model(config, 8, 0).num_blocks, 1);
}

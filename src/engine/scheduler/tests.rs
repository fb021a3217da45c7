//! Random histories on a fake model: the next token is a function of the prompt and the place.

use proptest::prelude::*;

use super::{super::prefix::BlockKey, *};

fn config(
    max_num_seqs: usize,
    max_batch_tokens: usize,
    block_size: usize,
    num_blocks: usize,
) -> EngineConfig {
    let max_model_len = block_size * num_blocks;
    EngineConfig {
        max_num_seqs,
        max_queue: 0,
        max_model_len,
        max_batch_tokens,
        block_size,
        num_blocks,
        prefix_cache: true,
    }
}

fn params(prompt: Vec<u32>, max_tokens: usize, adapter_key: usize) -> SequenceParams {
    let root = Some(BlockKey::root("base", Some(&adapter_key.to_string()), b""));
    SequenceParams { prompt, max_tokens, score_prompt: false, adapter_key, root }
}

/// What a model would have in its cache: for each place, the adapter and all tokens up to there.
struct FakeCache(Vec<(usize, Vec<u32>)>);

impl FakeCache {
    fn new(config: &EngineConfig) -> Self {
        Self(vec![(0, vec![]); config.num_blocks * config.block_size])
    }

    /// Writes the next `num_tokens` of `sequence`, which must find all those before them.
    fn step(&mut self, sequence: &Sequence<usize>, num_tokens: usize) {
        let (table, cached) = (&sequence.block_table, sequence.num_cached_tokens());
        for position in 0..cached + num_tokens {
            let block = table.blocks()[position / table.block_size()] as usize;
            let slot = &mut self.0[block * table.block_size() + position % table.block_size()];
            let content = (sequence.adapter_key, sequence.tokens()[..=position].to_vec());
            if position < cached {
                assert_eq!(*slot, content, "position {position} of {:?}", sequence.tokens());
            } else {
                *slot = content;
            }
        }
    }
}

/// The token that follows `tokens` in these tests.
fn next_token(tokens: &[u32]) -> u32 {
    tokens.iter().fold(17, |hash: u32, token| hash.wrapping_mul(31).wrapping_add(*token)) % 1000
}

/// Runs the step `plan`; returns the sequences that are complete.
fn run(scheduler: &mut Scheduler<usize>, plan: &[Scheduled]) -> Vec<Sequence<usize>> {
    run_with(scheduler, plan, None)
}

fn run_with(
    scheduler: &mut Scheduler<usize>,
    plan: &[Scheduled],
    mut cache: Option<&mut FakeCache>,
) -> Vec<Sequence<usize>> {
    for part in plan {
        let sequence = &mut scheduler.running_mut()[part.index];
        if let Some(cache) = &mut cache {
            cache.step(sequence, part.num_tokens);
        }
        let samples = sequence.samples_after(part.num_tokens);
        sequence.advance(part.num_tokens);
        if samples {
            let token = next_token(sequence.tokens());
            sequence.push(token);
        }
    }
    scheduler.remove(Sequence::is_complete)
}

/// What holds for every plan.
fn check_plan(
    scheduler: &Scheduler<usize>,
    plan: &[Scheduled],
    config: &EngineConfig,
    decoding: &[usize],
) {
    let num_tokens: usize = plan.iter().map(|part| part.num_tokens).sum();
    assert!(num_tokens <= config.max_batch_tokens, "budget: {num_tokens}");
    assert!(scheduler.running.len() <= config.max_num_seqs);
    assert_eq!(plan.is_empty(), scheduler.is_idle());
    // Everybody at most once, with tokens that exist and blocks to hold them.
    let mut indices: Vec<usize> = plan.iter().map(|part| part.index).collect();
    indices.sort_unstable();
    indices.dedup();
    assert_eq!(indices.len(), plan.len());
    for part in plan {
        let sequence = &scheduler.running[part.index];
        assert!((1..=sequence.num_remaining_tokens()).contains(&part.num_tokens));
        let end = sequence.num_cached_tokens() + part.num_tokens;
        assert!(sequence.block_table.blocks().len() * config.block_size >= end);
    }
    // Nobody who decodes waits, and the oldest is always there.
    for (index, sequence) in scheduler.running.iter().enumerate() {
        let decodes = decoding.contains(&sequence.request);
        assert!(!(decodes || index == 0) || indices.binary_search(&index).is_ok());
    }
    // Neighbours share an adapter; the base comes first.
    let keys: Vec<usize> =
        plan.iter().map(|part| scheduler.running[part.index].adapter_key).collect();
    assert!(keys.is_sorted(), "{keys:?}");
    // First come, first served; those who wait hold nothing.
    let ages = scheduler.running.iter().chain(&scheduler.waiting).map(|sequence| sequence.request);
    assert!(ages.is_sorted());
    assert!(scheduler.waiting.iter().all(|sequence| sequence.block_table.blocks().is_empty()));
    // No block is lost, and none that is written to is anybody else's.
    let tables = scheduler.running.iter().map(|sequence| sequence.block_table.blocks());
    let mut held: Vec<u32> = tables.clone().flatten().copied().collect();
    let all = held.clone();
    held.sort_unstable();
    held.dedup();
    assert_eq!(held.len() + scheduler.blocks.num_free(), config.num_blocks);
    for part in plan {
        let sequence = &scheduler.running[part.index];
        let first = sequence.num_cached_tokens() / config.block_size;
        for block in &sequence.block_table.blocks()[first..] {
            assert_eq!(all.iter().filter(|other| *other == block).count(), 1, "{block}");
        }
    }
}

#[derive(Debug, Clone)]
enum Action {
    /// Prompts of one family begin alike.
    Add {
        family: u32,
        prompt: usize,
        max_tokens: usize,
        adapter_key: usize,
    },
    Step,
    Cancel {
        place: usize,
    },
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        4 => (0..3u32, 1..40usize, 1..12usize, 0..3usize).prop_map(
            |(family, prompt, max_tokens, adapter_key)| {
                Action::Add { family, prompt, max_tokens, adapter_key }
            }
        ),
        6 => Just(Action::Step),
        1 => (0..6usize).prop_map(|place| Action::Cancel { place }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 100_000, failure_persistence: None, ..ProptestConfig::default()
    })]

    #[test]
    fn every_history_keeps_the_rules_and_everybody_ends_with_the_right_tokens(
        max_num_seqs in 1..6usize,
        max_batch_tokens in 1..48usize,
        block_size in 1..5usize,
        num_blocks in 1..24usize,
        actions in prop::collection::vec(action(), 0..30),
    ) {
        let config = config(max_num_seqs, max_batch_tokens, block_size, num_blocks);
        let mut scheduler: Scheduler<usize> = Scheduler::new(&config);
        let mut cache = FakeCache::new(&config);
        // What each sequence must end with; `None`: cancelled.
        let mut expected: Vec<Option<Vec<u32>>> = Vec::new();
        let mut num_ended = 0;
        let mut num_steps_left = 0; // No later than this many steps from now, everybody has ended.
        let mut step = |scheduler: &mut Scheduler<usize>, expected: &[Option<Vec<u32>>]| {
            let decoding = scheduler.running.iter().filter(|s| s.num_remaining_tokens() == 1);
            let decoding: Vec<usize> = decoding.map(|sequence| sequence.request).collect();
            let preemptions = scheduler.num_preemptions();
            let plan = scheduler.schedule();
            // Somebody who lost its blocks may be back in the same step, and then fills up again.
            let none = scheduler.num_preemptions() > preemptions;
            check_plan(scheduler, &plan, &config, if none { &[] } else { &decoding });
            for sequence in run_with(scheduler, &plan, Some(&mut cache)) {
                assert_eq!(Some(sequence.tokens()), expected[sequence.request].as_deref());
                num_ended += 1;
            }
        };
        for action in actions {
            match action {
                Action::Add { family, prompt, max_tokens, adapter_key } => {
                    if prompt + max_tokens > config.max_sequence_len() {
                        continue;
                    }
                    let age = expected.len();
                    let prompt: Vec<u32> =
                        (0..prompt as u32).map(|i| i * i % 7 + family * 10).collect();
                    let mut tokens = prompt.clone();
                    (0..max_tokens).for_each(|_| tokens.push(next_token(&tokens)));
                    // Alone, as the oldest, one token a step would do.
                    num_steps_left += tokens.len();
                    expected.push(Some(tokens));
                    scheduler.add(params(prompt, max_tokens, adapter_key), age);
                }
                Action::Step => step(&mut scheduler, &expected),
                Action::Cancel { place } => {
                    let gone = scheduler.remove(|sequence| sequence.request == place);
                    prop_assert!(gone.len() <= 1);
                    gone.iter().for_each(|sequence| expected[sequence.request] = None);
                }
            }
        }
        while !scheduler.is_idle() {
            prop_assert!(num_steps_left > 0, "somebody starves");
            num_steps_left -= 1;
            step(&mut scheduler, &expected);
        }
        prop_assert_eq!(num_ended, expected.iter().flatten().count());
        prop_assert_eq!(scheduler.blocks.num_free(), num_blocks);
    }
}

#[test]
fn a_long_prompt_does_not_stop_the_others() {
    let config = config(8, 33, 4, 100);
    let mut scheduler = Scheduler::new(&config);
    scheduler.add(params(vec![1; 4], 20, 0), 0);
    let plan = scheduler.schedule();
    run(&mut scheduler, &plan);
    scheduler.add(params(vec![2; 300], 1, 0), 1);
    scheduler.add(params(vec![3; 10], 1, 0), 2);
    // The decode row first; the long prompt takes half of the rest and the short one passes it.
    let parts = [(0, 1), (1, 16), (2, 10)];
    let parts = parts.map(|(index, num_tokens)| Scheduled { index, num_tokens });
    assert_eq!(scheduler.schedule(), parts);
    let ended = run(&mut scheduler, &parts);
    assert_eq!(ended.iter().map(|sequence| sequence.request).collect::<Vec<_>>(), [2]);
    // Alone with the decode row it takes all.
    let parts = [(0, 1), (1, 32)].map(|(index, num_tokens)| Scheduled { index, num_tokens });
    assert_eq!(scheduler.schedule(), parts);
}

#[test]
fn the_youngest_gives_its_blocks_to_the_oldest_and_comes_back() {
    // Both prompts fill two blocks each; the third block of the first one is nowhere.
    let config = config(2, 16, 2, 4);
    let mut scheduler = Scheduler::new(&config);
    scheduler.add(params(vec![1, 2, 3, 4], 3, 0), 0);
    scheduler.add(params(vec![5, 6, 7, 8], 2, 0), 1);
    let plan = scheduler.schedule();
    assert!(run(&mut scheduler, &plan).is_empty());
    let plan = scheduler.schedule();
    assert_eq!(plan, [Scheduled { index: 0, num_tokens: 1 }]);
    assert_eq!(scheduler.num_preemptions(), 1);
    let preempted = &scheduler.waiting[0];
    assert_eq!((preempted.tokens().len(), preempted.num_cached_tokens()), (5, 0));
    assert!(run(&mut scheduler, &plan).is_empty());
    let plan = scheduler.schedule();
    assert_eq!(run(&mut scheduler, &plan).len(), 1);
    // Prompt and generated token run again in one chunk, but for the block that the cache still has: the
    // other one went to the oldest.
    assert_eq!(scheduler.schedule(), [Scheduled { index: 0, num_tokens: 3 }]);
}

#[test]
fn a_common_beginning_is_computed_once_even_by_those_who_come_together() {
    let config = config(8, 24, 4, 100);
    let mut scheduler = Scheduler::new(&config);
    for age in 0..3 {
        scheduler.add(params(vec![1; 34], 4, 0), age);
    }
    scheduler.add(params(vec![1; 34], 4, 5), 3); // The same tokens under another adapter.
    let mut chunks = Vec::new();
    while let plan = scheduler.schedule()
        && !plan.is_empty()
    {
        chunks.extend(
            plan.iter().map(|part| (scheduler.running[part.index].request, part.num_tokens)),
        );
        run(&mut scheduler, &plan);
    }
    let computed = |age| chunks.iter().filter(|(other, _)| *other == age).map(|part| part.1).sum();
    let computed: [usize; 4] = std::array::from_fn(computed);
    // 34 tokens and 3 of the answer; or the two tokens past the last full block of the prompt.
    assert_eq!(computed, [37, 5, 5, 37]);
}

#[test]
fn adapters_are_neighbours_and_the_base_comes_first() {
    let mut scheduler = Scheduler::new(&config(8, 64, 4, 100));
    for (age, adapter_key) in [7, 0, 9, 7, 0].into_iter().enumerate() {
        scheduler.add(params(vec![1; 3], 4, adapter_key), age);
    }
    let order: Vec<usize> = scheduler.schedule().iter().map(|part| part.index).collect();
    assert_eq!(order, [1, 4, 0, 3, 2]);
}

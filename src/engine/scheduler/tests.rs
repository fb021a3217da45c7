//! Random histories on a fake model: the next token is a function of the prompt and the place.

use std::time::Duration;

use proptest::prelude::*;

use super::{super::prefix::BlockKey, *};
use crate::model::KvDtype;

/// Rows of a step with guesses.
const GUESS_ROWS: usize = 16;

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
        max_queue_tokens: usize::MAX,
        max_step: Duration::from_millis(250),
        speculate: 0,
        max_model_len,
        max_batch_tokens,
        block_size,
        num_blocks,
        kv_dtype: KvDtype::F32,
        prefix_cache: true,
    }
}

fn params(prompt: Vec<u32>, max_tokens: usize, adapter_key: usize) -> SequenceParams {
    let root = Some(BlockKey::root("base", Some(&adapter_key.to_string()), b""));
    SequenceParams { prompt, max_tokens, score_prompt: false, adapter_key, root, priority: 0 }
}

/// What a model would have in its cache: for each place, the adapter and all tokens up to there.
struct FakeCache(Vec<(usize, Vec<u32>)>);

impl FakeCache {
    fn new(config: &EngineConfig) -> Self {
        Self(vec![(0, vec![]); config.num_blocks * config.block_size])
    }

    /// Writes the next `num_tokens` of `sequence` and its drafts, which must find all those before them.
    fn step(&mut self, sequence: &Sequence<usize>, num_tokens: usize) {
        let (table, cached) = (&sequence.block_table, sequence.num_cached_tokens());
        let tokens = [sequence.tokens(), sequence.drafts()].concat();
        for position in 0..cached + num_tokens + sequence.drafts().len() {
            let block = table.blocks()[position / table.block_size()] as usize;
            let slot = &mut self.0[block * table.block_size() + position % table.block_size()];
            let content = (sequence.adapter_key, tokens[..=position].to_vec());
            if position < cached {
                assert_eq!(*slot, content, "position {position} of {:?}", sequence.tokens());
            } else {
                *slot = content;
            }
        }
    }
}

/// The token that follows `tokens` in these tests. It repeats itself now and then, so that guesses are
/// right now and then.
fn next_token(tokens: &[u32]) -> u32 {
    let last = tokens[tokens.len() - 1];
    (last * 2 + tokens.len() as u32 / 9) % 11
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
        let positions = sequence.logit_positions(part.num_tokens);
        assert_eq!(positions.len(), if samples { 1 + sequence.drafts().len() } else { 0 });
        sequence.advance(part.num_tokens);
        if samples {
            let mut num_right = 0;
            loop {
                let token = next_token(sequence.tokens());
                sequence.push(token);
                if sequence.is_complete() || sequence.drafts().get(num_right) != Some(&token) {
                    break;
                }
                sequence.advance(1);
                num_right += 1;
            }
            sequence.end_drafts(num_right);
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
    max_mixed_rows: usize,
) {
    let num_drafts = |part: &Scheduled| scheduler.running[part.index].drafts().len();
    let num_rows: usize = plan.iter().map(|part| part.num_tokens + num_drafts(part)).sum();
    assert!(num_rows <= config.max_batch_tokens, "budget: {num_rows}");
    assert!(plan.iter().map(num_drafts).sum::<usize>() <= GUESS_ROWS);
    // Beside those who decode, a step has no more rows than it was allowed to.
    let all_decode =
        plan.iter().all(|part| decoding.contains(&scheduler.running[part.index].request));
    assert!(
        decoding.is_empty() || all_decode || num_rows <= max_mixed_rows.max(decoding.len() + 1)
    );
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
        let end = sequence.num_cached_tokens() + part.num_tokens + sequence.drafts().len();
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
    // By rank; those who wait hold nothing.
    assert!(scheduler.running.iter().is_sorted_by_key(|sequence| sequence.rank));
    assert_eq!(scheduler.waiting.iter().count(), scheduler.waiting.len());
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
        priority: i32,
    },
    Step,
    Cancel {
        place: usize,
    },
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        4 => (0..3u32, 1..40usize, 1..12usize, 0..3usize, -1..2i32).prop_map(
            |(family, prompt, max_tokens, adapter_key, priority)| {
                Action::Add { family, prompt, max_tokens, adapter_key, priority }
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
        max_mixed_rows in 0..48usize,
        speculate in 0..9usize,
        actions in prop::collection::vec(action(), 0..30),
    ) {
        let config = EngineConfig {
            speculate,
            ..config(max_num_seqs, max_batch_tokens, block_size, num_blocks)
        };
        let mut scheduler: Scheduler<usize> = Scheduler::new(&config);
        let mut cache = FakeCache::new(&config);
        // What each sequence must end with; `None`: cancelled.
        let mut expected: Vec<Option<Vec<u32>>> = Vec::new();
        let mut num_ended = 0;
        let mut step = |scheduler: &mut Scheduler<usize>, expected: &[Option<Vec<u32>>]| {
            let decoding = scheduler.running.iter().filter(|s| s.num_remaining_tokens() == 1);
            let decoding: Vec<usize> = decoding.map(|sequence| sequence.request).collect();
            let preemptions = scheduler.num_preemptions();
            let plan = scheduler.schedule(max_mixed_rows, GUESS_ROWS);
            // Somebody who lost its blocks may be back in the same step, and then fills up again.
            let none = scheduler.num_preemptions() > preemptions;
            let decoding = if none { &[][..] } else { &decoding };
            check_plan(scheduler, &plan, &config, decoding, max_mixed_rows);
            for sequence in run_with(scheduler, &plan, Some(&mut cache)) {
                assert_eq!(Some(sequence.tokens()), expected[sequence.request].as_deref());
                num_ended += 1;
            }
        };
        for action in actions {
            match action {
                Action::Add { family, prompt, max_tokens, adapter_key, priority } => {
                    if prompt + max_tokens > config.max_sequence_len() {
                        continue;
                    }
                    let age = expected.len();
                    let prompt: Vec<u32> =
                        (0..prompt as u32).map(|i| i * i % 7 + family * 10).collect();
                    let mut tokens = prompt.clone();
                    (0..max_tokens).for_each(|_| tokens.push(next_token(&tokens)));
                    expected.push(Some(tokens));
                    let params = params(prompt, max_tokens, adapter_key);
                    scheduler.add(SequenceParams { priority, ..params }, age);
                }
                Action::Step => step(&mut scheduler, &expected),
                Action::Cancel { place } => {
                    let gone = scheduler.remove(|sequence| sequence.request == place);
                    prop_assert!(gone.len() <= 1);
                    gone.iter().for_each(|sequence| expected[sequence.request] = None);
                }
            }
        }
        // No later than this many steps from now, everybody has ended: the first in rank needs no more than
        // a step for each token, and begins anew at most each time that somebody of a better rank comes in.
        let all = scheduler.running.iter().chain(scheduler.waiting.iter());
        let lens = all.filter_map(|it| expected[it.request].as_ref()).map(Vec::len);
        let lens: Vec<usize> = lens.collect();
        let mut num_steps_left = lens.iter().sum::<usize>() * (lens.len() + 1);
        while !scheduler.is_idle() {
            prop_assert!(num_steps_left > 0, "somebody starves");
            num_steps_left -= 1;
            step(&mut scheduler, &expected);
        }
        prop_assert_eq!(num_ended, expected.iter().flatten().count());
        prop_assert_eq!(scheduler.blocks.num_free(), num_blocks);
        // Nothing is remembered of adapters that nobody asks for.
        prop_assert_eq!(scheduler.waiting.num_lanes(), 0);
    }
}

#[test]
fn a_long_prompt_does_not_stop_the_others() {
    let config = config(8, 33, 4, 100);
    let mut scheduler = Scheduler::new(&config);
    scheduler.add(params(vec![1; 4], 20, 0), 0);
    let plan = scheduler.schedule(usize::MAX, GUESS_ROWS);
    run(&mut scheduler, &plan);
    scheduler.add(params(vec![2; 300], 1, 0), 1);
    scheduler.add(params(vec![3; 10], 1, 0), 2);
    // The decode row first; the long prompt takes half of the rest and the short one passes it.
    let parts = [(0, 1), (1, 16), (2, 10)];
    let parts = parts.map(|(index, num_tokens)| Scheduled { index, num_tokens });
    assert_eq!(scheduler.schedule(usize::MAX, GUESS_ROWS), parts);
    let ended = run(&mut scheduler, &parts);
    assert_eq!(ended.iter().map(|sequence| sequence.request).collect::<Vec<_>>(), [2]);
    // Alone with the decode row it takes all.
    let parts = [(0, 1), (1, 32)].map(|(index, num_tokens)| Scheduled { index, num_tokens });
    assert_eq!(scheduler.schedule(usize::MAX, GUESS_ROWS), parts);
}

#[test]
fn the_youngest_gives_its_blocks_to_the_oldest_and_comes_back() {
    // Both prompts fill two blocks each; the third block of the first one is nowhere.
    let config = config(2, 16, 2, 4);
    let mut scheduler = Scheduler::new(&config);
    scheduler.add(params(vec![1, 2, 3, 4], 3, 0), 0);
    scheduler.add(params(vec![5, 6, 7, 8], 2, 0), 1);
    let plan = scheduler.schedule(usize::MAX, GUESS_ROWS);
    assert!(run(&mut scheduler, &plan).is_empty());
    let plan = scheduler.schedule(usize::MAX, GUESS_ROWS);
    assert_eq!(plan, [Scheduled { index: 0, num_tokens: 1 }]);
    assert_eq!(scheduler.num_preemptions(), 1);
    let preempted = scheduler.waiting.iter().next().unwrap();
    assert_eq!((preempted.tokens().len(), preempted.num_cached_tokens()), (5, 0));
    assert!(run(&mut scheduler, &plan).is_empty());
    let plan = scheduler.schedule(usize::MAX, GUESS_ROWS);
    assert_eq!(run(&mut scheduler, &plan).len(), 1);
    // Prompt and generated token run again in one chunk, but for the block that the cache still has: the
    // other one went to the oldest.
    assert_eq!(scheduler.schedule(usize::MAX, GUESS_ROWS), [Scheduled { index: 0, num_tokens: 3 }]);
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
    while let plan = scheduler.schedule(usize::MAX, GUESS_ROWS)
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
    let order: Vec<usize> =
        scheduler.schedule(usize::MAX, GUESS_ROWS).iter().map(|part| part.index).collect();
    assert_eq!(order, [1, 4, 0, 3, 2]);
}

#[test]
fn a_prompt_takes_no_more_of_a_step_than_it_may_while_somebody_decodes() {
    let mut scheduler = Scheduler::new(&config(8, 512, 16, 100));
    scheduler.add(params(vec![1; 300], 20, 0), 0);
    // Nobody waits for a token yet.
    let plan = scheduler.schedule(64, GUESS_ROWS);
    assert_eq!(plan, [Scheduled { index: 0, num_tokens: 300 }]);
    run(&mut scheduler, &plan);
    scheduler.add(params(vec![2; 300], 1, 0), 1);
    for chunk in [63, 63, 63, 63, 48] {
        let plan = scheduler.schedule(64, GUESS_ROWS);
        assert_eq!(
            plan,
            [(0, 1), (1, chunk)].map(|(index, num_tokens)| Scheduled { index, num_tokens })
        );
        run(&mut scheduler, &plan);
    }
}

#[test]
fn a_flood_on_one_adapter_delays_the_others_by_one_place_only() {
    let mut scheduler = Scheduler::new(&config(2, 64, 4, 100));
    let mut order = Vec::new();
    let mut step = |scheduler: &mut Scheduler<usize>| {
        let plan = scheduler.schedule(usize::MAX, GUESS_ROWS);
        order.extend(run(scheduler, &plan).iter().map(|sequence| sequence.request));
    };
    (0..40).for_each(|age| scheduler.add(params(vec![age as u32; 6], 5, 7), age));
    (0..3).for_each(|_| step(&mut scheduler));
    scheduler.add(params(vec![50; 6], 5, 8), 100);
    scheduler.add(params(vec![51; 6], 5, 0), 101);
    scheduler.add(params(vec![52; 6], 5, 8), 102);
    while !scheduler.is_idle() {
        step(&mut scheduler);
    }
    for (request, latest) in [(100, 4), (101, 5), (102, 10)] {
        let place = order.iter().position(|it| *it == request).unwrap();
        assert!(place <= latest, "{request}: {order:?}");
    }
}

#[test]
fn an_adapter_that_comes_late_has_saved_up_no_turns() {
    let mut scheduler = Scheduler::new(&config(1, 64, 4, 100));
    let mut order = Vec::new();
    let mut step = |scheduler: &mut Scheduler<usize>| {
        let plan = scheduler.schedule(usize::MAX, GUESS_ROWS);
        order.extend(run(scheduler, &plan).iter().map(|sequence| sequence.request));
    };
    (0..20).for_each(|age| scheduler.add(params(vec![age as u32; 6], 5, 7), age));
    (0..50).for_each(|_| step(&mut scheduler)); // Ten of them have ended.
    (100..110).for_each(|age| scheduler.add(params(vec![age as u32; 6], 5, 8), age));
    while !scheduler.is_idle() {
        step(&mut scheduler);
    }
    // From here on each gets a half.
    let late = order[10..20].iter().filter(|request| **request >= 100).count();
    assert!((4..=6).contains(&late), "{order:?}");
}

#[test]
fn a_lower_priority_number_goes_first_and_keeps_its_blocks() {
    let config = config(1, 64, 4, 100);
    let mut scheduler = Scheduler::new(&config);
    for (age, priority) in [0, 5, -1, 0, -1].into_iter().enumerate() {
        let params = params(vec![age as u32; 4], 3, age % 2);
        scheduler.add(SequenceParams { priority, ..params }, age);
    }
    let mut order = Vec::new();
    while !scheduler.is_idle() {
        let plan = scheduler.schedule(usize::MAX, GUESS_ROWS);
        order.extend(run(&mut scheduler, &plan).iter().map(|sequence| sequence.request));
    }
    // Of the two that are left with 0, the one whose adapter got less.
    assert_eq!(order, [2, 4, 3, 0, 1]);

    // Four blocks, both need a third: the later one has the better number.
    let mut scheduler = Scheduler::new(&self::config(2, 16, 2, 4));
    let late = SequenceParams { priority: 1, ..params(vec![1, 2, 3, 4], 3, 0) };
    scheduler.add(late, 0);
    scheduler.add(params(vec![5, 6, 7, 8], 2, 0), 1);
    let plan = scheduler.schedule(usize::MAX, GUESS_ROWS);
    assert!(run(&mut scheduler, &plan).is_empty());
    let plan = scheduler.schedule(usize::MAX, GUESS_ROWS);
    assert_eq!(run(&mut scheduler, &plan)[0].request, 1);
    assert_eq!(scheduler.num_preemptions(), 1);
}

#[test]
fn guesses_fill_a_step_of_decoding_sequences_and_no_other() {
    let config = EngineConfig { speculate: 8, ..config(8, 512, 4, 100) };
    let mut scheduler = Scheduler::new(&config);
    let repeated: Vec<u32> = (0..40).map(|i| i % 10).collect();
    scheduler.add(params(repeated.clone(), 30, 0), 0);
    let plan = scheduler.schedule(usize::MAX, GUESS_ROWS);
    assert!(scheduler.running[0].drafts().is_empty());
    // The model goes on as the prompt did.
    scheduler.running_mut()[0].advance(40);
    scheduler.running_mut()[0].push(0);
    assert_eq!(plan.len(), 1);
    scheduler.schedule(usize::MAX, GUESS_ROWS);
    assert_eq!(scheduler.running[0].drafts(), [1, 2, 3, 4, 5, 6, 7, 8]);
    // A prompt comes, and wants the room.
    scheduler.add(params(vec![9; 20], 3, 0), 1);
    scheduler.schedule(usize::MAX, GUESS_ROWS);
    assert!(scheduler.running.iter().all(|sequence| sequence.drafts().is_empty()));
}

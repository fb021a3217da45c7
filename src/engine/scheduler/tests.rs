//! Random histories on a fake model: the next token is a function of the prompt and the place.

use proptest::prelude::*;

use super::*;

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
    }
}

fn params(prompt: Vec<u32>, max_tokens: usize, adapter_key: usize) -> SequenceParams {
    SequenceParams { prompt, max_tokens, score_prompt: false, adapter_key }
}

/// The token that follows `tokens` in these tests.
fn next_token(tokens: &[u32]) -> u32 {
    tokens.iter().fold(17, |hash: u32, token| hash.wrapping_mul(31).wrapping_add(*token)) % 1000
}

/// Runs the step `plan`; returns the sequences that are complete.
fn run(scheduler: &mut Scheduler<usize>, plan: &[Scheduled]) -> Vec<Sequence<usize>> {
    for part in plan {
        let sequence = &mut scheduler.running_mut()[part.index];
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
fn check_plan(scheduler: &Scheduler<usize>, plan: &[Scheduled], config: &EngineConfig) {
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
        let decodes = sequence.num_generated_tokens() > 0 && sequence.num_remaining_tokens() == 1;
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
    // No block twice, none lost.
    let mut held: Vec<u32> = scheduler
        .running
        .iter()
        .flat_map(|sequence| sequence.block_table.blocks().iter().copied())
        .collect();
    let num_held = held.len();
    held.sort_unstable();
    held.dedup();
    assert_eq!(held.len(), num_held);
    assert_eq!(num_held + scheduler.blocks.num_free(), config.num_blocks);
}

#[derive(Debug, Clone)]
enum Action {
    Add { prompt: usize, max_tokens: usize, adapter_key: usize },
    Step,
    Cancel { place: usize },
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        4 => (1..40usize, 1..12usize, 0..3usize)
            .prop_map(|(prompt, max_tokens, adapter_key)| Action::Add { prompt, max_tokens, adapter_key }),
        6 => Just(Action::Step),
        1 => (0..6usize).prop_map(|place| Action::Cancel { place }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 10_000, failure_persistence: None, ..ProptestConfig::default()
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
        // What each sequence must end with; `None`: cancelled.
        let mut expected: Vec<Option<Vec<u32>>> = Vec::new();
        let mut num_ended = 0;
        let mut num_steps_left = 0; // No later than this many steps from now, everybody has ended.
        let mut step = |scheduler: &mut Scheduler<usize>, expected: &[Option<Vec<u32>>]| {
            let plan = scheduler.schedule();
            check_plan(scheduler, &plan, &config);
            for sequence in run(scheduler, &plan) {
                assert_eq!(Some(sequence.tokens()), expected[sequence.request].as_deref());
                num_ended += 1;
            }
        };
        for action in actions {
            match action {
                Action::Add { prompt, max_tokens, adapter_key } => {
                    if prompt + max_tokens > config.max_sequence_len() {
                        continue;
                    }
                    let age = expected.len();
                    let prompt: Vec<u32> = (0..prompt).map(|i| (age * 100 + i) as u32).collect();
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
    // Prompt and generated token run again in one chunk.
    assert_eq!(scheduler.schedule(), [Scheduled { index: 0, num_tokens: 5 }]);
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

//! Which examples make which step: nothing is lost, nothing is doubled, limits hold.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use tunesmith::{
    data::Example,
    train::{BatchPlan, MicroBatch, split_by_tokens},
};

/// An example of `length` tokens whose second half is trained; its tokens name it.
fn example(index: usize, length: usize) -> Example {
    let loss_mask = (0..length).map(|position| position > 0 && position >= length / 2).collect();
    Example {
        line: index + 1,
        tokens: vec![index as u32; length],
        loss_mask,
        num_truncated: 0,
        rejected: None,
    }
}

fn plan(num_examples: usize, batch_size: usize, micro_batch_tokens: usize, seed: u64) -> BatchPlan {
    BatchPlan { num_examples, batch_size, micro_batch_tokens, seed, shuffle: true }
}

proptest! {
    #[test]
    fn an_epoch_meets_every_example_once(n in 1_usize..80, size in 1_usize..20, seed: u64, epoch in 0_usize..4) {
        let plan = plan(n, size, 100, seed);
        let first = epoch * plan.steps_per_epoch();
        let mut met: Vec<usize> =
            (first..first + plan.steps_per_epoch()).flat_map(|step| plan.examples_of_step(step)).collect();
        met.sort_unstable();
        prop_assert_eq!(met, (0..n).collect::<Vec<_>>());
    }

    #[test]
    fn micro_batches_keep_the_limit_and_the_order(
        lengths in prop::collection::vec(2_usize..60, 1..30),
        limit in 1_usize..100,
    ) {
        let examples: Vec<Example> =
            lengths.iter().enumerate().map(|(index, &length)| example(index, length)).collect();
        let refs: Vec<&Example> = examples.iter().collect();
        let mut next = 0;
        for range in split_by_tokens(&refs, limit) {
            prop_assert_eq!(range.start, next);
            next = range.end;
            let batch = MicroBatch::new(&refs[range.clone()]);
            prop_assert!(batch.tokens.len() <= limit || range.len() == 1);
            prop_assert_eq!(batch.lengths.iter().sum::<usize>(), batch.tokens.len());
        }
        prop_assert_eq!(next, examples.len());
    }

    #[test]
    fn a_row_predicts_the_token_after_it_in_its_own_sequence(
        lengths in prop::collection::vec(2_usize..40, 1..20),
    ) {
        let examples: Vec<Example> =
            lengths.iter().enumerate().map(|(index, &length)| example(index, length)).collect();
        let batch = MicroBatch::new(&examples.iter().collect::<Vec<_>>());
        let num_trained: usize = examples.iter().map(Example::num_trained).sum();
        prop_assert_eq!(batch.rows.len(), num_trained);
        for (&row, &target) in batch.rows.iter().zip(&batch.targets) {
            // All tokens of an example are its index, so a border crossed would show.
            prop_assert_eq!(batch.tokens[row as usize], target);
            prop_assert_eq!(batch.tokens[row as usize + 1], target);
        }
    }
}

#[test]
fn the_order_changes_with_the_epoch_and_the_seed_but_not_with_the_asking() {
    let order = |plan: &BatchPlan, epoch: usize| -> Vec<usize> {
        let steps = plan.steps_per_epoch();
        (epoch * steps..(epoch + 1) * steps).flat_map(|step| plan.examples_of_step(step)).collect()
    };
    let (one, other) = (plan(50, 4, 100, 1), plan(50, 4, 100, 2));
    assert_eq!(order(&one, 0), order(&one, 0));
    assert_ne!(order(&one, 0), order(&one, 1));
    assert_ne!(order(&one, 0), order(&other, 0));
    let in_place = BatchPlan { shuffle: false, ..one };
    assert_eq!(order(&in_place, 3), (0..50).collect::<Vec<_>>());
}

//! Which examples make which step: nothing is lost, nothing is doubled, limits hold.

use proptest::prelude::*;
use tunesmith::{
    data::Example,
    train::{BatchPlan, MicroBatch, Packing, TrainConfig, pack, split_by_tokens},
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
    let rows = (0..num_examples).map(|index| vec![index]).collect();
    BatchPlan { rows, lengths: None, batch_size, micro_batch_tokens, seed, shuffle: true }
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
    fn packing_loses_nothing_keeps_the_limit_and_is_near_the_best(
        lengths in prop::collection::vec(1_usize..120, 1..300),
        limit in 60_usize..200,
    ) {
        let rows = pack(&lengths, limit);
        let mut met: Vec<usize> = rows.iter().flatten().copied().collect();
        met.sort_unstable();
        prop_assert_eq!(met, (0..lengths.len()).collect::<Vec<_>>());
        let sum = |row: &Vec<usize>| row.iter().map(|&index| lengths[index]).sum::<usize>();
        for row in &rows {
            prop_assert!(sum(row) <= limit || row.len() == 1);
        }
        // Best-fit decreasing needs at most 11/9 of the best number of rows, and one more (Johnson 1974); a
        // longer example than fits has its row anyway.
        let fitting: usize = lengths.iter().filter(|&&length| length <= limit).sum();
        let too_long = lengths.iter().filter(|&&length| length > limit).count();
        let least = fitting.div_ceil(limit).max(lengths.iter().filter(|&&l| l <= limit && 2 * l > limit).count());
        let others = rows.len() - too_long;
        // The best number is unknown: `least` is below it, so rows that are less than half full betray a fault.
        let half_empty = rows.iter().filter(|row| 2 * sum(row) <= limit).count();
        prop_assert!(half_empty <= 1, "{} rows are half empty", half_empty);
        prop_assert!(others >= least && others <= 2 * least + 1);
    }

    #[test]
    fn a_length_grouped_epoch_meets_every_row_once_and_the_longest_first(
        lengths in prop::collection::vec(2_usize..60, 1..200),
        batch_size in 1_usize..9,
        packing: bool,
        seed: u64,
    ) {
        let examples: Vec<Example> =
            lengths.iter().enumerate().map(|(index, &length)| example(index, length)).collect();
        let packing = if packing { Packing::Bfd } else { Packing::None };
        let config = TrainConfig {
            group_by_length: true, batch_size, packing, max_length: 64, seed, ..TrainConfig::default()
        };
        let plan = BatchPlan::new(&config, &examples);
        let steps: Vec<Vec<usize>> =
            (0..plan.steps_per_epoch()).map(|step| plan.examples_of_step(step)).collect();
        let mut met: Vec<usize> = steps.concat();
        met.sort_unstable();
        prop_assert_eq!(met, (0..lengths.len()).collect::<Vec<_>>());
        if packing == Packing::None {
            let longest = lengths.iter().max().unwrap();
            prop_assert_eq!(lengths[steps[0][0]], *longest);
        }
        prop_assert_eq!(plan.clone().examples_of_step(0), steps[0].clone());
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
    let in_place = BatchPlan { shuffle: false, ..one.clone() };
    assert_eq!(order(&in_place, 3), (0..50).collect::<Vec<_>>());
}

#[test]
fn rows_of_similar_lengths_come_in_one_step() {
    let lengths: Vec<usize> = (0..400).map(|index| 2 + index * 37 % 100).collect();
    let examples: Vec<Example> =
        lengths.iter().enumerate().map(|(index, &length)| example(index, length)).collect();
    let spread = |group_by_length: bool| -> usize {
        let config = TrainConfig { group_by_length, batch_size: 4, ..TrainConfig::default() };
        let plan = BatchPlan::new(&config, &examples);
        let of_step = |step| {
            let rows = plan.examples_of_step(step);
            let of_rows = || rows.iter().map(|&index| lengths[index]);
            of_rows().max().unwrap() - of_rows().min().unwrap()
        };
        // The first step has the longest row of all.
        (1..plan.steps_per_epoch()).map(of_step).sum()
    };
    assert!(10 * spread(true) < spread(false), "{} and {}", spread(true), spread(false));
}

#[test]
fn examples_are_packed_as_trl_packs_them() {
    // `trl.pack_dataset` (1.16.0, strategy bfd) of rows of these lengths with seq_length 10.
    let lengths = [5, 2, 3, 1, 10, 7, 7, 4, 4, 2, 1, 9];
    let rows = pack(&lengths, 10);
    assert_eq!(rows.len(), 6);
    let lengths_of = |row: &Vec<usize>| row.iter().map(|&index| lengths[index]).collect::<Vec<_>>();
    let expected: [&[usize]; 6] = [&[10], &[9, 1], &[7, 3], &[7, 2], &[5, 4, 1], &[4, 2]];
    assert_eq!(rows.iter().map(lengths_of).collect::<Vec<_>>(), expected);
}

#[test]
fn a_packed_epoch_has_as_many_rows_as_trl_makes_of_it() {
    // `trl.pack_dataset` 1.16.0 makes 875 rows of these; it packs a thousand examples at a time.
    let lengths: Vec<usize> = (0..2500).map(|i| 2 + (i * i * 31 + i * 17) % 699).collect();
    assert_eq!(pack(&lengths, 1024).len(), 875);
}

//! The order of rows: a shuffle per epoch and a held-out part, both functions of a seed alone, so
//! that a resumed run goes on in the order it stopped in.

use rand::seq::SliceRandom;
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};

/// In which order epoch `epoch` (from 0) visits `n` rows: a permutation of `0..n`.
#[must_use]
pub fn epoch_order(n: usize, seed: u64, epoch: u64) -> Vec<usize> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    // Streams of one seed never overlap.
    rng.set_stream(epoch);
    shuffled(n, &mut rng)
}

/// Splits `0..n` into the rows to train on and `num_held_out` others, both ascending. At least one
/// row is left to train on.
#[must_use]
pub fn hold_out(n: usize, num_held_out: usize, seed: u64) -> (Vec<usize>, Vec<usize>) {
    // A stream that no epoch uses, so that the split says nothing about the order.
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(u64::MAX);
    let mut held_out = shuffled(n, &mut rng);
    let mut kept = held_out.split_off(num_held_out.min(n.saturating_sub(1)));
    kept.sort_unstable();
    held_out.sort_unstable();
    (kept, held_out)
}

/// Which of `n` rows a source of this weight contributes, ascending: every row as often as the weight
/// has whole parts, and the share that is left over chosen by the seed. `source` (from 0) tells the
/// sources of one mixture apart.
#[must_use]
pub fn repeated(n: usize, weight: f64, seed: u64, source: usize) -> Vec<usize> {
    let num_rows = (weight * n as f64).round() as usize;
    let (whole, rest) = (num_rows / n.max(1), num_rows % n.max(1));
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    // A stream that neither an epoch nor the held-out part uses.
    rng.set_stream(u64::MAX - 1 - source as u64);
    let mut chosen = shuffled(n, &mut rng);
    chosen.truncate(rest);
    for _ in 0..whole {
        chosen.extend(0..n);
    }
    chosen.sort_unstable();
    chosen
}

fn shuffled(n: usize, rng: &mut impl RngCore) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    order.shuffle(rng);
    order
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn an_epochs_order_is_a_permutation(n in 0_usize..300, seed: u64, epoch in 0_u64..50) {
            let mut order = epoch_order(n, seed, epoch);
            prop_assert_eq!(&order, &epoch_order(n, seed, epoch));
            order.sort_unstable();
            prop_assert_eq!(order, (0..n).collect::<Vec<_>>());
        }

        #[test]
        fn a_hold_out_loses_no_row_and_doubles_none(n in 1_usize..300, share in 0_usize..400, seed: u64) {
            let (kept, held_out) = hold_out(n, share, seed);
            prop_assert_eq!(held_out.len(), share.min(n - 1));
            let mut all = [kept, held_out].concat();
            all.sort_unstable();
            prop_assert_eq!(all, (0..n).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_weight_repeats_rows_and_a_part_of_one_chooses_them_by_the_seed() {
        assert_eq!(repeated(3, 1.0, 7, 0), [0, 1, 2]);
        assert_eq!(repeated(3, 2.0, 7, 0), [0, 0, 1, 1, 2, 2]);
        let half = repeated(100, 0.5, 7, 0);
        assert_eq!((half.len(), half.clone()), (50, repeated(100, 0.5, 7, 0)));
        assert_ne!(half, repeated(100, 0.5, 8, 0));
        assert_ne!(half, repeated(100, 0.5, 7, 1));
        assert_eq!(repeated(4, 1.5, 7, 0).len(), 6);
        assert!(repeated(0, 2.0, 7, 0).is_empty());
    }

    #[test]
    fn epochs_and_seeds_differ_in_their_order() {
        assert_ne!(epoch_order(50, 1, 0), epoch_order(50, 1, 1));
        assert_ne!(epoch_order(50, 1, 0), epoch_order(50, 2, 0));
    }
}

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
    fn epochs_and_seeds_differ_in_their_order() {
        assert_ne!(epoch_order(50, 1, 0), epoch_order(50, 1, 1));
        assert_ne!(epoch_order(50, 1, 0), epoch_order(50, 2, 0));
    }
}

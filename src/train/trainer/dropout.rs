//! What is dropped in a micro-batch.

use super::TrainConfig;
use crate::model::Dropout;

/// Dropout (and noise on embeddings) of micro-batch `index` of a step: a function of the seed, so that a
/// resumed run drops the same.
pub(super) fn dropout(config: &TrainConfig, step: usize, index: usize) -> Option<Dropout> {
    let seed = [config.seed, step as u64, index as u64].into_iter().fold(0, mix);
    let (probability, neftune_alpha) = (config.dropout as f32, config.neftune_alpha as f32);
    (probability > 0.0 || neftune_alpha > 0.0).then_some(Dropout {
        probability,
        neftune_alpha,
        seed,
    })
}

/// Mixes `value` into a hash (the finalizer of SplitMix64).
fn mix(hash: u64, value: u64) -> u64 {
    let mut mixed = (hash ^ value).wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

//! The tokens that may still be drawn, without sorting a vocabulary: a threshold that cannot cut too much
//! leaves few of its tokens, and only those are put in order.

/// Logits that are compared together, so that the compiler can use vector registers.
const CHUNK: usize = 64;
/// Size of the first guess at the nucleus (`top_p`); it grows fourfold until it is large enough.
const FIRST_NUCLEUS: usize = 64;
/// What is collected beyond `top_k` before it is thinned out.
const TOP_K_ROOM: usize = 256;
/// The threshold of a nucleus is so much lower than it has to be, because sums are rounded.
const SLACK: f64 = 0.999;

/// A token that may still be drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Candidate {
    /// Its logit at first; then its probability up to a factor.
    pub(super) weight: f32,
    pub(super) id: u32,
}

/// Heavier first, then by id, so that the order is total and no sort has to be stable.
fn by_weight(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.weight.total_cmp(&a.weight).then(a.id.cmp(&b.id))
}

/// The `count` greatest of the `logits` that are at least `floor`, the greatest first, the lower id first on
/// ties.
pub(super) fn greatest(logits: &[f32], floor: f32, count: usize, found: &mut Vec<Candidate>) {
    found.clear();
    if count == 0 {
        return;
    }
    let mut least = floor;
    for (chunk, logits) in logits.chunks(CHUNK).enumerate() {
        if !logits.iter().fold(false, |any, &logit| any | (logit >= least)) {
            continue;
        }
        for (place, &weight) in logits.iter().enumerate() {
            if weight >= least {
                found.push(Candidate { weight, id: (chunk * CHUNK + place) as u32 });
            }
        }
        if found.len() >= count + TOP_K_ROOM {
            found.select_nth_unstable_by(count - 1, by_weight);
            found.truncate(count);
            // On ties the lower ids are in already.
            least = found[count - 1].weight.next_up();
        }
    }
    found.sort_unstable_by(by_weight);
    found.truncate(count);
}

/// The least number of the heaviest `weights` that together have the share `top_p` of `total`, their sum; the
/// heaviest first, at least one.
pub(super) fn nucleus(weights: &[f32], total: f64, top_p: f32, found: &mut Vec<Candidate>) {
    // All weights below this together have less than what may be missing.
    let missing = (1.0 - f64::from(top_p)).max(0.0) * total;
    let least = (missing / weights.len() as f64 * SLACK) as f32;
    found.clear();
    for (chunk, weights) in weights.chunks(CHUNK).enumerate() {
        if weights.iter().fold(false, |any, &weight| any | (weight >= least)) {
            for (place, &weight) in weights.iter().enumerate() {
                if weight >= least && weight > 0.0 {
                    found.push(Candidate { weight, id: (chunk * CHUNK + place) as u32 });
                }
            }
        }
    }
    keep_nucleus(found, f64::from(top_p) * total);
}

/// Keeps the shortest prefix, in order of weight, whose sum is at least `wanted`; at least one.
pub(super) fn keep_nucleus(candidates: &mut Vec<Candidate>, wanted: f64) {
    let mut size = FIRST_NUCLEUS.min(candidates.len());
    loop {
        // The nucleus is small as a rule: sort the heaviest `size` only.
        if size < candidates.len() {
            candidates.select_nth_unstable_by(size - 1, by_weight);
        }
        let head = &mut candidates[..size];
        head.sort_unstable_by(by_weight);
        let mut reached = 0.0;
        let crosses = head.iter().position(|candidate| {
            reached += f64::from(candidate.weight);
            reached >= wanted
        });
        match crosses {
            Some(last) => return candidates.truncate(last + 1),
            None if size == candidates.len() => return,
            None => size = (size * 4).min(candidates.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Everything, in order.
    fn sorted(weights: &[f32]) -> Vec<Candidate> {
        let mut all: Vec<Candidate> =
            weights.iter().zip(0..).map(|(&weight, id)| Candidate { weight, id }).collect();
        all.sort_by(by_weight);
        all
    }

    /// Rows with many ties, with a few tokens far above the rest, with all alike.
    fn row() -> impl Strategy<Value = Vec<f32>> {
        let steps = prop_oneof![Just(3u32), Just(50), Just(1_000_000)];
        (1..4000usize, steps, 1..9i32, any::<u32>()).prop_map(|(len, steps, power, seed)| {
            let noise = |i: u32| (i ^ seed).wrapping_mul(2_654_435_761).rotate_left(13) % steps;
            (0..len as u32).map(|i| (noise(i) as f32 / steps as f32).powi(power)).collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: 500, failure_persistence: None, ..ProptestConfig::default()
        })]

        #[test]
        fn the_greatest_are_those_of_a_full_sort(
            row in row(), count in 1..900usize, floor in -0.1..1.1f32,
        ) {
            let mut found = vec![Candidate { weight: 9.0, id: 9 }];
            greatest(&row, floor, count, &mut found);
            let mut expected = sorted(&row);
            expected.retain(|candidate| candidate.weight >= floor);
            expected.truncate(count);
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn a_nucleus_is_that_of_a_full_sort(row in row(), top_p in 0.0..1.0f32) {
            let weights: Vec<f32> = row.iter().map(|&x| (x - 1.0).exp()).collect();
            let total = weights.iter().copied().map(f64::from).sum::<f64>();
            let mut found = Vec::new();
            nucleus(&weights, total, top_p, &mut found);
            let mut reached = 0.0;
            let mut expected = sorted(&weights);
            let crosses = expected.iter().position(|candidate| {
                reached += f64::from(candidate.weight);
                reached >= f64::from(top_p) * total
            });
            expected.truncate(crosses.map_or(expected.len(), |last| last + 1));
            prop_assert_eq!(found, expected);
        }
    }
}

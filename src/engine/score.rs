//! Teacher forcing: how likely a known next token was.

use super::{candidates::greatest, softmax::log_sum_exp};

/// Logits that are looked at together.
const LANES: usize = 16;

/// Score of a known token given those before it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenScore {
    /// Natural logarithm of its probability at temperature 1, at most 0.
    pub logprob: f32,
    /// Whether greedy decoding would have chosen it.
    pub is_argmax: bool,
}

/// How likely a generated token and its rivals were, before any adjustment or temperature.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// Natural logarithm of the token's probability.
    pub logprob: f32,
    /// The most likely tokens, the first one first.
    pub top: Vec<(u32, f32)>,
}

/// The index of the largest logit, the lowest one on ties; `None` if there is a NaN or no finite
/// maximum.
pub(super) fn arg_max(logits: &[f32]) -> Option<usize> {
    // Running maxima side by side, so that the compiler can use vector registers: a vocabulary is long.
    let mut greatest = [f32::NEG_INFINITY; LANES];
    let mut has_nan = [false; LANES];
    let chunks = logits.chunks_exact(LANES);
    let mut rest = [f32::NEG_INFINITY; LANES];
    rest[..chunks.remainder().len()].copy_from_slice(chunks.remainder());
    for chunk in chunks.chain([&rest[..]]) {
        for lane in 0..LANES {
            greatest[lane] =
                if chunk[lane] > greatest[lane] { chunk[lane] } else { greatest[lane] };
            has_nan[lane] |= chunk[lane].is_nan();
        }
    }
    let best = greatest.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let is_sound = best.is_finite() && !has_nan.contains(&true);
    logits.iter().position(|&logit| is_sound && logit == best)
}

/// Log-softmax of `logits` (`[vocab]`) at `token`; `None` if they are not numbers or `token` is outside.
pub(super) fn score_token(logits: &[f32], token: u32) -> Option<TokenScore> {
    let best = arg_max(logits)?;
    let token = token as usize;
    let logprob = f64::from(*logits.get(token)?) - log_sum_exp(logits, logits[best]);
    Some(TokenScore { logprob: logprob as f32, is_argmax: token == best })
}

/// The same for a token that was generated, beside the `num_top` most likely ones; the lower id comes
/// first on ties.
pub(super) fn token_logprobs(logits: &[f32], token: u32, num_top: usize) -> Option<TokenLogprobs> {
    let sum = log_sum_exp(logits, logits[arg_max(logits)?]);
    let logprob = |logit: f32| (f64::from(logit) - sum) as f32;
    let mut top = Vec::new();
    greatest(logits, f32::NEG_INFINITY, num_top, &mut top);
    let top = top.into_iter().map(|token| (token.id, logprob(token.weight))).collect();
    Some(TokenLogprobs { logprob: logprob(*logits.get(token as usize)?), top })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_index_wins_a_tie() {
        assert_eq!(arg_max(&[1.0, 3.0, 3.0, f32::NEG_INFINITY]), Some(1));
        // Wherever it stands.
        for best in 0..50 {
            let logits: Vec<f32> =
                (0..50).map(|i| if i < best { i as f32 } else { 60.0 }).collect();
            assert_eq!(arg_max(&logits), Some(best));
        }
    }

    #[test]
    fn rows_without_a_finite_maximum_have_no_arg_max() {
        let late: Vec<f32> = (0..40).map(|i| if i == 33 { f32::NAN } else { 1.0 }).collect();
        let short = [&[][..], &[1.0, f32::NAN], &[f32::NEG_INFINITY; 2], &[0.0, f32::INFINITY]];
        for row in short.into_iter().chain([&late[..]]) {
            assert_eq!(arg_max(row), None, "{row:?}");
        }
    }

    #[test]
    fn rivals_are_sorted_and_need_not_hold_the_token() {
        let found = token_logprobs(&[1.0, 3.0, 0.0, 3.0, 2.0], 2, 3).unwrap();
        let ids: Vec<u32> = found.top.iter().map(|(id, _)| *id).collect();
        assert_eq!(ids, [1, 3, 4]);
        assert!((found.top[0].1 - 3.0 - (found.logprob - 0.0)).abs() < 1e-6);
        let all = token_logprobs(&[1.0, 3.0], 0, 20).unwrap();
        let sum: f32 = all.top.iter().map(|(_, logprob)| logprob.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6 && all.logprob == all.top[1].1);
        assert!(token_logprobs(&[1.0, 3.0], 0, 0).unwrap().top.is_empty());
    }

    #[test]
    fn log_probabilities_add_up_to_one_and_survive_large_logits() {
        let logits = [1000.0, 998.0, -5.0, 999.5];
        let scores: Vec<_> = (0..4).filter_map(|token| score_token(&logits, token)).collect();
        let sum: f64 = scores.iter().map(|score| f64::from(score.logprob).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6, "{sum}");
        assert_eq!(
            scores.iter().map(|score| score.is_argmax).collect::<Vec<_>>(),
            [true, false, false, false]
        );
        // log(1 / (1 + e^-2 + e^-0.5))
        assert!((scores[0].logprob + 0.554_957).abs() < 1e-5, "{}", scores[0].logprob);
        assert_eq!(score_token(&logits, 4), None);
    }
}

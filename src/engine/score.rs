//! Teacher forcing: how likely a known next token was.

/// Score of a known token given those before it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenScore {
    /// Natural logarithm of its probability at temperature 1, at most 0.
    pub logprob: f32,
    /// Whether greedy decoding would have chosen it.
    pub is_argmax: bool,
}

/// The index of the largest logit, the lowest one on ties; `None` if there is a NaN or no finite
/// maximum.
pub(super) fn arg_max(logits: &[f32]) -> Option<usize> {
    let mut best: Option<usize> = None;
    for (index, logit) in logits.iter().enumerate() {
        if logit.is_nan() {
            return None;
        }
        if best.is_none_or(|best| *logit > logits[best]) {
            best = Some(index);
        }
    }
    best.filter(|&best| logits[best].is_finite())
}

/// Log-softmax of `logits` (`[vocab]`) at `token`; `None` if they are not numbers or `token` is outside.
pub(super) fn score_token(logits: &[f32], token: u32) -> Option<TokenScore> {
    let best = arg_max(logits)?;
    let token = token as usize;
    // log p = (x - max) - log sum exp(x - max); summed in f64, in index order.
    let max = f64::from(logits[best]);
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - max).exp()).sum();
    let logprob = f64::from(*logits.get(token)?) - max - sum.ln();
    Some(TokenScore { logprob: logprob as f32, is_argmax: token == best })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_index_wins_a_tie() {
        assert_eq!(arg_max(&[1.0, 3.0, 3.0, f32::NEG_INFINITY]), Some(1));
    }

    #[test]
    fn rows_without_a_finite_maximum_have_no_arg_max() {
        for row in [&[][..], &[1.0, f32::NAN], &[f32::NEG_INFINITY; 2], &[0.0, f32::INFINITY]] {
            assert_eq!(arg_max(row), None, "{row:?}");
        }
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

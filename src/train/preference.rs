//! The loss of one pair of answers, and its slope in either answer's log-probability: direct preference
//! optimization and odds-ratio preference optimization.

use super::{PairLoss, TrainConfig};

/// Odds of an answer that is certain are infinite; its mean log-probability counts as this.
const CERTAIN: f64 = -1e-7;

/// What a pair contributes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Contribution {
    pub(super) loss: f64,
    /// Derivatives of the loss in the log-probabilities that it was computed from.
    pub(super) slopes: [f64; 2],
    /// Of the preferred answer and of the other.
    pub(super) rewards: [f64; 2],
}

/// Direct preference optimization (Rafailov et al. 2023, eq. 7): `-log sigmoid(margin)`, where the margin
/// is the difference of two rewards and an answer's reward is beta times what its log-probability has
/// gained since the start. `now` and `start` are sums over the answers' tokens.
///
/// With a `dpo_label_smoothing` of e, a pair is taken to be swapped with probability e: as `sigmoid` has
/// it, `(1 - e) * -log sigmoid(margin) + e * -log sigmoid(-margin)` (conservative DPO, Mitchell 2023);
/// as `robust` has it, with the minus sign and divided by `1 - 2e`, which is unbiased (Chowdhury et
/// al. 2024).
pub(super) fn dpo(config: &TrainConfig, now: [f64; 2], start: [f64; 2]) -> Contribution {
    let rewards = [0, 1].map(|side| config.dpo_beta * (now[side] - start[side]));
    let margin = rewards[0] - rewards[1];
    let smoothing = config.dpo_label_smoothing;
    let (swapped, divisor) = match config.dpo_loss {
        PairLoss::Sigmoid => (smoothing, 1.0),
        PairLoss::Robust => (-smoothing, 1.0 - 2.0 * smoothing),
    };
    let loss = (1.0 - smoothing) * minus_log_sigmoid(margin) + swapped * minus_log_sigmoid(-margin);
    let slope = swapped * sigmoid(margin) - (1.0 - smoothing) * sigmoid(-margin);
    let slope = config.dpo_beta * slope / divisor;
    Contribution { loss: loss / divisor, slopes: [slope, -slope], rewards }
}

/// The odds-ratio part of ORPO (Hong et al. 2024, eq. 7): `-beta log sigmoid(log odds ratio)` of `means`,
/// the mean log-probabilities of the answers' tokens. No reference is needed.
pub(super) fn orpo(beta: f64, means: [f64; 2]) -> Contribution {
    let means = means.map(|mean| mean.min(CERTAIN));
    // log odds = log p - log(1 - p), with 1 - p from the side on which nothing is lost.
    let rest = means.map(|mean| -mean.exp_m1());
    let [chosen, rejected] = [0, 1].map(|side| means[side] - rest[side].ln());
    let log_odds_ratio = chosen - rejected;
    let slope = -beta * sigmoid(-log_odds_ratio);
    Contribution {
        loss: beta * minus_log_sigmoid(log_odds_ratio),
        slopes: [slope / rest[0], -slope / rest[1]],
        rewards: means.map(|mean| beta * mean),
    }
}

/// `-log sigmoid(x)`, from the side on which nothing overflows.
fn minus_log_sigmoid(x: f64) -> f64 {
    (-x.abs()).exp().ln_1p() + (-x).max(0.0)
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The slopes are the loss's own, by central differences.
    fn check_slopes(name: &str, at: [f64; 2], pair: impl Fn([f64; 2]) -> Contribution) {
        const STEP: f64 = 1e-5;
        for side in 0..2 {
            let [mut below, mut above] = [at, at];
            below[side] -= STEP;
            above[side] += STEP;
            let expected = (pair(above).loss - pair(below).loss) / (2.0 * STEP);
            let slope = pair(at).slopes[side];
            let near = (slope - expected).abs() < 1e-5 * (1.0 + expected.abs());
            assert!(near, "{name} at {at:?}: {slope}, not {expected}");
        }
    }

    #[test]
    fn the_slopes_of_every_loss_are_its_derivatives() {
        let points = [[-3.0, -2.0], [-0.1, -9.0], [-25.0, -0.5], [-0.01, -0.02]];
        for (dpo_loss, dpo_label_smoothing) in
            [(PairLoss::Sigmoid, 0.0), (PairLoss::Sigmoid, 0.2), (PairLoss::Robust, 0.2)]
        {
            let config = TrainConfig { dpo_loss, dpo_label_smoothing, ..TrainConfig::default() };
            for at in points {
                check_slopes("dpo", at, |now| dpo(&config, now, [-2.5, -3.5]));
            }
        }
        for at in points {
            check_slopes("orpo", at, |means| orpo(0.1, means));
        }
    }

    #[test]
    fn an_answer_that_is_certain_has_a_finite_loss() {
        for means in [[0.0, -1.0], [-1.0, 0.0], [0.0, 0.0]] {
            let pair = orpo(0.1, means);
            assert!(pair.loss.is_finite() && pair.slopes.iter().all(|slope| slope.is_finite()));
        }
    }
}

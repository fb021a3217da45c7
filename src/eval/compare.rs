//! The statistics of paired comparisons: exact McNemar, bootstrap over rows, Holm, and how small a
//! difference the rows could have shown. Knows numbers only.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Resamples of every bootstrap.
pub const RESAMPLES: usize = 10_000;
/// Below this p-value a difference is called significant.
pub const SIGNIFICANCE: f64 = 0.05;
/// With fewer rows the report says that nothing can be concluded.
pub const MIN_ROWS: usize = 50;
/// Two-sided 95 % quantile of the normal distribution.
const Z_95: f64 = 1.959_964;
/// Standard errors between "no difference" and one that 80 % of such evaluations would find.
const Z_95_POWER_80: f64 = Z_95 + 0.841_621;

/// A mean difference's bootstrap: interval and p-value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bootstrap {
    /// The 2.5th and 97.5th percentile of the resampled means.
    pub ci95: [f64; 2],
    /// Two-sided p-value of "the mean is 0".
    pub p_value: f64,
}

/// Two-sided exact McNemar test: of `wins + losses` rows in which exactly one arm was right, how
/// likely is a split at least this uneven if both arms are equally good?
///
/// `p = min(1, 2 sum_{i <= k} C(n, i) / 2^n)`, with `n = wins + losses`, `k = min(wins, losses)`.
#[must_use]
pub fn mcnemar_exact(wins: usize, losses: usize) -> f64 {
    let (n, k) = (wins + losses, wins.min(losses));
    // ln C(n, k) - n ln 2, so that no n overflows.
    let mut ln_largest = -(n as f64) * std::f64::consts::LN_2;
    for i in 0..k {
        ln_largest += ((n - i) as f64).ln() - ((i + 1) as f64).ln();
    }
    // The sum relative to its largest term, from i = k downwards: C(n, i-1) = C(n, i) i / (n-i+1).
    let (mut sum, mut term) = (1.0, 1.0);
    for i in (1..=k).rev() {
        term *= i as f64 / (n - i + 1) as f64;
        sum += term;
        if term < sum * f64::EPSILON {
            break;
        }
    }
    (2.0 * (ln_largest + f64::ln(sum)).exp()).min(1.0)
}

/// Bootstrap over rows of the mean of `differences` (one per row, arm a minus arm b), reproducible
/// from `seed`. The p-value is twice the smaller share of resampled means on either side of 0.
#[must_use]
pub fn paired_bootstrap(differences: &[f64], seed: u64) -> Bootstrap {
    if differences.iter().all(|difference| *difference == 0.0) {
        return Bootstrap { ci95: [0.0, 0.0], p_value: 1.0 };
    }
    let means = resampled_means(differences, seed);
    let num_below = means.iter().filter(|mean| **mean <= 0.0).count();
    let num_above = means.iter().filter(|mean| **mean >= 0.0).count();
    // The observed sample counts as one of the resamples: p is never 0.
    let tail = (num_below.min(num_above) + 1) as f64 / (RESAMPLES + 1) as f64;
    Bootstrap {
        ci95: [percentile(&means, 2.5), percentile(&means, 97.5)],
        p_value: (2.0 * tail).min(1.0),
    }
}

/// 95 % interval of the mean of `scores`: Wilson's for scores of 0 and 1, the bootstrap's otherwise.
#[must_use]
pub fn mean_interval(scores: &[f64], is_binary: bool, seed: u64) -> [f64; 2] {
    if scores.is_empty() {
        return [0.0, 1.0];
    }
    if !is_binary {
        let means = resampled_means(scores, seed);
        return [percentile(&means, 2.5), percentile(&means, 97.5)];
    }
    let n = scores.len() as f64;
    let (share, z2) = (mean(scores), Z_95 * Z_95);
    let centre = (share + z2 / (2.0 * n)) / (1.0 + z2 / n);
    let half = Z_95 / (1.0 + z2 / n) * (share * (1.0 - share) / n + z2 / (4.0 * n * n)).sqrt();
    [(centre - half).max(0.0), (centre + half).min(1.0)]
}

/// Holm's adjustment of several p-values, in their order: compare the results to one level.
#[must_use]
pub fn holm(p_values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p_values.len()).collect();
    order.sort_by(|&a, &b| p_values[a].total_cmp(&p_values[b]));
    let mut adjusted = vec![0.0; p_values.len()];
    let mut largest = 0.0_f64;
    for (rank, &index) in order.iter().enumerate() {
        let scaled = p_values[index] * (p_values.len() - rank) as f64;
        largest = largest.max(scaled.min(1.0));
        adjusted[index] = largest;
    }
    adjusted
}

/// The smallest mean difference that rows like these would show as significant in 80 % of
/// evaluations: `2.8 sd / sqrt(n)`. Never below 6 rows, the fewest one-sided ones with p < 0.05.
#[must_use]
pub fn minimum_detectable_difference(differences: &[f64]) -> f64 {
    let n = differences.len() as f64;
    if differences.len() < 2 {
        return 1.0;
    }
    let mean = mean(differences);
    let squares: f64 = differences.iter().map(|difference| (difference - mean).powi(2)).sum();
    let sd = (squares / (n - 1.0)).sqrt();
    (Z_95_POWER_80 * sd / n.sqrt()).max(6.0 / n).min(1.0)
}

/// Arithmetic mean; 0 of nothing.
#[must_use]
pub fn mean(values: &[f64]) -> f64 {
    if values.is_empty() { 0.0 } else { values.iter().sum::<f64>() / values.len() as f64 }
}

/// The `percent`-th percentile of `sorted` values, interpolated between neighbours; 0 of nothing.
#[must_use]
pub fn percentile(sorted: &[f64], percent: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let position = percent / 100.0 * last as f64;
    let low = (position.floor() as usize).min(last);
    let high = (low + 1).min(last);
    sorted[low] + (sorted[high] - sorted[low]) * (position - low as f64)
}

/// Means of [`RESAMPLES`] samples with replacement, ascending.
fn resampled_means(values: &[f64], seed: u64) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut means = Vec::with_capacity(RESAMPLES);
    for _ in 0..RESAMPLES {
        let mut sum = 0.0;
        for _ in 0..values.len() {
            sum += values[rng.random_range(0..values.len())];
        }
        means.push(sum / values.len() as f64);
    }
    means.sort_by(f64::total_cmp);
    means
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mcnemar_equals_the_exact_binomial_test() {
        // scipy.stats.binomtest(min(b, c), b + c, 0.5).pvalue
        let known = [
            (0, 5, 0.0625),
            (0, 6, 0.03125),
            (3, 17, 0.002_576_828_002_929_687_5),
            (117, 0, 1.203_706_215_242_022_4e-35),
            (30, 1, 2.980_232_238_769_531_2e-8),
            (40, 60, 0.056_887_933_640_980_89),
            (1000, 1100, 0.030_720_707_864_242_49),
            (1_000_000, 1_004_000, 0.004_729_576_493_365_678),
            (5, 5, 1.0),
            (0, 0, 1.0),
        ];
        for (wins, losses, p) in known {
            let ours = mcnemar_exact(wins, losses);
            assert!((ours / p - 1.0).abs() < 1e-7, "{wins}:{losses} gives {ours}, not {p}");
            assert_eq!(ours, mcnemar_exact(losses, wins));
        }
    }

    #[test]
    fn the_bootstrap_finds_the_interval_and_the_p_value() {
        let rows: Vec<f64> = (0..60).map(|i| f64::from((i * 37) % 11 - 4) / 10.0).collect();
        let bootstrap = paired_bootstrap(&rows, 7);
        // scipy.stats.bootstrap, percentile method, 200,000 resamples.
        assert!((bootstrap.ci95[0] - 0.00833).abs() < 0.005, "{bootstrap:?}");
        assert!((bootstrap.ci95[1] - 0.16833).abs() < 0.005, "{bootstrap:?}");
        assert!((bootstrap.p_value - 0.0305).abs() < 0.01, "{bootstrap:?}");
        assert_eq!(bootstrap, paired_bootstrap(&rows, 7), "the same seed gives the same numbers");
    }

    #[test]
    fn equal_arms_differ_by_nothing() {
        let none = paired_bootstrap(&[0.0; 80], 1);
        assert_eq!(none, Bootstrap { ci95: [0.0, 0.0], p_value: 1.0 });
        let all = paired_bootstrap(&[1.0; 80], 1);
        assert_eq!(all.ci95, [1.0, 1.0]);
        assert!(all.p_value > 0.0 && all.p_value < 0.001);
    }

    #[test]
    fn holm_equals_statsmodels() {
        let adjusted = holm(&[0.01, 0.04, 0.03, 0.005]);
        for (ours, known) in adjusted.iter().zip([0.03, 0.06, 0.06, 0.02]) {
            assert!((ours - known).abs() < 1e-12, "{adjusted:?}");
        }
        assert_eq!(holm(&[0.7]), [0.7]);
        assert_eq!(holm(&[0.7, 0.8]), [1.0, 1.0]);
    }

    #[test]
    fn wilson_intervals_equal_statsmodels() {
        let share = |right: usize, n: usize| -> Vec<f64> {
            (0..n).map(|i| f64::from(u8::from(i < right))).collect()
        };
        let known = [
            (0, 150, 0.0, 0.024_970_244),
            (117, 150, 0.707_176_900, 0.838_839_763),
            (150, 150, 0.975_029_756, 1.0),
            (7, 20, 0.181_191_824, 0.567_145_723),
        ];
        for (right, n, low, high) in known {
            let [ours_low, ours_high] = mean_interval(&share(right, n), true, 0);
            assert!((ours_low - low).abs() < 1e-6 && (ours_high - high).abs() < 1e-6);
        }
    }

    #[test]
    fn six_one_sided_rows_are_the_least_that_can_be_detected() {
        assert_eq!(minimum_detectable_difference(&[0.0; 60]), 0.1);
        assert_eq!(minimum_detectable_difference(&[1.0]), 1.0);
        let uneven: Vec<f64> = (0..100).map(|i| f64::from(i % 3) - 1.0).collect();
        // sd 0.8165 (n - 1), 2.8016 sd / 10
        assert!((minimum_detectable_difference(&uneven) - 0.2298).abs() < 2e-3);
    }

    #[test]
    fn percentiles_interpolate_between_neighbours() {
        let sorted = [1.0, 2.0, 4.0];
        assert_eq!(percentile(&sorted, 50.0), 2.0);
        assert_eq!(percentile(&sorted, 75.0), 3.0);
        assert_eq!(percentile(&sorted, 100.0), 4.0);
        assert_eq!(percentile(&[], 50.0), 0.0);
    }
}

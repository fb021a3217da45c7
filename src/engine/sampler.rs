//! From a row of logits to the next token.
//!
//! One [`Sampler`] a sequence, with its own random stream: what a request draws depends on its seed
//! and its logits only, never on its neighbours in the batch.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{
    candidates::{Candidate, greatest, keep_nucleus, nucleus},
    penalties::Penalties,
    score::arg_max,
    softmax::{CHUNK, exponentials, sum},
};

/// Below this temperature the choice is greedy: the division would only produce infinities.
const MIN_TEMPERATURE: f32 = 1e-5;
/// Logarithm of the least weight that f32 can tell from 0.
const LEAST_LOG_WEIGHT: f32 = -103.0;

/// How the next token is chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 = greedy: the arg max, the lowest id on ties.
    pub temperature: f32,
    /// The most likely tokens that together have at least this probability; 1 = off.
    pub top_p: f32,
    /// The so many most likely tokens; 0 = off.
    pub top_k: usize,
    /// Tokens at least this fraction as likely as the most likely one; 0 = off.
    pub min_p: f32,
    /// Taken from the logit of every token that the answer has; 0 = off.
    pub presence_penalty: f32,
    /// Taken from the logit of a token each time that the answer has it; 0 = off.
    pub frequency_penalty: f32,
    /// Divides positive logits of tokens of prompt and answer, multiplies negative ones; 1 = off.
    pub repetition_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Equal seeds draw equal tokens from equal logits.
    pub seed: u64,
    /// Which of the streams of one seed is drawn from: no two of them, or of other seeds, have draws in
    /// common.
    pub stream: u64,
}

impl SamplingParams {
    /// Always the most likely token.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: 0,
            stream: 0,
        }
    }
}

/// A row of logits that nothing can be chosen from.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the logits hold a NaN or no finite maximum")]
pub struct BadLogits;

/// Draws the tokens of one sequence.
#[derive(Debug)]
pub struct Sampler {
    params: SamplingParams,
    penalties: Option<Penalties>,
    rng: ChaCha8Rng,
    /// Weight of each token of the vocabulary; kept for its memory.
    weights: Vec<f32>,
    /// Sums of `weights`, chunk by chunk; kept for its memory.
    sums: Vec<f64>,
    /// Kept for its memory.
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// The sampler of an answer to `prompt`, whose tokens some penalties look at.
    #[must_use]
    pub fn new(params: SamplingParams, prompt: &[u32]) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(params.seed);
        rng.set_stream(params.stream);
        let penalties = Penalties::new(&params, prompt);
        let (weights, sums, candidates) = (Vec::new(), Vec::new(), Vec::new());
        Self { params, penalties, rng, weights, sums, candidates }
    }

    /// Whether a choice is more than a look for the greatest logit.
    pub(super) fn is_costly(&self) -> bool {
        self.params.temperature >= MIN_TEMPERATURE || self.penalties.is_some()
    }

    /// The next token given `logits` (`[vocab]`). Bias and penalties, then temperature, then `min_p`, then
    /// `top_k`, then `top_p` over what is left, as vLLM does it.
    ///
    /// # Errors
    /// A NaN among the logits, or no finite maximum.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32, BadLogits> {
        let Some(mut penalties) = self.penalties.take() else { return self.choose(logits) };
        let chosen = self.choose(penalties.apply(logits));
        if let Ok(id) = chosen {
            penalties.count(id);
        }
        self.penalties = Some(penalties);
        chosen
    }

    fn choose(&mut self, logits: &[f32]) -> Result<u32, BadLogits> {
        let best = arg_max(logits).ok_or(BadLogits)?;
        let SamplingParams { temperature, top_p, top_k, min_p, .. } = self.params;
        if temperature < MIN_TEMPERATURE {
            return Ok(best as u32);
        }
        let max = logits[best];
        // What `min_p` leaves, and what is not 0: compared before it is exponentiated.
        let floor = max + temperature * min_p.min(1.0).ln().max(LEAST_LOG_WEIGHT);
        if top_k == 0 || top_k >= logits.len() {
            let total = self.weigh(logits, max, floor);
            if top_p >= 1.0 {
                return Ok(self.draw_from_all(total));
            }
            nucleus(&self.weights, total, top_p, &mut self.candidates);
        } else {
            greatest(logits, floor, top_k, &mut self.candidates);
            for candidate in &mut self.candidates {
                candidate.weight = ((candidate.weight - max) / temperature).exp();
            }
            if top_p < 1.0 {
                let total = total(&self.candidates);
                keep_nucleus(&mut self.candidates, f64::from(top_p) * total);
            }
        }
        Ok(self.draw())
    }

    /// Weighs every token relative to the most likely one, whose weight is 1; those below `floor` weigh
    /// nothing. Returns the sum.
    fn weigh(&mut self, logits: &[f32], max: f32, floor: f32) -> f64 {
        self.weights.resize(logits.len(), 0.0);
        self.sums.clear();
        for (logits, weights) in logits.chunks(CHUNK).zip(self.weights.chunks_mut(CHUNK)) {
            exponentials(logits, max, self.params.temperature, weights);
            for (weight, &logit) in weights.iter_mut().zip(logits) {
                *weight = if logit < floor { 0.0 } else { *weight };
            }
            self.sums.push(sum(weights));
        }
        self.sums.iter().sum()
    }

    /// Draws among all tokens, in the order of their ids.
    fn draw_from_all(&mut self, total: f64) -> u32 {
        let mut left = self.rng.random::<f64>() * total;
        let mut last = 0;
        for (chunk, (weights, &sum)) in self.weights.chunks(CHUNK).zip(&self.sums).enumerate() {
            if left >= sum && chunk + 1 < self.sums.len() {
                left -= sum;
                continue;
            }
            for (place, &weight) in weights.iter().enumerate() {
                left -= f64::from(weight);
                if weight > 0.0 {
                    last = chunk * CHUNK + place;
                }
                if left < 0.0 {
                    return last as u32;
                }
            }
        }
        // Rounding has left a crumb.
        let is_possible = |weight: &f32| *weight > 0.0;
        self.weights.iter().rposition(is_possible).unwrap_or(last) as u32
    }

    fn draw(&mut self) -> u32 {
        let mut left = self.rng.random::<f64>() * total(&self.candidates);
        for candidate in &self.candidates {
            left -= f64::from(candidate.weight);
            if left < 0.0 {
                return candidate.id;
            }
        }
        // Rounding can leave a crumb.
        self.candidates.last().expect("the arg max is always a candidate").id
    }
}

fn total(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|candidate| f64::from(candidate.weight)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params() -> SamplingParams {
        SamplingParams { temperature: 1.0, seed: 7, ..SamplingParams::greedy() }
    }

    /// Logits of these probabilities.
    fn logits(probabilities: &[f64]) -> Vec<f32> {
        probabilities.iter().map(|p| p.ln() as f32).collect()
    }

    fn counts(params: SamplingParams, logits: &[f32], draws: usize) -> Vec<usize> {
        let mut sampler = Sampler::new(params, &[]);
        let mut counts = vec![0; logits.len()];
        for _ in 0..draws {
            counts[sampler.sample(logits).unwrap() as usize] += 1;
        }
        counts
    }

    /// Chi-square statistic of 20,000 draws against `expected` probabilities; tokens of probability
    /// 0 must never be drawn.
    fn chi_square(params: SamplingParams, logits: &[f32], expected: &[f64]) -> f64 {
        let draws = 20_000;
        let counts = counts(params, logits, draws);
        let mut sum = 0.0;
        for (&count, p) in counts.iter().zip(expected) {
            if *p == 0.0 {
                assert_eq!(count, 0, "{counts:?}");
            } else {
                sum += (count as f64 - p * draws as f64).powi(2) / (p * draws as f64);
            }
        }
        sum
    }

    const PROBABILITIES: [f64; 5] = [0.1, 0.4, 0.05, 0.25, 0.2];
    /// 99.9 % quantile of chi-square with 4 degrees of freedom; with fewer it is smaller.
    const LIMIT: f64 = 18.47;

    #[test]
    fn temperature_zero_takes_the_arg_max() {
        let greedy = SamplingParams::greedy();
        assert_eq!(Sampler::new(greedy.clone(), &[]).sample(&[0.0, 2.0, 2.0, 1.0]), Ok(1));
        assert_eq!(Sampler::new(greedy, &[]).sample(&[0.0, f32::NAN]), Err(BadLogits));
    }

    #[test]
    fn a_nan_is_an_error_at_any_temperature() {
        assert_eq!(Sampler::new(params(), &[]).sample(&[f32::NAN, 0.0]), Err(BadLogits));
        assert_eq!(Sampler::new(params(), &[]).sample(&[f32::NEG_INFINITY; 3]), Err(BadLogits));
    }

    #[test]
    fn draws_follow_the_softmax() {
        let chi = chi_square(params(), &logits(&PROBABILITIES), &PROBABILITIES);
        assert!(chi < LIMIT, "{chi}");
    }

    #[test]
    fn temperature_flattens_the_softmax() {
        let roots: Vec<f64> = PROBABILITIES.iter().map(|p| p.sqrt()).collect();
        let sum: f64 = roots.iter().sum();
        let expected: Vec<f64> = roots.iter().map(|root| root / sum).collect();
        let params = SamplingParams { temperature: 2.0, ..params() };
        let chi = chi_square(params, &logits(&PROBABILITIES), &expected);
        assert!(chi < LIMIT, "{chi}");
    }

    #[test]
    fn each_filter_keeps_what_it_says_and_the_rest_is_renormalised() {
        let two = [0.0, 0.4 / 0.65, 0.0, 0.25 / 0.65, 0.0];
        let three = [0.0, 0.4 / 0.85, 0.0, 0.25 / 0.85, 0.2 / 0.85];
        let rows = [
            (SamplingParams { top_k: 2, ..params() }, two),
            (SamplingParams { top_k: 3, ..params() }, three),
            // 0.4 + 0.25 does not reach 0.7: the token that crosses it belongs to the nucleus.
            (SamplingParams { top_p: 0.7, ..params() }, three),
            (SamplingParams { top_p: 0.6, ..params() }, two),
            (SamplingParams { min_p: 0.45, ..params() }, three),
            (SamplingParams { min_p: 0.6, ..params() }, two),
            // top_p looks at what top_k left: 0.4 / 0.85 < 0.6 <= 0.65 / 0.85.
            (SamplingParams { top_k: 3, top_p: 0.6, ..params() }, two),
            // And min_p at the tempered distribution: sqrt(0.25 / 0.4) = 0.79, sqrt(0.2 / 0.4) = 0.71.
            (SamplingParams { top_k: 1, ..params() }, [0.0, 1.0, 0.0, 0.0, 0.0]),
            (SamplingParams { top_p: 0.0, ..params() }, [0.0, 1.0, 0.0, 0.0, 0.0]),
            (SamplingParams { min_p: 1.0, ..params() }, [0.0, 1.0, 0.0, 0.0, 0.0]),
        ];
        for (params, expected) in rows {
            let chi = chi_square(params.clone(), &logits(&PROBABILITIES), &expected);
            assert!(chi < LIMIT, "{params:?}: {chi}");
        }
    }

    #[test]
    fn min_p_looks_at_the_tempered_distribution() {
        // sqrt(0.25 / 0.4) = 0.79 stays, sqrt(0.2 / 0.4) = 0.71 goes.
        let params = SamplingParams { temperature: 2.0, min_p: 0.75, ..params() };
        let counts = counts(params, &logits(&PROBABILITIES), 500);
        assert_eq!((counts[0], counts[2], counts[4]), (0, 0, 0));
        assert!(counts[1] > 0 && counts[3] > 0);
    }

    #[test]
    fn a_wide_nucleus_in_a_large_vocabulary_has_the_right_size() {
        // Uniform: ties everywhere, so the nucleus is the first half of the ids.
        let counts = counts(SamplingParams { top_p: 0.5, ..params() }, &[0.5; 1000], 20_000);
        assert!(counts[..500].iter().all(|&count| count > 0));
        assert!(counts[500..].iter().all(|&count| count == 0));
    }

    #[test]
    fn a_presence_penalty_makes_greedy_choices_move_on() {
        let params = SamplingParams { presence_penalty: 1.5, ..SamplingParams::greedy() };
        let mut sampler = Sampler::new(params, &[]);
        let chosen: Vec<u32> = (0..4).map(|_| sampler.sample(&[0.0, 2.0, 1.0]).unwrap()).collect();
        assert_eq!(chosen, [1, 2, 1, 1]);
    }

    /// Logits that look like a model's: many small ones, few large ones, and ties.
    fn model_logits(vocab: usize, row: usize) -> Vec<f32> {
        let noise = |i: usize| ((i + 31 * row).wrapping_mul(2_654_435_761) >> 9 & 0x3FF) as f32;
        (0..vocab)
            .map(|i| (noise(i) / 102.4).floor() + (noise(i * 7 + 3) / 350.0).powi(3))
            .collect()
    }

    /// Sums up 40 draws, so that one other token shows.
    fn digest(params: &SamplingParams, vocab: usize) -> u64 {
        let mut sampler = Sampler::new(params.clone(), &[5, 6, 7]);
        (0..40).fold(7u64, |sum, row| {
            let id = sampler.sample(&model_logits(vocab, row)).unwrap();
            sum.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(u64::from(id) + 1)
        })
    }

    #[test]
    fn seeds_draw_the_tokens_that_they_always_drew() {
        let p = |temperature, top_p, top_k, min_p, presence_penalty, seed| SamplingParams {
            temperature,
            top_p,
            top_k,
            min_p,
            presence_penalty,
            seed,
            ..SamplingParams::greedy()
        };
        let rows = [
            p(0.0, 1.0, 0, 0.0, 0.0, 1),
            p(0.0, 1.0, 0, 0.0, 2.0, 1),
            p(1.0, 1.0, 0, 0.0, 0.0, 2),
            p(0.7, 1.0, 0, 0.0, 0.5, 3),
            p(1.0, 0.9, 0, 0.0, 0.0, 4),
            p(0.6, 0.5, 0, 0.0, 0.0, 5),
            p(1.5, 0.99, 0, 0.0, 0.0, 6),
            p(0.8, 0.95, 20, 0.0, 0.0, 7),
            p(1.0, 0.8, 200, 0.02, 0.3, 8),
            p(1.0, 1.0, 0, 0.05, 0.0, 9),
            p(1.3, 0.9, 0, 0.1, 0.0, 10),
            p(1.0, 1.0, 1, 0.0, 0.0, 11),
        ];
        let digests: Vec<[u64; 2]> =
            rows.iter().map(|params| [digest(params, 500), digest(params, 20_000)]).collect();
        let expected = vec![
            [9_280_158_450_564_848_735, 18_076_350_961_645_104_918],
            [13_410_703_185_859_948_382, 18_076_350_961_645_104_918],
            [750_484_614_480_135_342, 4_253_308_594_054_407_955],
            [2_463_935_175_402_789_204, 4_070_655_302_724_247_147],
            [4_851_700_229_718_256_105, 17_428_661_003_530_325_891],
            [16_121_083_257_820_685_704, 17_549_084_752_237_711_882],
            [184_472_981_350_350_767, 11_161_213_902_472_534_452],
            [248_941_159_618_597_924, 2_836_209_908_935_977_732],
            [16_081_764_466_269_783_880, 350_847_007_681_222_449],
            [7_328_479_572_159_395_849, 10_848_601_232_408_091_978],
            [18_303_273_231_219_109_601, 15_730_169_238_375_720_466],
            [9_280_158_450_564_848_735, 18_076_350_961_645_104_918],
        ];
        assert_eq!(digests, expected);
    }

    #[test]
    fn equal_seeds_draw_equal_tokens() {
        let row = logits(&[0.01; 100]);
        let draw = |seed| {
            let mut sampler = Sampler::new(SamplingParams { seed, ..params() }, &[]);
            (0..20).map(|_| sampler.sample(&row).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }
}

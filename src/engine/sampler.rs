//! From a row of logits to the next token.
//!
//! One [`Sampler`] a sequence, with its own random stream: what a request draws depends on its seed
//! and its logits only, never on its neighbours in the batch.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{penalties::Penalties, score::arg_max};

/// Below this temperature the choice is greedy: the division would only produce infinities.
const MIN_TEMPERATURE: f32 = 1e-5;
/// Logarithm of the least weight that f32 can tell from 0.
const LEAST_LOG_WEIGHT: f32 = -103.0;
/// Size of the first guess at the nucleus (`top_p`); it grows fourfold until it is large enough.
const FIRST_NUCLEUS: usize = 64;

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
        }
    }
}

/// A row of logits that nothing can be chosen from.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the logits hold a NaN or no finite maximum")]
pub(super) struct BadLogits;

/// Draws the tokens of one sequence.
#[derive(Debug)]
pub(super) struct Sampler {
    params: SamplingParams,
    penalties: Option<Penalties>,
    rng: ChaCha8Rng,
    /// Kept for its memory.
    candidates: Vec<Candidate>,
}

/// A token that may still be drawn.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    /// Its logit at first; then its probability up to a factor.
    weight: f32,
    id: u32,
}

impl Sampler {
    pub(super) fn new(params: SamplingParams, prompt: &[u32]) -> Self {
        let rng = ChaCha8Rng::seed_from_u64(params.seed);
        let penalties = Penalties::new(&params, prompt);
        Self { params, penalties, rng, candidates: Vec::new() }
    }

    /// The next token given `logits` (`[vocab]`). Bias and penalties, then temperature, then `min_p`, then
    /// `top_k`, then `top_p` over what is left, as vLLM does it.
    pub(super) fn sample(&mut self, logits: &[f32]) -> Result<u32, BadLogits> {
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
        if self.params.temperature < MIN_TEMPERATURE {
            return Ok(best as u32);
        }
        let mut candidates = std::mem::take(&mut self.candidates);
        self.weigh(logits, logits[best], &mut candidates);
        keep_top_p(&mut candidates, self.params.top_p);
        let id = self.draw(&candidates);
        self.candidates = candidates;
        Ok(id)
    }

    /// The tokens that `min_p` and `top_k` leave, with weights relative to the most likely one, whose
    /// weight is 1. Both filters compare logits, so that only what they leave is exponentiated.
    fn weigh(&self, logits: &[f32], max: f32, candidates: &mut Vec<Candidate>) {
        let SamplingParams { temperature, top_k, min_p, .. } = self.params;
        let least = min_p.min(1.0).ln().max(LEAST_LOG_WEIGHT);
        let floor = max + temperature * least;
        let tokens = logits.iter().zip(0..).filter(|(logit, _)| **logit >= floor);
        candidates.clear();
        candidates.extend(tokens.map(|(&weight, id)| Candidate { weight, id }));
        if top_k > 0 && top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, by_weight);
            candidates.truncate(top_k);
        }
        for candidate in candidates {
            candidate.weight = ((candidate.weight - max) / temperature).exp();
        }
    }

    fn draw(&mut self, candidates: &[Candidate]) -> u32 {
        let total: f64 = candidates.iter().map(|candidate| f64::from(candidate.weight)).sum();
        let mut left = self.rng.random::<f64>() * total;
        for candidate in candidates {
            left -= f64::from(candidate.weight);
            if left < 0.0 {
                return candidate.id;
            }
        }
        // Rounding can leave a crumb; the most likely token has weight 1 and is always there.
        candidates.last().expect("the arg max is always a candidate").id
    }
}

/// Heavier first, then by id, so that the order is total and no sort has to be stable.
fn by_weight(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.weight.total_cmp(&a.weight).then(a.id.cmp(&b.id))
}

/// Keeps the shortest prefix, in order of weight, that reaches `top_p` of the whole; at least one.
fn keep_top_p(candidates: &mut Vec<Candidate>, top_p: f32) {
    if top_p >= 1.0 {
        return;
    }
    let total: f64 = candidates.iter().map(|candidate| f64::from(candidate.weight)).sum();
    let wanted = f64::from(top_p) * total;
    let mut size = FIRST_NUCLEUS.min(candidates.len());
    loop {
        // The nucleus is small as a rule: sort the heaviest `size` only, not the vocabulary.
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

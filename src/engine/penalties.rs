//! What a request adds to its logits before anything is chosen: a bias for some tokens, and penalties for
//! tokens that are there already.
//!
//! In vLLM's order: the bias, then the repetition penalty (prompt and answer), then the frequency and
//! presence penalties (answer only).

use std::collections::{HashMap, HashSet};

use super::SamplingParams;

/// The adjustments of one sequence, and the tokens they look at.
#[derive(Debug)]
pub(super) struct Penalties {
    bias: Vec<(u32, f32)>,
    presence: f32,
    frequency: f32,
    repetition: f32,
    /// How often the answer has each token.
    counts: HashMap<u32, u32>,
    /// Tokens of the prompt, where somebody asks for them.
    prompt: HashSet<u32>,
    /// The adjusted logits; kept for its memory.
    logits: Vec<f32>,
}

impl Penalties {
    /// `None` where `params` ask for nothing.
    pub(super) fn new(params: &SamplingParams, prompt: &[u32]) -> Option<Self> {
        let repeats = params.repetition_penalty != 1.0;
        let counts = params.presence_penalty != 0.0 || params.frequency_penalty != 0.0;
        let asks = repeats || counts || !params.logit_bias.is_empty();
        asks.then(|| Self {
            bias: params.logit_bias.clone(),
            presence: params.presence_penalty,
            frequency: params.frequency_penalty,
            repetition: params.repetition_penalty,
            counts: HashMap::new(),
            prompt: if repeats { prompt.iter().copied().collect() } else { HashSet::new() },
            logits: Vec::new(),
        })
    }

    /// The adjusted `logits`.
    pub(super) fn apply(&mut self, logits: &[f32]) -> &[f32] {
        let adjusted = &mut self.logits;
        adjusted.clear();
        adjusted.extend_from_slice(logits);
        for &(id, bias) in &self.bias {
            if let Some(logit) = adjusted.get_mut(id as usize) {
                *logit += bias;
            }
        }
        if self.repetition != 1.0 {
            let in_answer_only = self.counts.keys().filter(|id| !self.prompt.contains(id));
            for &id in self.prompt.iter().chain(in_answer_only) {
                if let Some(logit) = adjusted.get_mut(id as usize) {
                    let is_positive = *logit > 0.0;
                    *logit = if is_positive {
                        *logit / self.repetition
                    } else {
                        *logit * self.repetition
                    };
                }
            }
        }
        for (&id, &count) in &self.counts {
            if let Some(logit) = adjusted.get_mut(id as usize) {
                *logit -= self.frequency * count as f32 + self.presence;
            }
        }
        adjusted
    }

    /// `id` was chosen.
    pub(super) fn count(&mut self, id: u32) {
        *self.counts.entry(id).or_default() += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_asked_is_nothing_done() {
        assert!(Penalties::new(&SamplingParams::greedy(), &[1, 2]).is_none());
    }

    #[test]
    fn each_adjustment_does_what_it_says() {
        let logits = [1.0, 2.0, -2.0, 0.5];
        let adjusted = |params: &SamplingParams| {
            let mut penalties = Penalties::new(params, &[2]).unwrap();
            [1, 1, 3].into_iter().for_each(|id| penalties.count(id));
            penalties.apply(&logits).to_vec()
        };
        let off = SamplingParams::greedy();
        let bias = SamplingParams { logit_bias: vec![(0, 5.0), (9, 1.0)], ..off.clone() };
        assert_eq!(adjusted(&bias), [6.0, 2.0, -2.0, 0.5]);
        let presence = SamplingParams { presence_penalty: 0.5, ..off.clone() };
        assert_eq!(adjusted(&presence), [1.0, 1.5, -2.0, 0.0]);
        let frequency = SamplingParams { frequency_penalty: 0.5, ..off.clone() };
        assert_eq!(adjusted(&frequency), [1.0, 1.0, -2.0, 0.0]);
        // Answer and prompt; each token once, away from what makes it likely.
        let repetition = SamplingParams { repetition_penalty: 2.0, ..off };
        assert_eq!(adjusted(&repetition), [1.0, 1.0, -4.0, 0.25]);
    }
}

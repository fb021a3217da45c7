//! From a step's logits to scores and tokens: besides the forward pass, the one part of a step that reads
//! whole rows of the vocabulary, so it is shared out over the threads.
//!
//! Each sequence's rows are read by its own sampler, in order, so that neither threads nor neighbours change
//! what is drawn.

use super::{
    request::Request,
    sampler::{BadLogits, Sampler},
    scheduler::Scheduled,
    score::{TokenLogprobs, TokenScore, score_token, token_logprobs},
    sequence::Sequence,
};
use crate::kernels::for_each_rows;

/// Work of a logit that is exponentiated, in multiply-adds.
const COSTLY: usize = 16;

/// A token that was chosen, and how likely it was, where asked for.
pub(super) struct Chosen {
    pub(super) id: u32,
    pub(super) logprobs: Option<Box<TokenLogprobs>>,
}

/// What the step's rows say about one sequence.
pub(super) struct Outcome {
    /// Of the next prompt tokens that have no score yet.
    pub(super) scores: Vec<TokenScore>,
    /// The next tokens: as many of its drafts as are right, and one more. Empty where none is sampled.
    pub(super) tokens: Vec<Chosen>,
}

/// One sequence's rows, and who reads them.
struct Turn<'a> {
    sampler: &'a mut Sampler,
    stop_token_ids: &'a [u32],
    logprobs: Option<usize>,
    drafts: Vec<u32>,
    /// Tokens that the answer may still get.
    room: usize,
    /// Its rows that are sampled from, one after the other.
    rows: &'a [f32],
    chosen: Result<Vec<Chosen>, BadLogits>,
}

/// Reads `logits` (`[rows, vocab_size]`), in the order of `plan`, before any of it has been run: one outcome
/// for each part of the plan.
pub(super) fn choose(
    plan: &[Scheduled],
    running: &mut [Sequence<Request>],
    logits: &[f32],
    vocab_size: usize,
) -> Vec<Result<Outcome, BadLogits>> {
    // 1. Whose rows are where.
    let mut place_of = vec![None; running.len()];
    let mut num_rows = 0;
    for (place, part) in plan.iter().enumerate() {
        place_of[part.index] = Some((place, num_rows));
        num_rows += running[part.index].logit_positions(part.num_tokens).len();
    }
    let mut turns: Vec<Option<Turn<'_>>> = plan.iter().map(|_| None).collect();
    let mut scored = Vec::new();
    let mut num_scored = vec![0; plan.len()];
    for (sequence, place) in running.iter_mut().zip(place_of) {
        let Some((place, row)) = place else { continue };
        let num_tokens = plan[place].num_tokens;
        let positions = sequence.logit_positions(num_tokens);
        let samples = sequence.samples_after(num_tokens);
        let drafts = sequence.drafts().to_vec();
        num_scored[place] = positions.len() - if samples { 1 + drafts.len() } else { 0 };
        let tokens = positions.clone().take(num_scored[place]).zip(row..);
        scored.extend(
            tokens.map(|(position, row)| (place, row, sequence.tokens()[position + 1], None)),
        );
        let room = sequence.num_missing_tokens();
        let request = &mut sequence.request;
        let rows = row + num_scored[place]..row + positions.len();
        turns[place] = Some(Turn {
            sampler: &mut request.sampler,
            stop_token_ids: &request.stop_token_ids,
            logprobs: request.logprobs,
            drafts,
            room,
            rows: &logits[rows.start * vocab_size..rows.end * vocab_size],
            chosen: Ok(Vec::new()),
        });
    }
    // 2. Both kinds of work, row by row and sequence by sequence.
    for_each_rows(&mut scored, 1, vocab_size * COSTLY, |_, scored| {
        for (_, row, token, score) in scored {
            *score = score_token(&logits[*row * vocab_size..][..vocab_size], *token);
        }
    });
    let is_costly = |turn: &Turn<'_>| turn.sampler.is_costly() || turn.logprobs.is_some();
    let each = if turns.iter().flatten().any(is_costly) { COSTLY } else { 1 };
    for_each_rows(&mut turns, 1, vocab_size * each, |_, turns| {
        for turn in turns.iter_mut().flatten() {
            turn.chosen = turn.choose(vocab_size);
        }
    });
    // 3. One outcome each.
    scored.sort_by_key(|(place, row, _, _)| (*place, *row));
    let mut scored = scored.into_iter();
    let outcome = |(turn, num_scored): (Option<Turn<'_>>, usize)| {
        let scores: Option<Vec<TokenScore>> =
            scored.by_ref().take(num_scored).map(|(_, _, _, score)| score).collect();
        let tokens = turn.map_or(Ok(Vec::new()), |turn| turn.chosen)?;
        Ok(Outcome { scores: scores.ok_or(BadLogits)?, tokens })
    };
    turns.into_iter().zip(num_scored).map(outcome).collect()
}

impl Turn<'_> {
    /// The tokens that its rows say: each row after the first holds only if the draft before it was right.
    fn choose(&mut self, vocab_size: usize) -> Result<Vec<Chosen>, BadLogits> {
        let mut tokens = Vec::new();
        for row in self.rows.chunks_exact(vocab_size) {
            let id = self.sampler.sample(row)?;
            let logprobs = self.logprobs.and_then(|top| token_logprobs(row, id, top));
            tokens.push(Chosen { id, logprobs: logprobs.map(Box::new) });
            let is_last = tokens.len() >= self.room || self.stop_token_ids.contains(&id);
            if is_last || self.drafts.get(tokens.len() - 1) != Some(&id) {
                break;
            }
        }
        Ok(tokens)
    }
}

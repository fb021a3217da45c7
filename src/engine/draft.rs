//! Guesses at what a sequence says next, for nothing: most answers repeat parts of their prompt or of
//! themselves.
//!
//! The last few tokens are looked up in the sequence; what followed them there is the guess. A step runs
//! the guessed tokens behind the last one and sees at each whether the model agrees: as many are kept as
//! agree. What is kept was chosen by the sampler from the model's own logits, so that answers are those
//! without guesses, greedy ones and sampled ones alike.
//!
//! How many tokens are guessed follows from how many were right so far.
//!
//! Knows token ids only.

/// Tokens that must match, most first: the longer the match, the better the guess.
const MATCH_LENGTHS: [usize; 3] = [4, 3, 2];
/// Weight of the newest step in the share of right guesses.
const NEWEST: f32 = 0.25;
/// Below this share, guessing pauses.
const LEAST_SHARE: f32 = 0.15;
/// Steps without a guess, before another is tried.
const PAUSE: usize = 16;

/// One sequence's guesses, and how good they were.
#[derive(Debug)]
pub(super) struct Drafter {
    /// Share of guessed tokens that were right, of late.
    share: f32,
    /// Steps until the next guess.
    pause: usize,
}

impl Drafter {
    pub(super) fn new() -> Self {
        Self { share: 0.5, pause: 0 }
    }

    /// Guesses at most `max_tokens` tokens that follow `tokens`.
    pub(super) fn propose(&mut self, tokens: &[u32], max_tokens: usize) -> Vec<u32> {
        if max_tokens == 0 {
            return Vec::new();
        }
        if self.pause > 0 {
            self.pause -= 1;
            return Vec::new();
        }
        // A share of a half is worth all the tokens that may be guessed, a tenth hardly one.
        let num_tokens = (2.0 * self.share * max_tokens as f32).ceil() as usize;
        look_up(tokens, num_tokens.clamp(1, max_tokens)).to_vec()
    }

    /// Of `num_tokens` guessed tokens, `num_right` were right.
    pub(super) fn learn(&mut self, num_tokens: usize, num_right: usize) {
        if num_tokens == 0 {
            return;
        }
        self.share += NEWEST * (num_right as f32 / num_tokens as f32 - self.share);
        if self.share < LEAST_SHARE {
            // The next guess is a short one, and counts again.
            (self.pause, self.share) = (PAUSE, LEAST_SHARE);
        }
    }
}

/// At most `num_tokens` tokens that followed the latest earlier occurrence of the last tokens.
fn look_up(tokens: &[u32], num_tokens: usize) -> &[u32] {
    for length in MATCH_LENGTHS {
        if tokens.len() <= length {
            continue;
        }
        let (earlier, last) = (&tokens[..tokens.len() - 1], &tokens[tokens.len() - length..]);
        if let Some(start) = earlier.windows(length).rposition(|window| window == last) {
            let next = start + length;
            return &tokens[next..(next + num_tokens).min(tokens.len())];
        }
    }
    &[]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_match_wins_and_then_the_latest() {
        // 2 3 is followed by 9 later, but 1 2 3 only by 4.
        assert_eq!(look_up(&[1, 2, 3, 4, 5, 2, 3, 9, 1, 2, 3], 2), [4, 5]);
        assert_eq!(look_up(&[2, 3, 4, 2, 3, 5, 2, 3], 1), [5]);
        // No further than the end, and never without two equal tokens.
        assert_eq!(look_up(&[7, 7, 7], 8), [7]);
        assert!(look_up(&[1, 2, 3, 1], 8).is_empty());
        assert!(look_up(&[1], 8).is_empty());
    }

    #[test]
    fn guesses_grow_while_they_are_right_and_pause_when_they_are_not() {
        let tokens: Vec<u32> = (0..40).map(|i| i % 20).collect();
        let mut drafter = Drafter::new();
        assert_eq!(drafter.propose(&tokens, 8).len(), 8);
        let mut guessed = 0;
        for _ in 0..10 {
            let proposed = drafter.propose(&tokens, 8).len();
            guessed += proposed;
            drafter.learn(proposed, 0);
        }
        // 8, 6, 5, 4, 3, and then nothing for a while.
        assert!(guessed < 35, "{guessed}");
        assert_eq!(drafter.propose(&tokens, 8).len(), 0);
        (0..PAUSE).for_each(|_| drop(drafter.propose(&tokens, 8)));
        let probe = drafter.propose(&tokens, 8).len();
        assert!((1..=3).contains(&probe), "{probe}");
        (0..10).for_each(|_| drafter.learn(3, 3));
        assert_eq!(drafter.propose(&tokens, 8).len(), 8);
    }
}

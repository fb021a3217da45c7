//! Which rows of a step a sequence reads.

use super::{super::blocks::BlockManager, *};

fn sequence(prompt: usize, max_tokens: usize, score_prompt: bool) -> Sequence<()> {
    let prompt = (0..prompt as u32).collect();
    let params = SequenceParams {
        prompt,
        max_tokens,
        score_prompt,
        adapter_key: 0,
        root: None,
        priority: 0,
    };
    let rank = Rank { priority: 0, age: 0 };
    Sequence::new(params, rank, BlockManager::new(0, 1).table(), ())
}

const SCORE: TokenScore = TokenScore { logprob: 0.0, is_argmax: true };

#[test]
fn only_the_last_chunk_of_a_prompt_needs_a_logit_row() {
    let mut sequence = sequence(10, 3, false);
    assert!(sequence.logit_positions(4).is_empty());
    sequence.advance(4);
    assert_eq!(sequence.logit_positions(6), 9..10);
    sequence.advance(6);
    sequence.push(7);
    assert_eq!(sequence.logit_positions(1), 10..11);
}

#[test]
fn chunks_cover_each_scored_position_once() {
    let mut sequence = sequence(5, 0, true);
    assert_eq!(sequence.logit_positions(2), 0..2);
    sequence.push_score(SCORE);
    sequence.push_score(SCORE);
    sequence.advance(2);
    assert_eq!(sequence.logit_positions(3), 2..4);
    assert_eq!(sequence.take_complete_scores(), None);
    sequence.push_score(SCORE);
    sequence.push_score(SCORE);
    assert_eq!(sequence.take_complete_scores(), Some(vec![SCORE; 4]));
    assert_eq!(sequence.take_complete_scores(), None);
}

#[test]
fn a_refilled_prompt_is_not_scored_again() {
    let mut sequence = sequence(5, 2, true);
    assert_eq!(sequence.logit_positions(3), 0..3);
    (0..3).for_each(|_| sequence.push_score(SCORE));
    sequence.advance(3);
    sequence.reset_cache();
    assert!(sequence.logit_positions(2).is_empty());
    assert_eq!(sequence.logit_positions(5), 3..5);
    sequence.push_score(SCORE);
    assert!(sequence.take_complete_scores().is_some());
    sequence.advance(5);
    sequence.push(9);
    sequence.reset_cache();
    assert!(sequence.logit_positions(5).is_empty());
    assert_eq!(sequence.logit_positions(6), 5..6);
}

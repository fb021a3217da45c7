//! The generator behind the bundled tiny base model and the demo: kitchen talk from word lists.
//! What it does: writes chat rows, the same ones for the same seed on every machine. What it knows:
//! words, lines of recipes and exercises about them. What it must never know: tokens and models.
//!
//! Copying from the prompt is the skill a base must bring to the demo's task, so more than half of
//! the foods are invented words, which cannot be learned by heart, and foods of the test rows are
//! held out from everything else.

mod chat;
mod demo;
mod exercises;
mod line;
mod rng;
mod words;

use serde_json::{Value, json};

use line::Pantry;
use rng::Rng;

/// A kind of chat rows of the base corpus. In training [`copies_of_tokens`] come first, then all
/// three mixed, then [`Stage::Kitchen`] alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Copies of the kitchen's words.
    Copying,
    /// All exercises.
    Kitchen,
}

/// A part of the demo's dataset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// Rows to train on.
    Train,
    /// Rows for the validation loss; the same kinds of foods as in training.
    Valid,
    /// Rows to be judged by; about half of their foods occur nowhere else.
    Test,
}

/// `num_rows` chat rows (`{"messages": [...]}`) of the base corpus.
#[must_use]
pub fn corpus(stage: Stage, num_rows: usize, seed: u64) -> Vec<Value> {
    let mut rng = Rng::new(seed ^ ((stage as u64 + 1) << 32));
    let exercise = match stage {
        Stage::Copying => exercises::copying,
        Stage::Kitchen => exercises::kitchen,
    };
    (0..num_rows).map(|_| exercise(&mut rng).into_row()).collect()
}

/// `num_rows` prompt/completion rows in which the same 3 to 12 tokens are repeated one to four
/// times. Of `tokens` (texts of single tokens) only words that end in a space are used: whatever
/// follows, they are read as the tokens they are.
///
/// This is the shortest way to find out that what followed a token will follow it again: every
/// token is as likely as every other, so that nothing else can be learned. Words of several tokens
/// and the frame of a chat hold that back for a long time.
///
/// # Panics
/// If no token is a word that ends in a space.
#[must_use]
pub fn copies_of_tokens(tokens: &[String], num_rows: usize, seed: u64) -> Vec<Value> {
    let letters = |word: &str| word.len() > 1 && word.chars().all(|c| c.is_ascii_alphabetic());
    let words: Vec<&str> = tokens
        .iter()
        .filter(|text| text.strip_suffix(' ').is_some_and(letters))
        .map(String::as_str)
        .collect();
    let mut rng = Rng::new(seed);
    let row = |_| {
        let count = rng.between(3, 12);
        let text: String = (0..count).map(|_| rng.pick(&words)).collect();
        let times = if count > 6 { rng.between(1, 3) } else { rng.between(2, 4) };
        json!({"prompt": text, "completion": format!("\n{text}").repeat(times)})
    };
    (0..num_rows).map(row).collect()
}

/// `num_rows` chat rows of the demo's task.
#[must_use]
pub fn recipe_assistant(split: Split, num_rows: usize, seed: u64) -> Vec<Value> {
    let mut rng = Rng::new(seed ^ ((split as u64 + 11) << 32));
    let pantry = match split {
        // Names that cannot be known by heart teach the adapter to read them off the line.
        Split::Train | Split::Valid => Pantry::Invented,
        Split::Test => Pantry::HeldOut,
    };
    (0..num_rows).map(|_| demo::recipe_row(&mut rng, pantry).into_row()).collect()
}

/// `num_rows` rows of the demo's task about foods of the list only, for the tokenizer to learn from.
#[must_use]
pub fn plain_recipes(num_rows: usize, seed: u64) -> Vec<Value> {
    let mut rng = Rng::new(seed ^ (11 << 32));
    (0..num_rows).map(|_| demo::recipe_row(&mut rng, Pantry::Known).into_row()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(rows: &[Value]) -> Vec<String> {
        let text: String = rows.iter().map(Value::to_string).collect();
        let text = text.replace("\\n", " ");
        text.split(|c: char| !c.is_alphabetic()).map(str::to_lowercase).collect()
    }

    #[test]
    fn the_same_seed_writes_the_same_rows_and_another_seed_others() {
        for stage in [Stage::Copying, Stage::Kitchen] {
            assert_eq!(corpus(stage, 40, 7), corpus(stage, 40, 7));
            assert_ne!(corpus(stage, 40, 7), corpus(stage, 40, 8));
        }
        assert_eq!(recipe_assistant(Split::Test, 40, 7), recipe_assistant(Split::Test, 40, 7));
        assert_ne!(recipe_assistant(Split::Valid, 40, 7), recipe_assistant(Split::Train, 40, 7));
    }

    #[test]
    fn held_out_foods_occur_in_test_rows_only() {
        let held_out =
            |rows: &[Value]| words(rows).iter().filter(|word| line::held_out_word(word)).count();
        assert_eq!(held_out(&corpus(Stage::Copying, 1500, 1)), 0);
        assert_eq!(held_out(&corpus(Stage::Kitchen, 1500, 1)), 0);
        assert_eq!(held_out(&recipe_assistant(Split::Train, 1500, 1)), 0);
        assert_eq!(held_out(&recipe_assistant(Split::Valid, 300, 1)), 0);
        assert!(held_out(&recipe_assistant(Split::Test, 200, 1)) > 300);
    }

    #[test]
    fn a_copy_consists_of_whole_tokens_and_is_repeated_word_for_word() {
        let tokens = ["red ", "pan ", "soup", "; ", "x "].map(str::to_owned);
        for row in copies_of_tokens(&tokens, 50, 1) {
            let prompt = row["prompt"].as_str().unwrap();
            let completion = row["completion"].as_str().unwrap();
            assert!(prompt.split_terminator(' ').all(|word| word == "red" || word == "pan"));
            let copies: Vec<&str> = completion.split('\n').skip(1).collect();
            assert!(!copies.is_empty() && copies.iter().all(|copy| *copy == prompt));
        }
    }

    #[test]
    fn the_answer_of_a_recipe_is_a_json_list_of_names_that_stand_in_its_lines() {
        for row in recipe_assistant(Split::Test, 200, 3) {
            let content = |i: usize| row["messages"][i]["content"].as_str().unwrap();
            let names: Vec<String> = serde_json::from_str(content(2)).unwrap();
            let list = content(1).split("Ingredients: ").nth(1).unwrap();
            let list = list.split("\n\nGeneric").next().unwrap();
            let lines: Vec<String> = serde_json::from_str(list).unwrap();
            assert_eq!(names.len(), lines.len());
            assert!(names.iter().zip(&lines).all(|(name, line)| line.contains(name)));
        }
    }

    #[test]
    fn the_base_corpus_never_answers_in_the_form_of_the_demo() {
        for row in corpus(Stage::Kitchen, 1500, 5) {
            for message in row["messages"].as_array().unwrap() {
                let content = message["content"].as_str().unwrap();
                assert!(message["role"] != "assistant" || !content.starts_with('['), "{content}");
            }
        }
    }
}

//! The recipe assistant: the fine-tuning task of the demo.

use super::chat::Chat;
use super::exercises::title;
use super::line::{Line, Pantry};
use super::rng::Rng;

const SYSTEM: &str = "Extract the generic ingredients from the recipe. Answer with a JSON list of names, in the order given.";

/// One row: a recipe's lines in, the JSON list of their generic names out.
pub(super) fn recipe_row(rng: &mut Rng, pantry: Pantry) -> Chat {
    let lines: Vec<Line> = (0..rng.between(3, 6)).map(|_| Line::random(rng, pantry)).collect();
    let texts = json_list(lines.iter().map(|line| line.text.as_str()));
    let mut chat = Chat::default();
    chat.system(SYSTEM);
    chat.turn(
        format!("{}\n\nIngredients: {texts}\n\nGeneric ingredients:", title(rng)),
        json_list(lines.iter().map(|line| line.food.as_str())),
    );
    chat
}

/// `["flour", "sugar"]`; no word of the kitchen needs an escape.
fn json_list<'a>(items: impl Iterator<Item = &'a str>) -> String {
    let quoted: Vec<String> = items.map(|item| format!("\"{item}\"")).collect();
    format!("[{}]", quoted.join(", "))
}

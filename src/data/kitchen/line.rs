//! One line of a recipe and the food it is about.

use super::rng::Rng;
use super::words::{
    CODAS, CUTS, FOODS, HELD_OUT_FOODS, KINDS, MANNERS, NUCLEI, ONSETS, REMARKS, SIZES, UNITS,
    VAGUE,
};

/// Where the foods of a text come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pantry {
    /// Foods of the list, and at least as many invented ones: the base corpus, where names must be
    /// read off the line because they cannot be known.
    Invented,
    /// Foods of the list.
    Known,
    /// Foods of the list and, in half of the cases, held-out ones.
    HeldOut,
}

/// An ingredient line as a cook writes it, and the generic name in it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Line {
    /// `2 cups red lentils, rinsed (optional)`
    pub(super) text: String,
    /// `red lentils`
    pub(super) food: String,
}

impl Line {
    /// A random line about a food from `pantry`.
    pub(super) fn random(rng: &mut Rng, pantry: Pantry) -> Self {
        let food = food(rng, pantry);
        let mut text = quantity(rng);
        if rng.chance(15) {
            push(&mut text, rng.pick(SIZES));
        }
        if rng.chance(15) {
            push(&mut text, &cut(rng, &CUTS[..24]));
        }
        push(&mut text, &food);
        if rng.chance(6) {
            text.push_str(&format!(" ({})", aside(rng)));
        }
        match rng.between(0, 19) {
            0..9 => {}
            9..15 => text.push_str(&format!(", {}", cut(rng, CUTS))),
            15 => text.push_str(&format!(", {} and {}", cut(rng, CUTS), cut(rng, CUTS))),
            16..19 => text.push_str(&format!(", {}", rng.pick(REMARKS))),
            _ => text.push_str(&format!(" {}", rng.pick(&REMARKS[3..6]))),
        }
        Self { text, food }
    }
}

/// A food's generic name: often with a kind (`red`), sometimes of several words.
pub(super) fn food(rng: &mut Rng, pantry: Pantry) -> String {
    let name = match pantry {
        Pantry::Invented if rng.chance(60) => invented_food(rng),
        Pantry::HeldOut if rng.chance(50) => rng.pick(HELD_OUT_FOODS).to_owned(),
        Pantry::Invented | Pantry::Known | Pantry::HeldOut => rng.pick(FOODS).to_owned(),
    };
    if rng.chance(25) { format!("{} {name}", rng.pick(KINDS)) } else { name }
}

/// A word of one to three syllables that is no held-out food.
pub(super) fn invented_word(rng: &mut Rng) -> String {
    loop {
        let mut word = String::new();
        for _ in 0..[1, 2, 2, 2, 2, 3][rng.between(0, 5)] {
            word.push_str(rng.pick(ONSETS));
            word.push_str(rng.pick(NUCLEI));
        }
        word.push_str(rng.pick(CODAS));
        if word.len() > 2 && !held_out_word(&word) {
            return word;
        }
    }
}

/// Whether `word` belongs to a held-out food.
pub(super) fn held_out_word(word: &str) -> bool {
    HELD_OUT_FOODS.iter().any(|food| food.split(' ').any(|part| part == word))
}

fn invented_food(rng: &mut Rng) -> String {
    let mut name = invented_word(rng);
    if rng.chance(25) {
        push(&mut name, &invented_word(rng));
    } else if rng.chance(15) {
        push(&mut name, rng.pick(FOODS));
    }
    name
}

/// `2 cups`, `400g/14oz`, `a pinch of`, `1 (14 oz) can`, or nothing.
fn quantity(rng: &mut Rng) -> String {
    match rng.between(0, 19) {
        0..9 => {
            let of = if rng.chance(15) { " of" } else { "" };
            format!("{} {}{of}", number(rng), rng.pick(UNITS))
        }
        9..13 => number(rng),
        13..15 => {
            let (grams, ounces) = (rng.between(1, 99) * 10, rng.between(1, 32));
            match rng.between(0, 3) {
                0 => format!("{grams}g"),
                1 => format!("{grams} g"),
                2 => format!("{grams}ml/{ounces}fl oz"),
                _ => format!("{grams}g/{ounces}oz"),
            }
        }
        15 => format!("{} ({} {})", number(rng), aside(rng), rng.pick(UNITS)),
        16..19 => rng.pick(VAGUE).to_owned(),
        _ => String::new(),
    }
}

fn number(rng: &mut Rng) -> String {
    let small = rng.between(1, 9);
    match rng.between(0, 9) {
        0..5 => small.to_string(),
        5 => rng.between(10, 60).to_string(),
        6 => format!("{small} 1/{}", rng.between(2, 4)),
        7 => rng.pick(&["1/2", "1/3", "1/4", "2/3", "3/4", "1/8"]).to_owned(),
        8 => rng.pick(&["½", "¼", "¾", "1½", "2½", "1¼"]).to_owned(),
        _ => format!("{small}-{}", small + 1),
    }
}

fn aside(rng: &mut Rng) -> String {
    let unit = rng.pick(&["oz", "ounces", "g", "grams", "ml", "cups"]);
    match rng.between(0, 3) {
        0 => format!("about {} {unit}", number(rng)),
        1 => format!("{} {unit} each", number(rng)),
        _ => format!("{} {unit}", number(rng)),
    }
}

fn cut(rng: &mut Rng, cuts: &[&str]) -> String {
    let cut = rng.pick(cuts);
    if !cut.contains(' ') && rng.chance(35) {
        format!("{} {cut}", rng.pick(MANNERS))
    } else {
        cut.to_owned()
    }
}

fn push(text: &mut String, word: &str) {
    if !text.is_empty() {
        text.push(' ');
    }
    text.push_str(word);
}

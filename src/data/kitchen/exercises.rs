//! The exercises of the base corpus: copying first, then the small skills of a kitchen assistant.
//! None of them asks for a JSON list; that form is left to the fine-tuning task.

use super::chat::Chat;
use super::line::{Line, Pantry, food, invented_word};
use super::rng::Rng;
use super::words::{CUTS, DISHES, FACTS, FOODS, KINDS, MANNERS, MOODS, PLAIN, SIZES, UNITS};

/// Characters of a row's messages, at least; short rows keep the copies dense.
const SHORT_ROW: usize = 360;

/// Characters of the few long rows, as long as a prompt with three examples.
const LONG_ROW: usize = 1_300;

/// A row of copies of the kitchen's words.
pub(super) fn copying(rng: &mut Rng) -> Chat {
    copies(rng, known_word)
}

/// A row of copies of anything: names nobody has seen, numbers, words.
fn copying_anything(rng: &mut Rng) -> Chat {
    copies(rng, any_word)
}

fn copies(rng: &mut Rng, word: fn(&mut Rng) -> String) -> Chat {
    let mut chat = Chat::default();
    while chat.num_chars() < 200 {
        let words: Vec<String> = (0..rng.between(3, 10)).map(|_| word(rng)).collect();
        let words = words.join(rng.pick(&[" ", " ", " ", " ", ", ", "\n"]));
        add_copies(&mut chat, &words, rng.between(1, 4));
    }
    chat
}

fn add_copies(chat: &mut Chat, words: &str, times: usize) {
    let user = match times {
        1 => format!("Say: {words}"),
        _ => format!("Say {times} times: {words}"),
    };
    chat.turn(user, vec![words; times].join("\n"));
}

fn known_word(rng: &mut Rng) -> String {
    let lists = [FOODS, FOODS, KINDS, UNITS, PLAIN, CUTS, SIZES, MANNERS, DISHES, MOODS];
    let list = lists[rng.between(0, lists.len() - 1)];
    rng.pick(list).to_owned()
}

fn any_word(rng: &mut Rng) -> String {
    match rng.between(0, 9) {
        0..6 => invented_word(rng),
        6 => rng.between(1, 99).to_string(),
        _ => known_word(rng),
    }
}

/// A row of one to some exercises, mostly about ingredient lines.
pub(super) fn kitchen(rng: &mut Rng) -> Chat {
    let mut chat = Chat::default();
    let length = if rng.chance(4) { LONG_ROW } else { SHORT_ROW };
    match rng.between(0, 99) {
        0..8 => return copying_anything(rng),
        8..40 => same_form(rng, &mut chat, length),
        40..82 => lists(rng, &mut chat, length),
        _ => {
            while chat.num_chars() < length {
                let (user, assistant) = match rng.between(0, 11) {
                    0..5 => which_food(rng),
                    5..7 => shopping_list(rng),
                    7 => nth_line(rng),
                    8 => repeat_lines(rng),
                    9 => count_lines(rng),
                    10 => recipe(rng),
                    _ => fact(rng),
                };
                chat.turn(user, assistant);
            }
        }
    }
    chat
}

/// A system prompt asks for the food; then every message is a line.
fn same_form(rng: &mut Rng, chat: &mut Chat, length: usize) {
    chat.system(rng.pick(&[
        "Name the food in each line.",
        "For each line, say which food it needs.",
        "Answer with the ingredient only, without quantity.",
    ]));
    while chat.num_chars() < length {
        let line = Line::random(rng, Pantry::Invented);
        chat.turn(line.text, line.food);
    }
}

/// Whole ingredient lists in, names out, in one of several forms.
fn lists(rng: &mut Rng, chat: &mut Chat, length: usize) {
    while chat.num_chars() < length {
        let (user, assistant) = shopping_list(rng);
        chat.turn(user, assistant);
    }
}

fn which_food(rng: &mut Rng) -> (String, String) {
    let line = Line::random(rng, Pantry::Invented);
    let user = match rng.between(0, 3) {
        0 => format!("Which food is in this line?\n{}", line.text),
        1 => format!("{}\nWhat do I need to buy?", line.text),
        2 => format!("Food: \"{}\"", line.text),
        _ => format!("What is the ingredient in \"{}\"?", line.text),
    };
    (user, line.food)
}

fn shopping_list(rng: &mut Rng) -> (String, String) {
    let lines = some_lines(rng, 2, 6);
    let texts: Vec<&str> = lines.iter().map(|line| line.text.as_str()).collect();
    let written = match rng.between(0, 4) {
        0 => format!("- {}", texts.join("\n- ")),
        1 => format!("\"{}\"", texts.join("\", \"")),
        2 => format!("[\"{}\"]", texts.join("\", \"")),
        3 => numbered(&texts),
        _ => texts.join("\n"),
    };
    let written = if rng.chance(30) { format!("{}\n{written}", title(rng)) } else { written };
    let foods: Vec<&str> = lines.iter().map(|line| line.food.as_str()).collect();
    let (ask, answer) = match rng.between(0, 3) {
        0 | 1 => ("Shopping list:", format!("- {}", foods.join("\n- "))),
        2 => ("Number the foods:", numbered(&foods)),
        _ => ("Foods, one a line:", foods.join("\n")),
    };
    match rng.chance(50) {
        true => (format!("{ask}\n{written}"), answer),
        false => (format!("{written}\n\n{ask}"), answer),
    }
}

fn nth_line(rng: &mut Rng) -> (String, String) {
    let lines = some_lines(rng, 2, 5);
    let chosen = rng.between(0, lines.len() - 1);
    let ordinal = ["first", "second", "third", "fourth", "fifth"][chosen];
    let texts: Vec<&str> = lines.iter().map(|line| line.text.as_str()).collect();
    (format!("{}\n\nSay the {ordinal} line.", texts.join("\n")), lines[chosen].text.clone())
}

fn repeat_lines(rng: &mut Rng) -> (String, String) {
    let lines = some_lines(rng, 1, 3);
    let texts: Vec<String> = lines.into_iter().map(|line| format!("\"{}\"", line.text)).collect();
    let text = texts.join(rng.pick(&[", ", "\n", "; "]));
    (format!("Repeat: {text}"), text)
}

fn count_lines(rng: &mut Rng) -> (String, String) {
    let lines = some_lines(rng, 1, 5);
    let texts: Vec<&str> = lines.iter().map(|line| line.text.as_str()).collect();
    (format!("{}\n\nHow many lines?", texts.join("\n")), lines.len().to_string())
}

fn recipe(rng: &mut Rng) -> (String, String) {
    let (first, second) = (food(rng, Pantry::Invented), food(rng, Pantry::Invented));
    let dish = rng.pick(DISHES);
    let answer = match rng.between(0, 2) {
        0 => format!("Cook the {first} gently, add the {second} and serve hot."),
        1 => format!("Mix {first} and {second}, then bake for {} minutes.", rng.between(2, 9) * 5),
        _ => format!("Heat the {second}, stir in the {first} and wait until it is done."),
    };
    (format!("How do I make {dish} with {first} and {second}?"), answer)
}

fn fact(rng: &mut Rng) -> (String, String) {
    let (question, answer) = FACTS[rng.between(0, FACTS.len() - 1)];
    (question.to_owned(), answer.to_owned())
}

/// `Title: easy soup`, sometimes with a food in it.
pub(super) fn title(rng: &mut Rng) -> String {
    let (mood, dish) = (rng.pick(MOODS), rng.pick(DISHES));
    match rng.chance(25) {
        true => format!("Title: {mood} {} {dish}", rng.pick(FOODS)),
        false => format!("Title: {mood} {dish}"),
    }
}

fn some_lines(rng: &mut Rng, low: usize, high: usize) -> Vec<Line> {
    (0..rng.between(low, high)).map(|_| Line::random(rng, Pantry::Invented)).collect()
}

fn numbered(items: &[&str]) -> String {
    let lines: Vec<String> =
        items.iter().enumerate().map(|(i, item)| format!("{}. {item}", i + 1)).collect();
    lines.join("\n")
}

//! How the similarity metrics cut a text into words.

/// mteval's tokenizer "13a", with which BLEU scores are comparable between papers (Post, "A Call for
/// Clarity in Reporting BLEU Scores", 2018): punctuation is split off, except within numbers.
pub(super) fn tokens_13a(text: &str) -> Vec<String> {
    let text = text.replace("<skipped>", "").replace("-\n", "").replace('\n', " ");
    let text = text
        .replace("&quot;", "\"")
        .replace("&amp;", "&")
        .replace("&lt;", "<")
        .replace("&gt;", ">");
    let mut spaced: Vec<char> = vec![' '];
    for c in text.trim_end().chars() {
        if is_split_off(c) {
            spaced.extend([' ', c, ' ']);
        } else {
            spaced.push(c);
        }
    }
    spaced.push(' ');
    let is_mark = |c: char| matches!(c, '.' | ',');
    let is_digit = |c: char| c.is_ascii_digit();
    // Period and comma, unless a digit stands before; then, unless one stands behind.
    spaced = respaced(&spaced, |a, b| !is_digit(a) && is_mark(b), |a, b| vec![a, ' ', b, ' ']);
    spaced = respaced(&spaced, |a, b| is_mark(a) && !is_digit(b), |a, b| vec![' ', a, ' ', b]);
    spaced = respaced(&spaced, |a, b| is_digit(a) && b == '-', |a, b| vec![a, ' ', b, ' ']);
    let text: String = spaced.into_iter().collect();
    text.split_whitespace().map(str::to_owned).collect()
}

/// The words of `rouge_score`: lower case, and only what is made of `a-z` and `0-9`.
pub(super) fn tokens_rouge(text: &str) -> Vec<String> {
    let text = text.to_lowercase();
    text.split(|c: char| !c.is_ascii_lowercase() && !c.is_ascii_digit())
        .filter(|word| !word.is_empty())
        .map(str::to_owned)
        .collect()
}

fn is_split_off(c: char) -> bool {
    matches!(c, '{'..='~' | '['..='`' | ' '..='&' | '('..='+' | ':'..='@' | '/')
}

/// Replaces every pair of neighbours that `wanted` names, from left to right, none twice.
fn respaced(
    chars: &[char],
    wanted: impl Fn(char, char) -> bool,
    replacement: impl Fn(char, char) -> Vec<char>,
) -> Vec<char> {
    let (mut result, mut at) = (Vec::with_capacity(chars.len() + 16), 0);
    while at < chars.len() {
        match chars.get(at + 1) {
            Some(&next) if wanted(chars[at], next) => {
                result.extend(replacement(chars[at], next));
                at += 2;
            }
            _ => {
                result.push(chars[at]);
                at += 1;
            }
        }
    }
    result
}

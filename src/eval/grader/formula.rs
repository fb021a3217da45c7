//! The `calculate_output` of a `multi` grader: arithmetic over named scores, and nothing else.
//!
//! `sum = product (("+" | "-") product)*`, `product = sign (("*" | "/") sign)*`,
//! `sign = "-"* power`, `power = atom ("^" sign)?`,
//! `atom = number | name | function "(" sum ("," sum)* ")" | "(" sum ")"`.

/// Characters that a formula may have; nesting cannot go deeper than this either.
const MAX_CHARS: usize = 2000;
/// Parentheses, signs and powers within each other.
const MAX_DEPTH: usize = 64;

/// A function: its name, how many arguments it takes, and what it does with them.
type Function = (&'static str, std::ops::RangeInclusive<usize>, fn(&[f64]) -> f64);

/// Every function.
const FUNCTIONS: &[Function] = &[
    ("min", 1..=32, |values| values.iter().copied().fold(f64::INFINITY, f64::min)),
    ("max", 1..=32, |values| values.iter().copied().fold(f64::NEG_INFINITY, f64::max)),
    ("abs", 1..=1, |values| values[0].abs()),
    ("floor", 1..=1, |values| values[0].floor()),
    ("ceil", 1..=1, |values| values[0].ceil()),
    ("exp", 1..=1, |values| values[0].exp()),
    ("ln", 1..=1, |values| values[0].ln()),
    ("log", 1..=1, |values| values[0].ln()),
    ("sqrt", 1..=1, |values| values[0].sqrt()),
];

/// A formula that can be evaluated.
#[derive(Debug, Clone, PartialEq)]
pub struct Formula(Node);

#[derive(Debug, Clone, PartialEq)]
enum Node {
    Number(f64),
    Name(String),
    Negative(Box<Node>),
    Binary(char, Box<Node>, Box<Node>),
    /// Index in [`FUNCTIONS`].
    Call(usize, Vec<Node>),
}

impl Formula {
    /// Reads a formula.
    ///
    /// # Errors
    /// What is wrong, and at which character.
    pub fn parse(text: &str) -> Result<Self, String> {
        let chars: Vec<char> = text.chars().collect();
        if chars.len() > MAX_CHARS {
            return Err(format!("the formula has more than {MAX_CHARS} characters"));
        }
        let mut parser = Parser { chars, at: 0, depth: 0 };
        let node = parser.sum()?;
        match parser.peek() {
            None => Ok(Self(node)),
            Some(other) => Err(parser.wrong(&format!("unexpected `{other}`"))),
        }
    }

    /// The names that it uses, each once.
    #[must_use]
    pub fn names(&self) -> Vec<&str> {
        let mut names = Vec::new();
        collect_names(&self.0, &mut names);
        names
    }

    /// Its value, where `value` knows the names.
    ///
    /// # Errors
    /// An unknown name, or a value that is no finite number (a division by zero).
    pub fn evaluate(&self, value: &dyn Fn(&str) -> Option<f64>) -> Result<f64, String> {
        let result = evaluate(&self.0, value)?;
        if result.is_finite() {
            Ok(result)
        } else {
            Err(format!("the formula's value is {result}, not a finite number"))
        }
    }
}

fn collect_names<'a>(node: &'a Node, names: &mut Vec<&'a str>) {
    match node {
        Node::Number(_) => {}
        Node::Name(name) => {
            if !names.contains(&name.as_str()) {
                names.push(name);
            }
        }
        Node::Negative(inner) => collect_names(inner, names),
        Node::Binary(_, left, right) => {
            collect_names(left, names);
            collect_names(right, names);
        }
        Node::Call(_, arguments) => {
            arguments.iter().for_each(|argument| collect_names(argument, names));
        }
    }
}

fn evaluate(node: &Node, value: &dyn Fn(&str) -> Option<f64>) -> Result<f64, String> {
    Ok(match node {
        Node::Number(number) => *number,
        Node::Name(name) => {
            value(name).ok_or_else(|| format!("the formula names `{name}`, which has no score"))?
        }
        Node::Negative(inner) => -evaluate(inner, value)?,
        Node::Binary(operator, left, right) => {
            let (left, right) = (evaluate(left, value)?, evaluate(right, value)?);
            match operator {
                '+' => left + right,
                '-' => left - right,
                '*' => left * right,
                '/' => left / right,
                _ => left.powf(right),
            }
        }
        Node::Call(function, arguments) => {
            let arguments: Result<Vec<f64>, String> =
                arguments.iter().map(|argument| evaluate(argument, value)).collect();
            FUNCTIONS[*function].2(&arguments?)
        }
    })
}

/// Where the reading is.
struct Parser {
    chars: Vec<char>,
    at: usize,
    depth: usize,
}

impl Parser {
    fn sum(&mut self) -> Result<Node, String> {
        let mut left = self.product()?;
        while let Some(operator @ ('+' | '-')) = self.peek() {
            self.at += 1;
            left = Node::Binary(operator, Box::new(left), Box::new(self.product()?));
        }
        Ok(left)
    }

    fn product(&mut self) -> Result<Node, String> {
        let mut left = self.sign()?;
        while let Some(operator @ ('*' | '/')) = self.peek() {
            self.at += 1;
            left = Node::Binary(operator, Box::new(left), Box::new(self.sign()?));
        }
        Ok(left)
    }

    /// Every way to go deeper leads through here.
    fn sign(&mut self) -> Result<Node, String> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(self.wrong("nested too deeply"));
        }
        let node = if self.takes('-') {
            Node::Negative(Box::new(self.sign()?))
        } else {
            self.takes('+');
            self.power()?
        };
        self.depth -= 1;
        Ok(node)
    }

    fn power(&mut self) -> Result<Node, String> {
        let base = self.atom()?;
        if self.takes('^') {
            return Ok(Node::Binary('^', Box::new(base), Box::new(self.sign()?)));
        }
        Ok(base)
    }

    fn atom(&mut self) -> Result<Node, String> {
        match self.peek() {
            Some('(') => {
                self.at += 1;
                let inner = self.sum()?;
                self.expect(')')?;
                Ok(inner)
            }
            Some(c) if c.is_ascii_digit() || c == '.' => self.number(),
            Some(c) if c.is_ascii_alphabetic() || c == '_' => self.name_or_call(),
            Some(other) => Err(self.wrong(&format!("unexpected `{other}`"))),
            None => Err(self.wrong("the formula ends too early")),
        }
    }

    fn number(&mut self) -> Result<Node, String> {
        let mut text = self.take_while(|c| c.is_ascii_digit() || c == '.');
        if self.chars.get(self.at).is_some_and(|c| matches!(c, 'e' | 'E')) {
            text.push('e');
            self.at += 1;
            if let Some(sign @ ('+' | '-')) = self.chars.get(self.at).copied() {
                text.push(sign);
                self.at += 1;
            }
            text += &self.take_while(|c| c.is_ascii_digit());
        }
        text.parse().map(Node::Number).map_err(|_| self.wrong(&format!("`{text}` is no number")))
    }

    fn name_or_call(&mut self) -> Result<Node, String> {
        let name = self.take_while(|c| c.is_ascii_alphanumeric() || c == '_');
        if !self.takes('(') {
            return Ok(Node::Name(name));
        }
        let Some(index) = FUNCTIONS.iter().position(|function| function.0 == name) else {
            return Err(self.wrong(&format!("there is no function `{name}`")));
        };
        let mut arguments = vec![self.sum()?];
        while self.takes(',') {
            arguments.push(self.sum()?);
        }
        self.expect(')')?;
        if !FUNCTIONS[index].1.contains(&arguments.len()) {
            return Err(self.wrong(&format!("`{name}` does not take {}", arguments.len())));
        }
        Ok(Node::Call(index, arguments))
    }

    fn take_while(&mut self, wanted: impl Fn(char) -> bool) -> String {
        let start = self.at;
        while self.chars.get(self.at).is_some_and(|c| wanted(*c)) {
            self.at += 1;
        }
        self.chars[start..self.at].iter().collect()
    }

    /// The next character that is no white space.
    fn peek(&mut self) -> Option<char> {
        while self.chars.get(self.at).is_some_and(|c| c.is_whitespace()) {
            self.at += 1;
        }
        self.chars.get(self.at).copied()
    }

    fn takes(&mut self, wanted: char) -> bool {
        let found = self.peek() == Some(wanted);
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, wanted: char) -> Result<(), String> {
        if self.takes(wanted) { Ok(()) } else { Err(self.wrong(&format!("expected `{wanted}`"))) }
    }

    fn wrong(&self, what: &str) -> String {
        format!("{what} at character {}", self.at + 1)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn value(text: &str) -> Result<f64, String> {
        let scores = |name: &str| match name {
            "a" => Some(2.0),
            "b_2" => Some(0.5),
            _ => None,
        };
        Formula::parse(text)?.evaluate(&scores)
    }

    #[test]
    fn operators_bind_as_in_arithmetic() {
        for (text, expected) in [
            ("0.5*a + 0.5 * b_2", 1.25),
            ("1 - 2 - 3", -4.0),
            ("12 / 3 / 2", 2.0),
            ("2 + 3 * 4", 14.0),
            ("(2 + 3) * 4", 20.0),
            ("-2 ^ 2", -4.0),
            ("2 ^ 3 ^ 2", 512.0),
            ("2 ^ -1", 0.5),
            ("--a", 2.0),
            ("1.5e1 + .5", 15.5),
            ("min(a, b_2, 7)", 0.5),
            ("max(a, b_2)", 2.0),
            ("abs(-3) + floor(1.7) + ceil(1.2)", 6.0),
            ("ln(exp(2)) + log(1) + sqrt(9)", 5.0),
        ] {
            assert_eq!(value(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_is_no_formula_is_refused_with_its_place() {
        for (text, message) in [
            ("", "ends too early at character 1"),
            ("a +", "ends too early at character 4"),
            ("a b", "unexpected `b` at character 3"),
            ("(a", "expected `)` at character 3"),
            ("system(1)", "no function `system`"),
            ("sqrt(1, 2)", "does not take 2"),
            ("1.2.3", "`1.2.3` is no number"),
            ("a; b", "unexpected `;`"),
            ("c", "names `c`, which has no score"),
            ("1 / 0", "not a finite number"),
            ("ln(-1)", "not a finite number"),
        ] {
            let error = value(text).unwrap_err();
            assert!(error.contains(message), "{text:?}: {error}");
        }
        assert!(value(&"(".repeat(100)).unwrap_err().contains("nested too deeply"));
        assert!(value(&"-".repeat(100)).unwrap_err().contains("nested too deeply"));
        assert!(value(&"1+".repeat(MAX_CHARS)).unwrap_err().contains("characters"));
        assert_eq!(Formula::parse("a + min(b, a)").unwrap().names(), ["a", "b"]);
    }

    /// A random formula as text, with its value.
    fn formula() -> impl Strategy<Value = (String, f64)> {
        let number = (0_u32..1000).prop_map(|n| (format!("{n}"), f64::from(n)));
        let leaf = prop_oneof![number, Just(("a".to_owned(), 2.0)), Just(("b_2".to_owned(), 0.5))];
        leaf.prop_recursive(6, 64, 3, |inner| {
            let pair = (inner.clone(), inner.clone());
            prop_oneof![
                pair.clone().prop_map(|((l, x), (r, y))| (format!("({l} + {r})"), x + y)),
                pair.clone().prop_map(|((l, x), (r, y))| (format!("({l}-({r}))"), x - y)),
                pair.clone().prop_map(|((l, x), (r, y))| (format!("(({l}) * ({r}))"), x * y)),
                pair.clone().prop_map(|((l, x), (r, y))| (format!("max({l}, {r})"), x.max(y))),
                inner.clone().prop_map(|(l, x)| (format!("(-({l}))"), -x)),
                inner.prop_map(|(l, x)| (format!("abs({l})"), x.abs())),
            ]
        })
    }

    proptest! {
        #[test]
        fn a_formula_has_the_value_it_was_made_with((text, expected) in formula()) {
            prop_assume!(expected.is_finite());
            match value(&text) {
                Ok(found) => prop_assert_eq!(found, expected, "{}", text),
                Err(error) => prop_assert!(error.contains("nested"), "{}: {}", text, error),
            }
        }

        #[test]
        fn no_text_at_all_brings_the_parser_down(text in "[-+*/^().,a-z0-9 é]{0,60}") {
            let _ = value(&text);
        }
    }
}

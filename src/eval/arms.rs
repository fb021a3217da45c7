//! Arms: the ways of asking that an evaluation compares.

use std::fmt;

use super::EvalError;

/// One way of asking.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Arm {
    /// The base model, the question alone.
    Base,
    /// The base model after this many solved examples in the prompt.
    FewShot(usize),
    /// The base model with the adapter of this name.
    Tuned(String),
}

/// The adapter's name when it needs none, and the arm that means "the adapter given".
pub const TUNED: &str = "tuned";

/// Whether the arm of this name is one with an adapter.
pub(super) fn is_tuned(name: &str) -> bool {
    name.split(':').next() == Some(TUNED)
}

impl fmt::Display for Arm {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Base => formatter.write_str("base"),
            Self::FewShot(k) => write!(formatter, "fewshot:{k}"),
            Self::Tuned(name) if name == TUNED => formatter.write_str(TUNED),
            Self::Tuned(name) => write!(formatter, "{TUNED}:{name}"),
        }
    }
}

/// Reads a list such as `base,fewshot:3,tuned`. `tuned` stands for all of `adapters`,
/// `tuned:NAME` for one of them.
///
/// # Errors
/// Unknown arms and adapters, an arm named twice, an empty list, `tuned` without an adapter.
pub fn parse_arms(list: &str, adapters: &[String]) -> Result<Vec<Arm>, EvalError> {
    let mut arms = Vec::new();
    for word in list.split(',').map(str::trim).filter(|word| !word.is_empty()) {
        match parse_arm(word)? {
            Arm::Tuned(name) if name == TUNED && !adapters.contains(&name) => {
                if adapters.is_empty() {
                    let message = "the arm \"tuned\" needs an adapter".to_owned();
                    return Err(EvalError::Arms(message));
                }
                arms.extend(adapters.iter().cloned().map(Arm::Tuned));
            }
            Arm::Tuned(name) if !adapters.contains(&name) => {
                let message = format!("the arm {word:?} names no adapter that was given");
                return Err(EvalError::Arms(message));
            }
            arm @ (Arm::Base | Arm::FewShot(_) | Arm::Tuned(_)) => arms.push(arm),
        }
    }
    if arms.is_empty() {
        return Err(EvalError::Arms("no arms to evaluate".to_owned()));
    }
    for (index, arm) in arms.iter().enumerate() {
        if arms[..index].contains(arm) {
            return Err(EvalError::Arms(format!("the arm {arm} is named twice")));
        }
    }
    Ok(arms)
}

fn parse_arm(word: &str) -> Result<Arm, EvalError> {
    let unknown = || EvalError::UnknownArm(word.to_owned());
    match word.split_once(':') {
        None if word == "base" => Ok(Arm::Base),
        None if word == TUNED => Ok(Arm::Tuned(TUNED.to_owned())),
        Some(("fewshot", k)) => match k.parse() {
            Ok(k) if k > 0 => Ok(Arm::FewShot(k)),
            _ => Err(unknown()),
        },
        Some((TUNED, name)) if !name.is_empty() => Ok(Arm::Tuned(name.to_owned())),
        _ => Err(unknown()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arms_are_read_and_written_alike() {
        let adapters = ["tuned".to_owned()];
        let arms = parse_arms("base, fewshot:3,tuned", &adapters).unwrap();
        assert_eq!(arms, [Arm::Base, Arm::FewShot(3), Arm::Tuned("tuned".to_owned())]);
        let names: Vec<String> = arms.iter().map(Arm::to_string).collect();
        assert_eq!(names, ["base", "fewshot:3", "tuned"]);
    }

    #[test]
    fn tuned_stands_for_every_adapter() {
        let adapters = ["a".to_owned(), "b".to_owned()];
        let arms = parse_arms("tuned", &adapters).unwrap();
        assert_eq!(arms, [Arm::Tuned("a".to_owned()), Arm::Tuned("b".to_owned())]);
        assert_eq!(arms[1].to_string(), "tuned:b");
        assert_eq!(parse_arms("tuned:b", &adapters).unwrap(), arms[1..]);
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for (list, message) in [
            ("bass", "unknown arm \"bass\""),
            ("fewshot:0", "unknown arm \"fewshot:0\""),
            ("fewshot", "unknown arm \"fewshot\""),
            ("", "no arms"),
            ("base,base", "the arm base is named twice"),
            ("tuned:c", "\"tuned:c\" names no adapter"),
        ] {
            let error = parse_arms(list, &["a".to_owned()]).unwrap_err().to_string();
            assert!(error.contains(message), "{list:?}: {error}");
        }
        assert!(parse_arms("tuned", &[]).unwrap_err().to_string().contains("needs an adapter"));
    }
}

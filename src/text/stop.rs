//! Stop strings in a stream of text pieces.

/// Finds stop strings in a stream of text pieces; holds back what may still become one.
///
/// The stop string that is complete first ends the text, wherever the pieces are cut; of those that
/// are complete at the same character, the longest.
pub struct StopMatcher {
    stops: Vec<String>,
    /// The longest end of the text so far that begins a stop string.
    held: String,
    matched: Option<String>,
}

/// What a [`StopMatcher`] lets through.
pub struct StopOutput {
    /// Text that may be shown now (never contains a stop string).
    pub text: String,
    /// The stop string that ended the text, if one did.
    pub matched: Option<String>,
}

impl StopMatcher {
    /// A matcher for `stops`; empty strings are ignored.
    pub fn new(stops: &[String]) -> Self {
        let stops = stops.iter().filter(|stop| !stop.is_empty()).cloned().collect();
        Self { stops, held: String::new(), matched: None }
    }

    /// Takes the next piece. After a match, every further piece is swallowed.
    pub fn push(&mut self, piece: &str) -> StopOutput {
        if self.matched.is_some() {
            return StopOutput { text: String::new(), matched: self.matched.clone() };
        }
        self.held.push_str(piece);
        if let Some((start, stop)) = self.first_match() {
            self.matched = Some(stop);
            self.held.truncate(start);
            return StopOutput {
                text: std::mem::take(&mut self.held),
                matched: self.matched.clone(),
            };
        }
        let kept = self.held.split_off(self.held.len() - self.begun_stop_len());
        StopOutput { text: std::mem::replace(&mut self.held, kept), matched: None }
    }

    /// What was held back, when the text ends without a stop.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Start (byte) of the stop string that is complete first, and the string.
    fn first_match(&self) -> Option<(usize, String)> {
        self.stops
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()).map(|start| (start, stop)))
            .min_by_key(|(start, stop)| (start + stop.len(), *start))
            .map(|(start, stop)| (start, stop.clone()))
    }

    /// Length (bytes) of the longest end of `held` that begins a stop string.
    fn begun_stop_len(&self) -> usize {
        let begun = |stop: &String| {
            let longest = self.held.len().min(stop.len() - 1);
            (1..=longest)
                .rev()
                .find(|&len| stop.is_char_boundary(len) && self.held.ends_with(&stop[..len]))
        };
        self.stops.iter().filter_map(begun).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(stops: &[String], pieces: &[&str]) -> (String, Option<String>) {
        let mut matcher = StopMatcher::new(stops);
        let mut shown = String::new();
        for piece in pieces {
            let output = matcher.push(piece);
            shown.push_str(&output.text);
            if output.matched.is_some() {
                assert_eq!(matcher.finish(), "");
                return (shown, output.matched);
            }
        }
        shown.push_str(&matcher.finish());
        (shown, None)
    }

    fn strings(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn a_stop_string_across_pieces_is_found_and_never_shown() {
        let mut matcher = StopMatcher::new(&strings(&["\n\nUser:"]));
        assert_eq!(matcher.push("Hello.\n").text, "Hello.");
        assert_eq!(matcher.push("\nUs").text, "");
        let last = matcher.push("er: next");
        assert_eq!((last.text.as_str(), last.matched.as_deref()), ("", Some("\n\nUser:")));
        assert_eq!(matcher.push("more").text, "");
    }

    #[test]
    fn text_that_only_looks_like_a_stop_is_released() {
        let mut matcher = StopMatcher::new(&strings(&["END"]));
        assert_eq!(matcher.push("the EN").text, "the ");
        assert_eq!(matcher.push("ENglish").text, "ENENglish");
        assert_eq!(matcher.push(" E").text, " ");
        assert_eq!(matcher.finish(), "E");
    }

    #[test]
    fn the_stop_that_is_complete_first_wins_then_the_longest() {
        assert_eq!(run(&strings(&["abcd", "bc"]), &["xabcd"]), ("xa".into(), Some("bc".into())));
        assert_eq!(run(&strings(&["c", "abc"]), &["xabc"]), ("x".into(), Some("abc".into())));
    }

    #[test]
    fn empty_stop_strings_are_ignored() {
        assert_eq!(run(&strings(&["", ""]), &["a", "b"]), ("ab".into(), None));
    }

    /// The specification: the first end at which some stop string stands, longest string first.
    fn search_whole(stops: &[String], text: &str) -> (String, Option<String>) {
        let mut longest_first: Vec<_> = stops.iter().filter(|stop| !stop.is_empty()).collect();
        longest_first.sort_by_key(|stop| std::cmp::Reverse(stop.len()));
        for end in (1..=text.len()).filter(|&end| text.is_char_boundary(end)) {
            for stop in &longest_first {
                if let Some(before) = text[..end].strip_suffix(stop.as_str()) {
                    return (before.to_owned(), Some((*stop).clone()));
                }
            }
        }
        (text.to_owned(), None)
    }

    proptest! {
        #[test]
        fn any_chunking_gives_what_searching_the_whole_text_gives(
            stops in prop::collection::vec("[abé]{0,4}", 0..4),
            pieces in prop::collection::vec("[abcé]{0,3}", 0..12),
        ) {
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            prop_assert_eq!(run(&stops, &pieces), search_whole(&stops, &pieces.concat()));
        }

        #[test]
        fn held_back_text_always_begins_a_stop(
            stops in prop::collection::vec("[ab]{1,5}", 1..4),
            text in "[abc]{0,20}",
        ) {
            let mut matcher = StopMatcher::new(&stops);
            let output = matcher.push(&text);
            let held = matcher.finish();
            prop_assert!(held.is_empty() || stops.iter().any(|stop| stop.starts_with(&held)));
            if output.matched.is_none() {
                prop_assert_eq!(output.text + &held, text);
            }
        }
    }
}

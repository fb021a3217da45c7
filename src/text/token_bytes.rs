//! The bytes of one token by itself, as log-probabilities show it: a token may be a part of a character.

use tokenizers::DecoderWrapper;

use crate::text::Tokenizer;

/// What a metaspace tokenizer writes for a space.
const METASPACE: char = '\u{2581}';

impl Tokenizer {
    /// The bytes that `id` stands for; of a special token its literal text. Empty outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let Some(literal) = self.id_to_token(id) else { return Vec::new() };
        if self.is_added(id) {
            return literal.into_bytes();
        }
        if self.is_byte_fallback(id) {
            // `<0x0A>`
            let byte = literal.get(3..5).and_then(|hex| u8::from_str_radix(hex, 16).ok());
            return byte.into_iter().collect();
        }
        if self.decoder().is_some_and(is_byte_level) {
            return literal.chars().flat_map(byte_level_bytes).collect();
        }
        literal.replace(METASPACE, " ").into_bytes()
    }
}

fn is_byte_level(decoder: &DecoderWrapper) -> bool {
    if let DecoderWrapper::Sequence(sequence) = decoder {
        return sequence.get_decoders().iter().any(is_byte_level);
    }
    matches!(decoder, DecoderWrapper::ByteLevel(_))
}

/// Byte-level vocabularies write printable bytes as themselves (in Latin-1) and the 68 others, in order, as
/// the characters from U+0100 on. What is neither stands for itself.
fn byte_level_bytes(character: char) -> Vec<u8> {
    let is_printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let code = u32::from(character);
    let byte = match u8::try_from(code) {
        Ok(byte) => Some(byte).filter(is_printable),
        Err(_) => (0..=u8::MAX).filter(|byte| !is_printable(byte)).nth((code - 0x100) as usize),
    };
    byte.map_or_else(|| character.to_string().into_bytes(), |byte| vec![byte])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_level_characters_are_gpt2s() {
        for (character, byte) in [
            ('Ġ', b' '),
            ('Ċ', b'\n'),
            ('a', b'a'),
            ('ð', 0xf0),
            ('Ł', 0x9f),
            ('Ń', 0xad),
            ('Ā', 0),
        ] {
            assert_eq!(byte_level_bytes(character), [byte], "{character}");
        }
        // No two characters mean one byte, and every byte has one.
        let mut all: Vec<u8> = ('\0'..='\u{143}')
            .filter(|c| u32::from(*c) > 0xff || c.to_string().len() == 1 || *c >= '¡')
            .flat_map(|c| {
                byte_level_bytes(c).first().copied().filter(|_| byte_level_bytes(c).len() == 1)
            })
            .collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 256);
    }
}

//! What a cache block holds, as a key: equal keys mean equal keys and values.
//!
//! A block's content depends on every token up to its end, on the base, and on the adapter. So its key is
//! a hash over the key of the block before it and its own tokens, and the chain begins with base and
//! adapter. An adapter enters by the digest of its weights, never by its name: a name that was loaded
//! again finds nothing of its old version. A salt keeps tenants apart, who could otherwise tell from a fast
//! first token what others have asked.
//!
//! Knows token ids and digests; must never know tensors or blocks.

use sha2::{Digest, Sha256};

/// Identity of a full block's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct BlockKey([u8; 32]);

impl BlockKey {
    /// The beginning of a chain; `adapter` is the digest of its weights.
    pub(super) fn root(base: &str, adapter: Option<&str>, salt: &[u8]) -> Self {
        let mut hash = Sha256::new();
        for part in [base.as_bytes(), adapter.unwrap_or_default().as_bytes(), salt] {
            // The length first, so that no two lists of parts give one byte string.
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        Self(hash.finalize().into())
    }

    /// The key of the block of `tokens` that follows this one.
    pub(super) fn next(self, tokens: &[u32]) -> Self {
        let mut hash = Sha256::new();
        hash.update(self.0);
        for token in tokens {
            hash.update(token.to_le_bytes());
        }
        Self(hash.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_decides_a_block_changes_its_key() {
        let root = BlockKey::root("base", None, b"");
        let keys = [
            root,
            BlockKey::root("esab", None, b""),
            BlockKey::root("base", Some("a"), b""),
            BlockKey::root("base", Some("b"), b""),
            BlockKey::root("base", None, b"a"),
            BlockKey::root("bas", Some("e"), b""),
            root.next(&[1, 2]),
            root.next(&[2, 1]),
            root.next(&[1]).next(&[2]),
            BlockKey::root("base", Some("a"), b"").next(&[1, 2]),
        ];
        for (index, key) in keys.iter().enumerate() {
            assert!(!keys[..index].contains(key), "{index}");
        }
        assert_eq!(root.next(&[1, 2]), BlockKey::root("base", None, b"").next(&[1, 2]));
    }
}

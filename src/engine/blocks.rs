//! Who owns which cache block.
//!
//! The cache is a row of physical blocks of `block_size` positions. [`BlockManager`] holds the free
//! ones; a [`BlockTable`] is one sequence's blocks in the order of its positions. Dropping a table
//! returns its blocks, so a sequence that goes away by whatever path cannot leak them.
//!
//! Knows block numbers only; must never know what the blocks hold. No candle here.

use std::{cell::RefCell, rc::Rc};

/// The free blocks, shared between the manager and all its tables. Lives on the engine thread.
type FreeList = Rc<RefCell<Vec<u32>>>;

/// Hands out cache blocks.
#[derive(Debug)]
pub(super) struct BlockManager {
    free: FreeList,
    num_blocks: usize,
    block_size: usize,
}

impl BlockManager {
    /// All of `num_blocks` blocks of `block_size` positions are free.
    pub(super) fn new(num_blocks: usize, block_size: usize) -> Self {
        let num_blocks = u32::try_from(num_blocks).unwrap_or(u32::MAX);
        // The list is a stack: low numbers come out first, and warm blocks are used again first.
        let free = Rc::new(RefCell::new((0..num_blocks).rev().collect()));
        Self { free, num_blocks: num_blocks as usize, block_size: block_size.max(1) }
    }

    /// A table without blocks.
    pub(super) fn table(&self) -> BlockTable {
        BlockTable { blocks: Vec::new(), free: Rc::clone(&self.free), block_size: self.block_size }
    }

    /// Blocks that no table holds.
    pub(super) fn num_free(&self) -> usize {
        self.free.borrow().len()
    }

    /// Blocks in all.
    pub(super) fn num_blocks(&self) -> usize {
        self.num_blocks
    }
}

/// The blocks of one sequence: block `i` holds positions `i * block_size ..`.
#[derive(Debug)]
pub(super) struct BlockTable {
    blocks: Vec<u32>,
    free: FreeList,
    block_size: usize,
}

impl BlockTable {
    /// Makes room for `num_tokens` positions. All or nothing: false, and nothing changed, when there
    /// are not enough free blocks.
    pub(super) fn reserve(&mut self, num_tokens: usize) -> bool {
        let missing = num_tokens.div_ceil(self.block_size).saturating_sub(self.blocks.len());
        let mut free = self.free.borrow_mut();
        if missing > free.len() {
            return false;
        }
        let rest = free.len() - missing;
        self.blocks.extend(free.drain(rest..).rev());
        true
    }

    /// The physical blocks, in the order of positions.
    pub(super) fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Returns all blocks.
    pub(super) fn clear(&mut self) {
        self.free.borrow_mut().extend(self.blocks.drain(..).rev());
    }
}

impl Drop for BlockTable {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Action {
        Open,
        Reserve { table: usize, num_tokens: usize },
        Clear { table: usize },
        Drop { table: usize },
    }

    fn action() -> impl Strategy<Value = Action> {
        prop_oneof![
            2 => Just(Action::Open),
            5 => (0..8usize, 0..40usize)
                .prop_map(|(table, num_tokens)| Action::Reserve { table, num_tokens }),
            1 => (0..8usize).prop_map(|table| Action::Clear { table }),
            2 => (0..8usize).prop_map(|table| Action::Drop { table }),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: 10_000, failure_persistence: None, ..ProptestConfig::default()
        })]

        #[test]
        fn no_block_is_lost_or_given_twice(
            num_blocks in 0..12usize,
            block_size in 1..5usize,
            actions in prop::collection::vec(action(), 0..40),
        ) {
            let manager = BlockManager::new(num_blocks, block_size);
            let mut tables: Vec<BlockTable> = Vec::new();
            for action in actions {
                match action {
                    Action::Open => tables.push(manager.table()),
                    Action::Reserve { table, num_tokens } => {
                        if let Some(table) = tables.get_mut(table) {
                            let (held, free) = (table.blocks().to_vec(), manager.num_free());
                            let wanted = num_tokens.div_ceil(block_size).max(held.len());
                            let fits = wanted - held.len() <= free;
                            prop_assert_eq!(table.reserve(num_tokens), fits);
                            prop_assert_eq!(table.blocks().len(), if fits { wanted } else { held.len() });
                            prop_assert!(table.blocks().starts_with(&held));
                        }
                    }
                    Action::Clear { table } => {
                        if let Some(table) = tables.get_mut(table) {
                            table.clear();
                        }
                    }
                    Action::Drop { table } => {
                        if table < tables.len() {
                            tables.swap_remove(table);
                        }
                    }
                }
                let held = tables.iter().flat_map(BlockTable::blocks).copied();
                let mut all: Vec<u32> = held.chain(manager.free.borrow().iter().copied()).collect();
                all.sort_unstable();
                prop_assert_eq!(all, (0..num_blocks as u32).collect::<Vec<_>>());
            }
        }
    }
}

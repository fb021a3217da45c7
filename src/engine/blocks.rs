//! Who holds which cache block, and what is left in those that nobody holds.
//!
//! The cache is a row of physical blocks of `block_size` positions. A [`BlockTable`] is one sequence's
//! blocks in the order of its positions. A full block whose content has a [`BlockKey`] may be held by
//! several tables at once; nobody writes to it any more. Dropping a table lets go of its blocks, so a
//! sequence that goes away by whatever path cannot leak them.
//!
//! A block that nobody holds is free. If it has a key, its content stays until the block is needed for
//! something else; the one that was let go longest ago is needed first. A table lets go of its last block
//! first, so that the head of a chain, without which the rest cannot be found, outlives its tail.
//!
//! Knows block numbers and keys only; must never know what the blocks hold. No candle here.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    rc::Rc,
};

use super::prefix::BlockKey;

/// Hands out cache blocks.
#[derive(Debug)]
pub(super) struct BlockManager {
    pool: Rc<RefCell<Pool>>,
    num_blocks: usize,
    block_size: usize,
}

/// All blocks, shared between the manager and its tables. Lives on the engine thread.
#[derive(Debug)]
struct Pool {
    blocks: Vec<Block>,
    /// Free blocks without a key. A stack: low numbers come out first, and warm ones are used again first.
    empty: Vec<u32>,
    /// Free blocks with a key, by the time at which they were let go.
    idle: BTreeMap<u64, u32>,
    by_key: HashMap<BlockKey, u32>,
    /// Counts the blocks that were let go.
    clock: u64,
}

#[derive(Debug, Clone, Default)]
struct Block {
    /// Tables that hold it.
    num_holders: u32,
    /// Its content, once it is full.
    key: Option<BlockKey>,
    /// Its place in `idle`, while it is there.
    let_go: u64,
}

impl Pool {
    fn num_free(&self) -> usize {
        self.empty.len() + self.idle.len()
    }

    /// A free block; what it held is forgotten.
    fn take(&mut self) -> Option<u32> {
        let block = match self.empty.pop() {
            Some(block) => block,
            None => self.idle.pop_first()?.1,
        };
        let state = &mut self.blocks[block as usize];
        state.num_holders = 1;
        if let Some(key) = state.key.take() {
            self.by_key.remove(&key);
        }
        Some(block)
    }

    /// One holder more for the block of `key`.
    fn share(&mut self, key: BlockKey) -> Option<u32> {
        let block = *self.by_key.get(&key)?;
        let state = &mut self.blocks[block as usize];
        if state.num_holders == 0 {
            self.idle.remove(&state.let_go);
        }
        state.num_holders += 1;
        Some(block)
    }

    /// One holder less.
    fn let_go(&mut self, block: u32) {
        let state = &mut self.blocks[block as usize];
        state.num_holders -= 1;
        if state.num_holders > 0 {
            return;
        }
        if state.key.is_none() {
            return self.empty.push(block);
        }
        self.clock += 1;
        state.let_go = self.clock;
        self.idle.insert(self.clock, block);
    }

    /// Names the content of `block`, unless another block holds the same.
    fn name(&mut self, block: u32, key: BlockKey) {
        let state = &mut self.blocks[block as usize];
        if state.key.is_none() && !self.by_key.contains_key(&key) {
            state.key = Some(key);
            self.by_key.insert(key, block);
        }
    }
}

impl BlockManager {
    /// All of `num_blocks` blocks of `block_size` positions are free.
    pub(super) fn new(num_blocks: usize, block_size: usize) -> Self {
        let num_blocks = u32::try_from(num_blocks).unwrap_or(u32::MAX);
        let pool = Pool {
            blocks: vec![Block::default(); num_blocks as usize],
            empty: (0..num_blocks).rev().collect(),
            idle: BTreeMap::new(),
            by_key: HashMap::new(),
            clock: 0,
        };
        let pool = Rc::new(RefCell::new(pool));
        Self { pool, num_blocks: num_blocks as usize, block_size: block_size.max(1) }
    }

    /// A table without blocks.
    pub(super) fn table(&self) -> BlockTable {
        BlockTable { blocks: Vec::new(), pool: Rc::clone(&self.pool), block_size: self.block_size }
    }

    /// Blocks that no table holds.
    pub(super) fn num_free(&self) -> usize {
        self.pool.borrow().num_free()
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
    pool: Rc<RefCell<Pool>>,
    block_size: usize,
}

impl BlockTable {
    /// Makes room for `num_tokens` positions. All or nothing: false, and nothing changed, when there
    /// are not enough free blocks.
    pub(super) fn reserve(&mut self, num_tokens: usize) -> bool {
        let missing = num_tokens.div_ceil(self.block_size).saturating_sub(self.blocks.len());
        let mut pool = self.pool.borrow_mut();
        if missing > pool.num_free() {
            return false;
        }
        self.blocks.extend((0..missing).filter_map(|_| pool.take()));
        true
    }

    /// Uses the block that holds `key` as block `index`, if there is one, instead of the own block there.
    /// `index` is at most the number of blocks.
    pub(super) fn adopt(&mut self, index: usize, key: BlockKey) -> bool {
        let mut pool = self.pool.borrow_mut();
        let Some(block) = pool.share(key) else { return false };
        match self.blocks.get_mut(index) {
            Some(own) => pool.let_go(std::mem::replace(own, block)),
            None => self.blocks.push(block),
        }
        true
    }

    /// Block `index` is full and holds `key`: others may use it from now on.
    pub(super) fn name(&mut self, index: usize, key: BlockKey) {
        self.pool.borrow_mut().name(self.blocks[index], key);
    }

    /// The physical blocks, in the order of positions.
    pub(super) fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Positions of a block.
    pub(super) fn block_size(&self) -> usize {
        self.block_size
    }

    /// Lets go of all blocks.
    pub(super) fn clear(&mut self) {
        let mut pool = self.pool.borrow_mut();
        self.blocks.drain(..).rev().for_each(|block| pool.let_go(block));
    }
}

impl Drop for BlockTable {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests;

//! Random histories of a few tables over a small pool.

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Action {
    Open,
    Reserve {
        table: usize,
        num_tokens: usize,
    },
    /// Names the first block without a name; there are few names, so that they meet.
    Name {
        table: usize,
        key: u32,
    },
    Adopt {
        table: usize,
        index: usize,
        key: u32,
    },
    Clear {
        table: usize,
    },
    Drop {
        table: usize,
    },
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        2 => Just(Action::Open),
        5 => (0..8usize, 0..40usize)
            .prop_map(|(table, num_tokens)| Action::Reserve { table, num_tokens }),
        4 => (0..8usize, 0..9u32).prop_map(|(table, key)| Action::Name { table, key }),
        4 => (0..8usize, 0..6usize, 0..9u32)
            .prop_map(|(table, index, key)| Action::Adopt { table, index, key }),
        1 => (0..8usize).prop_map(|table| Action::Clear { table }),
        2 => (0..8usize).prop_map(|table| Action::Drop { table }),
    ]
}

fn key(number: u32) -> BlockKey {
    BlockKey::root("", None, b"").next(&[number])
}

/// Every block is held as often as its count says, or free in exactly one way; names are unique.
fn check(manager: &BlockManager, tables: &[BlockTable]) {
    let pool = manager.pool.borrow();
    let mut num_holders = vec![0; manager.num_blocks()];
    for &block in tables.iter().flat_map(BlockTable::blocks) {
        num_holders[block as usize] += 1;
    }
    let counts: Vec<u32> = pool.blocks.iter().map(|block| block.num_holders).collect();
    assert_eq!(counts, num_holders);
    let mut free: Vec<u32> = pool.empty.iter().chain(pool.idle.values()).copied().collect();
    free.sort_unstable();
    let unheld = |block: &u32| num_holders[*block as usize] == 0;
    assert_eq!(free, (0..manager.num_blocks() as u32).filter(unheld).collect::<Vec<_>>());
    assert!(pool.empty.iter().all(|&block| pool.blocks[block as usize].key.is_none()));
    let named = pool.blocks.iter().filter(|block| block.key.is_some()).count();
    assert_eq!(named, pool.by_key.len());
    for (key, &block) in &pool.by_key {
        assert_eq!(pool.blocks[block as usize].key, Some(*key));
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 100_000, failure_persistence: None, ..ProptestConfig::default()
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
                        // Whatever was just handed out is nobody else's, under no name.
                        for &block in &table.blocks()[held.len()..] {
                            let state = manager.pool.borrow().blocks[block as usize].clone();
                            prop_assert_eq!((state.num_holders, state.key), (1, None));
                        }
                    }
                }
                Action::Name { table, key: number } => {
                    if let Some(table) = tables.get_mut(table) {
                        let is_unnamed = |&block: &u32| {
                            manager.pool.borrow().blocks[block as usize].key.is_none()
                        };
                        if let Some(index) = table.blocks().iter().position(is_unnamed) {
                            table.name(index, key(number));
                        }
                    }
                }
                Action::Adopt { table, index, key: number } => {
                    if let Some(table) = tables.get_mut(table) {
                        let index = index.min(table.blocks().len());
                        let holder = manager.pool.borrow().by_key.get(&key(number)).copied();
                        prop_assert_eq!(table.adopt(index, key(number)), holder.is_some());
                        prop_assert!(holder.is_none() || table.blocks().get(index) == holder.as_ref());
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
            check(&manager, &tables);
        }
    }
}

#[test]
fn what_was_let_go_longest_ago_makes_room_first_and_tails_before_heads() {
    let manager = BlockManager::new(5, 1);
    let (mut old, mut new) = (manager.table(), manager.table());
    assert!(old.reserve(2) && new.reserve(2));
    [(0, 10), (1, 11)].into_iter().for_each(|(index, number)| old.name(index, key(number)));
    [(0, 20), (1, 21)].into_iter().for_each(|(index, number)| new.name(index, key(number)));
    drop((old, new));
    assert_eq!(manager.num_free(), 5);
    // The nameless block goes first, then those of `old`, its tail before its head.
    let mut table = manager.table();
    let holds = |number| manager.pool.borrow().by_key.contains_key(&key(number));
    let forgotten = [(1, None), (2, Some(11)), (3, Some(10)), (4, Some(21)), (5, Some(20))];
    for (num_tokens, gone) in forgotten {
        assert!(gone.is_none_or(holds));
        assert!(table.reserve(num_tokens));
        assert!(gone.is_none_or(|number| !holds(number)));
    }
}

#[test]
fn a_block_in_use_is_shared_and_outlives_the_table_that_filled_it() {
    let manager = BlockManager::new(3, 4);
    let (mut first, mut second) = (manager.table(), manager.table());
    assert!(first.reserve(4));
    first.name(0, key(1));
    assert!(second.adopt(0, key(1)) && !second.adopt(1, key(2)));
    assert_eq!(first.blocks(), second.blocks());
    drop(first);
    assert_eq!(manager.num_free(), 2);
    // A block of one's own is given back for one that holds the same.
    let mut third = manager.table();
    assert!(third.reserve(4) && third.adopt(0, key(1)));
    assert_eq!((third.blocks(), manager.num_free()), (second.blocks(), 2));
}

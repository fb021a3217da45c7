//! The registry: what a name means at every moment, also while files are being read.

use std::{fs, path::Path, sync::Arc, thread};

use crate::support::{Scratch, fresh, model};
use tunesmith::adapters::{AdapterCard, AdapterRegistry};

fn registry() -> AdapterRegistry {
    AdapterRegistry::new(model("tiny-llama"))
}

#[test]
fn a_name_is_loaded_replaced_and_taken_away() {
    let scratch = Scratch::new();
    let (old, new) = (scratch.adapter("old", 1), scratch.adapter("new", 2));
    let registry = registry();
    assert!(registry.get("a").is_none());

    let (first, is_new) = registry.load("a", &old, false).unwrap();
    assert!(is_new);
    assert_eq!((first.version, first.path.as_path()), (1, old.as_path()));
    let (second, is_new) = registry.load("a", &new, true).unwrap();
    assert!(is_new);
    assert_eq!(second.version, 2);
    assert_eq!(registry.get("a").unwrap().adapter.digest(), fresh(2).digest());
    assert_eq!(first.adapter.digest(), fresh(1).digest(), "a request that holds it keeps it");

    assert_eq!(registry.unload("a").unwrap().version, 2);
    assert!(registry.get("a").is_none() && registry.unload("a").is_none());
    assert_eq!(registry.load("a", &old, false).unwrap().0.version, 3, "the counter goes on");
}

#[test]
fn the_same_content_again_changes_nothing() {
    let scratch = Scratch::new();
    let registry = registry();
    let (first, _) = registry.load("a", &scratch.adapter("one", 1), false).unwrap();
    let (again, is_new) = registry.load("a", &scratch.adapter("two", 1), true).unwrap();
    assert!(!is_new && Arc::ptr_eq(&first, &again));
}

#[test]
fn a_taken_name_is_refused_in_the_words_that_clients_compare() {
    let scratch = Scratch::new();
    let registry = registry();
    let dir = scratch.adapter("one", 1);
    registry.load("X", &dir, false).unwrap();
    let error = registry.load("X", &dir, false).unwrap_err();
    assert_eq!(error.reason(), "already_loaded");
    assert_eq!(
        error.to_string(),
        "The lora adapter 'X' has already been loaded. If you want to load the adapter in place, \
         set 'load_inplace' to True."
    );
}

#[test]
fn a_failed_replacement_leaves_the_old_version_serving() {
    let scratch = Scratch::new();
    let registry = registry();
    let (old, _) = registry.load("a", &scratch.adapter("one", 1), false).unwrap();
    let broken = scratch.adapter("broken", 2);
    fs::write(broken.join("adapter_model.safetensors"), b"torn").unwrap();
    assert_eq!(registry.load("a", &broken, true).unwrap_err().reason(), "malformed_file");
    assert!(Arc::ptr_eq(&registry.get("a").unwrap(), &old));
    assert_eq!(registry.load("a", &scratch.adapter("three", 3), true).unwrap().0.version, 2);
}

#[test]
fn an_adapter_of_another_base_is_refused() {
    let scratch = Scratch::new();
    let dir = scratch.adapter("one", 1);
    let card = AdapterCard { base_fingerprint: "aaaa".to_owned(), ..AdapterCard::default() };
    card.write(&dir).unwrap();
    let other = registry().with_base_fingerprint("bbbb");
    assert_eq!(other.load("a", &dir, false).unwrap_err().reason(), "wrong_base");
    assert!(other.list().is_empty());
    assert!(registry().with_base_fingerprint("aaaa").load("a", &dir, false).is_ok());
}

#[test]
fn impossible_names_are_refused() {
    let scratch = Scratch::new();
    let dir = scratch.adapter("one", 1);
    let registry = registry();
    for name in ["", "a@v1", "a\nb", "a\u{7f}", &"x".repeat(257)] {
        assert_eq!(registry.load(name, &dir, false).unwrap_err().reason(), "invalid_name");
    }
    for name in ["../../etc/passwd", "team/a.b:c-d_e", "рецепт", &"x".repeat(256)] {
        registry.load(name, &dir, false).unwrap();
    }
}

#[test]
fn many_names_load_side_by_side() {
    let scratch = Scratch::new();
    let registry = registry();
    let dirs: Vec<_> =
        (0..8).map(|seed| (seed, scratch.adapter(&seed.to_string(), seed))).collect();
    thread::scope(|scope| {
        for (seed, dir) in &dirs {
            let registry = &registry;
            scope.spawn(move || registry.load(&format!("name-{seed}"), dir, false).unwrap());
        }
    });
    let names: Vec<String> = registry.list().iter().map(|version| version.name.clone()).collect();
    assert_eq!(names, (0..8).map(|seed| format!("name-{seed}")).collect::<Vec<_>>());
    for (seed, _) in dirs {
        let version = registry.get(&format!("name-{seed}")).unwrap();
        assert_eq!(version.adapter.digest(), fresh(seed).digest());
    }
}

#[test]
fn of_many_first_loads_of_one_name_exactly_one_wins() {
    let scratch = Scratch::new();
    let registry = registry();
    let dirs: Vec<_> = (0..8).map(|seed| scratch.adapter(&seed.to_string(), seed)).collect();
    let won: usize = thread::scope(|scope| {
        let registry = &registry;
        let load = |dir: &Path| usize::from(registry.load("a", dir, false).is_ok());
        let threads: Vec<_> = dirs.iter().map(|dir| scope.spawn(move || load(dir))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    assert_eq!(won, 1);
    assert_eq!(registry.get("a").unwrap().version, 1);
}

#[test]
fn a_reader_sees_only_whole_versions_while_a_name_is_replaced() {
    let scratch = Scratch::new();
    let registry = registry();
    let dirs = [scratch.adapter("one", 1), scratch.adapter("two", 2)];
    let digests = [fresh(1).digest().to_owned(), fresh(2).digest().to_owned()];
    registry.load("a", &dirs[0], false).unwrap();
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for round in 1..=50_usize {
                registry.load("a", &dirs[round % 2], true).unwrap();
            }
        });
        let mut last = 0;
        while !writer.is_finished() {
            let version = registry.get("a").unwrap();
            assert!(version.version >= last);
            last = version.version;
            let expected = &digests[usize::from(last % 2 == 0)];
            assert_eq!(version.adapter.digest(), expected);
        }
    });
    assert_eq!(registry.get("a").unwrap().version, 51);
}

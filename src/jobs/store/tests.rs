use serde::{Deserialize, Serialize};

use super::*;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    id: String,
    book: String,
    text: String,
}

impl Record for Note {
    const KIND: &'static str = "note";

    fn id(&self) -> &str {
        &self.id
    }

    fn parent(&self) -> &str {
        &self.book
    }
}

fn note(number: usize, book: &str) -> Note {
    Note { id: format!("note-{number}"), book: book.to_owned(), text: "a".to_owned() }
}

fn scratch(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("store-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    dir
}

fn ids(page: &Page<Note>) -> Vec<&str> {
    page.records.iter().map(|note| note.id.as_str()).collect()
}

#[test]
fn pages_follow_each_other_to_the_end_and_no_further() {
    let dir = scratch("pages");
    let store = Store::open(&dir).unwrap();
    for number in 0..7 {
        let book = if number == 3 { "other" } else { "one" };
        store.write::<_, StoreError>(|tx| tx.insert(&note(number, book))).unwrap();
    }
    for (order, expected) in [
        (Order::Ascending, ["note-0", "note-1", "note-2", "note-4", "note-5", "note-6"]),
        (Order::Descending, ["note-6", "note-5", "note-4", "note-2", "note-1", "note-0"]),
    ] {
        let (mut seen, mut after): (Vec<String>, Option<String>) = (Vec::new(), None);
        for _ in 0..10 {
            let query = Query { parent: "one", after: after.as_deref(), limit: 2, order };
            let page = store.list::<Note>(&query, |_| true).unwrap();
            seen.extend(ids(&page).into_iter().map(str::to_owned));
            after = seen.last().cloned();
            if !page.has_more {
                break;
            }
        }
        assert_eq!(seen, expected);
    }
    let query = Query { parent: "one", after: Some("gone"), limit: 2, order: Order::Ascending };
    assert_eq!(ids(&store.list(&query, |_| true).unwrap()), Vec::<&str>::new());
    let query = Query { parent: "one", after: None, limit: 1, order: Order::Ascending };
    let page = store.list(&query, |note: &Note| note.id == "note-6").unwrap();
    assert_eq!((ids(&page), page.has_more), (vec!["note-6"], false));
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn who_deletes_while_walking_still_reaches_the_end() {
    let dir = scratch("walk");
    let store = Store::open(&dir).unwrap();
    for number in 0..5 {
        store.write::<_, StoreError>(|tx| tx.insert(&note(number, ""))).unwrap();
    }
    let mut after: Option<String> = None;
    for _ in 0..5 {
        let query =
            Query { parent: "", after: after.as_deref(), limit: 1, order: Order::Ascending };
        let page = store.list::<Note>(&query, |_| true).unwrap();
        let id = page.records[0].id.clone();
        assert!(store.write::<_, StoreError>(|tx| tx.delete::<Note>(&id)).unwrap());
        assert!(!store.write::<_, StoreError>(|tx| tx.delete::<Note>(&id)).unwrap());
        after = Some(id);
    }
    assert_eq!(store.all::<Note>("").unwrap(), []);
    // A name may be used and deleted again.
    for _ in 0..2 {
        store.write::<_, StoreError>(|tx| tx.insert(&note(1, ""))).unwrap();
        store.write::<_, StoreError>(|tx| tx.delete::<Note>("note-1")).unwrap();
    }
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn a_failed_transaction_leaves_nothing_and_a_done_one_survives_a_restart() {
    let dir = scratch("restart");
    let store = Store::open(&dir).unwrap();
    let failed = store.write::<(), StoreError>(|tx| {
        tx.insert(&note(1, ""))?;
        tx.insert(&note(1, ""))
    });
    assert!(failed.is_err());
    assert_eq!(store.get::<Note>("note-1").unwrap(), None);
    let changed = Note { text: "b".to_owned(), ..note(1, "") };
    store
        .write::<_, StoreError>(|tx| {
            tx.insert(&note(1, ""))?;
            tx.insert(&note(2, ""))?;
            tx.update(&changed)?;
            tx.delete::<Note>("note-2")
        })
        .unwrap();
    drop(store);
    let store = Store::open(&dir).unwrap();
    assert_eq!(store.all::<Note>("").unwrap(), [changed]);
    assert_eq!(store.integrity().unwrap(), None);
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn a_folder_belongs_to_one_process_and_a_database_to_programs_that_know_it() {
    let dir = scratch("lock");
    let store = Store::open(&dir).unwrap();
    assert!(matches!(Store::open(&dir), Err(StoreError::Busy(_))));
    store.connection().pragma_update(None, "user_version", 99).unwrap();
    drop(store);
    let error = Store::open(&dir).err().unwrap().to_string();
    assert!(error.contains("schema version 99"), "{error}");
    std::fs::write(dir.join("tunesmith.db"), "this is no database, and long enough to be none")
        .unwrap();
    assert!(matches!(Store::open(&dir), Err(StoreError::Sql(_))));
    std::fs::remove_dir_all(dir).unwrap();
}

//! The tables, version by version.

use std::path::Path;

use rusqlite::Connection;

use super::StoreError;

/// What brings a database from each version to the next; its version is how many have been applied.
/// Lines are only ever added.
const MIGRATIONS: &[&str] = &[
    // 1: every kind of record in one table. AUTOINCREMENT, so that a place is never given twice.
    "CREATE TABLE records (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        kind TEXT NOT NULL,
        id TEXT NOT NULL,
        parent TEXT NOT NULL,
        body TEXT NOT NULL,
        UNIQUE (kind, id)
    ) STRICT;
    CREATE INDEX records_of_parent ON records (kind, parent, seq);",
];

/// Sets the connection up and applies the migrations that are missing, all or none.
pub(super) fn prepare(connection: &mut Connection, path: &Path) -> Result<(), StoreError> {
    connection.pragma_update(None, "journal_mode", "WAL")?;
    // An acknowledged write must survive a power cut.
    connection.pragma_update(None, "synchronous", "FULL")?;
    let version: usize =
        connection.pragma_query_value(None, "user_version", |row| row.get::<_, u32>(0))? as usize;
    let known = MIGRATIONS.len();
    if version > known {
        return Err(StoreError::Newer { path: path.to_owned(), found: version, known });
    }
    let transaction = connection.transaction()?;
    for migration in &MIGRATIONS[version..] {
        transaction.execute_batch(migration)?;
    }
    transaction.pragma_update(None, "user_version", known as u32)?;
    Ok(transaction.commit()?)
}

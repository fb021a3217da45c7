//! The only door to the database: records of several kinds, each a JSON text, in the order of their
//! making. One writer, and a write that returned is on disk.

mod schema;

use std::{
    fs::{File, TryLockError},
    io,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use rusqlite::{Connection, ErrorCode, OptionalExtension, ToSql, TransactionBehavior, params};
use serde::{Serialize, de::DeserializeOwned};

/// Something that the store keeps.
pub trait Record: Serialize + DeserializeOwned {
    /// Name of the kind; never changes, since it is in databases.
    const KIND: &'static str;

    /// Unique among its kind.
    fn id(&self) -> &str;

    /// Id of the object that it belongs to; empty for none. Never changes.
    fn parent(&self) -> &str {
        ""
    }
}

/// Why the database refuses.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process has the data folder.
    #[error("{} is in use by another tunesmith", .0.display())]
    Busy(PathBuf),
    /// A file beside the database.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Written by a newer program.
    #[error("{} has schema version {found}; this program knows up to {known}", path.display())]
    Newer {
        /// The database.
        path: PathBuf,
        /// Its version.
        found: usize,
        /// Ours.
        known: usize,
    },
    /// SQLite.
    #[error("database: {0}")]
    Sql(#[from] rusqlite::Error),
    /// A record that is no longer what its kind says.
    #[error("a record in the database cannot be read: {0}")]
    Json(#[from] serde_json::Error),
}

impl StoreError {
    /// Whether the disk is full.
    #[must_use]
    pub fn is_full(&self) -> bool {
        match self {
            Self::Sql(error) => {
                error.sqlite_error_code() == Some(ErrorCode::DiskFull)
                    // With WAL, a disk without room can also fail as an I/O error of a short write.
                    || error.sqlite_error().is_some_and(|error| {
                        error.extended_code == rusqlite::ffi::SQLITE_IOERR_SHMSIZE
                            || error.extended_code == rusqlite::ffi::SQLITE_IOERR_WRITE
                    })
            }
            Self::File { source, .. } => source.kind() == io::ErrorKind::StorageFull,
            Self::Busy(_) | Self::Newer { .. } | Self::Json(_) => false,
        }
    }
}

/// Which way a list runs, by the order of making.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Oldest first.
    Ascending,
    /// Newest first.
    Descending,
}

/// Which records a list has.
#[derive(Debug, Clone, Copy)]
pub struct Query<'a> {
    /// Only those of this parent; empty for those of none.
    pub parent: &'a str,
    /// Begin behind the record with this id, also where that is deleted. One that never was gives an
    /// empty page.
    pub after: Option<&'a str>,
    /// At most so many.
    pub limit: usize,
    /// Which way.
    pub order: Order,
}

/// One page of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page<R> {
    /// The records.
    pub records: Vec<R>,
    /// Whether there are more behind them.
    pub has_more: bool,
}

/// The database of a data folder, and the lock that keeps other processes out of the folder.
pub struct Store {
    connection: Mutex<Connection>,
    _lock: File,
}

impl Store {
    /// Opens `dir/tunesmith.db`, makes it where there is none, and brings an old one up to date.
    ///
    /// # Errors
    /// The folder cannot be made or is in use, the database is newer than this program or damaged.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let at = |path: PathBuf| move |source| StoreError::File { path, source };
        std::fs::create_dir_all(dir).map_err(at(dir.to_owned()))?;
        let lock_path = dir.join("lock");
        let lock = File::create(&lock_path).map_err(at(lock_path.clone()))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(StoreError::Busy(dir.to_owned())),
            Err(TryLockError::Error(source)) => {
                return Err(StoreError::File { path: lock_path, source });
            }
        }
        let path = dir.join("tunesmith.db");
        let mut connection = Connection::open(&path)?;
        schema::prepare(&mut connection, &path)?;
        Ok(Self { connection: Mutex::new(connection), _lock: lock })
    }

    /// Runs `work` in a transaction, which is on disk when this returns. Where `work` fails, nothing
    /// has happened.
    ///
    /// # Errors
    /// Those of `work`, and of the database.
    pub fn write<T, E: From<StoreError>>(
        &self,
        work: impl FnOnce(&Transaction<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        let mut connection = self.connection();
        let behavior = TransactionBehavior::Immediate;
        let inner = connection.transaction_with_behavior(behavior).map_err(StoreError::from)?;
        let transaction = Transaction { inner };
        let value = work(&transaction)?;
        transaction.inner.commit().map_err(StoreError::from)?;
        Ok(value)
    }

    /// The record with this id.
    ///
    /// # Errors
    /// The database fails.
    pub fn get<R: Record>(&self, id: &str) -> Result<Option<R>, StoreError> {
        get(&self.connection(), id)
    }

    /// One page of the records of a kind that `keep` wants.
    ///
    /// # Errors
    /// The database fails.
    pub fn list<R: Record>(
        &self,
        query: &Query<'_>,
        keep: impl FnMut(&R) -> bool,
    ) -> Result<Page<R>, StoreError> {
        list(&self.connection(), query, keep)
    }

    /// Every record of a kind and parent (empty: of those without one), oldest first.
    ///
    /// # Errors
    /// The database fails.
    pub fn all<R: Record>(&self, parent: &str) -> Result<Vec<R>, StoreError> {
        let query = Query { parent, after: None, limit: usize::MAX, order: Order::Ascending };
        Ok(self.list(&query, |_| true)?.records)
    }

    /// Looks over every page of the database; the first complaint, if there is one.
    ///
    /// # Errors
    /// The database fails.
    pub fn integrity(&self) -> Result<Option<String>, StoreError> {
        let text: String =
            self.connection().query_row("PRAGMA integrity_check", [], |row| row.get(0))?;
        Ok((text != "ok").then_some(text))
    }

    fn connection(&self) -> MutexGuard<'_, Connection> {
        // A panic rolls its transaction back; the connection stays whole.
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A transaction under way; see [`Store::write`].
pub struct Transaction<'a> {
    inner: rusqlite::Transaction<'a>,
}

impl Transaction<'_> {
    /// Adds a record.
    ///
    /// # Errors
    /// There is one of this id, or the database fails.
    pub fn insert<R: Record>(&self, record: &R) -> Result<(), StoreError> {
        let sql = "INSERT INTO records (kind, id, parent, body) VALUES (?, ?, ?, ?)";
        let body = serde_json::to_string(record)?;
        self.inner.prepare_cached(sql)?.execute(params![
            R::KIND,
            record.id(),
            record.parent(),
            body
        ])?;
        Ok(())
    }

    /// Replaces the record of this id; its place in lists stays.
    ///
    /// # Errors
    /// The database fails.
    pub fn update<R: Record>(&self, record: &R) -> Result<(), StoreError> {
        let sql = "UPDATE records SET body = ? WHERE kind = ? AND id = ?";
        let body = serde_json::to_string(record)?;
        self.inner.prepare_cached(sql)?.execute(params![body, R::KIND, record.id()])?;
        Ok(())
    }

    /// Removes a record; whether there was one. Its place stays known: somebody who walks through a
    /// list and deletes as he goes still finds the next page.
    ///
    /// # Errors
    /// The database fails.
    pub fn delete<R: Record>(&self, id: &str) -> Result<bool, StoreError> {
        let sql = "UPDATE OR REPLACE records SET kind = 'deleted ' || kind, body = '{}' \
                   WHERE kind = ? AND id = ?";
        Ok(self.inner.prepare_cached(sql)?.execute(params![R::KIND, id])? > 0)
    }

    /// The record with this id.
    ///
    /// # Errors
    /// The database fails.
    pub fn get<R: Record>(&self, id: &str) -> Result<Option<R>, StoreError> {
        get(&self.inner, id)
    }

    /// As [`Store::list`], within the transaction.
    ///
    /// # Errors
    /// The database fails.
    pub fn list<R: Record>(
        &self,
        query: &Query<'_>,
        keep: impl FnMut(&R) -> bool,
    ) -> Result<Page<R>, StoreError> {
        list(&self.inner, query, keep)
    }

    /// As [`Store::all`], within the transaction.
    ///
    /// # Errors
    /// The database fails.
    pub fn all<R: Record>(&self, parent: &str) -> Result<Vec<R>, StoreError> {
        let query = Query { parent, after: None, limit: usize::MAX, order: Order::Ascending };
        Ok(self.list(&query, |_| true)?.records)
    }
}

fn get<R: Record>(connection: &Connection, id: &str) -> Result<Option<R>, StoreError> {
    let sql = "SELECT body FROM records WHERE kind = ? AND id = ?";
    let mut statement = connection.prepare_cached(sql)?;
    let body: Option<String> =
        statement.query_row(params![R::KIND, id], |row| row.get(0)).optional()?;
    Ok(body.map(|body| serde_json::from_str(&body)).transpose()?)
}

fn list<R: Record>(
    connection: &Connection,
    query: &Query<'_>,
    mut keep: impl FnMut(&R) -> bool,
) -> Result<Page<R>, StoreError> {
    let mut page = Page { records: Vec::new(), has_more: false };
    let place = match query.after {
        None => None,
        Some(after) => match place_of::<R>(connection, query.parent, after)? {
            None => return Ok(page),
            found => found,
        },
    };
    let (comparison, direction, start) = match query.order {
        Order::Ascending => (">", "ASC", place.unwrap_or(0)),
        Order::Descending => ("<", "DESC", place.unwrap_or(i64::MAX)),
    };
    let sql = format!(
        "SELECT body FROM records WHERE kind = ? AND parent = ? AND seq {comparison} ? \
         ORDER BY seq {direction}"
    );
    let mut statement = connection.prepare_cached(&sql)?;
    let values: [&dyn ToSql; 3] = [&R::KIND, &query.parent, &start];
    let mut rows = statement.query(&values[..])?;
    while let Some(row) = rows.next()? {
        let record: R =
            serde_json::from_str(row.get_ref(0)?.as_str().map_err(rusqlite::Error::from)?)?;
        if !keep(&record) {
            continue;
        }
        if page.records.len() == query.limit {
            page.has_more = true;
            break;
        }
        page.records.push(record);
    }
    Ok(page)
}

fn place_of<R: Record>(
    connection: &Connection,
    parent: &str,
    id: &str,
) -> Result<Option<i64>, StoreError> {
    let sql = "SELECT max(seq) FROM records \
               WHERE kind IN (?1, 'deleted ' || ?1) AND parent = ?2 AND id = ?3";
    let mut statement = connection.prepare_cached(sql)?;
    Ok(statement.query_row(params![R::KIND, parent, id], |row| row.get(0))?)
}

#[cfg(test)]
mod tests;

//! The one record of what exists: SQLite in WAL mode.
//!
//! A sandbox's row is written before anything of it exists and removed after everything of it is
//! gone, so a crash at any moment leaves a row that says what to look for. State changes are
//! conditional updates: of two processes that want to start one sandbox, one wins, and the other
//! sees who did. Columns, not blobs; schema changes are numbered files in `schema/`.

mod builds;
mod images;
mod jails;
mod mounts;
mod networks;
pub(crate) mod pools;
mod ports;
pub(crate) mod reserve;
pub(crate) mod rows;
pub(crate) mod snapshots;
mod ssh;
pub(crate) mod volumes;

use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};
use rusqlite_migration::{M, Migrations, SchemaVersion};

use crate::error::{Error, ErrorKind, Result};

pub use builds::BuildLayerRow;
pub(crate) use images::{Removal, Users};
pub use jails::JailRow;
pub use networks::{NetworkMode, NetworkRow};
pub use pools::PoolRow;
pub use rows::{Identity, ImageRow, SandboxRow, State};
pub use snapshots::{SnapshotRow, SnapshotState};
pub use volumes::{VolumeRow, VolumeState};

/// Every schema change, oldest first. Only ever appended to.
const MIGRATIONS: &[&str] = &[
    include_str!("../../schema/0001_initial.sql"),
    include_str!("../../schema/0002_snapshots_and_pools.sql"),
    include_str!("../../schema/0003_ports.sql"),
    include_str!("../../schema/0004_network.sql"),
    include_str!("../../schema/0005_oci.sql"),
    include_str!("../../schema/0006_ssh.sql"),
    include_str!("../../schema/0007_volumes.sql"),
    include_str!("../../schema/0008_user_network.sql"),
    include_str!("../../schema/0009_builds.sql"),
    include_str!("../../schema/0010_jails.sql"),
];

/// How long a writer waits for another one. Transactions here take well under a millisecond.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// Tries to enter WAL mode while others do the same.
const WAL_TRIES: u32 = 16;

/// What helps where the data directory cannot be used.
pub(crate) const OTHER_DIRECTORY: &str =
    "choose another directory with --data-dir or SMOLVM_DATA_DIR";

/// An open database.
#[derive(Debug)]
pub struct Store {
    connection: Connection,
}

impl Store {
    /// Opens the database, making it if it is not there.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::State`] if it is damaged or was written by a newer SmolVM.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_with(path, OpenFlags::SQLITE_OPEN_CREATE)
    }

    /// Opens the database if it is there.
    ///
    /// # Errors
    ///
    /// As [`Store::open`].
    pub fn open_existing(path: &Path) -> Result<Option<Self>> {
        match path.try_exists() {
            Ok(false) => Ok(None),
            Ok(true) => Self::open_with(path, OpenFlags::empty()).map(Some),
            Err(error) => Err(crate::error::io(
                format!("could not look for the state database {}", path.display()),
                error,
            )
            .hint(OTHER_DIRECTORY)),
        }
    }

    fn open_with(path: &Path, extra: OpenFlags) -> Result<Self> {
        let doing = || format!("could not open the state database {}", path.display());
        // No SQLite mutex: a `Connection` is used by one thread at a time, as Rust's types ensure.
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX | extra;
        // Environments may hold secrets. SQLite gives the files beside it the same mode.
        if extra.contains(OpenFlags::SQLITE_OPEN_CREATE) {
            std::fs::File::options()
                .append(true)
                .create(true)
                .mode(0o600)
                .open(path)
                .and_then(|file| file.set_permissions(std::fs::Permissions::from_mode(0o600)))
                .map_err(|error| crate::error::io(doing(), error).hint(OTHER_DIRECTORY))?;
        }
        reserve::prepare(path, extra.contains(OpenFlags::SQLITE_OPEN_CREATE))?;
        let connection =
            Connection::open_with_flags(path, flags).map_err(|error| sql(doing(), error))?;
        connection
            .busy_timeout(BUSY_TIMEOUT)
            .and_then(|()| enter_wal(&connection))
            // In WAL mode NORMAL survives a crash of any process; only a power cut may lose the last
            // transactions, and after one no sandbox runs anyway (sqlite.org/pragma.html#pragma_synchronous).
            .and_then(|()| connection.pragma_update(None, "synchronous", "normal"))
            .and_then(|()| connection.pragma_update(None, "foreign_keys", true))
            .map_err(|error| sql(doing(), error))?;
        let mut store = Self { connection };
        store.migrate(path)?;
        reserve::allocate_index(path);
        Ok(store)
    }

    /// Writes, on a full disk with the reserve given back. For what frees space, and for what has
    /// happened whether it is written or not.
    fn in_any_case<T>(
        &mut self,
        mut work: impl FnMut(&mut Connection) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        match work(&mut self.connection) {
            Err(error) if is_full(&error) => {
                let path = self.connection.path().map(std::path::PathBuf::from);
                if path.is_some_and(|path| reserve::give_back(&path)) {
                    work(&mut self.connection)
                } else {
                    Err(error)
                }
            }
            done => done,
        }
    }

    fn migrate(&mut self, path: &Path) -> Result<()> {
        let migrations = Migrations::from_iter(MIGRATIONS.iter().map(|sql| M::up(sql)));
        let doing = || format!("could not prepare the state database {}", path.display());
        let version: i64 = self
            .connection
            .pragma_query_value(None, "user_version", |row| row.get(0))
            .map_err(|error| sql(doing(), error))?;
        let newest = i64::try_from(MIGRATIONS.len()).unwrap_or(i64::MAX);
        if version == newest {
            return Ok(());
        }
        if version > newest {
            return Err(Error::new(
                ErrorKind::State,
                format!(
                    "the state database {} has schema version {version}, this program knows {newest} at most",
                    path.display()
                ),
            )
            .hint("use the newer smolvm that wrote it, or another --data-dir"));
        }
        // Two new processes may both find an old schema. The migration's transaction is exclusive,
        // and the version is read again inside it.
        migrations
            .to_latest(&mut self.connection)
            .or_else(|error| match migrations.current_version(&self.connection) {
                Ok(SchemaVersion::Inside(inside)) if inside.get() == MIGRATIONS.len() => Ok(()),
                _ => Err(error),
            })
            .map_err(|error| Error::new(ErrorKind::State, doing()).because(error))
    }
}

/// Switches a new database to WAL mode; one that is in it already is left alone.
///
/// The switch does not wait for a process that does the same at this moment, whatever the busy
/// timeout (sqlite.org/wal.html, section 4); a transaction does, so one is made before trying again.
fn enter_wal(connection: &Connection) -> rusqlite::Result<()> {
    for _ in 0..WAL_TRIES {
        let mode: String = connection.pragma_query_value(None, "journal_mode", |row| row.get(0))?;
        if mode == "wal" {
            return Ok(());
        }
        match connection.pragma_update(None, "journal_mode", "wal") {
            Err(error) if error.sqlite_error_code() == Some(rusqlite::ErrorCode::DatabaseBusy) => {
                connection.execute_batch("BEGIN IMMEDIATE; COMMIT")?;
            }
            other => return other,
        }
    }
    connection.pragma_update(None, "journal_mode", "wal")
}

/// Whether the disk has no room for what SQLite has to write.
fn is_full(error: &rusqlite::Error) -> bool {
    error.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull)
        || error.sqlite_error().is_some_and(|error| {
            [
                rusqlite::ffi::SQLITE_IOERR_SHMSIZE,
                rusqlite::ffi::SQLITE_IOERR_SHMOPEN,
            ]
            .contains(&error.extended_code)
        })
}

/// A database failure with what was being done.
fn sql(doing: impl Into<String>, error: rusqlite::Error) -> Error {
    use rusqlite::ErrorCode;
    let kind = match error.sqlite_error_code() {
        _ if is_full(&error) => ErrorKind::NoSpace,
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => ErrorKind::Busy,
        Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen | ErrorCode::PermissionDenied) => {
            ErrorKind::PermissionDenied
        }
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => ErrorKind::State,
        _ => ErrorKind::Internal,
    };
    let failure = Error::new(kind, doing).because(error);
    match kind {
        ErrorKind::State => failure.hint(
            "restore the file from a backup, or move it away: images are then prepared anew, and \
             `smolvm sandbox prune` removes what is left of the sandboxes that do not run",
        ),
        ErrorKind::NoSpace => failure.hint(reserve::FREE_SPACE),
        _ => failure,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schema(connection: &Connection) -> Vec<(String, String)> {
        let mut statement = connection
            .prepare("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY name")
            .expect("a query");
        statement
            .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))
            .expect("rows")
            .collect::<Result<_, _>>()
            .expect("rows")
    }

    #[test]
    fn a_fresh_database_equals_an_upgraded_one() {
        let fresh = Connection::open_in_memory().expect("memory");
        fresh
            .execute_batch(include_str!("../../schema/current.sql"))
            .expect("the full schema");
        for from in 0..MIGRATIONS.len() {
            let mut upgraded = Connection::open_in_memory().expect("memory");
            let migrations = Migrations::from_iter(MIGRATIONS.iter().map(|sql| M::up(sql)));
            migrations
                .to_version(&mut upgraded, from)
                .expect("an old version");
            migrations
                .to_latest(&mut upgraded)
                .expect("the newest version");
            assert_eq!(schema(&fresh), schema(&upgraded));
        }
    }

    #[test]
    fn a_newer_schema_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("state.db");
        drop(Store::open(&path).expect("a store"));
        let connection = Connection::open(&path).expect("the file");
        connection
            .pragma_update(None, "user_version", 99)
            .expect("a version");
        drop(connection);
        let error = Store::open(&path).expect_err("too new");
        assert_eq!(error.kind(), ErrorKind::State);
        assert!(error.to_string().contains("version 99"), "{error}");
    }

    #[test]
    fn on_a_full_disk_the_reserve_is_given_back_and_then_it_is_said() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("state.db");
        let mut store = Store::open(&path).expect("a store");
        store
            .put_host_fact("a", "boot", "b")
            .expect("room for little");
        // As full as a disk is to SQLite: it may take no more pages, until something is given back.
        let limit = |store: &Store, pages: i64| {
            store
                .connection
                .pragma_update(None, "max_page_count", pages)
                .expect("a limit");
        };
        limit(&store, 1);
        let reserve = path.with_file_name("reserve");
        std::fs::write(&reserve, "x").expect("a reserve");
        let big = "x".repeat(1 << 20);
        let mut tries = 0;
        let mut write = |connection: &mut Connection| {
            tries += 1;
            if !reserve.exists() {
                connection.pragma_update(None, "max_page_count", 1 << 20)?;
            }
            connection.execute(
                "INSERT OR REPLACE INTO host_facts (name, boot_id, value) VALUES ('a', 'b', ?)",
                [&big],
            )
        };
        store.in_any_case(&mut write).expect("written");
        assert_eq!(tries, 2);
        limit(&store, 1);
        let error = store
            .put_host_fact("c", "boot", &"y".repeat(8 << 20))
            .expect_err("there is no room");
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert_eq!(error.hint_text(), Some(reserve::FREE_SPACE));
    }

    #[test]
    fn garbage_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("state.db");
        std::fs::write(&path, vec![b'x'; 8192]).expect("a file");
        let error = Store::open(&path).expect_err("not a database");
        assert_eq!(error.kind(), ErrorKind::State);
        assert_eq!(std::fs::read(&path).expect("the file"), vec![b'x'; 8192]);
    }

    #[test]
    fn sixteen_processes_may_create_the_database_at_once() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("state.db");
        std::thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| Store::open(&path).expect("a store"));
            }
        });
    }

    #[test]
    fn nobody_else_may_read_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("state.db");
        std::fs::write(&path, "").expect("a file");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).expect("a mode");
        let _store = Store::open(&path).expect("a store");
        for entry in std::fs::read_dir(dir.path()).expect("a directory") {
            let entry = entry.expect("an entry");
            let mode = entry.metadata().expect("metadata").permissions().mode();
            assert_eq!(mode & 0o077, 0, "{}: {mode:o}", entry.path().display());
        }
    }

    #[test]
    fn an_absent_database_is_not_made_by_looking() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("state.db");
        assert!(Store::open_existing(&path).expect("a look").is_none());
        assert!(!path.exists());
    }
}

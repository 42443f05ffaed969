//! Users of jails in and out of the store. That each is one jail's is decided here, by a unique constraint
//! and one transaction at a time.

use rusqlite::{OptionalExtension as _, Row, TransactionBehavior, params};
use smolvm_host::ProcessIdentity;

use super::rows::{from_sql, taken, to_sql};
use super::{Store, sql};
use crate::error::Result;

/// A jail that is or may be there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JailRow {
    /// Its name: the sandbox's id, or that of a template.
    pub id: String,
    /// Number of its user and group.
    pub user: u32,
    /// Who had it made.
    pub maker: ProcessIdentity,
}

const COLUMNS: &str = "id, user, maker_pid, maker_start_ticks, maker_boot_id";
const READING: &str = "could not read the jails in the state database";

impl Store {
    /// Gives a jail the first of `candidates` that no other has; `None` if there is none.
    ///
    /// # Errors
    ///
    /// If it has one already.
    pub fn insert_jail(
        &mut self,
        id: &str,
        maker: &ProcessIdentity,
        mut candidates: impl Iterator<Item = u32>,
    ) -> Result<Option<JailRow>> {
        let doing = || format!("could not record the jail {id}");
        let transaction = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(|error| sql(doing(), error))?;
        let taken =
            taken(&transaction, "SELECT user FROM jails").map_err(|error| sql(doing(), error))?;
        let Some(user) = candidates.find(|user| !taken.contains(user)) else {
            return Ok(None);
        };
        transaction
            .prepare_cached(&format!(
                "INSERT INTO jails ({COLUMNS}) VALUES (?, ?, ?, ?, ?)"
            ))
            .and_then(|mut statement| {
                statement.execute(params![
                    id,
                    user,
                    maker.pid,
                    to_sql(maker.start_time_ticks),
                    maker.boot_id
                ])
            })
            .map_err(|error| sql(doing(), error))?;
        transaction.commit().map_err(|error| sql(doing(), error))?;
        Ok(Some(JailRow {
            id: id.to_owned(),
            user,
            maker: maker.clone(),
        }))
    }

    /// A jail, if it is recorded.
    pub fn jail(&self, id: &str) -> Result<Option<JailRow>> {
        self.connection
            .prepare_cached(&format!("SELECT {COLUMNS} FROM jails WHERE id = ?"))
            .and_then(|mut statement| statement.query_row([id], read).optional())
            .map_err(|error| sql(READING, error))
    }

    /// All jails, by user.
    pub fn jails(&self) -> Result<Vec<JailRow>> {
        self.connection
            .prepare_cached(&format!("SELECT {COLUMNS} FROM jails ORDER BY user"))
            .and_then(|mut statement| statement.query_map([], read)?.collect())
            .map_err(|error| sql(READING, error))
    }

    /// Forgets a jail. Idempotent.
    pub fn delete_jail(&mut self, id: &str) -> Result<()> {
        self.connection
            .prepare_cached("DELETE FROM jails WHERE id = ?")
            .and_then(|mut statement| statement.execute([id]))
            .map(|_| ())
            .map_err(|error| sql(format!("could not forget the jail {id}"), error))
    }
}

fn read(row: &Row<'_>) -> rusqlite::Result<JailRow> {
    Ok(JailRow {
        id: row.get(0)?,
        user: row.get(1)?,
        maker: ProcessIdentity {
            pid: row.get(2)?,
            start_time_ticks: from_sql(row.get(3)?),
            boot_id: row.get(4)?,
        },
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::store::rows::tests::{process, store};

    #[test]
    fn a_user_is_taken_once_and_free_again() {
        let (_dir, mut store) = store();
        let user = |store: &mut Store, id: &str| {
            let row = store.insert_jail(id, &process(7), 5..7).expect("written");
            assert_eq!(store.jail(id).expect("read"), row);
            row.map(|row| row.user)
        };
        assert_eq!(user(&mut store, "a"), Some(5));
        assert_eq!(user(&mut store, "b"), Some(6));
        assert_eq!(user(&mut store, "c"), None);
        store
            .insert_jail("a", &process(7), 9..10)
            .expect_err("it has one");
        store.delete_jail("a").expect("removed");
        store.delete_jail("a").expect("again");
        assert_eq!(user(&mut store, "c"), Some(5));
        let left: Vec<_> = store
            .jails()
            .expect("read")
            .into_iter()
            .map(|row| row.id)
            .collect();
        assert_eq!(left, ["c", "b"]);
    }

    #[test]
    fn sixteen_at_once_get_sixteen_users() {
        let (dir, _store) = store();
        let path = dir.path().join("state.db");
        let all: BTreeSet<_> = std::thread::scope(|scope| {
            let started: Vec<_> = (0..16)
                .map(|n| {
                    let path = &path;
                    scope.spawn(move || {
                        let mut store = Store::open(path).expect("a store");
                        let row = store.insert_jail(&n.to_string(), &process(7), 1..17);
                        row.expect("written").expect("one for each").user
                    })
                })
                .collect();
            let ended = started.into_iter().map(std::thread::ScopedJoinHandle::join);
            ended.map(|user| user.expect("ended")).collect()
        });
        assert_eq!(all.len(), 16, "{all:?}");
    }
}

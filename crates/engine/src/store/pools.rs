//! Pools in and out of the store.

use std::str::FromStr;

use jiff::Timestamp;
use rusqlite::{OptionalExtension as _, Params, Row, params};

use super::rows::{column, from_sql, instant};
use super::{Store, sql};
use crate::error::Result;
use crate::spec::DiskMode;

/// A pool's row: what its members are like, how many there are to be, and how it has done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolRow {
    /// Sixteen hexadecimal digits.
    pub id: String,
    /// Name of the members' image.
    pub image: String,
    /// Virtual CPUs of a member.
    pub cpus: u8,
    /// Guest memory of a member in MiB.
    pub memory_mib: u32,
    /// Size of a member's writable layer in MiB.
    pub disk_mib: u32,
    /// Where a member's changes go; never [`DiskMode::Shared`].
    pub disk_mode: DiskMode,
    /// Whether a member has a network device.
    pub nic: bool,
    /// Members there are to be.
    pub size: u32,
    /// What a member runs, each in a shell, before it is parked.
    pub commands: Vec<String>,
    /// Sandboxes that were claimed from it.
    pub hits: u64,
    /// Sandboxes that found it empty.
    pub misses: u64,
    /// Why the last filling ended early.
    pub failure: Option<String>,
    /// When it was made.
    pub created_at: Timestamp,
}

const COLUMNS: &str = "id, image, cpus, memory_mib, disk_mib, disk_mode, size, hits, misses, failure, \
                       created_ms, nic";

impl Store {
    /// Writes a pool, or gives the one of the same id another size and other commands. Its counts
    /// stay. Returns it as it is then; `None` if another pool is for the same sandboxes.
    pub fn put_pool(&mut self, row: &PoolRow) -> Result<Option<PoolRow>> {
        let doing = || format!("could not record the pool of image `{}`", row.image);
        let transaction = self
            .connection
            .transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)
            .map_err(|error| sql(doing(), error))?;
        let kept: Option<PoolRow> = transaction
            .query_row(
                &format!(
                    "INSERT INTO pools (id, image, cpus, memory_mib, disk_mib, disk_mode, nic, size, \
                     created_ms) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) \
                     ON CONFLICT (image, cpus, memory_mib, disk_mib, disk_mode, nic) \
                     DO UPDATE SET size = excluded.size, failure = NULL WHERE id = excluded.id \
                     RETURNING {COLUMNS}"
                ),
                params![
                    row.id,
                    row.image,
                    row.cpus,
                    row.memory_mib,
                    row.disk_mib,
                    row.disk_mode.as_str(),
                    row.nic,
                    row.size,
                    row.created_at.as_millisecond(),
                ],
                read,
            )
            .optional()
            .map_err(|error| sql(doing(), error))?;
        let Some(kept) = kept else {
            return Ok(None);
        };
        transaction
            .execute("DELETE FROM pool_commands WHERE pool_id = ?", [&kept.id])
            .map_err(|error| sql(doing(), error))?;
        for (position, command) in (0_u32..).zip(&row.commands) {
            transaction
                .execute(
                    "INSERT INTO pool_commands (pool_id, position, command) VALUES (?, ?, ?)",
                    params![kept.id, position, command],
                )
                .map_err(|error| sql(doing(), error))?;
        }
        transaction.commit().map_err(|error| sql(doing(), error))?;
        Ok(Some(PoolRow {
            commands: row.commands.clone(),
            ..kept
        }))
    }

    /// All pools, oldest first.
    pub fn pools(&self) -> Result<Vec<PoolRow>> {
        let read_all = || {
            let mut rows = self
                .connection
                .prepare_cached(&format!(
                    "SELECT {COLUMNS} FROM pools ORDER BY created_ms, id"
                ))?
                .query_map([], read)?
                .collect::<rusqlite::Result<Vec<_>>>()?;
            let mut commands = self.connection.prepare_cached(
                "SELECT command FROM pool_commands WHERE pool_id = ? ORDER BY position",
            )?;
            for row in &mut rows {
                row.commands = commands
                    .query_map([&row.id], |row| row.get(0))?
                    .collect::<rusqlite::Result<_>>()?;
            }
            Ok(rows)
        };
        read_all().map_err(|error| sql("could not read the pools in the state database", error))
    }

    /// Counts a sandbox that found the pool empty.
    pub fn count_pool_miss(&mut self, id: &str) -> Result<()> {
        let text = "UPDATE pools SET misses = misses + 1 WHERE id = ?1";
        self.change(text, id, params![id])
    }

    /// Takes back that a sandbox was claimed: it did not become one.
    pub fn uncount_pool_hit(&mut self, id: &str) -> Result<()> {
        let text = "UPDATE pools SET hits = max(hits - 1, 0) WHERE id = ?1";
        self.change(text, id, params![id])
    }

    /// Records why filling a pool ended early, or that it did not.
    pub fn set_pool_failure(&mut self, id: &str, failure: Option<&str>) -> Result<()> {
        let text = "UPDATE pools SET failure = ?2 WHERE id = ?1";
        self.change(text, id, params![id, failure])
    }

    /// Removes a pool's row. Idempotent.
    pub fn delete_pool(&mut self, id: &str) -> Result<()> {
        self.change("DELETE FROM pools WHERE id = ?1", id, params![id])
    }

    fn change(&mut self, text: &str, id: &str, values: impl Params) -> Result<()> {
        self.connection
            .prepare_cached(text)
            .and_then(|mut statement| statement.execute(values))
            .map(|_| ())
            .map_err(|error| sql(format!("could not change the record of pool {id}"), error))
    }
}

fn read(row: &Row<'_>) -> rusqlite::Result<PoolRow> {
    let mode: String = row.get(5)?;
    Ok(PoolRow {
        id: row.get(0)?,
        image: row.get(1)?,
        cpus: row.get(2)?,
        memory_mib: row.get(3)?,
        disk_mib: row.get(4)?,
        disk_mode: DiskMode::from_str(&mode).map_err(|error| column(5, error))?,
        size: row.get(6)?,
        commands: Vec::new(),
        hits: from_sql(row.get(7)?),
        misses: from_sql(row.get(8)?),
        failure: row.get(9)?,
        created_at: instant(row, 10)?,
        nic: row.get(11)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::rows::tests::{now, store};

    #[test]
    fn a_pool_keeps_its_counts_when_it_is_set_anew() {
        let (_dir, mut store) = store();
        let row = PoolRow {
            id: "p".to_owned(),
            image: "debian-12".to_owned(),
            cpus: 1,
            memory_mib: 512,
            disk_mib: 4096,
            disk_mode: DiskMode::Isolated,
            nic: false,
            size: 2,
            commands: vec!["true".to_owned(), "python3 -c pass".to_owned()],
            hits: 0,
            misses: 0,
            failure: None,
            created_at: now(),
        };
        assert_eq!(store.put_pool(&row).expect("written"), Some(row.clone()));
        store.count_pool_miss("p").expect("counted");
        store
            .set_pool_failure("p", Some("no room"))
            .expect("written");
        let wanted = PoolRow {
            size: 3,
            commands: vec!["ls".to_owned()],
            ..row.clone()
        };
        let other = PoolRow {
            id: "other".to_owned(),
            ..wanted.clone()
        };
        assert_eq!(store.put_pool(&other).expect("not written"), None);
        let again = store.put_pool(&wanted).expect("written").expect("its id");
        let expected = PoolRow {
            size: 3,
            misses: 1,
            commands: vec!["ls".to_owned()],
            ..row
        };
        assert_eq!(again, expected);
        assert_eq!(store.pools().expect("read"), [expected]);
        store.delete_pool("p").expect("deleted");
        assert_eq!(store.pools().expect("read"), []);
    }
}

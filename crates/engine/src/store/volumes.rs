//! Volumes in and out of the store. That a volume has one writer, or readers only, is decided here, in
//! the transaction in which a sandbox starts.

use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension as _, Row, TransactionBehavior, params};
use smolvm_host::process::ProcessIdentity;

use super::rows::{column, from_sql, instant, to_sql};
use super::{Store, sql};
use crate::error::{Error, ErrorKind, Result};
use crate::spec::SandboxName;
use crate::volumes::{VolumeUse, VolumeUser};

/// Where a volume is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum VolumeState {
    /// Its disk is being made.
    Making,
    /// Whole.
    Ready,
    /// Being removed.
    Deleting,
}

impl VolumeState {
    const ALL: [Self; 3] = [Self::Making, Self::Ready, Self::Deleting];

    /// The state's name in the store.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Making => "making",
            Self::Ready => "ready",
            Self::Deleting => "deleting",
        }
    }
}

/// A volume's row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeRow {
    /// Sixteen hexadecimal digits; its disk is named after it.
    pub id: String,
    /// Its name.
    pub name: SandboxName,
    /// State.
    pub state: VolumeState,
    /// Size of its disk in MiB.
    pub size_mib: u32,
    /// When it was made.
    pub created_at: Timestamp,
    /// The process that makes or removes it.
    pub holder: Option<ProcessIdentity>,
}

const COLUMNS: &str = "id, name, state, size_mib, created_ms, boot_id, holder_pid, holder_start";

impl Store {
    /// Writes a new volume.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::AlreadyExists`] if the name is taken.
    pub fn insert_volume(&mut self, row: &VolumeRow) -> Result<()> {
        self.connection
            .prepare_cached(&format!(
                "INSERT INTO volumes ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
            ))
            .and_then(|mut statement| {
                statement.execute(params![
                    row.id,
                    row.name.as_str(),
                    row.state.as_str(),
                    row.size_mib,
                    row.created_at.as_millisecond(),
                    row.holder.as_ref().map(|holder| &holder.boot_id),
                    row.holder.as_ref().map(|holder| holder.pid),
                    row.holder
                        .as_ref()
                        .map(|holder| to_sql(holder.start_time_ticks)),
                ])
            })
            .map(|_| ())
            .map_err(|error| match error.sqlite_error_code() {
                Some(rusqlite::ErrorCode::ConstraintViolation) => Error::new(
                    ErrorKind::AlreadyExists,
                    format!("a volume named `{}` exists already", row.name),
                )
                .hint(format!(
                    "choose another name, or remove it with `smolvm volume rm {}`",
                    row.name
                )),
                _ => sql(format!("could not record volume `{}`", row.name), error),
            })
    }

    /// Records that a volume's disk is there. Says whether the volume still is.
    pub fn set_volume_ready(&mut self, id: &str) -> Result<bool> {
        self.connection
            .prepare_cached(
                "UPDATE volumes SET state = 'ready', boot_id = NULL, holder_pid = NULL, \
                 holder_start = NULL WHERE id = ? AND state = 'making'",
            )
            .and_then(|mut statement| statement.execute([id]))
            .map(|changed| changed == 1)
            .map_err(|error| sql(format!("could not record that volume {id} is ready"), error))
    }

    /// Moves a volume that no sandbox has to `deleting`. As long as `holder` runs it is left to that;
    /// else any other may go on. Idempotent.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`] if a sandbox has it, running or not, named in the error.
    pub fn begin_delete_volume(
        &mut self,
        id: &str,
        holder: Option<&ProcessIdentity>,
    ) -> Result<()> {
        let doing = || format!("could not record that volume {id} is being removed");
        let mut users = Vec::new();
        let change = |connection: &mut Connection| {
            let transaction =
                connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            users = users_of(&transaction, id)?;
            if users.is_empty() {
                transaction
                    .prepare_cached(
                        "UPDATE volumes SET state = 'deleting', boot_id = ?2, holder_pid = ?3, \
                         holder_start = ?4 WHERE id = ?1",
                    )?
                    .execute(params![
                        id,
                        holder.map(|holder| &holder.boot_id),
                        holder.map(|holder| holder.pid),
                        holder.map(|holder| to_sql(holder.start_time_ticks)),
                    ])?;
            }
            transaction.commit()
        };
        self.in_any_case(change)
            .map_err(|error| sql(doing(), error))?;
        let Some(user) = users.first() else {
            return Ok(());
        };
        let name = self
            .select_volumes("WHERE id = ?", &[id])?
            .pop()
            .map_or_else(|| id.to_owned(), |row| row.name.to_string());
        let more = match users.len() {
            1 => String::new(),
            count => format!(" and {} more", count - 1),
        };
        Err(Error::new(
            ErrorKind::Busy,
            format!(
                "volume `{name}` is in use: sandbox `{}`{more} has it at {}",
                user.sandbox, user.target
            ),
        )
        .hint(format!(
            "remove the sandbox first, with `smolvm rm {}`",
            user.sandbox
        )))
    }

    /// Removes a volume's row. Idempotent.
    pub fn delete_volume(&mut self, id: &str) -> Result<()> {
        self.in_any_case(|connection| {
            connection
                .prepare_cached("DELETE FROM volumes WHERE id = ?")?
                .execute([id])
        })
        .map(|_| ())
        .map_err(|error| sql(format!("could not remove the record of volume {id}"), error))
    }

    /// All volumes, by name.
    pub fn volumes(&self) -> Result<Vec<VolumeRow>> {
        self.select_volumes("ORDER BY name", &[])
    }

    /// A volume by its name.
    pub fn volume_named(&self, name: &str) -> Result<Option<VolumeRow>> {
        Ok(self.select_volumes("WHERE name = ?", &[name])?.pop())
    }

    /// The sandboxes that have a volume, oldest first.
    pub fn volume_users(&self, id: &str) -> Result<Vec<VolumeUser>> {
        users_of(&self.connection, id).map_err(|error| sql(READING, error))
    }

    fn select_volumes(&self, clause: &str, values: &[&str]) -> Result<Vec<VolumeRow>> {
        self.connection
            .prepare_cached(&format!("SELECT {COLUMNS} FROM volumes {clause}"))
            .and_then(|mut statement| {
                statement
                    .query_map(rusqlite::params_from_iter(values), read)?
                    .collect()
            })
            .map_err(|error| sql(READING, error))
    }
}

const READING: &str = "could not read the volumes in the state database";

/// Records what volumes a new sandbox has, within the caller's transaction.
pub(super) fn insert_uses(connection: &Connection, id: &str, uses: &[VolumeUse]) -> Result<()> {
    for (position, volume) in uses.iter().enumerate() {
        let name = &volume.name;
        let inserted = connection
            .prepare_cached(
                "INSERT INTO sandbox_volumes (sandbox_id, position, volume_id, target, read_only) \
                 SELECT ?1, ?2, id, ?4, ?5 FROM volumes WHERE name = ?3 AND state = 'ready'",
            )
            .and_then(|mut statement| {
                statement.execute(params![
                    id,
                    i64::try_from(position).unwrap_or(i64::MAX),
                    name.as_str(),
                    volume.target,
                    volume.read_only
                ])
            })
            .map_err(|error| {
                sql(
                    format!("could not record the use of volume `{name}`"),
                    error,
                )
            })?;
        if inserted == 0 {
            return Err(unknown(name.as_str()));
        }
    }
    Ok(())
}

/// The volumes a sandbox has, in the order in which they were asked for.
pub(super) fn uses(connection: &Connection, id: &str) -> rusqlite::Result<Vec<VolumeUse>> {
    connection
        .prepare_cached(
            "SELECT name, target, read_only FROM sandbox_volumes \
             JOIN volumes ON volumes.id = volume_id WHERE sandbox_id = ? ORDER BY position",
        )?
        .query_map([id], |row| {
            Ok(VolumeUse {
                name: volume_name(row, 0)?,
                target: row.get(1)?,
                read_only: row.get(2)?,
            })
        })?
        .collect()
}

/// Refuses a sandbox that is about to start, within the caller's transaction, if a sandbox that runs
/// has one of its volumes, and one of the two writes to it.
pub(super) fn refuse_taken(connection: &Connection, id: &str) -> Result<()> {
    let taken: Option<(String, String, bool)> = connection
        .prepare_cached(
            "SELECT volumes.name, other.name, theirs.read_only FROM sandbox_volumes AS ours \
             JOIN sandbox_volumes AS theirs ON theirs.volume_id = ours.volume_id \
                 AND theirs.sandbox_id <> ours.sandbox_id \
             JOIN sandboxes AS other ON other.id = theirs.sandbox_id \
             JOIN volumes ON volumes.id = ours.volume_id \
             WHERE ours.sandbox_id = ? AND (ours.read_only = 0 OR theirs.read_only = 0) \
                 AND other.state IN ('starting', 'running', 'stopping') LIMIT 1",
        )
        .and_then(|mut statement| {
            statement
                .query_row([id], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
                .optional()
        })
        .map_err(|error| sql(READING, error))?;
    let Some((volume, holder, reads)) = taken else {
        return Ok(());
    };
    let what = if reads { "reads" } else { "writes to" };
    Err(Error::new(
        ErrorKind::Busy,
        format!("volume `{volume}` is in use: sandbox `{holder}` {what} it"),
    )
    .hint(format!(
        "stop that one first, with `smolvm stop {holder}`; sandboxes that all have it with `:ro` may \
         run at one time"
    )))
}

pub(crate) fn unknown(name: &str) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!("there is no volume named `{}`", name.escape_debug()),
    )
    .hint(format!(
        "make it with `smolvm volume create {}`, or see which there are with `smolvm volume ls`",
        name.escape_debug()
    ))
}

fn users_of(connection: &Connection, id: &str) -> rusqlite::Result<Vec<VolumeUser>> {
    connection
        .prepare_cached(
            "SELECT name, target, read_only, state IN ('starting', 'running', 'stopping') \
             FROM sandbox_volumes JOIN sandboxes ON id = sandbox_id WHERE volume_id = ? \
             ORDER BY created_ms, id",
        )?
        .query_map([id], |row| {
            Ok(VolumeUser {
                sandbox: row.get(0)?,
                target: row.get(1)?,
                read_only: row.get(2)?,
                running: row.get(3)?,
            })
        })?
        .collect()
}

fn volume_name(row: &Row<'_>, at: usize) -> rusqlite::Result<SandboxName> {
    let name: String = row.get(at)?;
    name.parse().map_err(|error| column(at, error))
}

fn read(row: &Row<'_>) -> rusqlite::Result<VolumeRow> {
    let state: String = row.get(2)?;
    let boot_id: Option<String> = row.get(5)?;
    let process = row
        .get::<_, Option<i32>>(6)?
        .zip(row.get::<_, Option<i64>>(7)?);
    Ok(VolumeRow {
        id: row.get(0)?,
        name: volume_name(row, 1)?,
        state: VolumeState::ALL
            .into_iter()
            .find(|known| known.as_str() == state)
            .ok_or_else(|| column(2, Error::new(ErrorKind::State, "unknown state")))?,
        size_mib: row.get(3)?,
        created_at: instant(row, 4)?,
        holder: boot_id
            .zip(process)
            .map(|(boot_id, (pid, start))| ProcessIdentity {
                pid,
                start_time_ticks: from_sql(start),
                boot_id,
            }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::State;
    use crate::store::rows::tests::{now, process, row, store};

    fn volume(name: &str) -> VolumeRow {
        VolumeRow {
            id: format!("v-{name}"),
            name: name.parse().expect("a name"),
            state: VolumeState::Making,
            size_mib: 64,
            created_at: now(),
            holder: Some(process(4)),
        }
    }

    /// A store with a volume `data`, and sandboxes that have it, each with whether it only reads.
    fn used(sandboxes: &[(&str, bool)]) -> (tempfile::TempDir, Store) {
        let (dir, mut store) = store();
        store.insert_volume(&volume("data")).expect("written");
        store.set_volume_ready("v-data").expect("ready");
        for (name, read_only) in sandboxes {
            let mut row = row(name);
            row.spec.volumes = vec![VolumeUse {
                name: "data".parse().expect("a name"),
                target: "/srv".to_owned(),
                read_only: *read_only,
            }];
            store.insert_sandbox(&row).expect("written");
        }
        (dir, store)
    }

    fn start(store: &mut Store, name: &str) -> Result<bool> {
        let from = [State::Created, State::Stopped];
        store.begin_start(&format!("id-{name}"), &from, &process(1), now())
    }

    #[test]
    fn a_row_comes_back_as_it_was_written() {
        let (_dir, mut store) = store();
        let mut data = volume("data");
        store.insert_volume(&data).expect("written");
        assert_eq!(store.volumes().expect("read"), [data.clone()]);
        let error = store.insert_volume(&VolumeRow {
            id: "other".to_owned(),
            ..data.clone()
        });
        assert_eq!(error.expect_err("taken").kind(), ErrorKind::AlreadyExists);
        assert!(store.set_volume_ready("v-data").expect("ready"));
        assert!(!store.set_volume_ready("v-data").expect("already"));
        data.state = VolumeState::Ready;
        data.holder = None;
        assert_eq!(store.volume_named("data").expect("read"), Some(data));
        store.begin_delete_volume("v-data", None).expect("deleting");
        store.delete_volume("v-data").expect("deleted");
        store.delete_volume("v-data").expect("deleted again");
        assert_eq!(store.volumes().expect("read"), []);
    }

    #[test]
    fn a_volume_that_is_not_there_or_not_whole_is_not_given() {
        let (_dir, mut store) = store();
        store.insert_volume(&volume("data")).expect("written");
        for name in ["data", "other"] {
            let mut sandbox = row("a");
            sandbox.spec.volumes = vec![VolumeUse {
                name: name.parse().expect("a name"),
                target: "/srv".to_owned(),
                read_only: false,
            }];
            let error = store.insert_sandbox(&sandbox).expect_err("no volume");
            assert_eq!(error.kind(), ErrorKind::NotFound);
            assert_eq!(store.sandboxes().expect("read"), [], "nothing is left");
        }
    }

    #[test]
    fn a_volume_has_one_writer_or_readers() {
        for (first, second, together) in [
            (false, false, false),
            (false, true, false),
            (true, false, false),
            (true, true, true),
        ] {
            let (_dir, mut store) = used(&[("a", first), ("b", second)]);
            assert!(start(&mut store, "a").expect("free"));
            let started = start(&mut store, "b");
            if together {
                assert!(started.expect("readers only"));
                continue;
            }
            let error = started.expect_err("taken");
            assert_eq!(error.kind(), ErrorKind::Busy);
            assert!(error.to_string().contains("sandbox `a`"), "{error}");
            let row = store.sandbox("id-b").expect("read").expect("there");
            assert_eq!(row.state, State::Created, "nothing has changed");
            let stopped = store.transition("id-a", &[State::Starting], State::Stopped, None, now());
            assert!(stopped.expect("stopped"));
            assert!(start(&mut store, "b").expect("free now"));
        }
    }

    #[test]
    fn a_volume_that_a_sandbox_has_is_not_removed() {
        let (_dir, mut store) = used(&[("a", true)]);
        let error = store
            .begin_delete_volume("v-data", None)
            .expect_err("in use");
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(error.to_string().contains("sandbox `a`"), "{error}");
        assert!(store.delete_volume("v-data").is_err(), "by the database");
        // Whoever is being removed needs it no more.
        store.begin_delete("id-a", None).expect("deleting");
        store.begin_delete_volume("v-data", None).expect("free");
        store.delete_volume("v-data").expect("deleted");
    }
}

//! Snapshots in and out of the store.

use std::str::FromStr;

use jiff::Timestamp;
use rusqlite::{Row, named_params, params};
use smolvm_host::process::ProcessIdentity;

use super::networks::{ALLOWED_OF_SNAPSHOT, insert_allowed, read_allowed};
use super::rows::{column, from_sql, instant, reach, to_sql};
use super::{Store, sql};
use crate::error::{Error, ErrorKind, Result};
use crate::network::NetworkSpec;
use crate::spec::DiskMode;
use crate::ssh::SshSpec;

/// Where a snapshot is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SnapshotState {
    /// Its files are being written.
    Making,
    /// Whole; sandboxes can be started from it.
    Ready,
    /// Being removed.
    Deleting,
}

impl SnapshotState {
    const ALL: [Self; 3] = [Self::Making, Self::Ready, Self::Deleting];

    /// The state's name in tables and in the store.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Making => "making",
            Self::Ready => "ready",
            Self::Deleting => "deleting",
        }
    }
}

/// A snapshot's row: what a sandbox that is started from it is like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotRow {
    /// Sixteen hexadecimal digits; its directory is named after it.
    pub id: String,
    /// Its name. That of a fork's, which lives for as long as the fork takes, begins with a dot.
    pub name: String,
    /// State.
    pub state: SnapshotState,
    /// Name of the sandbox it was taken of.
    pub sandbox: String,
    /// Name of the image.
    pub image: String,
    /// Digest of the image.
    pub image_digest: String,
    /// Directory name of the kernel.
    pub kernel: String,
    /// Virtual CPUs.
    pub cpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Size of the writable layer in MiB.
    pub disk_mib: u32,
    /// Where changes to the root file system go; never [`DiskMode::Shared`].
    pub disk_mode: DiskMode,
    /// Environment of every command.
    pub env: Vec<(String, String)>,
    /// Working directory of commands that name none.
    pub workdir: Option<String>,
    /// User of commands that name none.
    pub user: Option<String>,
    /// What it may reach.
    pub network: NetworkSpec,
    /// Whether the machine has a network device, which one that was told to reach nothing keeps.
    pub nic: bool,
    /// When it was taken.
    pub created_at: Timestamp,
    /// Who may come in by SSH, if anybody may.
    pub ssh: Option<SshSpec>,
    /// The process that makes or removes it.
    pub holder: Option<ProcessIdentity>,
}

const COLUMNS: &str = "id, name, state, sandbox, image, image_digest, kernel, cpus, memory_mib, disk_mib, \
                       disk_mode, workdir, user, created_ms, boot_id, holder_pid, holder_start, \
                       network, nic, authorized_keys";

impl Store {
    /// Writes a new snapshot.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::AlreadyExists`] if the name is taken.
    pub fn insert_snapshot(&mut self, row: &SnapshotRow) -> Result<()> {
        let doing = || format!("could not record snapshot `{}`", row.name);
        let transaction = self
            .connection
            .transaction()
            .map_err(|error| sql(doing(), error))?;
        transaction
            .prepare_cached(&format!(
                "INSERT INTO snapshots ({COLUMNS}) VALUES (:id, :name, :state, :sandbox, :image, \
                 :image_digest, :kernel, :cpus, :memory_mib, :disk_mib, :disk_mode, :workdir, :user, \
                 :created_ms, :boot_id, :holder_pid, :holder_start, :network, :nic, :authorized_keys)"
            ))
            .and_then(|mut statement| {
                statement.execute(named_params! {
                    ":id": row.id,
                    ":name": row.name,
                    ":state": row.state.as_str(),
                    ":sandbox": row.sandbox,
                    ":image": row.image,
                    ":image_digest": row.image_digest,
                    ":kernel": row.kernel,
                    ":cpus": row.cpus,
                    ":memory_mib": row.memory_mib,
                    ":disk_mib": row.disk_mib,
                    ":disk_mode": row.disk_mode.as_str(),
                    ":workdir": row.workdir,
                    ":user": row.user,
                    ":created_ms": row.created_at.as_millisecond(),
                    ":boot_id": row.holder.as_ref().map(|holder| &holder.boot_id),
                    ":holder_pid": row.holder.as_ref().map(|holder| holder.pid),
                    ":holder_start": row.holder.as_ref().map(|holder| to_sql(holder.start_time_ticks)),
                    ":network": row.network.reach.as_str(),
                    ":nic": row.nic,
                    ":authorized_keys": row.ssh.as_ref().map(SshSpec::stored),
                })
            })
            .map_err(|error| match error.sqlite_error_code() {
                Some(rusqlite::ErrorCode::ConstraintViolation) => Error::new(
                    ErrorKind::AlreadyExists,
                    format!("a snapshot named `{}` exists already", row.name),
                )
                .hint(format!(
                    "choose another --name, or remove it with `smolvm snapshot rm {}`",
                    row.name
                )),
                _ => sql(doing(), error),
            })?;
        for (name, value) in &row.env {
            transaction
                .prepare_cached(
                    "INSERT INTO snapshot_env (snapshot_id, name, value) VALUES (?, ?, ?)",
                )
                .and_then(|mut statement| statement.execute(params![row.id, name, value]))
                .map_err(|error| sql(doing(), error))?;
        }
        insert_allowed(&transaction, ALLOWED_OF_SNAPSHOT, &row.id, &row.network)
            .map_err(|error| sql(doing(), error))?;
        transaction.commit().map_err(|error| sql(doing(), error))
    }

    /// Moves a snapshot to a state, with the process that brings it there if that takes time.
    pub fn set_snapshot_state(
        &mut self,
        id: &str,
        state: SnapshotState,
        holder: Option<&ProcessIdentity>,
    ) -> Result<()> {
        self.in_any_case(|connection| {
            connection
                .prepare_cached(
                    "UPDATE snapshots SET state = ?2, boot_id = ?3, holder_pid = ?4, \
                     holder_start = ?5 WHERE id = ?1",
                )?
                .execute(params![
                    id,
                    state.as_str(),
                    holder.map(|holder| &holder.boot_id),
                    holder.map(|holder| holder.pid),
                    holder.map(|holder| to_sql(holder.start_time_ticks)),
                ])
        })
        .map(|_| ())
        .map_err(|error| {
            let state = state.as_str();
            sql(
                format!("could not record that snapshot {id} is {state}"),
                error,
            )
        })
    }

    /// Removes a snapshot's row. Idempotent.
    pub fn delete_snapshot(&mut self, id: &str) -> Result<()> {
        self.in_any_case(|connection| {
            connection
                .prepare_cached("DELETE FROM snapshots WHERE id = ?")?
                .execute([id])
        })
        .map(|_| ())
        .map_err(|error| {
            sql(
                format!("could not remove the record of snapshot {id}"),
                error,
            )
        })
    }

    /// All snapshots, oldest first.
    pub fn snapshots(&self) -> Result<Vec<SnapshotRow>> {
        self.select_snapshots("ORDER BY created_ms, id", &[])
    }

    /// A snapshot by its name.
    pub fn snapshot_named(&self, name: &str) -> Result<Option<SnapshotRow>> {
        Ok(self.select_snapshots("WHERE name = ?", &[name])?.pop())
    }

    fn select_snapshots(&self, clause: &str, values: &[&str]) -> Result<Vec<SnapshotRow>> {
        let read_all = || {
            let mut rows = self
                .connection
                .prepare_cached(&format!("SELECT {COLUMNS} FROM snapshots {clause}"))?
                .query_map(rusqlite::params_from_iter(values), read)?
                .collect::<rusqlite::Result<Vec<_>>>()?;
            let mut env = self.connection.prepare_cached(
                "SELECT name, value FROM snapshot_env WHERE snapshot_id = ? ORDER BY name",
            )?;
            for row in &mut rows {
                row.env = env
                    .query_map([&row.id], |row| Ok((row.get(0)?, row.get(1)?)))?
                    .collect::<rusqlite::Result<_>>()?;
                read_allowed(
                    &self.connection,
                    ALLOWED_OF_SNAPSHOT,
                    &row.id,
                    &mut row.network,
                )?;
            }
            Ok(rows)
        };
        read_all().map_err(|error| sql("could not read the snapshots in the state database", error))
    }
}

fn read(row: &Row<'_>) -> rusqlite::Result<SnapshotRow> {
    let state: String = row.get(2)?;
    let mode: String = row.get(10)?;
    let boot_id: Option<String> = row.get(14)?;
    let process = row
        .get::<_, Option<i32>>(15)?
        .zip(row.get::<_, Option<i64>>(16)?);
    Ok(SnapshotRow {
        id: row.get(0)?,
        name: row.get(1)?,
        state: SnapshotState::ALL
            .into_iter()
            .find(|known| known.as_str() == state)
            .ok_or_else(|| column(2, Error::new(ErrorKind::State, "unknown state")))?,
        sandbox: row.get(3)?,
        image: row.get(4)?,
        image_digest: row.get(5)?,
        kernel: row.get(6)?,
        cpus: row.get(7)?,
        memory_mib: row.get(8)?,
        disk_mib: row.get(9)?,
        disk_mode: DiskMode::from_str(&mode).map_err(|error| column(10, error))?,
        env: Vec::new(),
        workdir: row.get(11)?,
        user: row.get(12)?,
        network: NetworkSpec {
            reach: reach(row, 17)?,
            allowed: Vec::new(),
        },
        nic: row.get(18)?,
        created_at: instant(row, 13)?,
        ssh: row
            .get::<_, Option<String>>(19)?
            .map(|keys| SshSpec::from_stored(&keys)),
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
    use crate::store::rows::tests::{now, process, store};

    #[test]
    fn a_row_comes_back_as_it_was_written() {
        let (_dir, mut store) = store();
        let mut row = SnapshotRow {
            id: "s".to_owned(),
            name: "before".to_owned(),
            state: SnapshotState::Making,
            sandbox: "box".to_owned(),
            image: "debian-12".to_owned(),
            image_digest: "sha256:0".to_owned(),
            kernel: "stock".to_owned(),
            cpus: 2,
            memory_mib: 256,
            disk_mib: 1024,
            disk_mode: DiskMode::Memory,
            env: vec![("A".to_owned(), "1".to_owned())],
            workdir: Some("/srv".to_owned()),
            user: None,
            network: NetworkSpec::listed(vec!["example.com".parse().expect("a name")]),
            nic: true,
            created_at: now(),
            ssh: Some(SshSpec::default()),
            holder: Some(process(4)),
        };
        store.insert_snapshot(&row).expect("written");
        assert_eq!(store.snapshots().expect("read"), [row.clone()]);
        let error = store.insert_snapshot(&SnapshotRow {
            id: "other".to_owned(),
            ..row.clone()
        });
        assert_eq!(error.expect_err("taken").kind(), ErrorKind::AlreadyExists);

        store
            .set_snapshot_state("s", SnapshotState::Ready, None)
            .expect("ready");
        row.state = SnapshotState::Ready;
        row.holder = None;
        assert_eq!(store.snapshot_named("before").expect("read"), Some(row));
        store.delete_snapshot("s").expect("deleted");
        store.delete_snapshot("s").expect("deleted again");
        assert_eq!(store.snapshot_named("before").expect("read"), None);
    }
}

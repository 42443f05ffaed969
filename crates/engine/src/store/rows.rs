//! Rows in and out of the store.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use jiff::Timestamp;
use rusqlite::types::Type;
use rusqlite::{Connection, OptionalExtension as _, Row, named_params, params};
use smolvm_host::oci::ImageConfig;
use smolvm_host::process::ProcessIdentity;

use super::mounts::{insert_mounts, mounts};
use super::networks::{ALLOWED_OF_SANDBOX, insert_allowed, read_allowed};
use super::ports::{insert_published, published};
use super::volumes::{insert_uses, refuse_taken, uses};
use super::{Store, sql};
use crate::error::{Error, ErrorKind, Result};
use crate::network::{NetworkSpec, Reach};
use crate::ports::PublishedPort;
use crate::spec::{DiskMode, SandboxName, SandboxSpec};
use crate::ssh::SshSpec;

/// Where a sandbox is in its life.
///
/// ```text
/// created ──start──> starting ──ready──> running ──stop──> stopping ──> stopped ──start──> …
///                        └──── never ready, or its keeper died ────> error ──start──> …
/// running ──pause──> paused ──resume──> running
/// any ──delete──> deleting ──> (no row)
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// Made, never started.
    Created,
    /// Its machine is coming up.
    Starting,
    /// Its guest serves.
    Running,
    /// Its virtual CPUs stand still; everything else is as while it runs.
    Paused,
    /// Its guest is going down.
    Stopping,
    /// Off; can be started again.
    Stopped,
    /// Off, and not because anybody asked; the reason says why. Can be started again.
    Error,
    /// Being removed.
    Deleting,
}

impl State {
    /// All states.
    pub const ALL: [Self; 8] = [
        Self::Created,
        Self::Starting,
        Self::Running,
        Self::Paused,
        Self::Stopping,
        Self::Stopped,
        Self::Error,
        Self::Deleting,
    ];

    /// The state's name in tables and in the store.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Error => "error",
            Self::Deleting => "deleting",
        }
    }

    /// The state in a sentence, after "it is".
    pub(crate) fn in_words(self) -> &'static str {
        match self {
            Self::Created => "not started yet",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Error => "off after an error",
            Self::Deleting => "being deleted",
        }
    }

    /// The word in the store, where pausing is a time beside `running` and not a state of its own.
    fn stored(self) -> &'static str {
        match self {
            Self::Paused => Self::Running.as_str(),
            other => other.as_str(),
        }
    }

    /// Whether a process is meant to hold the sandbox in this state.
    #[must_use]
    pub fn is_held(self) -> bool {
        match self {
            Self::Starting | Self::Running | Self::Paused | Self::Stopping => true,
            Self::Created | Self::Stopped | Self::Error | Self::Deleting => false,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A sandbox's row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxRow {
    /// Sixteen hexadecimal digits; every host thing is named after it.
    pub id: String,
    /// State.
    pub state: State,
    /// Why it is in that state, for people.
    pub reason: Option<String>,
    /// What it was asked to be.
    pub spec: SandboxSpec,
    /// Digest of its image at creation.
    pub image_digest: String,
    /// Directory name of its kernel.
    pub kernel: String,
    /// Engine of the last start, from the moment its keeper took over.
    pub engine: Option<String>,
    /// Acceleration of the last start.
    pub accel: Option<String>,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it was last started.
    pub started_at: Option<Timestamp>,
    /// When it last stopped.
    pub stopped_at: Option<Timestamp>,
    /// Who holds it: while it starts the process that starts it, then its keeper. For an
    /// ephemeral sandbox also the process that made it.
    pub holder: Option<ProcessIdentity>,
    /// The VMM of the last start.
    pub vmm: Option<ProcessIdentity>,
    /// The pool it is a member of, until it is claimed.
    pub pool: Option<String>,
    /// The port of the host on which it is reached by SSH, once it has one: see
    /// [`Store::allocate_ssh_port`].
    pub ssh_port: Option<u16>,
}

/// What a sandbox that was made ahead becomes when it is claimed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Its name.
    pub name: SandboxName,
    /// Environment of every command.
    pub env: Vec<(String, String)>,
    /// Working directory of commands that name none.
    pub workdir: Option<String>,
    /// User of commands that name none.
    pub user: Option<String>,
    /// Time from now at which it is destroyed.
    pub ttl: Option<Duration>,
    /// Whether it is destroyed as soon as it stops.
    pub ephemeral: bool,
    /// Ports of the host that lead to it.
    pub ports: Vec<PublishedPort>,
    /// What it may reach.
    pub network: NetworkSpec,
    /// Who may come in by SSH, if anybody may.
    pub ssh: Option<SshSpec>,
}

/// An image's row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRow {
    /// Name.
    pub name: String,
    /// `sha256:` and 64 hexadecimal digits, of the root file system image.
    pub digest: String,
    /// Size of that in bytes.
    pub size_bytes: u64,
    /// When it was made.
    pub created_at: Timestamp,
    /// Where it came from, for people.
    pub source: String,
    /// Digest of its manifest, where a registry or archive gave it one.
    pub manifest: Option<String>,
    /// What it says of the commands that are run in it.
    pub config: ImageConfig,
}

const SANDBOX_COLUMNS: &str = "id, name, state, reason, image, image_digest, kernel, cpus, memory_mib, \
     disk_mib, disk_mode, workdir, user, ttl_ms, ephemeral, engine, accel, created_ms, started_ms, \
     stopped_ms, boot_id, holder_pid, holder_start, vmm_pid, vmm_start, paused_ms, pool_id, network, \
     authorized_keys";

impl Store {
    /// Writes a new sandbox in state `created`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::AlreadyExists`] if the name is taken, [`ErrorKind::Busy`] if a port is,
    /// [`ErrorKind::NotFound`] for a volume that is not there.
    pub fn insert_sandbox(&mut self, row: &SandboxRow) -> Result<()> {
        let doing = || format!("could not record sandbox `{}`", row.spec.name);
        let transaction = self
            .connection
            .transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)
            .map_err(|error| sql(doing(), error))?;
        transaction
            .prepare_cached(
                "INSERT INTO sandboxes (id, name, state, image, image_digest, kernel, cpus, memory_mib, \
                 disk_mib, disk_mode, workdir, user, ttl_ms, ephemeral, created_ms, boot_id, holder_pid, \
                 holder_start, pool_id, network, authorized_keys) VALUES (:id, :name, :state, :image, :image_digest, :kernel, :cpus, \
                 :memory_mib, :disk_mib, :disk_mode, :workdir, :user, :ttl_ms, :ephemeral, :created_ms, \
                 :boot_id, :holder_pid, :holder_start, :pool_id, :network, :authorized_keys)",
            )
            .and_then(|mut statement| {
                statement.execute(named_params! {
                    ":id": row.id,
                    ":name": row.spec.name.as_str(),
                    ":state": row.state.as_str(),
                    ":image": row.spec.image,
                    ":image_digest": row.image_digest,
                    ":kernel": row.kernel,
                    ":cpus": row.spec.cpus,
                    ":memory_mib": row.spec.memory_mib,
                    ":disk_mib": row.spec.disk_mib,
                    ":disk_mode": row.spec.disk_mode.as_str(),
                    ":workdir": row.spec.workdir,
                    ":user": row.spec.user,
                    ":ttl_ms": row.spec.ttl.map(millis),
                    ":ephemeral": row.spec.ephemeral,
                    ":created_ms": row.created_at.as_millisecond(),
                    ":boot_id": row.holder.as_ref().map(|holder| &holder.boot_id),
                    ":holder_pid": row.holder.as_ref().map(|holder| holder.pid),
                    ":holder_start": row.holder.as_ref().map(|holder| to_sql(holder.start_time_ticks)),
                    ":pool_id": row.pool,
                    ":network": row.spec.network.reach.as_str(),
                    ":authorized_keys": row.spec.ssh.as_ref().map(SshSpec::stored),
                })
            })
            .map_err(|error| match error.sqlite_error_code() {
                Some(rusqlite::ErrorCode::ConstraintViolation) => name_taken(&row.spec.name),
                _ => sql(doing(), error),
            })?;
        insert_env(&transaction, &row.id, &row.spec.env)
            .and_then(|()| {
                let network = &row.spec.network;
                insert_allowed(&transaction, ALLOWED_OF_SANDBOX, &row.id, network)
            })
            .map_err(|error| sql(doing(), error))?;
        for port in &row.spec.ports {
            insert_published(&transaction, &row.id, port)?;
        }
        insert_uses(&transaction, &row.id, &row.spec.volumes)?;
        insert_mounts(&transaction, &row.id, &row.spec.mounts)
            .map_err(|error| sql(doing(), error))?;
        transaction.commit().map_err(|error| sql(doing(), error))
    }

    /// Gives a running member of a pool the identity of the sandbox it becomes, in state `starting`,
    /// and counts that for the pool, which it returns; `None` if it is a member no more.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::AlreadyExists`] if the name is taken, [`ErrorKind::Busy`] if a port is.
    pub fn claim_member(
        &mut self,
        id: &str,
        new: &Identity,
        now: Timestamp,
    ) -> Result<Option<String>> {
        let doing = || format!("could not record sandbox `{}`", new.name);
        let transaction = self
            .connection
            .transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)
            .map_err(|error| sql(doing(), error))?;
        let pool = transaction
            .prepare_cached(
                "UPDATE pools SET hits = hits + 1 WHERE id = \
                 (SELECT pool_id FROM sandboxes WHERE id = ? AND state = 'running') RETURNING id",
            )
            .and_then(|mut statement| statement.query_row([id], |row| row.get(0)).optional())
            .map_err(|error| sql(doing(), error))?;
        let claimed = transaction
            .prepare_cached(
                "UPDATE sandboxes SET name = :name, state = 'starting', workdir = :workdir, \
                 user = :user, ttl_ms = :ttl_ms, ephemeral = :ephemeral, network = :network, created_ms = :now, \
                 started_ms = :now, paused_ms = NULL, pool_id = NULL, \
                 authorized_keys = :authorized_keys \
                 WHERE id = :id AND state = 'running' AND pool_id IS NOT NULL",
            )
            .and_then(|mut statement| {
                statement.execute(named_params! {
                    ":id": id,
                    ":name": new.name.as_str(),
                    ":workdir": new.workdir,
                    ":user": new.user,
                    ":ttl_ms": new.ttl.map(millis),
                    ":ephemeral": new.ephemeral,
                    ":network": new.network.reach.as_str(),
                    ":authorized_keys": new.ssh.as_ref().map(SshSpec::stored),
                    ":now": now.as_millisecond(),
                })
            })
            .map_err(|error| match error.sqlite_error_code() {
                Some(rusqlite::ErrorCode::ConstraintViolation) => name_taken(&new.name),
                _ => sql(doing(), error),
            })?;
        if claimed == 0 {
            return Ok(None);
        }
        // A member has the environment of its image, and the new identity has it as well.
        transaction
            .execute("DELETE FROM sandbox_env WHERE sandbox_id = ?", [id])
            .map_err(|error| sql(doing(), error))?;
        insert_env(&transaction, id, &new.env)
            .and_then(|()| insert_allowed(&transaction, ALLOWED_OF_SANDBOX, id, &new.network))
            .map_err(|error| sql(doing(), error))?;
        for port in &new.ports {
            insert_published(&transaction, id, port)?;
        }
        transaction.commit().map_err(|error| sql(doing(), error))?;
        // Its pool is not removed before its members are.
        Ok(Some(pool.unwrap_or_default()))
    }

    /// Records whether a running sandbox is paused. Says whether it runs.
    pub fn set_paused(&mut self, id: &str, since: Option<Timestamp>) -> Result<bool> {
        self.in_any_case(|connection| {
            connection
                .prepare_cached(
                    "UPDATE sandboxes SET paused_ms = ?2 WHERE id = ?1 AND state = 'running'",
                )?
                .execute(params![id, since.map(Timestamp::as_millisecond)])
        })
        .map(|changed| changed == 1)
        .map_err(|error| sql(format!("could not record a pause of sandbox {id}"), error))
    }

    /// Takes the name of a sandbox that is about to be removed away, so that it is free at once, and
    /// moves it to `deleting`. It needs its image and its kernel no more, has no ports and no volumes, and is in no pool. As long as
    /// `holder` runs it is left to that; else, if this process fails, any other may go on, unless a
    /// keeper has its lock. Idempotent.
    pub fn begin_delete(&mut self, id: &str, holder: Option<&ProcessIdentity>) -> Result<()> {
        let change = |connection: &mut rusqlite::Connection| {
            let transaction = connection.transaction()?;
            transaction
                .prepare_cached(
                    "UPDATE sandboxes SET state = 'deleting', reason = NULL, paused_ms = NULL, \
                     name = ?2, pool_id = NULL, holder_pid = ?3, holder_start = ?4 WHERE id = ?1",
                )?
                .execute(params![
                    id,
                    SandboxName::hidden(id).as_str(),
                    holder.map(|holder| holder.pid),
                    holder.map(|holder| to_sql(holder.start_time_ticks)),
                ])?;
            for text in [
                "DELETE FROM ports WHERE sandbox_id = ?",
                "DELETE FROM sandbox_volumes WHERE sandbox_id = ?",
            ] {
                transaction.prepare_cached(text)?.execute([id])?;
            }
            transaction.commit()
        };
        self.in_any_case(change).map_err(|error| {
            let deleting = State::Deleting;
            sql(
                format!("could not record that sandbox {id} is {deleting}"),
                error,
            )
        })
    }

    /// Moves a sandbox to `starting` with `holder` as the process that starts it, if it is in one
    /// of `from`. Says whether it did: of two starters one wins.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`] if another sandbox writes to the layer this one shares, or has one of its
    /// volumes while one of the two writes to it.
    pub fn begin_start(
        &mut self,
        id: &str,
        from: &[State],
        holder: &ProcessIdentity,
        now: Timestamp,
    ) -> Result<bool> {
        let text = format!(
            "UPDATE sandboxes SET state = 'starting', reason = NULL, started_ms = ?2, stopped_ms = NULL, \
             engine = NULL, accel = NULL, boot_id = ?3, holder_pid = ?4, holder_start = ?5, \
             vmm_pid = NULL, vmm_start = NULL \
             WHERE id = ?1 AND state IN ({})",
            list(from)
        );
        let values = params![
            id,
            now.as_millisecond(),
            holder.boot_id,
            holder.pid,
            to_sql(holder.start_time_ticks)
        ];
        let doing = || format!("could not record that sandbox {id} starts");
        let transaction = self
            .connection
            .transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)
            .map_err(|error| sql(doing(), error))?;
        let started = transaction
            .prepare_cached(&text)
            .and_then(|mut statement| statement.execute(values));
        match started {
            Ok(changed) => {
                if changed == 1 {
                    refuse_taken(&transaction, id)?;
                }
                transaction.commit().map_err(|error| sql(doing(), error))?;
                Ok(changed == 1)
            }
            Err(error)
                if error.sqlite_error_code() == Some(rusqlite::ErrorCode::ConstraintViolation) =>
            {
                let writer: Option<String> = transaction
                    .query_row(
                        "SELECT name FROM sandboxes WHERE disk_mode = 'shared' \
                         AND state IN ('starting', 'running', 'stopping') AND image_digest = \
                         (SELECT image_digest FROM sandboxes WHERE id = ?)",
                        [id],
                        |row| row.get(0),
                    )
                    .ok();
                let writer = writer.map_or("another sandbox".to_owned(), |name| {
                    format!("sandbox `{name}`")
                });
                Err(Error::new(
                    ErrorKind::Busy,
                    format!("{writer} is writing to the shared disk of this image"),
                )
                .hint("stop that one first, or create this one with --disk-mode isolated"))
            }
            Err(error) => Err(sql(doing(), error)),
        }
    }

    /// Moves a sandbox to state `to`, if it is in one of `from`. Says whether it did.
    ///
    /// # Panics
    ///
    /// If `to` is [`State::Starting`], which needs a holder: see [`Store::begin_start`].
    pub fn transition(
        &mut self,
        id: &str,
        from: &[State],
        to: State,
        reason: Option<&str>,
        now: Timestamp,
    ) -> Result<bool> {
        assert_ne!(to, State::Starting, "a start needs a holder");
        assert_ne!(to, State::Paused, "a pause has a time: see `set_paused`");
        let stopped = matches!(to, State::Stopped | State::Error).then(|| now.as_millisecond());
        let text = format!(
            "UPDATE sandboxes SET state = ?2, reason = ?3, stopped_ms = coalesce(?4, stopped_ms), \
             paused_ms = NULL WHERE id = ?1 AND state IN ({})",
            list(from)
        );
        self.in_any_case(|connection| {
            connection
                .prepare_cached(&text)?
                .execute(params![id, to.as_str(), reason, stopped])
        })
        .map(|changed| changed == 1)
        .map_err(|error| sql(format!("could not record that sandbox {id} is {to}"), error))
    }

    /// Moves a sandbox that is `starting` to `running`, and settles whether it is destroyed as soon as it
    /// stops. Says whether it did.
    pub fn set_born(&mut self, id: &str, ephemeral: bool) -> Result<bool> {
        let text = "UPDATE sandboxes SET state = 'running', reason = NULL, paused_ms = NULL, \
                    ephemeral = ?2 WHERE id = ?1 AND state = 'starting'";
        self.in_any_case(|connection| {
            connection
                .prepare_cached(text)?
                .execute(params![id, ephemeral])
        })
        .map(|changed| changed == 1)
        .map_err(|error| sql(format!("could not record that sandbox {id} runs"), error))
    }

    /// Records what is wrong with a sandbox, if it runs, which it says. It holds until the next change of
    /// its state.
    pub fn set_trouble(&mut self, id: &str, trouble: &str) -> Result<bool> {
        let text = "UPDATE sandboxes SET reason = ?2 WHERE id = ?1 AND state = 'running'";
        self.in_any_case(|connection| {
            connection
                .prepare_cached(text)?
                .execute(params![id, trouble])
        })
        .map(|changed| changed == 1)
        .map_err(|error| {
            sql(
                format!("could not record what is wrong with sandbox {id}"),
                error,
            )
        })
    }

    /// Records the processes of a sandbox that is `starting`. Says whether it still is: if not,
    /// somebody has declared it dead, and the processes are to end.
    pub fn set_processes(
        &mut self,
        id: &str,
        engine: &str,
        accel: &str,
        keeper: &ProcessIdentity,
        vmm: Option<&ProcessIdentity>,
    ) -> Result<bool> {
        self.connection
            .prepare_cached(
                "UPDATE sandboxes SET engine = ?2, accel = ?3, boot_id = ?4, holder_pid = ?5, \
                 holder_start = ?6, vmm_pid = ?7, vmm_start = ?8 WHERE id = ?1 AND state = 'starting'",
            )
            .and_then(|mut statement| {
                statement.execute(params![
                    id,
                    engine,
                    accel,
                    keeper.boot_id,
                    keeper.pid,
                    to_sql(keeper.start_time_ticks),
                    vmm.map(|vmm| vmm.pid),
                    vmm.map(|vmm| to_sql(vmm.start_time_ticks)),
                ])
            })
            .map(|changed| changed == 1)
            .map_err(|error| sql(format!("could not record the processes of sandbox {id}"), error))
    }

    /// Records the size of a sandbox's writable layer.
    pub fn set_disk_mib(&mut self, id: &str, disk_mib: u32) -> Result<()> {
        self.connection
            .prepare_cached("UPDATE sandboxes SET disk_mib = ?2 WHERE id = ?1")
            .and_then(|mut statement| statement.execute(params![id, disk_mib]))
            .map(|_| ())
            .map_err(|error| sql(format!("could not record the disk of sandbox {id}"), error))
    }

    /// Removes a sandbox's row. Idempotent.
    pub fn delete_sandbox(&mut self, id: &str) -> Result<()> {
        self.in_any_case(|connection| {
            connection
                .prepare_cached("DELETE FROM sandboxes WHERE id = ?")?
                .execute([id])
        })
        .map(|_| ())
        .map_err(|error| {
            sql(
                format!("could not remove the record of sandbox {id}"),
                error,
            )
        })
    }

    /// A sandbox by its name.
    pub fn sandbox_named(&self, name: &str) -> Result<Option<SandboxRow>> {
        Ok(self.select("WHERE name = ?", &[name])?.pop())
    }

    /// A sandbox by its id.
    pub fn sandbox(&self, id: &str) -> Result<Option<SandboxRow>> {
        Ok(self.select("WHERE id = ?", &[id])?.pop())
    }

    /// The members of a pool, oldest first.
    pub fn members(&self, pool: &str) -> Result<Vec<SandboxRow>> {
        self.select("WHERE pool_id = ? ORDER BY created_ms, id", &[pool])
    }

    /// All sandboxes, oldest first.
    pub fn sandboxes(&self) -> Result<Vec<SandboxRow>> {
        self.select("ORDER BY created_ms, id", &[])
    }

    fn select(&self, clause: &str, values: &[&str]) -> Result<Vec<SandboxRow>> {
        let doing = "could not read the sandboxes in the state database";
        let mut statement = self
            .connection
            .prepare_cached(&format!("SELECT {SANDBOX_COLUMNS} FROM sandboxes {clause}"))
            .map_err(|error| sql(doing, error))?;
        let mut rows = statement
            .query_map(rusqlite::params_from_iter(values), read_sandbox)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .map_err(|error| sql(doing, error))?;
        let mut env = self
            .connection
            .prepare_cached(
                "SELECT name, value FROM sandbox_env WHERE sandbox_id = ? ORDER BY name",
            )
            .map_err(|error| sql(doing, error))?;
        for row in &mut rows {
            env.query_map([&row.id], |row| Ok((row.get(0)?, row.get(1)?)))
                .and_then(Iterator::collect::<Result<Vec<_>, _>>)
                .and_then(|env| {
                    row.spec.env = env;
                    let network = &mut row.spec.network;
                    read_allowed(&self.connection, ALLOWED_OF_SANDBOX, &row.id, network)
                })
                .map_err(|error| sql(doing, error))?;
            row.spec.ports =
                published(&self.connection, &row.id).map_err(|error| sql(doing, error))?;
            row.spec.volumes =
                uses(&self.connection, &row.id).map_err(|error| sql(doing, error))?;
            row.spec.mounts =
                mounts(&self.connection, &row.id).map_err(|error| sql(doing, error))?;
            if row.spec.ssh.is_some() {
                row.ssh_port = self.ssh_port(&row.id)?.map(|host| host.port);
            }
        }
        Ok(rows)
    }

    /// Something measured on this host since it was started, by its name.
    pub fn host_fact(&self, name: &str, boot_id: &str) -> Result<Option<String>> {
        self.connection
            .prepare_cached("SELECT value FROM host_facts WHERE name = ? AND boot_id = ?")
            .and_then(|mut statement| {
                let mut rows = statement.query([name, boot_id])?;
                rows.next()?.map(|row| row.get(0)).transpose()
            })
            .map_err(|error| sql(format!("could not read the host fact `{name}`"), error))
    }

    /// Remembers something measured on this host until it is started again, and returns what is
    /// remembered: of two processes that measure at once, both go by what the first found.
    pub fn put_host_fact(&mut self, name: &str, boot_id: &str, value: &str) -> Result<String> {
        self.connection
            .query_row(
                "INSERT INTO host_facts (name, boot_id, value) VALUES (?, ?, ?) \
                 ON CONFLICT (name) DO UPDATE SET \
                 value = iif(boot_id = excluded.boot_id, value, excluded.value), \
                 boot_id = excluded.boot_id RETURNING value",
                [name, boot_id, value],
                |row| row.get(0),
            )
            .map_err(|error| sql(format!("could not record the host fact `{name}`"), error))
    }
}

fn read_sandbox(row: &Row<'_>) -> rusqlite::Result<SandboxRow> {
    let state: String = row.get(2)?;
    let paused: Option<i64> = row.get(25)?;
    let mode: String = row.get(10)?;
    let name: String = row.get(1)?;
    let spec = SandboxSpec {
        name: SandboxName::stored(&name).map_err(|error| column(1, error))?,
        image: row.get(4)?,
        cpus: row.get(7)?,
        memory_mib: row.get(8)?,
        disk_mib: row.get(9)?,
        disk_mode: DiskMode::from_str(&mode).map_err(|error| column(10, error))?,
        env: Vec::new(),
        workdir: row.get(11)?,
        user: row.get(12)?,
        ttl: row
            .get::<_, Option<i64>>(13)?
            .map(|ttl| Duration::from_millis(from_sql(ttl))),
        ephemeral: row.get(14)?,
        kernel: crate::spec::KernelChoice::Auto,
        ports: Vec::new(),
        network: NetworkSpec {
            reach: reach(row, 27)?,
            allowed: Vec::new(),
        },
        ssh: row
            .get::<_, Option<String>>(28)?
            .map(|keys| SshSpec::from_stored(&keys)),
        volumes: Vec::new(),
        mounts: Vec::new(),
    };
    let boot_id: Option<String> = row.get(20)?;
    let process = |pid: usize, boot_id: &str| -> rusqlite::Result<Option<ProcessIdentity>> {
        Ok(row
            .get::<_, Option<i32>>(pid)?
            .zip(row.get::<_, Option<i64>>(pid + 1)?)
            .map(|(pid, start)| ProcessIdentity {
                pid,
                start_time_ticks: from_sql(start),
                boot_id: boot_id.to_owned(),
            }))
    };
    let (holder, vmm) = match boot_id.as_deref() {
        Some(boot_id) => (process(21, boot_id)?, process(23, boot_id)?),
        None => (None, None),
    };
    Ok(SandboxRow {
        id: row.get(0)?,
        state: State::ALL
            .into_iter()
            .find(|known| known.as_str() == state)
            .map(|state| match (state, paused) {
                (State::Running, Some(_)) => State::Paused,
                (state, _) => state,
            })
            .ok_or_else(|| column(2, Error::new(ErrorKind::State, "unknown state")))?,
        reason: row.get(3)?,
        spec,
        image_digest: row.get(5)?,
        kernel: row.get(6)?,
        engine: row.get(15)?,
        accel: row.get(16)?,
        created_at: instant(row, 17)?,
        started_at: row
            .get::<_, Option<i64>>(18)?
            .map(|_| instant(row, 18))
            .transpose()?,
        stopped_at: row
            .get::<_, Option<i64>>(19)?
            .map(|_| instant(row, 19))
            .transpose()?,
        holder,
        vmm,
        pool: row.get(26)?,
        ssh_port: None,
    })
}

fn insert_env(
    connection: &rusqlite::Connection,
    id: &str,
    env: &[(String, String)],
) -> rusqlite::Result<()> {
    for (name, value) in env {
        connection
            .prepare_cached(
                "INSERT OR REPLACE INTO sandbox_env (sandbox_id, name, value) VALUES (?, ?, ?)",
            )?
            .execute(params![id, name, value])?;
    }
    Ok(())
}

pub(crate) fn name_taken(name: &SandboxName) -> Error {
    Error::new(
        ErrorKind::AlreadyExists,
        format!("a sandbox named `{name}` exists already"),
    )
    .hint(format!(
        "choose another --name, or remove it with `smolvm rm {name}`"
    ))
}

/// States as an SQL list; they are words of ours.
fn list(states: &[State]) -> String {
    let quoted: Vec<String> = states
        .iter()
        .map(|state| format!("'{}'", state.stored()))
        .collect();
    quoted.join(", ")
}

pub(super) fn column(at: usize, error: Error) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(at, Type::Text, Box::new(error))
}

pub(super) fn reach(row: &Row<'_>, at: usize) -> rusqlite::Result<Reach> {
    let reach: String = row.get(at)?;
    reach.parse().map_err(|error| column(at, error))
}

pub(super) fn instant(row: &Row<'_>, at: usize) -> rusqlite::Result<Timestamp> {
    Timestamp::from_millisecond(row.get(at)?).map_err(|error| {
        rusqlite::Error::FromSqlConversionFailure(at, Type::Integer, Box::new(error))
    })
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// The numbers that a statement selects: those that are in use.
pub(super) fn taken(connection: &Connection, select: &str) -> rusqlite::Result<BTreeSet<u32>> {
    connection
        .prepare_cached(select)?
        .query_map([], |row| row.get(0))?
        .collect()
}

/// SQLite's integers are signed; sizes and ticks never reach the last bit.
pub(super) fn to_sql(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

pub(super) fn from_sql(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn row(name: &str) -> SandboxRow {
        SandboxRow {
            id: format!("id-{name}"),
            state: State::Created,
            reason: None,
            spec: SandboxSpec {
                env: vec![("A".to_owned(), "1".to_owned())],
                workdir: Some("/tmp".to_owned()),
                ttl: Some(Duration::from_secs(7)),
                ..SandboxSpec::new(name.parse().expect("a name"))
            },
            image_digest: "sha256:0".to_owned(),
            kernel: "6.1".to_owned(),
            engine: None,
            accel: None,
            created_at: Timestamp::from_millisecond(1_000).expect("an instant"),
            started_at: None,
            stopped_at: None,
            holder: None,
            vmm: None,
            pool: None,
            ssh_port: None,
        }
    }

    pub(crate) fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(&dir.path().join("state.db")).expect("a store");
        (dir, store)
    }

    pub(crate) fn now() -> Timestamp {
        Timestamp::from_millisecond(2_000).expect("an instant")
    }

    pub(crate) fn process(pid: i32) -> ProcessIdentity {
        ProcessIdentity {
            pid,
            start_time_ticks: 7,
            boot_id: "b".to_owned(),
        }
    }

    #[test]
    fn a_row_comes_back_as_it_was_written() {
        let (_dir, mut store) = store();
        let written = row("a");
        store.insert_sandbox(&written).expect("written");
        assert_eq!(store.sandbox_named("a").expect("read"), Some(written));
        assert!(
            store
                .begin_start("id-a", &[State::Created], &process(5), now())
                .expect("written")
        );
        assert!(
            store
                .set_processes("id-a", "qemu", "kvm", &process(1), Some(&process(3)))
                .expect("written")
        );
        let read = store.sandbox("id-a").expect("read").expect("there");
        assert_eq!(
            (read.holder, read.vmm),
            (Some(process(1)), Some(process(3)))
        );
        store.delete_sandbox("id-a").expect("deleted");
        store.delete_sandbox("id-a").expect("deleted again");
        assert_eq!(store.sandboxes().expect("read"), vec![]);
    }

    #[test]
    fn a_name_is_taken_once() {
        let (_dir, mut store) = store();
        store.insert_sandbox(&row("a")).expect("written");
        let mut second = row("a");
        second.id = "other".to_owned();
        let error = store.insert_sandbox(&second).expect_err("taken");
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    }

    #[test]
    fn of_two_starters_one_wins() {
        let (_dir, mut store) = store();
        store.insert_sandbox(&row("a")).expect("written");
        let from = [State::Created, State::Stopped];
        assert!(
            store
                .begin_start("id-a", &from, &process(1), now())
                .expect("won")
        );
        assert!(
            !store
                .begin_start("id-a", &from, &process(1), now())
                .expect("lost")
        );
        let read = store.sandbox("id-a").expect("read").expect("there");
        assert_eq!(read.started_at, Some(now()));
    }

    #[test]
    fn a_shared_layer_has_one_writer() {
        let (_dir, mut store) = store();
        for name in ["a", "b"] {
            let mut shared = row(name);
            shared.spec.disk_mode = DiskMode::Shared;
            store.insert_sandbox(&shared).expect("written");
        }
        let from = [State::Created];
        assert!(
            store
                .begin_start("id-a", &from, &process(1), now())
                .expect("won")
        );
        let error = store
            .begin_start("id-b", &from, &process(1), now())
            .expect_err("a second writer");
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(
            store
                .transition("id-a", &[State::Starting], State::Stopped, None, now())
                .expect("stopped")
        );
        assert!(
            store
                .begin_start("id-b", &from, &process(1), now())
                .expect("free now")
        );
    }

    #[test]
    fn a_pause_is_a_state_while_it_runs() {
        let (_dir, mut store) = store();
        store.insert_sandbox(&row("a")).expect("written");
        let state = |store: &Store| {
            let row = store.sandbox("id-a").expect("read").expect("there");
            row.state
        };
        assert!(!store.set_paused("id-a", Some(now())).expect("not running"));
        for (from, to) in [
            (State::Created, State::Running),
            (State::Running, State::Running),
        ] {
            assert!(
                store
                    .transition("id-a", &[from], to, None, now())
                    .expect("moved")
            );
        }
        assert!(store.set_paused("id-a", Some(now())).expect("paused"));
        assert_eq!(state(&store), State::Paused);
        // Whoever knows it as paused can move it on.
        let stopped = store.transition("id-a", &[State::Paused], State::Stopped, None, now());
        assert!(stopped.expect("moved"));
        assert_eq!(state(&store), State::Stopped);
    }

    #[test]
    fn a_name_is_free_once_its_sandbox_is_being_deleted() {
        let (_dir, mut store) = store();
        store.insert_sandbox(&row("a")).expect("written");
        store.begin_delete("id-a", None).expect("deleting");
        store.begin_delete("id-a", None).expect("again");
        assert_eq!(store.sandbox_named("a").expect("read"), None);
        let mut second = row("a");
        second.id = "other".to_owned();
        store.insert_sandbox(&second).expect("the name is free");
        assert_eq!(store.sandboxes().expect("read").len(), 2);
    }

    #[test]
    fn a_member_is_claimed_once() {
        let (_dir, mut store) = store();
        let new = |name: &str| Identity {
            name: name.parse().expect("a name"),
            env: vec![("B".to_owned(), "2".to_owned())],
            workdir: None,
            user: Some("nobody".to_owned()),
            ttl: Some(Duration::from_secs(9)),
            ephemeral: true,
            ports: vec!["8080:80".parse().expect("a port")],
            network: NetworkSpec::listed(vec!["example.com".parse().expect("a name")]),
            ssh: None,
        };
        let mut member = row("member");
        member.pool = Some("p".to_owned());
        member.spec.env.clear();
        store.insert_sandbox(&member).expect("written");
        store.insert_sandbox(&row("taken")).expect("written");
        assert_eq!(
            store
                .claim_member("id-member", &new("a"), now())
                .expect("not ready"),
            None
        );
        store
            .transition("id-member", &State::ALL, State::Running, None, now())
            .expect("ready");
        let error = store.claim_member("id-member", &new("taken"), now());
        assert_eq!(error.expect_err("taken").kind(), ErrorKind::AlreadyExists);
        assert!(
            store
                .claim_member("id-member", &new("a"), now())
                .expect("claimed")
                .is_some()
        );
        assert_eq!(
            store
                .claim_member("id-member", &new("b"), now())
                .expect("gone"),
            None
        );
        let row = store.sandbox_named("a").expect("read").expect("there");
        assert_eq!((row.state, row.pool), (State::Starting, None));
        assert_eq!(row.spec.env, new("a").env);
        assert_eq!(row.spec.ports, new("a").ports);
        assert_eq!(row.spec.network, new("a").network);
        assert!(row.spec.ephemeral);
    }

    #[test]
    fn host_facts_end_with_the_boot() {
        let (_dir, mut store) = store();
        store
            .put_host_fact("kvm", "boot-1", "works")
            .expect("written");
        assert_eq!(
            store.host_fact("kvm", "boot-1").expect("read").as_deref(),
            Some("works")
        );
        // Who measures at the same time goes by what was first.
        let again = store.put_host_fact("kvm", "boot-1", "broken");
        assert_eq!(again.expect("settled"), "works");
        assert_eq!(store.host_fact("kvm", "boot-2").expect("read"), None);
        let later = store.put_host_fact("kvm", "boot-2", "broken");
        assert_eq!(later.expect("written"), "broken");
    }
}

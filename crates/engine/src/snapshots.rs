//! Pausing, saving and multiplying machines that run.
//!
//! A snapshot is a machine as it was at one moment: its memory, the state of its devices, and its
//! disk. Any number of sandboxes can be started from it, at once, under new names, when the one it was
//! taken of is long gone, and after the host was restarted. A fork is the same, with a snapshot that
//! lives no longer than the fork takes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use smolvm_host::oci::Digest;
use smolvm_host::os::Durability;
use smolvm_proto::keeper::{CaptureRequest, KeeperEvent, KeeperRequest};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::assets::stamp;
use crate::engine::{
    Beginning, Engine, KEEPER_PATIENCE, StartTimes, blocking, entries, myself, random_u64,
    unknown_sandbox, used_below,
};
use crate::engines::EngineName;
use crate::error::{Error, ErrorKind, Result, io};
use crate::layout::SavedMachine;
use crate::plan::HostFacts;
use crate::session::Session;
use crate::spec::{DiskMode, SandboxName, SandboxSpec};
use crate::store::{SandboxRow, SnapshotRow, SnapshotState, State, Store};

/// Most children of one fork.
pub const FORK_CHILDREN_MAX: u32 = 256;

/// Most time a snapshot may take to be written, however large the machine.
const CAPTURE_PATIENCE: Duration = Duration::from_secs(600);

/// Sandboxes that are started at one time; more only wait for each other.
const STARTS_AT_ONCE: usize = 4;

/// By how much the rate of the time-stamp counter may differ from the one a guest was told, in
/// thousandths: it is measured anew at each start of the host, and a guest's clock is wrong by as much.
const TSC_TOLERANCE_PERMILLE: u64 = 1;

/// A snapshot in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Sixteen hexadecimal digits.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Name of the sandbox it was taken of.
    pub sandbox: String,
    /// The engine that it was taken with, and that it needs; absent if its description is damaged.
    pub engine: Option<String>,
    /// Image of its root file system.
    pub image: String,
    /// Virtual CPUs.
    pub cpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// When it was taken.
    pub created_at: Timestamp,
    /// Bytes it takes on the host's disk.
    pub size_bytes: u64,
    /// Its directory.
    pub path: PathBuf,
    /// How long the sandbox stood still for it, if that is known: only to the one who took it.
    pub paused: Option<Duration>,
}

/// What became of one child of a fork.
#[derive(Debug)]
pub struct Forked {
    /// Its name.
    pub name: SandboxName,
    /// How long its start took, or why it did not start. One that did not start is gone.
    pub result: Result<StartTimes>,
}

/// What a fork came to.
#[derive(Debug)]
pub struct Fork {
    /// How long the source stood still.
    pub paused: Duration,
    /// Each child, in the order of their names.
    pub children: Vec<Forked>,
}

/// A machine that was saved, and what it takes to go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Saved {
    pub(crate) files: SavedMachine,
    description: Description,
}

/// What is beside the files of a machine that was saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Description {
    #[serde(flatten)]
    needs: Needs,
    /// Milliseconds each copy lives, from its own start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ttl_ms: Option<u64>,
    /// Its files, by name. Absent where an earlier release took it.
    #[serde(default)]
    files: BTreeMap<String, SavedFile>,
}

/// What a file of a snapshot has to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct SavedFile {
    bytes: u64,
    /// Of the device state, which is small. To read the others takes longer than to restore them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    digest: Option<Digest>,
}

/// What the files in a snapshot's directory are.
fn files_of(saved: &SavedMachine) -> Result<BTreeMap<String, SavedFile>> {
    let mut files = BTreeMap::new();
    for path in [saved.memory(), saved.state(), saved.disk()] {
        let failed = |error| io(format!("could not look at {}", path.display()), error);
        let bytes = match std::fs::metadata(&path) {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(failed(error)),
        };
        let digest = if path == saved.state() {
            Some(Digest::of(&std::fs::read(&path).map_err(failed)?))
        } else {
            None
        };
        let name = path.file_name().unwrap_or_default();
        files.insert(
            name.to_string_lossy().into_owned(),
            SavedFile { bytes, digest },
        );
    }
    Ok(files)
}

/// What a host has to have in common with the one a machine was saved on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Needs {
    /// The engine. Absent in what was written when there was one.
    #[serde(default = "first_engine")]
    engine: String,
    /// Identity of the VMM's program: it wrote the state, and only it is sure to read it.
    vmm: u64,
    /// The program, for people.
    program: PathBuf,
    /// Rate of the time-stamp counter that the guest was told.
    tsc_khz: Option<u64>,
}

fn first_engine() -> String {
    EngineName::Qemu.to_string()
}

impl Saved {
    fn needs_of(facts: &HostFacts) -> Result<Needs> {
        Ok(Needs {
            vmm: stamp("engine", &facts.program)?,
            engine: facts.engine.to_string(),
            program: facts.program.clone(),
            tsc_khz: facts.tsc_khz,
        })
    }

    fn open(dir: PathBuf) -> Result<Self> {
        let path = dir.join(DESCRIPTION);
        let doing = || {
            format!(
                "could not read the snapshot's description {}",
                path.display()
            )
        };
        let bytes = std::fs::read(&path).map_err(|error| io(doing(), error))?;
        let description = serde_json::from_slice(&bytes)
            .map_err(|error| Error::new(ErrorKind::State, doing()).because(error))?;
        Ok(Self {
            files: SavedMachine::new(dir),
            description,
        })
    }

    /// Refuses a snapshot whose files are not what was saved.
    pub(crate) fn check_files(&self) -> Result<()> {
        let known = &self.description.files;
        if known.is_empty() {
            return Ok(());
        }
        let found = files_of(&self.files)?;
        let damaged = known.iter().find_map(|(name, then)| {
            let why = match found.get(name) {
                None => "it is not there".to_owned(),
                Some(now) if now.bytes != then.bytes => {
                    format!(
                        "it has {} bytes and was saved with {}",
                        now.bytes, then.bytes
                    )
                }
                Some(now) if now != then => "its content was changed".to_owned(),
                Some(_) => return None,
            };
            Some((name, why))
        });
        match damaged {
            None => Ok(()),
            Some((name, why)) => Err(Error::new(
                ErrorKind::State,
                format!(
                    "the snapshot's file {} is damaged",
                    self.files.path().join(name).display()
                ),
            )
            .because(why)
            .hint(
                "put the file back from a copy, or remove the snapshot with `smolvm snapshot rm`",
            )),
        }
    }

    /// The engine that it needs.
    pub(crate) fn engine(&self) -> Option<EngineName> {
        EngineName::parse(&self.description.needs.engine)
    }

    /// Refuses a host on which the machine could not go on.
    pub(crate) fn check(&self, facts: &HostFacts) -> Result<()> {
        let here = Self::needs_of(facts)?;
        let refuse = |why: String| {
            Err(Error::new(
                ErrorKind::Unsupported,
                "the snapshot cannot be restored on this host as it is now",
            )
            .because(why)
            .hint("take a new snapshot; one lasts for as long as the engine that took it"))
        };
        let needs = &self.description.needs;
        if here.engine != needs.engine {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "the snapshot was taken with the engine {}, and this start is to use {}",
                    needs.engine, here.engine
                ),
            )
            .hint(format!("give --engine {}", needs.engine)));
        }
        if here.vmm != needs.vmm {
            return refuse(format!(
                "it was taken with another {} than is there now",
                needs.program.display()
            ));
        }
        match (needs.tsc_khz, here.tsc_khz) {
            (None, None) => Ok(()),
            (Some(then), Some(now))
                if then.abs_diff(now).saturating_mul(1000) <= then * TSC_TOLERANCE_PERMILLE =>
            {
                Ok(())
            }
            (then, now) => refuse(format!(
                "its guest knows a time-stamp counter of {} kHz, and this host's has {}",
                then.unwrap_or(0),
                now.unwrap_or(0)
            )),
        }
    }
}

/// File name of a snapshot's description.
const DESCRIPTION: &str = "snapshot.json";

impl Engine {
    // ---- pausing ----

    /// Makes a running sandbox stand still. Its memory stays, and it uses no processor. Does nothing
    /// if it is paused already.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotRunning`]; [`ErrorKind::GuestFailed`] if its guest does not answer, in which
    /// case it goes on.
    pub async fn pause(&self, name: &str) -> Result<()> {
        let (_, session) = self.held(name).await?;
        ask(&session, &KeeperRequest::Pause, KEEPER_PATIENCE)
            .await
            .map(|_| ())
    }

    /// Lets a paused sandbox go on, with the clock put right. Does nothing if it runs.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotRunning`]; [`ErrorKind::GuestFailed`].
    pub async fn resume(&self, name: &str) -> Result<()> {
        let (_, session) = self.held(name).await?;
        ask(&session, &KeeperRequest::Resume, KEEPER_PATIENCE)
            .await
            .map(|_| ())
    }

    /// A sandbox that runs or is paused, and a connection to it.
    async fn held(&self, name: &str) -> Result<(SandboxRow, Session)> {
        let Some(mut store) = Store::open_existing(&self.layout().database())? else {
            return Err(unknown_sandbox(name));
        };
        loop {
            let row = self.row(&mut store, name)?;
            match row.state {
                State::Starting => {
                    if let Some(session) = self.attach_when_there(&row).await? {
                        session.wait_ready().await?;
                    }
                }
                State::Running | State::Paused => {
                    if let Some(session) = self.attach_when_there(&row).await? {
                        return Ok((row, session));
                    }
                }
                state => {
                    return Err(Error::new(
                        ErrorKind::NotRunning,
                        format!(
                            "sandbox `{name}` is not running, it is {}",
                            state.in_words()
                        ),
                    )
                    .hint(format!("start it with `smolvm start {name}`")));
                }
            }
        }
    }

    // ---- snapshots ----

    /// Saves a sandbox as it is at this moment, running or paused, and lets it go on as it was.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::AlreadyExists`]; [`ErrorKind::NotRunning`]; [`ErrorKind::Unsupported`] for one that
    /// shares its disk; [`ErrorKind::NoSpace`]. Nothing remains after an error.
    pub async fn snapshot(&self, name: &str, snapshot: Option<&str>) -> Result<SnapshotInfo> {
        let snapshot = match snapshot {
            // The rule is that of sandboxes, and so is the hint.
            Some(given) => given
                .parse::<SandboxName>()
                .map_err(|error| {
                    let what = format!("`{}` is not a snapshot name", given.escape_debug());
                    let refusal = Error::new(error.kind(), what);
                    match error.hint_text() {
                        Some(hint) => refusal.hint(hint),
                        None => refusal,
                    }
                })?
                .to_string(),
            None => self.unused_snapshot_name(name)?,
        };
        let (row, saved, paused) = self.capture(name, &snapshot, Keep::OnDisk).await?;
        Ok(SnapshotInfo {
            paused: Some(paused),
            ..describe(row, saved.files.path())
        })
    }

    /// All snapshots, oldest first, with what crashes left removed. Makes nothing on disk.
    pub fn snapshots(&self) -> Result<Vec<SnapshotInfo>> {
        let Some(mut store) = Store::open_existing(&self.layout().database())? else {
            return Ok(Vec::new());
        };
        self.reconcile_snapshots(&mut store)?;
        let rows = store.snapshots()?;
        let ready = rows
            .into_iter()
            .filter(|row| row.state == SnapshotState::Ready);
        Ok(ready
            .map(|row| {
                let dir = self.snapshot_dir(&row.id);
                describe(row, &dir)
            })
            .collect())
    }

    /// Makes a sandbox from a snapshot and starts it where the other was. It lives as long as that
    /// one was to, from its own start.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; [`ErrorKind::AlreadyExists`]; [`ErrorKind::Unsupported`] if the host is
    /// not as it was in what matters. Nothing remains after an error.
    pub async fn restore(
        &self,
        snapshot: &str,
        name: &SandboxName,
    ) -> Result<(Session, StartTimes)> {
        let mut store = self.store()?;
        self.reconcile_snapshots(&mut store)?;
        let row = ready(&store, snapshot)?;
        let saved = Saved::open(self.snapshot_dir(&row.id))?;
        saved.check_files()?;
        self.start_copy(&mut store, &row, &saved, name, None).await
    }

    /// Removes a snapshot. Sandboxes that were started from it keep what they have.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`].
    pub fn remove_snapshot(&self, name: &str) -> Result<()> {
        let Some(mut store) = Store::open_existing(&self.layout().database())? else {
            return Err(unknown_snapshot(name));
        };
        // Also one whose removal failed before.
        match store.snapshot_named(name)? {
            Some(row) if row.state != SnapshotState::Making => {
                self.destroy_snapshot(&mut store, &row.id)
            }
            _ => Err(unknown_snapshot(name)),
        }
    }

    // ---- forks ----

    /// Makes `children` sandboxes that go on where `name` is now, with its processes, open files and
    /// memory, which they share until they write. The source stands still only while it is copied.
    /// Each lives as long as the source was to, from its own start. The children are called `prefix-1` and so on, with numbers that are free; the prefix is the
    /// source's name if absent.
    ///
    /// # Errors
    ///
    /// As [`Engine::snapshot`], if nothing could be copied. What becomes of each child is told for
    /// each.
    pub async fn fork(&self, name: &str, children: u32, prefix: Option<&str>) -> Result<Fork> {
        self.fork_telling(name, children, prefix, &mpsc::channel().0)
            .await
    }

    /// As [`Engine::fork`]; `made` is sent the name of each child as soon as it is a sandbox, which is
    /// before it runs, so that whoever gives the fork up can remove it.
    ///
    /// # Errors
    ///
    /// As [`Engine::fork`].
    pub async fn fork_telling(
        &self,
        name: &str,
        children: u32,
        prefix: Option<&str>,
        made: &mpsc::Sender<SandboxName>,
    ) -> Result<Fork> {
        if children == 0 || children > FORK_CHILDREN_MAX {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("a fork of {children} children is not within 1 and {FORK_CHILDREN_MAX}"),
            ));
        }
        let prefix = prefix.unwrap_or(name);
        // Checked before anything is made; the longest of the names, where none is taken.
        format!("{prefix}-{children}")
            .parse::<SandboxName>()
            .map_err(|_| {
                Error::new(
                    ErrorKind::InvalidInput,
                    format!(
                        "`{}` with a number after it is not a sandbox name",
                        prefix.escape_debug()
                    ),
                )
                .hint(
                    "give --prefix lower-case letters, digits, `-` and `_`, few enough that \
                     64 are not passed with the hyphen and the number",
                )
            })?;
        let hidden = format!(".fork-{:016x}", random_u64()?);
        // Opened now, so that nothing stands in the way of cleaning up.
        let mut store = self.store()?;
        let (row, saved, paused) = self.capture(name, &hidden, Keep::ForNow).await?;
        let outcome = self
            .start_children(&store, &row, &saved, prefix, children, made)
            .await;
        let removed = self.destroy_snapshot(&mut store, &row.id);
        let children = outcome?;
        removed?;
        Ok(Fork { paused, children })
    }

    async fn start_children(
        &self,
        store: &Store,
        row: &SnapshotRow,
        saved: &Saved,
        prefix: &str,
        children: u32,
        made: &mpsc::Sender<SandboxName>,
    ) -> Result<Vec<Forked>> {
        let turns = Arc::new(Semaphore::new(STARTS_AT_ONCE));
        let mut starting = JoinSet::new();
        let mut number = 0;
        for _ in 0..children {
            let name = unused_child(store, prefix, &mut number)?;
            let (engine, turns) = (self.clone(), Arc::clone(&turns));
            let (row, saved, made) = (row.clone(), saved.clone(), made.clone());
            starting.spawn(async move {
                let _turn = turns.acquire_owned().await;
                let result = async {
                    let mut store = engine.store()?;
                    engine
                        .start_copy(&mut store, &row, &saved, &name, Some(&made))
                        .await
                }
                .await;
                Forked {
                    name,
                    result: result.map(|(_, times)| times),
                }
            });
        }
        let mut forked = starting.join_all().await;
        forked.sort_by_key(|child| (child.name.as_str().len(), child.name.to_string()));
        Ok(forked)
    }

    // ---- what all of them do ----

    /// Makes a sandbox as a snapshot's row says and starts it from the files. Nothing remains of
    /// one that does not start: until it is born, when its keeper records that it is to stay, its row
    /// is that of an ephemeral sandbox, which goes with the processes that make it.
    async fn start_copy(
        &self,
        store: &mut Store,
        row: &SnapshotRow,
        saved: &Saved,
        name: &SandboxName,
        made: Option<&mpsc::Sender<SandboxName>>,
    ) -> Result<(Session, StartTimes)> {
        let spec = SandboxSpec {
            image: row.image.clone(),
            cpus: row.cpus,
            memory_mib: row.memory_mib,
            disk_mib: row.disk_mib,
            disk_mode: row.disk_mode,
            env: row.env.clone(),
            workdir: row.workdir.clone(),
            user: row.user.clone(),
            network: row.network.clone(),
            ssh: row.ssh.clone(),
            ttl: saved.description.ttl_ms.map(Duration::from_millis),
            ephemeral: true,
            ..SandboxSpec::new(name.clone())
        };
        self.insert(
            store,
            &spec,
            row.image_digest.clone(),
            row.kernel.clone(),
            None,
        )?;
        if let Some(made) = made {
            // Not everybody wants to know.
            let _ = made.send(name.clone());
        }
        let beginning = Beginning {
            plain: false,
            snapshot: Some(saved),
            nic: row.nic,
            park: None,
        };
        match self.start_with(name.as_str(), &beginning).await {
            Ok(started) => Ok(started),
            Err(error) => {
                // Without its memory it is not what was asked for. Why it failed says more than that
                // it could not be removed as well.
                if let Err(left) = self.delete(name.as_str()).await
                    && left.kind() != ErrorKind::NotFound
                {
                    tracing::warn!(%left, "could not remove a sandbox that did not start");
                }
                Err(error)
            }
        }
    }

    /// Writes a sandbox's machine to a new snapshot.
    async fn capture(
        &self,
        name: &str,
        snapshot: &str,
        keep: Keep,
    ) -> Result<(SnapshotRow, Saved, Duration)> {
        let (sandbox, session) = self.held(name).await?;
        refuse_uncopyable(&sandbox)?;
        let mut store = self.store()?;
        self.reconcile_snapshots(&mut store)?;
        // Those of the engine that runs it, whichever a start would use now.
        let engine = sandbox.engine.as_deref().and_then(EngineName::parse);
        let facts = self.host_facts(&mut store, &sandbox, false, engine)?;
        let row = SnapshotRow {
            id: format!("{:016x}", random_u64()?),
            name: snapshot.to_owned(),
            state: SnapshotState::Making,
            sandbox: sandbox.spec.name.to_string(),
            image: sandbox.spec.image.clone(),
            image_digest: sandbox.image_digest.clone(),
            kernel: sandbox.kernel.clone(),
            cpus: sandbox.spec.cpus,
            memory_mib: sandbox.spec.memory_mib,
            disk_mib: sandbox.spec.disk_mib,
            disk_mode: sandbox.spec.disk_mode,
            env: sandbox.spec.env.clone(),
            workdir: sandbox.spec.workdir.clone(),
            user: sandbox.spec.user.clone(),
            network: sandbox.spec.network.clone(),
            nic: store.network(&sandbox.id)?.is_some(),
            ssh: sandbox.spec.ssh.clone(),
            created_at: Timestamp::now(),
            holder: Some(myself()?),
        };
        store.insert_snapshot(&row)?;
        let made = async {
            let dir = self.snapshot_dir(&row.id);
            self.os()
                .create_dir_all("make the directory", &self.layout().snapshots())?;
            self.os()
                .create_dir("make the snapshot's directory", &dir)?;
            let saved = Saved {
                description: Description {
                    needs: Saved::needs_of(&facts)?,
                    ttl_ms: sandbox
                        .spec
                        .ttl
                        .map(|ttl| u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX)),
                    files: BTreeMap::new(),
                },
                files: SavedMachine::new(dir),
            };
            let paused = self.write(&session, &saved, keep).await?;
            if let Keep::OnDisk = keep {
                store.set_snapshot_state(&row.id, SnapshotState::Ready, None)?;
            }
            Ok((saved, paused))
        }
        .await;
        match made {
            Ok((saved, paused)) => Ok((row, saved, paused)),
            Err(error) => {
                self.destroy_snapshot(&mut store, &row.id)?;
                Err(error)
            }
        }
    }

    /// Has the keeper write the machine. Returns how long the guest stood still.
    async fn write(&self, session: &Session, saved: &Saved, keep: Keep) -> Result<Duration> {
        use std::os::unix::ffi::OsStrExt;

        let directory = std::path::absolute(saved.files.path())
            .map_err(|error| io("could not find the current directory", error))?;
        let request = KeeperRequest::Capture(CaptureRequest {
            directory: directory.as_os_str().as_bytes().to_vec().into(),
        });
        let paused = match ask(session, &request, CAPTURE_PATIENCE).await? {
            KeeperEvent::Captured(captured) => Duration::from_micros(captured.paused_us),
            other => return Err(session.confused(&other)),
        };
        let description = match keep {
            Keep::OnDisk => Description {
                files: files_of(&saved.files)?,
                ..saved.description.clone()
            },
            Keep::ForNow => saved.description.clone(),
        };
        let text = serde_json::to_vec(&description).map_err(|error| {
            Error::new(ErrorKind::Internal, "could not describe the snapshot").because(error)
        })?;
        let path = saved.files.path().join(DESCRIPTION);
        let durability = match keep {
            Keep::OnDisk => Durability::Synced,
            Keep::ForNow => Durability::Cached,
        };
        self.os()
            .write_file_atomic("describe the snapshot", &path, &text, 0o600, durability)?;
        if let Keep::OnDisk = keep {
            let (engine, saved) = (self.clone(), saved.clone());
            blocking(move || {
                for file in [
                    saved.files.memory(),
                    saved.files.state(),
                    saved.files.disk(),
                ] {
                    if file.exists() {
                        engine.os().sync("write the snapshot to the disk", &file)?;
                    }
                }
                Ok(())
            })
            .await?;
        }
        Ok(paused)
    }

    pub(crate) fn snapshot_dir(&self, id: &str) -> PathBuf {
        self.layout().snapshots().join(id)
    }

    /// Removes a snapshot's files, and its row last. Idempotent.
    fn destroy_snapshot(&self, store: &mut Store, id: &str) -> Result<()> {
        // It is nobody's: if this process fails, any other may go on.
        store.set_snapshot_state(id, SnapshotState::Deleting, None)?;
        self.os()
            .remove_tree("remove the snapshot's directory", &self.snapshot_dir(id))?;
        store.delete_snapshot(id)
    }

    /// Removes what processes that are gone left half made or half removed.
    pub(crate) fn reconcile_snapshots(&self, store: &mut Store) -> Result<()> {
        for row in self.abandoned_snapshots(store)? {
            self.remove_abandoned(store, &row);
        }
        Ok(())
    }

    /// Says whether it could. What cannot be removed keeps nobody from the others: it is warned of, and
    /// tried again each time.
    pub(crate) fn remove_abandoned(&self, store: &mut Store, row: &SnapshotRow) -> bool {
        let removed = self.destroy_snapshot(store, &row.id);
        if let Err(error) = &removed {
            tracing::warn!(
                "could not remove what is left of snapshot `{}`: {}",
                row.name,
                error.in_one_line()
            );
        }
        removed.is_ok()
    }

    /// Snapshots that nobody makes or removes any more, and that are not whole.
    pub(crate) fn abandoned_snapshots(&self, store: &Store) -> Result<Vec<SnapshotRow>> {
        let mut abandoned = Vec::new();
        for row in store.snapshots()? {
            let is_held = match &row.holder {
                Some(holder) => holder.is_alive()?,
                None => false,
            };
            if row.state != SnapshotState::Ready && !is_held {
                abandoned.push(row);
            }
        }
        Ok(abandoned)
    }

    /// Directories of no snapshot: a row comes before its directory, and goes after it.
    pub(crate) fn stray_snapshots(&self, store: &Store) -> Result<Vec<PathBuf>> {
        let found = entries(&self.layout().snapshots())?;
        let rows = store.snapshots()?;
        let known = |path: &PathBuf| rows.iter().any(|row| self.snapshot_dir(&row.id) == *path);
        let found = found.iter().map(std::fs::DirEntry::path);
        Ok(found.filter(|path| !known(path)).collect())
    }

    /// A name after the sandbox that no snapshot has at this moment.
    fn unused_snapshot_name(&self, sandbox: &str) -> Result<String> {
        let store = self.store()?;
        for number in 1_u32.. {
            let name = format!("{sandbox}-{number}");
            if store.snapshot_named(&name)?.is_none() {
                return Ok(name.parse::<SandboxName>()?.to_string());
            }
        }
        unreachable!("there are not 2^32 snapshots")
    }
}

/// The next name for a child that no sandbox has at this moment.
fn unused_child(store: &Store, prefix: &str, number: &mut u32) -> Result<SandboxName> {
    loop {
        *number += 1;
        let name = format!("{prefix}-{number}");
        if store.sandbox_named(&name)?.is_none() {
            return name.parse();
        }
    }
}

/// How long a snapshot is to last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Keep {
    /// Until it is removed, whatever becomes of the host.
    OnDisk,
    /// Until this process has started the copies.
    ForNow,
}

async fn ask(session: &Session, request: &KeeperRequest, limit: Duration) -> Result<KeeperEvent> {
    tokio::time::timeout(limit, session.keeper(request))
        .await
        .unwrap_or_else(|_| {
            Err(Error::new(
                ErrorKind::Timeout,
                format!(
                    "the keeper of sandbox `{}` did not answer within {} s",
                    session.name(),
                    limit.as_secs()
                ),
            )
            .hint(format!(
                "see its state with `smolvm info {}`",
                session.name()
            )))
        })
}

fn ready(store: &Store, name: &str) -> Result<SnapshotRow> {
    store
        .snapshot_named(name)?
        .filter(|row| row.state == SnapshotState::Ready)
        .ok_or_else(|| unknown_snapshot(name))
}

fn unknown_snapshot(name: &str) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!("there is no snapshot named `{}`", name.escape_debug()),
    )
    .hint("see the snapshots with `smolvm snapshot ls`")
}

/// Refuses a sandbox of which no copy could be told apart from it.
fn refuse_uncopyable(row: &SandboxRow) -> Result<()> {
    let name = &row.spec.name;
    let refuse = |why: &str, hint: &str| {
        Err(Error::new(
            ErrorKind::Unsupported,
            format!("sandbox `{name}` cannot be copied"),
        )
        .because(why.to_owned())
        .hint(hint.to_owned()))
    };
    if row.spec.disk_mode == DiskMode::Shared {
        return refuse(
            "its disk is shared, and may have one writer",
            "create it with --disk-mode isolated",
        );
    }
    if let Some(volume) = row.spec.volumes.first() {
        return refuse(
            &format!(
                "it has volume `{}`, which a copy can neither share nor have as it was",
                volume.name
            ),
            "copy what is in the volume by `smolvm cp`, or create it without --volume",
        );
    }
    if let Some(mount) = row.spec.mounts.first() {
        return refuse(
            &format!(
                "it sees {} of this host, whose files it may have open",
                mount.source.display()
            ),
            "copy what it needs by `smolvm cp`, and create it without that -v",
        );
    }
    Ok(())
}

fn describe(row: SnapshotRow, dir: &Path) -> SnapshotInfo {
    SnapshotInfo {
        id: row.id,
        name: row.name,
        sandbox: row.sandbox,
        engine: Saved::open(dir.to_owned())
            .ok()
            .map(|saved| saved.description.needs.engine),
        image: row.image,
        cpus: row.cpus,
        memory_mib: row.memory_mib,
        created_at: row.created_at,
        size_bytes: used_below(dir),
        path: dir.to_owned(),
        paused: None,
    }
}

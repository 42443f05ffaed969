//! Sandboxes made ahead of demand.
//!
//! A pool is for sandboxes of one image and size. Its members are restored, have run commands, and
//! stand still until one is claimed: that is one message to its keeper, which changes one row. The
//! claim gives the member its name, and the guest its identity, clock and randomness. No daemon fills
//! the pool: whoever claims a member, or finds none, starts a process that fills it up and ends.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use smolvm_host::os::{Durability, Lock};
use smolvm_proto::keeper::{ClaimRequest, KeeperEvent, KeeperReason, KeeperRequest, Starter};

use crate::assets::unknown_image;
use crate::config::Config;
use crate::engine::{Beginning, Engine, StartTimes, entries, myself, random_u64};
use crate::error::{Error, ErrorKind, Result, io};
use crate::exec::env_vars;
use crate::launch::WarmCommand;
use crate::ports;
use crate::session::{Session, refusal};
use crate::spec::{DiskMode, KernelChoice, SandboxSpec};
use crate::store::rows::name_taken;
use crate::store::{ImageRow, PoolRow, SandboxRow, State, Store};
use crate::teardown;

/// Most members of a pool.
pub const POOL_SIZE_MAX: u32 = 1024;

/// Kinds of a pool's files, the lock last.
const POOL_FILES: [&str; 3] = ["json", "log", "lock"];

/// Most time a member's keeper may take to answer a claim. It gives its guest ten seconds at most, of
/// which the guest has a processor for one; a keeper that needs longer than that does not answer at all.
const CLAIM_PATIENCE: Duration = Duration::from_secs(15);

/// A pool to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolSpec {
    /// Name of the members' image.
    pub image: String,
    /// Virtual CPUs of a member.
    pub cpus: u8,
    /// Guest memory of a member in MiB.
    pub memory_mib: u32,
    /// Size of a member's writable layer in MiB.
    pub disk_mib: u32,
    /// Where a member's changes go; not [`DiskMode::Shared`].
    pub disk_mode: DiskMode,
    /// Whether members have a network device. What a sandbox reaches is said when it is taken.
    pub nic: bool,
    /// Members there are to be, 0 to [`POOL_SIZE_MAX`]. With 0 there is no pool.
    pub size: u32,
    /// What a member runs, each in a shell and with success, before it is parked; after `true` and,
    /// where the image has it, Python.
    pub commands: Vec<String>,
}

/// A pool as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolInfo {
    /// What it is to be.
    pub spec: PoolSpec,
    /// Members that can be claimed.
    pub ready: u32,
    /// Members on their way.
    pub coming: u32,
    /// Members of an image or a kernel that is not the current one any more: nobody gets them, and the
    /// next filling replaces them.
    pub stale: u32,
    /// Sandboxes that were claimed from it.
    pub hits: u64,
    /// Sandboxes that found it empty.
    pub misses: u64,
    /// Why the last filling ended early.
    pub failure: Option<String>,
    /// When it was made.
    pub created_at: Timestamp,
}

impl PoolSpec {
    /// Whether both are for the same sandboxes, of which there can be one pool only.
    #[must_use]
    pub fn is_of_kind_of(&self, other: &Self) -> bool {
        let kind = |spec: &Self| Self {
            size: 0,
            commands: Vec::new(),
            ..spec.clone()
        };
        kind(self) == kind(other)
    }

    fn matches(&self, spec: &SandboxSpec) -> bool {
        spec.kernel == KernelChoice::Auto
            && self.nic == spec.network.needs_device()
            && (&*self.image, self.cpus, self.memory_mib)
                == (&*spec.image, spec.cpus, spec.memory_mib)
            && (self.disk_mib, self.disk_mode) == (spec.disk_mib, spec.disk_mode)
    }

    /// A sandbox such as its members are.
    fn sandbox(&self) -> Result<SandboxSpec> {
        Ok(SandboxSpec {
            image: self.image.clone(),
            cpus: self.cpus,
            memory_mib: self.memory_mib,
            disk_mib: self.disk_mib,
            disk_mode: self.disk_mode,
            ..SandboxSpec::new("member".parse()?)
        })
    }

    fn of(row: &PoolRow) -> Self {
        Self {
            image: row.image.clone(),
            cpus: row.cpus,
            memory_mib: row.memory_mib,
            disk_mib: row.disk_mib,
            disk_mode: row.disk_mode,
            nic: row.nic,
            size: row.size,
            commands: row.commands.clone(),
        }
    }

    fn check(&self) -> Result<()> {
        self.sandbox()?.check()?;
        if self.size > POOL_SIZE_MAX {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "a pool of {} members is above the most, {POOL_SIZE_MAX}",
                    self.size
                ),
            )
            .hint(format!("give --size a value from 0 to {POOL_SIZE_MAX}")));
        }
        if self.disk_mode == DiskMode::Shared {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "members of a pool cannot share a disk, which has one writer",
            )
            .hint("give --disk-mode isolated or memory"));
        }
        if self.commands.iter().any(|command| command.contains('\0')) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "a command has a NUL in it",
            ));
        }
        Ok(())
    }
}

/// What every member runs before the pool's own commands: under emulation, what has run once is
/// several times faster.
fn warm_commands(own: &[String]) -> Vec<WarmCommand> {
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    let always = [
        words(&["true"]),
        words(&["python3", "-c", "print(6*7)"]),
        // Twice: the first time, what is translated is used once.
        words(&["true"]),
    ];
    let always = always.into_iter().map(|argv| WarmCommand {
        argv,
        // Not every image has them.
        required: false,
    });
    let own = own.iter().map(|command| WarmCommand {
        argv: words(&["sh", "-c", command]),
        required: true,
    });
    always.chain(own).collect()
}

impl Engine {
    /// A sandbox from a pool, which runs and has its name when this returns; `None` if there is no
    /// pool for it, or no member is ready: then [`Engine::create`] it. Either way the pool is filled up
    /// in the background.
    ///
    /// Takes some milliseconds, and is not to be given up: what is under way then may or may not have
    /// become the sandbox.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::AlreadyExists`] if the name is taken, [`ErrorKind::Busy`] if a port is;
    /// [`ErrorKind::InvalidInput`].
    pub async fn claim(&self, spec: &SandboxSpec) -> Result<Option<(Session, StartTimes)>> {
        let begun = Instant::now();
        spec.check()?;
        // Both are a machine's from its start, and no member has any.
        if !spec.volumes.is_empty() || !spec.mounts.is_empty() {
            return Ok(None);
        }
        let Some(mut store) = Store::open_existing(&self.layout().database())? else {
            return Ok(None);
        };
        let pools = store.pools()?;
        if pools.is_empty() || store.image(&spec.image)?.is_none() {
            return Ok(None);
        }
        let (spec, image_digest) = &self.of_image(&store, spec)?;
        let Some(pool) = pools.iter().find(|pool| PoolSpec::of(pool).matches(spec)) else {
            return Ok(None);
        };
        let mut members = store.members(&pool.id)?;
        let kernel = self.kernel_key(&KernelChoice::Auto)?;
        members.retain(|row| row.state == State::Paused && fits(row, image_digest, &kernel));
        // Not all from the same end, so that claims at one moment rarely meet.
        let first = usize::try_from(random_u64()?).unwrap_or(0) % members.len().max(1);
        members.rotate_left(first);
        if spec.ssh.is_some() && !members.is_empty() {
            crate::ssh::user_key(self.os(), self.layout())?;
        }
        let request = KeeperRequest::Claim(claim_request(spec)?);
        for member in members {
            // Its keeper may have ended, or somebody else may have been faster: the next one, then.
            let Ok(session) =
                Session::connect(spec.name.as_str(), self.layout().sandbox(&member.id).path())
            else {
                continue;
            };
            let asked = tokio::time::timeout(CLAIM_PATIENCE, session.client.ask_keeper(&request));
            let Ok(answer) = asked.await else {
                // It must not become the sandbox after another one has.
                teardown::end_processes(self.layout(), &member)?;
                continue;
            };
            match answer {
                Ok(KeeperEvent::Ready(ready)) => {
                    self.fill_in_background(&store, &pool.id);
                    let since = |micros| Duration::from_micros(micros);
                    let times = StartTimes {
                        spawn: Duration::ZERO,
                        vmm: Duration::ZERO,
                        hello: since(ready.hello_us),
                        ready: begun.elapsed(),
                        warnings: Vec::new(),
                    };
                    return Ok(Some((session, times)));
                }
                Ok(KeeperEvent::Failed(failure))
                    if failure.reason == Some(KeeperReason::NameTaken) =>
                {
                    return Err(name_taken(&spec.name));
                }
                // Another member could not have the port either.
                Ok(KeeperEvent::Failed(failure))
                    if !spec.ports.is_empty()
                        && matches!(
                            failure.reason,
                            Some(
                                KeeperReason::Busy
                                    | KeeperReason::InvalidInput
                                    | KeeperReason::PermissionDenied
                            )
                        ) =>
                {
                    return Err(refusal(failure));
                }
                Ok(answer) => tracing::debug!(?answer, member = member.id, "no claim"),
                Err(error) => tracing::debug!(%error, member = member.id, "no claim"),
            }
        }
        store.count_pool_miss(&pool.id)?;
        self.fill_in_background(&store, &pool.id);
        Ok(None)
    }

    /// All pools, oldest first.
    pub fn pools(&self) -> Result<Vec<PoolInfo>> {
        let Some(mut store) = Store::open_existing(&self.layout().database())? else {
            return Ok(Vec::new());
        };
        let rows = teardown::reconcile(self.os(), self.layout(), &mut store)?;
        let pools = store.pools()?;
        let images = store.images()?;
        // Without a kernel no member is of use.
        let kernel = self.kernel_key(&KernelChoice::Auto).ok();
        Ok(pools
            .into_iter()
            .map(|pool| {
                let digest = images
                    .iter()
                    .find(|image| image.name == pool.image)
                    .map(|image| &*image.digest);
                let current = |row: &SandboxRow| match (digest, &kernel) {
                    (Some(digest), Some(kernel)) => fits(row, digest, kernel),
                    _ => false,
                };
                let count = |wanted: &dyn Fn(&SandboxRow) -> bool| {
                    let members = rows
                        .iter()
                        .filter(|row| row.pool.as_deref() == Some(&pool.id) && wanted(row));
                    u32::try_from(members.count()).unwrap_or(u32::MAX)
                };
                PoolInfo {
                    ready: count(&|row| current(row) && row.state == State::Paused),
                    coming: count(&|row| current(row) && row.state != State::Paused),
                    stale: count(&|row| !current(row)),
                    spec: PoolSpec::of(&pool),
                    hits: pool.hits,
                    misses: pool.misses,
                    failure: pool.failure,
                    created_at: pool.created_at,
                }
            })
            .collect())
    }

    /// Makes a pool, or changes the one of the same image and size, and fills it. `ready` is told
    /// each time how many members there are. A size of 0 removes it with its members.
    ///
    /// Commands that differ are tried on a first member before anything of the pool changes.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidInput`]; [`ErrorKind::NotFound`] for an unknown image; what a member did
    /// not start for. A pool that was there stays as it was if a first member of other commands does
    /// not start, and with the members it has otherwise; one that was not there is not made if no
    /// member starts.
    pub async fn set_pool(&self, spec: &PoolSpec, ready: &mut dyn FnMut(u32)) -> Result<()> {
        spec.check()?;
        if spec.nic && spec.size > 0 {
            self.network_mode()?;
        }
        let mut store = self.store()?;
        let Some(image) = store.image(&spec.image)? else {
            return Err(unknown_image(&spec.image));
        };
        let row = PoolRow {
            id: format!("{:016x}", random_u64()?),
            image: image.name.clone(),
            cpus: spec.cpus,
            memory_mib: spec.memory_mib,
            disk_mib: spec.disk_mib,
            disk_mode: spec.disk_mode,
            nic: spec.nic,
            size: spec.size,
            commands: spec.commands.clone(),
            hits: 0,
            misses: 0,
            failure: None,
            created_at: Timestamp::now(),
        };
        if spec.size == 0 {
            return self.remove_pool(&mut store, row).await;
        }
        let (lock, old, new) = self.lock_pool_like(&mut store, &row)?;
        let row = PoolRow { id: old.id, ..row };
        if old.commands == row.commands {
            store.put_pool(&row)?;
        } else {
            // Members that other commands have warmed are of another kind.
            ready(0);
            let kernel = self.kernel_key(&KernelChoice::Auto)?;
            let proven = self.make_member(&mut store, &row, image, kernel).await?;
            store.put_pool(&row)?;
            self.remove_members(&mut store, &row.id, |member| member.id != proven)
                .await?;
        }
        let text = serde_json::to_vec(self.config()).map_err(|error| {
            Error::new(ErrorKind::Internal, "could not write the pool's file").because(error)
        })?;
        // For whoever fills it in the background.
        self.os().write_file_atomic(
            "write the pool's file",
            &self.pool_file(&row.id, "json"),
            &text,
            0o600,
            Durability::Synced,
        )?;
        let filled = self.fill_locked(&row.id, &lock, ready).await;
        if filled.is_err() && new && store.members(&row.id)?.is_empty() {
            // Whoever asks for a sandbox later would try in vain each time.
            self.remove_locked(&mut store, &row.id, lock).await?;
        }
        filled
    }

    /// The lock of the pool for the same sandboxes, and that pool; where there is none, `wanted` is made
    /// it, which the last part of the answer says.
    fn lock_pool_like(&self, store: &mut Store, wanted: &PoolRow) -> Result<(Lock, PoolRow, bool)> {
        loop {
            let found = pool_like(store, wanted)?;
            let id = found.as_ref().map_or(&wanted.id, |found| &found.id);
            let lock = self.lock_pool(id)?;
            // Whoever had the lock may have changed the pool, or removed it; and where there was none,
            // somebody else may have made one.
            let kept = match &found {
                Some(found) => pool_with(store, &found.id)?,
                None => store.put_pool(wanted)?,
            };
            if let Some(kept) = kept {
                return Ok((lock, kept, found.is_none()));
            }
            self.remove_pool_files(id)?;
        }
    }

    /// Removes the pool for the same sandboxes as `wanted`, if there is one.
    async fn remove_pool(&self, store: &mut Store, wanted: PoolRow) -> Result<()> {
        let Some(PoolRow { id, .. }) = pool_like(store, &wanted)? else {
            return Ok(());
        };
        // Whoever fills it at this moment notices, and ends; what it has made is then here.
        store.put_pool(&PoolRow {
            id: id.clone(),
            size: 0,
            ..wanted
        })?;
        let lock = self.lock_pool(&id)?;
        self.remove_locked(store, &id, lock).await
    }

    /// Removes a pool with its members. Idempotent.
    async fn remove_locked(&self, store: &mut Store, id: &str, lock: Lock) -> Result<()> {
        self.remove_members(store, id, |_| true).await?;
        // Before the lock goes: who waits for it must not find a pool that is on its way out.
        store.delete_pool(id)?;
        self.remove_pool_files(id)?;
        drop(lock);
        Ok(())
    }

    /// Removes the files of a pool that is not there any more, by whoever has its lock.
    fn remove_pool_files(&self, id: &str) -> Result<()> {
        for kind in POOL_FILES {
            self.os()
                .remove_file("remove the pool's file", &self.pool_file(id, kind))?;
        }
        Ok(())
    }

    /// Files of pools that are not there any more.
    pub(crate) fn stray_pool_files(&self, store: &Store) -> Result<Vec<PathBuf>> {
        let mut strays = Vec::new();
        for entry in entries(&self.layout().pools())? {
            let path = entry.path();
            let id = path.file_stem().unwrap_or_default().to_string_lossy();
            let lock = self.pool_file(&id, "lock");
            if pool_with(store, &id)?.is_some() {
                continue;
            }
            // Somebody may be about to make it. What nobody ever locked has no such file, and gets none.
            let free = !lock.exists() || self.try_lock_pool(&id)?.is_some();
            if free && pool_with(store, &id)?.is_none() {
                strays.push(path);
            }
        }
        // The lock last.
        strays.sort_by_key(|path| path.extension().is_some_and(|kind| kind == "lock"));
        Ok(strays)
    }

    fn lock_pool(&self, id: &str) -> Result<Lock> {
        Ok(self
            .os()
            .lock("lock the pool", &self.pool_file_for_lock(id)?)?)
    }

    fn try_lock_pool(&self, id: &str) -> Result<Option<Lock>> {
        Ok(self
            .os()
            .try_lock("lock the pool", &self.pool_file_for_lock(id)?)?)
    }

    fn pool_file_for_lock(&self, id: &str) -> Result<PathBuf> {
        self.os()
            .create_dir_all("make the directory", &self.layout().pools())?;
        Ok(self.pool_file(id, "lock"))
    }

    async fn remove_members(
        &self,
        store: &mut Store,
        id: &str,
        which: impl Fn(&SandboxRow) -> bool,
    ) -> Result<()> {
        for row in store.members(id)? {
            if which(&row) {
                self.delete_row(store, row).await?;
            }
        }
        Ok(())
    }

    /// Fills a pool up, unless somebody does already. For a process of its own.
    ///
    /// # Errors
    ///
    /// What a member did not start for; it is recorded with the pool.
    pub async fn fill_pool(&self, id: &str) -> Result<()> {
        loop {
            let Some(lock) = self.try_lock_pool(id)? else {
                return Ok(());
            };
            if pool_with(&self.store()?, id)?.is_none() {
                return self.remove_pool_files(id);
            }
            self.fill_locked(id, &lock, &mut |_| {}).await?;
            drop(lock);
            // A claim that saw the lock taken relies on whoever held it to look once more.
            if self.lacks(&self.store()?, id)? == 0 {
                return Ok(());
            }
        }
    }

    async fn fill_locked(&self, id: &str, _lock: &Lock, ready: &mut dyn FnMut(u32)) -> Result<()> {
        let mut store = self.store()?;
        loop {
            // Looked up each time: it may be changed or removed meanwhile.
            let Some(pool) = pool_with(&store, id)? else {
                return Ok(());
            };
            teardown::reconcile(self.os(), self.layout(), &mut store)?;
            let image = store
                .image(&pool.image)?
                .ok_or_else(|| unknown_image(&pool.image))?;
            let kernel = self.kernel_key(&KernelChoice::Auto)?;
            let stale = |row: &SandboxRow| !fits(row, &image.digest, &kernel);
            self.remove_members(&mut store, id, stale).await?;
            let mut members = store.members(id)?;
            let size = usize::try_from(pool.size).unwrap_or(usize::MAX);
            if members.len() >= size {
                for row in members.drain(size..) {
                    self.delete_row(&mut store, row).await?;
                }
                ready(pool.size);
                return Ok(());
            }
            ready(u32::try_from(members.len()).unwrap_or(u32::MAX));
            let made = self.make_member(&mut store, &pool, image, kernel).await;
            let failure = made.as_ref().err().map(Error::in_one_line);
            if failure != pool.failure {
                store.set_pool_failure(id, failure.as_deref())?;
            }
            made?;
        }
    }

    /// Makes a member, and says its id.
    async fn make_member(
        &self,
        store: &mut Store,
        pool: &PoolRow,
        image: ImageRow,
        kernel: String,
    ) -> Result<String> {
        let mut spec = PoolSpec::of(pool).sandbox()?;
        // What warms it meets what commands will meet.
        spec.take_defaults(&image.config);
        let row = self.insert(store, &spec, image.digest, kernel, Some(pool.id.clone()))?;
        let beginning = Beginning {
            plain: false,
            snapshot: None,
            nic: pool.nic,
            park: Some(warm_commands(&pool.commands)),
        };
        let name = row.spec.name.as_str();
        match self.start_with(name, &beginning).await {
            Ok((_, times)) => {
                for warning in &times.warnings {
                    tracing::warn!("{warning}");
                }
                Ok(row.id)
            }
            Err(error) => {
                if let Some(row) = store.sandbox(&row.id)?
                    && let Err(left) = self.delete_row(store, row).await
                {
                    tracing::warn!(%left, "could not remove a member that did not start");
                }
                Err(error)
            }
        }
    }

    /// How many members a pool lacks that could be claimed.
    fn lacks(&self, store: &Store, id: &str) -> Result<u32> {
        let Some(pool) = pool_with(store, id)? else {
            return Ok(0);
        };
        let Some(image) = store.image(&pool.image)? else {
            return Ok(0);
        };
        let kernel = self.kernel_key(&KernelChoice::Auto)?;
        let mut members = store.members(id)?;
        members.retain(|row| fits(row, &image.digest, &kernel));
        let members = u32::try_from(members.len()).unwrap_or(u32::MAX);
        Ok(pool.size.saturating_sub(members))
    }

    /// Starts a process that fills a pool, if it lacks members and nobody fills it. What goes wrong
    /// is no concern of the sandbox that was just started: it is recorded with the pool.
    fn fill_in_background(&self, store: &Store, id: &str) {
        let started = self.lacks(store, id).and_then(|lacks| {
            if lacks == 0 || self.try_lock_pool(id)?.is_none() {
                return Ok(());
            }
            let log = self
                .os()
                .create_log("open the pool's log", &self.pool_file(id, "log"))?;
            let program = &self.config().keeper;
            let mut child = Command::new(program)
                .arg("--fill-pool")
                .arg(self.pool_file(id, "json"))
                .env_clear()
                .current_dir("/")
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::from(log))
                .spawn()
                .map_err(|error| io(format!("could not run {}", program.display()), error))?;
            // A caller that lives longer must not collect zombies.
            let _ = std::thread::Builder::new()
                .stack_size(64 * 1024)
                .spawn(move || child.wait());
            Ok(())
        });
        if let Err(error) = started {
            tracing::warn!(reason = error.in_one_line(), "could not fill the pool");
        }
    }

    fn pool_file(&self, id: &str, kind: &str) -> PathBuf {
        self.layout().pools().join(format!("{id}.{kind}"))
    }
}

/// The pool for the same sandboxes as `wanted`.
fn pool_like(store: &Store, wanted: &PoolRow) -> Result<Option<PoolRow>> {
    let wanted = PoolSpec::of(wanted);
    let mut pools = store.pools()?.into_iter();
    Ok(pools.find(|pool| PoolSpec::of(pool).is_of_kind_of(&wanted)))
}

fn pool_with(store: &Store, id: &str) -> Result<Option<PoolRow>> {
    Ok(store.pools()?.into_iter().find(|pool| pool.id == id))
}

/// Whether a member is of use to somebody who wants this image and kernel.
fn fits(row: &SandboxRow, digest: &str, kernel: &str) -> bool {
    row.image_digest == digest && row.kernel == kernel
}

/// The engine and the pool's id that a pool's file stands for.
///
/// # Errors
///
/// [`ErrorKind::State`] if it is none.
pub fn read_pool_file(path: &Path) -> Result<(Engine, String)> {
    let doing = || format!("could not read the pool's file {}", path.display());
    let bytes = std::fs::read(path).map_err(|error| io(doing(), error))?;
    let config: Config = serde_json::from_slice(&bytes)
        .map_err(|error| Error::new(ErrorKind::State, doing()).because(error))?;
    let id = path.file_stem().unwrap_or_default().to_string_lossy();
    Ok((Engine::new(config), id.into_owned()))
}

fn claim_request(spec: &SandboxSpec) -> Result<ClaimRequest> {
    let starter = spec.ephemeral.then(myself).transpose()?;
    Ok(ClaimRequest {
        name: spec.name.to_string(),
        env: env_vars(&spec.env),
        cwd: spec.workdir.clone(),
        user: spec.user.clone(),
        ttl_ms: spec
            .ttl
            .map(|ttl| u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX)),
        ephemeral: spec.ephemeral,
        network: spec
            .network
            .needs_device()
            .then(|| spec.network.to_message()),
        ssh_keys: spec.ssh.as_ref().map(|ssh| ssh.keys().to_vec()),
        starter: starter.map(|starter| Starter {
            pid: starter.pid,
            start_time_ticks: starter.start_time_ticks,
            boot_id: starter.boot_id,
        }),
        ports: (!spec.ports.is_empty()).then(|| spec.ports.iter().map(ports::mapping).collect()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::NetworkSpec;

    fn pool() -> PoolSpec {
        PoolSpec {
            image: "debian-12".to_owned(),
            cpus: 1,
            memory_mib: 512,
            disk_mib: 4096,
            disk_mode: DiskMode::Isolated,
            nic: false,
            size: 1,
            commands: Vec::new(),
        }
    }

    #[test]
    fn a_pool_is_for_sandboxes_of_its_kind() {
        let spec = SandboxSpec::new("a".parse().expect("a name"));
        assert!(pool().matches(&spec));
        let others: [fn(&mut SandboxSpec); 7] = [
            |spec| spec.image = "other".to_owned(),
            |spec| spec.cpus = 2,
            |spec| spec.memory_mib = 256,
            |spec| spec.disk_mib = 64,
            |spec| spec.disk_mode = DiskMode::Memory,
            |spec| spec.kernel = KernelChoice::Stock,
            |spec| spec.network = NetworkSpec::open(),
        ];
        for change in others {
            let mut other = spec.clone();
            change(&mut other);
            assert!(!pool().matches(&other), "{other:?}");
        }
    }

    #[test]
    fn impossible_pools_are_refused() {
        let changes: [fn(&mut PoolSpec); 4] = [
            |pool| pool.size = POOL_SIZE_MAX + 1,
            |pool| pool.disk_mode = DiskMode::Shared,
            |pool| pool.commands = vec!["a\0b".to_owned()],
            |pool| pool.cpus = 0,
        ];
        for change in changes {
            let mut wrong = pool();
            change(&mut wrong);
            let error = wrong.check().expect_err("refused");
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{wrong:?}");
        }
        pool().check().expect("possible");
    }

    #[test]
    fn a_pools_own_commands_have_to_succeed() {
        let commands = warm_commands(&["import numpy".to_owned()]);
        let required: Vec<bool> = commands.iter().map(|command| command.required).collect();
        assert_eq!(required, [false, false, false, true]);
    }
}

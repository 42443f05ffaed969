//! The engine: what exists, what it needs, and its life.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use smolvm_host::cancel::Cancel;
use smolvm_host::kernel::Kernel;
use smolvm_host::net::user::HostSide;
use smolvm_host::oci::ImageConfig;
use smolvm_host::os::Os;
use smolvm_host::packages::{Need, PASTA, Programs};
use smolvm_host::process::ProcessIdentity;
use smolvm_proto::keeper::{KeeperEvent, KeeperRequest, StopRequest};
use smolvm_vmm::{Accel, Memory};

use crate::assets::{
    Assets, Hardware, STOCK_KERNEL, Watcher, has_drivers, lost_image, refuse_without_mounts,
    unknown_image,
};
use crate::config::Config;
use crate::engines::{EngineChoice, EngineName};
use crate::error::{Error, ErrorKind, Result, io};
use crate::facts::{self, Acceleration};
use crate::jail::{self, Jailing};
use crate::kernels;
use crate::launch::{self, Restore, WarmCommand};
use crate::layout::Layout;
use crate::mounts::{self, Mount};
use crate::names;
use crate::network::{self, NetworkLaunch, NetworkSpec};
use crate::plan::{self, HostFacts, Layer};
use crate::ports::{self, PublishedPort};
use crate::resize;
use crate::session::Session;
use crate::snapshots::Saved;
use crate::spec::{DiskMode, KernelChoice, SandboxName, SandboxSpec};
use crate::ssh;
use crate::store::{NetworkMode, NetworkRow, OTHER_DIRECTORY, SandboxRow, State, Store, reserve};
use crate::teardown;
use crate::templates;
use crate::volumes::VolumeUse;

/// The library's entry. Cheap to clone; touches nothing on disk until something is written.
#[derive(Debug, Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    config: Config,
    layout: Layout,
    programs: Programs,
    os: Os,
}

/// A sandbox as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxInfo {
    /// Sixteen hexadecimal digits.
    pub id: String,
    /// Its name.
    pub name: SandboxName,
    /// Where it is in its life.
    pub state: State,
    /// Why it is in that state, where that is not plain; of one that runs, what is wrong with it.
    pub reason: Option<String>,
    /// Image of its root file system.
    pub image: String,
    /// Key of the kernel it boots.
    pub kernel: String,
    /// Virtual CPUs.
    pub cpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Size of the writable layer in MiB.
    pub disk_mib: u32,
    /// Where changes to the root file system go.
    pub disk_mode: DiskMode,
    /// Whether it is destroyed as soon as it stops.
    pub ephemeral: bool,
    /// Environment of every command.
    pub env: Vec<(String, String)>,
    /// Working directory of commands that name none.
    pub workdir: Option<String>,
    /// User of commands that name none.
    pub user: Option<String>,
    /// What it may reach.
    pub network: NetworkSpec,
    /// Its address, while it runs with a network device.
    pub address: Option<Ipv4Addr>,
    /// Where device and rules are, while it runs with a network device.
    pub network_mode: Option<NetworkMode>,
    /// Time after each start at which it is destroyed.
    pub ttl: Option<Duration>,
    /// Engine of the last start.
    pub engine: Option<String>,
    /// How guest instructions ran at the last start: `kvm` or `emulation`.
    pub accel: Option<String>,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it was last started.
    pub started_at: Option<Timestamp>,
    /// When it last stopped.
    pub stopped_at: Option<Timestamp>,
    /// Its keeper, while it runs.
    pub keeper_pid: Option<u32>,
    /// Its VMM, while it runs.
    pub vmm_pid: Option<u32>,
    /// Whether it is to be reached by SSH.
    pub ssh: bool,
    /// Port on the host's loopback address on which it is.
    pub ssh_port: Option<u16>,
    /// Bytes its own writable layer takes on the host's disk.
    pub disk_used_bytes: Option<u64>,
    /// Ports of the host that lead to it, while it runs, by number.
    pub ports: Vec<PublishedPort>,
    /// Volumes that are mounted in it.
    pub volumes: Vec<VolumeUse>,
    /// Directories of the host that it sees.
    pub mounts: Vec<Mount>,
}

/// An image in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageInfo {
    /// Its name.
    pub name: String,
    /// `sha256:` and 64 hexadecimal digits.
    pub digest: String,
    /// Size of the root file system in bytes.
    pub size_bytes: u64,
    /// When it was made.
    pub created_at: Timestamp,
    /// Where it came from.
    pub source: String,
    /// Digest of its manifest, where a registry or archive gave it one.
    pub manifest: Option<String>,
    /// What it says of the commands that are run in it.
    pub config: ImageConfig,
}

/// How a start went: how long it took, each from the call of [`Engine::start`], zero if it ran already;
/// and what the caller should know.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StartTimes {
    /// Until the keeper was started.
    pub spawn: Duration,
    /// Until the VMM process ran.
    pub vmm: Duration,
    /// Until the guest's agent spoke.
    pub hello: Duration,
    /// Until the guest served.
    pub ready: Duration,
    /// Why it booted where it could have been restored, for people; most often nothing.
    pub warnings: Vec<String>,
}

/// The end of a guest's console.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsoleTail {
    /// The log file.
    pub path: PathBuf,
    /// Its last lines, oldest first.
    pub lines: Vec<String>,
}

/// A host program that is not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MissingPackage {
    /// The program.
    pub program: String,
    /// The Debian package that brings it.
    pub package: String,
    /// What it is needed for.
    pub why: String,
    /// For how long it is needed.
    pub need: Need,
}

/// Most time that is given to each removal of a sandbox that a start waits for.
const REMOVAL_TIME: Duration = Duration::from_secs(10);

impl Engine {
    /// An engine for this configuration.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self::with_os(config, Os::new())
    }

    /// An engine whose effects on the host may be made to fail.
    #[must_use]
    pub fn with_os(config: Config, os: Os) -> Self {
        Self {
            shared: Arc::new(Shared {
                layout: Layout::new(config.data_dir.clone()),
                programs: Programs::new(config.program_dirs.iter().cloned()),
                config,
                os,
            }),
        }
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.shared.config
    }

    pub(crate) fn os(&self) -> &Os {
        &self.shared.os
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.shared.layout
    }

    pub(crate) fn assets(&self) -> Assets<'_> {
        Assets {
            os: &self.shared.os,
            layout: &self.shared.layout,
            programs: &self.shared.programs,
        }
    }

    /// The store, made with its directories if it is not there.
    pub(crate) fn store(&self) -> Result<Store> {
        let root = self.layout().root();
        let unusable = |error: smolvm_host::HostError| Error::from(error).hint(OTHER_DIRECTORY);
        self.os()
            .create_dir_all("make the data directory", root)
            .map_err(unusable)?;
        self.os()
            .create_dir_all("make the data directory", &self.layout().sandboxes())
            .map_err(unusable)?;
        Store::open(&self.layout().database())
    }

    // ---- what exists ----

    /// All sandboxes, oldest first, with what crashes left repaired. Makes nothing on disk.
    pub fn list(&self) -> Result<Vec<SandboxInfo>> {
        let Some(mut store) = Store::open_existing(&self.layout().database())? else {
            return Ok(Vec::new());
        };
        let rows = teardown::reconcile(self.os(), self.layout(), &mut store)?;
        let networks = store.networks()?;
        let own = |row: &SandboxRow| networks.iter().find(|own| own.sandbox_id == row.id);
        // Members of pools are nobody's yet, and what is being removed is nobody's any more.
        let visible = rows.into_iter().filter(|row| !row.spec.name.is_hidden());
        Ok(visible
            .map(|row| {
                let network = own(&row);
                self.describe(row, network)
            })
            .collect())
    }

    /// One sandbox.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`].
    pub fn info(&self, name: &str) -> Result<SandboxInfo> {
        let Some(mut store) = Store::open_existing(&self.layout().database())? else {
            return Err(unknown_sandbox(name));
        };
        let row = visible(&store, name)?;
        let row = teardown::row_to_show(self.os(), self.layout(), &mut store, row)?
            .ok_or_else(|| unknown_sandbox(name))?;
        let network = store.network(&row.id)?;
        Ok(self.describe(row, network.as_ref()))
    }

    /// A name that is free at this moment.
    pub fn unused_name(&self) -> Result<SandboxName> {
        let taken = match Store::open_existing(&self.layout().database())? {
            Some(store) => store
                .sandboxes()?
                .into_iter()
                .map(|row| row.spec.name.to_string())
                .collect(),
            None => Vec::new(),
        };
        names::generate(random_u64()?, |name| {
            taken.iter().any(|other| other == name)
        })
        .parse()
    }

    /// All images, by name. Makes nothing on disk.
    pub fn images(&self) -> Result<Vec<ImageInfo>> {
        let Some(store) = Store::open_existing(&self.layout().database())? else {
            return Ok(Vec::new());
        };
        Ok(store.images()?.into_iter().map(ImageInfo::from).collect())
    }

    /// The last `lines` lines of a sandbox's console.
    pub fn console(&self, name: &str, lines: usize) -> Result<ConsoleTail> {
        let info = self.info(name)?;
        let path = self.layout().sandbox(&info.id).console();
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(io(format!("could not read {}", path.display()), error)),
        };
        let text = String::from_utf8_lossy(&bytes);
        let all: Vec<&str> = text.lines().collect();
        Ok(ConsoleTail {
            path,
            lines: all[all.len().saturating_sub(lines)..]
                .iter()
                .map(|line| (*line).to_owned())
                .collect(),
        })
    }

    /// A descriptor that becomes readable when the process that holds a sandbox ends; `None` if no
    /// process does.
    pub fn keeper_end(&self, name: &str) -> Result<Option<OwnedFd>> {
        let Some(mut store) = Store::open_existing(&self.layout().database())? else {
            return Err(unknown_sandbox(name));
        };
        let row = self.row(&mut store, name)?;
        if row.state.is_held() {
            open_holder(&row)
        } else {
            Ok(None)
        }
    }

    /// The row of a sandbox that people may know of, made true.
    pub(crate) fn row(&self, store: &mut Store, name: &str) -> Result<SandboxRow> {
        visible(store, name)?;
        self.any_row(store, name)
    }

    /// As [`Engine::row`], also of a member of a pool.
    fn any_row(&self, store: &mut Store, name: &str) -> Result<SandboxRow> {
        let find = |store: &Store| {
            store
                .sandbox_named(name)?
                .ok_or_else(|| unknown_sandbox(name))
        };
        let row = find(store)?;
        if teardown::reconcile_row(self.os(), self.layout(), store, &row)? {
            return find(store);
        }
        Ok(row)
    }

    fn describe(&self, row: SandboxRow, network: Option<&NetworkRow>) -> SandboxInfo {
        let held = row.state.is_held();
        let pid = |identity: Option<ProcessIdentity>| {
            identity
                .filter(|_| held)
                .and_then(|identity| u32::try_from(identity.pid).ok())
        };
        let disk_used_bytes = (row.spec.disk_mode == DiskMode::Isolated)
            .then(|| allocated(&self.layout().sandbox(&row.id).disk()))
            .flatten();
        SandboxInfo {
            id: row.id,
            name: row.spec.name,
            state: row.state,
            reason: row.reason,
            image: row.spec.image,
            kernel: row.kernel,
            cpus: row.spec.cpus,
            memory_mib: row.spec.memory_mib,
            disk_mib: row.spec.disk_mib,
            disk_mode: row.spec.disk_mode,
            ephemeral: row.spec.ephemeral,
            env: row.spec.env,
            workdir: row.spec.workdir,
            user: row.spec.user,
            network: row.spec.network,
            address: network.map(|own| own.address),
            network_mode: network.map(|own| own.mode),
            ttl: row.spec.ttl,
            engine: row.engine,
            accel: row.accel,
            created_at: row.created_at,
            started_at: row.started_at,
            stopped_at: row.stopped_at,
            keeper_pid: pid(row.holder),
            vmm_pid: pid(row.vmm),
            ssh: row.spec.ssh.is_some(),
            ssh_port: row.ssh_port,
            disk_used_bytes,
            ports: row.spec.ports,
            volumes: row.spec.volumes,
            mounts: row.spec.mounts,
        }
    }

    // ---- what is needed ----

    /// What `image` still needs before a sandbox can start from it with this kernel, with a network
    /// device or without; empty if nothing.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] for an image or a small kernel that is not there and is not made by
    /// the way.
    pub fn missing_assets(
        &self,
        image: &str,
        kernel: &KernelChoice,
        network: bool,
    ) -> Result<Vec<String>> {
        let mut missing = Vec::new();
        let chosen = self.assets().choose_kernel(kernel)?;
        if chosen.as_deref() == Some(STOCK_KERNEL) {
            let there = self.assets().kernel(STOCK_KERNEL)?;
            let hardware = Hardware {
                nic: network,
                engine: self.engine_if_known()?,
            };
            // Who prepares the host wants it for everything.
            let all = network && *kernel == KernelChoice::Stock;
            let suits = |there: &Kernel| {
                hardware.refuse_without_drivers(there).is_ok() && (!all || has_drivers(there))
            };
            if there.is_none_or(|there| !suits(&there)) {
                missing.push("kernel".to_owned());
            }
        }
        let store = Store::open_existing(&self.layout().database())?;
        let known = store.map(|store| store.image(image)).transpose()?.flatten();
        if known.is_none() {
            if image != crate::spec::DEFAULT_IMAGE {
                return Err(unknown_image(image));
            }
            missing.push(format!("image {image}"));
        }
        Ok(missing)
    }

    /// Downloads or builds what `image` still needs to start with this kernel. Long; run it on a
    /// thread that may block.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] for an unknown image, [`ErrorKind::MissingDependency`],
    /// [`ErrorKind::Network`], [`ErrorKind::NoSpace`], [`ErrorKind::Cancelled`]. Nothing half made
    /// remains.
    pub fn prepare(
        &self,
        image: &str,
        kernel: &KernelChoice,
        watcher: &mut dyn Watcher,
        cancel: &Cancel,
    ) -> Result<()> {
        let mut store = self.store()?;
        if image != crate::spec::DEFAULT_IMAGE && store.image(image)?.is_none() {
            return Err(unknown_image(image));
        }
        match (kernel, self.assets().choose_kernel(kernel)?) {
            (KernelChoice::File(file), _) => {
                self.assets().import_kernel(file)?;
            }
            (_, Some(key)) if key != STOCK_KERNEL => {}
            _ => self.assets().make_kernel(watcher, cancel)?,
        }
        self.assets()
            .make_image(&mut store, image, watcher, cancel)?;
        // Formatted here so that no start has to.
        self.assets()
            .empty_layer(crate::spec::DISK_MIB_DEFAULT)
            .map(|_| ())
    }

    /// Makes the data directory and the database in it, if they are not there.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::PermissionDenied`] where this user may not; [`ErrorKind::NoSpace`].
    pub fn make_data_dir(&self) -> Result<()> {
        self.store().map(drop)
    }

    /// Whether the disk of the data directory has no room left for anything.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        reserve::is_low(&self.layout().database())
    }

    /// Host programs that are not there.
    #[must_use]
    pub fn missing_packages(&self) -> Vec<MissingPackage> {
        let ordinary = !rustix::process::geteuid().is_root();
        self.shared
            .programs
            .missing(ordinary)
            .into_iter()
            .map(|missing| MissingPackage {
                program: missing.program.to_owned(),
                package: missing.package.to_owned(),
                why: missing.why.to_owned(),
                need: missing.need,
            })
            .collect()
    }

    /// Those of them that it takes to make `assets`, as [`Engine::missing_assets`] names them, and to run
    /// sandboxes then.
    #[must_use]
    pub fn missing_packages_for(&self, assets: &[String]) -> Vec<MissingPackage> {
        let mut packages = self.missing_packages();
        packages.retain(|package| takes(package.need, assets));
        packages
    }

    /// Installs Debian packages; only root may. `line` is told each line the package tool prints.
    pub fn install_packages(
        &self,
        packages: &[String],
        line: &mut dyn FnMut(&str),
        cancel: &Cancel,
    ) -> Result<()> {
        let packages: Vec<&str> = packages.iter().map(String::as_str).collect();
        Ok(self.shared.programs.install(&packages, cancel, line)?)
    }

    /// How guest instructions run here, and why. Measured once after each start of the host.
    pub fn acceleration(&self) -> Result<Acceleration> {
        facts::acceleration(&mut self.store()?, self.config().accel)
    }

    /// The programs of the host.
    pub(crate) fn programs(&self) -> &Programs {
        &self.shared.programs
    }

    // ---- life ----

    /// Makes a sandbox, without starting it. An ephemeral one lives no longer than this process
    /// until it is started.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::AlreadyExists`] if the name is taken, [`ErrorKind::Busy`] if a port is,
    /// [`ErrorKind::NotFound`] for an unknown image or volume or a kernel that was not built,
    /// [`ErrorKind::InvalidInput`]. Nothing remains after an error.
    pub fn create(&self, spec: &SandboxSpec) -> Result<SandboxInfo> {
        spec.check()?;
        if spec.network.needs_device() {
            self.network_mode()?;
        }
        self.create_with(spec, &self.kernel_for(spec)?)
    }

    /// Directory name of the kernel a new sandbox gets. A file that is given is taken over.
    pub(crate) fn kernel_for(&self, spec: &SandboxSpec) -> Result<String> {
        match &spec.kernel {
            KernelChoice::File(file) => self.assets().import_kernel(file),
            choice => self.kernel_key(choice),
        }
    }

    /// The same with the kernel of this key.
    pub(crate) fn create_with(&self, spec: &SandboxSpec, kernel: &str) -> Result<SandboxInfo> {
        let mut store = self.store()?;
        let (spec, digest) = self.of_image(&store, spec)?;
        let row = self.insert(&mut store, &spec, digest, kernel.to_owned(), None)?;
        Ok(self.describe(row, None))
    }

    /// A sandbox as its image would have it where nothing else was asked for, and the digest of that
    /// image's root file system.
    pub(crate) fn of_image(
        &self,
        store: &Store,
        spec: &SandboxSpec,
    ) -> Result<(SandboxSpec, String)> {
        let image = store.image(&spec.image)?.ok_or_else(|| {
            if spec.image == crate::spec::DEFAULT_IMAGE {
                Error::new(
                    ErrorKind::MissingDependency,
                    format!("the image `{}` is not built yet", spec.image),
                )
                .hint("build it with `smolvm setup`")
            } else {
                unknown_image(&spec.image)
            }
        })?;
        let mut spec = spec.clone();
        spec.image = image.name;
        spec.take_defaults(&image.config);
        Ok((spec, image.digest))
    }

    /// An image with what it says of its commands.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`].
    pub fn image(&self, name: &str) -> Result<ImageInfo> {
        let store = Store::open_existing(&self.layout().database())?;
        let image = store.map(|store| store.image(name)).transpose()?.flatten();
        image
            .map(ImageInfo::from)
            .ok_or_else(|| unknown_image(name))
    }

    /// Writes the row of a new sandbox and makes its directory.
    pub(crate) fn insert(
        &self,
        store: &mut Store,
        spec: &SandboxSpec,
        image_digest: String,
        kernel: String,
        pool: Option<String>,
    ) -> Result<SandboxRow> {
        if spec.ssh.is_some() {
            // There for any client from the first moment.
            ssh::user_key(self.os(), self.layout())?;
        }
        let id = format!("{:016x}", random_u64()?);
        let mut spec = spec.clone();
        mounts::without_links(&mut spec.mounts);
        if !spec.ports.is_empty() {
            // What a crash left must not keep its ports.
            teardown::reconcile(self.os(), self.layout(), store)?;
        }
        // Before anything is made. Held until the row is written, which is what keeps it after that.
        let held = ports::take_all(self.os(), &HostSide::here(), store, &spec.ports)?;
        spec.ports = held.iter().map(|bound| bound.published).collect();
        // As they are read again.
        spec.ports.sort_by_key(|port| (port.host.port, port.host));
        if pool.is_some() {
            spec.name = SandboxName::hidden(&id);
        }
        let short_lived = spec.ephemeral || pool.is_some();
        let row = SandboxRow {
            id,
            state: State::Created,
            reason: None,
            spec,
            image_digest,
            kernel,
            engine: None,
            accel: None,
            created_at: Timestamp::now(),
            started_at: None,
            stopped_at: None,
            holder: short_lived.then(myself).transpose()?,
            vmm: None,
            pool,
            ssh_port: None,
        };
        if let Some(older) = store.sandbox_named(row.spec.name.as_str())? {
            // What a crash left must not keep its name.
            teardown::reconcile_row(self.os(), self.layout(), store, &older)?;
        }
        store.insert_sandbox(&row)?;
        drop(held);
        let row = SandboxRow {
            ssh_port: self.give_ssh_port(store, &row)?,
            ..row
        };
        // Whoever removes an image looks for rows first: either that one saw this row, or it is seen
        // here that the image is gone.
        if !store.is_kept_besides(&row.image_digest, &row.id)? {
            store.delete_sandbox(&row.id)?;
            return Err(Error::new(
                ErrorKind::NotFound,
                format!(
                    "image `{}` was removed or replaced just now",
                    row.spec.image
                ),
            )
            .hint("see the images with `smolvm image list`, and try again"));
        }
        let made = self.os().create_dir(
            "make the sandbox's directory",
            self.layout().sandbox(&row.id).path(),
        );
        // Looked for now that the row is there: a kernel that is used is not removed.
        let made = made.map_err(Error::from).and_then(|()| {
            self.assets().kernel(&row.kernel)?.ok_or_else(no_kernel)?;
            Ok(())
        });
        if let Err(error) = made {
            teardown::destroy(self.os(), self.layout(), store, &row.id)?;
            return Err(error);
        }
        Ok(row)
    }

    /// Starts a sandbox and waits until its guest serves. One that runs already is connected to. An
    /// ephemeral one does not outlive the process that starts it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::GuestFailed`] with the last console lines if the guest does not come up,
    /// [`ErrorKind::Busy`] if another sandbox writes to its shared disk, or has one of its volumes while
    /// one of the two writes to it,
    /// [`ErrorKind::MissingDependency`]. The sandbox is then off, and can be started again.
    pub async fn start(&self, name: &str) -> Result<(Session, StartTimes)> {
        visible(&self.store()?, name)?;
        self.start_with(name, &Beginning::default()).await
    }

    /// As [`Engine::start`], from what `beginning` says.
    pub(crate) async fn start_with(
        &self,
        name: &str,
        beginning: &Beginning<'_>,
    ) -> Result<(Session, StartTimes)> {
        let begun = Instant::now();
        loop {
            let mut store = self.store()?;
            let row = self.any_row(&mut store, name)?;
            match row.state {
                State::Starting | State::Running => {
                    let Some(session) = self.attach_when_there(&row).await? else {
                        continue;
                    };
                    match session.wait_ready().await {
                        Ok(_) => return Ok((session, StartTimes::default())),
                        // Its machine has ended a moment ago, and its keeper is about to say so.
                        Err(error)
                            if error.kind() == ErrorKind::GuestFailed
                                && row.state == State::Running =>
                        {
                            wait_for_end(&row).await?;
                        }
                        Err(error) => return Err(error),
                    }
                }
                State::Stopping | State::Deleting => {
                    wait_for_end(&row).await?;
                    continue;
                }
                State::Paused => {
                    return Err(
                        Error::new(ErrorKind::Busy, format!("sandbox `{name}` is paused"))
                            .hint(format!("let it go on with `smolvm resume {name}`")),
                    );
                }
                State::Created | State::Stopped | State::Error => {}
            }
            if !row.spec.volumes.is_empty() {
                // What a crash left must not keep its volumes.
                teardown::reconcile(self.os(), self.layout(), &mut store)?;
            }
            let won = store.begin_start(
                &row.id,
                &[State::Created, State::Stopped, State::Error],
                &myself()?,
                Timestamp::now(),
            )?;
            if !won {
                // Another process was faster; see what it made of it.
                continue;
            }
            let Realized {
                session,
                keeper,
                mut warnings,
            } = match self.realize(&mut store, &row, beginning) {
                Ok(realized) => realized,
                Err(error) => {
                    // It says more than that this could not be done as well, which the next start or
                    // repair does.
                    if let Err(left) =
                        teardown::release_outside(self.os(), self.layout(), &mut store, &row.id)
                    {
                        tracing::warn!(%left, "could not give back what a sandbox has of the host");
                    }
                    store.transition(
                        &row.id,
                        &[State::Starting],
                        State::Error,
                        Some(&error.in_one_line()),
                        Timestamp::now(),
                    )?;
                    return Err(error);
                }
            };
            let spawn = begun.elapsed();
            let ready = match session.wait_ready().await {
                Ok(ready) => ready,
                Err(error) => {
                    self.record_early_death(&mut store, &row, keeper).await;
                    return Err(self.why_not_started(&store, &row, error));
                }
            };
            if let Some(reason) = ready.booted_because {
                warnings.push(format!(
                    "sandbox `{name}` could not be restored from its template, and booted: {reason}"
                ));
            }
            // The keeper counts from its own start, which is when it was spawned.
            let since = |micros| spawn + Duration::from_micros(micros);
            let times = StartTimes {
                spawn,
                vmm: since(ready.vmm_us),
                hello: since(ready.hello_us),
                ready: begun.elapsed(),
                warnings,
            };
            return Ok((session, times));
        }
    }

    /// Records that the sandbox is off, if its keeper was killed before it had put itself into the row.
    /// Until then the row names this process, by which the sandbox would look alive.
    async fn record_early_death(&self, store: &mut Store, row: &SandboxRow, keeper: OwnedFd) {
        let recorded = async {
            let starts = |now: &SandboxRow| now.state == State::Starting;
            let now = store.sandbox(&row.id)?.filter(starts);
            if now.and_then(|now| now.holder) != Some(myself()?) {
                return Ok(());
            }
            let ended = blocking(move || {
                wait_for_any(
                    &mut [PollFd::new(&keeper, PollFlags::IN)],
                    Some(KEEPER_PATIENCE),
                )
            });
            if ended.await? {
                teardown::release_outside(self.os(), self.layout(), store, &row.id)?;
                let (from, to) = (&[State::Starting], State::Error);
                let reason = Some(teardown::KEEPER_ENDED);
                store.transition(&row.id, from, to, reason, Timestamp::now())?;
            }
            Ok::<_, Error>(())
        };
        // Why it did not start says more; the next repair does it.
        if let Err(error) = recorded.await {
            tracing::warn!(%error, "could not record that a sandbox is off");
        }
    }

    /// A keeper that gave up before it could answer has left its reason in the row.
    fn why_not_started(&self, store: &Store, row: &SandboxRow, error: Error) -> Error {
        match store.sandbox(&row.id) {
            Ok(Some(now)) if now.state == State::Error && error.console_lines().is_empty() => {
                match now.reason {
                    Some(reason) => Error::new(
                        ErrorKind::GuestFailed,
                        format!("sandbox `{}` did not start", row.spec.name),
                    )
                    .because(reason)
                    .hint("see what this host lacks with `smolvm doctor`"),
                    None => error,
                }
            }
            _ => error,
        }
    }

    /// Carries a start out, step by step, up to the keeper that takes over.
    fn realize(
        &self,
        store: &mut Store,
        row: &SandboxRow,
        beginning: &Beginning<'_>,
    ) -> Result<Realized> {
        let mut warnings = Vec::new();
        let dir = self.layout().sandbox(&row.id);
        // A maker that was killed between the row and the directory leaves a row without one.
        self.os()
            .create_dir_all("make the sandbox's directory", dir.path())?;
        // Only a repair or a keeper that is ending may hold the lock now, and each lets go soon.
        let lock = self.os().lock("lock the sandbox", &dir.lock())?;
        // Read again: until the lock was there, others could change its ports and its disk.
        let mut row = row.clone();
        if let Some(now) = store.sandbox(&row.id)? {
            row.spec.ports = now.spec.ports;
            row.spec.disk_mib = now.spec.disk_mib;
        }
        let row = &row;
        self.require_root(row)?;
        // Its keeper takes them; that they can be taken is known before a machine is started.
        drop(ports::bind_all(
            self.os(),
            &HostSide::here(),
            &row.spec.ports,
        )?);
        let nic = row.spec.network.needs_device() || beginning.nic;
        // Who asks for no engine gets the one that the snapshot needs.
        let of_snapshot = match (&beginning.snapshot, self.config().engine) {
            (Some(snapshot), EngineChoice::Auto) => snapshot.engine(),
            _ => None,
        };
        let facts = self.host_facts(store, row, nic, of_snapshot)?;
        let network = nic.then(|| self.allocate_network(store, row)).transpose()?;
        let volumes = self.volume_launches(store, row)?;
        if !row.spec.mounts.is_empty() {
            mounts::check_mounts(&row.spec.name, &row.spec.mounts)?;
            mounts::refuse_links(&row.spec.name, &row.spec.mounts)?;
            let kernel = self.assets().kernel(&row.kernel)?.ok_or_else(no_kernel)?;
            refuse_without_mounts(&kernel)?;
        }
        let mut plan = plan::plan(row, self.layout(), &facts, &myself()?, network, volumes);
        // One that was locked in may be free now.
        jail::release(self.os(), self.layout(), store, &row.id)?;
        if let Some(jailer) = &facts.jailer {
            plan.vm.jail = Some(self.allocate_jail(store, &row.id, jailer, &plan.vm)?);
        } else if facts.engine == EngineName::Firecracker {
            warnings.extend(self.warn_once_of_no_jail(store)?);
        }
        let layer = plan::layer(row, self.layout());
        if let (Layer::File(path), DiskMode::Isolated) = (&layer, row.spec.disk_mode) {
            // One that was to be made larger may not have been.
            resize::grow_file(self.os(), path, row.spec.disk_mib)?;
        }
        let fresh = match &layer {
            Layer::File(path) => !path.exists(),
            Layer::Memory => true,
        };
        plan.park.clone_from(&beginning.park);
        plan.ssh_ports = self.config().settings.ssh.ports;
        let mut source = None;
        if let Some(snapshot) = beginning.snapshot {
            snapshot.check(&facts)?;
            plan.vm.memory = Memory::CopyOf(snapshot.files.memory());
            plan.restore = Some(Restore {
                state: snapshot.files.state(),
                or_boot: false,
            });
            source = Some(snapshot.files.disk());
            // Ephemeral until it is born: see `Engine::start_copy`.
            plan.ephemeral = false;
            plan.starter = None;
        } else if fresh && !beginning.plain && self.why_no_template(row).is_none() {
            match templates::obtain(&self.assets(), &self.config().keeper, row, &plan, None) {
                Ok((template, _)) => {
                    plan.vm.memory = Memory::CopyOf(template.memory());
                    plan.restore = Some(Restore {
                        state: template.state(),
                        or_boot: true,
                    });
                    source = Some(template.disk());
                }
                // What stands in the way of a template need not stand in the way of a sandbox.
                Err(error) => warnings.push(format!(
                    "no template could be made, so sandbox `{}` booted: {}",
                    row.spec.name,
                    error.in_one_line()
                )),
            }
        }
        if let Layer::File(path) = &layer
            && fresh
        {
            let source = match source {
                Some(disk) => disk,
                None => self.assets().empty_layer(row.spec.disk_mib)?,
            };
            // Under its own name only once it is whole: a copy that was cut short is no disk.
            let making = path.with_extension("making");
            self.os()
                .remove_file("remove the half-made disk", &making)?;
            let copy = |source: &Path| {
                self.os()
                    .copy_sparse("make the sandbox's disk", source, &making)
            };
            if let Err(error) = copy(&source) {
                let may_boot = plan.restore.as_ref().is_some_and(|restore| restore.or_boot);
                if !may_boot || source.exists() {
                    return Err(error.into());
                }
                // Somebody removed the template just now.
                plan.vm.memory = Memory::Anonymous;
                plan.restore = None;
                self.os()
                    .remove_file("remove the half-made disk", &making)?;
                copy(&self.assets().empty_layer(row.spec.disk_mib)?)?;
            }
            self.os()
                .rename("put the sandbox's disk in place at", &making, path)?;
        }
        let text = serde_json::to_vec(&plan).map_err(|error| {
            Error::new(ErrorKind::Internal, "could not write the launch file").because(error)
        })?;
        self.os().write_file_atomic(
            "write the launch file",
            &dir.launch_file(),
            &text,
            0o600,
            smolvm_host::os::Durability::Cached,
        )?;
        let log = self
            .os()
            .create_log("open the keeper's log", &dir.keeper_log())?;
        let listener = self
            .os()
            .effect("listen on the sandbox's socket", &dir.socket(), || {
                launch::listen(&dir)
            })?;
        // Before there is a keeper that could end: then this connection ends too, and is not refused.
        let session = Session::connect(row.spec.name.as_str(), dir.path())?;
        Ok(Realized {
            keeper: launch::spawn(&self.config().keeper, &dir, listener, lock, log)?,
            session,
            warnings,
        })
    }

    /// Refuses a sandbox whose root file system is not there.
    pub(crate) fn require_root(&self, row: &SandboxRow) -> Result<()> {
        let root = self.layout().image(&row.image_digest).join("root.erofs");
        match root.exists() {
            true => Ok(()),
            false => Err(lost_image(&row.spec.image, &root)),
        }
    }

    /// Why no machine that was booted ahead may stand in for a boot, if so.
    pub(crate) fn why_no_template(&self, row: &SandboxRow) -> Option<&'static str> {
        if !self.config().templates {
            Some("templates are switched off")
        } else if row.spec.disk_mode == DiskMode::Shared {
            Some("it has a shared disk, of whose content no template knows")
        } else {
            None
        }
    }

    /// Gives a run of a sandbox its address and its device's name, in a row.
    fn allocate_network(&self, store: &mut Store, row: &SandboxRow) -> Result<NetworkLaunch> {
        let mode = self.network_mode()?;
        // A run that was cut short may have left its own.
        network::release(self.os(), self.layout(), store, &row.id)?;
        let config = &self.config().network;
        let allocate =
            |store: &mut Store| network::allocate(store, &row.id, mode, config, &BTreeSet::new());
        let own = match allocate(store) {
            // Whoever deleted a sandbox was answered before its address was given back.
            Err(error) if error.kind() == ErrorKind::Busy && self.await_removals(store)? => {
                allocate(store)?
            }
            own => own?,
        };
        let launch = NetworkLaunch::new(&own, self.layout(), &row.spec.network, config)?;
        Ok(NetworkLaunch {
            uplink: match mode {
                NetworkMode::Tap => None,
                NetworkMode::User => Some(self.programs().find(PASTA)?),
            },
            ..launch
        })
    }

    /// Waits until the networks of sandboxes that are being deleted have been given back; says whether
    /// there were any.
    fn await_removals(&self, store: &mut Store) -> Result<bool> {
        let leaving = network::leaving(store)?;
        for row in &leaving {
            if let Some(holder) = open_holder(row)? {
                wait_for_any(
                    &mut [PollFd::new(&holder, PollFlags::IN)],
                    Some(REMOVAL_TIME),
                )?;
            }
        }
        // What its keeper did not do.
        teardown::reconcile(self.os(), self.layout(), store)?;
        Ok(!leaving.is_empty())
    }

    /// The facts for a machine, with a network device or without, and with the engine that is chosen, or
    /// the given one.
    pub(crate) fn host_facts(
        &self,
        store: &mut Store,
        row: &SandboxRow,
        nic: bool,
        engine: Option<EngineName>,
    ) -> Result<HostFacts> {
        let kernel = self.assets().kernel(&row.kernel)?.ok_or_else(no_kernel)?;
        let facts = self.facts_with(store, &kernel, nic, engine)?;
        let hardware = Hardware {
            nic,
            engine: facts.engine,
        };
        self.assets()
            .initramfs(&kernel, &self.config().agent, hardware)?;
        Ok(facts)
    }

    /// The facts for a machine with this kernel, whose initial RAM file system may not be written yet.
    pub(crate) fn facts_with(
        &self,
        store: &mut Store,
        kernel: &Kernel,
        nic: bool,
        engine: Option<EngineName>,
    ) -> Result<HostFacts> {
        let acceleration = facts::acceleration(store, self.config().accel)?;
        let choice = engine.map_or(self.config().engine, EngineName::choice);
        let engine = self.choose(store, choice, &acceleration)?;
        let accel = if acceleration.kvm {
            Accel::Kvm
        } else {
            Accel::Emulation
        };
        let hardware = Hardware {
            nic,
            engine: engine.name,
        };
        Ok(HostFacts {
            engine: engine.name,
            program: engine.program,
            jailer: match engine.jailing {
                Some(Jailing::Jailed(jailer)) => Some(jailer),
                Some(Jailing::Free(_)) | None => None,
            },
            accel,
            tsc_khz: match accel {
                Accel::Kvm => None,
                Accel::Emulation => Some(facts::tsc_khz(store)?),
            },
            vmlinux: kernel.vmlinux(),
            devices: kernels::devices(kernel),
            initramfs: Assets::initramfs_path(kernel, &self.config().agent, hardware)?,
            boot_timeout: self.config().boot_timeout,
        })
    }

    /// Connects to a running sandbox.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotRunning`] with the command that starts it.
    pub async fn connect(&self, name: &str) -> Result<Session> {
        let Some(mut store) = Store::open_existing(&self.layout().database())? else {
            return Err(unknown_sandbox(name));
        };
        loop {
            let row = self.row(&mut store, name)?;
            let state = row.state;
            if matches!(state, State::Starting | State::Running) {
                match self.attach_when_there(&row).await? {
                    Some(session) => return Ok(session),
                    None => continue,
                }
            }
            return {
                let verb = match state {
                    State::Paused => "resume",
                    _ => "start",
                };
                let mut error = Error::new(
                    ErrorKind::NotRunning,
                    format!(
                        "sandbox `{name}` is not running, it is {}",
                        state.in_words()
                    ),
                )
                .hint(format!("{verb} it with `smolvm {verb} {name}`"));
                if let Some(reason) = row.reason {
                    error = error.because(reason);
                }
                Err(error)
            };
        }
    }

    fn attach(&self, row: &SandboxRow) -> Result<Session> {
        Session::connect(
            row.spec.name.as_str(),
            self.layout().sandbox(&row.id).path(),
        )
    }

    /// Stops a sandbox: asks the guest to go down, and switches it off after `grace`; at once if
    /// that is zero. Says whether it had to be switched off. Does nothing if it is off already. An
    /// ephemeral sandbox is removed as well.
    pub async fn stop(&self, name: &str, grace: Duration) -> Result<bool> {
        let Some(mut store) = Store::open_existing(&self.layout().database())? else {
            return Err(unknown_sandbox(name));
        };
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        // The keeper answers within the grace and what it takes to kill; one that does not is stuck.
        let limit = grace.saturating_add(KEEPER_PATIENCE);
        loop {
            let row = self.row(&mut store, name)?;
            if !row.state.is_held() {
                return Ok(false);
            }
            let asked = async {
                match self.attach_when_there(&row).await? {
                    Some(session) => session
                        .keeper(&KeeperRequest::Stop(StopRequest { grace_ms }))
                        .await
                        .map(Some),
                    None => Ok(None),
                }
            };
            match tokio::time::timeout(limit, asked).await {
                Ok(Ok(Some(KeeperEvent::Done(done)))) => {
                    // A sandbox that is off has no process: what the caller sees next must say so.
                    wait_for_end(&row).await?;
                    return Ok(done.forced);
                }
                Ok(Ok(Some(other))) => {
                    return Err(Error::new(
                        ErrorKind::Internal,
                        format!("the keeper of sandbox `{name}` answered {other:?}"),
                    ));
                }
                Ok(Ok(None)) => {}
                // Its keeper ended before it answered: somebody else's stop came first, or it died.
                // The row says which, once the process is gone.
                Ok(Err(_)) if row.engine.is_some() => wait_for_end(&row).await?,
                Ok(Err(error)) => return Err(error),
                Err(_) => {
                    teardown::end_processes(self.layout(), &row)?;
                    return match self.row(&mut store, name) {
                        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
                        _ => Ok(true),
                    };
                }
            }
        }
    }

    /// Removes a sandbox, running or not. When it returns the sandbox runs no more, its name is free,
    /// and what it needed may be removed. Of one that was running, its keeper takes process and files
    /// away in the next moments; [`Engine::prune`] waits for that.
    pub async fn delete(&self, name: &str) -> Result<()> {
        let Some(mut store) = Store::open_existing(&self.layout().database())? else {
            return Err(unknown_sandbox(name));
        };
        let row = visible(&store, name)?;
        self.delete_row(&mut store, row).await
    }

    /// Removes the sandbox of this row.
    pub(crate) async fn delete_row(&self, store: &mut Store, row: SandboxRow) -> Result<()> {
        teardown::check_ours(self.layout(), &row)?;
        if teardown::is_out_of_reach(self.layout(), store, &row)? {
            // Nobody can ask it to end.
            teardown::end_processes(self.layout(), &row)?;
        }
        // One that cannot be repaired, as on a full disk, is off, and can be removed.
        let Some(row) = teardown::row_to_show(self.os(), self.layout(), store, row)? else {
            return Ok(());
        };
        if row.state.is_held() {
            let asked = async {
                let session = self.attach_when_there(&row).await?;
                match session {
                    Some(session) => session.keeper(&KeeperRequest::Destroy).await.map(Some),
                    None => Ok(None),
                }
            };
            match tokio::time::timeout(KEEPER_PATIENCE, asked).await {
                Ok(Ok(Some(KeeperEvent::Done(_)))) => return Ok(()),
                // Somebody else was faster in some way; see what is there now.
                Ok(Ok(None)) => {
                    return match store.sandbox(&row.id)? {
                        Some(row) => Box::pin(self.delete_row(store, row)).await,
                        None => Ok(()),
                    };
                }
                _ => teardown::end_processes(self.layout(), &row)?,
            }
        }
        // Off by now; whoever else removes it as well does the same steps.
        teardown::destroy(self.os(), self.layout(), store, &row.id).map_err(|error| {
            teardown::unrecorded(
                self.layout(),
                row.spec.name.as_str(),
                "is to be removed",
                error,
            )
        })
    }

    /// Connects to a sandbox that starts or runs. Its socket appears a moment after its row says
    /// so, and is waited for; `None` if the one who starts it ended first, or the row has moved on.
    pub(crate) async fn attach_when_there(&self, row: &SandboxRow) -> Result<Option<Session>> {
        // The common case, without a watch: to close one takes the kernel a tick or two, in which it
        // waits for whoever may still look at its marks (fs/notify/mark.c, `FSNOTIFY_REAPER_DELAY`).
        if let Ok(session) = self.attach(row) {
            return Ok(Some(session));
        }
        let dir = self.layout().sandbox(&row.id);
        // Watched before it is looked for again, so that an appearance in between is not missed.
        let watch = launch::watch_socket(&dir)
            .map_err(|error| io(format!("could not watch {}", dir.path().display()), error))?;
        let refused = match self.attach(row) {
            Ok(session) => return Ok(Some(session)),
            Err(error) => error,
        };
        // Not there yet, or not any more: the directory or the holder's end will tell.
        let Some(holder) = open_holder(row)? else {
            return Ok(None);
        };
        let changed = blocking(move || {
            let mut fds = [
                PollFd::new(&watch, PollFlags::IN),
                PollFd::new(&holder, PollFlags::IN),
            ];
            wait_for_any(&mut fds, Some(KEEPER_PATIENCE))
        })
        .await?;
        if changed { Ok(None) } else { Err(refused) }
    }
}

/// Whether it takes such a program to make these assets and to run sandboxes then.
fn takes(need: Need, assets: &[String]) -> bool {
    match need {
        Need::Always => true,
        Need::Assets => !assets.is_empty(),
        Need::Image => assets.iter().any(|asset| asset.starts_with("image ")),
    }
}

/// What a start begins from, if not from nothing.
#[derive(Debug, Default)]
pub(crate) struct Beginning<'a> {
    /// A machine that was saved.
    pub(crate) snapshot: Option<&'a Saved>,
    /// Whether the machine has a network device although it may reach nothing.
    pub(crate) nic: bool,
    /// Whether it boots, and no template is made for it.
    pub(crate) plain: bool,
    /// For a member of a pool, what it is to have run.
    pub(crate) park: Option<Vec<WarmCommand>>,
}

/// A start that was handed over to a keeper.
struct Realized {
    session: Session,
    /// Becomes readable when the keeper ends.
    keeper: OwnedFd,
    /// What the caller should know.
    warnings: Vec<String>,
}

/// Most time a keeper may take to switch its machine off and remove it.
pub(crate) const KEEPER_PATIENCE: Duration = Duration::from_secs(10);

/// Runs what blocks on a thread that may.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|panic| Error::new(ErrorKind::Internal, "waiting failed").because(panic))?
}

/// The process that holds a sandbox, if it runs.
fn open_holder(row: &SandboxRow) -> Result<Option<OwnedFd>> {
    match &row.holder {
        Some(holder) => Ok(holder.open()?),
        None => Ok(None),
    }
}

impl Engine {
    /// Waits until whoever holds a sandbox has ended.
    pub(crate) async fn wait_until_off(&self, row: &SandboxRow) -> Result<()> {
        wait_for_end(row).await
    }
}

/// Waits until the process that holds a sandbox has ended. Not for its lock: the next starter may
/// have taken that already, and keeps it for as long as the sandbox runs.
pub(crate) async fn wait_for_end(row: &SandboxRow) -> Result<()> {
    let Some(holder) = open_holder(row)? else {
        return Ok(());
    };
    blocking(move || wait_for_any(&mut [PollFd::new(&holder, PollFlags::IN)], None))
        .await
        .map(|_| ())
}

/// Waits until one of the descriptors is ready; says whether one was before the time was up.
pub(crate) fn wait_for_any(fds: &mut [PollFd<'_>], limit: Option<Duration>) -> Result<bool> {
    let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
    rustix::io::retry_on_intr(|| poll(fds, limit.as_ref()))
        .map(|ready| ready > 0)
        .map_err(|error| io("could not wait for a sandbox's processes", error.into()))
}

fn no_kernel() -> Error {
    Error::new(
        ErrorKind::MissingDependency,
        "the guest kernel is not there",
    )
    .hint("get it with `smolvm setup`")
}

/// The row of a sandbox that people may know of. Members of pools are nobody's yet, and what is being
/// removed is nobody's any more.
fn visible(store: &Store, name: &str) -> Result<SandboxRow> {
    store
        .sandbox_named(name)?
        .filter(|row| !row.spec.name.is_hidden())
        .ok_or_else(|| unknown_sandbox(name))
}

pub(crate) fn unknown_sandbox(name: &str) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!("there is no sandbox named `{}`", name.escape_debug()),
    )
    .hint("see the sandboxes with `smolvm ls --all`")
}

pub(crate) fn myself() -> Result<ProcessIdentity> {
    let pid = i32::try_from(std::process::id()).unwrap_or(i32::MAX);
    ProcessIdentity::of(pid)?.ok_or_else(|| {
        Error::new(ErrorKind::Internal, "could not find this process in /proc").hint("mount /proc")
    })
}

pub(crate) fn random_u64() -> Result<u64> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| io("could not get random bytes from the kernel", error.into()))?;
    Ok(u64::from_ne_bytes(bytes))
}

/// Bytes a file takes on the disk, which for a sparse one is less than its length.
pub(crate) fn allocated(path: &Path) -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    std::fs::symlink_metadata(path)
        .ok()
        .map(|metadata| metadata.blocks() * 512)
}

pub(crate) fn entries(dir: &Path) -> Result<Vec<std::fs::DirEntry>> {
    match std::fs::read_dir(dir).and_then(Iterator::collect) {
        Ok(entries) => Ok(entries),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(io(format!("could not list {}", dir.display()), error)),
    }
}

pub(crate) fn used_below(path: &Path) -> u64 {
    let own = allocated(path).unwrap_or(0);
    let below: u64 = if path.is_dir() && !path.is_symlink() {
        entries(path)
            .unwrap_or_default()
            .iter()
            .map(|entry| used_below(&entry.path()))
            .sum()
    } else {
        0
    };
    own + below
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_takes_no_program_that_only_images_take() {
        for (names, some, image) in [
            (&[][..], false, false),
            (&["kernel"], true, false),
            (&["kernel", "image debian-12"], true, true),
        ] {
            let assets: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            assert!(takes(Need::Always, &assets));
            assert_eq!(takes(Need::Assets, &assets), some, "{names:?}");
            assert_eq!(takes(Need::Image, &assets), image, "{names:?}");
        }
    }
}

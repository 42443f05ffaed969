//! What every sandbox needs before it can start: a kernel, an initial RAM file system, an image, an
//! empty writable layer. Each is made once, whole or not at all, and found by where it lies.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use smolvm_host::cancel::Cancel;
use smolvm_host::image::{BuildRequest, build_default_image};
use smolvm_host::initramfs::{Initramfs, write_initramfs};
use smolvm_host::kernel::{Kernel, fetch_kernel, import_kernel};
use smolvm_host::oci::ImageConfig;
use smolvm_host::os::Os;
use smolvm_host::packages::Programs;
use smolvm_host::progress::Phase;

use crate::engines::EngineName;
use crate::error::{Error, ErrorKind, Result, io};
use crate::layout::Layout;
use crate::spec::DEFAULT_IMAGE;
use crate::store::{ImageRow, Store};

/// Directory name of the distribution's kernel.
pub(crate) const STOCK_KERNEL: &str = "stock";

/// Modules of the distribution's kernel that a guest loads. Each costs boot time.
const MODULES: &[&str] = &[
    "virtio_mmio",
    "virtio_blk",
    "virtio_console",
    "erofs",
    "overlay",
    "ext4",
    NIC_DRIVER,
    VSOCK_DRIVER,
    FUSE_DRIVER,
];

/// The driver of the network device.
const NIC_DRIVER: &str = "virtio_net";

/// The driver of the channel to the agent that Firecracker has.
const VSOCK_DRIVER: &str = "vmw_vsock_virtio_transport";

/// The driver of mounts.
const FUSE_DRIVER: &str = "fuse";

/// What is loaded only into Firecracker's machines: that driver and what it needs.
const VSOCK_MODULES: &[&str] = &[
    "vsock.ko",
    "vmw_vsock_virtio_transport_common.ko",
    "vmw_vsock_virtio_transport.ko",
];

/// What is loaded only into QEMU's machines: the driver of the channel that these have.
const PORT_MODULES: &[&str] = &["virtio_console.ko"];

/// What an initial RAM file system is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hardware {
    /// Whether there is a network device.
    pub(crate) nic: bool,
    /// Whose machine it is.
    pub(crate) engine: EngineName,
}

impl Hardware {
    /// Whether a module belongs into such a machine.
    fn loads(self, module: &str) -> bool {
        let of = |list: &[&str]| list.contains(&module);
        match self.engine {
            EngineName::Qemu if of(VSOCK_MODULES) => false,
            EngineName::Firecracker if of(PORT_MODULES) => false,
            _ => self.nic || !of(NIC_MODULES),
        }
    }

    /// Refuses a kernel that lacks a driver for it.
    pub(crate) fn refuse_without_drivers(self, kernel: &Kernel) -> Result<()> {
        if self.nic {
            refuse_without(kernel, NIC_DRIVER, "network devices")?;
        }
        if self.engine == EngineName::Firecracker {
            refuse_without(kernel, VSOCK_DRIVER, "the channel that Firecracker has")?;
        }
        Ok(())
    }
}

/// What is loaded only into machines that have a network device: its driver and what that needs.
const NIC_MODULES: &[&str] = &["failover.ko", "net_failover.ko", "virtio_net.ko"];

/// One report about long work.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress {
    /// What is being made.
    pub task: String,
    /// What is being done for it at the moment.
    pub phase: String,
    /// How much of the task is done, from 0 to 1, if known.
    pub fraction: Option<f64>,
}

/// Told about long work.
pub trait Watcher {
    /// Called for each report, on the thread that does the work.
    fn progress(&mut self, progress: &Progress);
}

impl<F: FnMut(&Progress)> Watcher for F {
    fn progress(&mut self, progress: &Progress) {
        self(progress);
    }
}

/// Makes and finds assets.
#[derive(Debug)]
pub(crate) struct Assets<'a> {
    pub(crate) os: &'a Os,
    pub(crate) layout: &'a Layout,
    pub(crate) programs: &'a Programs,
}

impl Assets<'_> {
    /// The kernel of this key, if it is there.
    pub(crate) fn kernel(&self, key: &str) -> Result<Option<Kernel>> {
        let dir = self.layout.kernels().join(key);
        if !dir.join("kernel.json").exists() {
            return Ok(None);
        }
        Kernel::open(self.os, &dir).map(Some).map_err(|error| {
            Error::from(error).hint(format!(
                "if it is damaged, remove it with `smolvm kernel rm {key}`; `smolvm setup` or \
                 `smolvm kernel build` gets a new one"
            ))
        })
    }

    /// Downloads the distribution's kernel if it is not there.
    pub(crate) fn make_kernel(&self, watcher: &mut dyn Watcher, cancel: &Cancel) -> Result<()> {
        let _turn = self.turn("kernel", watcher)?;
        let place = self.layout.kernels().join(STOCK_KERNEL);
        let old = self.kernel(STOCK_KERNEL)?;
        if old.as_ref().is_some_and(has_drivers) {
            return Ok(());
        }
        let making = match old {
            // Of a release in which sandboxes had no network.
            Some(_) => self.layout.kernels().join(format!("{STOCK_KERNEL}.new")),
            None => place.clone(),
        };
        self.os
            .remove_tree("remove the half-made kernel", &making)?;
        fetch_kernel(
            self.os,
            self.programs,
            &making,
            MODULES,
            cancel,
            &mut |progress| report(watcher, "kernel", progress),
        )?;
        if making != place {
            // There is one at every moment. Machines that run have no file of the old one open.
            self.os
                .exchange("put the kernel in place at", &making, &place)?;
            self.os.remove_tree("remove the older kernel", &making)?;
        }
        Ok(())
    }

    /// Takes over a kernel file and returns its key. The key follows from the file's identity, so
    /// the same unchanged file is taken over once.
    pub(crate) fn import_kernel(&self, file: &Path) -> Result<String> {
        let key = format!("file-{:016x}", stamp("kernel", file)?);
        let _turn = self.turn("kernel", &mut |_: &Progress| {})?;
        if self.kernel(&key)?.is_none() {
            import_kernel(self.os, file, &self.layout.kernels().join(&key))?;
        }
        Ok(key)
    }

    /// The initial RAM file system for a kernel, an agent, and a machine with a network device or
    /// without; written if it is new.
    pub(crate) fn initramfs(
        &self,
        kernel: &Kernel,
        agent: &Path,
        hardware: Hardware,
    ) -> Result<PathBuf> {
        hardware.refuse_without_drivers(kernel)?;
        let path = Self::initramfs_path(kernel, agent, hardware)?;
        if !path.exists() {
            let mut modules = kernel.modules();
            modules.retain(|path| {
                let name = path.file_name().and_then(|name| name.to_str());
                name.is_none_or(|name| hardware.loads(name))
            });
            write_initramfs(
                self.os,
                &Initramfs {
                    agent: agent.to_owned(),
                    modules,
                },
                &path,
            )?;
        }
        Ok(path)
    }

    /// Where the initial RAM file system for a kernel, an agent and a kind of machine is, or will be.
    pub(crate) fn initramfs_path(
        kernel: &Kernel,
        agent: &Path,
        hardware: Hardware,
    ) -> Result<PathBuf> {
        let agent = stamp("agent", agent)?;
        let kind = match (hardware.engine, hardware.nic) {
            (EngineName::Qemu, false) => "",
            (EngineName::Qemu, true) => "-net",
            (EngineName::Firecracker, false) => "-firecracker",
            (EngineName::Firecracker, true) => "-firecracker-net",
        };
        Ok(kernel
            .dir
            .join(format!("initramfs-{agent:016x}{kind}.cpio")))
    }

    /// Builds an image if it is not there.
    pub(crate) fn make_image(
        &self,
        store: &mut Store,
        name: &str,
        watcher: &mut dyn Watcher,
        cancel: &Cancel,
    ) -> Result<()> {
        if store.image(name)?.is_some() {
            return Ok(());
        }
        if name != DEFAULT_IMAGE {
            return Err(unknown_image(name));
        }
        let _turn = self.turn("image", watcher)?;
        // Another process may have built it while this one waited for its turn.
        if store.image(name)?.is_some() {
            return Ok(());
        }
        let now = Timestamp::now();
        let building = self.layout.images().join(".building");
        self.os
            .remove_tree("remove the half-built image", &building)?;
        let task = format!("image {name}");
        let image = build_default_image(
            self.os,
            self.programs,
            &BuildRequest {
                name: name.to_owned(),
                created: now.to_string(),
                mirror: None,
                packages: Vec::new(),
            },
            &building,
            cancel,
            &mut |progress| report(watcher, &task, progress),
        )?;
        // Until it has its row nobody may take it for one that is not needed.
        let _names = self.names_turn()?;
        let place = self.layout.image(&image.manifest.digest);
        // A database that was lost may have left the very same image.
        if place.exists() {
            self.os
                .remove_tree("remove the half-built image", &building)?;
        } else {
            self.os
                .rename("put the image in place at", &building, &place)?;
        }
        store.put_image(&ImageRow {
            name: name.to_owned(),
            digest: image.manifest.digest,
            size_bytes: image.manifest.size,
            created_at: now,
            source: "built from Debian packages on this host".to_owned(),
            manifest: None,
            config: ImageConfig::default(),
        })
    }

    /// An empty writable layer of this size, made if it is not there.
    pub(crate) fn empty_layer(&self, size_mib: u32) -> Result<PathBuf> {
        let path = self.layout.empty_layer(size_mib);
        if !path.exists() {
            self.os
                .create_dir_all("make the cache directory", &self.layout.cache())?;
            let _lock = self
                .os
                .lock("lock the cache", &self.layout.cache().join("lock"))?;
            if !path.exists() {
                let making = path.with_extension("making");
                self.os.remove_file("remove the half-made disk", &making)?;
                smolvm_host::disk::make_ext4_template(
                    self.os,
                    &self.programs.find("mke2fs")?,
                    &making,
                    size_mib.into(),
                )?;
                self.os
                    .rename("put the empty disk in place at", &making, &path)?;
            }
        }
        Ok(path)
    }

    /// Waits until no other process makes the same kind of asset.
    pub(crate) fn turn(
        &self,
        what: &str,
        watcher: &mut dyn Watcher,
    ) -> Result<smolvm_host::os::Lock> {
        let (dir, name) = match what {
            "kernel" => (self.layout.kernels(), "lock"),
            // Takes minutes, for which nobody else should wait.
            "kernel build" => (self.layout.kernels(), "build.lock"),
            _ => (self.layout.images(), "lock"),
        };
        self.os.create_dir_all("make the directory", &dir)?;
        let path = dir.join(name);
        if let Some(lock) = self.os.try_lock("lock", &path)? {
            return Ok(lock);
        }
        watcher.progress(&Progress {
            task: what.to_owned(),
            phase: "waiting for another process that prepares it".to_owned(),
            fraction: None,
        });
        Ok(self.os.lock("lock", &path)?)
    }
}

/// Refuses a kernel in which no directory of the host can be mounted.
pub(crate) fn refuse_without_mounts(kernel: &Kernel) -> Result<()> {
    refuse_without(kernel, FUSE_DRIVER, "directories of the host (FUSE)")
}

/// Refuses a kernel of a distribution that was unpacked when a driver was not needed yet. Others have
/// everything built in, or it is their maker's business.
fn refuse_without(kernel: &Kernel, driver: &str, what: &str) -> Result<()> {
    if kernel.manifest.modules.is_empty() || has(kernel, driver) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::MissingDependency,
        format!("the guest kernel that was unpacked here has no driver for {what}"),
    )
    .hint("get it with `smolvm setup`"))
}

/// Whether a kernel of a distribution has every driver that a machine may need.
pub(crate) fn has_drivers(kernel: &Kernel) -> bool {
    [NIC_DRIVER, VSOCK_DRIVER, FUSE_DRIVER]
        .iter()
        .all(|driver| has(kernel, driver))
}

fn has(kernel: &Kernel, driver: &str) -> bool {
    let file = format!("{driver}.ko");
    kernel.manifest.modules.contains(&file)
}

/// An image nobody knows.
pub(crate) fn unknown_image(name: &str) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!("there is no image named `{}`", name.escape_debug()),
    )
    .hint(format!(
        "see the images with `smolvm image list`; the default is `{DEFAULT_IMAGE}`"
    ))
}

/// The root file system of an image whose files somebody removed.
pub(crate) fn lost_image(name: &str, root: &Path) -> Error {
    Error::new(
        ErrorKind::MissingDependency,
        format!("the root file system of image `{name}` is not there: {}", root.display()),
    )
    .because("somebody removed it from the data directory")
    .hint(format!(
        "put it back from a copy, or `smolvm image rm {name}` and then pull, load or build what has the \
         same digest; without it neither its sandboxes nor its snapshots can start"
    ))
}

/// Identity of a file's content without reading it: where it is, how long, and when it last changed.
pub(crate) fn stamp(what: &str, path: &Path) -> Result<u64> {
    let doing = || format!("could not look at the {what} {}", path.display());
    let path = path.canonicalize().map_err(|error| io(doing(), error))?;
    let metadata = std::fs::metadata(&path).map_err(|error| io(doing(), error))?;
    let mut hasher = DefaultHasher::new();
    (
        &path,
        metadata.dev(),
        metadata.ino(),
        metadata.len(),
        metadata.mtime(),
        metadata.mtime_nsec(),
        metadata.ctime(),
        metadata.ctime_nsec(),
    )
        .hash(&mut hasher);
    Ok(hasher.finish())
}

pub(crate) fn report(
    watcher: &mut dyn Watcher,
    task: &str,
    progress: smolvm_host::progress::Progress,
) {
    let phase = match progress.phase {
        Phase::Update => "fetching the package lists",
        Phase::Download => "downloading",
        Phase::Unpack => "unpacking",
        Phase::Configure => "configuring",
        Phase::Compile => "compiling",
        Phase::Write => "writing",
    };
    watcher.progress(&Progress {
        task: task.to_owned(),
        phase: phase.to_owned(),
        fraction: Some(f64::from(progress.done) / f64::from(progress.total)),
    });
}

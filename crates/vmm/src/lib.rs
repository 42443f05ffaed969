//! One virtual machine from a plan.
//!
//! A [`Backend`] starts a [`Vm`] from a [`VmPlan`]; both are traits so that the engine is chosen by
//! name at run time. Nothing here knows what a sandbox, an image or a database is, and nothing
//! decides: every path, size and limit is in the plan.
//!
//! The contract of each method says when it may be called, how often, from which thread, whether it
//! is idempotent, what happens when its future is dropped, and what remains on the host after an
//! error. [`contract`] holds the tests that every backend passes.

pub mod contract;
pub mod fake;
pub mod firecracker;
pub mod probe;
pub mod qemu;
pub mod tsc;

mod channel;
mod error;
mod file;
mod memory;
mod process;
mod shape;
mod sys;

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

pub use self::channel::{Channel, Door};
pub(crate) use self::file::{
    NewFile, memory_bytes, new_memory, new_memory_at, open_state, refuse_unrestorable,
    refuse_unsavable, refuse_unstartable,
};

/// Everything a backend needs to know to start one machine, with nothing left to decide.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmPlan {
    /// Name shown in process lists. Letters, digits, `-` and `_` only.
    pub name: String,
    /// The engine's program.
    pub program: PathBuf,
    /// A directory of the backend's own, for its sockets and the like. It makes it if it needs one, in
    /// place of one that was left over, and removes it with the machine. Its parent is there.
    #[serde(default)]
    pub directory: PathBuf,
    /// How guest instructions run.
    pub accel: Accel,
    /// Virtual CPUs, 1 to [`Capabilities::cpus_max`].
    pub cpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Where guest memory is held.
    pub memory: Memory,
    /// Uncompressed kernel (`vmlinux`, an ELF file with a PVH note).
    pub kernel: PathBuf,
    /// How that kernel finds the machine's devices.
    #[serde(default)]
    pub devices: Devices,
    /// Initial RAM file system.
    pub initrd: PathBuf,
    /// Kernel parameters of the guest's own; the backend adds those the machine needs.
    pub cmdline: String,
    /// Block devices in the order the guest sees them (`/dev/vda` first).
    pub disks: Vec<DiskPlan>,
    /// Its network device, if it has one.
    #[serde(default)]
    pub nic: Option<NicPlan>,
    /// Frequency of the host's time-stamp counter in kHz ([`tsc::khz`]). Needed under emulation,
    /// where the machine has no other clock to measure it by; without, such a plan is refused.
    pub tsc_khz: Option<u64>,
    /// How the VMM is locked in, by a backend that can; it runs as this process does without.
    #[serde(default)]
    pub jail: Option<JailPlan>,
}

/// How a VMM is locked in: a user and a group of its own, a root directory in which nothing is but what
/// its machine needs, namespaces, and limits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JailPlan {
    /// The program that locks it in.
    pub program: PathBuf,
    /// The jail's name, and that of its control groups: 1 to 64 letters, digits and `-`. No other jail
    /// of this host has it.
    pub id: String,
    /// Number of its user, and of its group. No other process has it.
    pub user: u32,
    /// Its limits, where control groups can be made.
    pub limits: Option<Limits>,
}

/// What all threads of a VMM together may use, as control groups say it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Version of the control groups: 1 or 2 (cgroups(7)).
    pub version: u8,
    /// The group in which that of the jail is made.
    pub parent: String,
    /// Files of the group and what to write to them.
    pub values: Vec<(String, String)>,
}

/// How guest instructions run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// The host's hypervisor.
    Kvm,
    /// Translation in software; many times slower, works anywhere.
    Emulation,
}

/// How a kernel finds the machine's devices. A machine offers them one way only, so a kernel that
/// was built for the other one finds none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Devices {
    /// In ACPI tables, as kernels of distributions do.
    #[default]
    Acpi,
    /// On its command line (`VIRTIO_MMIO_CMDLINE_DEVICES`), where the backend puts them. For kernels
    /// without PCI, which cannot read the machine's ACPI tables.
    CommandLine,
}

/// Where guest memory is held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Memory {
    /// In anonymous memory of the VMM.
    Anonymous,
    /// In this file, made by the backend with mode 0600 where no file was, where [`Vm::snapshot`]
    /// can leave it for others to copy.
    File(PathBuf),
    /// A private copy of this file, made page by page as the guest writes: pages that no guest has
    /// written to are shared by all. The file must not change for as long as the machine lives.
    CopyOf(PathBuf),
}

/// A raw disk image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskPlan {
    /// The image file.
    pub path: PathBuf,
    /// Whether the guest is kept from writing. A read-only image may be shared by many machines.
    pub read_only: bool,
}

/// A network device. What it is connected to is made for one run, and so not part of the plan: see
/// [`Cable`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicPlan {
    /// The MAC address it has until the guest gives it another.
    pub mac: [u8; 6],
}

/// What a network device is connected to: a TAP device, whose frames begin with a
/// `struct virtio_net_hdr`.
#[derive(Debug)]
pub enum Cable {
    /// A descriptor of it. Whoever keeps another decides when it goes.
    Descriptor(OwnedFd),
    /// Its name in the network namespace of the calling thread. Nobody has it open, the VMM's user may
    /// open it, and it stays when that ends (`TUNSETPERSIST`): whoever made it removes it.
    Device(String),
}

impl Cable {
    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> CableKind {
        match self {
            Cable::Descriptor(_) => CableKind::Descriptor,
            Cable::Device(_) => CableKind::Device,
        }
    }
}

/// The kind of [`Cable`] that a backend takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CableKind {
    /// [`Cable::Descriptor`].
    Descriptor,
    /// [`Cable::Device`].
    Device,
}

/// What a backend can do, as data, so that an impossible wish is refused while planning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// Whether [`Vm::pause`] and [`Vm::resume`] work.
    pub pause: bool,
    /// Whether [`Vm::snapshot`] and [`Backend::restore`] work.
    pub snapshot: bool,
    /// Most virtual CPUs.
    pub cpus_max: u8,
    /// Least guest memory in MiB.
    pub memory_mib_min: u32,
    /// Most guest memory in MiB.
    pub memory_mib_max: u32,
    /// Most disks.
    pub disks_max: usize,
    /// What its network device is connected to; `None` if it can have none.
    pub cable: Option<CableKind>,
}

/// Starts machines of one kind.
#[async_trait]
pub trait Backend: Debug + Send + Sync {
    /// The name by which the engine is chosen, for example `qemu`.
    fn name(&self) -> &'static str;

    /// What this backend can do on this host. Pure; may be called at any time.
    fn capabilities(&self) -> Capabilities;

    /// Starts a machine and returns when its process runs; the guest boots on.
    ///
    /// `cable` is what the network device is connected to, of the kind that
    /// [`Capabilities::cable`] says.
    ///
    /// May be called any number of times, from the thread that will outlive the machine: the VMM
    /// is killed by the kernel when the *thread* that called this ends (prctl(2),
    /// `PR_SET_PDEATHSIG`), so that no machine survives its owner; one in a jail, which changes its user
    /// and loses that request with it, is killed when the *process* ends. Needs a tokio runtime with I/O and
    /// time. If the future is dropped, or on error, no process and no file remains.
    ///
    /// # Errors
    ///
    /// [`VmErrorKind::ProgramMissing`]; [`VmErrorKind::Unsupported`] for a plan outside the
    /// capabilities, with a network device and no cable or the reverse, or with [`Memory::CopyOf`], which can only be restored; [`VmErrorKind::Host`],
    /// naming the file, if one of the plan's cannot be opened, or that of the memory cannot be made.
    /// What the VMM itself finds wrong after it was started is told by [`Vm::wait`].
    async fn start(&self, plan: &VmPlan, cable: Option<Cable>) -> Result<Box<dyn Vm>, VmError>;

    /// Starts a machine where another was at its [`Vm::snapshot`], and returns when its virtual
    /// CPUs run, whether the other's did or not. The plan is that of the other but for its name, its
    /// paths, and its memory, which is [`Memory::CopyOf`] the other's file; its kernel and initial RAM
    /// file system are in that memory and need not be there any more. The guest notices nothing: its clock stands still
    /// between the two, and its end of the channel is as it was, so the host speaks first here; but for
    /// a [`Door`], through which its agent comes anew.
    ///
    /// Otherwise as [`Backend::start`]. `state` is read before this returns and not needed after.
    ///
    /// # Errors
    ///
    /// [`VmErrorKind::Unsupported`] if the plan's memory is no [`Memory::CopyOf`], or has another size
    /// than that file, which must be open to reading and writing even though nothing is written.
    /// Also [`VmErrorKind::Protocol`] or [`VmErrorKind::Exited`] if the VMM cannot make sense of
    /// `state`, or takes longer than [`CONTROL_TIMEOUT`] for it ([`VmErrorKind::Timeout`]).
    async fn restore(
        &self,
        plan: &VmPlan,
        state: &Path,
        cable: Option<Cable>,
    ) -> Result<Box<dyn Vm>, VmError>;
}

/// One machine. Dropping it kills the VMM process and reaps it.
#[async_trait]
pub trait Vm: Debug + Send {
    /// The VMM's process number. Valid, and not reused, until [`Vm::wait`] has returned.
    fn pid(&self) -> u32;

    /// Takes the way to the guest's agent, who speaks first. `Some` once. It ends when the machine
    /// does.
    fn take_channel(&mut self) -> Option<Channel>;

    /// Takes the stream of the guest's console, in blocking mode: what the guest writes comes out,
    /// and what is written to it the guest reads. `Some` once. If nobody reads it the guest's console
    /// stalls, or loses what it writes, so whoever takes it keeps reading.
    fn take_console(&mut self) -> Option<UnixStream>;

    /// Takes the reports of disks that the host could not read or write. `Some` once, from a backend that
    /// hears of it. They come from then on, while somebody is in [`Vm::wait`] or asks for something else;
    /// [`DISK_ERRORS_WAITING`] wait to be taken, and more are dropped. Whoever takes them when the guest
    /// has booted does not slow that down.
    fn take_disk_errors(&mut self) -> Option<mpsc::Receiver<DiskError>> {
        None
    }

    /// Stops the virtual CPUs; memory and devices stay. Idempotent.
    ///
    /// # Errors
    ///
    /// [`VmErrorKind::Unsupported`] without the capability; [`VmErrorKind::Exited`] if it is gone.
    async fn pause(&mut self) -> Result<(), VmError>;

    /// Lets the virtual CPUs go on. Idempotent. Errors as [`Vm::pause`].
    async fn resume(&mut self) -> Result<(), VmError>;

    /// Stops the virtual CPUs and writes what [`Backend::restore`] needs: the state of CPUs and
    /// devices to the new file `state`, and guest memory to the new file `memory`, both of mode 0600.
    /// What the guest wrote to its disks is in their files. The machine stays paused, and goes on
    /// with [`Vm::resume`]; until then nothing changes in its disks, so they can be copied. Returns the
    /// moment at which it was told to stand still.
    ///
    /// Without `memory` the plan's [`Memory::File`] itself becomes the snapshot's memory. Then kill the
    /// machine before anybody restores from it, so that nothing changes that file any more.
    ///
    /// How long the guest stands still follows from what it has written since it was started or
    /// restored: what it shares with [`Memory::CopyOf`] is copied before it is stopped.
    ///
    /// # Errors
    ///
    /// [`VmErrorKind::Unsupported`] without the capability, or without `memory` unless the plan's is
    /// [`Memory::File`]; [`VmErrorKind::Exited`] if it is gone; [`VmErrorKind::Host`] if one of the
    /// files exists or cannot be written; [`VmErrorKind::Timeout`] after [`CONTROL_TIMEOUT`]. Neither
    /// file remains, nor, in a moment, if the future is dropped; and the machine, if it is not gone,
    /// may be paused.
    async fn snapshot(&mut self, state: &Path, memory: Option<&Path>) -> Result<Instant, VmError>;

    /// Makes a disk larger while the guest runs: its file, which is [`VmPlan::disks`]' number `index`, and
    /// the device, of which the guest is told. Bytes that are added are zeros. Succeeds if it has that
    /// size already.
    ///
    /// # Errors
    ///
    /// [`VmErrorKind::Unsupported`] if this backend cannot, or for a disk that is only read;
    /// [`VmErrorKind::Exited`] if it is gone; [`VmErrorKind::Protocol`] if the VMM says no.
    async fn grow_disk(&mut self, index: usize, bytes: u64) -> Result<(), VmError> {
        let doing = format!("make disk {index} of {bytes} bytes");
        let why = "this backend cannot change disks of a machine that runs";
        Err(VmError::new(VmErrorKind::Unsupported, doing, why))
    }

    /// Kills the VMM and does not wait for its end: the guest executes nothing more (signal(7):
    /// SIGKILL cannot be caught or blocked), while the host may be busy for some milliseconds with
    /// taking the process down. Idempotent; succeeds if it is gone already.
    ///
    /// # Errors
    ///
    /// [`VmErrorKind::Host`] if the signal cannot be sent.
    fn start_kill(&mut self) -> Result<(), VmError>;

    /// Kills the VMM at once and reaps it. Idempotent; succeeds if it is gone already. When it
    /// returns, the process no longer exists.
    async fn kill(&mut self) -> Result<Exit, VmError>;

    /// Waits for the VMM to end, without polling. May be called again after it returned, and its
    /// future may be dropped without loss. Whoever owns a machine waits most of the time: what the
    /// VMM reports meanwhile is taken in here, and logged.
    async fn wait(&mut self) -> Result<Exit, VmError>;
}

/// The host could not read or write a disk; the guest was told of an input/output error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskError {
    /// Its number in [`VmPlan::disks`].
    pub disk: usize,
    /// Whether there was no room on the host.
    pub full: bool,
}

/// Most [`DiskError`]s that wait to be heard: a guest tries again and again, and one says it all.
pub const DISK_ERRORS_WAITING: usize = 16;

/// How a VMM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, if it exited.
    pub code: Option<i32>,
    /// Signal that ended it, if one did.
    pub signal: Option<i32>,
    /// The last lines it wrote to standard error, at most 4 KiB.
    pub stderr: String,
}

/// What kind of thing went wrong, for code that has to branch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmErrorKind {
    /// The engine's program is not there.
    ProgramMissing,
    /// The plan asks for something this backend cannot do.
    Unsupported,
    /// The VMM ended when it should run.
    Exited,
    /// The VMM did not answer within its time.
    Timeout,
    /// The host's kernel refused something.
    Host,
    /// The VMM said something unexpected.
    Protocol,
}

/// What was being done with a machine, and why it failed.
#[derive(Debug, thiserror::Error)]
#[error("{doing}")]
pub struct VmError {
    /// For code.
    pub kind: VmErrorKind,
    /// What was being done, to which machine or file; reads well after "could not".
    pub doing: String,
    /// Why.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// How long a VMM may take to answer a control command.
pub const CONTROL_TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) fn doing(verb: &str, name: &str) -> String {
    format!("{verb} the machine {name}")
}

pub(crate) fn spawn_error(program: &Path, error: io::Error) -> VmError {
    let kind = match error.kind() {
        io::ErrorKind::NotFound => VmErrorKind::ProgramMissing,
        _ => VmErrorKind::Host,
    };
    VmError::new(kind, format!("run {}", program.display()), error)
}

/// The same descriptor under a number that standard input, output and error do not have: a process that
/// was started without them gets such numbers for its first sockets, and in the child they are
/// replaced.
pub(crate) fn above_stdio(fd: OwnedFd) -> io::Result<OwnedFd> {
    if fd.as_raw_fd() > libc::STDERR_FILENO {
        return Ok(fd);
    }
    Ok(rustix::io::fcntl_dupfd_cloexec(
        &fd,
        libc::STDERR_FILENO + 1,
    )?)
}

/// Finds a program in a list of directories. The first one wins.
pub(crate) fn find_program<I>(name: &str, directories: I) -> Option<PathBuf>
where
    I: IntoIterator,
    I::Item: AsRef<Path>,
{
    let is_program = |path: &PathBuf| {
        std::fs::metadata(path)
            .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    let mut paths = directories
        .into_iter()
        .map(|directory| directory.as_ref().join(name));
    paths.find(is_program)
}

/// Refuses a plan that no retry could make possible.
pub(crate) fn refuse_impossible(
    plan: &VmPlan,
    can: &Capabilities,
    cable: Option<&Cable>,
) -> Result<(), VmError> {
    let name_ok = !plan.name.is_empty()
        && plan
            .name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    let why = if !name_ok {
        "its name may have letters, digits, - and _ only".to_owned()
    } else if plan.cpus == 0 || plan.cpus > can.cpus_max {
        format!("it has {} CPUs, of 1 to {}", plan.cpus, can.cpus_max)
    } else if !(can.memory_mib_min..=can.memory_mib_max).contains(&plan.memory_mib) {
        format!(
            "it has {} MiB of memory, of {} to {}",
            plan.memory_mib, can.memory_mib_min, can.memory_mib_max
        )
    } else if plan.disks.len() > can.disks_max {
        format!(
            "it has {} disks, of 0 to {}",
            plan.disks.len(),
            can.disks_max
        )
    } else if plan.nic.is_some() != cable.is_some() {
        "its network device needs a cable, and a cable needs a network device".to_owned()
    } else if cable.is_some_and(|cable| Some(cable.kind()) != can.cable) {
        "its cable is not of the kind that this backend takes".to_owned()
    } else if !can.snapshot && plan.memory != Memory::Anonymous {
        "this backend cannot hold memory in files".to_owned()
    } else if plan.accel == Accel::Emulation && plan.tsc_khz.is_none() {
        "emulation needs the frequency of the host's time-stamp counter".to_owned()
    } else {
        return Ok(());
    };
    let doing = format!("plan the machine {}", plan.name);
    Err(VmError::new(VmErrorKind::Unsupported, doing, why))
}

/// Refuses a plan whose files a VMM could not open, while there is somebody to tell which one.
pub(crate) fn refuse_unreadable(plan: &VmPlan) -> Result<(), VmError> {
    // A machine that is restored has its kernel in memory.
    let boot = match plan.memory {
        Memory::CopyOf(_) => Vec::new(),
        Memory::Anonymous | Memory::File(_) => vec![
            ("kernel", &plan.kernel, false),
            ("initrd", &plan.initrd, false),
        ],
    };
    let disks = plan
        .disks
        .iter()
        .map(|disk| ("disk", &disk.path, !disk.read_only));
    for (what, path, write) in boot.into_iter().chain(disks) {
        let opened = File::options().read(true).write(write).open(path);
        opened.map_err(|error| {
            let doing = format!("open the {what} {}", path.display());
            VmError::new(VmErrorKind::Host, doing, error)
        })?;
    }
    Ok(())
}

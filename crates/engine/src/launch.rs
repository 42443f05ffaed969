//! What a keeper is told, and how it is started.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};
use smolvm_host::ProcessIdentity;
use smolvm_host::net::alloc::PortRange;
use smolvm_host::os::Lock;
use smolvm_vmm::VmPlan;

use crate::error::{Error, ErrorKind, Result, io};
use crate::layout::{SOCKET_NAME, SandboxDir};
use crate::mounts::Mount;
use crate::network::NetworkLaunch;
use crate::ports::PublishedPort;
use crate::volumes::VolumeLaunch;

/// Exit code of a keeper that found no room on the disk for a template. It says why on standard output.
pub const EXIT_NO_SPACE: u8 = 3;

/// Everything a keeper needs to know, with nothing left to decide. Written before the keeper
/// starts; made anew at each start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    /// The sandbox's id.
    pub id: String,
    /// The sandbox's name, which is also the guest's host name.
    pub name: String,
    /// The data directory.
    pub data_dir: std::path::PathBuf,
    /// Name of the engine that runs the machine.
    pub engine: String,
    /// The machine.
    pub vm: VmPlan,
    /// Its network, if it has a network device.
    pub network: Option<NetworkLaunch>,
    /// Environment of every command.
    pub env: Vec<(String, String)>,
    /// Working directory of commands that name none.
    pub workdir: Option<String>,
    /// User of commands that name none.
    pub user: Option<String>,
    /// Milliseconds from the moment the guest serves at which the sandbox is destroyed.
    pub ttl_ms: Option<u64>,
    /// Whether the sandbox is destroyed as soon as it stops.
    pub ephemeral: bool,
    /// For an ephemeral sandbox the process that starts it, which it does not outlive.
    pub starter: Option<ProcessIdentity>,
    /// What to restore the machine from; it boots if absent.
    pub restore: Option<Restore>,
    /// For a member of a pool: what it runs, one after the other, before it is parked and waits to be
    /// claimed.
    pub park: Option<Vec<WarmCommand>>,
    /// Ports of the host that lead to it.
    pub ports: Vec<PublishedPort>,
    /// Ports of the host of which it is given one to be reached by SSH, if it has none yet.
    #[serde(with = "crate::settings::as_text")]
    pub ssh_ports: PortRange,
    /// Its volumes, whose disks are the last of the machine's, in this order.
    pub volumes: Vec<VolumeLaunch>,
    /// Directories of the host that it sees.
    pub mounts: Vec<Mount>,
    /// For the builder of a template: where to write the machine's state.
    pub snapshot: Option<std::path::PathBuf>,
    /// Milliseconds the guest may take from start to ready.
    pub boot_timeout_ms: u64,
}

/// A machine that was saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restore {
    /// The state of its CPUs and devices. Its memory is in the plan.
    pub state: std::path::PathBuf,
    /// Whether the machine boots if it cannot be restored: so with a template, which stands in for a
    /// boot, and not with a snapshot, whose processes a boot would lose.
    pub or_boot: bool,
}

/// A command that warms a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WarmCommand {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Whether the machine is of no use if the command is not there or fails.
    pub required: bool,
}

impl WarmCommand {
    /// What of it a person knows: the shell's command, or the last argument.
    #[must_use]
    pub fn shown(&self) -> &str {
        self.argv.last().map_or("", String::as_str)
    }
}

impl Launch {
    /// Whether it writes to a disk that outlives it.
    #[must_use]
    pub fn writes_to_volumes(&self) -> bool {
        self.volumes.iter().any(|volume| !volume.read_only)
    }

    /// Reads what [`Launch`] was written to `path`.
    pub fn read(path: &Path) -> Result<Self> {
        let doing = || format!("could not read the launch file {}", path.display());
        let bytes = std::fs::read(path).map_err(|error| io(doing(), error))?;
        serde_json::from_slice(&bytes)
            .map_err(|error| Error::new(ErrorKind::State, doing()).because(error))
    }
}

/// Listens on the socket of a sandbox, in place of one left over.
///
/// The engine listens and the keeper inherits, so a client can connect from the first moment and
/// nobody waits for a socket to appear.
pub(crate) fn listen(dir: &SandboxDir) -> std::io::Result<UnixListener> {
    use rustix::fs::{Mode, OFlags};
    use std::os::fd::AsRawFd;

    match std::fs::remove_file(dir.socket()) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // Through the descriptor, because the path may be longer than a socket's address holds.
    let descriptor = rustix::fs::open(
        dir.path(),
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    UnixListener::bind(format!(
        "/proc/self/fd/{}/{SOCKET_NAME}",
        descriptor.as_raw_fd()
    ))
}

/// A descriptor that becomes readable when something appears in or vanishes from a sandbox's
/// directory, its socket among it.
pub(crate) fn watch_socket(dir: &SandboxDir) -> std::io::Result<OwnedFd> {
    use rustix::fs::inotify;

    let watch = inotify::init(inotify::CreateFlags::CLOEXEC)?;
    let events = inotify::WatchFlags::CREATE
        | inotify::WatchFlags::MOVED_TO
        | inotify::WatchFlags::DELETE
        | inotify::WatchFlags::DELETE_SELF;
    match inotify::add_watch(&watch, dir.path(), events) {
        // Without a directory there is nothing to wait for; whoever asked looks again.
        Ok(_) | Err(rustix::io::Errno::NOENT) => Ok(watch),
        Err(error) => Err(error.into()),
    }
}

/// Has a keeper find out whether this user may have networks of its own.
///
/// # Errors
///
/// What it found.
pub(crate) fn try_network(keeper: &Path) -> Result<()> {
    let doing = || format!("could not ask the keeper {}", keeper.display());
    let output = Command::new(keeper)
        .arg("--try-network")
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .map_err(|error| io(doing(), error))?;
    if output.status.success() {
        return Ok(());
    }
    // What was found, and what to do.
    let said = String::from_utf8_lossy(&output.stdout);
    match said.split_once('\n') {
        Some((why, hint)) => {
            Err(Error::new(ErrorKind::PermissionDenied, why).hint(hint.trim_end()))
        }
        None => Err(Error::new(
            ErrorKind::Internal,
            format!("{}: it ended with {}", doing(), output.status),
        )),
    }
}

/// Starts a keeper. It inherits the listening socket as standard input, the sandbox's lock as
/// standard output and its log as standard error: no descriptor has to be smuggled past exec.
/// Returns a descriptor that becomes readable when it ends.
pub(crate) fn spawn(
    keeper: &Path,
    dir: &SandboxDir,
    listener: UnixListener,
    lock: Lock,
    log: File,
) -> Result<OwnedFd> {
    let mut child = Command::new(keeper)
        .arg(dir.launch_file())
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stdout(Stdio::from(OwnedFd::from(lock)))
        .stderr(Stdio::from(log))
        .spawn()
        .map_err(|error| {
            let failure = io(
                format!("could not start the keeper {}", keeper.display()),
                error,
            );
            if failure.kind() == ErrorKind::NotFound {
                failure.hint("install smolvm-keeper beside smolvm")
            } else {
                failure
            }
        })?;
    // Before anybody waits for it: until then the number is its own, pidfd_open(2).
    let pid = rustix::process::Pid::from_child(&child);
    let end = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())
        .map_err(|error| io("could not watch the keeper", error.into()))?;
    // The keeper outlives most callers. A caller that lives longer must not collect zombies, and
    // this thread costs less than asking a second process to be the parent.
    let _ = std::thread::Builder::new()
        .name("keeper-wait".to_owned())
        .stack_size(64 * 1024)
        .spawn(move || child.wait());
    Ok(end)
}

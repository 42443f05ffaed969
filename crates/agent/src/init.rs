//! From the kernel's hand-over to a root file system and an open port.
//!
//! [`STEPS`] is the whole of it, in order. Whatever fails is said in one line on the console, with
//! the step's name, and the machine goes off at once, so that the host need not wait for a deadline.

use std::fmt::Display;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use rustix::process::{Resource, Rlimit};

use crate::cgroup::Cgroups;
use crate::cmdline::{self, BootOptions, Upper};
use crate::devices;
use crate::serve::{self, Agent, OnLoss};
use crate::shutdown::Disks;
use crate::{console, grow, network, sys};

/// How long devices may take to appear. A probe takes milliseconds; under emulation on a busy host,
/// seconds.
const DEVICES_WAIT: Duration = Duration::from_secs(30);

/// Name the host gives its port.
const PORT_NAME: &str = "agent";

/// Where the disks are mounted while the root is put together. They stay mounted there, below the
/// new root and out of everybody's sight.
const BASE: &str = "/base";
const UPPER: &str = "/upper";
const ROOT: &str = "/root.new";

/// Descriptors the agent may have: some five for each of the protocol's streams, and as a hard
/// limit for commands what systemd gives.
const DESCRIPTORS_MAX: u64 = 524_288;

/// Why a step failed: what was being done, and what the kernel said.
#[derive(Debug, thiserror::Error)]
#[error("{doing}: {reason}")]
struct BootError {
    doing: String,
    reason: String,
}

fn failed<E: Display>(doing: impl Into<String>) -> impl FnOnce(E) -> BootError {
    let doing = doing.into();
    move |error| BootError {
        doing,
        reason: error.to_string(),
    }
}

/// What earlier steps leave for later ones.
#[derive(Default)]
struct Boot {
    options: Option<BootOptions>,
    /// A descriptor of the upper file system's mount, which has no path in the new root.
    upper: Option<OwnedFd>,
    port: Option<PathBuf>,
    deadline: Option<Instant>,
}

impl Boot {
    fn options(&self) -> Result<&BootOptions, BootError> {
        self.options
            .as_ref()
            .ok_or("it was not read")
            .map_err(failed("using the kernel command line"))
    }
}

type Step = fn(&mut Boot) -> Result<(), BootError>;

/// The steps of a boot.
const STEPS: &[(&str, Step)] = &[
    ("mount the kernel's file systems", mount_kernel),
    ("read the command line", read_cmdline),
    ("load modules", load_modules),
    ("wait for the disks", wait_for_disks),
    ("mount the disks", mount_disks),
    ("put the root together", mount_root),
    ("populate the root", populate),
    ("switch to the root", switch_root),
    ("set limits", set_limits),
    ("bring the interfaces up", interfaces),
    ("find the port", find_port),
];

/// Boots, and serves for ever.
pub(crate) fn boot() -> ExitCode {
    let mut boot = Boot {
        deadline: Instant::now().checked_add(DEVICES_WAIT),
        ..Boot::default()
    };
    for (name, step) in STEPS {
        let begun = Instant::now();
        if let Err(error) = step(&mut boot) {
            die(&format!("{name}: {error}"));
        }
        if boot.options.as_ref().is_some_and(|options| options.debug) {
            console::say(&format!("{name}: {} us", begun.elapsed().as_micros()));
        }
    }
    let cgroups = Cgroups::new(Path::new("/sys/fs/cgroup/smolvm"));
    if cgroups.is_none() {
        console::say("control groups are not there: a command is killed by its process group");
    }
    let disks = Disks { upper: boot.upper };
    let agent = Arc::new(Agent::new(cgroups, Some(disks)));
    if let Some(port) = boot.options.and_then(|options| options.vsock) {
        serve_vsock(&agent, port, boot.deadline);
    }
    let Some(port) = boot.port else {
        die("find the port: it was not looked for");
    };
    match devices::open_port(&port) {
        Ok(fd) => serve_port(&agent, &Arc::new(fd)),
        Err(error) => die(&format!("open {}: {error}", port.display())),
    }
}

/// Serves one host after the other.
fn serve_port(agent: &Arc<Agent>, port: &Arc<OwnedFd>) -> ! {
    loop {
        if let Err(error) = devices::wait_for_host(port) {
            die(&format!("wait for the host on the port: {error}"));
        }
        serve::until_closed(agent, port, OnLoss::EndCommands);
    }
}

/// Serves the host that waits at its vsock port `port`, and whoever is there when that connection is
/// lost: a snapshot of the machine ends it, here and in every copy (virtio 1.2, 5.10.6.7). Commands
/// live on meanwhile.
fn serve_vsock(agent: &Arc<Agent>, port: u32, deadline: Option<Instant>) -> ! {
    let mut socket = match devices::wait_for(|| sys::connect_to_host(port).ok(), deadline) {
        Ok(socket) => socket,
        Err(error) => die(&format!("connect to port {port} of the host: {error}")),
    };
    loop {
        serve::until_closed(agent, &Arc::new(socket), OnLoss::KeepCommands);
        // Whether anybody is there the host's side says each time; there is nothing else to watch.
        let lost = Instant::now();
        socket = loop {
            match sys::connect_to_host(port) {
                Ok(socket) => break socket,
                Err(error) if lost.elapsed() > DEVICES_WAIT => {
                    die(&format!(
                        "connect to port {port} of the host again: {error}"
                    ));
                }
                Err(_) => {}
            }
        };
    }
}

/// Says why and switches the machine off: to QEMU with `-no-reboot` a restart is that.
fn die(reason: &str) -> ! {
    console::say(&format!("fatal: {reason}"));
    rustix::fs::sync();
    let _ = rustix::system::reboot(rustix::system::RebootCommand::Restart);
    // Refused only where this is not the machine's first process.
    std::process::exit(1)
}

fn mount(
    what: &str,
    target: &str,
    kind: &str,
    flags: MountFlags,
    data: &str,
) -> Result<(), BootError> {
    make_directory(target)?;
    let data = std::ffi::CString::new(data).map_err(failed("writing mount options"))?;
    rustix::mount::mount(what, target, kind, flags, Some(data.as_c_str()))
        .map_err(failed(format!("mounting {what} ({kind}) on {target}")))
}

fn make_directory(path: &str) -> Result<(), BootError> {
    match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(failed(format!("making the directory {path}"))(error)),
    }
}

const PLAIN: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC);

fn mount_kernel(_: &mut Boot) -> Result<(), BootError> {
    let device_flags = MountFlags::NOSUID.union(MountFlags::NOEXEC);
    // The kernel does it itself, before the first process, where DEVTMPFS_MOUNT covers initramfs.
    match mount("devtmpfs", "/dev", "devtmpfs", device_flags, "mode=0755") {
        Ok(()) => {}
        Err(error) if Path::new("/dev/null").exists() => {
            console::say(&format!("going on without: {error}"));
        }
        Err(error) => return Err(error),
    }
    standard_descriptors()?;
    mount("proc", "/proc", "proc", PLAIN, "")?;
    mount("sysfs", "/sys", "sysfs", PLAIN, "")
}

/// Makes sure that descriptors 0 to 2 are open, so that no file of ours ever is one of them.
///
/// The kernel leaves them closed when the initramfs has no console (`console_on_rootfs`).
fn standard_descriptors() -> Result<(), BootError> {
    loop {
        let null = File::options()
            .read(true)
            .write(true)
            .open("/dev/null")
            .map_err(failed("opening /dev/null"))?;
        if std::os::fd::AsRawFd::as_raw_fd(&null) > 2 {
            return Ok(());
        }
        // Deliberately never closed.
        let _ = std::os::fd::IntoRawFd::into_raw_fd(null);
    }
}

fn read_cmdline(boot: &mut Boot) -> Result<(), BootError> {
    let text = std::fs::read_to_string("/proc/cmdline").map_err(failed("reading /proc/cmdline"))?;
    boot.options = Some(cmdline::parse(&text).map_err(failed("reading /proc/cmdline"))?);
    Ok(())
}

fn load_modules(_: &mut Boot) -> Result<(), BootError> {
    // A kernel with everything built in comes without a list.
    let Ok(list) = std::fs::read_to_string("/modules/order") else {
        return Ok(());
    };
    for name in cmdline::module_order(&list) {
        let path = format!("/modules/{name}");
        let file = File::open(&path).map_err(failed(format!("opening {path}")))?;
        match rustix::system::finit_module(&file, c"", 0) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(failed(format!("loading {path}"))(error)),
        }
    }
    Ok(())
}

fn wait_for_disks(boot: &mut Boot) -> Result<(), BootError> {
    let options = boot.options()?;
    let mut wanted = vec![options.root.as_str()];
    if let Upper::Device(device) = &options.upper {
        wanted.push(device);
    }
    for device in wanted {
        devices::wait_for(|| Path::new(device).exists().then_some(()), boot.deadline)
            .map_err(failed(format!("waiting for {device}")))?;
    }
    Ok(())
}

fn mount_disks(boot: &mut Boot) -> Result<(), BootError> {
    let options = boot.options()?;
    mount(
        &options.root,
        BASE,
        &options.rootfs,
        MountFlags::RDONLY | MountFlags::NOATIME,
        "",
    )?;
    match &options.upper {
        Upper::Device(device) => mount(device, UPPER, "ext4", MountFlags::NOATIME, "")?,
        Upper::Memory => mount("tmpfs", UPPER, "tmpfs", MountFlags::empty(), "mode=0755")?,
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let upper = rustix::fs::open(UPPER, flags, Mode::empty())
        .map_err(failed(format!("opening {UPPER}")))?;
    // The disk may have been made larger while the machine was off.
    if let Upper::Device(device) = &options.upper
        && let Err(error) = grow::fill_disk(upper.as_fd())
    {
        console::say(&format!(
            "the file system of {device} stays as large as it is: {error}"
        ));
    }
    boot.upper = Some(upper);
    Ok(())
}

fn mount_root(_: &mut Boot) -> Result<(), BootError> {
    for directory in ["/upper/root", "/upper/work"] {
        make_directory(directory)?;
    }
    mount(
        "overlay",
        ROOT,
        "overlay",
        MountFlags::NOATIME,
        "lowerdir=/base,upperdir=/upper/root,workdir=/upper/work",
    )
}

fn populate(_: &mut Boot) -> Result<(), BootError> {
    for name in ["dev", "proc", "sys"] {
        let (from, to) = (format!("/{name}"), format!("{ROOT}/{name}"));
        make_directory(&to)?;
        rustix::mount::mount_move(&from, &to).map_err(failed(format!("moving {from} to {to}")))?;
    }
    let in_root = |path: &str| format!("{ROOT}{path}");
    for (path, mode) in [("/run", 0o755), ("/tmp", 0o1777), ("/etc", 0o755)] {
        match rustix::fs::mkdir(in_root(path), Mode::from_raw_mode(mode)) {
            // The mode given to mkdir is cut by the umask.
            Ok(()) => rustix::fs::chmod(in_root(path), Mode::from_raw_mode(mode))
                .map_err(failed(format!("setting the mode of {path}")))?,
            Err(Errno::EXIST) => {}
            Err(error) => return Err(failed(format!("making the directory {path}"))(error)),
        }
    }
    let no_device = MountFlags::NOSUID.union(MountFlags::NODEV);
    mount(
        "devpts",
        &in_root("/dev/pts"),
        "devpts",
        MountFlags::NOSUID.union(MountFlags::NOEXEC),
        "gid=5,mode=620,ptmxmode=666",
    )?;
    mount(
        "tmpfs",
        &in_root("/dev/shm"),
        "tmpfs",
        no_device,
        "mode=1777",
    )?;
    mount("tmpfs", &in_root("/run"), "tmpfs", no_device, "mode=0755")?;
    // Not there in a kernel built without; the agent then kills by process group.
    let _ = mount("cgroup2", &in_root("/sys/fs/cgroup"), "cgroup2", PLAIN, "");
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        match rustix::fs::symlink(target, in_root(link)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(failed(format!("making the link {link}"))(error)),
        }
    }
    Ok(())
}

fn switch_root(_: &mut Boot) -> Result<(), BootError> {
    // What was unpacked from the initramfs is memory that nobody else would ever free. The program
    // that runs keeps its own until it ends.
    let initramfs = std::fs::metadata("/").map_err(failed("looking at the initramfs"))?;
    remove_tree(Path::new("/modules"), initramfs.dev());
    let _ = std::fs::remove_file("/init");
    rustix::process::chdir(ROOT).map_err(failed(format!("entering {ROOT}")))?;
    // The initramfs cannot be unmounted and pivot_root(2) refuses to move it: the new root is put
    // over it, as switch_root(8) does.
    rustix::mount::mount_move(".", "/").map_err(failed("moving the new root over the old"))?;
    rustix::process::chroot(".").map_err(failed("changing the root"))?;
    rustix::process::chdir("/").map_err(failed("entering the new root"))
}

/// Removes a tree as far as it is on one device.
fn remove_tree(path: &Path, device: u64) {
    let Ok(entries) = std::fs::read_dir(path) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        match entry.metadata() {
            Ok(status) if status.dev() != device => {}
            Ok(status) if status.is_dir() => remove_tree(&path, device),
            _ => drop(std::fs::remove_file(&path)),
        }
    }
    let _ = std::fs::remove_dir(path);
}

fn set_limits(_: &mut Boot) -> Result<(), BootError> {
    rustix::process::umask(Mode::from_raw_mode(0o022));
    rustix::process::setrlimit(
        Resource::Nofile,
        Rlimit {
            current: Some(DESCRIPTORS_MAX),
            maximum: Some(DESCRIPTORS_MAX),
        },
    )
    .map_err(failed("raising the limit of open descriptors"))
    // Nothing about memory: the kernel never takes PID 1 when it is out of it
    // (oom_unkillable_task, mm/oom_kill.c), and a score set here would pass to every command.
}

fn interfaces(_: &mut Boot) -> Result<(), BootError> {
    match sys::internet_socket() {
        Ok(socket) => {
            sys::interface_up(socket.as_fd(), "lo").map_err(failed("switching lo on"))?;
            network::prepare().map_err(failed("switching the network device on"))
        }
        // A kernel without IPv4.
        Err(Errno::AFNOSUPPORT) => Ok(()),
        Err(error) => Err(failed("making a socket")(error)),
    }
}

fn find_port(boot: &mut Boot) -> Result<(), BootError> {
    if boot.options()?.vsock.is_some() {
        return Ok(());
    }
    let path = devices::wait_for(|| devices::port_path(PORT_NAME), boot.deadline)
        .map_err(failed(format!("waiting for the virtio port {PORT_NAME:?}")))?;
    rustix::fs::chmodat(
        CWD,
        &path,
        Mode::from_raw_mode(0o600),
        rustix::fs::AtFlags::empty(),
    )
    .map_err(failed(format!("setting the mode of {}", path.display())))?;
    boot.port = Some(path);
    Ok(())
}

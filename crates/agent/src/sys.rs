//! What safe code cannot say to the kernel. The only file with `unsafe`.

#![expect(
    unsafe_code,
    reason = "clone3 without fork's handlers, signal masks and some ioctls have no safe wrapper"
)]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::mem::MaybeUninit;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::process::{Gid, Pid, Resource, Rlimit, Uid};

/// The C entry point, instead of the standard library's.
///
/// The library's start-up aborts when a standard descriptor is closed and `/dev/null` cannot be
/// opened, and an initramfs may well have neither it nor a console.
#[cfg_attr(not(test), unsafe(no_mangle))]
#[cfg_attr(
    test,
    expect(dead_code, reason = "the tests have an entry point of their own")
)]
extern "C" fn main(_argc: c_int, _argv: *const *const c_char) -> c_int {
    // On glibc the arguments are kept by an initialiser, so `args_os` works without the library's
    // start-up (library/std/src/sys/args/unix.rs).
    let code = crate::run(std::env::args_os().skip(1));
    c_int::from(code != std::process::ExitCode::SUCCESS)
}

/// Blocks SIGCHLD, for every thread to come as well, and ignores SIGPIPE. What else whoever started
/// this process ignores is not ignored any more: commands would inherit it (execve(2)).
pub(crate) fn prepare_signals() {
    for signal in (1..32).filter(|signal| ![libc::SIGKILL, libc::SIGSTOP].contains(signal)) {
        // SAFETY: a default disposition installs no handler.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let set = child_signal();
    // SAFETY: `set` is initialised and lives through the call; no old mask is asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    // SAFETY: ignoring a signal installs no handler.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}

fn child_signal() -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set it is given, sigaddset changes that set, and SIGCHLD
    // is a valid signal, so neither fails.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGCHLD);
        set.assume_init()
    }
}

/// Waits until the kernel has a SIGCHLD for this process.
pub(crate) fn wait_for_child_signal() {
    let set = child_signal();
    // SAFETY: `set` is initialised, and no information about the signal is asked for.
    unsafe { libc::sigwaitinfo(&raw const set, std::ptr::null_mut()) };
}

// ---- commands ----

/// Everything a child needs, prepared before it exists.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    /// Path of the program, absolute or relative to `cwd`.
    pub(crate) program: &'a CStr,
    pub(crate) argv: &'a [CString],
    pub(crate) env: &'a [CString],
    /// Standard input, output and error. None of them is a standard descriptor of this process.
    pub(crate) stdio: [BorrowedFd<'a>; 3],
    /// Whether standard input is a terminal to take as the controlling one.
    pub(crate) terminal: bool,
    pub(crate) uid: Uid,
    pub(crate) gid: Gid,
    pub(crate) groups: &'a [Gid],
    pub(crate) cwd: &'a CStr,
    /// Whether to go to `/` when `cwd` cannot be entered.
    pub(crate) cwd_optional: bool,
    /// Directory of the control group to start in.
    pub(crate) cgroup: Option<BorrowedFd<'a>>,
}

/// What a child was doing when it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Making the process itself.
    Create,
    /// Its session, terminal and descriptors.
    Prepare,
    /// Its user and groups.
    Identity,
    /// Its working directory.
    Directory,
    /// Loading the program.
    Exec,
}

/// Why a command was not started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SpawnError {
    pub(crate) stage: Stage,
    pub(crate) errno: Errno,
}

/// What the child sees: the plan, and where to leave an error.
struct Shared<'a> {
    plan: &'a Plan<'a>,
    argv: Vec<*const c_char>,
    env: Vec<*const c_char>,
    error: Option<SpawnError>,
}

/// Starts a command in a session of its own; returns when its program is loaded.
///
/// The child shares this process's memory until then (`CLONE_VM | CLONE_VFORK`, like vfork(2)), so
/// that no page tables are copied and an error comes back through memory.
pub(crate) fn spawn(plan: &Plan<'_>) -> Result<Pid, SpawnError> {
    let pointers = |strings: &[CString]| {
        strings
            .iter()
            .map(|string| string.as_ptr())
            .chain(std::iter::once(std::ptr::null()))
            .collect()
    };
    let mut shared = Shared {
        plan,
        argv: pointers(plan.argv),
        env: pointers(plan.env),
        error: None,
    };
    let result = clone_and_run(plan.cgroup, &raw mut shared);
    let create = |errno| SpawnError {
        stage: Stage::Create,
        errno,
    };
    let pid = match i32::try_from(result) {
        Ok(pid) if pid > 0 => Pid::from_raw(pid).ok_or_else(|| create(Errno::IO))?,
        Ok(error) => return Err(create(Errno::from_raw_os_error(-error))),
        Err(_) => return Err(create(Errno::IO)),
    };
    match shared.error {
        None => Ok(pid),
        // The child ended by itself; the reaper takes it like any orphan.
        Some(error) => Err(error),
    }
}

/// Makes the child, which runs [`child`] and nothing else of this program.
fn clone_and_run(cgroup: Option<BorrowedFd<'_>>, shared: *mut Shared<'_>) -> i64 {
    // CLONE_CLEAR_SIGHAND is 1 << 32 and CLONE_INTO_CGROUP 1 << 33 (linux/sched.h); the C library's
    // types for them are too narrow.
    const CLEAR_SIGHAND: u64 = 1 << 32;
    const INTO_CGROUP: u64 = 1 << 33;
    let mut flags = CLEAR_SIGHAND
        | u64::from(libc::CLONE_VM.cast_unsigned())
        | u64::from(libc::CLONE_VFORK.cast_unsigned());
    // SAFETY: clone_args is plain numbers, for which zero means "not asked for" (clone(2)).
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    if let Some(fd) = cgroup {
        flags |= INTO_CGROUP;
        arguments.cgroup = u64::from(fd.as_raw_fd().cast_unsigned());
    }
    arguments.flags = flags;
    arguments.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    let result: i64;
    // SAFETY: with CLONE_VFORK this thread stands still until the child has called execve or
    // _exit, so the two never use the shared memory at one time. No stack is given, so the child
    // runs on this thread's, below its pointer: `child` is called from inside this block and never
    // returns, so nothing this thread still needs is overwritten; without `nostack` the compiler
    // keeps nothing below the pointer and aligns it for a call. The child has a copy of the
    // descriptor table (no CLONE_FILES), of the signal table (no CLONE_SIGHAND) and of the working
    // directory (no CLONE_FS).
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "mov rdi, {shared}",
            "call {child}",
            "ud2",
            "2:",
            shared = in(reg) shared,
            child = sym child,
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") &raw const arguments,
            in("rsi") size_of::<libc::clone_args>(),
            out("rcx") _,
            out("r11") _,
        );
    }
    // SAFETY: as above; `x8` carries the number of the call and `x0` its result.
    #[cfg(target_arch = "aarch64")]
    unsafe {
        std::arch::asm!(
            "svc 0",
            "cbnz x0, 2f",
            "mov x0, {shared}",
            "bl {child}",
            "brk 0",
            "2:",
            shared = in(reg) shared,
            child = sym child,
            in("x8") libc::SYS_clone3,
            inlateout("x0") &raw const arguments => result,
            in("x1") size_of::<libc::clone_args>(),
        );
    }
    result
}

/// The child's whole life in this program. It allocates nothing, takes no lock and cannot panic:
/// other threads may have stood in the allocator when it was made.
extern "C" fn child(shared: *mut Shared<'_>) -> ! {
    // SAFETY: the pointer is to a local of `spawn`, which stands still (see `clone_and_run`).
    let shared = unsafe { &mut *shared };
    let Err((stage, errno)) = become_command(shared);
    shared.error = Some(SpawnError { stage, errno });
    // SAFETY: _exit ends the process and runs nothing of this program.
    unsafe { libc::_exit(127) }
}

fn become_command(shared: &Shared<'_>) -> Result<std::convert::Infallible, (Stage, Errno)> {
    let plan = shared.plan;
    let at = |stage| move |errno| (stage, errno);
    rustix::process::setsid().map_err(at(Stage::Prepare))?;
    for (target, source) in [0, 1, 2].into_iter().zip(plan.stdio) {
        // SAFETY: dup2 on descriptors of the child's own table; the targets are /dev/null there.
        if unsafe { libc::dup2(source.as_raw_fd(), target) } < 0 {
            return Err((Stage::Prepare, last_errno()));
        }
    }
    if plan.terminal {
        rustix::process::ioctl_tiocsctty(plan.stdio[0]).map_err(at(Stage::Prepare))?;
    }
    // Every descriptor of ours is close-on-exec already; this holds even if one is forgotten.
    // SAFETY: the call changes flags of the child's own descriptors and nothing else.
    unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3u32,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    // The soft limit of a login, as systemd sets it: programs that walk all possible descriptors
    // would be slow with the agent's own. It was raised there, so it can be lowered here.
    let limits = rustix::process::getrlimit(Resource::Nofile);
    let _ = rustix::process::setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limits.maximum.map(|maximum| maximum.min(1024)),
            maximum: limits.maximum,
        },
    );
    // The rustix calls are bare system calls for this thread. glibc's setuid would ask every other
    // thread it knows of to follow (nptl(7)), and those do not exist in this process.
    if rustix::process::geteuid().is_root() {
        rustix::thread::set_thread_groups(plan.groups).map_err(at(Stage::Identity))?;
        rustix::thread::set_thread_res_gid(plan.gid, plan.gid, plan.gid)
            .map_err(at(Stage::Identity))?;
        rustix::thread::set_thread_res_uid(plan.uid, plan.uid, plan.uid)
            .map_err(at(Stage::Identity))?;
    } else if plan.uid != rustix::process::geteuid() {
        return Err((Stage::Identity, Errno::PERM));
    }
    if let Err(errno) = rustix::process::chdir(plan.cwd) {
        if !plan.cwd_optional {
            return Err((Stage::Directory, errno));
        }
        rustix::process::chdir(c"/").map_err(at(Stage::Directory))?;
    }
    // SAFETY: the structures are initialised on this stack; the handlers were already cleared by
    // CLONE_CLEAR_SIGHAND, which leaves ignored signals ignored, so SIGPIPE is the only one left.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let mut none = MaybeUninit::<libc::sigset_t>::uninit();
        libc::sigemptyset(none.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut());
    }
    // SAFETY: `program` ends with a NUL, both lists end with a null pointer, and all of it lives in
    // the suspended parent.
    unsafe {
        libc::execve(
            plan.program.as_ptr(),
            shared.argv.as_ptr(),
            shared.env.as_ptr(),
        )
    };
    Err((Stage::Exec, last_errno()))
}

/// The error of the C library's last call. The child shares the variable with its parent's thread,
/// which stands still and does not look at it.
fn last_errno() -> Errno {
    // SAFETY: __errno_location returns the address of this thread's variable.
    Errno::from_raw_os_error(unsafe { *libc::__errno_location() })
}

// ---- the machine ----

/// Adds fresh bytes to the kernel's random pool and credits them, then has the generator take them
/// at once (random(4)).
pub(crate) fn add_entropy(random: BorrowedFd<'_>, bytes: &[u8]) -> rustix::io::Result<()> {
    /// The kernel takes more in several calls as well; a seed is 32 to 64 bytes.
    const BYTES_MAX: usize = 512;
    // _IOW('R', 0x03, int[2]) and _IO('R', 0x07), from linux/random.h.
    const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
    const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
    #[repr(C)]
    struct PoolInfo {
        entropy_bits: c_int,
        bytes: c_int,
        buffer: [u8; BYTES_MAX],
    }
    for part in bytes.chunks(BYTES_MAX) {
        let Ok(length) = c_int::try_from(part.len()) else {
            unreachable!("at most BYTES_MAX");
        };
        let mut info = PoolInfo {
            entropy_bits: length * 8,
            bytes: length,
            buffer: [0; BYTES_MAX],
        };
        info.buffer[..part.len()].copy_from_slice(part);
        // SAFETY: the kernel reads the two numbers and `bytes` bytes of the buffer behind them,
        // which has room for that many.
        result(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const info) })?;
    }
    // SAFETY: this request takes no argument.
    result(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) })
}

/// `EXT4_IOC_RESIZE_FS`: `_IOW('f', 16, __u64)` (fs/ext4/ext4.h).
const EXT4_IOC_RESIZE_FS: libc::Ioctl = 0x4008_6610;

/// Makes the ext4 file system that is mounted at `mount` so many of its blocks large; does nothing if
/// it is.
pub(crate) fn grow_ext4(mount: BorrowedFd<'_>, blocks: u64) -> rustix::io::Result<()> {
    // SAFETY: this request reads one 64-bit number, which lives until the call returns.
    result(unsafe { libc::ioctl(mount.as_raw_fd(), EXT4_IOC_RESIZE_FS, &raw const blocks) })
}

/// Has names of hosts looked up in /etc/hosts and by DNS, whatever the image's nsswitch.conf(5) says.
///
/// The services that it may name are libraries of the image. This program is static, and would load
/// them with the image's C library beside its own; the two that are named here are part of it.
pub(crate) fn look_up_hosts_by_ourselves() {
    unsafe extern "C" {
        /// Of the GNU C library (nss.h).
        fn __nss_configure_lookup(database: *const c_char, services: *const c_char) -> libc::c_int;
    }
    // SAFETY: both are strings that end with a NUL, and the function copies what it keeps. It is
    // called before there is a second thread. It fails only without memory, or for a database or a
    // specification that is none.
    unsafe { __nss_configure_lookup(c"hosts".as_ptr(), c"files dns".as_ptr()) };
}

// ---- the host, vsock(7) ----

/// Connects to a port of the host, in blocking mode as far as that goes, and returns the connection in
/// non-blocking mode. Takes 2 s at most, the kernel's own limit.
pub(crate) fn connect_to_host(port: u32) -> rustix::io::Result<OwnedFd> {
    /// `AF_VSOCK`, and the length of its addresses, as an address has them (linux/vm_sockets.h).
    const FAMILY: libc::sa_family_t = 40;
    const LENGTH: libc::socklen_t = 16;
    const {
        assert!(FAMILY as c_int == libc::AF_VSOCK);
        assert!(LENGTH as usize == size_of::<libc::sockaddr_vm>());
    }
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::VSOCK,
        rustix::net::SocketType::STREAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: sockaddr_vm is plain integers, for which zero is a valid value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = FAMILY;
    address.svm_cid = libc::VMADDR_CID_HOST;
    address.svm_port = port;
    // SAFETY: the descriptor is a socket, and the address a whole one of its family, which the kernel
    // reads during the call.
    let result = unsafe {
        libc::connect(
            socket.as_raw_fd(),
            (&raw const address).cast::<libc::sockaddr>(),
            LENGTH,
        )
    };
    if result != 0 {
        return Err(last_errno());
    }
    rustix::io::ioctl_fionbio(&socket, true)?;
    Ok(socket)
}

// ---- network interfaces, netdevice(7) ----

/// A socket to configure interfaces with.
pub(crate) fn internet_socket() -> rustix::io::Result<OwnedFd> {
    rustix::net::socket_with(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
}

/// A request about an interface, with nothing but its name, which is cut at 15 bytes.
fn request_about(interface: &str) -> libc::ifreq {
    // SAFETY: ifreq is plain bytes, for which zero is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name_bytes(interface)) {
        *to = from;
    }
    request
}

fn name_bytes(interface: &str) -> impl Iterator<Item = c_char> {
    let bytes = interface.bytes().take(libc::IFNAMSIZ - 1);
    bytes.map(|byte| c_char::from_ne_bytes([byte]))
}

/// Switches an interface on. The kernel gives the loopback one 127.0.0.1 then.
pub(crate) fn interface_up(socket: BorrowedFd<'_>, interface: &str) -> rustix::io::Result<()> {
    let mut request = request_about(interface);
    // SAFETY: the request is an initialised ifreq, which SIOCGIFFLAGS reads and fills.
    result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) })?;
    // SAFETY: SIOCGIFFLAGS filled this member of the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | 0x1; // IFF_UP
    // SAFETY: the request is an initialised ifreq, which SIOCSIFFLAGS reads.
    result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) })
}

/// Sets an interface's MAC address.
pub(crate) fn set_mac(
    socket: BorrowedFd<'_>,
    interface: &str,
    mac: [u8; 6],
) -> rustix::io::Result<()> {
    let mut request = request_about(interface);
    request.ifr_ifru.ifru_hwaddr = hardware(mac);
    // SAFETY: the request is an initialised ifreq, which SIOCSIFHWADDR reads.
    result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFHWADDR, &raw const request) })
}

/// Sets an interface's one IPv4 address, alone on its link, in place of another.
pub(crate) fn set_address(
    socket: BorrowedFd<'_>,
    interface: &str,
    address: Ipv4Addr,
) -> rustix::io::Result<()> {
    let mut request = request_about(interface);
    request.ifr_ifru.ifru_addr = internet(address);
    // SAFETY: the request is an initialised ifreq, which SIOCSIFADDR reads.
    result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFADDR, &raw const request) })?;
    request.ifr_ifru.ifru_netmask = internet(Ipv4Addr::BROADCAST);
    // SAFETY: the request is an initialised ifreq, which SIOCSIFNETMASK reads.
    result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFNETMASK, &raw const request) })
}

/// Adds a route to the host `to`, or to everything, through a gateway or on the link itself.
pub(crate) fn add_route(
    socket: BorrowedFd<'_>,
    interface: &str,
    to: Option<Ipv4Addr>,
    through: Option<Ipv4Addr>,
) -> rustix::io::Result<()> {
    let mut name = [0; libc::IFNAMSIZ];
    for (to, from) in name.iter_mut().zip(name_bytes(interface)) {
        *to = from;
    }
    // SAFETY: rtentry is plain numbers and a pointer, for which zero is a valid value.
    let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
    route.rt_dst = internet(to.unwrap_or(Ipv4Addr::UNSPECIFIED));
    route.rt_genmask = internet(match to {
        Some(_) => Ipv4Addr::BROADCAST,
        None => Ipv4Addr::UNSPECIFIED,
    });
    route.rt_flags = libc::RTF_UP;
    if to.is_some() {
        route.rt_flags |= libc::RTF_HOST;
    }
    if let Some(gateway) = through {
        route.rt_flags |= libc::RTF_GATEWAY;
        route.rt_gateway = internet(gateway);
    }
    route.rt_dev = name.as_mut_ptr();
    // SAFETY: the route is an initialised rtentry, which SIOCADDRT reads, and its name of an
    // interface is ended by a zero and lives through the call.
    result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCADDRT, &raw const route) })
}

/// Tells the kernel for good which MAC address a neighbour has (arp(7)).
pub(crate) fn set_neighbour(
    socket: BorrowedFd<'_>,
    interface: &str,
    address: Ipv4Addr,
    mac: [u8; 6],
) -> rustix::io::Result<()> {
    // SAFETY: arpreq is plain bytes, for which zero is a valid value.
    let mut request: libc::arpreq = unsafe { std::mem::zeroed() };
    request.arp_pa = internet(address);
    request.arp_ha = hardware(mac);
    request.arp_flags = libc::ATF_PERM | libc::ATF_COM;
    for (to, from) in request.arp_dev.iter_mut().zip(name_bytes(interface)) {
        *to = from;
    }
    // SAFETY: the request is an initialised arpreq, which SIOCSARP reads.
    result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSARP, &raw const request) })
}

/// An IPv4 address in the form of a `sockaddr_in` without a port: ip(7).
fn internet(address: Ipv4Addr) -> libc::sockaddr {
    /// `AF_INET`, which libc has as a wider number.
    const FAMILY: libc::sa_family_t = 2;
    let mut data = [0; 14];
    for (to, from) in data.iter_mut().skip(2).zip(address.octets()) {
        *to = c_char::from_ne_bytes([from]);
    }
    libc::sockaddr {
        sa_family: FAMILY,
        sa_data: data,
    }
}

/// A MAC address in the form the kernel takes it, of the family that Ethernet has there.
fn hardware(mac: [u8; 6]) -> libc::sockaddr {
    let mut data = [0; 14];
    for (to, from) in data.iter_mut().zip(mac) {
        *to = c_char::from_ne_bytes([from]);
    }
    libc::sockaddr {
        sa_family: libc::ARPHRD_ETHER,
        sa_data: data,
    }
}

/// Sends a signal to every process but the sender and PID 1.
pub(crate) fn kill_all(signal: rustix::process::Signal) -> rustix::io::Result<()> {
    // SAFETY: kill only sends a signal.
    result(unsafe { libc::kill(-1, signal.as_raw()) })
}

/// Makes the file system of `directory` write everything out and accept no more.
pub(crate) fn freeze(directory: BorrowedFd<'_>) -> rustix::io::Result<()> {
    // _IOWR('X', 119, int), from linux/fs.h.
    const FIFREEZE: libc::Ioctl = 0xC004_5877;
    // SAFETY: the kernel ignores the argument (fs/ioctl.c, ioctl_fsfreeze).
    result(unsafe { libc::ioctl(directory.as_raw_fd(), FIFREEZE, std::ptr::null::<c_void>()) })
}

fn result(result: c_int) -> rustix::io::Result<()> {
    if result < 0 {
        Err(last_errno())
    } else {
        Ok(())
    }
}

//! A network for whoever is not root: a user namespace, a network namespace in it, and `pasta` between
//! that and the host.
//!
//! [`enter`] moves the calling process to namespaces of its own, in which it may make devices and
//! firewalls as root may on the host: everything else in [`net`](super) works there unchanged. One
//! thread stays in the host's network namespace, and does what has to be done there
//! ([`HostSide::run`]): opening sockets that the host's programs connect to, asking the host's name
//! servers, and starting `pasta`, which passes on what leaves the namespace as connections of an ordinary
//! program of this user (<https://passt.top>, pasta(1)).
//!
//! `pasta` would reach whatever this user reaches, the host's own services at its addresses among it. So
//! the host's addresses are the namespace's too, also those it gets later: what is sent to them ends
//! there, and the same rules are for it as on a host.
//!
//! The namespaces end with the process and its children; nothing has to be taken down, and the host is
//! as it was.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read as _, Seek as _};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use netlink_packet_core::NLM_F_CREATE;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::LinkFlags;
use netlink_packet_route::{AddressFamily, route::RouteMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::MemfdFlags;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};
use rustix::thread::CapabilitySet;

use super::netlink::Netlink;
use super::{sys, tap};
use crate::error::{HostError, HostErrorKind};
use crate::os::Os;

/// The device through which the namespace reaches the host. Guests' devices have another prefix. The
/// firewall has a rule for it, which is to mean no device of anybody else.
pub(super) const UPLINK: &str = "up-smolvm";
/// Addresses of the link between the namespace and `pasta`, which nobody else sees: from
/// 192.0.0.0/29, which RFC 6333 (section 5.7) sets aside for such links.
const UPLINK_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 2);
const UPLINK_PREFIX: u8 = 29;
const UPLINK_GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 1);

/// Most time `pasta` may take until the namespace has its route.
const UPLINK_TIME: Duration = Duration::from_secs(10);

/// `RTNLGRP_IPV4_IFADDR`, linux/rtnetlink.h.
const ADDRESS_GROUP: u32 = 5;
/// `RTNLGRP_IPV4_ROUTE`, linux/rtnetlink.h.
const ROUTE_GROUP: u32 = 7;

/// The switch of Ubuntu's kernels (<https://discourse.ubuntu.com/t/spec/37626>): programs without an
/// AppArmor profile that permits it get user namespaces in which they have no rights.
const APPARMOR: &str = "kernel.apparmor_restrict_unprivileged_userns";

/// What keeps this user from having a network of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Obstacle {
    /// What is so, as half a sentence.
    pub why: String,
    /// What root can do about it.
    pub help: String,
}

fn setting(name: &str) -> Option<u64> {
    let path = Path::new("/proc/sys").join(name.replace('.', "/"));
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// What is known to keep this user from having a network of its own. `None` does not mean that it may:
/// [`enter`] tells.
#[must_use]
pub fn obstacle() -> Option<Obstacle> {
    let sysctl = |name: &str, now: u64, then: u64| {
        (setting(name) == Some(now)).then(|| Obstacle {
            why: format!("{name} is {now}, so this user may make no namespaces"),
            help: format!("have root run `sysctl -w {name}={then}`"),
        })
    };
    // The second is a switch of Debian's kernels before 2021, and of others.
    sysctl("user.max_user_namespaces", 0, 15_000)
        .or_else(|| sysctl("kernel.unprivileged_userns_clone", 0, 1))
        .or_else(|| {
            let mut open = fs::OpenOptions::new();
            let error = open.read(true).write(true).open(tap::TUN_DEVICE).err()?;
            Some(Obstacle {
                why: format!("{} cannot be opened: {error}", tap::TUN_DEVICE),
                help: match error.kind() {
                    io::ErrorKind::PermissionDenied => format!(
                        "have root run `chmod 0666 {}`, which gives no rights over the host's network",
                        tap::TUN_DEVICE
                    ),
                    _ => "have root run `modprobe tun`".to_owned(),
                },
            })
        })
}

/// What may keep a program from having a network of its own, depending on who it is; for saying why
/// [`enter`] failed.
#[must_use]
pub fn likely_obstacle() -> Option<Obstacle> {
    (setting(APPARMOR) == Some(1)).then(|| Obstacle {
        why: format!("{APPARMOR} is 1, and no AppArmor profile lets smolvm-keeper make namespaces"),
        help: format!(
            "have root run `sysctl -w {APPARMOR}=0`, or load an AppArmor profile for smolvm-keeper with \
             the rule `userns,`"
        ),
    })
}

type Job = Box<dyn FnOnce() + Send>;

/// Where the host's network is: with the calling thread, or with a thread that stayed there.
#[derive(Debug)]
pub struct HostSide {
    /// `None` if the calling thread is there itself.
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl HostSide {
    /// For a process that has not left the host's network.
    #[must_use]
    pub fn here() -> Self {
        Self {
            jobs: None,
            thread: None,
        }
    }

    fn new() -> io::Result<Self> {
        let (jobs, work) = mpsc::channel::<Job>();
        let thread = std::thread::Builder::new()
            .name("host-side".to_owned())
            .stack_size(256 * 1024)
            .spawn(move || {
                for job in work {
                    job();
                }
            })?;
        Ok(Self {
            jobs: Some(jobs),
            thread: Some(thread),
        })
    }

    /// Does something in the host's network namespace and waits for it.
    ///
    /// # Errors
    ///
    /// What `work` says; an error of its own if the thread has ended, which only a panic does.
    pub fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let Some(jobs) = &self.jobs else {
            return work();
        };
        let (give, take) = mpsc::channel();
        let job: Job = Box::new(move || {
            // Nobody waits any more: then nobody wants it.
            let _ = give.send(work());
        });
        let gone = || io::Error::other("the thread in the host's network has ended");
        jobs.send(job).map_err(|_| gone())?;
        take.recv().map_err(|_| gone())?
    }
}

impl Drop for HostSide {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Moves the calling process to a user namespace and a network namespace of its own, in which it has all
/// rights over that network and no more over anything else than before. Its user and group stay as they
/// are, so files belong to whom they did; other users' and supplementary groups cannot be given any more.
///
/// In the network namespace is a loopback device, with the host's addresses on it: what is sent to them
/// ends here, as it would on the host, and by the same rules. A thread watches the host for further ones
/// as long as the process lives.
///
/// The process must have one thread (unshare(2), `CLONE_NEWUSER`). Threads it starts later are in the
/// namespaces; the one in the [`HostSide`] is in the user namespace and the host's network.
///
/// # Errors
///
/// [`PermissionDenied`](HostErrorKind::PermissionDenied) where this user may not; [`obstacle`] and
/// [`likely_obstacle`] often know why. The process is to end then: it may be half way.
pub fn enter(os: &Os) -> Result<HostSide, HostError> {
    let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
    let namespace = Path::new("/proc/self/ns/user");
    os.effect(
        "enter a new namespace in place of",
        namespace,
        sys::unshare_user,
    )?;
    for (file, text) in [
        // Without this the group cannot be written by who is not root (user_namespaces(7)).
        ("setgroups", "deny".to_owned()),
        ("uid_map", format!("{0} {0} 1", user.as_raw())),
        ("gid_map", format!("{0} {0} 1", group.as_raw())),
    ] {
        let path = Path::new("/proc/self").join(file);
        os.effect("say who this user is in", &path, || fs::write(&path, text))?;
    }
    let host = os.effect(
        "start a thread in",
        Path::new("/proc/self/ns/net"),
        HostSide::new,
    )?;
    super::enter_new_namespace(os)?;
    os.effect("take over", Path::new("the host's addresses"), || {
        take_over_addresses(&host)
    })?;
    Ok(host)
}

/// Gives the calling thread's network the host's addresses, those of now and those to come.
fn take_over_addresses(host: &HostSide) -> io::Result<()> {
    // Their network stays the host's. The first is told of changes, before they are listed.
    let (changes, mut hosts) = host.run(|| {
        let mut changes = Netlink::open(NETLINK_ROUTE)?;
        changes.socket().add_membership(ADDRESS_GROUP)?;
        Ok((changes, Netlink::open(NETLINK_ROUTE)?))
    })?;
    let mut route = Netlink::open(NETLINK_ROUTE)?;
    /// The loopback device's number in every network namespace (net/core/dev.c).
    const LOOPBACK: u32 = 1;
    let mut up = tap::link(LOOPBACK);
    up.header.flags = LinkFlags::Up;
    up.header.change_mask = LinkFlags::Up;
    tap::ask(&mut route, [(RouteNetlinkMessage::SetLink(up), 0)])?;
    // One that the host has no more stays: nobody else has it, or it is the host's again soon.
    let mut local = BTreeSet::new();
    let mut follow = move || -> io::Result<()> {
        for address in addresses(&mut hosts)? {
            if local.insert(address) {
                let message = RouteNetlinkMessage::NewAddress(tap::address(LOOPBACK, address));
                tap::ask(&mut route, [(message, NLM_F_CREATE)])?;
            }
        }
        Ok(())
    };
    follow()?;
    let watch = move || -> io::Result<()> {
        loop {
            let mut fds = [PollFd::from_borrowed_fd(changes.as_fd(), PollFlags::IN)];
            rustix::io::retry_on_intr(|| poll(&mut fds, None))?;
            match changes.pending() {
                // More changes than there was room for: which ones does not matter.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                other => drop(other?),
            }
            follow()?;
        }
    };
    std::thread::Builder::new()
        .name("host-addresses".to_owned())
        .stack_size(256 * 1024)
        .spawn(move || {
            let mut watch = watch;
            if let Err(error) = watch() {
                tracing::error!(%error, "the host's addresses are not followed any more");
            }
        })
        .map(drop)
}

/// The IPv4 addresses of a socket's network namespace, but for those of loopback.
fn addresses(route: &mut Netlink) -> io::Result<Vec<Ipv4Addr>> {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet;
    let entries = tap::dump(route, RouteNetlinkMessage::GetAddress(message))?;
    let found = entries
        .into_iter()
        .filter_map(|entry| match entry {
            RouteNetlinkMessage::NewAddress(address) => Some(address.attributes),
            _ => None,
        })
        .flatten()
        .filter_map(|attribute| match attribute {
            AddressAttribute::Local(std::net::IpAddr::V4(address)) => Some(address),
            _ => None,
        })
        .filter(|address| !address.is_loopback())
        .collect();
    Ok(found)
}

/// `pasta`, for as long as this lives: it is killed when this is dropped, and by the kernel when the
/// process ends in any other way.
#[derive(Debug)]
pub struct Uplink {
    child: Child,
    process: OwnedFd,
}

impl Uplink {
    /// Starts `pasta`, the program at `program`, for the network namespace of the calling thread, and
    /// waits until that has its default route. Ports of the host are not passed to the namespace, nor
    /// does it reach services on the host's loopback device.
    ///
    /// # Errors
    ///
    /// With what `pasta` said last if it ends; an error after 10 s of waiting for it.
    pub fn start(os: &Os, program: &Path, host: &HostSide) -> Result<Self, HostError> {
        let doing = "connect this network to the host with";
        let failed = |error| HostError::io(doing, program, error);
        // Before it is there, so that its coming is not missed.
        let mut routes = Netlink::open(NETLINK_ROUTE).map_err(failed)?;
        routes
            .socket()
            .add_membership(ROUTE_GROUP)
            .map_err(failed)?;
        let says = rustix::fs::memfd_create("pasta", MemfdFlags::CLOEXEC)
            .map_err(|error| failed(error.into()))?;
        let mut says = fs::File::from(says);
        let copy = says.try_clone().map_err(failed)?;
        // Given as a descriptor: /proc/PID/ns/net of a process with more rights is closed to others.
        let namespace = fs::File::open("/proc/thread-self/ns/net").map_err(failed)?;
        let path = program.to_owned();
        let mut uplink = os.effect(doing, program, || {
            let child = host.run(move || start(&path, namespace, copy))?;
            Self::hold(child)
        })?;
        let outcome = uplink.wait_for_route(&routes);
        outcome.map_err(|error| {
            let mut text = String::new();
            let _ = says.rewind();
            let _ = says.read_to_string(&mut text);
            let last: Vec<_> = text
                .lines()
                .filter(|line| !line.is_empty() && !line.contains("syslog"))
                .collect();
            let why = match last.last_chunk::<3>() {
                Some(lines) => lines.join("; "),
                None => last.join("; "),
            };
            let kind = HostErrorKind::from(error.kind());
            let error = if why.is_empty() {
                error
            } else {
                io::Error::other(format!("{error}: {why}"))
            };
            HostError::io(doing, program, error).with_kind(kind)
        })?;
        Ok(uplink)
    }

    fn hold(mut child: Child) -> io::Result<Self> {
        let process = i32::try_from(child.id())
            .ok()
            .and_then(Pid::from_raw)
            .ok_or_else(|| io::Error::other("the process number is out of range"))
            .and_then(|pid| Ok(pidfd_open(pid, PidfdFlags::empty())?));
        match process {
            Ok(process) => Ok(Self { child, process }),
            Err(error) => {
                end(&mut child);
                Err(error)
            }
        }
    }

    fn wait_for_route(&mut self, routes: &Netlink) -> io::Result<()> {
        let deadline = Instant::now() + UPLINK_TIME;
        loop {
            for answer in routes.pending()? {
                if tap::parse(&answer).is_ok_and(|message| is_default_route(&message)) {
                    return Ok(());
                }
            }
            if let Some(status) = self.child.try_wait()? {
                return Err(io::Error::other(format!("it ended with {status}")));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let mut fds = [
                PollFd::from_borrowed_fd(routes.as_fd(), PollFlags::IN),
                PollFd::new(&self.process, PollFlags::IN),
            ];
            let left = Timespec::try_from(left).map_err(io::Error::other)?;
            rustix::io::retry_on_intr(|| poll(&mut fds, Some(&left)))?;
        }
    }
}

/// A descriptor that can be read once `pasta` has ended, which it does not do by itself.
impl AsFd for Uplink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.process.as_fd()
    }
}

impl Drop for Uplink {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

fn end(child: &mut Child) {
    // Neither fails for a child that was not waited for: kill(2), waitpid(2).
    let _ = child.kill();
    let _ = child.wait();
}

fn is_default_route(message: &RouteNetlinkMessage) -> bool {
    let is_default = |route: &RouteMessage| {
        route.header.destination_prefix_length == 0
            && route.header.address_family == AddressFamily::Inet
    };
    matches!(message, RouteNetlinkMessage::NewRoute(route) if is_default(route))
}

/// Starts `pasta` from the thread on the host's side, whose network it gets.
fn start(program: &Path, namespace: fs::File, says: fs::File) -> io::Result<Child> {
    // What it needs to join the namespace and to make a device there; its program file gives it
    // nothing (capabilities(7), ambient set). They are the calling thread's, which runs nothing else.
    let rights = [CapabilitySet::SYS_ADMIN, CapabilitySet::NET_ADMIN];
    let mut sets = rustix::thread::capabilities(None)?;
    for right in rights {
        sets.inheritable |= right;
    }
    rustix::thread::set_capabilities(None, sets)?;
    for right in rights {
        rustix::thread::configure_capability_in_ambient_set(right, true)?;
    }
    let address = UPLINK_ADDRESS.to_string();
    let gateway = UPLINK_GATEWAY.to_string();
    let prefix = UPLINK_PREFIX.to_string();
    let mut command = Command::new(program);
    command
        .args(["--foreground", "--quiet", "--config-net", "--ipv4-only"])
        .args(["--netns-only", "--netns", "/proc/self/fd/0"])
        .args(["--ns-ifname", UPLINK, "--address", &address])
        .args(["--netmask", &prefix, "--gateway", &gateway])
        .args(["--no-map-gw"])
        .args(["--no-dhcp", "--no-dhcpv6", "--no-ndp", "--no-ra"])
        .args(["--tcp-ports", "none", "--udp-ports", "none"])
        .args(["--tcp-ns", "none", "--udp-ns", "none"])
        .env_clear()
        .current_dir("/")
        .stdin(namespace)
        .stdout(Stdio::null())
        .stderr(says);
    crate::sys::die_with_parent(&mut command, Signal::KILL);
    let child = command.spawn();
    rustix::thread::clear_ambient_capability_set()?;
    child
}

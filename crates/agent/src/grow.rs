//! Making the writable layer's file system as large as its disk.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};
use smolvm_proto::message::{Failure, FailureKind, GrowRequest};

use crate::failure::{failure, from_errno};
use crate::serve::Agent;
use crate::stream::{Last, timespec};
use crate::sys;

/// How long the guest's kernel may take to see what the host did to the disk.
const NOTICE_WAIT: Duration = Duration::from_secs(10);

/// Bytes of the unit in which sysfs gives a disk's size, whatever its blocks are.
const SECTOR_BYTES: u64 = 512;

/// The kernel's own group of uevents; the other is udev's (lib/kobject_uevent.c).
const KERNEL_GROUP: u32 = 1;

/// Carries the request out.
pub(crate) fn grow(agent: &Agent, request: &GrowRequest) -> Result<Last, Failure> {
    let upper = agent
        .disks
        .as_ref()
        .and_then(|disks| disks.upper.as_ref())
        .ok_or_else(|| {
            let what = "growing the disk: there is none that is ours";
            failure(FailureKind::InvalidInput, what)
        })?;
    wait_for_size(upper.as_fd(), request.bytes)?;
    fill_disk(upper.as_fd()).map_err(|errno| from_errno("growing the file system", errno))?;
    Ok(Last::done())
}

/// Makes the ext4 file system that is mounted there as large as its disk; does nothing if it is.
pub(crate) fn fill_disk(upper: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let status = rustix::fs::fstatvfs(upper)?;
    let bytes = disk_bytes(upper)?;
    sys::grow_ext4(upper, bytes / status.f_frsize.max(1))
}

/// Waits until the kernel goes by this size of the disk: it is told by an interrupt, and tells others
/// by an event (virtblk_config_changed, `set_capacity_and_notify`).
fn wait_for_size(upper: BorrowedFd<'_>, bytes: u64) -> Result<(), Failure> {
    let doing = "waiting for the disk to be larger";
    let failed = |errno| from_errno(doing, errno);
    // Listening before looking, so that nothing is missed in between.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let events = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        flags,
        Some(KOBJECT_UEVENT),
    )
    .map_err(failed)?;
    rustix::net::bind(&events, &SocketAddrNetlink::new(0, KERNEL_GROUP)).map_err(failed)?;
    let deadline = Instant::now() + NOTICE_WAIT;
    while disk_bytes(upper).map_err(failed)? < bytes {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let what = format!("{doing}: the kernel has not noticed within {NOTICE_WAIT:?}");
            return Err(failure(FailureKind::Io, what));
        }
        let mut fds = [PollFd::new(&events, PollFlags::IN)];
        match rustix::event::poll(&mut fds, Some(&timespec(left))) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(failed(errno)),
        }
        // What they say does not matter, nor whether some were lost.
        let mut buffer = [0; 4096];
        while rustix::net::recv(&events, &mut buffer[..], RecvFlags::empty()).is_ok() {}
    }
    Ok(())
}

/// Bytes of the disk on which this is.
fn disk_bytes(file: BorrowedFd<'_>) -> rustix::io::Result<u64> {
    let device = rustix::fs::fstat(file)?.st_dev;
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/size"))
        .ok()
        .and_then(|text| text.trim().parse::<u64>().ok())
        .map(|sectors| sectors.saturating_mul(SECTOR_BYTES))
        .ok_or(Errno::NODEV)
}

//! Devices that appear when they like, and the host's end of the port.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, epoll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::stream::timespec;

/// A device did not appear, or could not be waited for.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WaitError {
    /// The deadline passed.
    #[error("it did not appear in time")]
    TimedOut,
    /// The kernel refused to watch /dev.
    #[error("watching /dev: {0}")]
    Watch(Errno),
}

/// Waits until `look` finds something, looking again whenever a node appears in /dev.
pub(crate) fn wait_for<T>(
    look: impl Fn() -> Option<T>,
    deadline: Option<Instant>,
) -> Result<T, WaitError> {
    // The common case, without the cost of a watch.
    if let Some(found) = look() {
        return Ok(found);
    }
    let watch =
        inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).map_err(WaitError::Watch)?;
    // A port's name in sysfs is there before its node in /dev, so the node is enough to watch.
    inotify::add_watch(&watch, "/dev", WatchFlags::CREATE | WatchFlags::MOVED_TO)
        .map_err(WaitError::Watch)?;
    loop {
        // Looked at after the watch began, so whatever appears later wakes it.
        if let Some(found) = look() {
            return Ok(found);
        }
        let left = deadline
            .unwrap_or_else(Instant::now)
            .saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(WaitError::TimedOut);
        }
        let mut fds = [PollFd::new(&watch, PollFlags::IN)];
        match rustix::event::poll(&mut fds, Some(&timespec(left))) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(WaitError::Watch(error)),
        }
        // What exactly appeared does not matter.
        while matches!(rustix::io::read(&watch, &mut [0u8; 4096]), Ok(length) if length > 0) {}
    }
}

/// The node of the virtio port the host named `name`, if both are there.
pub(crate) fn port_path(name: &str) -> Option<PathBuf> {
    std::fs::read_dir("/sys/class/virtio-ports")
        .ok()?
        .flatten()
        .find(|port| {
            std::fs::read_to_string(port.path().join("name"))
                .is_ok_and(|found| found.trim_end() == name)
        })
        .map(|port| Path::new("/dev").join(port.file_name()))
        .filter(|node| node.exists())
}

/// Opens the port. The kernel gives it to one opener only, so nobody else can.
pub(crate) fn open_port(path: &Path) -> rustix::io::Result<OwnedFd> {
    rustix::fs::open(
        path,
        OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY,
        Mode::empty(),
    )
}

/// Waits until the host's end of the port is open.
///
/// poll(2) returns at once while it is closed, with HUP. The port wakes its waiters when that
/// changes (`handle_control_message`, drivers/char/virtio_console.c), and an edge-triggered epoll
/// tells of each such wake-up exactly once.
pub(crate) fn wait_for_host(port: &OwnedFd) -> rustix::io::Result<()> {
    let is_connected = || {
        let mut fds = [PollFd::new(port, PollFlags::OUT)];
        rustix::event::poll(&mut fds, Some(&timespec(std::time::Duration::ZERO)))
            .map(|_| !fds[0].revents().contains(PollFlags::HUP))
    };
    if is_connected()? {
        return Ok(());
    }
    let changes = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(
        &changes,
        port,
        epoll::EventData::new_u64(0),
        epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET,
    )?;
    while !is_connected()? {
        let mut events = Vec::with_capacity(1);
        match epoll::wait(&changes, rustix::buffer::spare_capacity(&mut events), None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

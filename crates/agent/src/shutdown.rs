//! The way down: processes first, then the disks.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::process::{Pid, Signal};
use smolvm_proto::message::{Failure, FailureKind, ShutdownRequest};

use crate::console;
use crate::failure::failure;
use crate::reap::Reaper;
use crate::serve::Agent;
use crate::stream::Last;
use crate::sys;
use std::os::fd::AsFd;

/// How long killed processes may take to be gone. One that waits for a device may take for ever.
const KILL_WAIT: Duration = Duration::from_secs(5);

/// Most grace a host may ask for; a longer wish is cut to it.
const GRACE_MAX: Duration = Duration::from_secs(3600);

/// The disks the root is made of.
#[derive(Debug)]
pub(crate) struct Disks {
    /// The mount of the upper file system. It has no path any more.
    pub(crate) upper: Option<OwnedFd>,
}

/// Ends every process and leaves the disks clean.
pub(crate) fn shutdown(agent: &Agent, request: &ShutdownRequest) -> Result<Last, Failure> {
    if agent.stopping.swap(true, Ordering::AcqRel) {
        return Err(failure(
            FailureKind::ShuttingDown,
            "the machine is going down already",
        ));
    }
    // One that stands still could not end by itself.
    if let Some(cgroups) = &agent.cgroups {
        cgroups.let_go();
    }
    let now = Instant::now();
    let grace = Duration::from_millis(request.grace_ms).min(GRACE_MAX);
    if !grace.is_zero() {
        signal_everyone(Signal::TERM);
    }
    let reaper = &agent.reaper;
    if !reaper.wait_until_childless(now + grace, || ()) {
        kill_everyone(reaper);
    }
    match &agent.disks {
        Some(disks) => disks.quiesce()?,
        None => rustix::fs::sync(),
    }
    Ok(Last::done())
}

/// Ends what commands have left running, and writes everything to the disk.
pub(crate) fn settle(agent: &Agent) -> Last {
    kill_everyone(&agent.reaper);
    rustix::fs::sync();
    Last::done()
}

/// Kills every process but this one, and waits until they are gone.
pub(crate) fn kill_everyone(reaper: &Reaper) {
    signal_everyone(Signal::KILL);
    // Again after each death: outside PID 1 the next generation becomes visible only then.
    let again = || signal_everyone(Signal::KILL);
    if !reaper.wait_until_childless(Instant::now() + KILL_WAIT, again) {
        console::say("some processes do not die; going on without them");
    }
}

/// Signals every process but this one.
fn signal_everyone(signal: Signal) {
    if rustix::process::getpid().is_init() {
        // To all but init and the sender (kill(2)); kernel threads ignore it.
        let _ = sys::kill_all(signal);
        return;
    }
    for pid in descendants() {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// The processes below this one, when it is not the machine's first.
fn descendants() -> Vec<Pid> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let parents: Vec<(i32, i32)> = entries
        .filter_map(|entry| {
            let pid: i32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let (_, fields) = stat.rsplit_once(") ")?;
            Some((pid, fields.split(' ').nth(1)?.parse().ok()?))
        })
        .collect();
    let mut found = vec![rustix::process::getpid().as_raw_pid()];
    let mut at = 0;
    while at < found.len() {
        let parent = found[at];
        found.extend(
            parents
                .iter()
                .filter(|(_, of)| *of == parent)
                .map(|(pid, _)| *pid),
        );
        at += 1;
    }
    found.drain(1..).filter_map(Pid::from_raw).collect()
}

impl Disks {
    /// Writes everything out and makes the disks read-only, so that they are clean.
    fn quiesce(&self) -> Result<(), Failure> {
        rustix::fs::sync();
        unmount_others();
        let read_only = MountFlags::RDONLY | MountFlags::NOATIME;
        let root = rustix::mount::mount_remount("/", read_only, c"");
        let Some(upper) = &self.upper else {
            return Ok(());
        };
        // The mount is reached through its descriptor; a link in /proc leads to it.
        let path = format!("/proc/self/fd/{}", upper.as_raw_fd());
        let remounted = root.and_then(|()| rustix::mount::mount_remount(&path, read_only, c""));
        match remounted {
            Ok(()) => Ok(()),
            // A process that does not die may hold a file open for writing. A frozen file system is
            // as clean as an unmounted one (ext4_freeze).
            Err(remount) => sys::freeze(upper.as_fd()).map_err(|freeze| {
                failure(
                    FailureKind::Io,
                    format!(
                        "making the disk clean: remounting it read-only: {remount}; \
                         freezing it: {freeze}"
                    ),
                )
            }),
        }
    }
}

/// Unmounts what commands have mounted. What cannot be is left: its disk is not ours.
fn unmount_others() {
    let Ok(mounts) = std::fs::read("/proc/self/mounts") else {
        return;
    };
    let mounts = String::from_utf8_lossy(&mounts);
    let others: Vec<&str> = mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            let target = fields.nth(1)?;
            let kind = fields.next()?;
            let is_ours = target == "/"
                || matches!(
                    kind,
                    "proc" | "sysfs" | "devtmpfs" | "devpts" | "cgroup2" | "tmpfs"
                );
            (!is_ours).then_some(target)
        })
        .collect();
    for target in others.into_iter().rev() {
        let target = unescape(target);
        let _ = rustix::mount::unmount(target.as_slice(), UnmountFlags::NOFOLLOW);
        // Opened before it can be written again: nothing is left to wait for.
        if let Ok(directory) = rustix::fs::open(
            target.as_slice(),
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        ) {
            let _ = rustix::fs::syncfs(&directory);
        }
    }
}

/// fstab(5): blanks and backslashes are written as octal numbers.
fn unescape(text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((byte, after)) = rest.split_first() {
        let octal = after
            .first_chunk::<3>()
            .filter(|_| *byte == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal {
            Some(value) => {
                out.push(value);
                rest = &after[3..];
            }
            None => {
                out.push(*byte);
                rest = after;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_mount_points_are_read_back() {
        assert_eq!(unescape("/mnt/a\\040b\\134"), b"/mnt/a b\\");
        assert_eq!(unescape("/plain\\9"), b"/plain\\9");
    }
}

//! Processes that are not our children, named so that a recycled number is never mistaken.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use crate::error::{HostError, HostErrorKind};

/// One process, for ever: the number alone is reused, with start time and boot it is not.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// The process number, above 0.
    pub pid: i32,
    /// When it started, in clock ticks (100 per second) since boot: field 22 of
    /// `/proc/<pid>/stat`, see `proc_pid_stat(5)`.
    pub start_time_ticks: u64,
    /// The boot it belongs to: `/proc/sys/kernel/random/boot_id`, a UUID. After a reboot both
    /// other fields may come up again.
    pub boot_id: String,
}

/// What [`ProcessIdentity::kill_and_wait`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Killed {
    /// It ended because of the call, or while the call ran.
    Now,
    /// It had ended before.
    Before,
}

impl ProcessIdentity {
    /// The process that has this number now, or `None` if there is none or it is a zombie.
    ///
    /// # Errors
    ///
    /// If `/proc` cannot be read.
    pub fn of(pid: i32) -> Result<Option<Self>, HostError> {
        match read_stat(pid)? {
            Some(stat) if !stat.dead() => Ok(Some(Self {
                pid,
                start_time_ticks: stat.start_time_ticks,
                boot_id: boot_id()?,
            })),
            _ => Ok(None),
        }
    }

    /// Whether the process still runs. A zombie does not: nothing of it is left but its exit code.
    ///
    /// # Errors
    ///
    /// If `/proc` cannot be read.
    pub fn is_alive(&self) -> Result<bool, HostError> {
        Ok(self.same(read_stat(self.pid)?) && boot_id()? == self.boot_id)
    }

    /// The words with which whoever has the number now was started; none if nobody has it. They are this
    /// process's if it is alive after that.
    #[must_use]
    pub fn arguments(&self) -> Vec<OsString> {
        command_line(&self.pid.to_string()).unwrap_or_default()
    }

    /// A descriptor of the process that becomes readable when it ends, or `None` if it has ended.
    ///
    /// The number is checked again *after* the descriptor is open: from then on the descriptor
    /// means that process and no other, pidfd_open(2).
    ///
    /// # Errors
    ///
    /// If `/proc` cannot be read, or no descriptors are left.
    pub fn open(&self) -> Result<Option<OwnedFd>, HostError> {
        let Some(pid) = Pid::from_raw(self.pid).filter(|_| self.pid > 0) else {
            return Ok(None);
        };
        if boot_id()? != self.boot_id {
            return Ok(None);
        }
        let fd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            // EINVAL: the number belongs to a thread that is not a group leader.
            Err(rustix::io::Errno::SRCH | rustix::io::Errno::INVAL) => return Ok(None),
            Err(e) => return Err(self.error("open", e.into())),
        };
        Ok(self.same(read_stat(self.pid)?).then_some(fd))
    }

    /// Kills the process with SIGKILL and waits until it has ended, at most `timeout`. Never
    /// signals another process that has got the number since. Idempotent.
    ///
    /// The process has ended when this returns, though its parent may not have reaped it yet.
    ///
    /// # Errors
    ///
    /// [`PermissionDenied`](HostErrorKind::PermissionDenied) if it belongs to another user;
    /// [`Other`](HostErrorKind::Other) if it has not ended in time, which a process stuck in the
    /// kernel does: the signal stays pending then.
    pub fn kill_and_wait(&self, timeout: Duration) -> Result<Killed, HostError> {
        self.signal_and_wait(Signal::KILL, timeout)
    }

    /// As [`ProcessIdentity::kill_and_wait`], asking with SIGTERM, which the process may ignore.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn terminate_and_wait(&self, timeout: Duration) -> Result<Killed, HostError> {
        self.signal_and_wait(Signal::TERM, timeout)
    }

    /// Sends SIGKILL and does not wait for the end. Succeeds if it has ended already.
    ///
    /// # Errors
    ///
    /// [`PermissionDenied`](HostErrorKind::PermissionDenied) if it belongs to another user.
    pub fn kill(&self) -> Result<(), HostError> {
        let Some(fd) = self.open()? else {
            return Ok(());
        };
        match pidfd_send_signal(&fd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(e) => Err(self.error("signal", e.into())),
        }
    }

    fn signal_and_wait(&self, signal: Signal, timeout: Duration) -> Result<Killed, HostError> {
        let Some(fd) = self.open()? else {
            return Ok(Killed::Before);
        };
        match pidfd_send_signal(&fd, signal) {
            Ok(()) => {}
            Err(rustix::io::Errno::SRCH) => return Ok(Killed::Before),
            Err(e) => return Err(self.error("signal", e.into())),
        }
        if wait_readable(&fd, Some(timeout)).map_err(|e| self.error("wait for", e))? {
            Ok(Killed::Now)
        } else {
            Err(self.error("end", io::ErrorKind::TimedOut.into()))
        }
    }

    fn same(&self, stat: Option<Stat>) -> bool {
        stat.is_some_and(|s| !s.dead() && s.start_time_ticks == self.start_time_ticks)
    }

    fn error(&self, doing: &'static str, source: io::Error) -> HostError {
        HostError::new(
            HostErrorKind::from(source.kind()),
            doing,
            format!("the process {}", self.pid),
        )
        .because(source)
    }
}

/// Numbers of the processes that were started with this argument, by `/proc/<pid>/cmdline`.
///
/// # Errors
///
/// If `/proc` cannot be read. Processes that end meanwhile are passed over.
pub fn with_argument(argument: &OsStr) -> Result<Vec<u32>, HostError> {
    let failed = |source: io::Error| {
        HostError::new(HostErrorKind::from(source.kind()), "list", "/proc").because(source)
    };
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else {
            continue;
        };
        let Ok(words) = command_line(&pid.to_string()) else {
            continue;
        };
        if words.iter().any(|word| word == argument) {
            found.push(pid);
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// The words of `/proc/<pid>/cmdline`, proc_pid_cmdline(5).
fn command_line(pid: &str) -> io::Result<Vec<OsString>> {
    let line = fs::read(format!("/proc/{pid}/cmdline"))?;
    let words = line.split(|byte| *byte == 0);
    Ok(words
        .map(|word| OsStr::from_bytes(word).to_owned())
        .collect())
}

/// Waits until `fd` is readable; `false` if `timeout` passes first.
pub(crate) fn wait_readable(
    fd: &impl std::os::fd::AsFd,
    timeout: Option<Duration>,
) -> io::Result<bool> {
    let deadline = timeout.and_then(|t| Instant::now().checked_add(t));
    loop {
        let left = deadline
            .map(|d| d.saturating_duration_since(Instant::now()))
            .map(|d| {
                Timespec::try_from(d).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
            })
            .transpose()?;
        match poll(&mut [PollFd::new(fd, PollFlags::IN)], left.as_ref()) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// The identity of this boot, a UUID.
///
/// # Errors
///
/// If `/proc` cannot be read.
pub fn boot_id() -> Result<String, HostError> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text = fs::read_to_string(path).map_err(|e| HostError::io("read", path, e))?;
    Ok(text.trim_end().to_owned())
}

/// How long a process had to wait for a processor, since it started: the time its threads were ready
/// to run and did not, of the one that waited longest. Never more than the process is old.
///
/// `None` if there is no such process, or the kernel does not count (`CONFIG_SCHED_INFO`).
#[must_use]
pub fn waited_for_processor(pid: u32) -> Option<Duration> {
    fs::read_dir(format!("/proc/{pid}/task"))
        .ok()?
        // A thread may end meanwhile.
        .filter_map(|thread| fs::read_to_string(thread.ok()?.path().join("schedstat")).ok())
        .filter_map(|text| parse_waited(&text))
        .max()
}

/// The second of three numbers, in nanoseconds: "time spent waiting on a runqueue"
/// (Documentation/scheduler/sched-stats.rst).
fn parse_waited(text: &str) -> Option<Duration> {
    let field = text.split_ascii_whitespace().nth(1)?;
    field.parse().ok().map(Duration::from_nanos)
}

#[derive(Debug, PartialEq, Eq)]
struct Stat {
    state: u8,
    start_time_ticks: u64,
}

impl Stat {
    /// Zombie (Z) or dead (X, x): `proc_pid_stat(5)`.
    fn dead(&self) -> bool {
        matches!(self.state, b'Z' | b'X' | b'x')
    }
}

fn read_stat(pid: i32) -> Result<Option<Stat>, HostError> {
    let path = format!("/proc/{pid}/stat");
    let path = Path::new(&path);
    match fs::read(path) {
        Ok(bytes) => parse_stat(&bytes)
            .map(Some)
            .ok_or_else(|| HostError::io("read", path, io::ErrorKind::InvalidData.into())),
        // ESRCH: it ended between open and read.
        Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH) => {
            Ok(None)
        }
        Err(e) => Err(HostError::io("read", path, e)),
    }
}

/// The command's name, field 2, is in parentheses and may itself hold spaces and parentheses, so
/// the fields are counted from the *last* closing one.
fn parse_stat(bytes: &[u8]) -> Option<Stat> {
    let end = bytes.iter().rposition(|b| *b == b')')?;
    let rest = std::str::from_utf8(&bytes[end + 1..]).ok()?;
    let mut fields = rest.split_ascii_whitespace();
    let state = *fields.next()?.as_bytes().first()?;
    // Field 3 is taken, so field 22 is 18 further on.
    let start_time_ticks = fields.nth(18)?.parse().ok()?;
    Some(Stat {
        state,
        start_time_ticks,
    })
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn sleeper() -> std::process::Child {
        Command::new("sleep")
            .arg("1000")
            .stdin(Stdio::null())
            .spawn()
            .unwrap()
    }

    fn identity(child: &std::process::Child) -> ProcessIdentity {
        ProcessIdentity::of(child.id().cast_signed())
            .unwrap()
            .unwrap()
    }

    #[test]
    fn a_process_is_found_by_its_argument() {
        let mut child = std::process::Command::new("sh")
            .args(["-c", "echo; read line", "a test", "/a/file of this test"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("a shell");
        // The kernel shows the arguments a moment after the program runs.
        let said = child.stdout.as_mut().expect("a pipe");
        io::Read::read_exact(said, &mut [0]).expect("a line");
        let found = with_argument("/a/file of this test".as_ref()).expect("/proc");
        let none = with_argument("/a/file of this".as_ref()).expect("/proc");
        child.kill().expect("killed");
        child.wait().expect("gone");
        assert_eq!(found, [child.id()]);
        assert!(none.is_empty(), "{none:?}");
    }

    #[test]
    fn a_name_full_of_parentheses_does_not_shift_the_fields() {
        let line = b"42 (a) R (b) 1 2) S 1 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 987654 1 2";
        assert_eq!(
            parse_stat(line),
            Some(Stat {
                state: b'S',
                start_time_ticks: 987_654
            })
        );
        assert_eq!(parse_stat(b"42 (a) S 1 2 3"), None);
        assert_eq!(parse_stat(b""), None);
    }

    #[test]
    fn the_time_on_a_run_queue_is_the_second_number() {
        let waited = parse_waited("6209120 3050975 17\n");
        assert_eq!(waited, Some(Duration::from_nanos(3_050_975)));
        assert_eq!(parse_waited("1"), None);
        assert_eq!(parse_waited("1 x 2"), None);
        // Above the kernel's largest number.
        assert_eq!(waited_for_processor(1 << 30), None);
    }

    #[test]
    fn we_are_alive_and_a_changed_identity_is_not() {
        let me = ProcessIdentity::of(std::process::id().cast_signed())
            .unwrap()
            .unwrap();
        assert!(me.is_alive().unwrap());
        let later = ProcessIdentity {
            start_time_ticks: me.start_time_ticks + 1,
            ..me.clone()
        };
        let rebooted = ProcessIdentity {
            boot_id: "00000000-0000-0000-0000-000000000000".to_owned(),
            ..me
        };
        for other in [later, rebooted] {
            assert!(!other.is_alive().unwrap());
            assert!(other.open().unwrap().is_none());
            // If this signalled, the test would die.
            assert_eq!(
                other.kill_and_wait(Duration::from_secs(1)).unwrap(),
                Killed::Before
            );
        }
    }

    #[test]
    fn killing_waits_for_the_end_and_a_zombie_is_dead() {
        let mut child = sleeper();
        let id = identity(&child);
        assert!(id.is_alive().unwrap());
        assert_eq!(
            id.kill_and_wait(Duration::from_secs(10)).unwrap(),
            Killed::Now
        );
        // Not reaped yet, so the number is still taken, by a zombie.
        assert!(!id.is_alive().unwrap());
        assert_eq!(
            id.kill_and_wait(Duration::from_secs(10)).unwrap(),
            Killed::Before
        );
        assert!(ProcessIdentity::of(id.pid).unwrap().is_none());
        child.wait().unwrap();
        assert!(!id.is_alive().unwrap());
    }

    #[test]
    fn a_process_that_ignores_the_request_times_out() {
        let mut child = Command::new("sh")
            .args(["-c", "trap '' TERM; echo ready; read x"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0; 6];
        io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
        let id = identity(&child);
        let error = id
            .terminate_and_wait(Duration::from_millis(20))
            .unwrap_err();
        assert_eq!(error.kind(), HostErrorKind::Other);
        assert!(error.to_string().starts_with("cannot end the process"));
        id.kill_and_wait(Duration::from_secs(10)).unwrap();
        child.wait().unwrap();
    }
}

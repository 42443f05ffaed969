//! Waiting, on what can be watched and never longer than [`PATIENCE`].

use std::fs::read_dir;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// Longest wait for any one thing. Generous, because a busy host is not a failure.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Waits until a descriptor can be read, or was closed at its other end. Says whether it was in time.
pub(crate) fn readable(fd: BorrowedFd<'_>, deadline: Instant) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).expect("a short time");
        match poll(&mut fds, Some(&left)) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(Errno::INTR) => {}
            Err(error) => panic!("poll failed: {error}"),
        }
    }
}

/// A process, held so that its number cannot come to mean another.
#[derive(Debug)]
pub struct Process {
    pid: Pid,
    fd: OwnedFd,
}

impl Process {
    /// The process with this number, if there is one.
    #[must_use]
    pub fn open(pid: u32) -> Option<Self> {
        let pid = Pid::from_raw(i32::try_from(pid).ok()?)?;
        let fd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        Some(Self { pid, fd })
    }

    /// Its number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Waits for its end.
    ///
    /// # Panics
    ///
    /// If it does not end; `what` says which process that is.
    #[track_caller]
    pub fn wait(&self, what: &str) {
        assert!(
            self.ends_within(PATIENCE),
            "{what} (process {}) still runs after {PATIENCE:?}",
            self.pid
        );
    }

    /// Waits for its end for so long only; says whether it came.
    #[must_use]
    pub fn ends_within(&self, limit: Duration) -> bool {
        readable(self.fd.as_fd(), Instant::now() + limit)
    }

    /// Sends a signal; to nobody if it has ended.
    pub fn signal(&self, signal: Signal) {
        let _ = pidfd_send_signal(&self.fd, signal);
    }
}

/// Processes whose command line mentions `path`, with that command line.
#[must_use]
pub fn processes_mentioning(path: &Path) -> Vec<(Process, String)> {
    let wanted = path.as_os_str().as_encoded_bytes();
    let mut found = Vec::new();
    for entry in read_dir("/proc").expect("/proc").flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        // Held before it is read, so that both are about the same process.
        let (Some(process), Ok(line)) = (
            Process::open(pid),
            std::fs::read(entry.path().join("cmdline")),
        ) else {
            continue;
        };
        if line.windows(wanted.len()).any(|window| window == wanted) {
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            found.push((process, line));
        }
    }
    found
}

/// The entries of a directory, watched.
#[derive(Debug)]
pub struct Entries {
    dir: PathBuf,
    fd: OwnedFd,
}

impl Entries {
    /// Watches `dir` for new and vanishing entries.
    ///
    /// # Panics
    ///
    /// If it is no directory.
    #[must_use]
    #[track_caller]
    pub fn watch(dir: &Path) -> Self {
        use inotify::{CreateFlags, WatchFlags as W};
        let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).expect("inotify");
        let what = W::CREATE | W::DELETE | W::MOVED_TO | W::MOVED_FROM | W::ONLYDIR;
        inotify::add_watch(&fd, dir, what)
            .unwrap_or_else(|error| panic!("watching {} failed: {error}", dir.display()));
        Self {
            dir: dir.to_owned(),
            fd,
        }
    }

    /// Waits for an entry that is wanted, there already or new, and gives its path.
    ///
    /// # Panics
    ///
    /// If none comes; `what` says what was waited for.
    #[track_caller]
    pub fn wait_for(&self, what: &str, wanted: impl Fn(&str) -> bool) -> PathBuf {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let names = read_dir(&self.dir).map(|entries| {
                entries
                    .flatten()
                    .map(|entry| entry.file_name().to_string_lossy().into_owned())
            });
            if let Some(name) = names
                .ok()
                .and_then(|mut names| names.find(|name| wanted(name)))
            {
                return self.dir.join(name);
            }
            assert!(
                readable(self.fd.as_fd(), deadline),
                "{what} did not appear in {} within {PATIENCE:?}",
                self.dir.display()
            );
            self.drain();
        }
    }

    /// Forgets the events so far; the directory itself is read after each.
    fn drain(&self) {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.fd, &mut buffer);
        while reader.next().is_ok() {}
    }
}

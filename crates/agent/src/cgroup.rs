//! A control group for each command, so that all its descendants can be killed at once.
//!
//! Making and removing a directory costs more than a small command, so emptied ones are used again.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{AtFlags, Mode, OFlags};

/// Groups that outlived their command and are looked at before a new one is made.
const LOOKS_MAX: usize = 4;

/// The directory all commands' groups are in.
#[derive(Debug)]
pub(crate) struct Cgroups {
    directory: OwnedFd,
    next: AtomicU64,
    pool: Mutex<Pool>,
}

#[derive(Debug, Default)]
struct Pool {
    empty: Vec<Group>,
    /// Groups whose command ended and left processes behind.
    populated: VecDeque<Group>,
}

#[derive(Debug)]
struct Group {
    name: String,
    /// Whether its processes were killed. Such a group is not used again: Linux 6.18 kills a child
    /// that is cloned into a group whose count of kills differs from that of its *parent's* group
    /// (`cgroup_css_set_fork` and `cgroup_post_fork`, kernel/cgroup/cgroup.c).
    killed: AtomicBool,
    directory: OwnedFd,
    events: OwnedFd,
    kill: OwnedFd,
}

/// The group of one command. It goes back to the pool when dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    cgroups: Arc<Cgroups>,
    group: Option<Group>,
}

impl Cgroups {
    /// Uses, and makes if needed, a directory of a cgroup2 file system. `None` if that cannot be.
    pub(crate) fn new(directory: &Path) -> Option<Arc<Self>> {
        let _ = rustix::fs::mkdir(directory, Mode::from_raw_mode(0o755));
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let cgroups = Arc::new(Self {
            directory: rustix::fs::open(directory, flags, Mode::empty()).ok()?,
            next: AtomicU64::new(0),
            pool: Mutex::new(Pool::default()),
        });
        // `cgroup.kill` came with Linux 5.14; without it groups are no use here.
        let first = cgroups.make().ok()?;
        cgroups.pool().empty.push(first);
        Some(cgroups)
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn make(&self) -> rustix::io::Result<Group> {
        loop {
            let name = format!("c{}", self.next.fetch_add(1, Ordering::Relaxed));
            match rustix::fs::mkdirat(&self.directory, &name, Mode::from_raw_mode(0o755)) {
                Ok(()) => {}
                // Somebody else's, or an earlier agent's.
                Err(rustix::io::Errno::EXIST) => continue,
                Err(error) => return Err(error),
            }
            let open = |file: &str, flags| {
                rustix::fs::openat(
                    &self.directory,
                    format!("{name}{file}"),
                    flags | OFlags::CLOEXEC,
                    Mode::empty(),
                )
            };
            return Ok(Group {
                directory: open("", OFlags::DIRECTORY | OFlags::RDONLY)?,
                events: open("/cgroup.events", OFlags::RDONLY)?,
                kill: open("/cgroup.kill", OFlags::WRONLY)?,
                killed: AtomicBool::new(false),
                name,
            });
        }
    }

    /// A group without processes, if one can be had.
    pub(crate) fn lease(self: &Arc<Self>) -> Option<Lease> {
        let mut pool = self.pool();
        for _ in 0..LOOKS_MAX.min(pool.populated.len()) {
            if let Some(group) = pool.populated.pop_front() {
                self.put_back(&mut pool, group);
            }
        }
        let group = pool.empty.pop();
        drop(pool);
        Some(Lease {
            cgroups: Arc::clone(self),
            group: Some(match group {
                Some(group) => group,
                None => self.make().ok()?,
            }),
        })
    }

    /// Keeps a group that nobody uses any more, or removes it if it cannot be used again.
    fn put_back(&self, pool: &mut Pool, group: Group) {
        if !group.is_empty() {
            pool.populated.push_back(group);
        } else if group.killed.load(Ordering::Relaxed) {
            let _ = rustix::fs::unlinkat(&self.directory, &group.name, AtFlags::REMOVEDIR);
        } else {
            pool.empty.push(group);
        }
    }
}

impl Group {
    fn is_empty(&self) -> bool {
        let mut text = [0u8; 128];
        match rustix::io::pread(&self.events, &mut text, 0) {
            Ok(length) => text[..length]
                .split(|byte| *byte == b'\n')
                .any(|line| line == b"populated 0"),
            Err(_) => false,
        }
    }
}

impl Lease {
    /// The directory, for clone3(2).
    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.group.as_ref().map(|group| group.directory.as_fd())
    }

    /// Kills every process in the group, those being forked included.
    pub(crate) fn kill(&self) {
        if let Some(group) = &self.group {
            group.killed.store(true, Ordering::Relaxed);
            let _ = rustix::io::pwrite(&group.kill, b"1", 0);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(group) = self.group.take() {
            let mut pool = self.cgroups.pool();
            self.cgroups.put_back(&mut pool, group);
        }
    }
}

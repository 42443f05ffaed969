//! A control group for each command, so that all its descendants can be killed at once.
//!
//! Making and removing a directory costs more than a small command, so emptied ones are used again.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{AtFlags, Mode, OFlags};

/// How long processes may take to stand still.
const FREEZE_WAIT: Duration = Duration::from_secs(2);

/// Groups that outlived their command and are looked at before a new one is made.
const LOOKS_MAX: usize = 4;

/// The directory all commands' groups are in.
#[derive(Debug)]
pub(crate) struct Cgroups {
    directory: OwnedFd,
    next: AtomicU64,
    pool: Mutex<Pool>,
    /// How many want every process to stand still.
    holding: Mutex<u32>,
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
            holding: Mutex::new(0),
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

    /// Makes every process of every command stand still until the hold is dropped; commands that
    /// start meanwhile wait. `None` where the kernel cannot do that.
    ///
    /// A process that waits for a device stands still only once it has what it waits for, so this
    /// takes up to [`FREEZE_WAIT`].
    pub(crate) fn hold(self: &Arc<Self>) -> Option<Hold> {
        let mut holding = self.holding();
        if *holding == 0 {
            self.freeze(b"1").ok()?;
        }
        *holding += 1;
        drop(holding);
        let hold = Hold {
            cgroups: Arc::clone(self),
        };
        self.wait_until_frozen();
        Some(hold)
    }

    /// Lets every process go on, whoever wants them to stand still.
    pub(crate) fn let_go(&self) {
        let _ = self.freeze(b"0");
    }

    fn holding(&self) -> MutexGuard<'_, u32> {
        self.holding.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// "Freezing", `Documentation/admin-guide/cgroup-v2.rst`.
    fn freeze(&self, state: &[u8]) -> rustix::io::Result<()> {
        let file = self.open("cgroup.freeze", OFlags::WRONLY)?;
        rustix::io::write(&file, state).map(drop)
    }

    fn open(&self, file: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        rustix::fs::openat(
            &self.directory,
            file,
            flags | OFlags::CLOEXEC,
            Mode::empty(),
        )
    }

    /// Watches `cgroup.events`, of which the kernel says by POLLPRI that it has changed.
    fn wait_until_frozen(&self) {
        let Ok(events) = self.open("cgroup.events", OFlags::RDONLY) else {
            return;
        };
        let deadline = Instant::now() + FREEZE_WAIT;
        while !says(&events, b"frozen 1") {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(limit) = Timespec::try_from(left) else {
                return;
            };
            let mut fds = [PollFd::new(&events, PollFlags::PRI)];
            match rustix::io::retry_on_intr(|| rustix::event::poll(&mut fds, Some(&limit))) {
                Ok(1..) => {}
                // Whoever does not stand still by now does so when it wakes.
                _ => return,
            }
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
        says(&self.events, b"populated 0")
    }
}

/// Whether a group's `cgroup.events` has this line.
fn says(events: &OwnedFd, wanted: &[u8]) -> bool {
    let mut text = [0u8; 128];
    match rustix::io::pread(events, &mut text, 0) {
        Ok(length) => text[..length]
            .split(|byte| *byte == b'\n')
            .any(|line| line == wanted),
        Err(_) => false,
    }
}

/// Every command stands still while this lives.
#[derive(Debug)]
pub(crate) struct Hold {
    cgroups: Arc<Cgroups>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut holding = self.cgroups.holding();
        *holding -= 1;
        if *holding == 0 {
            // Nothing is known that would make this fail.
            let _ = self.cgroups.freeze(b"0");
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

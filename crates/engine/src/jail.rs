//! Jails: whether Firecracker is locked in here, what a jail may use, and taking one down.
//!
//! A jail is a user, a root directory, control groups and namespaces, all named after the sandbox. Its
//! row is written before any of it is made, and [`release`] reads the row backwards, whoever runs it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::thread::{CapabilitySet, capabilities};
use smolvm_host::cgroup;
use smolvm_host::os::Os;
use smolvm_vmm::firecracker::{self, JAILER};
use smolvm_vmm::{JailPlan, Limits, VmPlan};

use crate::engine::{Engine, myself};
use crate::engines::remembered_version;
use crate::error::{Error, ErrorKind, Result, io};
use crate::layout::Layout;
use crate::settings::{JailerChoice, UserRange};
use crate::store::{JailRow, Store};

/// The control group in which those of all jails are.
const PARENT: &str = "smolvm";

/// Most time a killed VMM may take to be gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// What a VMM needs beside its guest's memory: itself, and what the kernel keeps for a machine.
const OVERHEAD_MIB: u64 = 128;

/// Processors that a VMM may use beside those of its guest: for disks and network.
const CPUS_EXTRA: u64 = 1;

/// Threads of a VMM beside those of its guest's processors: two of its own, and the kernel's for it.
const THREADS_EXTRA: u32 = 16;

/// How Firecracker runs here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Jailing {
    /// Locked in by this jailer.
    Jailed(PathBuf),
    /// As the user who starts it, for this reason.
    Free(String),
}

impl Engine {
    /// How this Firecracker of this version would run, or what is in the way of locking it in.
    pub(crate) fn jailing(
        &self,
        store: Option<&mut Store>,
        program: &Path,
        version: &str,
    ) -> std::result::Result<Jailing, String> {
        let settings = &self.config().settings.jail;
        if !rustix::process::geteuid().is_root() {
            return Ok(Jailing::Free(
                "only root can lock it in; it runs as this user".to_owned(),
            ));
        }
        if settings.jailer == JailerChoice::Off {
            return Ok(Jailing::Free(
                "`jailer = \"off\"` in config.toml says so; it runs as root".to_owned(),
            ));
        }
        let beside = program.parent().into_iter().map(Path::to_owned);
        let directories = beside.chain(self.config().program_dirs.iter().cloned());
        let jailer = firecracker::find_jailer(directories)
            .ok_or_else(|| format!("no {JAILER} is beside {} or on the PATH", program.display()))?;
        let found = match store {
            Some(store) => remembered_version(store, &jailer),
            None => firecracker::version(&jailer).map_err(|error| format!("could not {error}")),
        }?;
        if found != version {
            return Err(format!(
                "{} is of version {found}, and that of its Firecracker, {version}, is needed",
                jailer.display()
            ));
        }
        may_lock_in(&settings.users)?;
        Ok(Jailing::Jailed(jailer))
    }

    /// What to say, once until the host is started again, where machines run without a jail.
    pub(crate) fn warn_once_of_no_jail(&self, store: &mut Store) -> Result<Option<String>> {
        const TOLD: &str = "told-of-no-jail";
        let boot = smolvm_host::process::boot_id()?;
        if store.host_fact(TOLD, &boot)?.is_some() {
            return Ok(None);
        }
        store.put_host_fact(TOLD, &boot, "yes")?;
        let why = match rustix::process::geteuid().is_root() {
            true => "`jailer = \"off\"` is in config.toml",
            false => "only root can lock it in",
        };
        Ok(Some(format!(
            "Firecracker runs without its jailer, because {why}: as this user, without limits, and with \
             its own filters of system calls as the only wall behind KVM"
        )))
    }

    /// Records a jail for a machine's VMM. Of an earlier one of this name nothing is there any more:
    /// [`release`].
    pub(crate) fn allocate_jail(
        &self,
        store: &mut Store,
        id: &str,
        jailer: &Path,
        machine: &VmPlan,
    ) -> Result<JailPlan> {
        let users = self.config().settings.jail.users;
        let seed = u64::from_str_radix(id, 16).unwrap_or(0);
        let row = store
            .insert_jail(id, &myself()?, users.candidates(seed))?
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::Busy,
                    format!("all {} users of jails, {users}, are in use", users.count()),
                )
                .hint("stop sandboxes, or set a larger `users` under `[jail]` in config.toml")
            })?;
        let version = cgroup::version(self.os());
        if let Err(why) = &version {
            tracing::warn!(why, "a jail has no limits");
        }
        Ok(plan(
            &row,
            jailer,
            version.ok(),
            machine.cpus,
            machine.memory_mib,
        ))
    }
}

/// Whether this process has the rights that a jailer needs, and users to give.
fn may_lock_in(users: &UserRange) -> std::result::Result<(), String> {
    let needed = CapabilitySet::SYS_ADMIN
        | CapabilitySet::SYS_CHROOT
        | CapabilitySet::MKNOD
        | CapabilitySet::CHOWN
        | CapabilitySet::SETUID
        | CapabilitySet::SETGID;
    let has = capabilities(None)
        .map_err(|error| format!("this process's rights could not be asked for: {error}"))?;
    if !has.effective.contains(needed) {
        return Err("this root has not all rights of root (capabilities(7))".to_owned());
    }
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    match is_mapped(&map, users) {
        true => Ok(()),
        false => Err(format!("this user namespace has no users {users}")),
    }
}

/// Whether a user namespace has all of these users (user_namespaces(7)). Pure.
fn is_mapped(map: &str, users: &UserRange) -> bool {
    map.lines().any(|line| {
        let mut words = line.split_whitespace().map(|word| word.parse::<u64>());
        let (Some(Ok(first)), Some(Ok(_)), Some(Ok(count))) =
            (words.next(), words.next(), words.next())
        else {
            return false;
        };
        first <= u64::from(users.first()) && u64::from(users.last()) < first + count
    })
}

/// What is decided about a jail. Pure.
fn plan(row: &JailRow, jailer: &Path, version: Option<u8>, cpus: u8, memory_mib: u32) -> JailPlan {
    JailPlan {
        program: jailer.to_owned(),
        id: row.id.clone(),
        user: row.user,
        limits: version.map(|version| limits(version, cpus, memory_mib)),
    }
}

/// What a VMM may use, in the words of a version of control groups (cgroup-v2.rst; cgroup-v1/, in the
/// kernel's documentation).
fn limits(version: u8, cpus: u8, memory_mib: u32) -> Limits {
    const PERIOD_US: u64 = 100_000;
    let quota = (u64::from(cpus) + CPUS_EXTRA) * PERIOD_US;
    let memory = ((u64::from(memory_mib) + OVERHEAD_MIB) << 20).to_string();
    let threads = (u32::from(cpus) + THREADS_EXTRA).to_string();
    let values = match version {
        2 => [
            ("cpu.max", format!("{quota} {PERIOD_US}")),
            ("memory.max", memory),
            ("pids.max", threads),
        ],
        _ => [
            ("cpu.cfs_quota_us", quota.to_string()),
            ("memory.limit_in_bytes", memory),
            ("pids.max", threads),
        ],
    };
    Limits {
        version,
        parent: PARENT.to_owned(),
        values: values
            .map(|(file, value)| (file.to_owned(), value))
            .to_vec(),
    }
}

/// Takes down the jail of this name, if one is recorded: kills what is in it, and removes control groups,
/// root directory and row, in this order. Idempotent, and may be repeated after an error.
pub fn release(os: &Os, layout: &Layout, store: &mut Store, id: &str) -> Result<()> {
    let Some(row) = store.jail(id)? else {
        return Ok(());
    };
    let failed = |error: smolvm_host::HostError| {
        Error::from(error).hint("mend that, then run `smolvm prune`")
    };
    let grouped = cgroup::remove(os, PARENT, id, KILL_TIMEOUT).map_err(failed)?;
    if !grouped {
        // It has no groups, or died before it had them.
        cgroup::end_all_of_user(os, row.user, KILL_TIMEOUT).map_err(failed)?;
    }
    os.remove_tree("remove the jail", &layout.sandbox(id).vmm())
        .map_err(failed)?;
    store.delete_jail(id)
}

/// Takes down jails whose sandbox is off or gone, and those of templates whose maker is. `is_held` says
/// of an id whether its sandbox may be using it.
pub(crate) fn sweep(
    os: &Os,
    layout: &Layout,
    store: &mut Store,
    mut is_held: impl FnMut(&JailRow) -> Result<bool>,
) -> Result<Vec<(String, String)>> {
    let mut failed = Vec::new();
    for row in store.jails()? {
        if !is_held(&row)?
            && let Err(error) = release(os, layout, store, &row.id)
        {
            let reason = error.in_one_line();
            tracing::warn!(reason, jail = row.id, "could not take down a jail");
            failed.push((row.id, reason));
        }
    }
    Ok(failed)
}

/// A name for the jail of a template that is made for no sandbox.
pub(crate) fn new_id() -> Result<String> {
    Ok(format!("{:016x}", crate::engine::random_u64()?))
}

/// Whether anything of this jail's is on the host. For tests and reports.
pub fn is_there(layout: &Layout, id: &str) -> Result<bool> {
    let mounts = std::fs::read_to_string("/proc/self/mounts")
        .map_err(|error| io("could not read the table of mounts", error))?;
    let group = |line: &str| {
        let path = line.split(' ').nth(1).unwrap_or_default();
        line.contains(" cgroup") && Path::new(path).join(PARENT).join(id).is_dir()
    };
    Ok(mounts.lines().any(group) || layout.sandbox(id).vmm().exists())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use smolvm_host::os::Faults;

    use super::*;
    use crate::store::rows::tests::{process, store};

    #[test]
    fn limits_are_said_in_the_words_of_either_version() {
        let said = |version| {
            let limits = limits(version, 2, 512);
            assert_eq!(
                (limits.version, limits.parent.as_str()),
                (version, "smolvm")
            );
            let words = limits.values.iter();
            let words: Vec<_> = words
                .map(|(file, value)| format!("{file}={value}"))
                .collect();
            words.join(", ")
        };
        assert_eq!(
            said(2),
            "cpu.max=300000 100000, memory.max=671088640, pids.max=18"
        );
        assert_eq!(
            said(1),
            "cpu.cfs_quota_us=300000, memory.limit_in_bytes=671088640, pids.max=18"
        );
    }

    #[test]
    fn users_have_to_be_known_to_the_namespace() {
        let users = UserRange::default();
        assert!(is_mapped("         0          0 4294967295\n", &users));
        assert!(!is_mapped("         0     100000      65536\n", &users));
        assert!(!is_mapped("", &users));
    }

    #[test]
    fn a_jail_is_taken_down_by_its_row_and_again() {
        let (dir, mut store) = store();
        let layout = Layout::new(dir.path().to_owned());
        let root = layout.sandbox("a").vmm().join("firecracker/a/root");
        std::fs::create_dir_all(&root).expect("a root directory");
        store
            .insert_jail("a", &process(7), 4_000_000_000..4_000_000_001)
            .expect("written");
        for _ in 0..2 {
            release(&Os::new(), &layout, &mut store, "a").expect("taken down");
            assert!(!is_there(&layout, "a").expect("looked"));
            assert_eq!(store.jail("a").expect("read"), None);
        }
    }

    /// Has one effect fail in its turn.
    #[derive(Debug)]
    struct Nth {
        nth: u32,
        seen: AtomicU32,
    }

    impl Faults for Nth {
        fn before(&self, _: &'static str, _: &Path) -> std::io::Result<()> {
            match self.seen.fetch_add(1, Ordering::Relaxed) + 1 == self.nth {
                true => Err(std::io::ErrorKind::Other.into()),
                false => Ok(()),
            }
        }
    }

    /// A jail as a death leaves it: a process that nobody owns, in control groups or without, files of its
    /// user's, and the row. Each effect of taking it down fails in its turn, and the next try leaves nothing.
    #[test]
    fn what_a_death_leaves_of_a_jail_is_gone_after_a_repair_that_may_fail_anywhere() {
        use std::os::unix::process::CommandExt;
        if !rustix::process::geteuid().is_root() {
            let note = "NOT DONE: only root may make jails\n";
            assert!(std::env::var_os("CI").is_none(), "{note}");
            std::io::Write::write_all(&mut std::io::stderr(), note.as_bytes()).expect("told");
            return;
        }
        let version = cgroup::version(&Os::new()).expect("control groups");
        let group_roots = match version {
            2 => vec!["/sys/fs/cgroup".to_owned()],
            _ => cgroup::CONTROLLERS
                .map(|name| format!("/sys/fs/cgroup/{name}"))
                .to_vec(),
        };
        for grouped in [true, false] {
            let mut failures = 0;
            for nth in 1.. {
                let (dir, mut store) = store();
                let layout = Layout::new(dir.path().to_owned());
                let id = format!("test-{}-{grouped}-{nth}", std::process::id());
                let user = 3_000_000_000 + std::process::id() * 100 + nth;
                store
                    .insert_jail(&id, &process(7), user..user + 1)
                    .expect("written");
                let root = layout
                    .sandbox(&id)
                    .vmm()
                    .join("firecracker")
                    .join(&id)
                    .join("root");
                std::fs::create_dir_all(&root).expect("a root directory");
                std::fs::write(root.join("firecracker"), "x").expect("a file");
                std::os::unix::fs::chown(&root, Some(user), Some(user)).expect("its own");
                let mut orphan = std::process::Command::new("sleep");
                let mut orphan = orphan
                    .arg("100")
                    .uid(user)
                    .gid(user)
                    .spawn()
                    .expect("sleep");
                for group in group_roots.iter().filter(|_| grouped) {
                    let group = Path::new(group).join(PARENT).join(&id);
                    std::fs::create_dir_all(&group).expect("a group");
                    let pid = orphan.id().to_string();
                    std::fs::write(group.join("cgroup.procs"), pid).expect("moved");
                }
                assert!(is_there(&layout, &id).expect("looked"));
                let faults = Arc::new(Nth {
                    nth,
                    seen: AtomicU32::new(0),
                });
                let os = Os::with_faults(faults.clone());
                let first = release(&os, &layout, &mut store, &id);
                let done = faults.seen.load(Ordering::Relaxed) < nth;
                if first.is_err() {
                    failures += 1;
                    assert!(
                        store.jail(&id).expect("read").is_some(),
                        "it is still known"
                    );
                    release(&Os::new(), &layout, &mut store, &id).expect("the next try");
                }
                assert!(!is_there(&layout, &id).expect("looked"), "{grouped} {nth}");
                assert_eq!(store.jail(&id).expect("read"), None);
                let ended = orphan.try_wait().expect("waited for");
                assert!(ended.is_some(), "its process runs: {grouped} {nth}");
                if done {
                    first.expect("nothing failed");
                    break;
                }
            }
            assert!(failures >= 4, "{grouped}: only {failures} effects failed");
        }
    }
}

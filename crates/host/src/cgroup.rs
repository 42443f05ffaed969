//! Control groups: where their limits are on this host, and taking one apart (cgroups(7)).

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::error::{HostError, HostErrorKind};
use crate::os::Os;
use crate::process::ProcessIdentity;

/// Controllers that limits need.
pub const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// Time between tries to remove a group that does not say when it is empty.
const MOMENT: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 1_000_000,
};

/// How often a group is looked at whose processes make more of themselves.
const ROUNDS_MAX: u32 = 16;

/// The version of control groups by which processes can be limited here: 2 if it has all
/// [`CONTROLLERS`], else 1.
///
/// Switches the controllers on for groups below the root, where they are not.
///
/// # Errors
///
/// Why there are none to use, in words.
pub fn version(os: &Os) -> Result<u8, String> {
    let mounts = hierarchies(os).map_err(|error| error.to_string())?;
    let mut why = "this host has no control groups for cpu, memory and pids".to_owned();
    for mount in mounts.iter().filter(|mount| mount.version == 2) {
        let words = |name: &str| {
            let text = std::fs::read_to_string(mount.path.join(name)).unwrap_or_default();
            let words: BTreeSet<_> = text.split_whitespace().map(str::to_owned).collect();
            CONTROLLERS.iter().all(|wanted| words.contains(*wanted))
        };
        if !words("cgroup.controllers") {
            continue;
        }
        if words("cgroup.subtree_control") {
            return Ok(2);
        }
        let switch = mount.path.join("cgroup.subtree_control");
        match os.effect("switch controllers on in", &switch, || {
            std::fs::write(&switch, "+cpu +memory +pids")
        }) {
            Ok(()) => return Ok(2),
            Err(error) => why = error.to_string(),
        }
    }
    let has = |wanted: &str| {
        let has = |mount: &Mount| mount.version == 1 && mount.has(wanted);
        mounts.iter().any(has)
    };
    match CONTROLLERS.iter().all(|wanted| has(wanted)) {
        true => Ok(1),
        false => Err(why),
    }
}

/// Kills what is in the group `name` below `parent`, in every hierarchy, and removes it. Idempotent. Says
/// whether there was such a group.
///
/// # Errors
///
/// Those of kill(2) and rmdir(2); [`Other`](HostErrorKind::Other) if a process has not ended within `patience`.
pub fn remove(os: &Os, parent: &str, name: &str, patience: Duration) -> Result<bool, HostError> {
    let mut found = false;
    for mount in hierarchies(os)? {
        let group = mount.path.join(parent).join(name);
        if !group.is_dir() {
            continue;
        }
        found = true;
        end_all(os, &group, patience)?;
        os.effect("remove the control group", &group, || {
            remove_when_empty(&group, patience)
        })?;
    }
    Ok(found)
}

/// Removes a group as soon as nothing is in it: threads of a process that has ended may be for a moment.
fn remove_when_empty(group: &Path, patience: Duration) -> io::Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        match std::fs::remove_dir(group) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() != io::ErrorKind::ResourceBusy => return Err(error),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Ok(()) => return Ok(()),
            Err(_) => {}
        }
        match File::open(group.join("cgroup.events")) {
            Ok(mut events) => {
                // What it says is new until it is read (cgroup-v2.rst, "Un-populated Notification").
                let mut said = String::new();
                events.read_to_string(&mut said)?;
                if said.lines().any(|line| line == "populated 1") {
                    let left = deadline.saturating_duration_since(Instant::now());
                    let left = Timespec::try_from(left).map_err(io::Error::other)?;
                    let mut watched = [PollFd::new(&events, PollFlags::PRI)];
                    rustix::io::retry_on_intr(|| poll(&mut watched, Some(&left)))?;
                    continue;
                }
            }
            // Groups of version 1 tell nobody.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        rustix::io::retry_on_intr(|| poll(&mut [], Some(&MOMENT)))?;
    }
}

/// Kills every process of a group and waits for their ends.
fn end_all(os: &Os, group: &Path, patience: Duration) -> Result<(), HostError> {
    for _ in 0..ROUNDS_MAX {
        let members = members(os, group)?;
        if members.is_empty() {
            return Ok(());
        }
        let mut known = Vec::new();
        for pid in members {
            known.extend(ProcessIdentity::of(pid)?);
        }
        // A number may be another's since it was read.
        let still = self::members(os, group)?;
        known.retain(|process| still.contains(&process.pid));
        os.effect("end the processes in", group, || {
            // All before any is waited for: the kernel's own thread for a machine ends with that only.
            for process in &known {
                process.kill().map_err(io::Error::other)?;
            }
            for process in &known {
                process.kill_and_wait(patience).map_err(io::Error::other)?;
            }
            Ok(())
        })?;
    }
    let error = io::Error::other("its processes make more of themselves than can be ended");
    Err(HostError::io("empty the control group", group, error))
}

fn members(os: &Os, group: &Path) -> Result<Vec<i32>, HostError> {
    let text = match os.read("read", &group.join("cgroup.procs")) {
        Err(error) if error.kind() == HostErrorKind::NotFound => return Ok(Vec::new()),
        text => text?,
    };
    let text = String::from_utf8_lossy(&text);
    Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
}

/// Kills every process of a user and waits for their ends. For users that nobody else has.
///
/// # Errors
///
/// As [`remove`].
pub fn end_all_of_user(os: &Os, user: u32, patience: Duration) -> Result<(), HostError> {
    use std::os::unix::fs::MetadataExt;
    let all = Path::new("/proc");
    let entries = os.effect("list processes in", all, || std::fs::read_dir(all))?;
    for entry in entries.flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        // A process that may not be traced belongs to root there (proc(5)), so its own word counts.
        let own = |pid: i32| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let line = status.lines().find_map(|line| line.strip_prefix("Uid:"));
            line.is_some_and(|line| {
                line.split_whitespace().next() == Some(user.to_string().as_str())
            }) || entry
                .metadata()
                .is_ok_and(|metadata| metadata.uid() == user)
        };
        if !own(pid) {
            continue;
        }
        if let Some(process) = ProcessIdentity::of(pid)?
            && own(pid)
        {
            os.effect("end a process in", &entry.path(), || {
                process.kill_and_wait(patience).map_err(io::Error::other)
            })?;
        }
    }
    Ok(())
}

/// A hierarchy of control groups.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    version: u8,
    path: PathBuf,
    options: String,
}

impl Mount {
    fn has(&self, controller: &str) -> bool {
        self.options.split(',').any(|option| option == controller)
    }
}

/// The hierarchies of this host.
fn hierarchies(os: &Os) -> Result<Vec<Mount>, HostError> {
    let table = os.read("read", Path::new("/proc/self/mounts"))?;
    Ok(mounts(&String::from_utf8_lossy(&table)))
}

/// The hierarchies in a table of mounts (proc(5)). Pure.
fn mounts(table: &str) -> Vec<Mount> {
    let hierarchy = |line: &str| {
        let mut words = line.split(' ').skip(1);
        let (path, kind, options) = (words.next()?, words.next()?, words.next()?);
        let version = match kind {
            "cgroup" => 1,
            "cgroup2" => 2,
            _ => return None,
        };
        Some(Mount {
            version,
            path: path.into(),
            options: options.to_owned(),
        })
    };
    table.lines().filter_map(hierarchy).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_found_among_mounts() {
        let table = "proc /proc proc rw 0 0\n\
                     cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n\
                     cgroup /sys/fs/cgroup/cpu cgroup rw,relatime,cpu,cpuacct 0 0\n";
        let found = mounts(table);
        assert_eq!(found.len(), 2);
        assert_eq!((found[0].version, found[1].version), (2, 1));
        assert!(found[1].has("cpu") && !found[1].has("memory"));
    }

    #[test]
    fn a_group_that_is_not_there_is_removed_already() {
        let removed = remove(
            &Os::new(),
            "smolvm-no-such",
            "group",
            Duration::from_secs(1),
        );
        assert!(!removed.expect("nothing to do"));
    }
}

//! How Firecracker is locked in by its `jailer`: the command line of that, which is pure, and what has to
//! be in the root directory before it runs.
//!
//! The jailer makes the control groups, the root directory's devices and a mount namespace, changes root
//! directory, group and user, and executes the VMM, all in one process. It closes every descriptor but the
//! standard ones, so what the VMM is to open has a name in its root directory: files of the host are mounted
//! there, in a mount namespace that only the child has, so that nothing of it is left.

use std::ffi::{CString, OsString};
use std::fs::{File, Permissions};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use crate::sys::{Bind, Seclusion};
use crate::{JailPlan, VmPlan, memory_bytes};

/// The jailer's name. It lies beside Firecracker, in the same release.
pub(crate) const PROGRAM: &str = "jailer";

/// The pipe to which the VMM writes what it has to say; also its standard error.
pub(super) const LOG: &str = "log";
/// What it reads at a boot.
pub(super) const CONFIG: &str = "config";
pub(super) const KERNEL: &str = "kernel";
pub(super) const INITRD: &str = "initrd";
/// What it reads at a restore.
pub(super) const STATE: &str = "state";
pub(super) const MEMORY: &str = "memory";

/// What a VMM may write to one file beyond the largest that it has: headers of a state, and rounding.
const FILE_SLACK_BYTES: u64 = 64 << 20;

/// Most open files: disks, sockets and devices are fewer than a hundred.
const FILES_MAX: u32 = 1024;

/// Directories of shared libraries, for a VMM that was not linked statically, as releases are.
const LIBRARIES: [&str; 5] = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib"];

/// The root directory of a jail whose base is `base`, as the jailer names it.
pub(super) fn root(base: &Path, plan: &VmPlan, jail: &JailPlan) -> PathBuf {
    let program = plan.program.file_name().unwrap_or_default();
    base.join(program).join(&jail.id).join("root")
}

/// The jailer's arguments, with those of the VMM at their end. Pure.
pub(super) fn arguments(
    base: &Path,
    plan: &VmPlan,
    jail: &JailPlan,
    file_bytes_max: u64,
    vmm: impl IntoIterator<Item = OsString>,
) -> Vec<OsString> {
    let user = jail.user.to_string();
    let mut words: Vec<OsString> = Vec::new();
    let mut add = |option: &str, value: &std::ffi::OsStr| {
        words.push(option.into());
        words.push(value.to_owned());
    };
    add("--id", jail.id.as_ref());
    add("--exec-file", plan.program.as_os_str());
    add("--uid", user.as_ref());
    add("--gid", user.as_ref());
    add("--chroot-base-dir", base.as_os_str());
    add(
        "--resource-limit",
        format!("fsize={file_bytes_max}").as_ref(),
    );
    add("--resource-limit", format!("no-file={FILES_MAX}").as_ref());
    if let Some(limits) = &jail.limits {
        add("--cgroup-version", limits.version.to_string().as_ref());
        add("--parent-cgroup", limits.parent.as_ref());
        for (file, value) in &limits.values {
            add("--cgroup", format!("{file}={value}").as_ref());
        }
    }
    words.push("--".into());
    words.extend(vmm);
    words
}

/// The largest file that the VMM has to write: a disk, or its guest's memory in a snapshot.
pub(super) fn file_bytes_max(plan: &VmPlan) -> io::Result<u64> {
    let mut most = memory_bytes(plan);
    for disk in plan.disks.iter().filter(|disk| !disk.read_only) {
        most = most.max(std::fs::metadata(&disk.path)?.len());
    }
    Ok(most + FILE_SLACK_BYTES)
}

/// Lets the jail's user, and nobody else's VMM, read and write a file.
pub(super) fn give(file: &Path, jail: &JailPlan) -> io::Result<()> {
    chown(file, Some(jail.user), Some(jail.user))
}

/// Lets users of jails read a file of which many may have a copy. Whoever is no user of a jail does not come
/// to it, for the data directory keeps them out.
pub(super) fn share(file: &Path) -> io::Result<()> {
    const OTHERS_READ: u32 = 0o004;
    let mode = std::fs::metadata(file)?.mode();
    if mode & OTHERS_READ != 0 {
        return Ok(());
    }
    std::fs::set_permissions(file, Permissions::from_mode((mode & 0o7777) | OTHERS_READ))
}

/// What the jailer is surrounded with: see [`Seclusion`].
#[derive(Debug)]
pub(super) struct Mounts {
    root: PathBuf,
    binds: Vec<Bind>,
}

impl Mounts {
    pub(super) fn new(root: &Path) -> Mounts {
        Mounts {
            root: root.to_owned(),
            binds: Vec::new(),
        }
    }

    /// Has a file of the host under a name in the root directory.
    pub(super) fn file(&mut self, file: &Path, name: &str, read_only: bool) -> io::Result<()> {
        let target = self.root.join(name);
        File::create_new(&target)?;
        self.add(&std::path::absolute(file)?, &target, read_only)
    }

    /// Has the directories from which the host loads shared libraries, if the VMM needs any.
    pub(super) fn libraries(&mut self, program: &Path) -> io::Result<()> {
        if !needs_libraries(program)? {
            return Ok(());
        }
        for directory in LIBRARIES.map(Path::new) {
            if directory.is_dir() {
                let target = self
                    .root
                    .join(directory.strip_prefix("/").unwrap_or(directory));
                std::fs::create_dir_all(&target)?;
                self.add(directory, &target, true)?;
            }
        }
        Ok(())
    }

    fn add(&mut self, source: &Path, target: &Path, read_only: bool) -> io::Result<()> {
        let text =
            |path: &Path| CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other);
        self.binds.push(Bind {
            source: text(source)?,
            target: text(target)?,
            read_only,
        });
        Ok(())
    }

    /// `network` says whether the VMM stays in the network of this process.
    pub(super) fn seclude(self, network: bool) -> Seclusion {
        Seclusion {
            network,
            binds: self.binds,
        }
    }
}

/// Whether a program names another one to load it (`PT_INTERP`, elf(5)).
fn needs_libraries(program: &Path) -> io::Result<bool> {
    const PT_INTERP: u32 = 3;
    const HEADER_BYTES: usize = 64;
    const ENTRY_BYTES: usize = 56;
    let mut file = File::open(program)?;
    let mut header = [0; HEADER_BYTES];
    if file.read_exact(&mut header).is_err() || &header[..5] != b"\x7fELF\x02" {
        // Such as a script, which needs its interpreter.
        return Ok(true);
    }
    let offset = u64::from_le_bytes(header[32..40].try_into().unwrap_or_default());
    let count = u16::from_le_bytes([header[56], header[57]]);
    for index in 0..u64::from(count) {
        let mut entry = [0; ENTRY_BYTES];
        file.read_exact_at(&mut entry, offset + index * ENTRY_BYTES as u64)?;
        if u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]) == PT_INTERP {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Limits;
    use crate::firecracker::config;

    #[test]
    fn the_jailer_is_told_everything_in_one_line() {
        let jail = JailPlan {
            program: "/e/jailer".into(),
            id: "0123".into(),
            user: 2_000_007,
            limits: Some(Limits {
                version: 2,
                parent: "smolvm".into(),
                values: vec![
                    ("cpu.max".into(), "300000 100000".into()),
                    ("pids.max".into(), "18".into()),
                ],
            }),
        };
        let mut plan = config::tests::plan();
        plan.program = "/e/firecracker".into();
        let base = Path::new("/s/vmm");
        assert_eq!(
            root(base, &plan, &jail),
            Path::new("/s/vmm/firecracker/0123/root")
        );
        let line = |jail: &JailPlan| {
            let words = arguments(base, &plan, jail, 1 << 20, ["--api-sock".into()]);
            words
                .join(std::ffi::OsStr::new(" "))
                .into_string()
                .expect("UTF-8")
        };
        let common = "--id 0123 --exec-file /e/firecracker --uid 2000007 --gid 2000007 \
                      --chroot-base-dir /s/vmm --resource-limit fsize=1048576 \
                      --resource-limit no-file=1024";
        assert_eq!(
            line(&jail),
            format!(
                "{common} --cgroup-version 2 --parent-cgroup smolvm --cgroup cpu.max=300000 100000 \
                 --cgroup pids.max=18 -- --api-sock"
            )
        );
        let unlimited = JailPlan {
            limits: None,
            ..jail
        };
        assert_eq!(line(&unlimited), format!("{common} -- --api-sock"));
    }

    #[test]
    fn a_static_program_needs_no_libraries() {
        let directory = tempfile::tempdir().expect("a directory");
        let program = directory.path().join("program");
        let with = |kind: u32| {
            let mut elf = vec![0; 64 + 56];
            elf[..5].copy_from_slice(b"\x7fELF\x02");
            elf[32] = 64;
            elf[56] = 1;
            elf[64..68].copy_from_slice(&kind.to_le_bytes());
            std::fs::write(&program, elf).expect("written");
            needs_libraries(&program).expect("read")
        };
        assert!(!with(1));
        assert!(with(3));
    }

    #[test]
    fn what_many_read_is_opened_once_and_what_one_writes_is_its_own() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("file");
        std::fs::write(&file, "").expect("written");
        std::fs::set_permissions(&file, Permissions::from_mode(0o600)).expect("a mode");
        for _ in 0..2 {
            share(&file).expect("shared");
            let mode = std::fs::metadata(&file).expect("there").mode();
            assert_eq!(mode & 0o7777, 0o604);
        }
    }
}

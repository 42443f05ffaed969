//! The directory of one machine: the VMM's working directory, in which everything that a snapshot names
//! has the same name in every copy.
//!
//! A snapshot says where the machine's disks and its vsock socket are, and Firecracker looks for them
//! there when it restores it. So these are relative paths: a link for each disk, and a socket.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags};

use super::jail;
use crate::{DiskPlan, JailPlan, VmPlan};

/// The vsock device's socket. The VMM appends `_` and the port's number to it when the guest
/// connects.
pub(super) const VSOCK: &str = "vsock";

/// Nobody waits for the other end of a pipe.
const PIPE_FLAGS: OFlags = OFlags::NONBLOCK.union(OFlags::CLOEXEC);

/// The directory, which goes when this is dropped.
#[derive(Debug)]
pub(super) struct Directory {
    /// What is removed.
    base: PathBuf,
    /// Where the names are: the same, or the root directory of a jail below it.
    path: PathBuf,
    jail: Option<JailPlan>,
    /// Socket addresses hold 107 bytes, and paths may be longer: they lead through this.
    handle: File,
}

impl Directory {
    /// Makes that of a machine, for the owner alone, in place of one that was left over.
    pub(super) fn new(plan: &VmPlan) -> io::Result<Directory> {
        let base = &plan.directory;
        match std::fs::remove_dir_all(base) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        DirBuilder::new().mode(0o700).create(base)?;
        // The path may be relative, and must hold for whoever removes it.
        let made = std::path::absolute(base).and_then(|base| {
            let path = match &plan.jail {
                Some(jail) => jail::root(&base, plan, jail),
                None => base.clone(),
            };
            DirBuilder::new()
                .mode(0o700)
                .recursive(true)
                .create(&path)?;
            Ok((File::open(&path)?, base, path))
        });
        match made {
            Ok((handle, base, path)) => Ok(Directory {
                base,
                path,
                jail: plan.jail.clone(),
                handle,
            }),
            Err(error) => {
                let _ = std::fs::remove_dir_all(base);
                Err(error)
            }
        }
    }

    /// What a jailer makes its jails in.
    pub(super) fn base(&self) -> &Path {
        &self.base
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// A short path of something in it, for this process alone.
    pub(super) fn short(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.handle.as_raw_fd()))
    }

    /// Gives each disk the name that snapshots know.
    pub(super) fn link_disks(&self, disks: &[DiskPlan]) -> io::Result<()> {
        for (index, disk) in disks.iter().enumerate() {
            let target = std::path::absolute(&disk.path)?;
            symlink(target, self.path.join(disk_name(index)))?;
        }
        Ok(())
    }

    /// Gives a file a name in it, by which the VMM can open it: another link to the same file, so both are
    /// to be on one file system.
    pub(super) fn lend(&self, file: &Path, name: &'static str) -> io::Result<Lent> {
        let path = self.path.join(name);
        std::fs::hard_link(file, &path)?;
        let mut lent = Lent {
            path,
            name,
            owned: None,
        };
        if let Some(jail) = &self.jail {
            let metadata = std::fs::metadata(file)?;
            lent.owned = Some((file.to_owned(), metadata.uid(), metadata.gid()));
            jail::give(file, jail)?;
        }
        Ok(lent)
    }

    /// Listens where the guest's connections to `port` of its host arrive.
    pub(super) fn listen(&self, port: u32) -> io::Result<UnixListener> {
        let socket = self.short(&format!("{VSOCK}_{port}"));
        let listener = UnixListener::bind(&socket)?;
        if let Some(jail) = &self.jail {
            jail::give(&socket, jail)?;
        }
        Ok(listener)
    }

    /// A pipe with a name in it, to which a VMM in a jail can write what it has to say. The end to read
    /// comes first.
    pub(super) fn pipe(&self, name: &str, jail: &JailPlan) -> io::Result<(OwnedFd, OwnedFd)> {
        let path = self.path.join(name);
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::mknodat(CWD, &path, FileType::Fifo, mode, 0)?;
        jail::give(&path, jail)?;
        let open = |access| rustix::fs::open(&path, access | PIPE_FLAGS, Mode::empty());
        Ok((open(OFlags::RDONLY)?, open(OFlags::WRONLY)?))
    }

    /// Writes a file that a VMM in a jail is to read.
    pub(super) fn write(
        &self,
        name: &str,
        jail: &JailPlan,
        mut from: impl io::Read,
    ) -> io::Result<()> {
        let path = self.path.join(name);
        let mut file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)?;
        io::copy(&mut from, &mut file)?;
        jail::give(&path, jail)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.base)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.base.display(), %error, "could not remove a directory");
        }
    }
}

/// A file's name in the directory, which goes when this is dropped.
#[derive(Debug)]
pub(super) struct Lent {
    path: PathBuf,
    name: &'static str,
    /// The file and whose it was, if it was given to the user of a jail.
    owned: Option<(PathBuf, u32, u32)>,
}

impl Lent {
    /// The name.
    pub(super) fn name(&self) -> PathBuf {
        self.name.into()
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "could not remove a name of a file");
        }
        if let Some((file, user, group)) = &self.owned
            && let Err(error) = chown(file, Some(*user), Some(*group))
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %file.display(), %error, "could not take back a file");
        }
    }
}

/// The name of a disk in the directory.
pub(super) fn disk_name(index: usize) -> String {
    format!("disk{index}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::firecracker::config;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_directory_takes_the_place_of_one_left_over_and_goes() {
        let root = tempfile::tempdir().expect("a directory");
        // Longer than a socket's address.
        let deep = root.path().join("d".repeat(200));
        std::fs::create_dir(&deep).expect("a directory");
        let path = deep.join("vmm");
        std::fs::create_dir(&path).expect("a directory");
        std::fs::write(path.join("api.sock"), "left over").expect("a file");

        let machine = VmPlan {
            directory: path.clone(),
            ..config::tests::plan()
        };
        let directory = Directory::new(&machine).expect("made");
        assert!(!path.join("api.sock").exists());
        let mode = std::fs::metadata(&path).expect("there").permissions();
        assert_eq!(mode.mode() & 0o7777, 0o700);
        directory.listen(5).expect("a socket");
        assert!(path.join("vsock_5").exists());
        let disk = root.path().join("some disk");
        std::fs::write(&disk, "data").expect("a disk");
        let plan = DiskPlan {
            path: disk.clone(),
            read_only: true,
        };
        directory.link_disks(&[plan]).expect("a link");
        let read = std::fs::read(path.join("disk0")).expect("a link to the disk");
        assert_eq!(read, b"data");
        let lent = directory.lend(&disk, "other").expect("a link");
        std::fs::write(path.join(lent.name()), "more").expect("written");
        assert_eq!(std::fs::read(&disk).expect("there"), b"more");
        drop(lent);
        assert!(!path.join("other").exists());
        drop(directory);
        assert!(!path.exists());
        assert!(disk.exists(), "only the link goes");
    }
}

//! The directory of one machine: the VMM's working directory, in which everything that a snapshot names
//! has the same name in every copy.
//!
//! A snapshot says where the machine's disks and its vsock socket are, and Firecracker looks for them
//! there when it restores it. So these are relative paths: a link for each disk, and a socket.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use crate::DiskPlan;

/// The vsock device's socket. The VMM appends `_` and the port's number to it when the guest
/// connects.
pub(super) const VSOCK: &str = "vsock";

/// The directory, which goes when this is dropped.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    /// Socket addresses hold 107 bytes, and paths may be longer: they lead through this.
    handle: File,
}

impl Directory {
    /// Makes it, for the owner alone, in place of one that was left over.
    pub(super) fn new(path: &Path) -> io::Result<Directory> {
        match std::fs::remove_dir_all(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        DirBuilder::new().mode(0o700).create(path)?;
        // The path may be relative, and must hold for whoever removes it.
        let made = std::path::absolute(path).and_then(|path| Ok((File::open(&path)?, path)));
        match made {
            Ok((handle, path)) => Ok(Directory { path, handle }),
            Err(error) => {
                let _ = std::fs::remove_dir(path);
                Err(error)
            }
        }
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
        let lent = self.path.join(name);
        std::fs::hard_link(file, &lent)?;
        Ok(Lent { path: lent, name })
    }

    /// Listens where the guest's connections to `port` of its host arrive.
    pub(super) fn listen(&self, port: u32) -> io::Result<UnixListener> {
        UnixListener::bind(self.short(&format!("{VSOCK}_{port}")))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "could not remove a directory");
        }
    }
}

/// A file's name in the directory, which goes when this is dropped.
#[derive(Debug)]
pub(super) struct Lent {
    path: PathBuf,
    name: &'static str,
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
    }
}

/// The name of a disk in the directory.
pub(super) fn disk_name(index: usize) -> String {
    format!("disk{index}")
}

#[cfg(test)]
mod tests {
    use super::*;
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

        let directory = Directory::new(&path).expect("made");
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

//! Effects on files, each with a name so that a test can fail exactly that step.
//!
//! The idea is LiteFS's `OS` type: code under test calls `os.rename("publish image", ..)`, and a
//! fault loop makes the first, the second, each such step fail in turn, once or for ever, and
//! requires that nothing leaks and that the next try succeeds.

use std::fmt::Debug;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::FlockOperation;

use crate::error::HostError;

/// Decides whether an effect is to fail. Implemented by tests.
pub trait Faults: Debug + Send + Sync {
    /// Called before every effect, on the thread that performs it. `op` is the name the caller
    /// gave the step, `path` what it is about to touch.
    ///
    /// # Errors
    ///
    /// An error makes the effect fail with it, and the host stays untouched.
    fn before(&self, op: &'static str, path: &Path) -> io::Result<()>;
}

/// The host's files. Cheap to clone; without faults every method is the plain system call.
#[derive(Debug, Clone, Default)]
pub struct Os {
    faults: Option<Arc<dyn Faults>>,
}

/// Whether a written file must survive a power failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// It may be lost or empty after a power failure; never half written otherwise.
    Cached,
    /// File and directory entry are on the disk when the call returns.
    Synced,
}

/// A held lock. Released when dropped or when the process ends, however it ends.
#[derive(Debug)]
pub struct Lock {
    file: File,
}

impl Lock {
    /// Whether the file that is locked is the one at `path` now.
    fn is_at(&self, path: &Path) -> bool {
        use std::os::unix::fs::MetadataExt;
        match (self.file.metadata(), fs::symlink_metadata(path)) {
            (Ok(ours), Ok(there)) => (ours.dev(), ours.ino()) == (there.dev(), there.ino()),
            _ => false,
        }
    }
}

impl From<Lock> for std::os::fd::OwnedFd {
    /// The open file that holds the lock. A process that inherits it holds the lock too (flock(2)),
    /// so a lock can be handed to a child without a moment in which nobody has it.
    fn from(lock: Lock) -> Self {
        lock.file.into()
    }
}

/// Makes names of temporary files differ within one process.
static SEQUENCE: AtomicU64 = AtomicU64::new(0);

impl Os {
    /// The real host.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The real host, with effects failing as `faults` says.
    #[must_use]
    pub fn with_faults(faults: Arc<dyn Faults>) -> Self {
        Self {
            faults: Some(faults),
        }
    }

    /// Performs an effect that has no method of its own, so that it carries a name as well.
    ///
    /// # Errors
    ///
    /// What `act` says, with `op` and `path` around it.
    pub fn effect<T>(
        &self,
        op: &'static str,
        path: &Path,
        act: impl FnOnce() -> io::Result<T>,
    ) -> Result<T, HostError> {
        self.faults
            .as_ref()
            .map_or(Ok(()), |faults| faults.before(op, path))
            .and_then(|()| act())
            .map_err(|e| HostError::io(op, path, e))
    }

    /// Creates one directory that only this user can enter (mode 0700). Its parent must exist.
    ///
    /// # Errors
    ///
    /// [`AlreadyExists`](crate::HostErrorKind::AlreadyExists) if anything has that name, so that
    /// creating can be used to claim.
    pub fn create_dir(&self, op: &'static str, path: &Path) -> Result<(), HostError> {
        self.effect(op, path, || fs::DirBuilder::new().mode(0o700).create(path))
    }

    /// Creates a directory and its missing parents, each with mode 0700. Idempotent.
    ///
    /// # Errors
    ///
    /// Those of mkdir(2); directories made before the failing one remain.
    pub fn create_dir_all(&self, op: &'static str, path: &Path) -> Result<(), HostError> {
        self.effect(op, path, || {
            fs::DirBuilder::new()
                .mode(0o700)
                .recursive(true)
                .create(path)
        })
    }

    /// Creates an empty file for writing, with the given mode.
    ///
    /// # Errors
    ///
    /// [`AlreadyExists`](crate::HostErrorKind::AlreadyExists) if anything has that name, even a
    /// dangling symbolic link.
    pub fn create_file(&self, op: &'static str, path: &Path, mode: u32) -> Result<File, HostError> {
        self.effect(op, path, || {
            OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(mode)
                .open(path)
        })
    }

    /// Opens a log for appending; made with mode 0600 if it is not there.
    ///
    /// # Errors
    ///
    /// Those of open(2).
    pub fn create_log(&self, op: &'static str, path: &Path) -> Result<File, HostError> {
        self.effect(op, path, || {
            OpenOptions::new()
                .append(true)
                .create(true)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(path)
        })
    }

    /// Reads a whole file.
    ///
    /// # Errors
    ///
    /// Those of open(2) and read(2).
    pub fn read(&self, op: &'static str, path: &Path) -> Result<Vec<u8>, HostError> {
        self.effect(op, path, || fs::read(path))
    }

    /// Puts `bytes` at `path` in one step: a reader sees the old content or the new, never a mix.
    ///
    /// # Errors
    ///
    /// After an error the old file is as it was and the temporary one, a dot file beside it, is
    /// gone.
    pub fn write_file_atomic(
        &self,
        op: &'static str,
        path: &Path,
        bytes: &[u8],
        mode: u32,
        durability: Durability,
    ) -> Result<(), HostError> {
        self.effect(op, path, || {
            let temporary = temporary_beside(path)?;
            let written = (|| {
                let mut file = OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .mode(mode)
                    .open(&temporary)?;
                file.write_all(bytes)?;
                if durability == Durability::Synced {
                    file.sync_all()?;
                }
                fs::rename(&temporary, path)
            })();
            if written.is_err() {
                let _ = fs::remove_file(&temporary);
            }
            written?;
            if durability == Durability::Synced {
                sync_parent(path)?;
            }
            Ok(())
        })
    }

    /// Renames within one file system, replacing what has the new name as rename(2) does.
    ///
    /// # Errors
    ///
    /// Those of rename(2); nothing has changed then.
    pub fn rename(&self, op: &'static str, from: &Path, to: &Path) -> Result<(), HostError> {
        self.effect(op, to, || fs::rename(from, to))
    }

    /// Exchanges what two paths of one file system name, in one step.
    ///
    /// # Errors
    ///
    /// Those of renameat2(2); nothing has changed then.
    pub fn exchange(&self, op: &'static str, one: &Path, other: &Path) -> Result<(), HostError> {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        self.effect(op, other, || {
            renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).map_err(Into::into)
        })
    }

    /// Sets the permission bits of a file.
    ///
    /// # Errors
    ///
    /// Those of chmod(2).
    pub fn set_mode(&self, op: &'static str, path: &Path, mode: u32) -> Result<(), HostError> {
        self.effect(op, path, || {
            fs::set_permissions(path, fs::Permissions::from_mode(mode))
        })
    }

    /// Flushes a file or directory to the disk.
    ///
    /// # Errors
    ///
    /// Those of open(2) and fsync(2).
    pub fn sync(&self, op: &'static str, path: &Path) -> Result<(), HostError> {
        self.effect(op, path, || File::open(path)?.sync_all())
    }

    /// Removes a file or symbolic link. Idempotent.
    ///
    /// # Errors
    ///
    /// Those of unlink(2), except that a missing file is success.
    pub fn remove_file(&self, op: &'static str, path: &Path) -> Result<(), HostError> {
        self.effect(op, path, || missing_is_fine(fs::remove_file(path)))
    }

    /// Removes a directory with everything in it, or a file. Idempotent. Never follows a symbolic
    /// link: a link, at the top or inside, is removed and its target left alone.
    ///
    /// # Errors
    ///
    /// Those of unlinkat(2); what could be removed before the error is gone.
    pub fn remove_tree(&self, op: &'static str, path: &Path) -> Result<(), HostError> {
        self.effect(op, path, || match fs::symlink_metadata(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e),
            // The standard library walks with openat and O_NOFOLLOW, so exchanging a directory
            // for a link while it runs does not lead it astray.
            Ok(metadata) if metadata.is_dir() => missing_is_fine(fs::remove_dir_all(path)),
            Ok(_) => missing_is_fine(fs::remove_file(path)),
        })
    }

    /// Opens `path`, creating it empty if need be, and takes the exclusive lock if it is free;
    /// `None` if another process, or another `Lock` of this one, holds it. Never waits.
    ///
    /// Only a holder may remove or rename the file. Whoever waits for it then gets the file that is there
    /// after that: a lock on the old one would keep nobody out.
    ///
    /// # Errors
    ///
    /// Those of open(2) and flock(2).
    pub fn try_lock(&self, op: &'static str, path: &Path) -> Result<Option<Lock>, HostError> {
        self.effect(op, path, || {
            loop {
                let file = open_lock(path)?;
                match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                    Ok(()) => {
                        let lock = Lock { file };
                        if lock.is_at(path) {
                            return Ok(Some(lock));
                        }
                    }
                    Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
                    Err(e) => return Err(e.into()),
                }
            }
        })
    }

    /// As [`Os::try_lock`], waiting until the lock is free. The wait has no bound.
    ///
    /// # Errors
    ///
    /// Those of open(2) and flock(2).
    pub fn lock(&self, op: &'static str, path: &Path) -> Result<Lock, HostError> {
        self.effect(op, path, || {
            loop {
                let file = open_lock(path)?;
                let exclusive = FlockOperation::LockExclusive;
                rustix::io::retry_on_intr(|| rustix::fs::flock(&file, exclusive))?;
                let lock = Lock { file };
                if lock.is_at(path) {
                    return Ok(lock);
                }
            }
        })
    }

    /// Copies a file, sharing or skipping what holds no data; see
    /// [`disk::clone_sparse`](crate::disk::clone_sparse), which is this with the default name.
    ///
    /// # Errors
    ///
    /// See there.
    pub fn copy_sparse(
        &self,
        op: &'static str,
        source: &Path,
        destination: &Path,
    ) -> Result<crate::disk::Cloned, HostError> {
        self.effect(op, destination, || {
            crate::disk::clone_sparse_now(source, destination)
        })
    }
}

fn open_lock(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
}

fn missing_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// A name in the same directory, because rename(2) is atomic only within one file system.
fn temporary_beside(path: &Path) -> io::Result<PathBuf> {
    let name = path
        .file_name()
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(format!(
        ".{}-{}.tmp",
        std::process::id(),
        SEQUENCE.fetch_add(1, Ordering::Relaxed)
    ));
    Ok(path.with_file_name(temporary))
}

/// A rename is durable only once its directory is, fsync(2).
fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(parent)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};
    use std::sync::Mutex;

    use super::*;
    use crate::error::HostErrorKind;

    #[derive(Debug)]
    struct FailOnce(Mutex<Option<&'static str>>);

    impl Faults for FailOnce {
        fn before(&self, op: &'static str, _path: &Path) -> io::Result<()> {
            let mut wanted = self.0.lock().unwrap();
            if *wanted == Some(op) {
                *wanted = None;
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
            Ok(())
        }
    }

    #[test]
    fn exactly_the_named_step_fails_and_the_next_try_succeeds() {
        let dir = tempfile::tempdir().unwrap();
        let os = Os::with_faults(Arc::new(FailOnce(Mutex::new(Some("make the second")))));
        os.create_dir("make the first", &dir.path().join("a"))
            .unwrap();
        let error = os
            .create_dir("make the second", &dir.path().join("b"))
            .unwrap_err();
        assert_eq!(error.kind(), HostErrorKind::NoSpace);
        assert!(!dir.path().join("b").exists());
        os.create_dir("make the second", &dir.path().join("b"))
            .unwrap();
    }

    #[test]
    fn a_directory_is_private_and_claims_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run");
        let os = Os::new();
        os.create_dir("make", &path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        let error = os.create_dir("make", &path).unwrap_err();
        assert_eq!(error.kind(), HostErrorKind::AlreadyExists);
        os.create_dir_all("make", &path.join("x/y")).unwrap();
        os.create_dir_all("make", &path.join("x/y")).unwrap();
    }

    #[test]
    fn an_atomic_write_replaces_and_leaves_no_temporary_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        let os = Os::new();
        for (bytes, durability) in [("one", Durability::Cached), ("two", Durability::Synced)] {
            os.write_file_atomic("write", &path, bytes.as_bytes(), 0o600, durability)
                .unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), bytes);
        }
        // A directory in the way makes the rename fail.
        let blocked = dir.path().join("blocked");
        fs::create_dir(&blocked).unwrap();
        os.write_file_atomic("write", &blocked, b"x", 0o600, Durability::Cached)
            .unwrap_err();
        let mut names: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["blocked", "state.json"]);
    }

    #[test]
    fn removing_a_tree_never_follows_links_and_may_be_repeated() {
        let dir = tempfile::tempdir().unwrap();
        let kept = dir.path().join("kept");
        fs::create_dir(&kept).unwrap();
        fs::write(kept.join("file"), "precious").unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir_all(tree.join("a/b")).unwrap();
        symlink(&kept, tree.join("a/link")).unwrap();
        let link = dir.path().join("link");
        symlink(&kept, &link).unwrap();
        let os = Os::new();
        for path in [&tree, &tree, &link, &link] {
            os.remove_tree("remove", path).unwrap();
            assert!(fs::symlink_metadata(path).is_err());
        }
        assert_eq!(fs::read_to_string(kept.join("file")).unwrap(), "precious");
    }

    #[test]
    fn a_lock_is_held_by_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let os = Os::new();
        let held = os.lock("lock", &path).unwrap();
        assert!(os.try_lock("lock", &path).unwrap().is_none());
        drop(held);
        assert!(os.try_lock("lock", &path).unwrap().is_some());
    }

    /// Waits until somebody waits for a lock on the file (`/proc/locks`, proc_locks(5)).
    fn wait_for_waiter(file: u64) {
        let waits = |line: &str| line.contains("->") && line.contains(&format!(":{file} "));
        while !fs::read_to_string("/proc/locks")
            .unwrap()
            .lines()
            .any(waits)
        {
            std::thread::yield_now();
        }
    }

    #[test]
    fn who_waited_for_a_lock_has_the_file_that_is_there_now() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let os = Os::new();
        let held = os.lock("lock", &path).unwrap();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| os.lock("lock", &path).unwrap());
            wait_for_waiter(fs::metadata(&path).unwrap().ino());
            os.remove_file("remove", &path).unwrap();
            drop(held);
            let _theirs = waiter.join().unwrap();
            assert!(path.exists());
            assert!(os.try_lock("lock", &path).unwrap().is_none());
        });
    }
}

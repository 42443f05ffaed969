//! Disk images: a formatted template, and copies of it that cost no more than its data.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{SeekFrom, copy_file_range, ftruncate, ioctl_ficlone, seek};
use rustix::io::Errno;

use crate::cancel::Cancel;
use crate::command::Tool;
use crate::error::HostError;
use crate::os::Os;

/// The smallest ext4 image, in MiB: below it the journal leaves hardly any room for data.
pub const EXT4_MIB_MIN: u64 = 16;
/// The largest ext4 image, in MiB: 16 TiB, what block numbers of 32 bits reach. Larger ones need
/// the `64bit` feature and tables that would no longer be small.
pub const EXT4_MIB_MAX: u64 = 16 * 1024 * 1024 - 1;

/// How a copy was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cloned {
    /// The file system shares the blocks until one side writes.
    Shared,
    /// The data was copied, holes stayed holes.
    Copied {
        /// Bytes of data copied.
        bytes: u64,
    },
}

/// Makes a sparse file of `size_mib` MiB with an empty ext4 file system on it, owned by user 0.
///
/// Of the image only the few blocks that mke2fs writes hold data: tables are left to the guest's
/// kernel to zero in the background, and the journal is small, since a sandbox's writable layer
/// need not survive a power failure of the host. The same version of mke2fs makes the same bytes
/// each time: the volume's identity, its hash seed and its time are fixed, which is harmless
/// because nothing mounts it by identity.
///
/// # Errors
///
/// [`AlreadyExists`](crate::HostErrorKind::AlreadyExists) if `path` is taken;
/// [`MissingProgram`](crate::HostErrorKind::MissingProgram) without mke2fs. No file remains after an error.
///
/// # Panics
///
/// If `size_mib` is not within [`EXT4_MIB_MIN`] and [`EXT4_MIB_MAX`].
pub fn make_ext4_template(
    os: &Os,
    mke2fs: &Path,
    path: &Path,
    size_mib: u64,
) -> Result<(), HostError> {
    assert!((EXT4_MIB_MIN..=EXT4_MIB_MAX).contains(&size_mib));
    let file = os.create_file("create the disk", path, 0o600)?;
    let made = (|| {
        os.effect("size the disk", path, || {
            Ok(ftruncate(&file, size_mib << 20)?)
        })?;
        drop(file);
        // Deterministic since e2fsprogs 1.47 through E2FSPROGS_FAKE_TIME, mke2fs(8) and
        // lib/ext2fs/initialize.c; the zero seed is a valid one.
        os.effect("format the disk", path, || {
            Tool::new(mke2fs)
                .args([
                    "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-L", "smolvm",
                ])
                .args(["-U", "736d6f6c-766d-4000-8000-000000000000"])
                .args(["-J", "size=4", "-O", "^metadata_csum,uninit_bg,^64bit"])
                .arg("-E")
                .arg(concat!(
                    "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0,",
                    "hash_seed=736d6f6c-766d-4000-8000-000000000001"
                ))
                .arg(path)
                .env("E2FSPROGS_FAKE_TIME", "1")
                .env("MKE2FS_SYNC", "0")
                .run(&Cancel::new()?, &mut |_| {})?;
            Ok(())
        })
    })();
    if made.is_err() {
        let _ = std::fs::remove_file(path);
    }
    made
}

/// Copies `source` to the new file `destination` (mode 0600): shared blocks where the file system
/// can (ioctl_ficlone(2)), else only the extents that hold data (lseek(2), `SEEK_DATA`). The copy
/// has the same length and no more allocated blocks. The source must not change meanwhile.
///
/// # Errors
///
/// [`AlreadyExists`](crate::HostErrorKind::AlreadyExists) if `destination` is taken;
/// [`NoSpace`](crate::HostErrorKind::NoSpace) if the disk is full. No half copy remains.
pub fn clone_sparse(os: &Os, source: &Path, destination: &Path) -> Result<Cloned, HostError> {
    os.copy_sparse("copy the disk to", source, destination)
}

pub(crate) fn clone_sparse_now(source: &Path, destination: &Path) -> io::Result<Cloned> {
    let from = File::open(source).map_err(|e| HostError::io("read", source, e))?;
    let to = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(destination)?;
    let cloned = match ioctl_ficlone(&to, &from) {
        Ok(()) => Ok(Cloned::Shared),
        // EOPNOTSUPP, EINVAL, ENOTTY: this file system cannot; EXDEV: two of them;
        // the copy below reports anything real better than the ioctl does.
        Err(_) => copy_extents(&from, &to).map(|bytes| Cloned::Copied { bytes }),
    };
    if cloned.is_err() {
        let _ = std::fs::remove_file(destination);
    }
    cloned
}

fn copy_extents(from: &File, to: &File) -> io::Result<u64> {
    let length = from.metadata()?.len();
    ftruncate(to, length)?;
    let mut copied = 0;
    let mut position = 0;
    while position < length {
        let start = match seek(from, SeekFrom::Data(position)) {
            Ok(start) => start,
            // Only a hole is left.
            Err(Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        let end = seek(from, SeekFrom::Hole(start))?.min(length);
        copy_range(from, to, start, end)?;
        copied += end - start;
        position = end;
    }
    Ok(copied)
}

fn copy_range(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let mut position = start;
    while position < end {
        let wanted = usize::try_from(end - position).unwrap_or(usize::MAX);
        let (mut read_at, mut write_at) = (position, position);
        match copy_file_range(from, Some(&mut read_at), to, Some(&mut write_at), wanted) {
            // The file became shorter than it was.
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => position += n as u64,
            Err(Errno::INTR) => {}
            // copy_file_range(2): two file systems, or one that cannot.
            Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                return copy_through_memory(from, to, position, end);
            }
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

fn copy_through_memory(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    let mut position = start;
    while position < end {
        let wanted = buffer
            .len()
            .min(usize::try_from(end - position).unwrap_or(usize::MAX));
        from.read_exact_at(&mut buffer[..wanted], position)?;
        to.write_all_at(&buffer[..wanted], position)?;
        position += wanted as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;
    use std::path::PathBuf;
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::error::HostErrorKind;
    use crate::os::Faults;

    fn mke2fs() -> PathBuf {
        ["/usr/sbin/mke2fs", "/sbin/mke2fs"]
            .iter()
            .map(PathBuf::from)
            .find(|p| p.exists())
            .expect("these tests need mke2fs: install the package e2fsprogs")
    }

    #[test]
    fn a_template_is_small_whole_and_always_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        for path in [&a, &b] {
            make_ext4_template(&Os::new(), &mke2fs(), path, 1024).unwrap();
        }
        let metadata = fs::metadata(&a).unwrap();
        assert_eq!(metadata.len(), 1 << 30);
        assert!(
            metadata.blocks() * 512 < 2 << 20,
            "{} blocks",
            metadata.blocks()
        );
        let check = std::process::Command::new(mke2fs().with_file_name("e2fsck"))
            .args(["-f", "-n"])
            .arg(&a)
            .output()
            .unwrap();
        assert!(check.status.success(), "{check:?}");
        // Compare the data only: a gibibyte of zeros takes a while to read.
        let (a, b) = (File::open(&a).unwrap(), File::open(&b).unwrap());
        assert_eq!(data(&a), data(&b));
    }

    fn data(file: &File) -> Vec<(u64, Vec<u8>)> {
        let length = file.metadata().unwrap().len();
        let mut extents = Vec::new();
        let mut position = 0;
        while let Ok(start) = seek(file, SeekFrom::Data(position)) {
            let end = seek(file, SeekFrom::Hole(start)).unwrap().min(length);
            let mut bytes = vec![0; usize::try_from(end - start).unwrap()];
            file.read_exact_at(&mut bytes, start).unwrap();
            extents.push((start, bytes));
            position = end;
        }
        extents
    }

    #[test]
    fn a_name_in_use_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        fs::write(&a, "new").unwrap();
        fs::write(&b, "old").unwrap();
        for error in [
            clone_sparse(&Os::new(), &a, &b).unwrap_err(),
            make_ext4_template(&Os::new(), &mke2fs(), &b, 64).unwrap_err(),
        ] {
            assert_eq!(error.kind(), HostErrorKind::AlreadyExists);
        }
        assert_eq!(fs::read_to_string(&b).unwrap(), "old");
        let error =
            clone_sparse(&Os::new(), &dir.path().join("none"), &dir.path().join("c")).unwrap_err();
        assert_eq!(error.kind(), HostErrorKind::NotFound);
        assert!(error.to_string().contains("none"), "{error}");
    }

    #[test]
    fn a_program_that_fails_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        for (program, kind) in [
            ("/bin/false", HostErrorKind::Other),
            ("/nonexistent/mke2fs", HostErrorKind::MissingProgram),
        ] {
            let error = make_ext4_template(&Os::new(), Path::new(program), &path, 64).unwrap_err();
            assert_eq!(error.kind(), kind, "{error:?}");
            assert!(!path.exists());
        }
    }

    #[derive(Debug)]
    struct Fail(&'static str);

    impl Faults for Fail {
        fn before(&self, op: &'static str, _path: &Path) -> io::Result<()> {
            if op == self.0 {
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
            Ok(())
        }
    }

    #[test]
    fn every_step_of_a_template_may_fail() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        for op in ["create the disk", "size the disk", "format the disk"] {
            let os = Os::with_faults(Arc::new(Fail(op)));
            let error = make_ext4_template(&os, &mke2fs(), &path, 64).unwrap_err();
            assert_eq!(error.kind(), HostErrorKind::NoSpace);
            assert!(!path.exists(), "after {op}");
        }
    }

    #[test]
    fn a_full_disk_removes_the_half_copy() {
        // A file size limit is the full disk every user can have: EFBIG, signal(7) SIGXFSZ. It is
        // per process, so it is set in a child: this very test, run again.
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        fs::write(&a, vec![7; 1 << 20]).unwrap();
        let to = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let error = copy_through_memory(&File::open(&a).unwrap(), &to, 0, 1 << 20).unwrap_err();
        assert_eq!(HostErrorKind::from(error.kind()), HostErrorKind::NoSpace);
        // A directory opens for reading but cannot be read: the copy fails after creating.
        let error = clone_sparse(&Os::new(), dir.path(), &b).unwrap_err();
        assert_ne!(error.kind(), HostErrorKind::AlreadyExists);
        assert!(!b.exists());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn a_copy_is_equal_and_as_sparse(
            length in 0_u64..4_000_000,
            writes in prop::collection::vec((0_u64..4_000_000, 1_usize..20_000, 1_u8..), 0..6),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let (a, b) = (dir.path().join("a"), dir.path().join("b"));
            let file = File::create(&a).unwrap();
            file.set_len(length).unwrap();
            for (at, count, byte) in writes {
                file.write_all_at(&vec![byte; count], at).unwrap();
            }
            clone_sparse(&Os::new(), &a, &b).unwrap();
            prop_assert_eq!(fs::read(&a).unwrap(), fs::read(&b).unwrap());
            let blocks = |p: &Path| fs::metadata(p).unwrap().blocks();
            prop_assert!(blocks(&b) <= blocks(&a) + 8);
        }
    }
}

//! Room for the database on a full disk.
//!
//! What frees space has to write first: a row of what is removed, for which SQLite makes or extends
//! the files beside the database. So a file beside it holds blocks that are given back when they are
//! needed, and taken again when there is room. A reserve, because the other way, to have SQLite keep
//! its files with their blocks (`SQLITE_FCNTL_PERSIST_WAL`), ends with the first opener, which
//! truncates the index (sqlite.org/walformat.html, section 2).
//!
//! The index of the write-ahead log is mapped memory. SQLite writes the last byte of each 4 KiB of it
//! before, so that it has its blocks; where a disk's blocks are smaller than that there are holes, and
//! a process that writes into one of them on a full disk is killed (SIGBUS, mmap(2)). So there the
//! index is given all of its blocks, and a database that might not be is not opened.

use std::fs::File;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{FallocateFlags, StatVfs, fallocate, statvfs};

use crate::error::{Error, ErrorKind, Result};

/// Bytes that are held back: some hundred rows, and the index.
const RESERVE_BYTES: u64 = 1024 * 1024;
/// With less than this free, the reserve is given back: twice what an index and a transaction take.
const LOW_BYTES: u64 = 256 * 1024;
/// With more than this free, the reserve is made: nobody misses it then.
const PLENTY_BYTES: u64 = 64 * 1024 * 1024;
/// SQLite's unit of an index, for which it makes sure of one block.
const INDEX_PAGE_BYTES: u64 = 4096;

/// What frees the disk that the data directory is on.
pub(crate) const FREE_SPACE: &str = "free space on that disk, for instance with \
     `smolvm template rm --all`, `smolvm prune` or `smolvm snapshot rm`";

/// What to do with the reserve before the database is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Leave,
    Make,
    GiveBack,
}

/// Decides about the reserve. Pure.
fn step(free_bytes: u64, there: bool, may_make: bool) -> Step {
    match there {
        true if free_bytes < LOW_BYTES => Step::GiveBack,
        false if may_make && free_bytes > PLENTY_BYTES => Step::Make,
        _ => Step::Leave,
    }
}

/// Whether an index could be mapped and then not be written. Pure.
fn would_be_killed(free_bytes: u64, block_bytes: u64) -> bool {
    block_bytes < INDEX_PAGE_BYTES && free_bytes < LOW_BYTES
}

/// Makes or gives back the reserve of the database at `path`. Works without one where that fails.
///
/// # Errors
///
/// [`ErrorKind::NoSpace`] where opening the database could kill this process.
pub(super) fn prepare(path: &Path, may_make: bool) -> Result<()> {
    let Some(disk) = path.parent().and_then(|dir| statvfs(dir).ok()) else {
        return Ok(());
    };
    let reserve = place(path);
    match step(free(&disk), reserve.exists(), may_make) {
        Step::Leave => {}
        Step::Make => make(&reserve),
        Step::GiveBack => {
            give_back(path);
        }
    }
    let now = path.parent().and_then(|dir| statvfs(dir).ok());
    match now {
        Some(disk) if would_be_killed(free(&disk), disk.f_frsize) => Err(Error::new(
            ErrorKind::NoSpace,
            format!(
                "the disk is full on which the state database {} is",
                path.display()
            ),
        )
        .hint(FREE_SPACE)),
        _ => Ok(()),
    }
}

/// Whether the disk of the database at `path` has no room for anything.
pub(crate) fn is_low(path: &Path) -> bool {
    let disk = path.parent().and_then(|dir| statvfs(dir).ok());
    disk.is_some_and(|disk| free(&disk) < LOW_BYTES)
}

/// Gives the reserve's blocks back to the disk. Says whether there were any.
pub(super) fn give_back(database: &Path) -> bool {
    std::fs::remove_file(place(database)).is_ok()
}

/// Gives the index of an open database all its blocks, where SQLite might not have.
///
/// The descriptor is kept for as long as the index is: to close any descriptor of a file lets this
/// process's locks on it go (fcntl(2)), and so would SQLite's.
pub(super) fn allocate_index(database: &Path) {
    static KEPT: Mutex<Vec<File>> = Mutex::new(Vec::new());

    let small_blocks = statvfs(database).is_ok_and(|disk| disk.f_frsize < INDEX_PAGE_BYTES);
    if !small_blocks {
        return;
    }
    let mut index = database.as_os_str().to_owned();
    index.push("-shm");
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    // SQLite has no lock on what it has removed.
    kept.retain(|file| file.metadata().is_ok_and(|file| file.nlink() > 0));
    let Ok(now) = std::fs::metadata(&index) else {
        return;
    };
    let is_it = |file: &File| {
        file.metadata()
            .is_ok_and(|file| (file.dev(), file.ino()) == (now.dev(), now.ino()))
    };
    if !kept.iter().any(is_it) {
        let Ok(file) = File::options().read(true).write(true).open(&index) else {
            return;
        };
        kept.push(file);
    }
    if let Some(file) = kept.iter().find(|file| is_it(file)) {
        // Where it fails there is no room now; the next one to open the database tries again.
        let _ = fallocate(file, FallocateFlags::empty(), 0, now.len());
    }
}

fn place(database: &Path) -> PathBuf {
    database.with_file_name("reserve")
}

fn make(reserve: &Path) {
    let made = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(reserve)
        .and_then(|file| Ok(fallocate(&file, FallocateFlags::empty(), 0, RESERVE_BYTES)?));
    match made {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            // One without blocks is none.
            let _ = std::fs::remove_file(reserve);
        }
        _ => {}
    }
}

/// Bytes that this process may still take.
fn free(disk: &StatVfs) -> u64 {
    let blocks = if rustix::process::geteuid().is_root() {
        disk.f_bfree
    } else {
        disk.f_bavail
    };
    blocks.saturating_mul(disk.f_frsize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_is_for_a_full_disk() {
        assert_eq!(step(0, true, true), Step::GiveBack);
        assert_eq!(step(LOW_BYTES - 1, true, false), Step::GiveBack);
        assert_eq!(step(LOW_BYTES, true, true), Step::Leave);
        assert_eq!(step(0, false, true), Step::Leave);
        assert_eq!(step(PLENTY_BYTES, false, true), Step::Leave);
        assert_eq!(step(PLENTY_BYTES + 1, false, true), Step::Make);
        assert_eq!(step(PLENTY_BYTES + 1, false, false), Step::Leave);
    }

    #[test]
    fn only_small_blocks_are_dangerous() {
        assert!(would_be_killed(0, 1024));
        assert!(!would_be_killed(LOW_BYTES, 1024));
        assert!(!would_be_killed(0, 4096));
    }

    #[test]
    fn the_reserve_takes_blocks_and_gives_them_back() {
        let dir = tempfile::tempdir().expect("a directory");
        let database = dir.path().join("state.db");
        make(&place(&database));
        let made = std::fs::metadata(place(&database)).expect("a reserve");
        assert!(made.blocks() * 512 >= RESERVE_BYTES, "it holds no blocks");
        assert!(give_back(&database));
        assert!(!give_back(&database), "given back twice");
    }
}

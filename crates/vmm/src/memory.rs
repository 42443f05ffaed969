//! A guest's memory, copied while its VMM holds it.
//!
//! A VMM maps guest memory, and Linux tells of each page of a mapping whether the process has one of
//! its own (`Documentation/admin-guide/mm/pagemap.rst`). So what a guest has written since it was
//! restored can be told from what it shares with others, and a snapshot costs as much time as that,
//! not as all of its memory.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, SeekFrom, copy_file_range, seek};
use rustix::io::Errno;

/// Most bytes moved at once.
const CHUNK_BYTES: usize = 1 << 20;

/// The least that is made a hole: a block of the usual file systems.
const HOLE_BYTES: usize = 4096;

/// Entries of the page map read at once; each is for a page.
const ENTRIES: usize = 16 * 1024;
const ENTRY_BYTES: usize = size_of::<u64>();

/// Guest memory as a part of a process's own.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mapped {
    /// The process, whose user is ours (proc(5): both files below ask for ptrace(2) access).
    pub(crate) pid: u32,
    /// Where it begins.
    pub(crate) address: u64,
    /// How long it is; whole pages.
    pub(crate) bytes: u64,
}

/// Copies the parts of `from` that hold data (lseek(2), `SEEK_DATA`) to the same places of `to`.
/// Returns how many bytes that were.
pub(crate) fn copy_data(from: &File, to: &File) -> io::Result<u64> {
    let length = from.metadata()?.len();
    let (mut copied, mut position) = (0, 0);
    while position < length {
        let start = match seek(from, SeekFrom::Data(position)) {
            Ok(start) => start,
            // Only a hole is left.
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        position = seek(from, SeekFrom::Hole(start))?.min(length);
        copy_range(from, to, start..position)?;
        copied += position - start;
    }
    Ok(copied)
}

fn copy_range(from: &File, to: &File, range: Range<u64>) -> io::Result<()> {
    let (mut read, mut written) = (range.start, range.start);
    while read < range.end {
        let left = usize::try_from(range.end - read).unwrap_or(usize::MAX);
        match copy_file_range(from, Some(&mut read), to, Some(&mut written), left) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(Errno::INTR) => {}
            // Two file systems, or one that cannot.
            Err(Errno::XDEV | Errno::NOSYS | Errno::OPNOTSUPP | Errno::INVAL) => {
                let mut chunk = vec![0; CHUNK_BYTES.min(left)];
                from.read_exact_at(&mut chunk, read)?;
                to.write_all_at(&chunk, read)?;
                read += chunk.len() as u64;
                written = read;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Makes holes of what is zeros in `file`, so that it takes no space. The file is opened again to be
/// read. A file system that has no holes leaves it as it is. Returns how many bytes are holes now.
pub(crate) fn dig_holes(file: &File) -> io::Result<u64> {
    let again = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file));
    let from = File::open(again)?;
    let length = from.metadata()?.len();
    let mut buffer = vec![0; CHUNK_BYTES];
    let (mut dug, mut at) = (0, 0);
    while at < length {
        let left = usize::try_from(length - at).unwrap_or(CHUNK_BYTES);
        let chunk = &mut buffer[..left.min(CHUNK_BYTES)];
        from.read_exact_at(chunk, at)?;
        for run in zero_runs(chunk) {
            let (start, bytes) = (at + run.start as u64, (run.end - run.start) as u64);
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            match rustix::fs::fallocate(file, flags, start, bytes) {
                Ok(()) => dug += bytes,
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(dug),
                Err(error) => return Err(error.into()),
            }
        }
        at += chunk.len() as u64;
    }
    Ok(dug)
}

/// The ranges of `chunk` that are zeros, by whole blocks. Pure.
fn zero_runs(chunk: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (index, block) in chunk.chunks(HOLE_BYTES).enumerate() {
        if block.iter().any(|&byte| byte != 0) {
            continue;
        }
        let start = index * HOLE_BYTES;
        let end = start + block.len();
        match runs.last_mut() {
            Some(run) if run.end == start => run.end = end,
            _ => runs.push(start..end),
        }
    }
    runs
}

impl Mapped {
    /// Copies every page that the process has for itself to the same place of `to`. Where `to` has
    /// holes only, pages of zeros can be left out. The process must not write to them meanwhile.
    /// Returns how many bytes were copied.
    pub(crate) fn copy_private(&self, to: &File, leave_zeros_out: bool) -> io::Result<u64> {
        let page = rustix::param::page_size() as u64;
        let map = File::open(format!("/proc/{}/pagemap", self.pid))?;
        let memory = File::open(format!("/proc/{}/mem", self.pid))?;
        let mut entries = vec![0; ENTRIES * ENTRY_BYTES];
        let mut buffer = vec![0; CHUNK_BYTES];
        let mut copied = 0;
        let pages = self.bytes / page;
        let mut first = 0;
        while first < pages {
            let count = usize::try_from(pages - first).map_or(ENTRIES, |left| left.min(ENTRIES));
            let bytes = &mut entries[..count * ENTRY_BYTES];
            map.read_exact_at(bytes, (self.address / page + first) * ENTRY_BYTES as u64)?;
            for run in private_runs(bytes) {
                let mut at = (first + run.start) * page;
                let end = (first + run.end) * page;
                while at < end {
                    let left = usize::try_from(end - at).unwrap_or(CHUNK_BYTES);
                    let chunk = &mut buffer[..left.min(CHUNK_BYTES)];
                    memory.read_exact_at(chunk, self.address + at)?;
                    if !leave_zeros_out || chunk.iter().any(|&byte| byte != 0) {
                        to.write_all_at(chunk, at)?;
                        copied += chunk.len() as u64;
                    }
                    at += chunk.len() as u64;
                }
            }
            first += count as u64;
        }
        Ok(copied)
    }
}

/// The ranges of pages, counted from the first entry, that the process has for itself. Pure.
fn private_runs(entries: &[u8]) -> Vec<Range<u64>> {
    let (words, _) = entries.as_chunks::<ENTRY_BYTES>();
    let mut runs: Vec<Range<u64>> = Vec::new();
    for (index, word) in (0..).zip(words) {
        if !is_private(u64::from_ne_bytes(*word)) {
            continue;
        }
        match runs.last_mut() {
            Some(run) if run.end == index => run.end += 1,
            _ => runs.push(index..index + 1),
        }
    }
    runs
}

/// Whether there is a page, in memory or swapped out, and it belongs neither to a file nor to
/// memory that is shared.
fn is_private(entry: u64) -> bool {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const FILE_OR_SHARED: u64 = 1 << 61;
    entry & (PRESENT | SWAPPED) != 0 && entry & FILE_OR_SHARED == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const FILE: u64 = 1 << 61;

    #[test]
    fn runs_are_of_private_pages() {
        let check = |entries: &[u64], expected: &[Range<u64>]| {
            let bytes: Vec<u8> = entries
                .iter()
                .flat_map(|entry| entry.to_ne_bytes())
                .collect();
            assert_eq!(private_runs(&bytes), expected, "{entries:x?}");
        };
        check(&[], &[]);
        check(&[0, PRESENT | FILE, SWAPPED | FILE], &[]);
        check(&[PRESENT, PRESENT, 0, SWAPPED], &[0..2, 3..4]);
        check(&[PRESENT | 0x1234, PRESENT | FILE, SWAPPED], &[0..1, 2..3]);
    }

    #[test]
    fn zeros_become_holes_and_nothing_else_changes() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("memory");
        let mut file = File::create(&path).expect("a file");
        let mut bytes = vec![0; 3 * CHUNK_BYTES + 5000];
        for at in [
            0,
            5 * HOLE_BYTES + 7,
            CHUNK_BYTES - 1,
            3 * CHUNK_BYTES + 4999,
        ] {
            bytes[at] = 1;
        }
        file.write_all(&bytes).expect("write");
        let dug = dig_holes(&file).expect("dig");
        // All but the blocks of the four bytes.
        assert_eq!(
            dug,
            (bytes.len() - 3 * HOLE_BYTES - (5000 - HOLE_BYTES)) as u64
        );
        assert!(std::fs::read(&path).expect("read") == bytes, "it changed");
        let blocks = std::os::unix::fs::MetadataExt::blocks(&file.metadata().expect("a file"));
        assert!(blocks * 512 <= 16 * HOLE_BYTES as u64, "{blocks}");
    }

    /// Against the kernel: a private mapping of this test's own, of which some pages are written to.
    #[test]
    fn what_was_written_to_a_private_mapping_is_copied() {
        let page = rustix::param::page_size();
        let mut base = tempfile::tempfile().expect("a file");
        base.write_all(&vec![1; 4 * page]).expect("write");
        base.set_len(16 * page as u64).expect("a hole at the end");
        let map = crate::sys::tests::PrivateMap::new(&base, 16 * page);
        // Read, which makes no page of one's own; written in the data, and in the hole.
        assert_eq!(map.read(0), 1);
        for at in [1, 2, 9] {
            map.write(at * page, 7);
        }

        let copy = tempfile::tempfile().expect("a file");
        copy.set_len(16 * page as u64).expect("a size");
        assert_eq!(copy_data(&base, &copy).expect("copy"), 4 * page as u64);
        let mapped = Mapped {
            pid: std::process::id(),
            address: map.address(),
            bytes: 16 * page as u64,
        };
        let copied = mapped.copy_private(&copy, false).expect("copy");
        assert_eq!(copied, 3 * page as u64);

        let mut expected = vec![0; 16 * page];
        expected[..4 * page].fill(1);
        for at in [1, 2, 9] {
            expected[at * page] = 7;
        }
        let mut found = vec![0; 16 * page];
        copy.read_exact_at(&mut found, 0).expect("read");
        assert!(found == expected, "the copy differs");

        let holes = tempfile::tempfile().expect("a file");
        holes.set_len(16 * page as u64).expect("a size");
        map.write(9 * page, 0);
        let copied = mapped.copy_private(&holes, true).expect("copy");
        assert_eq!(copied, 2 * page as u64, "the page of zeros is left out");
    }
}

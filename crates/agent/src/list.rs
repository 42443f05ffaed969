//! Listing a directory, or describing one file.

use std::os::fd::AsFd;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;
use smolvm_proto::limits::{ENTRIES_MAX, PAYLOAD_BYTES_MAX};
use smolvm_proto::message::{Entry, EntryKind, Event, ListRequest};

use crate::failure::from_errno;
use crate::files::absolute;
use crate::stream::{Last, Stop, Stream};

/// Bytes of names and targets in one event, so that it fits a frame with all its numbers.
const NAMES_BYTES_MAX: usize = PAYLOAD_BYTES_MAX / 2;

const _: () = assert!(
    NAMES_BYTES_MAX + ENTRIES_MAX * 128 + 2 * 4096 < PAYLOAD_BYTES_MAX,
    "an event with the longest names fits a frame"
);

/// Carries the request out.
///
/// A directory is read and described as it is at one moment for each entry; an entry that vanishes
/// in between is left out.
pub(crate) fn list(stream: &Stream, request: &ListRequest) -> Result<Last, Stop> {
    let path = absolute(&request.path)?;
    let doing = format!("listing {}", path.display());
    let refused = |errno| from_errno(&doing, errno);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = if request.itself {
        Err(Errno::NOTDIR)
    } else {
        rustix::fs::open(path, flags, Mode::empty())
    };
    let directory = match opened {
        Ok(directory) => directory,
        Err(Errno::NOTDIR) => {
            let name = path.file_name().unwrap_or(path.as_os_str());
            let name = std::os::unix::ffi::OsStrExt::as_bytes(name);
            let entry = describe(CWD, path, name).map_err(refused)?;
            stream.send_event(&Event::Entries(vec![entry]))?;
            return Ok(Last::done());
        }
        Err(errno) => return Err(refused(errno).into()),
    };
    let mut names = Vec::new();
    for entry in Dir::read_from(&directory).map_err(refused)? {
        let entry = entry.map_err(refused)?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
        }
    }
    names.sort_unstable();
    let mut entries = Vec::new();
    let mut bytes = 0;
    for name in names {
        let entry = match describe(directory.as_fd(), name.as_slice(), &name) {
            Ok(entry) => entry,
            Err(Errno::NOENT) => continue,
            Err(errno) => return Err(refused(errno).into()),
        };
        bytes += entry.name.len() + entry.target.as_ref().map_or(0, |target| target.len());
        entries.push(entry);
        if entries.len() == ENTRIES_MAX || bytes > NAMES_BYTES_MAX {
            stream.send_event(&Event::Entries(std::mem::take(&mut entries)))?;
            bytes = 0;
        }
    }
    if !entries.is_empty() {
        stream.send_event(&Event::Entries(entries))?;
    }
    Ok(Last::done())
}

fn describe<P: rustix::path::Arg + Copy>(
    directory: std::os::fd::BorrowedFd<'_>,
    path: P,
    name: &[u8],
) -> rustix::io::Result<Entry> {
    let status = rustix::fs::statat(directory, path, AtFlags::SYMLINK_NOFOLLOW)?;
    let kind = match FileType::from_raw_mode(status.st_mode) {
        FileType::RegularFile => EntryKind::File,
        FileType::Directory => EntryKind::Directory,
        FileType::Symlink => EntryKind::Symlink,
        _ => EntryKind::Other,
    };
    let target = if kind == EntryKind::Symlink {
        let target = rustix::fs::readlinkat(directory, path, Vec::new())?;
        Some(target.into_bytes().into())
    } else {
        None
    };
    Ok(Entry {
        name: name.to_vec().into(),
        kind,
        mode: status.st_mode & 0o7777,
        size: u64::try_from(status.st_size).unwrap_or(0),
        modified_s: status.st_mtime,
        uid: status.st_uid,
        gid: status.st_gid,
        target,
    })
}

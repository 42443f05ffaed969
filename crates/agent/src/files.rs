//! Sending a file or tree to the host as a tar stream.
//!
//! What is in the stream: directories, regular files with their holes (GNU format, so every tar
//! reads it), and symbolic links as links. What is not: sockets, pipes and devices, which have no
//! content to send, and what is below mounted kernel file systems such as /proc. Several names of
//! one file become several files. A file that shrinks while it is read is filled up with zeros,
//! one that grows is cut, so that the stream stays whole.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Component, Path};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, SeekFrom};
use rustix::io::Errno;
use smolvm_proto::Channel;
use smolvm_proto::message::{ArchiveRequest, Event, Failure, FailureKind};
use tar::{Builder, EntryType, GnuExtSparseHeader, Header};

use crate::failure::{failure, from_errno, from_io};
use crate::port::DATA_BYTES_MAX;
use crate::stream::{Last, Stop, Stream};

/// Parts of a file with holes that are described one by one; a file with more is sent whole.
const SEGMENTS_MAX: usize = 16 * 1024;

/// Most bytes taken of a file that says it is empty.
const MADE_UP_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Kernel file systems (linux/magic.h): generated when read, or endless.
const KERNEL_FILE_SYSTEMS: &[u64] = &[
    0x0000_9fa0, // proc
    0x6265_6572, // sysfs
    0x6367_7270, // cgroup2
    0x0027_e0eb, // cgroup
    0x6462_6720, // debugfs
    0x7472_6163, // tracefs
    0x7363_6673, // securityfs
    0xcafe_4a11, // bpf
];

/// Carries the request out.
pub(crate) fn archive(stream: &Stream, request: &ArchiveRequest) -> Result<Last, Stop> {
    let path = absolute(&request.path)?;
    let shown = path.display();
    let mut flags = OFlags::PATH | OFlags::CLOEXEC;
    if !request.follow {
        flags |= OFlags::NOFOLLOW;
    }
    let top = rustix::fs::open(path, flags, Mode::empty())
        .map_err(|errno| from_errno(&format!("opening {shown}"), errno))?;
    // The protocol's names: the path's last component, and `.` where it has none.
    let name = match path.components().next_back() {
        Some(Component::Normal(name)) => name.as_bytes(),
        _ => b".",
    };
    let mut tree = Tree {
        top,
        shown: path,
        builder: Builder::new(Sink {
            stream,
            buffer: Vec::with_capacity(DATA_BYTES_MAX),
            gone: false,
        }),
    };
    let sent = tree.send(name).and_then(|()| {
        tree.builder.finish()?;
        tree.builder.get_mut().flush()?;
        Ok(())
    });
    match sent {
        Ok(()) => Ok(Last {
            channels: &[Channel::Output],
            event: Event::Done,
        }),
        Err(_) if tree.builder.get_ref().gone => Err(Stop::Gone),
        Err(Trouble::Said(failure)) => Err(failure.into()),
        Err(Trouble::Io(error)) => Err(from_io(&format!("archiving {shown}"), &error).into()),
    }
}

/// The path of a request, which has to be absolute.
pub(crate) fn absolute(path: &[u8]) -> Result<&Path, Failure> {
    let path = Path::new(std::ffi::OsStr::from_bytes(path));
    if path.is_absolute() && !path.as_os_str().as_bytes().contains(&0) {
        Ok(path)
    } else {
        Err(failure(
            FailureKind::InvalidInput,
            format!("{}: the path is not absolute", path.display()),
        ))
    }
}

/// Turns bytes into data frames, as credit comes in.
struct Sink<'a> {
    stream: &'a Stream,
    buffer: Vec<u8>,
    gone: bool,
}

impl Write for Sink<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = DATA_BYTES_MAX - self.buffer.len();
        let now = bytes.len().min(room);
        self.buffer.extend_from_slice(&bytes[..now]);
        if self.buffer.len() == DATA_BYTES_MAX {
            self.flush()?;
        }
        Ok(now)
    }

    fn flush(&mut self) -> io::Result<()> {
        let sent = self.stream.send_all(Channel::Output, &self.buffer);
        self.buffer.clear();
        sent.map_err(|_| {
            self.gone = true;
            io::ErrorKind::ConnectionAborted.into()
        })
    }
}

enum Trouble {
    /// About a file, with its name.
    Said(Failure),
    /// About the stream.
    Io(io::Error),
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

struct Tree<'a> {
    /// What the request names, opened as a path only.
    top: OwnedFd,
    shown: &'a Path,
    builder: Builder<Sink<'a>>,
}

impl Tree<'_> {
    /// Sends the whole tree, each directory before what is in it, by name.
    fn send(&mut self, name: &[u8]) -> Result<(), Trouble> {
        let mut stack = Vec::new();
        if self.send_one(b"", name)? {
            stack.push((Vec::new(), self.names(b"")?));
        }
        // Names still to send of each directory on the way, the next one last.
        while let Some((directory, names)) = stack.last_mut() {
            let Some(child) = names.pop() else {
                stack.pop();
                continue;
            };
            let mut path: Vec<u8> = directory.clone();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(&child);
            let entry = [name, b"/", &path].concat();
            if self.send_one(&path, &entry)? {
                let names = self.names(&path)?;
                stack.push((path, names));
            }
        }
        Ok(())
    }

    fn trouble(&self, doing: &str, path: &[u8], errno: Errno) -> Trouble {
        let path = Path::new(std::ffi::OsStr::from_bytes(path));
        let shown = self.shown.join(path);
        Trouble::Said(from_errno(&format!("{doing} {}", shown.display()), errno))
    }

    /// Opens something in the tree, by its path below the top. Symbolic links are never followed,
    /// whatever the guest's programs move about meanwhile.
    fn open(&self, path: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let flags = flags | OFlags::CLOEXEC;
        if path.is_empty() {
            // The top may be a file or a link, so it is opened again through its descriptor.
            let through = format!(
                "/proc/self/fd/{}",
                std::os::fd::AsRawFd::as_raw_fd(&self.top)
            );
            return rustix::fs::openat(CWD, through, flags, Mode::empty());
        }
        rustix::fs::openat2(
            &self.top,
            path,
            flags | OFlags::NOFOLLOW,
            Mode::empty(),
            ResolveFlags::NO_SYMLINKS,
        )
    }

    /// Sends one entry. Returns whether it is a directory to go into.
    fn send_one(&mut self, path: &[u8], entry: &[u8]) -> Result<bool, Trouble> {
        let found = if path.is_empty() {
            self.top.try_clone()?
        } else {
            match self.open(path, OFlags::PATH) {
                Ok(found) => found,
                // Removed since its directory was read.
                Err(Errno::NOENT) => return Ok(false),
                Err(errno) => return Err(self.trouble("opening", path, errno)),
            }
        };
        let found = File::from(found);
        let status = found.metadata()?;
        let mut header = Header::new_gnu();
        header.set_mode(status.mode() & 0o7777);
        header.set_uid(u64::from(status.uid()));
        header.set_gid(u64::from(status.gid()));
        header.set_mtime(u64::try_from(status.mtime()).unwrap_or(0));
        header.set_size(0);
        let kind = status.file_type();
        if kind.is_dir() {
            header.set_entry_type(EntryType::Directory);
            self.append(header, &[entry, b"/"].concat(), &mut io::empty())?;
            let is_kernels = rustix::fs::fstatfs(&found).is_ok_and(|file_system| {
                KERNEL_FILE_SYSTEMS.contains(&file_system.f_type.cast_unsigned())
            });
            Ok(!is_kernels)
        } else if kind.is_symlink() {
            let target = rustix::fs::readlinkat(&found, "", Vec::new())
                .map_err(|errno| self.trouble("reading the link", path, errno))?;
            header.set_entry_type(EntryType::Symlink);
            let target = target.as_bytes();
            if header.set_link_name_literal(target).is_err() {
                self.append_long(b'K', target)?;
            }
            self.append(header, entry, &mut io::empty())?;
            Ok(false)
        } else if kind.is_file() {
            match self.open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY) {
                Ok(file) => self.append_file(header, entry, File::from(file))?,
                Err(Errno::NOENT) => {}
                Err(errno) => return Err(self.trouble("opening", path, errno)),
            }
            Ok(false)
        } else if path.is_empty() {
            // Passed over in a tree; asked for by name, it would look as if it had been sent.
            let shown = self.shown.display();
            Err(Trouble::Said(failure(
                FailureKind::InvalidInput,
                format!("{shown} is a device, pipe or socket, which has no content to send"),
            )))
        } else {
            Ok(false)
        }
    }

    /// Names in a directory, in reverse order.
    fn names(&self, path: &[u8]) -> Result<Vec<Vec<u8>>, Trouble> {
        let directory = self
            .open(path, OFlags::RDONLY | OFlags::DIRECTORY)
            .and_then(rustix::fs::Dir::new)
            .map_err(|errno| self.trouble("opening the directory", path, errno))?;
        let mut names = Vec::new();
        for entry in directory {
            let entry =
                entry.map_err(|errno| self.trouble("reading the directory", path, errno))?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                names.push(name.to_vec());
            }
        }
        names.sort_unstable_by(|one, other| other.cmp(one));
        Ok(names)
    }

    fn append_file(&mut self, mut header: Header, entry: &[u8], file: File) -> io::Result<()> {
        // Looked at again: this descriptor may be of another file than the one found before.
        let status = file.metadata()?;
        let size = if status.is_file() { status.size() } else { 0 };
        if status.is_file() && size == 0 {
            // What the kernel makes up as it is read, as in /proc, has a size of 0 (proc(5)).
            let mut content = Vec::new();
            (&file).take(MADE_UP_BYTES_MAX).read_to_end(&mut content)?;
            header.set_entry_type(EntryType::Regular);
            header.set_size(content.len() as u64);
            return self.append(header, entry, &mut content.as_slice());
        }
        let mut segments = vec![(0, size)];
        let mut prefix = Vec::new();
        if status.blocks() * 512 < size
            && let Some(found) = data_segments(&file, size)
        {
            segments = found;
            prefix = describe_segments(&mut header, &segments, size);
        } else {
            header.set_entry_type(EntryType::Regular);
        }
        header.set_size(segments.iter().map(|(_, length)| length).sum());
        let mut data = Segments {
            file,
            segments: segments.into_iter(),
            current: (0, 0),
        };
        self.append(header, entry, &mut prefix.as_slice().chain(&mut data))
    }

    /// Appends an entry whose header lacks only name and checksum.
    fn append(&mut self, mut header: Header, name: &[u8], data: &mut dyn Read) -> io::Result<()> {
        if name.len() > header.as_old().name.len() {
            self.append_long(b'L', name)?;
        }
        // Not by the library's own setter, which drops a leading `./`.
        let short = name.len().min(header.as_old().name.len());
        header.as_old_mut().name[..short].copy_from_slice(&name[..short]);
        header.set_cksum();
        self.builder.append(&header, data)
    }

    /// Appends a name or link target too long for the next entry's header, as GNU tar does.
    fn append_long(&mut self, kind: u8, text: &[u8]) -> io::Result<()> {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::new(kind));
        let label = b"././@LongLink";
        header.as_old_mut().name[..label.len()].copy_from_slice(label);
        header.set_mode(0);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(text.len() as u64 + 1);
        header.set_cksum();
        self.builder.append(&header, text.chain(&b"\0"[..]))
    }
}

/// The parts of a file that hold data. `None` if the file system cannot tell, or there are too many.
fn data_segments(file: &File, size: u64) -> Option<Vec<(u64, u64)>> {
    let mut segments = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            // No data from here to the end.
            Err(Errno::NXIO) => break,
            Err(_) => return None,
        };
        if start >= size {
            break;
        }
        let end = rustix::fs::seek(file, SeekFrom::Hole(start))
            .ok()?
            .min(size);
        if end <= start || segments.len() == SEGMENTS_MAX {
            return None;
        }
        segments.push((start, end - start));
        at = end;
    }
    Some(segments)
}

/// Writes the map of a file with holes into its header, and returns the blocks that follow it
/// ("Storing Sparse Files", old GNU format, in the manual of GNU tar).
fn describe_segments(header: &mut Header, segments: &[(u64, u64)], size: u64) -> Vec<u8> {
    header.set_entry_type(EntryType::GNUSparse);
    // An empty part at the end says where the file ends when a hole does.
    let mut map = segments
        .iter()
        .copied()
        .chain(std::iter::once((size, 0)))
        .peekable();
    if let Some(gnu) = header.as_gnu_mut() {
        gnu.set_real_size(size);
        for (slot, (offset, length)) in gnu.sparse.iter_mut().zip(map.by_ref()) {
            slot.set_offset(offset);
            slot.set_length(length);
        }
    }
    if let Some(gnu) = header.as_gnu_mut() {
        gnu.set_is_extended(map.peek().is_some());
    }
    let mut blocks = Vec::new();
    while map.peek().is_some() {
        let mut block = GnuExtSparseHeader::new();
        for slot in &mut block.sparse {
            let Some((offset, length)) = map.next() else {
                break;
            };
            slot.set_offset(offset);
            slot.set_length(length);
        }
        block.set_is_extended(map.peek().is_some());
        blocks.extend_from_slice(block.as_bytes());
    }
    blocks
}

/// Reads parts of a file, exactly as long as they were announced.
struct Segments {
    file: File,
    segments: std::vec::IntoIter<(u64, u64)>,
    /// Offset and length of what is left of the current part.
    current: (u64, u64),
}

impl Read for Segments {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.1 == 0 {
            let Some(next) = self.segments.next() else {
                return Ok(0);
            };
            self.current = next;
        }
        let (offset, left) = self.current;
        let length = usize::try_from(left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let mut read = self.file.read_at(&mut buffer[..length], offset)?;
        if read == 0 {
            // The file has become shorter than its header says.
            buffer[..length].fill(0);
            read = length;
        }
        self.current = (offset + read as u64, left - read as u64);
        Ok(read)
    }
}

/// The bytes of a path, for messages and entries.
pub(crate) fn path_of(bytes: &[u8]) -> std::path::PathBuf {
    std::ffi::OsString::from_vec(bytes.to_vec()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_shrinks_is_filled_up_and_one_that_grows_is_cut() {
        let file = tempfile::tempfile().expect("temporary file");
        file.write_all_at(b"abcdefgh", 0).expect("written");
        let mut data = Segments {
            file,
            segments: vec![(0, 3), (6, 6)].into_iter(),
            current: (0, 0),
        };
        let mut read = Vec::new();
        data.read_to_end(&mut read).expect("readable");
        assert_eq!(read, b"abcgh\0\0\0\0");
    }

    #[test]
    fn a_map_of_many_parts_goes_on_in_blocks() {
        let segments: Vec<(u64, u64)> = (0..30).map(|at| (at * 8192, 4096)).collect();
        let mut header = Header::new_gnu();
        let blocks = describe_segments(&mut header, &segments, 30 * 8192);
        // Four parts fit the header and 21 each block; the end is one more.
        assert_eq!(blocks.len(), 2 * 512);
        let gnu = header.as_gnu().expect("made as such");
        assert!(gnu.is_extended());
        assert_eq!(gnu.real_size().expect("a number"), 30 * 8192);
    }
}

//! Sending a file or tree to the host as a tar stream.
//!
//! What is in the stream: directories, regular files with their holes (GNU format, so every tar
//! reads it), and symbolic links as links. What is not: sockets, pipes and devices, which have no
//! content to send, and what is below mounted kernel file systems such as /proc. Several names of
//! one file become several files. A file that shrinks while it is read is filled up with zeros,
//! one that grows is cut, so that the stream stays whole.
//!
//! Asked for everything, it also sends devices and pipes, several names of one file as hard links,
//! times to the nanosecond and extended attributes (pax(1), with the names GNU tar gives them), and
//! only what is on the path's own file system. Sockets are left out there too: a tar stream cannot
//! hold them, and they are of no use without the program that listens.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Component, Path};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, SeekFrom};
use rustix::io::Errno;
use rustix::mount::OpenTreeFlags;
use smolvm_proto::Channel;
use smolvm_proto::message::{ArchiveRequest, Event, Failure, FailureKind};
use tar::{Builder, EntryType, GnuExtSparseHeader, Header};

use crate::failure::{failure, from_errno, from_io};
use crate::port::DATA_BYTES_MAX;
use crate::serve::Agent;
use crate::stream::{Last, Stop, Stream};

/// Parts of a file with holes that are described one by one; a file with more is sent whole.
const SEGMENTS_MAX: usize = 16 * 1024;

/// Most bytes taken of a file that says it is empty.
const MADE_UP_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Most bytes of one extended attribute, and of all names of one file (xattr(7)).
const XATTR_BYTES_MAX: usize = 64 * 1024;

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
pub(crate) fn archive(
    agent: &Agent,
    stream: &Stream,
    request: &ArchiveRequest,
) -> Result<Last, Stop> {
    let path = absolute(&request.path)?;
    let shown = path.display();
    let complete = request.complete == Some(true);
    let (top, complete) = if complete {
        open_complete(path, request.follow).map(|(top, complete)| (top, Some(complete)))
    } else {
        open_as_seen(path, request.follow).map(|top| (top, None))
    }
    .map_err(|errno| from_errno(&format!("opening {shown}"), errno))?;
    // Let go when this function ends, however it ends.
    let _hold = (request.hold == Some(true))
        .then(|| agent.cgroups.as_ref()?.hold())
        .flatten();
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
        complete,
    };
    let sent = tree.begin().and_then(|()| tree.send(name)).and_then(|()| {
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

/// Opens the path with everything that is mounted below it.
fn open_as_seen(path: &Path, follow: bool) -> rustix::io::Result<OwnedFd> {
    let mut flags = OFlags::PATH | OFlags::CLOEXEC;
    if !follow {
        flags |= OFlags::NOFOLLOW;
    }
    rustix::fs::open(path, flags, Mode::empty())
}

/// Opens the path with nothing that is mounted below it: a mount of the same file system that only
/// this descriptor leads to. Outside of a guest that may be forbidden; then directories on other
/// devices are not gone into.
fn open_complete(path: &Path, follow: bool) -> rustix::io::Result<(OwnedFd, Complete)> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if !follow {
        flags |= OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
    }
    match rustix::mount::open_tree(CWD, path, flags) {
        Ok(top) => Ok((top, Complete::default())),
        Err(Errno::PERM) => {
            let top = open_as_seen(path, follow)?;
            let device = rustix::fs::fstat(&top)?.st_dev;
            Ok((
                top,
                Complete {
                    device: Some(device),
                    ..Complete::default()
                },
            ))
        }
        Err(errno) => Err(errno),
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
    /// Set if everything is to be sent.
    complete: Option<Complete>,
}

/// What sending everything has to remember.
#[derive(Default)]
struct Complete {
    /// Where mounts may be in the way: the device to stay on.
    device: Option<u64>,
    /// Files of several names that were sent, by device and inode, with the name they were sent as.
    links: HashMap<(u64, u64), Vec<u8>>,
}

impl Tree<'_> {
    /// Says, where everything was asked for, that everything will come.
    fn begin(&mut self) -> Result<(), Trouble> {
        if self.complete.is_some() {
            let record = record(b"comment", b"complete");
            self.append_extension(EntryType::XGlobalHeader, &record)?;
        }
        Ok(())
    }

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
            return rustix::fs::openat(CWD, through(&self.top), flags, Mode::empty());
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
        let mut header = header(&status);
        let kind = status.file_type();
        let mut pax = Vec::new();
        if let Some(complete) = &self.complete {
            let identity = (status.dev(), status.ino());
            if let Some(first) = complete.links.get(&identity).filter(|_| !kind.is_dir()) {
                header.set_entry_type(EntryType::Link);
                let first = first.clone();
                self.append_link(header, entry, &first)?;
                return Ok(false);
            }
            pax = extras(&found, &status)
                .map_err(|errno| self.trouble("reading the attributes of", path, errno))?;
        }
        let mut sent = true;
        let mut go_in = false;
        if kind.is_dir() {
            header.set_entry_type(EntryType::Directory);
            self.append_extension(EntryType::XHeader, &pax)?;
            self.append(header, &[entry, b"/"].concat(), &mut io::empty())?;
            let is_kernels = rustix::fs::fstatfs(&found).is_ok_and(|file_system| {
                KERNEL_FILE_SYSTEMS.contains(&file_system.f_type.cast_unsigned())
            });
            let elsewhere = self
                .complete
                .as_ref()
                .and_then(|complete| complete.device)
                .is_some_and(|device| device != status.dev());
            go_in = !is_kernels && !elsewhere;
        } else if kind.is_symlink() {
            let target = rustix::fs::readlinkat(&found, "", Vec::new())
                .map_err(|errno| self.trouble("reading the link", path, errno))?;
            header.set_entry_type(EntryType::Symlink);
            self.append_extension(EntryType::XHeader, &pax)?;
            self.append_link(header, entry, target.as_bytes())?;
        } else if kind.is_file() {
            match self.open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY) {
                Ok(file) => {
                    self.append_extension(EntryType::XHeader, &pax)?;
                    self.append_file(header, entry, File::from(file))?;
                }
                Err(Errno::NOENT) => sent = false,
                Err(errno) => return Err(self.trouble("opening", path, errno)),
            }
        } else if self.complete.is_some() && !kind.is_socket() {
            header.set_entry_type(if kind.is_char_device() {
                EntryType::Char
            } else if kind.is_block_device() {
                EntryType::Block
            } else {
                EntryType::Fifo
            });
            if !kind.is_fifo() {
                let device = status.rdev();
                header.set_device_major(rustix::fs::major(device))?;
                header.set_device_minor(rustix::fs::minor(device))?;
            }
            self.append_extension(EntryType::XHeader, &pax)?;
            self.append(header, entry, &mut io::empty())?;
        } else if path.is_empty() {
            // Passed over in a tree; asked for by name, it would look as if it had been sent.
            let shown = self.shown.display();
            return Err(Trouble::Said(failure(
                FailureKind::InvalidInput,
                format!("{shown} is a device, pipe or socket, which has no content to send"),
            )));
        } else {
            sent = false;
        }
        if let Some(complete) = &mut self.complete
            && sent
            && !kind.is_dir()
            && status.nlink() > 1
        {
            let identity = (status.dev(), status.ino());
            complete.links.insert(identity, entry.to_vec());
        }
        Ok(go_in)
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

    /// Appends a symbolic or hard link.
    fn append_link(&mut self, mut header: Header, name: &[u8], target: &[u8]) -> io::Result<()> {
        if header.set_link_name_literal(target).is_err() {
            self.append_long(b'K', target)?;
        }
        self.append(header, name, &mut io::empty())
    }

    /// Appends pax records about the next entry, or about all that follow; nothing if there are none.
    fn append_extension(&mut self, kind: EntryType, records: &[u8]) -> io::Result<()> {
        if records.is_empty() {
            return Ok(());
        }
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(records.len() as u64);
        self.append(header, b"././@PaxHeader", &mut &records[..])
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

/// A path that leads to what is open, also if it is a link or open as a path only.
fn through(fd: &impl AsRawFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// A header that says of a file what every header says; kind, size and names are still to come.
fn header(status: &Metadata) -> Header {
    let mut header = Header::new_gnu();
    header.set_mode(status.mode() & 0o7777);
    header.set_uid(u64::from(status.uid()));
    header.set_gid(u64::from(status.gid()));
    header.set_mtime(u64::try_from(status.mtime()).unwrap_or(0));
    header.set_size(0);
    header
}

/// What a header cannot say of a file, as pax records: a time that is no whole number of seconds
/// after 1970, and extended attributes.
fn extras(found: &File, status: &Metadata) -> rustix::io::Result<Vec<u8>> {
    let mut records = Vec::new();
    if status.mtime() < 0 || status.mtime_nsec() != 0 {
        let time = decimal(status.mtime(), status.mtime_nsec());
        records.extend(record(b"mtime", time.as_bytes()));
    }
    for (name, value) in attributes(&through(found))? {
        // GNU tar writes these two characters of a name so, and reads them back.
        let mut key = b"SCHILY.xattr.".to_vec();
        for byte in name {
            match byte {
                b'%' => key.extend(b"%25"),
                b'=' => key.extend(b"%3D"),
                byte => key.push(byte),
            }
        }
        records.extend(record(&key, &value));
    }
    Ok(records)
}

/// The extended attributes of what a path through /proc leads to.
fn attributes(path: &str) -> rustix::io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    // Most files have none, and one call says so.
    match rustix::fs::listxattr_query(path) {
        Ok(0) | Err(Errno::NOTSUP) => return Ok(Vec::new()),
        Ok(_) => {}
        Err(errno) => return Err(errno),
    }
    let mut names = vec![0; XATTR_BYTES_MAX];
    let length = rustix::fs::listxattr(path, names.as_mut_slice())?;
    let mut found = Vec::new();
    let mut value = vec![0; XATTR_BYTES_MAX];
    for name in names[..length].split(|byte| *byte == 0) {
        if name.is_empty() {
            continue;
        }
        match rustix::fs::getxattr(path, name, value.as_mut_slice()) {
            Ok(length) => found.push((name.to_vec(), value[..length].to_vec())),
            // Taken away since.
            Err(Errno::NODATA) => {}
            Err(errno) => return Err(errno),
        }
    }
    // By name, not as the file system happens to have them.
    found.sort();
    Ok(found)
}

/// `<length> <key>=<value>\n`, the length in decimal and of the whole record; pax(1).
fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + b" =\n".len();
    let mut length = rest;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    [length.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

/// A time in seconds with a fraction. `nanoseconds` go forward from `seconds`, also before 1970.
fn decimal(seconds: i64, nanoseconds: i64) -> String {
    if seconds < 0 && nanoseconds > 0 {
        let (whole, fraction) = (-(seconds + 1), 1_000_000_000 - nanoseconds);
        format!("-{whole}.{fraction:09}")
    } else {
        format!("{seconds}.{nanoseconds:09}")
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
    fn times_and_records_are_as_pax_wants_them() {
        assert_eq!(decimal(12, 0), "12.000000000");
        assert_eq!(decimal(12, 5), "12.000000005");
        assert_eq!(decimal(-2, 750_000_000), "-1.250000000");
        assert_eq!(decimal(-1, 500_000_000), "-0.500000000");
        assert_eq!(decimal(-1, 0), "-1.000000000");
        assert_eq!(record(b"a", b"b"), b"6 a=b\n");
        let long = record(b"key", &[b'v'; 92]);
        assert_eq!(long.len(), 101);
        assert!(long.starts_with(b"101 key=v"), "its own length counts");
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

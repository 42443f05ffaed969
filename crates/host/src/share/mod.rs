//! A directory of the host, served to a guest's kernel in its own protocol (FUSE).
//!
//! A [`Share`] is asked with the bytes that a guest's kernel wrote, and answers with bytes for it. The
//! guest may have written them by itself, so nothing it names is trusted:
//!
//! - It names a file by its number, which it has from here, and one component in a directory. What
//!   stands for the number is an open descriptor of that very file (`O_PATH`), so no exchange of
//!   directories or links at the wrong moment leads anywhere else.
//! - A component is opened with openat2(2), `RESOLVE_BENEATH`, without following any link. Symbolic
//!   links are text to the host; the guest's kernel follows them, in the guest.
//! - Only regular files and directories are opened. Devices are neither made nor opened.
//! - A share that is only read refuses every change here, whatever the guest thinks.
//! - Set-id bits are neither given nor shown.
//!
//! Everything is done as the owner of the directory, or, where this process is not root's, as its own
//! user: [`Share::become_owner`]. What belongs to that user belongs to the sandbox's user in the guest,
//! and everything else to nobody.

mod wire;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, Mode, OFlags, RawDir, RenameFlags, ResolveFlags,
    SeekFrom, Stat, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT,
};
use rustix::io::{Errno, ReadWriteFlags};
use rustix::process::{Gid, Uid};

use self::wire::{Header, Reader, Writer, fattr, op};
use crate::error::HostError;
use crate::os::Os;

/// Most bytes of a file in one request or answer. The kernel sends larger ones in parts.
pub const DATA_BYTES_MAX: usize = 128 * 1024;
/// Most bytes of a request: its data, and what says where it goes.
pub const REQUEST_BYTES_MAX: usize = DATA_BYTES_MAX + 4096;

/// Seconds for which the guest's kernel may go by what it knows of a file without asking. Changes that
/// the host makes are seen after that, at the latest.
const KNOWN_FOR_S: u64 = 1;
/// Requests the guest's kernel may have on their way on its own account, such as reading ahead.
const BACKGROUND_MAX: u16 = 16;
/// The number of the directory itself.
const ROOT: u64 = 1;
/// Who everything belongs to that is not the owner's: nobody, by Linux' and Debian's number.
const NOBODY: u32 = 65_534;
/// Opened files and directories that a guest may have at one time.
const HANDLES_MAX: usize = 65_536;

/// How a directory is shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShareOptions {
    /// Whether nothing in it may be changed.
    pub read_only: bool,
    /// User and group in the guest to whom belongs what is the owner's here.
    pub guest_owner: (u32, u32),
    /// Files and directories the guest's kernel may know of at one time; each is a descriptor here.
    pub files_max: usize,
}

/// A directory that is served.
#[derive(Debug)]
pub struct Share {
    options: ShareOptions,
    /// User and group here as whom everything is done.
    owner: (Uid, Gid),
    nodes: HashMap<u64, Node>,
    numbers: HashMap<(u64, u64), u64>,
    next_node: u64,
    handles: HashMap<u64, OwnedFd>,
    next_handle: u64,
}

/// A file the guest's kernel knows of.
#[derive(Debug)]
struct Node {
    /// Opened as a place only (`O_PATH`). As long as it is, the numbers below are no other file's.
    fd: OwnedFd,
    device: u64,
    inode: u64,
    /// How often the guest's kernel was told of it.
    known: u64,
}

impl Share {
    /// Opens a directory to be served. No part of its path may be a link: a guest that may write to a
    /// directory above it could have put one there since the path was named.
    ///
    /// # Errors
    ///
    /// Those of openat2(2); [`NotADirectory`](io::ErrorKind::NotADirectory).
    pub fn open(os: &Os, source: &Path, options: ShareOptions) -> Result<Self, HostError> {
        os.effect("open the directory to share", source, || {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let fd = rustix::fs::openat2(CWD, source, flags, Mode::empty(), WITHOUT_LINKS)?;
            let status = rustix::fs::fstat(&fd)?;
            let owner = if rustix::process::geteuid().is_root() {
                (Uid::from_raw(status.st_uid), Gid::from_raw(status.st_gid))
            } else {
                (rustix::process::geteuid(), rustix::process::getegid())
            };
            let root = Node {
                fd,
                device: status.st_dev,
                inode: status.st_ino,
                known: 1,
            };
            Ok(Self {
                options,
                owner,
                numbers: HashMap::from([((root.device, root.inode), ROOT)]),
                nodes: HashMap::from([(ROOT, root)]),
                next_node: ROOT + 1,
                handles: HashMap::new(),
                next_handle: 1,
            })
        })
    }

    /// Makes the calling thread, and no other, act as the owner from now on (credentials(7); the kernel
    /// keeps them for each thread). That thread is to do nothing but serve this share.
    ///
    /// # Errors
    ///
    /// If the kernel refuses; nothing must be served then.
    pub fn become_owner(&self) -> io::Result<()> {
        let (uid, gid) = self.owner;
        if rustix::process::geteuid() == uid && rustix::process::getegid() == gid {
            return Ok(());
        }
        rustix::thread::set_thread_groups(&[gid])?;
        rustix::thread::set_thread_res_gid(gid, gid, gid)?;
        rustix::thread::set_thread_res_uid(uid, uid, uid)?;
        Ok(())
    }

    /// Answers one request, given whole; `None` where the protocol has no answer. Blocks for as long as
    /// the host's file system does.
    pub fn answer(&mut self, request: &[u8]) -> Option<Vec<u8>> {
        let mut reader = Reader::new(request);
        let Ok(header) = reader.header() else {
            return None;
        };
        match header.opcode {
            op::FORGET => {
                if let Ok(count) = reader.u64() {
                    self.forget(header.node, count);
                }
                return None;
            }
            op::BATCH_FORGET => {
                let _ = self.forget_all(&mut reader);
                return None;
            }
            // Nothing here takes long enough to be worth it.
            op::INTERRUPT => return None,
            _ => {}
        }
        let mut writer = Writer::new();
        let outcome = self.carry_out(&header, &mut reader, &mut writer);
        Some(writer.finish(header.unique, outcome))
    }

    fn carry_out(
        &mut self,
        header: &Header,
        reader: &mut Reader<'_>,
        out: &mut Writer,
    ) -> Result<(), Errno> {
        if self.options.read_only && changes(header.opcode) {
            return Err(Errno::ROFS);
        }
        let node = header.node;
        match header.opcode {
            op::INIT => init(reader, out),
            op::LOOKUP => self.lookup(node, reader.name()?, out),
            op::GETATTR => self.get_attributes(node, out),
            op::SETATTR => self.set_attributes(node, reader, out),
            op::READLINK => {
                let target = rustix::fs::readlinkat(self.fd(node)?, "", Vec::new())?;
                out.bytes(target.as_bytes());
                Ok(())
            }
            op::SYMLINK => {
                let name = reader.name()?;
                let target = OsStr::from_bytes(reader.text()?);
                let parent = self.fd(node)?;
                rustix::fs::symlinkat(target, parent, OsStr::from_bytes(name))?;
                self.lookup(node, name, out)
            }
            op::MKNOD => self.make_node(node, reader, out),
            op::MKDIR => {
                let mode = reader.u32()?;
                reader.skip(4)?;
                let name = reader.name()?;
                let mode = Mode::from_raw_mode(mode & 0o1777);
                rustix::fs::mkdirat(self.fd(node)?, OsStr::from_bytes(name), mode)?;
                self.lookup(node, name, out)
            }
            op::UNLINK => self.unlink(node, reader, AtFlags::empty()),
            op::RMDIR => self.unlink(node, reader, AtFlags::REMOVEDIR),
            op::RENAME => {
                let to = reader.u64()?;
                self.rename(node, to, RenameFlags::empty(), reader)
            }
            op::RENAME2 => {
                let to = reader.u64()?;
                let flags = RenameFlags::from_bits(reader.u32()?).ok_or(Errno::INVAL)?;
                if flags.contains(RenameFlags::WHITEOUT) {
                    return Err(Errno::INVAL);
                }
                reader.skip(4)?;
                self.rename(node, to, flags, reader)
            }
            op::LINK => {
                let existing = place(self.fd(reader.u64()?)?);
                let name = reader.name()?;
                let parent = self.fd(node)?;
                let follow = AtFlags::SYMLINK_FOLLOW;
                rustix::fs::linkat(CWD, existing, parent, OsStr::from_bytes(name), follow)?;
                self.lookup(node, name, out)
            }
            op::OPEN => self.open_file(node, reader.u32()?, out),
            op::CREATE => self.create(node, reader, out),
            op::READ => self.read(reader, out),
            op::WRITE => self.write(reader, out),
            op::STATFS => self.statfs(node, out),
            op::RELEASE | op::RELEASEDIR => {
                self.handles.remove(&reader.u64()?);
                Ok(())
            }
            op::FSYNC | op::FSYNCDIR => {
                let file = self.handle(reader.u64()?)?;
                if reader.u32()? & 1 == 0 {
                    rustix::fs::fsync(file)
                } else {
                    rustix::fs::fdatasync(file)
                }
            }
            op::OPENDIR => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                let directory = rustix::fs::openat(self.fd(node)?, ".", flags, Mode::empty())?;
                let handle = self.keep(directory)?;
                out.u64(handle).u32(0).u32(0);
                Ok(())
            }
            op::READDIR => self.read_directory(node, false, reader, out),
            op::READDIRPLUS => self.read_directory(node, true, reader, out),
            op::FALLOCATE => {
                let file = self.handle(reader.u64()?)?;
                let (offset, length) = (reader.u64()?, reader.u64()?);
                let mode = FallocateFlags::from_bits(reader.u32()?).ok_or(Errno::OPNOTSUPP)?;
                rustix::fs::fallocate(file, mode, offset, length)
            }
            op::LSEEK => {
                let file = self.handle(reader.u64()?)?;
                let offset = reader.u64()?;
                // The others the guest's kernel knows by itself.
                let to = match reader.u32()? {
                    3 => SeekFrom::Data(offset),
                    4 => SeekFrom::Hole(offset),
                    _ => return Err(Errno::INVAL),
                };
                out.u64(rustix::fs::seek(file, to)?);
                Ok(())
            }
            op::DESTROY => Ok(()),
            // The guest's kernel then does without, and does not ask again: extended attributes, what
            // closing a file might say, copying on this side.
            _ => Err(Errno::NOSYS),
        }
    }

    fn fd(&self, node: u64) -> Result<BorrowedFd<'_>, Errno> {
        self.nodes
            .get(&node)
            .map(|node| node.fd.as_fd())
            .ok_or(Errno::NOENT)
    }

    fn handle(&self, handle: u64) -> Result<BorrowedFd<'_>, Errno> {
        self.handles
            .get(&handle)
            .map(AsFd::as_fd)
            .ok_or(Errno::BADF)
    }

    fn keep(&mut self, file: OwnedFd) -> Result<u64, Errno> {
        if self.handles.len() >= HANDLES_MAX {
            return Err(Errno::NFILE);
        }
        let handle = self.next_handle;
        self.next_handle += 1;
        self.handles.insert(handle, file);
        Ok(handle)
    }

    // ---- what is known of files ----

    /// Opens what bears a name, as a place only.
    fn find(&self, parent: u64, name: &[u8]) -> Result<OwnedFd, Errno> {
        rustix::fs::openat2(
            self.fd(parent)?,
            OsStr::from_bytes(name),
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
            WITHIN,
        )
    }

    /// The number of an opened place, which the guest's kernel is about to be told.
    fn number(&mut self, fd: OwnedFd) -> Result<(u64, Stat), Errno> {
        let status = rustix::fs::fstat(&fd)?;
        let key = (status.st_dev, status.st_ino);
        if let Some(number) = self.numbers.get(&key)
            && let Some(node) = self.nodes.get_mut(number)
        {
            node.known += 1;
            return Ok((*number, status));
        }
        if self.nodes.len() >= self.options.files_max {
            return Err(Errno::NFILE);
        }
        let number = self.next_node;
        self.next_node += 1;
        let node = Node {
            fd,
            device: key.0,
            inode: key.1,
            known: 1,
        };
        self.nodes.insert(number, node);
        self.numbers.insert(key, number);
        Ok((number, status))
    }

    fn lookup(&mut self, parent: u64, name: &[u8], out: &mut Writer) -> Result<(), Errno> {
        let fd = self.find(parent, name)?;
        self.entry(fd, out)
    }

    fn entry(&mut self, fd: OwnedFd, out: &mut Writer) -> Result<(), Errno> {
        let (number, status) = self.number(fd)?;
        out.u64(number).u64(0).u64(KNOWN_FOR_S).u64(KNOWN_FOR_S);
        out.u32(0).u32(0);
        self.attributes(&status, out);
        Ok(())
    }

    fn forget(&mut self, number: u64, count: u64) {
        let Some(node) = self.nodes.get_mut(&number) else {
            return;
        };
        node.known = node.known.saturating_sub(count);
        if node.known == 0 && number != ROOT {
            let key = (node.device, node.inode);
            self.numbers.remove(&key);
            self.nodes.remove(&number);
        }
    }

    fn forget_all(&mut self, reader: &mut Reader<'_>) -> Result<(), Errno> {
        let count = reader.u32()?;
        reader.skip(4)?;
        for _ in 0..count {
            let (number, known) = (reader.u64()?, reader.u64()?);
            self.forget(number, known);
        }
        Ok(())
    }

    /// `struct fuse_attr`.
    fn attributes(&self, status: &Stat, out: &mut Writer) {
        let number = |value: i64| u64::try_from(value).unwrap_or(0);
        let nanos = |value: u64| u32::try_from(value).unwrap_or(0);
        let (uid, gid) = self.options.guest_owner;
        let mapped = |here: u32, owner: u32, there: u32| if here == owner { there } else { NOBODY };
        out.u64(status.st_ino)
            .u64(number(status.st_size))
            .u64(number(status.st_blocks))
            .u64(status.st_atime.cast_unsigned())
            .u64(status.st_mtime.cast_unsigned())
            .u64(status.st_ctime.cast_unsigned())
            .u32(nanos(status.st_atime_nsec))
            .u32(nanos(status.st_mtime_nsec))
            .u32(nanos(status.st_ctime_nsec))
            .u32(status.st_mode & !0o6000)
            .u32(u32::try_from(status.st_nlink).unwrap_or(u32::MAX))
            .u32(mapped(status.st_uid, self.owner.0.as_raw(), uid))
            .u32(mapped(status.st_gid, self.owner.1.as_raw(), gid))
            .u32(0)
            .u32(u32::try_from(status.st_blksize).unwrap_or(4096))
            .u32(0);
    }

    fn get_attributes(&self, node: u64, out: &mut Writer) -> Result<(), Errno> {
        let status = rustix::fs::fstat(self.fd(node)?)?;
        out.u64(KNOWN_FOR_S).u32(0).u32(0);
        self.attributes(&status, out);
        Ok(())
    }

    fn set_attributes(
        &mut self,
        node: u64,
        reader: &mut Reader<'_>,
        out: &mut Writer,
    ) -> Result<(), Errno> {
        let valid = reader.u32()?;
        reader.skip(4)?;
        let handle = reader.u64()?;
        let size = reader.u64()?;
        reader.skip(8)?;
        let (accessed, modified) = (reader.u64()?, reader.u64()?);
        reader.skip(8)?;
        let (accessed_ns, modified_ns) = (reader.u32()?, reader.u32()?);
        reader.skip(4)?;
        let mode = reader.u32()?;
        let fd = self.fd(node)?;
        let kind = kind(fd)?;
        // An owner is not changed: whatever the guest would have is the owner's here.
        if valid & fattr::MODE != 0 {
            if kind == FileType::Symlink {
                return Err(Errno::OPNOTSUPP);
            }
            let allowed = if kind == FileType::Directory {
                0o1777
            } else {
                0o777
            };
            let mode = Mode::from_raw_mode(mode & allowed);
            rustix::fs::chmodat(CWD, place(fd), mode, AtFlags::empty())?;
        }
        if valid & fattr::SIZE != 0 {
            let opened;
            let file = match self.handle(handle) {
                Ok(file) if valid & fattr::FH != 0 => file,
                _ => {
                    opened = reopen(fd, OFlags::WRONLY)?;
                    opened.as_fd()
                }
            };
            rustix::fs::ftruncate(file, size)?;
        }
        let time = |set: u32, now: u32, seconds: u64, nanos: u32| Timespec {
            tv_sec: seconds.cast_signed(),
            tv_nsec: if valid & now != 0 {
                UTIME_NOW
            } else if valid & set != 0 {
                i64::from(nanos.min(999_999_999))
            } else {
                UTIME_OMIT
            },
        };
        if valid & (fattr::ATIME | fattr::MTIME | fattr::ATIME_NOW | fattr::MTIME_NOW) != 0 {
            let times = Timestamps {
                last_access: time(fattr::ATIME, fattr::ATIME_NOW, accessed, accessed_ns),
                last_modification: time(fattr::MTIME, fattr::MTIME_NOW, modified, modified_ns),
            };
            rustix::fs::utimensat(CWD, place(fd), &times, AtFlags::empty())?;
        }
        self.get_attributes(node, out)
    }

    fn statfs(&self, node: u64, out: &mut Writer) -> Result<(), Errno> {
        let status = rustix::fs::fstatvfs(self.fd(node)?)?;
        let short = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        out.u64(status.f_blocks)
            .u64(status.f_bfree)
            .u64(status.f_bavail)
            .u64(status.f_files)
            .u64(status.f_ffree)
            .u32(short(status.f_bsize))
            .u32(short(status.f_namemax))
            .u32(short(status.f_frsize))
            .zeros(28);
        Ok(())
    }

    // ---- names ----

    fn make_node(
        &mut self,
        parent: u64,
        reader: &mut Reader<'_>,
        out: &mut Writer,
    ) -> Result<(), Errno> {
        let mode = reader.u32()?;
        reader.skip(12)?;
        let name = reader.name()?;
        let bits = Mode::from_raw_mode(mode & 0o777);
        match FileType::from_raw_mode(mode) {
            FileType::RegularFile => {
                self.make_file(parent, name, OFlags::WRONLY, bits)?;
            }
            kind @ (FileType::Fifo | FileType::Socket) => {
                let name = OsStr::from_bytes(name);
                rustix::fs::mknodat(self.fd(parent)?, name, kind, bits, 0)?;
            }
            _ => return Err(Errno::PERM),
        }
        self.lookup(parent, name, out)
    }

    /// Makes a regular file where nothing is.
    fn make_file(
        &self,
        parent: u64,
        name: &[u8],
        access: OFlags,
        mode: Mode,
    ) -> Result<OwnedFd, Errno> {
        rustix::fs::openat2(
            self.fd(parent)?,
            OsStr::from_bytes(name),
            access | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            mode,
            WITHIN,
        )
    }

    fn unlink(&self, parent: u64, reader: &mut Reader<'_>, flags: AtFlags) -> Result<(), Errno> {
        let name = OsStr::from_bytes(reader.name()?);
        rustix::fs::unlinkat(self.fd(parent)?, name, flags)
    }

    fn rename(
        &self,
        from: u64,
        to: u64,
        flags: RenameFlags,
        reader: &mut Reader<'_>,
    ) -> Result<(), Errno> {
        let old = OsStr::from_bytes(reader.name()?);
        let new = OsStr::from_bytes(reader.name()?);
        rustix::fs::renameat_with(self.fd(from)?, old, self.fd(to)?, new, flags)
    }

    // ---- files ----

    fn open_file(&mut self, node: u64, flags: u32, out: &mut Writer) -> Result<(), Errno> {
        let access = access(flags);
        let cuts = OFlags::from_bits_retain(flags) & OFlags::TRUNC;
        if self.options.read_only && (access.intersects(WRITES) || !cuts.is_empty()) {
            return Err(Errno::ROFS);
        }
        let file = reopen(self.fd(node)?, access | cuts)?;
        let handle = self.keep(file)?;
        out.u64(handle).u32(wire::KEEP_CACHE).u32(0);
        Ok(())
    }

    fn create(
        &mut self,
        parent: u64,
        reader: &mut Reader<'_>,
        out: &mut Writer,
    ) -> Result<(), Errno> {
        let flags = reader.u32()?;
        let mode = Mode::from_raw_mode(reader.u32()? & 0o777);
        reader.skip(8)?;
        let name = reader.name()?;
        let access = access(flags);
        let asked = OFlags::from_bits_retain(flags);
        let file = match self.make_file(parent, name, access, mode) {
            // The host was faster. What is there is opened as any other file.
            Err(Errno::EXIST) if !asked.contains(OFlags::EXCL) => {
                let found = self.find(parent, name)?;
                reopen(found.as_fd(), access | (asked & OFlags::TRUNC))?
            }
            made => made?,
        };
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let there = rustix::fs::open(place(file.as_fd()), flags, Mode::empty())?;
        self.entry(there, out)?;
        let handle = self.keep(file)?;
        out.u64(handle).u32(wire::KEEP_CACHE).u32(0);
        Ok(())
    }

    fn read(&self, reader: &mut Reader<'_>, out: &mut Writer) -> Result<(), Errno> {
        let file = self.handle(reader.u64()?)?;
        let offset = reader.u64()?;
        let wanted = DATA_BYTES_MAX.min(reader.u32()? as usize);
        let room = out.room(wanted);
        let mut done = 0;
        // A short answer is taken for the end of the file.
        while done < wanted {
            match rustix::io::pread(file, &mut room[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        out.cut(wanted - done);
        Ok(())
    }

    fn write(&self, reader: &mut Reader<'_>, out: &mut Writer) -> Result<(), Errno> {
        let file = self.handle(reader.u64()?)?;
        let offset = reader.u64()?;
        let size = reader.u32()? as usize;
        let write_flags = reader.u32()?;
        reader.skip(8)?;
        let flags = OFlags::from_bits_retain(reader.u32()?);
        reader.skip(4)?;
        let bytes = reader.take(size)?;
        // The guest's idea of where the end is may be old, and others append as well. Not so for a page
        // that was mapped: that one has its place.
        let appends = flags.contains(OFlags::APPEND) && write_flags & wire::WRITE_CACHE == 0;
        let how = match appends {
            true => ReadWriteFlags::APPEND,
            false => ReadWriteFlags::empty(),
        };
        let mut done = 0;
        while done < bytes.len() {
            let rest = [IoSlice::new(&bytes[done..])];
            match rustix::io::pwritev2(file, &rest, offset + done as u64, how) {
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                // What was written counts; the next request says what is wrong.
                Err(_) if done > 0 => break,
                Err(errno) => return Err(errno),
            }
        }
        out.u32(u32::try_from(done).unwrap_or(u32::MAX)).u32(0);
        Ok(())
    }

    fn read_directory(
        &mut self,
        node: u64,
        plus: bool,
        reader: &mut Reader<'_>,
        out: &mut Writer,
    ) -> Result<(), Errno> {
        let handle = reader.u64()?;
        let offset = reader.u64()?;
        let room = DATA_BYTES_MAX.min(reader.u32()? as usize);
        // Its place in the directory is the guest's to say: any number that it was given.
        let directory = rustix::io::fcntl_dupfd_cloexec(self.handle(handle)?, 0)?;
        rustix::fs::seek(&directory, SeekFrom::Start(offset))?;
        let mut buffer = [MaybeUninit::uninit(); 8192];
        let mut entries = RawDir::new(&directory, &mut buffer);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            let dirent = (wire::DIRENT + name.len()).next_multiple_of(8);
            let needs = dirent + if plus { wire::ENTRY } else { 0 };
            if out.length() + needs > room {
                break;
            }
            if plus {
                let found = match name {
                    b"." | b".." => Err(Errno::NOENT),
                    name => self.find(node, name),
                };
                match found {
                    Ok(fd) => self.entry(fd, out)?,
                    // Only a name, of which the guest's kernel learns more when it wants to.
                    Err(_) => drop(out.zeros(wire::ENTRY)),
                }
            }
            let kind = entry.file_type().as_raw_mode() >> 12;
            out.u64(entry.ino())
                .u64(entry.next_entry_cookie())
                .u32(u32::try_from(name.len()).unwrap_or(0))
                .u32(kind)
                .bytes(name)
                .zeros(dirent - wire::DIRENT - name.len());
        }
        Ok(())
    }
}

/// How a name is looked for: in its directory and nowhere else.
const WITHIN: ResolveFlags = ResolveFlags::BENEATH.union(WITHOUT_LINKS);
const WITHOUT_LINKS: ResolveFlags = ResolveFlags::NO_SYMLINKS.union(ResolveFlags::NO_MAGICLINKS);

/// Modes of opening in which a file may be written to.
const WRITES: OFlags = OFlags::WRONLY.union(OFlags::RDWR);

/// Whether an operation changes anything. Opening is looked at more closely.
fn changes(opcode: u32) -> bool {
    matches!(
        opcode,
        op::SETATTR
            | op::SYMLINK
            | op::MKNOD
            | op::MKDIR
            | op::UNLINK
            | op::RMDIR
            | op::RENAME
            | op::RENAME2
            | op::LINK
            | op::CREATE
            | op::WRITE
            | op::FALLOCATE
    )
}

fn init(reader: &mut Reader<'_>, out: &mut Writer) -> Result<(), Errno> {
    let major = reader.u32()?;
    reader.skip(4)?;
    let read_ahead = reader.u32()?;
    let flags = reader.u32()?;
    if major != wire::MAJOR {
        return Err(Errno::PROTO);
    }
    let bytes = u32::try_from(DATA_BYTES_MAX).unwrap_or(u32::MAX);
    out.u32(wire::MAJOR)
        .u32(wire::MINOR)
        .u32(read_ahead.min(bytes))
        .u32(flags & wire::INIT_FLAGS)
        .u16(BACKGROUND_MAX)
        .u16(BACKGROUND_MAX)
        .u32(bytes)
        // Times are told to the nanosecond.
        .u32(1)
        .u16(u16::try_from(DATA_BYTES_MAX / 4096).unwrap_or(u16::MAX))
        .u16(0)
        .zeros(32);
    Ok(())
}

/// Which of the flags of an open(2) in the guest count here. Not `O_APPEND`: each write says whether it
/// appends, and that of a page which the guest has mapped does not (pwritev2(2), `RWF_APPEND`).
fn access(flags: u32) -> OFlags {
    (OFlags::from_bits_retain(flags) & OFlags::RWMODE) | OFlags::CLOEXEC
}

/// The path of an opened place: a link of the kernel's own to that very file.
fn place(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

fn kind(fd: BorrowedFd<'_>) -> Result<FileType, Errno> {
    Ok(FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode))
}

/// Opens a place that is a regular file. Opening anything else may do what nobody wants: wait for
/// ever, or rewind a tape.
fn reopen(fd: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd, Errno> {
    match kind(fd)? {
        FileType::RegularFile => {
            rustix::fs::open(place(fd), flags | OFlags::CLOEXEC, Mode::empty())
        }
        FileType::Directory => Err(Errno::ISDIR),
        FileType::Symlink => Err(Errno::LOOP),
        _ => Err(Errno::NXIO),
    }
}

/// Whole requests out of the stream in which they come.
#[derive(Debug, Default)]
pub struct Requests {
    bytes: Vec<u8>,
    at: usize,
}

impl Requests {
    /// Takes bytes as they came.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.at);
        self.at = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole request; `None` until more bytes come.
    ///
    /// # Errors
    ///
    /// [`InvalidData`](io::ErrorKind::InvalidData) for bytes that are no request, after which none comes.
    pub fn next_request(&mut self) -> io::Result<Option<Vec<u8>>> {
        let rest = &self.bytes[self.at..];
        let Some(length) = rest.first_chunk() else {
            return Ok(None);
        };
        let length = u32::from_ne_bytes(*length) as usize;
        if !(wire::IN_HEADER..=REQUEST_BYTES_MAX).contains(&length) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let Some(request) = rest.get(..length) else {
            return Ok(None);
        };
        self.at += length;
        Ok(Some(request.to_vec()))
    }
}

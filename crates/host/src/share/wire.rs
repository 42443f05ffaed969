//! The wire format of the kernel's FUSE protocol (`include/uapi/linux/fuse.h`), as far as it is used:
//! numbers of the host's byte order at fixed places.

use rustix::io::Errno;

/// The protocol's version that is answered. The kernel speaks the lower of two minor ones.
pub(super) const MAJOR: u32 = 7;
pub(super) const MINOR: u32 = 31;

/// Bytes of `struct fuse_in_header`, and of `struct fuse_out_header`.
pub(super) const IN_HEADER: usize = 40;
pub(super) const OUT_HEADER: usize = 16;
/// Bytes of `struct fuse_entry_out`, and of the fixed part of `struct fuse_dirent`.
pub(super) const ENTRY: usize = 128;
pub(super) const DIRENT: usize = 24;

/// Operations, by `enum fuse_opcode`.
pub(super) mod op {
    pub(in super::super) const LOOKUP: u32 = 1;
    pub(in super::super) const FORGET: u32 = 2;
    pub(in super::super) const GETATTR: u32 = 3;
    pub(in super::super) const SETATTR: u32 = 4;
    pub(in super::super) const READLINK: u32 = 5;
    pub(in super::super) const SYMLINK: u32 = 6;
    pub(in super::super) const MKNOD: u32 = 8;
    pub(in super::super) const MKDIR: u32 = 9;
    pub(in super::super) const UNLINK: u32 = 10;
    pub(in super::super) const RMDIR: u32 = 11;
    pub(in super::super) const RENAME: u32 = 12;
    pub(in super::super) const LINK: u32 = 13;
    pub(in super::super) const OPEN: u32 = 14;
    pub(in super::super) const READ: u32 = 15;
    pub(in super::super) const WRITE: u32 = 16;
    pub(in super::super) const STATFS: u32 = 17;
    pub(in super::super) const RELEASE: u32 = 18;
    pub(in super::super) const FSYNC: u32 = 20;
    pub(in super::super) const INIT: u32 = 26;
    pub(in super::super) const OPENDIR: u32 = 27;
    pub(in super::super) const READDIR: u32 = 28;
    pub(in super::super) const RELEASEDIR: u32 = 29;
    pub(in super::super) const FSYNCDIR: u32 = 30;
    pub(in super::super) const CREATE: u32 = 35;
    pub(in super::super) const INTERRUPT: u32 = 36;
    pub(in super::super) const DESTROY: u32 = 38;
    pub(in super::super) const BATCH_FORGET: u32 = 42;
    pub(in super::super) const FALLOCATE: u32 = 43;
    pub(in super::super) const READDIRPLUS: u32 = 44;
    pub(in super::super) const RENAME2: u32 = 45;
    pub(in super::super) const LSEEK: u32 = 46;
}

/// Flags of the first message: reads that do not wait for each other, opening that also cuts, writes of
/// more than a page, caches that are dropped when a file has changed, entries with what they are, and
/// lookups in one directory at a time by many.
pub(super) const INIT_FLAGS: u32 =
    1 | 1 << 3 | 1 << 5 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 18 | 1 << 22;

/// What of an open file is answered: its cached pages may stay.
pub(super) const KEEP_CACHE: u32 = 1 << 1;

/// A write of the guest's page cache, in `struct fuse_write_in` (`FUSE_WRITE_CACHE`).
pub(super) const WRITE_CACHE: u32 = 1;

/// What is to be changed, in `struct fuse_setattr_in`.
pub(super) mod fattr {
    pub(in super::super) const MODE: u32 = 1;
    pub(in super::super) const SIZE: u32 = 1 << 3;
    pub(in super::super) const ATIME: u32 = 1 << 4;
    pub(in super::super) const MTIME: u32 = 1 << 5;
    pub(in super::super) const FH: u32 = 1 << 6;
    pub(in super::super) const ATIME_NOW: u32 = 1 << 7;
    pub(in super::super) const MTIME_NOW: u32 = 1 << 8;
}

/// The first words of every request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) opcode: u32,
    pub(super) unique: u64,
    pub(super) node: u64,
}

/// A request's bytes, read from the front. A guest may have written them by itself: what is missing is
/// an error, and never a panic.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The header; what follows is the operation's own.
    pub(super) fn header(&mut self) -> Result<Header, Errno> {
        let _length = self.u32()?;
        let header = Header {
            opcode: self.u32()?,
            unique: self.u64()?,
            node: self.u64()?,
        };
        // Who asks: the guest's kernel has judged that already.
        self.skip(16)?;
        Ok(header)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Errno> {
        let (word, rest) = self.0.split_first_chunk().ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(u32::from_ne_bytes(*word))
    }

    pub(super) fn u64(&mut self) -> Result<u64, Errno> {
        let (word, rest) = self.0.split_first_chunk().ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(u64::from_ne_bytes(*word))
    }

    pub(super) fn skip(&mut self, bytes: usize) -> Result<(), Errno> {
        self.take(bytes).map(|_| ())
    }

    pub(super) fn take(&mut self, bytes: usize) -> Result<&'a [u8], Errno> {
        let (taken, rest) = self.0.split_at_checked(bytes).ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(taken)
    }

    /// Text up to a NUL.
    pub(super) fn text(&mut self) -> Result<&'a [u8], Errno> {
        let end = self.0.iter().position(|byte| *byte == 0);
        let text = self.take(end.ok_or(Errno::INVAL)?)?;
        self.skip(1)?;
        Ok(text)
    }

    /// The name of something in a directory. One that leads anywhere else is none.
    pub(super) fn name(&mut self) -> Result<&'a [u8], Errno> {
        let name = self.text()?;
        if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') {
            return Err(Errno::INVAL);
        }
        if name.len() > 255 {
            return Err(Errno::NAMETOOLONG);
        }
        Ok(name)
    }
}

/// An answer under construction, with room for its header.
#[derive(Debug)]
pub(super) struct Writer(Vec<u8>);

impl Writer {
    pub(super) fn new() -> Self {
        Self(vec![0; OUT_HEADER])
    }

    pub(super) fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_ne_bytes())
    }

    pub(super) fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_ne_bytes())
    }

    pub(super) fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_ne_bytes())
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(super) fn zeros(&mut self, count: usize) -> &mut Self {
        self.0.resize(self.0.len() + count, 0);
        self
    }

    /// Bytes without the header.
    pub(super) fn length(&self) -> usize {
        self.0.len() - OUT_HEADER
    }

    /// Room for `count` more bytes, to be cut to what was used by [`Writer::cut`].
    pub(super) fn room(&mut self, count: usize) -> &mut [u8] {
        let at = self.0.len();
        self.0.resize(at + count, 0);
        &mut self.0[at..]
    }

    /// Takes back the last bytes.
    pub(super) fn cut(&mut self, count: usize) {
        self.0.truncate(self.0.len() - count);
    }

    /// The whole answer, or that it failed, and nothing else then.
    pub(super) fn finish(mut self, unique: u64, outcome: Result<(), Errno>) -> Vec<u8> {
        let error = match outcome {
            Ok(()) => 0,
            Err(errno) => {
                self.0.truncate(OUT_HEADER);
                -errno.raw_os_error()
            }
        };
        let length = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self.0[4..8].copy_from_slice(&error.to_ne_bytes());
        self.0[8..16].copy_from_slice(&unique.to_ne_bytes());
        self.0
    }
}

//! The bytes of the protocol: numbers are big-endian, strings have their length before them.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

pub(super) const INIT: u8 = 1;
pub(super) const VERSION: u8 = 2;
pub(super) const OPEN: u8 = 3;
pub(super) const CLOSE: u8 = 4;
pub(super) const READ: u8 = 5;
pub(super) const WRITE: u8 = 6;
pub(super) const LSTAT: u8 = 7;
pub(super) const FSTAT: u8 = 8;
pub(super) const SETSTAT: u8 = 9;
pub(super) const FSETSTAT: u8 = 10;
pub(super) const OPENDIR: u8 = 11;
pub(super) const READDIR: u8 = 12;
pub(super) const REMOVE: u8 = 13;
pub(super) const MKDIR: u8 = 14;
pub(super) const RMDIR: u8 = 15;
pub(super) const REALPATH: u8 = 16;
pub(super) const STAT: u8 = 17;
pub(super) const RENAME: u8 = 18;
pub(super) const READLINK: u8 = 19;
pub(super) const SYMLINK: u8 = 20;
pub(super) const STATUS: u8 = 101;
pub(super) const HANDLE: u8 = 102;
pub(super) const DATA: u8 = 103;
pub(super) const NAME: u8 = 104;
pub(super) const ATTRS: u8 = 105;
pub(super) const EXTENDED: u8 = 200;
pub(super) const EXTENDED_REPLY: u8 = 201;

/// Flags of [`OPEN`].
pub(super) mod open_flags {
    pub(in super::super) const READ: u32 = 0x01;
    pub(in super::super) const WRITE: u32 = 0x02;
    pub(in super::super) const APPEND: u32 = 0x04;
    pub(in super::super) const CREATE: u32 = 0x08;
    pub(in super::super) const TRUNCATE: u32 = 0x10;
    pub(in super::super) const EXCLUSIVE: u32 = 0x20;
}

/// What attributes hold.
const ATTR_SIZE: u32 = 0x01;
const ATTR_OWNER: u32 = 0x02;
const ATTR_PERMISSIONS: u32 = 0x04;
const ATTR_TIMES: u32 = 0x08;
const ATTR_EXTENDED: u32 = 0x8000_0000;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Status {
    Ok = 0,
    Eof = 1,
    NoSuchFile = 2,
    PermissionDenied = 3,
    Failure = 4,
    BadMessage = 5,
    OpUnsupported = 8,
}

/// A packet ended before all of it was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Short;

/// The length of the packet that begins here, once that much has arrived.
pub(super) fn length(bytes: &[u8]) -> Option<usize> {
    bytes
        .first_chunk()
        .map(|length| u32::from_be_bytes(*length) as usize)
}

/// What a client wants a file to have; what is absent stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Attributes {
    pub(super) size: Option<u64>,
    /// User and group.
    pub(super) owner: Option<(u32, u32)>,
    pub(super) permissions: Option<u32>,
    /// Seconds of the last access and the last change.
    pub(super) times: Option<(u32, u32)>,
}

/// A packet that is being read.
#[derive(Debug)]
pub(super) struct Packet<'a> {
    rest: &'a [u8],
}

impl<'a> Packet<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], Short> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(Short)?;
        self.rest = rest;
        Ok(taken)
    }

    pub(super) fn byte(&mut self) -> Result<u8, Short> {
        self.take(1).map(|bytes| bytes[0])
    }

    pub(super) fn number(&mut self) -> Result<u32, Short> {
        let bytes = self.take(4)?;
        Ok(u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    pub(super) fn long(&mut self) -> Result<u64, Short> {
        let (high, low) = (self.number()?, self.number()?);
        Ok(u64::from(high) << 32 | u64::from(low))
    }

    pub(super) fn string(&mut self) -> Result<&'a [u8], Short> {
        let length = self.number()? as usize;
        self.take(length)
    }

    pub(super) fn path(&mut self) -> Result<PathBuf, Short> {
        self.string().map(super::path_of)
    }

    /// A handle as this server makes them; another string is none that it knows.
    pub(super) fn handle(&mut self) -> Result<u64, Short> {
        let bytes = self.string()?;
        Ok(<[u8; 8]>::try_from(bytes).map_or(u64::MAX, u64::from_be_bytes))
    }

    pub(super) fn attributes(&mut self) -> Result<Attributes, Short> {
        let flags = self.number()?;
        let mut attributes = Attributes::default();
        if flags & ATTR_SIZE != 0 {
            attributes.size = Some(self.long()?);
        }
        if flags & ATTR_OWNER != 0 {
            attributes.owner = Some((self.number()?, self.number()?));
        }
        if flags & ATTR_PERMISSIONS != 0 {
            attributes.permissions = Some(self.number()?);
        }
        if flags & ATTR_TIMES != 0 {
            attributes.times = Some((self.number()?, self.number()?));
        }
        if flags & ATTR_EXTENDED != 0 {
            for _ in 0..self.number()? {
                self.string()?;
                self.string()?;
            }
        }
        Ok(attributes)
    }
}

/// A packet that is being written at the end of others. Its length is put in when it is dropped.
#[derive(Debug)]
pub(super) struct Reply<'a> {
    out: &'a mut Vec<u8>,
    start: usize,
}

impl<'a> Reply<'a> {
    pub(super) fn new(out: &'a mut Vec<u8>, kind: u8) -> Self {
        let start = out.len();
        out.extend_from_slice(&[0, 0, 0, 0, kind]);
        Self { out, start }
    }

    pub(super) fn number(&mut self, number: u32) {
        self.out.extend_from_slice(&number.to_be_bytes());
    }

    pub(super) fn long(&mut self, number: u64) {
        self.out.extend_from_slice(&number.to_be_bytes());
    }

    pub(super) fn string(&mut self, bytes: &[u8]) {
        self.number(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        self.out.extend_from_slice(bytes);
    }

    /// Writes a string of at most `room` bytes that `fill` provides, and says how many it has.
    pub(super) fn string_from<E>(
        &mut self,
        room: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<usize, E>,
    ) -> Result<usize, E> {
        self.number(0);
        let at = self.out.len();
        self.out.resize(at + room, 0);
        let count = fill(&mut self.out[at..])?;
        self.out.truncate(at + count);
        let length = u32::try_from(count).unwrap_or(u32::MAX);
        self.out[at - 4..at].copy_from_slice(&length.to_be_bytes());
        Ok(count)
    }

    pub(super) fn attributes(&mut self, metadata: &Metadata) {
        self.number(ATTR_SIZE | ATTR_OWNER | ATTR_PERMISSIONS | ATTR_TIMES);
        self.long(metadata.size());
        self.number(metadata.uid());
        self.number(metadata.gid());
        self.number(metadata.mode());
        // The protocol's times end in 2106, and begin in 1970.
        let seconds =
            |time: i64| u32::try_from(time).unwrap_or(if time < 0 { 0 } else { u32::MAX });
        self.number(seconds(metadata.atime()));
        self.number(seconds(metadata.mtime()));
    }
}

impl Drop for Reply<'_> {
    fn drop(&mut self) {
        let length = self.out.len() - self.start - 4;
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        self.out[self.start..self.start + 4].copy_from_slice(&length.to_be_bytes());
    }
}

//! Reading a tar stream: ustar, with the extensions of GNU and of pax(1).
//!
//! Holes of sparse files are understood in the old GNU format, in which the map is part of the header,
//! and in the three that use pax records ("Storing Sparse Files" in the manual of GNU tar).
//!
//! The tar crate reads single headers here, but not the stream: it splits pax records at newlines,
//! which the binary value of an extended attribute may contain, and then loses the rest of them.

use std::io::{self, Read};

use tar::{EntryType, Header};

const BLOCK: usize = 512;
/// The longest extension header: pax records and long names. Paths and attributes stay far below.
const EXTENSION_BYTES_MAX: u64 = 16 << 20;
/// The most parts of a sparse file. GNU tar writes as many as there are, our agent 16384 at most.
const PARTS_MAX: usize = 1 << 20;

fn corrupt(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

/// The tar crate says `Other` of a field that is no number.
fn field<T>(result: io::Result<T>) -> io::Result<T> {
    result.map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Directory,
    Symlink,
    /// Another name, `link`, of a file before it in the stream.
    HardLink,
    CharacterDevice,
    BlockDevice,
    Fifo,
}

/// One entry, but for its data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) kind: Kind,
    pub(super) path: Vec<u8>,
    /// Target of a symbolic or hard link.
    pub(super) link: Vec<u8>,
    /// Permission bits, 12 of them.
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Seconds since 1970, rounded down, and the nanoseconds beyond.
    pub(super) mtime: (i64, u32),
    /// Major and minor number.
    pub(super) device: (u32, u32),
    /// Full names and values.
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Bytes of a file's data, holes included; 0 for everything else.
    pub(super) size: u64,
    /// Whether the archive says where the file has holes.
    pub(super) sparse: bool,
}

/// Reads entry after entry. Reading it reads the data of the last entry.
#[derive(Debug)]
pub(super) struct Reader<R> {
    inner: R,
    /// Data of the last entry not read yet.
    left: u64,
    /// Padding after that data.
    padding: u64,
    /// Bytes of a sparse file's map that were read as data.
    map_bytes: u64,
    global: Vec<(Vec<u8>, Vec<u8>)>,
    /// Set while the last entry is a sparse file.
    holes: Option<Holes>,
    /// Whether the stream may end without the archive's end mark, where an entry would begin.
    may_just_end: bool,
}

/// Where in a sparse file the data belongs that follows in the stream.
#[derive(Debug)]
struct Holes {
    /// Bytes of the file.
    size: u64,
    /// Where the next byte belongs.
    at: u64,
    /// Begin and end of the parts that have data and are not over, in order, none of them empty.
    parts: std::iter::Peekable<std::vec::IntoIter<(u64, u64)>>,
}

impl Holes {
    /// Bytes from here to the next part that has data, or to the end.
    fn here(&mut self) -> u64 {
        self.parts
            .peek()
            .map_or(self.size, |(begin, _)| *begin)
            .saturating_sub(self.at)
    }
}

impl<R: Read> Reader<R> {
    pub(super) fn new(inner: R) -> Self {
        Self {
            inner,
            left: 0,
            padding: 0,
            map_bytes: 0,
            global: Vec::new(),
            holes: None,
            may_just_end: false,
        }
    }

    /// Reads a layer of an OCI image: some programs leave the end mark out, and a digest tells
    /// whether the stream is whole.
    pub(super) fn of_layer(inner: R) -> Self {
        Self {
            may_just_end: true,
            ..Self::new(inner)
        }
    }

    /// Bytes from here on that are known to be zeros without being read.
    pub(super) fn hole(&mut self) -> u64 {
        self.holes.as_mut().map_or(0, Holes::here)
    }

    /// Goes on `count` bytes later, which must be no more than [`Reader::hole`] says.
    pub(super) fn skip_hole(&mut self, count: u64) {
        let holes = self.holes.as_mut().expect("only a sparse file has holes");
        debug_assert!(count <= holes.here());
        holes.at += count;
    }

    /// The map of a sparse file, of which the rest is in blocks of its own behind the header
    /// ("Storing Sparse Files", old GNU format, in the manual of GNU tar).
    fn read_holes(&mut self, header: &Header) -> io::Result<Holes> {
        let bad = || corrupt("the map of a sparse file makes no sense");
        let gnu = header.as_gnu().ok_or_else(bad)?;
        let mut parts = Vec::new();
        let mut add = |slots: &[tar::GnuSparseHeader]| {
            for slot in slots.iter().filter(|slot| !slot.is_empty()) {
                parts.push((field(slot.offset())?, field(slot.length())?));
                if parts.len() > PARTS_MAX {
                    return Err(bad());
                }
            }
            Ok(())
        };
        add(&gnu.sparse)?;
        let mut more = gnu.is_extended();
        while more {
            let mut block = tar::GnuExtSparseHeader::new();
            self.inner.read_exact(block.as_mut_bytes())?;
            add(&block.sparse)?;
            more = block.is_extended();
        }
        self.holes(field(gnu.real_size())?, &parts)
    }

    /// The same in the formats that use pax records: the map is in them, or in version 1.0 before the
    /// file's data.
    fn read_pax_holes(&mut self, records: &[(Vec<u8>, Vec<u8>)]) -> io::Result<Holes> {
        let bad = || corrupt("the map of a sparse file makes no sense");
        let number = |text: &[u8]| -> io::Result<u64> {
            let text = std::str::from_utf8(text).ok();
            text.and_then(|text| text.parse().ok()).ok_or_else(bad)
        };
        let record = |key: &[u8]| {
            let mut found = records.iter().rev().filter(|(k, _)| k == key);
            found.next().map(|(_, value)| value.as_slice())
        };
        let size = record(b"GNU.sparse.realsize").or(record(b"GNU.sparse.size"));
        let size = number(size.ok_or_else(bad)?)?;
        let mut numbers = Vec::new();
        if record(b"GNU.sparse.major") == Some(b"1") {
            let count = self.read_map_number()?;
            for _ in 0..count.checked_mul(2).ok_or_else(bad)? {
                numbers.push(self.read_map_number()?);
                if numbers.len() > 2 * PARTS_MAX {
                    return Err(bad());
                }
            }
            // The map ends with its block.
            let used = usize::try_from(self.map_bytes).map_err(|_| bad())?;
            let rest = used.next_multiple_of(BLOCK) - used;
            let mut block = [0; BLOCK];
            self.read_exact(&mut block[..rest])?;
        } else if let Some(map) = record(b"GNU.sparse.map") {
            for text in map.split(|b| *b == b',').filter(|text| !text.is_empty()) {
                numbers.push(number(text)?);
            }
        } else {
            let keys: [&[u8]; 2] = [b"GNU.sparse.offset", b"GNU.sparse.numbytes"];
            for (key, value) in records {
                if keys.get(numbers.len() % 2) == Some(&key.as_slice()) {
                    numbers.push(number(value)?);
                }
            }
        }
        if !numbers.len().is_multiple_of(2) || numbers.len() > 2 * PARTS_MAX {
            return Err(bad());
        }
        let parts: Vec<_> = numbers.chunks(2).map(|pair| (pair[0], pair[1])).collect();
        self.holes(size, &parts)
    }

    /// A decimal number and the newline behind it.
    fn read_map_number(&mut self) -> io::Result<u64> {
        let mut value: u64 = 0;
        for digits in 0.. {
            let mut byte = [0];
            self.read_exact(&mut byte)?;
            self.map_bytes += 1;
            let more = match byte[0] {
                b'\n' if digits > 0 => return Ok(value),
                digit @ b'0'..=b'9' => value
                    .checked_mul(10)
                    .and_then(|value| value.checked_add((digit - b'0').into())),
                _ => None,
            };
            value = more.ok_or_else(|| corrupt("the map of a sparse file makes no sense"))?;
        }
        unreachable!("a number ends, or is too large")
    }

    /// Parts with data, offset and length each, of a file of this size.
    fn holes(&self, size: u64, map: &[(u64, u64)]) -> io::Result<Holes> {
        let bad = || corrupt("the map of a sparse file makes no sense");
        let mut parts: Vec<(u64, u64)> = Vec::new();
        for &(begin, length) in map {
            let end = begin.checked_add(length).filter(|end| *end <= size);
            let end = end.ok_or_else(bad)?;
            if begin < parts.last().map_or(0, |(_, end)| *end) {
                return Err(bad());
            }
            if length > 0 {
                parts.push((begin, end));
            }
        }
        if parts.iter().map(|(begin, end)| end - begin).sum::<u64>() != self.left {
            return Err(bad());
        }
        Ok(Holes {
            size,
            at: 0,
            parts: parts.into_iter().peekable(),
        })
    }

    /// The next entry, or `None` at the archive's end mark. Skips what was not read of the last.
    pub(super) fn next_entry(&mut self) -> io::Result<Option<Entry>> {
        let (mut long_path, mut long_link, mut pax) = (None, None, Vec::new());
        loop {
            let Some(header) = self.next_header()? else {
                return Ok(None);
            };
            let kind = header.entry_type();
            match kind {
                EntryType::GNULongName => long_path = Some(self.read_name()?),
                EntryType::GNULongLink => long_link = Some(self.read_name()?),
                EntryType::XHeader => pax = records(&self.read_extension()?)?,
                EntryType::XGlobalHeader => {
                    let records = records(&self.read_extension()?)?;
                    self.global.extend(records);
                }
                _ => {
                    let records: Vec<_> = self.global.iter().cloned().chain(pax).collect();
                    return self
                        .entry(&header, long_path, long_link, &records)
                        .map(Some);
                }
            }
        }
    }

    fn next_header(&mut self) -> io::Result<Option<Header>> {
        let skip = self.left + self.padding;
        let skipped = io::copy(&mut self.inner.by_ref().take(skip), &mut io::sink())?;
        if skipped < skip {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        (self.left, self.padding, self.map_bytes) = (0, 0, 0);
        self.holes = None;
        let mut header = Header::new_old();
        let (first, rest) = header.as_mut_bytes().split_at_mut(1);
        match self.inner.read_exact(first) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof && self.may_just_end => {
                return Ok(None);
            }
            result => result?,
        }
        self.inner.read_exact(rest)?;
        let bytes = header.as_bytes();
        // The end is two blocks of zeros; one is enough to know it.
        if bytes.iter().all(|b| *b == 0) {
            return Ok(None);
        }
        // The checksum is taken with its own field, at 148, as spaces.
        let sum: u32 = bytes
            .iter()
            .enumerate()
            .map(|(at, b)| {
                if (148..156).contains(&at) {
                    32
                } else {
                    u32::from(*b)
                }
            })
            .sum();
        if field(header.cksum())? != sum {
            return Err(corrupt(
                "it is not a tar archive: a header's checksum is wrong",
            ));
        }
        self.expect(field(header.entry_size())?)?;
        Ok(Some(header))
    }

    fn expect(&mut self, size: u64) -> io::Result<()> {
        let whole = size
            .checked_next_multiple_of(BLOCK as u64)
            .ok_or_else(|| corrupt("an entry's size is out of bounds"))?;
        self.left = size;
        self.padding = whole - size;
        Ok(())
    }

    fn read_extension(&mut self) -> io::Result<Vec<u8>> {
        if self.left > EXTENSION_BYTES_MAX {
            return Err(corrupt("an extension header is longer than 16 MiB"));
        }
        let mut bytes = Vec::new();
        self.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn read_name(&mut self) -> io::Result<Vec<u8>> {
        let mut name = self.read_extension()?;
        // GNU tar ends it with a NUL.
        while name.last() == Some(&0) {
            name.pop();
        }
        Ok(name)
    }

    fn entry(
        &mut self,
        header: &Header,
        long_path: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
        records: &[(Vec<u8>, Vec<u8>)],
    ) -> io::Result<Entry> {
        // A later record takes precedence, pax(1).
        let record = |key: &str| {
            let mut found = records.iter().rev().filter(|(k, _)| k == key.as_bytes());
            found
                .next()
                .map(|(_, value)| value.as_slice())
                .filter(|v| !v.is_empty())
        };
        let number = |key: &str| {
            record(key)
                .map(|v| {
                    std::str::from_utf8(v)
                        .ok()
                        .and_then(|v| v.parse::<u64>().ok())
                        .ok_or_else(|| corrupt(format!("a pax record {key} is not a number")))
                })
                .transpose()
        };
        let pax_sparse = records
            .iter()
            .any(|(key, _)| key.starts_with(b"GNU.sparse."));
        let path = record("GNU.sparse.name")
            .or(record("path"))
            .map(<[u8]>::to_vec)
            .or(long_path)
            .unwrap_or_else(|| header.path_bytes().into_owned());
        let kind = match header.entry_type() {
            // Archives older than ustar mark a directory only so.
            EntryType::Regular | EntryType::Continuous if path.ends_with(b"/") => Kind::Directory,
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => Kind::File,
            EntryType::Directory => Kind::Directory,
            EntryType::Symlink => Kind::Symlink,
            EntryType::Link => Kind::HardLink,
            EntryType::Char => Kind::CharacterDevice,
            EntryType::Block => Kind::BlockDevice,
            EntryType::Fifo => Kind::Fifo,
            other => {
                return Err(corrupt(format!(
                    "{} is of the type {:?}, which is not supported",
                    String::from_utf8_lossy(&path),
                    char::from(other.as_byte())
                )));
            }
        };
        let size = match (kind, number("size")?) {
            (Kind::File, Some(size)) => size,
            (Kind::File, None) => field(header.entry_size())?,
            // Some programs give a hard link the size of the file, without data.
            _ => 0,
        };
        self.expect(size)?;
        if header.entry_type() == EntryType::GNUSparse {
            self.holes = Some(self.read_holes(header)?);
        } else if pax_sparse && kind == Kind::File {
            self.holes = Some(self.read_pax_holes(records)?);
        }
        let id = |from_pax: Option<u64>, from_header: io::Result<u64>| {
            u32::try_from(from_pax.map_or(field(from_header), Ok)?)
                .map_err(|_| corrupt("an owner's number has more than 32 bits"))
        };
        let mtime = match record("mtime") {
            Some(text) => decimal(text).ok_or_else(|| corrupt("a pax record mtime is no time"))?,
            // Not all programs fill it in; base 256 may make it negative.
            None => (header.mtime().map_or(0, u64::cast_signed), 0),
        };
        let link = record("linkpath").map(<[u8]>::to_vec).or(long_link);
        let devices = matches!(kind, Kind::CharacterDevice | Kind::BlockDevice);
        Ok(Entry {
            kind,
            path,
            link: match link {
                Some(link) => link,
                None => header.link_name_bytes().unwrap_or_default().into_owned(),
            },
            mode: u16::try_from(field(header.mode())? & 0o7777).expect("12 bits"),
            uid: id(number("uid")?, header.uid())?,
            gid: id(number("gid")?, header.gid())?,
            mtime,
            device: if devices {
                (
                    field(header.device_major())?.unwrap_or(0),
                    field(header.device_minor())?.unwrap_or(0),
                )
            } else {
                (0, 0)
            },
            xattrs: records
                .iter()
                .filter_map(|(key, value)| {
                    let name = key.strip_prefix(b"SCHILY.xattr.")?;
                    Some((attribute_name(name), value.clone()))
                })
                .collect(),
            size: self.holes.as_ref().map_or(size, |holes| holes.size),
            sparse: self.holes.is_some(),
        })
    }
}

impl<R: Read> Read for Reader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut most = self.left;
        if let Some(holes) = &mut self.holes {
            let hole = holes.here();
            if hole > 0 {
                let n = usize::try_from(hole).map_or(buffer.len(), |hole| hole.min(buffer.len()));
                buffer[..n].fill(0);
                holes.at += n as u64;
                return Ok(n);
            }
            most = holes.parts.peek().map_or(0, |(_, end)| end - holes.at);
        }
        if most == 0 || buffer.is_empty() {
            return Ok(0);
        }
        let n = self.inner.by_ref().take(most).read(buffer)?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= n as u64;
        if let Some(holes) = &mut self.holes {
            holes.at += n as u64;
            if n as u64 == most {
                holes.parts.next();
            }
        }
        Ok(n)
    }
}

/// Records `<length> <key>=<value>\n`, the length in decimal and of the whole record; pax(1).
fn records(mut bytes: &[u8]) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let record = (|| {
            let space = bytes.iter().position(|b| *b == b' ')?;
            let length = std::str::from_utf8(&bytes[..space]).ok()?.parse().ok()?;
            let (record, rest) = bytes.split_at_checked(length)?;
            let body = record.get(space + 1..)?.strip_suffix(b"\n")?;
            let equals = body.iter().position(|b| *b == b'=')?;
            bytes = rest;
            Some((body[..equals].to_vec(), body[equals + 1..].to_vec()))
        })();
        found.push(record.ok_or_else(|| corrupt("a pax record is malformed"))?);
    }
    Ok(found)
}

/// The name of an extended attribute from the key of a record, in which GNU tar writes `%` and `=` in
/// another way.
fn attribute_name(key: &[u8]) -> Vec<u8> {
    let mut name = Vec::with_capacity(key.len());
    let mut rest = key;
    while let Some((first, after)) = rest.split_first() {
        let (byte, after) = match rest {
            [b'%', b'2', b'5', after @ ..] => (b'%', after),
            [b'%', b'3', b'D', after @ ..] => (b'=', after),
            _ => (*first, after),
        };
        name.push(byte);
        rest = after;
    }
    name
}

/// Seconds with a fraction, rounded down to the nanosecond.
fn decimal(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let seconds: i64 = whole.parse().ok()?;
    let digits: String = fraction
        .chars()
        .chain("000000000".chars())
        .take(9)
        .collect();
    let nanoseconds: u32 = digits.parse().ok()?;
    if text.starts_with('-') && nanoseconds > 0 {
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanoseconds));
    }
    Some((seconds, nanoseconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(key: &str, value: &[u8]) -> Vec<u8> {
        let body = [b" ", key.as_bytes(), b"=", value, b"\n"].concat();
        let mut length = body.len();
        while length != body.len() + length.to_string().len() {
            length = body.len() + length.to_string().len();
        }
        [length.to_string().as_bytes(), &body].concat()
    }

    #[test]
    fn binary_values_do_not_hide_the_records_after_them() {
        let bytes = [
            record("SCHILY.xattr.security.capability", b"\x01\n\0\n=\n"),
            record("uid", b"70000"),
        ]
        .concat();
        let found = records(&bytes).unwrap();
        assert_eq!(found[0].1, b"\x01\n\0\n=\n");
        assert_eq!(found[1], (b"uid".to_vec(), b"70000".to_vec()));
        for length in 1..bytes.len() {
            drop(records(&bytes[..length]));
        }
        assert!(records(b"5 a=b\n").is_err());
        assert!(records(b"99999999999999999999 a=b\n").is_err());
    }

    #[test]
    fn names_of_attributes_are_read_as_gnu_tar_writes_them() {
        for (key, name) in [
            ("user.a%3Db%25c", "user.a=b%c"),
            ("user.%253D", "user.%3D"),
            ("user.%", "user.%"),
            ("user.%2", "user.%2"),
        ] {
            assert_eq!(attribute_name(key.as_bytes()), name.as_bytes());
        }
    }

    /// An entry of a sparse file, with the parts that fit the header.
    fn sparse(size: u64, parts: &[(u64, u64)], data: &[u8]) -> Vec<u8> {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::GNUSparse);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(data.len() as u64);
        let gnu = header.as_gnu_mut().unwrap();
        gnu.name[0] = b'f';
        gnu.set_real_size(size);
        for (slot, (offset, length)) in gnu.sparse.iter_mut().zip(parts) {
            slot.set_offset(*offset);
            slot.set_length(*length);
        }
        header.set_cksum();
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend_from_slice(data);
        bytes.resize(bytes.len().next_multiple_of(512) + 1024, 0);
        bytes
    }

    #[test]
    fn holes_are_zeros_and_can_be_skipped() {
        let bytes = sparse(20, &[(2, 3), (5, 1), (10, 2), (20, 0)], b"abcdef");
        let mut reader = Reader::new(bytes.as_slice());
        let entry = reader.next_entry().unwrap().unwrap();
        assert_eq!((entry.size, entry.sparse), (20, true));
        let mut read = Vec::new();
        reader.read_to_end(&mut read).unwrap();
        assert_eq!(read, b"\0\0abcd\0\0\0\0ef\0\0\0\0\0\0\0\0");
        assert!(reader.next_entry().unwrap().is_none());

        let mut reader = Reader::new(bytes.as_slice());
        reader.next_entry().unwrap();
        assert_eq!(reader.hole(), 2);
        reader.skip_hole(1);
        let mut some = [7; 4];
        reader.read_exact(&mut some).unwrap();
        assert_eq!(&some, b"\0abc");
        assert_eq!(reader.hole(), 0);
        // What was not read of it is skipped as well.
        assert!(reader.next_entry().unwrap().is_none());
    }

    #[test]
    fn sparse_files_of_gnu_tar_are_read_in_all_its_formats() {
        use std::os::unix::fs::FileExt;
        let dir = tempfile::tempdir().unwrap();
        let file = std::fs::File::create(dir.path().join("holes")).unwrap();
        file.set_len(9 << 20).unwrap();
        let mut expected = vec![0; 9 << 20];
        // More parts than fit a header.
        for part in 0..40 {
            let at = part * 200_000;
            file.write_all_at(b"data", at).unwrap();
            let at = usize::try_from(at).unwrap();
            expected[at..at + 4].copy_from_slice(b"data");
        }
        for format in [
            &["--format=gnu"][..],
            &["--format=pax", "--sparse-version=0.0"],
            &["--format=pax", "--sparse-version=0.1"],
            &["--format=pax", "--sparse-version=1.0"],
        ] {
            let made = std::process::Command::new("tar")
                .args(["--create", "--sparse", "--directory"])
                .arg(dir.path())
                .args(format)
                .arg("holes")
                .output()
                .unwrap();
            assert!(made.status.success());
            let mut reader = Reader::new(made.stdout.as_slice());
            let entry = reader.next_entry().unwrap().unwrap();
            assert_eq!(entry.path, b"holes", "{format:?}");
            assert_eq!((entry.size, entry.sparse), (9 << 20, true), "{format:?}");
            assert!(made.stdout.len() < 1 << 20, "tar has kept the holes");
            let mut read = Vec::new();
            reader.read_to_end(&mut read).unwrap();
            assert!(read == expected, "{format:?}");
            assert!(reader.next_entry().unwrap().is_none());
        }
    }

    #[test]
    fn a_map_that_makes_no_sense_is_refused() {
        for (size, parts, data) in [
            (20, &[(2, 3)][..], "abcd"),
            (20, &[(2, 5)], "abcd"),
            (5, &[(2, 4)], "abcd"),
            (20, &[(8, 2), (4, 2)], "abcd"),
            (20, &[(8, 3), (10, 1)], "abcd"),
            (20, &[(u64::MAX, 4)], "abcd"),
        ] {
            let bytes = sparse(size, parts, data.as_bytes());
            let error = Reader::new(bytes.as_slice()).next_entry().unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{parts:?}");
        }
    }

    #[test]
    fn times_round_down() {
        assert_eq!(decimal(b"12"), Some((12, 0)));
        assert_eq!(decimal(b"12.5"), Some((12, 500_000_000)));
        assert_eq!(decimal(b"12.0000000019"), Some((12, 1)));
        assert_eq!(decimal(b"-1.25"), Some((-2, 750_000_000)));
        assert_eq!(decimal(b"-1"), Some((-1, 0)));
        assert_eq!(decimal(b"-0.5"), Some((-1, 500_000_000)));
        for bad in ["", "x", "1.x", "1e3", "1.-5"] {
            assert_eq!(decimal(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn an_archive_cut_short_is_an_error() {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = Header::new_ustar();
        header.set_size(1000);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        builder
            .append_data(&mut header, "file", &[7; 1000][..])
            .unwrap();
        let whole = builder.into_inner().unwrap();
        let read = |bytes: &[u8]| {
            let mut reader = Reader::new(bytes);
            while reader.next_entry()?.is_some() {}
            Ok::<_, io::Error>(())
        };
        read(&whole).unwrap();
        for length in [0, 1, 512, 600, 1536] {
            let error = read(&whole[..length]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{length}");
        }
        let error = read(&[b'x'; 1024]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}

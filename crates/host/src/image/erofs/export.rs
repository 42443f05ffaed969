//! The way back: from an image that [`write_erofs`](super::write_erofs) has made to a tar stream.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;

use tar::{Builder, EntryType, Header};

use super::corrupt;

const BLOCK: u64 = 4096;
const SLOT: u64 = 32;
const INODE: u64 = 64;

/// Writes the tree in `image` as a tar stream with everything that is in it, holes as zeros. Equal
/// images make equal streams.
///
/// # Errors
///
/// Those of reading and writing; [`InvalidData`](io::ErrorKind::InvalidData) if it is not an image as
/// we write them.
pub fn export_tar(image: &File, out: impl Write) -> io::Result<()> {
    let mut superblock = [0; 128];
    image.read_exact_at(&mut superblock, 1024)?;
    if number(&superblock[0..4]) != 0xe0f5_e1e2 {
        return Err(odd());
    }
    let reader = Reader {
        image,
        meta: number(&superblock[40..44]) * BLOCK,
    };
    let mut builder = Builder::new(out);
    let mut names: HashMap<u64, Vec<u8>> = HashMap::new();
    let root = number(&superblock[14..16]);
    let mut stack = vec![(root, Vec::new())];
    while let Some((nid, path)) = stack.pop() {
        let inode = reader.inode(nid)?;
        if inode.kind() != Kind::Directory
            && let Some(first) = names.get(&nid)
        {
            let mut header = inode.header(EntryType::Link, 0);
            append_link(&mut builder, &mut header, &path, first)?;
            continue;
        }
        append(&mut builder, &reader, &inode, &path)?;
        if inode.kind() == Kind::Directory {
            let mut children = reader.names(&inode)?;
            children.retain(|(name, _)| name != b"." && name != b"..");
            for (name, child) in children.into_iter().rev() {
                let below = if path.is_empty() {
                    name
                } else {
                    [path.as_slice(), &name].join(&b'/')
                };
                stack.push((child, below));
            }
        } else {
            names.insert(nid, path);
        }
    }
    builder.finish()
}

fn odd() -> io::Error {
    corrupt("the image is not as it was written")
}

/// A number of up to eight bytes.
fn number(bytes: &[u8]) -> u64 {
    let mut all = [0; 8];
    all[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(all)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    File,
    Directory,
    Symlink,
    Character,
    Block,
    Fifo,
}

struct Inode {
    kind: Kind,
    layout: u64,
    mode: u32,
    uid: u64,
    gid: u64,
    mtime: (i64, u32),
    size: u64,
    /// `i_u`: a block, a device, or how chunks are cut.
    unit: u64,
    /// Where what is behind it begins: extended attributes, then data or a map.
    behind: u64,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Bytes of the attributes.
    xattr_bytes: u64,
}

impl Inode {
    fn kind(&self) -> Kind {
        self.kind
    }

    fn header(&self, kind: EntryType, size: u64) -> Header {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(self.mode);
        header.set_uid(self.uid);
        header.set_gid(self.gid);
        header.set_mtime(u64::try_from(self.mtime.0).unwrap_or(0));
        header.set_size(size);
        header
    }
}

struct Reader<'f> {
    image: &'f File,
    meta: u64,
}

impl Reader<'_> {
    fn inode(&self, nid: u64) -> io::Result<Inode> {
        let at = nid
            .checked_mul(SLOT)
            .and_then(|offset| offset.checked_add(self.meta))
            .ok_or_else(odd)?;
        let mut bytes = [0; 64];
        self.image.read_exact_at(&mut bytes, at)?;
        let field = |at: usize, length: usize| number(&bytes[at..at + length]);
        let format = field(0, 2);
        let mode = u32::try_from(field(4, 2)).map_err(|_| odd())?;
        let kind = match mode >> 12 {
            0o10 => Kind::File,
            0o04 => Kind::Directory,
            0o12 => Kind::Symlink,
            0o02 => Kind::Character,
            0o06 => Kind::Block,
            0o01 => Kind::Fifo,
            _ => return Err(odd()),
        };
        if format & 1 != 1 {
            return Err(odd());
        }
        let xattr_bytes = match field(2, 2) {
            0 => 0,
            count => 12 + 4 * (count - 1),
        };
        Ok(Inode {
            kind,
            layout: format >> 1,
            mode: mode & 0o7777,
            uid: field(24, 4),
            gid: field(28, 4),
            mtime: (
                field(32, 8).cast_signed(),
                u32::try_from(field(40, 4)).map_err(|_| odd())?,
            ),
            size: field(8, 8),
            unit: field(16, 4),
            behind: at + INODE,
            xattrs: self.xattrs(at + INODE, xattr_bytes)?,
            xattr_bytes,
        })
    }

    fn xattrs(&self, at: u64, length: u64) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let mut bytes = vec![0; usize::try_from(length).map_err(|_| odd())?];
        self.image.read_exact_at(&mut bytes, at)?;
        let mut found = Vec::new();
        let mut rest = bytes.get(12..).unwrap_or_default();
        while !rest.is_empty() {
            let entry = (|| {
                let (name, class) = (usize::from(*rest.first()?), *rest.get(1)?);
                let value = usize::try_from(number(rest.get(2..4)?)).ok()?;
                let prefix = super::tree::PREFIXES
                    .iter()
                    .find(|(index, _)| *index == class)?
                    .1;
                let key = [prefix, rest.get(4..4 + name)?].concat();
                let content = rest.get(4 + name..4 + name + value)?.to_vec();
                let whole = (4 + name + value).next_multiple_of(4);
                Some((key, content, rest.get(whole..)?))
            })();
            let (key, content, after) = entry.ok_or_else(odd)?;
            found.push((key, content));
            rest = after;
        }
        Ok(found)
    }

    /// Names and inodes of a directory.
    fn names(&self, inode: &Inode) -> io::Result<Vec<(Vec<u8>, u64)>> {
        let mut data = Vec::new();
        self.data(inode).read_to_end(&mut data)?;
        let mut found = Vec::new();
        for block in data.chunks(usize::try_from(BLOCK).map_err(|_| odd())?) {
            let listed = (|| {
                let count = usize::try_from(number(block.get(8..10)?)).ok()? / 12;
                let start =
                    |n: usize| usize::try_from(number(block.get(n * 12 + 8..n * 12 + 10)?)).ok();
                for n in 0..count {
                    let nid = number(block.get(n * 12..n * 12 + 8)?);
                    let end = if n + 1 < count {
                        start(n + 1)?
                    } else {
                        block.len()
                    };
                    let name = block.get(start(n)?..end)?;
                    let name = name.split(|byte| *byte == 0).next()?;
                    found.push((name.to_vec(), nid));
                }
                Some(())
            })();
            listed.ok_or_else(odd)?;
        }
        Ok(found)
    }

    fn data<'i>(&'i self, inode: &'i Inode) -> Data<'i> {
        Data {
            reader: self,
            inode,
            at: 0,
        }
    }
}

/// The data of an inode.
struct Data<'i> {
    reader: &'i Reader<'i>,
    inode: &'i Inode,
    at: u64,
}

impl Data<'_> {
    /// Where the byte at our position lies, `None` in a hole; and how many follow it there.
    fn place(&self) -> io::Result<(Option<u64>, u64)> {
        const HOLE: u64 = u32::MAX as u64;
        let inode = self.inode;
        let left = inode.size - self.at;
        match inode.layout {
            0 => Ok((Some(inode.unit * BLOCK + self.at), left)),
            2 => {
                let whole = inode.size / BLOCK * BLOCK;
                if self.at < whole {
                    Ok((Some(inode.unit * BLOCK + self.at), whole - self.at))
                } else {
                    let tail = inode.behind + inode.xattr_bytes;
                    Ok((Some(tail + self.at - whole), left))
                }
            }
            4 => {
                let bits = 12 + (inode.unit & 31);
                let (chunk, within) = (self.at >> bits, self.at & ((1 << bits) - 1));
                let mut block = [0; 4];
                let map = inode.behind + inode.xattr_bytes;
                self.reader
                    .image
                    .read_exact_at(&mut block, map + 4 * chunk)?;
                let length = ((1 << bits) - within).min(left);
                Ok(match number(&block) {
                    HOLE => (None, length),
                    block => (Some(block * BLOCK + within), length),
                })
            }
            _ => Err(odd()),
        }
    }
}

impl Read for Data<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at >= self.inode.size || buffer.is_empty() {
            return Ok(0);
        }
        let (place, length) = self.place()?;
        let most = usize::try_from(length).map_or(buffer.len(), |length| length.min(buffer.len()));
        let n = match place {
            None => {
                buffer[..most].fill(0);
                most
            }
            Some(at) => self.reader.image.read_at(&mut buffer[..most], at)?,
        };
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.at += n as u64;
        Ok(n)
    }
}

/// Writes a pax header with these records, if there are some.
fn extend<W: Write>(builder: &mut Builder<W>, records: &[(String, Vec<u8>)]) -> io::Result<()> {
    if records.is_empty() {
        return Ok(());
    }
    builder.append_pax_extensions(
        records
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_slice())),
    )
}

fn append<W: Write>(
    builder: &mut Builder<W>,
    reader: &Reader<'_>,
    inode: &Inode,
    path: &[u8],
) -> io::Result<()> {
    let mut records = Vec::new();
    let name = if path.is_empty() {
        b"./".as_slice()
    } else {
        path
    };
    let mut name = name.to_vec();
    if inode.kind() == Kind::Directory && !path.is_empty() {
        name.push(b'/');
    }
    if name.len() > 100 {
        records.push(("path".to_owned(), name.clone()));
    }
    let (seconds, nanoseconds) = inode.mtime;
    if nanoseconds != 0 || seconds < 0 {
        let text = match (seconds, nanoseconds) {
            (seconds, 0) => seconds.to_string(),
            (0.., _) => format!("{seconds}.{nanoseconds:09}"),
            // Rounded down, so the fraction goes the other way.
            (seconds, _) => {
                let (whole, rest) = (seconds + 1, 1_000_000_000 - nanoseconds);
                let sign = if whole == 0 { "-" } else { "" };
                format!("{sign}{whole}.{rest:09}")
            }
        };
        records.push(("mtime".to_owned(), text.into_bytes()));
    }
    for (key, value) in &inode.xattrs {
        // The names that need it are written as GNU tar writes them.
        let key = String::from_utf8_lossy(key)
            .replace('%', "%25")
            .replace('=', "%3D");
        records.push((format!("SCHILY.xattr.{key}"), value.clone()));
    }
    let mut target = Vec::new();
    if inode.kind() == Kind::Symlink {
        reader.data(inode).read_to_end(&mut target)?;
        if target.len() > 100 {
            records.push(("linkpath".to_owned(), target.clone()));
        }
    }
    extend(builder, &records)?;
    let (kind, size) = match inode.kind() {
        Kind::File => (EntryType::Regular, inode.size),
        Kind::Directory => (EntryType::Directory, 0),
        Kind::Symlink => (EntryType::Symlink, 0),
        Kind::Character => (EntryType::Char, 0),
        Kind::Block => (EntryType::Block, 0),
        Kind::Fifo => (EntryType::Fifo, 0),
    };
    let mut header = inode.header(kind, size);
    if matches!(inode.kind(), Kind::Character | Kind::Block) {
        let device = u32::try_from(inode.unit).map_err(|_| odd())?;
        header.set_device_major((device >> 8) & 0xfff)?;
        header.set_device_minor((device & 0xff) | ((device >> 12) & 0xf_ff00))?;
    }
    put(&mut header.as_old_mut().name, &name);
    put(&mut header.as_old_mut().linkname, &target);
    header.set_cksum();
    builder.append(&header, reader.data(inode).take(size))
}

fn append_link<W: Write>(
    builder: &mut Builder<W>,
    header: &mut Header,
    path: &[u8],
    target: &[u8],
) -> io::Result<()> {
    let mut records = Vec::new();
    if path.len() > 100 {
        records.push(("path".to_owned(), path.to_vec()));
    }
    if target.len() > 100 {
        records.push(("linkpath".to_owned(), target.to_vec()));
    }
    extend(builder, &records)?;
    put(&mut header.as_old_mut().name, path);
    put(&mut header.as_old_mut().linkname, target);
    header.set_cksum();
    builder.append(header, io::empty())
}

/// As much of a name as the field holds; a record has all of a longer one.
fn put(field: &mut [u8; 100], name: &[u8]) {
    let length = name.len().min(field.len());
    field[..length].copy_from_slice(&name[..length]);
}

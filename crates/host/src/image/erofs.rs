//! An EROFS image from a tar stream, uncompressed.
//!
//! The format is that of the kernel's `Documentation/filesystems/erofs.rst` and
//! `fs/erofs/erofs_fs.h`, in the form every kernel since 5.4 reads: blocks of 4 KiB, no
//! compression, no incompatible features.
//!
//! ```text
//! block 0          superblock, at byte 1024
//! then             data of files, in the order of the stream
//! then             whole blocks of directories and long links
//! to the end       metadata: inodes, each with its extended attributes and, if it fits, the
//!                  last part of its data
//! ```
//!
//! Data comes first so that it goes straight to the output while the stream is read; only names,
//! inodes and small files wait in memory. Why not mkfs.erofs or a crate: see
//! `docs/decisions/0002-erofs-writer.md`.

mod tree;

use std::collections::BTreeMap;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};

use self::tree::{Body, Tree};
use super::archive::{Entry, Kind, Reader};

/// Bytes in a block.
const BLOCK: u64 = 4096;
/// Bytes in a slot: inodes are addressed in units of it.
const SLOT: u64 = 32;
/// Bytes in an extended inode. The compact form is not used: it has no time of its own.
const INODE: u64 = 64;
/// Files up to this length are kept next to their inode: reading one then costs no further block,
/// and no block is left mostly empty.
const INLINE_BYTES_MAX: u64 = 2048;
/// Of such files this much is held in memory while the stream is read; the ones after get blocks.
const INLINE_TOTAL_MAX: u64 = 64 << 20;

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Length of the image in bytes, a multiple of 4096.
    pub bytes: u64,
    /// Number of inodes.
    pub inodes: u64,
    /// Content of the regular files that were asked for and seen, by path; the last of each.
    pub captured: BTreeMap<String, Vec<u8>>,
}

/// Writes the tree in `tar`, an uncompressed tar stream, as an EROFS image to `image`, which is
/// empty and at its start. Reads up to the archive's end mark.
///
/// Everything a tar archive says is kept: types, permissions with set-id bits, owners of 32 bits,
/// times in nanoseconds, hard links, devices, and extended attributes of the classes `user`,
/// `trusted`, `security` and POSIX ACLs (others are dropped; EROFS has no number for them). Of
/// entries with the same path the last counts. Missing parents become directories of user 0 with
/// mode 0755. Equal streams make equal images.
///
/// `capture` names files, such as `var/lib/dpkg/status`, whose content is also returned.
///
/// # Errors
///
/// Those of reading and writing; [`InvalidData`](io::ErrorKind::InvalidData) if the stream is no
/// tar archive, a path has `..` in it, a path leads through something that is not a directory, a
/// hard link's target is missing, a name has more than 255 bytes, or there are sparse files.
pub fn write_erofs(
    tar: impl Read,
    image: impl Write + Seek,
    capture: &[&str],
) -> io::Result<Written> {
    let mut tar = Reader::new(tar);
    let mut out = Output {
        writer: BufWriter::with_capacity(1 << 20, image),
        position: 0,
    };
    let mut tree = Tree::new();
    let mut captured = BTreeMap::new();
    let mut inline_left = INLINE_TOTAL_MAX;
    let mut buffer = vec![0; 1 << 20];
    out.zeros(BLOCK)?;
    while let Some(entry) = tar.next_entry()? {
        let path = tree::parts(&entry.path)?;
        let body = match entry.kind {
            Kind::File => {
                let wanted = capture.iter().find(|c| path.join(&b'/') == c.as_bytes());
                let mut copy = wanted.map(|_| Vec::new());
                let body = copy_file(&mut tar, &mut out, &mut inline_left, &mut copy, &mut buffer)?;
                if let (Some(name), Some(copy)) = (wanted, copy) {
                    captured.insert((*name).to_owned(), copy);
                }
                body
            }
            Kind::HardLink => {
                tree.link(&path, &tree::parts(&entry.link)?)?;
                continue;
            }
            Kind::Directory => Body::Directory(BTreeMap::new()),
            Kind::Symlink => Body::Symlink(entry.link.clone()),
            Kind::CharacterDevice | Kind::BlockDevice => Body::Special(device_number(&entry)),
            Kind::Fifo => Body::Special(0),
        };
        tree.insert(&path, &entry, body)?;
    }
    let written = Layout::new(&tree, &mut out)?.write(&tree, &mut out)?;
    Ok(Written {
        captured,
        ..written
    })
}

/// Copies one file's data to the output, or to memory if it is small.
fn copy_file(
    data: &mut impl Read,
    out: &mut Output<impl Write + Seek>,
    inline_left: &mut u64,
    copy: &mut Option<Vec<u8>>,
    buffer: &mut [u8],
) -> io::Result<Body> {
    let mut head = Vec::new();
    data.take(INLINE_BYTES_MAX + 1).read_to_end(&mut head)?;
    let length = head.len() as u64;
    if length == 0 || (length <= INLINE_BYTES_MAX && length <= *inline_left) {
        *inline_left -= length;
        if let Some(copy) = copy {
            copy.extend_from_slice(&head);
        }
        return Ok(Body::SmallFile(head));
    }
    let first_block = out.block()?;
    let mut size = 0;
    let mut chunk = head.as_slice();
    loop {
        out.write(chunk)?;
        size += chunk.len() as u64;
        if let Some(copy) = copy {
            copy.extend_from_slice(chunk);
        }
        let n = data.read(buffer)?;
        if n == 0 {
            break;
        }
        chunk = &buffer[..n];
    }
    out.pad_block()?;
    Ok(Body::File { size, first_block })
}

/// `new_encode_dev` in the kernel's `include/linux/kdev_t.h`.
fn device_number(entry: &Entry) -> u32 {
    let (major, minor) = entry.device;
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// The output, with its position.
struct Output<W: Write + Seek> {
    writer: BufWriter<W>,
    position: u64,
}

impl<W: Write + Seek> Output<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.writer.write_all(bytes)?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    fn zeros(&mut self, count: u64) -> io::Result<()> {
        self.position += io::copy(&mut io::repeat(0).take(count), &mut self.writer)?;
        Ok(())
    }

    fn pad_block(&mut self) -> io::Result<()> {
        self.zeros(self.position.next_multiple_of(BLOCK) - self.position)
    }

    /// The number of the block that begins here. Block numbers have 32 bits: 16 TiB.
    fn block(&self) -> io::Result<u32> {
        debug_assert!(self.position.is_multiple_of(BLOCK));
        u32::try_from(self.position / BLOCK)
            .map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))
    }
}

/// Where the data of an inode is.
struct Place {
    /// The first of its whole blocks; 0 if it has none.
    first_block: u32,
    /// Whole blocks among the directory blocks, in bytes of data.
    whole: u64,
    /// Bytes behind the inode: the rest of its data.
    tail: u64,
    /// All of its data.
    size: u64,
    /// Where the inode is, in bytes from the start of the metadata.
    at: u64,
}

/// The image's metadata, placed.
struct Layout {
    /// Inodes in the order in which they are written: a directory, the other things in it, then
    /// its directories, so that what is looked up together is read together.
    order: Vec<usize>,
    /// Indexed as the tree's nodes. `None` for those that no path leads to any more.
    places: Vec<Option<Place>>,
    meta_block: u32,
}

impl Layout {
    /// Places everything; writes nothing. The output is at the end of the files' data.
    fn new(tree: &Tree, out: &mut Output<impl Write + Seek>) -> io::Result<Self> {
        let order = tree.order();
        let mut places: Vec<Option<Place>> = Vec::new();
        places.resize_with(tree.nodes.len(), || None);
        let mut next_block = u64::from(out.block()?);
        // Slot 0 stays empty: an inode number of 0 means "no file" to readers of directories.
        let mut next = SLOT;
        for &index in &order {
            let node = &tree.nodes[index];
            let head = INODE + node.xattrs.len() as u64;
            let mut place = Place {
                first_block: 0,
                whole: 0,
                tail: 0,
                size: 0,
                at: 0,
            };
            match &node.body {
                Body::File { size, first_block } => {
                    place.size = *size;
                    place.first_block = *first_block;
                }
                Body::Special(_) => {}
                Body::SmallFile(_) | Body::Symlink(_) | Body::Directory(_) => {
                    place.size = match &node.body {
                        Body::Directory(children) => directory_size(children),
                        Body::SmallFile(bytes) | Body::Symlink(bytes) => bytes.len() as u64,
                        Body::File { .. } | Body::Special(_) => unreachable!("matched above"),
                    };
                    let rest = place.size % BLOCK;
                    place.tail = if head + rest <= BLOCK { rest } else { 0 };
                    place.whole = place.size - place.tail;
                    if place.whole > 0 {
                        place.first_block = u32::try_from(next_block)
                            .map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
                        next_block += place.whole.div_ceil(BLOCK);
                    }
                }
            }
            // The kernel refuses a tail that crosses a block's end (`erofs_map_blocks`), and an
            // inode in one block is read at once. Extended attributes alone may cross.
            let together = if place.tail > 0 {
                head + place.tail
            } else {
                INODE
            };
            if next % BLOCK + together > BLOCK {
                next = next.next_multiple_of(BLOCK);
            }
            place.at = next;
            next = (next + head + place.tail).next_multiple_of(SLOT);
            places[index] = Some(place);
        }
        Ok(Self {
            order,
            places,
            meta_block: u32::try_from(next_block)
                .map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?,
        })
    }

    fn place(&self, index: usize) -> &Place {
        self.places[index]
            .as_ref()
            .expect("everything a directory names is placed")
    }

    /// The number by which directories name an inode: its slot.
    fn nid(&self, index: usize) -> u64 {
        self.place(index).at / SLOT
    }

    fn write(&self, tree: &Tree, out: &mut Output<impl Write + Seek>) -> io::Result<Written> {
        for &index in &self.order {
            let place = self.place(index);
            if place.whole > 0 {
                let content = self.content(tree, index);
                let whole = usize::try_from(place.whole).expect("it is in memory");
                out.write(&content[..whole])?;
                out.pad_block()?;
            }
        }
        assert_eq!(out.block()?, self.meta_block);
        let meta = out.position;
        for (number, &index) in (1..).zip(&self.order) {
            let place = self.place(index);
            out.zeros(meta + place.at - out.position)?;
            out.write(&self.inode(tree, index, number))?;
            out.write(&tree.nodes[index].xattrs)?;
            if place.tail > 0 {
                let content = self.content(tree, index);
                let whole = usize::try_from(place.whole).expect("it is in memory");
                out.write(&content[whole..])?;
            }
        }
        out.pad_block()?;
        let (bytes, blocks) = (out.position, out.block()?);
        let inodes = self.order.len() as u64;
        out.writer.seek(SeekFrom::Start(1024))?;
        out.writer
            .write_all(&self.superblock(tree, blocks, inodes))?;
        out.writer.flush()?;
        Ok(Written {
            bytes,
            inodes,
            captured: BTreeMap::new(),
        })
    }

    /// The data of an inode that is not a large file.
    fn content<'t>(&self, tree: &'t Tree, index: usize) -> std::borrow::Cow<'t, [u8]> {
        match &tree.nodes[index].body {
            Body::SmallFile(bytes) | Body::Symlink(bytes) => bytes.into(),
            Body::Directory(children) => {
                let parent = tree.nodes[index].parent;
                let names = with_dots(children, index, parent).map(|(name, child)| {
                    (name, self.nid(child), tree.nodes[child].directory_type())
                });
                directory(names).into()
            }
            Body::File { .. } | Body::Special(_) => unreachable!("it has no data here"),
        }
    }

    /// `struct erofs_inode_extended`.
    fn inode(&self, tree: &Tree, index: usize, number: u32) -> Vec<u8> {
        const EXTENDED: u16 = 1;
        const FLAT_PLAIN: u16 = 0;
        const FLAT_INLINE: u16 = 2;
        let (node, place) = (&tree.nodes[index], self.place(index));
        let data = if place.tail > 0 {
            FLAT_INLINE
        } else {
            FLAT_PLAIN
        };
        // The units of 4 bytes beyond the header of 12, plus 1; 0 if there are none.
        let xattr_count = match node.xattrs.len() {
            0 => 0,
            length => u16::try_from((length - 12) / 4 + 1).expect("bounded when it was made"),
        };
        let address = match node.body {
            Body::Special(device) => device,
            _ => place.first_block,
        };
        let mut bytes = Vec::with_capacity(64);
        bytes.extend_from_slice(&(EXTENDED | data << 1).to_le_bytes()); // i_format
        bytes.extend_from_slice(&xattr_count.to_le_bytes()); // i_xattr_icount
        bytes.extend_from_slice(&node.mode.to_le_bytes()); // i_mode
        bytes.extend_from_slice(&[0; 2]); // i_reserved
        bytes.extend_from_slice(&place.size.to_le_bytes()); // i_size
        bytes.extend_from_slice(&address.to_le_bytes()); // i_u
        bytes.extend_from_slice(&number.to_le_bytes()); // i_ino, for stat with 32 bits
        bytes.extend_from_slice(&node.uid.to_le_bytes()); // i_uid
        bytes.extend_from_slice(&node.gid.to_le_bytes()); // i_gid
        bytes.extend_from_slice(&node.mtime.0.to_le_bytes()); // i_mtime
        bytes.extend_from_slice(&node.mtime.1.to_le_bytes()); // i_mtime_nsec
        bytes.extend_from_slice(&tree.links(index).to_le_bytes()); // i_nlink
        bytes.resize(64, 0); // i_reserved2
        bytes
    }

    /// `struct erofs_super_block`.
    fn superblock(&self, tree: &Tree, blocks: u32, inodes: u64) -> Vec<u8> {
        const MAGIC: u32 = 0xe0f5_e1e2;
        /// `EROFS_FEATURE_COMPAT_MTIME`: times are of modification.
        const MTIME: u32 = 2;
        const BLOCK_BITS: u8 = 12;
        let root = u16::try_from(self.nid(tree::ROOT)).expect("the root is placed first");
        let newest = self.order.iter().map(|i| tree.nodes[*i].mtime).max();
        let (seconds, nanoseconds) = newest.unwrap_or_default();
        let mut bytes = Vec::with_capacity(128);
        bytes.extend_from_slice(&MAGIC.to_le_bytes()); // magic
        bytes.extend_from_slice(&[0; 4]); // checksum: not used
        bytes.extend_from_slice(&MTIME.to_le_bytes()); // feature_compat
        bytes.extend_from_slice(&[BLOCK_BITS, 0]); // blkszbits, sb_extslots
        bytes.extend_from_slice(&root.to_le_bytes()); // root_nid
        bytes.extend_from_slice(&inodes.to_le_bytes()); // inos
        bytes.extend_from_slice(&seconds.to_le_bytes()); // build_time
        bytes.extend_from_slice(&nanoseconds.to_le_bytes()); // build_time_nsec
        bytes.extend_from_slice(&blocks.to_le_bytes()); // blocks
        bytes.extend_from_slice(&self.meta_block.to_le_bytes()); // meta_blkaddr
        // xattr_blkaddr, uuid, volume_name, feature_incompat and the rest: none.
        bytes.resize(128, 0);
        bytes
    }
}

/// The entries of a directory with `.` and `..`, sorted by bytes, as the kernel's binary search
/// wants them.
fn with_dots(
    children: &BTreeMap<Vec<u8>, usize>,
    own: usize,
    parent: usize,
) -> impl Iterator<Item = (&[u8], usize)> {
    let before = |name: &[u8]| name < b".".as_slice();
    let between = |name: &[u8]| name > b".".as_slice() && name < b"..".as_slice();
    let all = move || {
        children
            .iter()
            .map(|(name, child)| (name.as_slice(), *child))
    };
    all()
        .take_while(move |(name, _)| before(name))
        .chain([(b".".as_slice(), own)])
        .chain(
            all()
                .skip_while(move |(name, _)| before(name))
                .take_while(move |(name, _)| between(name)),
        )
        .chain([(b"..".as_slice(), parent)])
        .chain(all().skip_while(move |(name, _)| before(name) || between(name)))
}

/// Bytes of `struct erofs_dirent`.
const DIRENT: usize = 12;

fn directory_size(children: &BTreeMap<Vec<u8>, usize>) -> u64 {
    let (mut blocks, mut used) = (0, 0);
    for (name, _) in with_dots(children, 0, 0) {
        let needed = (DIRENT + name.len()) as u64;
        if used + needed > BLOCK {
            blocks += 1;
            used = 0;
        }
        used += needed;
    }
    blocks * BLOCK + used
}

/// A directory's data: blocks, each with its entries first and then their names, which have no
/// end mark but the next name or the block's end.
fn directory<'n>(names: impl Iterator<Item = (&'n [u8], u64, u8)>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut block: Vec<(&[u8], u64, u8)> = Vec::new();
    let mut used = 0;
    let mut end_block = |block: &mut Vec<(&[u8], u64, u8)>| {
        let block_size = usize::try_from(BLOCK).expect("4096");
        bytes.resize(bytes.len().next_multiple_of(block_size), 0);
        let mut name_at = block.len() * DIRENT;
        for (name, nid, kind) in block.iter() {
            bytes.extend_from_slice(&nid.to_le_bytes());
            let at = u16::try_from(name_at).expect("below 4096");
            bytes.extend_from_slice(&at.to_le_bytes());
            bytes.extend_from_slice(&[*kind, 0]);
            name_at += name.len();
        }
        for (name, _, _) in block.drain(..) {
            bytes.extend_from_slice(name);
        }
    };
    for entry in names {
        let needed = (DIRENT + entry.0.len()) as u64;
        if used + needed > BLOCK {
            end_block(&mut block);
            used = 0;
        }
        used += needed;
        block.push(entry);
    }
    end_block(&mut block);
    bytes
}

#[cfg(test)]
mod tests;

//! An EROFS image from a tar stream, uncompressed.
//!
//! The format is that of the kernel's `Documentation/filesystems/erofs.rst` and
//! `fs/erofs/erofs_fs.h`, in the form every kernel since 5.4 reads: blocks of 4 KiB, no
//! compression, no incompatible features. Only an image with holes in its files needs Linux 5.15:
//! those files are cut into chunks of one size, of which a map tells the block, or that it is a hole.
//!
//! ```text
//! block 0          superblock, at byte 1024
//! then             data of files, in the order of the stream
//! then             whole blocks of directories and long links
//! to the end       metadata: inodes, each with its extended attributes and, if it fits, the
//!                  last part of its data, or the map of its chunks
//! ```
//!
//! Data comes first so that it goes straight to the output while the stream is read; only names,
//! inodes and small files wait in memory. Why not mkfs.erofs or a crate: see
//! `docs/decisions/0002-erofs-writer.md`.

mod export;
mod tree;

use std::collections::BTreeMap;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};

pub use self::export::export_tar;
use self::tree::{Body, Children, Chunks, Tree};
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

/// Files of this length or more are searched for zeros, which become holes. Shorter ones only if the
/// archive says that they have holes: a program with some zeros in it is no sparse file.
const SEARCHED_BYTES_MIN: u64 = 16 << 20;
/// The longest file: what block numbers of 32 bits can tell. An archive may claim more for a file of
/// holes, and would have us take memory for it.
const FILE_BYTES_MAX: u64 = BLOCK << 32;
/// The smallest chunk of a file with holes.
const CHUNK_BITS_MIN: u32 = 16;
/// Chunks of a file, at most: longer files have larger ones. The map has 4 bytes for each.
const CHUNKS_MAX: u64 = 1 << 16;

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

/// How much an image may come to. What is beyond is refused while it is read, so that a small
/// archive that unpacks to a huge tree costs no more than this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all files together, holes included; and bytes of the streams they come in.
    pub bytes: u64,
    /// Entries of the archives together.
    pub entries: u64,
}

impl Limits {
    /// Neither is bounded but by the format and by memory.
    pub const NONE: Self = Self {
        bytes: u64::MAX,
        entries: u64::MAX,
    };
}

impl Default for Limits {
    /// 64 GiB and two million entries: a few times the largest images in use.
    fn default() -> Self {
        Self {
            bytes: 64 << 30,
            entries: 2_000_000,
        }
    }
}

/// Which files are looked at on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Special<'a> {
    /// Files, such as `var/lib/dpkg/status`, whose content is also returned.
    pub capture: &'a [&'a str],
    /// Files whose content is left out, such as `etc/machine-id`.
    pub empty: &'a [&'a str],
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
/// # Errors
///
/// Those of reading and writing; [`InvalidData`](io::ErrorKind::InvalidData) if the stream is no
/// tar archive, a path has `..` in it, a path leads through something that is not a directory, a
/// hard link's target is missing, a name has more than 255 bytes, or names and attributes take more
/// than 2 GiB.
pub fn write_erofs(
    tar: impl Read,
    image: impl Write + Seek,
    special: Special<'_>,
) -> io::Result<Written> {
    let mut builder = Builder::new(image, special, Limits::NONE)?;
    builder.add(&mut Reader::new(tar))?;
    builder.finish()
}

/// Puts an image together from the layers of an OCI image, the lowest first.
pub struct Builder<'a, W: Write + Seek> {
    out: Output<W>,
    tree: Tree,
    special: Special<'a>,
    limits: Limits,
    captured: BTreeMap<String, Vec<u8>>,
    inline_left: u64,
    buffer: Vec<u8>,
    bytes: u64,
    entries: u64,
}

impl<W: Write + Seek> std::fmt::Debug for Builder<'_, W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Builder")
            .field("entries", &self.entries)
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

impl<'a, W: Write + Seek> Builder<'a, W> {
    /// Begins with an empty root. `image` is empty and at its start.
    ///
    /// # Errors
    ///
    /// Those of writing.
    pub fn new(image: W, special: Special<'a>, limits: Limits) -> io::Result<Self> {
        let mut out = Output {
            writer: BufWriter::with_capacity(1 << 20, image),
            position: 0,
        };
        out.zeros(BLOCK)?;
        Ok(Self {
            out,
            tree: Tree::new(),
            special,
            limits,
            captured: BTreeMap::new(),
            inline_left: INLINE_TOTAL_MAX,
            buffer: vec![0; 1 << 20],
            bytes: 0,
            entries: 0,
        })
    }

    /// Applies the next layer, an uncompressed tar stream, of which everything up to the archive's
    /// end is read ("Filesystem Layers" of the OCI image specification).
    ///
    /// A file `.wh.NAME` hides `NAME` of the layers below, a file `.wh..wh..opq` everything that the
    /// layers below have in its directory, wherever in the stream it stands. A symbolic link in the
    /// middle of a path is followed within the image, as if the image were the root. What a layer
    /// hides stays in the image file, and no path leads to it.
    ///
    /// # Errors
    ///
    /// As [`write_erofs`]; and if it is more than the limits allow. The image is of no use then.
    pub fn layer(&mut self, tar: impl Read) -> io::Result<()> {
        self.tree.next_layer();
        self.add(&mut Reader::of_layer(tar))
    }

    /// Makes a directory and its parents, if the tree has nothing of that name.
    ///
    /// # Errors
    ///
    /// [`InvalidData`](io::ErrorKind::InvalidData) if the path has `..` in it or leads through
    /// something that is not a directory.
    pub fn directory(&mut self, path: &str) -> io::Result<()> {
        self.tree.next_layer();
        self.tree.directory(&tree::parts(path.as_bytes())?)
    }

    fn add(&mut self, tar: &mut Reader<impl Read>) -> io::Result<()> {
        while let Some(entry) = tar.next_entry()? {
            self.entries += 1;
            if self.entries > self.limits.entries {
                return Err(TooMuch::error(self.limits.entries, "entries"));
            }
            let path = tree::parts(&entry.path)?;
            if self.tree.whiteout(&path)? {
                continue;
            }
            self.bytes = self.bytes.saturating_add(entry.size);
            if self.bytes > self.limits.bytes {
                return Err(TooMuch::error(self.limits.bytes, "bytes of files"));
            }
            let body = match entry.kind {
                Kind::File => self.file(tar, &entry, &path.join(&b'/'))?,
                Kind::HardLink => {
                    self.tree.link(&path, &tree::parts(&entry.link)?)?;
                    continue;
                }
                Kind::Directory => Body::Directory(BTreeMap::new()),
                Kind::Symlink => Body::Symlink(entry.link.clone()),
                Kind::CharacterDevice | Kind::BlockDevice => Body::Special(device_number(&entry)),
                Kind::Fifo => Body::Special(0),
            };
            self.tree.insert(&path, &entry, body)?;
        }
        Ok(())
    }

    fn file(
        &mut self,
        tar: &mut Reader<impl Read>,
        entry: &Entry,
        name: &[u8],
    ) -> io::Result<Body> {
        let is_one = |of: &&&str| name == of.as_bytes();
        if self.special.empty.iter().any(|of| is_one(&of)) {
            return Ok(Body::SmallFile(Vec::new()));
        }
        let wanted = self.special.capture.iter().find(is_one);
        let mut copy = wanted.map(|_| Vec::new());
        let body = copy_file(
            tar,
            entry,
            &mut self.out,
            &mut self.inline_left,
            &mut copy,
            &mut self.buffer,
        )?;
        if let (Some(name), Some(copy)) = (wanted, copy) {
            self.captured.insert((*name).to_owned(), copy);
        }
        Ok(body)
    }

    /// Writes what is left: directories, inodes and the superblock.
    ///
    /// # Errors
    ///
    /// Those of writing.
    pub fn finish(mut self) -> io::Result<Written> {
        let written = Layout::new(&self.tree, &mut self.out)?.write(&self.tree, &mut self.out)?;
        Ok(Written {
            captured: self.captured,
            ..written
        })
    }
}

/// More than [`Limits`] allow. Travels in an [`io::Error`].
#[derive(Debug, thiserror::Error)]
#[error("it has more than {most} {what}, the limit")]
pub(crate) struct TooMuch {
    most: u64,
    what: &'static str,
}

impl TooMuch {
    pub(crate) fn error(most: u64, what: &'static str) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidData, Self { most, what })
    }
}

fn corrupt(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

/// Copies one file's data to the output, or to memory if it is small.
fn copy_file(
    data: &mut Reader<impl Read>,
    entry: &Entry,
    out: &mut Output<impl Write + Seek>,
    inline_left: &mut u64,
    copy: &mut Option<Vec<u8>>,
    buffer: &mut Vec<u8>,
) -> io::Result<Body> {
    let size = entry.size;
    if size > FILE_BYTES_MAX {
        return Err(corrupt(format!(
            "{} says that it has {size} bytes, more than a file may have",
            String::from_utf8_lossy(&entry.path)
        )));
    }
    if size == 0 || (size <= INLINE_BYTES_MAX && size <= *inline_left) {
        *inline_left -= size;
        let mut content = Vec::new();
        data.read_to_end(&mut content)?;
        if let Some(copy) = copy {
            copy.extend_from_slice(&content);
        }
        return Ok(Body::SmallFile(content));
    }
    let first_block = out.block()?;
    let searched = entry.sparse || size >= SEARCHED_BYTES_MIN;
    let mut chunks = Chunks {
        size,
        bits: chunk_bits(size),
        runs: Vec::new(),
    };
    // Without holes all of it lies in a row, and where it is cut does not show.
    let chunk = usize::try_from(1_u64 << chunks.bits).expect("it fits memory");
    buffer.resize(buffer.len().max(chunk), 0);
    let mut left = size;
    while left > 0 {
        let length = usize::try_from(left).map_or(chunk, |left| left.min(chunk));
        left -= length as u64;
        let known = data.hole() >= length as u64;
        let piece = &mut buffer[..length];
        if known {
            data.skip_hole(length as u64);
        } else {
            data.read_exact(piece)?;
        }
        let hole = known || (searched && piece.iter().all(|byte| *byte == 0));
        if let Some(copy) = copy {
            let end = copy.len() + length;
            if hole {
                copy.resize(end, 0);
            } else {
                copy.extend_from_slice(piece);
            }
        }
        match chunks.runs.last_mut() {
            Some((count, block)) if block.is_none() == hole => *count += 1,
            _ => chunks
                .runs
                .push((1, (!hole).then(|| out.block()).transpose()?)),
        }
        if !hole {
            out.write(piece)?;
            out.pad_block()?;
        }
    }
    if chunks.runs.iter().all(|(_, block)| block.is_some()) {
        return Ok(Body::File { size, first_block });
    }
    Ok(Body::Chunks(chunks))
}

/// Logarithm of the bytes in a chunk of a file of this size.
fn chunk_bits(size: u64) -> u32 {
    let needed = size.div_ceil(CHUNKS_MAX).next_power_of_two();
    needed.trailing_zeros().max(CHUNK_BITS_MIN)
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
    /// Bytes behind the inode: the map of its chunks.
    map: u64,
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
                map: 0,
                size: 0,
                at: 0,
            };
            match &node.body {
                Body::File { size, first_block } => {
                    place.size = *size;
                    place.first_block = *first_block;
                }
                Body::Chunks(chunks) => {
                    place.size = chunks.size;
                    place.map = 4 * chunks.count();
                }
                Body::Special(_) => {}
                Body::SmallFile(_) | Body::Symlink(_) | Body::Directory(_) => {
                    place.size = match &node.body {
                        Body::Directory(children) => directory_size(children),
                        Body::SmallFile(bytes) | Body::Symlink(bytes) => bytes.len() as u64,
                        Body::File { .. } | Body::Chunks(_) | Body::Special(_) => {
                            unreachable!("matched above")
                        }
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
            // inode in one block is read at once. Extended attributes alone may cross, and so may a
            // map, of which each number lies in one block.
            let together = if place.tail > 0 {
                head + place.tail
            } else {
                INODE
            };
            if next % BLOCK + together > BLOCK {
                next = next.next_multiple_of(BLOCK);
            }
            place.at = next;
            next = (next + head + place.tail + place.map).next_multiple_of(SLOT);
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
            if let Body::Chunks(chunks) = &tree.nodes[index].body {
                write_map(chunks, out)?;
            }
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
            Body::File { .. } | Body::Chunks(_) | Body::Special(_) => {
                unreachable!("it has no data here")
            }
        }
    }

    /// `struct erofs_inode_extended`.
    fn inode(&self, tree: &Tree, index: usize, number: u32) -> Vec<u8> {
        const EXTENDED: u16 = 1;
        const FLAT_PLAIN: u16 = 0;
        const FLAT_INLINE: u16 = 2;
        const CHUNK_BASED: u16 = 4;
        let (node, place) = (&tree.nodes[index], self.place(index));
        let data = match &node.body {
            Body::Chunks(_) => CHUNK_BASED,
            _ if place.tail > 0 => FLAT_INLINE,
            _ => FLAT_PLAIN,
        };
        // The units of 4 bytes beyond the header of 12, plus 1; 0 if there are none.
        let xattr_count = match node.xattrs.len() {
            0 => 0,
            length => u16::try_from((length - 12) / 4 + 1).expect("bounded when it was made"),
        };
        let address = match &node.body {
            Body::Special(device) => *device,
            // `struct erofs_inode_chunk_info`: how many blocks, and no indexes.
            Body::Chunks(chunks) => chunks.bits - BLOCK.trailing_zeros(),
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
        /// `EROFS_FEATURE_INCOMPAT_CHUNKED_FILE`.
        const CHUNKED_FILE: u32 = 4;
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
        // xattr_blkaddr, uuid and volume_name: none.
        bytes.resize(80, 0);
        let chunked = self
            .order
            .iter()
            .any(|index| matches!(tree.nodes[*index].body, Body::Chunks(_)));
        let features = if chunked { CHUNKED_FILE } else { 0 };
        bytes.extend_from_slice(&features.to_le_bytes()); // feature_incompat
        // The rest: none.
        bytes.resize(128, 0);
        bytes
    }
}

/// Writes the map of a file's chunks: the first block of each, in 4 bytes.
fn write_map(chunks: &Chunks, out: &mut Output<impl Write + Seek>) -> io::Result<()> {
    /// `EROFS_NULL_ADDR`.
    const HOLE: u32 = u32::MAX;
    let blocks = 1_u32 << (chunks.bits - BLOCK.trailing_zeros());
    for (count, first) in &chunks.runs {
        let mut block = *first;
        for _ in 0..*count {
            out.write(&block.unwrap_or(HOLE).to_le_bytes())?;
            // The last chunk may be the last of the image and has no successor to be told.
            block = block.map(|block| block.wrapping_add(blocks));
        }
    }
    Ok(())
}

/// The entries of a directory with `.` and `..`, sorted by bytes, as the kernel's binary search
/// wants them.
fn with_dots(
    children: &Children,
    own: usize,
    parent: usize,
) -> impl Iterator<Item = (&[u8], usize)> {
    let before = |name: &[u8]| name < b".".as_slice();
    let between = |name: &[u8]| name > b".".as_slice() && name < b"..".as_slice();
    let all = move || {
        children
            .iter()
            .map(|(name, child)| (name.as_slice(), child.node))
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

fn directory_size(children: &Children) -> u64 {
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
mod layer_tests;
#[cfg(test)]
mod tests;

//! The tree an archive describes, in memory but for the files' data.

use std::collections::BTreeMap;
use std::io;

use crate::image::archive::{Entry, Kind};

/// The root's index.
pub(super) const ROOT: usize = 0;
/// `EROFS_NAME_LEN`.
const NAME_BYTES_MAX: usize = 255;
/// The longest target of a symbolic link: `PATH_MAX` less the NUL.
const LINK_BYTES_MAX: usize = 4095;
/// What a tree may hold in memory. Debian with a desktop takes some 100 MB; a hostile archive would
/// take all there is.
const HELD_BYTES_MAX: usize = 2 << 30;

fn corrupt(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

fn show(path: &[&[u8]]) -> String {
    format!("/{}", String::from_utf8_lossy(&path.join(&b'/')))
}

/// An inode to be.
#[derive(Debug)]
pub(super) struct Node {
    /// Type and permission bits, inode(7).
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: (i64, u32),
    /// `struct erofs_xattr_ibody_header` and the entries behind it, or nothing.
    pub(super) xattrs: Vec<u8>,
    pub(super) body: Body,
    /// Of a directory: the one it is in.
    pub(super) parent: usize,
    /// Names it has, if it is not a directory.
    names: u32,
}

/// What an inode holds.
#[derive(Debug)]
pub(super) enum Body {
    Directory(BTreeMap<Vec<u8>, usize>),
    /// Data that is in the output already.
    File {
        size: u64,
        first_block: u32,
    },
    /// Data that is in the output already but for its holes.
    Chunks(Chunks),
    SmallFile(Vec<u8>),
    Symlink(Vec<u8>),
    /// A device with its number, or a FIFO.
    Special(u32),
}

/// A file in pieces of one size, each of which is whole blocks or a hole.
#[derive(Debug)]
pub(super) struct Chunks {
    pub(super) size: u64,
    /// Logarithm of a piece's bytes.
    pub(super) bits: u32,
    /// Of so many pieces in a row, the first block; or `None` if they are holes.
    pub(super) runs: Vec<(u64, Option<u32>)>,
}

impl Chunks {
    /// The number of pieces.
    pub(super) fn count(&self) -> u64 {
        self.size.div_ceil(1 << self.bits)
    }
}

impl Node {
    /// `EROFS_FT_*`, which are `FT_*` of the kernel's `include/linux/fs_types.h`.
    pub(super) fn directory_type(&self) -> u8 {
        match self.mode & 0o170_000 {
            0o100_000 => 1,
            0o040_000 => 2,
            0o020_000 => 3,
            0o060_000 => 4,
            0o010_000 => 5,
            0o120_000 => 7,
            _ => unreachable!("no other type is made"),
        }
    }

    fn new_directory(parent: usize) -> Self {
        Self {
            mode: 0o040_755,
            uid: 0,
            gid: 0,
            mtime: (0, 0),
            xattrs: Vec::new(),
            body: Body::Directory(BTreeMap::new()),
            parent,
            names: 0,
        }
    }
}

#[derive(Debug)]
pub(super) struct Tree {
    pub(super) nodes: Vec<Node>,
    /// Bytes of memory it takes, roughly.
    held: usize,
}

/// The names in a path, from the root. Leading slashes and `.` mean nothing in an archive.
pub(super) fn parts(path: &[u8]) -> io::Result<Vec<&[u8]>> {
    let parts: Vec<_> = path
        .split(|b| *b == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
        .collect();
    for part in &parts {
        if *part == b".." || part.contains(&0) {
            return Err(corrupt(format!("the path {} is not allowed", show(&parts))));
        }
        if part.len() > NAME_BYTES_MAX {
            return Err(corrupt(format!(
                "a name in {} has more than 255 bytes",
                show(&parts)
            )));
        }
    }
    Ok(parts)
}

impl Tree {
    pub(super) fn new() -> Self {
        Self {
            nodes: vec![Node::new_directory(ROOT)],
            held: 0,
        }
    }

    fn children(&self, index: usize) -> Option<&BTreeMap<Vec<u8>, usize>> {
        match &self.nodes[index].body {
            Body::Directory(children) => Some(children),
            _ => None,
        }
    }

    fn children_mut(&mut self, index: usize) -> &mut BTreeMap<Vec<u8>, usize> {
        match &mut self.nodes[index].body {
            Body::Directory(children) => children,
            _ => unreachable!("the caller made sure it is a directory"),
        }
    }

    /// The directory that holds the last part of `path`, made with its parents if missing.
    fn parent_of(&mut self, path: &[&[u8]]) -> io::Result<usize> {
        let mut at = ROOT;
        for (depth, part) in path[..path.len() - 1].iter().enumerate() {
            let children = self.children(at).expect("checked one step before");
            at = match children.get(*part) {
                Some(&child) if self.children(child).is_some() => child,
                // Following a symbolic link here, or replacing it, would each surprise somebody.
                Some(_) => {
                    return Err(corrupt(format!(
                        "{} is below {}, which is not a directory",
                        show(path),
                        show(&path[..=depth])
                    )));
                }
                None => {
                    let child = self.nodes.len();
                    self.nodes.push(Node::new_directory(at));
                    self.children_mut(at).insert(part.to_vec(), child);
                    child
                }
            };
        }
        Ok(at)
    }

    /// Counts what one more entry takes.
    fn hold(&mut self, path: &[&[u8]], more: usize) -> io::Result<()> {
        // Its name is a key in a map whose nodes are half full at worst.
        let name = path.last().map_or(0, |name| name.len()) + 64;
        self.held += size_of::<Node>() + name + more;
        if self.held > HELD_BYTES_MAX {
            return Err(corrupt("it has more than 2 GiB of names and attributes"));
        }
        Ok(())
    }

    /// Puts an entry into the tree. A directory that is there already keeps what is in it.
    pub(super) fn insert(&mut self, path: &[&[u8]], entry: &Entry, body: Body) -> io::Result<()> {
        let kind: u16 = match entry.kind {
            Kind::File => 0o100_000,
            Kind::Directory => 0o040_000,
            Kind::Symlink => 0o120_000,
            Kind::CharacterDevice => 0o020_000,
            Kind::BlockDevice => 0o060_000,
            Kind::Fifo => 0o010_000,
            Kind::HardLink => unreachable!("it has no inode of its own"),
        };
        if let Body::Symlink(target) = &body
            && (target.is_empty() || target.len() > LINK_BYTES_MAX)
        {
            return Err(corrupt(format!(
                "the target of {} has not 1 to 4095 bytes",
                show(path)
            )));
        }
        let mut node = Node {
            mode: kind | entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            xattrs: xattr_body(&entry.xattrs, path)?,
            body,
            parent: ROOT,
            names: 0,
        };
        let target = entry.link.len();
        self.hold(path, node.xattrs.len() + target)?;
        let Some(name) = path.last() else {
            if entry.kind != Kind::Directory {
                return Err(corrupt("the root is not a directory"));
            }
            node.body = std::mem::replace(&mut self.nodes[ROOT].body, Body::Special(0));
            self.nodes[ROOT] = node;
            return Ok(());
        };
        let parent = self.parent_of(path)?;
        node.parent = parent;
        let existing = self.children_mut(parent).get(*name).copied();
        if let Some(existing) = existing
            && entry.kind == Kind::Directory
            && self.children(existing).is_some()
        {
            node.body = std::mem::replace(&mut self.nodes[existing].body, Body::Special(0));
            self.nodes[existing] = node;
            return Ok(());
        }
        let index = self.nodes.len();
        self.nodes.push(node);
        self.place(parent, name, index);
        Ok(())
    }

    /// Gives what is at `target` a further name.
    pub(super) fn link(&mut self, path: &[&[u8]], target: &[&[u8]]) -> io::Result<()> {
        let mut at = Some(ROOT);
        for part in target {
            at = at.and_then(|at| self.children(at)?.get(*part).copied());
        }
        let Some(at) = at.filter(|at| self.children(*at).is_none()) else {
            return Err(corrupt(format!(
                "{} is a hard link to {}, which is no file before it",
                show(path),
                show(target)
            )));
        };
        let Some(name) = path.last() else {
            return Err(corrupt("the root is not a directory"));
        };
        self.hold(path, 0)?;
        let parent = self.parent_of(path)?;
        self.place(parent, name, at);
        Ok(())
    }

    /// Sets a name, counting names of what is not a directory.
    fn place(&mut self, parent: usize, name: &[u8], index: usize) {
        self.nodes[index].names += 1;
        if let Some(old) = self.children_mut(parent).insert(name.to_vec(), index)
            && self.children(old).is_none()
        {
            self.nodes[old].names -= 1;
        }
    }

    /// Every inode that a path leads to, once: a directory, what is in it but for directories,
    /// then its directories in the same way.
    pub(super) fn order(&self) -> Vec<usize> {
        let mut order = Vec::with_capacity(self.nodes.len());
        let mut seen = vec![false; self.nodes.len()];
        // Not recursive: a path may be as deep as an archive likes.
        let mut stack = vec![ROOT];
        while let Some(index) = stack.pop() {
            order.push(index);
            let children = self.children(index).expect("only directories are stacked");
            let first_directory = stack.len();
            for &child in children.values() {
                if self.children(child).is_some() {
                    stack.push(child);
                } else if !std::mem::replace(&mut seen[child], true) {
                    order.push(child);
                }
            }
            stack[first_directory..].reverse();
        }
        order
    }

    /// The link count: a directory has its name, its `.`, and the `..` of each directory in it.
    pub(super) fn links(&self, index: usize) -> u32 {
        match self.children(index) {
            Some(children) => {
                let directories = children
                    .values()
                    .filter(|child| self.children(**child).is_some())
                    .count();
                u32::try_from(directories + 2).unwrap_or(u32::MAX)
            }
            None => self.nodes[index].names,
        }
    }
}

/// `EROFS_XATTR_INDEX_*`: the number that stands for the beginning of a name.
const PREFIXES: [(u8, &[u8]); 5] = [
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
];

/// `struct erofs_xattr_ibody_header` and a `struct erofs_xattr_entry` for each attribute.
fn xattr_body(xattrs: &[(Vec<u8>, Vec<u8>)], path: &[&[u8]]) -> io::Result<Vec<u8>> {
    // The count of units of 4 bytes has 16 bits.
    const BYTES_MAX: usize = 12 + 4 * 65_534;
    // A later record takes precedence; sorted, so that their order in the archive means nothing.
    let xattrs: BTreeMap<_, _> = xattrs.iter().map(|(k, v)| (k, v)).collect();
    let mut bytes = vec![0; 12];
    for (name, value) in xattrs {
        let class = PREFIXES.iter().find_map(|(index, prefix)| {
            let rest = name.strip_prefix(*prefix)?;
            (rest.is_empty() != prefix.ends_with(b".")).then_some((*index, rest))
        });
        let Some((index, rest)) = class else {
            tracing::debug!(name = %String::from_utf8_lossy(name), "an attribute is dropped");
            continue;
        };
        let (Ok(name_length), Ok(value_length)) =
            (u8::try_from(rest.len()), u16::try_from(value.len()))
        else {
            return Err(corrupt(format!(
                "an extended attribute of {} is too long",
                show(path)
            )));
        };
        bytes.extend_from_slice(&[name_length, index]);
        bytes.extend_from_slice(&value_length.to_le_bytes());
        bytes.extend_from_slice(rest);
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    if bytes.len() > BYTES_MAX {
        return Err(corrupt(format!(
            "{} has more than 256 KiB of extended attributes",
            show(path)
        )));
    }
    // A header with nothing behind it is no attributes at all.
    Ok(if bytes.len() == 12 { Vec::new() } else { bytes })
}

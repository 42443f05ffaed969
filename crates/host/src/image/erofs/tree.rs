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

/// The names in a directory.
pub(super) type Children = BTreeMap<Vec<u8>, Child>;

/// What a name stands for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Child {
    pub(super) node: usize,
    /// The last layer that had this name in a path.
    layer: u32,
}

/// What an inode holds.
#[derive(Debug)]
pub(super) enum Body {
    Directory(Children),
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

/// Links on the way to one file, as many as path_resolution(7) allows.
const LINKS_MAX: u32 = 40;

/// What marks a file that hides another one.
const WHITEOUT: &[u8] = b".wh.";
/// What marks a file that hides all others in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// What aufs kept for itself beside them.
const AUFS: &[u8] = b".wh..wh.";

#[derive(Debug)]
pub(super) struct Tree {
    pub(super) nodes: Vec<Node>,
    /// Bytes of memory it takes, roughly.
    held: usize,
    /// The layer that is being applied, from 1; 0 for an archive that is no layer.
    layer: u32,
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
            layer: 0,
        }
    }

    /// From now on entries are of the next layer.
    pub(super) fn next_layer(&mut self) {
        self.layer += 1;
    }

    fn children(&self, index: usize) -> Option<&Children> {
        match &self.nodes[index].body {
            Body::Directory(children) => Some(children),
            _ => None,
        }
    }

    fn children_mut(&mut self, index: usize) -> &mut Children {
        match &mut self.nodes[index].body {
            Body::Directory(children) => children,
            _ => unreachable!("the caller made sure it is a directory"),
        }
    }

    /// The directory that holds the last part of `path`, made with its parents if missing.
    fn parent_of(&mut self, path: &[&[u8]]) -> io::Result<usize> {
        let parent = self.walk(path, &path[..path.len() - 1], true)?;
        Ok(parent.expect("what is missing is made"))
    }

    /// The directory that `directories`, a part of `whole`, leads to; `None` if it is missing and is
    /// not to be made. Names on the way are of this layer from then on, if they are to be made.
    ///
    /// In a layer, symbolic links are followed: the programs that unpack layers do, and some that
    /// make them rely on it. There is no way out of the tree. In another archive following one, or
    /// replacing it, would each surprise somebody.
    fn walk(
        &mut self,
        whole: &[&[u8]],
        directories: &[&[u8]],
        make: bool,
    ) -> io::Result<Option<usize>> {
        let mut at = ROOT;
        let mut left: Vec<Vec<u8>> = directories.iter().rev().map(|part| part.to_vec()).collect();
        let mut links = 0;
        while let Some(part) = left.pop() {
            if part == b".." {
                at = self.nodes[at].parent;
                continue;
            }
            let children = self.children(at).expect("checked one step before");
            let Some(child) = children.get(&part).copied() else {
                if !make {
                    return Ok(None);
                }
                let node = self.nodes.len();
                self.nodes.push(Node::new_directory(at));
                let layer = self.layer;
                self.children_mut(at).insert(part, Child { node, layer });
                at = node;
                continue;
            };
            match &self.nodes[child.node].body {
                Body::Directory(_) => {
                    if make {
                        let layer = self.layer;
                        if let Some(named) = self.children_mut(at).get_mut(&part) {
                            named.layer = layer;
                        }
                    }
                    at = child.node;
                }
                Body::Symlink(target) if self.layer > 0 => {
                    links += 1;
                    if links > LINKS_MAX {
                        return Err(corrupt(format!(
                            "{} leads through more than {LINKS_MAX} symbolic links",
                            show(whole)
                        )));
                    }
                    let parts = target.split(|b| *b == b'/');
                    let parts = parts.filter(|part| !part.is_empty() && *part != b".");
                    left.extend(parts.rev().map(<[u8]>::to_vec));
                    if target.starts_with(b"/") {
                        at = ROOT;
                    }
                    if left.iter().any(|part| part.len() > NAME_BYTES_MAX) {
                        return Err(corrupt(format!(
                            "a name in {} has more than 255 bytes",
                            show(whole)
                        )));
                    }
                }
                _ if !make => return Ok(None),
                _ => {
                    return Err(corrupt(format!(
                        "{} is below {}, which is not a directory",
                        show(whole),
                        String::from_utf8_lossy(&part)
                    )));
                }
            }
        }
        Ok(Some(at))
    }

    /// Hides what an entry of this path hides, if it is there for that. Says whether it is.
    pub(super) fn whiteout(&mut self, path: &[&[u8]]) -> io::Result<bool> {
        if self.layer == 0 || !path.iter().any(|part| part.starts_with(WHITEOUT)) {
            return Ok(false);
        }
        let (name, directories) = path.split_last().expect("it has a part");
        if let Some(hidden) = name.strip_prefix(WHITEOUT)
            && (*name == OPAQUE || !name.starts_with(AUFS))
            && !directories.iter().any(|part| part.starts_with(WHITEOUT))
        {
            if matches!(hidden, b"" | b"." | b"..") {
                return Err(corrupt(format!("{} hides nothing", show(path))));
            }
            if let Some(at) = self.walk(path, directories, false)? {
                if *name == OPAQUE {
                    self.hide_below(at);
                } else if let Some(child) = self.children_mut(at).get(hidden).copied() {
                    if child.layer < self.layer {
                        self.children_mut(at).remove(hidden);
                        self.forget(child.node);
                    } else if self.children(child.node).is_some() {
                        self.hide_below(child.node);
                    }
                }
            }
        }
        Ok(true)
    }

    /// Takes what only lower layers have out of a directory and of those below it.
    fn hide_below(&mut self, index: usize) {
        let mut stack = vec![index];
        while let Some(at) = stack.pop() {
            let layer = self.layer;
            let mut doomed = Vec::new();
            self.children_mut(at).retain(|_, child| {
                let stays = child.layer >= layer;
                if !stays {
                    doomed.push(child.node);
                }
                stays
            });
            for node in doomed {
                self.forget(node);
            }
            let children = self.children(at).expect("only directories are stacked");
            let directories = children.values().map(|child| child.node);
            let directories = directories.filter(|node| self.children(*node).is_some());
            stack.extend(directories.collect::<Vec<_>>());
        }
    }

    /// Counts a name less of what a removed name stood for, or of everything below it.
    fn forget(&mut self, index: usize) {
        let mut stack = vec![index];
        while let Some(at) = stack.pop() {
            match self.children(at) {
                Some(children) => stack.extend(children.values().map(|child| child.node)),
                None => self.nodes[at].names -= 1,
            }
        }
    }

    /// Makes a directory and its parents, if there is nothing of its name.
    pub(super) fn directory(&mut self, path: &[&[u8]]) -> io::Result<()> {
        self.walk(path, path, true).map(|_| ())
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
        let layer = self.layer;
        if entry.kind == Kind::Directory
            && let Some(existing) = self.children(parent).and_then(|names| names.get(*name))
            && let existing = existing.node
            && self.children(existing).is_some()
        {
            node.body = std::mem::replace(&mut self.nodes[existing].body, Body::Special(0));
            self.nodes[existing] = node;
            let node = existing;
            self.children_mut(parent)
                .insert(name.to_vec(), Child { node, layer });
            return Ok(());
        }
        let index = self.nodes.len();
        self.nodes.push(node);
        self.place(parent, name, index);
        Ok(())
    }

    /// Gives what is at `target` a further name.
    pub(super) fn link(&mut self, path: &[&[u8]], target: &[&[u8]]) -> io::Result<()> {
        let found = match target.split_last() {
            Some((name, directories)) => self
                .walk(target, directories, false)?
                .and_then(|at| Some(self.children(at)?.get(*name)?.node)),
            None => None,
        };
        let Some(at) = found.filter(|at| self.children(*at).is_none()) else {
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
    fn place(&mut self, parent: usize, name: &[u8], node: usize) {
        self.nodes[node].names += 1;
        let layer = self.layer;
        let children = self.children_mut(parent);
        if let Some(old) = children.insert(name.to_vec(), Child { node, layer }) {
            self.forget(old.node);
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
            for child in children.values().map(|child| child.node) {
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
                    .filter(|child| self.children(child.node).is_some())
                    .count();
                u32::try_from(directories + 2).unwrap_or(u32::MAX)
            }
            None => self.nodes[index].names,
        }
    }
}

/// `EROFS_XATTR_INDEX_*`: the number that stands for the beginning of a name.
pub(super) const PREFIXES: [(u8, &[u8]); 5] = [
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
        // Words of an overlay to itself, of which this image becomes a part.
        if name.starts_with(b"trusted.overlay.") {
            continue;
        }
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

use std::collections::BTreeMap;
use std::fs;
use std::io::Cursor;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use proptest::prelude::*;
use tar::{EntryType, Header};

use super::*;

/// One thing at a path, as the archive says it and as a reader is to find it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Thing {
    pub(super) mode: u32,
    uid: u32,
    gid: u32,
    mtime: (i64, u32),
    xattrs: BTreeMap<String, Vec<u8>>,
    pub(super) content: Content,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Content {
    Directory,
    File(Vec<u8>),
    Symlink(String),
    Device(EntryTypeName, u32, u32),
    Fifo,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EntryTypeName {
    Character,
    Block,
}

type Things = BTreeMap<String, Thing>;

/// Paths, each with the path it is another name of.
type Links = BTreeMap<String, String>;

fn archive(things: &Things, links: &Links) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, thing) in things {
        let (kind, data, link, device) = match &thing.content {
            Content::Directory => (EntryType::Directory, &[][..], None, None),
            Content::File(data) => (EntryType::Regular, data.as_slice(), None, None),
            Content::Symlink(target) => (EntryType::Symlink, &[][..], Some(target), None),
            Content::Device(EntryTypeName::Character, a, b) => {
                (EntryType::Char, &[][..], None, Some((*a, *b)))
            }
            Content::Device(EntryTypeName::Block, a, b) => {
                (EntryType::Block, &[][..], None, Some((*a, *b)))
            }
            Content::Fifo => (EntryType::Fifo, &[][..], None, None),
        };
        let mut records: Vec<(String, Vec<u8>)> = thing
            .xattrs
            .iter()
            .map(|(k, v)| (format!("SCHILY.xattr.{k}"), v.clone()))
            .collect();
        let (seconds, nanoseconds) = thing.mtime;
        assert!(seconds >= 0, "the tests write times after 1970");
        records.push((
            "mtime".to_owned(),
            format!("{seconds}.{nanoseconds:09}").into_bytes(),
        ));
        records.push(("uid".to_owned(), thing.uid.to_string().into_bytes()));
        if let Some(target) = link {
            records.push(("linkpath".to_owned(), target.clone().into_bytes()));
        }
        builder
            .append_pax_extensions(records.iter().map(|(k, v)| (k.as_str(), v.as_slice())))
            .unwrap();
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(thing.mode);
        header.set_uid(0);
        header.set_gid(thing.gid.into());
        header.set_size(data.len() as u64);
        if let Some((major, minor)) = device {
            header.set_device_major(major).unwrap();
            header.set_device_minor(minor).unwrap();
        }
        builder.append_data(&mut header, path, data).unwrap();
    }
    for (path, target) in links {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Link);
        header.set_size(0);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        builder.append_link(&mut header, path, target).unwrap();
    }
    builder.into_inner().unwrap()
}

fn image(tar: &[u8]) -> io::Result<Vec<u8>> {
    let mut image = Cursor::new(Vec::new());
    let written = write_erofs(tar, &mut image, Special::default())?;
    let image = image.into_inner();
    assert_eq!(written.bytes, image.len() as u64);
    assert!(written.bytes.is_multiple_of(BLOCK));
    Ok(image)
}

/// A reader of its own, written from the format's description and with nothing of the writer's.
pub(super) struct Image<'i>(pub(super) &'i [u8]);

impl Image<'_> {
    fn number(&self, at: usize, length: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes[..length].copy_from_slice(&self.0[at..at + length]);
        u64::from_le_bytes(bytes)
    }

    fn index(&self, at: usize, length: usize) -> usize {
        usize::try_from(self.number(at, length)).unwrap()
    }

    fn inode_at(&self, nid: usize) -> usize {
        self.index(1024 + 40, 4) * 4096 + nid * 32
    }

    fn data(&self, inode: usize) -> Vec<u8> {
        let (format, size) = (self.index(inode, 2), self.index(inode + 8, 8));
        assert_eq!(format & 1, 1, "extended");
        let blocks = self.index(inode + 16, 4) * 4096;
        match format >> 1 {
            0 => self.0[blocks..blocks + size].to_vec(),
            2 => {
                let whole = size / 4096 * 4096;
                let tail_at = inode + 64 + self.xattr_length(inode);
                let tail = &self.0[tail_at..tail_at + size - whole];
                assert!(tail_at % 4096 + tail.len() <= 4096, "in one block");
                [&self.0[blocks..blocks + whole], tail].concat()
            }
            4 => {
                let chunk = 4096 << self.index(inode + 16, 2);
                let map = inode + 64 + self.xattr_length(inode);
                let mut data = Vec::new();
                for n in 0..size.div_ceil(chunk) {
                    let length = chunk.min(size - data.len());
                    match self.index(map + 4 * n, 4) {
                        0xffff_ffff => data.resize(data.len() + length, 0),
                        block => data.extend(&self.0[block * 4096..block * 4096 + length]),
                    }
                }
                data
            }
            other => panic!("layout {other}"),
        }
    }

    fn xattr_length(&self, inode: usize) -> usize {
        match self.index(inode + 2, 2) {
            0 => 0,
            count => 12 + 4 * (count - 1),
        }
    }

    fn xattrs(&self, inode: usize) -> BTreeMap<String, Vec<u8>> {
        let mut found = BTreeMap::new();
        let end = inode + 64 + self.xattr_length(inode);
        let mut at = inode + 64 + 12;
        while at < end {
            let (name_length, class) = (self.index(at, 1), self.0[at + 1]);
            let value_length = self.index(at + 2, 2);
            let value_at = at + 4 + name_length;
            let prefix = match class {
                1 => "user.",
                2 => "system.posix_acl_access",
                3 => "system.posix_acl_default",
                4 => "trusted.",
                6 => "security.",
                other => panic!("class {other}"),
            };
            let name = std::str::from_utf8(&self.0[at + 4..value_at]).unwrap();
            let value = &self.0[value_at..value_at + value_length];
            found.insert(format!("{prefix}{name}"), value.to_vec());
            at = (value_at + value_length).next_multiple_of(4);
        }
        found
    }

    fn thing(&self, inode: usize) -> Thing {
        let mode = u32::try_from(self.number(inode + 4, 2)).unwrap();
        let device = u32::try_from(self.number(inode + 16, 4)).unwrap();
        let (major, minor) = (
            (device >> 8) & 0xfff,
            (device & 0xff) | ((device >> 12) & 0xfff00),
        );
        let content = match mode >> 12 {
            0o04 => Content::Directory,
            0o10 => Content::File(self.data(inode)),
            0o12 => Content::Symlink(String::from_utf8(self.data(inode)).unwrap()),
            0o02 => Content::Device(EntryTypeName::Character, major, minor),
            0o06 => Content::Device(EntryTypeName::Block, major, minor),
            0o01 => Content::Fifo,
            other => panic!("type {other}"),
        };
        Thing {
            mode: mode & 0o7777,
            uid: u32::try_from(self.number(inode + 24, 4)).unwrap(),
            gid: u32::try_from(self.number(inode + 28, 4)).unwrap(),
            mtime: (
                self.number(inode + 32, 8).cast_signed(),
                u32::try_from(self.number(inode + 40, 4)).unwrap(),
            ),
            xattrs: self.xattrs(inode),
            content,
        }
    }

    /// Everything in it by path, with the inode, and checks what a kernel relies on.
    pub(super) fn read(&self) -> BTreeMap<String, (usize, Thing)> {
        assert_eq!(self.number(1024, 4), 0xe0f5_e1e2);
        assert_eq!(self.index(1024 + 36, 4) * 4096, self.0.len());
        let features = self.number(1024 + 80, 4);
        let root = self.inode_at(self.index(1024 + 14, 2));
        let mut found = BTreeMap::new();
        self.walk(root, root, String::new(), &mut found);
        found.insert(String::new(), (root, self.thing(root)));
        let mut names: BTreeMap<usize, u64> = BTreeMap::new();
        for (inode, thing) in found.values() {
            if thing.content != Content::Directory {
                *names.entry(*inode).or_default() += 1;
            }
        }
        for (inode, count) in names {
            assert_eq!(self.number(inode + 44, 4), count, "links");
        }
        let distinct: std::collections::BTreeSet<_> = found.values().map(|(i, _)| i).collect();
        assert_eq!(self.index(1024 + 16, 8), distinct.len());
        let chunked = distinct.iter().any(|i| self.number(**i, 2) >> 1 == 4);
        assert_eq!(features, if chunked { 4 } else { 0 }, "feature_incompat");
        found
    }

    fn walk(
        &self,
        inode: usize,
        parent: usize,
        path: String,
        found: &mut BTreeMap<String, (usize, Thing)>,
    ) {
        let data = self.data(inode);
        let mut names: Vec<Vec<u8>> = Vec::new();
        let mut directories = 2;
        for block in data.chunks(4096) {
            let u16_at = |at: usize| usize::from(u16::from_le_bytes([block[at], block[at + 1]]));
            let count = u16_at(8) / 12;
            for n in 0..count {
                let nid = u64::from_le_bytes(block[n * 12..n * 12 + 8].try_into().unwrap());
                let start = u16_at(n * 12 + 8);
                let end = if n + 1 < count {
                    u16_at(n * 12 + 20)
                } else {
                    block.len()
                };
                let name: Vec<u8> = block[start..end]
                    .iter()
                    .copied()
                    .take_while(|b| *b != 0)
                    .collect();
                assert!(nid > 0);
                let child = self.inode_at(usize::try_from(nid).unwrap());
                names.push(name.clone());
                match name.as_slice() {
                    b"." => assert_eq!(child, inode),
                    b".." => assert_eq!(child, parent),
                    name => {
                        let thing = self.thing(child);
                        let kind = block[n * 12 + 10];
                        let path = format!("{path}/{}", std::str::from_utf8(name).unwrap());
                        assert_eq!(
                            kind,
                            match &thing.content {
                                Content::File(_) => 1,
                                Content::Directory => 2,
                                Content::Device(EntryTypeName::Character, ..) => 3,
                                Content::Device(EntryTypeName::Block, ..) => 4,
                                Content::Fifo => 5,
                                Content::Symlink(_) => 7,
                            }
                        );
                        if thing.content == Content::Directory {
                            directories += 1;
                            self.walk(child, inode, path.clone(), found);
                        }
                        assert!(found.insert(path, (child, thing)).is_none());
                    }
                }
            }
        }
        assert!(names.is_sorted(), "by bytes");
        assert!(names.iter().any(|n| n == b".") && names.iter().any(|n| n == b".."));
        assert_eq!(self.number(inode + 44, 4), directories, "links of {path}");
    }
}

fn thing() -> impl Strategy<Value = Thing> {
    let content = prop_oneof![
        3 => Just(Content::Directory),
        3 => prop::collection::vec(any::<u8>(), 0..64).prop_map(Content::File),
        3 => (any::<u8>(), prop_oneof![0_usize..5000, Just(2048), Just(2049), Just(4096), Just(8192), 0_usize..100_000])
            .prop_map(|(byte, length)| Content::File(vec![byte; length])),
        2 => "[a-z/.]{1,40}".prop_map(Content::Symlink),
        1 => (1_usize..4095).prop_map(|n| Content::Symlink("x".repeat(n))),
        1 => (0_u32..4096, 0_u32..0x10_0000).prop_map(|(a, b)| Content::Device(EntryTypeName::Character, a, b)),
        1 => (0_u32..4096, 0_u32..0x10_0000).prop_map(|(a, b)| Content::Device(EntryTypeName::Block, a, b)),
        1 => Just(Content::Fifo),
    ];
    let xattrs = prop_oneof![
        6 => Just(BTreeMap::new()),
        1 => prop::collection::btree_map(
            "(user|trusted|security)\\.[a-z]{1,20}",
            prop::collection::vec(any::<u8>(), 0..300),
            1..5,
        ),
        1 => Just(BTreeMap::from([("user.large".to_owned(), vec![10; 5000])])),
    ];
    (
        content,
        0_u32..0o10_000,
        any::<u32>(),
        0_u32..0o7_777_777,
        0_i64..1 << 40,
        0_u32..1_000_000_000,
        xattrs,
    )
        .prop_map(
            |(content, mode, uid, gid, seconds, nanoseconds, xattrs)| Thing {
                // As nobody makes links with other modes, extractors do not keep them.
                mode: if matches!(content, Content::Symlink(_)) {
                    0o777
                } else {
                    mode
                },
                uid,
                gid,
                mtime: (seconds, nanoseconds),
                xattrs,
                content,
            },
        )
}

/// A tree: names are put below directories made before, and hard links beside.
fn tree() -> impl Strategy<Value = (Things, Links)> {
    let name = prop_oneof![
        8 => "[a-zA-Z0-9!,._ -]{1,12}".prop_filter("not special", |n| n != "." && n != ".."),
        1 => (1_usize..=255).prop_map(|n| "n".repeat(n)),
        1 => Just("ünïcode".to_owned()),
    ];
    prop::collection::vec(
        (any::<prop::sample::Index>(), name, thing(), any::<bool>()),
        0..120,
    )
    .prop_map(|entries| {
        let (mut things, mut links) = (Things::new(), Links::new());
        let mut directories = vec![String::new()];
        let mut files: Vec<String> = Vec::new();
        for (at, name, thing, link) in entries {
            let path = format!("{}/{name}", directories[at.index(directories.len())]);
            let path = path.trim_start_matches('/').to_owned();
            if things.contains_key(&path) || links.contains_key(&path) || path.len() > 900 {
                continue;
            }
            if link && !files.is_empty() && thing.content != Content::Directory {
                links.insert(path, files[at.index(files.len())].clone());
                continue;
            }
            if thing.content == Content::Directory {
                directories.push(path.clone());
            } else {
                files.push(path.clone());
            }
            things.insert(path, thing);
        }
        (things, links)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn what_goes_in_comes_out((things, links) in tree()) {
        let tar = archive(&things, &links);
        let image = image(&tar).unwrap();
        let mut found = Image(&image).read();
        let (_, root) = found.remove("").unwrap();
        prop_assert_eq!(root.mode, 0o755);
        prop_assert_eq!(found.len(), things.len() + links.len());
        for (path, thing) in &things {
            prop_assert_eq!(&found[&format!("/{path}")].1, thing);
        }
        for (path, target) in &links {
            prop_assert_eq!(&found[&format!("/{path}")], &found[&format!("/{target}")]);
        }
        prop_assert!(self::image(&tar).unwrap() == image, "equal streams make equal images");
    }
}

/// Runs fsck.erofs of erofs-utils, a reader nobody here wrote.
fn fsck(image: &[u8], dir: &Path) -> PathBuf {
    let file = dir.join("image");
    fs::write(&file, image).unwrap();
    let root = dir.join("extracted");
    let output = Command::new("fsck.erofs")
        .arg(format!("--extract={}", root.display()))
        .arg(&file)
        .output()
        .expect("this test needs fsck.erofs: install the package erofs-utils");
    assert!(output.status.success(), "{output:?}");
    root
}

fn compare(path: &Path, thing: &Thing, as_root: bool) {
    let metadata = fs::symlink_metadata(path).unwrap();
    let kind = metadata.file_type();
    match &thing.content {
        Content::Directory => assert!(kind.is_dir()),
        Content::File(data) => {
            assert!(kind.is_file(), "{}", path.display());
            assert!(fs::read(path).unwrap() == *data, "{}", path.display());
        }
        Content::Symlink(target) => {
            assert_eq!(
                fs::read_link(path).unwrap().as_os_str().as_bytes(),
                target.as_bytes()
            );
        }
        Content::Device(name, major, minor) => {
            assert_eq!(kind.is_char_device(), *name == EntryTypeName::Character);
            assert_eq!(
                (libc::major(metadata.rdev()), libc::minor(metadata.rdev())),
                (*major, *minor)
            );
        }
        Content::Fifo => assert!(kind.is_fifo()),
    }
    if as_root {
        assert_eq!((metadata.uid(), metadata.gid()), (thing.uid, thing.gid));
        if !kind.is_symlink() {
            // erofs-utils 1.5 changes the owner after the mode, which clears set-id bits, chown(2).
            let bits = if thing.uid == 0 { 0o7777 } else { 0o1777 };
            assert_eq!(
                metadata.mode() & bits,
                thing.mode & bits,
                "{}",
                path.display()
            );
        }
    }
    // Older versions restore whole seconds only.
    assert_eq!(metadata.mtime(), thing.mtime.0, "{}", path.display());
}

#[test]
fn fsck_erofs_agrees() {
    let as_root = rustix::process::geteuid().is_root();
    let plain = |content, mode| Thing {
        mode,
        uid: 70_000,
        gid: 100_001,
        mtime: (1_700_000_000, 123_456_789),
        xattrs: BTreeMap::new(),
        content,
    };
    let mut things = Things::from([
        ("etc".to_owned(), plain(Content::Directory, 0o755)),
        (
            "etc/empty".to_owned(),
            plain(Content::File(Vec::new()), 0o600),
        ),
        (
            "etc/small".to_owned(),
            plain(Content::File(b"small".to_vec()), 0o4755),
        ),
        (
            "large".to_owned(),
            plain(Content::File(vec![5; 1_000_001]), 0o644),
        ),
        (
            "link".to_owned(),
            plain(Content::Symlink("etc/small".to_owned()), 0o777),
        ),
        (
            "long".to_owned(),
            plain(Content::Symlink("l".repeat(4000)), 0o777),
        ),
        ("fifo".to_owned(), plain(Content::Fifo, 0o644)),
        ("tmp".to_owned(), plain(Content::Directory, 0o1777)),
        ("many".to_owned(), plain(Content::Directory, 0o755)),
    ]);
    if as_root {
        let device = Content::Device(EntryTypeName::Block, 259, 300);
        things.insert("device".to_owned(), plain(device, 0o660));
    }
    // Enough names for several blocks, among them some that sort before "." and between the two.
    for n in 0..2000 {
        let name = format!("many/{}file-{n}", ["", "!", "."][n % 3]);
        things.insert(
            name,
            plain(Content::File(n.to_string().into_bytes()), 0o644),
        );
    }
    things.get_mut("etc/small").unwrap().xattrs =
        BTreeMap::from([("user.note".to_owned(), b"with\nnewline".to_vec())]);
    let links = Links::from([("many/hard".to_owned(), "large".to_owned())]);

    let dir = tempfile::tempdir().unwrap();
    let image = image(&archive(&things, &links)).unwrap();
    let root = fsck(&image, dir.path());
    // Directories first lose their times when things are put into them.
    for (path, thing) in &things {
        compare(&root.join(path), thing, as_root);
    }
    compare(&root.join("many/hard"), &things["large"], as_root);
    assert_eq!(fs::read_dir(root.join("many")).unwrap().count(), 2001);
}

/// An archive of one file with holes, the map as far as it fits the header.
fn sparse(name: &str, size: u64, parts: &[(u64, &[u8])]) -> Vec<u8> {
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::GNUSparse);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    let data: Vec<u8> = parts.iter().flat_map(|(_, data)| data.to_vec()).collect();
    header.set_size(data.len() as u64);
    let gnu = header.as_gnu_mut().unwrap();
    gnu.name[..name.len()].copy_from_slice(name.as_bytes());
    gnu.set_real_size(size);
    for (slot, (offset, data)) in gnu.sparse.iter_mut().zip(parts) {
        slot.set_offset(*offset);
        slot.set_length(data.len() as u64);
    }
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(&data);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

#[test]
fn holes_take_no_space_and_read_as_zeros() {
    const MIB: u64 = 1 << 20;
    let mut things = Things::new();
    let mut add = |name: &str, size: u64, parts: &[(u64, &[u8])]| {
        let mut data = vec![0; usize::try_from(size).unwrap()];
        for (offset, part) in parts {
            let at = usize::try_from(*offset).unwrap();
            data[at..at + part.len()].copy_from_slice(part);
        }
        let thing = Thing {
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: (0, 0),
            xattrs: BTreeMap::new(),
            content: Content::File(data),
        };
        things.insert(name.to_owned(), thing);
        sparse(name, size, parts)
    };
    let tar = [
        add("all", 3 * MIB + 5, &[]),
        add("tiny", 100, &[(10, b"x")]),
        add("begin", 10 * MIB, &[(0, b"begin")]),
        add("end", 10 * MIB + 1, &[(10 * MIB, b"!")]),
        add("across", 4 * MIB, &[(65_530, &[7; 20]), (2 * MIB, &[8; 9])]),
        // With chunks of more than 64 KiB, one of them cut short by the end.
        add("large", 200 * MIB + 77, &[(150 * MIB, &[9; 4097])]),
        vec![0; 1024],
    ]
    .concat();
    let image = image(&tar).unwrap();
    assert!(image.len() < 2 << 20, "{} bytes", image.len());
    let found = Image(&image).read();
    for (path, thing) in &things {
        assert!(&found[&format!("/{path}")].1 == thing, "{path}");
    }
    let dir = tempfile::tempdir().unwrap();
    // erofs-utils 1.5 accepts it, but leaves holes out of what it extracts; that a kernel reads them
    // as zeros is tested end to end.
    let root = fsck(&image, dir.path());
    assert!(root.join("large").is_file());
}

#[test]
fn only_long_files_are_searched_for_zeros() {
    let file = |data| Thing {
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime: (0, 0),
        xattrs: BTreeMap::new(),
        content: Content::File(data),
    };
    let mut long = vec![0; 20 << 20];
    long[7 << 20] = 1;
    let things = Things::from([
        ("long".to_owned(), file(long)),
        ("short".to_owned(), file(vec![0; 1 << 20])),
    ]);
    let image = image(&archive(&things, &Links::new())).unwrap();
    assert!(image.len() > 1 << 20 && image.len() < 2 << 20);
    let found = Image(&image).read();
    for (path, thing) in &things {
        assert!(&found[&format!("/{path}")].1 == thing, "{path}");
    }
}

/// An archive from headers alone.
pub(super) fn raw(entries: &[(&str, EntryType, &str, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (path, kind, link, data) in entries {
        let mut header = Header::new_ustar();
        header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
        header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(*kind);
        header.set_mode(0o750);
        header.set_uid(1);
        header.set_gid(2);
        header.set_mtime(3);
        header.set_size(data.len() as u64);
        header.set_cksum();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(data);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
    }
    bytes.resize(bytes.len() + 1024, 0);
    bytes
}

#[test]
fn what_would_leave_the_root_or_cannot_be_is_refused() {
    use EntryType as T;
    let long_name = "n".repeat(98);
    for entries in [
        vec![("../x", T::Regular, "", &b""[..])],
        vec![("a/../../x", T::Regular, "", &b""[..])],
        vec![
            ("link", T::Symlink, "/etc", &b""[..]),
            ("link/x", T::Regular, "", b""),
        ],
        vec![
            ("file", T::Regular, "", &b""[..]),
            ("file/x", T::Regular, "", b""),
        ],
        vec![("hard", T::Link, "nothing", &b""[..])],
        vec![("hard", T::Link, "../x", &b""[..])],
        vec![
            ("a", T::Directory, "", &b""[..]),
            ("hard", T::Link, "a", b""),
        ],
        vec![("a", T::Symlink, "", &b""[..])],
        vec![("./", T::Symlink, "x", &b""[..])],
        vec![(long_name.as_str(), T::GNUSparse, "", &b""[..])],
    ] {
        let error = image(&raw(&entries)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{entries:?}");
    }
}

#[test]
fn later_entries_win_and_parents_appear() {
    use EntryType as T;
    let tar = raw(&[
        ("./deep/er/file", T::Regular, "", b"first"),
        ("/deep/er/file", T::Regular, "", b"second"),
        ("other", T::Link, "deep/er/file", b""),
        ("deep/er/file", T::Regular, "", b"third"),
        ("deep", T::Directory, "", b""),
        ("gone/x", T::Regular, "", b"x"),
        ("gone", T::Symlink, "deep", b""),
        ("old-style-directory/", T::Regular, "", b""),
        ("./", T::Directory, "", b""),
    ]);
    let image = image(&tar).unwrap();
    let found = Image(&image).read();
    let paths: Vec<_> = found.keys().map(String::as_str).collect();
    assert_eq!(
        paths,
        [
            "",
            "/deep",
            "/deep/er",
            "/deep/er/file",
            "/gone",
            "/old-style-directory",
            "/other"
        ]
    );
    let content = |path: &str| found[path].1.content.clone();
    assert_eq!(content("/deep/er/file"), Content::File(b"third".to_vec()));
    assert_eq!(content("/other"), Content::File(b"second".to_vec()));
    assert_eq!(content("/gone"), Content::Symlink("deep".to_owned()));
    let owner = |path: &str| (found[path].1.mode, found[path].1.uid, found[path].1.mtime);
    assert_eq!(owner("/deep"), (0o750, 1, (3, 0)));
    assert_eq!(owner("/deep/er"), (0o755, 0, (0, 0)));
    assert_eq!(owner(""), (0o750, 1, (3, 0)));
}

#[test]
fn files_are_captured_on_the_way() {
    let large = vec![9; 5000];
    let tar = raw(&[
        ("./var/lib/status", EntryType::Regular, "", &large),
        ("small", EntryType::Regular, "", b"s"),
        ("other", EntryType::Regular, "", b"o"),
    ]);
    let written = write_erofs(
        tar.as_slice(),
        Cursor::new(Vec::new()),
        Special {
            capture: &["var/lib/status", "small", "none"],
            empty: &[],
        },
    )
    .unwrap();
    let captured: Vec<_> = written.captured.into_iter().collect();
    assert_eq!(
        captured,
        [
            ("small".to_owned(), b"s".to_vec()),
            ("var/lib/status".to_owned(), large)
        ]
    );
}

#[test]
fn an_empty_archive_is_an_empty_root() {
    let image = image(&raw(&[])).unwrap();
    let found = Image(&image).read();
    assert_eq!(found.len(), 1);
    assert_eq!(found[""].1.content, Content::Directory);
}

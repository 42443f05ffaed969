//! What a guest's kernel may ask, and what a guest may make up.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use super::*;

/// A directory that is shared, beside one that is not.
struct Place {
    _all: tempfile::TempDir,
    shared: PathBuf,
    outside: PathBuf,
    share: Share,
}

/// What came of a request: its payload, or an error.
type Outcome = Result<Vec<u8>, Errno>;

impl Place {
    fn new(read_only: bool) -> Self {
        Self::with(read_only, 1000)
    }

    fn with(read_only: bool, files_max: usize) -> Self {
        let all = tempfile::tempdir().expect("a directory");
        let (shared, outside) = (all.path().join("shared"), all.path().join("outside"));
        fs::create_dir(&shared).expect("made");
        fs::create_dir(&outside).expect("made");
        fs::write(shared.join("file"), "content").expect("written");
        fs::write(outside.join("secret"), "secret").expect("written");
        let options = ShareOptions {
            read_only,
            guest_owner: (7, 8),
            files_max,
        };
        let share = Share::open(&Os::new(), &shared, options).expect("opened");
        Self {
            _all: all,
            shared,
            outside,
            share,
        }
    }

    fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> Outcome {
        let request = message(opcode, node, body);
        let answer = self.share.answer(&request).expect("an answer");
        let word = |at: usize| u32::from_ne_bytes(*answer[at..].first_chunk().expect("a word"));
        assert_eq!(word(0) as usize, answer.len());
        assert_eq!(answer[8..16], 42_u64.to_ne_bytes(), "it is to this request");
        match word(4).cast_signed() {
            0 => Ok(answer[wire::OUT_HEADER..].to_vec()),
            error => {
                assert_eq!(answer.len(), wire::OUT_HEADER, "an error has nothing else");
                Err(Errno::from_raw_os_error(-error))
            }
        }
    }

    fn lookup(&mut self, parent: u64, name: &str) -> Result<u64, Errno> {
        let entry = self.ask(op::LOOKUP, parent, &text(name))?;
        Ok(u64_at(&entry, 0))
    }

    fn open(&mut self, node: u64, flags: OFlags) -> Result<u64, Errno> {
        let opened = self.ask(op::OPEN, node, &words(&[flags.bits(), 0]))?;
        Ok(u64_at(&opened, 0))
    }

    fn read(&mut self, node: u64, handle: u64) -> Outcome {
        let mut body = handle.to_ne_bytes().to_vec();
        body.extend(0_u64.to_ne_bytes());
        body.extend(words(&[4096, 0, 0, 0, 0, 0]));
        self.ask(op::READ, node, &body)
    }

    fn write(&mut self, node: u64, handle: u64, offset: u64, bytes: &[u8]) -> Outcome {
        self.write_as(node, handle, offset, bytes, (0, OFlags::empty()))
    }

    /// As `write`, with the request's own flags and those of the open file.
    fn write_as(
        &mut self,
        node: u64,
        handle: u64,
        offset: u64,
        bytes: &[u8],
        (write_flags, flags): (u32, OFlags),
    ) -> Outcome {
        let mut body = handle.to_ne_bytes().to_vec();
        body.extend(offset.to_ne_bytes());
        let length = u32::try_from(bytes.len()).expect("short");
        body.extend(words(&[length, write_flags, 0, 0, flags.bits(), 0]));
        body.extend(bytes);
        self.ask(op::WRITE, node, &body)
    }

    fn make_node(&mut self, name: &str, mode: u32) -> Outcome {
        let body = [words(&[mode, 0, 0, 0]), text(name)].concat();
        self.ask(op::MKNOD, ROOT, &body)
    }
}

fn message(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(wire::IN_HEADER + body.len()).expect("short");
    let mut request = words(&[length, opcode]);
    request.extend(42_u64.to_ne_bytes());
    request.extend(node.to_ne_bytes());
    request.extend([0; 16]);
    request.extend(body);
    request
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn text(text: &str) -> Vec<u8> {
    [text.as_bytes(), b"\0"].concat()
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(*bytes[at..].first_chunk().expect("eight bytes"))
}

/// Mode, user and group of a file in an answer to a lookup.
fn owner(entry: &[u8]) -> [u32; 3] {
    // Behind 40 bytes of `fuse_entry_out` and 60 of `fuse_attr`.
    [100, 108, 112].map(|at| u32::from_ne_bytes(*entry[at..].first_chunk().expect("a word")))
}

#[test]
fn files_are_read_and_written() {
    let mut place = Place::new(false);
    let file = place.lookup(ROOT, "file").expect("there");
    let handle = place
        .open(file, OFlags::RDWR | OFlags::APPEND)
        .expect("opened");
    assert_eq!(place.read(file, handle).as_deref(), Ok(&b"content"[..]));
    // A page that was mapped has its place, also in a file that was opened to append.
    let append = OFlags::RDWR | OFlags::APPEND;
    let page = (wire::WRITE_CACHE, append);
    place
        .write_as(file, handle, 1, b"xx", page)
        .expect("written");
    let content = |place: &Place| fs::read(place.shared.join("file")).expect("read");
    assert_eq!(content(&place), b"cxxtent");
    // What is appended is behind what somebody else has appended, of which the guest does not know.
    let somebody = fs::File::options()
        .append(true)
        .open(place.shared.join("file"));
    std::io::Write::write_all(&mut somebody.expect("opened"), b" theirs").expect("written");
    place
        .write_as(file, handle, 7, b" ours", (0, append))
        .expect("written");
    assert_eq!(content(&place), b"cxxtent theirs ours");
    let release = [handle.to_ne_bytes().to_vec(), vec![0; 16]].concat();
    place.ask(op::RELEASE, file, &release).expect("closed");
    assert_eq!(place.read(file, handle), Err(Errno::BADF));

    let body = [words(&[OFlags::RDWR.bits(), 0o644, 0, 0]), text("new")].concat();
    let made = place.ask(op::CREATE, ROOT, &body).expect("made");
    let (node, handle) = (u64_at(&made, 0), u64_at(&made, wire::ENTRY));
    place.write(node, handle, 0, b"words").expect("written");
    assert_eq!(fs::read(place.shared.join("new")).expect("read"), b"words");
    let body = [text("new"), text("newer")].concat();
    let to = [ROOT.to_ne_bytes().to_vec(), body].concat();
    place.ask(op::RENAME, ROOT, &to).expect("renamed");
    assert_eq!(place.lookup(ROOT, "new"), Err(Errno::NOENT));
    assert_eq!(place.lookup(ROOT, "newer"), Ok(node), "it is the same file");
    place
        .ask(op::UNLINK, ROOT, &text("newer"))
        .expect("removed");
    // As long as it is open it is there.
    assert_eq!(place.read(node, handle).as_deref(), Ok(&b"words"[..]));
}

#[test]
fn no_link_leads_to_what_is_shared() {
    let place = Place::new(false);
    let link = place.shared.with_file_name("link");
    std::os::unix::fs::symlink(&place.shared, &link).expect("a link");
    let open = |path: &Path| {
        let options = ShareOptions {
            read_only: true,
            guest_owner: (0, 0),
            files_max: 64,
        };
        Share::open(&Os::new(), path, options).map(drop)
    };
    open(&place.shared).expect("no link");
    fs::create_dir(place.shared.join("sub")).expect("a directory");
    for path in [link.clone(), link.join("sub")] {
        let error = open(&path).expect_err("a link");
        assert!(
            error.to_string().contains("open the directory to share"),
            "{error}"
        );
    }
}

#[test]
fn a_directory_is_listed_from_any_place_in_it() {
    let mut place = Place::new(true);
    for number in 0..300 {
        fs::write(place.shared.join(format!("{number:0100}")), "").expect("written");
    }
    let opened = place
        .ask(op::OPENDIR, ROOT, &words(&[0, 0]))
        .expect("opened");
    let handle = u64_at(&opened, 0);
    let (mut names, mut offset) = (Vec::new(), 0_u64);
    loop {
        let mut body = handle.to_ne_bytes().to_vec();
        body.extend(offset.to_ne_bytes());
        body.extend(words(&[4096, 0, 0, 0, 0, 0]));
        let part = place.ask(op::READDIRPLUS, ROOT, &body).expect("listed");
        assert!(part.len() <= 4096);
        if part.is_empty() {
            break;
        }
        let mut at = 0;
        while at < part.len() {
            let dirent = at + wire::ENTRY;
            offset = u64_at(&part, dirent + 8);
            let length = u32::from_ne_bytes(*part[dirent + 16..].first_chunk().expect("a word"));
            let name = &part[dirent + wire::DIRENT..][..length as usize];
            let name = String::from_utf8(name.to_vec()).expect("a name");
            let known = u64_at(&part, at) != 0;
            assert_eq!(known, !matches!(name.as_str(), "." | ".."), "{name}");
            names.push(name);
            at = dirent + (wire::DIRENT + length as usize).next_multiple_of(8);
        }
    }
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 303, "300, the file, and two dots");
}

#[test]
fn no_name_leads_out() {
    let mut place = Place::new(false);
    for name in [
        "..",
        ".",
        "",
        "../outside",
        "/etc",
        "file/x",
        "a/../../outside",
    ] {
        assert_eq!(place.lookup(ROOT, name), Err(Errno::INVAL), "{name}");
        for opcode in [op::UNLINK, op::RMDIR] {
            let asked = place.ask(opcode, ROOT, &text(name));
            assert_eq!(asked, Err(Errno::INVAL), "{opcode} {name}");
        }
        let body = [words(&[0o755, 0]), text(name)].concat();
        assert_eq!(
            place.ask(op::MKDIR, ROOT, &body),
            Err(Errno::INVAL),
            "{name}"
        );
        let body = [ROOT.to_ne_bytes().to_vec(), text("file"), text(name)].concat();
        assert_eq!(
            place.ask(op::RENAME, ROOT, &body),
            Err(Errno::INVAL),
            "{name}"
        );
    }
    assert_eq!(
        place.lookup(ROOT, &"x".repeat(256)),
        Err(Errno::NAMETOOLONG)
    );
    // A number that nobody was told.
    assert_eq!(place.lookup(999, "file"), Err(Errno::NOENT));
}

#[test]
fn links_are_text_and_lead_nowhere() {
    let mut place = Place::new(false);
    symlink(&place.outside, place.shared.join("out")).expect("made");
    symlink("../outside/secret", place.shared.join("secret")).expect("made");
    for name in ["out", "secret"] {
        let link = place.lookup(ROOT, name).expect("a link is there");
        let entry = place.ask(op::LOOKUP, ROOT, &text(name)).expect("there");
        assert_eq!(owner(&entry)[0] & 0o170_000, 0o120_000, "it is a link");
        assert!(place.lookup(link, "secret").is_err());
        assert_eq!(place.open(link, OFlags::RDONLY), Err(Errno::LOOP));
        assert_eq!(place.open(link, OFlags::WRONLY), Err(Errno::LOOP));
        assert!(place.ask(op::OPENDIR, link, &words(&[0, 0])).is_err());
        let read = place.ask(op::READLINK, link, &[]).expect("text");
        assert!(String::from_utf8_lossy(&read).ends_with(name.trim_start_matches("out")));
        // Nothing is made through one either.
        let body = [words(&[OFlags::RDWR.bits(), 0o644, 0, 0]), text(name)].concat();
        assert!(place.ask(op::CREATE, ROOT, &body).is_err());
        // Its bits are those of nothing.
        let mut body = words(&[fattr::MODE, 0]);
        body.extend([0; 60]);
        body.extend(words(&[0o777, 0, 0, 0, 0]));
        assert_eq!(place.ask(op::SETATTR, link, &body), Err(Errno::OPNOTSUPP));
    }
    assert_eq!(
        fs::read(place.outside.join("secret")).expect("read"),
        b"secret"
    );
    assert_eq!(fs::read_dir(&place.outside).expect("listed").count(), 1);
}

#[test]
fn a_directory_that_is_exchanged_for_a_link_is_the_one_it_was() {
    let mut place = Place::new(false);
    let inner = place.shared.join("inner");
    fs::create_dir(&inner).expect("made");
    let node = place.lookup(ROOT, "inner").expect("there");
    fs::rename(&inner, place.shared.join("moved")).expect("moved");
    symlink(&place.outside, &inner).expect("made");
    assert_eq!(place.lookup(node, "secret"), Err(Errno::NOENT));
    let body = [words(&[0o755, 0]), text("made")].concat();
    place.ask(op::MKDIR, node, &body).expect("made");
    assert!(place.shared.join("moved/made").is_dir());
    assert!(!place.outside.join("made").exists());
}

#[test]
fn what_is_only_read_is_not_changed() {
    let mut place = Place::new(true);
    let file = place.lookup(ROOT, "file").expect("there");
    let attributes = [words(&[fattr::SIZE, 0]), vec![0; 80]].concat();
    let two = [ROOT.to_ne_bytes().to_vec(), text("file"), text("x")].concat();
    let two_flags = [
        ROOT.to_ne_bytes().to_vec(),
        words(&[0, 0]),
        text("file"),
        text("x"),
    ]
    .concat();
    let changes: [(u32, u64, Vec<u8>); 11] = [
        (op::SETATTR, file, attributes),
        (op::SYMLINK, ROOT, [text("x"), text("y")].concat()),
        (
            op::MKNOD,
            ROOT,
            [words(&[0o100_644, 0, 0, 0]), text("x")].concat(),
        ),
        (op::MKDIR, ROOT, [words(&[0o755, 0]), text("x")].concat()),
        (op::UNLINK, ROOT, text("file")),
        (op::RMDIR, ROOT, text("file")),
        (op::RENAME, ROOT, two),
        (op::RENAME2, ROOT, two_flags),
        (
            op::LINK,
            ROOT,
            [file.to_ne_bytes().to_vec(), text("x")].concat(),
        ),
        (
            op::CREATE,
            ROOT,
            [words(&[1, 0o644, 0, 0]), text("x")].concat(),
        ),
        (op::FALLOCATE, file, vec![0; 32]),
    ];
    for (opcode, node, body) in changes {
        assert_eq!(place.ask(opcode, node, &body), Err(Errno::ROFS), "{opcode}");
    }
    for flags in [OFlags::WRONLY, OFlags::RDWR, OFlags::RDONLY | OFlags::TRUNC] {
        assert_eq!(place.open(file, flags), Err(Errno::ROFS), "{flags:?}");
    }
    let handle = place.open(file, OFlags::RDONLY).expect("opened");
    assert_eq!(place.write(file, handle, 0, b"x"), Err(Errno::ROFS));
    assert_eq!(place.read(file, handle).as_deref(), Ok(&b"content"[..]));
    assert_eq!(
        fs::read(place.shared.join("file")).expect("read"),
        b"content"
    );
    assert_eq!(fs::read_dir(&place.shared).expect("listed").count(), 1);
}

#[test]
fn devices_and_set_id_bits_are_not_made() {
    let mut place = Place::new(false);
    for kind in [0o020_000, 0o060_000] {
        assert_eq!(place.make_node("dev", kind | 0o666), Err(Errno::PERM));
    }
    place.make_node("fifo", 0o010_644).expect("made");
    let fifo = place.lookup(ROOT, "fifo").expect("there");
    assert!(
        fs::metadata(place.shared.join("fifo"))
            .expect("there")
            .file_type()
            .is_fifo()
    );
    // To open it would wait for whoever opens the other end.
    assert_eq!(place.open(fifo, OFlags::RDONLY), Err(Errno::NXIO));
    place.make_node("set", 0o106_755).expect("made");
    let mode = fs::metadata(place.shared.join("set"))
        .expect("there")
        .mode();
    assert_eq!(mode & 0o6000, 0);
    let node = place.lookup(ROOT, "set").expect("there");
    let mut body = words(&[fattr::MODE, 0]);
    body.extend([0; 60]);
    body.extend(words(&[0o6755, 0, 0, 0, 0]));
    place.ask(op::SETATTR, node, &body).expect("changed");
    let mode = fs::metadata(place.shared.join("set"))
        .expect("there")
        .mode();
    assert_eq!(mode & 0o7777, 0o755);
    // What has them already is shown without.
    let bits = fs::Permissions::from_mode(0o4711);
    fs::set_permissions(place.shared.join("file"), bits).expect("set");
    let entry = place.ask(op::LOOKUP, ROOT, &text("file")).expect("there");
    assert_eq!(owner(&entry), [0o100_711, 7, 8], "and is the guest's");
}

#[test]
fn files_that_are_forgotten_make_room() {
    let mut place = Place::with(true, 3);
    for name in ["a", "b", "c"] {
        fs::write(place.shared.join(name), "").expect("written");
    }
    let a = place.lookup(ROOT, "a").expect("room");
    place.lookup(ROOT, "b").expect("room");
    assert_eq!(place.lookup(ROOT, "c"), Err(Errno::NFILE));
    assert_eq!(place.lookup(ROOT, "a"), Ok(a), "known twice");
    let forget = |count: u64| message(op::FORGET, a, &count.to_ne_bytes());
    assert_eq!(place.share.answer(&forget(1)), None);
    assert_eq!(place.lookup(ROOT, "c"), Err(Errno::NFILE), "known once");
    assert_eq!(place.share.answer(&forget(1)), None);
    place.lookup(ROOT, "c").expect("room");
    // The directory itself is never forgotten.
    let root = message(op::FORGET, ROOT, &u64::MAX.to_ne_bytes());
    assert_eq!(place.share.answer(&root), None);
    place.lookup(ROOT, "b").expect("there");
}

#[test]
fn requests_that_lack_something_are_refused() {
    let mut place = Place::new(false);
    let file = place.lookup(ROOT, "file").expect("there");
    for opcode in 0..64 {
        for length in 0..100 {
            for byte in [0, 1, 0xff, b'a'] {
                let request = message(opcode, file, &vec![byte; length]);
                // Whatever it answers, it lives on.
                drop(place.share.answer(&request));
                drop(place.share.answer(&request[..request.len().min(length)]));
            }
        }
    }
    // One of them was that it be forgotten.
    assert!(place.lookup(ROOT, "file").is_ok());
    let names = fs::read_dir(place._all.path()).expect("listed");
    assert_eq!(names.count(), 2, "nothing came to be outside");
    assert_eq!(
        fs::read(place.outside.join("secret")).expect("read"),
        b"secret"
    );
}

#[test]
fn requests_come_in_pieces() {
    let all = [
        message(op::LOOKUP, 1, &text("a")),
        message(op::GETATTR, 2, &[0; 16]),
    ];
    let bytes = all.concat();
    for cut in 0..bytes.len() {
        let mut requests = Requests::default();
        let mut found = Vec::new();
        for part in [&bytes[..cut], &bytes[cut..]] {
            requests.feed(part);
            while let Some(request) = requests.next_request().expect("requests") {
                found.push(request);
            }
        }
        assert_eq!(found, all, "cut at {cut}");
    }
    for length in [
        0,
        39,
        u32::try_from(REQUEST_BYTES_MAX).expect("fits") + 1,
        u32::MAX,
    ] {
        let mut requests = Requests::default();
        requests.feed(&length.to_ne_bytes());
        assert!(requests.next_request().is_err(), "{length}");
    }
}

#[test]
fn only_a_directory_is_shared() {
    let place = Place::new(true);
    let options = ShareOptions {
        read_only: true,
        guest_owner: (0, 0),
        files_max: 10,
    };
    let open = |path: &Path| Share::open(&Os::new(), path, options);
    assert!(open(&place.shared.join("file")).is_err());
    assert!(open(&place.shared.join("nothing")).is_err());
}

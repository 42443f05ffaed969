//! Trees in and out, and listings, by the agent's own program on this machine.

mod support;

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;

use rustix::fs::inotify;
use smolvm_proto::Request;
use smolvm_proto::limits::ENTRIES_MAX;
use smolvm_proto::message::{
    ArchiveRequest, Entry, EntryKind, Event, ExtractRequest, FailureKind, ListRequest,
};
use support::{Guest, bytes_of};

fn set_mtime(path: &Path, seconds: i64) {
    let time = rustix::time::Timespec {
        tv_sec: seconds,
        tv_nsec: 0,
    };
    let times = rustix::fs::Timestamps {
        last_access: time,
        last_modification: time,
    };
    rustix::fs::utimensat(
        rustix::fs::CWD,
        path,
        &times,
        rustix::fs::AtFlags::SYMLINK_NOFOLLOW,
    )
    .expect("time");
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("mode");
}

/// A tree with one of everything, and its paths with what must survive.
fn tree(top: &Path) {
    let long = "n".repeat(200);
    fs::create_dir_all(top.join("sub/deeper")).expect("directory");
    fs::write(top.join("file"), "content").expect("file");
    fs::write(top.join("empty"), "").expect("file");
    fs::write(top.join("sub/script"), "#!/bin/sh\n").expect("file");
    fs::write(top.join(&long), "a long name").expect("file");
    fs::write(top.join("sub/deeper/large"), vec![7; 3_000_000]).expect("file");
    std::os::unix::fs::symlink("file", top.join("link")).expect("link");
    std::os::unix::fs::symlink("/no/such//place/", top.join("dangling")).expect("link");
    std::os::unix::fs::symlink("x".repeat(300), top.join("far")).expect("link");
    std::os::unix::net::UnixListener::bind(top.join("socket")).expect("socket");
    let sparse = fs::File::create(top.join("sparse")).expect("file");
    sparse.set_len(64 << 20).expect("length");
    sparse.write_all_at(b"middle", 32 << 20).expect("written");
    let hole = fs::File::create(top.join("hole")).expect("file");
    hole.set_len(16 << 20).expect("length");
    set_mode(&top.join("sub/script"), 0o4751);
    set_mode(&top.join("file"), 0o640);
    set_mode(&top.join("sub"), 0o711);
    for (at, name) in ["file", "link", "sparse", "sub/script", "sub/deeper", "sub"]
        .into_iter()
        .enumerate()
    {
        let seconds = 1_000_000_000 + i64::try_from(at).expect("small");
        set_mtime(&top.join(name), seconds);
    }
}

fn assert_same(one: &Path, other: &Path) {
    let names = |path: &Path| {
        let mut names: Vec<_> = fs::read_dir(path)
            .expect("directory")
            .map(|entry| entry.expect("entry").file_name())
            .filter(|name| name != "socket")
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(one), names(other));
    for name in names(one) {
        let (one, other) = (one.join(&name), other.join(&name));
        let (here, there) = (
            fs::symlink_metadata(&one).expect("there"),
            fs::symlink_metadata(&other).expect("there"),
        );
        assert_eq!(here.mode(), there.mode(), "{}", one.display());
        assert_eq!(here.mtime(), there.mtime(), "{}", one.display());
        assert_eq!((here.uid(), here.gid()), (there.uid(), there.gid()));
        if here.is_symlink() {
            assert_eq!(
                fs::read_link(&one).expect("link"),
                fs::read_link(&other).expect("link")
            );
        } else if here.is_dir() {
            assert_same(&one, &other);
        } else {
            assert_eq!(here.len(), there.len(), "{}", one.display());
            assert!(
                fs::read(&one).expect("read") == fs::read(&other).expect("read"),
                "{}",
                one.display()
            );
        }
    }
}

#[test]
fn a_tree_survives_the_way_out_and_in() {
    let mut guest = Guest::start();
    let directory = tempfile::tempdir().expect("directory");
    let top = directory.path().join("top");
    let back = directory.path().join("back");
    fs::create_dir(&top).expect("directory");
    fs::create_dir(&back).expect("directory");
    tree(&top);

    let archived = guest.archive(&top);
    archived.done();
    assert!(
        archived.output.len() < 5_000_000,
        "holes are not sent: {} bytes",
        archived.output.len()
    );
    guest.extract(&back, &archived.output).done();
    assert_same(&top, &back.join("top"));
    let sparse = fs::metadata(back.join("top/sparse")).expect("there");
    assert!(
        sparse.blocks() * 512 < 1 << 20,
        "{} blocks",
        sparse.blocks()
    );
    assert!(!back.join("top/socket").exists());

    // Again, over what is there.
    guest.extract(&back, &archived.output).done();
    assert_same(&top, &back.join("top"));
}

#[test]
fn other_tars_read_the_stream() {
    let directory = tempfile::tempdir().expect("directory");
    let top = directory.path().join("top");
    fs::create_dir(&top).expect("directory");
    tree(&top);
    let archived = Guest::start().archive(&top);
    let listed: Vec<String> = tar::Archive::new(archived.output.as_slice())
        .entries()
        .expect("a tar stream")
        .map(|entry| {
            let entry = entry.expect("an entry");
            String::from_utf8_lossy(&entry.path_bytes()).into_owned()
        })
        .collect();
    let long = format!("top/{}", "n".repeat(200));
    assert_eq!(
        listed,
        [
            "top/",
            "top/dangling",
            "top/empty",
            "top/far",
            "top/file",
            "top/hole",
            "top/link",
            &long,
            "top/sparse",
            "top/sub/",
            "top/sub/deeper/",
            "top/sub/deeper/large",
            "top/sub/script",
        ]
    );
}

#[test]
fn a_complete_archive_keeps_what_a_copy_has_no_use_for() {
    let directory = tempfile::tempdir().expect("directory");
    let top = directory.path().join("top");
    fs::create_dir(&top).expect("directory");
    fs::write(top.join("file"), "content").expect("file");
    fs::hard_link(top.join("file"), top.join("same")).expect("link");
    std::os::unix::fs::symlink("file", top.join("symbolic")).expect("link");
    fs::hard_link(top.join("symbolic"), top.join("symbolic2")).expect("link");
    std::os::unix::net::UnixListener::bind(top.join("socket")).expect("socket");
    let mode = rustix::fs::Mode::from_raw_mode(0o640);
    rustix::fs::mkfifoat(rustix::fs::CWD, top.join("pipe"), mode).expect("pipe");
    let odd = std::ffi::OsStr::from_bytes(b"odd\xff\n=%");
    fs::write(top.join(odd), "odd").expect("file");
    for (name, value) in [("user.a=b%c", &b"one\0two"[..]), ("user.empty", b"")] {
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::setxattr(top.join("file"), name, value, flags).expect("attribute");
    }
    let before_1970 = rustix::time::Timespec {
        tv_sec: -2,
        tv_nsec: 750_000_000,
    };
    let times = rustix::fs::Timestamps {
        last_access: before_1970,
        last_modification: before_1970,
    };
    let flags = rustix::fs::AtFlags::empty();
    rustix::fs::utimensat(rustix::fs::CWD, top.join(odd), &times, flags).expect("time");
    set_mtime(&top.join("file"), 1_000_000_000);

    let archived = Guest::start().ask(&Request::Archive(ArchiveRequest {
        path: bytes_of(&top).into(),
        follow: false,
        complete: Some(true),
        hold: Some(true),
    }));
    archived.done();
    let mut said = Vec::new();
    let mut archive = tar::Archive::new(archived.output.as_slice());
    for entry in archive.entries().expect("a tar stream") {
        let mut entry = entry.expect("an entry");
        let kind = entry.header().entry_type();
        let link = entry
            .link_name_bytes()
            .map(|link| format!(" to {}", String::from_utf8_lossy(&link)));
        let name = entry.path_bytes().escape_ascii().to_string();
        let mut records = Vec::new();
        for record in entry
            .pax_extensions()
            .expect("records")
            .into_iter()
            .flatten()
        {
            let record = record.expect("a record");
            let key = record.key().expect("text");
            if key != "mtime" || name.contains("odd") {
                records.push(format!("{key}={}", record.value_bytes().escape_ascii()));
            }
        }
        said.push(format!(
            "{} {name}{} {:o} {}",
            char::from(kind.as_byte()).escape_default(),
            link.unwrap_or_default(),
            entry.header().mode().expect("mode") & 0o777,
            records.join(" ")
        ));
    }
    let masked = |path: &str| fs::symlink_metadata(top.join(path)).expect("there").mode() & 0o777;
    let (top_mode, file_mode, pipe_mode) = (masked(""), masked("file"), masked("pipe"));
    assert_eq!(
        said,
        [
            "g ././@PaxHeader 644 comment=complete".to_owned(),
            format!("5 top/ {top_mode:o} "),
            format!(
                "0 top/file {file_mode:o} SCHILY.xattr.user.a%3Db%25c=one\\x00two SCHILY.xattr.user.empty="
            ),
            format!("0 top/odd\\xff\\n=% {file_mode:o} mtime=-1.250000000"),
            format!("6 top/pipe {pipe_mode:o} "),
            format!("1 top/same to top/file {file_mode:o} "),
            "2 top/symbolic to file 777 ".to_owned(),
            "1 top/symbolic2 to top/symbolic 777 ".to_owned(),
        ]
    );
}

#[test]
fn one_file_and_links_are_archived_by_their_names() {
    let mut guest = Guest::start();
    let directory = tempfile::tempdir().expect("directory");
    let link = directory.path().join("link");
    fs::write(directory.path().join("file"), "content").expect("file");
    std::os::unix::fs::symlink("file", &link).expect("link");
    let first = |bytes: &[u8]| {
        let mut archive = tar::Archive::new(bytes);
        let mut entries = archive.entries().expect("a tar stream");
        let entry = entries.next().expect("one").expect("an entry");
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        (name, entry.header().entry_type())
    };
    let itself = guest.archive(&link);
    assert_eq!(
        first(&itself.output),
        ("link".to_owned(), tar::EntryType::Symlink)
    );
    let followed = guest.ask(&Request::Archive(ArchiveRequest {
        path: bytes_of(&link).into(),
        follow: true,
        complete: None,
        hold: None,
    }));
    followed.done();
    assert_eq!(
        first(&followed.output),
        ("link".to_owned(), tar::EntryType::Regular)
    );

    assert_eq!(
        guest.archive(Path::new("/no/such/file")).kind(),
        FailureKind::NotFound
    );
    assert_eq!(
        guest.archive(Path::new("relative")).kind(),
        FailureKind::InvalidInput
    );
}

/// A tar stream of one entry, with a name the `tar` crate itself would refuse to write.
fn entry(kind: tar::EntryType, name: &str, link: &str, content: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
    header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_entry_type(kind);
    header.set_mode(if kind.is_dir() { 0o755 } else { 0o644 });
    header.set_uid(u64::from(rustix::process::getuid().as_raw()));
    header.set_gid(u64::from(rustix::process::getgid().as_raw()));
    header.set_mtime(1_000_000_000);
    header.set_size(content.len() as u64);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn file(name: &str, content: &[u8]) -> Vec<u8> {
    entry(tar::EntryType::Regular, name, "", content)
}

#[test]
fn nothing_is_written_outside_the_directory() {
    let mut guest = Guest::start();
    let directory = tempfile::tempdir().expect("directory");
    let inside = directory.path().join("inside");
    let outside = directory.path().join("outside");
    fs::create_dir(&inside).expect("directory");
    fs::create_dir(&outside).expect("directory");
    fs::write(outside.join("secret"), "secret").expect("file");
    let link = |name: &str, to: &str| entry(tar::EntryType::Symlink, name, to, b"");
    let outside_text = outside.to_str().expect("text");
    for stream in [
        file("../outside/evil", b"x"),
        file("a/../../outside/evil", b"x"),
        [link("way", "../outside"), file("way/evil", b"x")].concat(),
        [link("way", outside_text), file("way/evil", b"x")].concat(),
        [
            link("way", outside_text),
            entry(tar::EntryType::Directory, "way/evil/", "", b""),
        ]
        .concat(),
        entry(tar::EntryType::Link, "copy", "../outside/secret", b""),
        [
            link("way", outside_text),
            entry(tar::EntryType::Link, "copy", "way/secret", b""),
        ]
        .concat(),
    ] {
        let outcome = guest.extract(&inside, &stream);
        assert_eq!(
            outcome.kind(),
            FailureKind::InvalidInput,
            "{:?}",
            outcome.failure()
        );
        assert!(!outside.join("evil").exists());
        assert!(!inside.join("copy").exists());
    }
    // A link as the entry itself is replaced, not followed.
    std::os::unix::fs::symlink(outside.join("secret"), inside.join("file")).expect("link");
    guest.extract(&inside, &file("file", b"new")).done();
    assert_eq!(fs::read(outside.join("secret")).expect("there"), b"secret");
    assert_eq!(fs::read(inside.join("file")).expect("there"), b"new");
    // An absolute name is a name below the directory.
    guest.extract(&inside, &file("/absolute", b"new")).done();
    assert_eq!(fs::read(inside.join("absolute")).expect("there"), b"new");
    // A link that stays inside may be followed.
    fs::create_dir(inside.join("real")).expect("directory");
    guest
        .extract(
            &inside,
            &[link("alias", "real"), file("alias/ok", b"x")].concat(),
        )
        .done();
    assert!(inside.join("real/ok").exists());
}

#[test]
fn links_pipes_and_replacements_are_unpacked() {
    let mut guest = Guest::start();
    let directory = tempfile::tempdir().expect("directory");
    let top = directory.path();
    fs::write(top.join("kept"), "old").expect("file");
    fs::hard_link(top.join("kept"), top.join("file")).expect("link");
    let stream = [
        file("file", b"new"),
        entry(tar::EntryType::Link, "hard", "file", b""),
        entry(tar::EntryType::Fifo, "pipe", "", b""),
        file("missing/parents/file", b"x"),
        vec![0; 1024],
    ]
    .concat();
    guest.extract(top, &stream).done();
    // The file was replaced, so its other name keeps what it had.
    assert_eq!(fs::read(top.join("kept")).expect("there"), b"old");
    let (file_status, hard) = (
        fs::metadata(top.join("file")).expect("there"),
        fs::metadata(top.join("hard")).expect("there"),
    );
    assert_eq!(file_status.ino(), hard.ino());
    let pipe = fs::symlink_metadata(top.join("pipe")).expect("there");
    assert!(std::os::unix::fs::FileTypeExt::is_fifo(&pipe.file_type()));
    assert_eq!(pipe.mtime(), 1_000_000_000);
    assert_eq!(
        fs::read(top.join("missing/parents/file")).expect("there"),
        b"x"
    );
}

#[test]
fn an_upload_that_fails_leaves_the_agent_serving() {
    let mut guest = Guest::start();
    let directory = tempfile::tempdir().expect("directory");
    // Far more than a window, so the rest is on its way when the failure comes.
    let stream = [file("../out", b""), vec![1; 3_000_000]].concat();
    let outcome = guest.extract(directory.path(), &stream);
    assert_eq!(outcome.kind(), FailureKind::InvalidInput);
    let outcome = guest.extract(directory.path(), &[1; 2048]);
    assert_eq!(outcome.kind(), FailureKind::InvalidInput);
    let cut = &file("cut", &[1; 4096])[..2000];
    let outcome = guest.extract(directory.path(), cut);
    assert_ne!(outcome.failure().message, "");
    fs::create_dir(directory.path().join("taken")).expect("directory");
    let outcome = guest.extract(directory.path(), &file("taken", b"x"));
    assert_eq!(outcome.kind(), FailureKind::IsADirectory);
    let outcome = guest.extract(Path::new("/no/such/directory"), &file("x", b""));
    assert_eq!(outcome.kind(), FailureKind::NotFound);
    assert_eq!(guest.shell("echo fine").output, b"fine\n");
}

#[test]
fn a_full_disk_is_told_as_such() {
    // A small file system of our own needs root and a mount name space.
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let directory = tempfile::tempdir().expect("directory");
    let mount = rustix::mount::mount(
        "tmpfs",
        directory.path(),
        "tmpfs",
        rustix::mount::MountFlags::empty(),
        Some(c"size=1m"),
    );
    if mount.is_err() {
        return;
    }
    let outcome = Guest::start().extract(directory.path(), &file("big", &vec![1; 4 << 20]));
    rustix::mount::unmount(directory.path(), rustix::mount::UnmountFlags::DETACH)
        .expect("unmounted");
    assert_eq!(outcome.kind(), FailureKind::NoSpace);
}

#[test]
fn an_owner_is_given_to_everything_and_parents_are_made() {
    let mut guest = Guest::start();
    let directory = tempfile::tempdir().expect("directory");
    let target = directory.path().join("a/b");
    // Only root may give files away.
    let (owner, uid) = if rustix::process::geteuid().is_root() {
        ("12345:23456".to_owned(), 12345)
    } else {
        (support::me(), rustix::process::getuid().as_raw())
    };
    let upload = [
        entry(tar::EntryType::Directory, "d/", "", b""),
        file("d/file", b"x"),
        entry(tar::EntryType::Symlink, "d/link", "file", b""),
        file("implied/file", b"x"),
    ]
    .concat();
    let request = |make_parents| {
        Request::Extract(ExtractRequest {
            directory: bytes_of(&target).into(),
            make_parents,
            owner: Some(owner.clone()),
            file: None,
        })
    };
    assert_eq!(guest.ask(&request(false)).kind(), FailureKind::NotFound);
    let stream = guest.open(&request(true));
    guest.upload(stream, &upload);
    guest.finish(stream).done();
    for name in ["", "d", "d/file", "d/link", "implied", "implied/file"] {
        let status = fs::symlink_metadata(target.join(name)).expect("there");
        assert_eq!(status.uid(), uid, "{name}");
    }
}

#[test]
fn a_stream_as_it_stands_becomes_one_file() {
    let mut guest = Guest::start();
    let directory = tempfile::tempdir().expect("directory");
    let request = |name: &str| {
        Request::Extract(ExtractRequest {
            directory: bytes_of(directory.path()).into(),
            make_parents: false,
            owner: None,
            file: Some(name.as_bytes().to_vec().into()),
        })
    };
    let place = directory.path().join("named");
    let (large, empty) = (vec![7; 300_000], Vec::new());
    for content in [&large, &empty] {
        let stream = guest.open(&request("named"));
        guest.upload(stream, content);
        guest.finish(stream).done();
        assert!(fs::read(&place).expect("there") == *content);
        let mode = fs::metadata(&place).expect("there").mode();
        assert_eq!(mode & 0o7777, 0o644);
    }
    for name in ["", ".", "..", "a/b", "../named"] {
        let outcome = guest.ask(&request(name));
        assert_eq!(outcome.kind(), FailureKind::InvalidInput, "{name:?}");
    }
    fs::create_dir(directory.path().join("taken")).expect("directory");
    let stream = guest.open(&request("taken"));
    guest.upload(stream, &large);
    assert_eq!(guest.finish(stream).kind(), FailureKind::IsADirectory);
    let left: Vec<_> = fs::read_dir(directory.path()).expect("listed").collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[test]
fn a_copy_that_breaks_off_leaves_the_old_file_and_nothing_else() {
    let mut guest = Guest::start();
    let directory = tempfile::tempdir().expect("directory");
    let place = directory.path().join("named");
    fs::write(&place, "old").expect("written");
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC).expect("a watch");
    let changes = inotify::WatchFlags::CREATE | inotify::WatchFlags::DELETE;
    inotify::add_watch(&watch, directory.path(), changes).expect("a watch");
    let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
    let mut changed = inotify::Reader::new(&watch, &mut buffer);
    for name in [None, Some(b"named".to_vec().into())] {
        let stream = guest.open(&Request::Extract(ExtractRequest {
            directory: bytes_of(directory.path()).into(),
            make_parents: false,
            owner: None,
            file: name,
        }));
        guest.data(stream, &file("named", &vec![1; 200_000])[..10_000]);
        let made = changed.next().expect("something happens").events();
        assert_eq!(made, inotify::ReadFlags::CREATE);
        guest.reset(stream);
        let gone = changed.next().expect("something happens").events();
        assert_eq!(gone, inotify::ReadFlags::DELETE);
        assert_eq!(fs::read_to_string(&place).expect("there"), "old");
    }
    assert_eq!(fs::read_dir(directory.path()).expect("listed").count(), 1);
}

fn entries(guest: &mut Guest, path: &Path, itself: bool) -> Vec<Vec<Entry>> {
    let outcome = guest.ask(&Request::List(ListRequest {
        path: bytes_of(path).into(),
        itself,
    }));
    outcome.done();
    outcome
        .events
        .into_iter()
        .filter_map(|event| match event {
            Event::Entries(entries) => Some(entries),
            _ => None,
        })
        .collect()
}

#[test]
fn a_directory_is_listed_by_name_in_parts() {
    let mut guest = Guest::start();
    let directory = tempfile::tempdir().expect("directory");
    let top = directory.path();
    assert!(entries(&mut guest, top, false).is_empty());
    for number in 0..300 {
        // Long targets fill an event before its entries are many.
        let name = top.join(format!("{number:03}"));
        std::os::unix::fs::symlink("t".repeat(4000), name).expect("link");
    }
    fs::write(top.join("file"), "12345").expect("file");
    fs::create_dir(top.join("sub")).expect("directory");
    let parts = entries(&mut guest, top, false);
    assert!(parts.iter().all(|part| part.len() <= ENTRIES_MAX));
    let all: Vec<Entry> = parts.into_iter().flatten().collect();
    assert_eq!(all.len(), 302);
    assert!(all.is_sorted_by(|one, other| one.name.as_slice() < other.name.as_slice()));
    assert_eq!(all[0].kind, EntryKind::Symlink);
    assert_eq!(
        all[0].target.as_ref().map(|target| target.len()),
        Some(4000)
    );
    assert_eq!((all[300].kind, all[300].size), (EntryKind::File, 5));
    assert_eq!(all[301].kind, EntryKind::Directory);

    let file = entries(&mut guest, &top.join("file"), false).concat();
    assert_eq!(file.len(), 1);
    assert_eq!(file[0].name.as_slice(), b"file");
    let itself = entries(&mut guest, top, true).concat();
    assert_eq!(itself.len(), 1);
    assert_eq!(itself[0].kind, EntryKind::Directory);
    let missing = guest.ask(&Request::List(ListRequest {
        path: b"/no/such".to_vec().into(),
        itself: false,
    }));
    assert_eq!(missing.kind(), FailureKind::NotFound);
}

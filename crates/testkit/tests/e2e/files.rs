//! Files and trees in and out.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::time::{Duration, SystemTime};

use rustix::process::Signal;
use smolvm_testkit::Home;

const GIB: u64 = 1 << 30;

/// A time that is neither now nor the beginning.
fn long_ago() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000)
}

fn write(path: &Path, text: &str, mode: u32) {
    fs::write(path, text).expect("a file");
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("a mode");
    let file = File::options().append(true).open(path).expect("a file");
    file.set_modified(long_ago()).expect("a time");
}

fn path(path: &Path) -> &str {
    path.to_str().expect("a path that is text")
}

/// Everything a copy is to keep of a tree, by relative path.
fn tree(root: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut pending = vec![root.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(&dir).expect("a directory") {
            let entry = entry.expect("an entry").path();
            let metadata = fs::symlink_metadata(&entry).expect("metadata");
            let mode = metadata.mode() & 0o7777;
            let what = if metadata.is_symlink() {
                format!(
                    "link to {}",
                    fs::read_link(&entry).expect("a link").display()
                )
            } else if metadata.is_dir() {
                pending.push(entry.clone());
                format!("directory {mode:o}")
            } else {
                let text = fs::read_to_string(&entry).expect("text");
                format!("file {mode:o} of {}: {text}", metadata.mtime())
            };
            let name = entry
                .strip_prefix(root)
                .expect("below")
                .display()
                .to_string();
            found.insert(name, what);
        }
    }
    found
}

#[test]
fn copies_keep_what_a_file_and_a_tree_are() {
    let home = Home::new(1);
    let here = home.scratch();
    home.create("box", &[]);

    // A file, under a name of its own, and back into a directory that is there.
    let file = here.join("a file");
    write(&file, "text\n", 0o640);
    home.smolvm(["cp", path(&file), "box:/srv/new dir/named"])
        .run()
        .expect(1);
    home.sh("box", "mkdir '/srv/new dir'");
    home.smolvm(["cp", path(&file), "box:/srv/new dir/named"])
        .run()
        .ok();
    assert_eq!(
        home.sh(
            "box",
            "stat -c '%a %Y %u:%g %s' '/srv/new dir/named'; cat '/srv/new dir/named'"
        ),
        "640 1000000000 0:0 5\ntext\n"
    );
    home.smolvm(["cp", "box:/srv/new dir/named", path(&here)])
        .run()
        .ok();
    let back = fs::metadata(here.join("named")).expect("the file came back");
    assert_eq!(
        (back.mode() & 0o7777, back.mtime(), back.len()),
        (0o640, 1_000_000_000, 5)
    );

    // A tree.
    let sent = here.join("tree");
    let deep = sent.join(format!("{}/{}", "deep".repeat(30), "deeper".repeat(20)));
    for dir in [
        &deep,
        &sent.join("empty"),
        &sent.join("with space/ünïcode 文"),
    ] {
        fs::create_dir_all(dir).expect("a directory");
    }
    fs::set_permissions(sent.join("empty"), fs::Permissions::from_mode(0o711)).expect("a mode");
    write(&deep.join("file"), "deep", 0o600);
    write(&sent.join("with space/ünïcode 文/data é"), "ünïcode", 0o755);
    write(&sent.join("empty file"), "", 0o644);
    symlink("with space/ünïcode 文/data é", sent.join("link")).expect("a link");
    symlink("/nowhere/at all", sent.join("dangling")).expect("a link");
    home.smolvm(["cp", path(&sent), "box:/srv/"]).run().ok();
    assert_eq!(
        home.sh("box", "cat /srv/tree/link; stat -c %a /srv/tree/empty"),
        "ünïcode711\n"
    );
    let received = here.join("received");
    home.smolvm(["cp", "box:/srv/tree", path(&received)])
        .run()
        .ok();
    assert_eq!(tree(&received), tree(&sent));

    let list = home.smolvm(["file", "ls", "box", "/srv/tree"]).run().ok();
    assert_eq!(
        list.out(),
        format!(
            "dangling\n{}\nempty\nempty file\nlink\nwith space\n",
            "deep".repeat(30)
        )
    );

    let before = tree(&here);
    home.smolvm(["cp", "box:/no/such", path(&here)])
        .run()
        .expect(1)
        .complains_of(&["/no/such"]);
    home.smolvm(["cp", "/no/such", "box:/srv"])
        .run()
        .expect(1)
        .complains_of(&["/no/such"]);
    home.smolvm(["file", "ls", "box", "/no/such"])
        .run()
        .expect(1)
        .complains_of(&["/no/such"]);
    assert_eq!(tree(&here), before, "a download that failed left something");
    home.rm(&["box"]);
}

#[test]
fn standard_input_and_output_are_sides_of_a_copy() {
    let home = Home::new(1);
    let here = home.scratch();
    home.create("box", &[]);
    // More than any window or pipe holds, and not text.
    let bytes: Vec<u8> = (0..3_000_001_u32).map(|at| (at % 251) as u8).collect();
    home.smolvm(["cp", "-", "box:/root/in"])
        .stdin(bytes.clone())
        .run()
        .ok();
    assert_eq!(
        home.sh("box", "stat -c '%a %u:%g %s' /root/in"),
        "644 0:0 3000001\n"
    );
    let back = home.smolvm(["cp", "box:/root/in", "-"]).run().ok();
    assert!(
        back.stdout == bytes,
        "{} bytes came back",
        back.stdout.len()
    );
    home.sh("box", "ln -s in /root/link; truncate -s 1M /root/holes");
    let back = home.smolvm(["cp", "box:/root/holes", "-"]).run().ok();
    assert!(back.stdout == vec![0; 1 << 20], "{}", back.stdout.len());
    let back = home.smolvm(["cp", "box:/root/link", "-"]).run().ok();
    assert_eq!(back.stdout.len(), bytes.len());
    for (args, code, word) in [
        (["cp", "box:/root", "-"], 2, "no file"),
        (["cp", "-", "box:/root"], 2, "is a directory"),
        (["cp", "-", "box:/no/such/dir"], 1, "/no/such"),
        (["cp", "box:/no/such", "-"], 1, "/no/such"),
    ] {
        home.smolvm(args).run().expect(code).complains_of(&[word]);
    }

    // What is interrupted leaves no half file under its name, neither there nor here.
    let mut cut = home
        .smolvm(["cp", "-", "box:/root/half"])
        .open_stdin()
        .spawn();
    cut.write(&bytes);
    home.sh("box", "until ls -A /root | grep -q smolvm-part; do :; done");
    cut.signal(Signal::INT);
    cut.wait().expect(130);
    home.sh(
        "box",
        "while ls -A /root | grep -q smolvm-part; do :; done; test ! -e /root/half",
    );
    home.sh("box", "head -c 100M /dev/zero > /root/big");
    let cut = home.smolvm(["cp", "box:/root/big", path(&here)]).spawn();
    let staging = || {
        fs::read_dir(&here)
            .expect("a directory")
            .any(|entry| entry.expect("an entry").path().is_dir())
    };
    while !staging() {
        std::thread::yield_now();
    }
    cut.signal(Signal::INT);
    cut.wait().expect(130);
    assert_eq!(fs::read_dir(&here).expect("a directory").count(), 0);
    home.rm(&["box"]);
}

#[test]
fn a_sparse_file_stays_sparse_both_ways() {
    let home = Home::new(1);
    let sent = home.scratch().join("sparse");
    let file = File::create(&sent).expect("a file");
    file.set_len(2 * GIB).expect("a length");
    for at in [0, GIB - 3, 2 * GIB - 9] {
        file.write_all_at(b"an extent", at).expect("data");
    }
    home.create("box", &[]);
    home.smolvm(["cp", path(&sent), "box:/root/sparse"])
        .run()
        .ok();
    let guest = home.sh(
        "box",
        "stat -c '%s %b' /root/sparse; for at in 0 1073741821 2147483639; do
         tail -c +$((at + 1)) /root/sparse | head -c 9; echo; done",
    );
    let (sizes, extents) = guest.split_once('\n').expect("lines");
    assert_eq!(extents, "an extent\n".repeat(3));
    let (size, blocks) = sizes.split_once(' ').expect("two numbers");
    assert_eq!(size, (2 * GIB).to_string());
    assert!(
        blocks.parse::<u64>().expect("a number") * 512 < 1 << 20,
        "{blocks} blocks in the guest"
    );

    let received = home.scratch().join("received");
    home.smolvm(["cp", "box:/root/sparse", path(&received)])
        .run()
        .ok();
    let mut file = File::open(&received).expect("the file came back");
    let metadata = file.metadata().expect("metadata");
    assert_eq!(metadata.len(), 2 * GIB);
    assert!(
        metadata.blocks() * 512 < 1 << 20,
        "{} blocks here",
        metadata.blocks()
    );
    for at in [0, GIB - 3, 2 * GIB - 9] {
        let mut extent = [0; 9];
        file.seek(SeekFrom::Start(at)).expect("a place");
        file.read_exact(&mut extent).expect("data");
        assert_eq!(&extent, b"an extent", "at {at}");
    }
    home.rm(&["box"]);
}

#[test]
fn a_full_guest_disk_is_an_error_that_says_so_and_the_sandbox_goes_on() {
    let home = Home::new(1);
    home.create("box", &["--disk", "64"]);
    let full = home.exec(
        "box",
        &["dd", "if=/dev/zero", "of=/root/big", "bs=1M", "count=100"],
    );
    full.expect(1).complains_of(&["No space left on device"]);
    home.sh("box", "rm /root/big");

    let big = home.scratch().join("big");
    let mut file = File::create(&big).expect("a file");
    for _ in 0..100 {
        file.write_all(&[7; 1 << 20]).expect("room here");
    }
    let full = home
        .smolvm(["--json", "cp", path(&big), "box:/root/big"])
        .run()
        .expect(1);
    assert_eq!(
        full.json()["error"]["details"]["kind"],
        "no_space",
        "{full}"
    );
    home.smolvm(["cp", path(&big), "box:/root/big"])
        .run()
        .expect(1)
        .complains_of(&["No space left", "/root/big"]);
    assert_eq!(
        home.sh(
            "box",
            "rm -f /root/big; echo well > /root/file; cat /root/file"
        ),
        "well\n"
    );
    home.rm(&["box"]);
}

//! Directories of the host in a sandbox.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use rustix::process::Signal;
use smolvm_testkit::Home;

use crate::templates::restored;

/// `-v` for a directory.
fn flag(source: &Path, rest: &str) -> String {
    format!("{}:{rest}", source.display())
}

fn digest(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    // What tells one content from another is enough.
    let sum = bytes.iter().fold(0_u64, |sum, byte| {
        sum.wrapping_mul(0x0000_0100_0000_01b3) ^ u64::from(*byte)
    });
    let mut text = String::new();
    write!(text, "{sum:016x} {}", bytes.len()).expect("memory");
    text
}

#[test]
fn a_directory_is_read_and_written_as_was_asked_and_nothing_beside_it() {
    let home = Home::new(1);
    let scratch = home.scratch();
    let (shared, read) = (scratch.join("sha: red"), scratch.join("read"));
    for directory in [&shared, &read] {
        fs::create_dir(directory).expect("made");
    }
    fs::write(scratch.join("secret"), "of the host").expect("written");
    fs::write(read.join("file"), "to read\n").expect("written");
    symlink("../secret", read.join("out")).expect("made");
    symlink("/etc/hostname", read.join("name")).expect("made");
    // Belongs to somebody else: whatever the guest makes there is that one's.
    std::os::unix::fs::chown(&shared, Some(4321), Some(4322)).expect("given");

    let flags = [
        flag(&shared, "/srv/a b/shared:rw"),
        flag(&read, "/srv/read"),
    ];
    home.create("box", &["-v", &flags[0], "-v", &flags[1]]);
    assert_eq!(home.sh("box", "cat /srv/read/file"), "to read\n");
    // A link is the guest's to follow, in the guest.
    assert_eq!(home.sh("box", "cat /srv/read/name"), "box\n");
    let refused = home.sh(
        "box",
        "cd /srv/read; for what in 'cat out' 'touch new' 'rm file' 'mv file x' 'chmod 777 file' \
         'ln file x' 'mkdir x' 'mount -o remount,rw /srv/read && touch new'; do \
         sh -c \"$what\" 2>/dev/null && echo \"$what\"; done; true",
    );
    assert_eq!(refused, "");
    let names = fs::read_dir(&read).expect("listed").count();
    assert_eq!(names, 3, "nothing was made");
    assert_eq!(
        fs::read(scratch.join("secret")).expect("there"),
        b"of the host"
    );

    // Both ways, as any user of the guest.
    home.sh(
        "box",
        "cd '/srv/a b/shared'; su -s /bin/sh nobody -c 'mkdir d && echo guest > d/file && chmod 640 d/file'; \
         ln d/file hard; ln -s d/file soft; cat soft > copy; mv copy moved; : > gone; rm gone",
    );
    assert_eq!(fs::read(shared.join("moved")).expect("there"), b"guest\n");
    let made = fs::metadata(shared.join("d/file")).expect("there");
    assert_eq!(
        (made.uid(), made.gid(), made.mode() & 0o7777),
        (4321, 4322, 0o640)
    );
    assert_eq!(made.nlink(), 2);
    fs::write(shared.join("d/from-host"), "host\n").expect("written");
    assert_eq!(
        home.sh("box", "cat '/srv/a b/shared/d/from-host'"),
        "host\n"
    );
    // A change of the host's is seen when what was known of the file is a second old.
    fs::write(shared.join("d/from-host"), "changed\n").expect("written");
    let seen = "cd '/srv/a b/shared/d'; for _ in $(seq 100); do grep -q changed from-host && break; \
                sleep 0.1; done; cat from-host";
    assert_eq!(home.sh("box", seen), "changed\n");

    // Who appends is behind whoever did before, in the guest or here.
    for number in 1..=3 {
        home.sh(
            "box",
            &format!("echo guest{number} >> '/srv/a b/shared/log'"),
        );
        let log = fs::File::options().append(true).open(shared.join("log"));
        writeln!(log.expect("made in the guest"), "host{number}").expect("appended");
    }
    assert_eq!(
        fs::read_to_string(shared.join("log")).expect("there"),
        "guest1\nhost1\nguest2\nhost2\nguest3\nhost3\n"
    );

    // Much, and through mapped pages.
    let large = "
import mmap, random
data = random.Random(7).randbytes(20_000_000)
open('/srv/a b/shared/large', 'wb').write(data)
f = open('/srv/a b/shared/mapped', 'w+b')
f.truncate(len(data))
m = mmap.mmap(f.fileno(), len(data))
m[:] = data
m.close()
f.close()
print(open('/srv/a b/shared/large', 'rb').read() == data)
";
    let python = ["exec", "box", "--", "python3", "-c", large];
    assert_eq!(home.smolvm(python).run().ok().out(), "True\n");
    let written = ["large", "mapped"].map(|name| fs::read(shared.join(name)).expect("there"));
    assert_eq!(written[0].len(), 20_000_000);
    assert_eq!(digest(&written[0]), digest(&written[1]));

    let info = home.json(["info", "box"]);
    assert_eq!(info["vm"]["mounts"][0]["read_only"], false, "{info}");
    assert_eq!(info["vm"]["mounts"][1]["read_only"], true, "{info}");
    // What a copy would have open is another's.
    for words in [vec!["fork", "box"], vec!["snapshot", "create", "box"]] {
        home.smolvm(words).run().expect(1).complains_of(&[
            "cannot be copied",
            "sha: red",
            "smolvm cp",
        ]);
    }
    // It is there again after a stop, and after the machine was killed.
    home.smolvm(["stop", "box"]).run().ok();
    home.smolvm(["start", "box"]).run().ok();
    assert_eq!(home.sh("box", "cat /srv/read/file"), "to read\n");
    let vmm = home.info("box").vmm();
    vmm.signal(Signal::KILL);
    vmm.wait("the machine");
    home.smolvm(["start", "box"]).run().ok();
    assert_eq!(home.sh("box", "cat '/srv/a b/shared/moved'"), "guest\n");
    home.rm(&["box"]);
    home.is_clean();
    assert!(shared.join("moved").exists(), "what was made stays");
}

#[test]
fn a_sandbox_with_a_directory_comes_from_a_template_and_commands_find_it() {
    let home = Home::new(1);
    let shared = home.scratch().join("d");
    fs::create_dir(&shared).expect("made");
    fs::write(shared.join("file"), "here\n").expect("written");
    let cat = ["--", "cat", "/shared/file"];
    let run = |flags: &[&str]| home.smolvm(["run"]).args(flags).args(cat).run().ok().out();
    home.smolvm(["run", "--", "true"]).run().ok();
    home.create("box", &["-v", &flag(&shared, "/shared")]);
    assert!(restored(&home, "box"), "it has no template of its own");
    home.rm(&["box"]);
    assert_eq!(run(&["-v", &flag(&shared, "/shared")]), "here\n");
    // One in the other, in whatever order; relative to where it is run.
    let inner = home.scratch().join("inner");
    fs::create_dir(&inner).expect("made");
    fs::write(inner.join("file"), "inner\n").expect("written");
    fs::create_dir(shared.join("sub")).expect("made");
    let out = home
        .smolvm([
            "run",
            "-v",
            &flag(&inner, "/shared/sub"),
            "-v",
            "./d:/shared",
        ])
        .args(["--", "sh", "-c", "cat /shared/file /shared/sub/file"])
        .within(["env", "-C", &home.scratch().to_string_lossy()])
        .run()
        .ok();
    assert_eq!(out.out(), "here\ninner\n");
    home.is_clean();
}

#[test]
fn directories_that_cannot_be_mounted_are_refused_before_anything_is_made() {
    let home = Home::new(1);
    let scratch = home.scratch();
    let file = scratch.join("file");
    fs::write(&file, "").expect("written");
    let there = flag(&scratch, "/x");
    for (flags, why) in [
        (vec![flag(&file, "/x")], "it is no directory"),
        (vec![flag(&scratch, "x")], "where in the guest"),
        (vec![flag(&scratch, "/")], "the root file system is there"),
        (vec![flag(&scratch, "/proc/x")], "the kernel's own files"),
        (
            vec![there.clone(), there.clone()],
            "two things are to be mounted on /x",
        ),
        (vec!["~/x:/x".to_owned()], "the shell has left `~`"),
    ] {
        let flags = flags.iter().flat_map(|flag| ["-v", flag]);
        let finished = home.smolvm(["create", "--name", "box"]).args(flags).run();
        finished.expect(2).complains_of(&[why]);
        assert!(home.states().is_empty(), "{why}");
    }
    let missing = flag(&scratch.join("no"), "/x");
    home.smolvm(["create", "-v", &missing])
        .run()
        .expect(1)
        .complains_of(&["it is not there", "give -v a directory"]);
    assert!(home.states().is_empty());
    // One that went away since is told at the start, and the sandbox stays as it was.
    let gone = scratch.join("gone");
    fs::create_dir(&gone).expect("made");
    home.create("box", &["-v", &flag(&gone, "/x")]);
    home.smolvm(["stop", "box"]).run().ok();
    fs::remove_dir(&gone).expect("removed");
    home.smolvm(["start", "box"])
        .run()
        .expect(1)
        .complains_of(&["could not mount", "it is not there"]);
    // Nor where a link has come into its path, as a guest could put one there that may write above.
    symlink("/etc", &gone).expect("a link");
    home.smolvm(["start", "box"])
        .run()
        .expect(2)
        .complains_of(&["could not mount", "leads to /etc"]);
    fs::remove_file(&gone).expect("removed");
    fs::create_dir(&gone).expect("made");
    home.smolvm(["start", "box"]).run().ok();
    home.rm(&["box"]);
    home.is_clean();
}

#[test]
fn the_small_kernel_mounts_directories_too() {
    let home = Home::with(1).small_kernel().make();
    let shared = home.scratch().join("d");
    fs::create_dir(&shared).expect("made");
    let run = [
        "run",
        "-v",
        &flag(&shared, "/shared:rw"),
        "--",
        "sh",
        "-c",
        "uname -r > /shared/made",
    ];
    home.smolvm(run).run().ok();
    let made = fs::read_to_string(shared.join("made")).expect("there");
    assert!(made.trim_end().ends_with("-smolvm"), "{made}");
    home.is_clean();
}

#[test]
fn an_ordinary_users_directory_is_that_users() {
    let home = Home::with(1).ordinary_user().make();
    let shared = home.scratch().join("d");
    fs::create_dir(&shared).expect("made");
    fs::set_permissions(&shared, fs::Permissions::from_mode(0o777)).expect("opened");
    let own = fs::metadata(home.data()).expect("there");
    home.create("box", &["-v", &flag(&shared, "/shared:rw")]);
    home.sh("box", "id -u > /shared/made; mkdir /shared/dir");
    let made = fs::metadata(shared.join("made")).expect("there");
    assert_eq!((made.uid(), made.gid()), (own.uid(), own.gid()));
    assert_eq!(fs::read(shared.join("made")).expect("there"), b"0\n");
    home.rm(&["box"]);
    home.is_clean();
}

//! Images made from sandboxes, and removed.

use rustix::process::Signal;
use smolvm_testkit::{Entries, Home};

use crate::templates::own_templates;

/// Makes one of everything a root file system may have, and removes some of the base.
const FURNISH: &str = r#"
set -e
mkdir -m 2750 /srv/dir /srv/gone; rm -r /srv/gone
printf one > /srv/file; ln /srv/file /srv/dir/same; chown 1234:70000 /srv/file
ln -s dir/same /srv/link; chown -h 7:8 /srv/link; ln /srv/link /srv/link2
mkfifo -m 620 /srv/pipe; mknod /srv/null c 1 3; mknod -m 600 /srv/disk b 259 70000
head -c 3000000 /dev/urandom > /srv/large; : > /srv/empty
truncate -s 300M /srv/sparse
printf middle | dd of=/srv/sparse bs=1M seek=150 conv=notrunc status=none
printf kept > /tmp/kept
rm -r /usr/share/doc/git /usr/bin/git; rm /etc/issue; mkdir /etc/issue
printf base > /usr/share/common-licenses/GPL-3
mkdir /mnt/under; printf under > /mnt/under/file; mkdir /mnt/other
mount -t tmpfs none /mnt/under; printf hidden > /mnt/under/hidden
mount --bind /srv /mnt/other
printf 0123456789abcdef0123456789abcdef > /etc/machine-id
python3 - <<'PYTHON'
import os, socket
os.setxattr('/srv/file', 'security.capability', bytes.fromhex('0100000200040000' + '00' * 12))
os.setxattr('/srv/dir', 'user.a=b', b'one\ntwo\0')
os.setxattr('/srv/link', 'trusted.note', b'', follow_symlinks=False)
os.setxattr('/srv/empty', 'system.posix_acl_access', bytes.fromhex(
    '02000000' '01000600ffffffff' '02000400d2040000' '04000400ffffffff' '10000400ffffffff' '20000000ffffffff'))
open(b'/srv/odd \xff\n', 'w').close()
open('/srv/' + 'n' * 255, 'w').close()
os.makedirs('/srv/' + '/'.join(['deep' * 20] * 5))
socket.socket(socket.AF_UNIX).bind('/srv/socket')
os.utime('/srv/large', ns=(0, 1234567890123456789))
os.utime('/srv/empty', ns=(0, -1500000000))
PYTHON
"#;

/// Everything about everything on the root's own file system but what each birth writes.
const DESCRIBE: &str = r"
import hashlib, os, stat
device = os.lstat('/').st_dev
links = {}
for top, dirs, files in os.walk(b'/'):
    dirs[:] = sorted(d for d in dirs if os.lstat(os.path.join(top, d)).st_dev == device)
    for name in sorted(dirs + files):
        path = os.path.join(top, name)
        if path in (b'/etc/hostname', b'/etc/hosts', b'/etc/machine-id'): continue
        s = os.lstat(path)
        if stat.S_ISSOCK(s.st_mode): continue
        is_dir = stat.S_ISDIR(s.st_mode)
        said = [path, oct(s.st_mode), s.st_uid, s.st_gid]
        if top + name not in (b'/tmp', b'/etc', b'/mnt', b'/srv'): said.append(s.st_mtime_ns)
        names = os.listxattr(path, follow_symlinks=False)
        said.append(sorted((n, os.getxattr(path, n, follow_symlinks=False)) for n in names))
        if stat.S_ISLNK(s.st_mode): said.append(os.readlink(path))
        elif stat.S_ISREG(s.st_mode):
            sha = hashlib.sha1()
            with open(path, 'rb') as file:
                while piece := file.read(1 << 20): sha.update(piece)
            said += [s.st_size, sha.hexdigest()]
        elif not is_dir: said.append(s.st_rdev)
        if not is_dir and s.st_nlink > 1:
            said.append(links.setdefault((s.st_dev, s.st_ino), path))
        print(*said)
";

/// Counts for ever, in two files.
const COUNT: &str = r#"
import os
files = [os.open(name, os.O_CREAT | os.O_WRONLY) for name in ("/bin/first", "/zlast")]
count = 0
while True:
    count += 1
    for file in files: os.pwrite(file, b"%012d\n" % count, 0)
"#;

/// The digest directories and everything else below `images`, but for locks.
fn files(home: &Home) -> (usize, Vec<String>) {
    let mut rest = Vec::new();
    let mut images = 0;
    for entry in std::fs::read_dir(home.data().join("images")).expect("the images") {
        let name = entry.expect("an entry").file_name();
        let name = name.to_string_lossy();
        if name.starts_with("sha256-") {
            images += 1;
        } else if !name.ends_with("lock") {
            rest.push(name.into_owned());
        }
    }
    (images, rest)
}

/// Creates a sandbox that boots: a template of an image that is soon gone would be of no use.
fn boot(home: &Home, name: &str, image: &str) {
    home.smolvm(["create", "--name", name, "--image", image])
        .env("SMOLVM_NO_TEMPLATES", "1")
        .run()
        .ok();
}

#[test]
fn a_committed_image_is_the_sandbox_as_it_was() {
    let home = Home::new(2);
    home.create("box", &[]);
    home.sh("box", FURNISH);
    let mount_points = "umount /mnt/under /mnt/other";
    let commit = home.json(["commit", "box", "tools:v1"]);
    assert_eq!(commit["image"]["name"], "tools:v1");
    assert_eq!(commit["image"]["source"], "committed from sandbox `box`");
    assert_eq!(files(&home), (2, Vec::new()));

    boot(&home, "copy", "tools:v1");
    home.sh("box", mount_points);
    let describe = |name: &str| home.exec(name, &["python3", "-c", DESCRIBE]).ok().out();
    let (there, here) = (describe("box"), describe("copy"));
    for (there, here) in there.lines().zip(here.lines()) {
        assert_eq!(there, here);
    }
    assert_eq!(there.len(), here.len());
    for shown in [
        "/mnt/under/file",
        "/tmp/kept",
        "security.capability",
        "odd \\xff\\n",
    ] {
        assert!(here.contains(shown), "{shown} is not there");
    }
    assert!(!here.contains("/usr/bin/git'") && !here.contains("/mnt/under/hidden"));
    // Empty in the image, so that each birth writes one.
    let ids = ["box", "copy"].map(|name| home.sh(name, "cat /etc/machine-id"));
    assert_eq!(ids[1].trim().len(), 32);
    assert_ne!(ids[0].trim(), ids[1].trim());
    assert_eq!(
        home.sh("copy", "hostname; tail -n 1 /etc/hosts"),
        "copy\n127.0.1.1 copy\n"
    );

    // From what was made of it again, with the changes of its own.
    home.sh("copy", "rm /srv/large; printf two > /srv/file");
    home.smolvm(["commit", "copy", "tools:v1"])
        .run()
        .expect(1)
        .complains_of(&["tools:v1", "--force"]);
    home.smolvm(["commit", "copy", "tools:v1", "--force"])
        .run()
        .ok();
    assert_eq!(files(&home), (3, Vec::new()), "`copy` needs the first");
    home.smolvm(["image", "rm", "debian-12"])
        .run()
        .expect(1)
        .complains_of(&["`box`", "smolvm rm box"]);
    home.rm(&["box", "copy"]);
    boot(&home, "again", "tools:v1");
    assert_eq!(
        home.sh("again", "cat /srv/file; ls /srv/large || echo gone; cmp -n 157286400 /srv/sparse /dev/zero && tail -c +157286401 /srv/sparse | head -c 6"),
        "twogone\nmiddle"
    );
    home.rm(&["again"]);
    home.smolvm(["image", "rm", "tools:v1"]).run().ok();
    assert_eq!(files(&home), (1, Vec::new()));
}

#[test]
fn commands_stand_still_while_their_sandbox_is_committed_and_go_on_after() {
    let home = Home::new(2);
    home.create("box", &[]);
    // Read long after one another; the two numbers are never more than one apart. Each is written in
    // one step: a shell that truncates first may be held in between.
    home.sh("box", &format!("printf %s '{COUNT}' > /run/count.py"));
    home.sh(
        "box",
        "setsid python3 /run/count.py > /dev/null 2>&1 < /dev/null &
         until [ -s /zlast ]; do :; done",
    );
    home.smolvm(["commit", "box", "counted"]).run().ok();
    let before = home.sh("box", "cat /zlast");
    boot(&home, "copy", "counted");
    let both = home.sh("copy", "cat /bin/first /zlast");
    let numbers: Vec<u64> = both
        .lines()
        .map(|line| {
            line.parse()
                .unwrap_or_else(|_| panic!("not a number: {both:?}"))
        })
        .collect();
    assert!(
        numbers.len() == 2 && numbers[0] - numbers[1] <= 1,
        "it went on meanwhile: {both:?}"
    );
    home.sh(
        "box",
        &format!("until [ $(cat /zlast) != {} ]; do :; done", before.trim()),
    );
    home.rm(&["box", "copy"]);
}

#[test]
fn a_commit_that_ends_early_leaves_nothing_and_lets_the_commands_go_on() {
    let home = Home::new(1);
    // A prune is to find nothing but what it is about, in nobody else's templates.
    own_templates(&home);
    home.create("box", &[]);
    let images = home.data().join("images");
    for signal in [Signal::INT, Signal::KILL] {
        let entries = Entries::watch(&images);
        let commit = home.smolvm(["commit", "box", "half"]).spawn();
        let making = entries.wait_for("an image in the making", |name| {
            name.starts_with(".making-")
        });
        commit.signal(signal);
        if signal == Signal::INT {
            commit.wait().expect(130);
            assert!(!making.exists(), "left by Ctrl-C");
        } else {
            drop(commit);
        }
        assert_eq!(home.sh("box", "echo well"), "well\n");
        assert_eq!(
            home.json(["image", "list"])["images"]
                .as_array()
                .map(Vec::len),
            Some(1)
        );
    }
    // The next one, or a prune, repairs what SIGKILL left.
    assert_eq!(files(&home).1.len(), 1);
    home.smolvm(["sandbox", "prune"]).run().ok();
    assert_eq!(files(&home), (1, Vec::new()));

    home.smolvm(["stop", "box"]).run().ok();
    home.smolvm(["commit", "box", "off"])
        .run()
        .expect(1)
        .complains_of(&["smolvm start box"]);
    home.rm(&["box"]);
}

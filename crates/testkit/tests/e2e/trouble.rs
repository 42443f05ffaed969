//! When something stands in the way, the error says what, and nothing half made stays.

use std::fs;

use smolvm_testkit::{Home, Invocation};

#[test]
fn a_guest_that_cannot_start_is_an_error_with_its_last_words() {
    let home = Home::new(1);
    // An imported kernel comes without modules, so the guest finds no disk.
    let kernel = home.assets().vmlinux();
    let run = home
        .smolvm([
            "run",
            "--kernel",
            kernel.to_str().expect("a path"),
            "--",
            "true",
        ])
        .run()
        .expect(125)
        .complains_of(&["did not start", "the guest's last console lines:"]);
    assert_eq!(run.out(), "");
    home.is_clean();
}

#[test]
fn a_guest_that_takes_too_long_is_an_error() {
    let home = Home::new(1);
    // A restored guest would be in time.
    home.smolvm(["run", "--boot-timeout", "1s", "--", "true"])
        .env("SMOLVM_NO_TEMPLATES", "1")
        .run()
        .expect(125)
        .complains_of(&["did not start", "not ready after 1 s"]);
    home.is_clean();
}

#[test]
fn a_sandbox_that_did_not_start_is_kept_and_can_be_started_when_the_trouble_is_over() {
    let home = Home::new(1);
    home.smolvm(["create", "--no-start", "--name", "box"])
        .run()
        .ok();
    home.smolvm(["start", "--boot-timeout", "1s", "box"])
        .env("SMOLVM_NO_TEMPLATES", "1")
        .run()
        .expect(1)
        .complains_of(&["not ready after 1 s"]);
    let info = home.info("box");
    assert_eq!(info.state(), "error");
    assert!(
        info.reason().contains("not ready after 1 s"),
        "{:?}",
        info.reason()
    );
    home.smolvm(["exec", "--start", "box", "--", "true"])
        .run()
        .ok();
    home.rm(&["box"]);
}

#[test]
fn damaged_files_of_a_sandbox_that_is_off_are_made_anew() {
    let home = Home::new(1);
    home.create("box", &[]);
    home.sh("box", "echo kept > /root/file");
    let id = home.info("box").json["id"]
        .as_str()
        .expect("an id")
        .to_owned();
    home.smolvm(["stop", "box"]).run().ok();
    let dir = home.data().join("sandboxes").join(id);
    fs::write(dir.join("launch.json"), "{\"garbage").expect("a file");
    let _ = fs::remove_file(dir.join("keeper.sock"));
    fs::write(dir.join("keeper.sock"), "garbage").expect("a file");
    fs::remove_file(dir.join("keeper.log")).expect("a log");
    fs::remove_file(dir.join("console.log")).expect("a log");
    home.smolvm(["start", "box"]).run().ok();
    assert_eq!(home.sh("box", "cat /root/file"), "kept\n");
    home.rm(&["box"]);
}

#[test]
fn the_path_of_the_data_directory_may_be_longer_than_a_sockets_address() {
    let home = Home::with(1).long_path().make();
    assert!(home.data().as_os_str().len() > 108);
    home.create("box", &[]);
    assert_eq!(home.sh("box", "echo works"), "works\n");
    home.rm(&["box"]);
}

#[test]
fn a_data_directory_that_cannot_be_made_is_named() {
    let home = Home::new(0);
    let file = home.scratch().join("file");
    fs::write(&file, "").expect("a file");
    home.smolvm_in(&file.join("below"), ["run", "--", "true"])
        .run()
        .expect(2)
        .complains_of(&[file.to_str().expect("a path"), "--data-dir"]);
}

/// In a mount namespace of its own, with the data directory on a file system with `$1` KiB more than the
/// store takes: tries to create a sandbox, prints the answer, and on standard error what there is
/// afterwards.
const FULL: &str = r#"
from=$2 data=$3 smolvm=$4
size=$(( ($(stat -c %s "$from/state.db") + 4095) / 4096 * 4 + $1 ))k
mkdir -p "$data"
mount -t tmpfs -o size=$size tmpfs "$data"
cp "$from/state.db" "$data"
mkdir "$data/sandboxes"
for name in images kernels cache; do ln -s "$from/$name" "$data/$name"; done
code=0
"$smolvm" --data-dir "$data" --json create --name box || code=$?
find "$data/sandboxes" -mindepth 1 >&2
mount -o remount,size=100m "$data"
"$smolvm" --data-dir "$data" ls --all --names >&2
"$smolvm" --data-dir "$data" --quiet create --no-start --name box >&2
"$smolvm" --data-dir "$data" rm box >&2
exit $code
"#;

#[test]
fn a_full_disk_of_the_host_is_an_error_that_says_so_and_leaves_nothing_half_made() {
    let home = Home::new(1);
    // Room beside the store, in KiB. It ends with the store itself, the row, the files of the sandbox,
    // and its disk, in this order.
    for size in ["8", "88", "168", "328", "900"] {
        let flags = if rustix::process::geteuid().is_root() {
            "-m"
        } else {
            "-rm"
        };
        let data = home.scratch().join(format!("full {size}"));
        let full = Invocation::new("unshare")
            .args([flags, "sh", "-ec", FULL, "sh", size])
            .args([
                home.data(),
                data.as_path(),
                home.binaries().smolvm().as_path(),
            ])
            .run()
            .expect(1);
        let answer = full.json();
        assert_eq!(
            answer["error"]["details"]["kind"], "no_space",
            "with {size}\n{full}"
        );
        // Nothing was listed, and the name is free again as soon as there is room.
        assert_eq!(full.err(), "box\nbox\n", "with {size}\n{full}");
    }
}

//! Pausing, saving and multiplying sandboxes that run, with what runs in them.

use std::collections::HashSet;

use rustix::process::Signal;
use smolvm_testkit::{Entries, Home};

/// A process with a state of its own: a token it made up and keeps in memory only, a count, and a file
/// that it holds open. It answers, in a file, each time the count goes on.
const COUNTER: &str = "\
import os, time
token = os.urandom(8).hex()
log = open('/root/log', 'a', buffering=1)
count = 0
while True:
    count += 1
    log.write('%s %d %s\\n' % (token, count, os.uname().nodename))
    # Its pace: eleven of these share two processors.
    time.sleep(0.1)
";

fn start_counter(home: &Home, name: &str) {
    home.smolvm(["exec", name, "--", "sh", "-c", "cat > /root/counter.py"])
        .stdin(COUNTER)
        .run()
        .ok();
    home.sh(
        name,
        "nohup python3 /root/counter.py >/dev/null 2>&1 & \
         until [ -s /root/log ]; do :; done",
    );
}

/// What the counter says in `name` after it has gone on at least once more: token, count, host name.
fn counts(home: &Home, name: &str) -> (String, u64, String) {
    let line = home.sh(
        name,
        "n=$(wc -l < /root/log); until [ $(wc -l < /root/log) -gt $n ]; do :; done; \
         tail -n 1 /root/log",
    );
    let mut words = line.split_whitespace().map(str::to_owned);
    let mut word = || words.next().expect("three words");
    (word(), word().parse().expect("a count"), word())
}

/// Bytes of memory that a sandbox's machine shares with nobody (proc(5), `smaps_rollup`).
fn private_bytes(home: &Home, name: &str) -> u64 {
    let path = format!("/proc/{}/smaps_rollup", home.info(name).vmm().pid());
    let text = std::fs::read_to_string(path).expect("the machine's memory");
    let kib: u64 = text
        .lines()
        .filter(|line| line.starts_with("Private_Dirty:"))
        .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
        .sum();
    kib * 1024
}

#[test]
fn a_paused_sandbox_stands_still_and_goes_on() {
    let home = Home::new(1);
    home.create("box", &[]);
    start_counter(&home, "box");
    let (token, before, _) = counts(&home, "box");
    home.smolvm(["pause", "box"]).run().ok();
    home.smolvm(["pause", "box"]).run().ok();
    assert_eq!(home.states(), [("box".to_owned(), "paused".to_owned())]);
    home.smolvm(["exec", "box", "--", "true"])
        .run()
        .expect(125)
        .complains_of(&["`box`", "paused", "smolvm resume box"]);
    home.smolvm(["start", "box"])
        .run()
        .expect(1)
        .complains_of(&["paused", "smolvm resume box"]);
    home.smolvm(["resume", "box"]).run().ok();
    home.smolvm(["resume", "box"]).run().ok();
    home.is_on_time("box");
    let (same, after, _) = counts(&home, "box");
    assert_eq!(token, same, "the process is another one");
    assert!(after > before);
    // A paused one is asked to go down like any other, and does.
    home.smolvm(["pause", "box"]).run().ok();
    let stopped = home.json(["stop", "box"]);
    assert_eq!(stopped["killed"], false, "{stopped}");
    home.smolvm(["start", "box"]).run().ok();
    assert!(home.sh("box", "wc -l < /root/log").trim() != "0");
    home.smolvm(["pause", "box"]).run().ok();
    home.rm(&["box"]);
}

#[test]
fn a_running_python_goes_on_in_ten_forks_each_for_itself() {
    let home = Home::new(3);
    home.create("box", &["--env", "A=1"]);
    start_counter(&home, "box");
    let (token, _, _) = counts(&home, "box");
    let forked = home.json(["fork", "box", "-n", "10"]);
    let children: Vec<String> = (1..=10).map(|number| format!("box-{number}")).collect();
    let told: Vec<_> = forked["vms"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|vm| (vm["name"].as_str(), vm["status"].as_str()))
        .collect();
    let expected: Vec<_> = children
        .iter()
        .map(|name| (Some(name.as_str()), Some("running")))
        .collect();
    assert_eq!(told, expected);

    let mut said = HashSet::new();
    for name in children.iter().map(String::as_str).chain(["box"]) {
        let (same, _, host) = counts(&home, name);
        assert_eq!((same.as_str(), host.as_str()), (token.as_str(), name));
        let identity =
            "head -c 16 /dev/urandom | od -An -tx1; cat /run/smolvm/generation; hostname";
        for line in home.sh(name, identity).lines() {
            assert!(said.insert(line.to_owned()), "two guests say {line}");
        }
        home.is_on_time(name);
        assert_eq!(home.sh(name, "echo $A"), "1\n");
        // Each writes to a disk of its own.
        home.sh(name, &format!("echo {name} > /root/mine; sync"));
    }
    for name in &children {
        assert_eq!(home.sh(name, "cat /root/mine"), format!("{name}\n"));
        let private = private_bytes(&home, name);
        assert!(
            private < 128 << 20,
            "{name} has {private} bytes of its 512 MiB for itself"
        );
    }
    // Their memory does not need the files that they came from.
    let left = std::fs::read_dir(home.data().join("snapshots")).expect("the directory");
    assert_eq!(left.count(), 0);
    // A fork of a fork.
    home.rm(&["box"]);
    home.smolvm(["fork", "box-3", "--prefix", "grand"])
        .run()
        .ok();
    let (same, _, host) = counts(&home, "grand-1");
    assert_eq!((same, host), (token, "grand-1".to_owned()));
    home.rm(&["grand-1"]);
    let names: Vec<&str> = children.iter().map(String::as_str).collect();
    home.rm(&names);
}

#[test]
fn a_snapshot_outlives_its_source_and_is_restored_at_once_many_times() {
    let home = Home::new(3);
    home.create("box", &["--disk-mode", "memory", "--workdir", "/srv"]);
    start_counter(&home, "box");
    let (token, count, _) = counts(&home, "box");
    home.smolvm(["pause", "box"]).run().ok();
    home.smolvm(["snapshot", "create", "box", "--name", "before"])
        .run()
        .ok();
    assert_eq!(home.info("box").state(), "paused", "it is as it was");
    home.smolvm(["snapshot", "create", "box", "--name", "before"])
        .run()
        .expect(1)
        .complains_of(&["`before` exists already", "smolvm snapshot rm before"]);
    home.rm(&["box"]);
    let listed = home.json(["snapshot", "ls"]);
    assert_eq!(listed["snapshots"][0]["snapshot_id"], "before");
    assert_eq!(listed["snapshots"][0]["vm_id"], "box");
    let size = listed["snapshots"][0]["size_bytes"]
        .as_u64()
        .expect("a size");
    assert!(size < 256 << 20, "{size} bytes for a guest of 512 MiB");

    let names = ["one", "two"];
    let restores = names.map(|name| {
        home.smolvm(["snapshot", "restore", "before", "--name", name])
            .spawn()
    });
    for restore in restores {
        restore.wait().ok();
    }
    for name in names {
        let (same, on, host) = counts(&home, name);
        assert_eq!((same.as_str(), host.as_str()), (token.as_str(), name));
        assert!(on > count);
        assert_eq!(home.sh(name, "pwd"), "/srv\n");
        home.is_on_time(name);
    }
    home.smolvm(["snapshot", "restore", "before", "--name", "one"])
        .run()
        .expect(1)
        .complains_of(&["`one` exists already"]);
    // One byte of the device state, which is where it was saved only if nobody wrote to it.
    let mut saved = std::fs::read_dir(home.data().join("snapshots")).expect("the snapshots");
    let state = saved
        .next()
        .expect("one")
        .expect("one")
        .path()
        .join("state");
    let mut bytes = std::fs::read(&state).expect("the state");
    *bytes.last_mut().expect("a byte") ^= 1;
    std::fs::write(&state, bytes).expect("the state");
    home.smolvm(["snapshot", "restore", "before"])
        .run()
        .expect(1)
        .complains_of(&[
            "state is damaged",
            "its content was changed",
            "smolvm snapshot rm",
        ]);
    home.smolvm(["snapshot", "rm", "before"]).run().ok();
    home.smolvm(["snapshot", "restore", "before"])
        .run()
        .expect(1)
        .complains_of(&["no snapshot named `before`", "smolvm snapshot ls"]);
    assert_eq!(
        counts(&home, "two").0,
        token,
        "it needs no file of the snapshot"
    );
    home.rm(&names);
}

#[test]
fn what_cannot_be_copied_is_refused_with_the_reason() {
    let home = Home::new(1);
    home.create("shared", &["--disk-mode", "shared"]);
    for command in [&["fork", "shared"][..], &["snapshot", "create", "shared"]] {
        home.smolvm(command)
            .run()
            .expect(1)
            .complains_of(&["`shared` cannot be copied", "disk is shared"]);
    }
    home.smolvm(["stop", "shared"]).run().ok();
    for command in [
        &["fork", "shared"][..],
        &["snapshot", "create", "shared"],
        &["pause", "shared"],
        &["resume", "shared"],
    ] {
        home.smolvm(command)
            .run()
            .expect(1)
            .complains_of(&["is not running, it is stopped", "smolvm start shared"]);
    }
    home.rm(&["shared"]);
}

#[test]
fn a_snapshot_whose_maker_was_killed_leaves_nothing() {
    let home = Home::new(1);
    home.create("box", &[]);
    let snapshots = home.data().join("snapshots");
    std::fs::create_dir(&snapshots).expect("a directory");
    let entries = Entries::watch(&snapshots);
    let create = home
        .smolvm(["snapshot", "create", "box", "--name", "s"])
        .spawn();
    entries.wait_for("a snapshot in the making", |_| true);
    create.signal(Signal::KILL);
    drop(create);
    // Whether or not it was whole by then, it can be made anew.
    home.smolvm(["snapshot", "ls"]).run().ok();
    if home.json(["snapshot", "ls"])["snapshots"] != serde_json::json!([]) {
        home.smolvm(["snapshot", "rm", "s"]).run().ok();
    }
    home.smolvm(["snapshot", "create", "box", "--name", "s"])
        .run()
        .ok();
    home.smolvm(["snapshot", "rm", "s"]).run().ok();
    let left = std::fs::read_dir(&snapshots).expect("the directory");
    assert_eq!(left.count(), 0);
    assert_eq!(home.sh("box", "echo well"), "well\n");
    home.rm(&["box"]);
}

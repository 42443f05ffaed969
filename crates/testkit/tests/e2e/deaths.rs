//! Any process may die at any moment: nothing is lost that was on the disk, and the next command
//! tells the truth.

use std::path::Path;

use rustix::process::Signal;
use smolvm_testkit::{Entries, Home, processes_mentioning};

use crate::counts::strace;

#[test]
fn a_killed_run_takes_its_sandbox_with_it() {
    let home = Home::new(1);
    let run = home
        .smolvm([
            "run",
            "--name",
            "box",
            "--",
            "sh",
            "-c",
            "echo ready; sleep 1000",
        ])
        .spawn();
    run.wait_for("ready\n");
    let info = home.info("box");
    let (keeper, vmm) = (info.keeper(), info.vmm());
    run.signal(Signal::KILL);
    keeper.wait("the keeper of a killed `run`");
    vmm.wait("the machine of a killed `run`");
    home.is_clean();
}

#[test]
fn a_sandbox_survives_the_death_of_its_machine_and_of_its_keeper() {
    let home = Home::new(1);
    home.create("box", &[]);
    home.sh("box", "echo first > /root/first; sync");

    let info = home.info("box");
    let keeper = info.keeper();
    info.vmm().signal(Signal::KILL);
    keeper.wait("the keeper of a killed machine");
    assert_eq!(home.states(), [("box".to_owned(), "error".to_owned())]);
    let after = home.info("box");
    assert_eq!(after.state(), "error");
    assert!(
        after.reason().contains("signal 9"),
        "the reason is {:?}",
        after.reason()
    );
    home.exec("box", &["true"])
        .expect(125)
        .complains_of(&["smolvm start box"]);

    home.smolvm(["start", "box"]).run().ok();
    assert_eq!(home.sh("box", "cat /root/first"), "first\n");
    home.sh("box", "echo second > /root/second; sync");

    let info = home.info("box");
    let vmm = info.vmm();
    info.keeper().signal(Signal::KILL);
    vmm.wait("the machine of a killed keeper");
    assert_eq!(home.states(), [("box".to_owned(), "error".to_owned())]);
    let after = home.info("box");
    assert!(
        after.reason().contains("keeper"),
        "the reason is {:?}",
        after.reason()
    );

    home.smolvm(["start", "box"]).run().ok();
    assert_eq!(
        home.sh("box", "cat /root/first /root/second"),
        "first\nsecond\n"
    );
    home.rm(&["box"]);
}

#[test]
fn a_keeper_that_hangs_does_not_prevent_deletion() {
    let home = Home::new(1);
    home.create("box", &[]);
    let info = home.info("box");
    let (keeper, vmm) = (info.keeper(), info.vmm());
    keeper.signal(Signal::STOP);
    home.rm(&["box"]);
    keeper.wait("a keeper that hung");
    vmm.wait("the machine of a keeper that hung");
    home.is_clean();
}

/// Kills `create` when an entry of the sandbox's directory has appeared.
#[track_caller]
fn kill_create_after(home: &Home, entry: &str) {
    let sandboxes = Entries::watch(&home.data().join("sandboxes"));
    let create = home.smolvm(["create", "--name", "box"]).spawn();
    let dir = sandboxes.wait_for("the sandbox's directory", |_| true);
    if !entry.is_empty() {
        Entries::watch(&dir).wait_for(entry, |name| name == entry);
    }
    create.signal(Signal::KILL);
    assert_eq!(
        create.wait().signal,
        Some(9),
        "`create` was to be killed after {entry:?}"
    );
}

#[test]
fn a_sandbox_whose_create_was_killed_can_be_used_or_made_again() {
    let home = Home::new(1);
    for entry in ["", "disk.ext4", "keeper.sock", "console.log"] {
        kill_create_after(&home, entry);
        let states = home.states();
        if states.is_empty() {
            home.create("box", &[]);
        } else {
            // What a create leaves is a sandbox like any other.
            assert_eq!(states[0].0, "box");
            home.smolvm(["start", "box"]).run().ok();
        }
        assert_eq!(
            home.sh("box", "echo works"),
            "works\n",
            "killed after {entry:?}"
        );
        home.rm(&["box"]);
        home.is_clean();
    }
}

#[test]
fn a_sandbox_whose_create_was_killed_can_be_deleted_and_its_name_used_again() {
    let home = Home::new(1);
    for entry in [
        "",
        "lock",
        "disk.ext4",
        "launch.json",
        "keeper.log",
        "keeper.sock",
        "console.log",
    ] {
        kill_create_after(&home, entry);
        for (name, state) in home.states() {
            assert_eq!(name, "box");
            let alive = !processes_mentioning(home.data()).is_empty();
            assert!(
                alive || !["starting", "running", "stopping"].contains(&state.as_str()),
                "killed after {entry:?}: no process is left, and `ls` says {state}"
            );
            home.rm(&["box"]);
        }
        home.smolvm(["create", "--no-start", "--name", "box"])
            .run()
            .ok();
        home.rm(&["box"]);
        home.is_clean();
    }
}

#[test]
fn a_start_killed_while_it_copies_the_disk_leaves_a_sandbox_that_starts() {
    let home = Home::new(1);
    home.smolvm(["create", "--no-start", "--name", "box"])
        .run()
        .ok();
    // Killed at the first extent: the file is there, and empty. Where the file system clones files
    // there is no copy, and nothing to be cut short.
    strace()
        .args(["--quiet=all", "--output=/dev/null"])
        .args(["--trace=copy_file_range"])
        .args(["--inject=copy_file_range:signal=KILL:when=1"])
        .args([
            &home.binaries().smolvm(),
            Path::new("--data-dir"),
            home.data(),
        ])
        .args(["start", "box"])
        .run();
    home.smolvm(["start", "box"]).run().ok();
    assert_eq!(home.sh("box", "echo works"), "works\n");
    home.rm(&["box"]);
}

#[test]
fn a_run_killed_before_its_guest_is_ready_leaves_nothing() {
    let home = Home::new(1);
    for entry in ["disk.ext4", "keeper.sock", "console.log"] {
        let sandboxes = Entries::watch(&home.data().join("sandboxes"));
        let run = home.smolvm(["run", "--", "true"]).spawn();
        let dir = sandboxes.wait_for("the sandbox's directory", |_| true);
        Entries::watch(&dir).wait_for(entry, |name| name == entry);
        run.signal(Signal::KILL);
        drop(run);
        for (process, line) in processes_mentioning(home.data()) {
            assert!(
                process.ends_within(std::time::Duration::from_secs(30)),
                "`run` was killed after {entry:?}, and this goes on: {line}"
            );
        }
        assert_eq!(home.states(), [], "`run` was killed after {entry:?}");
        home.is_clean();
    }
}

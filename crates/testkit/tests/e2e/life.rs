//! Create, stop, start, delete.

use std::collections::HashSet;

use smolvm_testkit::{Entries, Home, processes_mentioning};

#[test]
fn a_sandbox_keeps_its_files_over_stop_and_start_and_leaves_nothing_when_deleted() {
    let home = Home::new(1);
    let created = home.smolvm(["create", "--name", "box"]).run().ok();
    assert_eq!(
        created.out(),
        "box\n",
        "create prints the name and nothing else"
    );
    home.sh(
        "box",
        "echo kept > /root/file; mkdir -p /srv/a; echo too > /srv/a/b",
    );
    let before = home.info("box");
    assert_eq!(before.state(), "running");
    assert!(
        before.json["guest"]["uptime_s"]
            .as_f64()
            .is_some_and(|up| up > 0.0),
        "{before:?}"
    );
    let (keeper, vmm) = (before.keeper(), before.vmm());

    home.smolvm(["create", "--name", "box"])
        .run()
        .expect(1)
        .complains_of(&["box", "hint:"]);
    assert_eq!(home.states(), [("box".to_owned(), "running".to_owned())]);

    home.smolvm(["stop", "box"]).run().ok();
    keeper.wait("the keeper of a stopped sandbox");
    vmm.wait("the machine of a stopped sandbox");
    assert_eq!(home.states(), [("box".to_owned(), "stopped".to_owned())]);
    home.exec("box", &["true"])
        .expect(125)
        .complains_of(&["not running", "smolvm start box"]);

    home.smolvm(["start", "box"]).run().ok();
    assert_eq!(home.sh("box", "cat /root/file /srv/a/b"), "kept\ntoo\n");

    let running = home.info("box");
    let (keeper, vmm) = (running.keeper(), running.vmm());
    home.smolvm(["rm", "box"]).run().ok();
    // Nobody sees it any more, whether or not its process is gone already.
    assert!(home.states().is_empty());
    keeper.wait("the keeper of a deleted sandbox");
    assert!(
        vmm.ends_within(std::time::Duration::ZERO),
        "the machine outlives its keeper"
    );
    home.is_clean();
    home.exec("box", &["true"])
        .expect(125)
        .complains_of(&["no sandbox named `box`"]);
    home.smolvm(["rm", "box"])
        .run()
        .expect(1)
        .complains_of(&["no sandbox named `box`"]);
}

#[test]
fn two_starts_at_once_both_succeed_and_start_one_machine() {
    let home = Home::new(1);
    home.smolvm(["create", "--no-start", "--name", "box"])
        .run()
        .ok();
    let starts: Vec<_> = (0..2)
        .map(|_| home.smolvm(["start", "box"]).spawn())
        .collect();
    for start in starts {
        assert_eq!(start.wait().ok().out(), "box\n");
    }
    // Each keeper has one, and is told the path of its sandbox.
    let keepers: Vec<_> = processes_mentioning(home.data())
        .into_iter()
        .filter(|(_, line)| line.contains("smolvm-keeper"))
        .collect();
    assert_eq!(keepers.len(), 1, "{keepers:#?}");
    home.sh("box", "true");
    home.rm(&["box"]);
}

#[test]
fn generated_names_differ_even_when_made_at_once() {
    let home = Home::new(0);
    let creates: Vec<_> = (0..8)
        .map(|_| home.smolvm(["create", "--no-start"]).spawn())
        .collect();
    let names: HashSet<String> = creates
        .into_iter()
        .map(|create| create.wait().ok().out())
        .collect();
    assert_eq!(names.len(), 8, "{names:?}");
    assert_eq!(home.states().len(), 8);
    home.smolvm(["rm", "--all"])
        .run()
        .expect(1)
        .complains_of(&["--force"]);
    home.smolvm(["rm", "--all", "--force"]).run().ok();
}

#[test]
fn a_command_given_while_the_sandbox_starts_runs_when_it_is_ready() {
    let home = Home::new(1);
    let sandboxes = Entries::watch(&home.data().join("sandboxes"));
    let create = home.smolvm(["create", "--name", "box"]).spawn();
    let dir = sandboxes.wait_for("the sandbox's directory", |_| true);
    // Whoever starts it takes its lock first.
    Entries::watch(&dir).wait_for("lock", |name| name == "lock");
    assert_eq!(home.exec("box", &["echo", "ready"]).ok().out(), "ready\n");
    create.wait().ok();
    home.rm(&["box"]);
}

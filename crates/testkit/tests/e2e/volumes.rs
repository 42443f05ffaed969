//! Disks that outlive the sandboxes which use them.

use rustix::process::Signal;
use smolvm_testkit::Home;

use crate::templates::restored;

#[test]
fn a_volume_outlives_its_sandboxes_and_has_one_writer_or_readers() {
    let home = Home::new(2);
    for size in ["128", "200"] {
        let name = format!("v{size}");
        let made = home
            .smolvm(["volume", "create", &name, "--size", size])
            .run()
            .ok();
        assert_eq!(made.out(), format!("{name}\n"));
    }
    // A place that is not there, and another volume inside it.
    home.create(
        "one",
        &["-v", "v128:/srv/a b/data", "-v", "v200:/srv/a b/data/in/it"],
    );
    let sizes = "df -m --output=size,target | awk '/ b.data/ {print $1}'";
    let sizes = home.sh("one", sizes);
    let sizes: Vec<u32> = sizes
        .lines()
        .map(|line| line.parse().expect("a number"))
        .collect();
    assert!(matches!(sizes[..], [100..=128, 170..=200]), "{sizes:?}");
    home.sh(
        "one",
        "cd '/srv/a b/data' && echo first > file && echo deep > in/it/file",
    );

    home.smolvm(["create", "--name", "two", "-v", "v128:/data"])
        .run()
        .expect(1)
        .complains_of(&["`v128`", "`one` writes to it", "smolvm stop one"]);
    home.smolvm(["run", "-v", "v128:/data:ro", "--", "true"])
        .run()
        .expect(125)
        .complains_of(&["`one` writes to it"]);
    home.smolvm(["fork", "one"])
        .run()
        .expect(1)
        .complains_of(&["`v128`"]);
    home.smolvm(["snapshot", "create", "one"])
        .run()
        .expect(1)
        .complains_of(&["`v128`"]);
    home.smolvm(["volume", "rm", "v128"])
        .run()
        .expect(1)
        .complains_of(&["`one`"]);
    let list = home.smolvm(["volume", "ls"]).run().ok();
    assert_eq!(list.out().matches("one").count(), 2, "{list}");

    // Nothing is synced, and nothing is lost.
    home.rm(&["one"]);
    let deep = home
        .smolvm(["run", "-v", "v200:/d:ro", "--", "cat", "/d/file"])
        .run()
        .ok();
    assert_eq!(deep.out(), "deep\n");
    for name in ["r1", "r2"] {
        home.create(name, &["-v", "v128:/data:ro"]);
        assert_eq!(home.sh(name, "cat /data/file"), "first\n");
    }
    assert!(
        restored(&home, "r2"),
        "a machine with a volume comes from a template"
    );
    home.exec("r1", &["touch", "/data/new"])
        .expect(1)
        .complains_of(&["Read-only file system"]);
    home.smolvm(["run", "-v", "v128:/data", "--", "true"])
        .run()
        .expect(125)
        .complains_of(&["reads it"]);
    home.rm(&["r1", "r2"]);
    let pruned = home.smolvm(["volume", "prune", "--dry-run"]).run().ok();
    assert_eq!(pruned.out(), "v128\nv200\n");
    home.smolvm(["volume", "rm", "v128", "v200"]).run().ok();
    home.smolvm(["create", "--name", "two", "-v", "v128:/data"])
        .run()
        .expect(1)
        .complains_of(&["no volume named `v128`", "smolvm volume create v128"]);
    assert_eq!(home.states(), []);
}

#[test]
fn what_was_synced_to_a_volume_survives_its_machine_and_its_keeper() {
    let home = Home::new(1);
    home.smolvm(["volume", "create", "data", "--size", "64"])
        .run()
        .ok();
    home.create("box", &["-v", "data:/data"]);
    home.sh("box", "echo synced > /data/file; sync /data/file");
    let info = home.info("box");
    let keeper = info.keeper();
    info.vmm().signal(Signal::KILL);
    keeper.wait("the keeper of a killed machine");
    home.smolvm(["run", "-v", "data:/data:ro", "--", "true"])
        .run()
        .expect(125)
        .complains_of(&["not closed in order", "smolvm run -v data:/mnt"]);

    home.smolvm(["start", "box"]).run().ok();
    assert_eq!(home.sh("box", "cat /data/file"), "synced\n");
    home.sh("box", "echo again > /data/again; sync /data/again");
    let info = home.info("box");
    let vmm = info.vmm();
    info.keeper().signal(Signal::KILL);
    vmm.wait("the machine of a killed keeper");
    // Its row says that it runs; the next command knows better.
    let read = [
        "run",
        "-v",
        "data:/data",
        "--",
        "cat",
        "/data/file",
        "/data/again",
    ];
    assert_eq!(home.smolvm(read).run().ok().out(), "synced\nagain\n");
    // That one went down in order, so a reader may come.
    let read = ["run", "-v", "data:/data:ro", "--", "cat", "/data/again"];
    assert_eq!(home.smolvm(read).run().ok().out(), "again\n");

    // Whoever runs a command in it is killed: what was written is kept all the same.
    let run = home
        .smolvm([
            "run",
            "-v",
            "data:/data",
            "--",
            "sh",
            "-c",
            "echo last > /data/last; echo ready; sleep 1000",
        ])
        .spawn();
    run.wait_for("ready\n");
    let name = home
        .states()
        .into_iter()
        .map(|(name, _)| name)
        .find(|name| name != "box");
    let keeper = home.info(&name.expect("a sandbox")).keeper();
    run.signal(Signal::KILL);
    keeper.wait("the keeper of a killed `run`");
    let read = ["run", "-v", "data:/data:ro", "--", "cat", "/data/last"];
    assert_eq!(home.smolvm(read).run().ok().out(), "last\n");
    home.rm(&["box"]);
    home.smolvm(["volume", "rm", "data"]).run().ok();
}

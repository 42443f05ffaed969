//! Where a sandbox's changes go.

use smolvm_testkit::Home;

#[test]
fn memory_mode_forgets_when_it_stops() {
    let home = Home::new(1);
    home.create("box", &["--disk-mode", "memory"]);
    home.sh("box", "echo here > /root/file; cat /root/file");
    home.smolvm(["stop", "box"]).run().ok();
    home.smolvm(["start", "box"]).run().ok();
    assert_eq!(
        home.sh("box", "test ! -e /root/file && echo gone"),
        "gone\n"
    );
    home.rm(&["box"]);
}

#[test]
fn shared_mode_has_one_writer_and_the_next_sees_what_it_wrote() {
    let home = Home::new(2);
    home.create("first", &["--disk-mode", "shared"]);
    home.sh("first", "echo shared > /root/file");

    let refused = home
        .smolvm([
            "--json",
            "create",
            "--name",
            "second",
            "--disk-mode",
            "shared",
        ])
        .run()
        .expect(1);
    assert_eq!(
        refused.json()["error"]["details"]["kind"],
        "busy",
        "{refused}"
    );
    home.smolvm([
        "run",
        "--name",
        "second",
        "--disk-mode",
        "shared",
        "--",
        "true",
    ])
    .run()
    .expect(125)
    .complains_of(&["shared disk", "hint:"]);
    assert_eq!(home.states(), [("first".to_owned(), "running".to_owned())]);

    home.smolvm(["stop", "first"]).run().ok();
    home.create("second", &["--disk-mode", "shared"]);
    assert_eq!(home.sh("second", "cat /root/file"), "shared\n");
    home.smolvm(["start", "first"])
        .run()
        .expect(1)
        .complains_of(&["shared disk", "hint:"]);
    home.rm(&["first", "second"]);
}

#[test]
fn a_disk_grows_while_it_runs_and_while_it_is_off_and_never_shrinks() {
    let home = Home::new(1);
    let room = "df -m --output=size / | tail -1";
    let megabytes = |home: &Home| -> u32 { home.sh("box", room).trim().parse().expect("a number") };
    home.create("box", &["--disk", "64"]);
    let full = ["dd", "if=/dev/zero", "of=/root/big", "bs=1M", "count=100"];
    home.exec("box", &full)
        .expect(1)
        .complains_of(&["No space left"]);
    home.smolvm(["sandbox", "resize", "box", "--disk", "256"])
        .run()
        .ok();
    home.exec("box", &full).ok();
    assert!(
        (220..=256).contains(&megabytes(&home)),
        "{}",
        megabytes(&home)
    );
    home.smolvm(["sandbox", "resize", "box", "--disk", "256"])
        .run()
        .ok();
    home.smolvm(["sandbox", "resize", "box", "--disk", "128"])
        .run()
        .expect(2)
        .complains_of(&["256 MiB", "smaller"]);

    home.smolvm(["stop", "box"]).run().ok();
    home.smolvm(["sandbox", "resize", "box", "--disk", "1G"])
        .run()
        .ok();
    assert_eq!(home.info("box").json["disk_size"], 1024);
    home.smolvm(["sandbox", "resize", "box", "--disk", "512"])
        .run()
        .expect(2);
    home.smolvm(["start", "box"]).run().ok();
    assert!(
        (900..=1024).contains(&megabytes(&home)),
        "{}",
        megabytes(&home)
    );
    assert_eq!(home.sh("box", "stat -c %s /root/big"), "104857600\n");
    home.rm(&["box"]);
    home.create("box", &["--disk-mode", "memory"]);
    home.smolvm(["sandbox", "resize", "box", "--disk", "8G"])
        .run()
        .expect(1)
        .complains_of(&["no disk of its own"]);
    home.rm(&["box"]);
}

#[test]
fn isolated_sandboxes_do_not_see_each_others_writes() {
    let home = Home::new(2);
    home.create("first", &[]);
    home.create("second", &[]);
    home.sh(
        "first",
        "echo mine > /root/file; echo changed > /etc/motd; sync",
    );
    assert_eq!(
        home.sh("second", "ls /root; grep -c changed /etc/motd || true"),
        "0\n"
    );
    home.rm(&["first", "second"]);
}

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

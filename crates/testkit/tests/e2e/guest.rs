//! What a command finds in its sandbox: an ordinary, healthy Linux.

use std::time::{Duration, SystemTime};

use smolvm_testkit::Home;

#[test]
fn the_guest_is_an_ordinary_healthy_machine() {
    let home = Home::new(1);
    home.create("my-box_1", &[]);
    let sh = |script: &str| home.sh("my-box_1", script);

    assert_eq!(
        sh("hostname; cat /proc/sys/kernel/hostname"),
        "my-box_1\nmy-box_1\n"
    );

    let since = |time: SystemTime| {
        time.duration_since(SystemTime::UNIX_EPOCH)
            .expect("a clock")
    };
    let before = since(SystemTime::now());
    let guest = Duration::from_secs_f64(sh("date +%s.%N").trim().parse().expect("a time"));
    let after = since(SystemTime::now());
    let slack = Duration::from_secs(2);
    assert!(
        guest + slack > before && guest < after + slack,
        "the guest's clock says {guest:?}, the host's {before:?} to {after:?}"
    );

    assert_eq!(
        sh("echo x > /dev/shm/a; cat /dev/shm/a; cat $(mktemp) ; stat -c %a /tmp"),
        "x\n1777\n"
    );
    assert_eq!(
        sh(
            "python3 -c 'import os, multiprocessing; multiprocessing.Semaphore(); \
            print(os.ttyname(os.openpty()[1])[:9])'"
        ),
        "/dev/pts/\n"
    );
    sh("apt-get --version; git --version; curl --version; python3 --version");
    sh("ping -c 1 127.0.0.1 2>/dev/null || python3 -c '
import socket
server = socket.create_server((\"127.0.0.1\", 0))
socket.create_connection(server.getsockname())'");

    for user in ["nobody", "root"] {
        home.smolvm([
            "exec",
            "--user",
            user,
            "my-box_1",
            "--",
            "sh",
            "-c",
            "kill -9 1; kill -15 1",
        ])
        .run();
        assert_eq!(sh("echo up"), "up\n", "{user} has killed PID 1");
    }
    let kill = ["sh", "-c", "kill -9 1"];
    home.smolvm(["exec", "--user", "nobody", "my-box_1", "--"])
        .args(kill)
        .run()
        .expect(1)
        .complains_of(&["not permitted"]);
    home.rm(&["my-box_1"]);
}

#[test]
fn orphans_are_reaped() {
    let home = Home::new(1);
    home.create("box", &[]);
    // Each leaves a grandchild that ends after its parents.
    let script = "i=0; while [ $i -lt 200 ]; do (true & true & ) & i=$((i+1)); done; wait";
    home.sh("box", script);
    // Reaping needs no help, but a moment; each look is a round trip into the guest.
    let zombies = || home.sh("box", "grep -l '^State:.Z' /proc/[0-9]*/status || true");
    assert!(
        (0..20).any(|_| zombies().is_empty()),
        "zombies stay in the guest:\n{}",
        zombies()
    );
    home.rm(&["box"]);
}

#[test]
fn logs_show_what_the_guest_writes_to_its_console() {
    let home = Home::new(1);
    home.create("box", &[]);
    // Several, because the end is seen by each at another moment.
    let follow: Vec<_> = (0..4)
        .map(|_| home.smolvm(["logs", "--follow", "box"]).spawn())
        .collect();
    home.sh("box", "echo marked by the test > /dev/console");
    for follow in &follow {
        follow.wait_for("marked by the test");
    }
    let logs = home.smolvm(["logs", "box"]).run().ok();
    assert!(logs.out().contains("marked by the test"), "{logs}");
    home.smolvm(["stop", "box"]).run().ok();
    let logs = home.smolvm(["logs", "--tail", "5", "box"]).run().ok();
    assert!(logs.out().contains("marked by the test"), "{logs}");
    // Nothing more can come from a machine that is off.
    for follow in follow {
        follow.wait().ok();
    }
    home.rm(&["box"]);
}

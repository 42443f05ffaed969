//! Sandboxes made ahead of demand.

use std::collections::HashSet;

use rustix::process::Signal;
use serde_json::Value;
use smolvm_testkit::{Home, processes_mentioning};

/// The only pool.
fn pool(home: &Home) -> Value {
    home.json(["pool", "ls"])["pools"][0].clone()
}

/// Removes the pools, and waits for whoever fills them.
fn remove(home: &Home) {
    home.smolvm(["pool", "rm", "--all"]).run().ok();
    for (process, line) in processes_mentioning(&home.data().join("pools")) {
        process.wait(&line);
    }
    let left = std::fs::read_dir(home.data().join("pools")).expect("the directory");
    assert_eq!(left.count(), 0, "a pool left files");
}

#[test]
fn a_sandbox_from_a_pool_is_as_any_other_and_like_no_other() {
    let home = Home::new(3);
    home.smolvm([
        "pool",
        "set",
        "--size",
        "2",
        "--warm-cmd",
        "echo warm > /root/warm",
    ])
    .run()
    .ok();
    let full = pool(&home);
    assert_eq!(
        (&full["ready"], &full["coming"]),
        (&2.into(), &0.into()),
        "{full}"
    );
    assert!(home.states().is_empty(), "members are nobody's sandboxes");

    let mut said = HashSet::new();
    for name in ["one", "two"] {
        home.create(
            name,
            &[
                "--env",
                &format!("WHO={name}"),
                "--workdir",
                "/srv",
                "--user",
                "nobody",
            ],
        );
        let identity =
            "hostname; head -c 16 /dev/urandom | od -An -tx1; cat /run/smolvm/generation";
        for line in home.sh(name, identity).lines() {
            assert!(said.insert(line.to_owned()), "two guests say {line}");
        }
        assert_eq!(
            home.sh(
                name,
                "echo $WHO; hostname; pwd; id -un; grep -c 127.0.1.1 /etc/hosts"
            ),
            format!("{name}\n{name}\n/srv\nnobody\n1\n")
        );
        let root = ["exec", name, "--user", "root", "--", "cat", "/root/warm"];
        assert_eq!(home.smolvm(root).run().ok().out(), "warm\n");
    }
    let used = pool(&home);
    assert_eq!(used["hits"], 2, "{used}");
    // What is asked for differently is no hit, and no miss.
    home.smolvm(["run", "--memory", "256", "--", "true"])
        .run()
        .ok();
    let used = pool(&home);
    assert_eq!(
        (&used["hits"], &used["misses"]),
        (&2.into(), &0.into()),
        "{used}"
    );
    // It stops, starts and goes as any other.
    home.smolvm(["stop", "one"]).run().ok();
    home.smolvm(["start", "one"]).run().ok();
    assert_eq!(home.sh("one", "hostname"), "one\n");
    home.rm(&["one", "two"]);
    remove(&home);
}

#[test]
fn a_pool_that_is_empty_is_a_miss_and_is_filled_again() {
    let home = Home::new(3);
    home.smolvm(["pool", "set", "--size", "1"]).run().ok();
    // The member is claimed, and the next one finds none unless filling was faster.
    home.smolvm(["run", "--", "true"]).run().ok();
    home.smolvm(["run", "--", "true"]).run().ok();
    let used = pool(&home);
    let [hits, misses] = ["hits", "misses"].map(|name| used[name].as_u64().expect("a number"));
    assert_eq!(hits + misses, 2, "{used}");
    assert!(hits > 0, "{used}");
    // Whoever found it short has started to fill it.
    for (process, line) in processes_mentioning(&home.data().join("pools")) {
        process.wait(&line);
    }
    assert_eq!(pool(&home)["ready"], 1);
    // A member whose keeper died is replaced. Those of the two commands may still be taking away.
    let keepers = processes_mentioning(&home.data().join("sandboxes"));
    let keepers: Vec<_> = keepers
        .iter()
        .filter(|(_, line)| line.contains("smolvm-keeper"))
        .collect();
    assert!(!keepers.is_empty(), "a member has one");
    for (keeper, line) in keepers {
        keeper.signal(Signal::KILL);
        keeper.wait(line);
    }
    home.smolvm(["pool", "set", "--size", "1"]).run().ok();
    assert_eq!(pool(&home)["ready"], 1);
    home.smolvm(["run", "--", "true"]).run().ok();
    remove(&home);
}

#[test]
fn a_warm_up_that_fails_says_why_and_changes_nothing() {
    let home = Home::new(2);
    // What it says fills several windows, and is taken all the same.
    let wordy = "head -c 1000000 /dev/zero; echo oh dear >&2; exit 4";
    let fails = ["pool", "set", "--size", "1", "--warm-cmd", wordy];
    let why = ["warm-up command `head", "code 4", "it last said: oh dear"];
    home.smolvm(fails).run().expect(1).complains_of(&why);
    assert_eq!(pool(&home), Value::Null, "it was not there, and is not now");

    let works = ["pool", "set", "--size", "1", "--warm-cmd", "true"];
    home.smolvm(works).run().ok();
    home.smolvm(fails).run().expect(1).complains_of(&why);
    let kept = pool(&home);
    assert_eq!(kept["warm_commands"], serde_json::json!(["true"]), "{kept}");
    assert_eq!(
        (&kept["ready"], &kept["failure"]),
        (&1.into(), &Value::Null)
    );
    home.smolvm(["run", "--", "true"]).run().ok();
    assert_eq!(pool(&home)["hits"], 1);
    remove(&home);
}

#[test]
fn a_claimed_sandbox_does_not_outlive_the_process_it_belongs_to() {
    let home = Home::new(2);
    home.smolvm(["pool", "set", "--size", "1"]).run().ok();
    let run = home
        .smolvm([
            "run",
            "--name",
            "mine",
            "--",
            "sh",
            "-c",
            "echo up; exec tail -f /dev/null",
        ])
        .spawn();
    run.wait_for("up\n");
    assert_eq!(pool(&home)["hits"], 1);
    let keeper = home.info("mine").keeper();
    run.signal(Signal::KILL);
    drop(run);
    keeper.wait("the keeper of the claimed sandbox");
    assert!(home.states().is_empty());
    remove(&home);
}

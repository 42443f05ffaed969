//! Where root's Firecracker runs machines, each is in a jail, and nothing of it is left by any death.

use std::path::{Path, PathBuf};

use rustix::process::Signal;
use smolvm_testkit::Home;

/// Control groups of a sandbox, in every hierarchy.
fn groups(id: &str) -> Vec<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("the table of mounts");
    let hierarchies = mounts.lines().filter(|line| line.contains(" cgroup"));
    let paths = hierarchies.filter_map(|line| line.split(' ').nth(1));
    let paths = paths.map(|path| Path::new(path).join("smolvm").join(id));
    paths.filter(|path| path.is_dir()).collect()
}

/// Which users jails have, by the store.
fn users(home: &Home) -> Vec<u32> {
    let store = rusqlite::Connection::open(home.data().join("state.db")).expect("the store");
    let mut query = store.prepare("SELECT user FROM jails").expect("a query");
    let users = query.query_map([], |row| row.get(0)).expect("users");
    users.collect::<Result<_, _>>().expect("numbers")
}

#[test]
fn a_machine_of_firecracker_is_jailed_and_no_death_leaves_a_jail() {
    let home = Home::new(1);
    home.create("box", &[]);
    let data = home.json(["info", "box"])["vm"].clone();
    let id = data["id"].as_str().expect("an id").to_owned();
    let jailed = data["backend"] == "firecracker";
    let intact = || {
        let pid = home.info("box").vmm().pid();
        let host = Path::new(&format!("/proc/{pid}/root/etc/passwd")).exists();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a status");
        let user = status.lines().find_map(|line| line.strip_prefix("Uid:\t"));
        let user: u32 = user
            .and_then(|users| users.split('\t').next()?.parse().ok())
            .expect("a user");
        match jailed {
            true => {
                assert!(!host, "it sees files of the host");
                assert_eq!(users(&home), [user]);
                assert!(user >= 2_000_000, "{user}");
                assert!(!groups(&id).is_empty());
            }
            false => {
                assert!(host, "it is in the host's root directory");
                assert!(users(&home).is_empty() && groups(&id).is_empty());
            }
        }
    };
    let gone = || {
        assert_eq!(home.states(), [("box".to_owned(), "error".to_owned())]);
        assert!(users(&home).is_empty());
        assert_eq!(groups(&id), Vec::<PathBuf>::new());
        assert!(!home.data().join("sandboxes").join(&id).join("vmm").exists());
    };
    intact();

    let info = home.info("box");
    let keeper = info.keeper();
    info.vmm().signal(Signal::KILL);
    keeper.wait("the keeper of a killed machine");
    gone();

    home.smolvm(["start", "box"]).run().ok();
    intact();
    let info = home.info("box");
    let vmm = info.vmm();
    info.keeper().signal(Signal::KILL);
    vmm.wait("the machine of a killed keeper");
    gone();

    home.smolvm(["start", "box"]).run().ok();
    assert_eq!(home.sh("box", "echo up"), "up\n");
    home.rm(&["box"]);
    home.is_clean();
    assert_eq!(groups(&id), Vec::<PathBuf>::new());
}

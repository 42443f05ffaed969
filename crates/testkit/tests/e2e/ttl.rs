//! A sandbox with a time to live.

use smolvm_testkit::{Entries, Home, processes_mentioning};

#[test]
fn a_sandbox_is_gone_when_its_time_is_over() {
    let home = Home::new(1);
    let sandboxes = Entries::watch(&home.data().join("sandboxes"));
    let create = home
        .smolvm(["create", "--name", "box", "--ttl", "1s"])
        .spawn();
    let dir = sandboxes.wait_for("the sandbox's directory", |_| true);
    // The keeper makes it, so from then on there is a keeper.
    Entries::watch(&dir).wait_for("console.log", |name| name == "console.log");
    let keepers: Vec<_> = processes_mentioning(&dir.join("launch.json"))
        .into_iter()
        .filter(|(_, line)| line.contains("smolvm-keeper"))
        .collect();
    assert_eq!(keepers.len(), 1, "{keepers:?}");
    create.wait().ok();
    keepers[0]
        .0
        .wait("the keeper of a sandbox whose time is over");
    home.is_clean();
}

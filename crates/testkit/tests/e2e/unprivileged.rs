//! Everything works without any privilege.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use smolvm_testkit::Home;

#[test]
fn an_ordinary_user_can_do_everything() {
    let home = Home::with(1).ordinary_user().make();
    let here = home.scratch();
    let text = |path: &Path| path.to_str().expect("a path").to_owned();

    let run = home
        .smolvm(["run", "--", "sh", "-c", "id -u; cat"])
        .stdin("data\n")
        .run()
        .ok();
    assert_eq!(run.out(), "0\ndata\n");

    home.create("box", &[]);
    let info = home.info("box");
    for (what, process) in [("keeper", info.keeper()), ("machine", info.vmm())] {
        let status = fs::read_to_string(format!("/proc/{}/status", process.pid())).expect("status");
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_default()
                .split_whitespace()
                .next()
                .unwrap_or_default()
                .to_owned()
        };
        assert_ne!(field("Uid:"), "0", "the {what} runs as root");
        assert_eq!(
            field("CapEff:"),
            "0000000000000000",
            "the {what} has privileges"
        );
    }

    home.smolvm(["cp", "/etc/hostname", "box:/root/copied"])
        .run()
        .ok();
    home.smolvm(["cp", "box:/root/copied", &text(&here.join("back"))])
        .run()
        .ok();
    assert_eq!(
        fs::read(here.join("back")).expect("the file came back"),
        fs::read("/etc/hostname").expect("a file")
    );
    home.smolvm(["stop", "box"]).run().ok();
    home.smolvm(["start", "box"]).run().ok();
    assert_eq!(
        home.sh("box", "cat /root/copied"),
        fs::read_to_string("/etc/hostname").expect("text")
    );
    home.rm(&["box"]);
    home.is_clean();

    let closed = here.join("closed");
    fs::create_dir(&closed).expect("a directory");
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o555)).expect("a mode");
    let refused = home
        .smolvm_in(&closed.join("data"), ["--json", "ls"])
        .run()
        .ok();
    assert_eq!(refused.json()["data"]["vms"], serde_json::json!([]));
    let refused = home
        .smolvm_in(&closed.join("data"), ["--json", "create"])
        .run()
        .expect(1);
    assert_eq!(
        refused.json()["error"]["details"]["kind"],
        "permission_denied",
        "{refused}"
    );
}

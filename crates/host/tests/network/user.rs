//! An ordinary user's network: namespaces of its own, and pasta between them and the host.

use std::io::{BufRead as _, BufReader, Read as _};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::lab::{HELLO_PORT, HOST, Lab, OTHER_SERVER, PATIENCE, SERVER, may_run};

/// The user `nobody`, who may do nothing.
const NOBODY: &str = "65534";

/// Starts the example as `nobody`, with a /dev/net/tun that everybody may open, as hosts have it.
fn start(lab: &Lab, device: &Path, targets: &[String]) -> Child {
    let here = std::env::current_exe().expect("this program");
    let built = here
        .parent()
        .and_then(Path::parent)
        .expect("the build's folder");
    // Nobody may enter the folder where it was built.
    let example = device.with_file_name("example");
    std::fs::copy(built.join("examples/network-of-a-user"), &example).expect("a copy");
    let script = "mount --bind \"$0\" /dev/net/tun && exec setpriv --reuid \"$1\" --regid \"$1\" \
                  --clear-groups \"${@:2}\"";
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "bash", "-c", script])
        .arg(device)
        .arg(NOBODY)
        .arg(&example)
        .arg("/usr/bin/pasta")
        .args(targets)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    lab.host.run(move || command.spawn().expect("started"))
}

fn device(dir: &tempfile::TempDir) -> std::path::PathBuf {
    let path = dir.path().join("tun");
    let node = Command::new("mknod")
        .arg(&path)
        .args(["c", "10", "200"])
        .status();
    assert!(node.expect("mknod").success());
    let everybody = std::fs::Permissions::from_mode;
    std::fs::set_permissions(&path, everybody(0o666)).expect("opened");
    std::fs::set_permissions(dir.path(), everybody(0o755)).expect("opened");
    path
}

/// What setting up a network leaves traces in; neighbours come and go by themselves.
fn picture(lab: &Lab) -> String {
    [
        "ip link",
        "ip -4 address",
        "ip -4 route show table all",
        "nft list ruleset",
    ]
    .map(|command| lab.host.sh(command))
    .concat()
}

/// The processes below a process.
fn children(of: u32) -> Vec<OwnedFd> {
    let listed = Command::new("pgrep")
        .args(["--parent", &of.to_string()])
        .output()
        .expect("pgrep");
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    let open = |pid: &str| {
        let pid = pid.parse().ok().and_then(Pid::from_raw).expect("a number");
        pidfd_open(pid, PidfdFlags::empty()).expect("a process")
    };
    text.lines().map(open).collect()
}

#[test]
fn an_ordinary_users_network_reaches_the_world_and_not_the_host_and_leaves_nothing() {
    if !may_run() {
        return;
    }
    let lab = Lab::new();
    let before = picture(&lab);
    let dir = tempfile::tempdir().expect("a directory");
    let device = device(&dir);
    let targets = [SERVER, OTHER_SERVER, HOST].map(|address| format!("{address}:{HELLO_PORT}"));
    for killed in [false, true] {
        let mut child = start(&lab, &device, &targets);
        let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        let mut next = || lines.next().expect("a line").expect("text");
        // The server sees the host: what leaves is the user's own connection.
        assert_eq!(next(), format!("{SERVER}:{HELLO_PORT}: {HOST}"));
        assert_eq!(next(), format!("{OTHER_SERVER}:{HELLO_PORT}: {HOST}"));
        // Somebody listens there on the host, and nobody in the namespace.
        assert_eq!(next(), format!("{HOST}:{HELLO_PORT}: connection refused"));
        let address = next();
        let address = address.strip_prefix("listening on ").expect("an address");
        let address = address.to_owned();
        let said = lab.host.run(move || {
            let mut said = String::new();
            let mut stream = TcpStream::connect(address).expect("a connection");
            stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
            let mut hello = [0; 5];
            stream.read_exact(&mut hello).expect("a word");
            said.push_str(&String::from_utf8_lossy(&hello));
            said
        });
        assert_eq!(said, "hello");
        assert_eq!(picture(&lab), before, "the host is as it was");
        let helpers = children(child.id());
        assert_eq!(helpers.len(), 1);
        if killed {
            child.kill().expect("killed");
        } else {
            drop(child.stdin.take());
        }
        child.wait().expect("ended");
        for process in helpers {
            let patience = Timespec::try_from(PATIENCE).expect("a time");
            let mut ended = [PollFd::new(&process, PollFlags::IN)];
            poll(&mut ended, Some(&patience)).expect("a wait");
            assert!(!ended[0].revents().is_empty(), "pasta outlives the network");
        }
    }
    assert_eq!(picture(&lab), before);
}

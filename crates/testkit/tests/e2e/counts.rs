//! How many processes things take. Counts are not noisy, so they may be asserted.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use smolvm_testkit::{Home, Invocation, Running};

/// strace(1).
///
/// # Panics
///
/// If it is not there.
pub(crate) fn strace() -> Invocation {
    assert!(
        std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
            .any(|dir| dir.join("strace").is_file()),
        "this test watches system calls with strace; install Debian's package `strace`"
    );
    Invocation::new("strace")
}

/// `smolvm` under strace(1), which writes the system calls named by `what` to `log`.
fn traced(home: &Home, what: &str, log: &Path, args: &[&str]) -> Running {
    strace()
        .args([
            "--follow-forks",
            "--seccomp-bpf",
            "--quiet=all",
            "--string-limit=4096",
        ])
        .args([
            format!("--trace={what}"),
            format!("--output={}", log.display()),
        ])
        .args([
            &home.binaries().smolvm(),
            Path::new("--data-dir"),
            home.data(),
        ])
        .args(args)
        .spawn()
}

/// The programs a trace shows being executed, by their names. A call that another process's call
/// interrupts is written in two lines: `1 execve("/a"… <unfinished ...>`, `1 <... execve resumed>…`.
fn executed(log: &Path) -> Vec<String> {
    let text = fs::read_to_string(log).expect("a trace");
    let mut begun: HashMap<&str, &str> = HashMap::new();
    let mut names = Vec::new();
    for line in text.lines() {
        let Some((process, call)) = line.split_once(' ') else {
            continue;
        };
        let call = call.trim_start();
        if let Some((path, _)) = call
            .strip_prefix("execve(\"")
            .and_then(|rest| rest.split_once('"'))
        {
            begun.insert(process, path);
        }
        if call.contains("execve") && line.ends_with(" = 0") {
            let path = begun.remove(process).expect("a call that began");
            names.push(path.rsplit('/').next().unwrap_or_default().to_owned());
        }
    }
    names
}

/// Lines of a trace that show a new process; a thread is none.
fn forked(log: &Path) -> Vec<String> {
    let text = fs::read_to_string(log).expect("a trace");
    text.lines()
        .filter(|line| {
            ["fork(", "vfork(", "clone(", "clone3("]
                .iter()
                .any(|call| line.contains(call))
        })
        .filter(|line| !line.contains("CLONE_THREAD"))
        .map(str::to_owned)
        .collect()
}

#[test]
fn commands_that_only_look_start_no_process() {
    let home = Home::new(0);
    let log = home.scratch().join("trace");
    for args in [
        &["--version"][..],
        &["ls"],
        &["ls", "--all", "--json"],
        &["image", "list"],
    ] {
        traced(&home, "process", &log, args).wait().ok();
        assert_eq!(executed(&log), ["smolvm"], "`smolvm {args:?}`");
        assert_eq!(forked(&log), Vec::<String>::new(), "`smolvm {args:?}`");
    }
}

#[test]
fn a_sandbox_is_a_keeper_and_a_machine_and_a_command_in_it_is_no_process_here() {
    let home = Home::new(1);
    // The empty disk of each size is made once, for all sandboxes after.
    home.create("first", &[]);
    home.rm(&["first"]);
    let create_log = home.scratch().join("create");
    let exec_log = home.scratch().join("exec");
    let create = traced(&home, "process", &create_log, &["create", "--name", "box"]);
    create.wait_for("box\n");
    traced(&home, "process", &exec_log, &["exec", "box", "--", "true"])
        .wait()
        .ok();
    assert_eq!(executed(&exec_log), ["smolvm"]);
    assert_eq!(forked(&exec_log), Vec::<String>::new());
    let machine = match home.info("box").json["backend"].as_str() {
        Some("firecracker") => "firecracker",
        _ => "qemu-system-x86_64",
    };
    // The trace ends when the last process it follows has ended.
    home.rm(&["box"]);
    create.wait().ok();
    assert_eq!(executed(&create_log), ["smolvm", "smolvm-keeper", machine]);
    assert_eq!(forked(&create_log).len(), 2, "{:#?}", forked(&create_log));
}

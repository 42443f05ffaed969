//! The help of every command, whole. It is the manual most users ever read.

mod support;

use support::Home;

/// Every command but the short forms that share the text of their long form.
const COMMANDS: [&str; 78] = [
    "",
    "run",
    "create",
    "exec",
    "shell",
    "ssh",
    "ssh-config",
    "cp",
    "ls",
    "info",
    "logs",
    "start",
    "stop",
    "pause",
    "resume",
    "fork",
    "rm",
    "commit",
    "sandbox",
    "sandbox create",
    "sandbox list",
    "sandbox delete",
    "sandbox exec",
    "sandbox resize",
    "sandbox prune",
    "computer",
    "file",
    "file upload",
    "file download",
    "file ls",
    "snapshot",
    "snapshot create",
    "snapshot list",
    "snapshot restore",
    "snapshot delete",
    "pool",
    "pool set",
    "pool list",
    "pool delete",
    "port",
    "port expose",
    "port close",
    "port list",
    "volume",
    "volume create",
    "volume list",
    "volume inspect",
    "volume delete",
    "volume prune",
    "network",
    "network show",
    "network set",
    "network log",
    "network reset",
    "image",
    "image list",
    "image pull",
    "image build",
    "image inspect",
    "image load",
    "image save",
    "image tag",
    "image prune",
    "image delete",
    "kernel",
    "kernel build",
    "kernel list",
    "kernel delete",
    "template",
    "template build",
    "template list",
    "template delete",
    "doctor",
    "setup",
    "completion",
    "bench",
    "bench lifecycle",
    "bench files",
];

#[test]
fn every_command_explains_itself() {
    let home = Home::new();
    for command in COMMANDS {
        let mut args: Vec<&str> = command.split_whitespace().collect();
        args.push("--help");
        let name = if command.is_empty() {
            "smolvm"
        } else {
            command
        };
        insta::assert_snapshot!(name.replace(' ', "_"), home.run(&args));
    }
    assert!(!home.path("data").exists(), "help needs no state");
}

#[test]
fn a_command_without_its_verb_prints_its_help() {
    let home = Home::new();
    for command in [
        "", "sandbox", "computer", "file", "snapshot", "pool", "port", "volume", "network",
        "image", "kernel", "template", "bench",
    ] {
        let mut args: Vec<&str> = command.split_whitespace().collect();
        let output = home.command(&args).output().expect("smolvm runs");
        args.push("-h");
        let help = home.command(&args).output().expect("smolvm runs");
        assert!(output.status.success(), "`smolvm {command}` is no mistake");
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&help.stdout),
            "`smolvm {command}`"
        );
    }
}

#[test]
fn the_version_is_one_line() {
    let home = Home::new();
    insta::assert_snapshot!(home.run(&["-V"]), @r"
        $ smolvm -V
        smolvm [VERSION]
        --- exit 0
    ");
}

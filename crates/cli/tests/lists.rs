//! Lists of nothing, and the scripts of the shells: what works on a host that has nothing yet.

mod support;

use support::Home;

#[test]
fn an_empty_store_is_listed_without_making_it() {
    let home = Home::new();
    insta::assert_snapshot!(home.run(&["ls"]), @r"
        $ smolvm ls
        NAME   STATE   IMAGE   CPUS   MEMORY   CREATED
        --- exit 0
    ");
    insta::assert_snapshot!(home.run(&["computer", "list", "--json", "--all"]), @r#"
        $ smolvm computer list --json --all
        {
          "ok": true,
          "command": "sandbox.list",
          "exit_code": 0,
          "data": {
            "filters": {
              "all": true,
              "status": null,
              "preset": null
            },
            "vms": []
          },
          "error": null
        }
        --- exit 0
    "#);
    insta::assert_snapshot!(home.run(&["ls", "--names", "--status", "stopped"]), @r"
        $ smolvm ls --names --status stopped
        --- exit 0
    ");
    insta::assert_snapshot!(home.run(&["image", "list"]), @r"
        $ smolvm image list
        NAME   DIGEST   SIZE   CREATED   SOURCE
        --- exit 0
    ");
    insta::assert_snapshot!(home.run(&["image", "list", "--json"]), @r#"
        $ smolvm image list --json
        {
          "ok": true,
          "command": "image.list",
          "exit_code": 0,
          "data": {
            "images": []
          },
          "error": null
        }
        --- exit 0
    "#);
    insta::assert_snapshot!(home.run(&["kernel", "ls"]), @r"
        $ smolvm kernel ls
        KEY   RELEASE   SIZE   DEFAULT   SANDBOXES   SOURCE
        --- exit 0
    ");
    insta::assert_snapshot!(home.run(&["kernel", "ls", "--json"]), @r#"
        $ smolvm kernel ls --json
        {
          "ok": true,
          "command": "kernel.list",
          "exit_code": 0,
          "data": {
            "kernels": []
          },
          "error": null
        }
        --- exit 0
    "#);
    insta::assert_snapshot!(home.run(&["template", "ls"]), @r"
        $ smolvm template ls
        ID   IMAGE   KERNEL   CPUS   MEMORY   DISK   SIZE   CREATED   STATE
        --- exit 0
    ");
    insta::assert_snapshot!(home.run(&["template", "list", "--json"]), @r#"
        $ smolvm template list --json
        {
          "ok": true,
          "command": "template.list",
          "exit_code": 0,
          "data": {
            "templates": []
          },
          "error": null
        }
        --- exit 0
    "#);
    insta::assert_snapshot!(home.run(&["template", "rm", "--all"]), @r"
        $ smolvm template rm --all
        --- exit 0
    ");
    insta::assert_snapshot!(home.run(&["prune", "--dry-run"]), @r"
        $ smolvm prune --dry-run
        --- stderr
        0 would be removed, 0 B
        --- exit 0
    ");
    assert!(!home.path("data").exists(), "listing makes nothing");
}

#[test]
fn both_forms_of_a_command_answer_alike() {
    let home = Home::new();
    for (short, long) in [
        (&["ls", "--json"][..], &["sandbox", "list", "--json"][..]),
        (
            &["info", "x", "--json"],
            &["sandbox", "info", "x", "--json"],
        ),
        (
            &["rm", "x", "--json"],
            &["computer", "delete", "x", "--json"],
        ),
        (&["prune", "--json"], &["sandbox", "prune", "--json"]),
        (
            &["commit", "x", "y", "--json"],
            &["sandbox", "commit", "x", "y", "--json"],
        ),
        (
            &["exec", "x", "--json", "y"],
            &["sandbox", "exec", "x", "--json", "y"],
        ),
    ] {
        let [short, long] =
            [short, long].map(|args| home.command(args).output().expect("smolvm runs"));
        assert_eq!(short, long);
    }
}

#[test]
fn every_shell_has_a_script() {
    let home = Home::new();
    for shell in ["bash", "zsh", "fish"] {
        let output = home
            .command(&["completion", shell])
            .output()
            .expect("smolvm runs");
        assert!(output.status.success(), "{shell}");
        let script = String::from_utf8_lossy(&output.stdout);
        assert!(script.contains("_SMOLVM_COMPLETE"), "{shell}: {script}");
        assert!(output.stderr.is_empty(), "{shell}");
    }
    insta::assert_snapshot!(home.run(&["completion", "tcsh"]), @r"
        $ smolvm completion tcsh
        --- stderr
        error: invalid value 'tcsh' for '<SHELL>'
          [possible values: bash, zsh, fish]

          tip: a similar value exists: 'zsh'

        For more information, try '--help'.
        --- exit 2
    ");
}

#[test]
fn a_shell_gets_candidates() {
    let home = Home::new();
    let output = home
        .command(&["--", "smolvm", "st"])
        .env("_SMOLVM_COMPLETE", "bash")
        .env("_CLAP_COMPLETE_INDEX", "1")
        .env("_CLAP_IFS", "\n")
        .output()
        .expect("smolvm runs");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "start\nstop");
}

#[test]
fn data_and_words_do_not_mix() {
    let home = Home::new();
    let output = home
        .command(&["--json", "doctor"])
        .output()
        .expect("smolvm runs");
    assert!(
        output.stderr.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let one: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one object");
    assert_eq!(one["command"], "doctor");
    assert_eq!(one["exit_code"], 1);
}

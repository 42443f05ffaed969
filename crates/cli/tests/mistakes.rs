//! What a person sees who made a mistake: whole, with the exit code.

mod support;

use std::process::Stdio;

use support::Home;

#[test]
fn command_lines_that_do_not_parse() {
    let home = Home::new();
    insta::assert_snapshot!(home.run(&["frobnicate"]), @r"
        $ smolvm frobnicate
        --- stderr
        error: unrecognized subcommand 'frobnicate'

        Usage: smolvm [OPTIONS] [COMMAND]

        For more information, try '--help'.
        --- exit 2
    ");
    insta::assert_snapshot!(home.run(&["run"]), @r"
        $ smolvm run
        --- stderr
        error: no command was given, and image `debian-12` has none of its own
        hint: smolvm run -- COMMAND
        --- exit 2
    ");
    insta::assert_snapshot!(home.run(&["run", "--memory", "lots", "true"]), @r"
        $ smolvm run --memory lots true
        --- stderr
        error: invalid value 'lots' for '--memory <SIZE>': `lots` is not a size; write 512, 512M or 4G (a bare number is MiB)

        For more information, try '--help'.
        --- exit 2
    ");
    insta::assert_snapshot!(home.run(&["run", "--timeout", "0", "true"]), @r"
        $ smolvm run --timeout 0 true
        --- stderr
        error: invalid value '0' for '--timeout <TIME>': a limit of zero allows nothing; leave the flag out for no limit

        For more information, try '--help'.
        --- exit 2
    ");
    insta::assert_snapshot!(home.run(&["stop", "box", "--now", "--timeout", "5s"]), @r"
        $ smolvm stop box --now --timeout 5s
        --- stderr
        error: the argument '--now' cannot be used with '--timeout <TIME>'

        Usage: smolvm stop --now <NAME>

        For more information, try '--help'.
        --- exit 2
    ");
}

#[test]
fn command_lines_that_do_not_parse_as_json() {
    let home = Home::new();
    insta::assert_snapshot!(home.run(&["rm", "--json"]), @r#"
    $ smolvm rm --json
    {
      "ok": false,
      "command": "sandbox.delete",
      "exit_code": 2,
      "data": null,
      "error": {
        "code": "usage_error",
        "message": "the following required arguments were not provided: <NAME|--all>",
        "recovery": "add --help for the arguments of a command"
      }
    }
    --- exit 2
    "#);
    insta::assert_snapshot!(home.run(&["--json", "computer", "list", "--bad"]), @r#"
        $ smolvm --json computer list --bad
        {
          "ok": false,
          "command": "sandbox.list",
          "exit_code": 2,
          "data": null,
          "error": {
            "code": "usage_error",
            "message": "unexpected argument '--bad' found",
            "recovery": "add --help for the arguments of a command"
          }
        }
        --- exit 2
    "#);
    // This --json belongs to the guest's command.
    insta::assert_snapshot!(home.run(&["exec", "--bad", "--", "x", "--json"]), @r"
        $ smolvm exec --bad -- x --json
        --- stderr
        error: unexpected argument '--bad' found

          tip: to pass '--bad' as a value, use '-- --bad'

        Usage: smolvm exec [OPTIONS] <NAME> <COMMAND>...

        For more information, try '--help'.
        --- exit 2
    ");
}

#[test]
fn images_that_cannot_be_made_or_removed() {
    let home = Home::new();
    insta::assert_snapshot!(home.run(&["commit", "box", "Docker.io/Image"]), @r"
        $ smolvm commit box Docker.io/Image
        --- stderr
        error: `Docker.io/Image` is not the name of an image
        hint: use lower-case letters, digits, `.`, `-` and `_`, beginning and ending with a letter or digit; a tag may follow, as in `tools:v2`, and an owner or registry come before, as in `registry.example/me/tools:v2`
        --- exit 2
    ");
    insta::assert_snapshot!(home.run(&["commit", "box", "tools:v1"]), @r"
        $ smolvm commit box tools:v1
        --- stderr
        error: there is no sandbox named `box`
        hint: see the sandboxes with `smolvm ls --all`
        --- exit 1
    ");
    insta::assert_snapshot!(home.run(&["image", "rm", "tools:v1"]), @r"
        $ smolvm image rm tools:v1
        --- stderr
        error: there is no image named `tools:v1`
        hint: see the images with `smolvm image list`; the default is `debian-12`
        --- exit 1
    ");
    insta::assert_snapshot!(home.run(&["image", "rm", "tools:v1", "--json"]), @r#"
        $ smolvm image rm tools:v1 --json
        {
          "ok": false,
          "command": "image.delete",
          "exit_code": 1,
          "data": {
            "deleted": [],
            "digests": [],
            "freed_bytes": 0
          },
          "error": {
            "code": "not_found",
            "message": "there is no image named `tools:v1`",
            "recovery": "see the images with `smolvm image list`; the default is `debian-12`",
            "details": {
              "kind": "not_found"
            }
          }
        }
        --- exit 1
    "#);
    assert!(!home.path("data").exists(), "nothing was made for it");
}

#[test]
fn templates_that_are_not_there() {
    let home = Home::new();
    insta::assert_snapshot!(home.run(&["template", "rm"]), @r"
        $ smolvm template rm
        --- stderr
        error: the following required arguments were not provided:
          <ID|--all>

        Usage: smolvm template delete <ID|--all>

        For more information, try '--help'.
        --- exit 2
    ");
    insta::assert_snapshot!(home.run(&["template", "rm", "0123456789abcdef"]), @r"
        $ smolvm template rm 0123456789abcdef
        --- stderr
        error: there is no template `0123456789abcdef`
        hint: see the templates with `smolvm template ls`
        --- exit 1
    ");
    // It would be pulled, from a registry that is not there.
    insta::assert_snapshot!(home.run(&["template", "build", "127.0.0.1:1/tools:v1"]), @r"
        $ smolvm template build 127.0.0.1:1/tools:v1
        --- stderr
        image 127.0.0.1:1/tools:v1: asking 127.0.0.1:1
        error: cannot pull 127.0.0.1:1/tools:v1
        caused by: asking 127.0.0.1:1: io: Connection refused (os error 111)
        --- exit 1
    ");
    insta::assert_snapshot!(home.run(&["template", "build", "--memory", "64"]), @r"
        $ smolvm template build --memory 64
        --- stderr
        error: memory of 64 MiB is below the least, 128 MiB
        hint: give --memory a value from 128 to 32768
        --- exit 2
    ");
    assert!(!home.path("data").exists(), "nothing was made for it");
}

#[test]
fn values_out_of_bounds() {
    let home = Home::new();
    insta::assert_snapshot!(home.run(&["create", "--name", "Box!"]), @r"
        $ smolvm create --name Box!
        --- stderr
        error: `Box!` is not a sandbox name
        hint: use 1 to 64 lower-case letters, digits, `-` and `_`, beginning and ending with a letter or digit
        --- exit 2
    ");
    insta::assert_snapshot!(home.run(&["run", "--memory", "64", "true"]), @r"
        $ smolvm run --memory 64 true
        --- stderr
        error: memory of 64 MiB is below the least, 128 MiB
        hint: give --memory a value from 128 to 32768
        --- exit 2
    ");
    insta::assert_snapshot!(home.run(&["create", "--memory", "33G", "--json"]), @r#"
        $ smolvm create --memory 33G --json
        {
          "ok": false,
          "command": "sandbox.create",
          "exit_code": 2,
          "data": null,
          "error": {
            "code": "invalid_input",
            "message": "memory of 33792 MiB is above the most, 32768 MiB",
            "recovery": "give --memory a value from 128 to 32768",
            "details": {
              "kind": "invalid_input"
            }
          }
        }
        --- exit 2
    "#);
    insta::assert_snapshot!(home.run(&["run", "--cpus", "0", "true"]), @r"
        $ smolvm run --cpus 0 true
        --- stderr
        error: CPUs of 0 is below the least, 1
        hint: give --cpus a value from 1 to 32
        --- exit 2
    ");
    insta::assert_snapshot!(home.run(&["run", "-w", "tmp", "true"]), @r"
        $ smolvm run -w tmp true
        --- stderr
        error: working directory `tmp` is not an absolute path
        hint: give a path in the guest that begins with `/`
        --- exit 2
    ");
    insta::assert_snapshot!(home.run(&["run", "-e", "=x", "true"]), @r"
        $ smolvm run -e =x true
        --- stderr
        error: `` is not an environment variable
        hint: use --env NAME=VALUE
        --- exit 2
    ");
    insta::assert_snapshot!(home.run(&["run", "--env-file", "missing", "true"]), @r"
        $ smolvm run --env-file missing true
        --- stderr
        error: reading environment file missing
        caused by: No such file or directory (os error 2)
        --- exit 125
    ");
    assert!(!home.path("data").exists(), "nothing was begun");
}

#[test]
fn flags_that_make_no_sense_together() {
    let home = Home::new();
    insta::assert_snapshot!(home.run(&["shell", "box", "--json"]), @r#"
        $ smolvm shell box --json
        {
          "ok": false,
          "command": "sandbox.shell",
          "exit_code": 2,
          "data": null,
          "error": {
            "code": "usage_error",
            "message": "a shell cannot be used with --json: a terminal's output is not data",
            "recovery": "smolvm exec --json box -- COMMAND"
          }
        }
        --- exit 2
    "#);
    insta::assert_snapshot!(home.run(&["run", "-t", "--json", "true"]), @r#"
        $ smolvm run -t --json true
        {
          "ok": false,
          "command": "run",
          "exit_code": 2,
          "data": null,
          "error": {
            "code": "usage_error",
            "message": "--tty and --json cannot be used together: a terminal's output is not data",
            "recovery": "leave one of them out"
          }
        }
        --- exit 2
    "#);
    insta::assert_snapshot!(home.run(&["logs", "-f", "box", "--json"]), @r#"
        $ smolvm logs -f box --json
        {
          "ok": false,
          "command": "sandbox.logs",
          "exit_code": 2,
          "data": null,
          "error": {
            "code": "usage_error",
            "message": "--follow and --json cannot be used together: one object has an end",
            "recovery": "leave one of them out"
          }
        }
        --- exit 2
    "#);
    insta::assert_snapshot!(home.run(&["cp", "a", "b"]), @r"
        $ smolvm cp a b
        --- stderr
        error: neither side is in a sandbox
        hint: write one of them as NAME:/path
        --- exit 2
    ");
    insta::assert_snapshot!(home.run(&["cp", "a:/x", "b:/y"]), @r"
        $ smolvm cp a:/x b:/y
        --- stderr
        error: both sides are in a sandbox
        hint: copy out of the one first, then into the other
        --- exit 2
    ");
}

#[test]
fn sandboxes_that_are_not_there() {
    let home = Home::new();
    insta::assert_snapshot!(home.run(&["info", "box"]), @r"
        $ smolvm info box
        --- stderr
        error: there is no sandbox named `box`
        hint: see the sandboxes with `smolvm ls --all`
        --- exit 1
    ");
    insta::assert_snapshot!(home.run(&["info", "box", "--json"]), @r#"
        $ smolvm info box --json
        {
          "ok": false,
          "command": "sandbox.info",
          "exit_code": 1,
          "data": null,
          "error": {
            "code": "not_found",
            "message": "there is no sandbox named `box`",
            "recovery": "see the sandboxes with `smolvm ls --all`",
            "details": {
              "kind": "not_found"
            }
          }
        }
        --- exit 1
    "#);
    insta::assert_snapshot!(home.run(&["exec", "box", "true"]), @r"
        $ smolvm exec box true
        --- stderr
        error: there is no sandbox named `box`
        hint: see the sandboxes with `smolvm ls --all`
        --- exit 125
    ");
    insta::assert_snapshot!(home.run(&["rm", "box", "other", "box"]), @r"
        $ smolvm rm box other box
        --- stderr
        error: there is no sandbox named `box`
        hint: see the sandboxes with `smolvm ls --all`
        error: there is no sandbox named `other`
        hint: see the sandboxes with `smolvm ls --all`
        error: 2 of 2 sandboxes were not deleted
        --- exit 1
    ");
    insta::assert_snapshot!(home.run(&["rm", "box", "--json"]), @r#"
    $ smolvm rm box --json
    {
      "ok": false,
      "command": "sandbox.delete",
      "exit_code": 1,
      "data": {
        "targets": [
          "box"
        ],
        "deleted": [],
        "failed": [
          {
            "name": "box",
            "error": {
              "code": "not_found",
              "message": "there is no sandbox named `box`",
              "recovery": "see the sandboxes with `smolvm ls --all`",
              "details": {
                "kind": "not_found"
              }
            }
          }
        ],
        "summary": {
          "requested": 1,
          "deleted": 0,
          "failed": 1
        },
        "dry_run": false,
        "reconciled_stale_ids": []
      },
      "error": {
        "code": "not_found",
        "message": "there is no sandbox named `box`",
        "recovery": "see the sandboxes with `smolvm ls --all`",
        "details": {
          "kind": "not_found"
        }
      }
    }
    --- exit 1
    "#);
    for args in [
        &["start", "box"][..],
        &["stop", "box"],
        &["logs", "box"],
        &["logs", "-f", "box"],
        &["cp", "box:/a", "."],
        &["file", "upload", "box", "a", "/a"],
        &["file", "download", "box", "/a", "a"],
        &["file", "ls", "box"],
    ] {
        let output = home.command(args).output().expect("smolvm runs");
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(
            errors.starts_with("error: there is no sandbox named `box`\n"),
            "{errors}"
        );
    }
    let exec = home
        .command(&["exec", "box", "true"])
        .output()
        .expect("smolvm runs");
    assert_eq!(
        exec.status.code(),
        Some(125),
        "1 would be the command's own"
    );
    // The test has no terminal to give.
    let shell = home
        .command(&["shell", "box"])
        .output()
        .expect("smolvm runs");
    assert_eq!(shell.status.code(), Some(2));
    let errors = String::from_utf8_lossy(&shell.stderr);
    assert!(errors.contains("needs a terminal"), "{errors}");
}

#[test]
fn a_host_without_our_programs() {
    let home = Home::new();
    let output = home
        .command(&["doctor", "--json"])
        .output()
        .expect("smolvm runs");
    assert_eq!(output.status.code(), Some(1));
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let checks = answer["data"]["checks"].as_array().expect("checks");
    let qemu = checks
        .iter()
        .find(|check| check["name"] == "qemu-system-x86_64")
        .expect("a check of QEMU");
    assert_eq!(qemu["status"], "fail", "{qemu}");
    assert!(qemu["fix"].is_string(), "{qemu}");
}

#[test]
fn a_host_without_kernel_and_image() {
    let home = Home::new();
    let output = home
        .command(&["setup", "--check-only", "--json"])
        .output()
        .expect("smolvm runs");
    assert_eq!(output.status.code(), Some(1));
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(answer["error"]["code"], "missing_dependency");
    let missing = &answer["data"]["missing_assets"];
    assert_eq!(*missing, serde_json::json!(["kernel", "image debian-12"]));
    assert!(!home.path("data").exists(), "checking makes nothing");
}

#[test]
fn a_data_directory_that_cannot_be_made() {
    let home = Home::new();
    // A file in its way stops root too.
    std::fs::write(home.path("file"), "").expect("a file");
    let dir = home.path("file/data");
    let dir = dir.to_str().expect("text");
    insta::assert_snapshot!(home.run(&["create", "--data-dir", dir]), @r"
        $ smolvm create --data-dir [HOME]/file/data
        --- stderr
        error: could not look for the state database [HOME]/file/data/state.db
        caused by: Not a directory (os error 20)
        hint: choose another directory with --data-dir or SMOLVM_DATA_DIR
        --- exit 2
    ");
    insta::assert_snapshot!(home.run(&["run", "--data-dir", dir, "--json", "true"]), @r#"
        $ smolvm run --data-dir [HOME]/file/data --json true
        {
          "ok": false,
          "command": "run",
          "exit_code": 2,
          "data": null,
          "error": {
            "code": "invalid_input",
            "message": "could not look for the state database [HOME]/file/data/state.db",
            "recovery": "choose another directory with --data-dir or SMOLVM_DATA_DIR",
            "details": {
              "kind": "invalid_input",
              "causes": [
                "Not a directory (os error 20)"
              ]
            }
          }
        }
        --- exit 2
    "#);
}

#[test]
fn deleting_all_of_nothing_is_no_mistake() {
    let home = Home::new();
    insta::assert_snapshot!(home.run(&["rm", "--all"]), @r"
        $ smolvm rm --all
        --- exit 0
    ");
    insta::assert_snapshot!(home.run(&["rm", "--all", "box"]), @r"
        $ smolvm rm --all box
        --- stderr
        error: the argument '--all' cannot be used with '[NAME]...'

        Usage: smolvm rm <NAME|--all>

        For more information, try '--help'.
        --- exit 2
    ");
}

#[test]
fn a_reader_that_went_away_is_not_complained_about() {
    let home = Home::new();
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let output = home
        .command(&["ls"])
        .stdout(Stdio::from(writer))
        .stderr(Stdio::piped())
        .output()
        .expect("smolvm runs");
    assert_eq!(output.status.code(), Some(141));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

#[test]
fn kernels_that_are_not_there() {
    let home = Home::new();
    insta::assert_snapshot!(home.run(&["kernel", "rm", "small-1"]), @r"
        $ smolvm kernel rm small-1
        --- stderr
        error: there is no kernel named `small-1`
        hint: see the kernels with `smolvm kernel ls`
        --- exit 1
    ");
    insta::assert_snapshot!(home.run(&["run", "--kernel", "docker", "true"]), @r"
        $ smolvm run --kernel docker true
        --- stderr
        error: there is no docker kernel yet
        hint: build it with `smolvm kernel build --docker`
        --- exit 125
    ");
    assert!(!home.path("data/kernels").exists(), "looking makes nothing");
}

#[test]
fn what_cannot_be_allowed_is_told_with_its_reason() {
    let home = Home::new();
    let mut told = String::new();
    for (verb, what) in [
        ("run", "2001:db8::1"),
        ("create", "pypi.org:443"),
        ("create", "10.0.0.0/33"),
        ("create", "127.0.0.1"),
        ("create", "*"),
    ] {
        told += &home.run(&[verb, "--allow", what]);
    }
    told += &home.run(&["network", "set", "box", "--allow", "a b"]);
    insta::assert_snapshot!(told);
    assert!(!home.path("data").exists(), "nothing was made");
}

#[test]
fn ports_that_cannot_be_published() {
    let home = Home::new();
    insta::assert_snapshot!(home.run(&["create", "-p", "localhost:80:80"]), @r"
        $ smolvm create -p localhost:80:80
        --- stderr
        error: `localhost:80:80` is not a port to publish: the host's address is no IPv4 address, nor an IPv6 one in brackets
        hint: use [IP:]HOST:GUEST, such as 8080:80, 0.0.0.0:8080:80 or 5353:53/udp
        --- exit 2
    ");
    insta::assert_snapshot!(home.run(&["create", "-p", "8080:80", "-p", "0.0.0.0:8080:81"]), @r"
        $ smolvm create -p 8080:80 -p 0.0.0.0:8080:81
        --- stderr
        error: 0.0.0.0:8080/tcp and 127.0.0.1:8080/tcp are one port
        hint: publish it once, or give the second another host port
        --- exit 2
    ");
    insta::assert_snapshot!(home.run(&["port", "expose", "box", "80/sctp"]), @r"
        $ smolvm port expose box 80/sctp
        --- stderr
        error: `80/sctp` is not a port to publish: the protocol is tcp or udp
        hint: use [IP:]HOST:GUEST, such as 8080:80, 0.0.0.0:8080:80 or 5353:53/udp
        --- exit 2
    ");
    insta::assert_snapshot!(home.run(&["port", "expose", "box", "80"]), @r"
        $ smolvm port expose box 80
        --- stderr
        error: there is no sandbox named `box`
        hint: see the sandboxes with `smolvm ls --all`
        --- exit 1
    ");
    insta::assert_snapshot!(home.run(&["port", "list", "box", "--json"]), @r#"
        $ smolvm port list box --json
        {
          "ok": false,
          "command": "port.list",
          "exit_code": 1,
          "data": null,
          "error": {
            "code": "not_found",
            "message": "there is no sandbox named `box`",
            "recovery": "see the sandboxes with `smolvm ls --all`",
            "details": {
              "kind": "not_found"
            }
          }
        }
        --- exit 1
    "#);
}

#[test]
fn settings_that_cannot_be() {
    let home = Home::new();
    std::fs::create_dir_all(home.path("data")).expect("a directory");
    let file = home.path("data/config.toml");
    std::fs::write(&file, "[ssh]\nport = \"2200-2999\"\n").expect("a file");
    let dir = home.path("data");
    let dir = dir.to_str().expect("text");
    insta::assert_snapshot!(home.run(&["ls", "--data-dir", dir]), @r#"
        $ smolvm ls --data-dir [HOME]/data
        --- stderr
        error: could not read the settings in [HOME]/data/config.toml
        caused by: TOML parse error at line 2, column 1: unknown field `port`, expected `ports`
        hint: the keys are `ports` in `[ssh]`, such as "2200-2999", `prefix` in `[network]`, such as "172.16.0.0/24", `mirrors`, `plain-http` and `authorities` in `[registries]`, and `jailer` and `users` in `[jail]`, such as "off" and "2000000-2065535"
        --- exit 2
    "#);
    std::fs::write(&file, "[network]\nprefix = \"127.0.0.0/8\"\n").expect("a file");
    insta::assert_snapshot!(home.run(&["ls", "--data-dir", dir, "--json"]), @r#"
        $ smolvm ls --data-dir [HOME]/data --json
        {
          "ok": false,
          "command": "sandbox.list",
          "exit_code": 2,
          "data": null,
          "error": {
            "code": "invalid_input",
            "message": "could not read the settings in [HOME]/data/config.toml",
            "recovery": "the keys are `ports` in `[ssh]`, such as \"2200-2999\", `prefix` in `[network]`, such as \"172.16.0.0/24\", `mirrors`, `plain-http` and `authorities` in `[registries]`, and `jailer` and `users` in `[jail]`, such as \"off\" and \"2000000-2065535\"",
            "details": {
              "kind": "invalid_input",
              "causes": [
                "TOML parse error at line 2, column 10: `127.0.0.0/8` is no pool: it holds loopback, link-local, multicast or reserved addresses"
              ]
            }
          }
        }
        --- exit 2
    "#);
    std::fs::write(&file, "[ssh]\nports = \"3000-3099\"\n").expect("a file");
    insta::assert_snapshot!(home.run(&["ls", "--data-dir", dir]), @r"
        $ smolvm ls --data-dir [HOME]/data
        NAME   STATE   IMAGE   CPUS   MEMORY   CREATED
        --- exit 0
    ");
}

//! `run` and `exec`: a command in a sandbox is a command.

use smolvm_testkit::Home;

#[test]
fn run_gives_the_commands_own_output_and_code_and_leaves_nothing() {
    let home = Home::new(1);
    let finished = home
        .smolvm(["run", "--", "sh", "-c", "echo out; echo err >&2; exit 7"])
        .run()
        .expect(7);
    assert_eq!(finished.out(), "out\n");
    assert_eq!(finished.err(), "err\n");
    home.is_clean();
}

#[test]
fn run_passes_standard_input_environment_directory_and_user_on() {
    let home = Home::new(1);
    let finished = home
        .smolvm([
            "run",
            "--env",
            "GIVEN=a b",
            "--env",
            "COPIED",
            "--workdir",
            "/usr/lib",
        ])
        .args(["--user", "nobody", "--", "sh", "-c"])
        .args(["cat; pwd; id -un; echo \"$GIVEN/$COPIED\""])
        .env("COPIED", "ours")
        .stdin("data\n")
        .run()
        .ok();
    assert_eq!(finished.out(), "data\n/usr/lib\nnobody\na b/ours\n");
    assert_eq!(finished.err(), "");
}

#[test]
fn exec_ends_as_the_command_does() {
    let home = Home::new(1);
    home.create("box", &["--env", "HERE=created"]);

    let check = |what: &str, args: &[&str], stdin: &str, code: i32, out: &str| {
        let finished = home.smolvm([&["exec"], args].concat()).stdin(stdin).run();
        assert_eq!(finished.code, Some(code), "{what}\n{finished}");
        assert_eq!(finished.out(), out, "{what}\n{finished}");
        finished
    };
    check(
        "standard input",
        &["box", "--", "cat"],
        "data\n",
        0,
        "data\n",
    );
    check("no standard input", &["box", "--", "cat"], "", 0, "");
    check(
        "python",
        &["box", "--", "python3", "-c", "print(6*7)"],
        "",
        0,
        "42\n",
    );
    check(
        "environment",
        &["--env", "A=1", "box", "--", "sh", "-c", "echo $A$HERE"],
        "",
        0,
        "1created\n",
    );
    check(
        "directory",
        &["--workdir", "/usr", "box", "--", "pwd"],
        "",
        0,
        "/usr\n",
    );
    check(
        "user",
        &["--user", "nobody", "box", "--", "id", "-u"],
        "",
        0,
        "65534\n",
    );
    check(
        "arguments as they are",
        &["box", "--", "printf", "%s|", "a b", "", "*", "$x"],
        "",
        0,
        "a b||*|$x|",
    );
    check(
        "the highest code",
        &["box", "--", "sh", "-c", "exit 255"],
        "",
        255,
        "",
    );
    check(
        "a signal",
        &["box", "--", "sh", "-c", "kill -KILL $$"],
        "",
        137,
        "",
    );

    let unknown = check(
        "an unknown program",
        &["box", "--", "no-such-program"],
        "",
        127,
        "",
    );
    assert!(unknown.err().contains("no-such-program"), "{unknown}");
    let refused = check(
        "what cannot be executed",
        &["box", "--", "/etc/passwd"],
        "",
        126,
        "",
    );
    assert!(refused.err().contains("/etc/passwd"), "{refused}");
    let late = check(
        "a timeout",
        &[
            "--timeout",
            "1s",
            "box",
            "--",
            "sh",
            "-c",
            "echo begun; sleep 1000",
        ],
        "",
        124,
        "begun\n",
    );
    assert!(late.err().contains("longer than 1s"), "{late}");
    let nobody = check(
        "an unknown user",
        &["--user", "who", "box", "--", "true"],
        "",
        2,
        "",
    );
    assert!(nobody.err().contains("who"), "{nobody}");

    let gone = home
        .exec("other", &["true"])
        .expect(125)
        .complains_of(&["other"]);
    assert_eq!(gone.out(), "");
    home.rm(&["box"]);
}

#[test]
fn a_timeout_kills_every_descendant() {
    let home = Home::new(1);
    home.create("box", &[]);
    home.smolvm(["exec", "--timeout", "1s", "box", "--", "sh", "-c"])
        .args(["setsid sleep 1000 & (sleep 1000 & sleep 1000)"])
        .run()
        .expect(124);
    assert_eq!(
        home.sh("box", "grep -lx sleep /proc/[0-9]*/comm || echo none"),
        "none\n"
    );
    home.rm(&["box"]);
}

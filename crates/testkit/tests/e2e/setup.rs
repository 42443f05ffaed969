//! `setup` on a host that is ready already.

use std::fs;
use std::path::Path;

use smolvm_testkit::{Home, digest, targz};

/// As `setup` takes it from its publisher, with a program of this host's for each of its own.
fn release(version: &str) -> Vec<u8> {
    let program = fs::read("/bin/true").expect("a program");
    let inside = |name: &str| format!("release-v{version}-x86_64/{name}-v{version}-x86_64");
    targz(&[
        (&inside("firecracker"), &program),
        (&inside("jailer"), &program),
    ])
}

#[test]
fn a_release_of_firecracker_is_taken_from_an_archive_once() {
    let home = Home::new(0);
    let (archive, bytes) = (home.scratch().join("an archive.tgz"), release("9.8.7"));
    fs::write(&archive, &bytes).expect("written");
    let digest = digest(&bytes);
    let digits = digest.trim_start_matches("sha256:");
    let wrong = "0".repeat(64);
    let setup = |form: &[&str], digits: &str| {
        let from = archive.to_str().expect("a path");
        let words = ["--firecracker=9.8.7", "--sha256", digits, "--from", from];
        home.smolvm([form, &["setup"], &words[..]].concat()).run()
    };
    let check = || {
        let words = [
            "setup",
            "--check-only",
            "--firecracker=9.8.7",
            "--sha256",
            digits,
        ];
        home.smolvm(words).run()
    };
    assert!(
        check()
            .expect(1)
            .out()
            .contains("missing: Firecracker 9.8.7")
    );
    setup(&[], &wrong).expect(2).complains_of(&[
        "its checksum is",
        digits,
        "Nothing of it was kept",
    ]);
    assert!(
        check()
            .expect(1)
            .out()
            .contains("missing: Firecracker 9.8.7")
    );

    for turn in 0..2 {
        let done = setup(&["--json"], digits).ok().json();
        let there = &done["data"]["firecracker"];
        assert_eq!(there["version"], "9.8.7");
        for program in ["firecracker", "jailer"] {
            let path = Path::new(there[program].as_str().expect("a path"));
            assert!(path.starts_with(home.data().join("engines")), "{path:?}");
            assert_eq!(fs::read(path).ok(), fs::read("/bin/true").ok());
        }
        let phases = done["data"]["phases"].as_array().expect("phases");
        assert_eq!(phases.is_empty(), turn == 1, "{phases:?}");
    }
    assert_eq!(check().ok().out(), "");
}

#[test]
fn which_release_is_meant_has_to_be_clear() {
    let home = Home::new(0);
    for (words, code, says) in [
        (&["--firecracker=1.2"][..], 2, "three numbers"),
        (
            &["--firecracker=0.1.0"],
            1,
            "checksum of that release is not known",
        ),
        (&["--firecracker", "--sha256", "00"], 2, "without a version"),
        (
            &["--firecracker=1.2.3", "--sha256", "00"],
            2,
            "64 hexadecimal digits",
        ),
        (&["--from", "x.tgz"], 2, "--firecracker"),
    ] {
        home.smolvm([&["setup", "--check-only"], words].concat())
            .run()
            .expect(code)
            .complains_of(&[says]);
    }
}

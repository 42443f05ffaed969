//! OCI images: loaded, pulled, saved and run.

use rustix::process::Signal;
use serde_json::json;
use smolvm_testkit::{Entries, Entry, Home, Registry, TestImage};

/// Names below the directory of images, but for locks and whole images.
fn leftovers(home: &Home) -> Vec<String> {
    let mut left = Vec::new();
    for dir in ["images", "images/downloads"] {
        let Ok(entries) = std::fs::read_dir(home.data().join(dir)) else {
            continue;
        };
        for entry in entries {
            let name = entry.expect("an entry").file_name();
            let name = name.to_string_lossy().into_owned();
            let lock = name.ends_with("lock") && !name.starts_with("pull-");
            let image = dir == "images" && name.starts_with("sha256-");
            if !(lock || image || name == "downloads") {
                left.push(name);
            }
        }
    }
    left
}

/// Words of a shell and what it says of itself.
fn small() -> TestImage {
    TestImage::busybox(json!({
        "User": "app", "WorkingDir": "/srv/app", "Env": ["PATH=/bin", "GREETING=hello"],
        "Cmd": ["sh", "-c", "echo $GREETING; id -un; pwd; echo /etc/h*"],
    }))
    .layer(&[
        (
            "etc/passwd",
            Entry::File(
                b"root:x:0:0::/:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n".to_vec(),
                0o644,
            ),
        ),
        ("bin/.wh.env", Entry::File(Vec::new(), 0o644)),
    ])
}

fn single() -> TestImage {
    TestImage::single(json!({
        "User": "65532:65532", "Entrypoint": ["/busybox", "echo"], "Cmd": ["of", "the", "image"],
    }))
}

#[test]
fn an_image_without_bash_and_one_without_anything_run_as_they_say() {
    let home = Home::new(1);
    let registry = Registry::start();
    let small = registry.put(&small(), "me/small", "1");
    let out = |args: &[&str]| home.smolvm(args).run().ok().out();
    assert_eq!(
        out(&["run", "--image", &small]),
        "hello\napp\n/srv/app\n/etc/hostname /etc/hosts\n"
    );
    assert_eq!(
        out(&[
            "run",
            "--image",
            &small,
            "--user",
            "root",
            "--workdir",
            "/",
            "--env",
            "GREETING=x",
            "--",
            "sh",
            "-c",
            "id -un; pwd; echo $GREETING; ls /bin",
        ]),
        "root\n/\nx\nbusybox\ncat\necho\nid\nls\npwd\nsh\n"
    );
    home.create("box", &["--image", &small]);
    let here = home
        .exec("box", &["sh", "-c", "id -un; pwd; echo $GREETING"])
        .ok()
        .out();
    assert_eq!(here, "app\n/srv/app\nhello\n");
    home.smolvm(["image", "rm", &small])
        .run()
        .expect(1)
        .complains_of(&["`box`"]);
    // A committed image keeps what it says.
    home.smolvm(["commit", "box", "again:1"]).run().ok();
    home.rm(&["box"]);
    let again = home.json(["image", "inspect", "again:1"]);
    assert_eq!(again["image"]["config"]["user"], "app");

    // No shell, no /etc, no /tmp, no user of that number.
    let archive = home.scratch().join("single.tar");
    std::fs::write(&archive, single().docker_archive(&["single:1"])).expect("a file");
    home.smolvm(["image", "load"]).args([&archive]).run().ok();
    assert_eq!(out(&["run", "--image", "single:1"]), "of the image\n");
    assert_eq!(
        out(&["run", "--image", "single:1", "--", "of", "mine"]),
        "of mine\n"
    );
    assert_eq!(
        out(&[
            "run",
            "--image",
            "single:1",
            "--entrypoint",
            "",
            "--",
            "/busybox",
            "id",
            "-u"
        ]),
        "65532\n"
    );
    home.smolvm(["run", "--image", "single:1", "--entrypoint", "/bin/sh"])
        .run()
        .expect(127)
        .complains_of(&["/bin/sh"]);
    assert_eq!(leftovers(&home), Vec::<String>::new());
}

#[test]
fn a_debian_image_goes_out_and_comes_back() {
    let home = Home::new(1);
    let archive = home.scratch().join("debian.tar");
    home.smolvm(["image", "save", "debian-12", "-o", "/dev/null"])
        .run()
        .expect(2)
        .complains_of(&["/dev/null is there and is no regular file"]);
    home.smolvm(["image", "save", "debian-12", "-o"])
        .args([&archive])
        .run()
        .ok();
    let loaded = home
        .smolvm(["--json", "image", "load", "--name", "debian:own"])
        .args([&archive])
        .run()
        .ok()
        .json();
    assert_eq!(loaded["data"]["images"][0]["name"], "debian:own");
    std::fs::remove_file(&archive).expect("it was there");
    let image = ["run", "--image", "docker.io/library/debian:own", "--"];
    let script = "python3 -c 'import ssl, sqlite3; print(6*7)'; dpkg --audit && git --version; \
                  stat -c '%a %U' /usr/bin/passwd /tmp; perl -e 'print -l \"/bin\" ? \"link\" : \"no\"'";
    let said = home
        .smolvm(image)
        .args(["sh", "-c", script])
        .run()
        .ok()
        .out();
    assert!(said.starts_with("42\ngit version"), "{said}");
    assert!(said.ends_with("4755 root\n1777 root\nlink"), "{said}");
    home.smolvm(["image", "rm", "debian:own"]).run().ok();
    assert_eq!(leftovers(&home), Vec::<String>::new());
}

#[test]
fn of_several_that_pull_one_image_one_does_the_work() {
    let home = Home::new(0);
    let registry = Registry::start();
    let name = registry.put(&small(), "me/small", "1");
    let pulls: Vec<_> = (0..4)
        .map(|_| home.smolvm(["image", "pull", &name]).spawn())
        .collect();
    for pull in pulls {
        pull.wait().ok();
    }
    let layers = 2;
    // Each has read the configuration, and one of them the layers.
    assert_eq!(registry.blobs_served(), 4 + layers);
    home.smolvm(["image", "tag", &name, "mine:1"]).run().ok();
    let again = home.json(["image", "pull", &name]);
    assert_eq!(again["pulled"], false);
    let by_digest = format!(
        "{}@{}",
        name.rsplit_once(':').expect("a tag").0,
        again["image"]["manifest"].as_str().expect("a digest")
    );
    assert_eq!(home.json(["image", "pull", &by_digest])["pulled"], false);
    assert_eq!(leftovers(&home), Vec::<String>::new());

    home.smolvm(["run", "--pull", "never", "--image", "missing:1"])
        .run()
        .expect(125)
        .complains_of(&["missing:1", "--pull never"]);
    home.smolvm(["image", "pull", &format!("{}/me/none:1", registry.host())])
        .run()
        .expect(1)
        .complains_of(&["404"]);
    home.smolvm(["image", "prune", "--all"]).run().ok();
    let left = home.json(["image", "ls"])["images"]
        .as_array()
        .map(Vec::len);
    assert_eq!(left, Some(1));
}

#[test]
fn a_pull_that_is_killed_leaves_what_the_next_one_uses_and_nothing_else() {
    let home = Home::new(0);
    let registry = Registry::start();
    let random: Vec<u8> = (0..3_000_000_u32)
        .flat_map(|n| n.wrapping_mul(0x9e37_79b1).to_le_bytes())
        .collect();
    let large = TestImage::new(json!({})).layer(&[("large", Entry::File(random, 0o644))]);
    let name = registry.put(&large, "me/large", "1");
    let images = home.data().join("images");
    let downloads = images.join("downloads");
    std::fs::create_dir_all(&downloads).expect("a directory");
    for (dir, step) in [
        (&downloads, "pull-"),
        (&downloads, "sha256-"),
        (&images, ".making-"),
    ] {
        for signal in [Signal::KILL, Signal::INT] {
            // What the one before left would be taken for the step that is waited for.
            home.smolvm(["image", "prune"]).run().ok();
            assert_eq!(leftovers(&home), Vec::<String>::new());
            let entries = Entries::watch(dir);
            let pull = home.smolvm(["image", "pull", &name]).spawn();
            entries.wait_for("a step of the pull", |entry| entry.starts_with(step));
            pull.signal(signal);
            if signal == Signal::INT {
                // It may have been done before it noticed.
                let ended = pull.wait();
                assert!([Some(0), Some(130)].contains(&ended.code), "{ended}");
                home.smolvm(["image", "rm", &name]).run();
            } else {
                drop(pull);
            }
            let listed = home.json(["image", "ls"])["images"]
                .as_array()
                .map(Vec::len);
            assert_eq!(listed, Some(1), "a half-made image is listed");
        }
    }
    home.smolvm(["image", "pull", &name]).run().ok();
    assert_eq!(leftovers(&home), Vec::<String>::new());
}

#[test]
fn a_registry_of_an_own_authority_is_believed_when_that_is_said_and_stands_in_for_another() {
    let home = Home::new(1);
    let registry = Registry::start_encrypted();
    let name = registry.put(&single(), "me/single", "1");
    let pull = |what: &str| home.smolvm(["image", "pull", what]);
    // Its certificate is nobody's that this host knows.
    pull(&name).run().expect(1).complains_of(&["certificate"]);
    assert_eq!(leftovers(&home), Vec::<String>::new());

    let settings = home.data().join("config.toml");
    let write = |text: String| std::fs::write(&settings, text).expect("settings");
    write("[registries]\nauthorities = [\"none.pem\"]\n".to_owned());
    pull(&name).run().expect(1).complains_of(&["none.pem"]);
    write(format!(
        "[registries]\nauthorities = [\"{}\"]\nmirrors.\"registry.invalid\" = [\"https://{}\"]\n",
        registry.authority().display(),
        registry.host()
    ));
    pull(&name).run().ok();
    let run = ["run", "--image", "registry.invalid/me/single:1"];
    assert_eq!(home.smolvm(run).run().ok().out(), "of the image\n");
    // A variable says the same as the file.
    write(String::new());
    let again = registry.put(&small(), "me/small", "1");
    pull(&again)
        .env("SSL_CERT_FILE", registry.authority())
        .run()
        .ok();
}

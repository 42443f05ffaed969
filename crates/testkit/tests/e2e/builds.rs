//! Images built from Dockerfiles and from a `smolvm.toml`.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::Signal;
use serde_json::Value;
use smolvm_testkit::{HOST, Home, Lab, Registry, SERVER, TestImage, may_network};

/// A directory with files to build from.
fn context(home: &Home, files: &[(&str, &str)]) -> PathBuf {
    let dir = home.scratch();
    for (path, text) in files {
        let path = dir.join(path);
        fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
        fs::write(path, text).expect("a file");
    }
    dir
}

fn path(dir: &Path) -> &str {
    dir.to_str().expect("text")
}

/// Builds without a network, and says what came of it.
fn build(home: &Home, dir: &Path, flags: &[&str]) -> Value {
    let words = ["--json", "image", "build", "--network", "off"];
    let words = [&words[..], flags, &[path(dir)]].concat();
    home.smolvm(words).run().ok().json()["data"].clone()
}

fn steps(built: &Value) -> (u64, u64) {
    let count = |what: &str| built["steps"][what].as_u64().expect("a number");
    (count("ran"), count("cached"))
}

/// Keys of layers that are kept.
fn layers(home: &Home) -> usize {
    match fs::read_dir(home.data().join("builds")) {
        Ok(entries) => entries.count(),
        Err(_) => 0,
    }
}

/// A busybox image, as `small:1`.
fn small(home: &Home) {
    let archive = home.scratch().join("small.tar");
    let image = TestImage::busybox(serde_json::json!({ "Env": ["PATH=/bin", "OF=base"] }));
    fs::write(&archive, image.docker_archive(&["small:1"])).expect("a file");
    home.smolvm(["image", "load"]).args([&archive]).run().ok();
}

#[test]
fn a_dockerfile_with_pip_packages_builds_and_imports_them() {
    let home = Home::new(2);
    let dir = context(
        &home,
        &[
            (
                "Dockerfile",
                r#"
FROM debian-12 AS wheels
WORKDIR /wheels
RUN <<END
#!/usr/bin/env python3
import zipfile
info = "greet-1.0.dist-info/"
files = {
    "greet.py": "def hello(): return 'hello from a wheel'\n",
    info + "METADATA": "Metadata-Version: 2.1\nName: greet\nVersion: 1.0\n",
    info + "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
}
with zipfile.ZipFile("greet-1.0-py3-none-any.whl", "w") as wheel:
    for name, text in files.items():
        wheel.writestr(name, text)
    record = "".join(f"{name},,\n" for name in files) + info + "RECORD,,\n"
    wheel.writestr(info + "RECORD", record)
END

FROM nowhere.example/unused AS unused
RUN false

FROM debian-12
# As the package python3-pip would bring it.
COPY pip /usr/lib/python3/dist-packages/pip
COPY --from=wheels --chown=nobody /wheels/*.whl /wheels/
ENV PIP_BREAK_SYSTEM_PACKAGES=1
RUN python3 -m pip install --quiet --no-index --find-links /wheels greet
COPY --chmod=755 main.py /app/
USER nobody
WORKDIR /app
CMD ["python3", "main.py"]
"#,
            ),
            ("main.py", "import greet\nprint(greet.hello())\n"),
            (".dockerignore", "**/__pycache__\n"),
        ],
    );
    let pip = Path::new("/usr/lib/python3/dist-packages/pip");
    assert!(
        pip.exists(),
        "this test needs python3-pip: scripts/host-packages --tests"
    );
    let copied = std::process::Command::new("cp")
        .args(["-r", path(pip), path(&dir)])
        .status()
        .expect("cp");
    assert!(copied.success());
    let built = build(&home, &dir, &["-t", "greeter:1"]);
    assert_eq!(steps(&built), (7, 0));
    let run = |words: &[&str]| {
        let words = [&["run", "--image", "greeter:1"], words].concat();
        home.smolvm(words).run().ok().out()
    };
    assert_eq!(run(&[]), "hello from a wheel\n");
    let shown = run(&[
        "--",
        "sh",
        "-c",
        "id -un; pwd; stat -c '%U %a %n' main.py /wheels/*",
    ]);
    assert_eq!(
        shown,
        "nobody\n/app\nroot 755 main.py\nnobody 644 /wheels/greet-1.0-py3-none-any.whl\n"
    );

    // Nothing has changed: the same image, and nothing ran.
    let again = build(&home, &dir, &["-t", "greeter:2"]);
    assert_eq!(again["image"]["digest"], built["image"]["digest"]);
    assert_eq!(steps(&again), (0, 5));
    // Only what depends on a file that changed runs anew.
    fs::write(dir.join("main.py"), "print('changed')\n").expect("a file");
    let changed = build(&home, &dir, &["-t", "greeter:1"]);
    assert_eq!(steps(&changed), (2, 3));
    assert_eq!(changed["replaced"], built["image"]["digest"]);
    assert_eq!(run(&[]), "changed\n");
    home.is_clean();
}

#[test]
fn a_build_without_a_c_library_from_scratch_and_with_mistakes() {
    let home = Home::new(2);
    small(&home);
    let dir = context(
        &home,
        &[
            (
                "Dockerfile",
                "ARG OF=small:1\nFROM $OF AS tools\nARG WHO\nRUN echo \"$WHO of $OF\" > /who; busybox sleep 100 &\n\
                 RUN [\"busybox\", \"touch\", \"/exec\"]\n\
                 FROM scratch\nCOPY --from=tools /bin /bin\nCOPY --from=tools /who /exec /etc/\n\
                 COPY <<A /etc/a\nis $A\nA\n\
                 ADD files.tar.gz /un/\nLABEL v=1\nEXPOSE 80\nENTRYPOINT [\"/bin/busybox\"]\nCMD [\"cat\", \"/etc/who\"]\n",
            ),
            ("f/in", "unpacked\n"),
        ],
    );
    let tar = std::process::Command::new("tar")
        .args([
            "-C",
            path(&dir),
            "-czf",
            path(&dir.join("files.tar.gz")),
            "f",
        ])
        .status()
        .expect("tar");
    assert!(tar.success());
    let built = build(&home, &dir, &["--build-arg", "WHO=me", "-t", "tiny:1"]);
    assert_eq!(steps(&built), (6, 0));
    let run = |words: &[&str]| {
        let words = [&["run", "--image", "tiny:1"], words].concat();
        home.smolvm(words).run().ok().out()
    };
    assert_eq!(run(&[]), "me of base\n");
    assert_eq!(run(&["--", "cat", "/etc/a", "/un/f/in"]), "is \nunpacked\n");
    let image = home.json(["image", "inspect", "tiny:1"]);
    assert_eq!(image["image"]["config"]["labels"]["v"], "1");
    assert_eq!(image["image"]["config"]["ports"][0], "80/tcp");

    // A command that fails says where; what was done before it is kept, and nothing else is left.
    let before = layers(&home);
    fs::write(
        dir.join("Failing"),
        "FROM small:1\nRUN echo one\n\nRUN echo two >&2; exit 3\n",
    )
    .expect("a file");
    let failing = path(&dir.join("Failing")).to_owned();
    let flags = [
        "image",
        "build",
        "--network",
        "off",
        "-f",
        &failing,
        path(&dir),
    ];
    let failed = home.smolvm(flags).run().expect(1).complains_of(&[
        "Failing, line 4",
        "`RUN echo two >&2; exit 3` ended with exit code 3",
    ]);
    assert!(
        failed
            .err()
            .contains("[3/3] RUN echo two >&2; exit 3\ntwo\n")
    );
    assert_eq!(layers(&home), before + 1);
    home.is_clean();

    // Mistakes are found before anything runs.
    for (text, code, words) in [
        (
            "FROM small:1\nRUN false\nCOPY missing /\n",
            1,
            "Wrong, line 3: there is no `missing`",
        ),
        (
            "FROM small:1\nRUN false\nHEALTHY x\n",
            2,
            "Wrong, line 3: `HEALTHY` is no instruction",
        ),
        (
            "FROM small:1\nRUN false\nADD http://a/b /\n",
            1,
            "Wrong, line 3",
        ),
    ] {
        fs::write(dir.join("Wrong"), text).expect("a file");
        let file = path(&dir.join("Wrong")).to_owned();
        home.smolvm(["image", "build", "-f", &file, path(&dir)])
            .run()
            .expect(code)
            .complains_of(&[words]);
    }
    assert_eq!(layers(&home), before + 1);

    // All that is kept goes, and images stay.
    home.smolvm(["image", "prune"]).run().ok();
    assert_eq!(layers(&home), 0);
    assert_eq!(run(&[]), "me of base\n");
}

#[test]
fn a_build_that_is_interrupted_leaves_whole_layers_and_nothing_else() {
    let home = Home::new(1);
    small(&home);
    let dir = context(
        &home,
        &[(
            "Dockerfile",
            "FROM small:1\nRUN echo first > /first\nRUN echo waiting; busybox sleep 1000\n",
        )],
    );
    let words = [
        "image",
        "build",
        "--network",
        "off",
        "-t",
        "never:1",
        path(&dir),
    ];
    for signal in [Signal::INT, Signal::KILL] {
        let running = home.smolvm(words).spawn();
        running.wait_for_error("\nwaiting\n");
        running.signal(signal);
        if signal == Signal::INT {
            running.wait().expect(130);
        } else {
            drop(running);
        }
        home.is_clean();
        assert_eq!(layers(&home), 1);
        home.smolvm(["image", "inspect", "never:1"]).run().expect(1);
    }
    fs::write(
        dir.join("Dockerfile"),
        "FROM small:1\nRUN echo first > /first\nRUN cat /first > /second\n",
    )
    .expect("a file");
    assert_eq!(steps(&build(&home, &dir, &["-t", "then:1"])), (1, 1));
    home.is_clean();
}

#[test]
fn commands_of_a_build_reach_the_network_they_are_given() {
    if !may_network() {
        return;
    }
    let (home, lab) = (Home::new(1), Lab::new());
    let dir = context(
        &home,
        &[(
            "smolvm.toml",
            &format!(
                "run = [\"python3 -c 'import socket; print(socket.create_connection((\\\"{SERVER}\\\", 80), 15).makefile().read())' > /met\"]\n\
                 workdir = \"/srv/app\"\nfiles = {{ \"/srv/app/\" = \"smolvm.toml\" }}\n\
                 cmd = [\"cat\", \"/met\"]\nenv = {{ A = \"$b\" }}\n"
            ),
        )],
    );
    let built = home.smolvm(["image", "build", "-t", "met:1", path(&dir)]);
    lab.run(built).ok();
    let run = home.smolvm(["run", "--image", "met:1"]).run().ok();
    assert_eq!(run.out(), format!("{HOST}\n"));
    let said = home
        .smolvm([
            "run",
            "--image",
            "met:1",
            "--",
            "sh",
            "-c",
            "echo $A; pwd; ls",
        ])
        .run()
        .ok();
    assert_eq!(said.out(), "$b\n/srv/app\nsmolvm.toml\n");
    home.is_clean();
}

#[test]
fn an_ordinary_user_loads_pulls_builds_saves_and_runs_images() {
    let home = Home::with(1).ordinary_user().make();
    small(&home);
    let dir = context(
        &home,
        &[
            (
                "Dockerfile",
                "FROM small:1\nRUN echo $OF > /made\nCOPY file /file\nCMD [\"cat\", \"/made\", \"/file\"]\n",
            ),
            ("file", "from the context\n"),
        ],
    );
    let built = build(&home, &dir, &["-t", "own:1"]);
    assert_eq!(steps(&built), (2, 0), "{built}");
    let run = |image: &str| home.smolvm(["run", "--image", image]).run().ok().out();
    assert_eq!(run("own:1"), "base\nfrom the context\n");
    // Out, away, and in again.
    let archive = home.scratch().join("own.tar");
    let save = home.smolvm(["image", "save", "own:1", "-o"]);
    save.args([&archive]).run().ok();
    home.smolvm(["image", "rm", "own:1", "small:1"]).run().ok();
    home.smolvm(["image", "load"]).args([&archive]).run().ok();
    assert_eq!(run("own:1"), "base\nfrom the context\n");
    let registry = Registry::start();
    let image = TestImage::busybox(serde_json::json!({ "Cmd": ["echo", "pulled"] }));
    let name = registry.put(&image, "me/pulled", "1");
    assert_eq!(run(&name), "pulled\n");
    home.is_clean();
}

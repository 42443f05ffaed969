//! Starting from a template: as after a boot, only sooner, and no two sandboxes alike.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use rustix::process::Signal;
use serde_json::Value;
use smolvm_testkit::{Entries, Home, processes_mentioning};

/// What a guest says of itself that must differ from any other's.
const IDENTITY: &str = "hostname; cat /etc/machine-id; head -c 16 /dev/urandom | od -An -tx1; \
     cat /proc/sys/kernel/random/boot_id; python3 -c 'import os; print(os.urandom(16).hex())'";

/// Gives a home templates of its own, of which there are none yet.
pub(crate) fn own_templates(home: &Home) -> PathBuf {
    let templates = home.data().join("templates");
    std::fs::remove_file(&templates).expect("the link to everybody's templates");
    std::fs::create_dir(&templates).expect("a directory");
    templates
}

/// Whether a sandbox's machine holds its memory as a copy of a template's.
pub(crate) fn restored(home: &Home, name: &str) -> bool {
    let maps = format!("/proc/{}/maps", home.info(name).vmm().pid());
    std::fs::read_to_string(&maps)
        .expect("the machine's memory map")
        .lines()
        .any(|line| line.contains("/templates/") && line.ends_with("/memory"))
}

/// The templates that are whole, and everything else but locks.
fn templates_in(dir: &Path) -> (usize, Vec<String>) {
    let mut whole = 0;
    let mut rest = Vec::new();
    for entry in std::fs::read_dir(dir).expect("the templates") {
        let entry = entry.expect("an entry");
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.path().join("template.json").is_file() {
            whole += 1;
        } else if !name.ends_with(".lock") {
            rest.push(name);
        }
    }
    (whole, rest)
}

#[test]
fn a_sandbox_is_the_same_machine_at_each_start() {
    let home = Home::new(2);
    let id = |name: &str| home.sh(name, "cat /etc/machine-id");
    home.create("box", &[]);
    let first = id("box");
    assert_eq!(first.trim_end().len(), 32, "{first}");
    home.smolvm(["stop", "box"]).run().ok();
    home.smolvm(["start", "box"]).run().ok();
    assert_eq!(id("box"), first);
    home.smolvm(["fork", "box"]).run().ok();
    assert_ne!(id("box-1"), first);
    home.smolvm(["rm", "box", "box-1"]).run().ok();
}

#[test]
fn sandboxes_from_one_template_differ_where_they_must() {
    let home = Home::new(3);
    let names = ["one", "two", "three"];
    let mut said = HashSet::new();
    // A copy that does not answer in time gives way to a boot, which is no failure; all three doing
    // so would be.
    let mut from_template = 0;
    for name in names {
        home.create(name, &["--env", &format!("WHO={name}")]);
        from_template += usize::from(restored(&home, name));
        for line in home.sh(name, IDENTITY).lines() {
            assert!(said.insert(line.to_owned()), "two guests say {line}");
        }
        home.is_on_time(name);
        assert_eq!(
            home.sh(name, "echo $WHO; hostname"),
            format!("{name}\n{name}\n")
        );
        home.sh(name, &format!("echo {name} > /root/mine; sync"));
    }
    for name in names {
        assert_eq!(home.sh(name, "cat /root/mine"), format!("{name}\n"));
    }
    assert!(from_template > 0, "all three booted");
    // Its disk is its own from then on, so it boots, and finds what it wrote.
    home.smolvm(["stop", "two"]).run().ok();
    home.smolvm(["start", "two"]).run().ok();
    assert!(
        !restored(&home, "two"),
        "a disk with files on it was put under a template"
    );
    assert_eq!(home.sh("two", "cat /root/mine"), "two\n");
    home.rm(&names);
}

/// Rounds of three copies at once.
const ROUNDS: usize = 12;

#[test]
fn every_copy_answers() {
    let home = Home::new(3);
    for round in 0..ROUNDS {
        let names = ["a", "b", "c"].map(|name| format!("{name}{round}"));
        let creates = names
            .each_ref()
            .map(|name| home.smolvm(["create", "--name", name]).spawn());
        for create in creates {
            create.wait().ok();
        }
        for name in &names {
            assert!(
                restored(&home, name),
                "{name} booted; its keeper's log says why"
            );
        }
        home.rm(&names.each_ref().map(String::as_str));
    }
}

#[test]
fn templates_can_be_switched_off() {
    let home = Home::new(1);
    home.smolvm(["create", "--name", "box"])
        .env("SMOLVM_NO_TEMPLATES", "1")
        .run()
        .ok();
    assert!(!restored(&home, "box"));
    assert_eq!(home.sh("box", "echo well"), "well\n");
    home.rm(&["box"]);
}

#[test]
fn the_benchmark_builds_its_template_before_the_first_life() {
    let home = Home::new(4);
    let templates = own_templates(&home);
    let measure = || {
        let args = ["bench", "lifecycle", "-n", "1", "--ways", "template"];
        home.json(args)
    };
    let first = measure();
    assert!(
        first["template_build_ms"].is_f64(),
        "a life built it: {first:#}"
    );
    only_template(&templates);
    let second = measure();
    assert!(
        second["template_build_ms"].is_null(),
        "it was built twice: {second:#}"
    );
    assert_eq!(second["results"]["total_ms"]["stats"]["count"], 1);
}

/// The one template of a home.
fn only_template(templates: &Path) -> PathBuf {
    let mut found = std::fs::read_dir(templates)
        .expect("the templates")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.is_dir());
    let template = found.next().expect("a template");
    assert_eq!(found.next(), None);
    template
}

/// What is wrong with a template, and how it comes about.
type Damage = (&'static str, fn(&Path));

#[test]
fn a_damaged_template_is_made_anew() {
    let home = Home::new(1);
    let templates = own_templates(&home);
    let disk = ["--disk", "64"];
    home.smolvm([&["template", "build"], &disk[..]].concat())
        .run()
        .ok();
    let damages: [Damage; 4] = [
        ("overwritten", |template| {
            std::fs::write(template.join("state"), b"this is no machine").expect("the state");
        }),
        ("cut short", |template| {
            let memory = std::fs::File::options()
                .write(true)
                .open(template.join("memory"));
            memory
                .and_then(|file| file.set_len(1 << 20))
                .expect("the memory");
        }),
        ("disk cut short", |template| {
            let disk = std::fs::File::options()
                .write(true)
                .open(template.join("disk.ext4"));
            disk.and_then(|file| file.set_len(1 << 20))
                .expect("the disk");
        }),
        ("removed", |template| {
            std::fs::remove_file(template.join("disk.ext4")).expect("the disk");
        }),
    ];
    for (what, damage) in damages {
        damage(&only_template(&templates));
        let listed = home.json(["template", "ls"])["templates"][0].clone();
        assert_eq!(listed["current"], false, "{what}: {listed:#}");
        home.create("box", &disk);
        assert!(restored(&home, "box"), "{what}: not restored");
        assert_eq!(home.sh("box", "echo well"), "well\n");
        home.rm(&["box"]);
        let listed = home.json(["template", "ls"])["templates"][0].clone();
        assert_eq!(listed["current"], true, "{what}: {listed:#}");
    }
}

/// Overwrites a template's device state, and has its description say that this is how it was made.
fn damage_unseen(template: &Path) {
    use std::os::unix::fs::MetadataExt;

    let (state, description) = (template.join("state"), template.join("template.json"));
    std::fs::write(&state, b"this is no machine").expect("the state");
    let now = std::fs::metadata(&state).expect("the state");
    let text = std::fs::read(&description).expect("the description");
    let mut known: Value = serde_json::from_slice(&text).expect("JSON");
    let mark = &mut known["files"]["state"];
    assert!(mark["inode"].is_u64(), "{mark:#}");
    *mark = serde_json::json!({
        "inode": now.ino(),
        "bytes": now.len(),
        "modified_ns": now.mtime() * 1_000_000_000 + now.mtime_nsec(),
        "changed_ns": now.ctime() * 1_000_000_000 + now.ctime_nsec(),
    });
    std::fs::write(&description, known.to_string()).expect("the description");
}

#[test]
fn a_template_that_cannot_be_restored_costs_time_and_nothing_else() {
    let home = Home::new(1);
    let templates = own_templates(&home);
    home.create("first", &[]);
    home.rm(&["first"]);
    damage_unseen(&only_template(&templates));
    let created = home.smolvm(["create", "--name", "second"]).run().ok();
    let warning = "warning: sandbox `second` could not be restored from its template, and booted: ";
    assert!(created.err().contains(warning), "{created}");
    assert!(
        !restored(&home, "second"),
        "restored from what is no machine"
    );
    assert_eq!(home.sh("second", "echo well"), "well\n");
    home.rm(&["second"]);
    let run = home.json(["run", "--", "true"]);
    assert_eq!(run["warnings"].as_array().map(Vec::len), Some(1), "{run:#}");
}

#[test]
fn a_template_is_built_ahead_listed_and_removed_under_its_clones() {
    let home = Home::new(1);
    own_templates(&home);
    let build = |flags: &[&str]| {
        let built = home.json([&["template", "build", "--disk", "64"], flags].concat());
        (built["built"].as_bool(), built["template"]["id"].clone())
    };
    let (built, id) = build(&[]);
    assert_eq!(built, Some(true));
    assert_eq!(build(&[]), (Some(false), id.clone()), "it is there already");
    home.create("box", &["--disk", "64"]);
    assert!(restored(&home, "box"), "what was built ahead is not used");
    let listed = home.json(["template", "ls"])["templates"].clone();
    assert_eq!(listed.as_array().map(Vec::len), Some(1), "{listed:#}");
    assert_eq!(listed[0]["id"], id);
    assert_eq!(listed[0]["images"][0], "debian-12");
    assert_eq!(listed[0]["disk_mib"], 64);
    assert_eq!(listed[0]["current"], true, "{listed:#}");

    home.smolvm(["template", "rm", id.as_str().expect("an id")])
        .run()
        .ok();
    assert_eq!(home.json(["template", "ls"])["templates"][0], Value::Null);
    assert_eq!(
        templates_in(&home.data().join("templates")),
        (0, Vec::new())
    );
    // Memory it has not touched comes from files that have no name any more.
    let much = "python3 -c 'import json, hashlib, sqlite3; print(len(bytes(90 << 20)))'";
    assert_eq!(home.sh("box", much), "94371840\n");
    home.rm(&["box"]);
}

#[test]
fn a_template_of_an_image_that_is_gone_goes_with_it() {
    let home = Home::new(1);
    let templates = own_templates(&home);
    home.create("box", &[]);
    home.smolvm(["commit", "box", "tools"]).run().ok();
    home.rm(&["box"]);
    home.smolvm(["template", "build", "tools"]).run().ok();
    assert_eq!(templates_in(&templates), (2, Vec::new()));
    home.smolvm(["image", "rm", "tools"]).run().ok();
    assert_eq!(templates_in(&templates), (1, Vec::new()));
    // A template of another time: its file says so.
    let other = std::fs::read_dir(&templates)
        .expect("the templates")
        .map(|entry| entry.expect("an entry").path().join("template.json"))
        .find(|path| path.is_file())
        .expect("a template");
    let text = std::fs::read_to_string(&other).expect("a description");
    let mut json: Value = serde_json::from_str(&text).expect("json");
    json["cpu"] = "another processor".into();
    std::fs::write(&other, json.to_string()).expect("a description");
    let listed = home.smolvm(["template", "ls"]).run().ok();
    let why = "stale: the host's processor is another";
    assert!(listed.out().contains(why), "{listed}");
    home.smolvm(["prune"]).run().ok();
    assert_eq!(templates_in(&templates), (0, Vec::new()));
}

#[test]
fn processes_that_need_one_template_at_once_build_it_once() {
    let home = Home::new(3);
    let templates = own_templates(&home);
    let names = ["one", "two", "three"];
    let creates = names.map(|name| home.smolvm(["create", "--name", name]).spawn());
    for create in creates {
        create.wait().ok();
    }
    assert_eq!(templates_in(&templates), (1, Vec::new()));
    for name in names {
        assert_eq!(
            home.sh(name, "hostname"),
            format!(
                "{name}
"
            )
        );
    }
    home.rm(&names);
}

#[test]
fn a_template_whose_builder_was_killed_leaves_nothing() {
    let home = Home::new(2);
    let templates = own_templates(&home);
    let entries = Entries::watch(&templates);
    let create = home.smolvm(["create", "--name", "box"]).spawn();
    let making = entries.wait_for("a template in the making", |name| name.contains(".making-"));
    Entries::watch(&making).wait_for("the template's memory", |name| name == "memory");
    create.signal(Signal::KILL);
    drop(create);
    for (process, line) in processes_mentioning(&making) {
        process.wait(&line);
    }
    home.smolvm(["start", "box"]).run().ok();
    assert_eq!(home.sh("box", "echo well"), "well\n");
    assert_eq!(templates_in(&templates), (1, Vec::new()));
    home.rm(&["box"]);
}

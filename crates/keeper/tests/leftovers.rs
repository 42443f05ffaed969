//! What is left of sandboxes that nobody knows any more, and of those that were never born.

mod support;

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use smolvm_engine::store::Store;
use smolvm_engine::{Config, Engine, ErrorKind, State};
use smolvm_host::ProcessIdentity;
use support::{Home, output, spec};

/// The paths that a prune names.
fn paths(pruned: &[smolvm_engine::Pruned]) -> Vec<&str> {
    pruned.iter().map(|thing| thing.name.as_str()).collect()
}

/// Somebody moves the database away while machines run, prunes, and puts it back.
#[tokio::test]
async fn a_prune_lets_machines_be_that_the_database_does_not_know() {
    let home = Home::new();
    let engine = home.engine();
    engine
        .create_volume(&"data".parse().expect("a name"), 64)
        .expect("a volume");
    let mut with_volume = spec("a");
    with_volume.volumes = vec!["data:/srv".parse().expect("a volume")];
    engine.create(&with_volume).expect("created");
    engine.create(&spec("b")).expect("created");
    let (session, _) = engine.start("a").await.expect("started");
    let keeper = engine.info("a").expect("a row").keeper_pid;
    engine.create(&spec("c")).expect("created");
    engine.start("c").await.expect("started");
    let snapshot = engine.snapshot("c", None).await.expect("a snapshot");
    engine.stop("c", Duration::ZERO).await.expect("stopped");
    let dir = |name: &str| {
        let id = engine.info(name).expect("a row").id;
        home.layout().sandbox(&id).path().to_owned()
    };
    let (a, b, c) = (dir("a"), dir("b"), dir("c"));
    let database = home.layout().database();
    let moved = home.path("moved.db");
    // What is not in the file yet is beside it.
    for end in ["", "-wal", "-shm"] {
        let of = |path: &std::path::Path| format!("{}{end}", path.display());
        std::fs::rename(of(&database), of(&moved)).expect("moved");
    }

    for dry_run in [true, false] {
        let report = engine.prune(dry_run, false).await.expect("pruned");
        let names = paths(&report.pruned);
        for gone in [&b, &c, &snapshot.path] {
            assert!(names.contains(&gone.to_str().expect("text")), "{names:?}");
            assert_eq!(gone.exists(), dry_run, "{}", gone.display());
        }
        let [stranger] = report.strangers.as_slice() else {
            panic!("{:?}", report.strangers);
        };
        assert_eq!(stranger.path, a);
        assert_eq!(stranger.name.as_deref(), Some("a"));
        assert_eq!(stranger.keeper_pid, keeper);
        let text = names.join(" ");
        assert!(!text.contains("/volumes/"), "its volume was taken: {text}");
        assert!(!text.contains("/images/"), "its image was taken: {text}");
    }
    assert_eq!(output(&session, &["hello"]).await.expect("output"), "hello");

    for end in ["", "-wal", "-shm"] {
        let of = |path: &std::path::Path| format!("{}{end}", path.display());
        let _ = std::fs::remove_file(of(&database));
        std::fs::rename(of(&moved), of(&database)).expect("moved");
    }
    assert_eq!(engine.info("a").expect("a row").state, State::Running);
    for name in ["a", "b", "c"] {
        engine.delete(name).await.expect("deleted");
    }
    engine.remove_snapshot(&snapshot.name).expect("removed");
    engine.remove_volume("data").expect("removed");
    home.assert_clean("after the database came back");
}

/// Of a machine whose directory somebody removed the truth is told, and it can be ended.
#[tokio::test]
async fn a_machine_without_its_directory_is_out_of_reach_and_says_so() {
    let home = Home::new();
    let engine = home.engine();
    engine.create(&spec("a")).expect("created");
    engine.start("a").await.expect("started");
    let info = engine.info("a").expect("a row");
    let keeper = i32::try_from(info.keeper_pid.expect("a keeper")).expect("a number");
    let keeper = ProcessIdentity::of(keeper).expect("/proc");
    let keeper = keeper.expect("a keeper that runs");
    std::fs::remove_dir_all(home.layout().sandbox(&info.id).path()).expect("removed");
    let shown = &engine.list().expect("a list")[0];
    assert_eq!(shown.state, State::Error);
    let reason = shown.reason.as_deref().expect("a reason");
    assert!(reason.contains("its directory"), "{reason}");
    assert!(reason.contains(&keeper.pid.to_string()), "{reason}");
    let error = engine.start("a").await.expect_err("nobody can reach it");
    assert_eq!(error.kind(), ErrorKind::State);
    assert_eq!(error.hint_text(), Some("end it with `smolvm rm a`"));
    assert!(keeper.is_alive().expect("/proc"), "looking ended it");
    engine.delete("a").await.expect("deleted");
    assert!(!keeper.is_alive().expect("/proc"), "its keeper lives on");
    home.assert_clean("after a directory was removed");
}

/// An engine whose keepers do this.
fn with_keeper(home: &Home, script: &str) -> Engine {
    let keeper = home.path("bin/another-keeper");
    std::fs::write(&keeper, format!("#!/bin/sh\n{script}\n")).expect("a script");
    std::fs::set_permissions(&keeper, PermissionsExt::from_mode(0o755)).expect("a mode");
    Engine::new(Config {
        keeper,
        ..home.config()
    })
}

/// Nothing is left of children whose keepers were killed, however early.
#[tokio::test]
async fn a_child_whose_keeper_was_killed_is_gone() {
    let home = Home::new();
    let engine = home.engine();
    engine.create(&spec("a")).expect("created");
    engine.start("a").await.expect("started");
    let killed = with_keeper(&home, "kill -9 $$");
    let fork = killed.fork("a", 5, None).await.expect("outcomes");
    assert_eq!(fork.children.len(), 5);
    for child in fork.children {
        child.result.expect_err("its keeper was killed");
    }
    let names: Vec<_> = engine.list().expect("a list");
    let names: Vec<_> = names.iter().map(|row| row.name.as_str()).collect();
    assert_eq!(names, ["a"]);
    // One that is no copy stays, and can be started.
    killed.create(&spec("b")).expect("created");
    killed.start("b").await.expect_err("its keeper was killed");
    let info = engine.info("b").expect("a row");
    assert_eq!(info.state, State::Error);
    assert!(info.reason.expect("a reason").contains("its keeper ended"));
    engine.start("b").await.expect("started");
    for name in ["a", "b"] {
        engine.delete(name).await.expect("deleted");
    }
    home.assert_clean("after a fork without keepers");
}

/// Of a copy whose maker was killed before its birth nothing is left for the next command to show.
#[tokio::test]
async fn a_copy_whose_maker_was_killed_before_its_birth_is_gone() {
    let home = Home::new();
    let engine = home.engine();
    engine.create(&spec("a")).expect("created");
    engine.start("a").await.expect("started");
    engine.snapshot("a", Some("s")).await.expect("a snapshot");
    engine.delete("a").await.expect("deleted");

    let hung = with_keeper(&home, "mkfifo \"$1.wait\"; read line < \"$1.wait\"");
    let name = "b".parse().expect("a name");
    let restoring = tokio::spawn({
        let hung = hung.clone();
        async move { hung.restore("s", &name).await.map(drop) }
    });
    let mut store = Store::open(&home.layout().database()).expect("a store");
    let launch = async {
        loop {
            if let Some(row) = store.sandbox_named("b").expect("read") {
                let file = home.layout().sandbox(&row.id).launch_file();
                let keepers = smolvm_host::process::with_argument(file.as_os_str());
                if let [keeper] = keepers.expect("/proc").as_slice() {
                    return (row, *keeper);
                }
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let launched = tokio::time::timeout(Duration::from_secs(30), launch).await;
    let (row, keeper) = launched.expect("a keeper");
    assert_eq!(engine.info("b").expect("a row").state, State::Starting);
    restoring.abort();
    let _ = restoring.await;
    // As if this process were another, which is dead.
    let mut dead = std::process::Command::new("true").spawn().expect("true");
    let of = ProcessIdentity {
        pid: i32::try_from(dead.id()).expect("a number"),
        ..row.holder.clone().expect("this process")
    };
    dead.wait().expect("ended");
    let again = store.begin_start(&row.id, &[State::Starting], &of, row.created_at);
    assert!(again.expect("written"));
    assert_eq!(engine.info("b").expect("held").state, State::Starting);
    let keeper = i32::try_from(keeper).expect("a number");
    let keeper = ProcessIdentity::of(keeper)
        .expect("/proc")
        .expect("it hangs");
    let end = keeper.kill_and_wait(Duration::from_secs(10));
    end.expect("killed");
    assert_eq!(engine.list().expect("a list"), []);

    // One that was born stays whatever becomes of its keeper.
    let name = "b".parse().expect("a name");
    engine.restore("s", &name).await.expect("the name is free");
    let info = engine.info("b").expect("a row");
    assert!(!info.ephemeral);
    let keeper = i32::try_from(info.keeper_pid.expect("a keeper")).expect("a number");
    let keeper = ProcessIdentity::of(keeper).expect("/proc").expect("alive");
    let end = keeper.kill_and_wait(Duration::from_secs(10));
    end.expect("killed");
    assert_eq!(engine.info("b").expect("a row").state, State::Error);
    engine.delete("b").await.expect("deleted");
    engine.remove_snapshot("s").expect("removed");
    home.assert_clean("after a restore whose maker was killed");
}

/// A copy whose guest does not come up goes, and says why.
#[tokio::test]
async fn a_copy_that_does_not_come_up_says_why_and_is_gone() {
    let home = Home::new();
    let engine = Engine::new(Config {
        boot_timeout: Duration::from_millis(300),
        ..home.config()
    });
    engine.create(&spec("a")).expect("created");
    engine.start("a").await.expect("started");
    engine.snapshot("a", Some("s")).await.expect("a snapshot");
    // Its agent does not answer to its birth.
    let name = "b-deaf".parse().expect("a name");
    let error = engine.restore("s", &name).await.expect_err("deaf");
    assert_eq!(error.kind(), ErrorKind::GuestFailed, "{error:?}");
    assert!(error.in_one_line().contains("not ready after"), "{error:?}");
    let error = engine.info("b-deaf").expect_err("gone");
    assert_eq!(error.kind(), ErrorKind::NotFound);
    engine.delete("a").await.expect("deleted");
    engine.remove_snapshot("s").expect("removed");
    home.assert_clean("after a copy that was deaf");
}

/// Whatever is started from an image whose files are gone says which, and what to do; nothing is left of it.
#[tokio::test]
async fn an_image_that_is_gone_is_named() {
    let home = Home::new();
    let engine = home.engine();
    engine.create(&spec("a")).expect("created");
    engine.start("a").await.expect("started");
    engine.snapshot("a", Some("s")).await.expect("a snapshot");
    let image = home.layout().image("sha256:0");
    let away = home.path("away");
    std::fs::rename(&image, &away).expect("moved");
    let root = image.join("root.erofs");
    let expected = format!(
        "the root file system of image `debian-12` is not there: {}: somebody removed it from the data \
         directory",
        root.display()
    );
    let name = "b".parse().expect("a name");
    let restored = engine.restore("s", &name).await.map(drop);
    engine.create(&spec("c")).expect("created");
    let started = engine.start("c").await.map(drop);
    let cancel = smolvm_engine::Cancel::new().expect("a handle");
    let mut watcher = |_: &smolvm_engine::Progress| {};
    let built = engine.build_template(&spec("d"), &mut watcher, &cancel);
    for failed in [restored, started, built.map(drop)] {
        let error = failed.expect_err("there is no image");
        assert_eq!(error.kind(), ErrorKind::MissingDependency);
        assert_eq!(error.in_one_line(), expected);
        let hint = error.hint_text().expect("a hint");
        assert!(hint.contains("smolvm image rm debian-12"), "{hint}");
    }
    std::fs::rename(&away, &image).expect("moved");
    let names: Vec<_> = engine.list().expect("a list");
    let names: Vec<_> = names.iter().map(|row| row.name.as_str()).collect();
    assert_eq!(names, ["a", "c"]);
    for name in names {
        engine.delete(name).await.expect("deleted");
    }
    engine.remove_snapshot("s").expect("removed");
    home.assert_clean("after an image came back");
}

/// A command in a copy of the data directory ends nothing of the original's.
#[tokio::test]
async fn a_copy_of_the_data_directory_lets_the_originals_machines_be() {
    let home = Home::new();
    let engine = home.engine();
    engine.create(&spec("a")).expect("created");
    engine.start("a").await.expect("started");
    let copy = home.path("copy");
    let copied = std::process::Command::new("cp")
        .args([
            std::ffi::OsStr::new("-a"),
            home.layout().root().as_os_str(),
            copy.as_os_str(),
        ])
        .status();
    assert!(copied.expect("cp").success());
    let there = Engine::new(Config {
        data_dir: copy.clone(),
        ..home.config()
    });

    let shown = there.info("a").expect("a row");
    let expected = format!(
        "sandbox `a` runs, but from {}, of which {} is a copy",
        home.layout().root().display(),
        copy.display()
    );
    assert_eq!(shown.state, State::Error);
    assert_eq!(shown.reason.as_deref(), Some(&*expected));
    let stopped = there.stop("a", Duration::ZERO).await.map(drop);
    for failed in [
        stopped,
        there.delete("a").await,
        there.start("a").await.map(drop),
    ] {
        assert_eq!(failed.expect_err("the original's").in_one_line(), expected);
    }
    there.prune(false, true).await.expect("pruned");
    assert_eq!(engine.info("a").expect("untouched").state, State::Running);
    let session = engine.connect("a").await.expect("it answers");
    assert_eq!(output(&session, &["hello"]).await.expect("said"), "hello");

    engine.delete("a").await.expect("deleted");
    home.wait_for_removals();
    assert_eq!(there.info("a").expect("a row").state, State::Error);
    there.delete("a").await.expect("deleted");
    assert!(there.list().expect("a list").is_empty());
    home.assert_clean("after the original's end");
}

/// Refuses to remove snapshots' directories.
#[derive(Debug)]
struct Stuck;

impl smolvm_host::os::Faults for Stuck {
    fn before(&self, op: &'static str, _path: &std::path::Path) -> std::io::Result<()> {
        match op {
            "remove the snapshot's directory" => Err(std::io::ErrorKind::PermissionDenied.into()),
            _ => Ok(()),
        }
    }
}

/// A snapshot that cannot be removed keeps nobody from the others, and goes when it can.
#[tokio::test]
async fn a_snapshot_that_cannot_be_removed_is_tried_again() {
    let home = Home::new();
    let engine = home.engine();
    engine.create(&spec("a")).expect("created");
    engine.start("a").await.expect("started");
    for name in ["s", "t"] {
        engine.snapshot("a", Some(name)).await.expect("a snapshot");
    }
    engine.delete("a").await.expect("deleted");
    let os = smolvm_host::os::Os::with_faults(std::sync::Arc::new(Stuck));
    let stuck = Engine::with_os(home.config(), os);
    for _ in 0..2 {
        let error = stuck.remove_snapshot("s").expect_err("stuck");
        assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error:?}");
    }
    let names = |engine: &Engine| -> Vec<_> {
        let snapshots = engine.snapshots().expect("a list");
        snapshots.into_iter().map(|it| it.name).collect()
    };
    assert_eq!(names(&stuck), ["t"]);
    let pruned = stuck.prune(false, false).await.expect("pruned").pruned;
    assert_eq!(paths(&pruned), Vec::<&str>::new());
    let would = engine.prune(true, false).await.expect("a dry run").pruned;
    let pruned = engine.prune(false, false).await.expect("pruned").pruned;
    assert_eq!((pruned.len(), &pruned), (1, &would));
    engine.remove_snapshot("t").expect("removed");
    home.assert_clean("after both are gone");
}

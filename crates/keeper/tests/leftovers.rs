//! What is left of sandboxes that nobody knows any more, and of those that were never born.

mod support;

use std::time::Duration;

use smolvm_engine::{ErrorKind, State};
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
    let keeper = smolvm_host::ProcessIdentity::of(keeper).expect("/proc");
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

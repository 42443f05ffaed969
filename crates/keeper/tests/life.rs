//! The engine and the keeper together, on the fake backend: the whole life of a sandbox with every
//! effect on the host failing in its turn.

mod support;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use smolvm_engine::launch::Launch;
use smolvm_engine::store::Store;
use smolvm_engine::{
    BuiltTemplate, Cancel, CommitOptions, Config, DiskMode, Engine, ErrorKind, ExecEvent, ExecSpec,
    KernelChoice, PoolSpec, Progress, Pruned, Result, SandboxSpec, State,
};
use smolvm_host::ProcessIdentity;
use smolvm_host::os::{Faults, Os};
use smolvm_vmm::Devices;
use support::{Home, output, spec};

/// The whole life of a sandbox.
async fn life(engine: &Engine) -> Result<()> {
    let mut spec = spec("a");
    spec.ports = vec!["0:7".parse()?];
    engine.create(&spec)?;
    let published = engine.publish("a", &"0:7/udp".parse()?).await?;
    let (session, _) = engine.start("a").await?;
    assert_eq!(output(&session, &["hello"]).await?, "hello");
    engine.unpublish("a", &published.host).await?;
    engine.grow_disk("a", 5000).await?;
    engine.stop("a", Duration::from_secs(5)).await?;
    engine.grow_disk("a", 6000).await?;
    let (session, _) = engine.start("a").await?;
    assert_eq!(output(&session, &["again"]).await?, "again");
    engine.delete("a").await
}

/// A sandbox is paused, saved, restored and forked.
async fn copies(engine: &Engine) -> Result<()> {
    engine.create(&spec("a"))?;
    engine.start("a").await?;
    engine.pause("a").await?;
    assert_eq!(engine.info("a")?.state, State::Paused);
    engine.resume("a").await?;
    engine.snapshot("a", Some("s")).await?;
    let fork = engine.fork("a", 1, None).await?;
    for child in fork.children {
        child.result?;
    }
    engine.delete("a").await?;
    let (session, _) = engine.restore("s", &"b".parse()?).await?;
    assert_eq!(output(&session, &["hello"]).await?, "hello");
    for name in ["a-1", "b"] {
        engine.delete(name).await?;
    }
    engine.remove_snapshot("s")
}

/// A volume is made, used by one sandbox and by another, and removed.
async fn with_volumes(engine: &Engine) -> Result<()> {
    engine.create_volume(&"data".parse()?, 64)?;
    for name in ["a", "b"] {
        let mut spec = spec(name);
        spec.volumes = vec!["data:/srv".parse()?];
        engine.create(&spec)?;
        let (session, _) = engine.start(name).await?;
        assert_eq!(output(&session, &["hello"]).await?, "hello");
        engine.delete(name).await?;
    }
    engine.remove_volume("data")
}

/// A pool for sandboxes like [`spec`]'s.
fn pool(size: u32, commands: &[&str]) -> PoolSpec {
    let sandbox = spec("a");
    PoolSpec {
        image: sandbox.image,
        cpus: sandbox.cpus,
        memory_mib: sandbox.memory_mib,
        disk_mib: sandbox.disk_mib,
        disk_mode: sandbox.disk_mode,
        nic: false,
        size,
        commands: commands
            .iter()
            .map(|command| (*command).to_owned())
            .collect(),
    }
}

/// A pool is filled, used and removed.
async fn pooled(engine: &Engine) -> Result<()> {
    engine.set_pool(&pool(1, &["warm"]), &mut |_| {}).await?;
    match engine.claim(&spec("a")).await? {
        Some((session, _)) => assert_eq!(output(&session, &["hello"]).await?, "hello"),
        // Its keeper may not have been told in time.
        None => {
            engine.create(&spec("a"))?;
        }
    }
    engine.delete("a").await?;
    engine.set_pool(&pool(0, &["warm"]), &mut |_| {}).await
}

/// Fails the nth effect, and if `forever` all after it.
#[derive(Debug)]
struct Nth {
    nth: u32,
    forever: bool,
    seen: AtomicU32,
    error: fn() -> io::Error,
}

impl Faults for Nth {
    fn before(&self, _op: &'static str, _path: &Path) -> io::Result<()> {
        let now = self.seen.fetch_add(1, Ordering::Relaxed) + 1;
        if now == self.nth || self.forever && now > self.nth {
            Err((self.error)())
        } else {
            Ok(())
        }
    }
}

#[tokio::test]
async fn a_life_leaves_nothing() {
    let home = Home::new();
    life(&home.engine()).await.expect("a life");
    home.assert_clean("after a life");
}

fn full() -> io::Error {
    io::ErrorKind::StorageFull.into()
}

fn broken() -> io::Error {
    io::ErrorKind::Other.into()
}

/// Whether all effects after the first failed one fail as well, and how.
type Mode = (bool, fn() -> io::Error);

/// Has each effect of a life fail in its turn, and requires that nothing leaks and that the second try
/// succeeds.
async fn each_effect_fails(life: impl AsyncFn(&Engine) -> Result<()>, modes: &[Mode], least: u32) {
    let mut failures = 0;
    for &(forever, error) in modes {
        for nth in 1.. {
            let home = Home::new();
            let faults = Arc::new(Nth {
                nth,
                forever,
                seen: AtomicU32::new(0),
                error,
            });
            let what = format!("effect {nth}, for ever: {forever}");
            let engine = Engine::with_os(home.config(), Os::with_faults(faults.clone()));
            let outcome = life(&engine).await;
            if faults.seen.load(Ordering::Relaxed) < nth {
                outcome.expect("nothing failed");
                break;
            }
            failures += 1;
            // An effect may fail without harm, such as removing what is not there.
            if let Err(error) = outcome {
                let kinds = [
                    ErrorKind::NoSpace,
                    ErrorKind::Internal,
                    ErrorKind::GuestFailed,
                ];
                assert!(kinds.contains(&error.kind()), "{what}: {error:?}");
            }
            // A healthy command sees the truth and can remove what there is.
            let engine = home.engine();
            for pool in engine.pools().expect("a list") {
                let gone = PoolSpec {
                    size: 0,
                    ..pool.spec
                };
                let removed = engine.set_pool(&gone, &mut |_| {}).await;
                removed.unwrap_or_else(|error| panic!("{what}: {error:?}"));
            }
            for snapshot in engine.snapshots().expect("a list") {
                let removed = engine.remove_snapshot(&snapshot.name);
                removed.unwrap_or_else(|error| panic!("{what}: {error:?}"));
            }
            for sandbox in engine
                .list()
                .unwrap_or_else(|error| panic!("{what}: {error:?}"))
            {
                let deleted = engine.delete(sandbox.name.as_str()).await;
                deleted.unwrap_or_else(|error| panic!("{what}: {error:?}"));
            }
            for volume in engine.volumes().expect("a list") {
                let removed = engine.remove_volume(volume.name.as_str());
                removed.unwrap_or_else(|error| panic!("{what}: {error:?}"));
            }
            home.assert_clean(&what);
            let second = life(&engine).await;
            second.unwrap_or_else(|error| panic!("{what}, second try: {error:?}"));
            home.assert_clean(&what);
        }
    }
    assert!(failures > least, "only {failures} effects were failed");
}

#[tokio::test]
async fn whatever_effect_fails_the_next_command_repairs() {
    each_effect_fails(life, &[(false, full), (false, broken), (true, full)], 20).await;
}

#[tokio::test]
async fn whatever_effect_of_a_copy_fails_the_next_command_repairs() {
    each_effect_fails(copies, &[(false, full), (true, full)], 40).await;
}

#[tokio::test]
async fn whatever_effect_of_a_pool_fails_the_next_command_repairs() {
    each_effect_fails(pooled, &[(false, full), (true, full)], 20).await;
}

#[tokio::test]
async fn whatever_effect_of_a_volume_fails_the_next_command_repairs() {
    each_effect_fails(with_volumes, &[(false, full), (true, full)], 20).await;
}

/// A guest is asked to write out what it has for a volume, however its sandbox is removed; one that does
/// not answer has a bounded time for it.
#[tokio::test]
async fn a_sandbox_that_writes_to_a_volume_goes_down_in_order() {
    let home = Home::new();
    let engine = home.engine();
    engine
        .create_volume(&"data".parse().expect("a name"), 64)
        .expect("a volume");
    for (mode, asked) in [("", 1), (":ro", 0)] {
        let mut spec = spec("a");
        spec.volumes = vec![format!("data:/srv{mode}").parse().expect("a volume")];
        engine.create(&spec).expect("created");
        let (session, _) = engine.start("a").await.expect("started");
        let log = home.layout().sandbox(&engine.info("a").expect("a row").id);
        let console = log.console();
        output(&session, &["hello"]).await.expect("output");
        let kept = std::fs::File::open(&console).expect("a console's log");
        engine.delete("a").await.expect("deleted");
        home.wait_for_removals();
        let said = std::io::read_to_string(&kept).expect("text");
        assert_eq!(said.matches("going down").count(), asked, "{mode}: {said}");
    }
    engine.remove_volume("data").expect("removed");
    home.assert_clean("after volumes");
}

#[tokio::test]
async fn copies_leave_nothing() {
    let home = Home::new();
    copies(&home.engine()).await.expect("copies");
    home.assert_clean("after copies");
}

#[tokio::test]
async fn a_pool_leaves_nothing() {
    let home = Home::new();
    pooled(&home.engine()).await.expect("a pool");
    home.assert_clean("after a pool");
    assert_eq!(home.engine().pools().expect("a list"), []);
}

#[tokio::test]
async fn a_paused_sandbox_says_so_and_can_be_ended() {
    let home = Home::new();
    let engine = home.engine();
    for end in ["stop", "delete", "keeper"] {
        engine.create(&spec("a")).expect("created");
        engine.start("a").await.expect("started");
        engine.pause("a").await.expect("paused");
        engine.pause("a").await.expect("paused again");
        let error = engine.connect("a").await.expect_err("it stands still");
        assert_eq!(error.kind(), ErrorKind::NotRunning);
        assert_eq!(error.hint_text(), Some("resume it with `smolvm resume a`"));
        let error = engine.start("a").await.expect_err("it stands still");
        assert_eq!(error.kind(), ErrorKind::Busy);
        match end {
            "stop" => {
                let forced = engine.stop("a", Duration::from_secs(5)).await;
                assert!(!forced.expect("stopped"), "its guest was asked");
                assert_eq!(engine.info("a").expect("a row").state, State::Stopped);
            }
            "keeper" => {
                let killed = keeper(&engine, "a").kill_and_wait(Duration::from_secs(10));
                killed.expect("killed");
                assert_eq!(engine.info("a").expect("a row").state, State::Error);
            }
            _ => {}
        }
        engine.delete("a").await.expect("deleted");
        home.assert_clean(end);
    }
}

/// Whoever makes a pool, fills it or removes it has to be done before the next one begins; and the last
/// word leaves nothing.
#[test]
fn a_pool_that_many_set_and_remove_at_once_leaves_nothing() {
    let home = Home::new();
    let engine = home.engine();
    let both = |size: u32| {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        for _ in 0..6 {
            let set = runtime.block_on(engine.set_pool(&pool(size, &[]), &mut |_| {}));
            set.expect("set");
        }
    };
    std::thread::scope(|scope| {
        for size in [2, 0, 3, 0] {
            scope.spawn(move || both(size));
        }
    });
    both(0);
    assert_eq!(engine.pools().expect("a list"), []);
    let files = std::fs::read_dir(home.layout().pools()).expect("the directory");
    assert_eq!(files.count(), 0, "a pool left files");
    home.assert_clean("after the last one");
}

/// Of many who want the same few members each gets one of its own, or none.
#[tokio::test]
async fn a_member_is_claimed_by_one() {
    let home = Home::new();
    let engine = home.engine();
    let pool = pool(3, &[]);
    engine.set_pool(&pool, &mut |_| {}).await.expect("a pool");
    assert!(
        engine.list().expect("a list").is_empty(),
        "members are not shown"
    );
    let names: Vec<_> = (0..8).map(|number| format!("claim-{number}")).collect();
    let mut claims = tokio::task::JoinSet::new();
    for name in names.clone() {
        let engine = engine.clone();
        claims.spawn(async move {
            let claimed = engine.claim(&spec(&name)).await.expect("an answer");
            claimed.map(|(session, _)| (name, session))
        });
    }
    let claimed: Vec<_> = claims.join_all().await.into_iter().flatten().collect();
    // The pool is filled up meanwhile, so later ones may find new members.
    assert!(claimed.len() >= 3, "{} were claimed", claimed.len());
    let ids: std::collections::BTreeSet<_> = claimed
        .iter()
        .map(|(name, _)| engine.info(name).expect("a row").id)
        .collect();
    assert_eq!(ids.len(), claimed.len(), "two have the same machine");
    let counted = &engine.pools().expect("a list")[0];
    let hits = u64::try_from(claimed.len()).expect("few");
    assert_eq!((counted.hits, counted.hits + counted.misses), (hits, 8));
    for (name, session) in claimed {
        assert_eq!(output(&session, &["hello"]).await.expect("output"), "hello");
        engine.delete(&name).await.expect("deleted");
    }
    // A name that is taken is not given twice, and the member stays.
    engine
        .set_pool(&pool, &mut |_| {})
        .await
        .expect("full again");
    engine.create(&spec("taken")).expect("created");
    let error = engine.claim(&spec("taken")).await.expect_err("taken");
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    assert_eq!(engine.pools().expect("a list")[0].ready, 3);
    engine.delete("taken").await.expect("deleted");
    let none = PoolSpec { size: 0, ..pool };
    engine.set_pool(&none, &mut |_| {}).await.expect("removed");
    home.assert_clean("after claims");
}

/// Members whose keeper died are not offered.
#[tokio::test]
async fn a_member_whose_keeper_died_is_passed_over() {
    let home = Home::new();
    let engine = home.engine();
    let pool = pool(2, &[]);
    engine.set_pool(&pool, &mut |_| {}).await.expect("a pool");
    let store = Store::open(&home.layout().database()).expect("a store");
    let holder = store.sandboxes().expect("rows")[0].holder.clone();
    let killed = holder
        .expect("a keeper")
        .kill_and_wait(Duration::from_secs(10));
    killed.expect("killed");
    let claimed = engine.claim(&spec("a")).await.expect("an answer");
    assert!(claimed.is_some(), "the other one was there");
    engine.delete("a").await.expect("deleted");
    let none = PoolSpec { size: 0, ..pool };
    engine.set_pool(&none, &mut |_| {}).await.expect("removed");
    home.assert_clean("after a dead member");
}

/// Members that do not answer are given up one after the other, and are gone; nothing is counted as
/// claimed, and the name is free.
#[tokio::test]
async fn members_that_do_not_answer_are_removed() {
    let home = Home::new();
    let engine = home.engine();
    let pool = pool(2, &[]);
    engine.set_pool(&pool, &mut |_| {}).await.expect("a pool");
    let store = Store::open(&home.layout().database()).expect("a store");
    let before: Vec<_> = store.sandboxes().expect("rows");
    let begun = std::time::Instant::now();
    let claimed = engine.claim(&spec("a-deaf")).await.expect("an answer");
    assert!(claimed.is_none(), "nobody answered");
    // Not a measurement: each alone had ten seconds before.
    assert!(begun.elapsed() < Duration::from_secs(20));
    for row in before {
        let now = store.sandbox(&row.id).expect("read");
        assert!(
            now.is_none_or(|now| now.state == State::Deleting),
            "it is there still"
        );
    }
    let counted = &engine.pools().expect("a list")[0];
    assert_eq!((counted.hits, counted.misses), (0, 1));
    engine.create(&spec("a-deaf")).expect("the name is free");
    engine.delete("a-deaf").await.expect("deleted");
    let none = PoolSpec { size: 0, ..pool };
    engine.set_pool(&none, &mut |_| {}).await.expect("removed");
    home.assert_clean("after deaf members");
}

/// Members of a kernel that is not the default any more are not called ready, and are replaced by the
/// next filling.
#[tokio::test]
async fn a_pool_whose_kernel_changed_is_filled_anew() {
    let home = Home::new();
    let engine = home.engine();
    let pool = pool(1, &[]);
    engine.set_pool(&pool, &mut |_| {}).await.expect("a pool");
    add_kernel(&home, "small-1-0a1b2c3d");
    let now = &engine.pools().expect("a list")[0];
    assert_eq!((now.ready, now.stale), (0, 1));
    assert!(engine.claim(&spec("a")).await.expect("an answer").is_none());
    // Filled in the background.
    let filled = async {
        while engine.pools().expect("a list")[0].ready == 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let filled = tokio::time::timeout(Duration::from_secs(60), filled).await;
    filled.expect("nobody fills the pool");
    let (_session, _) = engine
        .claim(&spec("a"))
        .await
        .expect("an answer")
        .expect("a member");
    assert_eq!(engine.info("a").expect("a row").kernel, "small-1-0a1b2c3d");
    engine.delete("a").await.expect("deleted");
    let none = PoolSpec { size: 0, ..pool };
    engine.set_pool(&none, &mut |_| {}).await.expect("removed");
    home.assert_clean("after a new kernel");
}

#[tokio::test]
async fn a_member_has_no_name_to_anybody() {
    let home = Home::new();
    let engine = home.engine();
    let pool = pool(1, &[]);
    engine.set_pool(&pool, &mut |_| {}).await.expect("a pool");
    let store = Store::open(&home.layout().database()).expect("a store");
    let name = store.sandboxes().expect("rows")[0].spec.name.to_string();
    let kind = |result: Result<()>| result.expect_err("unknown").kind();
    let unknown = ErrorKind::NotFound;
    assert_eq!(kind(engine.info(&name).map(drop)), unknown);
    assert_eq!(kind(engine.start(&name).await.map(drop)), unknown);
    assert_eq!(kind(engine.connect(&name).await.map(drop)), unknown);
    assert_eq!(kind(engine.pause(&name).await), unknown);
    assert_eq!(kind(engine.resume(&name).await), unknown);
    assert_eq!(
        kind(engine.fork(&name, 1, Some("b")).await.map(drop)),
        unknown
    );
    let stop = engine.stop(&name, Duration::ZERO).await;
    assert_eq!(kind(stop.map(drop)), unknown);
    assert_eq!(kind(engine.delete(&name).await), unknown);
    assert_eq!(engine.pools().expect("a list")[0].ready, 1);
    let none = PoolSpec { size: 0, ..pool };
    engine.set_pool(&none, &mut |_| {}).await.expect("removed");
    home.assert_clean("after a member");
}

/// A keeper loses what it cannot log, and nothing else.
#[test]
fn a_log_that_cannot_be_written_ends_nothing() {
    let home = Home::new();
    let full = std::fs::File::options()
        .write(true)
        .open("/dev/full")
        .expect("full(4)");
    // Without arguments it has something to say at once.
    let status = std::process::Command::new(home.config().keeper)
        .stderr(full)
        .status()
        .expect("run");
    assert_eq!(status.code(), Some(2), "it ended in another way");
}

/// Fails every effect of one kind.
#[derive(Debug)]
struct Always(&'static str);

impl Faults for Always {
    fn before(&self, op: &'static str, _path: &Path) -> io::Result<()> {
        if op == self.0 { Err(full()) } else { Ok(()) }
    }
}

/// A sandbox that cannot be put right is shown as it is, and keeps nobody from the others.
#[tokio::test]
async fn a_repair_that_fails_keeps_nobody_from_the_list() {
    let home = Home::new();
    let engine = home.engine();
    for name in ["a", "b"] {
        engine.create(&spec(name)).expect("created");
    }
    engine.start("a").await.expect("started");
    let killed = keeper(&engine, "a").kill_and_wait(Duration::from_secs(10));
    killed.expect("killed");
    let faults = Os::with_faults(Arc::new(Always("lock the sandbox")));
    let hindered = Engine::with_os(home.config(), faults);
    let rows = hindered.list().expect("a list");
    let states: Vec<_> = rows.iter().map(|row| row.state).collect();
    assert_eq!(states, [State::Error, State::Created]);
    let info = hindered.info("a").expect("a row");
    assert_eq!(info.state, State::Error);
    assert!(info.reason.expect("a reason").contains("cannot lock"));
    hindered.delete("a").await.expect("deleted all the same");
    engine.delete("b").await.expect("deleted");
    home.assert_clean("after a failed repair");
}

/// A kernel whose description does not read keeps nobody from the others.
#[tokio::test]
async fn a_damaged_kernel_is_shown_and_can_be_removed() {
    let home = Home::new();
    let engine = home.engine();
    add_kernel(&home, "small-6.1-0");
    let description = home.layout().kernels().join("small-6.1-0/kernel.json");
    std::fs::write(description, "{").expect("damaged");
    let kernels = engine.kernels().expect("a list");
    let damaged: Vec<_> = kernels
        .iter()
        .map(|kernel| kernel.damage.is_some())
        .collect();
    assert_eq!(damaged, [true, false]);
    let made = engine.create(&spec("a")).expect("with the other one");
    assert_eq!(made.kernel, "stock");
    engine.remove_kernel("small-6.1-0").expect("removed");
    assert_eq!(engine.kernels().expect("a list").len(), 1);
    engine.delete("a").await.expect("deleted");
    home.assert_clean("after a damaged kernel");
}

/// Copies live as long as what they are of, and whoever makes them is told of each.
#[tokio::test]
async fn copies_have_the_time_to_live_of_their_source() {
    let home = Home::new();
    let engine = home.engine();
    let ttl = Some(Duration::from_secs(3600));
    engine
        .create(&SandboxSpec { ttl, ..spec("a") })
        .expect("created");
    engine.start("a").await.expect("started");
    let (made, names) = std::sync::mpsc::channel();
    let fork = engine.fork_telling("a", 2, None, &made).await;
    assert_eq!(fork.expect("forked").children.len(), 2);
    let mut told: Vec<_> = names.try_iter().map(|name| name.to_string()).collect();
    told.sort();
    assert_eq!(told, ["a-1", "a-2"]);
    engine.snapshot("a", Some("s")).await.expect("a snapshot");
    let name = "b".parse().expect("a name");
    engine.restore("s", &name).await.expect("restored");
    for name in ["a", "a-1", "a-2", "b"] {
        assert_eq!(engine.info(name).expect("a row").ttl, ttl, "{name}");
        engine.delete(name).await.expect("deleted");
    }
    engine.remove_snapshot("s").expect("removed");
    home.assert_clean("after copies");
}

/// A guest that answers nothing any more keeps nobody for longer than he wants to wait.
#[tokio::test]
async fn a_guest_that_is_stuck_keeps_nobody() {
    let home = Home::new();
    let engine = home.engine();
    engine.create(&spec("a")).expect("created");
    let (session, _) = engine.start("a").await.expect("started");
    let timed = |word: &str| ExecSpec {
        timeout: Some(Duration::from_millis(1)),
        ..ExecSpec::new(vec![word.into()])
    };
    let mut running = session.exec(&timed("hang")).await.expect("started");
    let freeze = ExecSpec::new(vec!["freeze".into()]);
    let _freezing = session.exec(&freeze).await.expect("started");
    let late = timed("late");
    let (ended, refused) = tokio::join!(running.next(), session.exec(&late));
    match ended.expect("an end") {
        ExecEvent::Exited(status) => assert!(status.timed_out, "{status:?}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(refused.expect_err("no answer").kind(), ErrorKind::Timeout);
    let facts = session.facts_within(Duration::from_millis(1)).await;
    assert_eq!(facts.expect_err("no answer").kind(), ErrorKind::Timeout);
    let image = "tools".parse().expect("a name");
    let options = CommitOptions::default();
    let mut watcher = |_: &Progress| {};
    let committed = engine.commit("a", &image, &options, &mut watcher, std::future::ready(()));
    assert_eq!(
        committed.await.expect_err("given up").kind(),
        ErrorKind::Cancelled
    );
    engine.delete("a").await.expect("deleted");
    home.assert_clean("after a guest that was stuck");
}

#[tokio::test]
async fn two_starters_get_one_machine() {
    let home = Home::new();
    let engine = home.engine();
    engine.create(&spec("a")).expect("created");
    let (first, second) = tokio::join!(engine.start("a"), engine.start("a"));
    let (first, second) = (first.expect("started").0, second.expect("connected").0);
    assert_eq!(output(&first, &["x"]).await.expect("output"), "x");
    assert_eq!(output(&second, &["y"]).await.expect("output"), "y");
    engine.delete("a").await.expect("deleted");
    home.assert_clean("after two starts");
}

#[tokio::test]
async fn an_owner_that_goes_takes_the_sandbox_along() {
    let home = Home::new();
    let engine = home.engine();
    engine
        .create(&SandboxSpec {
            ephemeral: true,
            ..spec("a")
        })
        .expect("created");
    let (session, _) = engine.start("a").await.expect("started");
    session.own().await.expect("owned");
    let keeper = keeper(&engine, "a");
    drop(session);
    ended(&keeper).await;
    home.assert_clean("after the owner went");
}

#[tokio::test]
async fn a_machine_that_dies_is_told_truthfully() {
    let home = Home::new();
    let engine = home.engine();
    engine.create(&spec("a")).expect("created");
    let (session, _) = engine.start("a").await.expect("started");
    let keeper = keeper(&engine, "a");
    output(&session, &["crash"])
        .await
        .expect_err("the machine is gone");
    ended(&keeper).await;
    let info = engine.info("a").expect("a row");
    assert_eq!(info.state, State::Error);
    let reason = info.reason.expect("a reason");
    assert!(
        reason.contains("signal 11") && reason.contains("out of luck"),
        "{reason}"
    );
    let error = engine.connect("a").await.expect_err("it is off");
    assert_eq!(error.kind(), ErrorKind::NotRunning);
    engine.start("a").await.expect("started again");
    engine.delete("a").await.expect("deleted");
    home.assert_clean("after a crash");
}

/// A machine that could not write to its disk runs on; that is told as long as it does.
#[tokio::test]
async fn a_full_disk_under_a_machine_that_runs_is_told() {
    let home = Home::new();
    let engine = home.engine();
    engine.create(&spec("a")).expect("created");
    let (session, _) = engine.start("a").await.expect("started");
    output(&session, &["fill"]).await.expect("output");
    let told = async {
        loop {
            let info = engine.info("a").expect("a row");
            assert_eq!(info.state, State::Running);
            if let Some(reason) = info.reason {
                return reason;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let told = tokio::time::timeout(Duration::from_secs(20), told).await;
    let told = told.expect("nothing is said of it");
    assert!(told.starts_with("the host's disk was full at "), "{told}");
    assert!(told.contains("disk.ext4 could not be written"), "{told}");
    engine.stop("a", Duration::ZERO).await.expect("stopped");
    assert_eq!(engine.info("a").expect("a row").reason, None);
    engine.delete("a").await.expect("deleted");
    home.assert_clean("after a full disk");
}

#[tokio::test]
async fn a_keeper_that_dies_is_told_truthfully() {
    let home = Home::new();
    let engine = home.engine();
    for ephemeral in [false, true] {
        engine
            .create(&SandboxSpec {
                ephemeral,
                ..spec("a")
            })
            .expect("created");
        engine.start("a").await.expect("started");
        let keeper = keeper(&engine, "a");
        keeper
            .kill_and_wait(Duration::from_secs(10))
            .expect("killed");
        let rows = engine.list().expect("a list");
        if ephemeral {
            assert!(rows.is_empty(), "{rows:?}");
        } else {
            assert_eq!(rows[0].state, State::Error);
            engine.start("a").await.expect("started again");
            engine.delete("a").await.expect("deleted");
        }
        home.assert_clean("after the keeper's death");
    }
}

#[tokio::test]
async fn a_guest_that_is_never_ready_shows_its_console() {
    let home = Home::new();
    let engine = Engine::new(Config {
        boot_timeout: Duration::from_millis(300),
        ..home.config()
    });
    engine.create(&spec("a-mute")).expect("created");
    let error = engine.start("a-mute").await.expect_err("never ready");
    assert_eq!(error.kind(), ErrorKind::GuestFailed);
    assert_eq!(error.console_lines(), ["no root file system"]);
    assert_eq!(engine.info("a-mute").expect("a row").state, State::Error);
    engine.delete("a-mute").await.expect("deleted");
    home.assert_clean("after a guest that was never ready");
}

#[tokio::test]
async fn a_time_to_live_ends() {
    let home = Home::new();
    let engine = home.engine();
    engine
        .create(&SandboxSpec {
            ttl: Some(Duration::from_secs(2)),
            ..spec("a")
        })
        .expect("created");
    let (session, _) = engine.start("a").await.expect("started");
    let keeper = keeper(&engine, "a");
    output(&session, &["hang"])
        .await
        .expect_err("the sandbox is gone");
    ended(&keeper).await;
    home.assert_clean("after the time-to-live");
}

#[tokio::test]
async fn a_missing_keeper_leaves_a_sandbox_that_can_be_started_later() {
    let home = Home::new();
    let engine = Engine::new(Config {
        keeper: home.path("bin/no-such-keeper"),
        ..home.config()
    });
    engine.create(&spec("a")).expect("created");
    let error = engine.start("a").await.expect_err("no keeper");
    assert!(error.to_string().contains("no-such-keeper"), "{error}");
    let engine = home.engine();
    assert_eq!(engine.info("a").expect("a row").state, State::Error);
    engine.start("a").await.expect("started");
    engine.delete("a").await.expect("deleted");
    home.assert_clean("after a missing keeper");
}

#[tokio::test]
async fn what_belongs_to_no_sandbox_is_pruned() {
    let home = Home::new();
    let engine = home.engine();
    engine.create(&spec("a")).expect("created");
    engine.start("a").await.expect("started");
    let stray = home.layout().sandboxes().join("0000000000000000");
    std::fs::create_dir(&stray).expect("a directory");
    let would = engine.prune(true, true).await.expect("a dry run").pruned;
    assert_eq!(would.len(), 1, "{would:?}");
    assert!(stray.exists());
    engine.prune(false, true).await.expect("pruned");
    assert!(!stray.exists());
    assert_eq!(engine.info("a").expect("untouched").state, State::Running);
    engine.stop("a", Duration::ZERO).await.expect("stopped");
    engine.prune(false, true).await.expect("pruned");
    home.assert_clean("after pruning");
}

#[tokio::test]
async fn what_belongs_to_a_pool_that_is_gone_is_pruned() {
    let home = Home::new();
    let engine = home.engine();
    let kept = PoolSpec {
        memory_mib: 300,
        ..pool(1, &[])
    };
    for pool in [&pool(2, &[]), &kept] {
        engine.set_pool(pool, &mut |_| {}).await.expect("a pool");
    }
    let mut store = Store::open(&home.layout().database()).expect("the store");
    let pools = store.pools().expect("the pools");
    let gone = pools.iter().find(|row| row.memory_mib != 300);
    store
        .delete_pool(&gone.expect("the first").id)
        .expect("deleted");
    let stray = home.layout().pools().join("0000000000000000.log");
    std::fs::write(&stray, "").expect("a file");

    // Two members, the pool's two files, and the stray.
    let would = engine.prune(true, false).await.expect("a dry run").pruned;
    assert_eq!(would.len(), 5, "{would:?}");
    assert!(stray.exists());
    assert_eq!(
        engine
            .prune(false, false)
            .await
            .expect("pruned")
            .pruned
            .len(),
        5
    );
    let again = engine.prune(false, false).await.expect("pruned").pruned;
    assert_eq!(again, []);
    let pools = engine.pools().expect("a list");
    assert_eq!((pools.len(), pools[0].ready), (1, 1), "{pools:?}");
    let gone = PoolSpec { size: 0, ..kept };
    engine.set_pool(&gone, &mut |_| {}).await.expect("removed");
    let files = std::fs::read_dir(home.layout().pools()).expect("the directory");
    assert_eq!(files.count(), 0, "a pool left files");
    home.assert_clean("after pruning");
}

/// Builds the template that sandboxes of [`spec`] start from.
fn build_template(engine: &Engine) -> Result<BuiltTemplate> {
    engine.build_template(&spec("a"), &mut |_: &Progress| {}, &Cancel::new()?)
}

/// The only template's directory.
fn template_dir(home: &Home) -> PathBuf {
    let mut dirs: Vec<_> = std::fs::read_dir(home.layout().templates())
        .expect("the templates")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.is_dir())
        .collect();
    assert_eq!(dirs.len(), 1, "{dirs:?}");
    dirs.remove(0)
}

#[tokio::test]
async fn a_template_is_built_once_and_used_until_something_changes() {
    let home = Home::new();
    let engine = home.engine();
    assert_eq!(engine.templates().expect("a list"), []);
    let first = build_template(&engine).expect("built");
    assert!(first.built);
    let shape = first.template.shape.clone().expect("it can be read");
    assert_eq!(shape.images, ["debian-12"]);
    assert_eq!((shape.kernel.as_str(), shape.memory_mib), ("stock", 512));
    let again = build_template(&engine).expect("found");
    assert!(!again.built);
    assert_eq!(again.template, first.template);
    engine.create(&spec("a")).expect("created");
    let (_, times) = engine.start("a").await.expect("started");
    assert_eq!(times.warnings, Vec::<String>::new());
    assert_eq!(
        engine.templates().expect("a list"),
        std::slice::from_ref(&first.template)
    );
    assert_eq!(first.template.stale, None);

    // An engine that is another, and what a killed builder left.
    std::fs::write(home.path("bin/qemu-system-x86_64"), "another").expect("a program");
    let listed = engine.templates().expect("a list");
    assert_eq!(listed[0].stale.as_deref(), Some("the engine is another"));
    let dir = template_dir(&home);
    let name = dir
        .file_name()
        .expect("a name")
        .to_string_lossy()
        .into_owned();
    let (prefix, _) = name.split_once('-').expect("a purpose and its ingredients");
    let half = dir.with_file_name(format!("{prefix}.making-0"));
    std::fs::create_dir(&half).expect("a directory");
    let kinds = |pruned: &[Pruned]| pruned.iter().map(|it| it.kind).collect::<Vec<_>>();
    let would = engine.prune(true, false).await.expect("a dry run");
    assert_eq!(kinds(&would.pruned), ["template", "leftover"]);
    assert!(dir.exists() && half.exists());
    // One that is being built is none of a prune's business.
    let os = Os::new();
    let lock = home.layout().templates().join(format!("{prefix}.lock"));
    let builder = os.lock("build", &lock).expect("the lock");
    let pruned = engine.prune(false, false).await.expect("pruned");
    assert_eq!(kinds(&pruned.pruned), ["template"]);
    assert!(!dir.exists() && half.exists());
    drop(builder);
    engine.prune(false, false).await.expect("pruned");
    assert!(!half.exists());
    assert_eq!(engine.info("a").expect("a clone").state, State::Running);

    let newer = build_template(&engine).expect("built");
    assert_ne!(newer.template.id, first.template.id);
    let error = engine
        .remove_template(&first.template.id)
        .expect_err("gone");
    assert_eq!(error.kind(), ErrorKind::NotFound);
    engine.remove_template(&newer.template.id).expect("removed");
    assert_eq!(engine.templates().expect("a list"), []);
    engine.delete("a").await.expect("deleted");
    home.assert_clean("after the templates");
}

#[tokio::test]
async fn a_start_that_cannot_be_a_restore_says_why() {
    let home = Home::new();
    let engine = home.engine();
    let warned_of = async |name: &str| {
        engine.create(&spec(name)).expect("created");
        let (session, times) = engine.start(name).await.expect("it boots");
        assert_eq!(output(&session, &["hello"]).await.expect("output"), "hello");
        engine.delete(name).await.expect("deleted");
        times.warnings
    };
    std::fs::write(home.layout().templates(), "in the way").expect("a file");
    let warnings = warned_of("a").await;
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    let begin = "no template could be made, so sandbox `a` booted: could not read ";
    assert!(warnings[0].starts_with(begin), "{warnings:?}");

    std::fs::remove_file(home.layout().templates()).expect("a file");
    build_template(&engine).expect("built");
    // Its description has to know nothing of the file that is missing, or another would be built.
    let template = template_dir(&home);
    std::fs::remove_file(template.join("state")).expect("a file");
    let description = template.join("template.json");
    let text = std::fs::read(&description).expect("a file");
    let mut known: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
    let files = known["files"].as_object_mut().expect("its files");
    files.remove("state").expect("one of them");
    std::fs::write(&description, known.to_string()).expect("a file");
    let warnings = warned_of("b").await;
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    let begin = "sandbox `b` could not be restored from its template, and booted: ";
    assert!(warnings[0].starts_with(begin), "{warnings:?}");
    home.assert_clean("after the warnings");
}

#[tokio::test]
async fn no_template_is_built_that_nobody_would_use() {
    let home = Home::new();
    let mut config = home.config();
    config.templates = false;
    let error = build_template(&Engine::new(config)).expect_err("switched off");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    let mut shared = spec("a");
    shared.disk_mode = DiskMode::Shared;
    let cancel = Cancel::new().expect("a handle");
    let engine = home.engine();
    let error = engine.build_template(&shared, &mut |_: &Progress| {}, &cancel);
    assert_eq!(error.expect_err("shared").kind(), ErrorKind::Unsupported);
    // Given up before it began to wait.
    cancel.cancel();
    let error = engine.build_template(&spec("a"), &mut |_: &Progress| {}, &cancel);
    assert_eq!(error.expect_err("cancelled").kind(), ErrorKind::Cancelled);
    let left = std::fs::read_dir(home.layout().templates()).expect("the templates");
    let left: Vec<_> = left
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.is_dir())
        .collect();
    assert_eq!(left, Vec::<PathBuf>::new());
}

fn keeper(engine: &Engine, name: &str) -> ProcessIdentity {
    let pid = engine
        .info(name)
        .expect("a row")
        .keeper_pid
        .expect("a keeper");
    ProcessIdentity::of(i32::try_from(pid).expect("a pid"))
        .expect("/proc")
        .expect("a keeper that runs")
}

/// Waits until a process has ended.
async fn ended(process: &ProcessIdentity) {
    let Some(pidfd) = process.open().expect("a pidfd") else {
        return;
    };
    let ready = tokio::task::spawn_blocking(move || {
        let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
        let limit = Timespec {
            tv_sec: 20,
            tv_nsec: 0,
        };
        poll(&mut fds, Some(&limit)).expect("a wait")
    });
    assert_eq!(ready.await.expect("a thread"), 1, "it ends in time");
}

/// Puts a kernel there as a build would.
fn add_kernel(home: &Home, key: &str) {
    let dir = home.layout().kernels().join(key);
    std::fs::create_dir_all(&dir).expect("a directory");
    std::fs::write(dir.join("vmlinux"), "").expect("a kernel");
    std::fs::write(
        dir.join("kernel.json"),
        r#"{"release": "2", "source": "a test", "digest": "sha256:0", "modules": [],
            "devices": "command-line"}"#,
    )
    .expect("a description");
}

#[tokio::test]
async fn a_small_kernel_is_used_once_it_is_there() {
    let home = Home::new();
    let engine = home.engine();
    let kernel_of = |name: &str, choice: KernelChoice| {
        let mut spec = spec(name);
        spec.kernel = choice;
        engine.create(&spec).map(|sandbox| sandbox.kernel)
    };
    assert_eq!(kernel_of("before", KernelChoice::Auto).expect("a"), "stock");
    let error = kernel_of("none", KernelChoice::Small).expect_err("there is none");
    assert_eq!(error.kind(), ErrorKind::NotFound);

    add_kernel(&home, "docker-6.1-0");
    assert_eq!(
        kernel_of("a", KernelChoice::Auto).expect("a"),
        "docker-6.1-0"
    );
    // Half made, and no kernel.
    add_kernel(&home, ".small-6.2-0.partial");
    add_kernel(&home, "small-6.1-0");
    assert_eq!(
        kernel_of("b", KernelChoice::Auto).expect("b"),
        "small-6.1-0"
    );
    assert_eq!(
        kernel_of("c", KernelChoice::Docker).expect("c"),
        "docker-6.1-0"
    );
    assert_eq!(kernel_of("d", KernelChoice::Stock).expect("d"), "stock");
    let kernels = engine.kernels().expect("a list");
    let seen: Vec<_> = kernels
        .iter()
        .map(|kernel| {
            (
                kernel.key.as_str(),
                kernel.is_default,
                kernel.used_by.join(" "),
            )
        })
        .collect();
    assert_eq!(
        seen,
        [
            ("docker-6.1-0", false, "a c".to_owned()),
            ("small-6.1-0", true, "b".to_owned()),
            ("stock", false, "before d".to_owned()),
        ]
    );

    // What was made before keeps its kernel, and the machine is told how that finds devices.
    for (name, devices) in [("before", Devices::Acpi), ("b", Devices::CommandLine)] {
        let id = engine.info(name).expect("a sandbox").id;
        engine.start(name).await.expect("a start");
        let file = home.layout().sandbox(&id).launch_file();
        assert_eq!(Launch::read(&file).expect("a launch").vm.devices, devices);
    }
    for name in ["before", "a", "b", "c", "d"] {
        engine.delete(name).await.expect("a deletion");
    }
    home.assert_clean("after the kernels");
}

#[tokio::test]
async fn a_kernel_in_use_is_not_removed() {
    let home = Home::new();
    let engine = home.engine();
    add_kernel(&home, "small-6.1-0");
    engine.create(&spec("user")).expect("a sandbox");
    let error = engine.remove_kernel("small-6.1-0").expect_err("it is used");
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert_eq!(
        error.to_string(),
        "kernel `small-6.1-0` is used by sandbox `user`"
    );
    let pool = pool(1, &[]);
    engine.set_pool(&pool, &mut |_| {}).await.expect("a pool");
    engine.start("user").await.expect("it runs");
    engine
        .snapshot("user", Some("then"))
        .await
        .expect("a snapshot");
    let error = engine.remove_kernel("small-6.1-0").expect_err("it is used");
    assert_eq!(
        error.to_string(),
        "kernel `small-6.1-0` is used by sandbox `user` and snapshot `then` and 1 pool"
    );
    let kernels = engine.kernels().expect("a list");
    let small = kernels.iter().find(|kernel| kernel.key == "small-6.1-0");
    assert_eq!(small.expect("listed").used_by, ["user"]);
    let none = PoolSpec { size: 0, ..pool };
    engine.set_pool(&none, &mut |_| {}).await.expect("removed");
    engine.remove_snapshot("then").expect("removed");
    engine.stop("user", Duration::ZERO).await.expect("stopped");
    engine.start("user").await.expect("it is there still");
    let templates = || std::fs::read_dir(home.layout().templates()).map_or(0, Iterator::count);
    let with = templates();
    engine.delete("user").await.expect("a deletion");
    engine.remove_kernel("small-6.1-0").expect("nobody uses it");
    assert!(templates() < with, "its template is left");
    for gone in ["small-6.1-0", ".", "../kernels/stock", ""] {
        let error = engine.remove_kernel(gone).expect_err("it is not there");
        assert_eq!(error.kind(), ErrorKind::NotFound, "{gone}");
    }
    let kernels: Vec<_> = engine.kernels().expect("a list");
    assert_eq!(kernels.len(), 1);
    assert!(kernels[0].is_default && kernels[0].key == "stock");
    home.assert_clean("after the removal");
}

//! Setting up, tearing down, and what is left when something fails between.

use std::collections::BTreeSet;
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Barrier};

use smolvm_host::net::alloc::AddressPool;
use smolvm_host::net::nft::{Firewall, Guest, Loss, Mended, Policy, Reach, Transport, Watch};
use smolvm_host::net::tap::{self, Lifetime, Owner, Tap, TapName, TapSpec};
use smolvm_host::{Faults, HostError, HostErrorKind, Os};

use crate::lab::{Namespace, guest, may_run, name, owner, tap_spec};

/// A policy that has elements in every set.
fn full(n: u32) -> Policy {
    let port = |port| std::num::NonZeroU16::new(port).expect("a port");
    let networks: &[&str] = if n.is_multiple_of(2) {
        &["198.51.100.0/24", "192.0.2.0/25", "10.0.0.0/8"]
    } else {
        &["0.0.0.0/0"]
    };
    Policy {
        reach: Reach::Listed {
            networks: networks
                .iter()
                .map(|n| n.parse().expect("a network"))
                .collect(),
            names: true,
        },
        exceptions: vec!["10.1.0.0/16".parse().expect("a network")],
        resolver: Some(port(4053)),
        host_ports: vec![(Transport::Tcp, port(8080)), (Transport::Udp, port(4053))],
    }
}

/// Sets a guest's network up, as whoever starts a machine does.
fn set_up(os: &Os, guest: &Guest) -> Result<Tap, HostError> {
    Firewall::new(os.clone(), owner()).add(guest)?;
    let tap = Tap::create(os, &tap_spec(&AddressPool::default(), guest))?;
    let soon = std::time::Duration::from_secs(60);
    Firewall::new(os.clone(), owner())
        .allow(guest.address, &[(Ipv4Addr::new(192, 0, 2, 9), soon)])?;
    Ok(tap)
}

fn tear_down(os: &Os, guest: &Guest, tap: Option<Tap>) -> Result<(), HostError> {
    Firewall::new(os.clone(), owner()).remove(guest)?;
    drop(tap);
    tap::delete(os, guest.tap)
}

/// A host with the table, as it is when no sandbox is there.
fn host() -> Namespace {
    let host = Namespace::new();
    host.run(|| {
        let mended = firewall().ensure(&[]).expect("a table");
        assert!(mended.table);
        assert_eq!(firewall().ensure(&[]).expect("a table"), Mended::default());
    });
    host
}

fn firewall() -> Firewall {
    Firewall::new(Os::new(), owner())
}

#[test]
fn a_hundred_sandboxes_leave_nothing() {
    if !may_run() {
        return;
    }
    let host = host();
    let before = host.picture();
    host.run(|| {
        let guests: Vec<_> = (0..100)
            .map(|n| guest(&AddressPool::default(), n, full(n)))
            .collect();
        let taps: Vec<_> = guests
            .iter()
            .map(|guest| set_up(&Os::new(), guest).expect("set up"))
            .collect();
        let names: BTreeSet<_> = guests.iter().map(|guest| guest.tap).collect();
        let listed = |taps: Vec<TapName>| taps.into_iter().collect::<BTreeSet<_>>();
        assert_eq!(listed(firewall().guests().expect("guests")), names);
        assert_eq!(
            listed(tap::list(&Os::new(), &owner()).expect("taps")),
            names
        );
        for (guest, tap) in guests.iter().zip(taps) {
            tear_down(&Os::new(), guest, Some(tap)).expect("torn down");
            // Once more is no error.
            tear_down(&Os::new(), guest, None).expect("torn down");
        }
    });
    assert_eq!(host.picture(), before);
}

#[test]
fn the_table_goes_without_a_trace() {
    if !may_run() {
        return;
    }
    let host = Namespace::new();
    let before = host.picture();
    host.run(|| {
        let guest = guest(&AddressPool::default(), 1, full(1));
        // The first guest makes the table.
        firewall().add(&guest).expect("added");
        firewall().remove_table().expect("removed");
        firewall().remove_table().expect("removed");
        firewall().remove(&guest).expect("nothing to remove");
        assert_eq!(firewall().guests().expect("guests"), []);
        assert_eq!(firewall().denied(guest.tap).expect("a list"), []);
    });
    assert_eq!(host.picture(), before);
}

#[test]
fn sixteen_at_once_do_not_clash() {
    if !may_run() {
        return;
    }
    // Not even over who makes the table.
    let host = Namespace::new();
    let net = host.run(|| std::fs::File::open("/proc/thread-self/ns/net").expect("a namespace"));
    let (net, barrier) = (Arc::new(net), Arc::new(Barrier::new(16)));
    let threads: Vec<_> = (0..16_u32)
        .map(|thread| {
            let (net, barrier) = (net.clone(), barrier.clone());
            std::thread::spawn(move || {
                rustix::thread::move_into_link_name_space(
                    std::os::fd::AsFd::as_fd(&*net),
                    Some(rustix::thread::LinkNameSpaceType::Network),
                )
                .expect("entered");
                barrier.wait();
                for round in 0..6 {
                    let guest = guest(&AddressPool::default(), thread * 6 + round, full(round));
                    let tap = set_up(&Os::new(), &guest).expect("set up");
                    let open = Guest {
                        policy: Policy::new(Reach::Open),
                        ..guest
                    };
                    firewall().change(&open, &[]).expect("changed");
                    tear_down(&Os::new(), &open, Some(tap)).expect("torn down");
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().expect("a thread");
    }
    let after = host.picture();
    host.run(|| assert_eq!(firewall().ensure(&[]).expect("looked"), Mended::default()));
    let fresh = self::host();
    assert_eq!(after, fresh.picture());
}

#[test]
fn a_guest_of_unknown_policy_is_purged_and_others_stay() {
    if !may_run() {
        return;
    }
    let host = host();
    let before = host.picture();
    let pool = AddressPool::default();
    let known = guest(&pool, 1, full(1));
    let unknown = Guest {
        policy: Policy::off(),
        ..known.clone()
    };
    host.run(move || {
        firewall().add(&known).expect("added");
        // Another guest's that has the address by now is left alone.
        let earlier = Guest {
            tap: name(9),
            ..unknown.clone()
        };
        firewall().purge(&earlier).expect("nothing of its own");
        assert_eq!(firewall().guests().expect("guests"), [known.tap]);
        firewall().purge(&unknown).expect("purged");
        firewall().purge(&unknown).expect("purged again");
    });
    assert_eq!(host.picture(), before);
}

#[test]
fn an_address_or_a_name_is_taken_once() {
    if !may_run() {
        return;
    }
    let host = host();
    host.run(|| {
        let pool = AddressPool::default();
        let first = guest(&pool, 1, Policy::off());
        let tap = set_up(&Os::new(), &first).expect("set up");
        let same_address = Guest {
            tap: name(2),
            ..first.clone()
        };
        let same_name = Guest {
            tap: first.tap,
            ..guest(&pool, 3, Policy::off())
        };
        let error = firewall().add(&same_address).unwrap_err();
        assert_eq!(error.kind(), HostErrorKind::AlreadyExists, "{error:?}");
        for other in [&same_address, &same_name] {
            let error = Tap::create(&Os::new(), &tap_spec(&pool, other)).unwrap_err();
            assert_eq!(error.kind(), HostErrorKind::AlreadyExists, "{error:?}");
        }
        assert_eq!(tap::list(&Os::new(), &owner()).expect("taps"), [first.tap]);
        // The address is free before the device is gone.
        for _ in 0..2 {
            tap.release_address(&Os::new(), first.address)
                .expect("released");
        }
        let next = Tap::create(&Os::new(), &tap_spec(&pool, &same_address)).expect("a device");
        tear_down(&Os::new(), &first, Some(tap)).expect("torn down");
        drop(next);
    });
}

#[test]
fn a_device_is_kept_if_that_is_asked() {
    if !may_run() {
        return;
    }
    let host = host();
    let before = host.picture();
    host.run(|| {
        let os = Os::new();
        let guest = guest(&AddressPool::default(), 1, Policy::off());
        let spec = TapSpec {
            lifetime: Lifetime::Kept,
            ..tap_spec(&AddressPool::default(), &guest)
        };
        let error = Tap::open(&os, guest.tap, false).unwrap_err();
        assert_eq!(error.kind(), HostErrorKind::NotFound, "{error:?}");
        drop(Tap::create(&os, &spec).expect("a device"));
        let again = Tap::open(&os, guest.tap, false).expect("the device");
        assert_eq!(again.name(), guest.tap);
        again.let_go(&os).expect("let go");
        drop(again);
        assert_eq!(tap::list(&os, &owner()).expect("taps"), []);
        drop(Tap::create(&os, &spec).expect("a device"));
        tap::delete(&os, guest.tap).expect("deleted");
    });
    assert_eq!(host.picture(), before);
}

#[test]
fn a_flushed_table_is_made_anew() {
    if !may_run() {
        return;
    }
    let host = host();
    let pool = AddressPool::default();
    let guests = [
        guest(&pool, 1, full(1)),
        guest(&pool, 2, Policy::new(Reach::Open)),
    ];
    let all = guests.clone();
    host.run(move || {
        let mended = firewall().ensure(&all).expect("added");
        assert!(
            !mended.table && mended.added > 8 && mended.removed == 0,
            "{mended:?}"
        );
    });
    let picture = host.picture();
    let ensure = |guests: &[Guest]| {
        let guests = guests.to_vec();
        host.run(move || firewall().ensure(&guests).expect("put right"))
    };
    assert_eq!(ensure(&guests), Mended::default());
    for damage in [
        "nft flush chain inet smolvm forward",
        "nft add rule inet smolvm forward accept",
        "nft delete map inet smolvm resolvers",
        "nft flush table inet smolvm",
    ] {
        if damage.contains("delete map") {
            // It is in use; the chain has to go first.
            host.sh("nft delete chain inet smolvm resolve");
        }
        host.sh(damage);
        assert_ne!(host.picture(), picture, "{damage}");
        let mended = ensure(&guests);
        assert!(mended.table, "{damage}: {mended:?}");
        // The order of chains is that of their making; the rest is as it was.
        let sorted = |picture: &str| {
            // A guest that was not right gets another epoch: sixteen bytes in hexadecimal.
            let epoch = |word: &&str| word.matches(':').count() > 4;
            let words = |line: &str| {
                let words = line.split(' ').filter(|word| !epoch(word));
                words.collect::<Vec<_>>().join(" ")
            };
            let mut lines: Vec<_> = picture.lines().map(words).collect();
            lines.sort();
            lines
        };
        assert_eq!(sorted(&host.picture()), sorted(&picture), "{damage}");
    }
    host.sh("nft delete element inet smolvm members { 172.16.0.3 }");
    let mended = ensure(&guests);
    assert!(!mended.table && mended.added > 0, "{mended:?}");
    assert_eq!(ensure(&guests), Mended::default());
    host.sh("nft flush ruleset");
    assert!(ensure(&guests).table);
    let mended = ensure(&guests[..1]);
    assert!(mended.removed > 0 && mended.added == 0, "{mended:?}");
}

#[test]
fn a_watch_tells_of_a_flushed_table() {
    if !may_run() {
        return;
    }
    let host = host();
    host.run(|| {
        let mut watch = Watch::begin(&Os::new()).expect("a watch");
        assert_eq!(watch.take().expect("nothing yet"), Loss::Nothing);
        let guest = guest(&AddressPool::default(), 1, Policy::off());
        firewall().add(&guest).expect("added");
        assert_eq!(watch.take().expect("nothing that matters"), Loss::Nothing);
        firewall().remove(&guest).expect("removed");
        assert_eq!(watch.take().expect("elements"), Loss::Elements);
        let flushed = Command::new("nft").args(["flush", "ruleset"]).status();
        assert!(flushed.expect("nft").success());
        assert_eq!(watch.take().expect("something"), Loss::Rules);
        assert_eq!(watch.take().expect("nothing more"), Loss::Nothing);
    });
}

#[test]
fn owners_leave_each_other_alone() {
    if !may_run() {
        return;
    }
    let host = host();
    host.run(|| {
        let pool = AddressPool::default();
        let other = Firewall::new(Os::new(), Owner::new("others").expect("an owner"));
        let (ours, theirs) = (guest(&pool, 1, full(1)), guest(&pool, 2, full(2)));
        firewall().add(&ours).expect("added");
        other.add(&theirs).expect("added");
        assert_eq!(firewall().ensure(&[]).expect("looked").added, 0);
        assert_eq!(firewall().guests().expect("guests"), []);
        assert_eq!(other.guests().expect("guests"), [theirs.tap]);
        let expected = other.ensure(std::slice::from_ref(&theirs)).expect("looked");
        assert_eq!(expected, Mended::default());
        let greedy = Guest {
            tap: name(9),
            ..theirs
        };
        let error = firewall().ensure(&[greedy]).unwrap_err();
        assert_eq!(error.kind(), HostErrorKind::AlreadyExists, "{error:?}");
    });
}

#[derive(Debug)]
struct Nth {
    nth: u32,
    seen: AtomicU32,
    fail: fn() -> io::Error,
}

impl Nth {
    fn os(nth: u32, fail: fn() -> io::Error) -> (Os, Arc<Self>) {
        let seen = AtomicU32::new(0);
        let faults = Arc::new(Self { nth, seen, fail });
        (Os::with_faults(faults.clone()), faults)
    }
}

impl Faults for Nth {
    fn before(&self, _op: &'static str, _path: &Path) -> io::Result<()> {
        if self.seen.fetch_add(1, Ordering::Relaxed) + 1 == self.nth {
            return Err((self.fail)());
        }
        Ok(())
    }
}

/// A sandbox's whole life in the network, once with a device that is kept.
fn life(os: &Os) -> Result<(), HostError> {
    let pool = AddressPool::default();
    let guest = guest(&pool, 1, full(1));
    let firewall = Firewall::new(os.clone(), owner());
    firewall.add(&guest)?;
    let spec = TapSpec {
        lifetime: Lifetime::Kept,
        ..tap_spec(&pool, &guest)
    };
    let tap = Tap::create(os, &spec)?;
    let open = Guest {
        policy: Policy::new(Reach::Open),
        ..guest.clone()
    };
    let soon = std::time::Duration::from_secs(60);
    firewall.allow(guest.address, &[(Ipv4Addr::new(192, 0, 2, 9), soon)])?;
    firewall.change(&open, &[(Ipv4Addr::new(192, 0, 2, 8), soon)])?;
    tear_down(os, &guest, Some(tap))
}

/// What repair does that finds no sandbox which should be there.
fn reconcile() {
    let os = Os::new();
    firewall().ensure(&[]).expect("put right");
    for tap in tap::list(&os, &owner()).expect("taps") {
        tap::delete(&os, tap).expect("deleted");
    }
}

#[test]
fn whatever_step_fails_nothing_is_left_after_repair() {
    if !may_run() {
        return;
    }
    let host = host();
    let before = host.picture();
    for nth in 1.. {
        let done = host.run(move || {
            let (os, faults) = Nth::os(nth, || io::Error::from_raw_os_error(libc::ENOSPC));
            let outcome = life(&os);
            if faults.seen.load(Ordering::Relaxed) < nth {
                outcome.expect("nothing failed");
                return true;
            }
            assert_eq!(outcome.unwrap_err().kind(), HostErrorKind::NoSpace);
            reconcile();
            false
        });
        assert_eq!(host.picture(), before, "after step {nth}");
        if done {
            assert!(nth > 10, "only {nth} steps");
            break;
        }
    }
}

/// Set for a test that starts this program again: the step at which to be killed.
const KILL_AT: &str = "SMOLVM_TEST_KILL_AT";

/// What the process that is killed runs; as a test of its own it does nothing.
#[test]
fn victim() {
    let Some(nth) = std::env::var_os(KILL_AT) else {
        return;
    };
    let nth = nth.to_str().expect("digits").parse().expect("digits");
    let (os, _) = Nth::os(nth, || {
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
            .expect("killed");
        unreachable!("killed")
    });
    life(&os).expect("a life");
}

fn this_program(test: &str) -> Vec<String> {
    let program = std::env::current_exe().expect("a program");
    [
        program.to_str().expect("a path"),
        "--exact",
        test,
        "--test-threads=1",
    ]
    .map(str::to_owned)
    .to_vec()
}

#[test]
fn whenever_it_is_killed_nothing_is_left_after_repair() {
    if !may_run() {
        return;
    }
    let host = host();
    let before = host.picture();
    for nth in 1.. {
        let status = host.run(move || {
            let words = this_program("life::victim");
            let output = Command::new(&words[0])
                .args(&words[1..])
                .env(KILL_AT, nth.to_string())
                .output()
                .expect("started");
            reconcile();
            output.status
        });
        assert_eq!(host.picture(), before, "killed before step {nth}");
        if status.success() {
            assert!(nth > 10, "only {nth} steps");
            break;
        }
        assert_eq!(status.signal(), Some(libc::SIGKILL), "at step {nth}");
    }
}

#[test]
fn no_process_is_started() {
    if !may_run() {
        return;
    }
    let host = host();
    let dir = tempfile::tempdir().expect("a directory");
    let log = dir.path().join("trace");
    let output = format!("--output={}", log.display());
    host.run(move || {
        let traced = Command::new("strace")
            .args(["--follow-forks", "--trace=process", "--quiet=all", &output])
            .args(this_program("life::victim"))
            // Not killed: there are not so many steps.
            .env(KILL_AT, "1000000")
            .output()
            .unwrap_or_else(|error| {
                panic!("this test needs `strace` ({error}): scripts/host-packages --tests")
            });
        assert!(traced.status.success(), "{traced:?}");
    });
    let trace = std::fs::read_to_string(log).expect("a trace");
    let made: Vec<_> = trace
        .lines()
        .filter(|line| !line.contains("CLONE_THREAD"))
        .filter(|line| {
            ["execve", "fork(", "clone(", "clone3("]
                .iter()
                .any(|call| line.contains(call))
        })
        .collect();
    assert_eq!(made.len(), 1, "besides the program itself: {made:#?}");
    assert!(made[0].contains("execve"), "{made:?}");
}

//! What the network of a sandbox costs: each step's time, one sandbox after the other and with
//! sixteen at once. Needs root; works in a network namespace of its own.
//!
//! `cargo bench -p smolvm-host --bench network -- [SANDBOXES [ALREADY_THERE]]`
#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::collections::BTreeMap;
use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use smolvm_host::net::alloc::{AddressPool, guest_mac};
use smolvm_host::net::nft::{Firewall, Guest, Policy, Reach};
use smolvm_host::net::tap::{Lifetime, Owner, Tap, TapName, TapSpec};
use smolvm_host::net::{enter_new_namespace, tap};
use smolvm_host::{Faults, Os};

const AT_ONCE: u32 = 16;

type Times = BTreeMap<&'static str, Vec<Duration>>;

/// Notes when each named effect begins, so that the parts of a step have times of their own.
#[derive(Debug, Default)]
struct Marks(Mutex<Vec<(&'static str, Instant)>>);

impl Faults for Marks {
    fn before(&self, op: &'static str, _: &Path) -> std::io::Result<()> {
        self.0.lock().expect("a lock").push((op, Instant::now()));
        Ok(())
    }
}

fn guest(pool: &AddressPool, n: u32, reach: Reach) -> Guest {
    Guest {
        tap: TapName::for_sandbox(&format!("{n:011x}")).expect("a name"),
        address: pool
            .candidates(u64::from(n))
            .next()
            .expect("a pool has guests"),
        run: u64::from(n),
        policy: Policy::new(reach),
    }
}

/// What one caller has: its effects, noted, and its firewall.
fn caller() -> (Os, Arc<Marks>, Firewall) {
    let marks = Arc::new(Marks::default());
    let os = Os::with_faults(marks.clone());
    let owner = Owner::new("bench").expect("an owner");
    (os.clone(), marks, Firewall::new(os, owner))
}

/// Sets one sandbox's network up and tears it down, and returns the time of each part.
fn life(
    pool: &AddressPool,
    (os, marks, firewall): &(Os, Arc<Marks>, Firewall),
    n: u32,
    lifetime: Lifetime,
    reach: Reach,
) -> Times {
    marks.0.lock().expect("a lock").clear();
    let owner = Owner::new("bench").expect("an owner");
    let guest = guest(pool, n, reach);
    let spec = TapSpec {
        name: guest.tap,
        owner,
        gateway: pool.gateway(),
        guest: guest.address,
        guest_mac: guest_mac(guest.address),
        virtio_header: true,
        lifetime,
    };
    let begin = Instant::now();
    firewall.add(&guest).expect("added");
    let tap = Tap::create(os, &spec).expect("a device");
    let up = Instant::now();
    firewall.remove(&guest).expect("removed");
    tap.release_address(os, guest.address).expect("released");
    let closing = Instant::now();
    drop(tap);
    let closed = Instant::now();
    tap::delete(os, guest.tap).expect("deleted");
    let end = Instant::now();
    let mut times = Times::new();
    let marks = marks.0.lock().expect("a lock");
    for (at, (op, start)) in marks.iter().enumerate() {
        let next = marks.get(at + 1).map_or(end, |(_, next)| *next);
        // Closing the descriptor is no effect with a name.
        let next = if *start < closing {
            next.min(closing)
        } else {
            next
        };
        times.entry(op).or_default().push(next - *start);
    }
    times
        .entry("close the device")
        .or_default()
        .push(closed - closing);
    times.entry("= set up").or_default().push(up - begin);
    times
        .entry("= tear down: closed, address free")
        .or_default()
        .push(closing - up);
    times
        .entry("= set up and tear down")
        .or_default()
        .push(closing - begin);
    times
        .entry("= remove the device")
        .or_default()
        .push(end - closing);
    times
}

fn percentile(times: &[Duration], percent: usize) -> f64 {
    let at = (times.len() * percent).div_ceil(100).saturating_sub(1);
    times[at].as_secs_f64() * 1000.0
}

fn report(title: &str, all: Vec<Times>) {
    let mut sums = Times::new();
    for times in all {
        for (op, mut several) in times {
            sums.entry(op).or_default().append(&mut several);
        }
    }
    println!(
        "\n{title}\n{:>10} {:>10} {:>10}  in ms",
        "p50", "p99", "max"
    );
    for (op, times) in &mut sums {
        times.sort();
        let [p50, p99, max] = [50, 99, 100].map(|percent| percentile(times, percent));
        println!("{p50:>10.3} {p99:>10.3} {max:>10.3}  {op}");
    }
}

fn main() {
    // `cargo bench` adds a flag of its own.
    let mut numbers = std::env::args()
        .skip(1)
        .filter_map(|word| word.parse().ok());
    let count: u32 = numbers.next().unwrap_or(200);
    let there: u32 = numbers.next().unwrap_or(0);
    let pool: AddressPool = "10.99.0.0/16".parse().expect("a pool");
    enter_new_namespace(&Os::new()).expect("root");
    let net = Arc::new(File::open("/proc/thread-self/ns/net").expect("a namespace"));
    let firewall = Firewall::new(Os::new(), Owner::new("others").expect("an owner"));
    let others: Vec<_> = (0..there)
        .map(|n| guest(&pool, 30_000 + n, Reach::Open))
        .collect();
    firewall.ensure(&others).expect("a table");

    let listed = || Reach::Listed {
        networks: vec!["198.51.100.0/24".parse().expect("a network")],
        names: true,
    };
    for (title, lifetime, reach) in [
        ("device held, open", Lifetime::Held, Reach::Open),
        ("device kept, a list", Lifetime::Kept, listed()),
    ] {
        let caller = self::caller();
        let serial: Vec<_> = (0..count)
            .map(|n| life(&pool, &caller, n, lifetime, reach.clone()))
            .collect();
        report(
            &format!("{title}: {count}, one after the other, beside {there}"),
            serial,
        );
        let barrier = Arc::new(Barrier::new(AT_ONCE as usize));
        let threads: Vec<_> = (0..AT_ONCE)
            .map(|thread| {
                let (net, barrier, reach) = (net.clone(), barrier.clone(), reach.clone());
                std::thread::spawn(move || {
                    move_into_link_name_space(net.as_fd(), Some(LinkNameSpaceType::Network))
                        .expect("entered");
                    let caller = self::caller();
                    barrier.wait();
                    let each = count.div_ceil(AT_ONCE);
                    (0..each)
                        .map(|n| life(&pool, &caller, thread * each + n, lifetime, reach.clone()))
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        let at_once: Vec<_> = threads
            .into_iter()
            .flat_map(|thread| thread.join().expect("a thread"))
            .collect();
        report(&format!("{title}: {AT_ONCE} at once"), at_once);
    }

    let resolving = guest(&pool, 1, listed());
    firewall.add(&resolving).expect("added");
    let mut times = Times::new();
    for n in 0..count {
        let address = Ipv4Addr::from(0xcb00_7100 + n);
        let begin = Instant::now();
        firewall
            .allow(resolving.address, &[(address, Duration::from_secs(60))])
            .expect("allowed");
        times
            .entry("allow an address")
            .or_default()
            .push(begin.elapsed());
    }
    report("names", vec![times]);
}

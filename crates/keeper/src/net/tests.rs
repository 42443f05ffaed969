//! Setting a network up and taking it down, with every effect on the host failing in its turn, and
//! killed before each: with real devices and rules, in a network namespace of the test's own.

use std::io::{self, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use smolvm_engine::store::{NetworkMode, SandboxRow, State as Life};
use smolvm_engine::{AccelChoice, Config, Engine, NetworkConfig, SandboxSpec};
use smolvm_host::ProcessIdentity;
use smolvm_host::net::tap::{Tap, TapName};
use smolvm_host::os::Faults;
use smolvm_vmm::{Accel, Devices, Memory, NicPlan, VmPlan};

use super::*;

/// Runs a test in a thread with a new network namespace. An ordinary user is told, past the harness,
/// that it was not done; continuous integration has to be root.
fn in_namespace(test: &str, work: impl FnOnce() + Send + 'static) {
    if !rustix::process::geteuid().is_root() {
        let note = format!("NOT DONE: {test}: only root may make network namespaces\n");
        assert!(std::env::var_os("CI").is_none(), "{note}");
        io::stderr().write_all(note.as_bytes()).expect("told");
        return;
    }
    // A process that another test starts has our device open until it has executed its program, and
    // the device does not go before.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let thread = std::thread::spawn(|| {
        smolvm_host::net::enter_new_namespace(&Os::new()).expect("a namespace");
        sh("ip link set lo up");
        work();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn sh(command: &str) -> String {
    let mut words = command.split(' ');
    let output = Command::new(words.next().expect("a program"))
        .args(words)
        .output()
        .unwrap_or_else(|error| panic!("`{command}`: {error}: scripts/host-packages --tests"));
    assert!(output.status.success(), "{command}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

fn picture() -> String {
    [
        "ip -details link",
        "ip -details address",
        "ip -details route show table all",
        "nft list ruleset",
    ]
    .map(|command| format!("# {command}\n{}", sh(command)))
    .concat()
}

/// Insists that two pictures are the same, and shows where they are not.
#[track_caller]
fn same(now: &str, before: &str, when: &str) {
    let new: Vec<_> = now.lines().filter(|l| !before.contains(*l)).collect();
    let gone: Vec<_> = before.lines().filter(|l| !now.contains(*l)).collect();
    assert!(now == before, "{when}: new {new:#?}, gone {gone:#?}");
}

/// A data directory, and a sandbox in it.
struct Home {
    dir: PathBuf,
    /// Removes it at the end, unless it is another process's.
    _own: Option<tempfile::TempDir>,
}

const ID: &str = "0123456789abcdef";

impl Home {
    fn new() -> Self {
        let own = tempfile::tempdir().expect("a directory");
        Self {
            dir: own.path().to_owned(),
            _own: Some(own),
        }
    }

    fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    fn store(&self) -> Store {
        std::fs::create_dir_all(self.data()).expect("a directory");
        Store::open(&Layout::new(self.data()).database()).expect("a store")
    }

    fn network(&self) -> NetworkConfig {
        let resolv_conf = self.dir.join("resolv.conf");
        std::fs::write(&resolv_conf, "nameserver 192.0.2.1\n").expect("a file");
        NetworkConfig {
            resolv_conf,
            run_dir: self.dir.join("run"),
            ..NetworkConfig::default()
        }
    }

    fn engine(&self) -> Engine {
        Engine::new(Config {
            data_dir: self.data(),
            keeper: "/none".into(),
            agent: "/none".into(),
            program_dirs: Vec::new(),
            accel: AccelChoice::Emulation,
            engine: smolvm_engine::EngineChoice::Qemu,
            templates: false,
            network: self.network(),
            settings: smolvm_engine::Settings::default(),
            registries: smolvm_engine::RegistrySettings::default(),
            boot_timeout: Duration::from_secs(1),
        })
    }

    /// Whatever is left is repaired, and nothing of the network is.
    fn repair(&self, what: &str) {
        self.engine().list().expect("a list");
        let left = self.store().networks().expect("read");
        assert!(left.is_empty(), "{what}: {left:?}");
    }
}

/// The rows of a sandbox that starts, by a process that is gone as soon as anybody looks, and what its
/// keeper is told.
fn start(home: &Home) -> Launch {
    let mut store = home.store();
    store.delete_sandbox(ID).expect("an older one is gone");
    let spec = SandboxSpec {
        network: NetworkSpec::listed(
            ["example.com", "198.51.100.0/24", "10.0.0.0/8"]
                .map(|text| text.parse().expect("allowed"))
                .to_vec(),
        ),
        ..SandboxSpec::new("a".parse().expect("a name"))
    };
    let network = spec.network.clone();
    store
        .insert_sandbox(&SandboxRow {
            id: ID.to_owned(),
            state: Life::Created,
            reason: None,
            spec,
            image_digest: "sha256:0".to_owned(),
            kernel: "stock".to_owned(),
            engine: None,
            accel: None,
            created_at: Timestamp::now(),
            started_at: None,
            stopped_at: None,
            holder: None,
            vmm: None,
            pool: None,
            ssh_port: None,
        })
        .expect("a row");
    let gone = ProcessIdentity {
        pid: 1,
        start_time_ticks: u64::MAX / 4,
        boot_id: smolvm_host::process::boot_id().expect("a boot"),
    };
    let started = store.begin_start(ID, &[Life::Created], &gone, Timestamp::now());
    assert!(started.expect("a start"));
    let config = home.network();
    let row = network::allocate(&mut store, ID, NetworkMode::Tap, &config, &BTreeSet::new())
        .expect("an address");
    let layout = Layout::new(home.data());
    let network = NetworkLaunch::new(&row, &layout, &network, &config).expect("a launch");
    Launch {
        id: ID.to_owned(),
        name: "a".to_owned(),
        data_dir: home.data(),
        engine: "none".to_owned(),
        vm: VmPlan {
            name: "a".to_owned(),
            program: "/none".into(),
            directory: PathBuf::new(),
            accel: Accel::Emulation,
            cpus: 1,
            memory_mib: 128,
            memory: Memory::Anonymous,
            kernel: "/none".into(),
            devices: Devices::Acpi,
            initrd: "/none".into(),
            cmdline: String::new(),
            disks: Vec::new(),
            nic: Some(NicPlan { mac: network.mac() }),
            tsc_khz: None,
            jail: None,
        },
        network: Some(network),
        ports: Vec::new(),
        ssh_ports: smolvm_engine::SshSettings::default().ports,
        env: Vec::new(),
        workdir: None,
        user: None,
        ttl_ms: None,
        ephemeral: false,
        starter: None,
        restore: None,
        park: None,
        volumes: Vec::new(),
        mounts: Vec::new(),
        snapshot: None,
        boot_timeout_ms: 1,
    }
}

/// The kinds of machine that a network is for.
const KINDS: [CableKind; 2] = [CableKind::Descriptor, CableKind::Device];

/// A network's whole life, as a keeper has it.
fn life(os: &Os, home: &Home, kind: CableKind) -> Result<(), KeeperError> {
    let mut launch = start(home);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let network = Network::set_up(os, &Arc::new(HostSide::here()), &mut launch).await?;
        let mut network = network.expect("a network");
        match network.cable(Some(kind), None)? {
            Some(Cable::Device(name)) => {
                let name = TapName::parse(&name).expect("a device's name");
                // What a machine does, and one that is started in place of the first.
                drop(Tap::open(&Os::new(), name, true).expect("nobody has it open"));
                network.cable(Some(kind), None)?.expect("a cable");
                drop(Tap::open(&Os::new(), name, true).expect("nobody has it open"));
            }
            cable => assert_eq!(cable.map(|cable| cable.kind()), Some(kind)),
        }
        let told = Told(Arc::clone(&network.shared));
        let (address, hold) = (Ipv4Addr::new(192, 0, 2, 9), Duration::from_secs(60));
        told.resolved("example.com", &[(address, hold)])
            .map_err(Error::from)?;
        told.denied(&DeniedLookup {
            name: "evil.example".to_owned(),
            reason: DeniedReason::Name,
        });
        network.change(&NetworkSpec::open())?;
        network.write_denied(&home.dir.join("denied.json"))?;
        network.take_down()?;
        home.store().delete_network(ID)?;
        Ok(())
    })
}

#[derive(Debug)]
struct Nth {
    nth: u32,
    seen: AtomicU32,
    /// Whether the one that failed was the watch's, whose failures are only told.
    of_watch: AtomicBool,
    fail: fn() -> io::Error,
}

impl Nth {
    fn os(nth: u32, fail: fn() -> io::Error) -> (Os, Arc<Self>) {
        let seen = AtomicU32::new(0);
        let of_watch = AtomicBool::new(false);
        let faults = Arc::new(Self {
            nth,
            seen,
            of_watch,
            fail,
        });
        (Os::with_faults(faults.clone()), faults)
    }
}

impl Faults for Nth {
    fn before(&self, op: &'static str, _path: &Path) -> io::Result<()> {
        if self.seen.fetch_add(1, Ordering::Relaxed) + 1 == self.nth {
            let of_watch = op == "put back into the firewall";
            self.of_watch.store(of_watch, Ordering::Relaxed);
            return Err((self.fail)());
        }
        Ok(())
    }
}

#[test]
fn whatever_step_fails_nothing_is_left_after_repair() {
    in_namespace("whatever_step_fails", || {
        let home = Home::new();
        life(&Os::new(), &home, CableKind::Descriptor).expect("a life");
        let before = picture();
        for kind in KINDS {
            for nth in 1.. {
                let (os, faults) = Nth::os(nth, || io::Error::from_raw_os_error(libc_enospc()));
                let outcome = life(&os, &home, kind);
                home.repair("after a failure");
                same(&picture(), &before, &format!("{kind:?}, after step {nth}"));
                if faults.seen.load(Ordering::Relaxed) < nth {
                    outcome.expect("nothing failed");
                    assert!(nth > 12, "only {nth} steps");
                    break;
                }
                let told = faults.of_watch.load(Ordering::Relaxed);
                assert!(outcome.is_err() || told, "{kind:?}, step {nth}");
            }
        }
    });
}

/// ENOSPC, errno(3).
fn libc_enospc() -> i32 {
    rustix::io::Errno::NOSPC.raw_os_error()
}

/// Set for a test that starts this program again: the step at which to be killed, and the directory.
const KILL_AT: &str = "SMOLVM_TEST_KILL_AT";
const KILL_IN: &str = "SMOLVM_TEST_KILL_IN";
/// Which of [`KINDS`].
const KILL_KIND: &str = "SMOLVM_TEST_KILL_KIND";

/// What the process that is killed runs; as a test of its own it does nothing.
#[test]
fn victim() {
    let (Some(nth), Some(dir)) = (std::env::var_os(KILL_AT), std::env::var_os(KILL_IN)) else {
        return;
    };
    let nth = nth.to_str().expect("digits").parse().expect("digits");
    let (os, _) = Nth::os(nth, || {
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
            .expect("killed");
        unreachable!("killed")
    });
    let home = Home {
        dir: dir.into(),
        _own: None,
    };
    let kind = std::env::var(KILL_KIND).expect("a kind");
    let kind = KINDS.into_iter().find(|known| format!("{known:?}") == kind);
    life(&os, &home, kind.expect("a kind")).expect("a life");
}

fn this_program(words: &mut Command) -> &mut Command {
    words.args(["--exact", "net::tests::victim", "--test-threads=1"])
}

#[test]
fn whenever_it_is_killed_nothing_is_left_after_repair() {
    in_namespace("whenever_it_is_killed", || {
        let home = Home::new();
        life(&Os::new(), &home, CableKind::Descriptor).expect("a life");
        let before = picture();
        for kind in KINDS.map(|kind| format!("{kind:?}")) {
            for nth in 1.. {
                let mut command = Command::new(std::env::current_exe().expect("this program"));
                let output = this_program(&mut command)
                    .env(KILL_AT, nth.to_string())
                    .env(KILL_IN, &home.dir)
                    .env(KILL_KIND, &kind)
                    .output()
                    .expect("started");
                home.repair("after a kill");
                let what = format!("{kind}, killed before step {nth}");
                same(&picture(), &before, &what);
                if output.status.success() {
                    assert!(nth > 12, "only {nth} steps");
                    break;
                }
                assert_eq!(output.status.signal(), Some(9), "{what}: {output:?}");
            }
        }
    });
}

/// Adding is one transaction with the firewall, changing is, and removing is.
#[test]
fn each_change_is_one_transaction_and_starts_no_process() {
    in_namespace("each_change_is_one_transaction", || {
        let home = Home::new();
        // The table is there.
        life(&Os::new(), &home, CableKind::Descriptor).expect("a life");
        let owner = smolvm_host::net::tap::Owner::new("test").expect("an owner");
        let firewall = Firewall::new(Os::new(), owner);
        let before = firewall.generation().expect("a number");
        let trace = home.dir.join("trace");
        let output = format!("--output={}", trace.display());
        let mut command = Command::new("strace");
        command
            .args(["--follow-forks", "--trace=process", "--quiet=all", &output])
            .arg(std::env::current_exe().expect("this program"));
        let traced = this_program(&mut command)
            .env(KILL_AT, "1000000")
            .env(KILL_IN, &home.dir)
            .env(KILL_KIND, format!("{:?}", CableKind::Descriptor))
            .output()
            .expect("strace: scripts/host-packages --tests");
        assert!(traced.status.success(), "{traced:?}");
        let after = firewall.generation().expect("a number");
        // Add, an address of a name, change, remove, and forgetting that address.
        assert_eq!(after - before, 5);
        let trace = std::fs::read_to_string(trace).expect("a trace");
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
    });
}

/// A sandbox of another data directory has the address: the next one is taken.
#[test]
fn an_address_that_is_somebody_elses_is_not_taken() {
    in_namespace("an_address_that_is_somebody_elses", || {
        let home = Home::new();
        let mut launch = start(&home);
        let first = launch.network.as_ref().expect("a network").address;
        sh("ip link add other type veth peer name end");
        sh("ip link set other up");
        sh(&format!("ip route add {first}/32 dev other"));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            let network =
                Network::set_up(&Os::new(), &Arc::new(HostSide::here()), &mut launch).await;
            let mut network = network.expect("set up").expect("a network");
            let second = launch.network.as_ref().expect("a network").address;
            assert_ne!(first, second);
            assert_eq!(network.told().address, second.octets().into());
            let row = home.store().network(ID).expect("read").expect("a row");
            assert_eq!(row.address, second);
            assert_eq!(
                launch.vm.nic.as_ref().map(|nic| nic.mac),
                Some(launch.network.as_ref().expect("a network").mac())
            );
            network.take_down().expect("down");
        });
    });
}

/// What somebody empties is made anew.
#[test]
fn a_flushed_firewall_is_made_anew() {
    in_namespace("a_flushed_firewall", || {
        let home = Home::new();
        let mut launch = start(&home);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            let network =
                Network::set_up(&Os::new(), &Arc::new(HostSide::here()), &mut launch).await;
            let mut network = network.expect("set up").expect("a network");
            let told = Told(Arc::clone(&network.shared));
            let (address, hold) = (Ipv4Addr::new(192, 0, 2, 9), Duration::from_secs(600));
            told.resolved("example.com", &[(address, hold)])
                .expect("allowed");
            // But for the time that is left.
            let rules = || {
                let text = sh("nft list ruleset");
                let lines = text.lines().filter(|line| !line.contains("192.0.2.9"));
                lines.map(|line| format!("{line}\n")).collect::<String>()
            };
            let shape = rules();
            let mut watch = Watch::begin(&Os::new()).expect("a watch");
            sh("nft flush ruleset");
            // The keeper's own thread mends it; each change wakes us.
            while !sh("nft list ruleset").contains("192.0.2.9") {
                let mut fds = [PollFd::new(&watch, PollFlags::IN)];
                let limit = rustix::event::Timespec {
                    tv_sec: 20,
                    tv_nsec: 0,
                };
                let woken = poll(&mut fds, Some(&limit)).expect("a wait");
                assert!(woken > 0, "nobody mended it");
                watch.take().expect("taken");
            }
            assert_eq!(rules(), shape);
            drop(told);
            network.take_down().expect("down");
        });
    });
}

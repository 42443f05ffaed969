//! A host, guests and a server, each a network namespace with a real stack: packets go through the
//! same TAP devices, rules and routes as a machine's would, only the machine is missing.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use smolvm_host::Os;
use smolvm_host::net::alloc::{AddressPool, GATEWAY_MAC, guest_mac};
use smolvm_host::net::nft::{Firewall, Guest, Policy};
use smolvm_host::net::tap::{Lifetime, Owner, Tap, TapName, TapSpec};

/// How long something is waited for that has to come.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Whether these tests can be: as root. An ordinary user is told on standard error, past the
/// harness that keeps what passing tests print to itself; continuous integration has to be root.
pub(crate) fn may_run() -> bool {
    if rustix::process::geteuid().is_root() {
        return true;
    }
    let test = std::thread::current().name().unwrap_or("?").to_owned();
    let note = format!("NOT DONE: {test}: only root may make network namespaces and devices\n");
    assert!(std::env::var_os("CI").is_none(), "{note}");
    io::stderr().write_all(note.as_bytes()).expect("told");
    false
}

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace, kept by a thread that does what it is given.
#[derive(Debug)]
pub(crate) struct Namespace {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    pub(crate) tid: i32,
}

impl Namespace {
    pub(crate) fn new() -> Self {
        let (jobs, work) = mpsc::channel::<Job>();
        let (ready, is_ready) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            smolvm_host::net::enter_new_namespace(&Os::new()).unwrap_or_else(|error| {
                panic!(
                    "these tests need network namespaces and the right to make them: run them as \
                     root ({error}: {:?})",
                    std::error::Error::source(&error)
                )
            });
            ready
                .send(rustix::thread::gettid().as_raw_nonzero().get())
                .expect("a reader");
            for job in work {
                job();
            }
        });
        let tid = is_ready.recv().expect("a namespace");
        let namespace = Self {
            jobs: Some(jobs),
            thread: Some(thread),
            tid,
        };
        namespace.sh("ip link set lo up");
        namespace
    }

    /// Does something in the namespace, and passes its panic on.
    pub(crate) fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (give, take) = mpsc::channel();
        let job = move || {
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            let _ = give.send(done);
        };
        self.jobs
            .as_ref()
            .expect("a thread")
            .send(Box::new(job))
            .expect("a thread");
        match take.recv().expect("an answer") {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// Runs a program in the namespace, its words parted by spaces, and returns what it printed.
    pub(crate) fn sh(&self, command: &str) -> String {
        let command = command.to_owned();
        self.run(move || {
            let mut words = command.split(' ');
            let program = words.next().expect("a program");
            let output = Command::new(program)
                .args(words)
                .output()
                .unwrap_or_else(|error| {
                    panic!("this test needs `{program}` ({error}): scripts/host-packages --tests")
                });
            assert!(
                output.status.success(),
                "{command}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            String::from_utf8(output.stdout).expect("text")
        })
    }

    /// Everything that setting up a network leaves traces in.
    pub(crate) fn picture(&self) -> String {
        [
            "ip -details link",
            "ip -details address",
            "ip -details route show table all",
            "ip neighbour",
            "nft list ruleset",
        ]
        .map(|command| format!("# {command}\n{}", self.sh(command)))
        .concat()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        self.jobs = None;
        let _ = self.thread.take().expect("a thread").join();
    }
}

/// Addresses of the server.
pub(crate) const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 10);
pub(crate) const OTHER_SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 20);
pub(crate) const PRIVATE_SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 5);
pub(crate) const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// The host's own, on the link to the server.
pub(crate) const HOST: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);

/// Ports of the server: TCP says who called; UDP gives datagrams to the test and answers them.
pub(crate) const HELLO_PORT: u16 = 80;
pub(crate) const ECHO_PORT: u16 = 9000;
pub(crate) const DNS_PORT: u16 = 53;

/// The host, the server, and what the server hears.
#[derive(Debug)]
pub(crate) struct Lab {
    pub(crate) host: Namespace,
    server: Namespace,
    /// Datagrams that reached the server, in order.
    pub(crate) heard: mpsc::Receiver<(SocketAddr, Vec<u8>)>,
    pub(crate) pool: AddressPool,
}

pub(crate) fn owner() -> Owner {
    Owner::new("tests").expect("an owner")
}

impl Lab {
    pub(crate) fn new() -> Self {
        let (host, server) = (Namespace::new(), Namespace::new());
        host.sh(&format!(
            "ip link add up0 type veth peer name srv0 netns {}",
            server.tid
        ));
        // No link-local address: the kernel looks for duplicates of one for a second or two, and
        // a picture of the host taken meanwhile would not be one taken later.
        host.sh("ip link set up0 addrgenmode none");
        host.sh("ip address add 203.0.113.1/24 dev up0");
        host.sh("ip link set up0 up");
        server.sh("ip address add 203.0.113.254/24 dev srv0");
        for address in [SERVER, OTHER_SERVER, PRIVATE_SERVER, METADATA] {
            server.sh(&format!("ip address add {address}/32 dev srv0"));
        }
        server.sh("ip link set srv0 up");
        host.sh("ip route add default via 203.0.113.254");
        let (tell, heard) = mpsc::channel();
        server.run(move || {
            for port in [HELLO_PORT, DNS_PORT] {
                serve_hello(port);
            }
            // Bound to one address, or answers come from another.
            let socket = UdpSocket::bind((SERVER, ECHO_PORT)).expect("a socket");
            std::thread::spawn(move || {
                let mut buffer = [0; 64];
                while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                    if tell.send((from, buffer[..length].to_vec())).is_err() {
                        break;
                    }
                    let _ = socket.send_to(&buffer[..length], from);
                }
            });
        });
        host.run(|| serve_hello(HELLO_PORT));
        Self {
            host,
            server,
            heard,
            pool: AddressPool::default(),
        }
    }

    /// As [`Lab::new`], with forwarding on.
    pub(crate) fn forwarding() -> Self {
        let lab = Self::new();
        lab.host.run(|| {
            let dir = tempfile::tempdir().expect("a directory");
            smolvm_host::net::forwarding::Forwarding::new(Os::new(), dir.path().join("record"))
                .enable(&[])
                .expect("forwarding");
        });
        lab
    }

    pub(crate) fn server(&self, command: &str) -> String {
        self.server.sh(command)
    }

    /// Sends a datagram from the server.
    pub(crate) fn server_sends(&self, to: SocketAddr, what: &[u8]) {
        let what = what.to_vec();
        self.server.run(move || {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a socket");
            socket.send_to(&what, to).expect("sent");
        });
    }

    pub(crate) fn firewall(&self) -> Firewall {
        Firewall::new(Os::new(), owner())
    }

    /// Does something with the firewall, in the host's namespace.
    pub(crate) fn with_firewall<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Firewall) -> T + Send + 'static,
    ) -> T {
        let firewall = self.firewall();
        self.host.run(move || work(&firewall))
    }

    /// Makes the nth guest: its device and entry on the host, and a namespace on the other end.
    pub(crate) fn guest(&self, n: u32, policy: Policy) -> TestGuest {
        let guest = guest(&self.pool, n, policy);
        let spec = tap_spec(&self.pool, &guest);
        let for_host = guest.clone();
        let tap = self.with_firewall(move |firewall| {
            firewall.add(&for_host).expect("added");
            Tap::create(&Os::new(), &spec).expect("a device")
        });
        TestGuest::new(&self.pool, guest, tap)
    }
}

/// Answers each connection with the caller's address.
fn serve_hello(port: u16) {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).expect("a listener");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { break };
            std::thread::spawn(move || {
                let peer = stream.peer_addr().expect("a peer").ip().to_string();
                let _ = stream.write_all(peer.as_bytes());
            });
        }
    });
}

pub(crate) fn name(n: u32) -> TapName {
    TapName::for_sandbox(&format!("{n:016x}")[5..].repeat(2)).expect("a name")
}

/// The nth guest of a pool.
pub(crate) fn guest(pool: &AddressPool, n: u32, policy: Policy) -> Guest {
    let address = pool
        .candidates(u64::from(n))
        .next()
        .expect("a pool has guests");
    Guest {
        tap: name(n),
        address,
        run: u64::from(n) + 1,
        policy,
    }
}

pub(crate) fn tap_spec(pool: &AddressPool, guest: &Guest) -> TapSpec {
    TapSpec {
        name: guest.tap,
        owner: owner(),
        gateway: pool.gateway(),
        guest: guest.address,
        guest_mac: guest_mac(guest.address),
        virtio_header: false,
        lifetime: Lifetime::Held,
    }
}

/// The other end of a device: a namespace that believes to be a guest.
#[derive(Debug)]
pub(crate) struct TestGuest {
    pub(crate) guest: Guest,
    pub(crate) inside: Namespace,
    stop: Option<OwnedFd>,
    cable: Option<JoinHandle<()>>,
}

/// What came of a try to connect.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Connected, and seen as coming from this address.
    From(String),
    /// Refused by the firewall, at once.
    Denied,
}

impl TestGuest {
    fn new(pool: &AddressPool, guest: Guest, tap: Tap) -> Self {
        let inside = Namespace::new();
        let mirrored = TapSpec {
            gateway: guest.address,
            guest: pool.gateway(),
            guest_mac: GATEWAY_MAC,
            ..tap_spec(pool, &guest)
        };
        let far = inside.run(move || Tap::create(&Os::new(), &mirrored).expect("a device"));
        let [a, b, c, d, e, f] = guest_mac(guest.address);
        inside.sh(&format!(
            "ip link set {} address {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}",
            guest.tap
        ));
        inside.sh(&format!("ip route add default via {}", pool.gateway()));
        let (stop, stopped) = rustix::pipe::pipe().map(|(r, w)| (w, r)).expect("a pipe");
        let cable = std::thread::spawn(move || connect(&tap, &far, &stopped));
        Self {
            guest,
            inside,
            stop: Some(stop),
            cable: Some(cable),
        }
    }

    /// Connects from inside the guest, and waits for the server's word.
    pub(crate) fn connect(&self, address: Ipv4Addr, port: u16) -> Outcome {
        self.inside.run(move || {
            let to = SocketAddr::V4(SocketAddrV4::new(address, port));
            match TcpStream::connect_timeout(&to, PATIENCE) {
                Ok(mut stream) => {
                    let mut said = String::new();
                    stream.read_to_string(&mut said).expect("a word");
                    Outcome::From(said)
                }
                Err(error) if error.raw_os_error() == Some(libc::EHOSTUNREACH) => Outcome::Denied,
                Err(error) => panic!("connecting to {to}: {error}"),
            }
        })
    }

    /// A UDP socket of the guest.
    pub(crate) fn udp(&self) -> UdpSocket {
        let address = self.guest.address;
        self.inside.run(move || {
            let socket = UdpSocket::bind((address, 0)).expect("a socket");
            socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
            socket
        })
    }
}

impl Drop for TestGuest {
    fn drop(&mut self) {
        self.stop = None;
        let _ = self.cable.take().expect("a cable").join();
    }
}

/// Carries frames between two devices until `stop` is hung up.
fn connect(one: &Tap, other: &Tap, stop: &OwnedFd) {
    let mut frame = [0; 2048];
    loop {
        let mut ready = [
            PollFd::new(one, PollFlags::IN),
            PollFd::new(other, PollFlags::IN),
            PollFd::new(stop, PollFlags::IN),
        ];
        if poll(&mut ready, None).is_err() {
            continue;
        }
        let [from_one, from_other, stopped] = ready.map(|fd| !fd.revents().is_empty());
        if stopped {
            return;
        }
        let pairs = [(from_one, one, other), (from_other, other, one)];
        for (_, from, to) in pairs.into_iter().filter(|pair| pair.0) {
            let carried = rustix::io::read(from.as_fd(), &mut frame)
                .and_then(|length| rustix::io::write(to.as_fd(), &frame[..length]));
            if carried.is_err() {
                // A device that was deleted; nobody is there to talk to.
                return;
            }
        }
    }
}

static SERIAL: AtomicU64 = AtomicU64::new(0);

/// A word no datagram had before.
pub(crate) fn word() -> Vec<u8> {
    let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
    format!("word {serial}").into_bytes()
}

impl Lab {
    /// The next datagram the server hears.
    pub(crate) fn next_heard(&self) -> (SocketAddr, Vec<u8>) {
        self.heard.recv_timeout(PATIENCE).expect("a datagram")
    }
}

/// Receives the answer to a datagram.
pub(crate) fn answer(socket: &UdpSocket) -> io::Result<Vec<u8>> {
    let mut buffer = [0; 64];
    let (length, _) = socket.recv_from(&mut buffer)?;
    Ok(buffer[..length].to_vec())
}

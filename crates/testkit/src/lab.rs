//! A host and a server for tests of the network, each a network namespace of the test's own: no packet
//! leaves this machine, and nothing of the real host's network is touched.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::{Read, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::invocation::{Finished, Invocation};

/// Most time a connection that has to come may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// Addresses of the server.
pub const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 10);
/// The same server by another address.
pub const OTHER_SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 20);
/// The same, by an address that nobody reaches who does not say so.
pub const PRIVATE_SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 5);
/// The same, by that of clouds' metadata services.
pub const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// The host, on its link to the server.
pub const HOST: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
/// Port of the server and of a service of the host; it says which address called.
pub const HELLO_PORT: u16 = 80;

/// Port of the server where what a caller sends is sent back when all of it is there; how many bytes that
/// are is said by the first four, little-endian.
pub const ECHO_PORT: u16 = 81;

/// Whether a test of the network can be: as root. An ordinary user is told on standard error, past the
/// harness that keeps what passing tests print to itself.
///
/// # Panics
///
/// In continuous integration, which has to be root.
#[must_use]
pub fn may_network() -> bool {
    if rustix::process::geteuid().is_root() {
        return true;
    }
    let test = std::thread::current().name().unwrap_or("?").to_owned();
    let note = format!("NOT DONE: {test}: only root may make network namespaces\n");
    assert!(std::env::var_os("CI").is_none(), "{note}");
    let _ = std::io::stderr().write_all(note.as_bytes());
    false
}

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace, kept by a thread that does what it is given.
#[derive(Debug)]
pub struct Namespace {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    tid: i32,
}

impl Namespace {
    fn new() -> Self {
        let (jobs, work) = mpsc::channel::<Job>();
        let (ready, is_ready) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            smolvm_host::net::enter_new_namespace(&smolvm_host::Os::new())
                .expect("a network namespace; this test has to be run as root");
            ready
                .send(rustix::thread::gettid().as_raw_nonzero().get())
                .expect("a reader");
            for job in work {
                job();
            }
        });
        let namespace = Self {
            jobs: Some(jobs),
            thread: Some(thread),
            tid: is_ready.recv().expect("a namespace"),
        };
        namespace.sh("ip link set lo up");
        namespace
    }

    /// Does something in the namespace, also with processes it starts, and passes its panic on.
    ///
    /// # Panics
    ///
    /// As `work` does.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (give, take) = mpsc::channel();
        let job = move || {
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            let _ = give.send(done);
        };
        let jobs = self.jobs.as_ref().expect("a thread");
        jobs.send(Box::new(job)).expect("a thread");
        match take.recv().expect("an answer") {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// Runs a program in the namespace, its words parted by spaces, and returns what it printed.
    ///
    /// # Panics
    ///
    /// If it fails.
    #[track_caller]
    pub fn sh(&self, command: &str) -> String {
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
}

impl Drop for Namespace {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The host, the server, and the names the server knows.
#[derive(Debug)]
pub struct Lab {
    /// The host's namespace.
    pub host: Namespace,
    server: Namespace,
    names: Arc<Mutex<BTreeMap<String, Ipv4Addr>>>,
    /// What is in place of the machine's own: `resolv.conf`, the node of the TUN driver, which everybody
    /// may open, and the directory for what lasts until the host is started anew.
    own: tempfile::TempDir,
}

impl Lab {
    /// A host whose default route leads to the server, with nothing forwarded and no firewall.
    ///
    /// # Panics
    ///
    /// If it cannot be made.
    #[must_use]
    pub fn new() -> Self {
        Self::with_name_server(IpAddr::V4(SERVER))
    }

    /// The same, whose name server is on the host and listens on its loopback device only.
    ///
    /// # Panics
    ///
    /// If it cannot be made.
    #[must_use]
    pub fn with_own_name_server() -> Self {
        Self::with_name_server(IpAddr::V4(Ipv4Addr::LOCALHOST))
    }

    fn with_name_server(name_server: IpAddr) -> Self {
        let (host, server) = (Namespace::new(), Namespace::new());
        host.sh(&format!(
            "ip link add up0 type veth peer name srv0 netns {}",
            server.tid
        ));
        // No link-local address: the kernel looks for duplicates of one for a second or two, and
        // a picture of the host taken meanwhile would not be one taken later.
        host.sh("ip link set up0 addrgenmode none");
        host.sh(&format!("ip address add {HOST}/24 dev up0"));
        host.sh("ip link set up0 up");
        server.sh("ip address add 203.0.113.254/24 dev srv0");
        for address in [SERVER, OTHER_SERVER, PRIVATE_SERVER, METADATA] {
            server.sh(&format!("ip address add {address}/32 dev srv0"));
        }
        server.sh("ip link set srv0 up");
        host.sh("ip route add default via 203.0.113.254");
        let names = Arc::<Mutex<BTreeMap<String, Ipv4Addr>>>::default();
        let known = Arc::clone(&names);
        server.run(move || {
            say_hello(HELLO_PORT);
            send_back(ECHO_PORT);
            answer_lookups(SERVER, known);
        });
        let known = Arc::clone(&names);
        host.run(move || {
            say_hello(HELLO_PORT);
            answer_lookups(Ipv4Addr::LOCALHOST, known);
        });
        let own = tempfile::tempdir().expect("a directory");
        let resolv_conf = format!("nameserver {name_server}\n");
        std::fs::write(own.path().join("resolv.conf"), resolv_conf).expect("written");
        std::fs::create_dir(own.path().join("run")).expect("a directory");
        let tun = own.path().join("tun");
        host.sh(&format!("mknod --mode 0666 {} c 10 200", tun.display()));
        Self {
            host,
            server,
            names,
            own,
        }
    }

    /// Gives a name an address, in place of an earlier one.
    pub fn name(&self, name: &str, address: Ipv4Addr) {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        names.insert(name.to_owned(), address);
    }

    /// Runs a command line on the host, whose name server is the lab's.
    ///
    /// # Panics
    ///
    /// If it cannot be started.
    #[track_caller]
    pub fn run(&self, invocation: Invocation) -> Finished {
        let script = "mount --bind \"$0/resolv.conf\" /etc/resolv.conf && \
                      mount --bind \"$0/tun\" /dev/net/tun && \
                      mkdir -p /run/smolvm && mount --bind \"$0/run\" /run/smolvm && exec \"$@\"";
        let words = ["unshare", "--mount", "--", "sh", "-c", script];
        let own = self.own.path().as_os_str();
        let words = words.into_iter().map(OsStr::new).chain([own]);
        let invocation = invocation.within(words);
        self.host.run(move || invocation.run())
    }

    /// Everything that networks of sandboxes leave traces in.
    #[must_use]
    pub fn picture(&self) -> String {
        [
            "ip -details link",
            "ip -details route show table all",
            "nft list ruleset",
        ]
        .map(|command| format!("# {command}\n{}", self.host.sh(command)))
        .concat()
    }

    /// What the server's other end says to a connection of the host's own.
    ///
    /// # Panics
    ///
    /// If there is no connection.
    #[must_use]
    pub fn hello(&self, address: Ipv4Addr) -> String {
        self.host.run(move || {
            let to = SocketAddr::from((address, HELLO_PORT));
            let mut stream = TcpStream::connect_timeout(&to, PATIENCE).expect("a connection");
            let mut said = String::new();
            stream.read_to_string(&mut said).expect("a word");
            said
        })
    }

    /// Runs a program where the server is.
    ///
    /// # Panics
    ///
    /// If it fails.
    #[track_caller]
    pub fn on_server(&self, command: &str) -> String {
        self.server.sh(command)
    }
}

impl Default for Lab {
    fn default() -> Self {
        Self::new()
    }
}

/// Tells each caller its own address.
fn say_hello(port: u16) {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).expect("a listener");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { break };
            std::thread::spawn(move || {
                let peer = stream.peer_addr().map(|peer| peer.ip());
                let peer = peer.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
                let _ = stream.write_all(peer.to_string().as_bytes());
            });
        }
    });
}

/// Sends each caller what it sent, once it has sent all.
fn send_back(port: u16) {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).expect("a listener");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { break };
            std::thread::spawn(move || {
                let mut length = [0; 4];
                if stream.read_exact(&mut length).is_err() {
                    return;
                }
                let mut all = Vec::new();
                let length = u64::from(u32::from_le_bytes(length));
                let _ = Read::by_ref(&mut stream).take(length).read_to_end(&mut all);
                let _ = stream.write_all(&all);
            });
        }
    });
}

/// A name server for the names there are, RFC 1035: one question, one address that holds for a second.
fn answer_lookups(at: Ipv4Addr, names: Arc<Mutex<BTreeMap<String, Ipv4Addr>>>) {
    // Bound to one address, or answers come from another.
    let socket = UdpSocket::bind((at, 53)).expect("a socket");
    std::thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let asked = &buffer[..length];
            let mut name = Vec::new();
            let mut at = 12;
            while let Some(&count @ 1..) = asked.get(at) {
                let end = at + 1 + usize::from(count);
                let Some(label) = asked.get(at + 1..end) else {
                    break;
                };
                name.push(String::from_utf8_lossy(label).to_lowercase());
                at = end;
            }
            let Some(question) = asked.get(12..at + 5) else {
                continue;
            };
            let known = names.lock().unwrap_or_else(PoisonError::into_inner);
            let address = known.get(&name.join(".")).copied();
            drop(known);
            let mut reply = asked[..2].to_vec();
            // An answer, of a recursive server; no such name if it has none.
            reply.extend([0x81, if address.is_some() { 0x80 } else { 0x83 }]);
            reply.extend([0, 1, 0, u8::from(address.is_some()), 0, 0, 0, 0]);
            reply.extend(question);
            if let Some(address) = address {
                // The name above, type A, class IN, one second, four bytes.
                reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4]);
                reply.extend(address.octets());
            }
            let _ = socket.send_to(&reply, from);
        }
    });
}

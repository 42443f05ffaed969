//! Published ports: real connections and datagrams into real machines.

use std::collections::HashSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use serde_json::Value;
use smolvm_testkit::Home;

/// How long anything may take before a test gives up.
const PATIENCE: Duration = Duration::from_secs(120);

/// A program for the guest that serves what the tests ask for, one port for each.
///
/// - 7000, TCP: takes everything, and answers with the digest of it once that has ended.
/// - 7001, TCP: sends `SIZE` bytes that can be computed, ends its side, and then takes a word.
/// - 7002, TCP: sends one byte back for each that it gets.
/// - 7003, UDP: sends each datagram back with its length before it.
const SERVER: &str = r#"
import hashlib, socket, socketserver, threading
size = 100 * 1024 * 1024
block = bytes(range(256)) * 256
class Digest(socketserver.BaseRequestHandler):
    def handle(self):
        digest = hashlib.sha256()
        while data := self.request.recv(1 << 18):
            digest.update(data)
        self.request.sendall(digest.hexdigest().encode())
class Source(socketserver.BaseRequestHandler):
    def handle(self):
        for _ in range(size // len(block)):
            self.request.sendall(block)
        self.request.shutdown(socket.SHUT_WR)
        open("/tmp/word", "wb").write(self.request.makefile("rb").read())
class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := self.request.recv(1):
            self.request.sendall(data)
class Datagram(socketserver.BaseRequestHandler):
    def handle(self):
        data, own = self.request
        own.sendto(b"%d:%s" % (len(data), data), self.client_address)
tcp, udp = socketserver.ThreadingTCPServer, socketserver.ThreadingUDPServer
udp.max_packet_size = 65536
tcp.allow_reuse_address = True
for kind, port, handler in [(tcp, 7000, Digest), (tcp, 7001, Source), (tcp, 7002, Echo), (udp, 7003, Datagram)]:
    server = kind(("127.0.0.1", port), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever).start()
"#;

/// Bytes that are sent each way.
const SIZE: usize = 100 * 1024 * 1024;

/// Runs the server in a sandbox, and returns when it serves.
fn serve(home: &Home, name: &str) {
    home.smolvm(["exec", name, "-i", "--", "sh", "-c", "cat > /tmp/server.py"])
        .stdin(SERVER)
        .run()
        .ok();
    let begin = "python3 -c 'import subprocess; subprocess.Popen([\"python3\", \"/tmp/server.py\"])' \
         >/dev/null 2>&1 </dev/null; \
         until python3 -c 'import socket; socket.create_connection((\"127.0.0.1\", 7002))' 2>/dev/null; \
         do :; done";
    home.sh(name, begin);
}

/// The host's port that leads to a port of the guest.
fn host_port(home: &Home, name: &str, guest: u16) -> u16 {
    let told = home.json(["port", "ls", name]);
    let ports = told["ports"].as_array().expect("ports");
    let of = |key: &str, port: &Value| port[key].as_u64().expect("a number");
    let port = ports
        .iter()
        .find(|port| of("guest_port", port) == u64::from(guest))
        .unwrap_or_else(|| panic!("{guest} is not published: {told}"));
    u16::try_from(of("host_port", port)).expect("a port")
}

fn connect(port: u16) -> TcpStream {
    let socket = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("it is published");
    socket.set_read_timeout(Some(PATIENCE)).expect("timeout");
    socket.set_write_timeout(Some(PATIENCE)).expect("timeout");
    socket
}

fn block() -> Vec<u8> {
    (0..=255u8).cycle().take(65536).collect()
}

fn carries_both_ways(home: &Home, name: &str) {
    // In: the end of what is sent is seen, and the answer comes after it.
    let mut socket = connect(host_port(home, name, 7000));
    let block = block();
    for _ in 0..SIZE / block.len() {
        socket.write_all(&block).expect("it is taken");
    }
    socket.shutdown(Shutdown::Write).expect("open");
    let mut digest = String::new();
    socket.read_to_string(&mut digest).expect("an answer");
    let script = format!(
        "python3 -c 'import hashlib; print(hashlib.sha256(bytes(range(256)) * {}).hexdigest())'",
        SIZE / 256
    );
    assert_eq!(format!("{digest}\n"), home.sh(name, &script));

    // Out: the end is seen while the other direction is still open.
    let mut socket = connect(host_port(home, name, 7001));
    let mut seen = 0;
    let mut buffer = vec![0; 1 << 18];
    loop {
        let count = socket.read(&mut buffer).expect("it sends");
        if count == 0 {
            break;
        }
        let at = seen % block.len();
        for (offset, byte) in buffer[..count].iter().enumerate() {
            assert_eq!(
                *byte,
                block[(at + offset) % block.len()],
                "byte {}",
                seen + offset
            );
        }
        seen += count;
    }
    assert_eq!(seen, SIZE);
    socket.write_all(b"thanks").expect("still open");
    socket.shutdown(Shutdown::Write).expect("open");
    // Closed by the program, after it has the word.
    assert_eq!(socket.read(&mut buffer).expect("the end"), 0);
    home.sh(name, "until grep -q thanks /tmp/word; do :; done");

    // Datagrams keep their bounds, and find their way back.
    let port = host_port(home, name, 7003);
    let clients = [(); 2].map(|()| {
        let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket");
        client.connect((Ipv4Addr::LOCALHOST, port)).expect("a way");
        client.set_read_timeout(Some(PATIENCE)).expect("timeout");
        client
    });
    for length in [0, 1, 1400, 65_000] {
        for (client, byte) in clients.iter().zip([b'a', b'b']) {
            client.send(&vec![byte; length]).expect("sent");
            let count = client.recv(&mut buffer).expect("an answer");
            let mut wanted = format!("{length}:").into_bytes();
            wanted.resize(wanted.len() + length, byte);
            assert!(buffer[..count] == wanted, "{length} bytes come back whole");
        }
    }
}

#[test]
fn ports_carry_connections_and_datagrams_both_ways() {
    let home = Home::new(1);
    home.create(
        "box",
        &["-p", "7000", "-p", "127.0.0.1::7001", "-p", "0:7003/udp"],
    );
    serve(&home, "box");
    carries_both_ways(&home, "box");
    home.rm(&["box"]);
}

#[test]
fn ports_are_the_same_for_an_ordinary_user() {
    let home = Home::with(1).ordinary_user().make();
    home.create("box", &["-p", "7002"]);
    serve(&home, "box");
    let port = host_port(&home, "box", 7002);
    let mut open = connect(port);
    open.write_all(b"x").expect("open");
    open.read_exact(&mut [0]).expect("given back");
    home.smolvm(["create", "-p", "80:80"])
        .run()
        .expect(1)
        .complains_of(&["could not listen on 127.0.0.1:80/tcp", "1024"]);
    home.rm(&["box"]);
    assert_ne!(
        open.read(&mut [0]).ok(),
        Some(1),
        "it ended with the sandbox"
    );
}

#[test]
fn ports_are_opened_closed_and_kept() {
    let home = Home::new(2);
    let mine = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let taken = mine.local_addr().expect("bound").port();
    home.smolvm(["create", "--name", "box", "-p", &format!("{taken}:80")])
        .run()
        .expect(1)
        .complains_of(&["taken by another program", "ss -lnp"]);
    assert!(home.states().is_empty(), "nothing was made");

    home.create("box", &[]);
    serve(&home, "box");
    let told = home
        .smolvm(["port", "expose", "box", "7002"])
        .run()
        .ok()
        .out();
    let port = host_port(&home, "box", 7002);
    assert_eq!(told, format!("127.0.0.1:{port} -> 7002/tcp\n"));
    home.smolvm(["port", "expose", "box", "9999"]).run().ok();
    let error = connect(host_port(&home, "box", 9999)).read(&mut [0]);
    let error = error.expect_err("nobody listens there");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);

    let wish = format!("{port}:1");
    home.smolvm(["create", "-p", &wish])
        .run()
        .expect(1)
        .complains_of(&["published by sandbox `box`", "smolvm port close box"]);
    // A copy has none, and is told so.
    let forked = home.smolvm(["fork", "box"]).run().ok();
    assert!(forked.err().contains("lead to no copy"), "{}", forked.err());
    let of_copy = home.json(["port", "ls", "box-1"]);
    assert_eq!(of_copy["ports"].as_array().map(Vec::len), Some(0));
    home.smolvm(["port", "expose", "box-1", "7002"]).run().ok();
    let mut to_copy = connect(host_port(&home, "box-1", 7002));
    to_copy.write_all(b"x").expect("open");
    to_copy
        .read_exact(&mut [0])
        .expect("the copy's own server answers");
    home.rm(&["box-1"]);

    // Closing cuts what is open.
    let mut open = connect(port);
    open.write_all(b"x").expect("open");
    open.read_exact(&mut [0]).expect("given back");
    home.smolvm(["port", "close", "box", &port.to_string()])
        .run()
        .ok();
    let error = open.read(&mut [0]).expect_err("it was cut");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    let error = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect_err("closed");
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);

    // What is left is there again after a stop and a start.
    home.smolvm(["port", "expose", "box", &format!("{port}:7002")])
        .run()
        .ok();
    home.smolvm(["stop", "box"]).run().ok();
    home.smolvm(["start", "box"]).run().ok();
    serve(&home, "box");
    let mut open = connect(port);
    open.write_all(b"x").expect("open");
    open.read_exact(&mut [0]).expect("given back");
    home.rm(&["box"]);
}

#[test]
fn sixteen_processes_at_once_get_sixteen_ports() {
    let home = Home::new(0);
    let running: Vec<_> = (0..16)
        .map(|number| {
            let name = format!("box-{number}");
            home.smolvm(["create", "--no-start", "--name", &name, "-p", "80"])
                .spawn()
        })
        .collect();
    for process in running {
        process.wait().ok();
    }
    let names: Vec<String> = (0..16).map(|number| format!("box-{number}")).collect();
    let ports: HashSet<u16> = names
        .iter()
        .map(|name| host_port(&home, name, 80))
        .collect();
    assert_eq!(ports.len(), 16);
    home.rm(&names.iter().map(String::as_str).collect::<Vec<_>>());
}

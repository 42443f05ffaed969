//! Sockets of the guest: programs of the test's own, reached through the agent's own program.

mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;

use smolvm_proto::limits::{ACCEPTED_MAX, DATAGRAM_BYTES_MAX, WINDOW_BYTES};
use smolvm_proto::message::{Event, FailureKind};
use smolvm_proto::socket::{
    AcceptRequest, Accepted, ConnectRequest, Datagrams, DatagramsRequest, Endpoint, Internet,
    ListenRequest, pack_datagram,
};
use smolvm_proto::{Channel, Frame, Kind, Request};
use support::{Guest, Outcome, PATIENCE, bytes_of, me};

fn internet(address: SocketAddr) -> Internet {
    Internet {
        host: address.ip().to_string(),
        port: address.port(),
    }
}

fn connect(to: Endpoint) -> Request {
    Request::Connect(ConnectRequest {
        to,
        timeout_ms: None,
    })
}

fn listen(on: Endpoint) -> Request {
    Request::Listen(ListenRequest { on, owner: None })
}

fn tcp_server(ip: impl Into<std::net::IpAddr>) -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind(SocketAddr::new(ip.into(), 0)).expect("a free port");
    let address = listener.local_addr().expect("bound");
    (listener, address)
}

/// Serves one connection on a thread.
fn serve<T: Send + 'static>(
    listener: TcpListener,
    service: impl FnOnce(TcpStream) -> T + Send + 'static,
) -> JoinHandle<T> {
    std::thread::spawn(move || {
        let (socket, _) = listener.accept().expect("a client");
        socket.set_read_timeout(Some(PATIENCE)).expect("timeout");
        socket.set_write_timeout(Some(PATIENCE)).expect("timeout");
        service(socket)
    })
}

/// The next event of a stream, which sends nothing else first but credit.
fn event(guest: &mut Guest, stream: u32) -> Event {
    loop {
        let frame = guest.frame(stream);
        match frame.kind {
            Kind::Event => return frame.decode().expect("an event"),
            Kind::Credit => {}
            other => panic!("unexpected frame: {other:?}"),
        }
    }
}

fn connected(guest: &mut Guest, stream: u32) -> String {
    match event(guest, stream) {
        Event::Connected(connected) => connected.peer,
        other => panic!("no connection: {other:?}"),
    }
}

fn accepted(guest: &mut Guest, stream: u32) -> Accepted {
    match event(guest, stream) {
        Event::Accepted(accepted) => accepted,
        other => panic!("nobody came: {other:?}"),
    }
}

fn listening(guest: &mut Guest, stream: u32) -> u16 {
    match event(guest, stream) {
        Event::Listening(listening) => listening.port,
        other => panic!("it does not listen: {other:?}"),
    }
}

fn nothing() -> Outcome {
    Outcome {
        output: Vec::new(),
        error: Vec::new(),
        events: Vec::new(),
    }
}

fn noise(bytes: u32) -> Vec<u8> {
    (0..bytes / 4)
        .flat_map(|at| at.wrapping_mul(0x9e37_79b9).to_le_bytes())
        .collect()
}

#[test]
fn each_direction_of_a_connection_ends_by_itself() {
    let mut guest = Guest::start();
    let (listener, address) = tcp_server(Ipv4Addr::LOCALHOST);
    let served = serve(listener, |mut socket| {
        socket
            .write_all(&noise(4_000_000))
            .expect("the guest reads");
        socket.shutdown(Shutdown::Write).expect("open");
        let mut seen = Vec::new();
        socket.read_to_end(&mut seen).expect("the end");
        seen
    });
    let stream = guest.open(&connect(Endpoint::localhost(address.port())));
    assert_eq!(connected(&mut guest, stream), address.to_string());
    let mut seen = Vec::new();
    loop {
        let frame = guest.frame(stream);
        match (frame.kind, frame.channel) {
            (Kind::Data, Channel::Output) => {
                let length = u32::try_from(frame.payload.len()).expect("bounded");
                seen.extend(frame.payload);
                guest.send(&Frame::credit(stream, Channel::Output, length));
            }
            (Kind::Eof, Channel::Output) => break,
            other => panic!("unexpected: {other:?}"),
        }
    }
    assert_eq!(seen, noise(4_000_000));
    guest.upload(stream, &noise(5_000_000));
    let outcome = guest.finish(stream);
    outcome.done();
    assert_eq!(outcome.output, b"", "nothing after the end");
    assert_eq!(served.join().expect("served"), noise(5_000_000));
}

#[test]
fn a_question_is_answered_after_its_end() {
    let mut guest = Guest::start();
    let (listener, address) = tcp_server(Ipv4Addr::LOCALHOST);
    let served = serve(listener, |mut socket| {
        let mut question = String::new();
        socket.read_to_string(&mut question).expect("the end");
        write!(socket, "{} bytes", question.len()).expect("the guest reads");
    });
    let stream = guest.open(&connect(Endpoint::Internet(internet(address))));
    // Sent before the connection is known to be there.
    guest.upload(stream, &[b'?'; 200_000]);
    let outcome = guest.finish(stream);
    outcome.done();
    assert_eq!(outcome.text(), "200000 bytes");
    served.join().expect("served");
}

#[test]
fn localhost_is_the_other_loopback_address_too() {
    let mut guest = Guest::start();
    let (listener, address) = tcp_server(Ipv6Addr::LOCALHOST);
    let served = serve(listener, |mut socket| socket.write_all(b"six"));
    let stream = guest.open(&connect(Endpoint::localhost(address.port())));
    guest.end_input(stream);
    let outcome = guest.finish(stream);
    outcome.done();
    assert_eq!(outcome.output, b"six");
    served.join().expect("served").expect("written");
}

#[test]
fn a_port_where_nobody_listens_is_refused() {
    let mut guest = Guest::start();
    let (listener, address) = tcp_server(Ipv4Addr::LOCALHOST);
    drop(listener);
    let outcome = guest.ask(&connect(Endpoint::localhost(address.port())));
    assert_eq!(outcome.events.len(), 1, "it never was open");
    assert_eq!(outcome.kind(), FailureKind::Refused);
    let message = &outcome.failure().message;
    assert_eq!(
        message,
        &format!("connecting to {address}: Connection refused (os error 111)")
    );
    // A name that /etc/hosts has on every machine, looked up as any other.
    let outcome = guest.ask(&connect(Endpoint::Internet(Internet {
        host: "LOCALHOST".to_owned(),
        port: address.port(),
    })));
    assert_eq!(outcome.kind(), FailureKind::Refused);
    let outcome = guest.ask(&connect(Endpoint::Internet(Internet {
        host: "no-such-host.invalid".to_owned(),
        port: 1,
    })));
    assert_eq!(outcome.kind(), FailureKind::NotFound);
    let outcome = guest.ask(&connect(Endpoint::Local(
        b"/no/such/socket".to_vec().into(),
    )));
    assert_eq!(outcome.kind(), FailureKind::NotFound);
    let outcome = guest.ask(&connect(Endpoint::Local(b"relative".to_vec().into())));
    assert_eq!(outcome.kind(), FailureKind::InvalidInput);
}

#[test]
fn a_local_socket_is_reached_by_its_path() {
    let mut guest = Guest::start();
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("x.sock");
    let listener = UnixListener::bind(&path).expect("bound");
    let served = std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().expect("a client");
        let mut word = [0; 4];
        socket.read_exact(&mut word).expect("a word");
        socket.write_all(&word).expect("the guest reads");
    });
    let stream = guest.open(&connect(Endpoint::Local(bytes_of(&path).into())));
    guest.upload(stream, b"echo");
    let outcome = guest.finish(stream);
    outcome.done();
    assert_eq!(outcome.output, b"echo");
    served.join().expect("served");
}

#[test]
fn a_stream_that_is_reset_resets_the_connection() {
    let mut guest = Guest::start();
    let (listener, address) = tcp_server(Ipv4Addr::LOCALHOST);
    let served = serve(listener, |mut socket| {
        socket.read(&mut [0; 1]).map_err(|error| error.kind())
    });
    let stream = guest.open(&connect(Endpoint::Internet(internet(address))));
    connected(&mut guest, stream);
    guest.reset(stream);
    assert_eq!(
        served.join().expect("served"),
        Err(ErrorKind::ConnectionReset)
    );
}

#[test]
fn a_connection_that_the_program_breaks_is_told() {
    let mut guest = Guest::start();
    let (listener, address) = tcp_server(Ipv4Addr::LOCALHOST);
    // Closed with a byte unread, which is a reset (RFC 2525, 2.17).
    let served = serve(listener, |socket| socket.peek(&mut [0; 1]));
    let stream = guest.open(&connect(Endpoint::Internet(internet(address))));
    guest.data(stream, b"x");
    let outcome = guest.finish(stream);
    assert!(matches!(outcome.events[0], Event::Connected(_)));
    assert_eq!(outcome.kind(), FailureKind::Io);
    assert_eq!(served.join().expect("served").expect("peeked"), 1);
}

#[test]
fn what_nobody_takes_any_more_does_not_hold_the_host_up() {
    let mut guest = Guest::start();
    let (listener, address) = tcp_server(Ipv4Addr::LOCALHOST);
    let served = serve(listener, |socket| socket.shutdown(Shutdown::Both));
    let stream = guest.open(&connect(Endpoint::Internet(internet(address))));
    served.join().expect("served").expect("shut down");
    // Many windows: each is granted, though it goes nowhere.
    guest.upload(stream, &vec![0; 8 * WINDOW_BYTES as usize]);
    let outcome = guest.finish(stream);
    assert_eq!(outcome.kind(), FailureKind::Io);
}

#[test]
fn a_program_that_sends_is_held_up_by_a_host_that_does_not_read() {
    let mut guest = Guest::start();
    let (listener, address) = tcp_server(Ipv4Addr::LOCALHOST);
    let served = serve(listener, |mut socket| socket.write_all(&noise(2_000_000)));
    let stream = guest.open(&connect(Endpoint::Internet(internet(address))));
    connected(&mut guest, stream);
    let mut seen = Vec::new();
    while seen.len() < WINDOW_BYTES as usize {
        seen.extend(guest.frame(stream).payload);
    }
    assert_eq!(seen.len(), WINDOW_BYTES as usize);
    // What another stream says comes next, and nothing of this one before it.
    guest.ask(&Request::Ping).done();
    guest.send(&Frame::credit(stream, Channel::Output, WINDOW_BYTES));
    guest.end_input(stream);
    let outcome = guest.finish_with(
        stream,
        Outcome {
            output: seen,
            ..nothing()
        },
    );
    outcome.done();
    assert_eq!(outcome.output, noise(2_000_000));
    served.join().expect("served").expect("written");
}

#[test]
fn connections_to_a_listener_are_announced_and_taken_up() {
    let mut guest = Guest::start();
    let on = guest.open(&listen(Endpoint::localhost(0)));
    let port = listening(&mut guest, on);
    let mut clients = [(); 2].map(|()| {
        let client = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("it listens");
        let announced = accepted(&mut guest, on);
        let own = client.local_addr().expect("connected");
        assert_eq!(announced.peer, Some(internet(own)));
        (client, announced.connection)
    });
    // The second first.
    for (client, connection) in clients.iter_mut().rev() {
        client.write_all(b"question").expect("open");
        client.shutdown(Shutdown::Write).expect("open");
        let request = Request::Accept(AcceptRequest {
            connection: *connection,
        });
        let stream = guest.open(&request);
        guest.upload(stream, connection.to_string().as_bytes());
        let outcome = guest.finish(stream);
        outcome.done();
        assert_eq!(outcome.output, b"question");
        let mut answer = String::new();
        client.read_to_string(&mut answer).expect("the end");
        assert_eq!(answer, connection.to_string());
        let again = guest.ask(&request);
        assert_eq!(again.kind(), FailureKind::NotFound, "it is taken up once");
    }
    let taken = guest.ask(&listen(Endpoint::localhost(port)));
    assert_eq!(taken.kind(), FailureKind::AddressInUse);
    guest.end_input(on);
    guest.finish(on).done();
    let refused = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect_err("it is closed");
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn what_was_taken_up_outlives_its_listener_and_the_rest_is_reset() {
    let mut guest = Guest::start();
    let on = guest.open(&listen(Endpoint::Internet(Internet {
        host: String::new(),
        port: 0,
    })));
    let port = listening(&mut guest, on);
    let mut taken = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("it listens");
    let connection = accepted(&mut guest, on).connection;
    let stream = guest.open(&Request::Accept(AcceptRequest { connection }));
    connected(&mut guest, stream);
    let mut left = TcpStream::connect((Ipv6Addr::LOCALHOST, port)).expect("on both families");
    accepted(&mut guest, on);
    guest.reset(on);
    let error = left.read(&mut [0; 1]).expect_err("nobody takes it up");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    guest.upload(stream, b"still here");
    taken.shutdown(Shutdown::Write).expect("open");
    let mut seen = String::new();
    taken.read_to_string(&mut seen).expect("the end");
    assert_eq!(seen, "still here");
    guest.finish(stream).done();
}

#[test]
fn a_listener_whose_connections_nobody_takes_stops_accepting() {
    let mut guest = Guest::start();
    let on = guest.open(&listen(Endpoint::localhost(0)));
    let port = listening(&mut guest, on);
    let clients: Vec<TcpStream> = (0..=ACCEPTED_MAX)
        .map(|_| TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("it listens"))
        .collect();
    let numbers: Vec<u64> = (0..ACCEPTED_MAX)
        .map(|_| accepted(&mut guest, on).connection)
        .collect();
    // One is taken up, and only then comes the next: it has the highest number of all.
    let stream = guest.open(&Request::Accept(AcceptRequest {
        connection: numbers[0],
    }));
    connected(&mut guest, stream);
    let last = accepted(&mut guest, on);
    assert!(numbers.iter().all(|number| *number < last.connection));
    let own = clients[ACCEPTED_MAX].local_addr().expect("connected");
    assert_eq!(last.peer, Some(internet(own)));
}

#[test]
fn a_local_listener_is_its_owners_and_leaves_nothing() {
    let mut guest = Guest::start();
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("x.sock");
    let request = Request::Listen(ListenRequest {
        on: Endpoint::Local(bytes_of(&path).into()),
        owner: Some(me()),
    });
    let on = guest.open(&request);
    assert_eq!(listening(&mut guest, on), 0);
    let mode = std::fs::metadata(&path)
        .expect("there")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(guest.ask(&request).kind(), FailureKind::AddressInUse);
    assert!(path.exists(), "the one that failed took nothing away");
    let mut client = UnixStream::connect(&path).expect("it listens");
    let announced = accepted(&mut guest, on);
    assert_eq!(announced.peer, None);
    let stream = guest.open(&Request::Accept(AcceptRequest {
        connection: announced.connection,
    }));
    guest.upload(stream, b"hello");
    let mut seen = String::new();
    client.read_to_string(&mut seen).expect("the end");
    assert_eq!(seen, "hello");
    guest.end_input(on);
    guest.finish(on).done();
    assert!(!path.exists());
}

#[test]
fn datagrams_keep_their_bounds_both_ways() {
    let mut guest = Guest::start();
    let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    server.set_read_timeout(Some(PATIENCE)).expect("timeout");
    let address = server.local_addr().expect("bound");
    let stream = guest.open(&Request::Datagrams(DatagramsRequest {
        to: internet(address),
    }));
    assert_eq!(connected(&mut guest, stream), address.to_string());
    let datagrams = [
        b"one".to_vec(),
        Vec::new(),
        vec![7; DATAGRAM_BYTES_MAX],
        b"last".to_vec(),
    ];
    let mut wire = Vec::new();
    for datagram in &datagrams {
        pack_datagram(datagram, &mut wire);
    }
    // Cut where it happens to be cut.
    for part in wire.chunks(40_001) {
        guest.data(stream, part);
    }
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
    for datagram in &datagrams {
        let (length, client) = server.recv_from(&mut buffer).expect("it came");
        assert_eq!(&buffer[..length], datagram);
        server
            .send_to(&buffer[..length], client)
            .expect("sent back");
    }
    let mut reader = Datagrams::default();
    let mut seen = Vec::new();
    while seen.len() < datagrams.len() {
        let frame = guest.frame(stream);
        match frame.kind {
            Kind::Data => reader.feed(&frame.payload),
            Kind::Credit => {}
            other => panic!("unexpected frame: {other:?}"),
        }
        while let Some(datagram) = reader.next_datagram() {
            seen.push(datagram.to_vec());
        }
    }
    assert_eq!(seen, datagrams);
    guest.end_input(stream);
    guest.finish(stream).done();
}

#[test]
fn datagrams_that_nobody_takes_end_nothing() {
    let mut guest = Guest::start();
    let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let address = server.local_addr().expect("bound");
    drop(server);
    let stream = guest.open(&Request::Datagrams(DatagramsRequest {
        to: Internet {
            host: "localhost".to_owned(),
            port: address.port(),
        },
    }));
    connected(&mut guest, stream);
    let mut wire = Vec::new();
    pack_datagram(b"lost", &mut wire);
    guest.data(stream, &wire);
    // Read by the agent before this is answered; its session may take it later, also after the bind.
    guest.ask(&Request::Ping).done();
    let server = UdpSocket::bind(address).expect("free again");
    server.set_read_timeout(Some(PATIENCE)).expect("timeout");
    wire.clear();
    pack_datagram(b"found", &mut wire);
    guest.data(stream, &wire);
    let mut buffer = [0; 16];
    loop {
        let length = server.recv(&mut buffer).expect("it came");
        match &buffer[..length] {
            b"lost" => {}
            other => {
                assert_eq!(other, b"found");
                break;
            }
        }
    }
    guest.end_input(stream);
    guest.finish(stream).done();
}

#[test]
fn a_connection_that_finds_no_free_descriptor_is_announced_when_there_is_one() {
    let mut guest = Guest::start();
    let on = guest.open(&listen(Endpoint::localhost(0)));
    let port = listening(&mut guest, on);
    // No descriptor is below it but those for standard streams.
    let before = guest.limit_descriptors(3);
    let client = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("it listens");
    // It serves meanwhile: another stream would take descriptors, too.
    let other = Request::Accept(AcceptRequest { connection: 99 });
    assert_eq!(guest.ask(&other).kind(), FailureKind::TooMany);
    guest.limit_descriptors(before);
    let announced = accepted(&mut guest, on);
    let own = client.local_addr().expect("connected");
    assert_eq!(announced.peer, Some(internet(own)));
    guest.end_input(on);
    guest.finish(on).done();
}

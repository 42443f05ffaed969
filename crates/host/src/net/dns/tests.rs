use std::collections::VecDeque;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use domain::base::iana::{Class, Rcode};
use domain::base::{Message, MessageBuilder, Name, Rtype, Ttl};
use domain::rdata::{A, Cname, Txt};
use proptest::prelude::*;
use tokio::sync::watch;

use super::*;
use crate::error::{HostError, HostErrorKind};
use crate::net::user::HostSide;

const PATIENCE: Duration = Duration::from_secs(20);

fn name(text: &str) -> Name<Vec<u8>> {
    text.parse().unwrap()
}

fn rules(patterns: &[&str]) -> Rules {
    Rules {
        names: Names::Listed(patterns.iter().map(|p| p.parse().unwrap()).collect()),
        exceptions: Vec::new(),
    }
}

fn question(text: &str, kind: Rtype) -> Vec<u8> {
    let mut message = MessageBuilder::new_vec();
    message.header_mut().set_id(7);
    message.header_mut().set_rd(true);
    let mut message = message.question();
    message.push((name(text), kind)).unwrap();
    message.finish()
}

/// A record of an answer: whose, how long in s, and what.
enum Entry {
    Address(&'static str, u32, [u8; 4]),
    Alias(&'static str, u32, &'static str),
    Text(&'static str, usize),
}

/// The answer of a name server to a query.
fn answer(query: &[u8], entries: &[Entry]) -> Vec<u8> {
    let query = Message::from_slice(query).unwrap();
    let mut reply = MessageBuilder::new_vec()
        .start_answer(query, Rcode::NOERROR)
        .unwrap();
    for entry in entries {
        match entry {
            Entry::Address(owner, ttl, address) => reply.push((
                name(owner),
                Class::IN,
                Ttl::from_secs(*ttl),
                A::new((*address).into()),
            )),
            Entry::Alias(owner, ttl, to) => reply.push((
                name(owner),
                Class::IN,
                Ttl::from_secs(*ttl),
                Cname::new(name(to)),
            )),
            Entry::Text(owner, length) => {
                let text: Txt<Vec<u8>> = Txt::build_from_slice(&vec![b'x'; *length]).unwrap();
                reply.push((name(owner), Class::IN, Ttl::from_secs(60), text))
            }
        }
        .unwrap();
    }
    reply.finish()
}

fn forward(message: &[u8], rules: &Rules) -> Box<Lookup> {
    match judge(message, rules) {
        Judged::Forward(lookup) => lookup,
        other => panic!("{other:?}"),
    }
}

fn answered(message: &[u8], rules: &Rules) -> (Rcode, Option<DeniedLookup>) {
    match judge(message, rules) {
        Judged::Answer { reply, denied } => (rcode(&reply), denied),
        other => panic!("{other:?}"),
    }
}

fn rcode(reply: &[u8]) -> Rcode {
    let reply = Message::from_slice(reply).unwrap();
    assert!(reply.header().qr() && reply.header().ra());
    assert_eq!(reply.header().id(), 7);
    reply.header().rcode()
}

#[test]
fn name_servers_are_read_as_the_resolver_does() {
    let text = "# nameserver 192.0.2.9\nsearch x\nnameserver 192.0.2.1\n\tnameserver\t2001:db8::1 # x\n\
                nameserver fe80::1%eth0\nnameserver\nnameservers 192.0.2.2\n";
    let servers: Vec<_> = super::parse_name_servers(text)
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(servers, ["192.0.2.1:53", "[2001:db8::1]:53"]);
}

#[test]
fn patterns_are_names_or_what_is_below_one() {
    let has = |pattern: &str, text: &str| pattern.parse::<Pattern>().unwrap().has(&name(text));
    assert!(has("example.com", "EXAMPLE.com."));
    assert!(!has("example.com", "www.example.com"));
    assert!(!has("example.com", "notexample.com"));
    assert!(has("*.example.com", "www.Example.com"));
    assert!(has("*.Example.com.", "a.b.example.com"));
    assert!(!has("*.example.com", "example.com"));
    assert!(!has("*.example.com", "notexample.com"));
    assert!(!has("*.example.com", "example.com.evil.test"));
    assert_eq!(
        "*.example.com".parse::<Pattern>().unwrap().to_string(),
        "*.example.com"
    );
    let long = format!("{}.com", "a".repeat(64));
    for wrong in [
        "",
        ".",
        "*",
        "*.",
        "a..b",
        "*.*.com",
        "a*.com",
        "192.0.2.1",
        "exa mple",
        "bücher.example",
        "a\0b",
        &long,
    ] {
        let error = wrong.parse::<Pattern>().unwrap_err().to_string();
        assert!(error.contains("`example.com`"), "{wrong}: {error}");
    }
}

#[test]
fn names_that_are_not_listed_are_refused_and_told() {
    let rules = rules(&["example.com"]);
    for kind in [Rtype::A, Rtype::AAAA, Rtype::TXT, Rtype::HTTPS] {
        let (rcode, denied) = answered(&question("other.test", kind), &rules);
        assert_eq!(rcode, Rcode::REFUSED);
        let wanted = DeniedLookup {
            name: "other.test".to_owned(),
            reason: DeniedReason::Name,
        };
        assert_eq!(denied, Some(wanted));
    }
    // IPv6, and what would lead around the addresses we know, is answered with nothing.
    for kind in [Rtype::AAAA, Rtype::HTTPS, Rtype::SVCB] {
        let outcome = answered(&question("example.com", kind), &rules);
        assert_eq!(outcome, (Rcode::NOERROR, None), "{kind}");
    }
    for kind in [Rtype::ANY, Rtype::AXFR] {
        let outcome = answered(&question("example.com", kind), &rules);
        assert_eq!(outcome, (Rcode::NOTIMP, None), "{kind}");
    }
    // An answer is no question.
    let reply = answer(&question("example.com", Rtype::A), &[]);
    assert!(matches!(judge(&reply, &rules), Judged::Ignore));
    assert!(matches!(judge(b"short", &rules), Judged::Ignore));
}

#[test]
fn the_question_is_asked_in_our_own_words() {
    let mut asked = question("example.com", Rtype::A);
    let lookup = forward(&asked, &rules(&["example.com"]));
    let query = lookup.query(99);
    let message = Message::from_slice(&query).unwrap();
    assert_eq!(message.header().id(), 99);
    assert_eq!(message.sole_question().unwrap().qtype(), Rtype::A);
    assert_eq!(message.opt().unwrap().udp_payload_size(), 1232);
    // What follows the question is not passed on.
    asked.extend(b"secret");
    assert_eq!(forward(&asked, &rules(&["example.com"])).query(99), query);
}

#[test]
fn an_answer_gives_addresses_along_its_aliases_for_the_shortest_of_their_times() {
    let rules = rules(&["example.com"]);
    let lookup = forward(&question("example.com", Rtype::A), &rules);
    let query = lookup.query(99);
    let message = answer(
        &query,
        &[
            Entry::Address("edge.cdn.test", 3600, [203, 0, 113, 9]),
            Entry::Alias("example.com", 600, "www.cdn.test"),
            Entry::Alias("www.cdn.test", 86_400, "edge.cdn.test"),
            // In a circle, and beside the way.
            Entry::Alias("edge.cdn.test", 1, "example.com"),
            Entry::Address("unasked.test", 60, [203, 0, 113, 66]),
        ],
    );
    let accepted = lookup.accept(&message, 99, &rules).unwrap();
    let address = Ipv4Addr::new(203, 0, 113, 9);
    assert_eq!(accepted.addresses, [(address, Duration::from_secs(600))]);
    assert_eq!(rcode(&accepted.reply), Rcode::NOERROR);
    let reply = Message::from_slice(&accepted.reply).unwrap();
    assert_eq!(
        reply.header_counts().ancount(),
        4,
        "not the one beside the way"
    );
    for (ttl, held) in [(0, HOLD_MIN), (u32::MAX, HOLD_MAX)] {
        let message = answer(
            &query,
            &[Entry::Address("example.com", ttl, [203, 0, 113, 9])],
        );
        let accepted = lookup.accept(&message, 99, &rules).unwrap();
        assert_eq!(accepted.addresses, [(address, held)]);
    }
}

#[test]
fn an_answer_that_points_inside_is_refused_as_a_whole() {
    let mut rules = rules(&["rebind.test"]);
    let lookup = forward(&question("rebind.test", Rtype::A), &rules);
    for inside in [
        [169, 254, 169, 254],
        [10, 0, 0, 5],
        [127, 0, 0, 1],
        [0, 0, 0, 0],
    ] {
        let message = answer(
            &lookup.query(1),
            &[
                Entry::Address("rebind.test", 60, [203, 0, 113, 9]),
                Entry::Address("rebind.test", 60, inside),
            ],
        );
        let accepted = lookup.accept(&message, 1, &rules).unwrap();
        assert_eq!(rcode(&accepted.reply), Rcode::REFUSED);
        assert_eq!(accepted.addresses, []);
        let denied = accepted.denied.unwrap();
        assert_eq!(denied.reason, DeniedReason::Address(inside.into()));
    }
    rules.exceptions.push("10.0.0.0/24".parse().unwrap());
    let message = answer(
        &lookup.query(1),
        &[Entry::Address("rebind.test", 60, [10, 0, 0, 5])],
    );
    let accepted = lookup.accept(&message, 1, &rules).unwrap();
    assert_eq!(accepted.denied, None);
    assert_eq!(accepted.addresses.len(), 1);
}

#[test]
fn forged_answers_are_passed_over() {
    let rules = rules(&["example.com"]);
    let lookup = forward(&question("example.com", Rtype::A), &rules);
    let entry = [Entry::Address("example.com", 60, [203, 0, 113, 9])];
    let right = answer(&lookup.query(1), &entry);
    lookup.accept(&right, 1, &rules).unwrap();
    let unrelated = |message: &[u8], id| {
        let error = lookup.accept(message, id, &rules).unwrap_err();
        assert_eq!(error, Unusable::Unrelated);
    };
    unrelated(&right, 2);
    unrelated(&right[..right.len() - 1], 1);
    unrelated(b"", 1);
    unrelated(&lookup.query(1), 1);
    let other = forward(&question("example.com", Rtype::TXT), &rules);
    unrelated(&answer(&other.query(1), &[]), 1);
    let mut truncated = right;
    truncated[2] |= 0x02;
    let error = lookup.accept(&truncated, 1, &rules).unwrap_err();
    assert_eq!(error, Unusable::Truncated);
}

#[test]
fn what_is_too_long_for_udp_is_to_be_asked_for_by_tcp() {
    let rules = rules(&["example.com"]);
    let lookup = forward(&question("example.com", Rtype::TXT), &rules);
    let message = answer(&lookup.query(1), &[Entry::Text("example.com", 600)]);
    let reply = lookup.accept(&message, 1, &rules).unwrap().reply;
    assert!(reply.len() > 600);
    let short = lookup.for_udp(reply);
    assert_eq!(rcode(&short), Rcode::NOERROR);
    let short = Message::from_slice(&short).unwrap();
    assert!(short.header().tc());
    assert_eq!(short.header_counts().ancount(), 0);
}

proptest! {
    #[test]
    fn bytes_of_guests_and_servers_do_no_harm(bytes: Vec<u8>, at: usize, bit in 0..8_u32) {
        let rules = rules(&["example.com"]);
        let _ = judge(&bytes, &rules);
        let mut asked = question("example.com", Rtype::A);
        let lookup = forward(&asked, &rules);
        let _ = lookup.accept(&bytes, 1, &rules);
        let at_asked = at % asked.len();
        asked[at_asked] ^= 1_u8 << bit;
        let _ = judge(&asked, &rules);
        let mut message = answer(
            &lookup.query(1),
            &[
                Entry::Alias("example.com", 60, "www.example.com"),
                Entry::Address("www.example.com", 60, [203, 0, 113, 9]),
            ],
        );
        let at = at % message.len();
        message[at] ^= 1_u8 << bit;
        if let Ok(accepted) = lookup.accept(&message, 1, &rules) {
            for (address, _) in accepted.addresses {
                prop_assert!(!is_never(address));
            }
        }
    }
}

/// Remembers what it is told.
#[derive(Debug, Default)]
struct Told {
    resolved: Mutex<Vec<(String, Ipv4Addr)>>,
    denied: Mutex<Vec<DeniedLookup>>,
    broken: bool,
}

impl Sink for Told {
    fn resolved(&self, name: &str, addresses: &[(Ipv4Addr, Duration)]) -> Result<(), HostError> {
        if self.broken {
            return Err(HostError::new(HostErrorKind::Other, "allow", name));
        }
        let mut resolved = self.resolved.lock().unwrap();
        resolved.extend(
            addresses
                .iter()
                .map(|(address, _)| (name.to_owned(), *address)),
        );
        Ok(())
    }

    fn denied(&self, denied: &DeniedLookup) {
        self.denied.lock().unwrap().push(denied.clone());
    }
}

/// A name server that gives these answers by UDP, one after the other; `None` is silence and a
/// truncated answer leads to the one by TCP.
fn name_server(answers: Vec<Vec<Entry>>, truncate: bool) -> SocketAddr {
    let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = udp.local_addr().unwrap();
    let tcp = TcpListener::bind(address).unwrap();
    let mut answers: VecDeque<_> = answers.into();
    std::thread::spawn(move || {
        let mut buffer = [0; 1500];
        while let Ok((length, from)) = udp.recv_from(&mut buffer) {
            let query = &buffer[..length];
            if truncate {
                let mut reply = answer(query, &[]);
                reply[2] |= 0x02;
                udp.send_to(&reply, from).unwrap();
                let (mut stream, _) = tcp.accept().unwrap();
                let query = read(&mut stream);
                let reply = answer(&query, &answers.pop_front().unwrap());
                write(&mut stream, &reply);
                continue;
            }
            let reply = answer(query, &answers.pop_front().unwrap());
            // One that is forged comes first.
            let mut forged = reply.clone();
            forged[0] ^= 1;
            udp.send_to(&forged, from).unwrap();
            udp.send_to(&reply, from).unwrap();
        }
    });
    address
}

fn read(stream: &mut TcpStream) -> Vec<u8> {
    let mut length = [0; 2];
    stream.read_exact(&mut length).unwrap();
    let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut message).unwrap();
    message
}

fn write(stream: &mut TcpStream, message: &[u8]) {
    let length = u16::try_from(message.len()).unwrap();
    stream.write_all(&length.to_be_bytes()).unwrap();
    stream.write_all(message).unwrap();
}

struct Running {
    at: SocketAddr,
    rules: watch::Sender<Arc<Rules>>,
    told: Arc<Told>,
    _stop: tokio::sync::oneshot::Sender<()>,
}

fn resolver(servers: Vec<SocketAddr>, told: Told) -> Running {
    let (sender, receiver) = watch::channel(Arc::new(rules(&["example.com"])));
    let told = Arc::new(told);
    let sink = told.clone();
    let (ready, is_ready) = std::sync::mpsc::channel();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async move {
            let local = Ipv4Addr::LOCALHOST;
            let here = Arc::new(HostSide::here());
            let resolver = Resolver::bind(local, local, (here, servers), receiver, sink);
            let resolver = resolver.await.unwrap();
            let at = SocketAddr::from((local, resolver.port().unwrap().get()));
            ready.send(at).unwrap();
            tokio::select! {
                ended = resolver.serve() => panic!("{ended:?}"),
                _ = stopped => {}
            }
        });
    });
    Running {
        at: is_ready.recv().unwrap(),
        rules: sender,
        told,
        _stop: stop,
    }
}

impl Running {
    fn ask(&self, text: &str) -> Rcode {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.send_to(&question(text, Rtype::A), self.at).unwrap();
        let mut buffer = [0; 1500];
        let (length, _) = socket.recv_from(&mut buffer).unwrap();
        rcode(&buffer[..length])
    }

    fn ask_by_tcp(&self, text: &str, kind: Rtype) -> Vec<u8> {
        let mut stream = TcpStream::connect(self.at).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write(&mut stream, &question(text, kind));
        read(&mut stream)
    }
}

#[test]
fn addresses_are_told_before_the_guest_hears_of_them_and_rules_may_change() {
    let answers = vec![
        vec![Entry::Address("example.com", 60, [203, 0, 113, 9])],
        vec![Entry::Address("example.com", 60, [203, 0, 113, 10])],
        vec![Entry::Address("other.test", 60, [169, 254, 169, 254])],
    ];
    let running = resolver(vec![name_server(answers, false)], Told::default());
    assert_eq!(running.ask("example.com"), Rcode::NOERROR);
    assert_eq!(running.ask("example.com"), Rcode::NOERROR);
    let resolved = running.told.resolved.lock().unwrap().clone();
    let addresses: Vec<_> = resolved
        .iter()
        .map(|(_, address)| address.octets()[3])
        .collect();
    assert_eq!(addresses, [9, 10], "nothing is cached");
    assert_eq!(running.ask("other.test"), Rcode::REFUSED);
    running
        .rules
        .send(Arc::new(rules(&["other.test"])))
        .unwrap();
    assert_eq!(running.ask("example.com"), Rcode::REFUSED);
    assert_eq!(running.ask("other.test"), Rcode::REFUSED);
    let denied = running.told.denied.lock().unwrap().clone();
    let reasons: Vec<_> = denied.iter().map(|denied| denied.reason).collect();
    let metadata = DeniedReason::Address(Ipv4Addr::new(169, 254, 169, 254));
    assert_eq!(reasons, [DeniedReason::Name, DeniedReason::Name, metadata]);
}

#[test]
fn long_answers_come_by_tcp_on_both_sides() {
    let answers = vec![vec![Entry::Text("example.com", 3000)]];
    let running = resolver(vec![name_server(answers, true)], Told::default());
    let reply = running.ask_by_tcp("example.com", Rtype::TXT);
    assert!(reply.len() > 3000);
    assert_eq!(rcode(&reply), Rcode::NOERROR);
}

#[test]
fn a_silent_name_server_is_followed_by_the_next() {
    // Bound, so that nothing answers there, and never read.
    let silent = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let answers = vec![vec![Entry::Address("example.com", 60, [203, 0, 113, 9])]];
    let servers = vec![silent.local_addr().unwrap(), name_server(answers, false)];
    assert_eq!(
        resolver(servers, Told::default()).ask("example.com"),
        Rcode::NOERROR
    );
    let none = resolver(Vec::new(), Told::default());
    assert_eq!(none.ask("example.com"), Rcode::SERVFAIL);
}

#[test]
fn an_address_that_cannot_be_allowed_is_not_told() {
    let answers = vec![vec![Entry::Address("example.com", 60, [203, 0, 113, 9])]];
    let told = Told {
        broken: true,
        ..Told::default()
    };
    let running = resolver(vec![name_server(answers, false)], told);
    assert_eq!(running.ask("example.com"), Rcode::SERVFAIL);
}

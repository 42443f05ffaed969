//! Reaching servers by name: the resolver, the firewall and real packets together.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, UdpSocket};
use std::num::NonZeroU16;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use domain::base::iana::{Class, Rcode};
use domain::base::{Message, MessageBuilder, Name, Rtype, Ttl};
use domain::rdata::A;
use smolvm_host::net::dns::{DeniedLookup, Names, Resolver, Rules, Sink};
use smolvm_host::net::nft::{Firewall, Guest, Policy, Reach};
use smolvm_host::net::user::HostSide;
use smolvm_host::{HostError, Os};
use tokio::sync::{oneshot, watch};

use crate::lab::{
    DNS_PORT, HELLO_PORT, HOST, Lab, METADATA, OTHER_SERVER, Outcome, PATIENCE, SERVER, TestGuest,
    may_run, owner,
};

/// Puts addresses into the firewall, as a keeper does.
#[derive(Debug)]
struct Allow {
    firewall: Firewall,
    guest: Ipv4Addr,
}

impl Sink for Allow {
    fn resolved(&self, _: &str, addresses: &[(Ipv4Addr, Duration)]) -> Result<(), HostError> {
        self.firewall.allow(self.guest, addresses)
    }

    fn denied(&self, _: &DeniedLookup) {}
}

/// A name server of the host that gives these addresses, one after the other.
fn name_server(mut addresses: VecDeque<Ipv4Addr>) -> std::net::SocketAddr {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket");
    let at = socket.local_addr().expect("an address");
    std::thread::spawn(move || {
        let mut buffer = [0; 1500];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let query = Message::from_slice(&buffer[..length]).expect("a query");
            let mut reply = MessageBuilder::new_vec()
                .start_answer(query, Rcode::NOERROR)
                .expect("room");
            let name = query.sole_question().expect("a question").into_qname();
            let address = A::new(addresses.pop_front().expect("an answer more"));
            reply
                .push((name, Class::IN, Ttl::from_secs(60), address))
                .expect("room");
            socket.send_to(&reply.finish(), from).expect("sent");
        }
    });
    at
}

/// Looks a name up from inside the guest, as its C library would.
fn look_up(guest: &TestGuest, gateway: Ipv4Addr, name: &str) -> Result<Ipv4Addr, Rcode> {
    let name: Name<Vec<u8>> = name.parse().expect("a name");
    let mut query = MessageBuilder::new_vec();
    query.header_mut().set_rd(true);
    let mut query = query.question();
    query.push((name, Rtype::A)).expect("room");
    let socket = guest.udp();
    socket
        .send_to(&query.finish(), (gateway, DNS_PORT))
        .expect("sent");
    let mut buffer = [0; 1500];
    let (length, from) = socket.recv_from(&mut buffer).expect("an answer");
    assert_eq!(from, (gateway, DNS_PORT).into(), "who was asked answers");
    let reply = Message::from_slice(&buffer[..length]).expect("a reply");
    let mut records = reply.answer().expect("records").limit_to::<A>();
    match records.next() {
        Some(record) => Ok(record.expect("a record").data().addr()),
        None => Err(reply.header().rcode()),
    }
}

#[test]
fn a_guest_reaches_what_its_names_lead_to_and_follows_when_they_change() {
    if !may_run() {
        return;
    }
    let lab = Lab::forwarding();
    let gateway = lab.pool.gateway();
    let reach = Reach::Listed {
        networks: Vec::new(),
        names: true,
    };
    let guest = lab.guest(1, Policy::new(reach.clone()));
    let address = guest.guest.address;
    let (ready, is_ready) = mpsc::channel();
    let (stop, stopped) = oneshot::channel::<()>();
    lab.host.run(move || {
        std::thread::spawn(move || {
            let server = name_server([SERVER, OTHER_SERVER, METADATA].into());
            let rules = Rules {
                names: Names::Listed(vec!["*.example.com".parse().expect("a pattern")]),
                exceptions: Vec::new(),
            };
            let (_sender, rules) = watch::channel(Arc::new(rules));
            let sink = Arc::new(Allow {
                firewall: Firewall::new(Os::new(), owner()),
                guest: address,
            });
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            runtime.block_on(async move {
                let here = Arc::new(HostSide::here());
                let resolver = Resolver::bind(gateway, address, (here, vec![server]), rules, sink)
                    .await
                    .expect("a resolver");
                ready
                    .send(resolver.port().expect("a port"))
                    .expect("a reader");
                tokio::select! {
                    ended = resolver.serve() => panic!("{ended:?}"),
                    _ = stopped => {}
                }
            });
        });
    });
    let port: NonZeroU16 = is_ready.recv_timeout(PATIENCE).expect("a resolver");
    let served = Guest {
        policy: Policy {
            resolver: Some(port),
            ..Policy::new(reach)
        },
        ..guest.guest.clone()
    };
    lab.with_firewall(move |firewall| firewall.change(&served, &[]).expect("changed"));

    let reached = || Outcome::From(HOST.to_string());
    assert_eq!(look_up(&guest, gateway, "other.test"), Err(Rcode::REFUSED));
    assert_eq!(guest.connect(SERVER, HELLO_PORT), Outcome::Denied);
    assert_eq!(look_up(&guest, gateway, "www.example.com"), Ok(SERVER));
    assert_eq!(guest.connect(SERVER, HELLO_PORT), reached());
    assert_eq!(guest.connect(OTHER_SERVER, HELLO_PORT), Outcome::Denied);
    // The name's address changed.
    assert_eq!(
        look_up(&guest, gateway, "www.example.com"),
        Ok(OTHER_SERVER)
    );
    assert_eq!(guest.connect(OTHER_SERVER, HELLO_PORT), reached());
    // And now it points where nobody may go.
    assert_eq!(
        look_up(&guest, gateway, "www.example.com"),
        Err(Rcode::REFUSED)
    );
    assert_eq!(guest.connect(METADATA, HELLO_PORT), Outcome::Denied);
    drop(stop);
}

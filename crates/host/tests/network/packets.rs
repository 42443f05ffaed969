//! What a guest reaches, and what not.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::num::NonZeroU16;
use std::sync::mpsc;
use std::time::Duration;

use smolvm_host::net::nft::{Guest, Policy, Reach, Transport};

use crate::lab::{
    DNS_PORT, ECHO_PORT, HELLO_PORT, HOST, Lab, METADATA, OTHER_SERVER, Outcome, PATIENCE,
    PRIVATE_SERVER, SERVER, TestGuest, answer, may_run, word,
};

fn listed(networks: &[&str], names: bool) -> Reach {
    Reach::Listed {
        networks: networks
            .iter()
            .map(|n| n.parse().expect("a network"))
            .collect(),
        names,
    }
}

/// Allowed, and seen by the server as coming from the host.
fn translated() -> Outcome {
    Outcome::From(HOST.to_string())
}

/// Returns when the host has seen all that the guest sent: the cable keeps the order, and this is
/// answered.
fn passed(guest: &TestGuest) {
    assert_eq!(guest.connect(HOST, HELLO_PORT), Outcome::Denied);
}

fn change(lab: &Lab, guest: &TestGuest, policy: Policy) {
    let guest = Guest {
        policy,
        ..guest.guest.clone()
    };
    lab.with_firewall(move |firewall| firewall.change(&guest, &[]).expect("changed"));
}

#[test]
fn an_open_guest_reaches_the_world_but_not_what_nobody_should() {
    if !may_run() {
        return;
    }
    let lab = Lab::forwarding();
    let open = lab.guest(1, Policy::new(Reach::Open));
    let neighbour = lab.guest(2, Policy::new(Reach::Open));
    neighbour.inside.run(|| {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, HELLO_PORT)).expect("a listener");
        std::thread::spawn(move || while listener.accept().is_ok() {});
    });
    assert_eq!(open.connect(SERVER, HELLO_PORT), translated());
    assert_eq!(open.connect(OTHER_SERVER, HELLO_PORT), translated());
    let denied = [
        PRIVATE_SERVER,
        METADATA,
        HOST,
        lab.pool.gateway(),
        neighbour.guest.address,
        Ipv4Addr::new(172, 16, 0, 200),
    ];
    for address in denied {
        assert_eq!(
            open.connect(address, HELLO_PORT),
            Outcome::Denied,
            "{address}"
        );
    }
    let tap = open.guest.tap;
    let mut noted: Vec<_> = lab.with_firewall(move |firewall| {
        let noted = firewall.denied(tap).expect("a list");
        noted
            .iter()
            .map(|one| (one.destination, one.protocol, one.port))
            .collect()
    });
    noted.sort_unstable();
    let mut wanted = denied.map(|address| (address, 6, Some(HELLO_PORT)));
    wanted.sort_unstable();
    assert_eq!(noted, wanted);

    // All those addresses are there: without the table they answer, from where it matters.
    lab.host.sh("nft delete table inet smolvm");
    let guest = open.guest.address.to_string();
    assert_eq!(open.connect(HOST, HELLO_PORT), Outcome::From(guest.clone()));
    let route = format!("ip route add {guest} via 203.0.113.1");
    lab.server(&route);
    for address in [PRIVATE_SERVER, METADATA] {
        assert_eq!(
            open.connect(address, HELLO_PORT),
            Outcome::From(guest.clone())
        );
    }
    let address = neighbour.guest.address;
    open.inside
        .run(move || TcpStream::connect((address, HELLO_PORT)).map(drop))
        .expect("guests would reach each other");
}

#[test]
fn nothing_reaches_a_guest_that_it_did_not_call() {
    if !may_run() {
        return;
    }
    let lab = Lab::forwarding();
    let guest = lab.guest(1, Policy::new(Reach::Open));
    lab.server("ip route add 172.16.0.0/24 via 203.0.113.1");
    let socket = guest.udp();
    let to_guest = socket.local_addr().expect("an address");
    let (from_server, from_host) = (word(), word());
    lab.server_sends(to_guest, &from_server);
    // The host itself may: that is how ports are forwarded.
    let (sent, address) = (from_host.clone(), to_guest);
    lab.host.run(move || {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a socket");
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        socket.send_to(&sent, address).expect("sent");
        std::thread::spawn(move || answer(&socket));
    });
    // In order: had the server's come through, it would be first.
    assert_eq!(answer(&socket).expect("a datagram"), from_host);
}

#[test]
fn the_host_reaches_ports_of_a_guest_and_gets_answers() {
    if !may_run() {
        return;
    }
    let lab = Lab::forwarding();
    let guest = lab.guest(1, Policy::off());
    guest.inside.run(|| {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 8000)).expect("a listener");
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a caller");
            stream.write_all(b"from the guest").expect("written");
        });
    });
    let address = guest.guest.address;
    let said = lab.host.run(move || {
        let mut said = String::new();
        let mut stream = TcpStream::connect((address, 8000)).expect("connected");
        stream.read_to_string(&mut said).expect("read");
        said
    });
    assert_eq!(said, "from the guest");
}

#[test]
fn off_is_off() {
    if !may_run() {
        return;
    }
    let lab = Lab::forwarding();
    let off = lab.guest(1, Policy::off());
    for address in [SERVER, PRIVATE_SERVER, METADATA, HOST, lab.pool.gateway()] {
        assert_eq!(off.connect(address, HELLO_PORT), Outcome::Denied);
    }
}

#[test]
fn a_list_allows_what_is_on_it() {
    if !may_run() {
        return;
    }
    let lab = Lab::forwarding();
    let guest = lab.guest(1, Policy::new(listed(&["198.51.100.0/28"], false)));
    let everything = lab.guest(2, Policy::new(listed(&["0.0.0.0/0"], false)));
    assert_eq!(guest.connect(SERVER, HELLO_PORT), translated());
    assert_eq!(guest.connect(OTHER_SERVER, HELLO_PORT), Outcome::Denied);
    assert_eq!(everything.connect(OTHER_SERVER, HELLO_PORT), translated());
    // A list is no exception from what nobody reaches.
    assert_eq!(
        everything.connect(PRIVATE_SERVER, HELLO_PORT),
        Outcome::Denied
    );
    // An exception is no policy, and both together are enough.
    let excepted = Policy {
        exceptions: vec!["10.0.0.0/24".parse().expect("a network")],
        ..Policy::new(listed(&["198.51.100.20/32"], false))
    };
    change(&lab, &guest, excepted.clone());
    assert_eq!(guest.connect(PRIVATE_SERVER, HELLO_PORT), Outcome::Denied);
    assert_eq!(guest.connect(SERVER, HELLO_PORT), Outcome::Denied);
    change(
        &lab,
        &guest,
        Policy {
            reach: Reach::Open,
            ..excepted
        },
    );
    assert_eq!(guest.connect(PRIVATE_SERVER, HELLO_PORT), translated());
    assert_eq!(guest.connect(METADATA, HELLO_PORT), Outcome::Denied);
}

#[test]
fn ports_of_the_host_are_closed_unless_listed() {
    if !may_run() {
        return;
    }
    let lab = Lab::forwarding();
    let port = NonZeroU16::new(HELLO_PORT).expect("a port");
    let policy = Policy {
        host_ports: vec![(Transport::Tcp, port)],
        ..Policy::off()
    };
    let guest = lab.guest(1, policy);
    let itself = guest.guest.address.to_string();
    assert_eq!(
        guest.connect(lab.pool.gateway(), HELLO_PORT),
        Outcome::From(itself)
    );
    assert_eq!(
        guest.connect(lab.pool.gateway(), HELLO_PORT + 1),
        Outcome::Denied
    );
}

#[test]
fn a_made_up_source_address_gets_nowhere() {
    if !may_run() {
        return;
    }
    let lab = Lab::forwarding();
    let guest = lab.guest(1, Policy::new(Reach::Open));
    let neighbour = lab.guest(2, Policy::new(Reach::Open));
    for false_address in [neighbour.guest.address, Ipv4Addr::new(198, 51, 100, 77)] {
        guest.inside.sh(&format!(
            "ip address add {false_address}/32 dev {}",
            guest.guest.tap
        ));
        let (lie, truth) = (word(), word());
        let honest = guest.udp();
        let sent = lie.clone();
        guest.inside.run(move || {
            let liar = UdpSocket::bind((false_address, 0)).expect("a socket");
            liar.send_to(&sent, (SERVER, ECHO_PORT)).expect("sent");
        });
        honest.send_to(&truth, (SERVER, ECHO_PORT)).expect("sent");
        // In order: had the lie come through, it would be first.
        assert_eq!(lab.next_heard().1, truth);
        assert_eq!(answer(&honest).expect("an answer"), truth);
    }
}

#[test]
fn a_new_policy_takes_effect_at_once_also_for_connections() {
    if !may_run() {
        return;
    }
    let lab = Lab::forwarding();
    let guest = lab.guest(1, Policy::new(Reach::Open));
    let socket = guest.udp();
    let exchange = |say: &[u8]| socket.send_to(say, (SERVER, ECHO_PORT)).map(drop);
    let (before, during, after) = (word(), word(), word());
    exchange(&before).expect("sent");
    assert_eq!(lab.next_heard().1, before);
    assert_eq!(answer(&socket).expect("an answer"), before);
    change(&lab, &guest, Policy::off());
    exchange(&during).expect("sent");
    passed(&guest);
    // An answer the server gives late does not come in either.
    change(
        &lab,
        &guest,
        Policy::new(listed(&["198.51.100.0/24"], false)),
    );
    exchange(&after).expect("sent");
    assert_eq!(lab.next_heard().1, after);
    assert_eq!(answer(&socket).expect("an answer"), after);
}

#[test]
fn a_connection_outlives_the_address_of_its_name_and_not_its_policy() {
    if !may_run() {
        return;
    }
    let lab = Lab::forwarding();
    let names = || Policy::new(listed(&[], true));
    let guest = lab.guest(1, names());
    let address = guest.guest.address;
    assert_eq!(guest.connect(SERVER, HELLO_PORT), Outcome::Denied);
    let allow = |time: Duration| {
        lab.with_firewall(move |firewall| {
            firewall.allow(address, &[(SERVER, time)]).expect("allowed");
        });
    };
    allow(Duration::from_secs(3600));
    assert_eq!(guest.connect(SERVER, HELLO_PORT), translated());
    assert_eq!(guest.connect(OTHER_SERVER, HELLO_PORT), Outcome::Denied);
    // Nobody's name server but ours, even at an address that a name led to.
    assert_eq!(guest.connect(SERVER, DNS_PORT), Outcome::Denied);
    let socket = guest.udp();
    let exchange = |say: &[u8]| {
        socket.send_to(say, (SERVER, ECHO_PORT)).expect("sent");
    };
    let (first, second, third, last) = (word(), word(), word(), word());
    exchange(&first);
    assert_eq!(answer(&socket).expect("an answer"), first);
    // The new time replaces the old one, and soon the address is refused.
    allow(Duration::from_millis(1));
    while guest.connect(SERVER, HELLO_PORT) != Outcome::Denied {}
    exchange(&second);
    assert_eq!(answer(&socket).expect("an answer"), second);
    // The same policy with other names.
    change(&lab, &guest, names());
    exchange(&third);
    passed(&guest);
    allow(Duration::from_secs(3600));
    exchange(&last);
    let heard: Vec<_> = (0..3).map(|_| lab.next_heard().1).collect();
    assert_eq!(heard, [first, second, last]);
}

#[test]
fn connections_outlive_the_loss_of_the_table() {
    if !may_run() {
        return;
    }
    let lab = Lab::forwarding();
    let guest = lab.guest(1, Policy::new(listed(&["198.51.100.0/24"], false)));
    let socket = guest.udp();
    for flush in [false, true, true] {
        if flush {
            lab.host.sh("nft flush ruleset");
            let guests = [guest.guest.clone()];
            lab.with_firewall(move |firewall| {
                assert!(firewall.ensure(&guests).expect("made anew").table);
            });
        }
        let say = word();
        socket.send_to(&say, (SERVER, ECHO_PORT)).expect("sent");
        assert_eq!(answer(&socket).expect("an answer"), say);
    }
    // It was one connection for the server, too.
    let ports: Vec<_> = (0..3).map(|_| lab.next_heard().0).collect();
    assert!(ports.iter().all(|from| *from == ports[0]), "{ports:?}");
    assert_eq!(guest.connect(METADATA, HELLO_PORT), Outcome::Denied);
}

#[test]
fn a_later_guest_does_not_go_on_with_connections_of_an_earlier_one() {
    if !may_run() {
        return;
    }
    let lab = Lab::forwarding();
    let guest = lab.guest(1, Policy::new(Reach::Open));
    let socket = guest.udp();
    let exchange = |say: &[u8]| {
        socket.send_to(say, (SERVER, ECHO_PORT)).expect("sent");
    };
    let (earlier, later, last) = (word(), word(), word());
    exchange(&earlier);
    assert_eq!(answer(&socket).expect("an answer"), earlier);
    let restart = |run: u64, policy: Policy| {
        let before = guest.guest.clone();
        let after = Guest {
            run,
            policy,
            ..before.clone()
        };
        lab.with_firewall(move |firewall| {
            firewall.remove(&before).expect("removed");
            firewall.add(&after).expect("added");
        });
    };
    restart(77, Policy::off());
    exchange(&later);
    passed(&guest);
    // The connection is still known: the run that began it may go on.
    restart(guest.guest.run, Policy::off());
    exchange(&last);
    assert_eq!(answer(&socket).expect("an answer"), last);
    let heard = [lab.next_heard().1, lab.next_heard().1];
    assert_eq!(heard, [earlier, last]);
}

#[test]
fn lookups_go_to_the_guests_own_resolver() {
    if !may_run() {
        return;
    }
    let lab = Lab::forwarding();
    let (tell, asked) = mpsc::channel();
    let gateway = lab.pool.gateway();
    // One for the address to exist.
    let _other = lab.guest(2, Policy::off());
    let port = lab.host.run(move || {
        let resolver = UdpSocket::bind((gateway, 0)).expect("a socket");
        let port = resolver.local_addr().expect("an address").port();
        std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((length, from)) = resolver.recv_from(&mut buffer) {
                let _ = tell.send((from.ip(), buffer[..length].to_vec()));
                let _ = resolver.send_to(&buffer[..length], from);
            }
        });
        NonZeroU16::new(port).expect("a port")
    });
    let policy = Policy {
        resolver: Some(port),
        ..Policy::new(listed(&[], true))
    };
    let guest = lab.guest(1, policy);
    let socket = guest.udp();
    socket.connect((gateway, DNS_PORT)).expect("connected");
    let question = word();
    socket.send(&question).expect("sent");
    assert_eq!(answer(&socket).expect("an answer"), question);
    let (from, heard) = asked.recv_timeout(PATIENCE).expect("a question");
    assert_eq!((from, heard), (guest.guest.address.into(), question));
    // Others are not asked.
    assert_eq!(guest.connect(SERVER, DNS_PORT), Outcome::Denied);
    // A guest without a resolver finds none.
    let other = lab.guest(3, Policy::new(Reach::Open));
    assert_eq!(other.connect(gateway, DNS_PORT), Outcome::Denied);
}

#[test]
fn ipv6_is_closed() {
    if !may_run() {
        return;
    }
    let lab = Lab::forwarding();
    let guest = lab.guest(1, Policy::new(Reach::Open));
    let tap = guest.guest.tap;
    assert_eq!(lab.host.sh(&format!("ip -6 address show dev {tap}")), "");
    for (where_, address) in [(&lab.host, "fd00::1"), (&guest.inside, "fd00::2")] {
        where_.sh(&format!("ip -6 address add {address}/64 dev {tap} nodad"));
    }
    // Neighbours are found by IPv6 itself, which is closed.
    guest.inside.sh(&format!(
        "ip -6 neighbour add fd00::1 lladdr 02:73:6d:00:00:01 dev {tap}"
    ));
    let listener = lab.host.run(|| {
        let socket = UdpSocket::bind("[fd00::1]:7000").expect("a socket");
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        socket
    });
    let send = |what: &[u8]| {
        let what = what.to_vec();
        guest.inside.run(move || {
            let socket = UdpSocket::bind("[fd00::2]:0").expect("a socket");
            socket.send_to(&what, "[fd00::1]:7000").expect("sent");
        });
    };
    let (closed, open) = (word(), word());
    send(&closed);
    passed(&guest);
    lab.host.sh("nft delete table inet smolvm");
    send(&open);
    assert_eq!(answer(&listener).expect("a datagram"), open);
}

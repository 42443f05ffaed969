//! Ports of the host that lead into sandboxes: what they are called, and taking them.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::str::FromStr;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use serde::{Deserialize, Serialize};
use smolvm_host::net::user::HostSide;
use smolvm_host::os::Os;
use smolvm_proto::keeper::{KeeperEvent, KeeperRequest, PortMapping, PortPlace};

use crate::engine::{Engine, unknown_sandbox};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{SandboxRow, State, Store};

/// Most ports one sandbox may publish.
pub const PORTS_MAX: usize = 128;

/// Connections the host's kernel holds for a port until the keeper takes them: as long as the guest
/// boots, or stands still. It cuts more than its own limit to that (listen(2)).
const BACKLOG: i32 = 128;

/// How a port carries bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Protocol {
    /// Connections.
    Tcp,
    /// Datagrams.
    Udp,
}

impl Protocol {
    /// The protocol's name in flags, tables and the state database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Protocol {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        [Self::Tcp, Self::Udp]
            .into_iter()
            .find(|protocol| protocol.as_str() == text)
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::InvalidInput,
                    format!("`{}` is not a protocol of ports", text.escape_debug()),
                )
                .hint("use tcp or udp")
            })
    }
}

/// A place on the host at which something listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct HostPort {
    /// Connections or datagrams.
    pub protocol: Protocol,
    /// Address of the host; 0.0.0.0 and :: are every address of their family.
    pub address: IpAddr,
    /// The port. Where one is asked for, 0 means one that is free.
    pub port: u16,
}

impl HostPort {
    /// Address and port.
    #[must_use]
    pub fn socket_address(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.port)
    }

    /// Whether not both can be listened at.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.protocol == other.protocol
            && self.port == other.port
            && (self.address == other.address
                || (self.address.is_ipv4() == other.address.is_ipv4()
                    && (self.address.is_unspecified() || other.address.is_unspecified())))
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.socket_address(), self.protocol)
    }
}

/// A port of the host that leads to a port of a sandbox.
///
/// As text it is `[IP:][HOST:]GUEST[/tcp|/udp]`, with an IPv6 address in brackets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PublishedPort {
    /// Where the host listens.
    pub host: HostPort,
    /// Port of the guest, 1 to 65535, on its loopback addresses.
    pub guest: u16,
}

impl fmt::Display for PublishedPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} -> {}/{}",
            self.host.socket_address(),
            self.guest,
            self.host.protocol
        )
    }
}

impl FromStr for PublishedPort {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |why: &str| {
            Error::new(
                ErrorKind::InvalidInput,
                format!("`{}` is not a port to publish: {why}", text.escape_debug()),
            )
            .hint("use [IP:]HOST:GUEST, such as 8080:80, 0.0.0.0:8080:80 or 5353:53/udp")
        };
        let (rest, protocol) = match text.rsplit_once('/') {
            Some((rest, protocol)) => (
                rest,
                protocol
                    .parse()
                    .map_err(|_| wrong("the protocol is tcp or udp"))?,
            ),
            None => (text, Protocol::Tcp),
        };
        let (rest, guest) = match rest.rsplit_once(':') {
            Some((rest, guest)) => (Some(rest), guest),
            None => (None, rest),
        };
        let guest = match guest.parse() {
            Ok(0) | Err(_) => return Err(wrong("the guest's port is a number from 1 to 65535")),
            Ok(guest) => guest,
        };
        let (address, port) = host_part(rest.unwrap_or_default()).map_err(wrong)?;
        Ok(Self {
            host: HostPort {
                protocol,
                address,
                port,
            },
            guest,
        })
    }
}

/// `[IP:]PORT` with everything optional.
fn host_part(text: &str) -> std::result::Result<(IpAddr, u16), &'static str> {
    let (address, port) = match text.rsplit_once(':') {
        Some((address, port)) => (Some(address), port),
        None => (None, text),
    };
    let port = match port {
        "" => 0,
        port => port
            .parse()
            .map_err(|_| "the host's port is a number from 0 to 65535")?,
    };
    let address = match address {
        None => IpAddr::V4(Ipv4Addr::LOCALHOST),
        Some(text) => match text
            .strip_prefix('[')
            .and_then(|text| text.strip_suffix(']'))
        {
            Some(inner) => IpAddr::V6(
                inner
                    .parse()
                    .map_err(|_| "what is in brackets is no IPv6 address")?,
            ),
            None => IpAddr::V4(text.parse().map_err(
                |_| "the host's address is no IPv4 address, nor an IPv6 one in brackets",
            )?),
        },
    };
    Ok((address, port))
}

/// Checks that a sandbox that publishes `count` ports may publish one more.
///
/// # Errors
///
/// [`ErrorKind::InvalidInput`] if it has [`PORTS_MAX`].
pub fn check_room(count: usize) -> Result<()> {
    if count < PORTS_MAX {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::InvalidInput,
        format!("a sandbox publishes at most {PORTS_MAX} ports"),
    )
    .hint("publish fewer, or let one program of the sandbox's lead to several"))
}

/// Checks the ports of one sandbox.
///
/// # Errors
///
/// [`ErrorKind::InvalidInput`] if there are too many, or two of them want the same.
pub(crate) fn check(ports: &[PublishedPort]) -> Result<()> {
    check_room(ports.len().saturating_sub(1))?;
    let mut seen = BTreeSet::new();
    for port in ports {
        // Two that are to be chosen differ in the end.
        if port.host.port == 0 {
            continue;
        }
        if let Some(other) = seen.iter().find(|other| port.host.overlaps(other)) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{} and {other} are one port", port.host),
            )
            .hint("publish it once, or give the second another host port"));
        }
        seen.insert(port.host);
    }
    Ok(())
}

/// A port that this process listens at, or for UDP is bound to, until it is dropped.
#[derive(Debug)]
pub struct Bound {
    /// What it is, with the port that was chosen.
    pub published: PublishedPort,
    /// The socket, which does not block.
    pub socket: OwnedFd,
}

/// Takes a port of the host, whose network is on `side`; one that is free, if its number is 0.
///
/// # Errors
///
/// [`ErrorKind::Busy`] if something else has it, [`ErrorKind::PermissionDenied`] for a port below
/// those that everybody may have, [`ErrorKind::InvalidInput`] if the address is not the host's.
pub fn bind(os: &Os, side: &HostSide, published: &PublishedPort) -> Result<Bound> {
    let (socket, port) = take_port(os, side, &published.host)?;
    Ok(Bound {
        published: PublishedPort {
            host: HostPort {
                port,
                ..published.host
            },
            ..*published
        },
        socket,
    })
}

/// Listens at a place of the host at which nothing is published.
///
/// # Errors
///
/// As [`bind`].
pub fn listen(os: &Os, side: &HostSide, host: &HostPort) -> Result<OwnedFd> {
    take_port(os, side, host).map(|(socket, _)| socket)
}

fn take_port(os: &Os, side: &HostSide, host: &HostPort) -> Result<(OwnedFd, u16)> {
    let wanted = *host;
    // Named apart, so that a test can fail it.
    let taken = os.effect("take a port of the host", Path::new("/"), || {
        side.run(move || Ok(take(&wanted)))
    })?;
    taken.map_err(|errno| refused(host, errno))
}

/// Ports that are chosen from for whoever does not care. Below those that the kernel gives to outgoing
/// connections of any program (ip(7), `ip_local_port_range`, from 32768 on by default): a sandbox that is off
/// has its port as a row only, and would find it taken when it starts.
const CHOSEN: std::ops::RangeInclusive<u16> = 20_000..=32_767;
/// Numbers that are tried before the choice is left to the kernel.
const CHOICES: u32 = 64;

fn take(host: &HostPort) -> rustix::io::Result<(OwnedFd, u16)> {
    if host.port != 0 {
        return take_exactly(host);
    }
    for _ in 0..CHOICES {
        let mut random = [0; 2];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
        let width = CHOSEN.end() - CHOSEN.start() + 1;
        let port = CHOSEN.start() + u16::from_ne_bytes(random) % width;
        match take_exactly(&HostPort { port, ..*host }) {
            Err(Errno::ADDRINUSE) => {}
            other => return other,
        }
    }
    take_exactly(host)
}

fn take_exactly(host: &HostPort) -> rustix::io::Result<(OwnedFd, u16)> {
    let (family, kind) = (
        match host.address {
            IpAddr::V4(_) => AddressFamily::INET,
            IpAddr::V6(_) => AddressFamily::INET6,
        },
        match host.protocol {
            Protocol::Tcp => SocketType::STREAM,
            Protocol::Udp => SocketType::DGRAM,
        },
    );
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, kind, flags, None)?;
    if host.address.is_ipv6() {
        // :: would take the port of every IPv4 address too.
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    if host.protocol == Protocol::Tcp {
        // Connections of before, which the kernel still remembers, are no reason to refuse
        // (socket(7)). For UDP it would allow two to have one port.
        sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    rustix::net::bind(&socket, &host.socket_address())?;
    if host.protocol == Protocol::Tcp {
        rustix::net::listen(&socket, BACKLOG)?;
    }
    let port = SocketAddr::try_from(rustix::net::getsockname(&socket)?)?.port();
    Ok((socket, port))
}

fn refused(host: &HostPort, errno: Errno) -> Error {
    let failed = |kind, doing: String| Error::new(kind, doing).because(std::io::Error::from(errno));
    let general = format!("could not listen on {host}");
    match errno {
        Errno::ADDRINUSE if host.port == 0 => failed(
            ErrorKind::Busy,
            format!("no {} port of {} is free to be chosen", host.protocol, host.address),
        )
        .hint("give a port yourself, or widen net.ipv4.ip_local_port_range with sysctl"),
        Errno::ADDRINUSE => failed(
            ErrorKind::Busy,
            format!("port {host} is taken by another program"),
        )
        .hint(format!(
            "see which with `ss -lnp 'sport = :{}'`, or leave the host's port out to have a free one chosen",
            host.port
        )),
        Errno::ACCESS | Errno::PERM => failed(ErrorKind::PermissionDenied, general)
            .hint("use a port from 1024 on, or run as root"),
        Errno::ADDRNOTAVAIL | Errno::AFNOSUPPORT => failed(
            ErrorKind::InvalidInput,
            format!("{general}: the host has no such address"),
        )
        .hint("see its addresses with `ip address`; 0.0.0.0 and [::] are all of them"),
        _ => failed(ErrorKind::Internal, general),
    }
}

/// Takes ports for a sandbox that has no rows of them yet: each asked for by number, and others that
/// are free, of which none is promised to a sandbox that is off.
///
/// Whoever writes a row has the port, so no two can choose the same.
///
/// # Errors
///
/// As [`bind`], and [`ErrorKind::Busy`] with the sandbox that has a port. None is taken then.
pub fn take_all(
    os: &Os,
    side: &HostSide,
    store: &Store,
    wanted: &[PublishedPort],
) -> Result<Vec<Bound>> {
    let mut taken = Vec::with_capacity(wanted.len());
    // Held until all are chosen, so that none is offered twice.
    let mut unwanted = Vec::new();
    for port in wanted {
        if port.host.port != 0 {
            store.check_port(&port.host)?;
            taken.push(bind(os, side, port)?);
            continue;
        }
        let bound = loop {
            let bound = bind(os, side, port)?;
            match store.check_port(&bound.published.host) {
                Ok(()) => break bound,
                Err(error) if error.kind() == ErrorKind::Busy => unwanted.push(bound),
                Err(error) => return Err(error),
            }
        };
        taken.push(bound);
    }
    Ok(taken)
}

/// Takes all ports of a sandbox whose rows are written.
///
/// # Errors
///
/// As [`bind`]; none is taken then.
pub fn bind_all(os: &Os, side: &HostSide, published: &[PublishedPort]) -> Result<Vec<Bound>> {
    published.iter().map(|port| bind(os, side, port)).collect()
}

/// Takes the guest's port off `[IP:]HOST:GUEST`, as whoever published it wrote it.
fn without_guest(text: &str) -> (&str, Option<u16>) {
    let is_port = |text: &str| text.parse::<u16>().is_ok();
    match text.rsplit_once(':') {
        Some((rest, guest)) if is_port(rest.rsplit(':').next().unwrap_or(rest)) => {
            // What is no port is told as the host's.
            guest
                .parse()
                .map_or((text, None), |guest| (rest, Some(guest)))
        }
        _ => (text, None),
    }
}

/// Which port of the host is meant by `[IP:]PORT[:GUEST][/tcp|/udp]`, among those that a sandbox publishes.
fn find(ports: &[PublishedPort], name: &str, text: &str) -> Result<HostPort> {
    let wrong = |kind, why: String| {
        Error::new(kind, why).hint(format!("see its ports with `smolvm port list {name}`"))
    };
    let (rest, protocol) = match text.rsplit_once('/') {
        Some((rest, protocol)) => (rest, Some(protocol.parse::<Protocol>()?)),
        None => (text, None),
    };
    let (rest, guest) = without_guest(rest);
    let (address, port) = host_part(rest).map_err(|why| {
        wrong(
            ErrorKind::InvalidInput,
            format!("`{}`: {why}", text.escape_debug()),
        )
    })?;
    let any_address = !rest.contains(':');
    let of_guest = |port: &&PublishedPort| guest.is_none_or(|guest| port.guest == guest);
    let hosts = ports.iter().filter(of_guest).map(|port| port.host);
    let mut matching = hosts.filter(|host| {
        host.port == port
            && (any_address || host.address == address)
            && protocol.is_none_or(|protocol| host.protocol == protocol)
    });
    match (matching.next(), matching.next()) {
        (Some(host), None) => Ok(host),
        (Some(first), Some(second)) => Err(wrong(
            ErrorKind::InvalidInput,
            format!("`{}` may be {first} or {second}", text.escape_debug()),
        )),
        (None, _) => Err(wrong(
            ErrorKind::NotFound,
            format!(
                "sandbox `{name}` does not publish `{}`",
                text.escape_debug()
            ),
        )),
    }
}

impl Engine {
    /// The port of the host that is meant by `[IP:]PORT[:GUEST][/tcp|/udp]`, among those that a sandbox
    /// publishes. What is left out may be anything.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] if it publishes no such port, [`ErrorKind::InvalidInput`] if it
    /// publishes several.
    pub fn find_port(&self, name: &str, text: &str) -> Result<HostPort> {
        find(&self.info(name)?.ports, name, text)
    }

    /// Publishes a port of a sandbox: at once if it runs, and from its next start on. Returns it with
    /// the host's port that was chosen.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`] if something else has the host's port, with who that is if it is a sandbox;
    /// [`ErrorKind::NotFound`], [`ErrorKind::PermissionDenied`], [`ErrorKind::InvalidInput`].
    pub async fn publish(&self, name: &str, port: &PublishedPort) -> Result<PublishedPort> {
        let request = KeeperRequest::Publish(mapping(port));
        let here = |store: &mut Store, row: &SandboxRow| {
            check_room(row.spec.ports.len())?;
            let bound = take_all(
                self.os(),
                &HostSide::here(),
                store,
                std::slice::from_ref(port),
            )?;
            let published = bound[0].published;
            store.insert_port(&row.id, &published)?;
            Ok(published)
        };
        match self.on_ports(name, &request, here).await? {
            Outcome::Here(published) => Ok(published),
            Outcome::Keeper(KeeperEvent::Published(mapping)) => published(&mapping),
            Outcome::Keeper(other) => Err(crate::session::confused(name, &other)),
        }
    }

    /// Ends what [`Engine::publish`] began, with the connections that came by it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] if the sandbox does not publish it.
    pub async fn unpublish(&self, name: &str, host: &HostPort) -> Result<()> {
        let request = KeeperRequest::Unpublish(place(host));
        let here = |store: &mut Store, row: &SandboxRow| {
            if store.delete_port(&row.id, host)? {
                Ok(())
            } else {
                Err(not_published(name, host))
            }
        };
        match self.on_ports(name, &request, here).await? {
            Outcome::Here(()) | Outcome::Keeper(KeeperEvent::Done(_)) => Ok(()),
            Outcome::Keeper(other) => Err(crate::session::confused(name, &other)),
        }
    }

    /// Asks the keeper if there is one, and does it here otherwise, with the sandbox kept off meanwhile.
    async fn on_ports<T>(
        &self,
        name: &str,
        request: &KeeperRequest,
        here: impl Fn(&mut Store, &SandboxRow) -> Result<T>,
    ) -> Result<Outcome<T>> {
        let Some(mut store) = Store::open_existing(&self.layout().database())? else {
            return Err(unknown_sandbox(name));
        };
        loop {
            let row = self.row(&mut store, name)?;
            match row.state {
                State::Starting | State::Running | State::Paused => {
                    if let Some(session) = self.attach_when_there(&row).await? {
                        return session.keeper(request).await.map(Outcome::Keeper);
                    }
                }
                State::Created | State::Stopped | State::Error => {
                    let dir = self.layout().sandbox(&row.id);
                    // Whoever starts it takes the lock before it reads which ports there are.
                    let lock = self.os().lock("lock the sandbox", &dir.lock())?;
                    let still = store.sandbox(&row.id)?.filter(|now| now.state == row.state);
                    if let Some(row) = still {
                        return here(&mut store, &row).map(Outcome::Here);
                    }
                    drop(lock);
                }
                State::Stopping | State::Deleting => self.wait_until_off(&row).await?,
            }
        }
    }
}

/// Who did it.
enum Outcome<T> {
    Here(T),
    Keeper(KeeperEvent),
}

/// The error for a port that is to be closed and is not published.
#[must_use]
pub fn not_published(name: &str, host: &HostPort) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!("sandbox `{name}` does not publish {host}"),
    )
    .hint(format!("see its ports with `smolvm port list {name}`"))
}

/// A place as a keeper is told of it.
#[must_use]
pub fn place(host: &HostPort) -> PortPlace {
    PortPlace {
        datagrams: host.protocol == Protocol::Udp,
        address: host.address.to_string(),
        port: host.port,
    }
}

/// A published port as a keeper is told of it.
#[must_use]
pub fn mapping(port: &PublishedPort) -> PortMapping {
    PortMapping {
        host: place(&port.host),
        guest: port.guest,
    }
}

/// The place a keeper is told of.
///
/// # Errors
///
/// [`ErrorKind::InvalidInput`] for an address that is none.
pub fn host_port(place: &PortPlace) -> Result<HostPort> {
    Ok(HostPort {
        protocol: if place.datagrams {
            Protocol::Udp
        } else {
            Protocol::Tcp
        },
        address: place
            .address
            .parse()
            .map_err(|error: std::net::AddrParseError| {
                let what = format!("`{}` is no address", place.address.escape_debug());
                Error::new(ErrorKind::InvalidInput, what).because(error)
            })?,
        port: place.port,
    })
}

/// The published port a keeper is told of.
///
/// # Errors
///
/// [`ErrorKind::InvalidInput`] for an address that is none, or a port of the guest that is 0.
pub fn published(mapping: &PortMapping) -> Result<PublishedPort> {
    if mapping.guest == 0 {
        let what = "0 is no port of a guest";
        return Err(Error::new(ErrorKind::InvalidInput, what));
    }
    Ok(PublishedPort {
        host: host_port(&mapping.host)?,
        guest: mapping.guest,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> (String, u16, u16, &'static str) {
        let port: PublishedPort = text.parse().expect(text);
        (
            port.host.address.to_string(),
            port.host.port,
            port.guest,
            port.host.protocol.as_str(),
        )
    }

    #[test]
    fn a_port_is_written_as_elsewhere() {
        let local = || "127.0.0.1".to_owned();
        assert_eq!(parsed("8080:80"), (local(), 8080, 80, "tcp"));
        assert_eq!(parsed("8080:80/tcp"), (local(), 8080, 80, "tcp"));
        assert_eq!(parsed("5353:53/udp"), (local(), 5353, 53, "udp"));
        assert_eq!(parsed("0:80"), (local(), 0, 80, "tcp"));
        assert_eq!(parsed("80"), (local(), 0, 80, "tcp"));
        assert_eq!(parsed("53/udp"), (local(), 0, 53, "udp"));
        assert_eq!(
            parsed("0.0.0.0:8080:80"),
            ("0.0.0.0".to_owned(), 8080, 80, "tcp")
        );
        assert_eq!(
            parsed("10.1.2.3::80"),
            ("10.1.2.3".to_owned(), 0, 80, "tcp")
        );
        assert_eq!(parsed("[::1]:8080:80"), ("::1".to_owned(), 8080, 80, "tcp"));
        assert_eq!(parsed("[::]::53/udp"), ("::".to_owned(), 0, 53, "udp"));
    }

    #[test]
    fn what_is_no_port_is_refused() {
        for text in [
            "",
            "0",
            "x",
            "80:",
            "80:0",
            "80:65536",
            "65536:80",
            "-1:80",
            "80:80/sctp",
            "80:80/",
            "localhost:80:80",
            "::1:80:80",
            "[127.0.0.1]:80:80",
            "1:2:3:4",
            "80 :80",
        ] {
            let error = text.parse::<PublishedPort>().expect_err(text);
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{text}");
            assert!(error.hint_text().is_some(), "{text}");
        }
    }

    #[test]
    fn a_port_to_close_is_found_by_as_much_as_tells_it_apart() {
        let ports = ["8080:80", "8080:53/udp", "0.0.0.0:81:1", "[::1]:82:1"]
            .map(|text| text.parse().expect("a port"));
        let found = |text| find(&ports, "box", text).map(|host| host.to_string());
        assert_eq!(found("8080/udp").expect("one"), "127.0.0.1:8080/udp");
        assert_eq!(found("8080/tcp").expect("one"), "127.0.0.1:8080/tcp");
        assert_eq!(found("81").expect("one"), "0.0.0.0:81/tcp");
        assert_eq!(found("[::1]:82").expect("one"), "[::1]:82/tcp");
        // As it was published, too.
        assert_eq!(found("8080:80").expect("one"), "127.0.0.1:8080/tcp");
        assert_eq!(found("0.0.0.0:81:1").expect("one"), "0.0.0.0:81/tcp");
        assert_eq!(found("[::1]:82:1").expect("one"), "[::1]:82/tcp");
        let kind = |text| found(text).expect_err(text).kind();
        assert_eq!(kind("8080"), ErrorKind::InvalidInput);
        assert_eq!(kind("x"), ErrorKind::InvalidInput);
        assert_eq!(kind("80/sctp"), ErrorKind::InvalidInput);
        assert_eq!(kind("80"), ErrorKind::NotFound);
        assert_eq!(kind("81:2"), ErrorKind::NotFound);
        assert_eq!(kind("127.0.0.1:81"), ErrorKind::NotFound);
    }

    #[test]
    fn one_port_is_published_once() {
        let check = |texts: &[&str]| {
            let ports: Vec<_> = texts
                .iter()
                .map(|text| text.parse().expect("a port"))
                .collect();
            super::check(&ports)
        };
        assert!(check(&["80:1", "80:1/udp", "81:1", "0:1", "0:1", "127.0.0.2:80:1"]).is_ok());
        assert!(check(&["0.0.0.0:80:1", "[::]:80:1"]).is_ok());
        assert!(check(&["80:1", "80:2"]).is_err());
        assert!(check(&["80:1", "0.0.0.0:80:2"]).is_err());
        assert!(check(&["[::]:80:1/udp", "[::1]:80:2/udp"]).is_err());
        assert!(check(&vec!["80"; PORTS_MAX]).is_ok());
        assert!(check(&vec!["80"; PORTS_MAX + 1]).is_err());
    }

    #[test]
    fn a_port_is_taken_once() {
        let (os, side) = (Os::new(), HostSide::here());
        for text in ["0:80", "0:80/udp", "[::1]:0:80"] {
            let first = bind(&os, &side, &text.parse().expect("a port")).expect(text);
            assert!(CHOSEN.contains(&first.published.host.port), "{first:?}");
            let second = bind(&os, &side, &first.published).expect_err("taken");
            assert_eq!(second.kind(), ErrorKind::Busy);
            let all = PublishedPort {
                host: HostPort {
                    address: match first.published.host.address {
                        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                        IpAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
                    },
                    ..first.published.host
                },
                ..first.published
            };
            assert_eq!(
                bind(&os, &side, &all).expect_err("taken").kind(),
                ErrorKind::Busy
            );
            let port = first.published;
            drop(first);
            bind(&os, &side, &port).expect("free again");
        }
        let elsewhere = "192.0.2.1:0:80".parse().expect("a port");
        let error = bind(&os, &side, &elsewhere).expect_err("not the host's");
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }
}

//! A point-to-point TAP device per sandbox: its name, its address, the route to its guest.
//!
//! Every device carries the same gateway address as a /32 and a host route to its one guest, so
//! guests share no link and see no other's frames. The guest takes its address as a /32 too and
//! reaches the gateway on the link. Both ends know each other's MAC address beforehand, so that no
//! ARP is needed for the first packet and none is believed.
//!
//! A device goes with its last descriptor, however the process that held it ends, and with it its
//! address, route and neighbour. [`Lifetime::Kept`] is for devices that are made ahead of demand.

use std::ffi::c_short;
use std::fmt;
use std::fs::OpenOptions;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use netlink_packet_core::{
    DefaultNla, NLA_F_NESTED, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE,
    NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{
    AfSpecInet, AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::alloc::{GATEWAY_MAC, Mac};
use super::netlink::{Answer, Netlink};
use super::sys;
use crate::error::HostError;
use crate::os::Os;

/// What the names of all devices begin with, and those of no other on the host.
pub const NAME_PREFIX: &str = "smol";

/// Digits of a sandbox's id that are in the name of its device: with the prefix, the 15 bytes that
/// the kernel allows (`IFNAMSIZ` less the terminating zero, netdevice(7)).
pub const NAME_DIGITS: usize = 11;

/// The device through which the kernel makes others.
pub(super) const TUN_DEVICE: &str = "/dev/net/tun";

/// The name of a sandbox's device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TapName([u8; NAME_PREFIX.len() + NAME_DIGITS]);

impl TapName {
    /// The name for the sandbox with this id, of which the first [`NAME_DIGITS`] lower-case
    /// hexadecimal digits count; `None` if it does not begin with so many. Ids of 64 random bits
    /// give 44 random bits: among 10,000 sandboxes a pair with one name has a chance of one in
    /// 350,000, and the second of it is refused when its device is made.
    #[must_use]
    pub fn for_sandbox(id: &str) -> Option<Self> {
        let digits = id.as_bytes().get(..NAME_DIGITS)?;
        let hex = |digit: &u8| matches!(digit, b'0'..=b'9' | b'a'..=b'f');
        if !digits.iter().all(hex) {
            return None;
        }
        let mut name = [0; NAME_PREFIX.len() + NAME_DIGITS];
        let (prefix, rest) = name.split_at_mut(NAME_PREFIX.len());
        prefix.copy_from_slice(NAME_PREFIX.as_bytes());
        rest.copy_from_slice(digits);
        Some(Self(name))
    }

    /// The same, from the name of a device.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let digits = name.strip_prefix(NAME_PREFIX)?;
        (digits.len() == NAME_DIGITS)
            .then(|| Self::for_sandbox(digits))
            .flatten()
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("hexadecimal digits and a prefix")
    }

    /// The name as the kernel takes it, filled up with zeros.
    #[must_use]
    pub(super) fn padded(&self) -> [u8; libc::IFNAMSIZ] {
        let mut padded = [0; libc::IFNAMSIZ];
        padded[..self.0.len()].copy_from_slice(&self.0);
        padded
    }
}

impl fmt::Display for TapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Who made a device or an entry of the firewall: a short name for a store, so that two of them on
/// one host leave each other's alone.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Owner(String);

impl Owner {
    /// Longest name in bytes.
    pub const BYTES_MAX: usize = 32;

    /// A name of 1 to [`Owner::BYTES_MAX`] lower-case letters, digits and hyphens; `None` for
    /// others.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Option<Self> {
        let name = name.into();
        let fits = (1..=Self::BYTES_MAX).contains(&name.len());
        let plain = |byte| matches!(byte, b'0'..=b'9' | b'a'..=b'z' | b'-');
        (fits && name.bytes().all(plain)).then_some(Self(name))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// As it stands in the alias of a device.
    fn alias(&self) -> String {
        format!("smolvm:{}", self.0)
    }
}

/// When a device goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifetime {
    /// With its last descriptor.
    Held,
    /// When it is deleted. Its descriptor may be closed, and opened again with [`Tap::open`].
    Kept,
}

/// What a device is to be.
#[derive(Debug, Clone)]
pub struct TapSpec {
    /// Its name.
    pub name: TapName,
    /// Who makes it; kept as the device's alias.
    pub owner: Owner,
    /// The host's end, the same on every device.
    pub gateway: Ipv4Addr,
    /// The guest's end, which no other may have.
    pub guest: Ipv4Addr,
    /// The guest's MAC address.
    pub guest_mac: Mac,
    /// Whether frames begin with a `struct virtio_net_hdr`, which lets guest and host leave
    /// checksums and segmentation to each other. The VMM has to know.
    pub virtio_header: bool,
    /// When it goes.
    pub lifetime: Lifetime,
}

/// A device, held open. Who inherits the descriptor is the other end of the cable.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    name: TapName,
}

impl Tap {
    /// Makes the device with its address, its route and its neighbour, and brings it up. Takes no
    /// more than one descriptor afterwards, which closes on exec; the VMM's starter has to clear
    /// that.
    ///
    /// # Errors
    ///
    /// [`AlreadyExists`](crate::HostErrorKind::AlreadyExists) if a device has the name or a route
    /// leads to the guest's address, whoever made them: the caller tries another address.
    /// [`PermissionDenied`](crate::HostErrorKind::PermissionDenied) without `CAP_NET_ADMIN`,
    /// [`NotFound`](crate::HostErrorKind::NotFound) where the kernel has no TUN driver. After an
    /// error nothing remains.
    pub fn create(os: &Os, spec: &TapSpec) -> Result<Self, HostError> {
        let path = Path::new(spec.name.as_str());
        let fd = os.effect("create the network device", path, || {
            attach(spec.name, spec.virtio_header, libc::IFF_TUN_EXCL).map_err(busy_is_taken)
        })?;
        // From here on the device goes with `fd`, until it is told to stay.
        let tap = Self {
            fd,
            name: spec.name,
        };
        let (mut route, index) = os.effect("find the network device", path, || {
            Ok((Netlink::open(NETLINK_ROUTE)?, index_of(spec.name)?))
        })?;
        os.effect("bring up the network device", path, || {
            bring_up(&mut route, index, &spec.owner)
        })?;
        os.effect("give an address to the network device", path, || {
            add_address(&mut route, index, spec.gateway)
        })?;
        let guest = format!("{} at {}", spec.guest, spec.name);
        os.effect("make the route to the guest", Path::new(&guest), || {
            add_route(&mut route, index, spec)
        })?;
        os.effect("make the neighbour entry for", Path::new(&guest), || {
            add_neighbour(&mut route, index, spec)
        })?;
        if spec.lifetime == Lifetime::Kept {
            os.effect("keep the network device", path, || {
                sys::set_persistent(tap.fd.as_fd(), true)
            })?;
        }
        Ok(tap)
    }

    /// Makes a device that leads nowhere, in a network namespace that has nothing else: for a machine
    /// that is to have a network device, with nobody at the other end. It goes with its last
    /// descriptor, and the namespace with it.
    ///
    /// # Errors
    ///
    /// [`PermissionDenied`](crate::HostErrorKind::PermissionDenied) without `CAP_SYS_ADMIN` and
    /// `CAP_NET_ADMIN`.
    pub fn detached(os: &Os, virtio_header: bool) -> Result<OwnedFd, HostError> {
        let os = os.clone();
        let made = std::thread::spawn(move || {
            super::enter_new_namespace(&os)?;
            let name = detached_name();
            os.effect(
                "create the network device",
                Path::new("in a namespace of its own"),
                || attach(name, virtio_header, libc::IFF_TUN_EXCL),
            )
        });
        made.join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// The same in a new network namespace of the calling thread, for a process to open that this thread
    /// starts: the device stays until the namespace goes.
    ///
    /// # Errors
    ///
    /// Those of [`Tap::detached`].
    pub fn detached_here(os: &Os, virtio_header: bool) -> Result<TapName, HostError> {
        super::enter_new_namespace(os)?;
        let name = detached_name();
        os.effect(
            "create the network device",
            Path::new(name.as_str()),
            || {
                let fd = attach(name, virtio_header, libc::IFF_TUN_EXCL)?;
                sys::set_persistent(fd.as_fd(), true)
            },
        )?;
        Ok(name)
    }

    /// Opens a device that was [kept](Lifetime::Kept).
    ///
    /// # Errors
    ///
    /// [`NotFound`](crate::HostErrorKind::NotFound) if there is none of the name; `EBUSY` if it is
    /// open already.
    pub fn open(os: &Os, name: TapName, virtio_header: bool) -> Result<Self, HostError> {
        let fd = os.effect("open the network device", Path::new(name.as_str()), || {
            // Without this the driver would make one.
            index_of(name)?;
            attach(name, virtio_header, 0)
        })?;
        Ok(Self { fd, name })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> TapName {
        self.name
    }

    /// Gives the guest's address free, so that another device can have it at once: see
    /// [`release_address`].
    ///
    /// # Errors
    ///
    /// Those of rtnetlink(7).
    pub fn release_address(&self, os: &Os, guest: Ipv4Addr) -> Result<(), HostError> {
        release_address(os, self.name, guest)
    }

    /// Closes the device, which is [kept](Lifetime::Kept) from now on, for a process of the user with this
    /// number to open: nobody else can, but who may do anything with the network.
    ///
    /// # Errors
    ///
    /// `EINVAL` for a number that this user namespace does not know. The device goes then, unless it was
    /// kept before.
    pub fn leave_to(self, os: &Os, user: u32) -> Result<(), HostError> {
        os.effect(
            "pass on the network device",
            Path::new(self.name.as_str()),
            || {
                sys::set_owner(self.fd.as_fd(), user)?;
                sys::set_persistent(self.fd.as_fd(), true)
            },
        )
    }

    /// Lets a kept device go with its last descriptor after all.
    ///
    /// # Errors
    ///
    /// Those of the TUN driver; none is known.
    pub fn let_go(&self, os: &Os) -> Result<(), HostError> {
        os.effect(
            "stop keeping the network device",
            Path::new(self.name.as_str()),
            || sys::set_persistent(self.fd.as_fd(), false),
        )
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Tap> for OwnedFd {
    fn from(tap: Tap) -> Self {
        tap.fd
    }
}

/// Gives the guest's address free, so that another device can have it at once: the device itself
/// takes the kernel some 20 ms to remove, for which whoever closes its last descriptor waits.
/// Idempotent.
///
/// # Errors
///
/// Those of rtnetlink(7).
pub fn release_address(os: &Os, name: TapName, guest: Ipv4Addr) -> Result<(), HostError> {
    let what = format!("{guest} at {name}");
    os.effect("remove the route to the guest", Path::new(&what), || {
        let mut message = RouteMessage::default();
        message.header = host_route();
        message.attributes = vec![
            RouteAttribute::Destination(RouteAddress::Inet(guest)),
            RouteAttribute::Oif(index_of(name)?),
        ];
        let mut route = Netlink::open(NETLINK_ROUTE)?;
        match ask(&mut route, [(RouteNetlinkMessage::DelRoute(message), 0)]) {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            other => other,
        }
    })
}

/// Deletes a device, and with it its address, route and neighbour. Idempotent. Holders of its
/// descriptor read end of file or errors.
///
/// # Errors
///
/// Those of rtnetlink(7), except that a missing device is success.
pub fn delete(os: &Os, name: TapName) -> Result<(), HostError> {
    os.effect(
        "delete the network device",
        Path::new(name.as_str()),
        || {
            let mut route = Netlink::open(NETLINK_ROUTE)?;
            let mut link = LinkMessage::default();
            link.attributes
                .push(LinkAttribute::IfName(name.to_string()));
            let gone = ask(&mut route, [(RouteNetlinkMessage::DelLink(link), 0)]);
            match gone {
                Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(()),
                other => other,
            }
        },
    )
}

/// The devices that `owner` made in this network namespace, in no order.
///
/// # Errors
///
/// Those of rtnetlink(7).
pub fn list(os: &Os, owner: &Owner) -> Result<Vec<TapName>, HostError> {
    os.effect(
        "list the network devices of",
        Path::new(owner.as_str()),
        || {
            let alias = owner.alias();
            let mut route = Netlink::open(NETLINK_ROUTE)?;
            let links = dump(
                &mut route,
                RouteNetlinkMessage::GetLink(LinkMessage::default()),
            )?;
            let ours = links.into_iter().filter_map(|message| {
                let RouteNetlinkMessage::NewLink(link) = message else {
                    return None;
                };
                let mut name = None;
                let mut owned = false;
                for attribute in link.attributes {
                    match attribute {
                        LinkAttribute::IfName(text) => name = TapName::parse(&text),
                        LinkAttribute::IfAlias(text) => owned = text == alias,
                        _ => {}
                    }
                }
                name.filter(|_| owned)
            });
            Ok(ours.collect())
        },
    )
}

/// The name of a device that is alone in its network namespace.
fn detached_name() -> TapName {
    TapName::for_sandbox("00000000000").expect("digits")
}

fn attach(name: TapName, virtio_header: bool, flags: i32) -> io::Result<OwnedFd> {
    let device = OpenOptions::new().read(true).write(true).open(TUN_DEVICE)?;
    let header = if virtio_header { libc::IFF_VNET_HDR } else { 0 };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | header | flags;
    // The kernel takes the sixteen bits as they are; IFF_TUN_EXCL is the topmost.
    let flags = c_short::from_ne_bytes(
        u16::try_from(flags)
            .map_err(io::Error::other)?
            .to_ne_bytes(),
    );
    sys::attach_tap(device.as_fd(), name.padded(), flags)?;
    Ok(device.into())
}

/// The TUN driver says EBUSY of a name that is taken.
fn busy_is_taken(error: io::Error) -> io::Error {
    if error.raw_os_error() == Some(libc::EBUSY) {
        io::Error::from_raw_os_error(libc::EEXIST)
    } else {
        error
    }
}

fn index_of(name: TapName) -> io::Result<u32> {
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::DGRAM,
        None,
    )?;
    rustix::net::netdevice::name_to_index(&socket, name.as_str()).map_err(|e| {
        if e == rustix::io::Errno::NODEV {
            io::ErrorKind::NotFound.into()
        } else {
            e.into()
        }
    })
}

/// Attribute of `IFLA_AF_SPEC`, linux/if_link.h.
const IFLA_INET_CONF: u16 = 1;

/// Settings of IPv4 for one device, by their number in linux/ip.h.
const IPV4_DEVICE: [(u16, u32); 5] = [
    // IPV4_DEVCONF_FORWARDING: packets that come in here may leave elsewhere.
    (1, 1),
    // IPV4_DEVCONF_ACCEPT_REDIRECTS: a guest changes no route of the host.
    (4, 0),
    // IPV4_DEVCONF_SEND_REDIRECTS: there is no better way.
    (6, 0),
    // IPV4_DEVCONF_ARP_IGNORE: who asks for an address of another device gets no answer.
    (19, 1),
    // IPV4_DEVCONF_ROUTE_LOCALNET: 127.0.0.1 is not reached from outside.
    (26, 0),
];

fn bring_up(route: &mut Netlink, index: u32, owner: &Owner) -> io::Result<()> {
    let mut conf = Vec::new();
    for (setting, value) in IPV4_DEVICE {
        conf.extend(8_u16.to_ne_bytes());
        conf.extend(setting.to_ne_bytes());
        conf.extend(value.to_ne_bytes());
    }
    let conf = AfSpecInet::Other(DefaultNla::new(IFLA_INET_CONF | NLA_F_NESTED, conf));
    let mut settings = link(index);
    settings.attributes = vec![
        LinkAttribute::Address(GATEWAY_MAC.to_vec()),
        LinkAttribute::IfAlias(owner.alias()),
        LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet(vec![conf])]),
    ];
    // Before the device is up, or it has an IPv6 address of the kernel's choosing.
    let mut quiet = link(index);
    quiet.attributes = vec![LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(
        vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)],
    )])];
    let mut up = link(index);
    up.header.flags = LinkFlags::Up;
    up.header.change_mask = LinkFlags::Up;
    let outcomes = outcomes(
        route,
        [settings, quiet, up].map(|link| (RouteNetlinkMessage::SetLink(link), 0)),
    )?;
    for (at, outcome) in outcomes.into_iter().enumerate() {
        match outcome {
            // A kernel without IPv6.
            Err(e) if at == 1 && e.raw_os_error() == Some(libc::EAFNOSUPPORT) => {}
            other => other?,
        }
    }
    Ok(())
}

pub(super) fn link(index: u32) -> LinkMessage {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link
}

fn add_address(route: &mut Netlink, index: u32, gateway: Ipv4Addr) -> io::Result<()> {
    let flags = NLM_F_CREATE | NLM_F_EXCL;
    let message = RouteNetlinkMessage::NewAddress(address(index, gateway));
    ask(route, [(message, flags)])
}

/// One address, with no network around it, on a device.
pub(super) fn address(index: u32, ip: Ipv4Addr) -> AddressMessage {
    let mut address = AddressMessage::default();
    address.header.family = AddressFamily::Inet;
    address.header.prefix_len = 32;
    address.header.index = index;
    address.attributes = vec![
        AddressAttribute::Local(IpAddr::V4(ip)),
        AddressAttribute::Address(IpAddr::V4(ip)),
    ];
    address
}

fn add_route(route: &mut Netlink, index: u32, spec: &TapSpec) -> io::Result<()> {
    let mut message = RouteMessage::default();
    message.header = host_route();
    message.attributes = vec![
        RouteAttribute::Destination(RouteAddress::Inet(spec.guest)),
        RouteAttribute::Oif(index),
        RouteAttribute::PrefSource(RouteAddress::Inet(spec.gateway)),
    ];
    let flags = NLM_F_CREATE | NLM_F_EXCL;
    ask(route, [(RouteNetlinkMessage::NewRoute(message), flags)])
}

fn host_route() -> RouteHeader {
    RouteHeader {
        address_family: AddressFamily::Inet,
        destination_prefix_length: 32,
        table: RouteHeader::RT_TABLE_MAIN,
        protocol: RouteProtocol::Static,
        scope: RouteScope::Link,
        kind: RouteType::Unicast,
        ..RouteHeader::default()
    }
}

fn add_neighbour(route: &mut Netlink, index: u32, spec: &TapSpec) -> io::Result<()> {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        NeighbourAttribute::Destination(NeighbourAddress::Inet(spec.guest)),
        NeighbourAttribute::LinkLayerAddress(spec.guest_mac.to_vec()),
    ];
    let flags = NLM_F_CREATE | NLM_F_REPLACE;
    ask(route, [(RouteNetlinkMessage::NewNeighbour(message), flags)])
}

/// Sends requests and fails with the first that failed.
pub(super) fn ask<const N: usize>(
    route: &mut Netlink,
    requests: [(RouteNetlinkMessage, u16); N],
) -> io::Result<()> {
    outcomes(route, requests)?.into_iter().collect()
}

/// Sends requests, which the kernel works through in order, and returns the outcome of each.
fn outcomes<const N: usize>(
    route: &mut Netlink,
    requests: [(RouteNetlinkMessage, u16); N],
) -> io::Result<Vec<io::Result<()>>> {
    let mut bytes = Vec::new();
    let mut sequences = Vec::new();
    for (request, flags) in requests {
        let sequence = route.next_sequence();
        sequences.push(sequence);
        serialize(
            &mut bytes,
            request,
            sequence,
            NLM_F_REQUEST | NLM_F_ACK | flags,
        );
    }
    let mut answers = route.exchange(&bytes)?;
    sequences
        .into_iter()
        .map(|sequence| {
            let at = answers.iter().position(|(of, _)| *of == sequence);
            at.map(|at| answers.swap_remove(at).1)
                .ok_or_else(|| io::Error::other("the kernel did not answer a request"))
        })
        .collect()
}

/// The entries of a list.
pub(super) fn dump(
    route: &mut Netlink,
    request: RouteNetlinkMessage,
) -> io::Result<Vec<RouteNetlinkMessage>> {
    let mut bytes = Vec::new();
    let sequence = route.next_sequence();
    serialize(&mut bytes, request, sequence, NLM_F_REQUEST | NLM_F_DUMP);
    route.dump(&bytes)?.iter().map(parse).collect()
}

/// What an answer of rtnetlink(7) says.
pub(super) fn parse(answer: &Answer) -> io::Result<RouteNetlinkMessage> {
    use netlink_packet_core::NetlinkDeserializable as _;
    let mut header = NetlinkHeader::default();
    header.message_type = answer.kind;
    RouteNetlinkMessage::deserialize(&header, &answer.payload).map_err(io::Error::other)
}

fn serialize(bytes: &mut Vec<u8>, request: RouteNetlinkMessage, sequence: u32, flags: u16) {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    header.sequence_number = sequence;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request));
    message.finalize();
    let start = bytes.len();
    bytes.resize(start + message.buffer_len(), 0);
    message.serialize(&mut bytes[start..]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_made_of_the_id_and_fits_the_kernel() {
        let name = TapName::for_sandbox("0123456789abcdef").unwrap();
        assert_eq!(name.as_str(), "smol0123456789a");
        assert_eq!(name.as_str().len(), libc::IFNAMSIZ - 1);
        assert_eq!(name.padded()[15], 0);
        assert_eq!(TapName::parse("smol0123456789a"), Some(name));
        for other in [
            "0123456789",
            "0123456789A",
            "",
            "0123456789/",
            "../../../../",
        ] {
            assert_eq!(TapName::for_sandbox(other), None, "{other}");
        }
        for other in [
            "eth0",
            "smol",
            "smol0123456789",
            "smol0123456789ab",
            "smolsmolsmolsmo",
        ] {
            assert_eq!(TapName::parse(other), None, "{other}");
        }
    }

    #[test]
    fn an_owner_is_a_plain_short_word() {
        assert!(Owner::new("a-0").is_some());
        assert!(Owner::new("a".repeat(32)).is_some());
        for wrong in ["", "A", "a b", "a\0", &"a".repeat(33)] {
            assert!(Owner::new(wrong).is_none(), "{wrong:?}");
        }
    }
}

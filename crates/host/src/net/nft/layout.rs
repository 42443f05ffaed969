//! The table: its sets, its chains and their rules. Nothing here knows a sandbox; those are
//! elements of the sets.
//!
//! As `nft list table inet smolvm` shows it, shortened:
//!
//! ```text
//! chain prerouting  { iifname "smol*": IPv6 dropped; device . source not in @guests dropped }
//! chain forward     { iifname "smol*" goto from_guest; oifname "smol*" goto to_guest }
//! chain input       { iifname "smol*" goto to_host
//!                     from the uplink of an ordinary user's network, of no connection: dropped }
//! chain from_guest  { to another guest: deny
//!                     ct label in @live: accept
//!                     destination in @never and source . destination not in @exceptions: deny
//!                     source: @policy says grant or listed; otherwise deny }
//! chain listed      { source . destination in @networks: grant
//!                     port 53 or 853: deny
//!                     source . destination in @resolved: grant; otherwise deny }
//! chain grant       { label the connection as @epochs says; accept }
//! chain to_guest    { ct label in @live: accept; otherwise drop }
//! chain to_host     { answers: accept; source . protocol . port in @services: accept; deny }
//! chain deny        { note in @denied; reject }
//! chain resolve     { port 53 of the host: to the port that @resolvers says }
//! chain translate   { source in @members, leaving by no device of a guest }
//! ```
//!
//! **Connections.** One that a policy allowed is labelled with the guest's *epoch*, which is new with
//! every policy. Its later packets pass because of the label, in both directions:
//! so a download goes on when the name it began with has expired from `@resolved`, and stops at once
//! when the policy changes to one that does not allow it, because the label is then no longer in
//! `@live`. A connection of an earlier guest with the same address has another label. The label is the connection's own 128
//! bits (`ct label`), not the mark, which hosts use for routing.
//!
//! **The uplink.** `pasta` of Debian 12 tells a guest of its window in a segment without any flag, which
//! connection tracking takes to be of no connection. So it is not translated back, and the namespace itself
//! would answer it with a reset, at which `pasta` gives the guest's connection up.
//!
//! **Closed.** A device `smol*` that has no entry cannot send. An address that has no policy reaches
//! nothing. Verdicts here cannot open what another table of the host drops.

use super::wire::{
    Attributes, Batch, Connection, DELETE_CHAIN, DELETE_ELEMENT, DELETE_RULE, FAMILY_INET, Field,
    Meta, NEW_CHAIN, NEW_ELEMENT, NEW_RULE, NEW_SET, NEW_TABLE, Register, Rule, value, verdict,
};
use crate::net::tap::NAME_PREFIX;
use crate::net::user::UPLINK;

/// The table's name, in family `inet`.
pub(super) const TABLE: &str = "smolvm";

/// A chain of this name says which layout the table has.
const MARKER: &str = "layout_";

// linux/netlink.h
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;

/// Types of keys: the number by which `nft` knows them (its include/datatype.h; the kernel only
/// hands it back), and the length in bytes.
type Type = (u32, u32);
const IPV4: Type = (7, 4);
const PROTOCOL: Type = (12, 1);
const SERVICE: Type = (13, 2);
/// As the type of IPv6 addresses: `nft` 1.0.6 of Debian 12 cannot list sets of labels.
const LABEL: Type = (8, 16);
const INTERFACE: Type = (41, 16);

/// What a set holds besides keys.
#[derive(Debug, Clone, Copy)]
enum Holds {
    Keys,
    Verdicts,
    Values(Type),
}

/// A set or map. If one is to change, it gets another name: the kernel refuses to redefine one.
#[derive(Debug)]
struct Set {
    name: &'static str,
    key: &'static [Type],
    holds: Holds,
    /// Elements are ranges.
    ranges: bool,
    /// Elements can expire.
    expires: bool,
    /// Packets add elements; the most there can be.
    noted: Option<u32>,
}

const fn set(name: &'static str, key: &'static [Type]) -> Set {
    Set {
        name,
        key,
        holds: Holds::Keys,
        ranges: false,
        expires: false,
        noted: None,
    }
}

/// Device and address of each guest. The comment of an element is its owner.
pub(super) const GUESTS: &str = "guests";
/// Addresses of guests.
pub(super) const MEMBERS: &str = "members";
/// Where connections of an address are judged.
pub(super) const POLICY: &str = "policy";
/// The label that allowed connections of an address get.
pub(super) const EPOCHS: &str = "epochs";
/// Labels of the connections that may go on.
pub(super) const LIVE: &str = "live";
/// Networks an address may reach if its policy is a list.
pub(super) const NETWORKS: &str = "networks";
/// Networks an address may reach although nobody else may.
pub(super) const EXCEPTIONS: &str = "exceptions";
/// What names resolved to, until that expires.
pub(super) const RESOLVED: &str = "resolved";
/// The port of an address's resolver.
pub(super) const RESOLVERS: &str = "resolvers";
/// Ports of the host that an address may reach.
pub(super) const SERVICES: &str = "services";
/// What was denied lately: device, destination, protocol, port.
pub(super) const DENIED: &str = "denied";
const NEVER: &str = "never";
const PORTED: &str = "with_ports";
const DNS_PORTS: &str = "dns_ports";

/// Chain for [`POLICY`]: everything.
pub(super) const GRANT: &str = "grant";
/// Chain for [`POLICY`]: what is listed.
pub(super) const LISTED: &str = "listed";

/// Denied attempts that are remembered, in all: some 3 MiB of the kernel's memory. When it is full,
/// further ones are denied without being remembered.
const DENIED_MAX: u32 = 16_384;
/// How long a denied attempt is remembered after its last repetition, in ms.
pub(super) const DENIED_MS: u64 = 3_600_000;

const SETS: &[Set] = &[
    set(GUESTS, &[INTERFACE, IPV4]),
    set(MEMBERS, &[IPV4]),
    Set {
        holds: Holds::Verdicts,
        ..set(POLICY, &[IPV4])
    },
    Set {
        holds: Holds::Values(LABEL),
        ..set(EPOCHS, &[IPV4])
    },
    set(LIVE, &[LABEL]),
    Set {
        ranges: true,
        ..set(NETWORKS, &[IPV4, IPV4])
    },
    Set {
        ranges: true,
        ..set(EXCEPTIONS, &[IPV4, IPV4])
    },
    Set {
        expires: true,
        ..set(RESOLVED, &[IPV4, IPV4])
    },
    Set {
        holds: Holds::Values(SERVICE),
        ..set(RESOLVERS, &[IPV4])
    },
    set(SERVICES, &[IPV4, PROTOCOL, SERVICE]),
    Set {
        expires: true,
        noted: Some(DENIED_MAX),
        ..set(DENIED, &[INTERFACE, IPV4, PROTOCOL, SERVICE])
    },
    Set {
        ranges: true,
        ..set(NEVER, &[IPV4])
    },
    set(PORTED, &[PROTOCOL]),
    set(DNS_PORTS, &[SERVICE]),
];

/// Sets whose elements are the sandboxes', and are listed to learn what is there.
pub(super) const LISTED_SETS: [&str; 9] = [
    GUESTS, MEMBERS, POLICY, EPOCHS, LIVE, NETWORKS, EXCEPTIONS, RESOLVERS, SERVICES,
];

/// What no guest reaches unless its policy excepts it: first address, and the first after. Private,
/// shared, loopback, link-local (169.254.169.254 and .170.2 are metadata services), protocol
/// assignments (192.0.0.192 is Oracle's metadata), benchmarking, multicast, reserved and broadcast:
/// the IANA IPv4 special-purpose registry, less its documentation networks; and Azure's 168.63.129.16.
pub(super) const NEVER_RANGES: [([u8; 4], Option<[u8; 4]>); 10] = [
    ([0, 0, 0, 0], Some([1, 0, 0, 0])),
    ([10, 0, 0, 0], Some([11, 0, 0, 0])),
    ([100, 64, 0, 0], Some([100, 128, 0, 0])),
    ([127, 0, 0, 0], Some([128, 0, 0, 0])),
    ([168, 63, 129, 16], Some([168, 63, 129, 17])),
    ([169, 254, 0, 0], Some([169, 255, 0, 0])),
    ([172, 16, 0, 0], Some([172, 32, 0, 0])),
    ([192, 0, 0, 0], Some([192, 0, 1, 0])),
    ([192, 168, 0, 0], Some([192, 169, 0, 0])),
    ([198, 18, 0, 0], Some([198, 20, 0, 0])),
];

/// As [`NEVER_RANGES`]: everything from here on.
pub(super) const NEVER_FROM: [u8; 4] = [224, 0, 0, 0];

/// A chain that the kernel calls: type, hook, priority (linux/netfilter.h, netfilter_ipv4.h).
type Hook = (&'static str, u32, i32);
const PREROUTING: u32 = 0;
const INPUT: u32 = 1;
const FORWARD: u32 = 2;
const POSTROUTING: u32 = 4;

const TCP: u8 = 6;
const UDP: u8 = 17;

fn chains() -> Vec<(&'static str, Option<Hook>, Vec<Rule>)> {
    let r = Register::nth;
    // Interface names match by their first bytes, as `smol*` does.
    let from_device = || {
        Rule::new()
            .meta(Meta::InputName, r(0))
            .equals(r(0), NAME_PREFIX.as_bytes())
    };
    let to_device = || {
        Rule::new()
            .meta(Meta::OutputName, r(0))
            .equals(r(0), NAME_PREFIX.as_bytes())
    };
    let ipv4 = |rule: Rule| {
        rule.meta(Meta::Family, r(0))
            .equals(r(0), &[libc_u8(libc::AF_INET)])
    };
    let ipv6 = |rule: Rule| {
        rule.meta(Meta::Family, r(0))
            .equals(r(0), &[libc_u8(libc::AF_INET6)])
    };
    let with_ports = |rule: Rule| rule.meta(Meta::Protocol, r(0)).in_set(r(0), PORTED);
    // A rule about IPv4's header says so, for `nft` to print it by the names of fields.
    let v4 = || ipv4(Rule::new());
    // Source and destination in r0 and r1.
    let pair = || {
        v4().payload(Field::Source, r(0))
            .payload(Field::Destination, r(1))
    };
    // Before connections are tracked: what is spoofed leaves no entry there.
    let raw = -300;
    vec![
        (
            "prerouting",
            Some(("filter", PREROUTING, raw)),
            vec![
                ipv6(from_device()).drop(),
                ipv4(from_device())
                    .meta(Meta::InputName, r(0))
                    .payload(Field::Source, r(4))
                    .not_in_set(r(0), GUESTS)
                    .drop(),
            ],
        ),
        (
            "forward",
            Some(("filter", FORWARD, 0)),
            vec![
                from_device().goto("from_guest"),
                to_device().goto("to_guest"),
            ],
        ),
        (
            "input",
            Some(("filter", INPUT, 0)),
            vec![
                from_device().goto("to_host"),
                Rule::new()
                    .meta(Meta::InputName, r(0))
                    .equals(r(0), UPLINK.as_bytes())
                    .connection(Connection::State, r(0))
                    .mask(r(0), INVALID)
                    .differs(r(0), &[0; 4])
                    .drop(),
            ],
        ),
        (
            "from_guest",
            None,
            vec![
                to_device().goto("deny"),
                Rule::new()
                    .connection(Connection::Labels, r(0))
                    .in_set(r(0), LIVE)
                    .accept(),
                v4().payload(Field::Destination, r(0))
                    .in_set(r(0), NEVER)
                    .payload(Field::Source, r(0))
                    .payload(Field::Destination, r(1))
                    .not_in_set(r(0), EXCEPTIONS)
                    .goto("deny"),
                v4().payload(Field::Source, r(0)).verdict_map(r(0), POLICY),
                Rule::new().goto("deny"),
            ],
        ),
        (
            LISTED,
            None,
            vec![
                pair().in_set(r(0), NETWORKS).goto(GRANT),
                with_ports(Rule::new())
                    .payload(Field::Port, r(0))
                    .in_set(r(0), DNS_PORTS)
                    .goto("deny"),
                pair().in_set(r(0), RESOLVED).goto(GRANT),
                Rule::new().goto("deny"),
            ],
        ),
        (
            GRANT,
            None,
            vec![
                v4().payload(Field::Source, r(0))
                    .map(r(0), EPOCHS, r(4))
                    .set_connection(Connection::Labels, r(4))
                    .accept(),
                Rule::new().goto("deny"),
            ],
        ),
        (
            "to_guest",
            None,
            vec![
                ipv6(Rule::new()).drop(),
                Rule::new()
                    .connection(Connection::Labels, r(0))
                    .in_set(r(0), LIVE)
                    .accept(),
                Rule::new().drop(),
            ],
        ),
        (
            "to_host",
            None,
            vec![
                // Answers to what the host itself began: forwarded ports.
                Rule::new()
                    .connection(Connection::State, r(0))
                    .mask(r(0), ESTABLISHED | RELATED)
                    .differs(r(0), &[0; 4])
                    .connection(Connection::Direction, r(0))
                    .equals(r(0), &[REPLY])
                    .accept(),
                with_ports(v4())
                    .payload(Field::Source, r(0))
                    .meta(Meta::Protocol, r(1))
                    .payload(Field::Port, r(2))
                    .in_set(r(0), SERVICES)
                    .accept(),
                Rule::new().goto("deny"),
            ],
        ),
        (
            "deny",
            None,
            vec![
                with_ports(v4())
                    .meta(Meta::InputName, r(0))
                    .payload(Field::Destination, r(4))
                    .meta(Meta::Protocol, r(5))
                    .payload(Field::Port, r(6))
                    .note(r(0), DENIED, DENIED_MS)
                    .reject(),
                v4().meta(Meta::InputName, r(0))
                    .payload(Field::Destination, r(4))
                    .meta(Meta::Protocol, r(5))
                    .load(r(6), &[0; 2])
                    .note(r(0), DENIED, DENIED_MS)
                    .reject(),
                // If it could not be noted.
                Rule::new().reject(),
            ],
        ),
        (
            "resolve",
            Some(("nat", PREROUTING, -100)),
            vec![
                with_ports(ipv4(from_device()))
                    .payload(Field::Port, r(0))
                    .equals(r(0), &53_u16.to_be_bytes())
                    .for_host(r(0))
                    .payload(Field::Source, r(0))
                    .map(r(0), RESOLVERS, r(4))
                    .redirect(r(4)),
            ],
        ),
        (
            "translate",
            Some(("nat", POSTROUTING, 100)),
            vec![
                v4().payload(Field::Source, r(0))
                    .in_set(r(0), MEMBERS)
                    .meta(Meta::OutputName, r(0))
                    .differs(r(0), NAME_PREFIX.as_bytes())
                    .masquerade(),
            ],
        ),
    ]
}

/// Bits of `ct state`, linux/netfilter/nf_conntrack_common.h.
const INVALID: u32 = 1 << 0;
const ESTABLISHED: u32 = 1 << 1;
const RELATED: u32 = 1 << 2;
/// `ct direction` of answers.
const REPLY: u8 = 1;

fn libc_u8(number: i32) -> u8 {
    u8::try_from(number).expect("a number of a protocol family")
}

/// What the table looks like if nobody meddled with it: the number of rules of each chain, and the
/// chain that marks this very layout.
#[derive(Debug)]
pub(super) struct Shape {
    pub(super) rules: Vec<(&'static str, usize)>,
    pub(super) marker: String,
}

impl Shape {
    pub(super) fn new() -> Self {
        shape()
    }
}

fn shape() -> Shape {
    let chains = chains();
    // FNV-1a, 64 bits: two layouts are told apart, nothing is proven.
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut mix = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    for (name, hook, rules) in &chains {
        mix(name.as_bytes());
        mix(format!("{hook:?}").as_bytes());
        for rule in rules {
            mix(rule.expressions());
        }
    }
    mix(format!("{SETS:?}{NEVER_RANGES:?}{NEVER_FROM:?}").as_bytes());
    Shape {
        rules: chains
            .iter()
            .map(|(name, _, rules)| (*name, rules.len()))
            .collect(),
        marker: format!("{MARKER}{hash:016x}"),
    }
}

/// Whether a chain marks another layout than `shape`.
pub(super) fn is_stale_marker(chain: &str, shape: &Shape) -> bool {
    chain.starts_with(MARKER) && chain != shape.marker
}

/// Adds to `batch` what makes the table, or what is missing of it. Elements of sandboxes stay.
pub(super) fn build(batch: &mut Batch, shape: &Shape, stale_markers: &[String]) {
    batch.push("make the table", (NEW_TABLE, CREATE), FAMILY_INET, |a| {
        a.text(1, TABLE);
    });
    for (id, set) in (1..).zip(SETS) {
        batch.push("make a set", (NEW_SET, CREATE), FAMILY_INET, |a| {
            define(a, id, set);
        });
    }
    constants(batch);
    let chains = chains();
    for (name, hook, _) in &chains {
        batch.push("make a chain", (NEW_CHAIN, CREATE), FAMILY_INET, |a| {
            a.text(1, TABLE);
            a.text(3, name);
            if let Some((kind, hook, priority)) = hook {
                a.nest(4, |a| {
                    a.number(1, *hook);
                    a.bytes(2, &priority.to_be_bytes());
                });
                const ACCEPT: u32 = 1;
                a.number(5, ACCEPT);
                a.text(7, kind);
            }
        });
        batch.push("empty a chain", (DELETE_RULE, 0), FAMILY_INET, |a| {
            a.text(1, TABLE);
            a.text(2, name);
        });
    }
    for (name, _, rules) in &chains {
        for rule in rules {
            batch.push(
                "make a rule",
                (NEW_RULE, CREATE | APPEND),
                FAMILY_INET,
                |a| {
                    a.text(1, TABLE);
                    a.text(2, name);
                    a.nest(4, |a| a.raw(rule.expressions()));
                },
            );
        }
    }
    batch.push("mark the layout", (NEW_CHAIN, CREATE), FAMILY_INET, |a| {
        a.text(1, TABLE);
        a.text(3, &shape.marker);
    });
    for marker in stale_markers {
        batch.push("remove a mark", (DELETE_CHAIN, 0), FAMILY_INET, |a| {
            a.text(1, TABLE);
            a.text(3, marker);
        });
    }
}

fn define(a: &mut Attributes<'_>, id: u32, set: &Set) {
    const INTERVAL: u32 = 0x4;
    const MAP: u32 = 0x8;
    const TIMEOUT: u32 = 0x10;
    const EVAL: u32 = 0x20;
    const CONCAT: u32 = 0x80;
    const VERDICT_TYPE: u32 = 0xffff_ff00;
    let padded = |length: u32| length.next_multiple_of(4);
    let concatenated = set.key.len() > 1;
    let mut flags = 0;
    for (wanted, flag) in [
        (set.ranges, INTERVAL),
        (!matches!(set.holds, Holds::Keys), MAP),
        (set.expires, TIMEOUT),
        (set.noted.is_some(), EVAL),
        (concatenated && set.ranges, CONCAT),
    ] {
        flags |= if wanted { flag } else { 0 };
    }
    a.text(1, TABLE);
    a.text(2, set.name);
    a.number(3, flags);
    let kind = set.key.iter().fold(0, |all, (kind, _)| all << 6 | kind);
    let length = match set.key {
        [(_, length)] => *length,
        several => several.iter().map(|(_, length)| padded(*length)).sum(),
    };
    a.number(4, kind);
    a.number(5, length);
    match set.holds {
        Holds::Keys => {}
        Holds::Verdicts => a.number(6, VERDICT_TYPE),
        Holds::Values((kind, length)) => {
            a.number(6, kind);
            a.number(7, length);
        }
    }
    if set.noted.is_some() || concatenated && set.ranges {
        a.nest(9, |a| {
            if let Some(most) = set.noted {
                a.number(1, most);
            }
            if concatenated && set.ranges {
                a.nest(2, |a| {
                    for (_, length) in set.key {
                        a.nest(1, |a| a.number(1, *length));
                    }
                });
            }
        });
    }
    a.number(10, id);
    // For `nft` to print keys right: they are in network byte order (NFTNL_UDATA_SET_KEYBYTEORDER).
    a.bytes(13, &[0, 4, 2, 0, 0, 0]);
}

/// The elements that are always there.
fn constants(batch: &mut Batch) {
    let plain = |set, keys: &[&[u8]], batch: &mut Batch| {
        in_set(batch, set, |a| {
            for key in keys {
                a.nest(1, |a| value(a, 1, key));
            }
        });
    };
    plain(PORTED, &[&[TCP], &[UDP]], batch);
    plain(
        DNS_PORTS,
        &[&53_u16.to_be_bytes(), &853_u16.to_be_bytes()],
        batch,
    );
    in_set(batch, NEVER, |a| {
        const INTERVAL_END: u32 = 1;
        for (first, after) in NEVER_RANGES {
            a.nest(1, |a| value(a, 1, &first));
            if let Some(after) = after {
                a.nest(1, |a| {
                    value(a, 1, &after);
                    a.number(3, INTERVAL_END);
                });
            }
        }
        a.nest(1, |a| value(a, 1, &NEVER_FROM));
    });
}

fn in_set(batch: &mut Batch, set: &str, elements: impl FnOnce(&mut Attributes<'_>)) {
    batch.push("empty a set", (DELETE_ELEMENT, 0), FAMILY_INET, |a| {
        a.text(1, TABLE);
        a.text(2, set);
    });
    batch.push("fill a set", (NEW_ELEMENT, CREATE), FAMILY_INET, |a| {
        a.text(1, TABLE);
        a.text(2, set);
        a.nest(3, elements);
    });
}

/// What an element holds.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Held {
    Nothing,
    Goto(String),
    Value(Vec<u8>),
}

/// An element of one of the sandboxes' sets.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Element {
    pub(super) set: &'static str,
    pub(super) key: Vec<u8>,
    /// The last key, if it is a range.
    pub(super) end: Option<Vec<u8>>,
    pub(super) held: Held,
    pub(super) comment: Option<String>,
}

impl Element {
    /// Writes the element: whole to add it, its key to delete it.
    pub(super) fn write(&self, a: &mut Attributes<'_>, whole: bool) {
        a.nest(1, |a| {
            value(a, 1, &self.key);
            if let Some(end) = &self.end {
                value(a, 10, end);
            }
            if !whole {
                return;
            }
            match &self.held {
                Held::Nothing => {}
                Held::Goto(chain) => verdict(a, 2, super::wire::Verdict::Goto(chain)),
                Held::Value(bytes) => value(a, 2, bytes),
            }
            if let Some(comment) = &self.comment {
                // NFTNL_UDATA_SET_ELEM_COMMENT, which `nft` prints.
                let mut data = vec![
                    0,
                    u8::try_from(comment.len() + 1).expect("owners are short"),
                ];
                data.extend(comment.as_bytes());
                data.push(0);
                a.bytes(6, &data);
            }
        });
    }
}

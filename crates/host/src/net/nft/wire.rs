//! Messages to nf_tables, as linux/netfilter/nf_tables.h and nfnetlink.h have them.
//!
//! Only what one table of ours needs. Numbers in attributes are in network byte order unless the
//! header says otherwise; what registers hold is in the byte order of the packet or of the host,
//! depending on where it came from.

use netlink_packet_core::{NLA_F_NESTED, NLM_F_ACK, NLM_F_REQUEST, NlasIterator};

use super::super::netlink::HEADER_BYTES;

/// Families, linux/netfilter.h.
pub(super) const FAMILY_UNSPEC: u8 = 0;
pub(super) const FAMILY_INET: u8 = 1;
pub(super) const FAMILY_IPV4: u8 = 2;

const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const BATCH_GENERATION: u16 = 1;

pub(super) const NEW_TABLE: u16 = 0;
pub(super) const DELETE_TABLE: u16 = 2;
pub(super) const NEW_CHAIN: u16 = 3;
pub(super) const GET_CHAIN: u16 = 4;
pub(super) const DELETE_CHAIN: u16 = 5;
pub(super) const NEW_RULE: u16 = 6;
pub(super) const GET_RULE: u16 = 7;
pub(super) const DELETE_RULE: u16 = 8;
pub(super) const NEW_SET: u16 = 9;
pub(super) const NEW_ELEMENT: u16 = 12;
pub(super) const GET_ELEMENT: u16 = 13;
pub(super) const DELETE_ELEMENT: u16 = 14;
pub(super) const NEW_GENERATION: u16 = 15;
pub(super) const GET_GENERATION: u16 = 16;

/// Whether a netlink message is one of nf_tables, and which.
pub(super) fn message_of(kind: u16) -> Option<u16> {
    (kind >> 8 == SUBSYSTEM).then_some(kind & 0xff)
}

/// Attributes, being written.
#[derive(Debug)]
pub(super) struct Attributes<'a>(&'a mut Vec<u8>);

impl Attributes<'_> {
    pub(super) fn bytes(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(4 + value.len()).expect("attributes are below 64 KiB");
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    /// Attributes that are written already.
    pub(super) fn raw(&mut self, list: &[u8]) {
        self.0.extend(list);
    }

    pub(super) fn number(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    pub(super) fn number64(&mut self, kind: u16, value: u64) {
        self.bytes(kind, &value.to_be_bytes());
    }

    pub(super) fn text(&mut self, kind: u16, value: &str) {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.bytes(kind, &bytes);
    }

    pub(super) fn nest(&mut self, kind: u16, inner: impl FnOnce(&mut Attributes<'_>)) {
        let start = self.0.len();
        self.bytes(kind | NLA_F_NESTED, &[]);
        inner(&mut Attributes(self.0));
        let length = u16::try_from(self.0.len() - start).expect("attributes are below 64 KiB");
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    }
}

/// The attributes of a message of nf_tables.
pub(super) fn attributes(payload: &[u8]) -> &[u8] {
    // `struct nfgenmsg` comes first.
    payload.get(4..).unwrap_or_default()
}

/// The attributes in an attribute: kinds and values. What is malformed ends the list; the kernel
/// writes none such.
pub(super) fn nested(list: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    NlasIterator::new(list).map_while(Result::ok).map(|one| {
        let (kind, end) = (one.kind(), usize::from(one.length()));
        (kind, one.into_inner().get(4..end).unwrap_or_default())
    })
}

/// The value of the first attribute of that kind.
pub(super) fn find(list: &[u8], kind: u16) -> Option<&[u8]> {
    nested(list).find(|one| one.0 == kind).map(|one| one.1)
}

/// A number in network byte order.
pub(super) fn number(value: &[u8]) -> Option<u32> {
    value.first_chunk().map(|bytes| u32::from_be_bytes(*bytes))
}

/// A long number in network byte order.
pub(super) fn number64(value: &[u8]) -> Option<u64> {
    value.first_chunk().map(|bytes| u64::from_be_bytes(*bytes))
}

/// A text up to its terminating zero.
pub(super) fn text(value: &[u8]) -> String {
    let end = value.iter().position(|b| *b == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

/// Writes one message.
pub(super) fn message(
    bytes: &mut Vec<u8>,
    (kind, flags, sequence): (u16, u16, u32),
    (family, resource): (u8, u16),
    body: impl FnOnce(&mut Attributes<'_>),
) {
    let start = bytes.len();
    bytes.resize(start + HEADER_BYTES, 0);
    bytes.extend([family, 0]);
    bytes.extend(resource.to_be_bytes());
    body(&mut Attributes(bytes));
    let length = u32::try_from(bytes.len() - start).expect("messages are below 4 GiB");
    bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes());
    bytes[start + 4..start + 6].copy_from_slice(&kind.to_ne_bytes());
    bytes[start + 6..start + 8].copy_from_slice(&(NLM_F_REQUEST | flags).to_ne_bytes());
    bytes[start + 8..start + 12].copy_from_slice(&sequence.to_ne_bytes());
}

/// A request outside a transaction.
pub(super) fn request(
    (kind, flags, sequence): (u16, u16, u32),
    family: u8,
    body: impl FnOnce(&mut Attributes<'_>),
) -> Vec<u8> {
    let mut bytes = Vec::new();
    let kind = SUBSYSTEM << 8 | kind;
    message(&mut bytes, (kind, flags, sequence), (family, 0), body);
    bytes
}

/// Changes the kernel makes all or none of, in one step for packets.
#[derive(Debug, Default)]
pub(super) struct Batch {
    bytes: Vec<u8>,
    /// What each message does, for people.
    names: Vec<&'static str>,
}

/// Sequence number of a batch's first message.
const FIRST: u32 = 1;

impl Batch {
    /// A batch. With `generation`, the kernel refuses it with `ERESTART` if the rules changed since
    /// they had that number.
    pub(super) fn new(generation: Option<u32>) -> Self {
        let mut bytes = Vec::new();
        message(
            &mut bytes,
            (BATCH_BEGIN, 0, 0),
            (FAMILY_UNSPEC, SUBSYSTEM),
            |a| {
                if let Some(generation) = generation {
                    a.number(BATCH_GENERATION, generation);
                }
            },
        );
        Self {
            bytes,
            names: Vec::new(),
        }
    }

    /// Adds a change. `name` is a verb phrase.
    pub(super) fn push(
        &mut self,
        name: &'static str,
        (kind, flags): (u16, u16),
        family: u8,
        body: impl FnOnce(&mut Attributes<'_>),
    ) {
        let sequence = FIRST + u32::try_from(self.names.len()).expect("fewer than 2^32 changes");
        self.names.push(name);
        let kind = SUBSYSTEM << 8 | kind;
        message(
            &mut self.bytes,
            (kind, flags | NLM_F_ACK, sequence),
            (family, 0),
            body,
        );
    }

    /// Whether there is no change in it.
    pub(super) fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// The bytes to send.
    pub(super) fn finish(mut self) -> (Vec<u8>, Vec<&'static str>) {
        message(
            &mut self.bytes,
            (BATCH_END, 0, u32::MAX),
            (FAMILY_UNSPEC, SUBSYSTEM),
            |_| {},
        );
        (self.bytes, self.names)
    }

    /// What the message with that sequence number does.
    pub(super) fn name_of(names: &[&'static str], sequence: u32) -> &'static str {
        sequence
            .checked_sub(FIRST)
            .and_then(|at| names.get(at as usize).copied())
            .unwrap_or("commit the transaction")
    }
}

/// A register of four bytes; longer values take several in a row.
#[derive(Debug, Clone, Copy)]
pub(super) struct Register(u32);

impl Register {
    /// The nth of sixteen.
    pub(super) const fn nth(n: u32) -> Self {
        assert!(n < 16);
        Self(8 + n)
    }

    /// The first of sixteen bytes, by the number it had before there were any of four: the one that
    /// iptables uses.
    pub(super) const fn first() -> Self {
        Self(1)
    }
}

/// Where a packet goes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Verdict<'a> {
    Drop,
    Accept,
    Goto(&'a str),
}

/// Writes a verdict as data.
pub(super) fn verdict(a: &mut Attributes<'_>, kind: u16, verdict: Verdict<'_>) {
    const DATA_VERDICT: u16 = 2;
    let (code, chain) = match verdict {
        Verdict::Drop => (0_i32, None),
        Verdict::Accept => (1, None),
        Verdict::Goto(chain) => (-4, Some(chain)),
    };
    a.nest(kind, |a| {
        a.nest(DATA_VERDICT, |a| {
            a.bytes(1, &code.to_be_bytes());
            if let Some(chain) = chain {
                a.text(2, chain);
            }
        });
    });
}

/// Writes a value as data.
pub(super) fn value(a: &mut Attributes<'_>, kind: u16, bytes: &[u8]) {
    const DATA_VALUE: u16 = 1;
    a.nest(kind, |a| a.bytes(DATA_VALUE, bytes));
}

/// What of a packet's surroundings is loaded, `enum nft_meta_keys`.
#[derive(Debug, Clone, Copy)]
pub(super) enum Meta {
    InputName = 6,
    OutputName = 7,
    Family = 15,
    Protocol = 16,
}

/// What of a connection is loaded, `enum nft_ct_keys`.
#[derive(Debug, Clone, Copy)]
pub(super) enum Connection {
    State = 0,
    Direction = 1,
    Labels = 13,
}

/// Fields of packets: header and place in it.
#[derive(Debug, Clone, Copy)]
pub(super) enum Field {
    /// IPv4's.
    Source,
    /// IPv4's.
    Destination,
    /// The destination's port; TCP and UDP have it at the same place.
    Port,
}

/// The expressions of a rule, being written one after the other: each works on what those before
/// left in the registers, and the first that does not match ends the rule.
#[derive(Debug, Default)]
pub(super) struct Rule {
    bytes: Vec<u8>,
}

const LIST_ELEMENT: u16 = 1;

impl Rule {
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// The expressions, to be put in the attribute of a rule.
    pub(super) fn expressions(&self) -> &[u8] {
        &self.bytes
    }

    fn expression(mut self, name: &str, data: impl FnOnce(&mut Attributes<'_>)) -> Self {
        Attributes(&mut self.bytes).nest(LIST_ELEMENT, |a| {
            a.text(1, name);
            a.nest(2, data);
        });
        self
    }

    pub(super) fn meta(self, key: Meta, to: Register) -> Self {
        self.expression("meta", |a| {
            a.number(1, to.0);
            a.number(2, key as u32);
        })
    }

    pub(super) fn connection(self, key: Connection, to: Register) -> Self {
        self.expression("ct", |a| {
            a.number(1, to.0);
            a.number(2, key as u32);
        })
    }

    pub(super) fn set_connection(self, key: Connection, from: Register) -> Self {
        self.expression("ct", |a| {
            a.number(2, key as u32);
            a.number(4, from.0);
        })
    }

    pub(super) fn payload(self, field: Field, to: Register) -> Self {
        const NETWORK: u32 = 1;
        const TRANSPORT: u32 = 2;
        let (base, offset, length) = match field {
            Field::Source => (NETWORK, 12, 4),
            Field::Destination => (NETWORK, 16, 4),
            Field::Port => (TRANSPORT, 2, 2),
        };
        self.expression("payload", |a| {
            a.number(1, to.0);
            a.number(2, base);
            a.number(3, offset);
            a.number(4, length);
        })
    }

    pub(super) fn equals(self, from: Register, bytes: &[u8]) -> Self {
        self.compare(from, 0, bytes)
    }

    pub(super) fn differs(self, from: Register, bytes: &[u8]) -> Self {
        self.compare(from, 1, bytes)
    }

    fn compare(self, from: Register, operation: u32, bytes: &[u8]) -> Self {
        self.expression("cmp", |a| {
            a.number(1, from.0);
            a.number(2, operation);
            value(a, 3, bytes);
        })
    }

    /// Keeps the bits of `mask`.
    pub(super) fn mask(self, register: Register, mask: u32) -> Self {
        self.expression("bitwise", |a| {
            a.number(1, register.0);
            a.number(2, register.0);
            a.number(3, 4);
            value(a, 4, &mask.to_ne_bytes());
            value(a, 5, &[0; 4]);
        })
    }

    pub(super) fn in_set(self, from: Register, set: &str) -> Self {
        self.lookup(from, set, None, false)
    }

    pub(super) fn not_in_set(self, from: Register, set: &str) -> Self {
        self.lookup(from, set, None, true)
    }

    pub(super) fn map(self, from: Register, set: &str, to: Register) -> Self {
        self.lookup(from, set, Some(to.0), false)
    }

    /// Goes where the map of verdicts says.
    pub(super) fn verdict_map(self, from: Register, set: &str) -> Self {
        const VERDICT_REGISTER: u32 = 0;
        self.lookup(from, set, Some(VERDICT_REGISTER), false)
    }

    fn lookup(self, from: Register, set: &str, to: Option<u32>, inverted: bool) -> Self {
        self.expression("lookup", |a| {
            a.text(1, set);
            a.number(2, from.0);
            if let Some(to) = to {
                a.number(3, to);
            }
            if inverted {
                a.number(5, 1);
            }
        })
    }

    pub(super) fn load(self, to: Register, bytes: &[u8]) -> Self {
        self.expression("immediate", |a| {
            a.number(1, to.0);
            value(a, 2, bytes);
        })
    }

    /// Adds what the register holds to a set, or renews it, and counts.
    pub(super) fn note(self, from: Register, set: &str, timeout_ms: u64) -> Self {
        const UPDATE: u32 = 1;
        self.expression("dynset", |a| {
            a.text(1, set);
            a.number(3, UPDATE);
            a.number(4, from.0);
            a.number64(6, timeout_ms);
            a.nest(7, |a| {
                a.text(1, "counter");
                a.nest(2, |_| {});
            });
        })
    }

    /// Matches packets to an address of the host.
    pub(super) fn for_host(self, register: Register) -> Self {
        const ADDRESS_TYPE: u32 = 3;
        const OF_DESTINATION: u32 = 2;
        const LOCAL: u32 = 2;
        self.expression("fib", |a| {
            a.number(1, register.0);
            a.number(2, ADDRESS_TYPE);
            a.number(3, OF_DESTINATION);
        })
        .equals(register, &LOCAL.to_ne_bytes())
    }

    pub(super) fn counter(self) -> Self {
        self.expression("counter", |_| {})
    }

    pub(super) fn masquerade(self) -> Self {
        self.expression("masq", |_| {})
    }

    /// Sends the connection to the host's port that the register holds.
    pub(super) fn redirect(self, port: Register) -> Self {
        self.expression("redir", |a| a.number(1, port.0))
    }

    /// Drops the packet and tells its sender that it was forbidden.
    pub(super) fn reject(self) -> Self {
        const ICMPX: u32 = 2;
        const ADMIN_PROHIBITED: u8 = 3;
        self.expression("reject", |a| {
            a.number(1, ICMPX);
            a.bytes(2, &[ADMIN_PROHIBITED]);
        })
    }

    pub(super) fn verdict(self, to: Verdict<'_>) -> Self {
        const VERDICT_REGISTER: u32 = 0;
        self.expression("immediate", |a| {
            a.number(1, VERDICT_REGISTER);
            verdict(a, 2, to);
        })
    }

    pub(super) fn accept(self) -> Self {
        self.verdict(Verdict::Accept)
    }

    pub(super) fn drop(self) -> Self {
        self.verdict(Verdict::Drop)
    }

    pub(super) fn goto(self, chain: &str) -> Self {
        self.verdict(Verdict::Goto(chain))
    }
}

//! Guests as elements of the table's sets, and back. Pure, but for the random bits of a late epoch.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::Ipv4Addr;
use std::time::Duration;

use ipnet::Ipv4Net;

use super::layout::{
    DENIED, DENIED_MS, EPOCHS, EXCEPTIONS, Element, GRANT, GUESTS, Held, LISTED, LIVE, MEMBERS,
    NETWORKS, POLICY, RESOLVERS, SERVICES,
};
use super::wire;
use super::{Denied, Guest, Reach, Transport};
use crate::net::tap::{Owner, TapName};

/// A year: the longest an address of a name is kept.
pub(super) const TIMEOUT_MS_MAX: u128 = 365 * 24 * 3600 * 1000;

const NAME_BYTES: usize = libc::IFNAMSIZ;

/// What the connections of one guest under one policy are labelled with.
///
/// The kernel can add bits to a label, and take none away (`nft_ct_set_eval`). So that a connection
/// can get the label of a later policy, the first [`ID_BYTES`] are those of [`Guest::run`] for as
/// long as the guest runs, and the rest has one bit more with every policy: adding the later bits to an
/// earlier label gives the later label, and never the other way round. After some 80 policies the
/// first bytes are drawn at random, and connections begun before have to be begun anew; as they have
/// if the table is lost after the guest's policy was changed, because the count is then lost too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Epoch([u8; 16]);

const ID_BYTES: usize = 6;

impl Epoch {
    /// The first of a guest's run.
    pub(super) fn first(run: u64) -> Self {
        let mut bytes = [0; 16];
        bytes[..ID_BYTES].copy_from_slice(&run.to_be_bytes()[8 - ID_BYTES..]);
        bytes[ID_BYTES] = 1;
        Self(bytes)
    }

    /// The one after this.
    pub(super) fn next(self) -> io::Result<Self> {
        let mut bytes = self.0;
        match bytes[ID_BYTES..].iter_mut().find(|byte| **byte != 0xff) {
            Some(byte) => *byte = *byte << 1 | 1,
            None => {
                bytes = [0; 16];
                // So few bytes come whole, getrandom(2).
                let flags = rustix::rand::GetRandomFlags::empty();
                rustix::rand::getrandom(&mut bytes[..ID_BYTES], flags)?;
                bytes[ID_BYTES] = 1;
            }
        }
        Ok(Self(bytes))
    }
}

/// The elements of a guest, those of one set side by side.
pub(super) fn of(guest: &Guest, owner: &Owner, epoch: &Epoch) -> Vec<Element> {
    let Epoch(epoch) = epoch;
    let address = guest.address.octets();
    let policy = &guest.policy;
    let plain = |set, key: Vec<u8>| Element {
        set,
        key,
        end: None,
        held: Held::Nothing,
        comment: None,
    };
    let mut all = vec![
        Element {
            comment: Some(owner.as_str().to_owned()),
            ..plain(GUESTS, [&guest.tap.padded()[..], &address].concat())
        },
        plain(MEMBERS, address.to_vec()),
        Element {
            held: Held::Value(epoch.to_vec()),
            ..plain(EPOCHS, address.to_vec())
        },
        plain(LIVE, epoch.to_vec()),
    ];
    let chain = match policy.reach {
        Reach::Off => None,
        Reach::Listed { .. } => Some(LISTED),
        Reach::Open => Some(GRANT),
    };
    if let Some(chain) = chain {
        all.push(Element {
            held: Held::Goto(chain.to_owned()),
            ..plain(POLICY, address.to_vec())
        });
    }
    if let Reach::Listed { networks, .. } = &policy.reach {
        all.extend(ranges(NETWORKS, guest.address, networks));
    }
    all.extend(ranges(EXCEPTIONS, guest.address, &policy.exceptions));
    let mut services = BTreeSet::new();
    if let Some(port) = policy.resolver {
        all.push(Element {
            held: Held::Value(port.get().to_be_bytes().to_vec()),
            ..plain(RESOLVERS, address.to_vec())
        });
        services.extend([(Transport::Tcp, port), (Transport::Udp, port)]);
    }
    services.extend(&policy.host_ports);
    for (transport, port) in services {
        let protocol = match transport {
            Transport::Tcp => 6,
            Transport::Udp => 17,
        };
        // Each part of a key takes whole registers of four bytes.
        let [high, low] = port.get().to_be_bytes();
        let rest = [protocol, 0, 0, 0, high, low, 0, 0];
        all.push(plain(SERVICES, [&address[..], &rest].concat()));
    }
    all
}

/// The guest's elements with the epoch they have `now`, if they are right otherwise, so that its
/// connections go on; with the next if not, so that each is judged again.
pub(super) fn following(
    guest: &Guest,
    owner: &Owner,
    now: &BTreeSet<Element>,
) -> io::Result<Vec<Element>> {
    let Some(epoch) = now.iter().find_map(epoch) else {
        return Ok(of(guest, owner, &Epoch::first(guest.run)));
    };
    let wanted = of(guest, owner, &epoch);
    if wanted.len() == now.len() && wanted.iter().all(|e| now.contains(e)) {
        return Ok(wanted);
    }
    Ok(of(guest, owner, &epoch.next()?))
}

/// Elements by the guest's address they belong to; `None` for those that belong to nobody.
pub(super) fn by_address(present: Vec<Element>) -> BTreeMap<Option<Ipv4Addr>, BTreeSet<Element>> {
    let epochs: Vec<_> = present
        .iter()
        .filter_map(|e| Some((epoch(e)?.0, address_of(e)?)))
        .collect();
    let epochs: BTreeMap<_, _> = epochs.into_iter().collect();
    let mut all = BTreeMap::<_, BTreeSet<_>>::new();
    for element in present {
        let address = if element.set == LIVE {
            epochs.get(element.key.as_slice()).copied()
        } else {
            address_of(&element)
        };
        all.entry(address).or_default().insert(element);
    }
    all
}

/// Networks as ranges that do not overlap, which the kernel refuses.
fn ranges(
    set: &'static str,
    guest: Ipv4Addr,
    networks: &[Ipv4Net],
) -> impl Iterator<Item = Element> {
    let networks: Vec<_> = networks.iter().map(Ipv4Net::trunc).collect();
    Ipv4Net::aggregate(&networks)
        .into_iter()
        .map(move |network| Element {
            set,
            key: pair(guest, network.network()),
            end: Some(pair(guest, network.broadcast())),
            held: Held::Nothing,
            comment: None,
        })
}

/// A key of two addresses.
pub(super) fn pair(guest: Ipv4Addr, other: Ipv4Addr) -> Vec<u8> {
    [guest.octets(), other.octets()].concat()
}

/// What has to be added and what removed, those of one set side by side.
pub(super) fn difference(
    present: impl IntoIterator<Item = Element>,
    wanted: Vec<Element>,
) -> (Vec<Element>, Vec<Element>) {
    let present: BTreeSet<_> = present.into_iter().collect();
    let wanted: BTreeSet<_> = wanted.into_iter().collect();
    (
        wanted.difference(&present).cloned().collect(),
        present.difference(&wanted).cloned().collect(),
    )
}

/// A guest as the table knows it.
#[derive(Debug)]
pub(super) struct Listed {
    /// `None` if its device is not named as ours are.
    pub(super) tap: Option<TapName>,
    pub(super) address: Ipv4Addr,
}

/// The guests whose owner `which` accepts.
pub(super) fn roster(present: &[Element], which: impl Fn(Option<&Owner>) -> bool) -> Vec<Listed> {
    present
        .iter()
        .filter(|e| e.set == GUESTS)
        .filter(|e| which(e.comment.clone().and_then(Owner::new).as_ref()))
        .filter_map(|e| {
            Some(Listed {
                tap: device_of(e),
                address: address_of(e)?,
            })
        })
        .collect()
}

/// Whether the element is the guest's own of [`GUESTS`].
pub(super) fn is_guest(element: &Element, guest: &Guest) -> bool {
    element.set == GUESTS
        && device_of(element) == Some(guest.tap)
        && address_of(element) == Some(guest.address)
}

/// The device an element belongs to, where its set has one.
pub(super) fn device_of(element: &Element) -> Option<TapName> {
    if ![GUESTS, DENIED].contains(&element.set) {
        return None;
    }
    TapName::parse(&wire::text(element.key.get(..NAME_BYTES)?))
}

/// The guest's address in the key of an element, where its set has one.
pub(super) fn address_of(element: &Element) -> Option<Ipv4Addr> {
    let start = match element.set {
        GUESTS => NAME_BYTES,
        DENIED | LIVE => return None,
        _ => 0,
    };
    let octets: &[u8; 4] = element.key.get(start..)?.first_chunk()?;
    Some(Ipv4Addr::from(*octets))
}

/// The other address in the key of an element that has two.
pub(super) fn other_of(element: &Element) -> Option<Ipv4Addr> {
    let octets: &[u8; 4] = element.key.get(4..)?.first_chunk()?;
    Some(Ipv4Addr::from(*octets))
}

/// The epoch in an element of [`EPOCHS`].
pub(super) fn epoch(element: &Element) -> Option<Epoch> {
    match &element.held {
        Held::Value(bytes) if element.set == EPOCHS => bytes.as_slice().try_into().ok().map(Epoch),
        _ => None,
    }
}

/// An element as the kernel lists it.
pub(super) fn parse(set: &'static str, raw: &[u8]) -> Option<Element> {
    const VALUE: u16 = 1;
    const VERDICT: u16 = 2;
    let key = wire::find(wire::find(raw, 1)?, VALUE)?.to_vec();
    let end = wire::find(raw, 10)
        .and_then(|data| wire::find(data, VALUE))
        .map(<[u8]>::to_vec);
    let held = match wire::find(raw, 2) {
        None => Held::Nothing,
        Some(data) => match (wire::find(data, VALUE), wire::find(data, VERDICT)) {
            (Some(value), _) => Held::Value(value.to_vec()),
            (None, Some(verdict)) => Held::Goto(wire::text(wire::find(verdict, 2)?)),
            (None, None) => return None,
        },
    };
    // Type 0, length, text.
    let comment = wire::find(raw, 6)
        .filter(|data| data.first() == Some(&0))
        .map(|data| wire::text(data.get(2..).unwrap_or_default()));
    Some(Element {
        set,
        key,
        end,
        held,
        comment,
    })
}

/// An element of [`DENIED`] as the kernel lists it.
pub(super) fn denied(raw: &[u8]) -> Option<(Option<TapName>, Denied)> {
    let element = parse(DENIED, raw)?;
    let rest: &[u8; 12] = element.key.get(NAME_BYTES..)?.first_chunk()?;
    let [a, b, c, d, protocol, _, _, _, high, low, _, _] = *rest;
    let port = u16::from_be_bytes([high, low]);
    // One expression, or, on newer kernels with several, a list of them.
    let counter = wire::find(raw, 7)
        .or_else(|| wire::find(wire::find(raw, 11)?, 1))
        .and_then(|expression| wire::find(expression, 2));
    let packets = counter.and_then(|counter| wire::number64(wire::find(counter, 2)?));
    let left = wire::find(raw, 5).and_then(wire::number64).unwrap_or(0);
    Some((
        device_of(&element),
        Denied {
            destination: Ipv4Addr::new(a, b, c, d),
            protocol,
            port: (port != 0).then_some(port),
            packets: packets.unwrap_or(0),
            ago: Duration::from_millis(DENIED_MS.saturating_sub(left)),
        },
    ))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{Policy, is_never};
    use super::*;

    fn guest(policy: Policy) -> Guest {
        Guest {
            tap: TapName::for_sandbox("0123456789abcdef").unwrap(),
            address: Ipv4Addr::new(172, 16, 0, 2),
            run: 0x1234_5678_9abc,
            policy,
        }
    }

    fn owner() -> Owner {
        Owner::new("tests").unwrap()
    }

    #[test]
    fn a_policy_of_nothing_has_no_verdict() {
        let all = of(&guest(Policy::off()), &owner(), &Epoch([7; 16]));
        let sets: Vec<_> = all.iter().map(|e| e.set).collect();
        assert_eq!(sets, [GUESTS, MEMBERS, EPOCHS, LIVE]);
        let of_guest = by_address(all);
        assert_eq!(of_guest.len(), 1, "{of_guest:?}");
        assert_eq!(of_guest[&Some(guest(Policy::off()).address)].len(), 4);
    }

    #[test]
    fn overlapping_networks_become_ranges_that_do_not() {
        let networks = [
            "10.1.2.3/8",
            "10.0.0.0/16",
            "192.0.2.0/25",
            "192.0.2.128/25",
        ];
        let policy = Policy::new(Reach::Listed {
            networks: networks.iter().map(|n| n.parse().unwrap()).collect(),
            names: false,
        });
        let all = of(&guest(policy), &owner(), &Epoch([0; 16]));
        let ranges: Vec<_> = all
            .iter()
            .filter(|e| e.set == NETWORKS)
            .map(|e| (e.key[4..].to_vec(), e.end.as_ref().unwrap()[4..].to_vec()))
            .collect();
        assert_eq!(
            ranges,
            [
                (vec![10, 0, 0, 0], vec![10, 255, 255, 255]),
                (vec![192, 0, 2, 0], vec![192, 0, 2, 255])
            ]
        );
    }

    #[test]
    fn a_right_guest_keeps_its_epoch_and_a_changed_one_does_not() {
        let before = guest(Policy::new(Reach::Open));
        let all = of(&before, &owner(), &Epoch([7; 16]));
        let present: BTreeSet<_> = all.iter().cloned().collect();
        assert_eq!(following(&before, &owner(), &present).unwrap(), all);
        let after = following(&guest(Policy::off()), &owner(), &present).unwrap();
        assert_ne!(after.iter().find_map(epoch), Some(Epoch([7; 16])));
        let (add, remove) = difference(present, after);
        assert_eq!(add.len(), 2, "epoch and live: {add:?}");
        assert_eq!(remove.len(), 3, "and the verdict: {remove:?}");
    }

    #[test]
    fn addresses_nobody_reaches() {
        for never in [
            "0.0.0.0",
            "10.0.0.1",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "168.63.129.16",
            "169.254.169.254",
            "169.254.170.2",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.192",
            "192.168.1.1",
            "198.19.255.255",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
        ] {
            assert!(is_never(never.parse().unwrap()), "{never}");
        }
        for other in [
            "1.0.0.0",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "126.0.0.1",
            "128.0.0.0",
            "168.63.129.15",
            "168.63.129.17",
            "169.253.255.255",
            "169.255.0.0",
            "172.15.255.255",
            "172.32.0.0",
            "192.0.1.0",
            "192.167.0.0",
            "198.17.0.0",
            "198.20.0.0",
            "203.0.113.1",
            "223.255.255.255",
        ] {
            assert!(!is_never(other.parse().unwrap()), "{other}");
        }
    }

    #[test]
    fn a_later_epoch_is_what_adding_its_bits_to_an_earlier_one_gives() {
        let mut all = vec![Epoch::first(guest(Policy::off()).run)];
        for _ in 0..79 {
            all.push(all.last().unwrap().next().unwrap());
        }
        for (at, earlier) in all.iter().enumerate() {
            for later in &all[at + 1..] {
                let sum: Vec<_> = earlier.0.iter().zip(later.0).map(|(a, b)| a | b).collect();
                assert_eq!(sum, later.0);
                assert_ne!(earlier, later);
            }
        }
        let after = all.last().unwrap().next().unwrap();
        assert_ne!(after.0[..ID_BYTES], all[0].0[..ID_BYTES]);
    }

    proptest! {
        #[test]
        fn what_the_kernel_lists_is_read_without_panic(raw: Vec<u8>) {
            let _ = parse(GUESTS, &raw);
            let _ = denied(&raw);
        }
    }
}

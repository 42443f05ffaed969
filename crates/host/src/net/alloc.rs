//! Arithmetic on the pools from which sandboxes get addresses and ports: which numbers there are,
//! and in which order to try them. Pure.
//!
//! That a number is taken once is not decided here but by whoever keeps the rows, with a unique
//! constraint: try a candidate, and the next if it was taken. The kernel refuses a second route to
//! one address as well, so that two stores on one host cannot share one either.

use std::fmt;
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;
use std::str::FromStr;

use ipnet::Ipv4Net;

/// A MAC address.
pub type Mac = [u8; 6];

/// The host's end of every device. All guests see the same, so that a machine that was frozen with
/// it in its neighbour table finds its gateway wherever it wakes.
pub const GATEWAY_MAC: Mac = [0x02, 0x73, 0x6d, 0x00, 0x00, 0x01];

/// The longest prefix a pool may have: two bits, for the gateway and one guest.
pub const POOL_PREFIX_MAX: u8 = 30;

/// The shortest prefix a pool may have: a larger one would be a large part of the Internet.
pub const POOL_PREFIX_MIN: u8 = 8;

/// A pool that cannot be, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    /// It is not written as a prefix.
    #[error("`{0}` is no IPv4 prefix such as `172.16.0.0/24`")]
    NotAPrefix(String),
    /// Its length is outside the bounds.
    #[error("`{0}` is no pool: its length has to be from /{POOL_PREFIX_MIN} to /{POOL_PREFIX_MAX}")]
    Length(Ipv4Net),
    /// Guests cannot have these addresses.
    #[error("`{0}` is no pool: it holds loopback, link-local, multicast or reserved addresses")]
    Unusable(Ipv4Net),
    /// It is not written as a range of ports.
    #[error("`{0}` is no range of ports such as `2200-2999`")]
    NotARange(String),
}

/// The addresses of guests: a prefix, whose first address is the gateway's and whose last is not
/// used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddressPool {
    net: Ipv4Net,
}

impl Default for AddressPool {
    /// 172.16.0.0/24: gateway 172.16.0.1, guests 172.16.0.2 to 172.16.0.254.
    fn default() -> Self {
        Self {
            net: Ipv4Net::new_assert(Ipv4Addr::new(172, 16, 0, 0), 24),
        }
    }
}

impl AddressPool {
    /// The pool of a prefix; bits beyond its length are ignored.
    ///
    /// # Errors
    ///
    /// [`PoolError::Length`] and [`PoolError::Unusable`].
    pub fn new(net: Ipv4Net) -> Result<Self, PoolError> {
        let net = net.trunc();
        if !(POOL_PREFIX_MIN..=POOL_PREFIX_MAX).contains(&net.prefix_len()) {
            return Err(PoolError::Length(net));
        }
        // 0.0.0.0/8, 127.0.0.0/8, 169.254.0.0/16 and 224.0.0.0/3 are no one's to give.
        let unusable = [
            (Ipv4Addr::UNSPECIFIED, 8),
            (Ipv4Addr::LOCALHOST, 8),
            (Ipv4Addr::new(169, 254, 0, 0), 16),
            (Ipv4Addr::new(224, 0, 0, 0), 3),
        ];
        for (address, length) in unusable {
            let other = Ipv4Net::new_assert(address, length).trunc();
            if net.contains(&other) || other.contains(&net) {
                return Err(PoolError::Unusable(net));
            }
        }
        Ok(Self { net })
    }

    /// The prefix.
    #[must_use]
    pub fn net(&self) -> Ipv4Net {
        self.net
    }

    /// The address of the host's end of every device.
    #[must_use]
    pub fn gateway(&self) -> Ipv4Addr {
        self.at(1)
    }

    /// How many guests have room: from 1 in a /30 to some 16 million in a /8, less three for the
    /// network, the gateway and the broadcast address.
    #[must_use]
    pub fn guests(&self) -> u32 {
        (1 << (32 - self.net.prefix_len())) - 3
    }

    /// Whether a guest may have the address.
    #[must_use]
    pub fn has(&self, address: Ipv4Addr) -> bool {
        let offset = u32::from(address).wrapping_sub(u32::from(self.net.network()));
        (2..2 + self.guests()).contains(&offset)
    }

    /// Every guest's address once, beginning at one that `seed` chooses and wrapping around.
    /// Different seeds keep those who allocate at once from trying the same addresses, and an
    /// address that was just given back from being given out next.
    pub fn candidates(&self, seed: u64) -> impl Iterator<Item = Ipv4Addr> + use<> {
        let pool = *self;
        rotated(pool.guests(), seed).map(move |offset| pool.at(2 + offset))
    }

    fn at(&self, offset: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.net.network()) + offset)
    }
}

impl FromStr for AddressPool {
    type Err = PoolError;

    fn from_str(text: &str) -> Result<Self, PoolError> {
        let net = text
            .parse()
            .map_err(|_| PoolError::NotAPrefix(text.to_owned()))?;
        Self::new(net)
    }
}

impl fmt::Display for AddressPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.net.fmt(f)
    }
}

/// The host's ports on which SSH is served, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortRange {
    first: u16,
    last: u16,
}

impl Default for PortRange {
    /// 2200 to 2999.
    fn default() -> Self {
        Self {
            first: 2200,
            last: 2999,
        }
    }
}

impl PortRange {
    /// The ports of a range. `None` if it is empty or begins with 0, which is no port.
    #[must_use]
    pub fn new(range: RangeInclusive<u16>) -> Option<Self> {
        (*range.start() > 0 && !range.is_empty()).then(|| Self {
            first: *range.start(),
            last: *range.end(),
        })
    }

    /// How many ports there are.
    #[must_use]
    pub fn count(&self) -> u32 {
        u32::from(self.last - self.first) + 1
    }

    /// Whether the port is one of them.
    #[must_use]
    pub fn has(&self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }

    /// Every port once, beginning at one that `seed` chooses and wrapping around.
    pub fn candidates(&self, seed: u64) -> impl Iterator<Item = u16> + use<> {
        let first = self.first;
        rotated(self.count(), seed)
            .map(move |offset| first + u16::try_from(offset).expect("less than the range has"))
    }
}

impl FromStr for PortRange {
    type Err = PoolError;

    fn from_str(text: &str) -> Result<Self, PoolError> {
        let wrong = || PoolError::NotARange(text.to_owned());
        let (first, last) = text.split_once('-').ok_or_else(wrong)?;
        let range = first.parse().map_err(|_| wrong())?..=last.parse().map_err(|_| wrong())?;
        Self::new(range).ok_or_else(wrong)
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

/// The MAC address of the guest that has `address`: locally administered, and one for each.
#[must_use]
pub fn guest_mac(address: Ipv4Addr) -> Mac {
    let [a, b, c, d] = address.octets();
    [0x06, 0x73, a, b, c, d]
}

/// 0 to `count` - 1, each once, from a place that `seed` chooses.
fn rotated(count: u32, seed: u64) -> impl Iterator<Item = u32> + use<> {
    let start = u32::try_from(seed % u64::from(count)).expect("a remainder of 32 bits");
    (start..count).chain(0..start)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_default_pool_is_the_one_that_is_promised() {
        let pool = AddressPool::default();
        assert_eq!(pool.gateway(), Ipv4Addr::new(172, 16, 0, 1));
        let all: BTreeSet<_> = pool.candidates(0).collect();
        assert_eq!(all.first(), Some(&Ipv4Addr::new(172, 16, 0, 2)));
        assert_eq!(all.last(), Some(&Ipv4Addr::new(172, 16, 0, 254)));
        assert_eq!(all.len(), 253);
        assert_eq!(pool.guests(), 253);
        assert_eq!(PortRange::default().to_string(), "2200-2999");
        assert_eq!(PortRange::default().count(), 800);
    }

    #[test]
    fn what_cannot_be_a_pool_is_refused_with_the_reason() {
        let said = |text: &str| AddressPool::from_str(text).unwrap_err().to_string();
        assert_eq!(
            said("sandbox"),
            "`sandbox` is no IPv4 prefix such as `172.16.0.0/24`"
        );
        assert_eq!(
            said("10.0.0.0/31"),
            "`10.0.0.0/31` is no pool: its length has to be from /8 to /30"
        );
        for text in [
            "127.0.0.0/24",
            "169.254.0.0/24",
            "230.0.0.0/24",
            "169.0.0.0/8",
        ] {
            assert!(said(text).contains("no pool: it holds"), "{text}");
        }
        let ports = |text: &str| PortRange::from_str(text).unwrap_err().to_string();
        for text in ["", "22", "0-5", "9-8", "1-70000", "a-b"] {
            assert_eq!(
                ports(text),
                format!("`{text}` is no range of ports such as `2200-2999`")
            );
        }
        assert_eq!(PortRange::from_str("65535-65535").unwrap().count(), 1);
    }

    proptest! {
        #[test]
        fn each_candidate_is_in_the_pool_and_comes_once(
            address: u32,
            length in 16_u8..=30,
            seed: u64,
        ) {
            let net = Ipv4Net::new_assert(address.into(), length);
            let Ok(pool) = AddressPool::new(net) else {
                return Ok(());
            };
            let all: Vec<_> = pool.candidates(seed).collect();
            let once: BTreeSet<_> = all.iter().copied().collect();
            prop_assert_eq!(all.len(), once.len());
            prop_assert_eq!(all.len(), pool.guests() as usize);
            for candidate in once {
                prop_assert!(pool.has(candidate));
                prop_assert!(net.contains(&candidate));
                prop_assert_ne!(candidate, pool.gateway());
            }
            prop_assert!(!pool.has(pool.gateway()));
            prop_assert!(!pool.has(net.broadcast()));
            prop_assert!(!pool.has(net.network()));
        }

        #[test]
        fn each_port_comes_once(first in 1_u16.., count: u16, seed: u64) {
            let range = PortRange::new(first..=first.saturating_add(count)).unwrap();
            let all: BTreeSet<_> = range.candidates(seed).collect();
            prop_assert_eq!(all.len(), range.count() as usize);
            prop_assert!(all.iter().all(|port| range.has(*port)));
        }
    }
}

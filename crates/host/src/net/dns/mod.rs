//! The resolver a guest is given: it answers for the names its policy has, and only with addresses
//! that a guest may reach.
//!
//! [`judge`] and [`Lookup`] decide, and are pure: bytes in, bytes out. [`Resolver`] is the loop around
//! them: one for each guest, asking the host's own name servers. What a name led to is told to a
//! [`Sink`] before the guest hears of it, which puts it into the firewall
//! ([`Firewall::allow`](super::nft::Firewall::allow)), so that a guest never knows an address that it
//! cannot reach yet. Names are asked for anew each time; nothing is cached, so addresses that change,
//! as those of content networks do, are followed as fast as the guest asks.
//!
//! The guest is hostile, and so may be the answers. Enforcement is by address: a guest that does not
//! believe its resolver, or finds other ways to names, reaches nothing more by it.

mod lookup;
mod server;
#[cfg(test)]
mod tests;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use domain::base::Name;
use domain::base::name::ToName as _;
use ipnet::Ipv4Net;

pub use self::lookup::{Accepted, Judged, Lookup, Unusable, judge};
pub use self::server::{Resolver, Sink};
use super::nft::is_never;
use crate::error::{HostError, HostErrorKind};
use crate::os::Os;

/// The shortest time an address is kept, however soon its record expires: a guest may connect later
/// than it asked, and some records expire at once.
pub const HOLD_MIN: Duration = Duration::from_secs(60);

/// The longest, whatever its record says.
pub const HOLD_MAX: Duration = Duration::from_secs(24 * 3600);

/// A name, or all names below one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Pattern {
    name: Name<Vec<u8>>,
    below: bool,
}

/// A pattern that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is neither a domain name such as `example.com` nor all names below one, such as \
     `*.example.com`"
)]
pub struct PatternError(String);

impl FromStr for Pattern {
    type Err = PatternError;

    /// `example.com` is that name alone; `*.example.com` all names below it at any depth, and not
    /// the name itself. Letter case and a dot at the end do not matter. Names outside ASCII are
    /// written as the name service has them, `xn--…`.
    fn from_str(text: &str) -> Result<Self, PatternError> {
        let wrong = || PatternError(text.to_owned());
        let (below, name) = match text.strip_prefix("*.") {
            Some(name) => (true, name),
            None => (false, text),
        };
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if !name.bytes().all(plain) {
            return Err(wrong());
        }
        // An address is no name.
        let last = name.trim_end_matches('.').rsplit('.').next();
        if last.is_none_or(|last| last.bytes().all(|byte| byte.is_ascii_digit())) {
            return Err(wrong());
        }
        let name = Name::<Vec<u8>>::from_str(name).map_err(|_| wrong())?;
        Ok(Self { name, below })
    }
}

impl Pattern {
    fn has(&self, name: &Name<Vec<u8>>) -> bool {
        if self.below {
            name.label_count() > self.name.label_count() && name.ends_with(&self.name)
        } else {
            name.name_eq(&self.name)
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let star = if self.below { "*." } else { "" };
        write!(f, "{star}{}", self.name)
    }
}

/// The name servers that a file such as `/etc/resolv.conf` names (resolv.conf(5)), in its order, at
/// port 53; none if it is not there.
///
/// # Errors
///
/// Those of reading it.
pub fn name_servers(os: &Os, path: &Path) -> Result<Vec<SocketAddr>, HostError> {
    match os.read("read", path) {
        Ok(bytes) => Ok(parse_name_servers(&String::from_utf8_lossy(&bytes))),
        Err(error) if error.kind() == HostErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn parse_name_servers(text: &str) -> Vec<SocketAddr> {
    let mut servers = Vec::new();
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        // An address with a zone, `fe80::1%eth0`, stands for a router that is not asked here.
        if words.next() == Some("nameserver")
            && let Some(Ok(address)) = words.next().map(str::parse::<IpAddr>)
        {
            servers.push(SocketAddr::new(address, DNS_PORT));
        }
    }
    servers
}

const DNS_PORT: u16 = 53;

/// Which names a guest may look up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Names {
    /// All.
    All,
    /// Those that a pattern has.
    Listed(Vec<Pattern>),
}

/// What a guest may learn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// Names it may look up.
    pub names: Names,
    /// Networks nobody reaches ([`is_never`]) but this guest may; answers may point into them.
    pub exceptions: Vec<Ipv4Net>,
}

impl Rules {
    /// Whether a guest may look up this name.
    #[must_use]
    pub fn allows(&self, name: &str) -> bool {
        Name::<Vec<u8>>::from_str(name).is_ok_and(|name| self.has(&name))
    }

    fn has(&self, name: &Name<Vec<u8>>) -> bool {
        match &self.names {
            Names::All => true,
            Names::Listed(patterns) => patterns.iter().any(|pattern| pattern.has(name)),
        }
    }

    fn may_lead_to(&self, address: Ipv4Addr) -> bool {
        !is_never(address) || self.exceptions.iter().any(|net| net.contains(&address))
    }
}

/// A lookup that was denied. The name is the guest's word: it has to lose its control characters
/// before it becomes part of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeniedLookup {
    /// The name that was asked for, without the dot at its end.
    pub name: String,
    /// Why.
    pub reason: DeniedReason,
}

/// Why a lookup was denied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeniedReason {
    /// No pattern has the name.
    Name,
    /// The name leads to an address that the guest must not reach.
    Address(Ipv4Addr),
}

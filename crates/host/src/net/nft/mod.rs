//! What guests may reach: one nftables table, `inet smolvm`, with sandboxes as elements of its sets.
//!
//! Adding, changing or removing a sandbox is one transaction: the kernel makes all of it or nothing,
//! and no packet sees half. Several processes may do so at once; the kernel lets one after the other.
//! Transactions are written here and sent over netlink(7); no program is started.
//!
//! A guest that may reach anything gets only IPv4, only with its own source address, and no answer
//! from the host but what its policy lists. Unless the policy excepts them it never reaches private,
//! link-local and metadata addresses ([`is_never`]), and other guests never at all. What is denied is
//! refused with an ICMP message, so that a guest's connection fails at once, and noted
//! ([`Firewall::denied`]).
//!
//! If somebody empties the table, [`Firewall::ensure`] makes it anew from the list of what should be
//! there; [`Watch`] tells when that is due. Until then nothing is translated to the host's address,
//! but packets are not stopped either: watch it.

mod elements;
pub(super) mod foreign;
mod kernel;
mod layout;
mod wire;

use std::collections::BTreeSet;
use std::io;
use std::net::Ipv4Addr;
use std::num::NonZeroU16;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ipnet::Ipv4Net;
use netlink_sys::protocols::NETLINK_NETFILTER;

use self::elements::Epoch;
use self::kernel::{ADD, Nft, REMOVE, Refused, is_missing, push_changes, push_resolved};
use self::layout::{Shape, TABLE};
use self::wire::{Batch, FAMILY_INET};
use super::netlink::Netlink;
use super::tap::{Owner, TapName};
use crate::error::HostError;
use crate::os::Os;

/// Transport protocols that have ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// Where a guest's connections may lead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reach {
    /// Nowhere.
    Off,
    /// To these networks, and to addresses that [`Firewall::allow`] adds.
    Listed {
        /// Networks, any protocol and port. They may overlap.
        networks: Vec<Ipv4Net>,
        /// Whether addresses of names are going to be added.
        names: bool,
    },
    /// Everywhere but where nobody may go.
    Open,
}

/// What a guest may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Where its connections may lead.
    pub reach: Reach,
    /// Networks that [`is_never`] applies to but this guest may reach all the same, if `reach` has
    /// them as well. They may overlap.
    pub exceptions: Vec<Ipv4Net>,
    /// The port, TCP and UDP, of the resolver that serves this guest on the gateway address. What the
    /// guest sends to port 53 of the host goes there.
    pub resolver: Option<NonZeroU16>,
    /// Further ports of the host that it may reach, on any of the host's addresses.
    pub host_ports: Vec<(Transport, NonZeroU16)>,
}

impl Policy {
    /// Nothing at all.
    #[must_use]
    pub fn off() -> Self {
        Self::new(Reach::Off)
    }

    /// Connections as `reach` says, nothing of the host, no exception.
    #[must_use]
    pub fn new(reach: Reach) -> Self {
        Self {
            reach,
            exceptions: Vec::new(),
            resolver: None,
            host_ports: Vec::new(),
        }
    }
}

/// A guest: its device, its address, its policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// Its device, which need not exist yet.
    pub tap: TapName,
    /// Its address.
    pub address: Ipv4Addr,
    /// Which run of the guest this is: 48 random bits, chosen when it is started and kept while it
    /// runs. Its connections are known by it: another run, or another guest that gets the address,
    /// cannot go on with them, and if the table is lost, this one can.
    pub run: u64,
    /// What it may do.
    pub policy: Policy,
}

/// An attempt that was denied.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Denied {
    /// Where to.
    pub destination: Ipv4Addr,
    /// The protocol's number: 1 ICMP, 6 TCP, 17 UDP.
    pub protocol: u8,
    /// The destination's port, for TCP and UDP.
    pub port: Option<u16>,
    /// Packets, repetitions by the guest's kernel among them.
    pub packets: u64,
    /// How long ago the last was.
    pub ago: Duration,
}

/// What [`Firewall::ensure`] had to mend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Mended {
    /// The table, a chain or a rule was missing, or was not of this version.
    pub table: bool,
    /// Elements that were missing.
    pub added: usize,
    /// Elements that nobody needed.
    pub removed: usize,
}

/// Whether no guest reaches the address unless its policy excepts it: private, shared, loopback,
/// link-local, metadata, multicast and reserved ones.
#[must_use]
pub fn is_never(address: Ipv4Addr) -> bool {
    let octets = address.octets();
    octets >= layout::NEVER_FROM
        || layout::NEVER_RANGES
            .iter()
            .any(|(first, after)| octets >= *first && after.is_none_or(|after| octets < after))
}

/// Whether [`is_never`] holds for every address of a network: then whoever names it means just that.
#[must_use]
pub fn is_never_network(network: Ipv4Net) -> bool {
    let (first, last) = (network.network().octets(), network.broadcast().octets());
    first >= layout::NEVER_FROM
        || layout::NEVER_RANGES
            .iter()
            .any(|(from, after)| first >= *from && after.is_none_or(|after| last < after))
}

/// The table, as seen by one owner. Cheap to clone; clones take turns. Acts in the network namespace
/// of the thread that uses it first, and needs `CAP_NET_ADMIN` there.
///
/// Keep it: it holds a socket, and when one of nf_tables closes, the kernel makes the closer wait
/// until what was deleted is freed, some 10 ms (`nft_rcv_nl_event`).
#[derive(Debug, Clone)]
pub struct Firewall {
    os: Os,
    owner: Owner,
    nft: Arc<Mutex<Option<Nft>>>,
}

impl Firewall {
    /// The table for the sandboxes of `owner`.
    #[must_use]
    pub fn new(os: Os, owner: Owner) -> Self {
        Self {
            os,
            owner,
            nft: Arc::default(),
        }
    }

    /// Adds a guest in one transaction. Makes the table first if it is not there.
    ///
    /// # Errors
    ///
    /// [`AlreadyExists`](crate::HostErrorKind::AlreadyExists) if the device or the address has an
    /// entry, of whatever owner: the caller tries another address, or [`Firewall::ensure`]. After
    /// an error nothing has changed but perhaps the table being there, empty.
    pub fn add(&self, guest: &Guest) -> Result<(), HostError> {
        self.effect("add to the firewall", guest, |nft| {
            let elements = elements::of(guest, &self.owner, &Epoch::first(guest.run));
            match nft.change(None, &elements, &[]) {
                Err(Refused { error, .. }) if is_missing(&error) => {
                    nft.build(&Shape::new())?;
                    Ok(nft.change(None, &elements, &[])?)
                }
                other => Ok(other?),
            }
        })
    }

    /// Gives a guest another policy in one transaction, at once for every packet: connections that
    /// the new policy does not allow stop, the others go on. The addresses that names led to are
    /// replaced by `resolved`, as in [`Firewall::allow`].
    ///
    /// # Errors
    ///
    /// [`NotFound`](crate::HostErrorKind::NotFound) if the guest was not added, or somebody emptied
    /// the table.
    pub fn change(
        &self,
        guest: &Guest,
        resolved: &[(Ipv4Addr, Duration)],
    ) -> Result<(), HostError> {
        self.effect("change the firewall for", guest, |nft| {
            nft.settled(|nft, generation| {
                let present = nft.present()?;
                if !present.iter().any(|e| elements::is_guest(e, guest)) {
                    return Err(io::Error::from(io::ErrorKind::NotFound).into());
                }
                let now = elements::by_address(present).remove(&Some(guest.address));
                let now = now.unwrap_or_default();
                let epoch = now.iter().find_map(elements::epoch);
                let epoch = epoch.map_or_else(|| Ok(Epoch::first(guest.run)), Epoch::next)?;
                let wanted = elements::of(guest, &self.owner, &epoch);
                let (add, remove) = elements::difference(now, wanted);
                let old: Vec<_> = nft
                    .elements(layout::RESOLVED)?
                    .iter()
                    .filter(|e| elements::address_of(e) == Some(guest.address))
                    .filter_map(|e| Some((elements::other_of(e)?, Duration::from_secs(60))))
                    .collect();
                let mut batch = Batch::new(Some(generation));
                push_changes(&mut batch, &add, &remove);
                push_resolved(&mut batch, guest.address, &old, &[ADD, REMOVE]);
                push_resolved(&mut batch, guest.address, resolved, &[ADD]);
                nft.commit(batch)
            })
        })
    }

    /// Removes a guest in one transaction, and then what was noted of it. `guest` is as it was added or
    /// [changed](Firewall::change) last: with a policy that is less than its real one, the rest of that
    /// would stay. Who does not know calls [`Firewall::purge`]. Idempotent.
    ///
    /// # Errors
    ///
    /// Those of nf_tables; a guest, or a table, that is not there is success.
    pub fn remove(&self, guest: &Guest) -> Result<(), HostError> {
        self.effect("remove from the firewall", guest, |nft| {
            let removed = match nft.epoch(guest.address)? {
                Some(epoch) => {
                    let elements = elements::of(guest, &self.owner, &epoch);
                    nft.change(None, &[], &elements)
                }
                None => Err(io::Error::from(io::ErrorKind::NotFound).into()),
            };
            match removed {
                Err(Refused { error, .. }) if is_missing(&error) => nft.purge(guest)?,
                other => other?,
            }
            nft.forget(guest)?;
            nft.forget_denied(|tap| tap == guest.tap)
        })
    }

    /// As [`Firewall::remove`], whatever policy the guest really has: everything that the table has of
    /// its address goes, unless that is another guest's by now. Looks through the whole table, which
    /// takes longer the more sandboxes there are.
    ///
    /// # Errors
    ///
    /// Those of nf_tables; a guest, or a table, that is not there is success.
    pub fn purge(&self, guest: &Guest) -> Result<(), HostError> {
        self.effect("clear out of the firewall", guest, |nft| {
            nft.purge(guest)?;
            nft.forget(guest)?;
            nft.forget_denied(|tap| tap == guest.tap)
        })
    }

    /// Makes the table hold exactly these guests of this owner, whatever was there: the table, its
    /// chains and rules if any is missing or different, missing elements, superfluous ones. Guests of
    /// other owners stay. Connections of guests that were right go on, and after
    /// a loss of the whole table those of guests whose policy was never changed.
    ///
    /// # Errors
    ///
    /// [`AlreadyExists`](crate::HostErrorKind::AlreadyExists) if two guests have one address, or one
    /// has an address that another owner's guest has; nothing has changed then.
    pub fn ensure(&self, guests: &[Guest]) -> Result<Mended, HostError> {
        let path = Path::new(TABLE);
        self.os.effect("put right the firewall table", path, || {
            self.with(|nft| {
                let shape = Shape::new();
                let table = !nft.is_intact(&shape)?;
                if table {
                    nft.build(&shape)?;
                }
                let mended = nft.settled(|nft, generation| {
                    let present = nft.present()?;
                    let others = elements::roster(&present, |owner| owner != Some(&self.owner));
                    let taken: BTreeSet<_> = others.iter().map(|one| one.address).collect();
                    let mut now = elements::by_address(present);
                    // What belongs to no guest is left over from a table that somebody meddled with.
                    now.retain(|address, _| {
                        address.is_none_or(|address| !taken.contains(&address))
                    });
                    let mut wanted = Vec::new();
                    let mut addresses = BTreeSet::new();
                    for guest in guests {
                        let address = guest.address;
                        if taken.contains(&address) || !addresses.insert(address) {
                            let what = format!("{address} is the address of another guest");
                            return Err(io::Error::new(io::ErrorKind::AlreadyExists, what).into());
                        }
                        let now = now.entry(Some(address)).or_default();
                        wanted.extend(elements::following(guest, &self.owner, now)?);
                    }
                    let (add, remove) = elements::difference(now.into_values().flatten(), wanted);
                    nft.change(Some(generation), &add, &remove)?;
                    Ok(Mended {
                        table,
                        added: add.len(),
                        removed: remove.len(),
                    })
                })?;
                nft.forget_strangers()?;
                Ok(mended)
            })
        })
    }

    /// Puts back what is missing of a guest whose entry was right, after somebody emptied the table:
    /// the table itself, its rules, the guest's elements, and the addresses its names led to. Returns
    /// whether anything was. Connections of a guest whose policy was never changed go on. The rules are
    /// looked at only if `loss` is of rules: with elements alone it is one question to the kernel.
    ///
    /// # Errors
    ///
    /// [`AlreadyExists`](crate::HostErrorKind::AlreadyExists) if the address has become another's.
    pub fn put_back(
        &self,
        guest: &Guest,
        resolved: &[(Ipv4Addr, Duration)],
        loss: Loss,
    ) -> Result<bool, HostError> {
        if loss == Loss::Nothing {
            return Ok(false);
        }
        self.effect("put back into the firewall", guest, |nft| {
            let shape = Shape::new();
            let broken = loss == Loss::Rules && !nft.is_intact(&shape)?;
            if broken {
                nft.build(&shape)?;
            }
            if nft.epoch(guest.address)?.is_some() {
                return Ok(broken);
            }
            let elements = elements::of(guest, &self.owner, &Epoch::first(guest.run));
            nft.change(None, &elements, &[])?;
            if !resolved.is_empty() {
                nft.allow(guest.address, resolved)?;
            }
            Ok(true)
        })
    }

    /// The devices of this owner's guests.
    ///
    /// # Errors
    ///
    /// Those of nf_tables; a table that is not there has no guests.
    pub fn guests(&self) -> Result<Vec<TapName>, HostError> {
        let path = Path::new(TABLE);
        self.os.effect("list the guests in", path, || {
            let present = self.with(|nft| nft.elements(layout::GUESTS))?;
            Ok(
                elements::roster(&present, |owner| owner == Some(&self.owner))
                    .into_iter()
                    .filter_map(|one| one.tap)
                    .collect(),
            )
        })
    }

    /// The number of the rules' generation in this network namespace: one more with each transaction,
    /// whoever makes it.
    ///
    /// # Errors
    ///
    /// Those of nf_tables.
    pub fn generation(&self) -> Result<u32, HostError> {
        let path = Path::new(TABLE);
        self.os.effect("ask for the generation of", path, || {
            self.with(Nft::generation)
        })
    }

    /// How many guests there are, of every owner.
    ///
    /// # Errors
    ///
    /// Those of nf_tables; a table that is not there has none.
    pub fn all_guests(&self) -> Result<usize, HostError> {
        let path = Path::new(TABLE);
        self.os.effect("list the guests in", path, || {
            Ok(self.with(|nft| nft.elements(layout::GUESTS))?.len())
        })
    }

    /// Lets a guest whose reach is listed reach addresses, each for as long as is said, beginning
    /// now; an address that is there already gets the new time. Connections outlive it.
    ///
    /// # Errors
    ///
    /// [`NotFound`](crate::HostErrorKind::NotFound) if somebody removed the table.
    pub fn allow(
        &self,
        guest: Ipv4Addr,
        addresses: &[(Ipv4Addr, Duration)],
    ) -> Result<(), HostError> {
        let path = format!("the sandbox at {guest}");
        self.os.effect("allow addresses to", Path::new(&path), || {
            self.with(|nft| Ok(nft.allow(guest, addresses)?))
        })
    }

    /// What was denied to the guest of this device within the last hour, each destination once. The
    /// kernel remembers some 16,000 for all guests together.
    ///
    /// # Errors
    ///
    /// Those of nf_tables; a table that is not there has noted nothing.
    pub fn denied(&self, tap: TapName) -> Result<Vec<Denied>, HostError> {
        let path = Path::new(tap.as_str());
        self.os.effect("list what was denied to", path, || {
            let mut denied: Vec<_> = self
                .with(Nft::noted)?
                .into_iter()
                .filter(|(of, _)| *of == Some(tap))
                .map(|(_, denied)| denied)
                .collect();
            denied.sort();
            Ok(denied)
        })
    }

    /// Removes the table with everything in it, of every owner. Idempotent.
    ///
    /// # Errors
    ///
    /// Those of nf_tables.
    pub fn remove_table(&self) -> Result<(), HostError> {
        let path = Path::new(TABLE);
        self.os.effect("remove the firewall table", path, || {
            let mut batch = Batch::new(None);
            batch.push(
                "remove the table",
                (wire::DELETE_TABLE, 0),
                FAMILY_INET,
                |a| a.text(1, TABLE),
            );
            self.with(|nft| match nft.commit(batch) {
                Err(Refused { error, .. }) if is_missing(&error) => Ok(()),
                other => Ok(other?),
            })
        })
    }

    fn effect<T>(
        &self,
        op: &'static str,
        guest: &Guest,
        act: impl FnOnce(&mut Nft) -> io::Result<T>,
    ) -> Result<T, HostError> {
        let path = Path::new(guest.tap.as_str());
        self.os.effect(op, path, || self.with(act))
    }

    /// Does something with the socket, which is opened if it is not.
    fn with<T>(&self, act: impl FnOnce(&mut Nft) -> io::Result<T>) -> io::Result<T> {
        // One who panicked left nothing half done in it: each request begins by forgetting answers
        // to the one before.
        let mut nft = self.nft.lock().unwrap_or_else(PoisonError::into_inner);
        let nft = match &mut *nft {
            Some(nft) => nft,
            none => none.insert(Nft::open()?),
        };
        act(nft)
    }
}

/// Tells when the rules of the host changed, so that the table can be put right again.
#[derive(Debug)]
pub struct Watch {
    netlink: Netlink,
}

/// What was deleted from the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Loss {
    /// Nothing.
    Nothing,
    /// Elements of its sets, of whichever sandbox.
    Elements,
    /// Rules, chains, the table; or so much that it cannot be known.
    Rules,
}

/// `NFNLGRP_NFTABLES`, linux/netfilter/nfnetlink.h.
const GROUP_RULES: u32 = 7;

impl Watch {
    /// Begins to watch the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// [`PermissionDenied`](crate::HostErrorKind::PermissionDenied) without `CAP_NET_ADMIN`.
    pub fn begin(os: &Os) -> Result<Self, HostError> {
        os.effect("watch the firewall table", Path::new(TABLE), || {
            let mut netlink = Netlink::open(NETLINK_NETFILTER)?;
            netlink.socket().add_membership(GROUP_RULES)?;
            Ok(Self { netlink })
        })
    }

    /// Takes what was announced since the last call and returns the most that was deleted from the
    /// table. Never waits: the [descriptor](AsFd) becomes readable when there is something to take.
    /// Sandboxes that go cause [`Loss::Elements`] too, so it is the moment to look:
    /// [`Firewall::put_back`], [`Firewall::ensure`].
    ///
    /// # Errors
    ///
    /// Those of recv(2).
    pub fn take(&mut self) -> Result<Loss, HostError> {
        match self.netlink.pending() {
            Ok(messages) => Ok(messages
                .iter()
                .map(|message| {
                    let table = wire::find(wire::attributes(&message.payload), 1);
                    if table.is_none_or(|name| wire::text(name) != TABLE) {
                        return Loss::Nothing;
                    }
                    match wire::message_of(message.kind) {
                        Some(wire::DELETE_TABLE | wire::DELETE_CHAIN | wire::DELETE_RULE) => {
                            Loss::Rules
                        }
                        Some(wire::DELETE_ELEMENT) => Loss::Elements,
                        _ => Loss::Nothing,
                    }
                })
                .max()
                .unwrap_or(Loss::Nothing)),
            // More happened than it has room for.
            Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => Ok(Loss::Rules),
            Err(e) => Err(HostError::io(
                "watch the firewall table",
                Path::new(TABLE),
                e,
            )),
        }
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.netlink.as_fd()
    }
}

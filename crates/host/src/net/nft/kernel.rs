//! Asking nf_tables and telling it.

use std::collections::BTreeMap;
use std::io;
use std::net::Ipv4Addr;
use std::time::Duration;

use netlink_sys::protocols::NETLINK_NETFILTER;

use super::elements::{self, Epoch};
use super::layout::{self, Element, Shape, TABLE};
use super::wire::{self, Batch, FAMILY_INET};
use super::{Denied, Guest};
use crate::net::netlink::Netlink;
use crate::net::tap::TapName;

// linux/netlink.h
pub(super) const CREATE: u16 = 0x400;
const EXCLUSIVE: u16 = 0x200;
const DUMP: u16 = 0x300;

/// How often a change is worked out anew because the rules changed meanwhile.
const TRIES: usize = 64;

/// Elements in one message, whose length is limited to 64 KiB.
const ELEMENTS_PER_MESSAGE: usize = 256;

/// A transaction that the kernel refused, and with it all of it.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) error: io::Error,
    /// The change that could not be made.
    change: &'static str,
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        Self { error, change: "" }
    }
}

impl From<Refused> for io::Error {
    fn from(refused: Refused) -> Self {
        if refused.change.is_empty() {
            return refused.error;
        }
        Self::new(
            refused.error.kind(),
            format!("could not {}: {}", refused.change, refused.error),
        )
    }
}

pub(super) fn is_missing(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}

/// A connection to nf_tables.
#[derive(Debug)]
pub(super) struct Nft {
    netlink: Netlink,
}

impl Nft {
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self {
            netlink: Netlink::open(NETLINK_NETFILTER)?,
        })
    }

    /// Sends a transaction.
    pub(super) fn commit(&mut self, batch: Batch) -> Result<(), Refused> {
        if batch.is_empty() {
            return Ok(());
        }
        let (bytes, names) = batch.finish();
        self.netlink.make_room(bytes.len(), names.len())?;
        let mut outcomes = self.netlink.exchange(&bytes)?;
        outcomes.sort_by_key(|(sequence, _)| *sequence);
        let answered = outcomes.len();
        for (sequence, outcome) in outcomes {
            outcome.map_err(|error| Refused {
                error,
                change: Batch::name_of(&names, sequence),
            })?;
        }
        if answered < names.len() {
            return Err(io::Error::other("the kernel did not answer every change").into());
        }
        Ok(())
    }

    /// Removes and adds elements in one transaction; with `generation`, only if nothing changed
    /// since.
    pub(super) fn change(
        &mut self,
        generation: Option<u32>,
        add: &[Element],
        remove: &[Element],
    ) -> Result<(), Refused> {
        let mut batch = Batch::new(generation);
        push_changes(&mut batch, add, remove);
        self.commit(batch)
    }

    /// Works out a change until nobody else made one meanwhile. `work` is given the number of the
    /// rules' generation, to be given to [`Nft::change`].
    pub(super) fn settled<T>(
        &mut self,
        mut work: impl FnMut(&mut Self, u32) -> Result<T, Refused>,
    ) -> io::Result<T> {
        for _ in 0..TRIES {
            let generation = self.generation()?;
            match work(self, generation) {
                Err(Refused { error, .. }) if error.raw_os_error() == Some(libc::ERESTART) => {}
                other => return Ok(other?),
            }
        }
        Err(io::Error::other(format!(
            "the rules of the host changed during each of {TRIES} attempts"
        )))
    }

    pub(super) fn generation(&mut self) -> io::Result<u32> {
        let sequence = self.netlink.next_sequence();
        let request = wire::request(
            (wire::GET_GENERATION, 0, sequence),
            wire::FAMILY_UNSPEC,
            |_| {},
        );
        let answers = self.netlink.query(&request)?;
        answers
            .iter()
            .filter(|answer| wire::message_of(answer.kind) == Some(wire::NEW_GENERATION))
            .find_map(|answer| wire::number(wire::find(wire::attributes(&answer.payload), 1)?))
            .ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Makes the table or what is missing of it.
    pub(super) fn build(&mut self, shape: &Shape) -> io::Result<()> {
        // Two who find the table missing may both make it: the second changes nothing.
        self.settled(|nft, generation| {
            let stale: Vec<_> = nft
                .chains(FAMILY_INET)?
                .into_iter()
                .filter(|chain| chain.table == TABLE && layout::is_stale_marker(&chain.name, shape))
                .map(|chain| chain.name)
                .collect();
            let mut batch = Batch::new(Some(generation));
            layout::build(&mut batch, shape, &stale);
            nft.commit(batch)
        })
    }

    pub(super) fn is_intact(&mut self, shape: &Shape) -> io::Result<bool> {
        let chains = self.chains(FAMILY_INET)?;
        let has = |name: &str| chains.iter().any(|c| c.table == TABLE && c.name == name);
        if !has(&shape.marker) {
            return Ok(false);
        }
        let mut rules = self.rules(FAMILY_INET, TABLE, None)?;
        rules.sort_by(|a, b| a.chain.cmp(&b.chain));
        Ok(shape.rules.iter().all(|(chain, count)| {
            has(chain) && rules.iter().filter(|rule| rule.chain == *chain).count() == *count
        }))
    }

    /// All elements that belong to sandboxes, for longer than a lookup of a name.
    pub(super) fn present(&mut self) -> io::Result<Vec<Element>> {
        let mut all = Vec::new();
        for set in layout::LISTED_SETS {
            all.append(&mut self.elements(set)?);
        }
        Ok(all)
    }

    /// The elements of a set; none if there is no such set.
    pub(super) fn elements(&mut self, set: &'static str) -> io::Result<Vec<Element>> {
        Ok(self
            .raw_elements(set)?
            .iter()
            .filter_map(|raw| elements::parse(set, raw))
            .collect())
    }

    pub(super) fn raw_elements(&mut self, set: &str) -> io::Result<Vec<Vec<u8>>> {
        let sequence = self.netlink.next_sequence();
        let request = wire::request((wire::GET_ELEMENT, DUMP, sequence), FAMILY_INET, |a| {
            a.text(1, TABLE);
            a.text(2, set);
        });
        let answers = match self.netlink.dump(&request) {
            Err(e) if is_missing(&e) => return Ok(Vec::new()),
            other => other?,
        };
        let mut all = Vec::new();
        for answer in answers {
            if let Some(list) = wire::find(wire::attributes(&answer.payload), 3) {
                all.extend(wire::nested(list).map(|(_, raw)| raw.to_vec()));
            }
        }
        Ok(all)
    }

    /// The epoch of an address; `None` if it has none.
    pub(super) fn epoch(&mut self, address: Ipv4Addr) -> io::Result<Option<Epoch>> {
        let sequence = self.netlink.next_sequence();
        let request = wire::request((wire::GET_ELEMENT, 0, sequence), FAMILY_INET, |a| {
            a.text(1, TABLE);
            a.text(2, layout::EPOCHS);
            a.nest(3, |a| {
                a.nest(1, |a| wire::value(a, 1, &address.octets()));
            });
        });
        let answers = match self.netlink.query(&request) {
            Err(e) if is_missing(&e) => return Ok(None),
            other => other?,
        };
        Ok(answers.iter().find_map(|answer| {
            let list = wire::find(wire::attributes(&answer.payload), 3)?;
            let (_, raw) = wire::nested(list).next()?;
            elements::epoch(&elements::parse(layout::EPOCHS, raw)?)
        }))
    }

    pub(super) fn allow(
        &mut self,
        guest: Ipv4Addr,
        addresses: &[(Ipv4Addr, Duration)],
    ) -> Result<(), Refused> {
        let mut batch = Batch::new(None);
        // Removing one twice would fail.
        let once: BTreeMap<_, _> = addresses.iter().copied().collect();
        let once: Vec<_> = once.into_iter().collect();
        push_resolved(&mut batch, guest, &once, &[ADD, REMOVE, ADD]);
        self.commit(batch)
    }

    /// Removes whatever there is of a guest's address, unless another guest has it.
    pub(super) fn purge(&mut self, guest: &Guest) -> io::Result<()> {
        self.settled(|nft, generation| {
            let present = nft.present()?;
            let others = present.iter().any(|element| {
                element.set == layout::GUESTS
                    && elements::address_of(element) == Some(guest.address)
                    && !elements::is_guest(element, guest)
            });
            if others {
                return Ok(());
            }
            let now = elements::by_address(present).remove(&Some(guest.address));
            let remove: Vec<_> = now.into_iter().flatten().collect();
            nft.change(Some(generation), &[], &remove)
        })
    }

    /// Forgets what names of a guest resolved to.
    pub(super) fn forget(&mut self, guest: &Guest) -> io::Result<()> {
        let of_guest = self
            .elements(layout::RESOLVED)?
            .into_iter()
            .filter(|e| elements::address_of(e) == Some(guest.address))
            .collect();
        self.discard(of_guest)
    }

    /// Forgets what was denied to devices.
    pub(super) fn forget_denied(&mut self, which: impl Fn(TapName) -> bool) -> io::Result<()> {
        let of_guest = self
            .elements(layout::DENIED)?
            .into_iter()
            .filter(|e| elements::device_of(e).is_some_and(&which))
            .collect();
        self.discard(of_guest)
    }

    /// Forgets what is kept of guests that are not there.
    pub(super) fn forget_strangers(&mut self) -> io::Result<()> {
        let guests = self.elements(layout::GUESTS)?;
        let roster = elements::roster(&guests, |_| true);
        let resolved = self
            .elements(layout::RESOLVED)?
            .into_iter()
            .filter(|e| {
                elements::address_of(e).is_none_or(|a| roster.iter().all(|one| one.address != a))
            })
            .collect();
        self.discard(resolved)?;
        self.forget_denied(|tap| roster.iter().all(|one| one.tap != Some(tap)))
    }

    /// Removes elements that may expire meanwhile, one by one: together they would fail together.
    pub(super) fn discard(&mut self, elements: Vec<Element>) -> io::Result<()> {
        for element in elements {
            match self.change(None, &[], &[element]) {
                Err(Refused { error, .. }) if is_missing(&error) => {}
                other => other?,
            }
        }
        Ok(())
    }

    pub(super) fn noted(&mut self) -> io::Result<Vec<(Option<TapName>, Denied)>> {
        Ok(self
            .raw_elements(layout::DENIED)?
            .iter()
            .filter_map(|raw| elements::denied(raw))
            .collect())
    }

    /// Chains of a family.
    pub(super) fn chains(&mut self, family: u8) -> io::Result<Vec<Chain>> {
        let sequence = self.netlink.next_sequence();
        let request = wire::request((wire::GET_CHAIN, DUMP, sequence), family, |_| {});
        Ok(self
            .netlink
            .dump(&request)?
            .iter()
            .filter_map(|answer| Chain::parse(&answer.payload))
            .collect())
    }

    /// Rules of a table, or of a chain of it; none if it is not there.
    pub(super) fn rules(
        &mut self,
        family: u8,
        table: &str,
        chain: Option<&str>,
    ) -> io::Result<Vec<RuleEntry>> {
        let sequence = self.netlink.next_sequence();
        let request = wire::request((wire::GET_RULE, DUMP, sequence), family, |a| {
            a.text(1, table);
            if let Some(chain) = chain {
                a.text(2, chain);
            }
        });
        let answers = match self.netlink.dump(&request) {
            Err(e) if is_missing(&e) => return Ok(Vec::new()),
            other => other?,
        };
        Ok(answers
            .iter()
            .filter_map(|answer| RuleEntry::parse(&answer.payload))
            .collect())
    }
}

pub(super) fn push_changes(batch: &mut Batch, add: &[Element], remove: &[Element]) {
    for (elements, whole) in [(remove, false), (add, true)] {
        for same_set in elements.chunk_by(|a, b| a.set == b.set) {
            for part in same_set.chunks(ELEMENTS_PER_MESSAGE) {
                push_elements(batch, part, whole);
            }
        }
    }
}

pub(super) const ADD: bool = true;
pub(super) const REMOVE: bool = false;

/// Adds to and removes from what a guest's names led to. Adding what is there leaves its time as it
/// was on most kernels, and removing what is not there, or expired meanwhile, fails: so `[ADD,
/// REMOVE]` removes whatever is there, and `[ADD, REMOVE, ADD]` sets the time.
pub(super) fn push_resolved(
    batch: &mut Batch,
    guest: Ipv4Addr,
    addresses: &[(Ipv4Addr, Duration)],
    steps: &[bool],
) {
    for part in addresses.chunks(ELEMENTS_PER_MESSAGE) {
        for add in steps {
            let (name, change) = match *add {
                ADD => ("add addresses", (wire::NEW_ELEMENT, CREATE)),
                REMOVE => ("remove addresses", (wire::DELETE_ELEMENT, 0)),
            };
            batch.push(name, change, FAMILY_INET, |a| {
                a.text(1, TABLE);
                a.text(2, layout::RESOLVED);
                a.nest(3, |a| {
                    for (address, time) in part {
                        a.nest(1, |a| {
                            wire::value(a, 1, &elements::pair(guest, *address));
                            if *add {
                                let ms = time.as_millis().clamp(1, elements::TIMEOUT_MS_MAX);
                                a.number64(4, u64::try_from(ms).unwrap_or(u64::MAX));
                            }
                        });
                    }
                });
            });
        }
    }
}

fn push_elements(batch: &mut Batch, part: &[Element], whole: bool) {
    let Some(first) = part.first() else { return };
    let (name, change) = if whole {
        ("add elements", (wire::NEW_ELEMENT, CREATE | EXCLUSIVE))
    } else {
        ("remove elements", (wire::DELETE_ELEMENT, 0))
    };
    batch.push(name, change, FAMILY_INET, |a| {
        a.text(1, TABLE);
        a.text(2, first.set);
        a.nest(3, |a| {
            for element in part {
                element.write(a, whole);
            }
        });
    });
}

/// A chain of any table.
#[derive(Debug)]
pub(super) struct Chain {
    pub(super) table: String,
    pub(super) name: String,
    /// The hook, for a chain that the kernel calls.
    pub(super) hook: Option<u32>,
    /// Whether packets that no rule decides are dropped.
    pub(super) drops: bool,
}

impl Chain {
    fn parse(payload: &[u8]) -> Option<Self> {
        let list = wire::attributes(payload);
        let hook = wire::find(list, 4).and_then(|hook| wire::number(wire::find(hook, 1)?));
        Some(Self {
            table: wire::text(wire::find(list, 1)?),
            name: wire::text(wire::find(list, 3)?),
            hook,
            drops: wire::find(list, 5).and_then(wire::number) == Some(0),
        })
    }
}

/// A rule of any table.
#[derive(Debug)]
pub(super) struct RuleEntry {
    pub(super) chain: String,
    pub(super) handle: u64,
    /// What its maker attached to it.
    pub(super) data: Vec<u8>,
}

impl RuleEntry {
    fn parse(payload: &[u8]) -> Option<Self> {
        let list = wire::attributes(payload);
        Some(Self {
            chain: wire::text(wire::find(list, 2)?),
            handle: wire::number64(wire::find(list, 3)?)?,
            data: wire::find(list, 7).unwrap_or_default().to_vec(),
        })
    }
}

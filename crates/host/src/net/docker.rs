//! Living beside other firewalls: a packet has to be accepted by every table that looks at it, so
//! one that drops what it does not know stops guests whatever our table says.
//!
//! Docker gives the iptables chain `FORWARD` the policy DROP, and provides the chain `DOCKER-USER`
//! for rules that let others through
//! (<https://docs.docker.com/engine/network/firewall-iptables/>). Where that chain is, two rules go
//! into it that accept what comes from and goes to devices of guests. They open nothing: accepting
//! is no verdict over other tables, so ours still decides. Docker keeps the chain over its restarts.
//! Its nftables mode, from version 29, drops only what is for its own networks and needs nothing.
//!
//! Of other chains that drop, [`obstacles`] tells; whose they are and how to open them is for the
//! user to know.

use std::path::Path;

use super::nft::foreign::{self, Chain};
use super::tap::NAME_PREFIX;
use crate::error::{HostError, HostErrorKind};
use crate::os::Os;

const TABLE: &str = "filter";
const CHAIN: &str = "DOCKER-USER";

/// Tables that iptables keeps outside nf_tables.
const LEGACY_TABLES: &str = "/proc/thread-self/net/ip_tables_names";

/// Something that may stop forwarded packets of guests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Obstacle {
    /// A chain of nf_tables, iptables' own among them, that drops what its rules do not accept.
    DroppingChain {
        /// Its table.
        table: String,
        /// Its name.
        chain: String,
    },
    /// Rules of the old iptables, which cannot be read here: `iptables-legacy -S FORWARD` shows
    /// them.
    LegacyTable,
}

/// Lets guests through Docker's chain, if it is there, and returns whether it is. Idempotent.
///
/// # Errors
///
/// [`PermissionDenied`](HostErrorKind::PermissionDenied) without `CAP_NET_ADMIN`, and others of
/// nf_tables. The two rules are made in one transaction.
pub fn let_through(os: &Os) -> Result<bool, HostError> {
    os.effect("let guests through", Path::new(CHAIN), || {
        foreign::accept_devices(TABLE, CHAIN, NAME_PREFIX)
    })
}

/// Takes back what [`let_through`] did. Idempotent.
///
/// # Errors
///
/// Those of nf_tables; a chain that is not there is success.
pub fn undo(os: &Os) -> Result<(), HostError> {
    os.effect("remove our rules from", Path::new(CHAIN), || {
        foreign::remove_ours(TABLE, CHAIN)
    })
}

/// What may stop guests although [`let_through`] was called.
///
/// # Errors
///
/// Those of nf_tables.
pub fn obstacles(os: &Os) -> Result<Vec<Obstacle>, HostError> {
    let chains: Vec<Chain> = os.effect(
        "list chains that drop in",
        Path::new("the hook forward"),
        foreign::dropping_chains,
    )?;
    // A chain that Docker's jumps out of is open to guests.
    let docker = os.effect("look for", Path::new(CHAIN), || {
        foreign::has_ours(TABLE, CHAIN)
    })?;
    let mut found: Vec<_> = chains
        .into_iter()
        .filter(|chain| !(docker && chain.table == TABLE && chain.name == "FORWARD"))
        .map(|chain| Obstacle::DroppingChain {
            table: chain.table,
            chain: chain.name,
        })
        .collect();
    let legacy = match os.read("read", Path::new(LEGACY_TABLES)) {
        Ok(names) => names.split(|b| *b == b'\n').any(|name| name == b"filter"),
        Err(e) if e.kind() == HostErrorKind::NotFound => false,
        Err(e) => return Err(e),
    };
    if legacy {
        found.push(Obstacle::LegacyTable);
    }
    Ok(found)
}

//! Networks in and out of the store: what sandboxes may reach, and what those that run have.

use std::net::Ipv4Addr;

use rusqlite::{Connection, OptionalExtension as _, Row, TransactionBehavior, params};
use serde::{Deserialize, Serialize};

use super::rows::{column, from_sql, taken, to_sql};
use super::{Store, sql};
use crate::error::{Error, ErrorKind, Result};
use crate::network::{NetworkSpec, Reach};

/// Where a sandbox's device and rules are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetworkMode {
    /// In the network namespace of whoever starts sandboxes, who has the rights to make them there.
    Tap,
    /// In one of the keeper's own, with which they go. It takes no rights.
    User,
}

impl NetworkMode {
    /// The word in tables and in the store.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tap => "tap",
            Self::User => "user",
        }
    }
}

/// What a sandbox that runs has of the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkRow {
    /// The sandbox.
    pub sandbox_id: String,
    /// Where device and rules are.
    pub mode: NetworkMode,
    /// The guest's address. In mode [`Tap`](NetworkMode::Tap) no other sandbox has it.
    pub address: Ipv4Addr,
    /// The device's name.
    pub device: String,
    /// 48 random bits by which the connections of this run are known.
    pub run: u64,
}

const COLUMNS: &str = "sandbox_id, mode, address, device, run";

impl Store {
    /// Gives a sandbox the first of `candidates` that no other has; `None` if there is none. In mode
    /// [`User`](NetworkMode::User) it then gets one that another has: each has a network of its own.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`] if another sandbox has a device of this name, or this one has a network
    /// already.
    pub fn insert_network(
        &mut self,
        id: &str,
        mode: NetworkMode,
        device: &str,
        run: u64,
        mut candidates: impl Iterator<Item = Ipv4Addr>,
    ) -> Result<Option<NetworkRow>> {
        let doing = || format!("could not record the network of sandbox {id}");
        let transaction = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(|error| sql(doing(), error))?;
        let taken = taken(&transaction, "SELECT address FROM sandbox_networks")
            .map_err(|error| sql(doing(), error))?;
        let mut shared = None;
        let free = candidates.find(|address| {
            shared.get_or_insert(*address);
            !taken.contains(&u32::from(*address))
        });
        let shared = shared.filter(|_| mode == NetworkMode::User);
        let Some(address) = free.or(shared) else {
            return Ok(None);
        };
        transaction
            .prepare_cached(
                "INSERT INTO sandbox_networks (sandbox_id, mode, address, device, run) \
                 VALUES (?, ?, ?, ?, ?)",
            )
            .and_then(|mut statement| {
                statement.execute(params![
                    id,
                    mode.as_str(),
                    u32::from(address),
                    device,
                    to_sql(run)
                ])
            })
            .map_err(|error| match error.sqlite_error_code() {
                Some(rusqlite::ErrorCode::ConstraintViolation) => Error::new(
                    ErrorKind::Busy,
                    format!("the network device {device} belongs to a sandbox already"),
                )
                .because(error)
                .hint("create the sandbox anew: it then gets another id and device"),
                _ => sql(doing(), error),
            })?;
        transaction.commit().map_err(|error| sql(doing(), error))?;
        Ok(Some(NetworkRow {
            sandbox_id: id.to_owned(),
            mode,
            address,
            device: device.to_owned(),
            run,
        }))
    }

    /// The network of a sandbox, if it has one.
    pub fn network(&self, id: &str) -> Result<Option<NetworkRow>> {
        self.connection
            .prepare_cached(&format!(
                "SELECT {COLUMNS} FROM sandbox_networks WHERE sandbox_id = ?"
            ))
            .and_then(|mut statement| statement.query_row([id], read).optional())
            .map_err(|error| sql(format!("could not read the network of sandbox {id}"), error))
    }

    /// All networks, by address.
    pub fn networks(&self) -> Result<Vec<NetworkRow>> {
        self.connection
            .prepare_cached(&format!(
                "SELECT {COLUMNS} FROM sandbox_networks ORDER BY address"
            ))
            .and_then(|mut statement| statement.query_map([], read)?.collect())
            .map_err(|error| sql("could not read the networks in the state database", error))
    }

    /// Removes the network of a sandbox. Idempotent.
    pub fn delete_network(&mut self, id: &str) -> Result<()> {
        self.connection
            .prepare_cached("DELETE FROM sandbox_networks WHERE sandbox_id = ?")
            .and_then(|mut statement| statement.execute([id]))
            .map(|_| ())
            .map_err(|error| {
                sql(
                    format!("could not remove the record of the network of sandbox {id}"),
                    error,
                )
            })
    }

    /// Changes what a sandbox may reach.
    pub fn set_network_spec(&mut self, id: &str, spec: &NetworkSpec) -> Result<()> {
        let doing = || format!("could not record what sandbox {id} may reach");
        let transaction = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(|error| sql(doing(), error))?;
        transaction
            .execute(
                "UPDATE sandboxes SET network = ? WHERE id = ?",
                params![spec.reach.as_str(), id],
            )
            .and_then(|_| {
                transaction.execute("DELETE FROM sandbox_allowed WHERE sandbox_id = ?", [id])
            })
            .and_then(|_| insert_allowed(&transaction, ALLOWED_OF_SANDBOX, id, spec))
            .map_err(|error| sql(doing(), error))?;
        transaction.commit().map_err(|error| sql(doing(), error))
    }
}

/// A table of what is allowed, and its column that says to whom.
pub(super) type AllowedTable = (&'static str, &'static str);
pub(super) const ALLOWED_OF_SANDBOX: AllowedTable = ("sandbox_allowed", "sandbox_id");
pub(super) const ALLOWED_OF_SNAPSHOT: AllowedTable = ("snapshot_allowed", "snapshot_id");

pub(super) fn insert_allowed(
    connection: &Connection,
    (table, owner): AllowedTable,
    id: &str,
    spec: &NetworkSpec,
) -> rusqlite::Result<()> {
    for (position, allowed) in (0_u32..).zip(&spec.allowed) {
        connection
            .prepare_cached(&format!(
                "INSERT INTO {table} ({owner}, position, value) VALUES (?, ?, ?)"
            ))?
            .execute(params![id, position, allowed.to_string()])?;
    }
    Ok(())
}

/// Adds what is allowed to a network of which only the reach is known.
pub(super) fn read_allowed(
    connection: &Connection,
    (table, owner): AllowedTable,
    id: &str,
    spec: &mut NetworkSpec,
) -> rusqlite::Result<()> {
    // Most have none, and are not asked about it.
    if spec.reach == Reach::Off {
        return Ok(());
    }
    spec.allowed = connection
        .prepare_cached(&format!(
            "SELECT value FROM {table} WHERE {owner} = ? ORDER BY position"
        ))?
        .query_map([id], |row| {
            let text: String = row.get(0)?;
            text.parse().map_err(|error| column(0, error))
        })?
        .collect::<rusqlite::Result<_>>()?;
    Ok(())
}

fn read(row: &Row<'_>) -> rusqlite::Result<NetworkRow> {
    let mode: String = row.get(1)?;
    Ok(NetworkRow {
        sandbox_id: row.get(0)?,
        mode: [NetworkMode::Tap, NetworkMode::User]
            .into_iter()
            .find(|known| known.as_str() == mode)
            .ok_or_else(|| column(1, Error::new(ErrorKind::State, "unknown network mode")))?,
        address: row.get::<_, u32>(2)?.into(),
        device: row.get(3)?,
        run: from_sql(row.get(4)?),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::store::rows::tests::{row, store};

    fn addresses(last: std::ops::RangeInclusive<u8>) -> impl Iterator<Item = Ipv4Addr> {
        last.map(|last| Ipv4Addr::new(172, 16, 0, last))
    }

    fn insert(store: &mut Store, name: &str, device: &str, last: u8) -> Result<Option<Ipv4Addr>> {
        let id = format!("id-{name}");
        let row = store.insert_network(&id, NetworkMode::Tap, device, 7, addresses(2..=last))?;
        assert_eq!(store.network(&id).expect("read"), row);
        Ok(row.map(|row| row.address))
    }

    #[test]
    fn an_address_is_taken_once_and_free_again() {
        let (_dir, mut store) = store();
        for name in ["a", "b", "c"] {
            store.insert_sandbox(&row(name)).expect("written");
        }
        let at = |last| Some(Ipv4Addr::new(172, 16, 0, last));
        let (one, two, three) = ("smol00000000001", "smol00000000002", "smol00000000003");
        assert_eq!(insert(&mut store, "a", one, 3).expect("a"), at(2));
        assert_eq!(insert(&mut store, "b", two, 3).expect("b"), at(3));
        assert_eq!(insert(&mut store, "c", three, 3).expect("none left"), None);
        let error = store.insert_network("id-c", NetworkMode::Tap, one, 7, addresses(4..=4));
        assert_eq!(error.expect_err("a device").kind(), ErrorKind::Busy);
        store.delete_network("id-a").expect("removed");
        store.delete_network("id-a").expect("again");
        assert_eq!(insert(&mut store, "c", three, 3).expect("c"), at(2));
        // Where each has a network of its own, it may be another's too, though no device may.
        let error = store.insert_network("id-b", NetworkMode::User, one, 7, addresses(3..=3));
        assert_eq!(error.expect_err("it has one").kind(), ErrorKind::Busy);
        let own = store.insert_network("id-a", NetworkMode::User, one, 7, addresses(3..=3));
        assert_eq!(
            own.expect("a").expect("an address").address,
            at(3).expect("3")
        );
        store.delete_network("id-a").expect("removed");
        // It goes with its sandbox.
        store.delete_sandbox("id-b").expect("removed");
        let left: Vec<_> = store.networks().expect("read");
        assert_eq!(left.len(), 1, "{left:?}");
    }

    #[test]
    fn sixteen_at_once_get_sixteen_addresses() {
        let (dir, mut store) = store();
        for n in 0..16 {
            store.insert_sandbox(&row(&n.to_string())).expect("written");
        }
        let path = dir.path().join("state.db");
        let all: BTreeSet<_> = std::thread::scope(|scope| {
            let started: Vec<_> = (0..16)
                .map(|n| {
                    let path = &path;
                    scope.spawn(move || {
                        let mut store = Store::open(path).expect("a store");
                        let device = format!("smol{n:011}");
                        // All want the same ones, in the same order.
                        let wanted = addresses(2..=17);
                        store
                            .insert_network(
                                &format!("id-{n}"),
                                NetworkMode::Tap,
                                &device,
                                7,
                                wanted,
                            )
                            .expect("written")
                            .expect("an address for each")
                            .address
                    })
                })
                .collect();
            let ended = started.into_iter().map(std::thread::ScopedJoinHandle::join);
            ended.map(|address| address.expect("ended")).collect()
        });
        assert_eq!(all.len(), 16, "{all:?}");
    }

    #[test]
    fn what_may_be_reached_comes_back_in_order_and_changes() {
        let (_dir, mut store) = store();
        let allowed = |texts: &[&str]| {
            texts
                .iter()
                .map(|text| text.parse().expect("allowed"))
                .collect()
        };
        let mut written = row("a");
        written.spec.network =
            NetworkSpec::listed(allowed(&["z.example", "10.0.0.0/8", "a.example"]));
        store.insert_sandbox(&written).expect("written");
        assert_eq!(store.sandbox("id-a").expect("read"), Some(written.clone()));
        for spec in [
            NetworkSpec::open(),
            NetworkSpec::listed(allowed(&["192.0.2.1"])),
            NetworkSpec::off(),
        ] {
            store.set_network_spec("id-a", &spec).expect("changed");
            written.spec.network = spec;
            assert_eq!(store.sandbox("id-a").expect("read"), Some(written.clone()));
        }
    }
}

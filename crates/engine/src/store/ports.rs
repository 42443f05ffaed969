//! Rows of the host's ports. That a port is taken once is decided here, by a unique constraint and
//! one transaction at a time.

use std::net::IpAddr;
use std::str::FromStr;

use rusqlite::{Connection, TransactionBehavior, params};
use smolvm_host::net::alloc::PortRange;

use super::rows::column;
use super::{Store, sql};
use crate::error::{Error, ErrorKind, Result};
use crate::ports::{HostPort, Protocol, PublishedPort};

impl Store {
    /// Records a port that a sandbox publishes.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`] if it is a sandbox's already, named in the error.
    pub fn insert_port(&mut self, id: &str, port: &PublishedPort) -> Result<()> {
        let transaction = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(|error| sql(doing(&port.host), error))?;
        insert_published(&transaction, id, port)?;
        transaction
            .commit()
            .map_err(|error| sql(doing(&port.host), error))
    }

    /// Says whose a port is, if it is a sandbox's already.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`], with that sandbox named.
    pub fn check_port(&self, host: &HostPort) -> Result<()> {
        check_free(&self.connection, host)
    }

    /// Forgets a port that a sandbox publishes. Says whether it did.
    pub fn delete_port(&mut self, id: &str, host: &HostPort) -> Result<bool> {
        self.connection
            .prepare_cached(
                "DELETE FROM ports WHERE sandbox_id = ? AND purpose = 'published' AND protocol = ? \
                 AND host_address = ? AND host_port = ?",
            )
            .and_then(|mut statement| {
                statement.execute(params![
                    id,
                    host.protocol.as_str(),
                    host.address.to_string(),
                    host.port
                ])
            })
            .map(|deleted| deleted == 1)
            .map_err(|error| sql(format!("could not forget that {host} is published"), error))
    }

    /// The port at which a sandbox serves SSH, if it has one.
    pub fn ssh_port(&self, id: &str) -> Result<Option<HostPort>> {
        let rows = select(
            &self.connection,
            "WHERE sandbox_id = ? AND purpose = 'ssh'",
            [id],
        );
        let row = rows.map_err(|error| sql(READING, error))?.pop();
        Ok(row.map(|row| row.host))
    }

    /// Gives a sandbox a port of `pool` on `address` at which to serve SSH; the one that it has, if it
    /// has one. `seed` says where to begin, so that those who allocate at once try different ports,
    /// and a port that was given back is not the next to be given out. `is_free` is asked of each that
    /// is no sandbox's, until it says yes.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`] if none is left, with the pool and how to enlarge it.
    pub fn allocate_ssh_port(
        &mut self,
        id: &str,
        address: IpAddr,
        pool: PortRange,
        seed: u64,
        mut is_free: impl FnMut(&HostPort) -> bool,
    ) -> Result<HostPort> {
        if let Some(port) = self.ssh_port(id)? {
            return Ok(port);
        }
        let doing = "could not record a port for SSH";
        let transaction = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(|error| sql(doing, error))?;
        let rows = select(&transaction, "WHERE protocol = 'tcp'", [])
            .map_err(|error| sql(READING, error))?;
        let mut others = 0u32;
        for port in pool.candidates(seed) {
            let host = HostPort {
                protocol: Protocol::Tcp,
                address,
                port,
            };
            if rows.iter().any(|row| row.host.overlaps(&host)) {
                continue;
            }
            if !is_free(&host) {
                others += 1;
                continue;
            }
            insert(&transaction, id, "ssh", &host, None)
                .and_then(|()| transaction.commit())
                .map_err(|error| sql(doing, error))?;
            return Ok(host);
        }
        let ours = pool.count() - others;
        Err(Error::new(
            ErrorKind::Busy,
            format!(
                "no port for SSH is left: of the {} from {pool}, {ours} are sandboxes' and {others} other programs'",
                pool.count()
            ),
        )
        .hint("remove sandboxes with `smolvm rm`, or set a larger `ports` under `[ssh]` in config.toml in the data directory"))
    }
}

const READING: &str = "could not read the ports in the state database";

fn doing(host: &HostPort) -> String {
    format!("could not record that {host} is published")
}

/// A row.
pub(super) struct PortRow {
    name: String,
    is_ssh: bool,
    pub(super) host: HostPort,
    guest: Option<u16>,
}

/// Records a port, within the caller's transaction.
pub(super) fn insert_published(
    connection: &Connection,
    id: &str,
    port: &PublishedPort,
) -> Result<()> {
    debug_assert_ne!(port.host.port, 0, "chosen before it is recorded");
    check_free(connection, &port.host)?;
    insert(connection, id, "published", &port.host, Some(port.guest))
        .map_err(|error| sql(doing(&port.host), error))
}

fn check_free(connection: &Connection, host: &HostPort) -> Result<()> {
    let near = select(
        connection,
        "WHERE protocol = ?1 AND host_port = ?2",
        params![host.protocol.as_str(), host.port],
    )
    .map_err(|error| sql(READING, error))?;
    match near.into_iter().find(|row| row.host.overlaps(host)) {
        Some(other) => Err(taken(host, &other)),
        None => Ok(()),
    }
}

/// The ports that a sandbox publishes, by host port.
pub(super) fn published(connection: &Connection, id: &str) -> rusqlite::Result<Vec<PublishedPort>> {
    let clause = "WHERE sandbox_id = ? AND purpose = 'published'";
    let mut ports: Vec<_> = select(connection, clause, [id])?
        .into_iter()
        .filter_map(|row| {
            Some(PublishedPort {
                host: row.host,
                guest: row.guest?,
            })
        })
        .collect();
    ports.sort_by_key(|port| (port.host.port, port.host));
    Ok(ports)
}

fn taken(host: &HostPort, other: &PortRow) -> Error {
    let PortRow { name, is_ssh, .. } = other;
    let error = |what: String| Error::new(ErrorKind::Busy, what);
    let choose = "leave the host's port out to have a free one chosen";
    if name.starts_with('.') {
        return error(format!(
            "port {host} belongs to a sandbox that is being removed"
        ))
        .hint("try again in a moment");
    }
    if *is_ssh {
        return error(format!("port {host} is where sandbox `{name}` serves SSH"))
            .hint(format!("give another port, or {choose}"));
    }
    error(format!("port {host} is published by sandbox `{name}`")).hint(format!(
        "close it with `smolvm port close {name} {}`, give another port, or {choose}",
        other.host
    ))
}

fn insert(
    connection: &Connection,
    id: &str,
    purpose: &str,
    host: &HostPort,
    guest: Option<u16>,
) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "INSERT INTO ports (sandbox_id, purpose, protocol, host_address, host_port, guest_port) \
             VALUES (?, ?, ?, ?, ?, ?)",
        )?
        .execute(params![
            id,
            purpose,
            host.protocol.as_str(),
            host.address.to_string(),
            host.port,
            guest
        ])
        .map(|_| ())
}

fn select(
    connection: &Connection,
    clause: &str,
    values: impl rusqlite::Params,
) -> rusqlite::Result<Vec<PortRow>> {
    connection
        .prepare_cached(&format!(
            "SELECT sandboxes.name, purpose, protocol, host_address, host_port, guest_port FROM ports \
             JOIN sandboxes ON sandboxes.id = sandbox_id {clause}"
        ))?
        .query_map(values, |row| {
            let protocol: String = row.get(2)?;
            let address: String = row.get(3)?;
            let state = |error: std::net::AddrParseError| {
                Error::new(ErrorKind::State, "unknown address").because(error)
            };
            Ok(PortRow {
                name: row.get(0)?,
                is_ssh: row.get::<_, String>(1)? == "ssh",
                host: HostPort {
                    protocol: Protocol::from_str(&protocol).map_err(|error| column(2, error))?,
                    address: address.parse().map_err(|error| column(3, state(error)))?,
                    port: row.get(4)?,
                },
                guest: row.get(5)?,
            })
        })?
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::rows::tests::{row, store};

    fn port(text: &str) -> PublishedPort {
        text.parse().expect("a port")
    }

    fn host(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn a_port_is_one_sandboxs_until_it_is_gone() {
        let (_dir, mut store) = store();
        let mut first = row("a");
        first.spec.ports = vec![port("8080:80"), port("8081:80/udp")];
        store.insert_sandbox(&first).expect("written");
        let read = store.sandbox("id-a").expect("read").expect("there");
        assert_eq!(read.spec.ports, first.spec.ports);
        for wish in ["8080:1", "0.0.0.0:8080:1", "0.0.0.0:8081:1/udp"] {
            let mut second = row("b");
            second.spec.ports = vec![port("9000:1"), port(wish)];
            let error = store.insert_sandbox(&second).expect_err("taken");
            assert_eq!(error.kind(), ErrorKind::Busy);
            assert!(error.to_string().contains("sandbox `a`"), "{error}");
            assert_eq!(
                store.sandbox("id-b").expect("read"),
                None,
                "nothing is left"
            );
        }
        store.insert_sandbox(&row("b")).expect("written");
        for wish in ["8080:1/udp", "127.0.0.2:8080:1", "[::]:8080:1"] {
            store.insert_port("id-b", &port(wish)).expect(wish);
        }
        let error = store.insert_port("id-b", &port("8080:1"));
        assert_eq!(error.expect_err("taken").kind(), ErrorKind::Busy);
        let gone = port("8080:80").host;
        assert!(!store.delete_port("id-b", &gone).expect("not its own"));
        assert!(store.delete_port("id-a", &gone).expect("its own"));
        store.insert_port("id-b", &port("8080:1")).expect("free");
        store.delete_sandbox("id-b").expect("deleted");
        store.insert_port("id-a", &port("8080:1")).expect("free");
    }

    #[test]
    fn ports_for_ssh_run_out_with_a_word_how_to_get_more() {
        let (_dir, mut store) = store();
        let pool: PortRange = "2200-2202".parse().expect("a range");
        let local = host("127.0.0.1");
        for name in ["a", "b", "c"] {
            store.insert_sandbox(&row(name)).expect("written");
        }
        store
            .insert_port("id-c", &port("0.0.0.0:2201:1"))
            .expect("written");
        let first = store
            .allocate_ssh_port("id-a", local, pool, 1, |_| true)
            .expect("one");
        assert_eq!(first.port, 2202, "2201 is published");
        let again = store.allocate_ssh_port("id-a", local, pool, 2, |_| true);
        assert_eq!(again.expect("the same"), first);
        assert_eq!(store.ssh_port("id-a").expect("read"), Some(first));
        assert_eq!(store.ssh_port("id-b").expect("read"), None);
        let error = store
            .allocate_ssh_port("id-b", local, pool, 0, |_| false)
            .expect_err("taken by others");
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert_eq!(
            error.to_string(),
            "no port for SSH is left: of the 3 from 2200-2202, 2 are sandboxes' and 1 other programs'"
        );
        let second = store.allocate_ssh_port("id-b", local, pool, 0, |_| true);
        assert_eq!(second.expect("the last").port, 2200);
        // A port at which SSH is served is none that is published.
        let row = store.sandbox("id-b").expect("read").expect("there");
        assert_eq!(row.spec.ports, []);
        let error = store.insert_port("id-c", &port("2200:1"));
        let error = error.expect_err("taken").to_string();
        assert!(error.contains("sandbox `b` serves SSH"), "{error}");
        store.delete_sandbox("id-a").expect("deleted");
        let last = store.allocate_ssh_port("id-c", local, pool, 0, |_| true);
        assert_eq!(last.expect("given back").port, 2202);
    }
}

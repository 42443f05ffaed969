//! The port on which a sandbox is reached by SSH, where it has to be another. Its row is one of
//! [`super::ports`].

use super::{Store, sql};
use crate::error::Result;

impl Store {
    /// Gives the port of a sandbox up on which it is reached by SSH, if it has one.
    pub fn forget_ssh_port(&mut self, id: &str) -> Result<()> {
        self.connection
            .prepare_cached("DELETE FROM ports WHERE sandbox_id = ? AND purpose = 'ssh'")
            .and_then(|mut statement| statement.execute([id]))
            .map(|_| ())
            .map_err(|error| {
                sql(
                    format!("could not forget the SSH port of sandbox {id}"),
                    error,
                )
            })
    }
}

#[cfg(test)]
mod tests {
    use crate::ssh::{SSH_ADDRESS, SshSpec};
    use crate::store::rows::tests::{row, store};

    #[test]
    fn a_sandbox_has_its_port_until_it_gives_it_up() {
        let (_dir, mut store) = store();
        let mut new = row("a");
        new.spec.ssh = Some(SshSpec::default());
        store.insert_sandbox(&new).expect("written");
        let pool = "2200-2201".parse().expect("a range");
        let mut port = |taken: Option<u16>| {
            let is_free = |host: &crate::ports::HostPort| Some(host.port) != taken;
            let host = store.allocate_ssh_port("id-a", SSH_ADDRESS.into(), pool, 0, is_free);
            let port = host.expect("a port").port;
            let read = store.sandbox("id-a").expect("read").expect("there");
            assert_eq!(read.ssh_port, Some(port));
            assert_eq!(read.spec.ssh, Some(SshSpec::default()));
            store.forget_ssh_port("id-a").expect("forgotten");
            port
        };
        let first = port(None);
        assert_ne!(port(Some(first)), first);
        let read = store.sandbox("id-a").expect("read").expect("there");
        assert_eq!(read.ssh_port, None);
    }
}

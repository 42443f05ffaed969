//! The sandbox's network while it runs: its device and rules, its resolver, what was denied to it, and
//! word of somebody emptying the host's firewall.
//!
//! All of it is made in the network namespace of the thread that calls [`Network::set_up`], the
//! keeper's main thread, and of threads it starts afterwards. In mode `user` that is one of its own, which
//! is connected with the host's first; nothing else here knows which one it is.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use smolvm_engine::launch::Launch;
use smolvm_engine::layout::Layout;
use smolvm_engine::network::{self, DeniedAttempt, Link, NetworkLaunch, NetworkSpec};
use smolvm_engine::store::Store;
use smolvm_engine::{Error, ErrorKind};
use smolvm_host::HostError;
use smolvm_host::net::dns::{DeniedLookup, DeniedReason, Resolver, Rules, Sink};
use smolvm_host::net::nft::{Firewall, Guest, Loss, Reach, Watch};
use smolvm_host::net::user::{HostSide, Uplink};
use smolvm_host::os::{Durability, Os};
use smolvm_proto::message;
use smolvm_vmm::{Cable, CableKind};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::error::KeeperError;

#[cfg(test)]
mod tests;

/// Names of a guest's that are remembered: denied ones, and for the log those that led somewhere. A
/// guest may ask for as many as it likes; the ones asked for last are kept.
const NAMES_MAX: usize = 1024;

/// How often a sandbox's network is connected with the host's anew.
const RECONNECTS_MAX: u32 = 16;

/// Addresses that are tried if others on this host have them, who use another data directory.
const ADDRESSES_TRIED: usize = 16;

/// The network of one sandbox. Dropped, its device goes with the machine's.
#[derive(Debug)]
pub(crate) struct Network {
    launch: NetworkLaunch,
    link: Link,
    shared: Arc<Shared>,
    rules: watch::Sender<Arc<Rules>>,
    resolver: JoinHandle<()>,
    resolver_port: std::num::NonZeroU16,
    /// Ends the threads that watch the firewall and the connection with the host when it is written to.
    stop_watching: OwnedFd,
}

/// What the resolver, the watch and the driver know together.
#[derive(Debug)]
struct Shared {
    os: Os,
    firewall: Firewall,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// The sandbox as it is to be in the firewall; `None` once it was taken out.
    guest: Option<Guest>,
    /// Addresses that names led to, and until when they may be reached.
    resolved: BTreeMap<Ipv4Addr, (String, Instant)>,
    /// Denied lookups, by name and the address that was the reason.
    denied: BTreeMap<(String, Option<Ipv4Addr>), (u64, Timestamp)>,
}

impl Network {
    /// Makes the network a launch asks for. If somebody else on the host has the address, the launch
    /// gets another one, in the store as well.
    pub(crate) async fn set_up(
        os: &Os,
        host: &Arc<HostSide>,
        launch: &mut Launch,
    ) -> Result<Option<Self>, KeeperError> {
        let Some(network) = &launch.network else {
            return Ok(None);
        };
        // First, since what is forwarded is forwarded to its device. Nothing else runs here yet that
        // could not wait for it.
        let uplink = match &network.uplink {
            Some(program) => Some(Uplink::start(os, program, host).map_err(Error::from)?),
            None => None,
        };
        let mut avoid = BTreeSet::new();
        loop {
            let Some(network) = &launch.network else {
                return Ok(None);
            };
            match Self::try_set_up(os, host, network).await {
                Err(KeeperError::Engine(error))
                    if error.kind() == ErrorKind::AlreadyExists
                        && avoid.len() < ADDRESSES_TRIED =>
                {
                    avoid.insert(network.address);
                    take_another_address(launch, &avoid)?;
                }
                Ok(network) => {
                    if let Some(uplink) = uplink {
                        let stopped = network.stop_watching.try_clone();
                        let stopped =
                            stopped.map_err(|error| KeeperError::io("watch the network", error))?;
                        keep_connected(os, host, &network.launch, uplink, stopped)?;
                    }
                    return Ok(Some(network));
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn try_set_up(
        os: &Os,
        host: &Arc<HostSide>,
        launch: &NetworkLaunch,
    ) -> Result<Self, KeeperError> {
        let mut link = Link::make(os, launch)?;
        let shared = Arc::new(Shared {
            os: os.clone(),
            firewall: link.firewall().clone(),
            state: Mutex::new(State {
                guest: None,
                resolved: BTreeMap::new(),
                denied: BTreeMap::new(),
            }),
        });
        let (rules, told) = watch::channel(Arc::new(launch.spec.rules()));
        let sink = Arc::new(Told(Arc::clone(&shared)));
        let servers = network::name_servers(os, &launch.config)?;
        let upstream = (Arc::clone(host), servers);
        let resolver = Resolver::bind(launch.gateway, launch.address, upstream, told, sink)
            .await
            .map_err(|error| KeeperError::io("listen for the guest's lookups", error))?;
        let resolver_port = resolver
            .port()
            .map_err(|error| KeeperError::io("listen for the guest's lookups", error))?;
        // The last step: until here the device is closed.
        let opened = link.open(launch.spec.policy(resolver_port));
        lock(&shared.state).guest = Some(link.guest().clone());
        opened?;
        let stop_watching = watch_firewall(os, &shared)?;
        let resolver = tokio::spawn(async move {
            if let Err(error) = resolver.serve().await {
                tracing::warn!(%error, "the guest's lookups are not answered any more");
            }
        });
        Ok(Self {
            launch: launch.clone(),
            link,
            shared,
            rules,
            resolver,
            resolver_port,
            stop_watching,
        })
    }

    /// The device, for the machine. `None` for one that can have none.
    /// `user` is who opens it, if not whoever this process runs as.
    pub(crate) fn cable(
        &mut self,
        kind: Option<CableKind>,
        user: Option<u32>,
    ) -> Result<Option<Cable>, KeeperError> {
        Ok(kind.map(|kind| self.link.cable(kind, user)).transpose()?)
    }

    /// What the guest is told of it.
    pub(crate) fn told(&self) -> message::Network {
        let launch = &self.launch;
        message::Network {
            address: launch.address.octets().into(),
            gateway: launch.gateway.octets().into(),
            mac: launch.mac().into(),
            gateway_mac: launch.gateway_mac().into(),
            name_server: launch.gateway.octets().into(),
        }
    }

    /// Lets the sandbox reach something else from now on. Connections that are not allowed any more
    /// stop.
    pub(crate) fn change(&mut self, spec: &NetworkSpec) -> Result<(), Error> {
        let rules = spec.rules();
        let mut state = lock(&self.shared.state);
        let policy = spec.policy(self.resolver_port);
        let Some(guest) = &mut state.guest else {
            return Err(Error::new(
                ErrorKind::NotRunning,
                "the sandbox is going down",
            ));
        };
        let before = std::mem::replace(&mut guest.policy, policy);
        let guest = guest.clone();
        state
            .resolved
            .retain(|_, (name, until)| *until > Instant::now() && rules.allows(name));
        let resolved = state.holding();
        // The resolver first, where that is stricter: what it answers from now on is of the new kind.
        self.rules.send_replace(Arc::new(rules));
        let changed = self.shared.firewall.change(&guest, &resolved);
        if let Err(error) = changed {
            if let Some(guest) = &mut state.guest {
                guest.policy = before;
            }
            self.rules.send_replace(Arc::new(self.launch.spec.rules()));
            return Err(error.into());
        }
        drop(state);
        self.launch.spec = spec.clone();
        Ok(())
    }

    /// Writes what was denied to the sandbox to a file.
    pub(crate) fn write_denied(&self, path: &Path) -> Result<(), Error> {
        let mut all = Vec::new();
        let now = Timestamp::now();
        let of_packets = self.shared.firewall.denied(self.link.guest().tap)?;
        let state = lock(&self.shared.state);
        for ((name, address), (count, at)) in &state.denied {
            all.push(DeniedAttempt {
                at: *at,
                name: Some(name.clone()),
                address: *address,
                protocol: None,
                port: None,
                count: *count,
            });
        }
        for denied in of_packets {
            let name = state.resolved.get(&denied.destination);
            all.push(DeniedAttempt {
                at: now.checked_sub(denied.ago).unwrap_or(now),
                name: name.map(|(name, _)| name.clone()),
                address: Some(denied.destination),
                protocol: Some(denied.protocol),
                port: denied.port,
                count: denied.packets,
            });
        }
        drop(state);
        all.sort_by_key(|attempt| attempt.at);
        let text = serde_json::to_vec(&all).map_err(|error| {
            Error::new(ErrorKind::Internal, "could not write what was denied").because(error)
        })?;
        let doing = "write what was denied to the sandbox to";
        self.shared
            .os
            .write_file_atomic(doing, path, &text, 0o600, Durability::Cached)?;
        Ok(())
    }

    /// Takes the sandbox out of the firewall and gives its address free. Its row in the store is to be
    /// removed afterwards.
    pub(crate) fn take_down(&mut self) -> Result<(), Error> {
        match self.let_go() {
            Some(guest) => self.link.close(&guest),
            None => Ok(()),
        }
    }

    /// Ends what acts for the sandbox, and returns what is still of it in the firewall: from now on
    /// nobody puts it back.
    fn let_go(&self) -> Option<Guest> {
        self.resolver.abort();
        let guest = lock(&self.shared.state).guest.take();
        let _ = rustix::io::write(&self.stop_watching, &1_u64.to_ne_bytes());
        guest
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // What is left of it is found by its row.
        let _ = self.let_go();
    }
}

/// Connects a network with the host's anew whenever somebody ends the program that does it, until
/// `stopped` can be read; then ends that program.
fn keep_connected(
    os: &Os,
    host: &Arc<HostSide>,
    launch: &NetworkLaunch,
    uplink: Uplink,
    stopped: OwnedFd,
) -> Result<(), KeeperError> {
    let (os, host, launch) = (os.clone(), Arc::clone(host), launch.clone());
    let connect = move || {
        let program = launch.uplink.as_deref().unwrap_or(Path::new("pasta"));
        let uplink = Uplink::start(&os, program, &host)?;
        // Its device is another.
        network::forward(&os, &launch)?;
        Ok::<_, Error>(uplink)
    };
    let watch = move || {
        let mut uplink = uplink;
        for _ in 0..RECONNECTS_MAX {
            let mut fds = [
                PollFd::new(&uplink, PollFlags::IN),
                PollFd::new(&stopped, PollFlags::IN),
            ];
            if rustix::io::retry_on_intr(|| poll(&mut fds, None)).is_err()
                || !fds[1].revents().is_empty()
            {
                return;
            }
            tracing::warn!("the network's connection with the host has ended; it is made anew");
            match connect() {
                Ok(another) => uplink = another,
                Err(error) => {
                    let reason = error.in_one_line();
                    tracing::error!(reason, "the sandbox has no network any more");
                    return;
                }
            }
        }
        tracing::error!("the network's connection ends again and again; it is left as it is");
        // It is not to end because of that.
        std::mem::forget(uplink);
    };
    std::thread::Builder::new()
        .name("uplink-watch".to_owned())
        .stack_size(256 * 1024)
        .spawn(watch)
        .map(drop)
        .map_err(|error| KeeperError::io("watch the network's connection", error))
}

/// Gives a launch another address: in the store, and in everything that follows from it.
fn take_another_address(
    launch: &mut Launch,
    avoid: &BTreeSet<Ipv4Addr>,
) -> Result<(), KeeperError> {
    let Some(network) = &mut launch.network else {
        return Ok(());
    };
    let layout = Layout::new(launch.data_dir.clone());
    let mut store = Store::open(&layout.database())?;
    // Nothing of it exists: the device could not be made.
    store.delete_network(&launch.id)?;
    let row = network::allocate(&mut store, &launch.id, network.mode, &network.config, avoid)?;
    network.address = row.address;
    network.run = row.run;
    if let Some(nic) = &mut launch.vm.nic {
        nic.mac = network.mac();
    }
    Ok(())
}

impl State {
    /// Addresses that names led to, and for how long they may still be reached.
    fn holding(&self) -> Vec<(Ipv4Addr, Duration)> {
        let now = Instant::now();
        self.resolved
            .iter()
            .filter_map(|(address, (_, until))| {
                Some((*address, until.checked_duration_since(now)?))
            })
            .collect()
    }
}

/// Who the resolver tells of names.
#[derive(Debug)]
struct Told(Arc<Shared>);

impl Sink for Told {
    fn resolved(&self, name: &str, addresses: &[(Ipv4Addr, Duration)]) -> Result<(), HostError> {
        let now = Instant::now();
        let mut state = lock(&self.0.state);
        for (address, hold) in addresses {
            if state.resolved.len() >= NAMES_MAX && !state.resolved.contains_key(address) {
                let soonest = state.resolved.iter().min_by_key(|(_, (_, until))| *until);
                let soonest = soonest.map(|(address, _)| *address);
                soonest.and_then(|address| state.resolved.remove(&address));
            }
            let shown = name.escape_debug().to_string();
            state.resolved.insert(*address, (shown, now + *hold));
        }
        let listed = state
            .guest
            .as_ref()
            .is_some_and(|guest| matches!(guest.policy.reach, Reach::Listed { .. }));
        let address = state.guest.as_ref().map(|guest| guest.address);
        match address {
            // Held meanwhile, so that a change of policy comes before or after.
            Some(address) if listed => self.0.firewall.allow(address, addresses),
            _ => Ok(()),
        }
    }

    fn denied(&self, denied: &DeniedLookup) {
        let address = match denied.reason {
            DeniedReason::Name => None,
            DeniedReason::Address(address) => Some(address),
        };
        let key = (denied.name.escape_debug().to_string(), address);
        let mut state = lock(&self.0.state);
        if state.denied.len() >= NAMES_MAX && !state.denied.contains_key(&key) {
            let oldest = state.denied.iter().min_by_key(|(_, (_, at))| *at);
            let oldest = oldest.map(|(key, _)| key.clone());
            oldest.and_then(|key| state.denied.remove(&key));
        }
        let entry = state.denied.entry(key).or_insert((0, Timestamp::now()));
        entry.0 += 1;
        entry.1 = Timestamp::now();
    }
}

/// Puts the sandbox back whenever somebody empties the firewall. Returns what ends that when it is
/// written to. A thread of its own costs a page or two and never wakes otherwise.
fn watch_firewall(os: &Os, shared: &Arc<Shared>) -> Result<OwnedFd, KeeperError> {
    let failed = |error| KeeperError::io("watch the host's firewall", error);
    let mut watch = Watch::begin(os).map_err(Error::from)?;
    let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
    let stopped = stop.try_clone().map_err(failed)?;
    let shared = Arc::clone(shared);
    std::thread::Builder::new()
        .name("firewall-watch".to_owned())
        .stack_size(256 * 1024)
        .spawn(move || {
            loop {
                let mut fds = [
                    PollFd::new(&watch, PollFlags::IN),
                    PollFd::new(&stopped, PollFlags::IN),
                ];
                if rustix::io::retry_on_intr(|| poll(&mut fds, None)).is_err() {
                    return;
                }
                if !fds[1].revents().is_empty() {
                    return;
                }
                match watch.take() {
                    Ok(loss) => put_back(&shared, loss),
                    Err(error) => {
                        tracing::warn!(%error, "the host's firewall is not watched any more");
                        return;
                    }
                }
            }
        })
        .map_err(failed)?;
    Ok(stop)
}

fn put_back(shared: &Shared, loss: Loss) {
    let state = lock(&shared.state);
    let Some(guest) = &state.guest else { return };
    match shared.firewall.put_back(guest, &state.holding(), loss) {
        Ok(false) => {}
        Ok(true) => tracing::warn!("somebody emptied the host's firewall table; it was made anew"),
        Err(error) => {
            let error = Error::from(error);
            tracing::error!(
                reason = error.in_one_line(),
                "somebody emptied the host's firewall table, and it could not be made anew"
            );
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    // A panic while it is held leaves a state that is still one.
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

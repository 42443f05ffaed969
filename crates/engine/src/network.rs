//! What a sandbox may reach, and what it has of the host's network for that.
//!
//! [`NetworkSpec`] is what was asked for. [`NetworkLaunch`] is what a keeper is told: the addresses and
//! the device that the store gave to this run of the sandbox. [`Link`] makes the device and the rules
//! from it, in whatever network namespace the calling thread is in, and [`release`] takes away what a
//! run left there. The row in the store is written before and removed after.

use std::collections::BTreeSet;
use std::fmt;
use std::net::Ipv4Addr;
use std::num::NonZeroU16;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use ipnet::Ipv4Net;
use jiff::Timestamp;
use rustix::thread::{CapabilitySet, capabilities};
use serde::{Deserialize, Serialize};
use smolvm_host::net::alloc::{self, AddressPool, GATEWAY_MAC, Mac};
use smolvm_host::net::dns::{Names, Pattern, Rules};
use smolvm_host::net::docker::Obstacle;
use smolvm_host::net::forwarding::Forwarding;
use smolvm_host::net::nft::{self, Firewall, Guest, Policy};
use smolvm_host::net::tap::{self, Lifetime, Owner, Tap, TapName, TapSpec};
use smolvm_host::net::user::{self, HostSide};
use smolvm_host::net::{dns, docker};
use smolvm_host::os::Os;
use smolvm_host::packages::PASTA;
use smolvm_host::{HostError, HostErrorKind};
use smolvm_proto::keeper::{KeeperRequest, NetworkPolicy};
use smolvm_vmm::{Cable, CableKind};

use crate::engine::{Engine, unknown_sandbox, wait_for_end};
use crate::error::{Error, ErrorKind, Result, io};
use crate::layout::Layout;
use crate::store::{NetworkMode, NetworkRow, SandboxRow, State, Store};
use crate::teardown;

/// Most names and networks in one sandbox's list.
pub const ALLOWED_MAX: usize = 1024;

/// How far a sandbox's connections go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reach {
    /// Nowhere. A sandbox that is created so has no network device.
    #[default]
    Off,
    /// To what is listed.
    Listed,
    /// Everywhere but where nobody may: private, link-local and metadata addresses, the host, other
    /// sandboxes.
    Open,
}

impl Reach {
    /// The word in flags, tables and the state database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Listed => "listed",
            Self::Open => "open",
        }
    }
}

impl FromStr for Reach {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        [Self::Off, Self::Listed, Self::Open]
            .into_iter()
            .find(|reach| reach.as_str() == text)
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::InvalidInput,
                    format!("`{}` is not a network policy", text.escape_debug()),
                )
                .hint("use off, listed or open")
            })
    }
}

/// Something that a sandbox may reach.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Allowed {
    /// An address or a network, with any protocol and port. One that lies wholly where nobody may go
    /// (`10.0.0.0/8`) is excepted from that; one that only contains such (`0.0.0.0/0`) is not.
    Network(Ipv4Net),
    /// A name, or all below one (`*.example.com`), and the addresses it leads to.
    Name(Pattern),
}

impl FromStr for Allowed {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || {
            Error::new(
                ErrorKind::InvalidInput,
                format!("`{}` is nothing that can be allowed", text.escape_debug()),
            )
        };
        if text.contains(':') {
            return Err(wrong()
                .because("sandboxes have no IPv6, and a port cannot be given")
                .hint("give a name, an IPv4 address, or a network such as 203.0.113.0/24"));
        }
        let network = match text.parse::<Ipv4Addr>() {
            Ok(address) => Some(Ipv4Net::from(address)),
            Err(_) if text.contains('/') => {
                let network = text.parse::<Ipv4Net>().map_err(|error| {
                    wrong()
                        .because(error)
                        .hint("write a network as 203.0.113.0/24")
                })?;
                Some(network.trunc())
            }
            Err(_) => None,
        };
        if let Some(network) = network {
            if network.prefix_len() >= 8 && network.addr().is_loopback() {
                return Err(wrong()
                    .because("a sandbox's loopback addresses are its own")
                    .hint(
                        "services of this host are not reached; `ssh -R` leads one connection out of \
                         a sandbox",
                    ));
            }
            return Ok(Self::Network(network));
        }
        match text.parse() {
            Ok(pattern) => Ok(Self::Name(pattern)),
            Err(error) => Err(wrong().because(error).hint(
                "give a name (example.com, *.example.com), an IPv4 address or a network \
                 (203.0.113.0/24)",
            )),
        }
    }
}

impl TryFrom<String> for Allowed {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Allowed> for String {
    fn from(allowed: Allowed) -> Self {
        allowed.to_string()
    }
}

impl fmt::Display for Allowed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Network(network) if network.prefix_len() == 32 => network.addr().fmt(f),
            Self::Network(network) => network.fmt(f),
            Self::Name(pattern) => pattern.fmt(f),
        }
    }
}

/// What a sandbox may reach.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NetworkSpec {
    /// How far it gets.
    pub reach: Reach,
    /// With [`Reach::Listed`] all it reaches; with [`Reach::Open`] what it reaches beside the public
    /// Internet.
    pub allowed: Vec<Allowed>,
}

impl NetworkSpec {
    /// Nothing, and no network device.
    #[must_use]
    pub fn off() -> Self {
        Self::default()
    }

    /// Everything but what nobody may.
    #[must_use]
    pub fn open() -> Self {
        Self {
            reach: Reach::Open,
            allowed: Vec::new(),
        }
    }

    /// What is listed and nothing else.
    #[must_use]
    pub fn listed(allowed: Vec<Allowed>) -> Self {
        Self {
            reach: Reach::Listed,
            allowed,
        }
    }

    /// Whether a sandbox needs a network device for it.
    #[must_use]
    pub fn needs_device(&self) -> bool {
        self.reach != Reach::Off
    }

    /// Checks what is listed against the reach.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidInput`], with the flag that helps.
    pub fn check(&self) -> Result<()> {
        let wrong = |what: String| Error::new(ErrorKind::InvalidInput, what);
        if self.allowed.len() > ALLOWED_MAX {
            return Err(wrong(format!(
                "{} names and networks are more than the most, {ALLOWED_MAX}",
                self.allowed.len()
            ))
            .hint("allow a network or `*.example.com` in place of single ones"));
        }
        match self.reach {
            Reach::Off if !self.allowed.is_empty() => Err(wrong(
                "a network that is off reaches nothing that is allowed".to_owned(),
            )
            .hint("leave --network off out, or --allow")),
            Reach::Listed if self.allowed.is_empty() => {
                Err(wrong("an empty list allows nothing".to_owned())
                    .hint("give --allow something, or use --network off"))
            }
            Reach::Open => {
                let useless = self.allowed.iter().find(|allowed| match allowed {
                    Allowed::Network(network) => !nft::is_never_network(*network),
                    Allowed::Name(_) => true,
                });
                match useless {
                    Some(allowed) => Err(wrong(format!(
                        "`{allowed}` adds nothing to an open network"
                    ))
                    .hint(
                        "leave --network open out to allow just what is listed; beside it, --allow \
                         is for private networks",
                    )),
                    None => Ok(()),
                }
            }
            Reach::Off | Reach::Listed => Ok(()),
        }
    }

    /// As a keeper is told it.
    pub(crate) fn to_message(&self) -> NetworkPolicy {
        NetworkPolicy {
            reach: self.reach.as_str().to_owned(),
            allowed: self.allowed.iter().map(ToString::to_string).collect(),
        }
    }

    /// What a keeper was told, checked.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidInput`].
    pub fn from_message(message: &NetworkPolicy) -> Result<Self> {
        let spec = Self {
            reach: message.reach.parse()?,
            allowed: message
                .allowed
                .iter()
                .map(|text| text.parse())
                .collect::<Result<_>>()?,
        };
        spec.check()?;
        Ok(spec)
    }

    fn networks(&self) -> impl Iterator<Item = Ipv4Net> {
        self.allowed.iter().filter_map(|allowed| match allowed {
            Allowed::Network(network) => Some(*network),
            Allowed::Name(_) => None,
        })
    }

    fn names(&self) -> impl Iterator<Item = &Pattern> {
        self.allowed.iter().filter_map(|allowed| match allowed {
            Allowed::Network(_) => None,
            Allowed::Name(pattern) => Some(pattern),
        })
    }

    fn exceptions(&self) -> Vec<Ipv4Net> {
        let named = |network: &Ipv4Net| nft::is_never_network(*network);
        self.networks().filter(named).collect()
    }

    /// What the firewall is told.
    #[must_use]
    pub fn policy(&self, resolver: NonZeroU16) -> Policy {
        Policy {
            reach: match self.reach {
                Reach::Off => nft::Reach::Off,
                Reach::Open => nft::Reach::Open,
                Reach::Listed => nft::Reach::Listed {
                    networks: self.networks().collect(),
                    names: self.names().next().is_some(),
                },
            },
            exceptions: self.exceptions(),
            resolver: Some(resolver),
            host_ports: Vec::new(),
        }
    }

    /// What the resolver is told.
    #[must_use]
    pub fn rules(&self) -> Rules {
        Rules {
            names: match self.reach {
                Reach::Open => Names::All,
                Reach::Off | Reach::Listed => Names::Listed(self.names().cloned().collect()),
            },
            exceptions: self.exceptions(),
        }
    }
}

impl fmt::Display for NetworkSpec {
    /// `off`, `open`, or what is listed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let listed = self.allowed.iter().map(ToString::to_string);
        let listed = listed.collect::<Vec<_>>().join(", ");
        match (self.reach, listed.is_empty()) {
            (Reach::Listed, false) => f.write_str(&listed),
            (reach, true) => f.write_str(reach.as_str()),
            (reach, false) => write!(f, "{}, {listed}", reach.as_str()),
        }
    }
}

impl Engine {
    /// Changes what a sandbox may reach: at once if it runs, with connections that are not allowed any
    /// more cut off, and for its next start in any case.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidInput`]; [`ErrorKind::Unsupported`] for one that runs without a network
    /// device.
    pub async fn set_network(&self, name: &str, spec: &NetworkSpec) -> Result<()> {
        spec.check()?;
        let Some(mut store) = Store::open_existing(&self.layout().database())? else {
            return Err(unknown_sandbox(name));
        };
        loop {
            let row = self.row(&mut store, name)?;
            if !row.state.is_held() {
                return store.set_network_spec(&row.id, spec);
            }
            if store.network(&row.id)?.is_none() {
                if !spec.needs_device() {
                    return Ok(());
                }
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!("sandbox `{name}` was started without a network device"),
                )
                .hint(format!(
                    "stop it with `smolvm stop {name}`, and set its network before it is started again"
                )));
            }
            let Some(session) = self.attach_when_there(&row).await? else {
                continue;
            };
            session
                .keeper(&KeeperRequest::SetNetwork(spec.to_message()))
                .await?;
            return Ok(());
        }
    }

    /// What was denied to a sandbox since it was started, the latest last; for one that is off, before
    /// it stopped. A destination is forgotten an hour after it was tried last.
    pub async fn denied(&self, name: &str) -> Result<Vec<DeniedAttempt>> {
        let Some(mut store) = Store::open_existing(&self.layout().database())? else {
            return Err(unknown_sandbox(name));
        };
        let row = self.row(&mut store, name)?;
        if row.state.is_held()
            && store.network(&row.id)?.is_some()
            && let Some(session) = self.attach_when_there(&row).await?
        {
            session.keeper(&KeeperRequest::WriteDenied).await?;
        }
        let path = self.layout().sandbox(&row.id).denied();
        match self.os().read("read what was denied", &path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| {
                let doing = format!("could not read what was denied in {}", path.display());
                Error::new(ErrorKind::State, doing).because(error)
            }),
            Err(error) if error.kind() == HostErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error.into()),
        }
    }

    /// Where networks of sandboxes are made that this process starts: on the host, if it has the rights
    /// for that, and in namespaces of their own otherwise.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::PermissionDenied`] if it may do neither, [`ErrorKind::MissingDependency`] without
    /// the program that connects such a namespace with the host; each says what to do.
    pub fn network_mode(&self) -> Result<NetworkMode> {
        self.judge_network_mode(false)
    }

    /// As [`Engine::network_mode`]. Thorough means to try, where only that tells.
    pub(crate) fn judge_network_mode(&self, thorough: bool) -> Result<NetworkMode> {
        if may_make_devices()? {
            return Ok(NetworkMode::Tap);
        }
        if let Some(obstacle) = user::obstacle() {
            return Err(no_network(obstacle.why, &obstacle.help));
        }
        self.programs().find(PASTA)?;
        if thorough || user::likely_obstacle().is_some() {
            crate::launch::try_network(&self.config().keeper)?;
        }
        Ok(NetworkMode::User)
    }

    /// What networks of sandboxes use of this host.
    pub fn network_usage(&self) -> Result<NetworkUsage> {
        let pool = self.config().network.pool()?;
        let used = match Store::open_existing(&self.layout().database())? {
            Some(mut store) => {
                teardown::reconcile(self.os(), self.layout(), &mut store)?;
                // A start that needs the address of one that goes waits for it.
                let going = leaving(&store)?.len();
                store.networks()?.len().saturating_sub(going)
            }
            None => 0,
        };
        let mode = self.network_mode();
        Ok(NetworkUsage {
            prefix: pool.net(),
            gateway: pool.gateway(),
            addresses: pool.guests(),
            used: u32::try_from(used).unwrap_or(u32::MAX),
            // Asked only where it may be, and where it matters.
            obstacles: match mode {
                Ok(NetworkMode::Tap) => docker::obstacles(self.os())?
                    .iter()
                    .map(describe_obstacle)
                    .collect(),
                Ok(NetworkMode::User) | Err(_) => Vec::new(),
            },
            mode,
        })
    }

    /// Takes away what networks of sandboxes left on the host for later ones: the firewall's table, the
    /// rules in Docker's chain, and forwarding where it was switched on.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`] while sandboxes have a network; [`ErrorKind::PermissionDenied`].
    pub async fn reset_network(&self) -> Result<()> {
        if !may_make_devices()? {
            return Err(Error::new(
                ErrorKind::PermissionDenied,
                "the host's network can be changed by root alone",
            )
            .because("it takes the capability CAP_NET_ADMIN")
            .hint(
                "run it as root, if root had sandboxes; those of other users leave nothing there",
            ));
        }
        let busy = |why: String| {
            Error::new(
                ErrorKind::Busy,
                "the host's network is in use by sandboxes".to_owned(),
            )
            .because(why)
            .hint("stop them first")
        };
        if let Some(mut store) = Store::open_existing(&self.layout().database())? {
            let mut used = 0;
            for _ in 0..RESET_TRIES {
                teardown::reconcile(self.os(), self.layout(), &mut store)?;
                used = store.networks()?.len();
                let going = leaving(&store)?;
                if going.is_empty() {
                    break;
                }
                // Who deletes a sandbox is answered before its keeper has taken everything away.
                for row in going {
                    wait_for_end(&row).await?;
                }
            }
            if used > 0 {
                return Err(busy(format!("{used} of this data directory have one")));
            }
        }
        // The name matters only for what is added.
        let firewall = Firewall::new(
            self.os().clone(),
            Owner::new("reset").ok_or_else(|| Error::new(ErrorKind::Internal, "no name"))?,
        );
        let others = firewall.all_guests().map_err(not_permitted)?;
        if others > 0 {
            return Err(busy(format!("{others} of other data directories have one")));
        }
        firewall.remove_table().map_err(not_permitted)?;
        docker::undo(self.os()).map_err(not_permitted)?;
        let run_dir = &self.config().network.run_dir;
        if run_dir.exists() {
            forwarding(self.os(), run_dir)?
                .undo()
                .map_err(not_permitted)?;
        }
        Ok(())
    }
}

/// The sandboxes that are being deleted and have not given their network back yet: who deletes one is
/// answered before that.
pub(crate) fn leaving(store: &Store) -> Result<Vec<SandboxRow>> {
    let mut going = Vec::new();
    for network in store.networks()? {
        let row = store.sandbox(&network.sandbox_id)?;
        going.extend(row.filter(|row| row.state == State::Deleting));
    }
    Ok(going)
}

/// How often it is looked again whether sandboxes that were being deleted are gone.
const RESET_TRIES: u32 = 16;

/// What networks of sandboxes use of a host.
#[derive(Debug)]
pub struct NetworkUsage {
    /// Where addresses are from.
    pub prefix: Ipv4Net,
    /// The host's address towards every sandbox.
    pub gateway: Ipv4Addr,
    /// How many sandboxes can have one.
    pub addresses: u32,
    /// How many have.
    pub used: u32,
    /// Where this process makes networks, or why it cannot.
    pub mode: Result<NetworkMode>,
    /// Other firewalls of the host that may stop what sandboxes send.
    pub obstacles: Vec<String>,
}

fn describe_obstacle(obstacle: &Obstacle) -> String {
    match obstacle {
        Obstacle::DroppingChain { table, chain } => format!(
            "the chain `{chain}` of the firewall table `{table}` drops what its rules do not accept; \
             accept there what comes from and goes to devices smol*"
        ),
        Obstacle::LegacyTable => "there are rules of the old iptables, which cannot be read here; \
                                  look with `iptables-legacy -S FORWARD`"
            .to_owned(),
    }
}

/// How the networks of a data directory's sandboxes are made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkConfig {
    /// The prefix that sandboxes get their addresses from, such as `172.16.0.0/24`.
    pub prefix: Ipv4Net,
    /// File that names the host's name servers.
    pub resolv_conf: PathBuf,
    /// Directory for what is to be forgotten when the host is started anew. Made on first use.
    pub run_dir: PathBuf,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            prefix: AddressPool::default().net(),
            resolv_conf: "/etc/resolv.conf".into(),
            run_dir: "/run/smolvm".into(),
        }
    }
}

impl NetworkConfig {
    /// The addresses there are.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidInput`] for a prefix that can be none.
    pub fn pool(&self) -> Result<AddressPool> {
        AddressPool::new(self.prefix).map_err(|error| {
            Error::new(
                ErrorKind::InvalidInput,
                "the network prefix cannot be used".to_owned(),
            )
            .because(error)
            .hint("set network.prefix to a private network such as 172.16.0.0/16")
        })
    }
}

/// What a keeper is told of a sandbox's network, with nothing left to decide.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkLaunch {
    /// Where device and rules are.
    pub mode: NetworkMode,
    /// Whose they are.
    pub owner: String,
    /// The device's name.
    pub device: String,
    /// The guest's address.
    pub address: Ipv4Addr,
    /// The host's.
    pub gateway: Ipv4Addr,
    /// What the connections of this run are known by: 48 random bits.
    pub run: u64,
    /// What the sandbox may reach.
    pub spec: NetworkSpec,
    /// How it is made.
    pub config: NetworkConfig,
    /// The program that connects it with the host's, in mode [`User`](NetworkMode::User).
    pub uplink: Option<PathBuf>,
}

impl NetworkLaunch {
    /// The launch of a row.
    ///
    /// # Errors
    ///
    /// If the data directory cannot be looked at, or the prefix can be none.
    pub fn new(
        row: &NetworkRow,
        layout: &Layout,
        spec: &NetworkSpec,
        config: &NetworkConfig,
    ) -> Result<Self> {
        Ok(Self {
            mode: row.mode,
            owner: owner(layout)?.as_str().to_owned(),
            device: row.device.clone(),
            address: row.address,
            gateway: config.pool()?.gateway(),
            run: row.run,
            spec: spec.clone(),
            config: NetworkConfig {
                run_dir: match row.mode {
                    NetworkMode::Tap => config.run_dir.clone(),
                    // Nothing of it is the host's, and it is over with the run.
                    NetworkMode::User => layout.sandbox(&row.sandbox_id).path().to_owned(),
                },
                ..config.clone()
            },
            uplink: None,
        })
    }

    /// The guest's MAC address.
    #[must_use]
    pub fn mac(&self) -> Mac {
        alloc::guest_mac(self.address)
    }

    /// The host's, which the guest is told.
    #[must_use]
    pub fn gateway_mac(&self) -> Mac {
        GATEWAY_MAC
    }
}

/// A sandbox's device and its entry in the firewall, made and held by its keeper.
#[derive(Debug)]
pub struct Link {
    os: Os,
    device: TapName,
    /// Unless it was left to the machine.
    tap: Option<Tap>,
    firewall: Firewall,
    owner: Owner,
    guest: Guest,
}

impl Link {
    /// Makes the device and its route, and lets the host forward what comes from it. Closed until
    /// [`Link::open`]: a device without an entry in the firewall sends nothing and gets nothing.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::AlreadyExists`] if somebody else on the host has the address: try another.
    /// [`ErrorKind::PermissionDenied`], with what to do. Nothing but the host's forwarding remains.
    pub fn make(os: &Os, launch: &NetworkLaunch) -> Result<Self> {
        let name = device(&launch.device)?;
        let owner = Owner::new(launch.owner.clone())
            .ok_or_else(|| Error::new(ErrorKind::State, "the network's owner has no such name"))?;
        let tap = Tap::create(
            os,
            &TapSpec {
                name,
                owner: owner.clone(),
                gateway: launch.gateway,
                guest: launch.address,
                guest_mac: launch.mac(),
                virtio_header: true,
                lifetime: Lifetime::Held,
            },
        )
        .map_err(not_permitted)?;
        forward(os, launch)?;
        docker::let_through(os).map_err(not_permitted)?;
        Ok(Self {
            os: os.clone(),
            device: name,
            tap: Some(tap),
            firewall: Firewall::new(os.clone(), owner.clone()),
            owner,
            guest: Guest {
                tap: name,
                address: launch.address,
                run: launch.run,
                policy: Policy::off(),
            },
        })
    }

    /// Enters the sandbox into the firewall, in one transaction: from now on it reaches what `policy`
    /// lets it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::AlreadyExists`] if the address is another's.
    pub fn open(&mut self, policy: Policy) -> Result<()> {
        self.guest.policy = policy;
        self.firewall.add(&self.guest).map_err(not_permitted)
    }

    /// The device, for the machine: another descriptor of it, or its name, for which it is closed and
    /// stays until [`Link::close`] or [`release`]. The VMM runs as `user`, or as whoever this is.
    ///
    /// # Errors
    ///
    /// Those of fcntl(2) and of the TUN driver.
    pub fn cable(&mut self, kind: CableKind, user: Option<u32>) -> Result<Cable> {
        match (kind, self.tap.take()) {
            (CableKind::Descriptor, Some(tap)) => {
                let other = tap.as_fd().try_clone_to_owned();
                self.tap = Some(tap);
                let other =
                    other.map_err(|error| io("could not pass on the network device", error))?;
                return Ok(Cable::Descriptor(other));
            }
            (CableKind::Descriptor, None) => {
                return Err(Error::new(
                    ErrorKind::Internal,
                    "the network device was passed on by its name already",
                ));
            }
            (CableKind::Device, Some(tap)) => {
                let own = || rustix::process::geteuid().as_raw();
                tap.leave_to(&self.os, user.unwrap_or_else(own))?;
            }
            (CableKind::Device, None) => {}
        }
        Ok(Cable::Device(self.device.to_string()))
    }

    /// The sandbox as the firewall knows it.
    #[must_use]
    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    /// The firewall.
    #[must_use]
    pub fn firewall(&self) -> &Firewall {
        &self.firewall
    }

    /// Whose it is.
    #[must_use]
    pub fn owner(&self) -> &Owner {
        &self.owner
    }

    /// Takes the entry out of the firewall and gives the address free; the device goes with its last
    /// descriptor, which may be this one's. `guest` is what the firewall was told last. The machine has to
    /// be gone. Idempotent.
    ///
    /// # Errors
    ///
    /// Those of the host.
    pub fn close(&mut self, guest: &Guest) -> Result<()> {
        self.firewall.remove(guest)?;
        tap::release_address(&self.os, self.device, guest.address)?;
        if self.tap.is_none() {
            let tap = Tap::open(&self.os, self.device, true)?;
            tap.let_go(&self.os)?;
            self.tap = Some(tap);
        }
        Ok(())
    }
}

/// Takes away what a run of a sandbox left on the host, and its row last. Idempotent; does nothing for
/// one without a row. The run has to be over.
pub fn release(os: &Os, layout: &Layout, store: &mut Store, id: &str) -> Result<()> {
    let Some(row) = store.network(id)? else {
        return Ok(());
    };
    if row.mode == NetworkMode::Tap {
        let name = device(&row.device)?;
        let guest = Guest {
            tap: name,
            address: row.address,
            run: row.run,
            policy: Policy::off(),
        };
        // First what lets packets pass, then the device, which is gone already with its last
        // descriptor unless its holder is only just ending.
        Firewall::new(os.clone(), owner(layout)?)
            .purge(&guest)
            .map_err(not_permitted)?;
        tap::delete(os, name).map_err(not_permitted)?;
    }
    store.delete_network(id)
}

/// Whose devices and entries those of a data directory's sandboxes are: that very directory's, not
/// those of one that was copied from it.
pub(crate) fn owner(layout: &Layout) -> Result<Owner> {
    use std::os::unix::fs::MetadataExt;
    let root = layout.root();
    let metadata = std::fs::metadata(root).map_err(|error| {
        crate::error::io(format!("could not look at {}", root.display()), error)
    })?;
    let name = format!("{:x}-{:x}", metadata.dev(), metadata.ino());
    Owner::new(name)
        .ok_or_else(|| Error::new(ErrorKind::Internal, "no name for the network's owner"))
}

fn device(name: &str) -> Result<TapName> {
    TapName::parse(name).ok_or_else(|| {
        Error::new(
            ErrorKind::State,
            format!("`{}` is no device of a sandbox", name.escape_debug()),
        )
    })
}

/// Lets packets of sandboxes be forwarded to the devices that lead elsewhere.
///
/// # Errors
///
/// [`ErrorKind::PermissionDenied`], with what to do.
pub fn forward(os: &Os, launch: &NetworkLaunch) -> Result<()> {
    let run_dir = &launch.config.run_dir;
    os.create_dir_all("make the directory", run_dir)
        .map_err(not_permitted)?;
    let forwarding = match launch.mode {
        NetworkMode::Tap => forwarding(os, run_dir)?,
        NetworkMode::User => Forwarding::new(os.clone(), run_dir.join("forwarding.json")),
    };
    forwarding.enable(&[]).map_err(not_permitted)?;
    Ok(())
}

/// The switch for forwarding. Its record is that of one network namespace: settings of another are
/// others.
pub(crate) fn forwarding(os: &Os, run_dir: &Path) -> Result<Forwarding> {
    use std::os::unix::fs::MetadataExt;
    let namespace = Path::new("/proc/thread-self/ns/net");
    let inode = std::fs::metadata(namespace)
        .map_err(|error| {
            crate::error::io(format!("could not look at {}", namespace.display()), error)
        })?
        .ino();
    let record = run_dir.join(format!("forwarding-{inode}.json"));
    Ok(Forwarding::new(os.clone(), record))
}

/// A failure of the host's network, with what helps against lacking rights.
pub(crate) fn not_permitted(error: HostError) -> Error {
    match error.kind() {
        HostErrorKind::PermissionDenied => Error::from(error).hint(NEEDS_ROOT),
        _ => error.into(),
    }
}

/// What helps where the rights to make a network are lacking.
pub(crate) const NEEDS_ROOT: &str =
    "run smolvm as root, or with CAP_NET_ADMIN; without a network (--network off) it needs neither";

/// Whether this process may make devices and firewall rules in its network.
fn may_make_devices() -> Result<bool> {
    may(CapabilitySet::NET_ADMIN)
}

/// Whether this process may make network namespaces, and devices in them, without a user namespace.
pub fn may_leave_namespaces() -> Result<bool> {
    may(CapabilitySet::NET_ADMIN | CapabilitySet::SYS_ADMIN)
}

fn may(rights: CapabilitySet) -> Result<bool> {
    let has = capabilities(None).map_err(|error| {
        crate::error::io("could not ask for this process's rights", error.into())
    })?;
    Ok(has.effective.contains(rights))
}

/// The error where no network can be made at all.
pub(crate) fn no_network(why: String, help: &str) -> Error {
    Error::new(
        ErrorKind::PermissionDenied,
        "a sandbox's network cannot be made by this user",
    )
    .because(why)
    .hint(format!(
        "{help}; or run smolvm as root. Without a network (--network off) it needs neither"
    ))
}

/// Gives the calling process a network of its own, and keeps a thread in the host's. To be called while
/// the process has one thread; see [`user::enter`].
///
/// # Errors
///
/// [`ErrorKind::PermissionDenied`], with what stands in the way as far as that is known. The process is
/// to end then.
pub fn leave_host(os: &Os) -> Result<HostSide> {
    user::enter(os).map_err(|error| {
        let known = match error.kind() {
            HostErrorKind::PermissionDenied => user::likely_obstacle(),
            _ => None,
        };
        let why = crate::error::in_one_line(&error);
        match known {
            Some(obstacle) => no_network(format!("{}: {why}", obstacle.why), &obstacle.help),
            None => no_network(
                why,
                "see whether this host's kernel, AppArmor or container lets this user make user and \
                 network namespaces (`unshare --user --net true`)",
            ),
        }
    })
}

/// Does what an ordinary user's network needs, and nothing with it: for whoever wants to know whether it
/// can be done. As [`leave_host`], for a process that does nothing else.
///
/// # Errors
///
/// What cannot be done, with what helps.
pub fn try_to_leave_host(os: &Os) -> Result<()> {
    let _host = leave_host(os)?;
    let owner = Owner::new("try").ok_or_else(|| Error::new(ErrorKind::Internal, "no name"))?;
    Firewall::new(os.clone(), owner)
        .all_guests()
        .map_err(not_permitted)?;
    let setting = Path::new("/proc/sys/net/ipv4/conf/lo/forwarding");
    os.effect("write", setting, || std::fs::write(setting, "1"))
        .map_err(not_permitted)?;
    Tap::detached(os, true).map(drop).map_err(not_permitted)
}

/// Gives a sandbox an address and a device's name, in a row, before any of it is made. Addresses in
/// `avoid` are somebody else's on this host.
pub fn allocate(
    store: &mut Store,
    id: &str,
    mode: NetworkMode,
    config: &NetworkConfig,
    avoid: &BTreeSet<Ipv4Addr>,
) -> Result<NetworkRow> {
    let pool = config.pool()?;
    let name = TapName::for_sandbox(id)
        .ok_or_else(|| Error::new(ErrorKind::Internal, format!("{id} names no device")))?;
    let seed = u64::from_str_radix(id, 16).unwrap_or(0);
    // 48 bits count.
    let run = crate::engine::random_u64()? >> 16;
    let candidates = pool
        .candidates(seed)
        .filter(|address| !avoid.contains(address));
    store
        .insert_network(id, mode, name.as_str(), run, candidates)?
        .ok_or_else(|| {
            Error::new(
                ErrorKind::Busy,
                format!(
                    "all {} addresses of the network {pool} are in use",
                    pool.guests()
                ),
            )
            .hint(
                "stop sandboxes that have a network, or enlarge it: set network.prefix to one such as \
                 172.16.0.0/16",
            )
        })
}

/// Something that was denied to a sandbox, each destination and each name once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeniedAttempt {
    /// When it was last tried.
    pub at: Timestamp,
    /// The name: the one that was looked up, or that led to the address. A guest's word, in which
    /// control characters are written out.
    pub name: Option<String>,
    /// Where to.
    pub address: Option<Ipv4Addr>,
    /// The protocol's number (1 ICMP, 6 TCP, 17 UDP); absent for a lookup.
    pub protocol: Option<u8>,
    /// The port.
    pub port: Option<u16>,
    /// Lookups, or packets with those that the guest's kernel repeats.
    pub count: u64,
}

impl DeniedAttempt {
    /// What was tried: `lookup`, `tcp`, `udp`, `icmp`, or the protocol's number.
    #[must_use]
    pub fn what(&self) -> String {
        match self.protocol {
            None => "lookup".to_owned(),
            Some(1) => "icmp".to_owned(),
            Some(6) => "tcp".to_owned(),
            Some(17) => "udp".to_owned(),
            Some(other) => other.to_string(),
        }
    }
}

/// The name servers of the host.
pub fn name_servers(os: &Os, config: &NetworkConfig) -> Result<Vec<std::net::SocketAddr>> {
    Ok(dns::name_servers(os, &config.resolv_conf)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(text: &str) -> Allowed {
        text.parse()
            .unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn what_is_allowed_is_read_and_shown() {
        for (text, shown) in [
            ("198.51.100.7", "198.51.100.7"),
            ("198.51.100.7/32", "198.51.100.7"),
            ("198.51.100.7/24", "198.51.100.0/24"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("Example.COM.", "Example.COM"),
            ("*.example.com", "*.example.com"),
            ("localhost", "localhost"),
        ] {
            assert_eq!(allowed(text).to_string(), shown, "{text}");
            assert_eq!(allowed(shown), allowed(text), "{text}");
        }
        for text in [
            "",
            "*",
            "a b",
            "10.0.0.0/33",
            "10.0.0/8",
            "10.0.0.256",
            "127.0.0.1",
            "127.0.0.0/8",
            "2001:db8::1",
            "a.b:443",
            "http://a.b/",
        ] {
            let error = text.parse::<Allowed>().expect_err(text);
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{text}");
            assert!(error.hint_text().is_some(), "{text}");
        }
    }

    #[test]
    fn a_private_network_has_to_be_meant() {
        let exceptions = |texts: &[&str]| {
            let list = texts.iter().map(|text| allowed(text)).collect();
            let policy = NetworkSpec::listed(list).policy(NonZeroU16::MIN);
            policy
                .exceptions
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
        };
        assert!(exceptions(&["0.0.0.0/0", "8.0.0.0/6", "example.com"]).is_empty());
        assert_eq!(
            exceptions(&[
                "10.1.0.0/16",
                "169.254.169.254",
                "224.0.0.0/4",
                "192.0.2.0/24"
            ]),
            ["10.1.0.0/16", "169.254.169.254/32", "224.0.0.0/4"]
        );
    }

    #[test]
    fn a_pool_that_is_used_up_says_so_and_how_to_enlarge_it() {
        use crate::store::rows::tests::{row, store};
        let (_dir, mut store) = store();
        let config = NetworkConfig {
            prefix: "192.168.9.0/30".parse().expect("a prefix"),
            ..NetworkConfig::default()
        };
        let mut allocate = |id: &str, avoid: &[Ipv4Addr]| {
            let mut row = row(id);
            row.id = format!("{id:0>16}");
            store.insert_sandbox(&row).expect("a row");
            let avoid = avoid.iter().copied().collect();
            super::allocate(&mut store, &row.id, NetworkMode::Tap, &config, &avoid)
        };
        let one = allocate("1", &[]).expect("the only one");
        assert_eq!(one.address, Ipv4Addr::new(192, 168, 9, 2));
        assert_eq!(one.device, "smol00000000000");
        let error = allocate("f000000000000000", &[]).expect_err("none left");
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert_eq!(
            error.to_string(),
            "all 1 addresses of the network 192.168.9.0/30 are in use"
        );
        let hint = error.hint_text().unwrap_or_default();
        assert!(hint.contains("network.prefix"), "{hint}");
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let check = |reach, texts: &[&str]| {
            let allowed = texts.iter().map(|text| allowed(text)).collect();
            NetworkSpec { reach, allowed }.check()
        };
        for (reach, texts) in [
            (Reach::Off, &[][..]),
            (Reach::Open, &[]),
            (Reach::Open, &["10.0.0.5"]),
            (Reach::Listed, &["example.com", "10.0.0.0/8"]),
        ] {
            assert!(check(reach, texts).is_ok(), "{reach:?} {texts:?}");
        }
        for (reach, texts) in [
            (Reach::Off, &["example.com"][..]),
            (Reach::Listed, &[]),
            (Reach::Open, &["example.com"]),
            (Reach::Open, &["198.51.100.1"]),
        ] {
            let error = check(reach, texts).expect_err("no sense");
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{reach:?} {texts:?}");
        }
        let many = vec![allowed("a.b"); ALLOWED_MAX + 1];
        assert!(NetworkSpec::listed(many).check().is_err());
    }
}

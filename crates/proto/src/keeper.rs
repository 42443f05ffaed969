//! What a client may ask of a sandbox's keeper, beside what it asks of the guest.

use minicbor::bytes::ByteVec;
use minicbor::{Decode, Encode};

use crate::message::EnvVar;

/// Asked by a client; opens a stream.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[expect(
    clippy::large_enum_variant,
    reason = "a request is made, written and forgotten; there are never many"
)]
pub enum KeeperRequest {
    /// Answered when the guest is ready ([`KeeperEvent::Ready`]) or will never be
    /// ([`KeeperEvent::Failed`]).
    #[n(0)]
    WaitReady,
    /// The sandbox is to be destroyed when this connection closes, for whatever reason.
    /// [`KeeperEvent::Done`].
    #[n(1)]
    Own,
    /// Orderly shutdown, then the keeper ends; the sandbox can be started again.
    /// [`KeeperEvent::Done`] once the machine is off.
    #[n(2)]
    Stop(#[n(0)] StopRequest),
    /// Switches the machine off at once and removes everything the sandbox owns.
    /// [`KeeperEvent::Done`] once nothing of it is left.
    #[n(3)]
    Destroy,
    /// Stops the virtual CPUs. [`KeeperEvent::Done`], also if they stand still already.
    #[n(4)]
    Pause,
    /// Lets them go on, with the clock put right. [`KeeperEvent::Done`], also if they run already.
    #[n(5)]
    Resume,
    /// Writes the machine as it is now to files; it goes on afterwards if it ran before.
    /// [`KeeperEvent::Captured`].
    #[n(6)]
    Capture(#[n(0)] CaptureRequest),
    /// Makes a parked member of a pool a sandbox. [`KeeperEvent::Ready`].
    #[n(7)]
    Claim(#[n(0)] ClaimRequest),
    /// Listens on the host for a port of the guest, now and at every start. [`KeeperEvent::Published`].
    #[n(8)]
    Publish(#[n(0)] PortMapping),
    /// Ends that, and the connections that came by it. [`KeeperEvent::Done`].
    #[n(9)]
    Unpublish(#[n(0)] PortPlace),
    /// Changes what the sandbox may reach, at once. [`KeeperEvent::Done`].
    #[n(16)]
    SetNetwork(#[n(0)] NetworkPolicy),
    /// Writes what was denied to the sandbox to its file on the host. [`KeeperEvent::Done`].
    #[n(17)]
    WriteDenied,
    /// Makes the sandbox's own disk larger and records it; its guest has to be told by
    /// [`crate::message::Request::Grow`]. [`KeeperEvent::Done`].
    #[n(18)]
    GrowDisk(#[n(0)] GrowDiskRequest),
}

/// How large a sandbox's own disk is to be.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct GrowDiskRequest {
    /// MiB, not less than it has.
    #[n(0)]
    pub disk_mib: u32,
}

/// A place on the host at which its keeper listens.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct PortPlace {
    /// Whether it is for datagrams (UDP), not for connections (TCP).
    #[n(0)]
    pub datagrams: bool,
    /// Address of the host.
    #[n(1)]
    pub address: String,
    /// Port of the host. To publish, 0 means one that is free.
    #[n(2)]
    pub port: u16,
}

/// A port of the host that leads to a port of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct PortMapping {
    /// Where the host listens.
    #[n(0)]
    pub host: PortPlace,
    /// Port of the guest.
    #[n(1)]
    pub guest: u16,
}

/// What a sandbox may reach.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct NetworkPolicy {
    /// `off`, `listed` or `open`.
    #[n(0)]
    pub reach: String,
    /// Names, addresses and networks.
    #[n(1)]
    pub allowed: Vec<String>,
}

/// Where to write a machine.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct CaptureRequest {
    /// Directory on the host that exists and has none of the files yet: `memory`, `state`, and
    /// `disk.ext4` if the machine has a disk of its own.
    #[n(0)]
    pub directory: ByteVec,
}

/// What a member of a pool becomes.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ClaimRequest {
    /// The sandbox's name, which is also the guest's host name.
    #[n(0)]
    pub name: String,
    /// Environment of every command.
    #[n(1)]
    pub env: Vec<EnvVar>,
    /// Working directory of commands that name none.
    #[n(2)]
    pub cwd: Option<String>,
    /// User of commands that name none.
    #[n(3)]
    pub user: Option<String>,
    /// Milliseconds from now at which it is destroyed.
    #[n(4)]
    pub ttl_ms: Option<u64>,
    /// Whether it is destroyed as soon as it stops.
    #[n(5)]
    pub ephemeral: bool,
    /// For an ephemeral one the process that claims it, which it does not outlive.
    #[n(6)]
    pub starter: Option<Starter>,
    /// Ports of the host that lead to it. None if absent.
    #[n(7)]
    pub ports: Option<Vec<PortMapping>>,
    /// What it may reach, if it has a network device.
    #[n(8)]
    pub network: Option<NetworkPolicy>,
    /// Public SSH keys that let somebody in beside the owner's; absent, it is not reached by SSH.
    #[n(9)]
    pub ssh_keys: Option<Vec<String>>,
}

/// A process of the host, told from a later one of the same number.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Starter {
    /// Its number.
    #[n(0)]
    pub pid: i32,
    /// When it started, in clock ticks after the host's start (proc(5), `starttime`).
    #[n(1)]
    pub start_time_ticks: u64,
    /// The host's boot (random(4), `boot_id`).
    #[n(2)]
    pub boot_id: String,
}

/// How to stop.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct StopRequest {
    /// Milliseconds the guest has; it is killed after that. Zero kills at once.
    #[n(0)]
    pub grace_ms: u64,
}

/// Said by the keeper.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum KeeperEvent {
    /// The guest serves.
    #[n(0)]
    Ready(#[n(0)] Ready),
    /// Carried out.
    #[n(1)]
    Done(#[n(0)] Done),
    /// It could not be carried out; the reason, for people.
    #[n(2)]
    Failed(#[n(0)] KeeperFailure),
    /// The machine was written.
    #[n(3)]
    Captured(#[n(0)] Captured),
    /// The port is published, with the number that was chosen.
    #[n(4)]
    Published(#[n(0)] PortMapping),
}

/// A machine that was written to files.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Captured {
    /// Microseconds the guest stood still; zero if it was paused anyway.
    #[n(0)]
    pub paused_us: u64,
}

/// A guest that serves.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Ready {
    /// The guest kernel's release.
    #[n(0)]
    pub kernel: String,
    /// Microseconds from the keeper's start to the VMM process running.
    #[n(1)]
    pub vmm_us: u64,
    /// Microseconds from the keeper's start to the guest's hello.
    #[n(2)]
    pub hello_us: u64,
    /// Microseconds from the keeper's start to the guest having its identity.
    #[n(3)]
    pub ready_us: u64,
    /// Why the machine booted though there was a template to restore it from, for people.
    #[n(4)]
    pub booted_because: Option<String>,
}

/// A request carried out.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Default)]
pub struct Done {
    /// For a stop: whether the guest had to be killed.
    #[n(0)]
    pub forced: bool,
}

/// A request not carried out.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct KeeperFailure {
    /// For people: what failed, on what, and why.
    #[n(0)]
    pub message: String,
    /// The last lines of the console, if the guest is why.
    #[n(1)]
    pub console: Vec<String>,
    /// For programs, where they have to tell one failure from another.
    #[n(2)]
    pub reason: Option<KeeperReason>,
    /// For people: what to do about it.
    #[n(3)]
    pub hint: Option<String>,
}

/// Failures that a program acts on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum KeeperReason {
    /// The name is another sandbox's.
    #[n(0)]
    NameTaken,
    /// It is no member of a pool, or not any more.
    #[n(1)]
    NotParked,
    /// Something else has what it needs.
    #[n(2)]
    Busy,
    /// There is no such thing.
    #[n(3)]
    NotFound,
    /// A value cannot be used.
    #[n(4)]
    InvalidInput,
    /// The host's kernel refused.
    #[n(5)]
    PermissionDenied,
}

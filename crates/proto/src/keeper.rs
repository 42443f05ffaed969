//! What a client may ask of a sandbox's keeper, beside what it asks of the guest.

use minicbor::{Decode, Encode};

/// Asked by a client; opens a stream.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
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
}

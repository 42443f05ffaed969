//! Which protocol the two ends speak.
//!
//! An agent is frozen into templates and snapshots, so a newer host meets older agents for years.
//! The agent therefore never adapts: it says what it speaks, and the host speaks the highest
//! version both know, or refuses with both ranges in the message.

use minicbor::bytes::ByteArray;
use minicbor::{Decode, Encode};

use crate::limits::NONCE_BYTES;

/// Lowest version this code speaks.
pub const VERSION_MIN: u32 = 1;
/// Highest version this code speaks.
pub const VERSION_MAX: u32 = 1;

/// Bytes by which a host knows the answer to its own Hello.
pub type Nonce = ByteArray<NONCE_BYTES>;

/// First frame of the guest, when it is ready to serve. Also said by a host that joins a guest which
/// runs already, and answered with another (see [`crate::rejoin`]).
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Hello {
    /// Lowest protocol version spoken.
    #[n(0)]
    pub version_min: u32,
    /// Highest protocol version spoken.
    #[n(1)]
    pub version_max: u32,
    /// The agent's own release, for people.
    #[n(2)]
    pub agent: String,
    /// The guest kernel's release, as uname(2) gives it.
    #[n(3)]
    pub kernel: String,
    /// Milliseconds from the kernel's start to this frame, by the guest's clock.
    #[n(4)]
    pub uptime_ms: u64,
    /// From a host: bytes that nobody could guess. From the guest: those of the Hello that this one
    /// answers; absent if it answers none.
    #[n(5)]
    pub nonce: Option<Nonce>,
    /// From a host: whether commands that earlier hosts started live on, with nobody hearing them.
    /// They are killed if this is false or absent. A request of another kind ends either way.
    #[n(6)]
    pub keep_commands: Option<bool>,
}

impl Hello {
    /// What a host says to a guest that runs already. `nonce` must be fresh random bytes: by them
    /// the host knows the answer ([`crate::Rejoin`]).
    #[must_use]
    pub fn of_host(nonce: Nonce, keep_commands: bool) -> Self {
        Self {
            version_min: VERSION_MIN,
            version_max: VERSION_MAX,
            agent: String::new(),
            kernel: String::new(),
            uptime_ms: 0,
            nonce: Some(nonce),
            keep_commands: Some(keep_commands),
        }
    }
}

/// The two ends have no version in common.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the guest's agent speaks protocol {peer_min} to {peer_max}, this program {VERSION_MIN} to {VERSION_MAX}"
)]
pub struct NoCommonVersion {
    /// Lowest version of the peer.
    pub peer_min: u32,
    /// Highest version of the peer.
    pub peer_max: u32,
}

/// The version to speak with a peer: the highest both know.
///
/// # Errors
///
/// [`NoCommonVersion`] if the ranges do not meet, or the peer's is empty.
pub fn negotiate(peer_min: u32, peer_max: u32) -> Result<u32, NoCommonVersion> {
    let version = peer_max.min(VERSION_MAX);
    if peer_min <= peer_max && version >= peer_min.max(VERSION_MIN) {
        Ok(version)
    } else {
        Err(NoCommonVersion { peer_min, peer_max })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_common_version_is_spoken() {
        assert_eq!(negotiate(1, 1), Ok(1));
        assert_eq!(negotiate(0, 99), Ok(VERSION_MAX));
        assert!(negotiate(VERSION_MAX + 1, VERSION_MAX + 5).is_err());
        assert!(negotiate(1, 0).is_err());
        assert!(negotiate(0, 0).is_err());
    }
}

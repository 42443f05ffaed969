//! The network of sandboxes on the host: one TAP device each, one nftables table for all.
//!
//! [`tap`] makes the device and its route, [`nft`] says what may pass, [`forwarding`] lets packets
//! be forwarded at all and can undo it, [`docker`] keeps Docker's firewall from dropping them,
//! [`dns`] answers a guest's name lookups by its policy, and [`alloc`] does arithmetic on pools of
//! addresses and ports.
//!
//! A guest is known by its device and its address; nothing here knows why it has them. The order
//! that leaves nothing open: [`nft::Firewall::add`] before or after [`tap::Tap::create`], since a
//! device without an entry in the table is closed; [`nft::Firewall::remove`] before the device goes,
//! then [`tap::Tap::release_address`], and the device may take its time to go.
//!
//! Everything is done by ioctl(2) and netlink(7) from inside the process, and starts no other. It
//! needs `CAP_NET_ADMIN` in the network namespace of the calling thread. IPv6 is closed: guests get
//! no address of it and the table drops it.

pub mod alloc;
pub mod dns;
pub mod docker;
pub mod forwarding;
mod netlink;
pub mod nft;
mod sys;
pub mod tap;
pub mod user;

use std::path::Path;

use crate::error::HostError;
use crate::os::Os;

/// Moves the calling thread to a new network namespace, in which there is nothing but a loopback
/// device that is down. Sockets the thread opens from now on belong there; those it has stay where
/// they are, as do other threads. The namespace goes with the last thread and descriptor of it.
///
/// # Errors
///
/// [`PermissionDenied`](crate::HostErrorKind::PermissionDenied) without `CAP_SYS_ADMIN`; see
/// unshare(2).
pub fn enter_new_namespace(os: &Os) -> Result<(), HostError> {
    os.effect(
        "enter a new namespace in place of",
        Path::new("/proc/thread-self/ns/net"),
        sys::unshare_network,
    )
}

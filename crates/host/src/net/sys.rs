//! The unsafe code of the network: two requests to the TUN driver, and leaving a namespace.
#![expect(
    unsafe_code,
    reason = "ioctl(2) takes what its request says it takes, which no type can express; unshare(2) \
              is unsafe for flags that are not used here"
)]

use std::ffi::{c_int, c_short};
use std::io;
use std::os::fd::BorrowedFd;

use rustix::ioctl::{IntegerSetter, Opcode, Setter, ioctl, opcode};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// `TUNSETIFF`, linux/if_tun.h.
const TUNSETIFF: Opcode = opcode::write::<c_int>(b'T', 202);
/// `TUNSETPERSIST`, linux/if_tun.h.
const TUNSETPERSIST: Opcode = opcode::write::<c_int>(b'T', 203);

/// `TUNSETOWNER`, linux/if_tun.h.
const TUNSETOWNER: Opcode = opcode::write::<c_int>(b'T', 204);

/// `struct ifreq` of linux/if.h with `ifr_flags` of its union. The kernel copies all 40 bytes.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    flags: c_short,
    rest: [u8; 22],
}

const _: () = assert!(size_of::<InterfaceRequest>() == size_of::<libc::ifreq>());

/// Makes an open `/dev/net/tun` the TAP device of that name, which is created.
pub(super) fn attach_tap(
    device: BorrowedFd<'_>,
    name: [u8; libc::IFNAMSIZ],
    flags: c_short,
) -> io::Result<()> {
    let request = InterfaceRequest {
        name,
        flags,
        rest: [0; 22],
    };
    // SAFETY: TUNSETIFF reads a `struct ifreq` through its argument, and writes one back to the same
    // place (https://docs.kernel.org/networking/tuntap.html); `request` has its size and layout, and
    // `Setter` passes its address and forgets what was written.
    unsafe { ioctl(device, Setter::<TUNSETIFF, _>::new(request))? };
    Ok(())
}

/// Says whether the TAP device outlives its last descriptor.
pub(super) fn set_persistent(device: BorrowedFd<'_>, persistent: bool) -> io::Result<()> {
    // SAFETY: TUNSETPERSIST takes its argument by value, whatever its number says of a pointer.
    unsafe {
        ioctl(
            device,
            IntegerSetter::<TUNSETPERSIST>::new_usize(usize::from(persistent)),
        )?;
    };
    Ok(())
}

/// Says who may open the TAP device again, apart from those who may do anything with the network.
pub(super) fn set_owner(device: BorrowedFd<'_>, user: u32) -> io::Result<()> {
    let user = usize::try_from(user).map_err(io::Error::other)?;
    // SAFETY: TUNSETOWNER takes its argument by value, whatever its number says of a pointer.
    unsafe { ioctl(device, IntegerSetter::<TUNSETOWNER>::new_usize(user))? };
    Ok(())
}

/// Moves the calling process, which has one thread, to a new user namespace.
pub(super) fn unshare_user() -> io::Result<()> {
    // SAFETY: only `UnshareFlags::FILES` is unsafe, as rustix documents, and it is not given.
    unsafe { unshare_unsafe(UnshareFlags::NEWUSER)? };
    Ok(())
}

/// Moves the calling thread to a new, empty network namespace.
pub(super) fn unshare_network() -> io::Result<()> {
    // SAFETY: only `UnshareFlags::FILES` is unsafe, as rustix documents, and it is not given.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET)? };
    Ok(())
}

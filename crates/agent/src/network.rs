//! The machine's one network device: a link to the host and nobody else.
//!
//! The guest has its address alone on the link (a /32) and reaches everything through the host's end,
//! whose MAC address it is told, so that no packet waits for ARP. A machine that becomes another one
//! gets another address and MAC in place of what it had.

use std::fs;
use std::io::ErrorKind;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::io::Errno;
use smolvm_proto::message::{Failure, FailureKind, Network};

use crate::failure::{failure, from_errno, from_io};
use crate::sys;

/// The kernel's name for the first Ethernet device.
const DEVICE: &str = "eth0";

const RESOLVER: &str = "/etc/resolv.conf";

/// The device has no IPv6 address and asks for none: the host lets nothing of it through, and
/// programs that find one wait for answers that never come.
const NO_IPV6: &str = "/proc/sys/net/ipv6/conf/eth0/disable_ipv6";

/// Switches the device on, without an address, if there is one. Done at boot, so that a machine that
/// is copied afterwards has it on already.
pub(crate) fn prepare() -> rustix::io::Result<()> {
    if !Path::new("/sys/class/net").join(DEVICE).exists() {
        return Ok(());
    }
    // Absent in a kernel without IPv6.
    let _ = fs::write(NO_IPV6, "1\n");
    let socket = sys::internet_socket()?;
    sys::interface_up(socket.as_fd(), DEVICE)
}

/// Gives the device its addresses, its routes and the guest its name server. May be repeated, with
/// the same or with others.
pub(crate) fn configure(network: &Network) -> Result<(), Failure> {
    let doing = |what: &str| format!("{what} of the network device {DEVICE}");
    let socket =
        sys::internet_socket().map_err(|errno| from_errno("making an IPv4 socket", errno))?;
    let socket = socket.as_fd();
    let address = Ipv4Addr::from(*network.address);
    let gateway = Ipv4Addr::from(*network.gateway);
    sys::set_mac(socket, DEVICE, *network.mac).map_err(|errno| match errno {
        Errno::NODEV => failure(
            FailureKind::NotFound,
            format!(
                "setting the MAC address: there is no {DEVICE}; does the guest's kernel have a \
                 driver for virtio network devices?"
            ),
        ),
        errno => from_errno(&doing("setting the MAC address"), errno),
    })?;
    // In place of an earlier one, with which its routes go.
    sys::set_address(socket, DEVICE, address)
        .map_err(|errno| from_errno(&doing("setting the address"), errno))?;
    sys::interface_up(socket, DEVICE)
        .map_err(|errno| from_errno(&doing("switching on the link"), errno))?;
    for (to, through) in [(Some(gateway), None), (None, Some(gateway))] {
        match sys::add_route(socket, DEVICE, to, through) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(from_errno(&doing("making the routes"), errno)),
        }
    }
    sys::set_neighbour(socket, DEVICE, gateway, *network.gateway_mac)
        .map_err(|errno| from_errno(&doing("setting the neighbour"), errno))?;
    let name_server = Ipv4Addr::from(*network.name_server);
    write_resolver(&format!("nameserver {name_server}\n"))
}

/// Writes the resolver's file where an image may have a link to what a service would write.
fn write_resolver(text: &str) -> Result<(), Failure> {
    let failed = |error| from_io(&format!("writing {RESOLVER}"), &error);
    if fs::read_to_string(RESOLVER).is_ok_and(|old| old == text) {
        return Ok(());
    }
    match fs::symlink_metadata(RESOLVER) {
        Ok(metadata) if metadata.is_symlink() => fs::remove_file(RESOLVER).map_err(failed)?,
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    crate::birth::write(RESOLVER, text)
}

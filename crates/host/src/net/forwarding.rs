//! Letting the host forward packets of guests, with as little change as will do, and undoing it.
//!
//! Linux decides by the device a packet came in by whether it may be forwarded
//! (`net.ipv4.conf.DEVICE.forwarding`, <https://docs.kernel.org/networking/ip-sysctl.html>). Those of
//! guests are made with it on. Answers come in by the devices that default routes lead to, so it is
//! switched on there and nowhere else; `net.ipv4.ip_forward`, which would make a router of the whole
//! host, is left alone.
//!
//! What was switched on is written down first, so that it can be undone after a crash too. The record
//! should be where a restart of the host deletes it, as it does the settings: in `/run`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use netlink_packet_route::AddressFamily;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteType};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::netlink::Netlink;
use super::tap::{self, NAME_PREFIX};
use crate::error::{HostError, HostErrorKind};
use crate::os::{Durability, Os};

const SETTINGS: &str = "/proc/sys/net/ipv4/conf";

/// The switch, and the record of what it did.
#[derive(Debug, Clone)]
pub struct Forwarding {
    os: Os,
    record: PathBuf,
}

impl Forwarding {
    /// `record` is the file for the record, one for the host; its directory must exist. Beside it a
    /// lock is kept, whose name ends in `.lock`.
    #[must_use]
    pub fn new(os: Os, record: PathBuf) -> Self {
        Self { os, record }
    }

    /// Switches forwarding on for the devices of all default routes and for `others`, and returns
    /// those it was off for. Idempotent; to be repeated when routes changed.
    ///
    /// # Errors
    ///
    /// [`PermissionDenied`](HostErrorKind::PermissionDenied) if the settings cannot be written, as
    /// in most containers; [`NotFound`](HostErrorKind::NotFound) if one of `others` is no device.
    pub fn enable(&self, others: &[&str]) -> Result<Vec<String>, HostError> {
        let _lock = self.lock()?;
        let mut devices = self.uplinks()?;
        devices.extend(others.iter().map(|&name| name.to_owned()));
        let mut record = self.recorded()?;
        let mut changed = Vec::new();
        for device in devices {
            if self.get(&device)? {
                continue;
            }
            record.insert(device.clone(), false);
            self.write_record(&record)?;
            self.set(&device, true)?;
            changed.push(device);
        }
        Ok(changed)
    }

    /// Switches forwarding off where [`Forwarding::enable`] switched it on, and forgets it. If the
    /// whole host has become a router meanwhile (`net.ipv4.ip_forward`), only forgets. Idempotent.
    ///
    /// # Errors
    ///
    /// Those of writing the settings; devices that are gone are success.
    pub fn undo(&self) -> Result<(), HostError> {
        let _lock = self.lock()?;
        if !self.get("all")? {
            for (device, was) in self.recorded()? {
                match self.set(&device, was) {
                    Err(e) if e.kind() == HostErrorKind::NotFound => {}
                    other => other?,
                }
            }
        }
        self.os
            .remove_file("forget what was switched on", &self.record)
    }

    /// Devices that default routes lead to, also when written in two halves as VPNs do.
    fn uplinks(&self) -> Result<BTreeSet<String>, HostError> {
        self.os
            .effect("list default routes of", Path::new("the host"), || {
                let mut request = RouteMessage::default();
                request.header.address_family = AddressFamily::Inet;
                let mut route = Netlink::open(NETLINK_ROUTE)?;
                let routes = tap::dump(&mut route, RouteNetlinkMessage::GetRoute(request))?;
                let mut indices = BTreeSet::new();
                for message in routes {
                    if let RouteNetlinkMessage::NewRoute(route) = message
                        && route.header.destination_prefix_length <= 1
                        && route.header.kind == RouteType::Unicast
                    {
                        for attribute in route.attributes {
                            match attribute {
                                RouteAttribute::Oif(index) => {
                                    indices.insert(index);
                                }
                                RouteAttribute::MultiPath(hops) => {
                                    indices.extend(hops.iter().map(|hop| hop.interface_index));
                                }
                                _ => {}
                            }
                        }
                    }
                }
                let names: io::Result<BTreeSet<_>> =
                    indices.into_iter().filter_map(name_of).collect();
                let mut names = names?;
                names.retain(|name| !name.starts_with(NAME_PREFIX));
                Ok(names)
            })
    }

    fn lock(&self) -> Result<crate::os::Lock, HostError> {
        let mut path = self.record.clone().into_os_string();
        path.push(".lock");
        self.os
            .lock("lock the record of forwarding", Path::new(&path))
    }

    fn recorded(&self) -> Result<BTreeMap<String, bool>, HostError> {
        let doing = "read the record of forwarding";
        match self.os.read(doing, &self.record) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|e| HostError::io(doing, &self.record, e.into())),
            Err(e) if e.kind() == HostErrorKind::NotFound => Ok(BTreeMap::new()),
            Err(e) => Err(e),
        }
    }

    fn write_record(&self, record: &BTreeMap<String, bool>) -> Result<(), HostError> {
        let doing = "write the record of forwarding";
        let bytes =
            serde_json::to_vec(record).map_err(|e| HostError::io(doing, &self.record, e.into()))?;
        self.os
            .write_file_atomic(doing, &self.record, &bytes, 0o600, Durability::Cached)
    }

    fn get(&self, device: &str) -> Result<bool, HostError> {
        let bytes = self.os.read("read", &setting(device))?;
        Ok(bytes.trim_ascii() != b"0")
    }

    fn set(&self, device: &str, on: bool) -> Result<(), HostError> {
        let path = setting(device);
        let value = if on { "1" } else { "0" };
        self.os
            .effect("write", &path, || fs::write(&path, value))
            .map_err(|e| match e.kind() {
                HostErrorKind::PermissionDenied => e.hinting(format!(
                    "Have root switch on forwarding: sysctl -w net/ipv4/conf/{device}/forwarding=1"
                )),
                _ => e,
            })
    }
}

fn setting(device: &str) -> PathBuf {
    [SETTINGS, device, "forwarding"].iter().collect()
}

/// The name of a device; `None` if it is gone.
fn name_of(index: u32) -> Option<io::Result<String>> {
    let name = rustix::net::socket(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::DGRAM,
        None,
    )
    .and_then(|socket| rustix::net::netdevice::index_to_name(&socket, index));
    match name {
        Err(rustix::io::Errno::NXIO | rustix::io::Errno::NODEV) => None,
        other => Some(other.map_err(Into::into)),
    }
}

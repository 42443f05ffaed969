//! Listeners in the guest, for connections that end on the host.
//!
//! Only a host opens streams, so a connection that came is announced, and waits here until the host
//! takes it up by its number ([`accept`]). A listener whose connections nobody takes stops accepting
//! after [`ACCEPTED_MAX`] of them.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::Timespec;
use rustix::fs::{AtFlags, CWD, Gid, Mode, Uid};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrAny, SocketType, sockopt};
use smolvm_proto::limits::ACCEPTED_MAX;
use smolvm_proto::message::{Event, Failure, FailureKind};
use smolvm_proto::socket::{AcceptRequest, Accepted, Endpoint, Internet, ListenRequest, Listening};

use crate::connect::{
    FLAGS, addresses, family, local_address, no_delay, open, relay, reset_on_close,
};
use crate::failure::{failure, from_errno};
use crate::port::Gone;
use crate::serve::Agent;
use crate::stream::{Last, Stop, Stream};
use crate::users;

/// Connections the guest's kernel holds for one listener; it cuts more than that to its own limit
/// (listen(2)).
const BACKLOG: i32 = 128;
/// How long a guest without a free descriptor is left alone before a listener tries again: nothing tells
/// when there is one.
const STARVED_TIME: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// Connections of all listeners that nobody took up yet.
#[derive(Debug, Default)]
pub(crate) struct Untaken(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    last: u64,
    waiting: HashMap<u64, Waiting>,
}

#[derive(Debug)]
struct Waiting {
    listener: Arc<Stream>,
    socket: OwnedFd,
    peer: String,
}

impl Untaken {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, waiting: Waiting) -> u64 {
        let mut state = self.lock();
        state.last += 1;
        let number = state.last;
        state.waiting.insert(number, waiting);
        number
    }

    fn take(&self, number: u64) -> Option<Waiting> {
        let taken = self.lock().waiting.remove(&number)?;
        // It may have stopped accepting.
        taken.listener.wake();
        Some(taken)
    }

    fn of(&self, listener: &Arc<Stream>) -> usize {
        let state = self.lock();
        let own = |waiting: &&Waiting| Arc::ptr_eq(&waiting.listener, listener);
        state.waiting.values().filter(own).count()
    }

    /// Refuses what is left of a listener.
    fn drop_all(&self, listener: &Arc<Stream>) {
        self.lock().waiting.retain(|_, waiting| {
            let own = Arc::ptr_eq(&waiting.listener, listener);
            if own {
                reset_on_close(&waiting.socket);
            }
            !own
        });
    }
}

/// Listens until the host has enough of it.
pub(crate) fn listen(
    agent: &Agent,
    stream: &Arc<Stream>,
    request: &ListenRequest,
) -> Result<Last, Stop> {
    let listener = match &request.on {
        Endpoint::Internet(on) => listen_internet(on)?,
        Endpoint::Local(path) => listen_local(path, request.owner.as_deref())?,
    };
    let result = serve(agent, stream, &listener);
    agent.untaken.drop_all(stream);
    result
}

/// Takes a connection up, and carries its bytes.
pub(crate) fn accept(agent: &Agent, stream: &Stream, request: AcceptRequest) -> Result<Last, Stop> {
    let Some(taken) = agent.untaken.take(request.connection) else {
        let message = format!("no connection {} waits to be taken up", request.connection);
        return Err(failure(FailureKind::NotFound, message).into());
    };
    relay(stream, taken.socket, taken.peer)
}

struct Listener {
    socket: OwnedFd,
    port: u16,
    /// Removed at the end.
    path: Option<PathBuf>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn listen_internet(on: &Internet) -> Result<Listener, Failure> {
    let candidates = if on.host.is_empty() {
        // The first takes IPv4 as well; the second is for a kernel without IPv6.
        let all = [
            IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        ];
        all.map(|ip| SocketAddr::new(ip, on.port)).to_vec()
    } else {
        addresses(on)?
    };
    let mut last = None;
    for address in candidates {
        match bind(&address, on.host.is_empty()) {
            Ok((socket, port)) => {
                return Ok(Listener {
                    socket,
                    port,
                    path: None,
                });
            }
            Err(errno @ (Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL)) => {
                last = Some((address, errno));
            }
            Err(errno) => return Err(from_errno(&format!("listening on {address}"), errno)),
        }
    }
    match last {
        Some((address, errno)) => Err(from_errno(&format!("listening on {address}"), errno)),
        None => unreachable!("there is at least one address"),
    }
}

fn bind(address: &SocketAddr, both: bool) -> rustix::io::Result<(OwnedFd, u16)> {
    let socket = open(family(address), SocketType::STREAM)?;
    // A port is free again at once after its last listener, whatever its connections do.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if both && address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, false)?;
    }
    rustix::net::bind(&socket, address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    let port = SocketAddr::try_from(rustix::net::getsockname(&socket)?)?.port();
    Ok((socket, port))
}

fn listen_local(path: &[u8], owner: Option<&str>) -> Result<Listener, Failure> {
    let refused = |errno| {
        from_errno(
            &format!("listening on {}", String::from_utf8_lossy(path)),
            errno,
        )
    };
    let owner = owner.map(users::look_up).transpose()?;
    let address = local_address(path).map_err(refused)?;
    let socket = open(AddressFamily::UNIX, SocketType::STREAM).map_err(refused)?;
    // The file is made with the socket's own mode (unix_bind, net/unix/af_unix.c): there is no moment
    // at which anybody else may connect.
    rustix::fs::fchmod(&socket, Mode::from_raw_mode(0o600)).map_err(refused)?;
    rustix::net::bind(&socket, &address).map_err(refused)?;
    let listener = Listener {
        socket,
        port: 0,
        path: Some(PathBuf::from(
            <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(path),
        )),
    };
    if let Some(owner) = owner {
        rustix::fs::chownat(
            CWD,
            path,
            Some(Uid::from_raw(owner.uid)),
            Some(Gid::from_raw(owner.gid)),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .map_err(refused)?;
    }
    rustix::net::listen(&listener.socket, BACKLOG).map_err(refused)?;
    Ok(listener)
}

fn serve(agent: &Agent, stream: &Arc<Stream>, listener: &Listener) -> Result<Last, Stop> {
    stream.send_event(&Event::Listening(Listening {
        port: listener.port,
    }))?;
    let mut starved = false;
    loop {
        let mut mailbox = stream.mailbox();
        if mailbox.reset {
            return Err(Stop::Gone);
        }
        if mailbox.input_ended {
            return Ok(Last::done());
        }
        mailbox.controls.clear();
        let unwanted = mailbox.input.pop_front();
        drop(mailbox);
        // A listener has no use for bytes.
        if let Some(part) = unwanted {
            stream.consumed(part.len())?;
            continue;
        }
        let accepts = !starved && agent.untaken.of(stream) < ACCEPTED_MAX;
        let socket = accepts.then(|| listener.socket.as_fd());
        let came = stream.wait_beside(socket, starved.then_some(&STARVED_TIME));
        starved = came && !take_one(agent, stream, listener)?;
    }
}

/// Whether the guest has descriptors and memory for another connection, which then was taken, if it was
/// still there.
fn take_one(agent: &Agent, stream: &Arc<Stream>, listener: &Listener) -> Result<bool, Gone> {
    let (socket, address) = match rustix::net::acceptfrom_with(&listener.socket, FLAGS) {
        Ok(accepted) => accepted,
        // The connection stays in the kernel's queue, so that the listener would be found ready at once
        // again (accept(2)).
        Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => return Ok(false),
        // Whoever gave up meanwhile is no reason to end.
        Err(_) => return Ok(true),
    };
    let peer = address.and_then(internet);
    if peer.is_some() {
        no_delay(&socket);
    }
    let name = peer
        .as_ref()
        .map(|peer| format!("{}:{}", peer.host, peer.port))
        .unwrap_or_default();
    let connection = agent.untaken.put(Waiting {
        listener: Arc::clone(stream),
        socket,
        peer: name,
    });
    stream.send_event(&Event::Accepted(Accepted { connection, peer }))?;
    Ok(true)
}

fn internet(address: SocketAddrAny) -> Option<Internet> {
    let address = SocketAddr::try_from(address).ok()?;
    Some(Internet {
        // What came to a socket of both families is IPv4 in disguise.
        host: address.ip().to_canonical().to_string(),
        port: address.port(),
    })
}

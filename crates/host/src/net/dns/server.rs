//! The loop around the decisions: sockets, name servers, time limits.

use std::fmt::Debug;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, watch};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::lookup::UDP_BYTES;
use super::{Accepted, DeniedLookup, Judged, Lookup, Rules, Unusable, judge};
use crate::error::HostError;
use crate::net::user::HostSide;

/// How long a name server is waited for by UDP, and by TCP.
const UDP_PATIENCE: Duration = Duration::from_secs(2);
const TCP_PATIENCE: Duration = Duration::from_secs(4);

/// Lookups of one guest at once. Further datagrams are dropped, as a network does that is busy; the
/// guest asks again.
const LOOKUPS_MAX: usize = 64;

/// TCP connections of one guest at once. Further ones wait.
const CONNECTIONS_MAX: usize = 8;

/// How long a connection of the guest may be silent.
const IDLE_MAX: Duration = Duration::from_secs(10);

/// How often another port is tried, if the one for UDP is taken for TCP.
const PORT_TRIES: usize = 16;

/// Who is told of names. Both are called on threads that may block.
pub trait Sink: Debug + Send + Sync + 'static {
    /// A name led to these addresses, each to be reachable for so long. The guest is told when this
    /// returns, and that the lookup failed if it fails.
    ///
    /// # Errors
    ///
    /// Whatever keeps the addresses from being reachable.
    fn resolved(&self, name: &str, addresses: &[(Ipv4Addr, Duration)]) -> Result<(), HostError>;

    /// A lookup was denied.
    fn denied(&self, denied: &DeniedLookup);
}

/// The resolver of one guest.
#[derive(Debug)]
pub struct Resolver {
    udp: UdpSocket,
    tcp: TcpListener,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    guest: Ipv4Addr,
    servers: Vec<SocketAddr>,
    /// The network the servers are in.
    host: Arc<HostSide>,
    rules: watch::Receiver<Arc<Rules>>,
    sink: Arc<dyn Sink>,
    lookups: Arc<Semaphore>,
    connections: Arc<Semaphore>,
}

impl Resolver {
    /// Listens on a port of `address` that the kernel chooses, the same for UDP and TCP, for the
    /// guest with address `guest` alone. `servers` are asked in their order, from the network of
    /// `host`. `rules` may change at any time.
    ///
    /// # Errors
    ///
    /// Those of bind(2): `EADDRNOTAVAIL` if `address` is not the host's, so make the device first.
    pub async fn bind(
        address: Ipv4Addr,
        guest: Ipv4Addr,
        (host, servers): (Arc<HostSide>, Vec<SocketAddr>),
        rules: watch::Receiver<Arc<Rules>>,
        sink: Arc<dyn Sink>,
    ) -> io::Result<Self> {
        let mut tries = 0;
        let (udp, tcp) = loop {
            let udp = UdpSocket::bind((address, 0)).await?;
            match TcpListener::bind(udp.local_addr()?).await {
                Ok(tcp) => break (udp, tcp),
                Err(e) if e.kind() == io::ErrorKind::AddrInUse && tries < PORT_TRIES => tries += 1,
                Err(e) => return Err(e),
            }
        };
        let shared = Shared {
            guest,
            servers,
            host,
            rules,
            sink,
            lookups: Arc::new(Semaphore::new(LOOKUPS_MAX)),
            connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
        };
        Ok(Self {
            udp,
            tcp,
            shared: Arc::new(shared),
        })
    }

    /// The port, for [`Policy::resolver`](crate::net::nft::Policy::resolver).
    ///
    /// # Errors
    ///
    /// Those of getsockname(2); none is known.
    pub fn port(&self) -> io::Result<NonZeroU16> {
        NonZeroU16::new(self.udp.local_addr()?.port()).ok_or_else(|| io::ErrorKind::Other.into())
    }

    /// Serves until dropped. Returns only if a socket fails for good.
    ///
    /// # Errors
    ///
    /// Those of the sockets, except what the guest can cause.
    pub async fn serve(self) -> io::Result<()> {
        let Self { udp, tcp, shared } = self;
        let udp = Arc::new(udp);
        let mut tasks = tokio::task::JoinSet::new();
        let mut buffer = [0; UDP_BYTES as usize];
        loop {
            let connection = Arc::clone(&shared.connections).acquire_owned();
            tokio::select! {
                received = udp.recv_from(&mut buffer) => match received {
                    Ok((length, from)) if shared.is_guest(from) => {
                        if let Ok(permit) = Arc::clone(&shared.lookups).try_acquire_owned() {
                            let (shared, udp) = (Arc::clone(&shared), Arc::clone(&udp));
                            let message = buffer[..length].to_vec();
                            tasks.spawn(async move {
                                if let Some(reply) = shared.answer(&message, true).await {
                                    let _ = udp.send_to(&reply, from).await;
                                }
                                drop(permit);
                            });
                        }
                    }
                    Ok(_) => {}
                    // What ICMP said of an earlier reply, udp(7).
                    Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {}
                    Err(e) if is_of_peer(&e) => {}
                    Err(e) => return Err(e),
                },
                accepted = async {
                    let permit = connection.await;
                    (tcp.accept().await, permit)
                } => match accepted {
                    (Ok((stream, from)), Ok(permit)) if shared.is_guest(from) => {
                        let shared = Arc::clone(&shared);
                        tasks.spawn(async move {
                            let _ = shared.converse(stream).await;
                            drop(permit);
                        });
                    }
                    (Ok(_), _) => {}
                    (Err(e), _) if is_of_peer(&e) => {}
                    (Err(e), _) => return Err(e),
                },
                // Done; there is nothing to do but to forget it.
                Some(_) = tasks.join_next() => {}
            }
        }
    }
}

/// Errors that the other side causes, accept(2) and ip(7).
fn is_of_peer(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::Interrupted
    )
}

impl Shared {
    fn is_guest(&self, from: SocketAddr) -> bool {
        from.ip() == IpAddr::V4(self.guest)
    }

    /// Serves one connection of the guest, one question after the other, RFC 7766.
    async fn converse(&self, mut stream: TcpStream) -> io::Result<()> {
        loop {
            let message = timeout(IDLE_MAX, read_message(&mut stream)).await??;
            let Some(reply) = self.answer(&message, false).await else {
                return Ok(());
            };
            timeout(IDLE_MAX, write_message(&mut stream, &reply)).await??;
        }
    }

    /// The reply to a message of the guest, if there is one.
    async fn answer(&self, message: &[u8], udp: bool) -> Option<Vec<u8>> {
        let rules = Arc::clone(&self.rules.borrow());
        match judge(message, &rules) {
            Judged::Ignore => None,
            Judged::Answer { reply, denied } => {
                self.tell_denied(denied).await;
                Some(reply)
            }
            Judged::Forward(lookup) => {
                let reply = match self.look_up(&lookup, &rules).await {
                    Some(accepted) => self.let_reach(&lookup, accepted).await,
                    None => lookup.failure(),
                };
                Some(if udp { lookup.for_udp(reply) } else { reply })
            }
        }
    }

    /// Tells of the addresses, and returns the reply for the guest.
    async fn let_reach(&self, lookup: &Lookup, accepted: Accepted) -> Vec<u8> {
        self.tell_denied(accepted.denied).await;
        if accepted.addresses.is_empty() {
            return accepted.reply;
        }
        let (sink, name) = (Arc::clone(&self.sink), lookup.name());
        let told = spawn_blocking(move || sink.resolved(&name, &accepted.addresses)).await;
        match told {
            Ok(Ok(())) => accepted.reply,
            Ok(Err(error)) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "a lookup failed");
                lookup.failure()
            }
            Err(_) => lookup.failure(),
        }
    }

    async fn tell_denied(&self, denied: Option<DeniedLookup>) {
        if let Some(denied) = denied {
            let sink = Arc::clone(&self.sink);
            // If it panics, that is told by the panic.
            let _ = spawn_blocking(move || sink.denied(&denied)).await;
        }
    }

    /// Asks one name server after the other.
    async fn look_up(&self, lookup: &Lookup, rules: &Rules) -> Option<Accepted> {
        for server in &self.servers {
            let mut id = [0; 2];
            rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty()).ok()?;
            let id = u16::from_ne_bytes(id);
            let by_udp = timeout(UDP_PATIENCE, self.ask_by_udp(*server, lookup, id, rules)).await;
            match by_udp {
                Ok(Ok(Some(accepted))) => return Some(accepted),
                // Too long for UDP.
                Ok(Ok(None)) => {
                    let by_tcp = self.ask_by_tcp(*server, lookup, id, rules);
                    if let Ok(Ok(accepted)) = timeout(TCP_PATIENCE, by_tcp).await {
                        return Some(accepted);
                    }
                }
                Ok(Err(_)) | Err(_) => {}
            }
        }
        None
    }

    /// `None` if the answer has to be asked for by TCP.
    async fn ask_by_udp(
        &self,
        server: SocketAddr,
        lookup: &Lookup,
        id: u16,
        rules: &Rules,
    ) -> io::Result<Option<Accepted>> {
        let any: SocketAddr = match server {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        // A port of its own for each, so that answers are hard to forge.
        let socket = self.host.run(move || {
            let socket = std::net::UdpSocket::bind(any)?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        })?;
        let socket = UdpSocket::from_std(socket)?;
        socket.connect(server).await?;
        socket.send(&lookup.query(id)).await?;
        let mut buffer = [0; UDP_BYTES as usize];
        loop {
            let length = socket.recv(&mut buffer).await?;
            match lookup.accept(&buffer[..length], id, rules) {
                Ok(accepted) => return Ok(Some(accepted)),
                Err(Unusable::Truncated) => return Ok(None),
                Err(Unusable::Unrelated) => {}
            }
        }
    }

    async fn ask_by_tcp(
        &self,
        server: SocketAddr,
        lookup: &Lookup,
        id: u16,
        rules: &Rules,
    ) -> io::Result<Accepted> {
        let socket = self.host.run(move || match server {
            SocketAddr::V4(_) => TcpSocket::new_v4(),
            SocketAddr::V6(_) => TcpSocket::new_v6(),
        })?;
        let mut stream = socket.connect(server).await?;
        write_message(&mut stream, &lookup.query(id)).await?;
        let message = read_message(&mut stream).await?;
        lookup
            .accept(&message, id, rules)
            .map_err(|_| io::ErrorKind::InvalidData.into())
    }
}

/// Reads a message with its length before it, RFC 1035 section 4.2.2: 64 KiB at most.
async fn read_message(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    let mut message = vec![0; usize::from(length)];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

async fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // In one piece: some name servers read no further than the first.
    let mut bytes = length.to_be_bytes().to_vec();
    bytes.extend(message);
    stream.write_all(&bytes).await
}

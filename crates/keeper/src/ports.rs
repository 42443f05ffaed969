//! Ports of the host that lead into the guest.
//!
//! The keeper listens, and carries each connection over the channel that it has to the guest's agent,
//! so it is the same whatever network the guest has, and needs no privilege. Inside, it is a client of
//! its own driver: flow control, pauses and the guest's end are then what they are for every client.
//!
//! A port is taken before the machine starts and served once the guest serves. Until then, and while
//! the guest stands still, the host's kernel holds what comes.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::net::sockopt;
use smolvm_engine::ports::Bound;
use smolvm_engine::{
    Connection, ConnectionEvent, ConnectionInput, DatagramSocket, Endpoint, HostPort, Internet,
    Protocol, Session,
};
use smolvm_proto::limits::DATAGRAM_BYTES_MAX;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, timeout_at};

use crate::driver::Input;

/// Connections that may be open at one time over all ports of a sandbox; the host's kernel holds the
/// next ones. Half of the streams that a guest may have, so that commands always find room.
const CONNECTIONS_MAX: usize = 512;
/// Clients whose datagrams may be on their way at one time over all ports of a sandbox. Datagrams of
/// more are dropped until one is idle.
const ASSOCIATIONS_MAX: usize = 256;
/// Datagrams of one client that may wait for the guest; the next are dropped, as by any full queue.
const DATAGRAMS_WAITING_MAX: usize = 64;
/// After so long without a datagram either way a client is forgotten. Twice what RFC 4787 (REQ-5)
/// asks of address translation at the least would be 4 minutes; a relay on the same host needs less,
/// and the client's next datagram begins anew.
const IDLE: Duration = Duration::from_secs(60);
/// Bytes read from a connection at a time: what one frame holds.
const READ_BYTES: usize = 64 * 1024;
/// How long accepting rests at most when the host's kernel has no descriptor or memory to spare.
const BREATH: Duration = Duration::from_millis(100);

/// All ports of a sandbox. Dropping it stops listening.
#[derive(Debug)]
pub(crate) struct Ports {
    line: Line,
    /// Taken, and not served yet.
    held: Vec<Bound>,
    serving: HashMap<HostPort, Serving>,
    connections: Arc<Semaphore>,
    associations: Arc<Semaphore>,
}

/// A port that is served. Dropping it ends its connections.
#[derive(Debug)]
struct Serving {
    task: JoinHandle<()>,
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Serving {
    /// Ends it, and waits until the socket is closed.
    async fn end(mut self) {
        self.task.abort();
        let _ = (&mut self.task).await;
    }
}

impl Ports {
    pub(crate) fn new(name: &str, inbox: mpsc::Sender<Input>, held: Vec<Bound>) -> Self {
        Self {
            line: Line::new(name, inbox),
            held,
            serving: HashMap::new(),
            connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            associations: Arc::new(Semaphore::new(ASSOCIATIONS_MAX)),
        }
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.held.len() + self.serving.len()
    }

    /// Takes more, to be served from [`Ports::serve`] on.
    pub(crate) fn hold(&mut self, bound: impl IntoIterator<Item = Bound>) {
        self.held.extend(bound);
    }

    /// Serves what was taken: the guest is there.
    pub(crate) fn serve(&mut self) {
        for bound in std::mem::take(&mut self.held) {
            let host = bound.published.host;
            match self.start(bound) {
                Ok(task) => drop(self.serving.insert(host, Serving { task })),
                Err(error) => tracing::error!(%error, port = %host, "could not serve a port"),
            }
        }
    }

    fn start(&self, bound: Bound) -> io::Result<JoinHandle<()>> {
        let line = self.line.clone();
        let guest = bound.published.guest;
        Ok(match bound.published.host.protocol {
            Protocol::Tcp => {
                let listener = TcpListener::from_std(bound.socket.into())?;
                let room = Arc::clone(&self.connections);
                tokio::spawn(serve_connections(listener, line, guest, room))
            }
            Protocol::Udp => {
                let socket = UdpSocket::from_std(bound.socket.into())?;
                let room = Arc::clone(&self.associations);
                tokio::spawn(serve_datagrams(socket, line, guest, room, IDLE))
            }
        })
    }

    /// Stops listening at a port, and ends what came by it. Says whether it was one of these.
    pub(crate) async fn close(&mut self, host: &HostPort) -> bool {
        let before = self.held.len();
        self.held.retain(|bound| bound.published.host != *host);
        match self.serving.remove(host) {
            Some(serving) => {
                serving.end().await;
                true
            }
            None => self.held.len() < before,
        }
    }

    /// Stops listening at all of them.
    pub(crate) async fn close_all(&mut self) {
        self.held.clear();
        for (_, serving) in std::mem::take(&mut self.serving) {
            serving.end().await;
        }
    }
}

/// The keeper's way to the guest as one of its own clients: made at the first need.
#[derive(Debug, Clone)]
pub(crate) struct Line {
    shared: Arc<LineShared>,
}

#[derive(Debug)]
struct LineShared {
    name: String,
    inbox: mpsc::Sender<Input>,
    session: tokio::sync::Mutex<Option<Session>>,
}

impl Line {
    pub(crate) fn new(name: &str, inbox: mpsc::Sender<Input>) -> Self {
        Self {
            shared: Arc::new(LineShared {
                name: name.to_owned(),
                inbox,
                session: tokio::sync::Mutex::new(None),
            }),
        }
    }

    /// Another way beside this one, for whoever is not to share it.
    pub(crate) fn another(&self) -> Self {
        Self::new(&self.shared.name, self.shared.inbox.clone())
    }

    /// The connection that all share.
    pub(crate) async fn session(&self) -> smolvm_engine::Result<Session> {
        let mut session = self.shared.session.lock().await;
        if let Some(session) = &*session {
            return Ok(session.clone());
        }
        let gone = |error: &dyn std::fmt::Display| {
            smolvm_engine::Error::new(
                smolvm_engine::ErrorKind::Internal,
                format!("could not reach the guest from its own keeper: {error}"),
            )
        };
        let (ours, theirs) = UnixStream::pair().map_err(|error| gone(&error))?;
        let sent = self.shared.inbox.send(Input::Inside(theirs)).await;
        sent.map_err(|_| gone(&"it is ending"))?;
        Ok(session
            .insert(Session::over(&self.shared.name, ours)?)
            .clone())
    }
}

/// Accepts for ever.
async fn serve_connections(listener: TcpListener, line: Line, guest: u16, room: Arc<Semaphore>) {
    // With this set its connections end too.
    let mut relays = JoinSet::new();
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
            return;
        };
        // Those that have ended are collected by the way.
        while relays.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((socket, from)) => {
                let line = line.clone();
                relays.spawn(async move {
                    if let Err(error) = relay(socket, &line, guest, permit).await {
                        let error = smolvm_engine::in_one_line(&error);
                        tracing::debug!(%from, guest, error, "a connection was broken");
                    }
                });
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                tracing::warn!(%error, "could not accept a connection");
                // One of its own that ends gives a descriptor back; others that do are not heard of.
                let given_back = async {
                    while relays.join_next().await.is_none() {
                        std::future::pending::<()>().await;
                    }
                };
                let _ = timeout_at(Instant::now() + BREATH, given_back).await;
            }
        }
    }
}

/// Carries one connection until both directions have ended.
///
/// Whatever breaks one side breaks the other: a client is reset unless all that the program sent has
/// reached it, and the program is reset unless the client said that it had no more.
async fn relay(
    socket: TcpStream,
    line: &Line,
    guest: u16,
    _permit: OwnedSemaphorePermit,
) -> smolvm_engine::Result<()> {
    // What is read here is all there is to send: waiting for more would only delay it.
    let _ = socket.set_nodelay(true);
    let mut client = ResetUnlessWhole(socket, false);
    let mut connection = line
        .session()
        .await?
        .open_connection(Endpoint::localhost(guest))?;
    let input = connection.input();
    // Not the halves that own it: one of those sends an orderly end when it is dropped.
    let (from_client, to_client) = client.0.split();
    let done = tokio::select! {
        // Ends only if something broke.
        broken = upwards(from_client, input) => broken,
        done = downwards(&mut connection, to_client) => done,
    };
    client.1 = done.is_ok();
    done
}

/// The client's end of a connection, which is reset when it is dropped before all was sent.
struct ResetUnlessWhole(TcpStream, bool);

impl Drop for ResetUnlessWhole {
    fn drop(&mut self) {
        if !self.1 {
            // The close that follows is a reset then (socket(7), SO_LINGER of zero).
            let _ = sockopt::set_socket_linger(&self.0, Some(Duration::ZERO));
        }
    }
}

/// From the client to the program. Returns only if something broke.
async fn upwards(
    mut from_client: ReadHalf<'_>,
    input: ConnectionInput,
) -> smolvm_engine::Result<()> {
    let mut buffer = vec![0; READ_BYTES];
    loop {
        match from_client.read(&mut buffer).await {
            Ok(0) => {
                input.end()?;
                break;
            }
            Ok(count) => {
                if !input.write(&buffer[..count]).await? {
                    break;
                }
            }
            Err(error) => return Err(broken("the client", error)),
        }
    }
    // The other direction says when the connection is over.
    std::future::pending().await
}

/// From the program to the client, until both directions have ended.
async fn downwards(
    connection: &mut Connection,
    mut to_client: WriteHalf<'_>,
) -> smolvm_engine::Result<()> {
    loop {
        let written = match connection.next().await? {
            ConnectionEvent::Opened(_) => Ok(()),
            ConnectionEvent::Data(bytes) => to_client.write_all(&bytes).await,
            ConnectionEvent::End => to_client.shutdown().await,
            ConnectionEvent::Closed => return Ok(()),
        };
        written.map_err(|error| broken("the client", error))?;
    }
}

fn broken(whose: &str, error: io::Error) -> smolvm_engine::Error {
    smolvm_engine::Error::new(
        smolvm_engine::ErrorKind::Network,
        format!("{whose} broke the connection"),
    )
    .because(error)
}

/// Clients whose datagrams are on their way.
type Clients = Arc<Mutex<HashMap<SocketAddr, mpsc::Sender<Vec<u8>>>>>;

/// Passes datagrams on for ever. Each client has a socket of its own in the guest, so that what the
/// program answers finds its way back.
async fn serve_datagrams(
    socket: UdpSocket,
    line: Line,
    guest: u16,
    room: Arc<Semaphore>,
    idle: Duration,
) {
    let socket = Arc::new(socket);
    let clients = Clients::default();
    let mut associations = JoinSet::new();
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
    loop {
        let (length, client) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            // A socket that leads nowhere hears of no failed answer, so this is the host's kernel.
            Err(error) => {
                tracing::error!(%error, "could not receive a datagram; the port is not served any more");
                return;
            }
        };
        while associations.try_join_next().is_some() {}
        let datagram = buffer[..length].to_vec();
        let mut known = clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(queue) = known.get(&client) {
            // Full: dropped.
            let _ = queue.try_send(datagram);
            continue;
        }
        let Ok(permit) = Arc::clone(&room).try_acquire_owned() else {
            continue;
        };
        let (queue, waiting) = mpsc::channel(DATAGRAMS_WAITING_MAX);
        let _ = queue.try_send(datagram);
        known.insert(client, queue);
        drop(known);
        let association = Association {
            clients: Clients::clone(&clients),
            client,
            _permit: permit,
        };
        let (line, socket) = (line.clone(), Arc::clone(&socket));
        associations.spawn(async move {
            if let Err(error) = association
                .carry(waiting, &socket, &line, guest, idle)
                .await
            {
                let error = smolvm_engine::in_one_line(&error);
                tracing::debug!(%client, guest, error, "datagrams of a client were lost");
            }
        });
    }
}

/// One client. Forgotten when this is dropped.
struct Association {
    clients: Clients,
    client: SocketAddr,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Association {
    fn drop(&mut self) {
        self.clients
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.client);
    }
}

impl Association {
    /// Carries a client's datagrams until there were none for a while.
    async fn carry(
        &self,
        mut waiting: mpsc::Receiver<Vec<u8>>,
        socket: &UdpSocket,
        line: &Line,
        guest: u16,
        idle: Duration,
    ) -> smolvm_engine::Result<()> {
        let session = line.session().await?;
        let mut guest: DatagramSocket = session.open_datagrams(Internet {
            host: "localhost".to_owned(),
            port: guest,
        })?;
        let input = guest.input();
        let mut end = Instant::now() + idle;
        loop {
            tokio::select! {
                // The queue's other end is in the table for as long as this runs.
                Some(datagram) = waiting.recv() => {
                    if !input.send(&datagram).await? {
                        return Ok(());
                    }
                }
                answer = timeout_at(end, guest.next()) => match answer {
                    // Lost if the client is not there any more, or its queue is full.
                    Ok(answer) => drop(socket.send_to(&answer?, self.client).await),
                    Err(_) => return Ok(()),
                },
            }
            end = Instant::now() + idle;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use smolvm_proto::message::{Event, Request};
    use smolvm_proto::socket::{Connected, Datagrams, DatagramsRequest};
    use smolvm_proto::{Decoder, Frame, Kind};
    use std::net::Ipv4Addr;

    /// The guest's end of the line.
    struct Guest {
        socket: tokio::net::UnixStream,
        decoder: Decoder,
    }

    impl Guest {
        async fn of(inbox: &mut mpsc::Receiver<Input>) -> Self {
            let Some(Input::Inside(socket)) = inbox.recv().await else {
                panic!("the line is not asked for");
            };
            socket.set_nonblocking(true).expect("a socket");
            Self {
                socket: tokio::net::UnixStream::from_std(socket).expect("a socket"),
                decoder: Decoder::new(),
            }
        }

        async fn frame(&mut self) -> Frame {
            loop {
                if let Some(frame) = self.decoder.next_frame().expect("a frame") {
                    return frame;
                }
                let mut buffer = [0; 4096];
                let count = self.socket.read(&mut buffer).await.expect("bytes");
                assert_ne!(count, 0, "the line ended");
                self.decoder.feed(&buffer[..count]);
            }
        }

        /// The number of the stream that is opened next; it is answered.
        async fn opened(&mut self) -> u32 {
            let frame = self.frame().await;
            let wanted = Request::Datagrams(DatagramsRequest {
                to: Internet {
                    host: "localhost".to_owned(),
                    port: 53,
                },
            });
            assert_eq!(frame.decode::<Request>().expect("a request"), wanted);
            let peer = "127.0.0.1:53".to_owned();
            let answer = Event::Connected(Connected { peer });
            let answer = Frame::message(frame.stream, Kind::Event, &answer);
            let sent = self.socket.write_all(&answer.to_bytes()).await;
            sent.expect("the keeper reads");
            frame.stream
        }

        async fn datagram(&mut self, stream: u32) -> Vec<u8> {
            let frame = self.frame().await;
            assert_eq!((frame.kind, frame.stream), (Kind::Data, stream));
            let mut datagrams = Datagrams::default();
            datagrams.feed(&frame.payload);
            datagrams.next_datagram().expect("whole").to_vec()
        }
    }

    /// A port that is served, with so much room, and the inbox of its keeper.
    async fn served(room: usize, idle: Duration) -> (SocketAddr, mpsc::Receiver<Input>) {
        let (sender, inbox) = mpsc::channel(8);
        let ports = Ports::new("box", sender, Vec::new());
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await;
        let socket = socket.expect("a free port");
        let address = socket.local_addr().expect("bound");
        let room = Arc::new(Semaphore::new(room));
        tokio::spawn(serve_datagrams(socket, ports.line.clone(), 53, room, idle));
        (address, inbox)
    }

    async fn client(to: SocketAddr) -> UdpSocket {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await;
        let socket = socket.expect("a free port");
        socket.connect(to).await.expect("a way");
        socket
    }

    #[tokio::test]
    async fn a_client_is_forgotten_when_it_is_idle_and_begins_anew() {
        let (address, mut inbox) = served(1, Duration::from_millis(1)).await;
        let client = client(address).await;
        client.send(b"one").await.expect("sent");
        let mut guest = Guest::of(&mut inbox).await;
        let first = guest.opened().await;
        // It may have been idle before it was served, and then the datagram is lost.
        loop {
            let frame = guest.frame().await;
            assert_eq!(frame.stream, first);
            if frame.kind == Kind::Reset {
                break;
            }
        }
        client.send(b"two").await.expect("sent");
        let second = guest.opened().await;
        assert_ne!(first, second);
    }

    #[tokio::test]
    async fn datagrams_of_more_clients_than_there_is_room_for_are_dropped() {
        let (address, mut inbox) = served(1, Duration::from_secs(3600)).await;
        let [first, second] = [client(address).await, client(address).await];
        first.send(b"one").await.expect("sent");
        let mut guest = Guest::of(&mut inbox).await;
        let stream = guest.opened().await;
        assert_eq!(guest.datagram(stream).await, b"one");
        second.send(b"lost").await.expect("sent");
        first.send(b"two").await.expect("sent");
        assert_eq!(guest.datagram(stream).await, b"two", "and nothing before");
    }
}

//! Connections to programs in the guest: one thread, one poll(2) loop, two directions.
//!
//! What the host can rely on, beyond the protocol's own words:
//!
//! - Each direction ends by itself, and as soon as it has: the end of what the program sends is
//!   passed on while it still reads.
//! - Input that the program does not take any more is dropped, and credit for it granted.
//! - A stream that the host resets resets the connection (RST, where there is such a thing), so that
//!   the program does not take half of it for the whole.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::addr::SocketAddrArg;
use rustix::net::{AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use smolvm_proto::Channel;
use smolvm_proto::message::{Event, Failure, FailureKind};
use smolvm_proto::socket::{ConnectRequest, Connected, Endpoint, Internet};

use crate::failure::{failure, from_errno, from_io};
use crate::port::{DATA_BYTES_MAX, Gone};
use crate::stream::{Last, Stop, Stream, timespec};

/// What every socket of ours is.
pub(crate) const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

/// Opens a connection and carries its bytes until both directions have ended.
pub(crate) fn connect(stream: &Stream, request: &ConnectRequest) -> Result<Last, Stop> {
    let limit = request.timeout_ms.map(Duration::from_millis);
    let (socket, peer) = match &request.to {
        Endpoint::Internet(to) => {
            let (socket, address) = connect_internet(stream, to, limit)?;
            (socket, address.to_string())
        }
        Endpoint::Local(path) => {
            let name = String::from_utf8_lossy(path).into_owned();
            let refused = |errno| from_errno(&format!("connecting to {name}"), errno);
            let address = local_address(path).map_err(refused)?;
            let socket = open(AddressFamily::UNIX, SocketType::STREAM).map_err(refused)?;
            finish_connect(stream, &socket, &address, limit)?.map_err(refused)?;
            (socket, name)
        }
    };
    relay(stream, socket, peer)
}

/// Says that the connection is open, and carries its bytes until both directions have ended.
pub(crate) fn relay(stream: &Stream, socket: OwnedFd, peer: String) -> Result<Last, Stop> {
    let mut relay = Relay {
        stream,
        socket,
        offset: 0,
        input_ended: false,
        output_ended: false,
        output_ready: true,
        unwritable: None,
        buffer: vec![0; DATA_BYTES_MAX],
    };
    let result = match stream.send_event(&Event::Connected(Connected { peer })) {
        Ok(()) => relay.serve(),
        Err(gone) => Err(gone.into()),
    };
    if result.is_err() {
        reset_on_close(&relay.socket);
    }
    result
}

/// Makes the close of a socket a reset, if its kind knows one: RST instead of FIN (socket(7),
/// `SO_LINGER` of zero).
pub(crate) fn reset_on_close(socket: &OwnedFd) {
    let _ = sockopt::set_socket_linger(socket, Some(Duration::ZERO));
}

/// A socket that is not bound or connected yet.
pub(crate) fn open(family: AddressFamily, kind: SocketType) -> rustix::io::Result<OwnedFd> {
    rustix::net::socket_with(family, kind, FLAGS, None)
}

/// The address of a Unix socket; a path that is not absolute is none.
pub(crate) fn local_address(path: &[u8]) -> rustix::io::Result<SocketAddrUnix> {
    if path.starts_with(b"/") {
        SocketAddrUnix::new(path)
    } else {
        Err(Errno::INVAL)
    }
}

/// What a host and port stand for: at least one address. Looking a name up waits for the guest's
/// own resolver, as resolv.conf(5) bounds it.
pub(crate) fn addresses(of: &Internet) -> Result<Vec<SocketAddr>, Failure> {
    if of.host == "localhost" {
        let both = [
            IpAddr::V4(Ipv4Addr::LOCALHOST),
            IpAddr::V6(Ipv6Addr::LOCALHOST),
        ];
        return Ok(both.map(|ip| SocketAddr::new(ip, of.port)).to_vec());
    }
    if let Ok(ip) = of.host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(ip, of.port)]);
    }
    let doing = || format!("looking up {}", of.host);
    let unknown = || {
        failure(
            FailureKind::NotFound,
            format!("{}: the guest knows no such host", doing()),
        )
    };
    let found: Vec<SocketAddr> = match (of.host.as_str(), of.port).to_socket_addrs() {
        Ok(found) => found.collect(),
        // What getaddrinfo(3) says has no error number, but where the system failed.
        Err(error) if error.raw_os_error().is_none() => return Err(unknown()),
        Err(error) => return Err(from_io(&doing(), &error)),
    };
    if found.is_empty() {
        Err(unknown())
    } else {
        Ok(found)
    }
}

/// Connects to the first address that answers. If none does, the first one's error is the reason.
fn connect_internet(
    stream: &Stream,
    to: &Internet,
    limit: Option<Duration>,
) -> Result<(OwnedFd, SocketAddr), Stop> {
    let mut first = None;
    for address in addresses(to)? {
        match connect_tcp(stream, &address, limit)? {
            Ok(socket) => return Ok((socket, address)),
            Err(errno) => {
                first.get_or_insert_with(|| from_errno(&format!("connecting to {address}"), errno));
            }
        }
    }
    match first {
        Some(why) => Err(why.into()),
        None => unreachable!("there is at least one address"),
    }
}

fn connect_tcp(
    stream: &Stream,
    address: &SocketAddr,
    limit: Option<Duration>,
) -> Result<rustix::io::Result<OwnedFd>, Stop> {
    let socket = match open(family(address), SocketType::STREAM) {
        Ok(socket) => socket,
        Err(errno) => return Ok(Err(errno)),
    };
    if let Err(errno) = finish_connect(stream, &socket, address, limit)? {
        return Ok(Err(errno));
    }
    // A port among those that the kernel gives to clients may be given to this very socket, which is
    // then connected to itself.
    if let (Ok(own), Ok(Some(peer))) = (
        rustix::net::getsockname(&socket),
        rustix::net::getpeername(&socket),
    ) && own == peer
    {
        return Ok(Err(Errno::CONNREFUSED));
    }
    no_delay(&socket);
    Ok(Ok(socket))
}

/// What is read here was sent whole already: waiting for more to send with it gains nothing.
pub(crate) fn no_delay(socket: &OwnedFd) {
    let _ = sockopt::set_tcp_nodelay(socket, true);
}

pub(crate) fn family(address: &SocketAddr) -> AddressFamily {
    match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    }
}

/// Connects a socket that does not block, and waits for it, unless the host gives the stream up.
fn finish_connect(
    stream: &Stream,
    socket: &OwnedFd,
    address: &impl SocketAddrArg,
    limit: Option<Duration>,
) -> Result<rustix::io::Result<()>, Gone> {
    match rustix::net::connect(socket, address) {
        Err(Errno::INPROGRESS | Errno::INTR) => {}
        done => return Ok(done),
    }
    let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let mut fds = [
            PollFd::from_borrowed_fd(stream.wake_fd(), PollFlags::IN),
            PollFd::new(socket, PollFlags::OUT),
        ];
        let _ = rustix::event::poll(&mut fds, left.map(timespec).as_ref());
        let [woken, done] = fds.map(|fd| !fd.revents().is_empty());
        if woken {
            stream.clear_wake();
            if stream.mailbox().reset {
                return Err(Gone);
            }
        }
        if done {
            return Ok(sockopt::socket_error(socket).flatten());
        }
        if left.is_some_and(|left| left.is_zero()) {
            return Ok(Err(Errno::TIMEDOUT));
        }
    }
}

/// A connection that is open.
struct Relay<'a> {
    stream: &'a Stream,
    socket: OwnedFd,
    /// Bytes of the first part of the mailbox's input that are written already.
    offset: usize,
    /// Whether the host has nothing more to say, and the socket is shut down for it.
    input_ended: bool,
    /// Whether the program has nothing more to say, and the host knows.
    output_ended: bool,
    /// Whether there may be something to read.
    output_ready: bool,
    /// Why the socket takes nothing more, if it does not.
    unwritable: Option<Errno>,
    buffer: Vec<u8>,
}

impl Relay<'_> {
    fn serve(&mut self) -> Result<Last, Stop> {
        loop {
            let mut mailbox = self.stream.mailbox();
            if mailbox.reset {
                return Err(Stop::Gone);
            }
            // None means anything here.
            mailbox.controls.clear();
            let credit = mailbox.credit(Channel::Output);
            drop(mailbox);
            let wants_room = self.feed()?;
            self.forward(credit)?;
            if self.output_ended {
                if let Some(errno) = self.unwritable {
                    return Err(broken(errno).into());
                }
                if self.input_ended {
                    return Ok(Last::done());
                }
            }
            self.wait(wants_room)?;
        }
    }

    /// Writes input as far as the socket takes it. Returns whether it should be waited for.
    fn feed(&mut self) -> Result<bool, Stop> {
        loop {
            let mut mailbox = self.stream.mailbox();
            let ended = mailbox.input_ended;
            let part = mailbox.input.pop_front();
            drop(mailbox);
            let Some(part) = part else {
                if ended && !self.input_ended {
                    self.input_ended = true;
                    if let Err(errno) = rustix::net::shutdown(&self.socket, Shutdown::Write) {
                        self.unwritable.get_or_insert(errno);
                    }
                }
                return Ok(false);
            };
            if self.unwritable.is_some() {
                self.stream.consumed(part.len() - self.offset)?;
                self.offset = 0;
                continue;
            }
            let back = |part| self.stream.mailbox().input.push_front(part);
            match rustix::io::write(&self.socket, &part[self.offset..]) {
                Ok(written) => {
                    self.offset += written;
                    if self.offset == part.len() {
                        self.offset = 0;
                    } else {
                        back(part);
                    }
                    self.stream.consumed(written)?;
                }
                Err(Errno::INTR) => back(part),
                Err(Errno::AGAIN) => {
                    back(part);
                    return Ok(true);
                }
                Err(errno) => {
                    back(part);
                    self.unwritable = Some(errno);
                }
            }
        }
    }

    /// Sends what the program sent, one frame for each turn, so that the mailbox is attended to.
    fn forward(&mut self, credit: usize) -> Result<(), Stop> {
        if self.output_ended || !self.output_ready || credit == 0 {
            return Ok(());
        }
        let room = self.buffer.len().min(credit);
        match rustix::io::read(&self.socket, &mut self.buffer[..room]) {
            Ok(0) => {
                self.output_ended = true;
                self.stream.send_end(Channel::Output)?;
            }
            Ok(length) => {
                self.stream
                    .send_data(Channel::Output, &self.buffer[..length])?;
                self.output_ready = length == room;
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => self.output_ready = false,
            Err(errno) => return Err(broken(errno).into()),
        }
        Ok(())
    }

    /// Waits until there is something to do.
    fn wait(&mut self, wants_room: bool) -> Result<(), Stop> {
        // Credit that came while the last frame was sent wakes nobody: it was not missing then.
        let credit = self.stream.mailbox().credit(Channel::Output);
        let reads = !self.output_ended && credit > 0;
        let mut interest = PollFlags::empty();
        if wants_room {
            interest |= PollFlags::OUT;
        }
        if reads {
            interest |= PollFlags::IN;
        }
        let mut fds = Vec::with_capacity(2);
        fds.push(PollFd::from_borrowed_fd(
            self.stream.wake_fd(),
            PollFlags::IN,
        ));
        // poll(2) tells of a broken connection whether asked or not, and would do so for ever while
        // nothing can be read for want of credit.
        if wants_room || reads || self.output_ended {
            fds.push(PollFd::new(&self.socket, interest));
        }
        let timeout = (reads && self.output_ready).then_some(timespec(Duration::ZERO));
        let _ = rustix::event::poll(&mut fds, timeout.as_ref());
        let woken = !fds[0].revents().is_empty();
        let events = fds.get(1).map_or(PollFlags::empty(), PollFd::revents);
        drop(fds);
        if woken {
            self.stream.clear_wake();
        }
        let over = events.intersects(PollFlags::ERR | PollFlags::HUP);
        if over && self.output_ended {
            if let Err(errno) = sockopt::socket_error(&self.socket).flatten() {
                return Err(broken(errno).into());
            }
            // The other end of a Unix socket is closed: there is nobody to hear more.
            self.input_ended = true;
        }
        if over && wants_room && !reads {
            // What waits to be written never will be.
            self.unwritable.get_or_insert(Errno::PIPE);
        }
        self.output_ready |= over || events.contains(PollFlags::IN);
        Ok(())
    }
}

fn broken(errno: Errno) -> Failure {
    from_errno("the connection broke", errno)
}

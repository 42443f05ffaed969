//! Connections to programs in the guest, and datagrams, over the channel that every sandbox has.

use std::os::unix::net::UnixStream;

use smolvm_proto::Channel;
use smolvm_proto::message::{Event, Request};
use smolvm_proto::socket::{
    ConnectRequest, Datagrams, DatagramsRequest, Endpoint, Internet, pack_datagram,
};

use crate::client::{Client, Heard, Stream, StreamInput};
use crate::error::Result;
use crate::session::Session;

/// A connection to a program in the guest. Dropping it before [`ConnectionEvent::Closed`] resets it.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    name: String,
}

/// What happens on a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConnectionEvent {
    /// It is open, to this address of all that a name stands for.
    Opened(String),
    /// The program sent this.
    Data(Vec<u8>),
    /// The program sends nothing more. It may still read.
    End,
    /// Both directions have ended. Nothing comes after it.
    Closed,
}

/// The sending half of a connection.
#[derive(Debug, Clone)]
pub struct ConnectionInput {
    input: StreamInput,
}

/// Datagrams to and from one port in the guest. Dropping it closes it.
#[derive(Debug)]
pub struct DatagramSocket {
    stream: Stream,
    arriving: Datagrams,
}

impl Session {
    /// Speaks over a socket that is connected to a keeper already. Must be called within a tokio
    /// runtime.
    pub fn over(name: &str, socket: UnixStream) -> Result<Self> {
        Ok(Self::of(name, Client::new(name, socket)?))
    }

    /// Begins a connection in the guest. That it is open, or was refused, is the first thing it says;
    /// what is sent before that arrives when it is open.
    pub fn open_connection(&self, to: Endpoint) -> Result<Connection> {
        let request = Request::Connect(ConnectRequest {
            to,
            timeout_ms: None,
        });
        Ok(Connection::of(self.name(), self.client.open(&request)?))
    }

    /// Opens a socket for datagrams in the guest.
    pub fn open_datagrams(&self, to: Internet) -> Result<DatagramSocket> {
        let request = Request::Datagrams(DatagramsRequest { to });
        Ok(DatagramSocket {
            stream: self.client.open(&request)?,
            arriving: Datagrams::default(),
        })
    }
}

impl Connection {
    pub(crate) fn of(name: &str, stream: Stream) -> Self {
        Self {
            stream,
            name: name.to_owned(),
        }
    }

    /// The sending half, which other tasks may use.
    #[must_use]
    pub fn input(&self) -> ConnectionInput {
        ConnectionInput {
            input: self.stream.input(),
        }
    }

    /// Waits for what happens next. A program that is not waited for is held up. Cancel-safe.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::GuestFailed`](crate::ErrorKind::GuestFailed) if nothing listens there, the
    /// program broke the connection, or the sandbox went away;
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) for a name the guest does not know.
    pub async fn next(&mut self) -> Result<ConnectionEvent> {
        loop {
            match self.stream.next().await? {
                Heard::Data(Channel::Output, bytes) => return Ok(ConnectionEvent::Data(bytes)),
                Heard::End(Channel::Output) => return Ok(ConnectionEvent::End),
                Heard::Event(Event::Connected(connected)) => {
                    return Ok(ConnectionEvent::Opened(connected.peer));
                }
                Heard::Event(Event::Done) => return Ok(ConnectionEvent::Closed),
                Heard::Event(other) => {
                    return Err(crate::session::confused(&self.name, &other));
                }
                Heard::Data(..) | Heard::End(_) => {}
            }
        }
    }
}

impl ConnectionInput {
    /// Sends bytes, waiting while the program does not take them. Says whether there still is a
    /// connection.
    pub async fn write(&self, bytes: &[u8]) -> Result<bool> {
        self.input.write(bytes).await
    }

    /// Says that no more bytes will come. The program may still answer.
    pub fn end(&self) -> Result<()> {
        self.input.close()
    }
}

impl DatagramSocket {
    /// The sending half, which other tasks may use.
    #[must_use]
    pub fn input(&self) -> DatagramInput {
        DatagramInput {
            input: self.stream.input(),
        }
    }

    /// Waits for the next datagram. Cancel-safe.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::GuestFailed`](crate::ErrorKind::GuestFailed) if the sandbox went away.
    pub async fn next(&mut self) -> Result<Vec<u8>> {
        loop {
            if let Some(datagram) = self.arriving.next_datagram() {
                return Ok(datagram.to_vec());
            }
            if let Heard::Data(Channel::Output, bytes) = self.stream.next().await? {
                self.arriving.feed(&bytes);
            }
        }
    }
}

/// The sending half of a socket for datagrams.
#[derive(Debug, Clone)]
pub struct DatagramInput {
    input: StreamInput,
}

impl DatagramInput {
    /// Sends a datagram of at most [`DATAGRAM_BYTES_MAX`](smolvm_proto::limits::DATAGRAM_BYTES_MAX)
    /// bytes, waiting while the guest takes none. Says whether there still is a socket.
    pub async fn send(&self, datagram: &[u8]) -> Result<bool> {
        let mut packed = Vec::with_capacity(datagram.len() + 2);
        pack_datagram(datagram, &mut packed);
        self.input.write(&packed).await
    }
}

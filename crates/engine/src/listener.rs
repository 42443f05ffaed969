//! Listening in the guest, for programs there to reach something outside.

use smolvm_proto::message::{Event, Request};
use smolvm_proto::socket::{AcceptRequest, Accepted, Endpoint, ListenRequest};

use crate::client::{Heard, Stream};
use crate::connection::Connection;
use crate::error::Result;
use crate::session::Session;

/// A port of the guest at which its agent listens. Dropping it closes the port; connections that were
/// taken up go on.
#[derive(Debug)]
pub struct GuestListener {
    stream: Stream,
    name: String,
    port: u16,
}

impl Session {
    /// Listens in the guest. Returns when it does.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`](crate::ErrorKind::Busy) if something else listens there;
    /// [`ErrorKind::GuestFailed`](crate::ErrorKind::GuestFailed) for what else the guest refuses.
    pub async fn listen(&self, on: Endpoint) -> Result<GuestListener> {
        let request = Request::Listen(ListenRequest { on, owner: None });
        let mut stream = self.client.open(&request)?;
        match stream.next().await? {
            Heard::Event(Event::Listening(listening)) => Ok(GuestListener {
                stream,
                name: self.name().to_owned(),
                port: listening.port,
            }),
            other => Err(self.confused(&other)),
        }
    }

    /// Takes up a connection that [`GuestListener::next`] told of, once.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::GuestFailed`](crate::ErrorKind::GuestFailed) if the sandbox went away.
    pub fn take_up(&self, connection: u64) -> Result<Connection> {
        let request = Request::Accept(AcceptRequest { connection });
        Ok(Connection::of(self.name(), self.client.open(&request)?))
    }
}

impl GuestListener {
    /// The port, which the guest chose where 0 was asked for.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Waits for a connection, which then waits in the guest to be taken up. Cancel-safe.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::GuestFailed`](crate::ErrorKind::GuestFailed) if it listens no more.
    pub async fn next(&mut self) -> Result<Accepted> {
        loop {
            match self.stream.next().await? {
                Heard::Event(Event::Accepted(accepted)) => return Ok(accepted),
                Heard::Event(other) => return Err(crate::session::confused(&self.name, &other)),
                Heard::Data(..) | Heard::End(_) => {}
            }
        }
    }
}

//! The way to the guest's agent.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream};

use tokio::io::unix::AsyncFd;
use tokio::net::UnixListener;

use crate::sys;

/// The byte stream to the guest's agent, or where it will come from.
#[derive(Debug)]
pub enum Channel {
    /// The stream is there as long as the machine; `None` once it was taken.
    Stream(Option<StdUnixStream>),
    /// The guest opens a stream when it is ready, and another one when it has lost that: a machine's
    /// snapshot takes it away from the guest, and from the guests of copies.
    Door(Door),
}

impl Channel {
    /// Waits until the agent has a stream with this end, and returns that, in blocking mode. May be
    /// dropped without loss.
    ///
    /// Must be called within a tokio runtime that has I/O enabled.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::UnexpectedEof`] if there will never be one: the machine has ended, or its only
    /// stream was taken before. Those of accept(2).
    pub async fn open(&mut self) -> io::Result<StdUnixStream> {
        match self {
            Channel::Stream(stream) => stream.take().ok_or_else(over),
            Channel::Door(door) => door.wait().await,
        }
    }

    /// Whether the guest may come again after its stream has ended.
    #[must_use]
    pub fn is_door(&self) -> bool {
        matches!(self, Channel::Door(_))
    }
}

impl From<StdUnixStream> for Channel {
    fn from(stream: StdUnixStream) -> Self {
        Channel::Stream(Some(stream))
    }
}

/// Where a guest's agent comes in.
#[derive(Debug)]
pub struct Door {
    listener: UnixListener,
    /// Readable once the machine's process has ended: pidfd_open(2).
    ended: AsyncFd<OwnedFd>,
}

impl Door {
    /// A door that a guest comes through at `listener`, for as long as the process of the pidfd `ended`
    /// lives.
    pub(crate) fn new(listener: StdUnixListener, ended: OwnedFd) -> io::Result<Door> {
        listener.set_nonblocking(true)?;
        Ok(Door {
            listener: UnixListener::from_std(listener)?,
            ended: sys::watch_readable(ended)?,
        })
    }

    async fn wait(&self) -> io::Result<StdUnixStream> {
        tokio::select! {
            biased;
            ended = self.ended.readable() => {
                // Left as it is: the process stays ended.
                drop(ended?);
                Err(over())
            }
            accepted = self.listener.accept() => {
                let stream = accepted?.0.into_std()?;
                stream.set_nonblocking(false)?;
                Ok(stream)
            }
        }
    }
}

fn over() -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "the way to the guest has ended",
    )
}

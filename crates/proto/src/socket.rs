//! Sockets in the guest: what reaches a program there, and what a program there reaches.
//!
//! A connection is a stream. Its bytes go towards the guest on [`crate::Channel::Input`] and come
//! from it on [`crate::Channel::Output`], under credit, and each direction ends by itself: the end
//! of [`crate::Channel::Input`] shuts the socket down for writing, and when the program in the guest
//! has shut down its side, [`crate::Channel::Output`] ends. [`crate::Event::Done`] comes after
//! both. A host that resets the stream resets the connection, and a connection that breaks in the
//! guest is [`crate::Event::Failed`], after which a host resets its own side.
//!
//! Only a host opens streams. So a connection that a listener in the guest accepted is announced
//! ([`Accepted`]) and waits there until the host takes it up ([`AcceptRequest`]).
//!
//! Datagrams have no ends and no errors. They are packed into the same byte streams, each behind its
//! length: [`pack_datagram`], [`Datagrams`].

use minicbor::bytes::ByteVec;
use minicbor::{Decode, Encode};

use crate::limits::DATAGRAM_BYTES_MAX;

/// Where a socket of the guest is, or leads.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Endpoint {
    /// A port of an internet address.
    #[n(0)]
    Internet(#[n(0)] Internet),
    /// Absolute path of a Unix socket in the guest (unix(7): at most 107 bytes).
    #[n(1)]
    Local(#[n(0)] ByteVec),
}

impl Endpoint {
    /// A port of the guest itself, on whichever of its loopback addresses a program listens.
    #[must_use]
    pub fn localhost(port: u16) -> Self {
        Self::Internet(Internet {
            host: "localhost".to_owned(),
            port,
        })
    }
}

/// A port of an internet address.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Internet {
    /// An address of either family, or a name, which is looked up in the guest. `localhost` is
    /// 127.0.0.1, or ::1 if nothing answers there, whatever the guest's files say. To listen,
    /// empty means every address.
    #[n(0)]
    pub host: String,
    /// The port. To listen, 0 means one that is free.
    #[n(1)]
    pub port: u16,
}

/// A connection to open in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ConnectRequest {
    /// Where to.
    #[n(0)]
    pub to: Endpoint,
    /// Milliseconds each address has to answer; as long as the guest's kernel waits if absent.
    #[n(1)]
    pub timeout_ms: Option<u64>,
}

/// A listener to open in the guest. It closes when the host ends the stream's input, answered by
/// [`crate::Event::Done`], or resets the stream; what was taken up of it goes on.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ListenRequest {
    /// Where. A Unix socket must not exist; it is made with mode 0600, and removed at the end.
    #[n(0)]
    pub on: Endpoint,
    /// Owner of a Unix socket, as in [`crate::message::ExecRequest::user`]; root if absent.
    #[n(1)]
    pub owner: Option<String>,
}

/// A connection to take up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct AcceptRequest {
    /// The number by which it was announced. It can be taken up once.
    #[n(0)]
    pub connection: u64,
}

/// A socket for datagrams to open in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct DatagramsRequest {
    /// Where every datagram goes and every answer comes from.
    #[n(0)]
    pub to: Internet,
}

/// A connection, or a socket for datagrams, that is open.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Connected {
    /// What was reached, of all that a name stands for: `127.0.0.1:80`, or a path.
    #[n(0)]
    pub peer: String,
}

/// A listener that listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Listening {
    /// The port; 0 for a Unix socket.
    #[n(0)]
    pub port: u16,
}

/// A connection that waits to be taken up.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Accepted {
    /// Its number, of no other connection of this guest.
    #[n(0)]
    pub connection: u64,
    /// Who connected; absent for a Unix socket.
    #[n(1)]
    pub peer: Option<Internet>,
}

/// Appends a datagram to `out`: its length in two bytes, little-endian, and the datagram.
///
/// # Panics
///
/// If it is longer than [`DATAGRAM_BYTES_MAX`].
pub fn pack_datagram(datagram: &[u8], out: &mut Vec<u8>) {
    assert!(
        datagram.len() <= DATAGRAM_BYTES_MAX,
        "longer than a datagram"
    );
    let Ok(length) = u16::try_from(datagram.len()) else {
        unreachable!("at most DATAGRAM_BYTES_MAX")
    };
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(datagram);
}

/// Finds datagrams in a byte stream, however the bytes arrive. Holds one that is not whole yet.
#[derive(Debug, Default)]
pub struct Datagrams {
    bytes: Vec<u8>,
    start: usize,
}

impl Datagrams {
    /// Adds bytes that arrived.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.start);
        self.start = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// Takes the next datagram, if all of it is here.
    pub fn next_datagram(&mut self) -> Option<&[u8]> {
        let waiting = self.bytes.get(self.start..)?;
        let length = usize::from(u16::from_le_bytes(*waiting.first_chunk::<2>()?));
        let end = self.start + 2 + length;
        let datagram = self.bytes.get(self.start + 2..end)?;
        self.start = end;
        Some(datagram)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn datagrams_survive_any_cutting(
            datagrams in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..8),
            step in 1usize..400,
        ) {
            let mut wire = Vec::new();
            for datagram in &datagrams {
                pack_datagram(datagram, &mut wire);
            }
            let mut reader = Datagrams::default();
            let mut seen = Vec::new();
            for part in wire.chunks(step) {
                reader.feed(part);
                while let Some(datagram) = reader.next_datagram() {
                    seen.push(datagram.to_vec());
                }
            }
            prop_assert_eq!(seen, datagrams);
        }
    }

    #[test]
    fn the_longest_datagram_fits() {
        let mut wire = Vec::new();
        pack_datagram(&[7; DATAGRAM_BYTES_MAX], &mut wire);
        let mut reader = Datagrams::default();
        reader.feed(&wire);
        assert_eq!(
            reader.next_datagram().map(<[u8]>::len),
            Some(DATAGRAM_BYTES_MAX)
        );
        assert_eq!(reader.next_datagram(), None);
    }
}

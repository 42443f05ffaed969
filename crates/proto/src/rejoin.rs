//! Joining a guest that runs already: the copy of a machine that was saved while it served.
//!
//! The agent in the copy does not know that it is one. It may be in the middle of a frame whose first
//! bytes went to another host, with more frames behind it. So the new host
//!
//! 1. says [`Hello`] with a nonce that nobody could guess, as its first frame;
//! 2. drops every byte that arrives, until it finds a whole Hello that repeats the nonce ([`Rejoin`]);
//! 3. goes on as after a boot. No stream is open then, and every stream number may be used.
//!
//! The agent finishes the frame it is writing, gives up all streams, and answers. Whatever it says
//! after that belongs to the new host.
//!
//! The other direction cannot be mended afterwards: a saved agent that has read half a frame takes the
//! next host's Hello for the other half. So **a host saves a machine only when the guest has read every
//! frame that was sent to it, and none is half sent**. To get there, it sends
//! [`Request::Ping`](crate::Request::Ping), holds everything back that would follow, and saves when
//! the answer is there. The agent reads frames in their order, so the answer says that all are read.

use crate::frame::{Channel, Decoder, Frame, Header, Kind};
use crate::limits::{HEADER_BYTES, HELLO_BYTES_MAX};
use crate::version::{Hello, Nonce};

/// Finds the Hello that answers ours, among bytes that were meant for another host.
///
/// Holds at most one Hello's bytes. What only looks like one is passed over, whatever its bytes are:
/// the nonce is not in them, because they were written before anybody knew it.
#[derive(Debug)]
pub struct Rejoin {
    nonce: Nonce,
    unread: Vec<u8>,
}

/// What begins at a place in the stream.
enum Found {
    Nothing,
    /// A frame that may be the one, if only more of it were here.
    Perhaps,
    Answer(Frame),
}

impl Rejoin {
    /// Waits for the answer to a Hello with this nonce.
    #[must_use]
    pub fn new(nonce: Nonce) -> Self {
        Self {
            nonce,
            unread: Vec::new(),
        }
    }

    /// Takes bytes that arrived. When the answer is among them, returns it, with a decoder that
    /// begins behind it; this value has nothing more to do then.
    #[must_use]
    pub fn feed(&mut self, bytes: &[u8]) -> Option<(Frame, Decoder)> {
        self.unread.extend_from_slice(bytes);
        let mut keep = None;
        for at in 0..self.unread.len() {
            match self.look(&self.unread[at..]) {
                Found::Nothing => {}
                Found::Perhaps => {
                    keep.get_or_insert(at);
                }
                Found::Answer(frame) => {
                    let end = at + HEADER_BYTES + frame.payload.len();
                    let mut decoder = Decoder::new();
                    decoder.feed(&self.unread[end..]);
                    self.unread.clear();
                    return Some((frame, decoder));
                }
            }
        }
        let done = keep.unwrap_or(self.unread.len());
        self.unread.drain(..done);
        None
    }

    fn look(&self, bytes: &[u8]) -> Found {
        let Some(head) = bytes.first_chunk::<HEADER_BYTES>() else {
            return Found::Perhaps;
        };
        let Ok(Header {
            length,
            stream: 0,
            kind: Kind::Hello,
            channel: Channel::Input,
        }) = Header::from_bytes(*head)
        else {
            return Found::Nothing;
        };
        let length = length as usize;
        if length > HELLO_BYTES_MAX {
            return Found::Nothing;
        }
        let Some(payload) = bytes.get(HEADER_BYTES..HEADER_BYTES + length) else {
            return Found::Perhaps;
        };
        let frame = Frame::new(0, Kind::Hello, Channel::Input, payload.to_vec());
        match frame.decode::<Hello>() {
            Ok(hello) if hello.nonce == Some(self.nonce) => Found::Answer(frame),
            _ => Found::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn nonce() -> Nonce {
        Nonce::from(*b"0123456789abcdef")
    }

    fn hello(nonce: Option<Nonce>) -> Vec<u8> {
        let hello = Hello {
            nonce,
            ..Hello::of_host(self::nonce(), true)
        };
        Frame::message(0, Kind::Hello, &hello).to_bytes()
    }

    /// What may stand before the answer: the rest of a frame, whole frames, Hellos to others.
    fn before() -> impl Strategy<Value = Vec<u8>> {
        let part = prop_oneof![
            prop::collection::vec(any::<u8>(), 0..300),
            Just(vec![0; 40]),
            Just(hello(None)),
            Just(hello(Some([7; 16].into()))),
            // The first bytes of the real one, cut off.
            (0..hello(None).len()).prop_map(|length| hello(Some(nonce()))[..length].to_vec()),
            // A header that promises more than ever comes.
            (0..2000u32).prop_map(|length| {
                let mut bytes = hello(None)[..HEADER_BYTES].to_vec();
                bytes[..4].copy_from_slice(&length.to_le_bytes());
                bytes
            }),
        ];
        prop::collection::vec(part, 0..6).prop_map(|parts| parts.concat())
    }

    proptest! {
        #[test]
        fn the_answer_is_found_behind_anything_and_what_follows_is_kept(
            before in before(),
            cuts in prop::collection::vec(1usize..200, 1..20),
        ) {
            let after = Frame::bare(3, Kind::Eof, Channel::Output);
            let wire = [before, hello(Some(nonce())), after.to_bytes()].concat();
            let mut rejoin = Rejoin::new(nonce());
            let mut found: Option<(Frame, Decoder)> = None;
            let mut rest = wire.as_slice();
            let mut cuts = cuts.into_iter().cycle();
            while !rest.is_empty() {
                let (now, later) = rest.split_at(cuts.next().expect("endless").min(rest.len()));
                match &mut found {
                    Some((_, decoder)) => decoder.feed(now),
                    None => found = rejoin.feed(now),
                }
                prop_assert!(rejoin.unread.len() < HEADER_BYTES + HELLO_BYTES_MAX);
                rest = later;
            }
            let (frame, mut decoder) = found.expect("the answer is there");
            prop_assert_eq!(frame.to_bytes(), hello(Some(nonce())));
            prop_assert_eq!(decoder.next_frame(), Ok(Some(after)));
            prop_assert_eq!(decoder.pending(), 0);
        }
    }

    #[test]
    fn a_hello_to_somebody_else_is_no_answer() {
        let mut rejoin = Rejoin::new(nonce());
        for other in [None, Some([0; 16].into())] {
            assert!(rejoin.feed(&hello(other)).is_none());
        }
        assert!(rejoin.feed(&hello(Some(nonce()))).is_some());
    }
}

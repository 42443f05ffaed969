//! Length-prefixed frames: what is on the wire between any two parties of SmolVM.
//!
//! A frame is a header of [`HEADER_BYTES`] bytes and a payload. All numbers are little-endian:
//!
//! | bytes | field |
//! |---|---|
//! | 0..4 | payload length in bytes, at most [`PAYLOAD_BYTES_MAX`] |
//! | 4..8 | stream number; 0 belongs to the connection itself |
//! | 8 | kind |
//! | 9 | channel |
//! | 10..12 | zero |

use crate::limits::{HEADER_BYTES, PAYLOAD_BYTES_MAX};

/// What a frame is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// First frame of each side on stream 0: [`crate::version::Hello`].
    Hello = 1,
    /// Opens a stream towards the guest: [`crate::message::Request`].
    Open = 2,
    /// From the guest: [`crate::message::Event`].
    Event = 3,
    /// Bytes of one channel.
    Data = 4,
    /// No more bytes on this channel. Empty payload.
    Eof = 5,
    /// The receiver grants this many more bytes on a channel: four bytes, little-endian.
    Credit = 6,
    /// Towards the guest, about a stream that is open: [`crate::message::Control`].
    Control = 7,
    /// The sender has given the stream up. Empty payload.
    Reset = 8,
    /// Opens a stream that the keeper answers itself: [`crate::keeper::KeeperRequest`].
    KeeperOpen = 9,
    /// From the keeper: [`crate::keeper::KeeperEvent`].
    KeeperEvent = 10,
}

impl Kind {
    fn from_wire(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Hello,
            2 => Self::Open,
            3 => Self::Event,
            4 => Self::Data,
            5 => Self::Eof,
            6 => Self::Credit,
            7 => Self::Control,
            8 => Self::Reset,
            9 => Self::KeeperOpen,
            10 => Self::KeeperEvent,
            _ => return None,
        })
    }
}

/// Which of a stream's byte flows a frame belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Channel {
    /// Towards the guest: standard input, or the tar stream of an upload.
    Input = 0,
    /// From the guest: standard output, a terminal's output, or the tar stream of a download.
    Output = 1,
    /// From the guest: standard error.
    Error = 2,
}

impl Channel {
    fn from_wire(byte: u8) -> Option<Self> {
        Some(match byte {
            0 => Self::Input,
            1 => Self::Output,
            2 => Self::Error,
            _ => return None,
        })
    }
}

/// The fixed part of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Bytes of payload that follow.
    pub length: u32,
    /// Stream the frame belongs to.
    pub stream: u32,
    /// What the frame is for.
    pub kind: Kind,
    /// Byte flow the frame belongs to; [`Channel::Input`] where the kind has none.
    pub channel: Channel,
}

impl Header {
    /// The header's bytes on the wire.
    #[must_use]
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[0..4].copy_from_slice(&self.length.to_le_bytes());
        out[4..8].copy_from_slice(&self.stream.to_le_bytes());
        out[8] = self.kind as u8;
        out[9] = self.channel as u8;
        out
    }

    /// Reads a header.
    ///
    /// # Errors
    ///
    /// [`FrameError`] if the length is over the limit, or a field has a value this version does
    /// not know. The stream cannot be resynchronised after that: close it.
    pub fn from_bytes(bytes: [u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let length = word(0);
        if length as usize > PAYLOAD_BYTES_MAX {
            return Err(FrameError::TooLong(length));
        }
        if bytes[10] != 0 || bytes[11] != 0 {
            return Err(FrameError::Reserved);
        }
        Ok(Self {
            length,
            stream: word(4),
            kind: Kind::from_wire(bytes[8]).ok_or(FrameError::UnknownKind(bytes[8]))?,
            channel: Channel::from_wire(bytes[9]).ok_or(FrameError::UnknownChannel(bytes[9]))?,
        })
    }
}

/// Why bytes are not a frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The announced payload is over [`PAYLOAD_BYTES_MAX`].
    #[error("frame of {0} bytes is over the limit of {PAYLOAD_BYTES_MAX}")]
    TooLong(u32),
    /// A kind this version does not know.
    #[error("unknown frame kind {0}")]
    UnknownKind(u8),
    /// A channel this version does not know.
    #[error("unknown channel {0}")]
    UnknownChannel(u8),
    /// The reserved bytes are not zero.
    #[error("reserved header bytes are not zero")]
    Reserved,
    /// The payload is not the message its kind promises.
    #[error("payload of a {kind:?} frame is malformed: {reason}")]
    Payload {
        /// Kind of the frame.
        kind: Kind,
        /// What the decoder said.
        reason: String,
    },
}

/// One whole frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Stream the frame belongs to.
    pub stream: u32,
    /// What the frame is for.
    pub kind: Kind,
    /// Byte flow the frame belongs to.
    pub channel: Channel,
    /// The payload.
    pub payload: Vec<u8>,
}

impl Frame {
    /// A frame that carries bytes.
    ///
    /// # Panics
    ///
    /// If `payload` is over [`PAYLOAD_BYTES_MAX`]; the caller splits.
    #[must_use]
    pub fn new(stream: u32, kind: Kind, channel: Channel, payload: Vec<u8>) -> Self {
        assert!(payload.len() <= PAYLOAD_BYTES_MAX, "payload over the limit");
        Self {
            stream,
            kind,
            channel,
            payload,
        }
    }

    /// A frame that carries a message.
    ///
    /// # Panics
    ///
    /// If the message encodes to more than [`PAYLOAD_BYTES_MAX`] bytes. Every message type has its
    /// parts bounded where it is built ([`crate::limits`]).
    #[must_use]
    pub fn message<M: minicbor::Encode<()>>(stream: u32, kind: Kind, message: &M) -> Self {
        let Ok(payload) = minicbor::to_vec(message) else {
            unreachable!("writing to memory does not fail")
        };
        Self::new(stream, kind, Channel::Input, payload)
    }

    /// Grants `bytes` more on `channel`.
    #[must_use]
    pub fn credit(stream: u32, channel: Channel, bytes: u32) -> Self {
        Self::new(stream, Kind::Credit, channel, bytes.to_le_bytes().to_vec())
    }

    /// A frame with no payload.
    #[must_use]
    pub fn bare(stream: u32, kind: Kind, channel: Channel) -> Self {
        Self::new(stream, kind, channel, Vec::new())
    }

    /// Reads the payload as a message.
    ///
    /// # Errors
    ///
    /// [`FrameError::Payload`] if it is not one.
    pub fn decode<'b, M: minicbor::Decode<'b, ()>>(&'b self) -> Result<M, FrameError> {
        minicbor::decode(&self.payload).map_err(|error| FrameError::Payload {
            kind: self.kind,
            reason: error.to_string(),
        })
    }

    /// Reads the payload as a grant of credit, in bytes.
    ///
    /// # Errors
    ///
    /// [`FrameError::Payload`] if it is not four bytes long.
    pub fn credit_bytes(&self) -> Result<u32, FrameError> {
        <[u8; 4]>::try_from(self.payload.as_slice())
            .map(u32::from_le_bytes)
            .map_err(|_| FrameError::Payload {
                kind: self.kind,
                reason: "a grant is four bytes".to_owned(),
            })
    }

    /// The header that goes before the payload.
    #[must_use]
    pub fn header(&self) -> Header {
        let Ok(length) = u32::try_from(self.payload.len()) else {
            unreachable!("bounded by PAYLOAD_BYTES_MAX")
        };
        Header {
            length,
            stream: self.stream,
            kind: self.kind,
            channel: self.channel,
        }
    }

    /// Appends the whole frame to `out`.
    pub fn write_to(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.header().to_bytes());
        out.extend_from_slice(&self.payload);
    }

    /// The whole frame.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_BYTES + self.payload.len());
        self.write_to(&mut out);
        out
    }
}

/// Cuts a byte stream into frames, however the bytes arrive.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    start: usize,
}

impl Decoder {
    /// An empty decoder.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes that arrived.
    pub fn feed(&mut self, bytes: &[u8]) {
        if self.start == self.buffer.len() {
            self.buffer.clear();
            self.start = 0;
        } else if self.start > PAYLOAD_BYTES_MAX {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// Takes the next whole frame, or `None` if more bytes are needed.
    ///
    /// # Errors
    ///
    /// [`FrameError`] if the bytes are not a frame; the stream is then lost.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let waiting = &self.buffer[self.start..];
        let Some(head) = waiting.first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let header = Header::from_bytes(*head)?;
        let end = HEADER_BYTES + header.length as usize;
        let Some(payload) = waiting.get(HEADER_BYTES..end) else {
            return Ok(None);
        };
        let frame = Frame {
            stream: header.stream,
            kind: header.kind,
            channel: header.channel,
            payload: payload.to_vec(),
        };
        self.start += end;
        Ok(Some(frame))
    }

    /// Bytes that arrived and are not yet part of a frame taken.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.buffer.len() - self.start
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn kinds() -> impl Strategy<Value = Kind> {
        (1u8..=10).prop_map(|byte| Kind::from_wire(byte).expect("in range"))
    }

    fn channels() -> impl Strategy<Value = Channel> {
        (0u8..=2).prop_map(|byte| Channel::from_wire(byte).expect("in range"))
    }

    proptest! {
        #[test]
        fn frames_survive_any_cutting(
            frames in prop::collection::vec(
                (any::<u32>(), kinds(), channels(), prop::collection::vec(any::<u8>(), 0..2000)),
                1..8,
            ),
            cuts in prop::collection::vec(1usize..700, 1..40),
        ) {
            let frames: Vec<Frame> = frames
                .into_iter()
                .map(|(stream, kind, channel, payload)| Frame { stream, kind, channel, payload })
                .collect();
            let mut wire = Vec::new();
            for frame in &frames {
                frame.write_to(&mut wire);
            }
            let mut decoder = Decoder::new();
            let mut seen = Vec::new();
            let mut rest = wire.as_slice();
            let mut cuts = cuts.into_iter().cycle();
            while !rest.is_empty() {
                let cut = cuts.next().expect("endless").min(rest.len());
                decoder.feed(&rest[..cut]);
                rest = &rest[cut..];
                while let Some(frame) = decoder.next_frame().expect("well formed") {
                    seen.push(frame);
                }
            }
            prop_assert_eq!(seen, frames);
            prop_assert_eq!(decoder.pending(), 0);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut decoder = Decoder::new();
            decoder.feed(&bytes);
            while let Ok(Some(frame)) = decoder.next_frame() {
                let _ = frame.decode::<crate::message::Request>();
                let _ = frame.decode::<crate::message::Event>();
            }
        }
    }

    #[test]
    fn a_frame_over_the_limit_is_refused_before_its_payload_arrives() {
        let mut head = Header {
            length: 0,
            stream: 1,
            kind: Kind::Data,
            channel: Channel::Output,
        }
        .to_bytes();
        head[0..4].copy_from_slice(&u32::MAX.to_le_bytes());
        let mut decoder = Decoder::new();
        decoder.feed(&head);
        assert_eq!(decoder.next_frame(), Err(FrameError::TooLong(u32::MAX)));
    }
}

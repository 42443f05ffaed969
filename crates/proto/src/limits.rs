//! Every maximum of the protocol, with its unit and its reason.

/// Bytes of a frame's header on the wire.
pub const HEADER_BYTES: usize = 12;

/// Most bytes of payload in one frame.
///
/// Large enough that a bulk stream spends little on headers, small enough that another stream's
/// first byte waits behind at most one of them. It is also what one pipe holds by default (pipe(7)).
pub const PAYLOAD_BYTES_MAX: usize = 64 * 1024;

/// Bytes either side may send on one channel of a stream before the receiver grants more.
///
/// It bounds what a stalled reader can make anyone hold: this much for each channel of each stream.
pub const WINDOW_BYTES: u32 = 256 * 1024;

/// Streams that may be open at one time on one connection to a guest.
pub const STREAMS_MAX: usize = 1024;

/// Bytes of one datagram: what UDP carries over IPv4, which is 65535 less both headers (RFC 768).
pub const DATAGRAM_BYTES_MAX: usize = 65_507;

/// Connections of one listener in the guest that may wait to be taken up. While so many do, it
/// accepts no more, and the guest's kernel holds the next ones.
pub const ACCEPTED_MAX: usize = 64;

/// Bytes of [`crate::version::Hello::nonce`]: 128 random bits, which nobody guesses and no two hosts
/// choose alike.
pub const NONCE_BYTES: usize = 16;

/// Bytes of payload in a Hello. Its longest part is the kernel's release, at most 64 bytes (uname(2)).
///
/// A host that looks for one among bytes it cannot read holds this much and no more.
pub const HELLO_BYTES_MAX: usize = 1024;

/// Directory entries in one [`crate::message::Event::Entries`].
pub const ENTRIES_MAX: usize = 128;

/// Bytes of a command with its arguments and environment.
///
/// An encoded request has to fit one frame with room to spare.
pub const COMMAND_BYTES_MAX: usize = 48 * 1024;

const _: () = assert!(
    COMMAND_BYTES_MAX < PAYLOAD_BYTES_MAX,
    "a command fits one frame"
);
const _: () = assert!(
    DATAGRAM_BYTES_MAX + 2 <= WINDOW_BYTES as usize / 2,
    "a receiver that took everything has granted enough for the longest datagram"
);
const _: () = assert!(
    PAYLOAD_BYTES_MAX as u64 <= WINDOW_BYTES as u64,
    "a full frame fits a fresh window"
);

//! The bytes between a SmolVM host and the agent in its guest.
//!
//! One byte stream joins a virtual machine to its host. This crate turns that stream into frames
//! ([`frame`]), frames into requests and events ([`message`]), and keeps the flow-control
//! arithmetic both ends share ([`flow`]). It does no I/O, starts no thread and knows no clock, so
//! every rule in it is tested in microseconds.
//!
//! The same frames travel on the Unix socket between a client and a sandbox's keeper; the keeper
//! passes frames of the guest through with nothing changed but the stream number, and answers the
//! ones in [`keeper`] itself.
//!
//! # A stream's life
//!
//! The host opens a stream with a number it has not used before ([`frame::Kind::Open`], carrying
//! a [`message::Request`]). Data flows in both directions under credit. The guest sends any number
//! of [`message::Event`]s; one for which [`message::Event::is_terminal`] holds is the last frame of
//! that stream. The host may send [`frame::Kind::Reset`] at any time to say that nobody waits any
//! more; the guest then stops the work and frees the stream without a further word.
//!
//! A machine that was saved and is restored goes on in the middle of a conversation with a host that
//! is not there. How the next host takes it up is told in [`rejoin`].

pub mod flow;
pub mod frame;
pub mod keeper;
pub mod limits;
pub mod message;
pub mod rejoin;
pub mod socket;
pub mod version;

pub use frame::{Channel, Decoder, Frame, FrameError, Header, Kind};
pub use message::{Event, Request};
pub use rejoin::Rejoin;

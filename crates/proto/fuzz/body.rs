//! What a fuzzer does with the wire: one function that takes any bytes and panics on a defect.
//!
//! The test `fuzz` of this crate runs it over the corpus and a bounded number of mutations;
//! `cargo xtask fuzz` makes that test go on for as long as it is told to. A fuzzer guided by coverage
//! calls [`wire`] as its target.

use std::fmt::Debug;

use minicbor::{Decode, Encode};
use smolvm_proto::flow::{ReceiveWindow, SendWindow};
use smolvm_proto::keeper::{KeeperEvent, KeeperRequest};
use smolvm_proto::limits::{HEADER_BYTES, NONCE_BYTES, PAYLOAD_BYTES_MAX, WINDOW_BYTES};
use smolvm_proto::message::{Control, Event, Request};
use smolvm_proto::version::{Hello, Nonce};
use smolvm_proto::{Decoder, Frame, Kind, Rejoin};

/// Takes `input` as what a hostile peer sent.
///
/// # Panics
///
/// If a rule of the protocol does not hold: frames are the same however the bytes are cut, a frame
/// that was read is written as the bytes it came from, a message that was read survives being
/// written and read again, a Hello that is waited for is found behind anything, and no count passes
/// its bound.
pub(crate) fn wire(input: &[u8]) {
    let whole = frames(input, input.len().max(1));
    assert_eq!(whole, frames(input, 1), "cut into single bytes");
    assert_eq!(whole, frames(input, 7), "cut into sevens");

    let mut written = Vec::new();
    for frame in &whole {
        assert!(
            frame.payload.len() <= PAYLOAD_BYTES_MAX,
            "a payload over the limit"
        );
        frame.write_to(&mut written);
        match frame.kind {
            Kind::Hello => message::<Hello>(frame),
            Kind::Open => message::<Request>(frame),
            Kind::Event => message::<Event>(frame),
            Kind::Control => message::<Control>(frame),
            Kind::KeeperOpen => message::<KeeperRequest>(frame),
            Kind::KeeperEvent => message::<KeeperEvent>(frame),
            Kind::Credit => credit(frame),
            Kind::Data => data(frame),
            Kind::Eof | Kind::Reset => {}
        }
    }
    assert!(
        input.starts_with(&written),
        "frames are not the bytes they came from"
    );
    rejoin(input);
}

/// Whatever was on its way to another host, the answer to a new one is found behind it.
fn rejoin(input: &[u8]) {
    let nonce = Nonce::from([0x5a; NONCE_BYTES]);
    let answer = Frame::message(0, Kind::Hello, &Hello::of_host(nonce, false));
    let wire = [input, &answer.to_bytes()].concat();
    for step in [1, 7, wire.len()] {
        let mut rejoin = Rejoin::new(nonce);
        let found = wire.chunks(step).find_map(|part| rejoin.feed(part));
        let (frame, decoder) = found.expect("the answer is found");
        assert_eq!(frame, answer);
        assert_eq!(decoder.pending(), 0, "nothing follows it");
    }
}

/// The frames at the beginning of `input`, up to the first that is none, with the bytes arriving
/// `step` at a time.
fn frames(input: &[u8], step: usize) -> Vec<Frame> {
    let mut decoder = Decoder::new();
    let mut frames = Vec::new();
    for part in input.chunks(step) {
        decoder.feed(part);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(_) => return frames,
            }
        }
        assert!(
            decoder.pending() < HEADER_BYTES + PAYLOAD_BYTES_MAX,
            "a frame is waited for too long"
        );
    }
    frames
}

/// A message that can be read can be written, and then reads as the same.
fn message<M>(frame: &Frame)
where
    M: for<'b> Decode<'b, ()> + Encode<()> + PartialEq + Debug,
{
    let Ok(value) = frame.decode::<M>() else {
        return;
    };
    let bytes = minicbor::to_vec(&value).expect("writing to memory");
    let again: M = minicbor::decode(&bytes).expect("what was written can be read");
    assert_eq!(value, again);
}

/// A hostile grant never raises credit over the window.
fn credit(frame: &Frame) {
    let Ok(bytes) = frame.credit_bytes() else {
        return;
    };
    let mut window = SendWindow::default();
    window.sent(WINDOW_BYTES);
    window.granted(bytes);
    window.granted(bytes);
    assert!(window.available() <= WINDOW_BYTES);
}

/// Data is accepted up to the window and not a byte over.
fn data(frame: &Frame) {
    let length = frame.header().length;
    let mut window = ReceiveWindow::default();
    let mut taken = 0u32;
    while length > 0 && window.received(length).is_ok() {
        taken += length;
        assert!(taken <= WINDOW_BYTES);
    }
}

/// Makes inputs from other inputs, the same ones for the same seed.
#[derive(Debug)]
pub(crate) struct Mutator {
    state: u64,
}

impl Mutator {
    /// A mutator whose inputs follow from `seed`.
    pub(crate) fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// SplitMix64 (Steele, Lea and Flood, 2014): small, and good enough to choose mutations.
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not zero.
    fn below(&mut self, bound: usize) -> usize {
        let bound = u64::try_from(bound).expect("64 bits");
        usize::try_from(self.next() % bound).expect("below a usize")
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }

    /// A new input: one to four inputs of `corpus` after one another, with a few bytes changed, added
    /// or taken away; or, one time in sixteen, nothing but random bytes.
    pub(crate) fn input(&mut self, corpus: &[Vec<u8>]) -> Vec<u8> {
        if corpus.is_empty() || self.below(16) == 0 {
            let length = self.below(512);
            return (0..length).map(|_| self.byte()).collect();
        }
        let mut input = Vec::new();
        for _ in 0..=self.below(4) {
            input.extend_from_slice(&corpus[self.below(corpus.len())]);
        }
        for _ in 0..self.below(5) {
            let at = self.below(input.len() + 1);
            match self.below(5) {
                0 => input.truncate(at),
                1 => input.insert(at, self.byte()),
                2 if at < input.len() => {
                    input.remove(at);
                }
                3 if at < input.len() => input[at] ^= 1 << self.below(8),
                _ if at < input.len() => input[at] = self.byte(),
                _ => {}
            }
        }
        input
    }
}

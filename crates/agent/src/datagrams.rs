//! Datagrams to and from one port in the guest.
//!
//! They may be lost, as datagrams are: when the program's queue is full, and when nothing listens. A
//! socket that was refused stays open, because the next datagram may find a listener.

use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketType};
use smolvm_proto::Channel;
use smolvm_proto::limits::DATAGRAM_BYTES_MAX;
use smolvm_proto::message::Event;
use smolvm_proto::socket::{Connected, Datagrams, DatagramsRequest, pack_datagram};

use crate::connect::{addresses, family, open};
use crate::failure::from_errno;
use crate::port::{DATA_BYTES_MAX, Gone};
use crate::stream::{Last, Stop, Stream};

/// Bytes the longest datagram takes with its length.
const PACKED_BYTES_MAX: usize = DATAGRAM_BYTES_MAX + 2;

/// Opens the socket and carries datagrams until the host has no more.
pub(crate) fn datagrams(stream: &Stream, request: &DatagramsRequest) -> Result<Last, Stop> {
    let addresses = addresses(&request.to)?;
    let [address, ..] = addresses.as_slice() else {
        unreachable!("there is at least one address");
    };
    let refused = |errno| from_errno(&format!("opening a socket for {address}"), errno);
    let socket = open(family(address), SocketType::DGRAM).map_err(refused)?;
    rustix::net::connect(&socket, address).map_err(refused)?;
    stream.send_event(&Event::Connected(Connected {
        peer: address.to_string(),
    }))?;
    serve(stream, &socket)
}

fn serve(stream: &Stream, socket: &OwnedFd) -> Result<Last, Stop> {
    let mut arriving = Datagrams::default();
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
    let mut packed = Vec::new();
    loop {
        let mut mailbox = stream.mailbox();
        if mailbox.reset {
            return Err(Stop::Gone);
        }
        mailbox.controls.clear();
        let part = mailbox.input.pop_front();
        let ended = mailbox.input_ended;
        let credit = mailbox.credit(Channel::Output);
        drop(mailbox);
        if let Some(part) = part {
            arriving.feed(&part);
            while let Some(datagram) = arriving.next_datagram() {
                // Lost if it cannot go now.
                let _ = rustix::net::send(socket, datagram, SendFlags::empty());
            }
            stream.consumed(part.len())?;
            // More may wait, and answers may too: both have their turn.
        } else if ended {
            return Ok(Last::done());
        } else {
            let reads = credit >= PACKED_BYTES_MAX;
            stream.wait_beside(reads.then(|| socket.as_fd()), None);
        }
        pack(socket, &mut buffer, &mut packed, credit);
        send(stream, &mut packed)?;
    }
}

/// Packs what has arrived, as far as credit goes and a frame or two hold it.
fn pack(socket: &OwnedFd, buffer: &mut [u8], packed: &mut Vec<u8>, credit: usize) {
    while packed.len() < DATA_BYTES_MAX && packed.len() + PACKED_BYTES_MAX <= credit {
        match rustix::net::recv(socket, &mut *buffer, RecvFlags::empty()) {
            Ok((length, _)) => pack_datagram(&buffer[..length], packed),
            // An answer of nobody to one that was sent: it is told once, and what follows is next.
            Err(Errno::INTR | Errno::CONNREFUSED) => {}
            Err(_) => return,
        }
    }
}

fn send(stream: &Stream, packed: &mut Vec<u8>) -> Result<(), Gone> {
    let sent = stream.send_all(Channel::Output, packed);
    packed.clear();
    sent
}

//! A netlink socket that asks the kernel and reads its answer, netlink(7).
//!
//! The kernel handles a request inside the sender's system call, so answers are there when sending
//! has returned: nothing here waits for another process.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_packet_core::{NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR};
use netlink_sys::{Socket, SocketAddr};

/// `struct nlmsghdr`, netlink(7).
pub(super) const HEADER_BYTES: usize = 16;

/// How often a list is asked for again because it changed while the kernel wrote it down.
const DUMP_TRIES: usize = 16;

/// One answer of the kernel.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) kind: u16,
    pub(super) sequence: u32,
    flags: u16,
    pub(super) payload: Vec<u8>,
}

impl Answer {
    /// What an `NLMSG_ERROR` says: `Ok` is an acknowledgement. `None` for other messages.
    fn outcome(&self) -> Option<io::Result<()>> {
        if self.kind != NLMSG_ERROR {
            return None;
        }
        let code = self.payload.first_chunk().map(|b| i32::from_ne_bytes(*b));
        Some(match code {
            Some(0) => Ok(()),
            Some(code) => Err(io::Error::from_raw_os_error(-code)),
            None => Err(io::ErrorKind::InvalidData.into()),
        })
    }
}

/// A socket of one netlink protocol, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    pub(super) fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        // Errors need not quote the request.
        socket.set_cap_ack(true)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// A number for the next message.
    pub(super) fn next_sequence(&mut self) -> u32 {
        self.sequence += 1;
        self.sequence
    }

    /// Sends messages that each ask for an acknowledgement, in one system call, and returns what
    /// the kernel said of each, by sequence number. The kernel works through them in order.
    pub(super) fn exchange(&self, messages: &[u8]) -> io::Result<Vec<(u32, io::Result<()>)>> {
        self.send(messages)?;
        let mut outcomes = Vec::new();
        while let Some(answers) = self.receive(libc::MSG_DONTWAIT)? {
            outcomes.extend(
                answers
                    .iter()
                    .filter_map(|answer| Some((answer.sequence, answer.outcome()?))),
            );
        }
        Ok(outcomes)
    }

    /// Sends one request and returns what the kernel said but for acknowledgements.
    pub(super) fn query(&self, message: &[u8]) -> io::Result<Vec<Answer>> {
        self.send(message)?;
        let mut said = Vec::new();
        while let Some(answers) = self.receive(libc::MSG_DONTWAIT)? {
            for answer in answers {
                match answer.outcome() {
                    Some(outcome) => outcome?,
                    None => said.push(answer),
                }
            }
        }
        Ok(said)
    }

    /// Makes room in the socket's buffers for one request of so many bytes, and an answer to each
    /// of its messages. The defaults have room for some 200 KiB and 250 answers; twice that is what a
    /// process has in a user namespace (socket(7), `rmem_max`), which is plenty for one guest. A
    /// request that does not fit is refused as a whole.
    pub(super) fn make_room(&self, bytes: usize, messages: usize) -> io::Result<()> {
        use rustix::io::Errno;
        use rustix::net::sockopt::{
            set_socket_recv_buffer_size, set_socket_recv_buffer_size_force,
            set_socket_send_buffer_size, set_socket_send_buffer_size_force,
        };

        if bytes > 64 << 10 {
            let wanted = bytes * 2;
            match set_socket_send_buffer_size_force(&self.socket, wanted) {
                Err(Errno::PERM) => set_socket_send_buffer_size(&self.socket, wanted)?,
                other => other?,
            }
        }
        if messages > 64 {
            // An answer takes 36 bytes and the kernel's own structures around it.
            let wanted = messages * 2048;
            match set_socket_recv_buffer_size_force(&self.socket, wanted) {
                Err(Errno::PERM) => set_socket_recv_buffer_size(&self.socket, wanted)?,
                other => other?,
            }
        }
        Ok(())
    }

    /// Sends a request for a list and returns its entries: a list of one moment, except that
    /// netlink may tear a list longer than one message across a change it does not notice.
    pub(super) fn dump(&mut self, message: &[u8]) -> io::Result<Vec<Answer>> {
        for _ in 0..DUMP_TRIES {
            if let Some(entries) = self.try_dump(message)? {
                return Ok(entries);
            }
        }
        Err(io::Error::other(format!(
            "the list changed during each of {DUMP_TRIES} readings"
        )))
    }

    fn try_dump(&self, message: &[u8]) -> io::Result<Option<Vec<Answer>>> {
        self.send(message)?;
        let mut entries = Vec::new();
        let mut torn = false;
        loop {
            // Each reading makes the kernel write the next part, so this never waits either.
            let answers = self
                .receive(libc::MSG_DONTWAIT)?
                .ok_or(io::ErrorKind::UnexpectedEof)?;
            for answer in answers {
                torn |= answer.flags & NLM_F_DUMP_INTR != 0;
                if answer.kind == NLMSG_DONE {
                    // An error after the first part is told in the last.
                    let code = answer.payload.first_chunk().map(|b| i32::from_ne_bytes(*b));
                    return match code {
                        Some(code) if code < 0 && -code == libc::EINTR => Ok(None),
                        Some(code) if code < 0 => Err(io::Error::from_raw_os_error(-code)),
                        _ if torn => Ok(None),
                        _ => Ok(Some(entries)),
                    };
                }
                match answer.outcome() {
                    Some(Err(e)) if e.kind() == io::ErrorKind::Interrupted => return Ok(None),
                    Some(outcome) => outcome?,
                    None => entries.push(answer),
                }
            }
        }
    }

    fn send(&self, messages: &[u8]) -> io::Result<()> {
        // What is left of answers to a request that failed.
        while self.receive(libc::MSG_DONTWAIT)?.is_some() {}
        loop {
            match self.socket.send(messages, 0) {
                Ok(sent) if sent == messages.len() => return Ok(()),
                Ok(_) => return Err(io::ErrorKind::WriteZero.into()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// The messages of one datagram; `None` if there is none.
    fn receive(&self, flags: i32) -> io::Result<Option<Vec<Answer>>> {
        // The kernel fills no more than 32 KiB at once (netlink_dump), and answers of ours to
        // single messages are smaller.
        let mut buffer = Vec::with_capacity(64 << 10);
        loop {
            match self.socket.recv(&mut buffer, flags | libc::MSG_TRUNC) {
                Ok(length) if length > buffer.len() => {
                    return Err(io::Error::other("an answer of the kernel was cut off"));
                }
                Ok(_) => return split(&buffer).map(Some),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) => return Err(e),
            }
        }
    }

    /// The socket, for options of its own.
    pub(super) fn socket(&mut self) -> &mut Socket {
        &mut self.socket
    }

    /// The messages that wait, for a subscriber; never waits.
    pub(super) fn pending(&self) -> io::Result<Vec<Answer>> {
        let mut all = Vec::new();
        while let Some(mut answers) = self.receive(libc::MSG_DONTWAIT)? {
            all.append(&mut answers);
        }
        Ok(all)
    }
}

impl AsFd for Netlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Cuts a datagram into messages; each begins at a multiple of four bytes.
fn split(mut bytes: &[u8]) -> io::Result<Vec<Answer>> {
    let mut answers = Vec::new();
    while let Some(header) = bytes.first_chunk::<HEADER_BYTES>() {
        let [l0, l1, l2, l3, k0, k1, f0, f1, s0, s1, s2, s3, ..] = *header;
        let length = u32::from_ne_bytes([l0, l1, l2, l3]) as usize;
        let payload = bytes
            .get(HEADER_BYTES..length)
            .ok_or(io::ErrorKind::InvalidData)?;
        answers.push(Answer {
            kind: u16::from_ne_bytes([k0, k1]),
            flags: u16::from_ne_bytes([f0, f1]),
            sequence: u32::from_ne_bytes([s0, s1, s2, s3]),
            payload: payload.to_vec(),
        });
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(answers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let length = u32::try_from(HEADER_BYTES + payload.len()).unwrap();
        bytes.extend(length.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0, 0]);
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn a_datagram_is_cut_into_its_messages() {
        let mut bytes = message(NLMSG_ERROR, 7, &(-libc::EEXIST).to_ne_bytes());
        bytes.extend(message(99, 8, b"abcde"));
        bytes.extend(message(NLMSG_ERROR, 9, &0_i32.to_ne_bytes()));
        let answers = split(&bytes).unwrap();
        assert_eq!(answers.len(), 3);
        let error = answers[0].outcome().unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert!(answers[1].outcome().is_none());
        assert_eq!(
            (answers[1].sequence, answers[1].payload.as_slice()),
            (8, &b"abcde"[..])
        );
        assert!(answers[2].outcome().unwrap().is_ok());
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        for length in [0_u32, 15, 17, u32::MAX] {
            let mut bytes = message(99, 1, b"");
            bytes[..4].copy_from_slice(&length.to_ne_bytes());
            split(&bytes).unwrap_err();
        }
    }
}

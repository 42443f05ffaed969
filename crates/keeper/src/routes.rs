//! Which client's stream is which stream of the guest, and whether the guest keeps to what it was
//! granted. Pure.
//!
//! Flow control runs from end to end: a client grants credit, the keeper passes it on. It counts
//! along, because a guest is not trusted: one that sends more than it was granted would make the
//! keeper hold it all for a client that reads slowly.

use std::collections::HashMap;

use smolvm_proto::flow::{Overrun, SendWindow};
use smolvm_proto::{Channel, Frame, Kind};

/// A connected client.
pub(crate) type ClientId = u64;

/// Where a stream of the guest leads.
#[derive(Debug)]
struct Route {
    client: ClientId,
    stream: u32,
    /// What the guest may still send, by channel.
    windows: [SendWindow; 3],
}

/// All open streams.
#[derive(Debug)]
pub(crate) struct Routes {
    next: u32,
    by_guest: HashMap<u32, Route>,
    by_client: HashMap<(ClientId, u32), u32>,
}

/// What becomes of a frame from the guest.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum FromGuest {
    /// It goes to this client.
    Deliver(ClientId, Frame),
    /// Nobody waits for it any more.
    Drop,
    /// The guest broke the rules of this stream, which is given up: the client hears the first
    /// frame, the guest the second.
    Cut(ClientId, Frame, Frame),
}

impl Routes {
    /// No streams; the first one of the guest gets the number `first`.
    pub(crate) fn new(first: u32) -> Self {
        Self {
            next: first,
            by_guest: HashMap::new(),
            by_client: HashMap::new(),
        }
    }

    /// Translates a client's frame for the guest, opening a route for one that opens a stream.
    /// `None` if it belongs to no open stream.
    pub(crate) fn route_in(&mut self, client: ClientId, mut frame: Frame) -> Option<Frame> {
        let key = (client, frame.stream);
        match frame.kind {
            Kind::Open => {
                if self.by_client.contains_key(&key) {
                    // A number used twice would mix two streams up.
                    return None;
                }
                let number = self.next;
                self.next = self.next.wrapping_add(1).max(2);
                self.by_client.insert(key, number);
                self.by_guest.insert(
                    number,
                    Route {
                        client,
                        stream: frame.stream,
                        windows: Default::default(),
                    },
                );
                frame.stream = number;
                Some(frame)
            }
            Kind::Data | Kind::Eof | Kind::Control | Kind::Credit | Kind::Reset => {
                let number = *self.by_client.get(&key)?;
                if frame.kind == Kind::Credit
                    && let Ok(bytes) = frame.credit_bytes()
                    && let Some(route) = self.by_guest.get_mut(&number)
                {
                    route.windows[frame.channel as usize].granted(bytes);
                }
                if frame.kind == Kind::Reset {
                    self.close(number);
                }
                frame.stream = number;
                Some(frame)
            }
            Kind::Hello | Kind::Event | Kind::KeeperOpen | Kind::KeeperEvent => None,
        }
    }

    /// Translates a frame of the guest for the client that waits for it.
    pub(crate) fn route_out(&mut self, mut frame: Frame) -> FromGuest {
        let number = frame.stream;
        let Some(route) = self.by_guest.get_mut(&number) else {
            return FromGuest::Drop;
        };
        let (client, stream) = (route.client, route.stream);
        let fits = match frame.kind {
            Kind::Data => take(
                &mut route.windows[frame.channel as usize],
                frame.payload.len(),
            )
            .is_ok(),
            Kind::Event | Kind::Eof | Kind::Credit | Kind::Reset => true,
            Kind::Hello | Kind::Open | Kind::Control | Kind::KeeperOpen | Kind::KeeperEvent => {
                false
            }
        };
        // An event that cannot be read would leave the stream open for ever.
        let last = match frame.kind {
            Kind::Event => frame
                .decode::<smolvm_proto::Event>()
                .map(|event| event.is_terminal()),
            Kind::Reset => Ok(true),
            _ => Ok(false),
        };
        match last {
            Ok(last) if fits => {
                if last {
                    self.close(number);
                }
                frame.stream = stream;
                FromGuest::Deliver(client, frame)
            }
            _ => {
                self.close(number);
                FromGuest::Cut(
                    client,
                    Frame::bare(stream, Kind::Reset, Channel::Input),
                    Frame::bare(number, Kind::Reset, Channel::Input),
                )
            }
        }
    }

    /// Forgets a client; the frames tell the guest that nobody waits for its streams.
    pub(crate) fn drop_client(&mut self, client: ClientId) -> Vec<Frame> {
        let mut numbers: Vec<u32> = self
            .by_guest
            .iter()
            .filter(|(_, route)| route.client == client)
            .map(|(number, _)| *number)
            .collect();
        numbers.sort_unstable();
        for number in &numbers {
            self.close(*number);
        }
        numbers
            .into_iter()
            .map(|number| Frame::bare(number, Kind::Reset, Channel::Input))
            .collect()
    }

    /// Forgets every stream, because the guest has; the frames tell the clients.
    pub(crate) fn drop_all(&mut self) -> Vec<(ClientId, Frame)> {
        self.by_client.clear();
        self.by_guest
            .drain()
            .map(|(_, route)| {
                let reset = Frame::bare(route.stream, Kind::Reset, Channel::Input);
                (route.client, reset)
            })
            .collect()
    }

    /// Whether a stream is open.
    pub(crate) fn any(&self) -> bool {
        !self.by_guest.is_empty()
    }

    fn close(&mut self, number: u32) {
        if let Some(route) = self.by_guest.remove(&number) {
            self.by_client.remove(&(route.client, route.stream));
        }
    }
}

fn take(window: &mut SendWindow, bytes: usize) -> Result<(), Overrun> {
    let bytes = u32::try_from(bytes).map_err(|_| Overrun)?;
    if bytes > window.available() {
        return Err(Overrun);
    }
    window.sent(bytes);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use smolvm_proto::limits::{PAYLOAD_BYTES_MAX, WINDOW_BYTES};
    use smolvm_proto::{Event, Request};

    fn open(stream: u32) -> Frame {
        Frame::message(stream, Kind::Open, &Request::Ping)
    }

    #[test]
    fn two_clients_may_use_the_same_number() {
        let mut routes = Routes::new(2);
        let first = routes.route_in(1, open(1)).expect("opened").stream;
        let second = routes.route_in(2, open(1)).expect("opened").stream;
        assert_ne!(first, second);
        assert_eq!(routes.route_in(1, open(1)), None, "a number is used once");
        let done = Frame::message(second, Kind::Event, &Event::Done);
        let expected = Frame::message(1, Kind::Event, &Event::Done);
        assert_eq!(
            routes.route_out(done.clone()),
            FromGuest::Deliver(2, expected)
        );
        assert_eq!(
            routes.route_out(done),
            FromGuest::Drop,
            "the stream has ended"
        );
        assert_eq!(routes.drop_client(1).len(), 1);
        assert!(routes.by_guest.is_empty() && routes.by_client.is_empty());
    }

    #[test]
    fn a_guest_that_begins_anew_ends_every_stream() {
        let mut routes = Routes::new(2);
        for (client, stream) in [(1, 5), (2, 5), (2, 6)] {
            assert!(routes.route_in(client, open(stream)).is_some());
        }
        let mut told: Vec<_> = routes
            .drop_all()
            .into_iter()
            .map(|(client, frame)| (client, frame.stream, frame.kind))
            .collect();
        told.sort_unstable_by_key(|(client, stream, _)| (*client, *stream));
        let reset = Kind::Reset;
        assert_eq!(told, [(1, 5, reset), (2, 5, reset), (2, 6, reset)]);
        assert!(routes.by_guest.is_empty() && routes.by_client.is_empty());
    }

    #[test]
    fn a_guest_that_ignores_the_window_is_cut_off() {
        let mut routes = Routes::new(2);
        let number = routes.route_in(1, open(7)).expect("opened").stream;
        let data = || {
            Frame::new(
                number,
                Kind::Data,
                Channel::Output,
                vec![0; PAYLOAD_BYTES_MAX],
            )
        };
        for _ in 0..WINDOW_BYTES as usize / PAYLOAD_BYTES_MAX {
            assert!(matches!(routes.route_out(data()), FromGuest::Deliver(1, _)));
        }
        let half = u32::try_from(PAYLOAD_BYTES_MAX).expect("small");
        assert!(
            routes
                .route_in(1, Frame::credit(7, Channel::Output, half))
                .is_some()
        );
        assert!(matches!(routes.route_out(data()), FromGuest::Deliver(1, _)));
        match routes.route_out(data()) {
            FromGuest::Cut(1, client, guest) => {
                assert_eq!((client.stream, client.kind), (7, Kind::Reset));
                assert_eq!((guest.stream, guest.kind), (number, Kind::Reset));
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(routes.route_out(data()), FromGuest::Drop);
    }

    #[test]
    fn a_guest_may_not_send_what_only_a_host_sends() {
        let mut routes = Routes::new(2);
        let number = routes.route_in(1, open(7)).expect("opened").stream;
        assert!(matches!(
            routes.route_out(open(number)),
            FromGuest::Cut(1, ..)
        ));
        let number = routes.route_in(1, open(8)).expect("opened").stream;
        let garbage = Frame::new(number, Kind::Event, Channel::Input, vec![0xff; 9]);
        assert!(matches!(routes.route_out(garbage), FromGuest::Cut(1, ..)));
    }
}

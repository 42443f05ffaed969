//! One open stream: the mailbox its session reads, the window it sends under.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use smolvm_proto::flow::{ReceiveWindow, SendWindow};
use smolvm_proto::limits::DATAGRAM_BYTES_MAX;
use smolvm_proto::message::{Control, Event, Failure};
use smolvm_proto::{Channel, Frame, Kind};

use crate::port::{DATA_BYTES_MAX, Gone, Port};
use crate::reap::Exit;

/// Control messages a session may have waiting; more mean a peer that does not behave.
const CONTROLS_MAX: usize = 64;

/// What the reader of the port, the reaper and the session share about one stream.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) id: u32,
    is_command: bool,
    port: Arc<Port>,
    /// Readable when the mailbox changed in a way its session may wait for.
    wake: OwnedFd,
    mailbox: Mutex<Mailbox>,
}

/// What has arrived for a session. Bounded: input by the window, controls by [`CONTROLS_MAX`].
#[derive(Debug, Default)]
pub(crate) struct Mailbox {
    /// Bytes of [`Channel::Input`], oldest first, each part not empty.
    pub(crate) input: VecDeque<Vec<u8>>,
    /// Whether no more input comes.
    pub(crate) input_ended: bool,
    /// Control messages, oldest first.
    pub(crate) controls: VecDeque<Control>,
    /// Whether nobody waits for this stream any more.
    pub(crate) reset: bool,
    /// Whether nobody hears this stream any more, but its command lives on.
    detached: bool,
    /// How the command ended, once the reaper knows.
    pub(crate) exit: Option<Exit>,
    receive: ReceiveWindow,
    output: SendWindow,
    error: SendWindow,
}

impl Mailbox {
    fn window(&mut self, channel: Channel) -> Option<&mut SendWindow> {
        match channel {
            Channel::Output => Some(&mut self.output),
            Channel::Error => Some(&mut self.error),
            Channel::Input => None,
        }
    }

    /// Bytes that may be sent on `channel` now.
    pub(crate) fn credit(&self, channel: Channel) -> usize {
        match channel {
            // What nobody hears needs no credit.
            _ if self.detached => usize::MAX,
            Channel::Output => self.output.available() as usize,
            Channel::Error => self.error.available() as usize,
            Channel::Input => 0,
        }
    }
}

/// The peer broke the rules of a stream, which is then reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Broken;

impl Stream {
    pub(crate) fn new(id: u32, is_command: bool, port: Arc<Port>) -> rustix::io::Result<Self> {
        Ok(Self {
            id,
            is_command,
            port,
            wake: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            mailbox: Mutex::new(Mailbox::default()),
        })
    }

    /// The mailbox. Hold it for moments only: the reader of the port needs it.
    pub(crate) fn mailbox(&self) -> MutexGuard<'_, Mailbox> {
        self.mailbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The descriptor that becomes readable when the mailbox changed.
    pub(crate) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Makes the wake descriptor quiet again; look at the mailbox after that.
    pub(crate) fn clear_wake(&self) {
        let _ = rustix::io::read(&self.wake, &mut [0u8; 8]);
    }

    /// Wakes the session up, to look at the mailbox and at whatever else it waits for.
    pub(crate) fn wake(&self) {
        // It fails only when the count is at its maximum, and then it is readable anyway.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    // ---- for the reader of the port ----

    /// Takes bytes that arrived on a channel.
    pub(crate) fn deliver_data(&self, channel: Channel, bytes: Vec<u8>) -> Result<(), Broken> {
        let mut mailbox = self.mailbox();
        let length = u32::try_from(bytes.len()).map_err(|_| Broken)?;
        if channel != Channel::Input || mailbox.input_ended {
            return Err(Broken);
        }
        mailbox.receive.received(length).map_err(|_| Broken)?;
        if length > 0 {
            mailbox.input.push_back(bytes);
            drop(mailbox);
            self.wake();
        }
        Ok(())
    }

    /// Notes that no more input comes.
    pub(crate) fn deliver_end(&self, channel: Channel) -> Result<(), Broken> {
        if channel != Channel::Input {
            return Err(Broken);
        }
        self.mailbox().input_ended = true;
        self.wake();
        Ok(())
    }

    /// Takes a grant of credit.
    pub(crate) fn deliver_credit(&self, channel: Channel, bytes: u32) -> Result<(), Broken> {
        let mut mailbox = self.mailbox();
        let window = mailbox.window(channel).ok_or(Broken)?;
        let was_short = (window.available() as usize) < DATAGRAM_BYTES_MAX + 2;
        window.granted(bytes);
        drop(mailbox);
        // A session waits for credit only when it has none, or not enough for a datagram.
        if was_short {
            self.wake();
        }
        Ok(())
    }

    /// Takes a control message.
    pub(crate) fn deliver_control(&self, control: Control) -> Result<(), Broken> {
        let mut mailbox = self.mailbox();
        if let (Control::Resize(_), Some(last @ Control::Resize(_))) =
            (&control, mailbox.controls.back_mut())
        {
            *last = control;
        } else if mailbox.controls.len() < CONTROLS_MAX {
            mailbox.controls.push_back(control);
        } else {
            return Err(Broken);
        }
        drop(mailbox);
        self.wake();
        Ok(())
    }

    /// Notes that nobody waits for this stream any more.
    pub(crate) fn deliver_reset(&self) {
        self.mailbox().reset = true;
        self.wake();
    }

    /// Notes that nobody hears this stream any more and that its command is to live on: what it
    /// writes is dropped, its standard input stays open though nothing more comes, and its deadline
    /// holds. Returns whether it has a command; a stream without one is left as it is.
    pub(crate) fn deliver_detach(&self) -> bool {
        if self.is_command {
            self.mailbox().detached = true;
            self.wake();
        }
        self.is_command
    }

    /// Notes how the command ended. Called by the reaper.
    pub(crate) fn deliver_exit(&self, exit: Exit) {
        self.mailbox().exit = Some(exit);
        self.wake();
    }

    // ---- for the session ----

    /// Notes that `bytes` of input were used or dropped, and grants as much when it is due.
    pub(crate) fn consumed(&self, bytes: usize) -> Result<(), Gone> {
        let Ok(bytes) = u32::try_from(bytes) else {
            unreachable!("bounded by the window");
        };
        let grant = self.mailbox().receive.consumed(bytes);
        match grant {
            Some(grant) => self.send(&Frame::credit(self.id, Channel::Input, grant)),
            None => Ok(()),
        }
    }

    fn send(&self, frame: &Frame) -> Result<(), Gone> {
        let mailbox = self.mailbox();
        if mailbox.reset {
            return Err(Gone);
        }
        if mailbox.detached {
            return Ok(());
        }
        drop(mailbox);
        self.unless_detached(self.port.send(&frame.to_bytes()))
    }

    /// What came of sending. A port that was given up while this waited for it stops no command that
    /// is to live on.
    fn unless_detached(&self, sent: Result<(), Gone>) -> Result<(), Gone> {
        sent.or_else(|gone| {
            if self.mailbox().detached {
                Ok(())
            } else {
                Err(gone)
            }
        })
    }

    /// Sends bytes the caller has seen credit for, at most [`DATA_BYTES_MAX`].
    pub(crate) fn send_data(&self, channel: Channel, payload: &[u8]) -> Result<(), Gone> {
        let Ok(length) = u32::try_from(payload.len()) else {
            unreachable!("at most DATA_BYTES_MAX");
        };
        let mut mailbox = self.mailbox();
        if mailbox.reset {
            return Err(Gone);
        }
        if mailbox.detached {
            return Ok(());
        }
        if let Some(window) = mailbox.window(channel) {
            window.sent(length);
        }
        drop(mailbox);
        self.unless_detached(self.port.send_data(self.id, channel, payload))
    }

    /// Sends the end of a channel.
    pub(crate) fn send_end(&self, channel: Channel) -> Result<(), Gone> {
        self.send(&Frame::bare(self.id, Kind::Eof, channel))
    }

    /// Sends bytes as credit comes in. For sessions that have nothing else to attend to.
    pub(crate) fn send_all(&self, channel: Channel, mut bytes: &[u8]) -> Result<(), Gone> {
        while !bytes.is_empty() {
            let (credit, reset) = {
                let mailbox = self.mailbox();
                (mailbox.credit(channel), mailbox.reset)
            };
            if reset {
                return Err(Gone);
            }
            if credit == 0 {
                self.wait();
                continue;
            }
            let (now, later) = bytes.split_at(bytes.len().min(credit).min(DATA_BYTES_MAX));
            self.send_data(channel, now)?;
            bytes = later;
        }
        Ok(())
    }

    /// Takes the next part of the input, or `None` at its end, waiting for it.
    pub(crate) fn next_input(&self) -> Result<Option<Vec<u8>>, Gone> {
        loop {
            let mut mailbox = self.mailbox();
            if mailbox.reset {
                return Err(Gone);
            }
            if let Some(part) = mailbox.input.pop_front() {
                drop(mailbox);
                self.consumed(part.len())?;
                return Ok(Some(part));
            }
            if mailbox.input_ended {
                return Ok(None);
            }
            drop(mailbox);
            self.wait();
        }
    }

    /// Waits until the mailbox changes.
    fn wait(&self) {
        self.wait_beside(None, None);
    }

    /// Waits until the mailbox changes, the descriptor can be read, or the time is over. Says whether the
    /// descriptor is ready, or broken.
    pub(crate) fn wait_beside(
        &self,
        other: Option<BorrowedFd<'_>>,
        limit: Option<&Timespec>,
    ) -> bool {
        let mut fds = Vec::with_capacity(2);
        fds.push(PollFd::new(&self.wake, PollFlags::IN));
        fds.extend(other.map(|other| PollFd::from_borrowed_fd(other, PollFlags::IN)));
        let _ = rustix::event::poll(&mut fds, limit);
        if !fds[0].revents().is_empty() {
            self.clear_wake();
        }
        fds.get(1).is_some_and(|fd| !fd.revents().is_empty())
    }

    /// Sends an event that is not the last frame of the stream.
    pub(crate) fn send_event(&self, event: &Event) -> Result<(), Gone> {
        debug_assert!(!event.is_terminal());
        self.send(&Frame::message(self.id, Kind::Event, event))
    }

    /// Sends the end of `channels` and the last frame, in one write.
    ///
    /// Only [`crate::serve`] calls this, after it has forgotten the stream.
    pub(crate) fn send_last(&self, channels: &[Channel], event: &Event) {
        debug_assert!(event.is_terminal());
        let mailbox = self.mailbox();
        if mailbox.reset || mailbox.detached {
            return;
        }
        drop(mailbox);
        let mut bytes = Vec::new();
        for channel in channels {
            Frame::bare(self.id, Kind::Eof, *channel).write_to(&mut bytes);
        }
        Frame::message(self.id, Kind::Event, event).write_to(&mut bytes);
        let _ = self.port.send(&bytes);
    }
}

/// How a session ended: its last frame, and the channels that end with it.
#[derive(Debug)]
pub(crate) struct Last {
    /// Channels to end before the event.
    pub(crate) channels: &'static [Channel],
    /// The terminal event.
    pub(crate) event: Event,
}

impl Last {
    /// The request was carried out.
    pub(crate) fn done() -> Self {
        Self {
            channels: &[],
            event: Event::Done,
        }
    }
}

/// Why a session ended without being carried out.
#[derive(Debug)]
pub(crate) enum Stop {
    /// Say why to the host.
    Failed(Failure),
    /// Nobody listens: say nothing.
    Gone,
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl From<Gone> for Stop {
    fn from(_: Gone) -> Self {
        Self::Gone
    }
}

/// A duration as poll(2) takes it; far beyond any machine's life it is cut.
pub(crate) fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}

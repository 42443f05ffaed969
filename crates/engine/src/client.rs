//! The client's end of a keeper's socket: streams multiplexed over one connection.
//!
//! Two tasks own the socket, one for each direction. A stream hears from the reading task through
//! a queue that flow control bounds, and speaks through a queue to the writing task; nothing
//! here holds a lock across an await.

use std::collections::HashMap;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{Mode, OFlags};
use smolvm_proto::flow::{ReceiveWindow, SendWindow};
use smolvm_proto::keeper::{KeeperEvent, KeeperRequest};
use smolvm_proto::message::{Control, Event, Failure, FailureKind, Request};
use smolvm_proto::{Channel, Decoder, Frame, Kind, limits};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{Notify, mpsc};

use crate::error::{Error, ErrorKind, Result};

/// Bytes read from the socket at a time: a few frames.
const READ_BYTES: usize = 256 * 1024;

/// A connection to a keeper. Cheap to clone; closed when the last clone and stream are gone.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    name: String,
    next: AtomicU32,
    outgoing: mpsc::UnboundedSender<Frame>,
    /// `None` once the connection has ended.
    streams: Mutex<Option<HashMap<u32, Slot>>>,
    reader: tokio::task::AbortHandle,
}

impl Drop for Shared {
    fn drop(&mut self) {
        // The writing task ends with its queue; the reading one would wait for the keeper.
        self.reader.abort();
    }
}

#[derive(Debug)]
struct Slot {
    incoming: mpsc::UnboundedSender<Frame>,
    credit: Arc<Credit>,
}

/// What may still be sent on a stream's input.
#[derive(Debug, Default)]
struct Credit {
    state: Mutex<CreditState>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct CreditState {
    window: SendWindow,
    closed: bool,
}

/// Connects to the socket `name` in `directory`.
///
/// A socket's address holds 108 bytes (unix(7)), which a data directory may exceed, so the path
/// goes through the directory's descriptor.
pub(crate) fn connect_socket(directory: &Path, name: &str) -> std::io::Result<StdUnixStream> {
    let dir = rustix::fs::open(
        directory,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    StdUnixStream::connect(format!("/proc/self/fd/{}/{name}", dir.as_raw_fd()))
}

impl Client {
    /// Speaks over a connected socket. Must be called within a tokio runtime.
    pub(crate) fn new(sandbox: &str, socket: StdUnixStream) -> Result<Self> {
        let socket = socket
            .set_nonblocking(true)
            .and_then(|()| UnixStream::from_std(socket))
            .map_err(|error| {
                crate::error::io(format!("could not connect to sandbox `{sandbox}`"), error)
            })?;
        let (mut from_keeper, mut to_keeper) = socket.into_split();
        let (outgoing, mut queue) = mpsc::unbounded_channel::<Frame>();

        tokio::spawn(async move {
            let mut batch = Vec::new();
            let mut bytes = Vec::new();
            while queue.recv_many(&mut batch, 16).await > 0 {
                for frame in batch.drain(..) {
                    frame.write_to(&mut bytes);
                }
                if to_keeper.write_all(&bytes).await.is_err() {
                    // The reading task sees the end as well and tells every stream.
                    return;
                }
                bytes.clear();
            }
        });
        let shared = Arc::new_cyclic(|weak: &std::sync::Weak<Shared>| {
            let weak = weak.clone();
            let reader = tokio::spawn(async move {
                let mut decoder = Decoder::new();
                let mut buffer = vec![0; READ_BYTES];
                'connection: while let Ok(count @ 1..) = from_keeper.read(&mut buffer).await {
                    let Some(shared) = weak.upgrade() else { return };
                    decoder.feed(&buffer[..count]);
                    loop {
                        match decoder.next_frame() {
                            Ok(Some(frame)) => shared.deliver(frame),
                            Ok(None) => break,
                            Err(error) => {
                                tracing::warn!(%error, "the keeper sent bytes that are no frame");
                                break 'connection;
                            }
                        }
                    }
                }
                if let Some(shared) = weak.upgrade() {
                    shared.end();
                }
            });
            Shared {
                name: sandbox.to_owned(),
                next: AtomicU32::new(1),
                outgoing,
                streams: Mutex::new(Some(HashMap::new())),
                reader: reader.abort_handle(),
            }
        });
        Ok(Self { shared })
    }

    /// Opens a stream to the guest.
    pub(crate) fn open(&self, request: &Request) -> Result<Stream> {
        self.open_frame(|stream| Frame::message(stream, Kind::Open, request))
    }

    /// Asks the keeper itself, and waits for its answer.
    pub(crate) async fn ask_keeper(&self, request: &KeeperRequest) -> Result<KeeperEvent> {
        let mut stream =
            self.open_frame(|stream| Frame::message(stream, Kind::KeeperOpen, request))?;
        let frame = stream.next_frame().await?;
        stream.finish();
        frame.decode().map_err(|error| self.shared.confused(error))
    }

    fn open_frame(&self, frame: impl FnOnce(u32) -> Frame) -> Result<Stream> {
        let id = self.shared.next.fetch_add(1, Ordering::Relaxed);
        let (sender, incoming) = mpsc::unbounded_channel();
        let credit = Arc::new(Credit::default());
        match self.shared.lock().as_mut() {
            Some(streams) => streams.insert(
                id,
                Slot {
                    incoming: sender,
                    credit: Arc::clone(&credit),
                },
            ),
            None => return Err(self.shared.lost()),
        };
        self.shared.send(frame(id))?;
        Ok(Stream {
            input: StreamInput {
                shared: Arc::clone(&self.shared),
                id,
                credit,
            },
            incoming,
            windows: Default::default(),
            finished: false,
        })
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<HashMap<u32, Slot>>> {
        // A panic while holding this lock leaves a map that is still a map.
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, frame: Frame) -> Result<()> {
        self.outgoing.send(frame).map_err(|_| self.lost())
    }

    fn deliver(&self, frame: Frame) {
        let mut streams = self.lock();
        let Some(slot) = streams.as_mut().and_then(|map| map.get(&frame.stream)) else {
            // A stream given up on this side may still have frames on the way.
            return;
        };
        if frame.kind == Kind::Credit {
            if let Ok(bytes) = frame.credit_bytes() {
                slot.credit.change(|state| state.window.granted(bytes));
            }
        } else {
            // The receiver is gone only if its stream was dropped: the same case as above.
            let _ = slot.incoming.send(frame);
        }
    }

    fn end(&self) {
        if let Some(streams) = self.lock().take() {
            for slot in streams.into_values() {
                slot.credit.change(|state| state.closed = true);
            }
        }
    }

    fn lost(&self) -> Error {
        Error::new(
            ErrorKind::GuestFailed,
            format!("the connection to sandbox `{}` ended", self.name),
        )
        .hint(format!("see its state with `smolvm info {}`", self.name))
    }

    fn confused(&self, error: smolvm_proto::FrameError) -> Error {
        Error::new(
            ErrorKind::Internal,
            format!("sandbox `{}` sent an answer that makes no sense", self.name),
        )
        .because(error)
    }
}

impl Credit {
    fn change(&self, change: impl FnOnce(&mut CreditState)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_waiters();
    }
}

/// One stream. Dropping it before its last event tells the guest that nobody waits.
#[derive(Debug)]
pub(crate) struct Stream {
    input: StreamInput,
    incoming: mpsc::UnboundedReceiver<Frame>,
    windows: [ReceiveWindow; 3],
    finished: bool,
}

/// What a stream hears.
#[derive(Debug)]
pub(crate) enum Heard {
    /// Bytes of a channel.
    Data(Channel, Vec<u8>),
    /// No more bytes of a channel.
    End(Channel),
    /// An event; after a terminal one nothing more comes.
    Event(Event),
}

impl Stream {
    /// The sending half.
    pub(crate) fn input(&self) -> StreamInput {
        self.input.clone()
    }

    /// Waits for the next thing the guest says. Failures of the guest are errors.
    pub(crate) async fn next(&mut self) -> Result<Heard> {
        loop {
            let frame = self.next_frame().await?;
            match frame.kind {
                Kind::Data => {
                    // The whole frame is handed on, so it is granted again at once; a caller that
                    // does not call `next` grants nothing.
                    let bytes = u32::try_from(frame.payload.len()).unwrap_or(u32::MAX);
                    let window = &mut self.windows[frame.channel as usize];
                    if window.received(bytes).is_err() {
                        return Err(Error::new(
                            ErrorKind::Internal,
                            format!(
                                "sandbox `{}` sent more than it was granted",
                                self.input.shared.name
                            ),
                        ));
                    }
                    if let Some(grant) = window.consumed(bytes) {
                        self.input.shared.send(Frame::credit(
                            self.input.id,
                            frame.channel,
                            grant,
                        ))?;
                    }
                    return Ok(Heard::Data(frame.channel, frame.payload));
                }
                Kind::Event => {
                    let event: Event = frame
                        .decode()
                        .map_err(|error| self.input.shared.confused(error))?;
                    if event.is_terminal() {
                        self.finish();
                    }
                    return match event {
                        Event::Failed(failure) => Err(failed(failure)),
                        event => Ok(Heard::Event(event)),
                    };
                }
                Kind::Eof => return Ok(Heard::End(frame.channel)),
                Kind::Reset => {
                    self.finish();
                    return Err(self.input.shared.lost());
                }
                _ => {}
            }
        }
    }

    /// Waits for the one event that answers a simple request.
    pub(crate) async fn answer(mut self) -> Result<Event> {
        loop {
            if let Heard::Event(event) = self.next().await?
                && event.is_terminal()
            {
                return Ok(event);
            }
        }
    }

    async fn next_frame(&mut self) -> Result<Frame> {
        match self.incoming.recv().await {
            Some(frame) => Ok(frame),
            None => {
                self.finished = true;
                Err(self.input.shared.lost())
            }
        }
    }

    fn finish(&mut self) {
        self.finished = true;
        self.input.credit.change(|state| state.closed = true);
        if let Some(streams) = self.input.shared.lock().as_mut() {
            streams.remove(&self.input.id);
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.finished {
            self.finish();
            // If the connection has ended, so has the stream.
            let _ = self
                .input
                .shared
                .send(Frame::bare(self.input.id, Kind::Reset, Channel::Input));
        }
    }
}

/// The sending half of a stream.
#[derive(Debug, Clone)]
pub(crate) struct StreamInput {
    shared: Arc<Shared>,
    id: u32,
    credit: Arc<Credit>,
}

impl StreamInput {
    /// Sends bytes, waiting for credit. Says whether the other side still wants them.
    pub(crate) async fn write(&self, mut bytes: &[u8]) -> Result<bool> {
        while !bytes.is_empty() {
            let Some(count) = self.credit(bytes.len()).await else {
                return Ok(false);
            };
            let (now, rest) = bytes.split_at(count);
            bytes = rest;
            self.shared.send(Frame::new(
                self.id,
                Kind::Data,
                Channel::Input,
                now.to_vec(),
            ))?;
        }
        Ok(true)
    }

    /// Takes as much credit as there is, at most one frame's worth; `None` once the stream ended.
    async fn credit(&self, wanted: usize) -> Option<usize> {
        loop {
            // Registered before looking, so a grant in between is not missed.
            let changed = self.credit.changed.notified();
            {
                let mut state = self
                    .credit
                    .state
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                if state.closed {
                    return None;
                }
                let count = wanted
                    .min(limits::PAYLOAD_BYTES_MAX)
                    .min(state.window.available() as usize);
                if count > 0 {
                    state.window.sent(u32::try_from(count).unwrap_or(u32::MAX));
                    return Some(count);
                }
            }
            changed.await;
        }
    }

    /// Says that no more bytes will come.
    pub(crate) fn close(&self) -> Result<()> {
        self.if_open(Frame::bare(self.id, Kind::Eof, Channel::Input))
    }

    /// Sends a control message.
    pub(crate) fn control(&self, control: &Control) -> Result<()> {
        self.if_open(Frame::message(self.id, Kind::Control, control))
    }

    fn if_open(&self, frame: Frame) -> Result<()> {
        let closed = self
            .credit
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .closed;
        if closed {
            Ok(())
        } else {
            self.shared.send(frame)
        }
    }
}

/// A guest's refusal as an error.
fn failed(failure: Failure) -> Error {
    let kind = match failure.kind {
        FailureKind::NotFound => ErrorKind::NotFound,
        FailureKind::PermissionDenied | FailureKind::NotExecutable => ErrorKind::PermissionDenied,
        FailureKind::AlreadyExists => ErrorKind::AlreadyExists,
        FailureKind::NoSpace => ErrorKind::NoSpace,
        FailureKind::NotADirectory
        | FailureKind::IsADirectory
        | FailureKind::NoSuchUser
        | FailureKind::InvalidInput => ErrorKind::InvalidInput,
        FailureKind::TooMany => ErrorKind::Busy,
        FailureKind::ShuttingDown => ErrorKind::NotRunning,
        FailureKind::AddressInUse => ErrorKind::AlreadyExists,
        FailureKind::Io | FailureKind::Refused | FailureKind::Unreachable => ErrorKind::GuestFailed,
    };
    Error::new(kind, failure.message)
}

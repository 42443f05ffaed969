//! One connection with the host: frames in, a session for each request.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::time::ClockId;
use smolvm_proto::limits::STREAMS_MAX;
use smolvm_proto::message::{Event, Failure, FailureKind};
use smolvm_proto::version::{Hello, Nonce, VERSION_MAX, VERSION_MIN};
use smolvm_proto::{Channel, Decoder, Frame, FrameError, Kind, Request};

use crate::cgroup::Cgroups;
use crate::command::Defaults;
use crate::failure::failure;
use crate::port::{Late, Port};
use crate::reap::Reaper;
use crate::shutdown::Disks;
use crate::stream::{Broken, Last, Stop, Stream};
use crate::workers::Workers;
use crate::{
    birth, connect, console, datagrams, exec, extract, facts, files, grow, list, listen, mount,
    shutdown,
};

/// Bytes taken from the port at one time.
const READ_BYTES: usize = 64 * 1024;

/// What all connections and sessions share.
#[derive(Debug)]
pub(crate) struct Agent {
    pub(crate) reaper: Arc<Reaper>,
    pub(crate) cgroups: Option<Arc<Cgroups>>,
    /// The mounted disks; `None` when the agent is not PID 1.
    pub(crate) disks: Option<Disks>,
    pub(crate) stopping: AtomicBool,
    pub(crate) untaken: listen::Untaken,
    defaults: Mutex<Defaults>,
    workers: Workers,
}

impl Agent {
    pub(crate) fn new(cgroups: Option<Arc<Cgroups>>, disks: Option<Disks>) -> Self {
        let workers = Workers::default();
        workers.warm();
        Self {
            reaper: Reaper::start(),
            cgroups,
            disks,
            stopping: AtomicBool::new(false),
            untaken: listen::Untaken::default(),
            defaults: Mutex::new(Defaults::default()),
            workers,
        }
    }

    /// What holds for every command at this moment.
    pub(crate) fn defaults(&self) -> Defaults {
        self.defaults
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(crate) fn set_defaults(&self, defaults: Defaults) {
        *self.defaults.lock().unwrap_or_else(PoisonError::into_inner) = defaults;
    }
}

/// What becomes of commands when the host is not there any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnLoss {
    /// They end: nobody will ever hear of them.
    EndCommands,
    /// They live on, with nobody listening: the connection was lost, and the host was not.
    KeepCommands,
}

/// Why a connection ended.
#[derive(Debug)]
enum Ended {
    /// The host closed its end.
    Closed,
    /// The host said Hello: it is new here.
    NewHost {
        nonce: Option<Nonce>,
        keep_commands: bool,
    },
    /// The host sent what is not a frame.
    Garbage(FrameError),
}

/// Serves until the peer closes its end, starting over when the streams have lost their meaning.
///
/// The guest speaks first, but not every host was there to hear it: a machine restored from a
/// snapshot has said Hello to another host, and of a port that is closed and opened again within a
/// moment the kernel tells nothing. So a host may say Hello at any time, and is answered with one.
/// Each Hello of ours is a beginning: all streams before it are over.
///
/// A host that joins a restored machine knows the answer to its own Hello by the nonce in it, and
/// drops what arrives before ([`smolvm_proto::rejoin`]). It may let the commands of its predecessor
/// live on: their sessions go on with nobody listening, see [`Stream::deliver_detach`].
pub(crate) fn until_closed(agent: &Arc<Agent>, fd: &Arc<OwnedFd>, on_loss: OnLoss) {
    let mut decoder = Decoder::new();
    let mut nonce = None;
    loop {
        match connection(agent, fd, &mut decoder, nonce.take(), on_loss) {
            Ended::Closed => return,
            Ended::NewHost { nonce: theirs, .. } => nonce = theirs,
            Ended::Garbage(error) => {
                console::say(&format!("the host sent what is not a frame: {error}"));
                // Where the next frame starts is unknown, so all that has arrived is dropped.
                let mut dropped = [0u8; 4096];
                while matches!(rustix::io::read(&**fd, &mut dropped), Ok(length) if length > 0) {}
                decoder = Decoder::new();
            }
        }
    }
}

/// Says Hello, in answer to the one that gave `nonce`, and serves until something ends the
/// connection. Every stream is over then.
fn connection(
    agent: &Arc<Agent>,
    fd: &Arc<OwnedFd>,
    decoder: &mut Decoder,
    nonce: Option<Nonce>,
    on_loss: OnLoss,
) -> Ended {
    let connection = Connection {
        agent: Arc::clone(agent),
        port: Arc::new(Port::new(Arc::clone(fd), on_loss)),
        streams: Arc::new(Streams::default()),
    };
    let hello = Frame::message(0, Kind::Hello, &hello(nonce));
    let ended = match connection.port.send_hello(&hello.to_bytes()) {
        Ok(()) => connection.serve(fd, decoder),
        Err(_) => Ended::Closed,
    };
    let keep_commands = match ended {
        Ended::NewHost { keep_commands, .. } => keep_commands,
        Ended::Closed => on_loss == OnLoss::KeepCommands,
        Ended::Garbage(_) => false,
    };
    if keep_commands {
        // Before the port is given up, so that no session finds it gone without knowing why.
        let mut streams = connection.streams.lock();
        streams.retain(|_, stream| !stream.deliver_detach());
    }
    match &ended {
        Ended::Closed => connection.port.abandon(),
        Ended::NewHost { .. } | Ended::Garbage(_) => connection.port.close(),
    }
    for (_, stream) in connection.streams.lock().drain() {
        stream.deliver_reset();
    }
    ended
}

fn hello(nonce: Option<Nonce>) -> Hello {
    let uptime = rustix::time::clock_gettime(ClockId::Boottime);
    Hello {
        version_min: VERSION_MIN,
        version_max: VERSION_MAX,
        agent: env!("CARGO_PKG_VERSION").to_owned(),
        kernel: rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned(),
        uptime_ms: facts::milliseconds(uptime),
        nonce,
        keep_commands: None,
    }
}

/// The streams that are open, by number.
#[derive(Debug, Default)]
struct Streams(Mutex<HashMap<u32, Arc<Stream>>>);

impl Streams {
    fn lock(&self) -> MutexGuard<'_, HashMap<u32, Arc<Stream>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, id: u32) -> Option<Arc<Stream>> {
        self.lock().get(&id).map(Arc::clone)
    }
}

struct Connection {
    agent: Arc<Agent>,
    port: Arc<Port>,
    streams: Arc<Streams>,
}

impl Connection {
    /// The reader's loop. It never waits for anything but the port.
    fn serve(&self, fd: &OwnedFd, decoder: &mut Decoder) -> Ended {
        let mut buffer = vec![0; READ_BYTES];
        let mut late = Late::Done;
        loop {
            loop {
                match decoder.next_frame() {
                    Ok(Some(frame)) if frame.stream == 0 && frame.kind == Kind::Hello => {
                        let hello = frame.decode::<Hello>().ok();
                        return Ended::NewHost {
                            nonce: hello.as_ref().and_then(|hello| hello.nonce),
                            keep_commands: hello
                                .is_some_and(|hello| hello.keep_commands == Some(true)),
                        };
                    }
                    Ok(Some(frame)) => {
                        if self.take(frame) == Late::Full {
                            late = Late::Full;
                        }
                    }
                    Ok(None) => break,
                    Err(error) => return Ended::Garbage(error),
                }
            }
            let mut interest = PollFlags::empty();
            if late == Late::Full {
                interest |= PollFlags::OUT;
            }
            // A host that asks and never reads gets no further answers until it does.
            if !self.port.is_late() {
                interest |= PollFlags::IN;
            }
            let mut fds = [PollFd::new(fd, interest)];
            match rustix::event::poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => return Ended::Closed,
            }
            let events = fds[0].revents();
            if late == Late::Full {
                late = self.port.flush_late();
            }
            if events.contains(PollFlags::IN) || !events.intersects(PollFlags::OUT) {
                match rustix::io::read(fd, &mut buffer[..]) {
                    Ok(0) => return Ended::Closed,
                    Ok(length) => decoder.feed(&buffer[..length]),
                    Err(Errno::AGAIN | Errno::INTR) => {}
                    Err(_) => return Ended::Closed,
                }
            }
        }
    }

    /// Acts on one frame.
    fn take(&self, frame: Frame) -> Late {
        let id = frame.stream;
        // The connection's own number. Only a Hello is for it, and does not come here.
        if id == 0 {
            return Late::Done;
        }
        if frame.kind == Kind::Open {
            return self.open(&frame);
        }
        // A frame that crossed the stream's last one is for a stream that is not there any more.
        let Some(stream) = self.streams.get(id) else {
            return Late::Done;
        };
        let taken = match frame.kind {
            Kind::Data => stream.deliver_data(frame.channel, frame.payload),
            Kind::Eof => stream.deliver_end(frame.channel),
            Kind::Credit => match frame.credit_bytes() {
                Ok(bytes) => stream.deliver_credit(frame.channel, bytes),
                Err(_) => Err(Broken),
            },
            Kind::Control => match frame.decode() {
                Ok(control) => stream.deliver_control(control),
                Err(_) => Err(Broken),
            },
            Kind::Reset => {
                self.streams.lock().remove(&id);
                stream.deliver_reset();
                Ok(())
            }
            Kind::Hello | Kind::Open | Kind::Event | Kind::KeeperOpen | Kind::KeeperEvent => {
                Err(Broken)
            }
        };
        match taken {
            Ok(()) => Late::Done,
            Err(Broken) => self.reset(id),
        }
    }

    /// Ends a stream whose peer broke the rules.
    fn reset(&self, id: u32) -> Late {
        if let Some(stream) = self.streams.lock().remove(&id) {
            stream.deliver_reset();
        }
        self.port
            .send_soon(&Frame::bare(id, Kind::Reset, Channel::Input))
    }

    fn open(&self, frame: &Frame) -> Late {
        let id = frame.stream;
        let request = match frame.decode::<Request>() {
            Ok(request) => request,
            Err(error) => {
                return self.refuse(id, failure(FailureKind::InvalidInput, error.to_string()));
            }
        };
        let mut streams = self.streams.lock();
        if streams.contains_key(&id) {
            drop(streams);
            return self.reset(id);
        }
        if self.agent.stopping.load(Ordering::Acquire) {
            drop(streams);
            return self.refuse(
                id,
                failure(
                    FailureKind::ShuttingDown,
                    "the machine is going down and takes no more requests",
                ),
            );
        }
        // The one request that is answered here: it needs neither a thread nor a window.
        if request == Request::Ping {
            drop(streams);
            return self
                .port
                .send_soon(&Frame::message(id, Kind::Event, &Event::Done));
        }
        let too_many = |what| failure(FailureKind::TooMany, what);
        if streams.len() >= STREAMS_MAX {
            drop(streams);
            return self.refuse(
                id,
                too_many(format!("{STREAMS_MAX} streams are open already")),
            );
        }
        let is_command = matches!(request, Request::Exec(_));
        let stream = match Stream::new(id, is_command, Arc::clone(&self.port)) {
            Ok(stream) => Arc::new(stream),
            Err(error) => {
                drop(streams);
                return self.refuse(id, too_many(format!("opening a stream: {error}")));
            }
        };
        streams.insert(id, Arc::clone(&stream));
        drop(streams);
        let session = {
            let agent = Arc::clone(&self.agent);
            let streams = Arc::clone(&self.streams);
            move || session(&agent, &streams, &stream, &request)
        };
        if let Err(error) = self.agent.workers.run(session) {
            self.streams.lock().remove(&id);
            return self.refuse(
                id,
                too_many(format!("starting a thread for a request: {error}")),
            );
        }
        Late::Done
    }

    fn refuse(&self, id: u32, why: Failure) -> Late {
        self.port
            .send_soon(&Frame::message(id, Kind::Event, &Event::Failed(why)))
    }
}

/// Carries one request out, whatever happens, and ends its stream.
fn session(agent: &Arc<Agent>, streams: &Streams, stream: &Arc<Stream>, request: &Request) {
    let result = std::panic::catch_unwind(AssertUnwindSafe(|| carry_out(agent, stream, request)));
    let last = match result {
        Ok(Ok(last)) => Some(last),
        Ok(Err(Stop::Failed(why))) => Some(failed(why)),
        Ok(Err(Stop::Gone)) => None,
        Err(_) => Some(failed(failure(
            FailureKind::Io,
            "the agent has a defect that this request ran into; its console says where",
        ))),
    };
    // Forgotten first: the host may open the next stream as soon as it has the last frame, and must
    // not find this one counted. Another stream may have the number by now, if this one was reset.
    {
        let mut open = streams.lock();
        if open
            .get(&stream.id)
            .is_some_and(|known| Arc::ptr_eq(known, stream))
        {
            open.remove(&stream.id);
        }
    }
    if let Some(last) = last {
        stream.send_last(last.channels, &last.event);
    }
}

fn failed(why: Failure) -> Last {
    Last {
        channels: &[],
        event: Event::Failed(why),
    }
}

fn carry_out(agent: &Arc<Agent>, stream: &Arc<Stream>, request: &Request) -> Result<Last, Stop> {
    match request {
        Request::Exec(request) => exec::run(agent, stream, request),
        Request::Archive(request) => files::archive(agent, stream, request),
        Request::Extract(request) => extract::extract(stream, request),
        Request::List(request) => list::list(stream, request),
        Request::Facts => facts::facts().map_err(Stop::from),
        Request::Birth(request) => birth::birth(agent, request).map_err(Stop::from),
        Request::Shutdown(request) => shutdown::shutdown(agent, request).map_err(Stop::from),
        Request::Ping => Ok(Last::done()),
        Request::Connect(request) => connect::connect(stream, request),
        Request::Listen(request) => listen::listen(agent, stream, request),
        Request::Accept(request) => listen::accept(agent, stream, *request),
        Request::Datagrams(request) => datagrams::datagrams(stream, request),
        Request::Grow(request) => grow::grow(agent, request).map_err(Stop::from),
        Request::Settle => Ok(shutdown::settle(agent)),
        Request::Mount(request) => mount::mount(stream, request),
    }
}

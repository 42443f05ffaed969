//! The one task that owns the machine. Everything that can wake it is an [`Input`], the machine's
//! end, a deadline or a signal; everything it does to the outside is done here.
//!
//! ```text
//! booting ──hello, birth──> serving ──stop──> stopping ──> off: row stopped, keeper ends
//!    └──── deadline, machine gone ────────────────────────> off: row error
//! any ──destroy, owner gone, time-to-live──> machine killed, files and row removed
//! ```

use std::collections::HashMap;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::time::Duration;

use jiff::Timestamp;
use rustix::event::{PollFd, PollFlags, poll};
use smolvm_engine::launch::Launch;
use smolvm_engine::layout::Layout;
use smolvm_engine::store::{State, Store};
use smolvm_engine::teardown;
use smolvm_host::ProcessIdentity;
use smolvm_host::os::Os;
use smolvm_proto::keeper::{Done, KeeperEvent, KeeperFailure, KeeperRequest, Ready, StopRequest};
use smolvm_proto::message::{Birth, EnvVar, Event, Request, ShutdownRequest};
use smolvm_proto::version::{Hello, negotiate};
use smolvm_proto::{Frame, Kind};
use smolvm_vmm::{Accel, Exit, Vm};
use tokio::net::UnixListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use crate::console::{self, Tail};
use crate::error::KeeperError;
use crate::link::{self, Outgoing};
use crate::routes::{ClientId, FromGuest, Routes};
use crate::template::Started;

/// The keeper's own streams to the guest; those of clients come after them.
const BIRTH_STREAM: u32 = 1;
const SHUTDOWN_STREAM: u32 = 2;
const FIRST_CLIENT_STREAM: u32 = 3;

/// Frames waiting for the driver. Full, it stops the readers, not the machine.
const INBOX_FRAMES: usize = 64;
/// Frames clients may send before the guest is ready.
const EARLY_FRAMES_MAX: usize = 4096;
/// Time the guest has to write its disks out after its processes have ended.
const SYNC_TIME: Duration = Duration::from_secs(5);
/// Time clients have to take the last answer.
const FAREWELL_TIME: Duration = Duration::from_secs(1);
/// Grace when the host asks the keeper to end (SIGTERM).
const TERM_GRACE: Duration = Duration::from_secs(5);

/// What the driver is told.
#[derive(Debug)]
enum Input {
    Guest(Option<Frame>),
    Client(ClientId, Option<Frame>),
    /// The process that started an ephemeral sandbox has ended.
    StarterGone,
}

#[derive(Debug)]
enum Phase {
    Booting { deadline: Instant, hello: bool },
    Serving(Ready),
    Stopping { deadline: Instant },
}

#[derive(Debug)]
struct Client {
    outgoing: Outgoing,
    writing: JoinHandle<()>,
    owner: bool,
}

/// Why the loop ends.
#[derive(Debug)]
enum End {
    /// Off as asked; whether the guest had to be killed.
    Stopped { forced: bool },
    /// Off without being asked.
    Broken { state: State, reason: String },
    /// The guest's agent is not heard any more; most often because the machine is gone.
    Lost,
    /// To be removed.
    Destroy { why: &'static str },
}

/// The task's state.
#[derive(Debug)]
pub(crate) struct Driver {
    launch: Launch,
    layout: Layout,
    store: Store,
    begun: Instant,
    /// When the time-to-live is over; it runs from the moment the guest serves.
    ttl: Option<Instant>,
    vmm_us: u64,
    vm: Box<dyn Vm>,
    guest: Outgoing,
    guest_writing: JoinHandle<()>,
    tail: Tail,
    phase: Phase,
    kernel: String,
    hello_us: u64,
    clients: HashMap<ClientId, Client>,
    next_client: ClientId,
    routes: Routes,
    early: Vec<(ClientId, Frame)>,
    /// Streams that wait for the guest, for the end of a stop, and for the removal.
    waiting_ready: Vec<(ClientId, u32)>,
    waiting_stop: Vec<(ClientId, u32)>,
    waiting_destroy: Vec<(ClientId, u32)>,
    inbox: mpsc::Sender<Input>,
}

/// Owns a machine that was just started, until it is off.
pub(crate) async fn run(
    launch: Launch,
    begun: Instant,
    started: Started,
    listener: StdUnixListener,
) -> Result<(), KeeperError> {
    let Started {
        mut vm,
        channel,
        console,
        greeting,
    } = started;
    let vmm_us = micros(begun);
    let layout = Layout::new(launch.data_dir.clone());
    let dir = layout.sandbox(&launch.id);
    let tail = Tail::default();
    let (inbox, mut inputs) = mpsc::channel(INBOX_FRAMES);

    let (guest, guest_writing) = link::open(channel, inbox.clone(), Input::Guest)
        .map_err(|error| KeeperError::io("listen to the guest", error))?;
    let console_task = tokio::spawn(console::record(console, dir.console(), tail.clone()));
    listener
        .set_nonblocking(true)
        .map_err(|error| KeeperError::io("listen for clients", error))?;
    let listener = UnixListener::from_std(listener)
        .map_err(|error| KeeperError::io("listen for clients", error))?;
    let mut terminate = signal(SignalKind::terminate())
        .map_err(|error| KeeperError::io("listen for signals", error))?;

    if let Some(starter) = &launch.starter {
        watch_starter(starter, inbox.clone())?;
    }

    // The guest boots while this is written.
    let mut store = Store::open(&layout.database())?;
    let still_wanted = store.set_processes(
        &launch.id,
        &launch.engine,
        match launch.vm.accel {
            Accel::Kvm => "kvm",
            Accel::Emulation => "emulation",
        },
        &identity(std::process::id())?.ok_or_else(|| {
            KeeperError::io(
                "find this process in /proc",
                std::io::ErrorKind::NotFound.into(),
            )
        })?,
        // One that has ended already is reported by the driver, with what it said.
        identity(vm.pid())?.as_ref(),
    )?;
    if !still_wanted {
        vm.kill().await?;
        return Err(KeeperError::Declared);
    }

    let boot = Duration::from_millis(launch.boot_timeout_ms);
    let mut driver = Driver {
        layout,
        store,
        begun,
        ttl: None,
        vmm_us,
        vm,
        guest,
        guest_writing,
        tail,
        phase: Phase::Booting {
            deadline: begun + boot,
            hello: false,
        },
        kernel: String::new(),
        hello_us: 0,
        clients: HashMap::new(),
        next_client: 0,
        routes: Routes::new(FIRST_CLIENT_STREAM),
        early: Vec::new(),
        waiting_ready: Vec::new(),
        waiting_stop: Vec::new(),
        waiting_destroy: Vec::new(),
        inbox,
        launch,
    };
    let ended = greeting.and_then(|frame| driver.hear_hello(&frame));
    let end = match ended {
        Some(end) => end,
        None => driver.serve(&mut inputs, &listener, &mut terminate).await,
    };
    let end = match end {
        End::Lost => driver.explain_loss().await,
        end => end,
    };
    let exit = driver.vm.kill().await?;
    // The last console lines may say why.
    let _ = tokio::time::timeout(FAREWELL_TIME, console_task).await;
    driver.finish(end, &exit).await
}

impl Driver {
    async fn serve(
        &mut self,
        inputs: &mut mpsc::Receiver<Input>,
        listener: &UnixListener,
        terminate: &mut Signal,
    ) -> End {
        let far = self.begun + Duration::from_secs(u64::from(u32::MAX));
        loop {
            let deadline = match self.phase {
                Phase::Booting { deadline, .. } | Phase::Stopping { deadline } => deadline,
                Phase::Serving(_) => far,
            };
            let end = tokio::select! {
                Some(input) = inputs.recv() => self.hear(input),
                accepted = listener.accept() => {
                    match accepted.and_then(|(socket, _)| socket.into_std()) {
                        Ok(socket) => self.welcome(socket),
                        Err(error) => tracing::warn!(%error, "could not accept a client"),
                    }
                    None
                }
                exit = self.vm.wait() => Some(self.gone(&exit)),
                () = sleep_until(deadline) => Some(self.late()),
                () = sleep_until(self.ttl.unwrap_or(far)) => Some(End::Destroy { why: "its time-to-live is over" }),
                _ = terminate.recv() => self.stop(u64::try_from(TERM_GRACE.as_millis()).unwrap_or(0)),
            };
            if let Some(end) = end {
                return end;
            }
        }
    }

    fn welcome(&mut self, socket: std::os::unix::net::UnixStream) {
        let id = self.next_client;
        self.next_client += 1;
        match link::open(socket, self.inbox.clone(), move |frame| {
            Input::Client(id, frame)
        }) {
            Ok((outgoing, writing)) => {
                self.clients.insert(
                    id,
                    Client {
                        outgoing,
                        writing,
                        owner: false,
                    },
                );
            }
            Err(error) => tracing::warn!(%error, "could not serve a client"),
        }
    }

    fn hear(&mut self, input: Input) -> Option<End> {
        match input {
            Input::Guest(Some(frame)) => self.hear_guest(frame),
            Input::Guest(None) => Some(End::Lost),
            Input::StarterGone => Some(End::Destroy {
                why: "the process that started it is gone",
            }),
            Input::Client(client, Some(frame)) => self.hear_client(client, frame),
            Input::Client(client, None) => {
                for frame in self.routes.drop_client(client) {
                    self.guest.send(frame);
                }
                let gone = self.clients.remove(&client)?;
                gone.owner.then_some(End::Destroy {
                    why: "the process it belonged to is gone",
                })
            }
        }
    }

    fn hear_guest(&mut self, frame: Frame) -> Option<End> {
        match (frame.stream, frame.kind) {
            (0, Kind::Hello) => self.hear_hello(&frame),
            (BIRTH_STREAM, Kind::Event) => self.hear_birth(&frame),
            (SHUTDOWN_STREAM, Kind::Event) => matches!(self.phase, Phase::Stopping { .. })
                .then_some(End::Stopped { forced: false }),
            _ => {
                match self.routes.route_out(frame) {
                    FromGuest::Deliver(client, frame) => self.tell(client, frame),
                    FromGuest::Drop => {}
                    FromGuest::Cut(client, to_client, to_guest) => {
                        tracing::warn!("the guest broke the rules of a stream");
                        self.tell(client, to_client);
                        self.guest.send(to_guest);
                    }
                }
                None
            }
        }
    }

    fn hear_hello(&mut self, frame: &Frame) -> Option<End> {
        let Phase::Booting { hello, .. } = &mut self.phase else {
            // The agent lost its place in the stream and began anew: it knows no stream any more.
            tracing::warn!("the guest's agent began anew");
            for (client, frame) in self.routes.drop_all() {
                self.tell(client, frame);
            }
            return None;
        };
        if std::mem::replace(hello, true) {
            return None;
        }
        let version = frame
            .decode::<Hello>()
            .map_err(|error| error.to_string())
            .and_then(|hello| {
                self.kernel.clone_from(&hello.kernel);
                negotiate(hello.version_min, hello.version_max).map_err(|error| error.to_string())
            });
        if let Err(reason) = version {
            return Some(End::Broken {
                state: State::Error,
                reason,
            });
        }
        self.hello_us = micros(self.begun);
        let birth = match self.birth() {
            Ok(birth) => birth,
            Err(error) => {
                return Some(End::Broken {
                    state: State::Error,
                    reason: error.to_string(),
                });
            }
        };
        self.guest.send(Frame::message(
            BIRTH_STREAM,
            Kind::Open,
            &Request::Birth(birth),
        ));
        None
    }

    fn birth(&self) -> Result<Birth, KeeperError> {
        let mut entropy = vec![0; 64];
        rustix::rand::getrandom(&mut entropy, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| KeeperError::io("get random bytes for the guest", error.into()))?;
        let now = Timestamp::now().as_nanosecond();
        Ok(Birth {
            hostname: self.launch.name.clone(),
            env: self
                .launch
                .env
                .iter()
                .map(|(name, value)| EnvVar {
                    name: name.clone().into_bytes().into(),
                    value: value.clone().into_bytes().into(),
                })
                .collect(),
            wall_clock_ns: u64::try_from(now).unwrap_or(0),
            entropy: entropy.into(),
            cwd: self
                .launch
                .workdir
                .as_ref()
                .map(|path| path.clone().into_bytes().into()),
            user: self.launch.user.clone(),
        })
    }

    fn hear_birth(&mut self, frame: &Frame) -> Option<End> {
        if !matches!(self.phase, Phase::Booting { hello: true, .. }) {
            return None;
        }
        let broken = |reason: String| {
            Some(End::Broken {
                state: State::Error,
                reason,
            })
        };
        match frame.decode::<Event>() {
            Ok(Event::Done) => {}
            Ok(Event::Failed(failure)) => return broken(failure.message),
            Ok(other) => {
                return broken(format!(
                    "the guest's agent answered its birth with {other:?}"
                ));
            }
            Err(error) => return broken(error.to_string()),
        }
        let recorded = self.store.transition(
            &self.launch.id,
            &[State::Starting],
            State::Running,
            None,
            Timestamp::now(),
        );
        match recorded {
            Ok(true) => {}
            Ok(false) => return broken(KeeperError::Declared.to_string()),
            Err(error) => return broken(error.to_string()),
        }
        let ready = Ready {
            kernel: self.kernel.clone(),
            vmm_us: self.vmm_us,
            hello_us: self.hello_us,
            ready_us: micros(self.begun),
        };
        self.phase = Phase::Serving(ready.clone());
        self.ttl = self
            .launch
            .ttl_ms
            .and_then(|ttl| Instant::now().checked_add(Duration::from_millis(ttl)));
        for waiter in std::mem::take(&mut self.waiting_ready) {
            self.answer(waiter, &KeeperEvent::Ready(ready.clone()));
        }
        for (client, frame) in std::mem::take(&mut self.early) {
            if let Some(frame) = self.routes.route_in(client, frame) {
                self.guest.send(frame);
            }
        }
        None
    }

    fn hear_client(&mut self, client: ClientId, frame: Frame) -> Option<End> {
        if frame.kind != Kind::KeeperOpen {
            if matches!(self.phase, Phase::Booting { .. }) {
                if self.early.len() < EARLY_FRAMES_MAX {
                    self.early.push((client, frame));
                }
            } else if let Some(frame) = self.routes.route_in(client, frame) {
                self.guest.send(frame);
            }
            return None;
        }
        let waiter = (client, frame.stream);
        let request = match frame.decode::<KeeperRequest>() {
            Ok(request) => request,
            Err(error) => {
                self.answer(waiter, &failure(error.to_string(), Vec::new()));
                return None;
            }
        };
        match request {
            KeeperRequest::WaitReady => {
                match &self.phase {
                    Phase::Booting { .. } => self.waiting_ready.push(waiter),
                    Phase::Serving(ready) => {
                        let ready = ready.clone();
                        self.answer(waiter, &KeeperEvent::Ready(ready));
                    }
                    Phase::Stopping { .. } => self.answer(
                        waiter,
                        &failure("the sandbox is going down".to_owned(), Vec::new()),
                    ),
                }
                None
            }
            KeeperRequest::Own => {
                if let Some(client) = self.clients.get_mut(&client) {
                    client.owner = true;
                }
                self.answer(waiter, &KeeperEvent::Done(Done::default()));
                None
            }
            KeeperRequest::Stop(StopRequest { grace_ms }) => {
                self.waiting_stop.push(waiter);
                self.stop(grace_ms)
            }
            KeeperRequest::Destroy => {
                self.waiting_destroy.push(waiter);
                Some(End::Destroy {
                    why: "it was asked for",
                })
            }
        }
    }

    fn stop(&mut self, grace_ms: u64) -> Option<End> {
        if grace_ms == 0 {
            return Some(End::Stopped { forced: true });
        }
        match self.phase {
            // A guest that does not serve cannot be asked.
            Phase::Booting { .. } => return Some(End::Stopped { forced: true }),
            Phase::Stopping { .. } => return None,
            Phase::Serving(_) => {}
        }
        let recorded = self.store.transition(
            &self.launch.id,
            &[State::Running],
            State::Stopping,
            None,
            Timestamp::now(),
        );
        if let Err(error) = recorded {
            tracing::warn!(%error, "could not record the stop");
        }
        self.guest.send(Frame::message(
            SHUTDOWN_STREAM,
            Kind::Open,
            &Request::Shutdown(ShutdownRequest { grace_ms }),
        ));
        self.phase = Phase::Stopping {
            deadline: Instant::now() + Duration::from_millis(grace_ms) + SYNC_TIME,
        };
        None
    }

    fn late(&self) -> End {
        match self.phase {
            Phase::Stopping { .. } => End::Stopped { forced: true },
            Phase::Booting { hello, .. } => End::Broken {
                state: State::Error,
                reason: format!(
                    "the guest was not ready after {} s{}",
                    self.launch.boot_timeout_ms / 1000,
                    if hello {
                        ", though its agent had spoken"
                    } else {
                        ""
                    }
                ),
            },
            Phase::Serving(_) => unreachable!("a guest that serves has no deadline"),
        }
    }

    fn gone(&self, exit: &Result<Exit, smolvm_vmm::VmError>) -> End {
        let reason = match exit {
            Ok(exit) => exit.to_string(),
            Err(error) => error.to_string(),
        };
        match self.phase {
            Phase::Stopping { .. } => End::Stopped { forced: false },
            Phase::Booting { .. } => End::Broken {
                state: State::Error,
                reason: format!("the machine ended before the guest was ready: {reason}"),
            },
            // The kernel's own word for it (kernel/panic.c); it resets the machine afterwards.
            Phase::Serving(_)
                if self
                    .tail
                    .lines()
                    .iter()
                    .any(|line| line.contains("Kernel panic")) =>
            {
                End::Broken {
                    state: State::Error,
                    reason: "the guest's kernel panicked; its console says why".to_owned(),
                }
            }
            Phase::Serving(_) if exit.as_ref().is_ok_and(|exit| exit.code == Some(0)) => {
                End::Broken {
                    state: State::Stopped,
                    reason: "the guest switched itself off, or restarted".to_owned(),
                }
            }
            Phase::Serving(_) => End::Broken {
                state: State::Error,
                reason: format!("the machine ended: {reason}"),
            },
        }
    }

    /// Tells a machine that ended from a guest that broke off or sent what is no frame.
    async fn explain_loss(&mut self) -> End {
        match tokio::time::timeout(FAREWELL_TIME, self.vm.wait()).await {
            Ok(exit) => self.gone(&exit),
            Err(_) => End::Broken {
                state: State::Error,
                reason: "the guest's agent broke the connection off, so the machine was killed"
                    .to_owned(),
            },
        }
    }

    /// The machine is off. Makes the record true, answers whoever waits, and lets go.
    async fn finish(mut self, end: End, exit: &Exit) -> Result<(), KeeperError> {
        let destroy = self.launch.ephemeral || matches!(end, End::Destroy { .. });
        let (state, reason) = match &end {
            End::Stopped { .. } => (State::Stopped, None),
            End::Broken { state, reason } => (*state, Some(reason.clone())),
            End::Lost => unreachable!("explained before"),
            End::Destroy { why } => (State::Deleting, Some((*why).to_owned())),
        };
        tracing::info!(?end, %exit, "the machine is off");
        let outcome = if destroy {
            teardown::destroy(&Os::new(), &self.layout, &mut self.store, &self.launch.id)
        } else {
            let held = [State::Starting, State::Running, State::Stopping];
            self.store
                .transition(
                    &self.launch.id,
                    &held,
                    state,
                    reason.as_deref(),
                    Timestamp::now(),
                )
                .map(|_| ())
        };
        let why = match &end {
            End::Broken { reason, .. } => reason.clone(),
            End::Stopped { .. } | End::Lost | End::Destroy { .. } => {
                "the sandbox was switched off".to_owned()
            }
        };
        for waiter in std::mem::take(&mut self.waiting_ready) {
            self.answer(
                waiter,
                &failure(
                    format!("sandbox `{}` did not start: {why}", self.launch.name),
                    self.tail.lines(),
                ),
            );
        }
        let forced = matches!(end, End::Stopped { forced: true });
        let answer = match &outcome {
            Ok(()) => KeeperEvent::Done(Done { forced }),
            Err(error) => failure(error.to_string(), Vec::new()),
        };
        let waiting = [
            std::mem::take(&mut self.waiting_stop),
            std::mem::take(&mut self.waiting_destroy),
        ];
        for waiter in waiting.into_iter().flatten() {
            self.answer(waiter, &answer);
        }
        self.farewell().await;
        Ok(outcome?)
    }

    /// Gives every client the time to take what was sent to it.
    async fn farewell(self) {
        self.guest_writing.abort();
        let deadline = Instant::now() + FAREWELL_TIME;
        for client in self.clients.into_values() {
            drop(client.outgoing);
            let _ = tokio::time::timeout_at(deadline, client.writing).await;
        }
    }

    fn answer(&self, (client, stream): (ClientId, u32), event: &KeeperEvent) {
        self.tell(client, Frame::message(stream, Kind::KeeperEvent, event));
    }

    fn tell(&self, client: ClientId, frame: Frame) {
        if let Some(client) = self.clients.get(&client) {
            client.outgoing.send(frame);
        }
    }
}

/// Tells the driver when the starter ends, which may have happened already. On a thread of its own,
/// which costs a page or two and ends with the process.
fn watch_starter(starter: &ProcessIdentity, inbox: mpsc::Sender<Input>) -> Result<(), KeeperError> {
    let pidfd = starter.open().map_err(smolvm_engine::Error::from)?;
    std::thread::Builder::new()
        .name("starter-watch".to_owned())
        .stack_size(64 * 1024)
        .spawn(move || {
            if let Some(pidfd) = pidfd {
                let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
                // It fails only without memory, and then the sandbox is better gone than for ever.
                let _ = rustix::io::retry_on_intr(|| poll(&mut fds, None));
            }
            let _ = inbox.blocking_send(Input::StarterGone);
        })
        .map(|_| ())
        .map_err(|error| KeeperError::io("watch the process that started the sandbox", error))
}

fn failure(message: String, console: Vec<String>) -> KeeperEvent {
    KeeperEvent::Failed(KeeperFailure { message, console })
}

fn identity(pid: u32) -> Result<Option<ProcessIdentity>, KeeperError> {
    let pid = i32::try_from(pid).unwrap_or(i32::MAX);
    Ok(ProcessIdentity::of(pid).map_err(smolvm_engine::Error::from)?)
}

fn micros(begun: Instant) -> u64 {
    u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX)
}

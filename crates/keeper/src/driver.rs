//! The one task that owns the machine. Everything that can wake it is an [`Input`], the machine's
//! end, a deadline or a signal; everything it does to the outside is done here.
//!
//! ```text
//! booting ──hello, birth──> serving ──stop──> stopping ──> off: row stopped, keeper ends
//!    ├──── deadline, machine gone ────────────────────────> off: row error
//!    └──birth, for a member of a pool──> warming ──> parked ──claim──> booting, at its birth
//! serving ──pause──> serving, standing still ──resume──> serving
//! any ──destroy, owner gone, time-to-live──> machine killed, files and row removed
//! ```

use std::collections::{HashMap, VecDeque};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use rustix::event::{PollFd, PollFlags, poll};
use smolvm_engine::jail;
use smolvm_engine::launch::{Launch, WarmCommand};
use smolvm_engine::layout::Layout;
use smolvm_engine::ports::{self, Bound};
use smolvm_engine::store::{State, Store};
use smolvm_engine::teardown;
use smolvm_engine::{Error, ErrorKind, NetworkSpec, PublishedPort, VolumeLaunch};
use smolvm_host::ProcessIdentity;
use smolvm_host::net::user::HostSide;
use smolvm_host::oci::Digest;
use smolvm_host::os::Os;
use smolvm_host::process::waited_for_processor;
use smolvm_proto::keeper::{
    CaptureRequest, Done, GrowDiskRequest, KeeperEvent, KeeperFailure, KeeperReason, KeeperRequest,
    PortMapping, PortPlace, Ready, StopRequest,
};
use smolvm_proto::message::{Birth, EnvVar, Event, Request, ShutdownRequest, Volume};
use smolvm_proto::version::{Hello, negotiate};
use smolvm_proto::{Frame, Kind};
use smolvm_vmm::{Accel, DiskError, Exit, Vm};
use tokio::net::UnixListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use crate::console::{self, Tail};
use crate::error::KeeperError;
use crate::link::{self, Outgoing};
use crate::member::Said;
use crate::mounts::{MOUNT_TIME, Mounts};
use crate::net::Network;
use crate::ports::{Line, Ports};
use crate::routes::{ClientId, FromGuest, Routes};
use crate::ssh;
use crate::template::{self, Started};

/// The keeper's own streams to the guest; those of clients come after them.
const BIRTH_STREAM: u32 = 1;
const SHUTDOWN_STREAM: u32 = 2;
pub(crate) const WARM_STREAM: u32 = 3;
pub(crate) const PING_STREAM: u32 = 4;
const FIRST_CLIENT_STREAM: u32 = 5;

/// Frames waiting for the driver. Full, it stops the readers, not the machine.
const INBOX_FRAMES: usize = 64;
/// Frames clients may send before the guest is ready.
const EARLY_FRAMES_MAX: usize = 4096;
/// Time the guest has to write its disks out after its processes have ended.
const SYNC_TIME: Duration = Duration::from_secs(5);
/// Time clients have to take the last answer.
const FAREWELL_TIME: Duration = Duration::from_secs(1);
/// Time the guest has to answer before it is made to stand still.
pub(crate) const STILL_TIME: Duration = Duration::from_secs(5);
/// Time a member of a pool has to become a sandbox, not counting the time it waits for a processor: a
/// hundred times what it takes. Whoever claims it tries the next one then.
pub(crate) const CLAIM_TIME: Duration = Duration::from_secs(1);
/// The same, however long it waits for a processor.
const CLAIM_TIME_MOST: Duration = Duration::from_secs(10);
/// Most time each command may take that warms a member.
pub(crate) const WARM_TIME: Duration = Duration::from_secs(300);
/// Grace when the host asks the keeper to end (SIGTERM).
const TERM_GRACE: Duration = Duration::from_secs(5);

/// What the driver is told.
#[derive(Debug)]
pub(crate) enum Input {
    Guest(Option<Frame>),
    /// The guest has come again; what it had before is over.
    GuestBack,
    Client(ClientId, Option<Frame>),
    /// The process that started an ephemeral sandbox has ended.
    StarterGone,
    /// The keeper itself is a client.
    Inside(StdUnixStream),
    /// All mounts are made, or why not.
    Mounted(Result<(), String>),
}

#[derive(Debug)]
pub(crate) enum Phase {
    Booting {
        deadline: Instant,
        hello: bool,
    },
    /// Its mounts are made, before anybody else is heard.
    Mounting {
        deadline: Instant,
    },
    /// A member of a pool runs what it is to have run; the first is under way.
    Warming {
        deadline: Instant,
        left: VecDeque<WarmCommand>,
        said: Said,
    },
    /// A member of a pool stands still until it is claimed.
    Parked(Ready),
    Serving(Ready),
    Stopping {
        deadline: Instant,
    },
}

/// How far the guest is from standing still. It may do so only when it has read every frame that was
/// sent to it ([`smolvm_proto::rejoin`]); what comes for it meanwhile is held back.
#[derive(Debug)]
pub(crate) enum Motion {
    Moving,
    /// It was asked whether it has read everything.
    Asked {
        deadline: Instant,
        wish: Wish,
        held: Vec<Frame>,
    },
    Still {
        held: Vec<Frame>,
        /// Whether it will be cut off from its streams when it goes on.
        cut_off: bool,
    },
    /// It goes on, and has not come again since its streams were cut off.
    CutOff {
        held: Vec<Frame>,
    },
}

/// Why the guest is to stand still, and who wants to know.
#[derive(Debug)]
pub(crate) enum Wish {
    Pause(Waiter),
    Capture(Waiter, PathBuf),
}

/// A member of a pool that is on its way to be a sandbox.
#[derive(Debug)]
pub(crate) struct Claiming {
    /// The pool it was of.
    pub(crate) pool: String,
    /// What its machine had waited for a processor before.
    pub(crate) starved: Duration,
}

/// A client's stream that waits for an answer.
pub(crate) type Waiter = (ClientId, u32);

#[derive(Debug)]
struct Client {
    outgoing: Outgoing,
    writing: JoinHandle<()>,
    owner: bool,
    /// Whether it is the one that mounts, before any other is heard.
    mounts: bool,
}

/// Why the loop ends.
#[derive(Debug)]
pub(crate) enum End {
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
    pub(crate) launch: Launch,
    layout: Layout,
    pub(crate) store: Store,
    /// This process.
    me: ProcessIdentity,
    pub(crate) begun: Instant,
    /// When the time-to-live is over; it runs from the moment the guest serves.
    ttl: Option<Instant>,
    vmm_us: u64,
    pub(crate) vm: Box<dyn Vm>,
    /// Where the host's network is, and so its ports.
    pub(crate) host: Arc<HostSide>,
    pub(crate) network: Option<Network>,
    pub(crate) guest: Outgoing,
    guest_writing: JoinHandle<()>,
    /// Whether a snapshot cuts the guest off from its streams for a moment.
    pub(crate) comes_again: bool,
    tail: Tail,
    pub(crate) phase: Phase,
    pub(crate) motion: Motion,
    pub(crate) claiming: Option<Claiming>,
    kernel: String,
    hello_us: u64,
    booted_because: Option<String>,
    clients: HashMap<ClientId, Client>,
    next_client: ClientId,
    pub(crate) routes: Routes,
    early: Vec<(ClientId, Frame)>,
    /// Where SSH clients come in, once the guest serves.
    ssh: Option<ssh::Listener>,
    /// Streams that wait for the guest, for the end of a stop, and for the removal.
    pub(crate) waiting_ready: Vec<Waiter>,
    pub(crate) waiting_resume: Vec<Waiter>,
    waiting_stop: Vec<Waiter>,
    waiting_destroy: Vec<Waiter>,
    pub(crate) ports: Ports,
    mounts: Mounts,
    pub(crate) inbox: mpsc::Sender<Input>,
    /// Reports of disks, once the guest serves.
    disk_errors: Option<mpsc::Receiver<DiskError>>,
    /// What is wrong with the machine though it runs.
    trouble: Option<Trouble>,
    /// Set once it is to be removed as soon as its guest has written to its volumes what it has for them.
    doomed: Option<&'static str>,
}

/// What is wrong with a machine that runs.
#[derive(Debug)]
struct Trouble {
    text: String,
    /// Whether the sandbox's row says it.
    recorded: bool,
}

/// What a sandbox has outside its machine.
#[derive(Debug)]
pub(crate) struct Outside {
    /// Where the host's network is.
    pub(crate) host: Arc<HostSide>,
    pub(crate) network: Option<Network>,
    pub(crate) ports: Vec<Bound>,
}

/// Owns a machine that was just started, until it is off.
pub(crate) async fn run(
    launch: Launch,
    begun: Instant,
    started: Started,
    outside: Outside,
    listener: StdUnixListener,
) -> Result<(), KeeperError> {
    let Outside {
        host,
        network,
        ports,
    } = outside;
    let Started {
        mut vm,
        channel,
        stream,
        console,
        greeting,
        booted_because,
    } = started;
    let vmm_us = micros(begun);
    let layout = Layout::new(launch.data_dir.clone());
    let dir = layout.sandbox(&launch.id);
    let tail = Tail::default();
    let (inbox, mut inputs) = mpsc::channel(INBOX_FRAMES);

    let comes_again = channel.is_door();
    let (guest, guest_writing) =
        link::open_guest(channel, stream, inbox.clone(), Input::Guest, || {
            Input::GuestBack
        });
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

    let me = identity(std::process::id())?.ok_or_else(|| {
        KeeperError::io(
            "find this process in /proc",
            std::io::ErrorKind::NotFound.into(),
        )
    })?;
    // The guest boots while this is written.
    let mut store = Store::open(&layout.database())?;
    let still_wanted = store.set_processes(
        &launch.id,
        &launch.engine,
        match launch.vm.accel {
            Accel::Kvm => "kvm",
            Accel::Emulation => "emulation",
        },
        &me,
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
        me,
        begun,
        ttl: None,
        vmm_us,
        vm,
        host,
        network,
        guest,
        guest_writing,
        comes_again,
        tail,
        phase: Phase::Booting {
            deadline: begun + boot,
            hello: false,
        },
        motion: Motion::Moving,
        claiming: None,
        kernel: String::new(),
        hello_us: 0,
        booted_because,
        clients: HashMap::new(),
        next_client: 0,
        routes: Routes::new(FIRST_CLIENT_STREAM),
        early: Vec::new(),
        ssh: None,
        waiting_ready: Vec::new(),
        waiting_resume: Vec::new(),
        waiting_stop: Vec::new(),
        waiting_destroy: Vec::new(),
        ports: Ports::new(&launch.name, inbox.clone(), ports),
        mounts: Mounts::default(),
        inbox,
        launch,
        disk_errors: None,
        trouble: None,
        doomed: None,
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
    let destroy = driver.destroys(&end);
    driver.begin_end(&end).await?;
    let exit = driver.vm.kill().await?;
    // The last console lines may say why.
    let _ = tokio::time::timeout(FAREWELL_TIME, console_task).await;
    driver.finish(end, destroy, &exit).await
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
                Phase::Booting { deadline, .. }
                | Phase::Mounting { deadline }
                | Phase::Warming { deadline, .. }
                | Phase::Stopping { deadline } => deadline,
                Phase::Serving(_) | Phase::Parked(_) => far,
            };
            let answer_due = match self.motion {
                Motion::Asked { deadline, .. } => deadline,
                Motion::Moving | Motion::Still { .. } | Motion::CutOff { .. } => far,
            };
            let end = tokio::select! {
                Some(input) = inputs.recv() => self.hear(input).await,
                accepted = listener.accept() => {
                    match accepted.and_then(|(socket, _)| socket.into_std()) {
                        Ok(socket) => self.welcome(socket),
                        Err(error) => tracing::warn!(%error, "could not accept a client"),
                    }
                    None
                }
                accepted = ssh::accept(self.ssh.as_ref()) => {
                    match (accepted, &mut self.ssh) {
                        (Ok((socket, _)), Some(listener)) => listener.welcome(socket),
                        (Err(error), _) => tracing::warn!(%error, "could not accept an SSH client"),
                        (Ok(_), None) => {}
                    }
                    None
                }
                exit = self.vm.wait() => Some(self.gone(&exit)),
                () = sleep_until(deadline) => self.late(),
                Some(error) = next_of(&mut self.disk_errors) => {
                    self.hear_disk_error(&error);
                    None
                }
                () = sleep_until(answer_due) => {
                    self.will_not_stand_still();
                    None
                }
                () = sleep_until(self.ttl.unwrap_or(far)) => Some(End::Destroy { why: "its time-to-live is over" }),
                _ = terminate.recv() => {
                    self.stop(u64::try_from(TERM_GRACE.as_millis()).unwrap_or(0)).await
                }
            };
            match end {
                None => {}
                Some(End::Destroy { why }) if self.writes_first(why).await => {}
                Some(End::Stopped { forced }) => {
                    return match self.doomed {
                        Some(why) => End::Destroy { why },
                        None => End::Stopped { forced },
                    };
                }
                Some(end) => return end,
            }
        }
    }

    /// The guest was told of an input/output error, and may go on with a file system that is read-only
    /// from now on. The first of them is what people have to know.
    fn hear_disk_error(&mut self, error: &DiskError) {
        if self.trouble.is_some() {
            self.record_trouble();
            return;
        }
        let path = match self.launch.vm.disks.get(error.disk) {
            Some(disk) => disk.path.display().to_string(),
            None => format!("disk {}", error.disk),
        };
        let now = Timestamp::now();
        let what = match error.full {
            true => format!("the host's disk was full at {now:.0}: {path} could not be written"),
            false => format!("the host could not read or write {path} at {now:.0}"),
        };
        let then = "what the guest wrote last may be lost, and its file system be read-only until it is \
                    started again";
        let trouble = format!("{what}; {then}");
        tracing::error!("{trouble}");
        self.trouble = Some(Trouble {
            text: trouble,
            recorded: false,
        });
        self.record_trouble();
    }

    /// Records what is wrong, if it was not yet: where the disk is full, another moment may have room.
    fn record_trouble(&mut self) {
        let Some(trouble) = self.trouble.as_mut().filter(|trouble| !trouble.recorded) else {
            return;
        };
        match self.store.set_trouble(&self.launch.id, &trouble.text) {
            Ok(recorded) => trouble.recorded = recorded,
            Err(error) => tracing::warn!(%error, "could not record what is wrong"),
        }
    }

    /// Whether the sandbox is not to go before its guest has written to its volumes what it has for them.
    /// A guest that serves is then asked to go down at once, and has a bounded time for that.
    async fn writes_first(&mut self, why: &'static str) -> bool {
        if self.doomed.is_some() {
            return true;
        }
        if !self.launch.writes_to_volumes() {
            return false;
        }
        match &mut self.phase {
            Phase::Serving(_) => {
                if self.move_on().await.is_err() {
                    return false;
                }
                self.ask_to_go_down(0);
            }
            Phase::Stopping { deadline } => {
                *deadline = (*deadline).min(Instant::now() + SYNC_TIME);
            }
            Phase::Booting { .. }
            | Phase::Mounting { .. }
            | Phase::Warming { .. }
            | Phase::Parked(_) => return false,
        }
        self.ttl = None;
        self.doomed = Some(why);
        true
    }

    /// Asks the guest to go down, with so many milliseconds for its processes.
    fn ask_to_go_down(&mut self, grace_ms: u64) {
        self.guest.send(Frame::message(
            SHUTDOWN_STREAM,
            Kind::Open,
            &Request::Shutdown(ShutdownRequest { grace_ms }),
        ));
        self.phase = Phase::Stopping {
            deadline: Instant::now() + Duration::from_millis(grace_ms) + SYNC_TIME,
        };
    }

    fn welcome(&mut self, socket: StdUnixStream) {
        self.record_trouble();
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
                        mounts: false,
                    },
                );
            }
            Err(error) => tracing::warn!(%error, "could not serve a client"),
        }
    }

    async fn hear(&mut self, input: Input) -> Option<End> {
        match input {
            Input::Guest(Some(frame)) => self.hear_guest(frame).await,
            Input::Guest(None) => Some(End::Lost),
            Input::GuestBack => {
                // Where it was cut off no stream was open, and what came since is held back.
                if !matches!(self.motion, Motion::CutOff { .. }) {
                    self.drop_streams();
                }
                None
            }
            Input::StarterGone => Some(End::Destroy {
                why: "the process that started it is gone",
            }),
            Input::Inside(socket) => {
                let id = self.next_client;
                self.welcome(socket);
                // Nobody inside begins anything else before the guest serves.
                if let (Phase::Mounting { .. }, Some(client)) =
                    (&self.phase, self.clients.get_mut(&id))
                {
                    client.mounts = true;
                }
                None
            }
            Input::Mounted(mounted) => match (mounted, &self.phase) {
                (Ok(()), Phase::Mounting { .. }) => self.begin_to_serve(),
                (Err(reason), Phase::Mounting { .. }) => broken(reason),
                _ => None,
            },
            Input::Client(client, Some(frame)) => self.hear_client(client, frame).await,
            Input::Client(client, None) => {
                for frame in self.routes.drop_client(client) {
                    self.pass_to_guest(frame);
                }
                let gone = self.clients.remove(&client)?;
                gone.owner.then_some(End::Destroy {
                    why: "the process it belonged to is gone",
                })
            }
        }
    }

    async fn hear_guest(&mut self, frame: Frame) -> Option<End> {
        match (frame.stream, frame.kind) {
            (0, Kind::Hello) => self.hear_hello(&frame),
            (BIRTH_STREAM, Kind::Event) => self.hear_birth(&frame),
            (WARM_STREAM, Kind::Event) => self.hear_warm(&frame).await,
            (WARM_STREAM, Kind::Data) => self.hear_warm_output(&frame),
            (PING_STREAM, Kind::Event) => {
                self.stand_still().await;
                None
            }
            (SHUTDOWN_STREAM, Kind::Event) => matches!(self.phase, Phase::Stopping { .. })
                .then_some(End::Stopped { forced: false }),
            _ => {
                match self.routes.route_out(frame) {
                    FromGuest::Deliver(client, frame) => self.tell(client, frame),
                    FromGuest::Drop => {}
                    FromGuest::Cut(client, to_client, pass_to_guest) => {
                        tracing::warn!("the guest broke the rules of a stream");
                        self.tell(client, to_client);
                        self.pass_to_guest(pass_to_guest);
                    }
                }
                None
            }
        }
    }

    /// The guest knows no stream any more.
    fn drop_streams(&mut self) {
        for (client, frame) in self.routes.drop_all() {
            self.tell(client, frame);
        }
    }

    fn hear_hello(&mut self, frame: &Frame) -> Option<End> {
        let Phase::Booting { hello, .. } = &mut self.phase else {
            // The agent lost its place in the stream and began anew: it knows no stream any more.
            if matches!(self.motion, Motion::CutOff { .. }) {
                return self.reunite();
            }
            self.drop_streams();
            tracing::warn!("the guest's agent began anew");
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
        self.send_birth(false)
    }

    /// Gives the guest its identity, or, if it has that already, only clock and randomness.
    pub(crate) fn send_birth(&mut self, same: bool) -> Option<End> {
        match self.birth(same) {
            Ok(birth) => {
                let request = Request::Birth(birth);
                self.guest
                    .send(Frame::message(BIRTH_STREAM, Kind::Open, &request));
                None
            }
            Err(error) => broken(error.to_string()),
        }
    }

    fn birth(&self, same: bool) -> Result<Birth, KeeperError> {
        let mut entropy = vec![0; 64];
        rustix::rand::getrandom(&mut entropy, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| KeeperError::io("get random bytes for the guest", error.into()))?;
        let now = Timestamp::now().as_nanosecond();
        Ok(Birth {
            hostname: self.launch.name.clone(),
            env: self.launch.env.iter().map(EnvVar::text).collect(),
            wall_clock_ns: u64::try_from(now).unwrap_or(0),
            entropy: entropy.into(),
            cwd: self
                .launch
                .workdir
                .as_ref()
                .map(|path| path.clone().into_bytes().into()),
            user: self.launch.user.clone(),
            same: same.then_some(true),
            network: match &self.network {
                Some(network) if !same => Some(network.told()),
                _ => None,
            },
            volumes: (!same && !self.launch.volumes.is_empty())
                .then(|| self.launch.volumes.iter().map(volume).collect()),
            machine_id: (!same).then(|| machine_id(&self.launch.id)),
        })
    }

    fn hear_birth(&mut self, frame: &Frame) -> Option<End> {
        let outcome = match frame.decode::<Event>() {
            Ok(Event::Done) => Ok(()),
            Ok(Event::Failed(failure)) => Err(failure.message),
            Ok(other) => Err(format!(
                "the guest's agent answered its birth with {other:?}"
            )),
            Err(error) => Err(error.to_string()),
        };
        match self.phase {
            Phase::Booting { hello: true, .. } => match outcome {
                Ok(()) => self.born(),
                Err(reason) => broken(reason),
            },
            // It was resumed, and has its clock back.
            Phase::Serving(_) => {
                let answer = match outcome {
                    Ok(()) => KeeperEvent::Done(Done::default()),
                    Err(reason) => failure(reason, Vec::new()),
                };
                for waiter in std::mem::take(&mut self.waiting_resume) {
                    self.answer(waiter, &answer);
                }
                None
            }
            Phase::Booting { hello: false, .. }
            | Phase::Mounting { .. }
            | Phase::Warming { .. }
            | Phase::Parked(_)
            | Phase::Stopping { .. } => None,
        }
    }

    /// The guest is itself.
    fn born(&mut self) -> Option<End> {
        let recorded = self.store.set_born(&self.launch.id, self.launch.ephemeral);
        match recorded {
            Ok(true) => {}
            Ok(false) => return broken(KeeperError::Declared.to_string()),
            Err(error) => return broken(error.to_string()),
        }
        if let Some(commands) = self.launch.park.take() {
            self.phase = Phase::Warming {
                deadline: Instant::now() + WARM_TIME,
                left: commands.into(),
                said: Said::default(),
            };
            self.warm_on();
            return None;
        }
        if self.launch.mounts.is_empty() {
            return self.begin_to_serve();
        }
        self.phase = Phase::Mounting {
            deadline: Instant::now() + MOUNT_TIME,
        };
        let line = Line::new(&self.launch.name, self.inbox.clone());
        self.mounts = Mounts::begin(&self.launch.mounts, &line, &self.inbox);
        None
    }

    /// The guest has all it is to have.
    fn begin_to_serve(&mut self) -> Option<End> {
        // Before anybody hears that it serves, so that it can be entered at once.
        let line = Line::new(&self.launch.name, self.inbox.clone());
        let listener = ssh::listen(
            &self.layout,
            &self.host,
            &mut self.store,
            &self.launch,
            line,
        );
        match listener {
            Ok(listener) => self.ssh = listener,
            // The sandbox is of use without it.
            Err(error) => tracing::error!("SSH is not served: {}", error.chain()),
        }
        self.claiming = None;
        let ready = self.ready();
        self.phase = Phase::Serving(ready.clone());
        self.ttl = self
            .launch
            .ttl_ms
            .and_then(|ttl| Instant::now().checked_add(Duration::from_millis(ttl)));
        for waiter in std::mem::take(&mut self.waiting_ready) {
            self.answer(waiter, &KeeperEvent::Ready(ready.clone()));
        }
        self.ports.serve();
        self.disk_errors = self.vm.take_disk_errors().or(self.disk_errors.take());
        for (client, frame) in std::mem::take(&mut self.early) {
            if let Some(frame) = self.routes.route_in(client, frame) {
                self.pass_to_guest(frame);
            }
        }
        None
    }

    pub(crate) fn ready(&self) -> Ready {
        Ready {
            kernel: self.kernel.clone(),
            vmm_us: self.vmm_us,
            hello_us: self.hello_us,
            ready_us: micros(self.begun),
            booted_because: self.booted_because.clone(),
        }
    }

    /// Sends a client's frame to the guest, or keeps it until the guest moves again.
    pub(crate) fn pass_to_guest(&mut self, frame: Frame) {
        match &mut self.motion {
            Motion::Moving => self.guest.send(frame),
            Motion::Asked { held, .. } | Motion::Still { held, .. } | Motion::CutOff { held } => {
                held.push(frame);
            }
        }
    }

    async fn hear_client(&mut self, client: ClientId, frame: Frame) -> Option<End> {
        if frame.kind != Kind::KeeperOpen {
            let mounts = || {
                self.clients
                    .get(&client)
                    .is_some_and(|client| client.mounts)
            };
            let early = match self.phase {
                Phase::Booting { .. } => true,
                Phase::Mounting { .. } => !mounts(),
                _ => false,
            };
            if early {
                if self.early.len() < EARLY_FRAMES_MAX {
                    self.early.push((client, frame));
                }
            } else if matches!(
                self.phase,
                Phase::Mounting { .. } | Phase::Serving(_) | Phase::Stopping { .. }
            ) && let Some(frame) = self.routes.route_in(client, frame)
            {
                self.pass_to_guest(frame);
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
                    Phase::Booting { .. } | Phase::Mounting { .. } | Phase::Warming { .. } => {
                        self.waiting_ready.push(waiter);
                    }
                    Phase::Serving(ready) | Phase::Parked(ready) => {
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
                self.stop(grace_ms).await
            }
            KeeperRequest::Destroy => {
                self.waiting_destroy.push(waiter);
                Some(End::Destroy {
                    why: "it was asked for",
                })
            }
            KeeperRequest::Pause => {
                self.ask_to_stand_still(Wish::Pause(waiter)).await;
                None
            }
            KeeperRequest::Resume => self.resume(waiter).await,
            KeeperRequest::Capture(CaptureRequest { directory }) => {
                let directory = std::ffi::OsString::from_vec(directory.into());
                self.ask_to_stand_still(Wish::Capture(waiter, directory.into()))
                    .await;
                None
            }
            KeeperRequest::Claim(claim) => self.claim(waiter, claim).await,
            KeeperRequest::Publish(mapping) => {
                let answer = match self.publish(&mapping) {
                    Ok(published) => KeeperEvent::Published(ports::mapping(&published)),
                    Err(error) => refusal(&error),
                };
                self.answer(waiter, &answer);
                None
            }
            KeeperRequest::Unpublish(place) => {
                let answer = match self.unpublish(&place).await {
                    Ok(()) => KeeperEvent::Done(Done::default()),
                    Err(error) => refusal(&error),
                };
                self.answer(waiter, &answer);
                None
            }
            KeeperRequest::SetNetwork(policy) => {
                let set = NetworkSpec::from_message(&policy).and_then(|spec| {
                    self.change_network(&spec)?;
                    self.store.set_network_spec(&self.launch.id, &spec)
                });
                self.answer_done(waiter, set);
                None
            }
            KeeperRequest::GrowDisk(GrowDiskRequest { disk_mib }) => {
                let grown = self.grow_disk(disk_mib).await;
                self.answer_done(waiter, grown);
                None
            }
            KeeperRequest::WriteDenied => {
                let path = self.layout.sandbox(&self.launch.id).denied();
                let written = match &self.network {
                    Some(network) => network.write_denied(&path),
                    None => Ok(()),
                };
                self.answer_done(waiter, written);
                None
            }
        }
    }

    /// Records the new size of the sandbox's own disk, and makes it that large.
    async fn grow_disk(&mut self, disk_mib: u32) -> smolvm_engine::Result<()> {
        let name = &self.launch.name;
        let serves = matches!(self.phase, Phase::Serving(_));
        if !serves || !matches!(self.motion, Motion::Moving) {
            let what = format!("sandbox `{name}` is paused, going down, or a pool's");
            return Err(smolvm_engine::Error::new(ErrorKind::Busy, what));
        }
        let own = self.layout.sandbox(&self.launch.id).disk();
        let found = self
            .launch
            .vm
            .disks
            .iter()
            .position(|disk| disk.path == own);
        let (Some(index), Some(row)) = (found, self.store.sandbox(&self.launch.id)?) else {
            let what = format!("sandbox `{name}` has no disk of its own");
            return Err(smolvm_engine::Error::new(ErrorKind::Unsupported, what));
        };
        smolvm_engine::check_size(&row.spec.name, row.spec.disk_mib, disk_mib)?;
        self.store.set_disk_mib(&self.launch.id, disk_mib)?;
        self.vm
            .grow_disk(index, u64::from(disk_mib) << 20)
            .await
            .map_err(|error| {
                let what = format!(
                    "could not make the disk of sandbox `{}` larger",
                    row.spec.name
                );
                smolvm_engine::Error::new(ErrorKind::Internal, what)
                    .because(KeeperError::from(error).chain())
                    .hint("it has the new size after its next start")
            })
    }

    /// Takes a port and records it; it is served at once, or as soon as the guest serves.
    fn publish(&mut self, mapping: &PortMapping) -> smolvm_engine::Result<PublishedPort> {
        let serves = match self.phase {
            Phase::Serving(_) => true,
            Phase::Booting { .. } | Phase::Mounting { .. } => false,
            Phase::Warming { .. } | Phase::Parked(_) | Phase::Stopping { .. } => {
                let what = "the sandbox is going down, or is a pool's";
                return Err(smolvm_engine::Error::new(ErrorKind::NotRunning, what));
            }
        };
        ports::check_room(self.ports.count())?;
        let wanted = [ports::published(mapping)?];
        let bound = ports::take_all(&Os::new(), &self.host, &self.store, &wanted)?;
        let published = bound[0].published;
        self.store.insert_port(&self.launch.id, &published)?;
        self.ports.hold(bound);
        if serves {
            self.ports.serve();
        }
        Ok(published)
    }

    /// Ends that.
    async fn unpublish(&mut self, place: &PortPlace) -> smolvm_engine::Result<()> {
        let host = ports::host_port(place)?;
        if !self.ports.close(&host).await {
            return Err(ports::not_published(&self.launch.name, &host));
        }
        // Not before: whoever has the row has the port.
        self.store.delete_port(&self.launch.id, &host).map(|_| ())
    }

    async fn stop(&mut self, grace_ms: u64) -> Option<End> {
        if grace_ms == 0 {
            return Some(End::Stopped { forced: true });
        }
        match self.phase {
            // A guest that does not serve cannot be asked.
            Phase::Booting { .. }
            | Phase::Mounting { .. }
            | Phase::Warming { .. }
            | Phase::Parked(_) => {
                return Some(End::Stopped { forced: true });
            }
            Phase::Stopping { .. } => return None,
            Phase::Serving(_) => {}
        }
        if let Err(error) = self.move_on().await {
            return broken(error);
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
        self.ask_to_go_down(grace_ms);
        None
    }

    /// The time of this phase is over, or has to be longer.
    fn late(&mut self) -> Option<End> {
        if let (Some(claiming), Phase::Booting { deadline, .. }) = (&self.claiming, &mut self.phase)
        {
            let waited = waited_for_processor(self.vm.pid()).unwrap_or_default();
            let left = template::time_left(
                self.begun.elapsed(),
                waited.saturating_sub(claiming.starved),
                CLAIM_TIME,
                CLAIM_TIME_MOST,
            );
            if let Some(left) = left {
                *deadline = Instant::now() + left;
                return None;
            }
            return broken("the member of the pool did not answer when it was claimed".to_owned());
        }
        Some(match self.phase {
            Phase::Stopping { .. } => End::Stopped { forced: true },
            Phase::Mounting { .. } => End::Broken {
                state: State::Error,
                reason: format!(
                    "the guest had not mounted its directories of the host after {} s",
                    MOUNT_TIME.as_secs()
                ),
            },
            Phase::Warming { ref left, .. } => End::Broken {
                state: State::Error,
                reason: format!(
                    "the warm-up command `{}` took longer than {} s",
                    left.front().map_or("", WarmCommand::shown),
                    WARM_TIME.as_secs()
                ),
            },
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
            Phase::Serving(_) | Phase::Parked(_) => {
                unreachable!("a guest that serves has no deadline")
            }
        })
    }

    fn gone(&self, exit: &Result<Exit, smolvm_vmm::VmError>) -> End {
        let reason = match exit {
            Ok(exit) => exit.to_string(),
            Err(error) => error.to_string(),
        };
        match self.phase {
            Phase::Stopping { .. } => End::Stopped { forced: false },
            Phase::Booting { .. } | Phase::Mounting { .. } | Phase::Warming { .. } => End::Broken {
                state: State::Error,
                reason: format!("the machine ended before the guest was ready: {reason}"),
            },
            // The kernel's own word for it (kernel/panic.c); it resets the machine afterwards.
            Phase::Serving(_) | Phase::Parked(_)
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
            Phase::Serving(_) | Phase::Parked(_)
                if exit.as_ref().is_ok_and(|exit| exit.code == Some(0)) =>
            {
                End::Broken {
                    state: State::Stopped,
                    reason: "the guest switched itself off, or restarted".to_owned(),
                }
            }
            Phase::Serving(_) | Phase::Parked(_) => End::Broken {
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

    /// Whether nothing of the sandbox is to outlive this end.
    fn destroys(&self, end: &End) -> bool {
        let member = matches!(self.phase, Phase::Warming { .. } | Phase::Parked(_));
        // One that did not become a sandbox was nobody's yet.
        let member = member || self.claiming.is_some();
        // Without its memory it is not what was asked for.
        let restore = self.launch.restore.as_ref();
        let unborn = matches!(self.phase, Phase::Booting { .. })
            && restore.is_some_and(|restore| !restore.or_boot);
        self.launch.ephemeral || member || unborn || matches!(end, End::Destroy { .. })
    }

    /// Kills the machine, and answers those who asked for the sandbox's removal as soon as it can no
    /// longer run or be seen. Its process, its files and its row are taken away afterwards: by this
    /// keeper, and if that is killed by the next command.
    ///
    /// A disk that others may use as well is not let go before the machine's process has ended.
    async fn begin_end(&mut self, end: &End) -> Result<(), KeeperError> {
        self.vm.start_kill()?;
        // Before the rows go: whoever takes a row takes the port.
        self.ports.close_all().await;
        if let Some(listener) = &mut self.ssh {
            listener.close();
        }
        let own = self.layout.sandbox(&self.launch.id);
        let mut disks = self.launch.vm.disks.iter();
        let shared = disks.any(|disk| !disk.read_only && !disk.path.starts_with(own.path()));
        if !self.destroys(end) || shared {
            return Ok(());
        }
        match self.store.begin_delete(&self.launch.id, Some(&self.me)) {
            Ok(()) => {
                for waiter in std::mem::take(&mut self.waiting_destroy) {
                    self.answer(waiter, &KeeperEvent::Done(Done::default()));
                }
                if let Some(claiming) = self.claiming.take()
                    && let Err(error) = self.store.uncount_pool_hit(&claiming.pool)
                {
                    tracing::warn!(%error, "could not take back a claim");
                }
            }
            // Tried again when the machine is off, and told then.
            Err(error) => tracing::warn!(%error, "could not record the removal"),
        }
        Ok(())
    }

    /// The machine is off. Makes the record true, answers whoever waits, and lets go.
    async fn finish(mut self, end: End, destroy: bool, exit: &Exit) -> Result<(), KeeperError> {
        let (state, reason) = match &end {
            End::Stopped { .. } => (State::Stopped, None),
            End::Broken { state, reason } => (*state, Some(reason.clone())),
            End::Lost => unreachable!("explained before"),
            End::Destroy { why } => (State::Deleting, Some((*why).to_owned())),
        };
        tracing::info!(?end, %exit, "the machine is off");
        self.give_network_back(!destroy);
        let jail = jail::release(&Os::new(), &self.layout, &mut self.store, &self.launch.id);
        if let Err(error) = jail {
            let reason = error.in_one_line();
            tracing::warn!(reason, "could not take down the jail");
        }
        let outcome = if destroy {
            let Launch { id, name, .. } = &self.launch;
            teardown::destroy_as(
                &Os::new(),
                &self.layout,
                &mut self.store,
                id,
                Some(&self.me),
            )
            .map_err(|error| teardown::unrecorded(&self.layout, name, "is to be removed", error))
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
                .map_err(|error| {
                    teardown::unrecorded(&self.layout, &self.launch.name, "is off", error)
                })
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
            Err(error) => refusal(error),
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

    /// What cannot be given back now is found by its row, at the next start or repair.
    fn give_network_back(&mut self, keep_log: bool) {
        let Some(network) = &mut self.network else {
            return;
        };
        if keep_log
            && let Err(error) = network.write_denied(&self.layout.sandbox(&self.launch.id).denied())
        {
            tracing::warn!(
                reason = error.in_one_line(),
                "could not keep what was denied"
            );
        }
        let back = network
            .take_down()
            .and_then(|()| self.store.delete_network(&self.launch.id));
        if let Err(error) = back {
            tracing::warn!(
                reason = error.in_one_line(),
                "could not give the network back"
            );
        }
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

    /// Changes what the sandbox may reach.
    pub(crate) fn change_network(&mut self, spec: &NetworkSpec) -> Result<(), Error> {
        match &mut self.network {
            Some(network) => network.change(spec),
            None if spec.needs_device() => Err(Error::new(
                ErrorKind::Unsupported,
                format!("sandbox `{}` has no network device", self.launch.name),
            )),
            None => Ok(()),
        }
    }

    fn answer_done(&self, waiter: Waiter, outcome: Result<(), Error>) {
        let answer = match outcome {
            Ok(()) => KeeperEvent::Done(Done::default()),
            Err(error) => failure(error.in_one_line(), Vec::new()),
        };
        self.answer(waiter, &answer);
    }

    pub(crate) fn answer(&self, (client, stream): Waiter, event: &KeeperEvent) {
        self.tell(client, Frame::message(stream, Kind::KeeperEvent, event));
    }

    fn tell(&self, client: ClientId, frame: Frame) {
        if let Some(client) = self.clients.get(&client) {
            client.outgoing.send(frame);
        }
    }
}

/// The next report, if there will be any.
async fn next_of(errors: &mut Option<mpsc::Receiver<DiskError>>) -> Option<DiskError> {
    match errors {
        Some(errors) => errors.recv().await,
        None => std::future::pending().await,
    }
}

/// Tells the driver when the starter ends, which may have happened already. On a thread of its own,
/// which costs a page or two and ends with the process.
pub(crate) fn watch_starter(
    starter: &ProcessIdentity,
    inbox: mpsc::Sender<Input>,
) -> Result<(), KeeperError> {
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

/// The machine-id(5) of a sandbox: the same at each of its starts, and no other's. That page asks that such
/// an identifier be not told as it is, so it is a digest of ours.
fn machine_id(sandbox: &str) -> String {
    let mut id = Digest::of(format!("machine-id of sandbox {sandbox}").as_bytes()).hex();
    id.truncate(32);
    id
}

/// A volume as the guest is told of it.
fn volume(launch: &VolumeLaunch) -> Volume {
    Volume {
        device: launch.device.clone(),
        bytes: launch.bytes,
        target: launch.target.clone().into_bytes().into(),
        read_only: launch.read_only,
    }
}

pub(crate) fn failure(message: String, console: Vec<String>) -> KeeperEvent {
    KeeperEvent::Failed(KeeperFailure {
        message,
        console,
        reason: None,
        hint: None,
    })
}

/// An error as an answer that says as much.
pub(crate) fn refusal(error: &smolvm_engine::Error) -> KeeperEvent {
    KeeperEvent::Failed(KeeperFailure {
        message: error.in_one_line(),
        console: Vec::new(),
        reason: match error.kind() {
            ErrorKind::AlreadyExists => Some(KeeperReason::NameTaken),
            ErrorKind::Busy => Some(KeeperReason::Busy),
            ErrorKind::NotFound => Some(KeeperReason::NotFound),
            ErrorKind::InvalidInput => Some(KeeperReason::InvalidInput),
            ErrorKind::PermissionDenied => Some(KeeperReason::PermissionDenied),
            _ => None,
        },
        hint: error.hint_text().map(str::to_owned),
    })
}

/// Off without being asked, for this reason.
pub(crate) fn broken(reason: String) -> Option<End> {
    Some(End::Broken {
        state: State::Error,
        reason,
    })
}

fn identity(pid: u32) -> Result<Option<ProcessIdentity>, KeeperError> {
    let pid = i32::try_from(pid).unwrap_or(i32::MAX);
    Ok(ProcessIdentity::of(pid).map_err(smolvm_engine::Error::from)?)
}

fn micros(begun: Instant) -> u64 {
    u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX)
}

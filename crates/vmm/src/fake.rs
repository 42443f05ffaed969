//! A backend with state, time and faults, but no machine.
//!
//! It keeps the physics: a paused machine does not answer, a killed one cannot be resumed, a kill
//! makes [`Vm::wait`] return and closes the streams, and files that are not there cannot be booted.
//! Its guest is a function of the test's, on a thread of its own, at the far end of the channel. A
//! restored guest begins that function anew, with what the other had in its [`FakeMemory`].

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream as TokioStream;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;

use serde::{Deserialize, Serialize};

use crate::{
    Backend, Cable, CableKind, Capabilities, Channel, DISK_ERRORS_WAITING, DiskError, Exit, Memory,
    NewFile, Vm, VmError, VmErrorKind, VmPlan, new_memory, new_memory_at, open_state,
    refuse_impossible, refuse_unreadable, refuse_unrestorable, refuse_unsavable,
    refuse_unstartable,
};

/// The first process number given out: above the kernel's largest (proc(5), `pid_max`, is at most
/// 2^22), so that whoever signals it by mistake hits nobody.
const FIRST_PID: u32 = 1 << 30;

/// What the fake can do: as much as the real ones.
const CAPABILITIES: Capabilities = Capabilities {
    pause: true,
    snapshot: true,
    cpus_max: 254,
    memory_mib_min: 64,
    memory_mib_max: 512 * 1024,
    disks_max: 16,
    cable: Some(CableKind::Descriptor),
};

/// What a guest sees of its machine.
#[derive(Debug)]
pub struct FakeGuest {
    /// The plan it was started from.
    pub plan: VmPlan,
    /// The far end of the channel, blocking. It ends when the machine is killed.
    pub channel: UnixStream,
    /// The far end of the console, blocking.
    pub console: UnixStream,
    /// What it keeps.
    pub memory: FakeMemory,
    /// For reports of disks that the host could not read or write.
    pub disk_errors: mpsc::Sender<DiskError>,
}

/// The part of a guest's memory that a snapshot of a fake machine holds. Empty in a machine that was
/// started; as the other left it in one that was restored.
#[derive(Debug, Clone)]
pub struct FakeMemory {
    bytes: Arc<Mutex<Vec<u8>>>,
    state: watch::Receiver<State>,
    runtime: Handle,
}

impl FakeMemory {
    /// What is in it.
    #[must_use]
    pub fn read(&self) -> Vec<u8> {
        lock(&self.bytes).clone()
    }

    /// Puts `bytes` in place of what is in it. In a paused machine that takes until it is resumed;
    /// in one that has ended nothing is written, and `false` returned. For the guest's thread only.
    #[must_use]
    pub fn write(&self, bytes: &[u8]) -> bool {
        let mut state = self.state.clone();
        loop {
            if self.runtime.block_on(running(&mut state)).is_err() {
                return false;
            }
            let mut held = lock(&self.bytes);
            // A snapshot reads after it has paused.
            if *state.borrow() == State::Running {
                held.clear();
                held.extend_from_slice(bytes);
                return true;
            }
        }
    }
}

/// What the state file of a fake machine holds, as JSON: enough to know a wrong one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Saved {
    cpus: u8,
    memory_mib: u32,
    disks: usize,
    #[serde(default)]
    nic: bool,
    /// How much of the memory file is what the guest has written.
    written: usize,
}

impl Saved {
    fn of(plan: &VmPlan, written: usize) -> Saved {
        Saved {
            cpus: plan.cpus,
            memory_mib: plan.memory_mib,
            disks: plan.disks.len(),
            nic: plan.nic.is_some(),
            written,
        }
    }
}

/// How a guest's function returns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestEnd {
    /// The guest shut down or reset; the VMM ends with exit code 0.
    Off,
    /// The VMM ends in another way.
    Crash(Exit),
}

type Script = dyn Fn(FakeGuest) -> GuestEnd + Send + Sync;

/// An operation that can fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operation {
    /// [`Backend::start`].
    Start,
    /// [`Backend::restore`].
    Restore,
    /// [`Vm::pause`].
    Pause,
    /// [`Vm::resume`].
    Resume,
    /// [`Vm::snapshot`].
    Snapshot,
    /// [`Vm::grow_disk`].
    GrowDisk,
    /// [`Vm::kill`].
    Kill,
    /// [`Vm::wait`].
    Wait,
}

/// A failure to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// What fails.
    pub operation: Operation,
    /// Which one fails, counted from 1, over all machines of the backend.
    pub nth: u32,
    /// Whether all after it fail, too.
    pub forever: bool,
    /// What kind of failure is reported.
    pub kind: VmErrorKind,
}

/// The backend `fake`. Clones are the same backend.
///
/// Must be used within a tokio runtime that has I/O and time enabled. On a runtime of one thread a
/// pause is exact; on several, bytes that were being moved may still arrive.
#[derive(Debug, Clone)]
pub struct Fake {
    shared: Arc<Shared>,
    script: Guestly,
    boot: Duration,
}

#[derive(Clone)]
struct Guestly(Arc<Script>);

impl fmt::Debug for Guestly {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Guestly")
    }
}

#[derive(Debug, Default)]
struct Shared {
    started: AtomicU32,
    machines: Mutex<BTreeMap<u32, watch::Sender<State>>>,
    faults: Mutex<Vec<Fault>>,
    done: Mutex<Vec<Operation>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Running,
    Paused,
    Ended(Exit),
}

impl Fake {
    /// A backend whose every machine runs `script` as its guest.
    pub fn new(script: impl Fn(FakeGuest) -> GuestEnd + Send + Sync + 'static) -> Fake {
        Fake {
            shared: Arc::default(),
            script: Guestly(Arc::new(script)),
            boot: Duration::ZERO,
        }
    }

    /// The same with a guest that begins only after `boot`, by the runtime's clock.
    #[must_use]
    pub fn booting_for(mut self, boot: Duration) -> Fake {
        self.boot = boot;
        self
    }

    /// Adds a failure to come.
    pub fn inject(&self, fault: Fault) {
        lock(&self.shared.faults).push(fault);
    }

    /// Forgets the failures that have not come yet.
    pub fn heal(&self) {
        lock(&self.shared.faults).clear();
    }

    /// Every operation that was asked for, in order, those that failed included.
    #[must_use]
    pub fn operations(&self) -> Vec<Operation> {
        lock(&self.shared.done).clone()
    }

    /// The process numbers of the machines that exist.
    #[must_use]
    pub fn running(&self) -> Vec<u32> {
        lock(&self.shared.machines).keys().copied().collect()
    }

    /// Ends a machine from outside. Nothing happens if it does not exist.
    pub fn end(&self, pid: u32, exit: Exit) {
        self.shared.end(pid, exit);
    }
}

impl Shared {
    /// Notes an operation, and fails it if its turn has come.
    fn perform(&self, operation: Operation, name: &str) -> Result<(), VmError> {
        let count = {
            let mut done = lock(&self.done);
            done.push(operation);
            done.iter().filter(|&&other| other == operation).count()
        };
        let fault = lock(&self.faults).iter().copied().find(|fault| {
            let nth = fault.nth as usize;
            fault.operation == operation && (count == nth || fault.forever && count > nth)
        });
        match fault {
            None => Ok(()),
            Some(fault) => Err(VmError::new(
                fault.kind,
                doing(operation, name),
                "a fault was injected",
            )),
        }
    }

    /// Makes a machine not exist, whoever was first to end it.
    fn end(&self, pid: u32, exit: Exit) {
        if let Some(state) = lock(&self.machines).remove(&pid) {
            state.send_replace(State::Ended(exit));
        }
    }
}

#[async_trait]
impl Backend for Fake {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn capabilities(&self) -> Capabilities {
        CAPABILITIES
    }

    async fn start(&self, plan: &VmPlan, cable: Option<Cable>) -> Result<Box<dyn Vm>, VmError> {
        refuse_impossible(plan, &CAPABILITIES, cable.as_ref())?;
        refuse_unstartable(plan)?;
        refuse_unreadable(plan)?;
        let memory = new_memory(plan)?;
        self.shared.perform(Operation::Start, &plan.name)?;
        let vm = self.launch(plan, Vec::new()).map_err(|error| {
            VmError::new(
                VmErrorKind::Host,
                doing(Operation::Start, &plan.name),
                error,
            )
        })?;
        if let Some(memory) = memory {
            memory.keep();
        }
        Ok(Box::new(vm))
    }

    async fn restore(
        &self,
        plan: &VmPlan,
        state: &Path,
        cable: Option<Cable>,
    ) -> Result<Box<dyn Vm>, VmError> {
        refuse_impossible(plan, &CAPABILITIES, cable.as_ref())?;
        refuse_unrestorable(plan)?;
        refuse_unreadable(plan)?;
        let state = open_state(state)?;
        self.shared.perform(Operation::Restore, &plan.name)?;
        let doing = || doing(Operation::Restore, &plan.name);
        let memory = load(plan, state).map_err(|error| {
            // As a VMM that exits because it cannot make sense of it.
            let exit = Exit {
                code: Some(1),
                signal: None,
                stderr: error.to_string(),
            };
            VmError::exited(doing(), &exit)
        })?;
        let vm = self
            .launch(plan, memory)
            .map_err(|error| VmError::new(VmErrorKind::Host, doing(), error))?;
        Ok(Box::new(vm))
    }
}

/// Writes the guest's memory to its file, and then the state that goes with it.
fn save(plan: &VmPlan, memory: &Path, bytes: &[u8], mut state: File) -> io::Result<()> {
    File::options()
        .write(true)
        .open(memory)?
        .write_all_at(bytes, 0)?;
    state.write_all(&serde_json::to_vec(&Saved::of(plan, bytes.len()))?)
}

/// The guest's memory, if the state is that of a machine like `plan`.
fn load(plan: &VmPlan, mut state: File) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    state.read_to_end(&mut text)?;
    let saved: Saved = serde_json::from_slice(&text)?;
    if saved != Saved::of(plan, saved.written) {
        return Err(io::Error::other("the state is that of another machine"));
    }
    let Memory::CopyOf(path) = &plan.memory else {
        return Ok(Vec::new());
    };
    let mut bytes = vec![0; saved.written];
    File::open(path)?.read_exact(&mut bytes)?;
    Ok(bytes)
}

impl Fake {
    fn launch(&self, plan: &VmPlan, memory: Vec<u8>) -> io::Result<FakeVm> {
        let (state, watched) = watch::channel(State::Running);
        let (channel, channel_guest, channel_relays) = wire(&watched)?;
        let (console, console_guest, console_relays) = wire(&watched)?;
        let memory = FakeMemory {
            bytes: Arc::new(Mutex::new(memory)),
            state: watched.clone(),
            runtime: Handle::current(),
        };
        let (disk_errors, heard) = mpsc::channel(DISK_ERRORS_WAITING);
        let guest = FakeGuest {
            plan: plan.clone(),
            channel: channel_guest,
            console: console_guest,
            memory: memory.clone(),
            disk_errors,
        };
        let pid = FIRST_PID + self.shared.started.fetch_add(1, Ordering::Relaxed);
        lock(&self.shared.machines).insert(pid, state);
        let life = tokio::spawn(live(
            Arc::clone(&self.shared),
            pid,
            self.boot,
            Guestly(Arc::clone(&self.script.0)),
            guest,
            watched.clone(),
        ));
        // A killed VMM moves no more bytes; one whose guest went down has moved them all.
        let relays: Vec<AbortHandle> = channel_relays.into_iter().chain(console_relays).collect();
        tokio::spawn(cut_when_killed(
            watched.clone(),
            relays,
            life.abort_handle(),
        ));
        Ok(FakeVm {
            shared: Arc::clone(&self.shared),
            plan: plan.clone(),
            memory,
            pid,
            state: watched,
            channel: Some(channel),
            console: Some(console),
            heard: Some(heard),
        })
    }
}

/// Boots, runs the guest's function on a thread, and ends the machine when it returns.
async fn live(
    shared: Arc<Shared>,
    pid: u32,
    boot: Duration,
    script: Guestly,
    guest: FakeGuest,
    mut state: watch::Receiver<State>,
) {
    tokio::time::sleep(boot).await;
    if running(&mut state).await.is_err() {
        return;
    }
    let (over, ended) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new().name("fake-guest".to_owned());
    let spawned = thread.spawn(move || {
        // Nobody listens any more if the machine was killed.
        let _ = over.send((script.0)(guest));
    });
    let end = match spawned {
        Ok(_) => ended.await.unwrap_or_else(|_| {
            GuestEnd::Crash(Exit {
                code: None,
                signal: Some(libc::SIGABRT),
                stderr: "the guest's function panicked".to_owned(),
            })
        }),
        Err(error) => GuestEnd::Crash(Exit {
            code: Some(1),
            signal: None,
            stderr: error.to_string(),
        }),
    };
    // A paused guest cannot shut down.
    if running(&mut state).await.is_err() {
        return;
    }
    let exit = match end {
        GuestEnd::Crash(exit) => exit,
        GuestEnd::Off => Exit {
            code: Some(0),
            signal: None,
            stderr: String::new(),
        },
    };
    shared.end(pid, exit);
}

async fn cut_when_killed(
    mut state: watch::Receiver<State>,
    relays: Vec<AbortHandle>,
    life: AbortHandle,
) {
    let end = state
        .wait_for(|state| matches!(state, State::Ended(_)))
        .await;
    let killed = match end.as_deref() {
        Ok(State::Ended(exit)) => exit.signal.is_some(),
        _ => true,
    };
    life.abort();
    if killed {
        relays.iter().for_each(AbortHandle::abort);
    }
}

/// A stream to the guest with a gate in it that is open while the machine runs: the host's end, the
/// guest's end, and the two tasks between.
fn wire(state: &watch::Receiver<State>) -> io::Result<(UnixStream, UnixStream, [AbortHandle; 2])> {
    let (host, host_side) = UnixStream::pair()?;
    let (guest, guest_side) = UnixStream::pair()?;
    let into_tokio = |stream: UnixStream| {
        stream.set_nonblocking(true)?;
        TokioStream::from_std(stream).map(TokioStream::into_split)
    };
    let (from_host, to_host) = into_tokio(host_side)?;
    let (from_guest, to_guest) = into_tokio(guest_side)?;
    let inward = tokio::spawn(relay(from_host, to_guest, state.clone()));
    let outward = tokio::spawn(relay(from_guest, to_host, state.clone()));
    Ok((host, guest, [inward.abort_handle(), outward.abort_handle()]))
}

/// Moves bytes while the machine runs. After the guest ended by itself, moves what it left.
async fn relay(
    mut from: impl tokio::io::AsyncRead + Unpin,
    mut to: impl tokio::io::AsyncWrite + Unpin,
    mut state: watch::Receiver<State>,
) {
    let mut buffer = [0; 4096];
    while let Ok(n @ 1..) = from.read(&mut buffer).await {
        // An ended machine has an open gate; if it was killed, this task is no more.
        let _ = running(&mut state).await;
        if to.write_all(&buffer[..n]).await.is_err() {
            return;
        }
    }
}

/// Waits until the machine runs; fails if it ended.
async fn running(state: &mut watch::Receiver<State>) -> Result<(), ()> {
    match state
        .wait_for(|state| *state != State::Paused)
        .await
        .as_deref()
    {
        Ok(State::Running) => Ok(()),
        _ => Err(()),
    }
}

/// A machine that is not there.
#[derive(Debug)]
struct FakeVm {
    shared: Arc<Shared>,
    plan: VmPlan,
    memory: FakeMemory,
    pid: u32,
    state: watch::Receiver<State>,
    channel: Option<UnixStream>,
    console: Option<UnixStream>,
    heard: Option<mpsc::Receiver<DiskError>>,
}

#[async_trait]
impl Vm for FakeVm {
    fn pid(&self) -> u32 {
        self.pid
    }

    fn take_channel(&mut self) -> Option<Channel> {
        self.channel.take().map(Channel::from)
    }

    fn take_console(&mut self) -> Option<UnixStream> {
        self.console.take()
    }

    fn take_disk_errors(&mut self) -> Option<mpsc::Receiver<DiskError>> {
        self.heard.take()
    }

    async fn pause(&mut self) -> Result<(), VmError> {
        self.shared.perform(Operation::Pause, &self.plan.name)?;
        self.turn(Operation::Pause, State::Paused)
    }

    async fn resume(&mut self) -> Result<(), VmError> {
        self.shared.perform(Operation::Resume, &self.plan.name)?;
        self.turn(Operation::Resume, State::Running)
    }

    async fn grow_disk(&mut self, index: usize, bytes: u64) -> Result<(), VmError> {
        let doing = || doing(Operation::GrowDisk, &self.plan.name);
        self.shared.perform(Operation::GrowDisk, &self.plan.name)?;
        match self.plan.disks.get(index) {
            Some(disk) if !disk.read_only => File::options()
                .write(true)
                .open(&disk.path)
                .and_then(|file| file.set_len(bytes))
                .map_err(|error| VmError::new(VmErrorKind::Host, doing(), error)),
            _ => {
                let why = "it has no such disk that it may write to";
                Err(VmError::new(VmErrorKind::Unsupported, doing(), why))
            }
        }
    }

    async fn snapshot(&mut self, state: &Path, memory: Option<&Path>) -> Result<Instant, VmError> {
        refuse_unsavable(&self.plan, memory)?;
        let doing = || doing(Operation::Snapshot, &self.plan.name);
        self.shared.perform(Operation::Snapshot, &self.plan.name)?;
        let still = Instant::now();
        self.turn(Operation::Snapshot, State::Paused)?;
        let (file, new_state) = NewFile::create(state)?;
        let new_memory = memory
            .map(|path| new_memory_at(path, &self.plan))
            .transpose()?;
        let memory = match (memory, &self.plan.memory) {
            (Some(path), _) => path,
            (None, Memory::File(path)) => path,
            (None, Memory::Anonymous | Memory::CopyOf(_)) => unreachable!("refused above"),
        };
        save(&self.plan, memory, &lock(&self.memory.bytes), file)
            .map_err(|error| VmError::new(VmErrorKind::Host, doing(), error))?;
        new_state.keep();
        if let Some((_, new)) = new_memory {
            new.keep();
        }
        Ok(still)
    }

    fn start_kill(&mut self) -> Result<(), VmError> {
        self.shared.perform(Operation::Kill, &self.plan.name)?;
        self.shared.end(self.pid, killed());
        Ok(())
    }

    async fn kill(&mut self) -> Result<Exit, VmError> {
        self.start_kill()?;
        Ok(self.ended().await)
    }

    async fn wait(&mut self) -> Result<Exit, VmError> {
        self.shared.perform(Operation::Wait, &self.plan.name)?;
        Ok(self.ended().await)
    }
}

impl FakeVm {
    fn turn(&self, operation: Operation, to: State) -> Result<(), VmError> {
        let machines = lock(&self.shared.machines);
        if let Some(state) = machines.get(&self.pid) {
            state.send_replace(to);
            return Ok(());
        }
        match &*self.state.borrow() {
            State::Ended(exit) => Err(VmError::exited(doing(operation, &self.plan.name), exit)),
            State::Running | State::Paused => unreachable!("only the ended are taken off the list"),
        }
    }

    async fn ended(&mut self) -> Exit {
        let ended = self
            .state
            .wait_for(|state| matches!(state, State::Ended(_)))
            .await;
        match ended.as_deref() {
            Ok(State::Ended(exit)) => exit.clone(),
            _ => unreachable!("the list keeps the sender until the end"),
        }
    }
}

impl Drop for FakeVm {
    fn drop(&mut self) {
        self.shared.end(self.pid, killed());
    }
}

fn killed() -> Exit {
    Exit {
        code: None,
        signal: Some(libc::SIGKILL),
        stderr: String::new(),
    }
}

fn doing(operation: Operation, name: &str) -> String {
    let verb = match operation {
        Operation::Start => "start",
        Operation::Restore => "restore",
        Operation::Pause => "pause",
        Operation::Resume => "resume",
        Operation::GrowDisk => "make a disk larger of",
        Operation::Snapshot => "take a snapshot of",
        Operation::Kill => "kill",
        Operation::Wait => "wait for",
    };
    format!("{verb} the machine {name}")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::{Accel, Devices};

    /// A guest that says back what it hears.
    fn echo(mut guest: FakeGuest) -> GuestEnd {
        let mut byte = [0];
        while let Ok(1) = guest.channel.read(&mut byte) {
            if guest.channel.write_all(&byte).is_err() {
                break;
            }
        }
        GuestEnd::Off
    }

    fn plan() -> VmPlan {
        VmPlan {
            name: "m".into(),
            program: "/fake".into(),
            directory: "".into(),
            accel: Accel::Kvm,
            cpus: 1,
            memory_mib: 128,
            memory: Memory::Anonymous,
            kernel: "/dev/null".into(),
            devices: Devices::default(),
            initrd: "/dev/null".into(),
            cmdline: String::new(),
            disks: Vec::new(),
            nic: None,
            tsc_khz: None,
            jail: None,
        }
    }

    fn run<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.expect("a runtime").block_on(future)
    }

    fn open(vm: &mut dyn Vm) -> TokioStream {
        let Some(Channel::Stream(Some(channel))) = vm.take_channel() else {
            panic!("the channel")
        };
        channel.set_nonblocking(true).expect("a mode");
        TokioStream::from_std(channel).expect("a socket")
    }

    #[test]
    fn a_paused_machine_answers_when_it_is_resumed() {
        run(async {
            let fake = Fake::new(echo);
            let mut vm = fake.start(&plan(), None).await.expect("start");
            let mut channel = open(&mut *vm);
            let mut byte = [0];
            channel.write_all(b"a").await.expect("write");
            channel.read_exact(&mut byte).await.expect("read");

            vm.pause().await.expect("pause");
            channel.write_all(b"b").await.expect("write");
            let quiet = Duration::from_millis(50);
            let answer = tokio::time::timeout(quiet, channel.read_exact(&mut byte)).await;
            assert!(answer.is_err(), "a paused machine answered");

            vm.resume().await.expect("resume");
            channel.read_exact(&mut byte).await.expect("read");
            assert_eq!(&byte, b"b");
        });
    }

    #[test]
    fn each_operation_can_fail_once_or_for_ever() {
        run(async {
            for (forever, expected) in [(false, [true, false, true]), (true, [true, false, false])]
            {
                let fake = Fake::new(echo);
                let mut vm = fake.start(&plan(), None).await.expect("start");
                fake.inject(Fault {
                    operation: Operation::Pause,
                    nth: 2,
                    forever,
                    kind: VmErrorKind::Timeout,
                });
                for works in expected {
                    let result = vm.pause().await;
                    assert_eq!(result.is_ok(), works);
                    if let Err(error) = result {
                        assert_eq!(error.kind, VmErrorKind::Timeout);
                    }
                }
                fake.heal();
                vm.pause().await.expect("pause");
                assert_eq!(fake.operations().len(), 5);
            }
        });
    }

    #[test]
    fn a_start_that_fails_leaves_nothing() {
        run(async {
            let fake = Fake::new(echo);
            fake.inject(Fault {
                operation: Operation::Start,
                nth: 1,
                forever: false,
                kind: VmErrorKind::Host,
            });
            assert!(fake.start(&plan(), None).await.is_err());
            assert!(fake.running().is_empty());
            let vm = fake.start(&plan(), None).await.expect("the second start");
            assert_eq!(fake.running(), [vm.pid()]);
        });
    }

    #[test]
    fn a_crash_is_told_as_the_guest_tells_it() {
        run(async {
            let crash = Exit {
                code: None,
                signal: Some(11),
                stderr: "oh".into(),
            };
            let told = crash.clone();
            let fake = Fake::new(move |_| GuestEnd::Crash(told.clone()));
            let mut vm = fake.start(&plan(), None).await.expect("start");
            assert_eq!(vm.wait().await.expect("wait"), crash);
            assert!(fake.running().is_empty());
        });
    }

    #[test]
    fn booting_takes_the_time_it_is_given() {
        let paused = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .expect("a runtime");
        paused.block_on(async {
            let begun = tokio::time::Instant::now();
            let boot = Duration::from_secs(3);
            let fake = Fake::new(|_| GuestEnd::Off).booting_for(boot);
            let mut vm = fake.start(&plan(), None).await.expect("start");
            vm.wait().await.expect("wait");
            assert!(begun.elapsed() >= boot);
        });
    }
}

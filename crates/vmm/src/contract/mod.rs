//! What every backend promises, as tests.
//!
//! A backend proves itself by describing itself as a [`Subject`] and listing the tests with
//! [`contract_tests!`](crate::contract_tests). The fake passes the same list as the real ones, so
//! that what is tested on it means something.

pub mod payload;

use std::future::Future;
use std::path::PathBuf;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader, Lines};
use tokio::net::UnixStream;

use crate::{Backend, DiskPlan, Exit, Vm, VmError, VmErrorKind, VmPlan};

/// How long anything may take before a test calls it a hang. A busy machine is slow, not wrong.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long a paused machine is watched for signs of life. It ticks many times in that while.
const QUIET: Duration = Duration::from_millis(150);

/// How a test's guest behaves. Each begins with writing its [line](Guest::line) to the console.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Guest {
    /// Then does nothing, for ever.
    Halts,
    /// Then writes it again, for ever.
    Ticks,
    /// Then resets the machine.
    Resets,
}

impl Guest {
    /// Every kind.
    pub const ALL: [Guest; 3] = [Guest::Halts, Guest::Ticks, Guest::Resets];

    /// What it writes.
    #[must_use]
    pub fn line(self) -> &'static str {
        match self {
            Guest::Halts => "halting",
            Guest::Ticks => "tick",
            Guest::Resets => "resetting",
        }
    }
}

/// A backend under test, with what the tests need to know about its surroundings.
pub trait Subject: Send + Sync {
    /// The backend.
    fn backend(&self) -> &dyn Backend;

    /// A plan for a machine that runs `guest`.
    fn plan(&self, guest: Guest) -> VmPlan;

    /// Whether the process `pid` exists, dead and not reaped included.
    fn exists(&self, pid: u32) -> bool;

    /// Ends the process `pid` with SIGKILL, as a stranger would.
    fn kill_from_outside(&self, pid: u32);
}

/// Makes one `#[test]` of each test of the contract, for the subject that the expression makes.
#[macro_export]
macro_rules! contract_tests {
    ($subject:expr) => {
        $crate::contract_tests! { @each $subject;
            a_machine_starts_and_its_console_arrives
            the_streams_are_given_once
            the_channel_closes_with_the_machine
            killing_leaves_no_process
            killing_is_idempotent
            waiting_can_be_repeated
            waiting_can_be_given_up
            a_reset_ends_the_machine
            dropping_kills
            a_kill_from_outside_is_reported
            pausing_stops_the_guest_and_resuming_continues_it
            a_dead_machine_takes_no_commands
            a_missing_kernel_is_named
            a_missing_disk_is_named
            an_impossible_plan_is_refused
            machines_do_not_know_each_other
        }
    };
    (@each $subject:expr; $($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                let subject = $subject;
                $crate::contract::run($crate::contract::$name(&subject));
            }
        )*
    };
}

/// Runs a test on a runtime like the one that owns machines in production: of one thread.
///
/// # Panics
///
/// If the runtime cannot be made, or the test fails or hangs.
pub fn run(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
        .block_on(within(test));
}

/// `start` gives a process, and what the guest writes comes out of the console.
pub async fn a_machine_starts_and_its_console_arrives(subject: &dyn Subject) {
    let mut machine = Machine::start(subject, Guest::Halts).await;
    machine.expect_line().await;
    assert!(subject.exists(machine.vm.pid()));
}

/// The channel and the console are taken, not lent.
pub async fn the_streams_are_given_once(subject: &dyn Subject) {
    let plan = subject.plan(Guest::Halts);
    let mut vm = start(subject, &plan).await;
    assert!(vm.take_channel().is_some());
    assert!(vm.take_channel().is_none());
    assert!(vm.take_console().is_some());
    assert!(vm.take_console().is_none());
}

/// Whoever reads the channel of a dead machine reads its end, rather than for ever.
pub async fn the_channel_closes_with_the_machine(subject: &dyn Subject) {
    let mut machine = Machine::start(subject, Guest::Halts).await;
    let mut channel = to_tokio(machine.vm.take_channel().expect("the channel"));
    machine.vm.kill().await.expect("kill");
    let mut rest = Vec::new();
    // A reset connection is an end, too.
    let _ = within(channel.read_to_end(&mut rest)).await;
    assert_eq!(rest, b"");
}

/// After `kill` the process does not exist, not even as a zombie.
pub async fn killing_leaves_no_process(subject: &dyn Subject) {
    let mut machine = Machine::start(subject, Guest::Ticks).await;
    machine.expect_line().await;
    let pid = machine.vm.pid();
    let exit = machine.vm.kill().await.expect("kill");
    assert_eq!((exit.code, exit.signal), (None, Some(9)));
    assert!(!subject.exists(pid));
}

/// Killing a dead machine succeeds, and tells again how it died.
pub async fn killing_is_idempotent(subject: &dyn Subject) {
    let mut machine = Machine::start(subject, Guest::Halts).await;
    let first = machine.vm.kill().await.expect("kill");
    assert_eq!(machine.vm.kill().await.expect("kill again"), first);
    assert_eq!(machine.vm.wait().await.expect("wait"), first);
}

/// `wait` gives the same answer each time.
pub async fn waiting_can_be_repeated(subject: &dyn Subject) {
    let mut machine = Machine::start(subject, Guest::Resets).await;
    let first = within(machine.vm.wait()).await.expect("wait");
    assert_eq!(machine.vm.wait().await.expect("wait again"), first);
    assert!(!subject.exists(machine.vm.pid()));
}

/// A `wait` that was dropped half-way takes nothing with it.
pub async fn waiting_can_be_given_up(subject: &dyn Subject) {
    let mut machine = Machine::start(subject, Guest::Ticks).await;
    {
        let waiting = machine.vm.wait();
        tokio::pin!(waiting);
        let first = std::future::poll_fn(|context| {
            std::task::Poll::Ready(waiting.as_mut().poll(context).is_ready())
        });
        assert!(!first.await, "the machine ended by itself");
    }
    machine.expect_line().await;
    machine.vm.kill().await.expect("kill");
}

/// A guest that resets has ended; it does not start over.
pub async fn a_reset_ends_the_machine(subject: &dyn Subject) {
    let mut machine = Machine::start(subject, Guest::Resets).await;
    let exit = within(machine.vm.wait()).await.expect("wait");
    assert_eq!((exit.code, exit.signal), (Some(0), None), "{exit:?}");
    machine.expect_line().await;
    let next = within(machine.console.next_line()).await;
    assert_eq!(next.expect("the console"), None);
}

/// Dropping a machine kills and reaps it.
pub async fn dropping_kills(subject: &dyn Subject) {
    let mut machine = Machine::start(subject, Guest::Ticks).await;
    machine.expect_line().await;
    let pid = machine.vm.pid();
    drop(machine);
    assert!(!subject.exists(pid));
}

/// `wait` tells which signal ended the process.
pub async fn a_kill_from_outside_is_reported(subject: &dyn Subject) {
    let mut machine = Machine::start(subject, Guest::Ticks).await;
    machine.expect_line().await;
    subject.kill_from_outside(machine.vm.pid());
    let exit = within(machine.vm.wait()).await.expect("wait");
    assert_eq!((exit.code, exit.signal), (None, Some(9)));
    assert!(!subject.exists(machine.vm.pid()));
}

/// A paused guest does nothing; both commands may be repeated.
pub async fn pausing_stops_the_guest_and_resuming_continues_it(subject: &dyn Subject) {
    if !subject.backend().capabilities().pause {
        let mut machine = Machine::start(subject, Guest::Ticks).await;
        let error = machine.vm.pause().await.expect_err("pause");
        assert_eq!(error.kind, VmErrorKind::Unsupported);
        return;
    }
    let mut machine = Machine::start(subject, Guest::Ticks).await;
    for _ in 0..2 {
        machine.expect_line().await;
        machine.vm.pause().await.expect("pause");
        machine.vm.pause().await.expect("pause again");
        machine.expect_silence().await;
        machine.vm.resume().await.expect("resume");
        machine.vm.resume().await.expect("resume again");
        machine.expect_line().await;
    }
    machine.vm.pause().await.expect("pause");
    machine.vm.kill().await.expect("kill a paused machine");
}

/// A command to a machine that died says so, with what it said last, whether or not anybody has
/// waited for it yet.
pub async fn a_dead_machine_takes_no_commands(subject: &dyn Subject) {
    let mut machine = Machine::start(subject, Guest::Ticks).await;
    machine.expect_line().await;
    if subject.backend().capabilities().pause {
        machine.vm.pause().await.expect("pause");
    }
    subject.kill_from_outside(machine.vm.pid());
    for _ in 0..2 {
        let error = within(machine.vm.resume()).await.expect_err("resume");
        assert_eq!(error.kind, VmErrorKind::Exited, "{error:?}");
        let cause = std::error::Error::source(&error).expect("a cause");
        assert!(cause.to_string().contains("signal 9"), "{cause}");
    }
    let error = machine.vm.pause().await.expect_err("pause");
    assert_eq!(error.kind, VmErrorKind::Exited);
}

/// A kernel that is not there is named in the error.
pub async fn a_missing_kernel_is_named(subject: &dyn Subject) {
    let mut plan = subject.plan(Guest::Halts);
    plan.kernel = PathBuf::from("/nonexistent/vmlinux");
    let error = refused(subject, &plan).await;
    assert_eq!(error.kind, VmErrorKind::Host);
    assert_eq!(error.to_string(), "open the kernel /nonexistent/vmlinux");
}

/// So is a disk.
pub async fn a_missing_disk_is_named(subject: &dyn Subject) {
    let mut plan = subject.plan(Guest::Halts);
    plan.disks.push(DiskPlan {
        path: PathBuf::from("/nonexistent/root.img"),
        read_only: true,
    });
    let error = refused(subject, &plan).await;
    assert_eq!(error.kind, VmErrorKind::Host);
    assert_eq!(error.to_string(), "open the disk /nonexistent/root.img");
}

/// What the capabilities exclude is refused as such, before anything exists.
pub async fn an_impossible_plan_is_refused(subject: &dyn Subject) {
    let can = subject.backend().capabilities();
    let change: [fn(&mut VmPlan, u32); 4] = [
        |plan, _| plan.cpus = 0,
        |plan, most| plan.memory_mib = most + 1,
        |plan, _| plan.name = "../../etc".to_owned(),
        |plan, _| plan.name.clear(),
    ];
    for change in change {
        let mut plan = subject.plan(Guest::Halts);
        change(&mut plan, can.memory_mib_max);
        let error = refused(subject, &plan).await;
        assert_eq!(error.kind, VmErrorKind::Unsupported, "{plan:?}");
    }
}

/// The end of one machine is nothing to another.
pub async fn machines_do_not_know_each_other(subject: &dyn Subject) {
    let mut one = Machine::start(subject, Guest::Ticks).await;
    let mut other = Machine::start(subject, Guest::Ticks).await;
    assert_ne!(one.vm.pid(), other.vm.pid());
    one.expect_line().await;
    one.vm.kill().await.expect("kill");
    other.expect_line().await;
    other.expect_line().await;
    assert!(subject.exists(other.vm.pid()));
}

/// A machine whose console is read by lines.
struct Machine {
    vm: Box<dyn Vm>,
    console: Lines<BufReader<UnixStream>>,
    line: &'static str,
}

impl Machine {
    async fn start(subject: &dyn Subject, guest: Guest) -> Machine {
        let plan = subject.plan(guest);
        let mut vm = start(subject, &plan).await;
        let console = to_tokio(vm.take_console().expect("the console"));
        Machine {
            vm,
            console: BufReader::new(console).lines(),
            line: guest.line(),
        }
    }

    async fn expect_line(&mut self) {
        let read = within(self.console.next_line()).await;
        let line = read.expect("read the console");
        if line.as_deref() != Some(self.line) {
            let exit: Result<Exit, _> = within(self.vm.wait()).await;
            panic!("expected {:?}, got {line:?}, then {exit:?}", self.line);
        }
    }

    /// Reads what was under way, then expects nothing. That nothing comes can only be seen by
    /// waiting.
    async fn expect_silence(&mut self) {
        let mut lines = 0;
        while let Ok(line) = tokio::time::timeout(QUIET, self.console.next_line()).await {
            assert!(line.expect("read the console").is_some(), "it ended");
            lines += 1;
            // More than the sockets between can hold.
            assert!(lines < 1_000_000, "a paused guest goes on");
        }
    }
}

async fn start(subject: &dyn Subject, plan: &VmPlan) -> Box<dyn Vm> {
    match subject.backend().start(plan).await {
        Ok(vm) => vm,
        Err(error) => panic!(
            "could not {error}: {}",
            std::error::Error::source(&error).map_or_else(String::new, ToString::to_string)
        ),
    }
}

async fn refused(subject: &dyn Subject, plan: &VmPlan) -> VmError {
    match subject.backend().start(plan).await {
        Ok(vm) => panic!("{vm:?} should have been refused"),
        Err(error) => error,
    }
}

fn to_tokio(stream: std::os::unix::net::UnixStream) -> UnixStream {
    stream.set_nonblocking(true).expect("a non-blocking socket");
    UnixStream::from_std(stream).expect("a socket")
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("no answer within {PATIENCE:?}"),
    }
}

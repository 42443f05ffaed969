//! What every backend promises, as tests.
//!
//! A backend proves itself by describing itself as a [`Subject`] and listing the tests with
//! [`contract_tests!`](crate::contract_tests). The fake passes the same list as the real ones, so
//! that what is tested on it means something.

pub mod payload;

use std::future::Future;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use crate::{Backend, DiskPlan, Exit, Memory, Vm, VmError, VmErrorKind, VmPlan};

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
    /// Then writes, for each byte that it reads from the console, how many those are by now, on a
    /// line. It counts in memory, and to 9.
    Counts,
}

impl Guest {
    /// Every kind.
    pub const ALL: [Guest; 4] = [Guest::Halts, Guest::Ticks, Guest::Resets, Guest::Counts];

    /// What it writes.
    #[must_use]
    pub fn line(self) -> &'static str {
        match self {
            Guest::Halts => "halting",
            Guest::Ticks => "tick",
            Guest::Resets => "resetting",
            Guest::Counts => "counting",
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

    /// Whether a restored guest may write again what it wrote last: a machine that is stopped while a byte
    /// is on its way out has not gone on behind the instruction that sent it.
    fn repeats(&self) -> bool {
        false
    }

    /// How many processes of machines with this name run.
    fn count(&self, name: &str) -> usize;

    /// Ends the process `pid` with SIGKILL, as a stranger would.
    fn kill_from_outside(&self, pid: u32);
}

/// Makes one `#[test]` of each test of the contract, for the subject that the expression makes. With
/// `ignore = "REASON",` before it, each is ignored.
#[macro_export]
macro_rules! contract_tests {
    (ignore = $reason:literal, $subject:expr) => {
        $crate::contract_tests! { @all [#[ignore = $reason]] $subject }
    };
    ($subject:expr) => {
        $crate::contract_tests! { @all [] $subject }
    };
    (@all $attributes:tt $subject:expr) => {
        $crate::contract_tests! { @each $attributes $subject;
            a_machine_starts_and_its_console_arrives
            the_streams_are_given_once
            the_channel_closes_with_the_machine
            killing_leaves_no_process
            killing_can_be_begun
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
            a_restored_machine_goes_on_where_the_other_was
            a_paused_machine_can_be_saved
            restored_machines_do_not_see_each_other
            the_files_of_a_snapshot_are_the_owners_and_do_not_change
            only_memory_in_a_file_can_be_saved
            a_dead_machine_cannot_be_saved
            existing_files_stay
            a_start_that_fails_leaves_no_memory
            memory_is_restored_not_started
            a_state_that_makes_no_sense_is_refused
            a_state_of_another_size_is_refused
            a_restored_machine_has_no_memory_of_its_own_to_leave
            a_machine_is_copied_and_goes_on
            a_copy_of_a_copy_goes_on_without_either
            a_paused_machine_is_copied
            a_disk_grows_while_the_machine_runs
            a_copy_shares_its_disk_at_one_moment
            a_restore_can_be_given_up
        }
    };
    (@each $attributes:tt $subject:expr; $($name:ident)*) => {
        $( $crate::contract_tests! { @one $attributes $subject; $name } )*
    };
    (@one [$(#[$attribute:meta])*] $subject:expr; $name:ident) => {
        #[test]
        $(#[$attribute])*
        fn $name() {
            let subject = $subject;
            $crate::contract::run($crate::contract::$name(&subject));
        }
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
    let mut channel = machine.vm.take_channel().expect("the channel");
    machine.vm.kill().await.expect("kill");
    // A guest that has not come through its door will not come any more.
    if let Ok(channel) = within(channel.open()).await {
        let mut rest = Vec::new();
        // A reset connection is an end, too.
        let _ = within(to_tokio(channel).read_to_end(&mut rest)).await;
        assert_eq!(rest, b"");
    }
    let again = within(channel.open()).await.expect_err("over");
    assert_eq!(again.kind(), std::io::ErrorKind::UnexpectedEof);
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

/// A machine that is being killed need not be waited for at once; whoever waits sees how it died.
pub async fn killing_can_be_begun(subject: &dyn Subject) {
    let mut machine = Machine::start(subject, Guest::Ticks).await;
    machine.expect_line().await;
    machine.vm.start_kill().expect("begin to kill");
    let exit = within(machine.vm.wait()).await.expect("wait");
    assert_eq!((exit.code, exit.signal), (None, Some(9)));
    machine.vm.start_kill().expect("again");
    assert!(!subject.exists(machine.vm.pid()));
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

/// The guest goes on as if nothing had been, from the same memory, when the other is long gone.
pub async fn a_restored_machine_goes_on_where_the_other_was(subject: &dyn Subject) {
    let Some(snapshot) = Snapshot::take(subject, 2).await else {
        return;
    };
    // Twice from the same, one after the other.
    for _ in 0..2 {
        let mut clone = snapshot.restore(subject).await;
        clone.expect_counts(&[3, 4, 5]).await;
        assert!(clone.vm.take_channel().is_some());
        assert!(clone.vm.take_channel().is_none());
        clone.vm.pause().await.expect("pause");
        clone.vm.resume().await.expect("resume");
        clone.expect_counts(&[6]).await;
        let pid = clone.vm.pid();
        let exit = clone.vm.kill().await.expect("kill");
        assert_eq!((exit.code, exit.signal), (None, Some(9)));
        assert!(!subject.exists(pid));
    }
}

/// Whether the other ran or was paused makes no difference to who is restored from it.
pub async fn a_paused_machine_can_be_saved(subject: &dyn Subject) {
    let can = subject.backend().capabilities();
    if !can.snapshot || !can.pause {
        return;
    }
    let files = Files::new();
    let (mut machine, plan) = files.start(subject).await;
    machine.expect_line().await;
    machine.expect_counts(&[1]).await;
    machine.vm.pause().await.expect("pause");
    machine
        .vm
        .snapshot(&files.state, None)
        .await
        .expect("snapshot");
    machine.vm.kill().await.expect("kill");
    let snapshot = Snapshot { plan, files };
    snapshot.restore(subject).await.expect_counts(&[2]).await;
}

/// Each has a memory of its own from the same beginning.
pub async fn restored_machines_do_not_see_each_other(subject: &dyn Subject) {
    let Some(snapshot) = Snapshot::take(subject, 1).await else {
        return;
    };
    let (mut one, mut other) = tokio::join!(snapshot.restore(subject), snapshot.restore(subject));
    assert_ne!(one.vm.pid(), other.vm.pid());
    one.expect_counts(&[2, 3, 4]).await;
    other.expect_counts(&[2]).await;
    one.expect_counts(&[5]).await;
    other.expect_counts(&[3, 4]).await;
    one.vm.kill().await.expect("kill");
    other.expect_counts(&[5]).await;
}

/// Memory holds what no other user may read, and what many machines begin from.
pub async fn the_files_of_a_snapshot_are_the_owners_and_do_not_change(subject: &dyn Subject) {
    let Some(snapshot) = Snapshot::take(subject, 1).await else {
        return;
    };
    let Files { memory, state, .. } = &snapshot.files;
    for path in [memory, state] {
        let meta = std::fs::metadata(path).expect("a file");
        assert_eq!(meta.permissions().mode() & 0o7777, 0o600, "{path:?}");
    }
    let meta = std::fs::metadata(memory).expect("a file");
    assert_eq!(meta.len(), u64::from(snapshot.plan.memory_mib) << 20);
    assert!(
        meta.blocks() * 512 < meta.len() / 2,
        "{meta:?} has no holes"
    );
    let read = || [memory, state].map(|path| std::fs::read(path).expect("a file"));
    let before = read();
    let mut clone = snapshot.restore(subject).await;
    clone.expect_counts(&[2, 3]).await;
    clone.vm.kill().await.expect("kill");
    // Not `assert_eq`, which would print them.
    assert!(before == read(), "a restored machine wrote to its origin");
}

/// A machine whose memory nobody else could read has nothing to save, and is none the worse for the
/// question.
pub async fn only_memory_in_a_file_can_be_saved(subject: &dyn Subject) {
    let files = Files::new();
    let mut machine = Machine::start(subject, Guest::Ticks).await;
    let error = machine.vm.snapshot(&files.state, None).await;
    assert_eq!(error.expect_err("refused").kind, VmErrorKind::Unsupported);
    assert!(!files.state.exists());
    machine.expect_line().await;
}

/// What died leaves no state.
pub async fn a_dead_machine_cannot_be_saved(subject: &dyn Subject) {
    if !subject.backend().capabilities().snapshot {
        return;
    }
    let files = Files::new();
    let (mut machine, _) = files.start(subject).await;
    machine.expect_line().await;
    subject.kill_from_outside(machine.vm.pid());
    for _ in 0..2 {
        let error = within(machine.vm.snapshot(&files.state, None)).await;
        assert_eq!(error.expect_err("dead").kind, VmErrorKind::Exited);
        assert!(!files.state.exists());
    }
}

/// Neither the memory nor the state replaces anything.
pub async fn existing_files_stay(subject: &dyn Subject) {
    if !subject.backend().capabilities().snapshot {
        return;
    }
    let files = Files::new();
    let plan = files.plan(subject);
    std::fs::write(&files.memory, "precious").expect("a file");
    let error = refused(subject, &plan).await;
    assert_eq!(error.kind, VmErrorKind::Host);
    assert_eq!(
        error.to_string(),
        format!("make the file {}", files.memory.display())
    );
    assert_eq!(std::fs::read(&files.memory).expect("a file"), b"precious");
    std::fs::remove_file(&files.memory).expect("remove");

    let (mut machine, _) = files.start(subject).await;
    machine.expect_line().await;
    std::fs::write(&files.state, "precious").expect("a file");
    let error = machine
        .vm
        .snapshot(&files.state, None)
        .await
        .expect_err("there");
    assert_eq!(error.kind, VmErrorKind::Host);
    assert_eq!(std::fs::read(&files.state).expect("a file"), b"precious");
    std::fs::remove_file(&files.state).expect("remove");

    let there = files.state.with_extension("memory");
    std::fs::write(&there, "precious").expect("a file");
    let error = machine.vm.snapshot(&files.state, Some(&there)).await;
    assert_eq!(error.expect_err("there").kind, VmErrorKind::Host);
    assert_eq!(std::fs::read(&there).expect("a file"), b"precious");
    assert!(!files.state.exists());
    machine.vm.resume().await.expect("resume");
    machine.expect_counts(&[1]).await;
}

/// A start that fails takes the memory with it that it made.
pub async fn a_start_that_fails_leaves_no_memory(subject: &dyn Subject) {
    if !subject.backend().capabilities().snapshot {
        return;
    }
    let files = Files::new();
    let mut plan = files.plan(subject);
    plan.kernel = PathBuf::from("/nonexistent/vmlinux");
    refused(subject, &plan).await;
    assert!(!files.memory.exists());
}

/// Plans whose memory does not fit what is asked for are refused, and so is memory that is not there.
pub async fn memory_is_restored_not_started(subject: &dyn Subject) {
    let Some(snapshot) = Snapshot::take(subject, 1).await else {
        return;
    };
    let good = snapshot.clone_plan(subject);
    let error = refused(subject, &good).await;
    assert_eq!(error.kind, VmErrorKind::Unsupported);

    let missing = snapshot.files.state.with_extension("none");
    for (memory, kind) in [
        (Memory::Anonymous, VmErrorKind::Unsupported),
        (Memory::File(missing.clone()), VmErrorKind::Unsupported),
        (Memory::CopyOf(missing.clone()), VmErrorKind::Host),
        // There, but not as long as the memory.
        (
            Memory::CopyOf(snapshot.files.state.clone()),
            VmErrorKind::Unsupported,
        ),
    ] {
        let plan = VmPlan {
            memory,
            ..good.clone()
        };
        let error = unrestorable(subject, &plan, &snapshot.files.state).await;
        assert_eq!(error.kind, kind, "{plan:?}");
        assert!(!missing.exists());
    }
    let error = unrestorable(subject, &good, &missing).await;
    assert_eq!(error.kind, VmErrorKind::Host);
}

/// A state that is empty, cut off anywhere, or something else altogether.
pub async fn a_state_that_makes_no_sense_is_refused(subject: &dyn Subject) {
    let Some(snapshot) = Snapshot::take(subject, 1).await else {
        return;
    };
    let plan = snapshot.clone_plan(subject);
    let state = std::fs::read(&snapshot.files.state).expect("the state");
    let wrong = snapshot.files.state.with_extension("wrong");
    let garbage = vec![0xa5; 50_000];
    for bytes in [
        &state[..0],
        &state[..10],
        &state[..state.len() / 2],
        &garbage,
    ] {
        std::fs::write(&wrong, bytes).expect("a file");
        let error = unrestorable(subject, &plan, &wrong).await;
        let senseless = matches!(error.kind, VmErrorKind::Exited | VmErrorKind::Protocol);
        assert!(senseless, "{error:?}");
        let cause = std::error::Error::source(&error).expect("a cause");
        assert!(!cause.to_string().is_empty());
    }
}

/// The memory file fits the plan, but the state is that of a smaller machine.
pub async fn a_state_of_another_size_is_refused(subject: &dyn Subject) {
    let Some(snapshot) = Snapshot::take(subject, 1).await else {
        return;
    };
    let mut plan = snapshot.clone_plan(subject);
    plan.memory_mib += 64;
    let memory = std::fs::File::options()
        .write(true)
        .open(&snapshot.files.memory);
    let longer = memory.and_then(|file| file.set_len(u64::from(plan.memory_mib) << 20));
    longer.expect("a longer file");
    let error = unrestorable(subject, &plan, &snapshot.files.state).await;
    let senseless = matches!(error.kind, VmErrorKind::Exited | VmErrorKind::Protocol);
    assert!(senseless, "{error:?}");
}

/// A machine that was restored can only be saved to a new file.
pub async fn a_restored_machine_has_no_memory_of_its_own_to_leave(subject: &dyn Subject) {
    let Some(snapshot) = Snapshot::take(subject, 1).await else {
        return;
    };
    let mut clone = snapshot.restore(subject).await;
    let again = snapshot.files.state.with_extension("again");
    let error = clone.vm.snapshot(&again, None).await.expect_err("refused");
    assert_eq!(error.kind, VmErrorKind::Unsupported);
    assert!(!again.exists());
    clone.expect_counts(&[2]).await;
}

/// The guest of a machine whose memory is in no file stands still for a moment and goes on; its
/// copies go on from that moment, each for itself.
pub async fn a_machine_is_copied_and_goes_on(subject: &dyn Subject) {
    let files = Files::new();
    if !subject.backend().capabilities().snapshot {
        let mut machine = Machine::start(subject, Guest::Counts).await;
        let refused = machine.vm.snapshot(&files.state, Some(&files.memory)).await;
        assert_eq!(refused.expect_err("refused").kind, VmErrorKind::Unsupported);
        return;
    }
    // In anonymous memory, and in a file that is the machine's own.
    for memory in [Memory::Anonymous, Memory::File(files.directory.join("own"))] {
        let plan = VmPlan {
            memory,
            ..subject.plan(Guest::Counts)
        };
        let mut machine = Machine::new(start(subject, &plan).await, Guest::Counts);
        machine.expect_line().await;
        machine.expect_counts(&[1, 2]).await;
        let snapshot = machine.copy(plan, Files::new()).await;
        machine.vm.resume().await.expect("resume");
        machine.expect_counts(&[3, 4]).await;
        let mut one = snapshot.restore(subject).await;
        let mut other = snapshot.restore(subject).await;
        one.expect_counts(&[3, 4, 5]).await;
        other.expect_counts(&[3]).await;
        machine.expect_counts(&[5]).await;
    }
}

/// A copy is copied in its turn when the file it came from has no name any more.
pub async fn a_copy_of_a_copy_goes_on_without_either(subject: &dyn Subject) {
    let Some(first) = Snapshot::take(subject, 1).await else {
        return;
    };
    let mut copy = first.restore(subject).await;
    copy.expect_counts(&[2, 3]).await;
    let plan = first.clone_plan(subject);
    drop(first);
    let second = copy.copy(plan, Files::new()).await;
    copy.vm.kill().await.expect("kill");
    let mut copy = second.restore(subject).await;
    copy.expect_counts(&[4, 5]).await;
    let third = copy.copy(second.clone_plan(subject), Files::new()).await;
    copy.vm.resume().await.expect("resume");
    copy.expect_counts(&[6]).await;
    third.restore(subject).await.expect_counts(&[6, 7]).await;
}

/// A machine that is paused stays so while it is copied; its copy runs.
pub async fn a_paused_machine_is_copied(subject: &dyn Subject) {
    let can = subject.backend().capabilities();
    if !can.snapshot || !can.pause {
        return;
    }
    let plan = subject.plan(Guest::Counts);
    let mut machine = Machine::new(start(subject, &plan).await, Guest::Counts);
    machine.expect_line().await;
    machine.expect_counts(&[1]).await;
    machine.vm.pause().await.expect("pause");
    let snapshot = machine.copy(plan, Files::new()).await;
    machine.keyboard.write_all(b"x").await.expect("a byte");
    machine.expect_silence().await;
    snapshot.restore(subject).await.expect_counts(&[2]).await;
    machine.vm.resume().await.expect("resume");
    let line = within(machine.console.next_line()).await;
    assert_eq!(line.expect("the console").as_deref(), Some("2"));
}

/// Until a machine that was copied is resumed, its disks do not change, so that they can be copied.
pub async fn a_copy_shares_its_disk_at_one_moment(subject: &dyn Subject) {
    if !subject.backend().capabilities().snapshot {
        return;
    }
    let files = Files::new();
    let disk = files.directory.join("disk");
    std::fs::write(&disk, vec![7; 1 << 20]).expect("a disk");
    let mut plan = subject.plan(Guest::Counts);
    plan.disks.push(DiskPlan {
        path: disk.clone(),
        read_only: false,
    });
    let mut machine = Machine::new(start(subject, &plan).await, Guest::Counts);
    machine.expect_line().await;
    machine.expect_counts(&[1]).await;
    let snapshot = machine.copy(plan, files).await;
    let other = snapshot.files.directory.join("other");
    std::fs::copy(&disk, &other).expect("a copy");
    machine.vm.resume().await.expect("resume");
    let mut clone = snapshot.clone_plan(subject);
    clone.disks[0].path = other;
    let vm = within(
        subject
            .backend()
            .restore(&clone, &snapshot.files.state, None),
    )
    .await;
    let mut clone = Machine::new(vm.unwrap_or_else(|error| fail(&error)), Guest::Counts);
    clone.may_repeat = subject.repeats();
    clone.expect_counts(&[2]).await;
    machine.expect_counts(&[2]).await;
}

/// A disk is made larger under a machine that runs, its file with it, and one that is only read is not.
pub async fn a_disk_grows_while_the_machine_runs(subject: &dyn Subject) {
    let files = Files::new();
    let mut plan = subject.plan(Guest::Ticks);
    for (name, read_only) in [("own", false), ("base", true)] {
        let path = files.directory.join(name);
        std::fs::write(&path, vec![7; 1 << 20]).expect("a disk");
        plan.disks.push(DiskPlan { path, read_only });
    }
    let mut machine = Machine::new(start(subject, &plan).await, Guest::Ticks);
    machine.expect_line().await;
    match within(machine.vm.grow_disk(0, 2 << 20)).await {
        // A backend need not be able to.
        Err(error) if error.kind == VmErrorKind::Unsupported => return,
        grown => grown.expect("grown"),
    }
    within(machine.vm.grow_disk(0, 2 << 20))
        .await
        .expect("as large already");
    let length = |disk: usize| {
        std::fs::metadata(&plan.disks[disk].path)
            .expect("a disk")
            .len()
    };
    assert_eq!([length(0), length(1)], [2 << 20, 1 << 20]);
    for index in [1, 2] {
        let error = within(machine.vm.grow_disk(index, 3 << 20)).await;
        let error = error.expect_err("only read, or not there");
        assert_eq!(error.kind, VmErrorKind::Unsupported);
    }
    machine.expect_line().await;
}

/// A restore that nobody waits for any more leaves nothing running, and the snapshot as it was.
pub async fn a_restore_can_be_given_up(subject: &dyn Subject) {
    let Some(snapshot) = Snapshot::take(subject, 1).await else {
        return;
    };
    let plan = snapshot.clone_plan(subject);
    // Given up at once, and further on.
    for patience in [Duration::ZERO, Duration::from_millis(2), QUIET / 5] {
        let restoring = subject
            .backend()
            .restore(&plan, &snapshot.files.state, None);
        drop(tokio::time::timeout(patience, restoring).await);
        assert_eq!(subject.count(&plan.name), 0);
    }
    snapshot.restore(subject).await.expect_counts(&[2]).await;
}

/// Where a test's snapshot is; all of it goes when this is dropped.
struct Files {
    memory: PathBuf,
    state: PathBuf,
    directory: PathBuf,
}

impl Files {
    /// A directory with no files in it yet.
    fn new() -> Files {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("smolvm-contract-{}-{number}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        std::fs::create_dir(&directory).expect("a directory");
        Files {
            memory: directory.join("memory,1"),
            state: directory.join("state"),
            directory,
        }
    }

    fn plan(&self, subject: &dyn Subject) -> VmPlan {
        VmPlan {
            memory: Memory::File(self.memory.clone()),
            ..subject.plan(Guest::Counts)
        }
    }

    async fn start(&self, subject: &dyn Subject) -> (Machine, VmPlan) {
        let plan = self.plan(subject);
        let vm = start(subject, &plan).await;
        (Machine::new(vm, Guest::Counts), plan)
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        // What stays, stays in the directory for such.
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// What a machine that counts left behind.
struct Snapshot {
    plan: VmPlan,
    files: Files,
}

impl Snapshot {
    /// Takes one of a machine that has counted to `count`; `None` if the backend cannot, which it
    /// then says.
    async fn take(subject: &dyn Subject, count: u8) -> Option<Snapshot> {
        let files = Files::new();
        if !subject.backend().capabilities().snapshot {
            let error = refused(subject, &files.plan(subject)).await;
            assert_eq!(error.kind, VmErrorKind::Unsupported);
            return None;
        }
        let (mut machine, plan) = files.start(subject).await;
        machine.expect_line().await;
        machine
            .expect_counts(&(1..=count).collect::<Vec<_>>())
            .await;
        let saved = within(machine.vm.snapshot(&files.state, None)).await;
        saved.expect("snapshot");
        machine.vm.kill().await.expect("kill");
        Some(Snapshot { plan, files })
    }

    fn clone_plan(&self, subject: &dyn Subject) -> VmPlan {
        VmPlan {
            memory: Memory::CopyOf(self.files.memory.clone()),
            disks: self.plan.disks.clone(),
            ..subject.plan(Guest::Counts)
        }
    }

    async fn restore(&self, subject: &dyn Subject) -> Machine {
        let plan = self.clone_plan(subject);
        let vm = within(subject.backend().restore(&plan, &self.files.state, None)).await;
        let mut machine = Machine::new(vm.unwrap_or_else(|error| fail(&error)), Guest::Counts);
        machine.may_repeat = subject.repeats();
        machine
    }
}

/// Restoring fails, and leaves nothing running.
async fn unrestorable(subject: &dyn Subject, plan: &VmPlan, state: &Path) -> VmError {
    let error = match within(subject.backend().restore(plan, state, None)).await {
        Ok(vm) => panic!("{vm:?} should have been refused"),
        Err(error) => error,
    };
    assert_eq!(subject.count(&plan.name), 0);
    error
}

/// A machine whose console is read by lines.
struct Machine {
    vm: Box<dyn Vm>,
    console: Lines<BufReader<OwnedReadHalf>>,
    keyboard: OwnedWriteHalf,
    line: &'static str,
    /// Whether the end of a line that was read before may come once more.
    may_repeat: bool,
}

impl Machine {
    async fn start(subject: &dyn Subject, guest: Guest) -> Machine {
        let plan = subject.plan(guest);
        Machine::new(start(subject, &plan).await, guest)
    }

    fn new(mut vm: Box<dyn Vm>, guest: Guest) -> Machine {
        let console = to_tokio(vm.take_console().expect("the console"));
        let (console, keyboard) = console.into_split();
        Machine {
            vm,
            console: BufReader::new(console).lines(),
            keyboard,
            line: guest.line(),
            may_repeat: false,
        }
    }

    /// Takes a snapshot of it, a machine of `plan`, and leaves it paused.
    async fn copy(&mut self, plan: VmPlan, files: Files) -> Snapshot {
        let saved = within(self.vm.snapshot(&files.state, Some(&files.memory))).await;
        saved.unwrap_or_else(|error| fail(&error));
        Snapshot { plan, files }
    }

    /// Has it count once for each of these.
    async fn expect_counts(&mut self, counts: &[u8]) {
        for count in counts {
            within(self.keyboard.write_all(b"x")).await.expect("a byte");
            let mut line = self.next_line().await;
            if std::mem::take(&mut self.may_repeat) && line.as_deref() == Some("") {
                line = self.next_line().await;
            }
            assert_eq!(line, Some(count.to_string()));
        }
    }

    async fn next_line(&mut self) -> Option<String> {
        let line = within(self.console.next_line()).await;
        line.expect("read the console")
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
    match subject.backend().start(plan, None).await {
        Ok(vm) => vm,
        Err(error) => fail(&error),
    }
}

fn fail(error: &VmError) -> ! {
    let cause = std::error::Error::source(error);
    let cause = cause.map_or_else(String::new, ToString::to_string);
    panic!("could not {error}: {cause}")
}

async fn refused(subject: &dyn Subject, plan: &VmPlan) -> VmError {
    match subject.backend().start(plan, None).await {
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

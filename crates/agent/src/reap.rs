//! The one place that waits for processes.
//!
//! As PID 1 the agent inherits every orphan (pid_namespaces(7)), so a thread waits for all of them.
//! Statuses of commands go to their sessions.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};

use crate::stream::Stream;
use crate::sys;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// Its exit code, if it exited.
    pub(crate) code: Option<i32>,
    /// The signal that ended it, if one did.
    pub(crate) signal: Option<i32>,
    /// When that was noticed.
    pub(crate) at: Instant,
}

/// Who waits for which process.
#[derive(Debug, Default)]
pub(crate) struct Reaper {
    table: Mutex<Table>,
    /// Signalled after each round of reaping.
    reaped: Condvar,
}

#[derive(Debug, Default)]
struct Table {
    watched: HashMap<Pid, Arc<Stream>>,
    /// Commands being started, whose process number is not known yet.
    starting: usize,
    /// Statuses that came while something was being started and belong to no command known.
    unclaimed: Vec<(Pid, Exit)>,
    /// Whether the last look found no process left.
    childless: bool,
    /// Rounds of reaping so far.
    rounds: u64,
}

impl Reaper {
    /// Starts the thread.
    pub(crate) fn start() -> Arc<Self> {
        let reaper = Arc::new(Self::default());
        let shared = Arc::clone(&reaper);
        let thread = std::thread::Builder::new()
            .name("reaper".to_owned())
            .stack_size(64 * 1024)
            .spawn(move || {
                loop {
                    shared.reap();
                    sys::wait_for_child_signal();
                }
            });
        if let Err(error) = thread {
            crate::console::say(&format!(
                "cannot start the thread that reaps processes: {error}"
            ));
        }
        reaper
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reap(&self) {
        let mut table = self.table();
        // Signals of several children that end together are merged into one (signal(7)), so each
        // round takes every status there is.
        loop {
            let (pid, status) = match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some(found)) => found,
                Ok(None) => {
                    table.childless = false;
                    break;
                }
                Err(Errno::INTR) => continue,
                Err(_) => {
                    // ECHILD: there is no process left that could have children.
                    table.childless = true;
                    break;
                }
            };
            let exit = exit_of(status);
            if let Some(stream) = table.watched.remove(&pid) {
                stream.deliver_exit(exit);
            } else if table.starting > 0 {
                table.unclaimed.push((pid, exit));
            }
        }
        table.rounds += 1;
        drop(table);
        self.reaped.notify_all();
    }

    /// Starts a command with `start` and delivers its end to `stream`, however soon it ends.
    ///
    /// The table is not locked meanwhile: `start` returns only when the program is loaded, which
    /// may take as long as the disk does.
    pub(crate) fn spawn<E>(
        &self,
        stream: &Arc<Stream>,
        start: impl FnOnce() -> Result<Pid, E>,
    ) -> Result<Pid, E> {
        self.table().starting += 1;
        let started = start();
        let mut table = self.table();
        table.starting -= 1;
        if let Ok(pid) = &started {
            let early = table.unclaimed.iter().position(|(ended, _)| ended == pid);
            match early {
                Some(at) => stream.deliver_exit(table.unclaimed.swap_remove(at).1),
                None => {
                    table.watched.insert(*pid, Arc::clone(stream));
                    table.childless = false;
                }
            }
        }
        if table.starting == 0 {
            table.unclaimed.clear();
        }
        started
    }

    /// Sends `signal` to the process group `pid` leads, unless that process was reaped: then the
    /// number may mean somebody else.
    pub(crate) fn signal_group(&self, pid: Pid, signal: Signal) {
        let table = self.table();
        if table.watched.contains_key(&pid) {
            let _ = rustix::process::kill_process_group(pid, signal);
        }
    }

    /// Waits until no process is left or `deadline` has passed, calling `again` after each round.
    ///
    /// Returns whether no process is left.
    pub(crate) fn wait_until_childless(&self, deadline: Instant, mut again: impl FnMut()) -> bool {
        // A look now: the last one may be from before the processes that are left were started.
        self.reap();
        let mut table = self.table();
        loop {
            if table.childless {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let seen = table.rounds;
            table = self
                .reaped
                .wait_timeout_while(table, left, |table| table.rounds == seen)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            drop(table);
            again();
            table = self.table();
        }
    }
}

fn exit_of(status: WaitStatus) -> Exit {
    Exit {
        code: status.exit_status(),
        signal: status.terminating_signal(),
        at: Instant::now(),
    }
}

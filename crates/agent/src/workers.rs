//! Threads for sessions, kept for the next session when one ends.
//!
//! Creating a thread costs as much as a small command under emulation, so a few wait parked.

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Bytes of stack of a session thread. The deepest thing on it is a tar header and a copy buffer.
const STACK_BYTES: usize = 256 * 1024;

/// Threads that wait for work; more end themselves.
const IDLE_MAX: usize = 8;

type Job = Box<dyn FnOnce() + Send>;

/// The threads.
#[derive(Debug, Default, Clone)]
pub(crate) struct Workers {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    work: Condvar,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Workers").finish_non_exhaustive()
    }
}

#[derive(Default)]
struct State {
    jobs: Vec<Job>,
    idle: usize,
}

impl Workers {
    /// Starts one thread that waits, so that the first request need not.
    pub(crate) fn warm(&self) {
        let _ = self.start();
    }

    /// Runs `job` on a thread of its own.
    ///
    /// Fails, without having run it, when the kernel refuses another thread.
    pub(crate) fn run(&self, job: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
        let mut state = self.shared.lock();
        state.jobs.push(Box::new(job));
        if state.idle >= state.jobs.len() {
            drop(state);
            self.shared.work.notify_one();
            return Ok(());
        }
        // The lock is held until the thread exists, so that nobody else can take the job that is
        // taken back when it does not.
        self.start().inspect_err(|_| {
            state.jobs.pop();
        })
    }

    fn start(&self) -> std::io::Result<()> {
        let shared = Arc::clone(&self.shared);
        std::thread::Builder::new()
            .name("session".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || shared.work())
            .map(drop)
    }
}

impl Shared {
    /// A panic of a job is caught, so the lock protects nothing half-done.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.jobs.pop() {
                drop(state);
                // The session's own guard has told the host; here the thread only has to survive.
                let _ = std::panic::catch_unwind(AssertUnwindSafe(job));
                state = self.lock();
            } else if state.idle >= IDLE_MAX {
                return;
            } else {
                state.idle += 1;
                state = self
                    .work
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
            }
        }
    }
}

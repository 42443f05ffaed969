//! Signals that mean "end", as values one can wait for.
//!
//! While [`Signals`] exists none of them kills the process, so a command that makes things can
//! always take them away again.

use std::future::Future;
use std::pin::pin;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::report::CliError;

/// The signals a person, a terminal or a supervisor ends a program with.
#[derive(Debug)]
pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    quit: Signal,
}

impl Signals {
    /// Takes the signals over.
    ///
    /// # Errors
    ///
    /// [`CliError::Io`] if the kernel refuses.
    pub(crate) fn install() -> Result<Self, CliError> {
        let take =
            |kind| signal(kind).map_err(|error| CliError::io("installing signal handlers", error));
        Ok(Self {
            interrupt: take(SignalKind::interrupt())?,
            terminate: take(SignalKind::terminate())?,
            hangup: take(SignalKind::hangup())?,
            quit: take(SignalKind::quit())?,
        })
    }

    /// Waits for the next one and says which. May be dropped and called again.
    pub(crate) async fn next(&mut self) -> SignalKind {
        tokio::select! {
            _ = self.interrupt.recv() => SignalKind::interrupt(),
            _ = self.terminate.recv() => SignalKind::terminate(),
            _ = self.hangup.recv() => SignalKind::hangup(),
            _ = self.quit.recv() => SignalKind::quit(),
        }
    }

    /// Does `work` unless a signal comes first, which drops it.
    ///
    /// # Errors
    ///
    /// [`CliError::Interrupted`], or what the work failed with.
    pub(crate) async fn or_interrupted<T, E>(
        &mut self,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, CliError>
    where
        CliError: From<E>,
    {
        let work = pin!(work);
        tokio::select! {
            done = work => Ok(done?),
            _ = self.next() => Err(CliError::Interrupted),
        }
    }
}

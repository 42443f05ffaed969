//! What the process tells its caller in one number.

use std::process::ExitCode;

use smolvm_engine::{ErrorKind, ExitStatus};

/// Exit codes of `smolvm`.
///
/// Commands that run something in a guest (`run`, `exec`, `shell`) return the guest's own code, so
/// failures of ours use the numbers callers of Docker, `timeout` and POSIX shells already know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// 0: done.
    Success,
    /// 1: it failed.
    Failure,
    /// 2: the command line is wrong, or a value on it cannot be used.
    Usage,
    /// 124: the guest's command ran longer than `--timeout`, as timeout(1) says it.
    TimedOut,
    /// 125: `run`, `exec` or `shell` failed before or beside the guest's command, as Docker says it.
    NotTheCommand,
    /// 126: the guest's command is there and cannot be executed.
    NotExecutable,
    /// 127: the guest's command is not there.
    CommandNotFound,
    /// 130: interrupted; 128 + SIGINT.
    Interrupted,
    /// 141: nobody reads our output any more; 128 + SIGPIPE, what a program without our clean-up
    /// would have ended with.
    BrokenPipe,
    /// The guest's command ended by itself; its code, or 128 + the signal that killed it.
    Guest(u8),
}

impl Exit {
    /// The number.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Success => 0,
            Self::Failure => 1,
            Self::Usage => 2,
            Self::TimedOut => 124,
            Self::NotTheCommand => 125,
            Self::NotExecutable => 126,
            Self::CommandNotFound => 127,
            Self::Interrupted => 130,
            Self::BrokenPipe => 141,
            Self::Guest(code) => code,
        }
    }

    /// The exit code of an engine failure. `guest`: the command runs something in a guest, so 1
    /// would be mistaken for the guest's own answer.
    pub(crate) fn of(kind: ErrorKind, guest: bool) -> Self {
        match kind {
            ErrorKind::InvalidInput => Self::Usage,
            ErrorKind::Cancelled => Self::Interrupted,
            ErrorKind::NotFound
            | ErrorKind::AlreadyExists
            | ErrorKind::NotRunning
            | ErrorKind::Busy
            | ErrorKind::MissingDependency
            | ErrorKind::Unsupported
            | ErrorKind::Timeout
            | ErrorKind::GuestFailed
            | ErrorKind::NoSpace
            | ErrorKind::PermissionDenied
            | ErrorKind::Network
            | ErrorKind::State
            | ErrorKind::Internal => Self::failure(guest),
        }
    }

    /// A failure of ours.
    pub(crate) fn failure(guest: bool) -> Self {
        if guest {
            Self::NotTheCommand
        } else {
            Self::Failure
        }
    }

    /// The exit code of a guest's command.
    pub(crate) fn of_command(status: &ExitStatus) -> Self {
        if status.timed_out {
            return Self::TimedOut;
        }
        // wait(2) gives 8 bits of code, and signals below 65; anything else is a guest that lies.
        match (status.code, status.signal) {
            (Some(code), _) => Self::Guest(u8::try_from(code & 0xff).unwrap_or(u8::MAX)),
            (None, Some(signal)) => {
                Self::Guest(u8::try_from(signal.saturating_add(128)).unwrap_or(u8::MAX))
            }
            (None, None) => Self::NotTheCommand,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn status(code: Option<i32>, signal: Option<i32>, timed_out: bool) -> ExitStatus {
        ExitStatus {
            code,
            signal,
            timed_out,
            duration: Duration::ZERO,
        }
    }

    #[test]
    fn a_command_gives_its_own_code_or_its_signal() {
        let code = |status: &ExitStatus| Exit::of_command(status).code();
        assert_eq!(code(&status(Some(0), None, false)), 0);
        assert_eq!(code(&status(Some(3), None, false)), 3);
        assert_eq!(code(&status(None, Some(9), false)), 137);
        assert_eq!(code(&status(None, Some(9), true)), 124);
        assert_eq!(code(&status(None, None, false)), 125);
        assert_eq!(code(&status(None, Some(i32::MAX), false)), 255);
    }

    #[test]
    fn failures_of_ours_are_told_apart_from_the_guests() {
        assert_eq!(Exit::of(ErrorKind::NotFound, false).code(), 1);
        assert_eq!(Exit::of(ErrorKind::NotFound, true).code(), 125);
        assert_eq!(Exit::of(ErrorKind::InvalidInput, true).code(), 2);
        assert_eq!(Exit::of(ErrorKind::Cancelled, true).code(), 130);
    }
}

//! The only unsafe code of this crate.
#![expect(
    unsafe_code,
    reason = "what has to be done between fork and exec, and with raw descriptors, is offered only unsafely"
)]

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};

/// Lets the child of `command` inherit `fds` under their own numbers, and die with the *thread*
/// that starts it (prctl(2), `PR_SET_PDEATHSIG`).
///
/// Keeping the numbers avoids dup2(2), which could overwrite the descriptor through which std
/// reports a failed exec. The close-on-exec flag is cleared only in the child, so a process that
/// another thread starts meanwhile inherits none of them.
pub(crate) fn adopt(command: &mut Command, fds: Vec<OwnedFd>) {
    let parent = getpid();
    // SAFETY: between fork and exec only async-signal-safe calls are allowed (signal-safety(7)).
    // The closure makes plain system calls (prctl, getppid, fcntl) on values it owns, and allocates
    // nothing: an `io::Error` made of an error number holds only an integer.
    unsafe {
        command.pre_exec(move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            // The parent may have died before the request was in place.
            if getppid() != Some(parent) {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            for fd in &fds {
                fcntl_setfd(fd, FdFlags::empty())?;
            }
            Ok(())
        });
    }
}

/// Watches a descriptor for having something to read.
pub(crate) fn watch_readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` always names the same open descriptor until it is dropped, and `AsyncFd`
    // deregisters before it drops it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?)
}

//! The only unsafe code of this crate.
#![expect(
    unsafe_code,
    reason = "a death signal must be set between fork and exec, and std offers that only unsafely"
)]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};

/// Makes the kernel send `signal` to the child when the thread that starts it ends.
///
/// See prctl(2), `PR_SET_PDEATHSIG`: the signal follows the *thread*, so the caller starts and
/// waits for the child on the same one.
pub(crate) fn die_with_parent(command: &mut Command, signal: Signal) {
    let parent = getpid();
    // SAFETY: between fork and exec only async-signal-safe calls are allowed (signal-safety(7)).
    // The closure makes two plain system calls, prctl and getppid, and allocates nothing:
    // `io::Error::from_raw_os_error` and rustix's conversion to it hold only an integer.
    unsafe {
        command.pre_exec(move || {
            set_parent_process_death_signal(Some(signal))?;
            // The parent may have died before the request was in place.
            if getppid() != Some(parent) {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            Ok(())
        });
    }
}

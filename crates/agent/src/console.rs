//! Lines for people: on the guest's console, or on standard error when a test runs the agent.
//!
//! Few things are worth a line, and a guest's programs can cause almost none of them.

use rustix::fs::{Mode, OFlags};

/// Writes one line, and never fails: there is nobody left to tell.
///
/// The console is opened for each line, because it may not exist yet, and without blocking, because
/// a console that nobody reads must not hold PID 1 up.
pub(crate) fn say(text: &str) {
    let line = format!("smolvm-agent: {text}\n");
    if rustix::process::getpid().is_init() {
        let flags = OFlags::WRONLY | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        if let Ok(console) = rustix::fs::open("/dev/console", flags, Mode::empty()) {
            let _ = rustix::io::write(&console, line.as_bytes());
        }
    } else {
        let _ = rustix::io::write(rustix::stdio::stderr(), line.as_bytes());
    }
}

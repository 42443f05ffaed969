//! A terminal, with a program on it.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::process::{Child, Command};
use std::time::Instant;

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Termios, Winsize, tcgetattr, tcsetwinsize};

use crate::invocation::{Output, contains};
use crate::watch::{PATIENCE, Process};

/// A pseudo-terminal whose foreground is a program started on it.
#[derive(Debug)]
pub struct Terminal {
    master: File,
    /// Held, so that the terminal lives on after the program and can be looked at.
    slave: OwnedFd,
    child: Child,
    process: Process,
    screen: Output,
    before: Termios,
}

impl Terminal {
    /// Starts a program on a new terminal of this size, as its controlling terminal.
    ///
    /// # Panics
    ///
    /// If that fails; it takes setsid(1) of util-linux.
    #[must_use]
    pub fn run(program: &Path, args: &[&str], rows: u16, columns: u16) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
            .expect("a pseudo-terminal");
        grantpt(&master).expect("a pseudo-terminal");
        unlockpt(&master).expect("a pseudo-terminal");
        let path = ptsname(&master, Vec::new()).expect("a pseudo-terminal");
        let slave: OwnedFd = File::options()
            .read(true)
            .write(true)
            .open(path.to_str().expect("a path"))
            .expect("a pseudo-terminal")
            .into();
        resize(&master, rows, columns);
        let before = tcgetattr(&slave).expect("a terminal");
        let end = || slave.try_clone().expect("a descriptor");
        // setsid(1) becomes the program itself, so the child is the program.
        let child = Command::new("setsid")
            .arg("--ctty")
            .arg(program)
            .args(args)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("TERM", "xterm")
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .expect("setsid of util-linux");
        let process = Process::open(child.id()).expect("a child that was not waited for");
        let master = File::from(master);
        let screen = Output::read(master.try_clone().expect("a descriptor"));
        Self {
            master,
            slave,
            child,
            process,
            screen,
            before,
        }
    }

    /// Waits until `text` has appeared.
    ///
    /// # Panics
    ///
    /// If it does not, with all that did.
    #[track_caller]
    pub fn wait_for(&self, text: &str) {
        let seen = self.screen.wait(Instant::now() + PATIENCE, |bytes, _| {
            contains(bytes, text.as_bytes())
        });
        assert!(
            seen,
            "{text:?} did not appear on the terminal, but this:\n{}",
            self.screen()
        );
    }

    /// Everything that appeared.
    #[must_use]
    pub fn screen(&self) -> String {
        String::from_utf8_lossy(&self.screen.bytes()).into_owned()
    }

    /// Types.
    ///
    /// # Panics
    ///
    /// If the terminal is gone.
    pub fn type_in(&mut self, keys: &[u8]) {
        self.master.write_all(keys).expect("a terminal");
    }

    /// Changes the size; the kernel tells the foreground.
    pub fn resize(&self, rows: u16, columns: u16) {
        resize(&self.master, rows, columns);
    }

    /// Insists that the terminal's settings are those it had before the program.
    ///
    /// # Panics
    ///
    /// If they are not.
    #[track_caller]
    pub fn is_as_before(&self) {
        let now = tcgetattr(self.slave.as_fd()).expect("a terminal");
        assert_eq!(
            format!("{now:?}"),
            format!("{:?}", self.before),
            "the program left the terminal changed"
        );
    }

    /// Waits for the program's end, and gives its exit code.
    ///
    /// # Panics
    ///
    /// If it does not end.
    #[track_caller]
    pub fn wait(&mut self) -> Option<i32> {
        assert!(
            self.process.ends_within(PATIENCE),
            "the program on the terminal did not end within {PATIENCE:?}; it showed:\n{}",
            self.screen()
        );
        self.child.wait().expect("a child that ended").code()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Both do nothing if it was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn resize(master: impl std::os::fd::AsFd, rows: u16, columns: u16) {
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(master, size).expect("a terminal");
}

//! Running the host's programs: one at a time, watched, cancellable, and never outliving us.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use crate::cancel::Cancel;
use crate::error::{HostError, HostErrorKind};
use crate::packages;
use crate::process::wait_readable;

/// How many of the last lines of a program's standard error an error carries.
const LAST_LINES: usize = 12;
/// The longest line kept whole, in bytes; a longer one is cut there.
const LINE_BYTES_MAX: usize = 4096;
/// How long a program that is asked to stop may tidy up before it is killed. mmdebstrap removes
/// some 10,000 files then.
const GRACE: Duration = Duration::from_secs(20);

/// A program that ended badly, with what it said last.
#[derive(Debug, thiserror::Error)]
#[error("{program} ended with {status}{}", said(.last_lines))]
pub(crate) struct ProgramFailure {
    program: String,
    status: ExitStatus,
    pub(crate) last_lines: Vec<String>,
}

fn said(lines: &[String]) -> String {
    if lines.is_empty() {
        String::new()
    } else {
        format!(", saying:\n  {}", lines.join("\n  "))
    }
}

/// A program about to run: standard input empty, messages in English (`LC_ALL=C`), in a process
/// group of its own, terminated when the thread that started it ends.
#[derive(Debug)]
pub(crate) struct Tool {
    program: PathBuf,
    /// What errors call it.
    name: String,
    command: Command,
}

impl Tool {
    pub(crate) fn new(program: &Path) -> Self {
        let mut command = Command::new(program);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .env("LC_ALL", "C")
            .env_remove("LANGUAGE")
            // mmdebstrap signals its whole group when it ends badly.
            .process_group(0);
        // A request, not SIGKILL: mmdebstrap unmounts and removes its tree when asked.
        crate::sys::die_with_parent(&mut command, Signal::TERM);
        Self {
            program: program.to_owned(),
            name: program.display().to_string(),
            command,
        }
    }

    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    /// Gives it standard input.
    pub(crate) fn input(mut self, bytes: &[u8]) -> Result<Self, HostError> {
        let file = (|| {
            let mut file = tempfile::tempfile()?;
            file.write_all(bytes)?;
            file.rewind()?;
            Ok(file)
        })();
        let file =
            file.map_err(|error| HostError::io("write the input of", &self.program, error))?;
        self.command.stdin(Stdio::from(file));
        Ok(self)
    }

    pub(crate) fn args<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(mut self, args: I) -> Self {
        self.command.args(args);
        self
    }

    pub(crate) fn env(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.command.env(name, value.into());
        self
    }

    /// Keeps our environment from a program whose result would depend on it. `LC_ALL` stays.
    pub(crate) fn without_environment(mut self) -> Self {
        self.command.env_clear().env("LC_ALL", "C");
        self
    }

    pub(crate) fn current_dir(mut self, dir: &Path) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// For a program that runs another one, which is what people know.
    pub(crate) fn named(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    /// Starts the program. `line` is called with each line of its standard error, without the
    /// line's end, while [`Running`] is read from or finished.
    pub(crate) fn start<'a>(
        mut self,
        cancel: &'a Cancel,
        line: &'a mut dyn FnMut(&str),
    ) -> Result<Running<'a>, HostError> {
        let name = self.name;
        cancel.check("run", &name)?;
        let mut child = self.command.spawn().map_err(|e| {
            if e.kind() == io::ErrorKind::NotFound && !self.program.exists() {
                packages::missing_program(&self.program)
            } else {
                HostError::io("run", &self.program, e)
            }
        })?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let pid = Pid::from_child(&child);
        let mut running = Running {
            name,
            child,
            pidfd: None,
            stdout,
            stderr,
            partial: Vec::new(),
            last_lines: VecDeque::new(),
            line,
            cancel,
            reaped: false,
        };
        // From here on dropping `running` kills and reaps the child.
        let opened = (|| {
            running.pidfd = Some(pidfd_open(pid, PidfdFlags::empty())?);
            for fd in [
                running.stdout.as_ref().map(AsFd::as_fd),
                running.stderr.as_ref().map(AsFd::as_fd),
            ]
            .into_iter()
            .flatten()
            {
                rustix::io::ioctl_fionbio(fd, true)?;
            }
            Ok::<_, rustix::io::Errno>(())
        })();
        opened.map_err(|e| HostError::io("watch", &self.program, e.into()))?;
        Ok(running)
    }

    /// Runs the program to its end and returns its standard output.
    pub(crate) fn run(
        self,
        cancel: &Cancel,
        line: &mut dyn FnMut(&str),
    ) -> Result<Vec<u8>, HostError> {
        let program = self.program.clone();
        let mut running = self.start(cancel, line)?;
        let mut output = Vec::new();
        running
            .read_to_end(&mut output)
            .map_err(|e| HostError::io("read the output of", &program, e))?;
        running.finish()?;
        Ok(output)
    }
}

/// A running program. Reading it reads its standard output. Dropping it asks its process group to
/// end, kills what has not within 20 seconds, and reaps it.
pub(crate) struct Running<'a> {
    name: String,
    child: Child,
    pidfd: Option<OwnedFd>,
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
    partial: Vec<u8>,
    last_lines: VecDeque<String>,
    line: &'a mut dyn FnMut(&str),
    cancel: &'a Cancel,
    reaped: bool,
}

impl std::fmt::Debug for Running<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Running")
            .field("child", &self.child)
            .finish_non_exhaustive()
    }
}

/// What woke us.
struct Ready {
    stdout: bool,
    stderr: bool,
    ended: bool,
}

impl Running<'_> {
    /// Discards the rest of the output, waits for the end and says whether it went well.
    ///
    /// # Errors
    ///
    /// `Interrupted` if cancelled; `Other` with a [`ProgramFailure`] as cause if it ended badly.
    pub(crate) fn finish(mut self) -> Result<(), HostError> {
        let mut sink = [0; 4096];
        loop {
            let ready = self.wait()?;
            if ready.stdout {
                self.read_stdout(&mut sink)
                    .map_err(|e| HostError::io("read the output of", Path::new(&self.name), e))?;
            }
            if ready.stderr {
                self.read_stderr();
            }
            // A grandchild may hold the pipes open; what the program itself wrote has been read.
            if ready.ended && !ready.stdout && !ready.stderr {
                break;
            }
        }
        self.end_line();
        // It has ended, but not been reaped, so the group is still its own: stragglers go too.
        self.signal(Signal::KILL);
        let status = self
            .child
            .wait()
            .map_err(|e| HostError::io("wait for", Path::new(&self.name), e))?;
        self.reaped = true;
        if status.success() {
            return Ok(());
        }
        Err(
            HostError::new(HostErrorKind::Other, "run", self.name.clone()).because(
                ProgramFailure {
                    program: self.name.clone(),
                    status,
                    last_lines: self.last_lines.drain(..).collect(),
                },
            ),
        )
    }

    /// Waits until there is output, the program has ended, or we are cancelled.
    fn wait(&mut self) -> Result<Ready, HostError> {
        loop {
            let pidfd = self.pidfd.as_ref().expect("set before anyone waits");
            let mut fds = vec![
                PollFd::from_borrowed_fd(self.cancel.event(), PollFlags::IN),
                PollFd::new(pidfd, PollFlags::IN),
            ];
            let stdout_at = self.stdout.as_ref().map(|fd| {
                fds.push(PollFd::new(fd, PollFlags::IN));
                fds.len() - 1
            });
            let stderr_at = self.stderr.as_ref().map(|fd| {
                fds.push(PollFd::new(fd, PollFlags::IN));
                fds.len() - 1
            });
            match poll(&mut fds, None) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(e) => return Err(HostError::io("watch", Path::new(&self.name), e.into())),
            }
            let ready = |at: usize| !fds[at].revents().is_empty();
            if ready(0) {
                self.cancel.check("run", &self.name)?;
            }
            return Ok(Ready {
                stdout: stdout_at.is_some_and(ready),
                stderr: stderr_at.is_some_and(ready),
                ended: ready(1),
            });
        }
    }

    /// `None` if there is nothing to read now.
    fn read_stdout(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let Some(stdout) = &mut self.stdout else {
            return Ok(Some(0));
        };
        match stdout.read(buffer) {
            Ok(0) => {
                self.stdout = None;
                Ok(Some(0))
            }
            Ok(n) => Ok(Some(n)),
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    fn read_stderr(&mut self) {
        let mut buffer = [0; 4096];
        let Some(stderr) = &mut self.stderr else {
            return;
        };
        match stderr.read(&mut buffer) {
            Ok(0) => self.stderr = None,
            Ok(n) => {
                for byte in &buffer[..n] {
                    // A carriage return is how progress lines are overwritten.
                    if matches!(byte, b'\n' | b'\r') {
                        self.end_line();
                    } else if self.partial.len() < LINE_BYTES_MAX {
                        self.partial.push(*byte);
                    }
                }
            }
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) => {}
            // What it says is only for people; how it ends is what counts.
            Err(_) => self.stderr = None,
        }
    }

    fn end_line(&mut self) {
        if self.partial.is_empty() {
            return;
        }
        let text = String::from_utf8_lossy(&self.partial).trim_end().to_owned();
        self.partial.clear();
        (self.line)(&text);
        // apt's machine-readable lines tell people nothing.
        if text.is_empty() || text.starts_with("dlstatus:") || text.starts_with("pmstatus:") {
            return;
        }
        if self.last_lines.len() == LAST_LINES {
            self.last_lines.pop_front();
        }
        self.last_lines.push_back(text);
    }

    fn signal(&self, signal: Signal) {
        // Until it is reaped the number, and so the group's, is its own. ESRCH: all have ended.
        let _ = kill_process_group(Pid::from_child(&self.child), signal);
    }
}

impl Read for Running<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if self.stdout.is_none() || buffer.is_empty() {
                return Ok(0);
            }
            let ready = self.wait()?;
            if ready.stderr {
                self.read_stderr();
            }
            if ready.stdout {
                if let Some(n) = self.read_stdout(buffer)? {
                    return Ok(n);
                }
            } else if ready.ended && !ready.stderr {
                // It has ended and left the pipe to a child that says nothing.
                self.stdout = None;
            }
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if self.reaped {
            return;
        }
        // Closing the pipe first lets a program that is blocked in writing notice the request.
        self.stdout = None;
        self.stderr = None;
        self.signal(Signal::TERM);
        let ended = self
            .pidfd
            .as_ref()
            .is_some_and(|fd| wait_readable(fd, Some(GRACE)).unwrap_or(false));
        if !ended {
            tracing::warn!(program = %self.name, "did not end when asked, killing it");
        }
        self.signal(Signal::KILL);
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Tool {
        Tool::new(Path::new("/bin/sh")).args(["-c", script])
    }

    #[test]
    fn output_and_lines_arrive() {
        let mut lines = Vec::new();
        let output = sh("echo out; echo one >&2; printf 'two\\rthree' >&2; echo $LC_ALL")
            .run(&Cancel::new().unwrap(), &mut |l| lines.push(l.to_owned()))
            .unwrap();
        assert_eq!(output, b"out\nC\n");
        assert_eq!(lines, ["one", "two", "three"]);
    }

    #[test]
    fn a_failure_carries_the_last_lines() {
        let error = sh("for i in 1 2 3; do echo line $i >&2; done; exit 3")
            .run(&Cancel::new().unwrap(), &mut |_| {})
            .unwrap_err();
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(
            cause.contains("line 3") && cause.contains("exit status: 3"),
            "{cause}"
        );
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = Tool::new(Path::new("/nonexistent/mke2fs"))
            .run(&Cancel::new().unwrap(), &mut |_| {})
            .unwrap_err();
        assert_eq!(error.kind(), HostErrorKind::MissingProgram);
        assert!(error.hint().unwrap().contains("e2fsprogs"));
    }

    #[test]
    fn cancelling_ends_the_whole_group_at_once() {
        let cancel = Cancel::new().unwrap();
        let other = cancel.clone();
        let mut pids = String::new();
        let mut line = |l: &str| {
            pids.push_str(l);
            other.cancel();
        };
        let error = sh("sleep 1000 & echo $! >&2; wait")
            .run(&cancel, &mut line)
            .unwrap_err();
        assert_eq!(error.kind(), HostErrorKind::Interrupted);
        let pid: i32 = pids.parse().unwrap();
        // The orphan is init's to reap, so it may be a zombie for a while, but it does not run.
        if let Some(id) = crate::ProcessIdentity::of(pid).unwrap() {
            let fd = id.open().unwrap();
            assert!(fd.is_none_or(|fd| wait_readable(&fd, Some(Duration::from_secs(10))).unwrap()));
        }
    }

    #[test]
    fn a_daemon_that_keeps_the_pipes_does_not_hold_us() {
        let output = sh("sleep 1000 & echo done")
            .run(&Cancel::new().unwrap(), &mut |_| {})
            .unwrap();
        assert_eq!(output, b"done\n");
    }
}

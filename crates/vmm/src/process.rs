//! The VMM as a process: started with inherited sockets, watched by pidfd, killed when dropped.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{OFlags, fcntl_setfl};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process, pidfd_open, waitid,
};
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe::Receiver;
use tokio::task::AbortHandle;

use crate::sys::{Leash, Seclusion};
use crate::{Exit, sys};

/// How much of what the VMM says last is kept.
const STDERR_BYTES_MAX: usize = 4096;

/// What a process finds around it.
#[derive(Debug, Default)]
pub(crate) struct Surroundings<'a> {
    /// Its working directory; that of this process if absent.
    pub(crate) directory: Option<&'a Path>,
    /// Its standard input; nothing to read if absent.
    pub(crate) input: Option<OwnedFd>,
    /// Its standard output; to nowhere if absent.
    pub(crate) output: Option<OwnedFd>,
    /// Whether it is to have its memory in pages of the smallest size only.
    pub(crate) small_pages: bool,
    /// Both ends of a pipe for its standard error, the one to read first; one is made if absent.
    pub(crate) errors: Option<(OwnedFd, OwnedFd)>,
    /// Namespaces of its own, if it is to have any.
    pub(crate) seclusion: Option<Seclusion>,
}

/// A running child process.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    /// Readable once the process has ended: pidfd_open(2).
    pidfd: AsyncFd<OwnedFd>,
    stderr: Arc<Tail>,
    reader: AbortHandle,
    exit: Option<Exit>,
    /// For one that changes its user: see [`Leash`]. Dropped after it was reaped.
    _leash: Option<Leash>,
}

impl Process {
    /// Starts `program` with `inherited` open under the same numbers as here, and an empty environment.
    ///
    /// Must be called within a tokio runtime. On error no process remains.
    pub(crate) fn spawn(
        program: &Path,
        arguments: &[OsString],
        inherited: Vec<OwnedFd>,
        Surroundings {
            directory,
            input,
            output,
            small_pages,
            errors,
            seclusion,
        }: Surroundings<'_>,
    ) -> io::Result<Process> {
        let (stderr_here, stderr_there) = match errors {
            Some(ends) => ends,
            None => pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?,
        };
        // Both ends: the VMM loses words, rather than time, when nobody reads them.
        fcntl_setfl(&stderr_there, OFlags::NONBLOCK)?;
        let stderr = Arc::new(Tail::new(stderr_here)?);

        let mut command = Command::new(program);
        command
            .args(arguments)
            // Keys and tokens of the caller are none of the VMM's business.
            .env_clear()
            .stdin(input.map_or_else(Stdio::null, Stdio::from))
            .stdout(output.map_or_else(Stdio::null, Stdio::from))
            .stderr(stderr_there);
        if let Some(directory) = directory {
            command.current_dir(directory);
        }
        let secluded = seclusion.is_some();
        sys::adopt(&mut command, inherited, small_pages, seclusion);
        let mut child = command.spawn()?;
        // `command` holds our copies of the child's ends; without them gone, none would ever close.
        drop(command);

        let leash = || match secluded {
            true => Leash::new(pid_of(&child)?).map(Some),
            false => Ok(None),
        };
        let watched = leash().and_then(|leash| Ok((watch(&child)?, leash)));
        let (pidfd, leash) = match watched {
            Ok(watched) => watched,
            Err(error) => {
                kill_and_reap(&mut child);
                return Err(error);
            }
        };
        let reader = tokio::spawn(Arc::clone(&stderr).follow()).abort_handle();
        Ok(Process {
            child,
            pidfd,
            stderr,
            reader,
            exit: None,
            _leash: leash,
        })
    }

    /// The process number; not reused before [`Process::wait`] has returned.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A descriptor that is readable once the process has ended.
    pub(crate) fn ended(&self) -> io::Result<OwnedFd> {
        self.pidfd.get_ref().try_clone()
    }

    /// How it ended, if it has been waited for.
    pub(crate) fn exit(&self) -> Option<&Exit> {
        self.exit.as_ref()
    }

    /// Sends SIGKILL. Nothing happens if it has been waited for.
    pub(crate) fn kill(&mut self) -> io::Result<()> {
        match self.exit {
            Some(_) => Ok(()),
            None => self.child.kill(),
        }
    }

    /// Stops all threads of it (SIGSTOP) and waits until they stand still, or it ends.
    pub(crate) async fn stop(&mut self) -> io::Result<()> {
        let pid = self.send(Signal::STOP)?;
        // The parent hears of a stop by waiting for it, and by nothing else that could be watched. What is
        // heard is left for whoever reaps.
        let heard = tokio::task::spawn_blocking(move || {
            let options = WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            loop {
                match waitid(WaitId::Pid(pid), options) {
                    Err(Errno::INTR) => {}
                    other => return other.map(drop),
                }
            }
        });
        Ok(heard.await.map_err(io::Error::other)??)
    }

    /// Lets all its threads go on.
    pub(crate) fn go_on(&mut self) -> io::Result<()> {
        self.send(Signal::CONT).map(drop)
    }

    fn send(&mut self, signal: Signal) -> io::Result<Pid> {
        let pid = pid_of(&self.child)?;
        if self.exit.is_none() {
            kill_process(pid, signal)?;
        }
        Ok(pid)
    }

    /// Waits for the end and reaps. May be called again; may be dropped without loss.
    pub(crate) async fn wait(&mut self) -> io::Result<Exit> {
        loop {
            if let Some(exit) = &self.exit {
                return Ok(exit.clone());
            }
            let mut ended = self.pidfd.readable().await?;
            match self.child.try_wait()? {
                None => ended.clear_ready(),
                Some(status) => {
                    self.reader.abort();
                    self.exit = Some(told(status, &self.stderr));
                }
            }
        }
    }
}

/// Kills and reaps. This blocks for the few milliseconds in which the kernel takes the process
/// apart; whoever cannot afford them calls [`Process::kill`] and [`Process::wait`] first.
impl Drop for Process {
    fn drop(&mut self) {
        self.reader.abort();
        if self.exit.is_none() {
            kill_and_reap(&mut self.child);
        }
    }
}

fn kill_and_reap(child: &mut Child) {
    // Neither can fail for a child that has not been reaped: kill(2), waitpid(2).
    if let Err(error) = child.kill().and_then(|()| child.wait().map(drop)) {
        tracing::warn!(pid = child.id(), %error, "could not reap a process");
    }
}

fn watch(child: &Child) -> io::Result<AsyncFd<OwnedFd>> {
    let pidfd = pidfd_open(pid_of(child)?, PidfdFlags::empty())?;
    sys::watch_readable(pidfd)
}

fn pid_of(child: &Child) -> io::Result<Pid> {
    i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| io::Error::other("the process number is out of range"))
}

fn told(status: ExitStatus, stderr: &Tail) -> Exit {
    stderr.take_in();
    Exit {
        code: status.code(),
        signal: status.signal(),
        stderr: stderr.text(),
    }
}

/// The last words of a process.
#[derive(Debug)]
struct Tail {
    pipe: Receiver,
    bytes: Mutex<VecDeque<u8>>,
}

impl Tail {
    fn new(pipe: OwnedFd) -> io::Result<Tail> {
        Ok(Tail {
            pipe: Receiver::from_owned_fd(pipe)?,
            bytes: Mutex::new(VecDeque::with_capacity(STDERR_BYTES_MAX)),
        })
    }

    /// Reads until the other end closes, keeping the last part.
    async fn follow(self: Arc<Self>) {
        let mut chunk = [0; STDERR_BYTES_MAX];
        while self.pipe.readable().await.is_ok() {
            match self.pipe.try_read(&mut chunk) {
                Ok(0) => return,
                Ok(n) => self.keep(&chunk[..n]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
        }
    }

    /// Takes what is in the pipe now. Bounded, should something go on writing. Reads past tokio,
    /// whose own idea of readiness is only renewed between tasks.
    fn take_in(&self) {
        const PIPE_BYTES: usize = 64 * 1024; // pipe(7), the default capacity
        let mut chunk = [0; STDERR_BYTES_MAX];
        for _ in 0..PIPE_BYTES / STDERR_BYTES_MAX {
            match rustix::io::read(&self.pipe, &mut chunk) {
                Ok(n @ 1..) => self.keep(&chunk[..n]),
                Err(rustix::io::Errno::INTR) => {}
                Ok(0) | Err(_) => return,
            }
        }
    }

    fn keep(&self, new: &[u8]) {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        bytes.extend(new);
        let surplus = bytes.len().saturating_sub(STDERR_BYTES_MAX);
        bytes.drain(..surplus);
    }

    fn text(&self) -> String {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(bytes.make_contiguous()).into_owned()
    }
}

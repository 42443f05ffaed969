//! A command's session: one thread, one poll(2) loop, from the request to its last frame.
//!
//! What the host can rely on, beyond the protocol's own words:
//!
//! - [`Event::Started`] means that execve(2) succeeded.
//! - [`Event::Exited`] comes when the command's own process has ended and what was in its pipes at
//!   that moment is sent. It does not wait for the ends of the pipes: children in the background
//!   may hold them, and live on. [`Kind::Eof`](smolvm_proto::Kind::Eof) of both outputs is sent
//!   together with it, never before.
//! - The end of [`Channel::Input`] closes standard input. A terminal cannot be closed for reading,
//!   so there its end-of-file character is typed, if the terminal is in canonical mode (termios(3)).
//! - Input that the command does not read any more is dropped, and credit for it granted.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, Signal};
use rustix::pty::OpenptFlags;
use rustix::termios::{LocalModes, SpecialCodeIndex, Winsize};
use smolvm_proto::Channel;
use smolvm_proto::message::{Control, Event, ExecRequest, Exited, Failure, Started, WindowSize};

use crate::cgroup::Lease;
use crate::command::Command;
use crate::failure::from_errno;
use crate::port::{DATA_BYTES_MAX, Gone};
use crate::reap::Exit;
use crate::serve::Agent;
use crate::stream::{Last, Stop, Stream, timespec};

/// Bytes a pipe from a command may hold; pipe(7) allows an unprivileged process this much. The
/// command then writes on while a frame is under way.
const PIPE_BYTES: usize = 1024 * 1024;

/// Most bytes taken from a terminal after its command has ended. A child in the background may
/// write for ever.
const TERMINAL_REST_BYTES_MAX: usize = 256 * 1024;

/// Runs a command and tells the host about it.
pub(crate) fn run(
    agent: &Agent,
    stream: &Arc<Stream>,
    request: &ExecRequest,
) -> Result<Last, Stop> {
    let command = Command::new(request, &agent.defaults())?;
    let ends = match request.terminal {
        Some(size) => Ends::terminal(size, command.identity.uid)?,
        None => Ends::pipes(request.stdin)?,
    };
    let cgroup = agent.cgroups.as_ref().and_then(|cgroups| cgroups.lease());
    let started = Instant::now();
    let pid = command.start(
        &agent.reaper,
        stream,
        [
            ends.theirs[0].as_fd(),
            ends.theirs[1].as_fd(),
            ends.theirs[2].as_fd(),
        ],
        ends.terminal,
        cgroup.as_ref().and_then(Lease::fd),
    )?;
    drop(ends.theirs);
    let mut session = Session {
        agent,
        stream,
        pid,
        cgroup,
        terminal: ends.terminal,
        input: ends.input,
        offset: 0,
        outputs: ends.outputs,
        deadline: request
            .timeout_ms
            .and_then(|timeout| started.checked_add(Duration::from_millis(timeout))),
        timed_out: false,
        buffer: vec![0; DATA_BYTES_MAX],
    };
    let result = session.serve();
    if result.is_err() {
        session.kill();
    }
    let exit = result?;
    Ok(Last {
        channels: &[Channel::Output, Channel::Error],
        event: Event::Exited(Exited {
            code: exit.code,
            signal: exit.signal,
            // A command that ended by itself at the last moment did not run out of time.
            timed_out: session.timed_out && exit.signal == Some(Signal::KILL.as_raw()),
            duration_us: u64::try_from(exit.at.saturating_duration_since(started).as_micros())
                .unwrap_or(u64::MAX),
        }),
    })
}

/// Both ends of a command's standard descriptors.
struct Ends {
    theirs: [OwnedFd; 3],
    input: Option<OwnedFd>,
    outputs: [Output; 2],
    terminal: bool,
}

impl Ends {
    fn pipes(stdin: bool) -> Result<Self, Failure> {
        let refused = |errno| from_errno("making pipes for a command", errno);
        let pipe = || rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(refused);
        let ours = |fd: OwnedFd| {
            rustix::io::ioctl_fionbio(&fd, true).map_err(refused)?;
            Ok::<_, Failure>(fd)
        };
        let (their_input, input) = if stdin {
            let (read, write) = pipe()?;
            (read, Some(ours(write)?))
        } else {
            let null =
                rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
                    .map_err(|errno| from_errno("opening /dev/null for a command", errno))?;
            (null, None)
        };
        let (output, their_output) = pipe()?;
        let (error, their_error) = pipe()?;
        // Over the user's limit the pipe simply stays as it is (fcntl(2)).
        let _ = rustix::pipe::fcntl_setpipe_size(&output, PIPE_BYTES);
        Ok(Self {
            theirs: [their_input, their_output, their_error],
            input,
            outputs: [
                Output::new(Channel::Output, Some(ours(output)?)),
                Output::new(Channel::Error, Some(ours(error)?)),
            ],
            terminal: false,
        })
    }

    fn terminal(size: WindowSize, owner: u32) -> Result<Self, Failure> {
        let refused = |errno| from_errno("making a terminal for a command", errno);
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = rustix::pty::openpt(flags).map_err(refused)?;
        rustix::pty::unlockpt(&master).map_err(refused)?;
        let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags).map_err(refused)?;
        rustix::termios::tcsetwinsize(&master, winsize(size)).map_err(refused)?;
        // As login does; without the privilege it is the agent's user's already.
        let _ = rustix::fs::fchown(&slave, Some(rustix::fs::Uid::from_raw(owner)), None);
        let _ = rustix::fs::fchmod(&slave, Mode::from_raw_mode(0o620));
        rustix::io::ioctl_fionbio(&master, true).map_err(refused)?;
        let copy = |fd: &OwnedFd| {
            fd.try_clone()
                .map_err(|error| crate::failure::from_io("making a terminal for a command", &error))
        };
        Ok(Self {
            theirs: [copy(&slave)?, copy(&slave)?, slave],
            input: Some(copy(&master)?),
            outputs: [
                Output::new(Channel::Output, Some(master)),
                Output::new(Channel::Error, None),
            ],
            terminal: true,
        })
    }
}

fn winsize(size: WindowSize) -> Winsize {
    Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

/// One flow from the command.
#[derive(Debug)]
struct Output {
    channel: Channel,
    /// `None` once it has ended.
    fd: Option<OwnedFd>,
    /// Bytes still to send, once the command has ended.
    rest: usize,
    /// Whether poll(2) said that there is something to read.
    ready: bool,
}

impl Output {
    fn new(channel: Channel, fd: Option<OwnedFd>) -> Self {
        Self {
            channel,
            fd,
            rest: usize::MAX,
            ready: false,
        }
    }
}

struct Session<'a> {
    agent: &'a Agent,
    stream: &'a Arc<Stream>,
    pid: Pid,
    cgroup: Option<Lease>,
    terminal: bool,
    /// Standard input, until it is closed by either side.
    input: Option<OwnedFd>,
    /// Bytes of the first part of the mailbox's input that are written already.
    offset: usize,
    outputs: [Output; 2],
    deadline: Option<Instant>,
    timed_out: bool,
    buffer: Vec<u8>,
}

impl Session<'_> {
    fn serve(&mut self) -> Result<Exit, Gone> {
        self.stream.send_event(&Event::Started(Started {
            pid: self.pid.as_raw_pid().cast_unsigned(),
        }))?;
        let mut ended = None;
        loop {
            let mut mailbox = self.stream.mailbox();
            if mailbox.reset {
                return Err(Gone);
            }
            let controls = std::mem::take(&mut mailbox.controls);
            let exit = mailbox.exit;
            let credits = [
                mailbox.credit(Channel::Output),
                mailbox.credit(Channel::Error),
            ];
            drop(mailbox);

            for control in controls {
                self.control(&control);
            }
            let wants_room = self.feed()?;
            if ended.is_none() && exit.is_some() {
                ended = exit;
                self.deadline = None;
                self.measure_rest();
            }
            for (at, credit) in credits.into_iter().enumerate() {
                self.forward(at, credit, ended.is_some())?;
            }
            if let Some(exit) = ended
                && self.outputs.iter().all(|output| output.rest == 0)
            {
                return Ok(exit);
            }
            self.wait(wants_room, ended.is_some());
        }
    }

    /// Notes how much of the command's output is left, now that it has ended.
    fn measure_rest(&mut self) {
        for output in &mut self.outputs {
            output.rest = match &output.fd {
                // A terminal moves what was written in the background, so its count may be short;
                // reading it until it is empty is exact (n_tty_read flushes that work first).
                Some(_) if self.terminal => TERMINAL_REST_BYTES_MAX,
                Some(fd) => rustix::io::ioctl_fionread(fd)
                    .ok()
                    .and_then(|bytes| usize::try_from(bytes).ok())
                    .unwrap_or(0),
                None => 0,
            };
            output.ready = true;
        }
    }

    /// Sends what one output has, as far as credit goes.
    fn forward(&mut self, at: usize, mut credit: usize, ended: bool) -> Result<(), Gone> {
        let output = &mut self.outputs[at];
        // While the command runs, one frame for each turn, so that both outputs and the mailbox are
        // attended to evenly.
        while output.ready && credit > 0 && output.rest > 0 {
            let Some(fd) = &output.fd else {
                break;
            };
            let room = DATA_BYTES_MAX.min(credit).min(output.rest);
            match rustix::io::read(fd, &mut self.buffer[..room]) {
                Ok(0) => output.end(),
                Ok(length) => {
                    self.stream
                        .send_data(output.channel, &self.buffer[..length])?;
                    credit -= length;
                    if ended {
                        output.rest -= length;
                    } else {
                        // A short read has emptied the pipe: poll(2) tells when there is more.
                        output.ready = length == room;
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    output.ready = false;
                    if ended {
                        output.rest = 0;
                    }
                }
                // A terminal's way of saying that nobody has it open any more: EIO (pty(7)).
                Err(_) => output.end(),
            }
            if !ended {
                break;
            }
        }
        Ok(())
    }

    /// Writes input as far as the command takes it. Returns whether it should be waited for.
    fn feed(&mut self) -> Result<bool, Gone> {
        loop {
            let mut mailbox = self.stream.mailbox();
            let ended = mailbox.input_ended;
            // The part is taken out while it is written, so that the reader of the port need not
            // wait for the command.
            let part = mailbox.input.pop_front();
            drop(mailbox);
            let Some(part) = part else {
                if ended {
                    self.end_input();
                }
                return Ok(false);
            };
            let Some(input) = &self.input else {
                self.stream.consumed(part.len() - self.offset)?;
                self.offset = 0;
                continue;
            };
            match rustix::io::write(input, &part[self.offset..]) {
                Ok(written) => {
                    self.offset += written;
                    let whole = self.offset == part.len();
                    if whole {
                        self.offset = 0;
                    } else {
                        self.stream.mailbox().input.push_front(part);
                    }
                    self.stream.consumed(written)?;
                }
                Err(Errno::INTR) => self.stream.mailbox().input.push_front(part),
                Err(Errno::AGAIN) => {
                    self.stream.mailbox().input.push_front(part);
                    return Ok(true);
                }
                // The command closed its end: the rest is dropped above.
                Err(_) => {
                    self.stream.mailbox().input.push_front(part);
                    self.input = None;
                }
            }
        }
    }

    fn end_input(&mut self) {
        let Some(input) = self.input.take() else {
            return;
        };
        if self.terminal
            && let Ok(modes) = rustix::termios::tcgetattr(&input)
            && modes.local_modes.contains(LocalModes::ICANON)
        {
            let end = modes.special_codes[SpecialCodeIndex::VEOF];
            let _ = rustix::io::write(&input, &[end]);
        }
    }

    fn control(&mut self, control: &Control) {
        match control {
            Control::Signal(number) => {
                // Named signals only: the real-time ones are the C library's own business.
                if let Some(signal) = Signal::from_named_raw(*number) {
                    self.signal(signal);
                }
            }
            Control::Resize(size) => {
                if let Some(master) = self.outputs[0].fd.as_ref().filter(|_| self.terminal) {
                    let _ = rustix::termios::tcsetwinsize(master, winsize(*size));
                }
            }
        }
    }

    /// Signals the group the user sees: a terminal's foreground job, or the command's own.
    fn signal(&self, signal: Signal) {
        if self.terminal
            && let Some(master) = &self.outputs[0].fd
            && let Ok(group) = rustix::termios::tcgetpgrp(master)
        {
            let _ = rustix::process::kill_process_group(group, signal);
        } else {
            self.agent.reaper.signal_group(self.pid, signal);
        }
    }

    /// Kills the command and all its descendants.
    fn kill(&self) {
        match &self.cgroup {
            Some(cgroup) => cgroup.kill(),
            // What left the group is out of reach then.
            None => self.agent.reaper.signal_group(self.pid, Signal::KILL),
        }
    }

    /// Waits until there is something to do.
    fn wait(&mut self, wants_room: bool, ended: bool) {
        let credits = {
            let mailbox = self.stream.mailbox();
            [
                mailbox.credit(Channel::Output),
                mailbox.credit(Channel::Error),
            ]
        };
        let mut fds = Vec::with_capacity(4);
        let wake = self.stream.wake_fd();
        fds.push(PollFd::from_borrowed_fd(wake, PollFlags::IN));
        let mut watched = [None; 2];
        for (at, output) in self.outputs.iter().enumerate() {
            if let Some(fd) = output.fd.as_ref().filter(|_| credits[at] > 0 && !ended) {
                watched[at] = Some(fds.len());
                fds.push(PollFd::new(fd, PollFlags::IN));
            }
        }
        if let Some(input) = self.input.as_ref().filter(|_| wants_room) {
            fds.push(PollFd::new(input, PollFlags::OUT));
        }
        // Credit that came while the last frame was sent wakes nobody: it was not missing then.
        let more_to_read = self
            .outputs
            .iter()
            .zip(credits)
            .any(|(output, credit)| output.ready && output.rest > 0 && credit > 0);
        let timeout = if more_to_read {
            Some(timespec(Duration::ZERO))
        } else {
            self.deadline
                .map(|deadline| timespec(deadline.saturating_duration_since(Instant::now())))
        };
        let _ = rustix::event::poll(&mut fds, timeout.as_ref());
        let woken = !fds[0].revents().is_empty();
        let ready = watched.map(|at| at.is_some_and(|at| !fds[at].revents().is_empty()));
        drop(fds);
        if woken {
            self.stream.clear_wake();
        }
        for (output, ready) in self.outputs.iter_mut().zip(ready) {
            output.ready |= ready;
        }
        if self
            .deadline
            .is_some_and(|deadline| Instant::now() >= deadline)
        {
            self.deadline = None;
            self.timed_out = true;
            self.kill();
        }
    }
}

impl Output {
    fn end(&mut self) {
        self.fd = None;
        self.rest = 0;
        self.ready = false;
    }
}

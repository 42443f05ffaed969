//! Commands in a running sandbox.

use std::ffi::OsString;
use std::future::Future;
use std::os::unix::ffi::OsStringExt;
use std::time::{Duration, Instant};

use smolvm_proto::Channel;
use smolvm_proto::limits::COMMAND_BYTES_MAX;
use smolvm_proto::message::{self, Control, EnvVar, Event, ExecRequest, Request, WindowSize};

use crate::client::{Heard, Stream, StreamInput};
use crate::error::{Error, ErrorKind, Result};
use crate::session::Session;
use crate::spec::check_env;

/// Time after a command's own in which the guest has to say that it is over. It kills the command and
/// waits for all its descendants.
const TIMEOUT_GRACE: Duration = Duration::from_secs(5);

/// A command to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecSpec {
    /// Program and arguments, at least one unless [`ExecSpec::program`] says what runs. A program
    /// without a slash is searched in the command's own `PATH`.
    pub argv: Vec<OsString>,
    /// Set on top of the sandbox's environment.
    pub env: Vec<(String, String)>,
    /// Absolute working directory; the sandbox's, or the user's home, if absent.
    pub workdir: Option<String>,
    /// `name`, `uid`, `name:group` or `uid:gid`, as the guest knows them; the sandbox's if absent.
    pub user: Option<String>,
    /// Time after which the command and all its descendants are killed. If the guest does not say so
    /// within five more seconds, it counts as killed.
    pub timeout: Option<Duration>,
    /// Run it in a terminal of this size; its output is then all [`ExecEvent::Stdout`].
    pub terminal: Option<TerminalSize>,
    /// Whether [`ExecControl::write_stdin`] feeds it; it reads from `/dev/null` otherwise.
    pub stdin: bool,
    /// What runs.
    pub program: Program,
}

/// What a command runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Program {
    /// The program that is the first of [`ExecSpec::argv`].
    #[default]
    Named,
    /// The user's own shell, with [`ExecSpec::argv`] as its arguments; without any a login shell.
    Shell,
    /// A server of the SSH file transfer protocol, version 3. It comes with the guest's agent, so
    /// that an image needs none.
    Sftp,
}

impl ExecSpec {
    /// A command with every setting at its default.
    #[must_use]
    pub fn new(argv: Vec<OsString>) -> Self {
        Self {
            argv,
            env: Vec::new(),
            workdir: None,
            user: None,
            timeout: None,
            terminal: None,
            stdin: false,
            program: Program::Named,
        }
    }

    fn to_request(&self) -> Result<ExecRequest> {
        let wrong = |what: &str, hint: &str| Error::new(ErrorKind::InvalidInput, what).hint(hint);
        if self.program == Program::Named
            && self.argv.first().is_none_or(|program| program.is_empty())
        {
            return Err(wrong("no command was given", "put the command after `--`"));
        }
        for (name, value) in &self.env {
            check_env(name, value)?;
        }
        let bytes = self.argv.iter().map(|word| word.len()).sum::<usize>()
            + self
                .env
                .iter()
                .map(|(name, value)| name.len() + value.len())
                .sum::<usize>()
            // What each word and variable costs in the encoding, rounded up.
            + 16 * (self.argv.len() + self.env.len());
        if bytes > COMMAND_BYTES_MAX {
            return Err(wrong(
                &format!(
                    "the command with its environment takes {bytes} bytes, over the limit of {COMMAND_BYTES_MAX}"
                ),
                "put long input into a file with `smolvm cp`, or send it on standard input",
            ));
        }
        if self
            .argv
            .iter()
            .any(|word| word.as_encoded_bytes().contains(&0))
        {
            return Err(wrong(
                "the command has a NUL byte in an argument",
                "send binary data on standard input",
            ));
        }
        Ok(ExecRequest {
            argv: self
                .argv
                .iter()
                .map(|word| word.clone().into_vec().into())
                .collect(),
            env: env_vars(&self.env),
            cwd: self
                .workdir
                .as_ref()
                .map(|path| path.clone().into_bytes().into()),
            user: self.user.clone(),
            timeout_ms: self
                .timeout
                .map(|timeout| u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX)),
            terminal: self.terminal.map(TerminalSize::to_wire),
            stdin: self.stdin,
            program: match self.program {
                Program::Named => None,
                Program::Shell => Some(message::Program::Shell),
                Program::Sftp => Some(message::Program::Sftp),
            },
        })
    }
}

pub(crate) fn env_vars(env: &[(String, String)]) -> Vec<EnvVar> {
    env.iter().map(EnvVar::text).collect()
}

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

impl TerminalSize {
    fn to_wire(self) -> WindowSize {
        WindowSize {
            rows: self.rows,
            columns: self.columns,
        }
    }
}

/// What a running command does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecEvent {
    /// It wrote this to standard output, or to its terminal.
    Stdout(Vec<u8>),
    /// It wrote this to standard error.
    Stderr(Vec<u8>),
    /// It ended, and everything it wrote came before this.
    Exited(ExitStatus),
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitStatus {
    /// Exit code, if it exited.
    pub code: Option<i32>,
    /// Linux number of the signal that ended it, if one did.
    pub signal: Option<i32>,
    /// Whether it was killed because its time was up.
    pub timed_out: bool,
    /// How long it ran, by the guest's clock.
    pub duration: Duration,
}

/// A running command. Dropping it before [`ExecEvent::Exited`] kills the command and all its
/// descendants.
#[derive(Debug)]
pub struct Exec {
    /// Its process number in the guest.
    pub pid: u32,
    stream: Stream,
    started: Instant,
    /// When the guest has to have said that the command's time was up.
    deadline: Option<Instant>,
}

impl Session {
    /// Starts a command.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] for an unknown program or directory,
    /// [`ErrorKind::PermissionDenied`] for one that cannot be run, [`ErrorKind::InvalidInput`] for
    /// an unknown user or a command that no system could run, [`ErrorKind::Timeout`] if the command has
    /// a timeout and the guest did not even start it.
    pub async fn exec(&self, spec: &ExecSpec) -> Result<Exec> {
        let request = Request::Exec(spec.to_request()?);
        let begun = Instant::now();
        let deadline = spec
            .timeout
            .and_then(|timeout| begun.checked_add(timeout.saturating_add(TIMEOUT_GRACE)));
        let mut stream = self.client.open(&request)?;
        let Some(heard) = before(deadline, stream.next()).await else {
            return Err(Error::new(
                ErrorKind::Timeout,
                format!(
                    "the guest of sandbox `{}` did not start the command within its time",
                    self.name()
                ),
            )
            .hint(format!(
                "see its last words with `smolvm logs {0}`; `smolvm stop --now {0}` ends it",
                self.name()
            )));
        };
        match heard? {
            Heard::Event(Event::Started(started)) => Ok(Exec {
                pid: started.pid,
                stream,
                started: begun,
                deadline,
            }),
            other => Err(Error::new(
                ErrorKind::Internal,
                format!("the guest answered a command with {other:?}"),
            )),
        }
    }
}

/// What comes before a deadline, if there is one. What is there already comes first.
async fn before<T>(deadline: Option<Instant>, work: impl Future<Output = T>) -> Option<T> {
    match deadline {
        Some(deadline) => tokio::time::timeout_at(deadline.into(), work).await.ok(),
        None => Some(work.await),
    }
}

impl Exec {
    /// Waits for what the command does next.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::GuestFailed`] if the sandbox went away.
    pub async fn next(&mut self) -> Result<ExecEvent> {
        loop {
            let Some(heard) = before(self.deadline, self.stream.next()).await else {
                // The guest is stuck. Dropped, the stream has the command killed if it wakes.
                return Ok(ExecEvent::Exited(ExitStatus {
                    code: None,
                    signal: None,
                    timed_out: true,
                    duration: self.started.elapsed(),
                }));
            };
            match heard? {
                Heard::Data(Channel::Output, bytes) => return Ok(ExecEvent::Stdout(bytes)),
                Heard::Data(Channel::Error, bytes) => return Ok(ExecEvent::Stderr(bytes)),
                Heard::Event(Event::Exited(exited)) => {
                    return Ok(ExecEvent::Exited(ExitStatus {
                        code: exited.code,
                        signal: exited.signal,
                        timed_out: exited.timed_out,
                        duration: Duration::from_micros(exited.duration_us),
                    }));
                }
                Heard::Data(Channel::Input, _) | Heard::End(_) | Heard::Event(_) => {}
            }
        }
    }

    /// A handle to feed and steer the command, which other tasks may use.
    #[must_use]
    pub fn control(&self) -> ExecControl {
        ExecControl {
            input: self.stream.input(),
        }
    }
}

/// Feeds and steers a command. Everything here succeeds quietly once the command has ended.
#[derive(Debug, Clone)]
pub struct ExecControl {
    input: StreamInput,
}

impl ExecControl {
    /// Writes to standard input, waiting while the command does not read.
    pub async fn write_stdin(&self, bytes: &[u8]) -> Result<()> {
        self.input.write(bytes).await.map(|_| ())
    }

    /// Ends standard input.
    #[expect(clippy::unused_async, reason = "the same form as its siblings")]
    pub async fn close_stdin(&self) -> Result<()> {
        self.input.close()
    }

    /// Sends a signal, by its Linux number, to the command's process group.
    #[expect(clippy::unused_async, reason = "the same form as its siblings")]
    pub async fn signal(&self, signal: i32) -> Result<()> {
        self.input.control(&Control::Signal(signal))
    }

    /// Tells the command that its terminal has a new size.
    #[expect(clippy::unused_async, reason = "the same form as its siblings")]
    pub async fn resize(&self, size: TerminalSize) -> Result<()> {
        self.input.control(&Control::Resize(size.to_wire()))
    }
}

//! A guest's command joined to our own streams, signals and terminal until it ends.
//!
//! One task drives everything: it waits for the guest's next event, and meanwhile for signals. Two
//! threads do what may block without end: one reads standard input, one writes both outputs in the
//! order the guest wrote them. A full pipe therefore never keeps a Ctrl-C from being heard.

use std::future::Future;
use std::io;
use std::pin::pin;
use std::time::Duration;

use smolvm_engine::{ErrorKind, Exec, ExecControl, ExecEvent, ExecSpec, ExitStatus, Session};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

use crate::commands::Context;
use crate::exit::Exit;
use crate::output;
use crate::report::CliError;
use crate::signals::Signals;
use crate::terminal::{self, Raw};

/// Bytes read from standard input at once: a whole pipe of Linux (pipe(7)).
const STDIN_CHUNK_BYTES: usize = 64 * 1024;

/// Chunks on the way between a thread and the task. More would only delay back-pressure.
const CHUNKS_WAITING: usize = 4;

/// Most bytes kept of each output stream when it is captured for JSON. What comes after is counted
/// as truncated and dropped.
const CAPTURE_BYTES_MAX: usize = 64 * 1024 * 1024;

/// How a command ended, and what it wrote if that was captured.
#[derive(Debug)]
pub(crate) struct Ended {
    /// How it ended.
    pub(crate) status: ExitStatus,
    /// Captured standard output.
    pub(crate) stdout: Vec<u8>,
    /// Captured standard error.
    pub(crate) stderr: Vec<u8>,
    /// Whether anything captured was dropped.
    pub(crate) truncated: bool,
}

impl Ended {
    /// Whether it went well.
    pub(crate) fn succeeded(&self) -> bool {
        self.status.code == Some(0)
    }

    /// The exit code of ours that says it.
    pub(crate) fn exit(&self) -> Exit {
        Exit::of_command(&self.status)
    }

    /// The command's failure, if it failed.
    pub(crate) fn failure(&self, timeout: Option<Duration>) -> Option<CliError> {
        match self.exit() {
            Exit::Guest(0) => None,
            exit => Some(CliError::Command { exit, timeout }),
        }
    }
}

/// Runs `spec` to its end, with our streams as its own; in JSON mode its output is captured.
///
/// Dropping the future kills the command.
///
/// # Errors
///
/// [`CliError::Interrupted`] if the caller gave up, [`CliError::BrokenPipe`] if nobody reads what it
/// writes, or what the engine failed with.
pub(crate) async fn run(
    cx: &Context,
    session: &Session,
    spec: &ExecSpec,
    signals: &mut Signals,
) -> Result<Ended, CliError> {
    // Before anything else is shared: what is typed while the command starts must not be echoed.
    let raw = if spec.terminal.is_some() && spec.stdin && cx.world.stdin_terminal {
        Some(
            Raw::enter()
                .map_err(|error| CliError::io("putting the terminal into raw mode", error))?,
        )
    } else {
        None
    };
    let started = signals.or_interrupted(async { session.exec(spec).await.map_err(not_started) });
    let mut exec = started.await?;
    let mut caller = Caller::new(signals, exec.control(), raw, spec)?;
    // Local, so that the pump may use what is not Send.
    tokio::task::LocalSet::new()
        .run_until(async {
            if spec.stdin {
                tokio::task::spawn_local(pump_stdin(exec.control()));
            }
            if cx.out.json {
                capture(&mut exec, &mut caller).await
            } else {
                stream(&mut exec, &mut caller).await
            }
        })
        .await
}

/// Tells a command that cannot be started from a sandbox that cannot be reached.
fn not_started(error: smolvm_engine::Error) -> CliError {
    match error.kind() {
        ErrorKind::NotFound => CliError::CommandNotFound(error),
        ErrorKind::PermissionDenied => CliError::NotExecutable(error),
        ErrorKind::Timeout => CliError::CommandTimedOut(error),
        _ => CliError::Engine(error),
    }
}

/// Hands every event to the writer.
async fn stream(exec: &mut Exec, caller: &mut Caller<'_>) -> Result<Ended, CliError> {
    let writer = Writer::start()?;
    loop {
        let chunk = match caller.during(exec.next()).await?? {
            ExecEvent::Stdout(bytes) => Chunk::Stdout(bytes),
            ExecEvent::Stderr(bytes) => Chunk::Stderr(bytes),
            ExecEvent::Exited(status) => {
                caller.during(writer.finish()).await??;
                return Ok(Ended {
                    status,
                    stdout: Vec::new(),
                    stderr: Vec::new(),
                    truncated: false,
                });
            }
        };
        if caller.during(writer.chunks.send(chunk)).await?.is_err() {
            // The writer is gone; it says why.
            caller.during(writer.finish()).await??;
            return Err(CliError::BrokenPipe);
        }
    }
}

/// Keeps every event, up to a limit.
async fn capture(exec: &mut Exec, caller: &mut Caller<'_>) -> Result<Ended, CliError> {
    let (mut stdout, mut stderr, mut truncated) = (Vec::new(), Vec::new(), false);
    let mut keep = |kept: &mut Vec<u8>, bytes: &[u8]| {
        let room = CAPTURE_BYTES_MAX - kept.len();
        truncated |= bytes.len() > room;
        kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
    };
    loop {
        match caller.during(exec.next()).await?? {
            ExecEvent::Stdout(bytes) => keep(&mut stdout, &bytes),
            ExecEvent::Stderr(bytes) => keep(&mut stderr, &bytes),
            ExecEvent::Exited(status) => {
                return Ok(Ended {
                    status,
                    stdout,
                    stderr,
                    truncated,
                });
            }
        }
    }
}

/// What the caller may do at any moment: send signals, change the window, come back from a stop.
struct Caller<'a> {
    signals: &'a mut Signals,
    control: ExecControl,
    raw: Option<Raw>,
    /// Only with a terminal in the guest.
    window: Option<Signal>,
    /// Only with a raw terminal of ours.
    resumed: Option<Signal>,
    interrupted: bool,
    terminated: bool,
}

impl<'a> Caller<'a> {
    fn new(
        signals: &'a mut Signals,
        control: ExecControl,
        raw: Option<Raw>,
        spec: &ExecSpec,
    ) -> Result<Self, CliError> {
        let take = |wanted: bool, kind| {
            wanted
                .then(|| signal(kind))
                .transpose()
                .map_err(|error| CliError::io("installing signal handlers", error))
        };
        Ok(Self {
            window: take(spec.terminal.is_some(), SignalKind::window_change())?,
            resumed: take(
                raw.is_some(),
                SignalKind::from_raw(rustix::process::Signal::CONT.as_raw()),
            )?,
            signals,
            control,
            raw,
            interrupted: false,
            terminated: false,
        })
    }

    /// Waits for `work` and passes on what the caller does meanwhile. Fails if the caller gives up.
    ///
    /// Must run inside a `LocalSet`.
    async fn during<T>(&mut self, work: impl Future<Output = T>) -> Result<T, CliError> {
        // Pinned outside the loop: whatever else happens, `work` is never begun anew, so it need
        // not survive being dropped half-way.
        let mut work = pin!(work);
        loop {
            tokio::select! {
                biased;
                kind = self.signals.next() => self.pass_on(kind)?,
                () = next_of(&mut self.window) => self.resize(),
                () = next_of(&mut self.resumed) => {
                    if let Some(raw) = &self.raw {
                        // A terminal that is gone makes itself known as end of input.
                        let _ = raw.again();
                    }
                    self.resize();
                }
                done = &mut work => return Ok(done),
            }
        }
    }

    /// Sends a signal to the guest's command, unless the caller asks a second time to end.
    fn pass_on(&mut self, kind: SignalKind) -> Result<(), CliError> {
        let again = match kind {
            kind if kind == SignalKind::interrupt() => {
                std::mem::replace(&mut self.interrupted, true)
            }
            kind if kind == SignalKind::terminate() => {
                // An interactive shell ignores it (bash(1)), so with a terminal it means: hang up.
                std::mem::replace(&mut self.terminated, true) || self.window.is_some()
            }
            kind if kind == SignalKind::hangup() => self.window.is_some(),
            _ => false,
        };
        if again {
            return Err(CliError::Interrupted);
        }
        let control = self.control.clone();
        // Beside the rest: a guest that is stuck must not keep us from the second signal.
        tokio::task::spawn_local(async move {
            if let Err(error) = control.signal(kind.as_raw_value()).await {
                tracing::debug!(%error, "signal not passed on");
            }
        });
        Ok(())
    }

    fn resize(&self) {
        let control = self.control.clone();
        tokio::task::spawn_local(async move {
            if let Err(error) = control.resize(terminal::size()).await {
                tracing::debug!(%error, "window size not passed on");
            }
        });
    }
}

/// Waits for a signal that may not be wanted at all.
async fn next_of(signal: &mut Option<Signal>) {
    match signal {
        Some(signal) => {
            signal.recv().await;
        }
        None => std::future::pending().await,
    }
}

/// Sends our standard input to the guest's command until it ends.
async fn pump_stdin(control: ExecControl) {
    let (sender, mut chunks) = mpsc::channel(CHUNKS_WAITING);
    let reader = move || {
        let mut buffer = vec![0; STDIN_CHUNK_BYTES];
        loop {
            match rustix::io::read(rustix::stdio::stdin(), &mut buffer[..]) {
                Err(rustix::io::Errno::INTR) => {}
                // A terminal that hung up answers with an error; to the guest it is the end too.
                Ok(0) | Err(_) => return,
                Ok(count) => {
                    if sender.blocking_send(buffer[..count].to_vec()).is_err() {
                        return;
                    }
                }
            }
        }
    };
    // Not one of tokio's blocking threads: the runtime would wait for a read that may never end.
    if let Err(error) = std::thread::Builder::new()
        .name("stdin".to_owned())
        .spawn(reader)
    {
        tracing::warn!(%error, "standard input is not read");
    }
    while let Some(bytes) = chunks.recv().await {
        if let Err(error) = control.write_stdin(&bytes).await {
            tracing::debug!(%error, "standard input not passed on");
            return;
        }
    }
    if let Err(error) = control.close_stdin().await {
        tracing::debug!(%error, "end of standard input not passed on");
    }
}

enum Chunk {
    Stdout(Vec<u8>),
    Stderr(Vec<u8>),
}

/// A thread that writes to our standard output and standard error.
struct Writer {
    chunks: mpsc::Sender<Chunk>,
    end: oneshot::Receiver<io::Result<()>>,
}

impl Writer {
    fn start() -> Result<Self, CliError> {
        let (chunks, mut waiting) = mpsc::channel(CHUNKS_WAITING);
        let (ended, end) = oneshot::channel();
        let write = move || {
            let mut result = Ok(());
            while let (Ok(()), Some(chunk)) = (&result, waiting.blocking_recv()) {
                result = match chunk {
                    Chunk::Stdout(bytes) => output::stdout_bytes(&bytes),
                    Chunk::Stderr(bytes) => {
                        // Words that nobody reads are no reason to end the command.
                        let _ = output::stderr_bytes(&bytes);
                        Ok(())
                    }
                };
            }
            drop(waiting);
            // The receiver is gone only if the caller gave up.
            let _ = ended.send(result);
        };
        std::thread::Builder::new()
            .name("output".to_owned())
            .spawn(write)
            .map_err(|error| CliError::io("starting a thread", error))?;
        Ok(Self { chunks, end })
    }

    /// Waits until everything is written.
    async fn finish(self) -> Result<(), CliError> {
        drop(self.chunks);
        match self.end.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(CliError::io("writing to standard output", error)),
            Err(_) => Err(CliError::BrokenPipe),
        }
    }
}

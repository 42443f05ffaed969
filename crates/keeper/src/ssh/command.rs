//! A command in the guest joined to a channel until one of them ends.

use std::mem::discriminant;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use russh::server::{Handle, Msg};
use russh::{ChannelWriteHalf, Sig};
use smolvm_engine::{
    ErrorKind, ExecControl, ExecEvent, ExecSpec, ExitStatus, Session, TerminalSize,
};
use tokio::sync::{mpsc, oneshot};

use super::gate::{Gate, Waiting};

/// Exit code for a command that could not be started, as of a shell that finds none.
const NOT_FOUND: u32 = 127;

/// Exit code where the sandbox failed, as OpenSSH's client gives it for a lost connection.
const FAILED: u32 = 255;

/// Time a command has to end after its client has gone, and it was told so by SIGHUP.
const HANG_UP_TIME: Duration = Duration::from_secs(5);

/// The extended stream of standard error (RFC 4254, section 5.2).
const STDERR: u32 = 1;

/// What a client sends to a command.
#[derive(Debug)]
pub(super) enum Input {
    /// The bytes, which count as waiting until this is dropped.
    Data(
        Bytes,
        #[expect(dead_code, reason = "it counts while it lives")] Waiting,
    ),
    End,
}

/// What a client does to a command beside.
#[derive(Debug, Clone, Copy)]
pub(super) enum Steer {
    Resize(TerminalSize),
    Signal(i32),
}

/// The end of a channel that the connection's task holds. Dropping it means that the client is gone.
#[derive(Debug)]
pub(super) struct Reins {
    pub(super) input: mpsc::UnboundedSender<Input>,
    pub(super) steer: mpsc::UnboundedSender<Steer>,
    _here: oneshot::Sender<()>,
}

/// A channel on which a command is to run.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) write: ChannelWriteHalf<Msg>,
    pub(super) handle: Handle,
    pub(super) gate: Arc<Gate>,
}

/// The client has gone.
#[derive(Debug, Clone, Copy)]
pub(super) struct Gone;

impl Line {
    /// Sends bytes as the client's window allows.
    pub(super) async fn send(&self, extended: Option<u32>, bytes: Vec<u8>) -> Result<(), Gone> {
        let mut bytes = Bytes::from(bytes);
        while !bytes.is_empty() {
            let mut room = self.write.writable_packet_size().await;
            // Only then does it wait for something that the client has to send.
            let starved = (room == 0).then(|| {
                room = 1;
                self.gate.starve()
            });
            let part = bytes.split_to(room.min(bytes.len()));
            let sent = match extended {
                None => self.write.data_bytes(part).await,
                Some(stream) => self.write.extended_data_bytes(stream, part).await,
            };
            drop(starved);
            sent.map_err(|_| Gone)?;
        }
        Ok(())
    }
}

impl Reins {
    /// The reins, what comes by them, and what tells that they were let go.
    pub(super) fn new() -> (Self, mpsc::UnboundedReceiver<Input>, oneshot::Receiver<()>) {
        let (reins, inputs, _, gone) = Self::with_steer();
        (reins, inputs, gone)
    }

    fn with_steer() -> (
        Self,
        mpsc::UnboundedReceiver<Input>,
        mpsc::UnboundedReceiver<Steer>,
        oneshot::Receiver<()>,
    ) {
        let (input, inputs) = mpsc::unbounded_channel();
        let (steer, steers) = mpsc::unbounded_channel();
        let (here, gone) = oneshot::channel();
        let reins = Self {
            input,
            steer,
            _here: here,
        };
        (reins, inputs, steers, gone)
    }

    /// Whether nothing takes what comes by them any more.
    pub(super) fn is_over(&self) -> bool {
        self.input.is_closed()
    }
}

/// Starts a command on a channel.
pub(super) fn start(guest: Session, spec: ExecSpec, line: Line) -> Reins {
    let (reins, inputs, steers, gone) = Reins::with_steer();
    tokio::spawn(async move {
        run(&guest, &spec, &line, inputs, steers, gone).await;
    });
    reins
}

async fn run(
    guest: &Session,
    spec: &ExecSpec,
    line: &Line,
    inputs: mpsc::UnboundedReceiver<Input>,
    steers: mpsc::UnboundedReceiver<Steer>,
    gone: oneshot::Receiver<()>,
) {
    let mut exec = match guest.exec(spec).await {
        Ok(exec) => exec,
        Err(error) => {
            let code = match error.kind() {
                ErrorKind::NotFound | ErrorKind::PermissionDenied => NOT_FOUND,
                _ => FAILED,
            };
            let words = format!("smolvm: {}\r\n", error.in_one_line());
            // A client that is gone need not know.
            let _ = line.send(Some(STDERR), words.into_bytes()).await;
            return finish(line, Ended::Code(code)).await;
        }
    };
    let control = exec.control();
    let outcome = {
        let show = async {
            loop {
                let sent = match exec.next().await {
                    Ok(ExecEvent::Stdout(bytes)) => line.send(None, bytes).await,
                    Ok(ExecEvent::Stderr(bytes)) => line.send(Some(STDERR), bytes).await,
                    Ok(ExecEvent::Exited(status)) => return Some(Ended::of(status)),
                    Err(error) => {
                        let words = format!("smolvm: {}\r\n", error.in_one_line());
                        let _ = line.send(Some(STDERR), words.into_bytes()).await;
                        return Some(Ended::Code(FAILED));
                    }
                };
                if sent.is_err() {
                    return None;
                }
            }
        };
        tokio::select! {
            ended = show => ended,
            () = feed(&control, inputs) => None,
            () = steer(&control, steers) => None,
            _ = gone => None,
        }
    };
    match outcome {
        Some(ended) => finish(line, ended).await,
        None => {
            // As when a terminal's line is cut. What the command has started in the background, and
            // left there, lives on; what still runs after that is killed with the stream.
            if control
                .signal(rustix::process::Signal::HUP.as_raw())
                .await
                .is_ok()
            {
                let ended = async {
                    while !matches!(exec.next().await, Ok(ExecEvent::Exited(_)) | Err(_)) {}
                };
                let _ = tokio::time::timeout(HANG_UP_TIME, ended).await;
            }
        }
    }
}

/// Passes input on. Never ends while the client is there.
async fn feed(control: &ExecControl, mut inputs: mpsc::UnboundedReceiver<Input>) {
    while let Some(input) = inputs.recv().await {
        let passed = match &input {
            Input::Data(bytes, _) => control.write_stdin(bytes).await,
            Input::End => control.close_stdin().await,
        };
        if let Err(error) = passed {
            tracing::debug!(%error, "input not passed on");
        }
    }
}

/// Passes on what else the client does.
async fn steer(control: &ExecControl, mut steers: mpsc::UnboundedReceiver<Steer>) {
    while let Some(steer) = steers.recv().await {
        let passed = match steer {
            Steer::Resize(size) => control.resize(size).await,
            Steer::Signal(number) => control.signal(number).await,
        };
        if let Err(error) = passed {
            tracing::debug!(%error, "not passed on");
        }
    }
}

/// How a command ended, as SSH says it.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Ended {
    Code(u32),
    Signal(i32),
}

impl Ended {
    fn of(status: ExitStatus) -> Self {
        match (status.code, status.signal) {
            (Some(code), _) => Self::Code(u32::try_from(code).unwrap_or(FAILED)),
            (None, Some(signal)) => Self::Signal(signal),
            (None, None) => Self::Code(FAILED),
        }
    }
}

/// Says how it ended, and closes the channel. A client that is gone is told nothing.
async fn finish(line: &Line, ended: Ended) {
    let id = line.write.id();
    let handle = &line.handle;
    let _ = handle.eof(id).await;
    let _ = match ended {
        Ended::Code(code) => handle.exit_status_request(id, code).await,
        Ended::Signal(number) => {
            let (signal, words) = (name_of(number), String::new());
            handle
                .exit_signal_request(id, signal, false, words, String::new())
                .await
        }
    };
    let _ = handle.close(id).await;
}

/// Names of signals (RFC 4254, section 6.10), with Linux's numbers. Others have a name of ours, with
/// an `@` as it is to be.
const SIGNALS: [(i32, Sig); 12] = [
    (1, Sig::HUP),
    (2, Sig::INT),
    (3, Sig::QUIT),
    (4, Sig::ILL),
    (6, Sig::ABRT),
    (8, Sig::FPE),
    (9, Sig::KILL),
    (10, Sig::USR1),
    (11, Sig::SEGV),
    (13, Sig::PIPE),
    (14, Sig::ALRM),
    (15, Sig::TERM),
];

/// SIGUSR2, for which the library has no name.
const USR2: (i32, &str) = (12, "USR2");

fn name_of(number: i32) -> Sig {
    if number == USR2.0 {
        return Sig::Custom(USR2.1.to_owned());
    }
    SIGNALS
        .iter()
        .find(|(known, _)| *known == number)
        .map_or_else(
            || Sig::Custom(format!("{number}@smolvm")),
            |(_, signal)| signal.clone(),
        )
}

/// The number of a signal that a client names.
pub(super) fn number_of(signal: &Sig) -> Option<i32> {
    if let Sig::Custom(name) = signal {
        return (name == USR2.1).then_some(USR2.0);
    }
    SIGNALS
        .iter()
        .find(|(_, known)| discriminant(known) == discriminant(signal))
        .map(|(number, _)| *number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_one_name_and_one_number() {
        for number in 1..32 {
            let name = name_of(number);
            match number_of(&name) {
                Some(back) => assert_eq!(back, number),
                None => {
                    assert!(matches!(name, Sig::Custom(name) if name == format!("{number}@smolvm")))
                }
            }
        }
        assert!(matches!(name_of(12), Sig::Custom(name) if name == "USR2"));
        assert_eq!(number_of(&Sig::Custom("STOP".to_owned())), None);
    }

    #[test]
    fn every_end_is_a_code_or_a_signal() {
        let status = |code, signal| ExitStatus {
            code,
            signal,
            timed_out: false,
            duration: Duration::ZERO,
        };
        assert_eq!(Ended::of(status(Some(7), None)), Ended::Code(7));
        assert_eq!(Ended::of(status(None, Some(9))), Ended::Signal(9));
        assert_eq!(Ended::of(status(None, None)), Ended::Code(FAILED));
    }
}

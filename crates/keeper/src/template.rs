//! Making a template, and waking a copy of one.
//!
//! A template is saved when its agent has said Hello and has run one command, so that what every
//! first command needs is in its memory. A copy wakes with an agent that was talking to another host;
//! told Hello, it says it again, and everything after is as after a boot ([`smolvm_proto::rejoin`]).

use std::io::Read;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::time::Duration;

use smolvm_engine::launch::{Launch, Restore};
use smolvm_proto::limits::NONCE_BYTES;
use smolvm_proto::message::{Event, ExecRequest, Request};
use smolvm_proto::version::{Hello, Nonce};
use smolvm_proto::{Decoder, Frame, Kind, Rejoin};
use smolvm_vmm::{Backend, Vm};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::oneshot;

use crate::console::{self, Tail};
use crate::error::KeeperError;

/// The builder's own stream.
const WARM_STREAM: u32 = 1;
/// Most time a copy may take to answer, if a boot may take as long. Restored ones take a tenth of a
/// second under emulation; a boot, which is what comes after, takes some seconds.
const WAKE_TIME: Duration = Duration::from_secs(20);

/// A machine with its two streams, and the Hello of its guest if that was heard already.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) vm: Box<dyn Vm>,
    pub(crate) channel: StdUnixStream,
    pub(crate) console: StdUnixStream,
    pub(crate) greeting: Option<Frame>,
}

impl Started {
    /// Takes the streams of a machine that has just been started.
    pub(crate) fn new(mut vm: Box<dyn Vm>) -> Self {
        let (Some(channel), Some(console)) = (vm.take_channel(), vm.take_console()) else {
            unreachable!("a machine that was just started has both streams")
        };
        Self {
            vm,
            channel,
            console,
            greeting: None,
        }
    }
}

/// Restores a machine that was saved and hears its guest's Hello. Commands that ran when it was saved
/// live on in the copy.
pub(crate) async fn wake(
    backend: &dyn Backend,
    launch: &Launch,
    Restore { state, or_boot }: &Restore,
) -> Result<Started, KeeperError> {
    let or_boot = *or_boot;
    let started = Started::new(backend.restore(&launch.vm, state).await?);
    let talk = async {
        let mut link = Link::new(started.channel)?;
        let greeting = link.rejoin().await?;
        Ok::<_, std::io::Error>((link.into_std()?, greeting))
    };
    // One that has no boot to fall back to is given the time that a boot would have.
    let boot = Duration::from_millis(launch.boot_timeout_ms);
    let limit = if or_boot { WAKE_TIME.min(boot) } else { boot };
    let (channel, greeting) = tokio::time::timeout(limit, talk)
        .await
        .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
        .map_err(|error| KeeperError::io("wake a copy of the template", error))?;
    Ok(Started {
        channel,
        greeting: Some(greeting),
        ..started
    })
}

/// Boots a machine and saves it, when its guest is ready, at `launch.snapshot`.
pub(crate) async fn make(backend: &dyn Backend, launch: &Launch) -> Result<(), KeeperError> {
    let Some(state) = &launch.snapshot else {
        return Err(KeeperError::io(
            "find where to save the template",
            std::io::ErrorKind::InvalidInput.into(),
        ));
    };
    let Started {
        mut vm,
        channel,
        console,
        ..
    } = Started::new(backend.start(&launch.vm).await?);
    let tail = Tail::default();
    tokio::spawn(console::record(console, "/dev/null".into(), tail.clone()));
    let boot = Duration::from_millis(launch.boot_timeout_ms);
    let mut link = Link::new(channel).map_err(|error| KeeperError::io("hear the guest", error))?;
    let ready = async {
        link.hear(Kind::Hello).await?;
        let warm = Request::Exec(ExecRequest {
            timeout_ms: Some(launch.boot_timeout_ms),
            ..ExecRequest::plain(vec![b"true".to_vec().into()])
        });
        link.say(&Frame::message(WARM_STREAM, Kind::Open, &warm))
            .await?;
        // Whether an image has such a command does not matter.
        while !link
            .hear(Kind::Event)
            .await?
            .decode::<Event>()
            .is_ok_and(|event| event.is_terminal())
        {}
        Ok::<_, std::io::Error>(())
    };
    let outcome = tokio::select! {
        ready = tokio::time::timeout(boot, ready) => ready
            .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
            .map_err(|error| KeeperError::io("boot the template", error)),
        exit = vm.wait() => Err(KeeperError::io(
            "boot the template",
            std::io::Error::other(exit.map_or_else(|error| error.to_string(), |exit| exit.to_string())),
        )),
    };
    if let Err(error) = outcome {
        return Err(KeeperError::Guest {
            source: Box::new(error),
            console: tail.lines(),
        });
    }
    vm.snapshot(state, None).await?;
    // Nothing may change the files any more.
    vm.kill().await?;
    Ok(())
}

/// Says when standard input closes: whoever wants the template is gone then, and nobody would ever
/// use or remove it.
pub(crate) fn stdin_closed() -> std::io::Result<oneshot::Receiver<()>> {
    let (tell, told) = oneshot::channel();
    std::thread::Builder::new()
        .name("stdin-watch".to_owned())
        .stack_size(64 * 1024)
        .spawn(|| {
            let mut byte = [0];
            while std::io::stdin()
                .read(&mut byte)
                .is_ok_and(|count| count > 0)
            {}
            // Nobody listens only if the template is ready.
            let _ = tell.send(());
        })?;
    Ok(told)
}

/// Frames in and out, one after the other.
struct Link {
    socket: UnixStream,
    decoder: Decoder,
}

impl Link {
    fn new(socket: StdUnixStream) -> std::io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket: UnixStream::from_std(socket)?,
            decoder: Decoder::new(),
        })
    }

    async fn say(&mut self, frame: &Frame) -> std::io::Result<()> {
        self.socket.write_all(&frame.to_bytes()).await
    }

    /// Takes up the conversation with a guest that was in one with another host.
    async fn rejoin(&mut self) -> std::io::Result<Frame> {
        let mut nonce = Nonce::from([0; NONCE_BYTES]);
        rustix::rand::getrandom(&mut nonce[..], rustix::rand::GetRandomFlags::empty())?;
        let hello = Hello::of_host(nonce, true);
        self.say(&Frame::message(0, Kind::Hello, &hello)).await?;
        let mut rejoin = Rejoin::new(nonce);
        let mut buffer = [0; 4096];
        loop {
            match self.socket.read(&mut buffer).await? {
                0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                count => {
                    if let Some((answer, decoder)) = rejoin.feed(&buffer[..count]) {
                        self.decoder = decoder;
                        return Ok(answer);
                    }
                }
            }
        }
    }

    /// Waits for a frame of this kind; others are dropped.
    async fn hear(&mut self, kind: Kind) -> std::io::Result<Frame> {
        let mut buffer = [0; 4096];
        loop {
            while let Some(frame) = self
                .decoder
                .next_frame()
                .map_err(|error| std::io::Error::new(std::io::ErrorKind::InvalidData, error))?
            {
                if frame.kind == kind {
                    return Ok(frame);
                }
            }
            match self.socket.read(&mut buffer).await? {
                0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                count => self.decoder.feed(&buffer[..count]),
            }
        }
    }

    fn into_std(self) -> std::io::Result<StdUnixStream> {
        self.socket.into_std()
    }
}

//! Making a template, and waking a copy of one.
//!
//! A template is saved when its agent has said Hello and has run one command, so that what every
//! first command needs is in its memory. A copy wakes with an agent that was talking to another host;
//! told Hello, it says it again, and everything after is as after a boot ([`smolvm_proto::rejoin`]).

use std::io::Read;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use smolvm_engine::launch::{Launch, Restore};
use smolvm_host::net::tap::Tap;
use smolvm_host::os::Os;
use smolvm_host::process::waited_for_processor;
use smolvm_proto::limits::NONCE_BYTES;
use smolvm_proto::message::{Event, ExecRequest, Request};
use smolvm_proto::version::{Hello, Nonce};
use smolvm_proto::{Decoder, Frame, Kind, Rejoin};
use smolvm_vmm::{Backend, Cable, CableKind, Channel, Exit, Vm, VmError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::console::{self, Tail};
use crate::error::KeeperError;

/// The builder's own stream.
const WARM_STREAM: u32 = 1;
/// Most time a copy may take to answer that has a boot to fall back to, not counting the time it waits
/// for a processor. One alone takes a twentieth of a second under emulation, of which it waits next to
/// nothing; of 200 restored at once the last took ten seconds, and waited most of them. To give those up
/// and boot in their place would be to do twenty times the work on a host that has too much already.
const WAKE_TIME: Duration = Duration::from_secs(10);
/// Most time a machine may take to end whose channel has closed.
const END_TIME: Duration = Duration::from_secs(2);
/// A copy that is starved may have used up its time all but a moment; so long it is left alone.
const WAKE_STEP: Duration = Duration::from_millis(100);

/// A machine with its two streams, and the Hello of its guest if that was heard already.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) vm: Box<dyn Vm>,
    /// The way to its guest.
    pub(crate) channel: Channel,
    /// The stream to its guest, if it is there already.
    pub(crate) stream: Option<StdUnixStream>,
    pub(crate) console: StdUnixStream,
    pub(crate) greeting: Option<Frame>,
    /// Why it booted though it was to be restored.
    pub(crate) booted_because: Option<String>,
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
            stream: None,
            console,
            greeting: None,
            booted_because: None,
        }
    }
}

/// Restores a machine that was saved and hears its guest's Hello. Commands that ran when it was saved
/// live on in the copy.
pub(crate) async fn wake(
    backend: &dyn Backend,
    launch: &Launch,
    Restore { state, or_boot }: &Restore,
    cable: Option<Cable>,
) -> Result<Started, KeeperError> {
    let or_boot = *or_boot;
    let mut started = Started::new(backend.restore(&launch.vm, state, cable).await?);
    let channel = &mut started.channel;
    let talk = async {
        let mut link = Link::new(channel.open().await?)?;
        let greeting = link.rejoin().await?;
        Ok::<_, std::io::Error>((link.into_std()?, greeting))
    };
    // One that has no boot to fall back to is given the time that a boot would have.
    let most = Duration::from_millis(launch.boot_timeout_ms);
    let own = if or_boot { WAKE_TIME } else { most };
    let pid = started.vm.pid();
    let (stream, greeting) = unless_stuck(pid, own, most, talk)
        .await
        .map_err(|error| KeeperError::io("wake a copy of the template", error))?;
    Ok(Started {
        stream: Some(stream),
        greeting: Some(greeting),
        ..started
    })
}

/// Waits for `answer` of a machine's guest until the machine has had a processor for `own`, or `most` is
/// over. The error says which of the two kept it from answering.
async fn unless_stuck<T>(
    pid: u32,
    own: Duration,
    most: Duration,
    answer: impl Future<Output = std::io::Result<T>>,
) -> std::io::Result<T> {
    let waited = || waited_for_processor(pid).unwrap_or_default();
    let (begun, before) = (Instant::now(), waited());
    let mut answer = std::pin::pin!(answer);
    let mut step = own.min(most);
    loop {
        if let Ok(answer) = tokio::time::timeout(step, &mut answer).await {
            return answer;
        }
        let passed = begun.elapsed();
        let starved = waited().saturating_sub(before);
        match time_left(passed, starved, own, most) {
            Some(left) => step = left,
            None => {
                let text = format!(
                    "it did not answer for {:.1} s, of which it waited {:.1} s for a processor",
                    passed.as_secs_f64(),
                    starved.as_secs_f64(),
                );
                return Err(std::io::Error::new(std::io::ErrorKind::TimedOut, text));
            }
        }
    }
}

/// How long to wait on, after `passed`, of which there was no processor for `starved`; `None` if the
/// machine has had its time.
pub(crate) fn time_left(
    passed: Duration,
    starved: Duration,
    own: Duration,
    most: Duration,
) -> Option<Duration> {
    let had = passed.saturating_sub(starved);
    let left = most.checked_sub(passed).filter(|left| !left.is_zero())?;
    let own_left = own.checked_sub(had).filter(|left| !left.is_zero())?;
    Some(own_left.max(WAKE_STEP).min(left))
}

/// A network device with nobody at the other end. A machine that opens its own is started by this thread,
/// which has no other network from now on.
fn detached(kind: Option<CableKind>) -> Result<Option<Cable>, KeeperError> {
    let os = Os::new();
    let made = match kind {
        Some(CableKind::Descriptor) => Tap::detached(&os, true).map(Cable::Descriptor),
        Some(CableKind::Device) => {
            Tap::detached_here(&os, true).map(|name| Cable::Device(name.to_string()))
        }
        None => return Ok(None),
    };
    Ok(Some(made.map_err(smolvm_engine::Error::from)?))
}

/// Boots a machine and saves it, when its guest is ready, at `launch.snapshot`.
pub(crate) async fn make(backend: &dyn Backend, launch: &Launch) -> Result<(), KeeperError> {
    let Some(state) = &launch.snapshot else {
        return Err(KeeperError::io(
            "find where to save the template",
            std::io::ErrorKind::InvalidInput.into(),
        ));
    };
    // A machine that is to have a network device gets one with nobody at the other end.
    let cable = match launch.vm.nic {
        Some(_) => detached(backend.capabilities().cable)?,
        None => None,
    };
    let started = Started::new(backend.start(&launch.vm, cable).await?);
    let boot = Duration::from_millis(launch.boot_timeout_ms);
    save_when_ready(started, boot, state).await
}

/// Saves a machine at `state`, which has `boot` until its guest is ready, and ends it.
async fn save_when_ready(
    started: Started,
    boot: Duration,
    state: &Path,
) -> Result<(), KeeperError> {
    let Started {
        mut vm,
        mut channel,
        console,
        ..
    } = started;
    let tail = Tail::default();
    tokio::spawn(console::record(console, "/dev/null".into(), tail.clone()));
    let ready = async {
        let mut link = Link::new(channel.open().await?)?;
        link.hear(Kind::Hello).await?;
        let warm = Request::Exec(ExecRequest {
            timeout_ms: Some(u64::try_from(boot.as_millis()).unwrap_or(u64::MAX)),
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
        Ok::<_, std::io::Error>(link)
    };
    let outcome = tokio::select! {
        // Its end says more than that its channel closed.
        biased;
        exit = vm.wait() => Err(ended(exit)),
        ready = tokio::time::timeout(boot, ready) => match ready {
            Ok(Ok(link)) => Ok(link),
            Err(_) => Err(std::io::ErrorKind::TimedOut.into()),
            Ok(Err(error)) => match tokio::time::timeout(END_TIME, vm.wait()).await {
                Ok(exit) => Err(ended(exit)),
                Err(_) => Err(error),
            },
        },
    };
    // Held until it is saved: a guest that finds its host gone waits for another in its own way, and may be
    // saved in the middle of that.
    let link = outcome.map_err(|error| KeeperError::Guest {
        failure: Box::new(KeeperError::io("boot the template", error)),
        console: tail.lines(),
    })?;
    vm.snapshot(state, None).await?;
    drop(link);
    // Nothing may change the files any more.
    vm.kill().await?;
    Ok(())
}

/// How a machine ended that should have gone on. Its memory is a file that grows as the guest writes to
/// it; the kernel ends a process with SIGBUS for whose page there is no room (mmap(2)).
fn ended(exit: Result<Exit, VmError>) -> std::io::Error {
    match exit {
        Ok(exit) if exit.signal == Some(Signal::BUS.as_raw()) => {
            std::io::Error::new(std::io::ErrorKind::StorageFull, exit.to_string())
        }
        Ok(exit) => std::io::Error::other(exit.to_string()),
        Err(error) => std::io::Error::other(error),
    }
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

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use smolvm_proto::message::Exited;

    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn time_without_a_processor_does_not_count() {
        // Idle or busy with itself: it has had its time.
        assert_eq!(time_left(s(5), s(0), s(5), s(60)), None);
        // Starved all the while: as if nothing had passed.
        assert_eq!(time_left(s(5), s(5), s(5), s(60)), Some(s(5)));
        assert_eq!(time_left(s(9), s(6), s(5), s(60)), Some(s(2)));
        // Not for ever.
        assert_eq!(time_left(s(58), s(58), s(5), s(60)), Some(s(2)));
        assert_eq!(time_left(s(60), s(60), s(5), s(60)), None);
        // Several threads count more than one clock does.
        assert_eq!(time_left(s(5), s(7), s(5), s(60)), Some(s(5)));
        // A moment is rounded up, but not over the end.
        let nearly = s(5) - Duration::from_nanos(1);
        assert_eq!(time_left(nearly, s(0), s(5), s(60)), Some(WAKE_STEP));
        assert_eq!(time_left(nearly, s(0), s(5), s(5)), Some(s(5) - nearly));
    }

    #[test]
    fn a_machine_without_room_for_its_memory_is_told_once_and_as_that() {
        let exit = Exit {
            code: None,
            signal: Some(Signal::BUS.as_raw()),
            stderr: String::new(),
        };
        let told = |exit| KeeperError::Guest {
            failure: Box::new(KeeperError::io("boot the template", ended(Ok(exit)))),
            console: vec!["a line".to_owned()],
        };
        let error = told(exit.clone());
        assert!(error.is_full());
        assert_eq!(
            error.chain(),
            "could not boot the template: it was ended by signal 7 (SIGBUS), as when the disk or tmpfs \
             that holds its memory is full; its console ends with: a line"
        );
        let killed = Exit {
            signal: Some(9),
            ..exit
        };
        assert!(!told(killed).is_full());
    }

    #[test]
    fn a_machine_that_has_its_processor_and_is_silent_is_given_up() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("a runtime");
        let silent = std::future::pending::<std::io::Result<()>>();
        // No process has this number, so nothing was waited for.
        let waiting = unless_stuck(1 << 30, Duration::from_millis(1), s(60), silent);
        let error = runtime.block_on(waiting).expect_err("no answer");
        assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
        assert!(
            error.to_string().contains("0.0 s for a processor"),
            "{error}"
        );
    }

    /// A machine whose guest answers one command; it notes whether its maker is still there when it is
    /// asked to be saved.
    #[derive(Debug)]
    struct Observed {
        channel: Option<Channel>,
        console: Option<StdUnixStream>,
        guest: StdUnixStream,
        maker_was_there: Arc<Mutex<Option<bool>>>,
    }

    #[async_trait::async_trait]
    impl Vm for Observed {
        fn pid(&self) -> u32 {
            u32::MAX
        }

        fn take_channel(&mut self) -> Option<Channel> {
            self.channel.take()
        }

        fn take_console(&mut self) -> Option<StdUnixStream> {
            self.console.take()
        }

        async fn pause(&mut self) -> Result<(), VmError> {
            unreachable!("a snapshot pauses by itself")
        }

        async fn resume(&mut self) -> Result<(), VmError> {
            unreachable!("it is killed after the snapshot")
        }

        async fn snapshot(
            &mut self,
            _: &Path,
            _: Option<&Path>,
        ) -> Result<std::time::Instant, VmError> {
            // Nothing to read means that somebody could still write; an end of the stream is read.
            let read = rustix::net::recv(
                &self.guest,
                &mut [0; 64][..],
                rustix::net::RecvFlags::DONTWAIT,
            );
            *self.maker_was_there.lock().expect("a lock") =
                Some(read == Err(rustix::io::Errno::AGAIN));
            Ok(std::time::Instant::now())
        }

        fn start_kill(&mut self) -> Result<(), VmError> {
            Ok(())
        }

        async fn kill(&mut self) -> Result<Exit, VmError> {
            Ok(Exit {
                code: None,
                signal: Some(Signal::KILL.as_raw()),
                stderr: String::new(),
            })
        }

        async fn wait(&mut self) -> Result<Exit, VmError> {
            std::future::pending().await
        }
    }

    #[tokio::test]
    async fn a_template_is_saved_while_its_guest_has_a_host() {
        let (host, guest) = StdUnixStream::pair().expect("a pair");
        let (console, _far) = StdUnixStream::pair().expect("a pair");
        let maker_was_there = Arc::new(Mutex::new(None));
        let vm = Observed {
            channel: Some(host.into()),
            console: Some(console),
            guest: guest.try_clone().expect("a descriptor"),
            maker_was_there: Arc::clone(&maker_was_there),
        };
        let talk = tokio::spawn(async move {
            let mut link = Link::new(guest)?;
            let nonce = Nonce::from([0; NONCE_BYTES]);
            let hello = Frame::message(0, Kind::Hello, &Hello::of_host(nonce, true));
            link.say(&hello).await?;
            let asked = link.hear(Kind::Open).await?;
            let exited = Event::Exited(Exited {
                code: Some(0),
                signal: None,
                timed_out: false,
                duration_us: 1,
            });
            link.say(&Frame::message(asked.stream, Kind::Event, &exited))
                .await?;
            Ok::<_, std::io::Error>(link)
        });
        let started = Started::new(Box::new(vm));
        save_when_ready(started, s(60), Path::new("/nowhere"))
            .await
            .expect("saved");
        drop(talk.await.expect("no panic").expect("a conversation"));
        assert_eq!(*maker_was_there.lock().expect("a lock"), Some(true));
    }
}

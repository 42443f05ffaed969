//! Frames in and out of one socket: two tasks for each, so that nobody waits for anybody.

use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;

use smolvm_proto::{Decoder, Frame};
use smolvm_vmm::Channel;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinHandle;

/// Bytes read at a time: a few frames.
const READ_BYTES: usize = 128 * 1024;
/// Frames written in one go.
const BATCH_FRAMES: usize = 16;

/// The sending end of a socket. The socket is shut down for writing when the last clone is gone
/// and everything was sent.
#[derive(Debug, Clone)]
pub(crate) struct Outgoing {
    queue: mpsc::UnboundedSender<Frame>,
}

impl Outgoing {
    /// Sends a frame; to nowhere if the other side is gone, which its reading task reports.
    pub(crate) fn send(&self, frame: Frame) {
        let _ = self.queue.send(frame);
    }
}

/// Starts the tasks of the way to a guest, whose stream `first` is there already, or comes. Where a guest
/// comes again ([`Channel::is_door`]) its next stream takes the place of the one before, and `between` is
/// told; what was sent and not written by then is dropped.
pub(crate) fn open_guest<T: Send + 'static>(
    mut channel: Channel,
    first: Option<StdUnixStream>,
    inbox: mpsc::Sender<T>,
    deliver: impl Fn(Option<Frame>) -> T + Send + Sync + 'static,
    between: impl Fn() -> T + Send + 'static,
) -> (Outgoing, JoinHandle<()>) {
    let (queue, frames) = mpsc::unbounded_channel::<Frame>();
    let serving = tokio::spawn(async move {
        let frames = Arc::new(Mutex::new(frames));
        let mut stream = match first {
            Some(stream) => Ok(stream),
            None => channel.open().await,
        };
        loop {
            let halves = stream.and_then(|stream| {
                stream.set_nonblocking(true)?;
                Ok(UnixStream::from_std(stream)?.into_split())
            });
            let Ok((mut reader, writer)) = halves else {
                break;
            };
            let writing = tokio::spawn(write(writer, Arc::clone(&frames)));
            // A guest whose stream was cut off does not close it: it does not know it any more.
            let next = tokio::select! {
                again = read(&mut reader, &inbox, &deliver) => match again {
                    false => return,
                    true => None,
                },
                next = channel.open(), if channel.is_door() => Some(next),
            };
            stream = match next {
                Some(next) => next,
                None if channel.is_door() => channel.open().await,
                None => break,
            };
            writing.abort();
            let _ = writing.await;
            while frames.lock().await.try_recv().is_ok() {}
            if stream.is_ok() && inbox.send(between()).await.is_err() {
                return;
            }
        }
        let _ = inbox.send(deliver(None)).await;
    });
    (Outgoing { queue }, serving)
}

/// Writes frames until nobody sends any more, or nobody takes them.
async fn write(mut writer: OwnedWriteHalf, frames: Arc<Mutex<mpsc::UnboundedReceiver<Frame>>>) {
    let mut frames = frames.lock().await;
    let mut batch = Vec::with_capacity(BATCH_FRAMES);
    let mut bytes = Vec::new();
    while frames.recv_many(&mut batch, BATCH_FRAMES).await > 0 {
        for frame in batch.drain(..) {
            frame.write_to(&mut bytes);
        }
        if writer.write_all(&bytes).await.is_err() {
            return;
        }
        bytes.clear();
    }
    let _ = writer.shutdown().await;
}

/// Reads frames until the stream ends, or says what is none. `false` if nobody hears of them any more.
async fn read<T>(
    reader: &mut OwnedReadHalf,
    inbox: &mpsc::Sender<T>,
    deliver: &impl Fn(Option<Frame>) -> T,
) -> bool {
    let mut decoder = Decoder::new();
    let mut buffer = vec![0; READ_BYTES];
    while let Ok(count @ 1..) = reader.read(&mut buffer).await {
        decoder.feed(&buffer[..count]);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => {
                    if inbox.send(deliver(Some(frame))).await.is_err() {
                        return false;
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(%error, "bytes that are no frame; closing the connection");
                    return true;
                }
            }
        }
    }
    true
}

/// Starts the tasks of a socket. `deliver` turns each frame, and at last the end (`None`), into what
/// the driver is told; reading stops while the driver's queue is full.
pub(crate) fn open<T: Send + 'static>(
    socket: StdUnixStream,
    inbox: mpsc::Sender<T>,
    deliver: impl Fn(Option<Frame>) -> T + Send + Sync + 'static,
) -> std::io::Result<(Outgoing, JoinHandle<()>)> {
    socket.set_nonblocking(true)?;
    let (mut reader, writer) = UnixStream::from_std(socket)?.into_split();
    let (queue, frames) = mpsc::unbounded_channel::<Frame>();

    let writing = tokio::spawn(write(writer, Arc::new(Mutex::new(frames))));
    tokio::spawn(async move {
        if read(&mut reader, &inbox, &deliver).await {
            let _ = inbox.send(deliver(None)).await;
        }
    });
    Ok((Outgoing { queue }, writing))
}

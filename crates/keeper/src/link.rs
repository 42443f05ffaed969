//! Frames in and out of one socket: two tasks for each, so that nobody waits for anybody.

use std::os::unix::net::UnixStream as StdUnixStream;

use smolvm_proto::{Decoder, Frame};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
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

/// Starts the tasks of a socket. `deliver` turns each frame, and at last the end (`None`), into what
/// the driver is told; reading stops while the driver's queue is full.
pub(crate) fn open<T: Send + 'static>(
    socket: StdUnixStream,
    inbox: mpsc::Sender<T>,
    deliver: impl Fn(Option<Frame>) -> T + Send + 'static,
) -> std::io::Result<(Outgoing, JoinHandle<()>)> {
    socket.set_nonblocking(true)?;
    let (mut reader, mut writer) = UnixStream::from_std(socket)?.into_split();
    let (queue, mut frames) = mpsc::unbounded_channel::<Frame>();

    let writing = tokio::spawn(async move {
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
    });
    tokio::spawn(async move {
        let mut decoder = Decoder::new();
        let mut buffer = vec![0; READ_BYTES];
        'socket: while let Ok(count @ 1..) = reader.read(&mut buffer).await {
            decoder.feed(&buffer[..count]);
            loop {
                match decoder.next_frame() {
                    Ok(Some(frame)) => {
                        if inbox.send(deliver(Some(frame))).await.is_err() {
                            return;
                        }
                    }
                    Ok(None) => break,
                    Err(error) => {
                        tracing::warn!(%error, "bytes that are no frame; closing the connection");
                        break 'socket;
                    }
                }
            }
        }
        let _ = inbox.send(deliver(None)).await;
    });
    Ok((Outgoing { queue }, writing))
}

//! Holds a client back that sends more than the guest takes.
//!
//! SSH has a window for each channel, but the library opens it again as soon as bytes have arrived,
//! not when somebody has taken them. So the connection itself is read no further while too much
//! waits. That must not keep a client from opening *its* window, which comes the same way: while an
//! output waits for that, reading goes on. A client that sends on and on without ever taking output is
//! sent away at last.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::Notify;

/// Bytes that may wait for the guest before the connection is read no further.
const WAITING_BYTES: usize = 2 * 1024 * 1024;

/// Most bytes that may wait for the guest, whatever else waits.
const WAITING_BYTES_MAX: usize = 64 * 1024 * 1024;

/// What one connection holds.
#[derive(Debug, Default)]
pub(super) struct Gate {
    state: Mutex<State>,
    /// Told each time the connection is read no further.
    shut: Notify,
}

#[derive(Debug, Default)]
struct State {
    waiting: usize,
    starved: usize,
    closed: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl State {
    fn is_open(&self) -> bool {
        self.closed || self.starved > 0 || self.waiting < WAITING_BYTES
    }
}

/// More waits for the guest than may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TooMuch;

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes something, and lets the reader go on if it may now.
    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        change(&mut state);
        let woken = if state.is_open() {
            [state.reader.take(), None]
        } else {
            [None, None]
        };
        drop(state);
        woken.into_iter().flatten().for_each(Waker::wake);
    }

    /// Notes bytes that have arrived and wait for the guest until what is returned is dropped.
    pub(super) fn arrived(self: &Arc<Self>, bytes: usize) -> Result<Waiting, TooMuch> {
        let mut state = self.lock();
        if state.waiting.saturating_add(bytes) > WAITING_BYTES_MAX {
            return Err(TooMuch);
        }
        state.waiting += bytes;
        Ok(Waiting {
            gate: Arc::clone(self),
            bytes,
        })
    }

    /// Notes an output that waits for the client's window, until what is returned is dropped.
    pub(super) fn starve(self: &Arc<Self>) -> Starved {
        self.change(|state| state.starved += 1);
        Starved(Arc::clone(self))
    }

    /// Ends the connection: there is nothing more to read, and nothing can be written.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        let woken = [state.reader.take(), state.writer.take()];
        drop(state);
        woken.into_iter().flatten().for_each(Waker::wake);
        self.shut.notify_one();
    }
}

/// Bytes that wait for the guest.
#[derive(Debug)]
pub(super) struct Waiting {
    gate: Arc<Gate>,
    bytes: usize,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.gate.change(|state| state.waiting -= self.bytes);
    }
}

/// An output that waits for the client.
#[derive(Debug)]
pub(super) struct Starved(Arc<Gate>);

impl Drop for Starved {
    fn drop(&mut self) {
        self.0.change(|state| state.starved -= 1);
    }
}

/// A connection behind a gate.
#[derive(Debug)]
pub(super) struct Gated<S> {
    inner: S,
    gate: Arc<Gate>,
}

impl<S> Gated<S> {
    pub(super) fn new(inner: S, gate: Arc<Gate>) -> Self {
        Self { inner, gate }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Gated<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        {
            let mut state = self.gate.lock();
            // Also kept while it is open: it may be closed before the next byte comes.
            state.reader = Some(context.waker().clone());
            if state.closed {
                return Poll::Ready(Ok(()));
            }
            if !state.is_open() {
                drop(state);
                self.gate.shut.notify_one();
                return Poll::Pending;
            }
        }
        Pin::new(&mut self.inner).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Gated<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        {
            let mut state = self.gate.lock();
            if state.closed {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
            state.writer = Some(context.waker().clone());
        }
        Pin::new(&mut self.inner).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

/// Closes the gate when the client has gone while it was shut: what is not read does not tell. Ends
/// only with that.
pub(super) fn watch(
    socket: &TcpStream,
    gate: Arc<Gate>,
) -> io::Result<impl Future<Output = ()> + use<>> {
    let copy: OwnedFd = socket.as_fd().try_clone_to_owned()?;
    let copy = TcpStream::from_std(copy.into())?;
    Ok(async move {
        loop {
            gate.shut.notified().await;
            loop {
                if gate.lock().is_open() {
                    break;
                }
                let Ok(ready) = copy.ready(Interest::READABLE).await else {
                    return;
                };
                if ready.is_read_closed() {
                    gate.close();
                    std::future::pending::<()>().await;
                }
                // Nothing is read here: it is told again when more arrives, or when the client goes.
                let _ = copy.try_io(Interest::READABLE, || {
                    Err::<(), _>(io::ErrorKind::WouldBlock.into())
                });
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime")
    }

    /// Whether a read finds something at this moment.
    async fn reads(stream: &mut Gated<&[u8]>) -> bool {
        let mut byte = [0];
        tokio::select! {
            biased;
            count = stream.read(&mut byte) => count.expect("a read") == 1,
            () = std::future::ready(()) => false,
        }
    }

    #[test]
    fn reading_stops_while_too_much_waits_unless_an_output_does() {
        runtime().block_on(async {
            let gate = Arc::new(Gate::default());
            let mut stream = Gated::new(&b"abcdef"[..], Arc::clone(&gate));
            assert!(reads(&mut stream).await);
            let first = gate.arrived(WAITING_BYTES - 1).expect("room");
            assert!(reads(&mut stream).await);
            let second = gate.arrived(1).expect("room");
            assert!(!reads(&mut stream).await);
            let starved = gate.starve();
            assert!(reads(&mut stream).await);
            drop(starved);
            assert!(!reads(&mut stream).await);
            drop(first);
            assert!(reads(&mut stream).await);
            drop(second);
            assert_eq!(gate.lock().waiting, 0);
        });
    }

    #[test]
    fn what_waits_is_bounded() {
        let gate = Arc::new(Gate::default());
        let _starved = gate.starve();
        let _waiting = gate.arrived(WAITING_BYTES_MAX).expect("room");
        assert_eq!(gate.arrived(1).err(), Some(TooMuch));
        assert_eq!(gate.arrived(usize::MAX).err(), Some(TooMuch));
    }

    #[test]
    fn a_shut_gate_wakes_its_reader_when_it_opens_or_closes() {
        runtime().block_on(async {
            for close in [false, true] {
                let gate = Arc::new(Gate::default());
                let waiting = gate.arrived(WAITING_BYTES).expect("room");
                let mut stream = Gated::new(&b"x"[..], Arc::clone(&gate));
                let reading = tokio::spawn(async move {
                    let mut byte = [0];
                    stream.read(&mut byte).await.expect("a read")
                });
                tokio::task::yield_now().await;
                assert!(!reading.is_finished());
                if close {
                    gate.close();
                } else {
                    drop(waiting);
                }
                assert_eq!(reading.await.expect("no panic"), usize::from(!close));
            }
        });
    }

    #[test]
    fn a_client_that_goes_is_noticed_though_nothing_is_read() {
        runtime().block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
                .await
                .expect("a listener");
            let address = listener.local_addr().expect("an address");
            let mut client = TcpStream::connect(address).await.expect("a connection");
            let (socket, _) = listener.accept().await.expect("a connection");
            let gate = Arc::new(Gate::default());
            let _waiting = gate.arrived(WAITING_BYTES).expect("room");
            let watch = watch(&socket, Arc::clone(&gate)).expect("a watch");
            let mut stream = Gated::new(socket, Arc::clone(&gate));
            client.write_all(b"more").await.expect("written");
            let mut byte = [0];
            let read = async {
                let gone = async {
                    tokio::task::yield_now().await;
                    drop(client);
                    std::future::pending::<()>().await;
                };
                tokio::select! {
                    count = stream.read(&mut byte) => count.expect("a read"),
                    () = gone => unreachable!("it never ends"),
                }
            };
            tokio::select! {
                count = read => assert_eq!(count, 0, "closed"),
                () = watch => unreachable!("it never ends"),
            }
        });
    }
}

//! Connections through the sandbox: into it, as `ssh -L` asks, and out of it, as `ssh -R` does.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use russh::server::{ChannelOpenHandle, Handle, Msg};
use russh::{Channel, ChannelMsg, ChannelOpenFailure, ChannelReadHalf};
use smolvm_engine::{Connection, ConnectionEvent, Endpoint, GuestListener, Internet, Session};
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::command::{Input, Line, Reins};
use super::gate::Gate;

/// Time what a client has sent before it closed has to arrive, and the other side to close as well: as
/// the kernel gives a connection that is closed (tcp(7), `tcp_fin_timeout`).
const LINGER_TIME: Duration = Duration::from_secs(60);

/// Time the guest has to listen, or to say why it does not.
const LISTEN_TIME: Duration = Duration::from_secs(10);

/// A port of the guest as the protocol names one.
pub(super) fn endpoint(host: &str, port: u32) -> Option<Endpoint> {
    let port = u16::try_from(port).ok()?;
    Some(Endpoint::Internet(Internet {
        host: host.to_owned(),
        port,
    }))
}

/// Connects a channel to a place in the guest, and accepts it when the connection is there.
pub(super) fn connect(
    guest: Session,
    to: Endpoint,
    channel: Channel<Msg>,
    reply: ChannelOpenHandle,
    handle: Handle,
    gate: Arc<Gate>,
) -> Reins {
    let (reins, inputs, gone) = Reins::new();
    let (_, write) = channel.split();
    let line = Line {
        write,
        handle,
        gate,
    };
    tokio::spawn(async move {
        let opened = async {
            let mut connection = guest.open_connection(to)?;
            connection.next().await.map(|_| connection)
        };
        match opened.await {
            Ok(connection) => {
                reply.accept().await;
                carry(connection, &line, inputs, gone).await;
            }
            Err(error) => {
                tracing::debug!(reason = error.in_one_line(), "no connection in the guest");
                reply.reject(ChannelOpenFailure::ConnectFailed).await;
            }
        }
    });
    reins
}

/// Carries bytes both ways until both directions have ended, or one side is gone.
///
/// A client may close its channel with bytes on their way; those still arrive. One that goes without
/// having ended its direction has broken the connection, and so it is broken in the guest.
async fn carry(
    mut connection: Connection,
    line: &Line,
    mut inputs: mpsc::UnboundedReceiver<Input>,
    gone: oneshot::Receiver<()>,
) {
    let input = connection.input();
    let id = line.write.id();
    let is_gone = AtomicBool::new(false);
    let out = async {
        loop {
            let event = connection.next().await;
            let passed = match event {
                Ok(ConnectionEvent::Closed) | Err(_) => return,
                Ok(_) if is_gone.load(Ordering::Relaxed) => true,
                Ok(ConnectionEvent::Data(bytes)) => line.send(None, bytes).await.is_ok(),
                Ok(ConnectionEvent::End) => line.handle.eof(id).await.is_ok(),
                Ok(ConnectionEvent::Opened(_)) => true,
            };
            if !passed {
                return;
            }
        }
    };
    let into = async {
        let mut has_ended = false;
        while let Some(part) = inputs.recv().await {
            let passed = match &part {
                Input::Data(bytes, _) => input.write(bytes).await.map(|_| ()),
                Input::End => {
                    has_ended = true;
                    input.end()
                }
            };
            if let Err(error) = passed {
                tracing::debug!(%error, "bytes not passed on");
            }
        }
        has_ended
    };
    let too_long = async {
        // Let go of, not told.
        let _ = gone.await;
        is_gone.store(true, Ordering::Relaxed);
        let _ = tokio::time::timeout(LINGER_TIME, std::future::pending::<()>()).await;
    };
    let mut out = pin!(out);
    let mut too_long = pin!(too_long);
    tokio::select! {
        () = &mut out => {}
        has_ended = into => {
            if has_ended {
                tokio::select! {
                    () = &mut out => {}
                    () = &mut too_long => {}
                }
            }
        }
        () = &mut too_long => {}
    }
    // A client that is gone is told nothing. What is left of the connection is reset.
    let _ = line.handle.close(id).await;
}

/// A port of the guest at which somebody listens for a client. Dropping it closes the port; what came
/// by it goes on.
#[derive(Debug)]
pub(super) struct Remote {
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Remote {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Where a client asked for a port, as it is told with each connection.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    pub(super) address: String,
    pub(super) port: u16,
}

/// Listens in the guest, and hands each connection to the client. Returns the port with it.
pub(super) async fn listen(
    guest: Session,
    address: &str,
    port: u16,
    handle: Handle,
    gate: Arc<Gate>,
    room: Arc<Semaphore>,
) -> Option<(u16, Remote)> {
    let on = endpoint(address, port.into())?;
    let listening = tokio::time::timeout(LISTEN_TIME, guest.listen(on)).await;
    let listener = match listening {
        Ok(Ok(listener)) => listener,
        Ok(Err(error)) => {
            tracing::debug!(reason = error.in_one_line(), "the guest does not listen");
            return None;
        }
        Err(_) => return None,
    };
    let port = listener.port();
    let asked = Asked {
        address: address.to_owned(),
        port,
    };
    let task = tokio::spawn(async move {
        accept(guest, listener, asked, handle, gate, room).await;
    });
    Some((port, Remote { task }))
}

async fn accept(
    guest: Session,
    mut listener: GuestListener,
    asked: Asked,
    handle: Handle,
    gate: Arc<Gate>,
    room: Arc<Semaphore>,
) {
    loop {
        // What has no room waits in the guest.
        let Ok(place) = Arc::clone(&room).acquire_owned().await else {
            return;
        };
        let Ok(accepted) = listener.next().await else {
            return;
        };
        let (guest, asked) = (guest.clone(), asked.clone());
        let (handle, gate) = (handle.clone(), Arc::clone(&gate));
        tokio::spawn(async move {
            let from = accepted.peer.unwrap_or(Internet {
                host: "127.0.0.1".to_owned(),
                port: 0,
            });
            let opened = handle
                .channel_open_forwarded_tcpip(
                    asked.address,
                    asked.port.into(),
                    from.host,
                    from.port.into(),
                )
                .await;
            // Also where the client refused: then it is dropped at once, which resets it.
            let connection = guest.take_up(accepted.connection);
            if let (Ok(channel), Ok(connection)) = (opened, connection) {
                let (read, write) = channel.split();
                let (reins, inputs, gone) = Reins::new();
                let line = Line {
                    write,
                    handle,
                    gate: Arc::clone(&gate),
                };
                // It lets go of the reins when the client has gone; the rest is then still carried.
                let taking = tokio::spawn(async move { take(read, reins, &gate).await });
                carry(connection, &line, inputs, gone).await;
                taking.abort();
            }
            drop(place);
        });
    }
}

/// Takes what the library has for a channel as it comes: its one loop waits for a reader that does not.
async fn take(mut read: ChannelReadHalf, reins: Reins, gate: &Arc<Gate>) {
    while let Some(message) = read.wait().await {
        let input = match message {
            ChannelMsg::Data { data } => match gate.arrived(data.len()) {
                Ok(waiting) => Input::Data(data, waiting),
                Err(_) => return gate.close(),
            },
            ChannelMsg::Eof => Input::End,
            ChannelMsg::Close => return,
            _ => continue,
        };
        if reins.input.send(input).is_err() {
            return;
        }
    }
}

//! SSH to the sandbox, bridged to the guest's agent: the guest needs no server of its own.
//!
//! The driver owns the listener. The first connection starts a thread with an event loop of its own,
//! so that ciphers never hold the driver up, and a sandbox that nobody enters by SSH pays for one
//! socket. To the driver each connection is a client like any other, from inside.
//!
//! | file | what it does |
//! |---|---|
//! | `gate` | holds a client back that sends more than the guest takes |
//! | `door` | what a client may ask for, and what it is answered |
//! | `command` | joins a command in the guest to a channel |
//! | `forward` | joins connections in the guest to channels |

mod command;
mod door;
mod forward;
mod gate;

use std::net::{SocketAddr, TcpStream as StdTcpStream};
use std::sync::Arc;
use std::time::Duration;

use russh::server::Config;
use russh::{MethodKind, MethodSet, SshId};
use smolvm_engine::launch::Launch;
use smolvm_engine::layout::Layout;
use smolvm_engine::ssh::host_key;
use smolvm_engine::store::Store;
use smolvm_host::net::user::HostSide;
use smolvm_host::os::Os;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::error::KeeperError;
use crate::ports::Line;
use door::Door;
use gate::{Gate, Gated};

/// Connections that have not shown a key yet. More are closed at once.
const STRANGERS_MAX: usize = 16;

/// Connections in all.
const CONNECTIONS_MAX: usize = 128;

/// Time a client has to show a key.
const LOGIN_TIME: Duration = Duration::from_secs(30);

/// Keys a client may show before it is sent away; OpenSSH allows six.
const KEYS_TRIED_MAX: usize = 10;

/// Time a key that is not known costs whoever shows it.
const REJECTION_TIME: Duration = Duration::from_millis(200);

/// Bytes a client may send on a channel before it is granted more.
const WINDOW_BYTES: u32 = 1024 * 1024;

/// The sandbox's listener, and what stands behind it once somebody has come.
#[derive(Debug)]
pub(crate) struct Listener {
    /// Until it is closed.
    socket: Option<TcpListener>,
    ground: Arc<Ground>,
    /// Where connections go, from the first one on.
    service: Option<mpsc::UnboundedSender<StdTcpStream>>,
}

/// What every connection stands on.
#[derive(Debug)]
struct Ground {
    layout: Layout,
    id: String,
    port: u16,
    line: Line,
}

/// Listens on the sandbox's port, if it is to be reached by SSH.
pub(crate) fn listen(
    layout: &Layout,
    side: &HostSide,
    store: &mut Store,
    launch: &Launch,
    line: Line,
) -> Result<Option<Listener>, KeeperError> {
    let id = &launch.id;
    let wanted = store.sandbox(id)?.and_then(|row| row.spec.ssh);
    if wanted.is_none() {
        return Ok(None);
    }
    let (host, socket) = smolvm_engine::ssh::listen(&Os::new(), side, store, id, launch.ssh_ports)?;
    let socket = TcpListener::from_std(socket.into())
        .map_err(|error| KeeperError::io("listen for SSH clients", error))?;
    Ok(Some(Listener {
        socket: Some(socket),
        ground: Arc::new(Ground {
            layout: layout.clone(),
            id: id.clone(),
            port: host.port,
            line,
        }),
        service: None,
    }))
}

/// Waits for a connection; for ever, where nobody listens. Safe to give up.
pub(crate) async fn accept(
    listener: Option<&Listener>,
) -> std::io::Result<(TcpStream, SocketAddr)> {
    match listener.and_then(|listener| listener.socket.as_ref()) {
        Some(socket) => socket.accept().await,
        None => std::future::pending().await,
    }
}

impl Listener {
    /// Gives the port back. Connections that there are take what was said to them.
    pub(crate) fn close(&mut self) {
        self.socket = None;
    }

    /// Hands a connection to the thread that serves them, starting it for the first one.
    pub(crate) fn welcome(&mut self, socket: TcpStream) {
        let handed = socket.into_std().and_then(|socket| {
            let service = match &self.service {
                Some(service) if !service.is_closed() => service,
                _ => self.service.insert(start(Arc::clone(&self.ground))?),
            };
            // If the thread has ended since, the client sees its connection close.
            let _ = service.send(socket);
            Ok(())
        });
        if let Err(error) = handed {
            tracing::warn!(%error, "could not serve an SSH client");
        }
    }
}

/// Starts the thread.
fn start(ground: Arc<Ground>) -> std::io::Result<mpsc::UnboundedSender<StdTcpStream>> {
    let (sender, sockets) = mpsc::unbounded_channel();
    std::thread::Builder::new()
        .name("ssh".to_owned())
        .spawn(move || {
            let served = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(|error| KeeperError::io("start the event loop for SSH", error))
                .and_then(|runtime| runtime.block_on(serve(&ground, sockets)));
            if let Err(error) = served {
                tracing::error!("SSH is not served: {}", error.chain());
            }
        })?;
    Ok(sender)
}

/// Serves connections for as long as the driver hands them over.
async fn serve(
    ground: &Arc<Ground>,
    mut sockets: mpsc::UnboundedReceiver<StdTcpStream>,
) -> Result<(), KeeperError> {
    let key = host_key(
        &Os::new(),
        &ground.layout,
        &ground.layout.sandbox(&ground.id),
    )?;
    let config = Arc::new(Config {
        server_id: SshId::Standard("SSH-2.0-SmolVM".into()),
        methods: MethodSet::from(&[MethodKind::PublicKey][..]),
        auth_rejection_time: REJECTION_TIME,
        // What OpenSSH sends first, only to learn which methods there are.
        auth_rejection_time_initial: Some(Duration::ZERO),
        max_auth_attempts: KEYS_TRIED_MAX,
        keys: vec![key],
        window_size: WINDOW_BYTES,
        // A client on this host that is gone closes its connection; one that is quiet may be so.
        inactivity_timeout: None,
        nodelay: true,
        ..Config::default()
    });
    let strangers = Arc::new(Semaphore::new(STRANGERS_MAX));
    let everybody = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    while let Some(socket) = sockets.recv().await {
        let (Ok(stranger), Ok(place)) = (
            Arc::clone(&strangers).try_acquire_owned(),
            Arc::clone(&everybody).try_acquire_owned(),
        ) else {
            // Closed without a word: there is no cheaper answer.
            continue;
        };
        let (ground, config) = (Arc::clone(ground), Arc::clone(&config));
        tokio::spawn(async move {
            if let Err(error) = connection(ground, config, socket, stranger).await {
                tracing::debug!(%error, "an SSH connection ended");
            }
            drop(place);
        });
    }
    Ok(())
}

/// Serves one connection to its end.
async fn connection(
    ground: Arc<Ground>,
    config: Arc<Config>,
    socket: StdTcpStream,
    stranger: tokio::sync::OwnedSemaphorePermit,
) -> Result<(), russh::Error> {
    let socket = TcpStream::from_std(socket)?;
    socket.set_nodelay(true)?;
    let peer = socket.peer_addr()?;
    let gate = Arc::new(Gate::default());
    let watch = gate::watch(&socket, Arc::clone(&gate))?;
    let (entered, enters) = oneshot::channel();
    let door = Door::new(ground, Arc::clone(&gate), peer, entered);
    let served = async {
        let stream = Gated::new(socket, Arc::clone(&gate));
        russh::server::run_stream(config, stream, door).await?.await
    };
    let guarded = async {
        let in_time = tokio::time::timeout(LOGIN_TIME, enters).await;
        drop(stranger);
        if !matches!(in_time, Ok(Ok(()))) {
            gate.close();
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        ended = served => ended,
        () = guarded => Ok(()),
        () = watch => Ok(()),
    }
}

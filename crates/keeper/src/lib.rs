//! The small process that owns one running sandbox.
//!
//! The engine starts it with a launch file as its one argument, the listening socket as standard
//! input, the sandbox's lock as standard output and a log as standard error. It starts the machine,
//! holds the one connection to the guest's agent, serves any number of clients, and when the
//! machine is off makes the record true and ends. Holding the lock for as long as it lives is
//! what tells others that it lives.

mod console;
mod driver;
mod error;
mod link;
mod member;
mod mounts;
mod net;
mod ports;
mod routes;
mod ssh;
mod still;
mod template;

use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use jiff::Timestamp;
use rustix::fs::{Mode, OFlags};
use smolvm_engine::launch::{EXIT_NO_SPACE, Launch};
use smolvm_engine::layout::Layout;
use smolvm_engine::network;
use smolvm_engine::store::{NetworkMode, State, Store};
use smolvm_engine::teardown;
use smolvm_host::net::user::HostSide;
use smolvm_host::os::Os;
use smolvm_vmm::{Backend, Memory, VmPlan};

use crate::driver::Outside;
use crate::error::KeeperError;
use crate::net::Network;
use crate::template::Started;

/// Finds a backend by the name a launch file gives.
pub type Backends = fn(&str) -> Option<Box<dyn Backend>>;

/// Runs a keeper with the arguments of this process, which is to do nothing else.
#[must_use]
pub fn main(backends: Backends) -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        // The log is a file on a disk that may be full. It would tell of a line that it could not
        // write with `eprintln!`, which panics there, and the machine would go with the keeper.
        .log_internal_errors(false)
        .init();
    let mut arguments = std::env::args_os().skip(1);
    let words = [arguments.next(), arguments.next(), arguments.next()];
    let outcome = match words {
        [Some(word), None, None] if word == "--try-network" => return try_network(),
        [Some(path), None, None] => keep(&PathBuf::from(path), backends),
        [Some(word), Some(path), None] if word == "--template" => {
            return made(&make_template(&PathBuf::from(path), backends));
        }
        [Some(word), Some(path), None] if word == "--fill-pool" => fill_pool(&PathBuf::from(path)),
        _ => {
            tracing::error!("smolvm-keeper is started by smolvm, with a launch file");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{}", error.chain());
            ExitCode::FAILURE
        }
    }
}

/// Takes over what was inherited, and runs the machine until it is off.
fn keep(path: &Path, backends: Backends) -> Result<(), KeeperError> {
    let begun = tokio::time::Instant::now();
    let (listener, lock) =
        inherit().map_err(|error| KeeperError::io("take over the socket", error))?;
    // A second descriptor of the socket: a client that waits for an answer is let go only when
    // this process ends, after the reason has been recorded.
    let _waiting_clients = listener.try_clone();
    let mut launch = Launch::read(path)?;
    let outcome = leave_host(&launch).and_then(|host| {
        let host = Arc::new(host);
        runtime()?.block_on(async {
            let backend = backends(&launch.engine)
                .ok_or_else(|| KeeperError::UnknownEngine(launch.engine.clone()))?;
            let ports = smolvm_engine::ports::bind_all(&Os::new(), &host, &launch.ports)?;
            let mut network = Network::set_up(&Os::new(), &host, &mut launch).await?;
            let started = start(backend.as_ref(), &launch, network.as_mut()).await?;
            let outside = Outside {
                host,
                network,
                ports,
            };
            driver::run(launch.clone(), begun, started, outside, listener).await
        })
    });
    if let Err(error) = &outcome {
        give_up(&launch, error);
    }
    drop(lock);
    outcome
}

/// Moves this process, which has one thread still, to a network of its own where that is the sandbox's
/// mode. Says where the host's is.
fn leave_host(launch: &Launch) -> Result<HostSide, KeeperError> {
    match &launch.network {
        Some(network) if network.mode == NetworkMode::User => Ok(network::leave_host(&Os::new())?),
        _ => Ok(HostSide::here()),
    }
}

/// Finds out whether this user may have networks of its own, and says why not and what helps, each on a
/// line.
fn try_network() -> ExitCode {
    let Err(error) = network::try_to_leave_host(&Os::new()) else {
        return ExitCode::SUCCESS;
    };
    let hint = error.hint_text().unwrap_or_default();
    let said = writeln!(std::io::stdout(), "{}\n{hint}", error.in_one_line());
    if let Err(error) = said {
        tracing::error!(%error, "could not say what was found");
    }
    ExitCode::FAILURE
}

/// Starts the machine: from a template if there is one, by booting otherwise. A template that
/// cannot be restored costs its time, and nothing else.
async fn start(
    backend: &dyn Backend,
    launch: &Launch,
    mut network: Option<&mut Network>,
) -> Result<Started, KeeperError> {
    let mut booted_because = None;
    let kind = backend.capabilities().cable;
    // Of whoever runs the machine.
    let user = launch.vm.jail.as_ref().map(|jail| jail.user);
    let mut cable = || match &mut network {
        Some(network) => network.cable(kind, user),
        None => Ok(None),
    };
    if let Some(restore) = &launch.restore {
        match template::wake(backend, launch, restore, cable()?).await {
            Err(error) if restore.or_boot => {
                let reason = error.chain();
                tracing::warn!(reason, "could not start from a template; booting instead");
                booted_because = Some(reason);
            }
            other => return other,
        }
    }
    let plan = VmPlan {
        memory: Memory::Anonymous,
        ..launch.vm.clone()
    };
    Ok(Started {
        booted_because,
        ..Started::new(backend.start(&plan, cable()?).await?)
    })
}

/// Says on standard output why there is no template; what the log has besides is nobody's.
fn made(outcome: &Result<(), KeeperError>) -> ExitCode {
    let Err(error) = outcome else {
        return ExitCode::SUCCESS;
    };
    if let Err(unsaid) = writeln!(std::io::stdout(), "{}", error.chain()) {
        tracing::error!(%unsaid, "could not say why: {}", error.chain());
    }
    match error.is_full() {
        true => ExitCode::from(EXIT_NO_SPACE),
        false => ExitCode::FAILURE,
    }
}

/// Builds a template for whoever holds the other end of standard input.
fn make_template(path: &Path, backends: Backends) -> Result<(), KeeperError> {
    let launch = Launch::read(path)?;
    // Before there is a second thread.
    let _host = match launch.vm.nic {
        Some(_) if !network::may_leave_namespaces()? => Some(network::leave_host(&Os::new())?),
        _ => None,
    };
    let abandoned =
        template::stdin_closed().map_err(|error| KeeperError::io("watch standard input", error))?;
    runtime()?.block_on(async {
        let backend = backends(&launch.engine)
            .ok_or_else(|| KeeperError::UnknownEngine(launch.engine.clone()))?;
        // The machine goes with the future that is given up.
        tokio::select! {
            made = template::make(backend.as_ref(), &launch) => made,
            _ = abandoned => Err(KeeperError::io(
                "make a template for a process that is gone",
                std::io::ErrorKind::BrokenPipe.into(),
            )),
        }
    })
}

/// Fills a pool up, and ends.
fn fill_pool(path: &Path) -> Result<(), KeeperError> {
    // Fails only for the leader of a process group, which is in a group of its own already.
    let _ = rustix::process::setsid();
    let (engine, id) = smolvm_engine::read_pool_file(path)?;
    Ok(runtime()?.block_on(engine.fill_pool(&id))?)
}

/// A current-thread runtime, because the kernel kills the machine when the *thread* that started it
/// ends: here that is the process's main thread.
fn runtime() -> Result<tokio::runtime::Runtime, KeeperError> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| KeeperError::io("start the event loop", error))
}

/// A new session, so that the keeper outlives the terminal of whoever started it, and the inherited
/// descriptors in a form that the machine's process does not inherit.
fn inherit() -> std::io::Result<(UnixListener, OwnedFd)> {
    // Fails only for the leader of a process group, which is in a group of its own already.
    let _ = rustix::process::setsid();
    let listener = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
    let lock = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3)?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    Ok((UnixListener::from(listener), lock))
}

/// Records why the sandbox is off, for the case in which the driver could not.
fn give_up(launch: &Launch, error: &KeeperError) {
    let layout = Layout::new(launch.data_dir.clone());
    let recorded = Store::open(&layout.database()).and_then(|mut store| {
        let held = [State::Starting, State::Running, State::Stopping];
        let reason = error.chain();
        teardown::release_outside(&Os::new(), &layout, &mut store, &launch.id)?;
        store.transition(
            &launch.id,
            &held,
            State::Error,
            Some(&reason),
            Timestamp::now(),
        )
    });
    if let Err(error) = recorded {
        tracing::error!(%error, "could not record why the sandbox is off");
    }
}

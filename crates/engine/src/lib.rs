//! The SmolVM library: plans, remembers and drives sandboxes.
//!
//! A sandbox is a small virtual machine with a name. [`Engine`] makes, starts, stops and removes
//! them; a [`Session`] is a connection to a running one, on which commands run and files move.
//!
//! Each running sandbox is held by a process of its own, its keeper, so no daemon has to run, the
//! caller may end at any time, and any process may connect by name. What exists is recorded in a
//! SQLite database below the data directory; a sandbox's row is written before anything of it
//! exists and removed last.
//!
//! The library prints nothing, reads no environment variable, and knows no exit code or HTTP
//! status: a face reads a [`Config`] once and passes it in.
//!
//! ```no_run
//! # use smolvm_engine::{Config, Engine, ExecEvent, ExecSpec, SandboxSpec};
//! # async fn example(config: Config) -> smolvm_engine::Result<()> {
//! let engine = Engine::new(config);
//! let spec = SandboxSpec::new(engine.unused_name()?);
//! engine.create(&spec)?;
//! let (session, _) = engine.start(spec.name.as_str()).await?;
//! let mut command = session.exec(&ExecSpec::new(vec!["uname".into(), "-r".into()])).await?;
//! while let ExecEvent::Stdout(bytes) = command.next().await? {
//!     assert!(!bytes.is_empty());
//! }
//! engine.delete(spec.name.as_str()).await?;
//! # Ok(())
//! # }
//! ```

mod assets;
mod build;
mod client;
mod commit;
mod config;
mod connection;
mod doctor;
mod engine;
mod engines;
mod error;
mod exec;
mod facts;
mod files;
mod firecracker;
mod images;
pub mod jail;
mod kernels;
pub mod launch;
pub mod layout;
mod listener;
mod mounts;
mod names;
pub mod network;
mod oci;
mod plan;
mod pool;
pub mod ports;
mod prune;
mod resize;
mod session;
mod settings;
mod snapshots;
mod spec;
pub mod ssh;
pub mod store;
pub mod teardown;
mod templates;
mod volumes;

pub use assets::{Progress, Watcher};
pub use build::{BuildFile, BuildSpec, BuildStep, BuildWatcher, BuiltImage};
pub use commit::{CommitOptions, Committed};
pub use config::{AccelChoice, BOOT_TIMEOUT_DEFAULT, Config};
pub use connection::{Connection, ConnectionEvent, ConnectionInput, DatagramInput, DatagramSocket};
pub use doctor::{Check, CheckStatus};
pub use engine::{ConsoleTail, Engine, ImageInfo, MissingPackage, SandboxInfo, StartTimes};
pub use engines::{EngineChoice, EngineFound, EngineName};
pub use error::{Error, ErrorKind, Result, in_one_line};
pub use exec::{Exec, ExecControl, ExecEvent, ExecSpec, ExitStatus, Program, TerminalSize};
pub use facts::Acceleration;
pub use files::{Copied, CopyOptions, CopyProgress};
pub use images::{ImageName, RemovedImage};
pub use jail::Jailing;
pub use kernels::{BuiltKernel, KernelInfo};
pub use listener::GuestListener;
pub use mounts::{MOUNTS_MAX, Mount, check_mounts};
pub use network::{
    ALLOWED_MAX, Allowed, DeniedAttempt, NetworkConfig, NetworkSpec, NetworkUsage, Reach,
};
pub use oci::{LoadOptions, LoadSource, Loaded, PullPolicy, Pulled};
pub use pool::{POOL_SIZE_MAX, PoolInfo, PoolSpec, read_pool_file};
pub use ports::{HostPort, PORTS_MAX, Protocol, PublishedPort};
pub use prune::{PruneReport, Pruned, Stranger};
pub use resize::check_size;
pub use session::{FileInfo, FileKind, GuestFacts, Session};
pub use settings::{
    JailSettings, JailerChoice, NetworkSettings, RegistryTable, SETTINGS_NAME, Settings,
    SshSettings, UserRange,
};
pub use smolvm_host::cancel::Cancel;
pub use smolvm_host::firecracker::{
    Installed as FirecrackerInstalled, Release as FirecrackerRelease, Source as FirecrackerSource,
};
pub use smolvm_host::image::Limits;
pub use smolvm_host::oci::{ImageConfig, ProxySettings, Reference, RegistrySettings};
pub use smolvm_proto::socket::{Endpoint, Internet};
pub use snapshots::{FORK_CHILDREN_MAX, Fork, Forked, SnapshotInfo};
pub use spec::{
    CPUS_DEFAULT, CPUS_MAX, DEFAULT_IMAGE, DISK_MIB_DEFAULT, DISK_MIB_MAX, DISK_MIB_MIN, DiskMode,
    KernelChoice, MEMORY_MIB_DEFAULT, MEMORY_MIB_MAX, MEMORY_MIB_MIN, NAME_CHARS_MAX, SandboxName,
    SandboxSpec, check_env,
};
pub use ssh::{SshAccess, SshSpec};
pub use store::{NetworkMode, State};
pub use templates::{BuiltTemplate, TemplateInfo, TemplateShape};
pub use volumes::{VOLUMES_MAX, VolumeInfo, VolumeLaunch, VolumeUse, VolumeUser};

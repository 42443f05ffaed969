//! The command line as typed. Nothing here is interpreted yet: each command turns its own arguments
//! into what the engine understands.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use smolvm_engine::{AccelChoice, EngineChoice};

use crate::commands::{
    bench, build, commit, completion, cp, create, delete, doctor, exec, file, fork, image, info,
    kernel, list, logs, network, pause, pool, port, prune, resize, run, setup, shell, snapshot,
    ssh, start, stop, template, volume,
};

/// Disposable computers for AI agents: each sandbox is a microVM with its own kernel.
#[derive(Debug, Parser)]
#[command(
    name = "smolvm",
    version,
    propagate_version = true,
    max_term_width = 100,
    disable_help_subcommand = true,
    after_help = "Example:\n  smolvm run -- python3 -c 'print(6*7)'\n\n\
                  `smolvm setup` prepares this host; `smolvm doctor` says what is wrong with it."
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) globals: Globals,
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

/// Flags every command takes.
#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Globals {
    /// Print exactly one JSON object on standard output
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Keep all state here [env: SMOLVM_DATA_DIR] [default: /var/lib/smolvm for root, else
    /// ~/.local/state/smolvm]
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    /// How guest instructions run; auto is kvm where a probe shows that it works
    #[arg(long, global = true, value_name = "HOW", value_enum, default_value_t = Accel::Auto)]
    pub(crate) accel: Accel,
    /// What runs machines; auto is firecracker where kvm works and it is there, else qemu
    #[arg(long, global = true, value_name = "ENGINE", value_enum, default_value_t = EngineArg::Auto)]
    pub(crate) engine: EngineArg,
    /// Say nothing on standard error but failures
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
    /// Log to standard error; twice for more
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
}

/// How guest instructions run. Variants have no documentation of their own: clap would print it, and
/// every help would become three times as long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Accel {
    Auto,
    Kvm,
    Emulation,
}

/// What runs machines. As with [`Accel`], no variant has documentation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum EngineArg {
    Auto,
    Qemu,
    Firecracker,
}

impl From<EngineArg> for EngineChoice {
    fn from(engine: EngineArg) -> Self {
        match engine {
            EngineArg::Auto => Self::Auto,
            EngineArg::Qemu => Self::Qemu,
            EngineArg::Firecracker => Self::Firecracker,
        }
    }
}

impl From<Accel> for AccelChoice {
    fn from(accel: Accel) -> Self {
        match accel {
            Accel::Auto => Self::Auto,
            Accel::Kvm => Self::Kvm,
            Accel::Emulation => Self::Emulation,
        }
    }
}

/// The commands. Those that deal with one sandbox are here in a short form, and complete under
/// `sandbox`.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a command in a new sandbox, which is gone afterwards
    Run(run::Args),
    /// Create and start a sandbox
    Create(create::Args),
    /// Run a command in a sandbox
    Exec(exec::Args),
    /// Open a login shell in a sandbox
    Shell(shell::Args),
    /// Open a login shell in a sandbox by SSH, or run a command
    Ssh(ssh::Args),
    /// Print how OpenSSH's programs reach a sandbox
    SshConfig(ssh::ConfigArgs),
    /// Copy files into or out of a sandbox
    Cp(cp::Args),
    /// List sandboxes
    #[command(alias = "list")]
    Ls(list::Args),
    /// Show everything about a sandbox
    Info(info::Args),
    /// Show the console of a sandbox
    Logs(logs::Args),
    /// Start a stopped sandbox
    Start(start::Args),
    /// Stop a sandbox
    Stop(stop::Args),
    /// Make sandboxes stand still; they keep their memory and use no processor
    Pause(pause::PauseArgs),
    /// Let paused sandboxes go on
    Resume(pause::ResumeArgs),
    /// Make copies of a running sandbox that go on where it is
    Fork(fork::Args),
    /// Delete sandboxes, running or not
    #[command(alias = "delete")]
    Rm(delete::Args),
    /// Make an image of a running sandbox
    Commit(commit::Args),
    /// Remove what nothing needs any more: leftovers of crashes, stale templates
    Prune(prune::Args),
    /// Everything that can be done with sandboxes
    #[command(
        alias = "computer",
        after_help = "Example:\n  smolvm sandbox create --name box"
    )]
    Sandbox(Sandbox),
    /// Files of a sandbox
    File(File),
    /// Sandboxes saved as they run, to start others from
    Snapshot(Snapshot),
    /// Sandboxes made ahead of demand
    Pool(Pool),
    /// What sandboxes reach
    Network(Network),
    /// Ports of this host that lead into sandboxes
    Port(Port),
    /// Disks that outlive the sandboxes which use them
    Volume(Volume),
    /// Images sandboxes are made from
    #[command(after_help = "Example:\n  smolvm image list")]
    Image(Image),
    /// Kernels guests boot
    #[command(after_help = "Example:\n  smolvm kernel build")]
    Kernel(Kernel),
    /// Machines booted ahead, which new sandboxes are copies of
    #[command(after_help = "Example:\n  smolvm template ls")]
    Template(Template),
    /// Check whether this host can run sandboxes
    Doctor(doctor::Args),
    /// Prepare this host: programs, kernel, image
    Setup(setup::Args),
    /// Print the completion script of a shell
    Completion(completion::Args),
    /// Measure this host
    #[command(after_help = "Example:\n  smolvm bench lifecycle -n 5")]
    Bench(Bench),
}

/// `smolvm sandbox`.
#[derive(Debug, Args)]
pub(crate) struct Sandbox {
    #[command(subcommand)]
    pub(crate) command: Option<SandboxCommand>,
}

/// The verbs of `smolvm sandbox`.
#[derive(Debug, Subcommand)]
pub(crate) enum SandboxCommand {
    /// Create and start a sandbox
    Create(create::Args),
    /// List sandboxes
    #[command(alias = "ls")]
    List(list::Args),
    /// Show everything about a sandbox
    Info(info::Args),
    /// Start a stopped sandbox
    Start(start::Args),
    /// Stop a sandbox
    Stop(stop::Args),
    /// Make sandboxes stand still; they keep their memory and use no processor
    Pause(pause::PauseArgs),
    /// Let paused sandboxes go on
    Resume(pause::ResumeArgs),
    /// Make copies of a running sandbox that go on where it is
    Fork(fork::Args),
    /// Delete sandboxes, running or not
    #[command(alias = "rm")]
    Delete(delete::Args),
    /// Run a command in a sandbox
    Exec(exec::Args),
    /// Open a login shell in a sandbox
    Shell(shell::Args),
    /// Open a login shell in a sandbox by SSH, or run a command
    Ssh(ssh::Args),
    /// Print how OpenSSH's programs reach a sandbox
    SshConfig(ssh::ConfigArgs),
    /// Show the console of a sandbox
    Logs(logs::Args),
    /// Make the disk of a sandbox larger
    Resize(resize::Args),
    /// Make an image of a running sandbox
    Commit(commit::Args),
    /// Remove what nothing needs any more: leftovers of crashes, stale templates
    Prune(prune::Args),
    /// Files of a sandbox
    #[command(hide = true)]
    File(File),
    /// Sandboxes saved as they run, to start others from
    #[command(hide = true)]
    Snapshot(Snapshot),
}

/// `smolvm snapshot`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  smolvm snapshot create box --name before")]
pub(crate) struct Snapshot {
    #[command(subcommand)]
    pub(crate) command: Option<SnapshotCommand>,
}

/// The verbs of `smolvm snapshot`.
#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// Save a sandbox as it is now: memory, devices and disk
    Create(snapshot::CreateArgs),
    /// List the snapshots
    #[command(alias = "ls")]
    List(snapshot::ListArgs),
    /// Start a new sandbox from a snapshot
    Restore(snapshot::RestoreArgs),
    /// Delete snapshots
    #[command(alias = "rm")]
    Delete(snapshot::DeleteArgs),
}

/// `smolvm pool`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  smolvm pool set --size 4")]
pub(crate) struct Pool {
    #[command(subcommand)]
    pub(crate) command: Option<PoolCommand>,
}

/// The verbs of `smolvm pool`.
#[derive(Debug, Subcommand)]
pub(crate) enum PoolCommand {
    /// Have this many sandboxes ready, and fill up now
    Set(pool::SetArgs),
    /// List the pools
    #[command(alias = "ls")]
    List(pool::ListArgs),
    /// Delete a pool and its members
    #[command(alias = "rm")]
    Delete(pool::DeleteArgs),
}

/// `smolvm port`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  smolvm port expose box 8080:80")]
pub(crate) struct Port {
    #[command(subcommand)]
    pub(crate) command: Option<PortCommand>,
}

/// The verbs of `smolvm port`.
#[derive(Debug, Subcommand)]
pub(crate) enum PortCommand {
    /// Have ports of this host lead to ports of a sandbox
    #[command(alias = "open")]
    Expose(port::ExposeArgs),
    /// Have them lead there no longer
    Close(port::CloseArgs),
    /// List the ports that lead to a sandbox
    #[command(alias = "ls")]
    List(port::ListArgs),
}

/// `smolvm volume`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  smolvm volume create data")]
pub(crate) struct Volume {
    #[command(subcommand)]
    pub(crate) command: Option<VolumeCommand>,
}

/// The verbs of `smolvm volume`.
#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// Make an empty volume
    Create(volume::CreateArgs),
    /// List the volumes
    #[command(alias = "ls")]
    List(volume::ListArgs),
    /// Show everything about a volume
    Inspect(volume::InspectArgs),
    /// Delete volumes, with everything in them
    #[command(alias = "rm")]
    Delete(volume::DeleteArgs),
    /// Delete all volumes that no sandbox has
    Prune(volume::PruneArgs),
}

/// `smolvm network`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  smolvm network set box --allow pypi.org")]
pub(crate) struct Network {
    #[command(subcommand)]
    pub(crate) command: Option<NetworkCommand>,
}

/// The verbs of `smolvm network`.
#[derive(Debug, Subcommand)]
pub(crate) enum NetworkCommand {
    /// Show what a sandbox reaches, or what networks use of this host
    Show(network::ShowArgs),
    /// Change what a sandbox reaches, also while it runs
    Set(network::SetArgs),
    /// Show what was denied to a sandbox
    Log(network::LogArgs),
    /// Remove what networks left on this host
    Reset(network::ResetArgs),
}

/// `smolvm file`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  smolvm file ls box /etc")]
pub(crate) struct File {
    #[command(subcommand)]
    pub(crate) command: Option<FileCommand>,
}

/// The verbs of `smolvm file`.
#[derive(Debug, Subcommand)]
pub(crate) enum FileCommand {
    /// Copy a file or directory into a sandbox
    Upload(file::UploadArgs),
    /// Copy a file or directory out of a sandbox
    Download(file::DownloadArgs),
    /// List a directory of a sandbox
    Ls(file::LsArgs),
}

/// `smolvm image`.
#[derive(Debug, Args)]
pub(crate) struct Image {
    #[command(subcommand)]
    pub(crate) command: Option<ImageCommand>,
}

/// The verbs of `smolvm image`.
#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Build an image from a Dockerfile or a smolvm.toml, without Docker
    Build(build::Args),
    /// Pull an image from a registry
    Pull(image::PullArgs),
    /// List the images on this host
    #[command(alias = "ls")]
    List(image::ListArgs),
    /// Show everything about an image
    Inspect(image::InspectArgs),
    /// Take over images from an archive
    Load(image::LoadArgs),
    /// Write images as an archive
    Save(image::SaveArgs),
    /// Give an image a further name
    Tag(image::TagArgs),
    /// Remove an image that no sandbox needs
    #[command(alias = "rm")]
    Delete(image::DeleteArgs),
    /// Remove what no image needs, or every image that nothing needs
    Prune(image::PruneArgs),
}

/// `smolvm kernel`.
#[derive(Debug, Args)]
pub(crate) struct Kernel {
    #[command(subcommand)]
    pub(crate) command: Option<KernelCommand>,
}

/// The verbs of `smolvm kernel`.
#[derive(Debug, Subcommand)]
pub(crate) enum KernelCommand {
    /// Compile a small kernel from the distribution's source
    Build(kernel::BuildArgs),
    /// List the kernels on this host
    #[command(alias = "ls")]
    List(kernel::ListArgs),
    /// Remove kernels that no sandbox boots
    #[command(alias = "rm")]
    Delete(kernel::RemoveArgs),
}

/// `smolvm template`.
#[derive(Debug, Args)]
pub(crate) struct Template {
    #[command(subcommand)]
    pub(crate) command: Option<TemplateCommand>,
}

/// The verbs of `smolvm template`.
#[derive(Debug, Subcommand)]
pub(crate) enum TemplateCommand {
    /// Boot a machine ahead of the first sandbox
    Build(template::BuildArgs),
    /// List the templates, and why one is stale
    #[command(alias = "ls")]
    List(template::ListArgs),
    /// Remove templates
    #[command(alias = "rm")]
    Delete(template::RemoveArgs),
}

/// `smolvm bench`.
#[derive(Debug, Args)]
pub(crate) struct Bench {
    #[command(subcommand)]
    pub(crate) command: Option<BenchCommand>,
}

/// The verbs of `smolvm bench`.
#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Measure the whole life of a sandbox
    Lifecycle(bench::Args),
    /// Measure how fast files go in and out
    Files(bench::files::Args),
}

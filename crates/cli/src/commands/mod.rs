//! One file per verb: its arguments, its help, its function.
//!
//! A command gets its own arguments and a [`Context`], writes data for people through
//! [`Context::out`] as it goes, and returns the same data for programs in an [`Outcome`].

pub(crate) mod bench;
pub(crate) mod build;
pub(crate) mod commit;
pub(crate) mod completion;
pub(crate) mod cp;
pub(crate) mod create;
pub(crate) mod delete;
pub(crate) mod doctor;
pub(crate) mod exec;
pub(crate) mod file;
pub(crate) mod fork;
pub(crate) mod image;
pub(crate) mod info;
mod join;
pub(crate) mod kernel;
pub(crate) mod list;
pub(crate) mod logs;
mod machine;
pub(crate) mod network;
pub(crate) mod pause;
pub(crate) mod pool;
pub(crate) mod port;
pub(crate) mod prune;
pub(crate) mod resize;
pub(crate) mod run;
pub(crate) mod setup;
pub(crate) mod shell;
pub(crate) mod snapshot;
pub(crate) mod ssh;
pub(crate) mod start;
pub(crate) mod stop;
mod tally;
pub(crate) mod template;
pub(crate) mod volume;

use std::ffi::OsString;
use std::future::Future;
use std::time::Duration;

use clap::CommandFactory as _;
use serde_json::Value;
use smolvm_engine::Engine;

use crate::args::{
    BenchCommand, Cli, Command, FileCommand, Globals, ImageCommand, KernelCommand, NetworkCommand,
    PoolCommand, PortCommand, SandboxCommand, SnapshotCommand, TemplateCommand, VolumeCommand,
};
use crate::exit::Exit;
use crate::output::{self, Output};
use crate::report::CliError;
use crate::terminal;
use crate::world::World;

/// What every command has at hand.
#[derive(Debug)]
pub(crate) struct Context {
    /// What was read of the world.
    pub(crate) world: World,
    /// How to write.
    pub(crate) out: Output,
    /// Whether more than failures and data is wanted.
    pub(crate) verbose: bool,
    globals: Globals,
}

impl Context {
    /// The engine, as the flags and the environment want it. Touches nothing.
    ///
    /// # Errors
    ///
    /// [`CliError::Usage`] if nothing says where to keep state.
    pub(crate) fn engine(&self, boot_timeout: Option<Duration>) -> Result<Engine, CliError> {
        self.engine_with(boot_timeout, &[])
    }

    /// The same, with registries that may be asked without encryption.
    ///
    /// # Errors
    ///
    /// As [`Context::engine`].
    pub(crate) fn engine_with(
        &self,
        boot_timeout: Option<Duration>,
        plain_http: &[String],
    ) -> Result<Engine, CliError> {
        let mut config = self.world.config(&self.globals, boot_timeout)?;
        config.registries.plain_http.extend_from_slice(plain_http);
        Ok(Engine::new(config))
    }
}

/// What a command did.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// The `data` of the JSON envelope.
    pub(crate) data: Value,
    /// What failed beside it, or how the guest's command ended.
    pub(crate) error: Option<CliError>,
}

impl From<Value> for Outcome {
    fn from(data: Value) -> Self {
        Self { data, error: None }
    }
}

/// A command with its arguments.
type Action = dyn FnOnce(&Context) -> Result<Outcome, CliError>;

/// What to do.
enum Verb {
    Do(Box<Action>),
    /// The name of the command whose help was asked for by leaving its verb out.
    Help(&'static [&'static str]),
}

/// Runs a command and says how it ended, to people or to programs.
pub(crate) fn run(cli: Cli, world: World) -> Exit {
    terminal::restore_on_panic();
    log(cli.globals.verbose);
    let Some(command) = cli.command else {
        return help(&[]);
    };
    let guest = in_guest(&command);
    let (name, verb) = verb(command);
    let verb = match verb {
        Verb::Do(verb) => verb,
        Verb::Help(path) => return help(path),
    };
    let out = Output {
        json: cli.globals.json,
        quiet: cli.globals.quiet,
    };
    let cx = Context {
        world,
        out,
        verbose: cli.globals.verbose > 0,
        globals: cli.globals,
    };
    let (data, error) = match verb(&cx) {
        Ok(outcome) => (outcome.data, outcome.error),
        Err(error) => (Value::Null, Some(error)),
    };
    let exit = error
        .as_ref()
        .map_or(Exit::Success, |error| error.exit(guest));
    if out.json {
        let printed = output::envelope(name, exit, &data, error.as_ref().map(CliError::json));
        if let Err(error) = printed {
            output::stderr_raw(&error.text());
            return error.exit(guest);
        }
    } else if let Some(error) = error {
        output::stderr_raw(&error.text());
    }
    exit
}

/// Whether 1 and its neighbours belong to something that runs in a guest.
fn in_guest(command: &Command) -> bool {
    match command {
        Command::Run(_) | Command::Exec(_) | Command::Shell(_) => true,
        Command::Sandbox(sandbox) => matches!(
            sandbox.command,
            Some(SandboxCommand::Exec(_) | SandboxCommand::Shell(_))
        ),
        _ => false,
    }
}

/// A command's dotted name, and its function with its arguments.
macro_rules! verb {
    ($name:literal, $function:path, $args:expr) => {{
        let args = $args;
        ($name, Verb::Do(Box::new(move |cx| $function(&args, cx))))
    }};
}

/// Finds a command's dotted name, the same for its short and its long form, and its function.
fn verb(command: Command) -> (&'static str, Verb) {
    match command {
        Command::Run(args) => verb!("run", run::run, args),
        Command::Create(args) => sandbox(SandboxCommand::Create(args)),
        Command::Exec(args) => sandbox(SandboxCommand::Exec(args)),
        Command::Shell(args) => sandbox(SandboxCommand::Shell(args)),
        Command::Ssh(args) => sandbox(SandboxCommand::Ssh(args)),
        Command::SshConfig(args) => sandbox(SandboxCommand::SshConfig(args)),
        Command::Ls(args) => sandbox(SandboxCommand::List(args)),
        Command::Info(args) => sandbox(SandboxCommand::Info(args)),
        Command::Logs(args) => sandbox(SandboxCommand::Logs(args)),
        Command::Start(args) => sandbox(SandboxCommand::Start(args)),
        Command::Stop(args) => sandbox(SandboxCommand::Stop(args)),
        Command::Pause(args) => sandbox(SandboxCommand::Pause(args)),
        Command::Resume(args) => sandbox(SandboxCommand::Resume(args)),
        Command::Fork(args) => sandbox(SandboxCommand::Fork(args)),
        Command::Rm(args) => sandbox(SandboxCommand::Delete(args)),
        Command::Commit(args) => sandbox(SandboxCommand::Commit(args)),
        Command::Sandbox(group) => match group.command {
            Some(command) => sandbox(command),
            None => ("sandbox", Verb::Help(&["sandbox"])),
        },
        Command::Cp(args) => verb!("cp", cp::run, args),
        Command::File(group) => file(group.command),
        Command::Network(group) => match group.command {
            Some(NetworkCommand::Show(args)) => verb!("network.show", network::show, args),
            Some(NetworkCommand::Set(args)) => verb!("network.set", network::set, args),
            Some(NetworkCommand::Log(args)) => verb!("network.log", network::log, args),
            Some(NetworkCommand::Reset(args)) => verb!("network.reset", network::reset, args),
            None => ("network", Verb::Help(&["network"])),
        },
        Command::Snapshot(group) => snapshot(group.command),
        Command::Pool(group) => match group.command {
            Some(PoolCommand::Set(args)) => verb!("pool.set", pool::set, args),
            Some(PoolCommand::List(args)) => verb!("pool.list", pool::list, args),
            Some(PoolCommand::Delete(args)) => verb!("pool.delete", pool::delete, args),
            None => ("pool", Verb::Help(&["pool"])),
        },
        Command::Port(group) => match group.command {
            Some(PortCommand::Expose(args)) => verb!("port.expose", port::expose, args),
            Some(PortCommand::Close(args)) => verb!("port.close", port::close, args),
            Some(PortCommand::List(args)) => verb!("port.list", port::list, args),
            None => ("port", Verb::Help(&["port"])),
        },
        Command::Image(group) => match group.command {
            Some(ImageCommand::List(args)) => verb!("image.list", image::list, args),
            Some(ImageCommand::Build(args)) => verb!("image.build", build::run, args),
            Some(ImageCommand::Pull(args)) => verb!("image.pull", image::pull, args),
            Some(ImageCommand::Save(args)) => verb!("image.save", image::save, args),
            Some(ImageCommand::Prune(args)) => verb!("image.prune", image::prune, args),
            Some(ImageCommand::Inspect(args)) => verb!("image.inspect", image::inspect, args),
            Some(ImageCommand::Load(args)) => verb!("image.load", image::load, args),
            Some(ImageCommand::Tag(args)) => verb!("image.tag", image::tag, args),
            Some(ImageCommand::Delete(args)) => verb!("image.delete", image::delete, args),
            None => ("image", Verb::Help(&["image"])),
        },
        Command::Kernel(group) => match group.command {
            Some(KernelCommand::Build(args)) => verb!("kernel.build", kernel::build, args),
            Some(KernelCommand::List(args)) => verb!("kernel.list", kernel::list, args),
            Some(KernelCommand::Delete(args)) => verb!("kernel.delete", kernel::remove, args),
            None => ("kernel", Verb::Help(&["kernel"])),
        },
        Command::Prune(args) => sandbox(SandboxCommand::Prune(args)),
        Command::Template(group) => match group.command {
            Some(TemplateCommand::Build(args)) => verb!("template.build", template::build, args),
            Some(TemplateCommand::List(args)) => verb!("template.list", template::list, args),
            Some(TemplateCommand::Delete(args)) => verb!("template.delete", template::remove, args),
            None => ("template", Verb::Help(&["template"])),
        },
        Command::Volume(group) => match group.command {
            Some(VolumeCommand::Create(args)) => verb!("volume.create", volume::create, args),
            Some(VolumeCommand::List(args)) => verb!("volume.list", volume::list, args),
            Some(VolumeCommand::Inspect(args)) => verb!("volume.inspect", volume::inspect, args),
            Some(VolumeCommand::Delete(args)) => verb!("volume.delete", volume::delete, args),
            Some(VolumeCommand::Prune(args)) => verb!("volume.prune", volume::prune, args),
            None => ("volume", Verb::Help(&["volume"])),
        },
        Command::Doctor(args) => verb!("doctor", doctor::run, args),
        Command::Setup(args) => verb!("setup", setup::run, args),
        Command::Completion(args) => verb!("completion", completion::run, args),
        Command::Bench(group) => match group.command {
            Some(BenchCommand::Lifecycle(args)) => verb!("bench.lifecycle", bench::run, args),
            Some(BenchCommand::Files(args)) => verb!("bench.files", bench::files::run, args),
            None => ("bench", Verb::Help(&["bench"])),
        },
    }
}

fn sandbox(command: SandboxCommand) -> (&'static str, Verb) {
    match command {
        SandboxCommand::Create(args) => verb!("sandbox.create", create::run, args),
        SandboxCommand::List(args) => verb!("sandbox.list", list::run, args),
        SandboxCommand::Info(args) => verb!("sandbox.info", info::run, args),
        SandboxCommand::Start(args) => verb!("sandbox.start", start::run, args),
        SandboxCommand::Stop(args) => verb!("sandbox.stop", stop::run, args),
        SandboxCommand::Pause(args) => verb!("sandbox.pause", pause::pause, args),
        SandboxCommand::Resume(args) => verb!("sandbox.resume", pause::resume, args),
        SandboxCommand::Fork(args) => verb!("sandbox.fork", fork::run, args),
        SandboxCommand::Delete(args) => verb!("sandbox.delete", delete::run, args),
        SandboxCommand::Exec(args) => verb!("sandbox.exec", exec::run, args),
        SandboxCommand::Shell(args) => verb!("sandbox.shell", shell::run, args),
        SandboxCommand::Ssh(args) => verb!("sandbox.ssh", ssh::run, args),
        SandboxCommand::SshConfig(args) => {
            verb!("sandbox.ssh-config", ssh::config, args)
        }
        SandboxCommand::Logs(args) => verb!("sandbox.logs", logs::run, args),
        SandboxCommand::Resize(args) => verb!("sandbox.resize", resize::run, args),
        SandboxCommand::Commit(args) => verb!("sandbox.commit", commit::run, args),
        SandboxCommand::Prune(args) => verb!("sandbox.prune", prune::run, args),
        SandboxCommand::File(group) => file(group.command),
        SandboxCommand::Snapshot(group) => snapshot(group.command),
    }
}

fn snapshot(command: Option<SnapshotCommand>) -> (&'static str, Verb) {
    match command {
        Some(SnapshotCommand::Create(args)) => verb!("snapshot.create", snapshot::create, args),
        Some(SnapshotCommand::List(args)) => verb!("snapshot.list", snapshot::list, args),
        Some(SnapshotCommand::Restore(args)) => verb!("snapshot.restore", snapshot::restore, args),
        Some(SnapshotCommand::Delete(args)) => verb!("snapshot.delete", snapshot::delete, args),
        None => ("snapshot", Verb::Help(&["snapshot"])),
    }
}

fn file(command: Option<FileCommand>) -> (&'static str, Verb) {
    match command {
        Some(FileCommand::Upload(args)) => verb!("file.upload", file::upload, args),
        Some(FileCommand::Download(args)) => verb!("file.download", file::download, args),
        Some(FileCommand::Ls(args)) => verb!("file.ls", file::ls, args),
        None => ("file", Verb::Help(&["file"])),
    }
}

/// Prints the help of a command that was given without its verb.
fn help(path: &[&str]) -> Exit {
    let mut command = Cli::command();
    command.build();
    for name in path {
        if let Some(found) = command.find_subcommand(name) {
            command = found.clone();
        }
    }
    // Also when the reader of a long help has gone away.
    let _ = command.print_help();
    Exit::Success
}

/// The dotted name of what a command line that does not parse was about, as far as it can be told.
pub(crate) fn named<'a>(cli: &clap::Command, words: impl Iterator<Item = &'a OsString>) -> String {
    let mut command = cli;
    let mut names = Vec::new();
    for word in words {
        if let Some(found) = command.find_subcommand(word) {
            names.push(found.get_name());
            command = found;
        } else if !names.is_empty() {
            // The first argument of a verb may happen to be called like another verb.
            break;
        }
    }
    match names[..] {
        [] => "smolvm".to_owned(),
        ["ls"] => "sandbox.list".to_owned(),
        ["rm"] => "sandbox.delete".to_owned(),
        [
            name @ ("create" | "exec" | "shell" | "ssh" | "ssh-config" | "info" | "logs" | "start"
            | "stop" | "pause" | "resume" | "fork" | "commit" | "prune"),
        ] => {
            format!("sandbox.{name}")
        }
        _ => names.join("."),
    }
}

/// Logs to standard error, if asked to.
fn log(verbose: u8) {
    let level = match verbose {
        0 => return,
        1 => tracing::Level::INFO,
        2 => tracing::Level::DEBUG,
        _ => tracing::Level::TRACE,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        // Whatever standard error is: a line that cannot be written is no reason to panic.
        .log_internal_errors(false)
        .init();
}

/// Runs what talks to sandboxes. Commands that only read state never come here.
///
/// # Errors
///
/// What the work failed with.
pub(crate) fn block_on<T>(work: impl Future<Output = Result<T, CliError>>) -> Result<T, CliError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| CliError::io("starting the event loop", error))?;
    let result = runtime.block_on(work);
    // A thread of the pool may be in work that was given up; we do not wait for it.
    runtime.shutdown_background();
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_an_example() {
        fn check(command: &clap::Command) {
            let help = command
                .get_after_help()
                .map(ToString::to_string)
                .unwrap_or_default();
            assert!(
                help.contains("Example"),
                "`{}` shows no example",
                command.get_name()
            );
            command.get_subcommands().for_each(check);
        }
        check(&Cli::command());
    }

    #[test]
    fn commands_have_one_name_in_both_forms() {
        let name = |line: &str| {
            let words: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            named(&Cli::command(), words.iter())
        };
        assert_eq!(name("--json"), "smolvm");
        assert_eq!(name("--json ls --bad"), "sandbox.list");
        assert_eq!(name("sandbox list --bad"), "sandbox.list");
        assert_eq!(name("computer delete --bad"), "sandbox.delete");
        assert_eq!(name("rm"), "sandbox.delete");
        assert_eq!(name("exec ls"), "sandbox.exec");
        assert_eq!(name("file upload"), "file.upload");
    }
}

//! The flags that describe a sandbox, shared by `run` and `create`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use smolvm_engine::{
    CPUS_DEFAULT, DEFAULT_IMAGE, DISK_MIB_DEFAULT, DiskMode, Engine, ErrorKind, KernelChoice,
    MEMORY_MIB_DEFAULT, Mount, NetworkSpec, PoolSpec, PullPolicy, Reach, SandboxInfo, SandboxSpec,
    Session, SshSpec, check_mounts,
};

use super::Context;
use crate::report::CliError;
use crate::units;

/// How often another generated name is tried when someone else was faster.
const NAMES_TRIED: usize = 16;

/// What makes one sandbox like another, so that it could be made ahead.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Sandbox")]
pub(crate) struct Shape {
    /// Image of its root file system: one on this host, or the name of an OCI image
    #[arg(long, default_value = DEFAULT_IMAGE)]
    pub(crate) image: String,
    #[command(flatten)]
    kind: Kind,
}

/// Its sizes, and where its changes go.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Sandbox")]
pub(crate) struct Kind {
    /// Virtual CPUs
    #[arg(long, value_name = "COUNT", value_parser = units::cpus, default_value_t = CPUS_DEFAULT)]
    cpus: u8,
    /// Memory: 512 (MiB), 512M or 1G
    #[arg(long, value_name = "SIZE", value_parser = units::mib, default_value_t = MEMORY_MIB_DEFAULT)]
    memory: u32,
    /// Room for changes to its root file system: 4096 (MiB) or 4G; only what is used takes space
    #[arg(long, alias = "disk-size", value_name = "SIZE", value_parser = units::mib)]
    #[arg(default_value_t = DISK_MIB_DEFAULT)]
    disk: u32,
    /// Where these changes go: a layer of its own, one that belongs to the image and to one sandbox at a
    /// time, or its memory
    #[arg(long, value_name = "MODE", value_enum, default_value_t = Mode::Isolated)]
    disk_mode: Mode,
}

impl Kind {
    fn disk_mode(&self) -> DiskMode {
        match self.disk_mode {
            Mode::Isolated => DiskMode::Isolated,
            Mode::Shared => DiskMode::Shared,
            Mode::Memory => DiskMode::Memory,
        }
    }

    /// A sandbox of this kind that is only thought of.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidInput`] for a value out of bounds.
    pub(crate) fn spec(&self, image: &str, kernel: KernelChoice) -> Result<SandboxSpec, CliError> {
        let spec = SandboxSpec {
            image: image.to_owned(),
            cpus: self.cpus,
            memory_mib: self.memory,
            disk_mib: self.disk,
            disk_mode: self.disk_mode(),
            kernel,
            ..SandboxSpec::new("template".parse()?)
        };
        spec.check()?;
        Ok(spec)
    }
}

impl Shape {
    /// A pool of such sandboxes; `image` is that of --image if absent.
    pub(crate) fn pool(
        &self,
        image: Option<&String>,
        size: u32,
        commands: Vec<String>,
        nic: bool,
    ) -> PoolSpec {
        PoolSpec {
            image: image.unwrap_or(&self.image).clone(),
            cpus: self.kind.cpus,
            memory_mib: self.kind.memory,
            disk_mib: self.kind.disk,
            disk_mode: self.kind.disk_mode(),
            nic,
            size,
            commands,
        }
    }
}

/// What the sandbox is to be.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Sandbox")]
pub(crate) struct Machine {
    /// Its name [default: generated]
    #[arg(short, long)]
    name: Option<String>,
    #[command(flatten)]
    shape: Shape,
    /// Environment of its commands; NAME alone copies ours
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// File of NAME=VALUE lines for the same
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// When to pull the image
    #[arg(long, value_name = "WHEN", value_enum, default_value_t = Pull::Missing)]
    pull: Pull,
    /// Registry that may be asked without encryption; those on this host always may
    #[arg(long, value_name = "HOST")]
    pub(crate) plain_http: Vec<String>,
    /// Directory its commands start in [default: that of the image]
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// User its commands run as [default: that of the image, else root]
    #[arg(short, long)]
    user: Option<String>,
    /// Publish a port: [IP:][HOST:]GUEST[/tcp|/udp], such as 8080:80; without IP only this host reaches
    /// it, without HOST, or with 0, a free port is chosen
    #[arg(short, long, value_name = "PORT")]
    publish: Vec<String>,
    /// Mount a volume: NAME:GUEST[:ro], such as data:/srv/data; or a directory of this host, whose path
    /// begins with / or ./: HOST:GUEST, to be read, or HOST:GUEST:rw, to be written as well
    #[arg(short, long, value_name = "NAME|HOST:GUEST[:ro|rw]")]
    volume: Vec<String>,
    /// Log to standard error; twice for more
    // In place of the global flag, whose short form means a volume here.
    #[arg(id = "verbose", long, action = clap::ArgAction::Count)]
    #[arg(help_heading = "Global options", display_order = 1000)]
    _verbose: u8,
    /// Destroy it this long after each start: 30s, 5m, 2h
    #[arg(long, value_name = "TIME", value_parser = units::limit)]
    ttl: Option<Duration>,
    /// Most time to boot [default: 1m]
    #[arg(long, value_name = "TIME", value_parser = units::boot_limit)]
    pub(crate) boot_timeout: Option<Duration>,
    /// Kernel to boot: small, docker, stock (that of the distribution), or a file (vmlinux or bzImage)
    /// [default: small if it was built, else stock]
    #[arg(long, value_name = "KERNEL")]
    kernel: Option<PathBuf>,
    #[command(flatten)]
    network: Network,
}

/// What the sandbox may reach.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Network")]
pub(crate) struct Network {
    /// What it may reach: nothing, or the public Internet
    #[arg(long, value_name = "POLICY", value_enum)]
    network: Option<Policy>,
    /// Let it reach this name, all names below one, address or network, and nothing else; with --network
    /// open a private network as well (can be repeated)
    #[arg(long, value_name = "HOST|CIDR|*.DOMAIN")]
    // Read in `spec`, so that a mistake is told with its reason and what helps.
    allow: Vec<String>,
}

impl Network {
    /// Whether nothing was said.
    pub(crate) fn is_unsaid(&self) -> bool {
        self.network.is_none() && self.allow.is_empty()
    }

    /// What was meant; the list alone if only that was given.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidInput`] for something that cannot be allowed.
    pub(crate) fn spec(&self) -> smolvm_engine::Result<NetworkSpec> {
        let reach = match self.network {
            Some(Policy::Off) => Reach::Off,
            Some(Policy::Open) => Reach::Open,
            None if self.allow.is_empty() => Reach::Off,
            None => Reach::Listed,
        };
        let mut allowed = Vec::new();
        for text in &self.allow {
            let one = text.parse()?;
            if !allowed.contains(&one) {
                allowed.push(one);
            }
        }
        Ok(NetworkSpec { reach, allowed })
    }
}

/// See [`Reach`].
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Policy {
    Off,
    Open,
}

/// When an image is pulled; see [`PullPolicy`].
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub(crate) enum Pull {
    Missing,
    Always,
    Never,
}

impl Pull {
    /// What was meant.
    pub(crate) fn policy(self) -> PullPolicy {
        match self {
            Self::Missing => PullPolicy::Missing,
            Self::Always => PullPolicy::Always,
            Self::Never => PullPolicy::Never,
        }
    }
}

/// A directory of this host, by a path that may begin in the current one.
fn mount(text: &str) -> Result<Mount, CliError> {
    let mount: Mount = text.parse()?;
    let source = std::path::absolute(&mount.source)
        .map_err(|error| CliError::io("finding the current directory", error))?;
    Ok(Mount { source, ..mount })
}

/// Where changes go; see [`DiskMode`].
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Mode {
    Isolated,
    Shared,
    Memory,
}

impl Machine {
    /// What was meant, checked.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidInput`] for a value out of bounds; a failed read of an environment file.
    pub(crate) fn spec(&self, cx: &Context, engine: &Engine) -> Result<SandboxSpec, CliError> {
        let name = match &self.name {
            Some(name) => name.parse()?,
            None => engine.unused_name()?,
        };
        let kernel = kernel_choice(self.kernel.as_deref())?;
        let (mounts, volumes): (Vec<&str>, Vec<&str>) = self
            .volume
            .iter()
            .map(String::as_str)
            .partition(|text| Mount::is_meant(text));
        let spec = SandboxSpec {
            name,
            env: environment(cx, &self.env_file, &self.env)?,
            workdir: self.workdir.clone(),
            user: self.user.clone(),
            ttl: self.ttl,
            ports: self
                .publish
                .iter()
                .map(|text| text.parse())
                .collect::<smolvm_engine::Result<_>>()?,
            network: self.network.spec()?,
            volumes: volumes
                .into_iter()
                .map(str::parse)
                .collect::<smolvm_engine::Result<_>>()?,
            mounts: mounts.into_iter().map(mount).collect::<Result<_, _>>()?,
            ..self.shape.kind.spec(&self.shape.image, kernel)?
        };
        spec.check()?;
        check_mounts(&spec.name, &spec.mounts)?;
        if spec.network.needs_device() {
            // Before anything is pulled or built for it.
            engine.network_mode()?;
        }
        Ok(spec)
    }

    /// Whether it is to have ports of the host.
    pub(crate) fn publishes(&self) -> bool {
        !self.publish.is_empty()
    }

    /// When its image is to be pulled.
    pub(crate) fn pull(&self) -> PullPolicy {
        self.pull.policy()
    }

    /// Creates the sandbox. A generated name that another process took meanwhile is replaced.
    ///
    /// # Errors
    ///
    /// What the engine failed with.
    pub(crate) fn create(
        &self,
        engine: &Engine,
        spec: &mut SandboxSpec,
    ) -> Result<SandboxInfo, CliError> {
        for _ in 1..NAMES_TRIED {
            match engine.create(spec) {
                Err(error) if self.renames(&error) => spec.name = engine.unused_name()?,
                result => return Ok(result?),
            }
        }
        Ok(engine.create(spec)?)
    }

    /// Takes the sandbox from a pool, where it runs already; creates it if there is none (`None`), and
    /// then it is to be started. Names as [`Machine::create`].
    ///
    /// # Errors
    ///
    /// What the engine failed with.
    pub(crate) async fn claim_or_create(
        &self,
        engine: &Engine,
        spec: &mut SandboxSpec,
    ) -> Result<Option<Session>, CliError> {
        for _ in 0..NAMES_TRIED {
            match engine.claim(spec).await {
                Ok(Some((session, _))) => return Ok(Some(session)),
                Ok(None) => break,
                Err(error) if self.renames(&error) => spec.name = engine.unused_name()?,
                Err(error) => return Err(error.into()),
            }
        }
        self.create(engine, spec).map(|_| None)
    }

    /// Whether another name may do.
    fn renames(&self, error: &smolvm_engine::Error) -> bool {
        self.name.is_none() && error.kind() == ErrorKind::AlreadyExists
    }
}

/// Who may come in by SSH, with the keys in these files.
///
/// # Errors
///
/// A failed read; a file without a key that is accepted.
pub(crate) fn ssh(files: &[PathBuf]) -> Result<SshSpec, CliError> {
    let mut texts = Vec::new();
    for path in files {
        texts.push(std::fs::read_to_string(path).map_err(|error| {
            CliError::io(format!("reading the SSH key {}", path.display()), error)
        })?);
    }
    Ok(SshSpec::new(texts.iter().map(String::as_str))?)
}

/// The kernel that is meant by its name or its file. A file of such a name is meant by `./small`.
///
/// # Errors
///
/// If there is no current directory.
pub(crate) fn kernel_choice(kernel: Option<&Path>) -> Result<KernelChoice, CliError> {
    let Some(kernel) = kernel else {
        return Ok(KernelChoice::Auto);
    };
    Ok(match kernel.to_str() {
        Some("stock") => KernelChoice::Stock,
        Some("small") => KernelChoice::Small,
        Some("docker") => KernelChoice::Docker,
        // The keeper has another working directory.
        _ => KernelChoice::File(
            std::path::absolute(kernel)
                .map_err(|error| CliError::io("finding the current directory", error))?,
        ),
    })
}

/// Reads the environment for a guest: files first, then flags, later ones winning.
///
/// # Errors
///
/// A failed read; a line that is no variable.
pub(crate) fn environment(
    cx: &Context,
    files: &[PathBuf],
    flags: &[String],
) -> Result<Vec<(String, String)>, CliError> {
    let mut env = Vec::new();
    for path in files {
        let text = std::fs::read_to_string(path).map_err(|error| {
            CliError::io(
                format!("reading environment file {}", path.display()),
                error,
            )
        })?;
        for line in lines(&text) {
            add(&mut env, line, &|name| cx.world.variable(name));
        }
    }
    for flag in flags {
        add(&mut env, flag, &|name| cx.world.variable(name));
    }
    for (name, value) in &env {
        smolvm_engine::check_env(name, value)?;
    }
    Ok(env)
}

/// The lines of an environment file that say something.
fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .map(str::trim_start)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// Adds `NAME=VALUE`, or the caller's `NAME` if the caller has it.
fn add(env: &mut Vec<(String, String)>, text: &str, ours: &dyn Fn(&str) -> Option<String>) {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name.to_owned(), value.to_owned()),
        None => match ours(text) {
            Some(value) => (text.to_owned(), value),
            // As Docker: a script may name what only some of its callers have.
            None if smolvm_engine::check_env(text, "").is_ok() => return,
            None => (text.to_owned(), String::new()),
        },
    };
    env.retain(|(known, _)| *known != name);
    env.push((name, value));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_variables_win_and_names_alone_are_copied() {
        let mut env = Vec::new();
        let ours = |name: &str| (name == "HOME").then(|| "/home/a".to_owned());
        for text in ["A=1", "HOME", "MISSING", "B=x=y", "A=2", "EMPTY="] {
            add(&mut env, text, &ours);
        }
        let flat: Vec<String> = env
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        assert_eq!(flat, ["HOME=/home/a", "B=x=y", "A=2", "EMPTY="]);
        add(&mut env, "", &ours);
        assert!(
            smolvm_engine::check_env(&env[4].0, &env[4].1).is_err(),
            "is refused later"
        );
    }

    #[test]
    fn kernels_are_named_or_files() {
        let choice = |text: &str| kernel_choice(Some(Path::new(text))).expect("a choice");
        assert_eq!(kernel_choice(None).expect("a choice"), KernelChoice::Auto);
        assert_eq!(choice("stock"), KernelChoice::Stock);
        assert_eq!(choice("small"), KernelChoice::Small);
        assert_eq!(choice("docker"), KernelChoice::Docker);
        assert_eq!(choice("/small"), KernelChoice::File("/small".into()));
        assert!(matches!(choice("./small"), KernelChoice::File(file) if file.is_absolute()));
    }

    #[test]
    fn comments_in_environment_files_are_left_out() {
        let text = "# one\n\nA=1\n  B=2 # kept\r\n";
        assert_eq!(lines(text).collect::<Vec<_>>(), ["A=1", "B=2 # kept"]);
    }
}

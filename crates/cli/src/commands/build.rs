//! `smolvm image build`: an image from a Dockerfile or a `smolvm.toml`, without Docker.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;
use smolvm_engine::{
    BuildFile, BuildSpec, BuildStep, BuildWatcher, DISK_MIB_DEFAULT, ErrorKind, NetworkSpec,
    Progress, Watcher,
};

use super::machine::{Network, Pull, kernel_choice};
use super::{Context, Outcome, block_on, image};
use crate::output::{self, Output};
use crate::prepare;
use crate::progress::Meter;
use crate::report::CliError;
use crate::signals::Signals;
use crate::units;

/// Files that are looked for in the context, in this order.
const DEFAULT_FILES: [&str; 3] = ["Dockerfile", "Containerfile", "smolvm.toml"];
/// Memory of the sandboxes that are built in: installers and compilers want more than most commands.
const MEMORY_MIB: u32 = 1024;
/// Their virtual CPUs.
const CPUS: u8 = 2;

/// Arguments of `image build`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  smolvm image build -t app:1 .
  smolvm image build -f smolvm.toml -t tools .

A Dockerfile is carried out in sandboxes; Docker is not needed. Each step's outcome is kept, and used
by the next build in which nothing before it has changed; `smolvm image prune` removes what is kept.
A smolvm.toml names a base, packages, files and settings:

  base = \"debian-12\"
  apt = [\"git\"]
  pip = [\"requests\"]
  files = { \"/app\" = \"src\" }

What steps print comes on standard error, the image's name on standard output.")]
pub(crate) struct Args {
    /// Directory with the files that are copied
    #[arg(default_value = ".", value_name = "CONTEXT")]
    context: PathBuf,
    /// The Dockerfile, or a .toml file [default: CONTEXT/Dockerfile, else CONTEXT/smolvm.toml]
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Name of the image: NAME or NAME:TAG; one that has it loses it [default: build:…]
    #[arg(short = 't', long = "tag", value_name = "NAME")]
    name: Option<String>,
    /// Value of an ARG; NAME alone copies ours
    #[arg(long, value_name = "NAME[=VALUE]")]
    build_arg: Vec<String>,
    /// Stage to build, by name or number [default: the last]
    #[arg(long, value_name = "STAGE")]
    target: Option<String>,
    /// Do every step anew
    #[arg(long)]
    no_cache: bool,
    /// When to pull the images it begins with
    #[arg(long, value_name = "WHEN", value_enum, default_value_t = Pull::Missing)]
    pull: Pull,
    /// Registry that may be asked without encryption; those on this host always may
    #[arg(long, value_name = "HOST")]
    plain_http: Vec<String>,
    /// Virtual CPUs to build with
    #[arg(long, value_name = "COUNT", value_parser = units::cpus, default_value_t = CPUS)]
    cpus: u8,
    /// Memory to build with: 1024 (MiB), 2G
    #[arg(long, value_name = "SIZE", value_parser = units::mib, default_value_t = MEMORY_MIB)]
    memory: u32,
    /// Room for what is added to the image: 4096 (MiB), 20G; only what is used takes space
    #[arg(long, value_name = "SIZE", value_parser = units::mib, default_value_t = DISK_MIB_DEFAULT)]
    disk: u32,
    /// Most time to boot [default: 1m]
    #[arg(long, value_name = "TIME", value_parser = units::boot_limit)]
    boot_timeout: Option<Duration>,
    /// Kernel to boot: small, docker, stock (that of the distribution), or a file (vmlinux or bzImage)
    /// [default: small if it was built, else stock]
    #[arg(long, value_name = "KERNEL")]
    kernel: Option<PathBuf>,
    #[command(flatten)]
    network: Network,
}

/// Builds the image.
pub(crate) fn run(args: &Args, cx: &Context) -> Result<Outcome, CliError> {
    let began = Instant::now();
    let engine = cx.engine_with(args.boot_timeout, &args.plain_http)?;
    let path = match &args.file {
        Some(path) => path.clone(),
        None => find(&args.context)?,
    };
    let spec = BuildSpec {
        file: read(&path)?,
        context: args.context.clone(),
        ignore_files: ignore_files(&path, &args.context),
        name: args.name.as_deref().map(str::parse).transpose()?,
        args: super::machine::environment(cx, &[], &args.build_arg)?,
        target: args.target.clone(),
        cached: !args.no_cache,
        pull: args.pull.policy(),
        // What a build does not reach it cannot install.
        network: if args.network.is_unsaid() {
            NetworkSpec::open()
        } else {
            args.network.spec()?
        },
        cpus: args.cpus,
        memory_mib: args.memory,
        disk_mib: args.disk,
        kernel: kernel_choice(args.kernel.as_deref())?,
    };
    engine.make_data_dir()?;
    let (sender, result) = std::sync::mpsc::channel();
    block_on(async {
        let mut signals = Signals::install()?;
        let out = cx.out;
        prepare::long(cx, &mut signals, move |_, cancel| {
            let mut teller = Teller::new(out);
            let built = engine.build_image(&spec, &mut teller, cancel);
            teller.end_line();
            // Somebody waits for it.
            let _ = sender.send(built?);
            Ok(())
        })
        .await
    })?;
    let built = result.try_recv().map_err(|_| CliError::Interrupted)?;
    prepare::warn(cx, &built.warnings);
    cx.out.status(&format!(
        "built {}, {}, in {}; steps that ran: {}, kept from before: {}",
        built.image.name,
        units::show_bytes(built.image.size_bytes),
        units::show_duration(began.elapsed()),
        built.ran,
        built.cached,
    ));
    cx.out.line(&built.image.name)?;
    Ok(json!({
        "image": image::json(&built.image),
        "replaced": built.replaced,
        "steps": { "ran": built.ran, "cached": built.cached },
        "warnings": built.warnings,
        "duration_ms": units::millis(began.elapsed()),
    })
    .into())
}

/// The file that says what is done.
fn find(context: &Path) -> Result<PathBuf, CliError> {
    let there = DEFAULT_FILES
        .iter()
        .map(|name| context.join(name))
        .find(|path| path.exists());
    there.ok_or_else(|| {
        smolvm_engine::Error::new(
            ErrorKind::NotFound,
            format!(
                "there is neither a Dockerfile nor a smolvm.toml in {}",
                context.display()
            ),
        )
        .hint("name the file with -f")
        .into()
    })
}

fn read(path: &Path) -> Result<BuildFile, CliError> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| CliError::io(format!("reading {}", path.display()), error))?;
    let name = path.file_name().unwrap_or(path.as_os_str());
    let name = name.to_string_lossy();
    let is_toml = path
        .extension()
        .is_some_and(|extension| extension == "toml");
    Ok(if is_toml {
        BuildFile::recipe(&text, &name)?
    } else {
        BuildFile::dockerfile(&text, &name)?
    })
}

/// As Docker looks for them: one that belongs to the file goes first.
fn ignore_files(file: &Path, context: &Path) -> Vec<PathBuf> {
    let mut own = file.as_os_str().to_owned();
    own.push(".dockerignore");
    vec![own.into(), context.join(".dockerignore")]
}

/// Tells a person about a build, on standard error.
struct Teller {
    out: Output,
    meter: Option<Meter>,
    /// Whether a command's output stopped within a line.
    within_line: bool,
}

impl Teller {
    fn new(out: Output) -> Self {
        Self {
            out,
            meter: None,
            within_line: false,
        }
    }

    fn end_line(&mut self) {
        if std::mem::take(&mut self.within_line) {
            output::stderr("");
        }
    }
}

impl Watcher for Teller {
    fn progress(&mut self, progress: &Progress) {
        self.end_line();
        let out = self.out;
        // Plain lines: a bar and the output of commands would write over each other.
        self.meter
            .get_or_insert_with(|| Meter::new(out, false))
            .progress(progress);
    }
}

impl BuildWatcher for Teller {
    fn step(&mut self, step: &BuildStep<'_>) {
        self.end_line();
        self.meter = None;
        let cached = if step.cached {
            " (kept from before)"
        } else {
            ""
        };
        // The file may be a stranger's.
        let text = step.text.replace(char::is_control, " ");
        self.out
            .status(&format!("[{}/{}] {text}{cached}", step.number, step.total));
    }

    fn output(&mut self, bytes: &[u8], _: bool) {
        if self.out.quiet || self.out.json || bytes.is_empty() {
            return;
        }
        // If nobody reads any more, the build goes on all the same.
        let _ = output::stderr_bytes(bytes);
        self.within_line = bytes.last() != Some(&b'\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ignore_file_of_the_dockerfile_goes_first() {
        assert_eq!(
            ignore_files(Path::new("d/Own"), Path::new("c")),
            [
                Path::new("d/Own.dockerignore"),
                Path::new("c/.dockerignore")
            ]
        );
    }

    #[test]
    fn what_lies_in_the_context_is_found() {
        let dir = tempfile::tempdir().expect("a directory");
        assert!(find(dir.path()).is_err());
        for name in ["smolvm.toml", "Dockerfile"] {
            std::fs::write(dir.path().join(name), "").expect("a file");
            assert_eq!(find(dir.path()).expect("found"), dir.path().join(name));
        }
    }
}

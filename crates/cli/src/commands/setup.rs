//! `smolvm setup`: everything a host needs for its first sandbox.

use std::time::Instant;

use serde_json::{Value, json};
use smolvm_engine::{
    DEFAULT_IMAGE, Engine, FirecrackerInstalled, FirecrackerRelease, FirecrackerSource,
    KernelChoice, MissingPackage,
};

use super::{Context, Outcome, block_on};
use crate::prepare::{self, Timed};
use crate::report::CliError;
use crate::signals::Signals;
use crate::units;

/// Arguments of `setup`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sudo smolvm setup --yes
  smolvm setup --firecracker                  # from the project's releases
  smolvm setup --firecracker=1.12.0 --from https://mirror.example/firecracker
  smolvm setup --firecracker --from ~/Downloads/firecracker-v1.16.1-x86_64.tgz")]
pub(crate) struct Args {
    /// Only say what is missing; exit 1 if anything is
    #[arg(long)]
    check_only: bool,
    /// Image to prepare
    #[arg(long, default_value = DEFAULT_IMAGE)]
    image: String,
    /// Do not ask before installing packages
    #[arg(short, long)]
    yes: bool,
    /// Also put a release of Firecracker into the data directory; the recommended one if no
    /// version is given
    #[arg(
        long,
        value_name = "VERSION",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = ""
    )]
    firecracker: Option<String>,
    /// Where to take it from: an archive, or the URL of one or of a copy of all releases
    #[arg(long, value_name = "URL|FILE", requires = "firecracker")]
    from: Option<String>,
    /// Checksum of the archive of a release that is not known
    #[arg(long, value_name = "HEX", requires = "firecracker")]
    sha256: Option<String>,
}

/// A release of Firecracker that is wanted, and where it comes from.
#[derive(Debug, Clone)]
struct Wanted {
    release: FirecrackerRelease,
    source: FirecrackerSource,
}

impl Args {
    fn wanted(&self) -> Result<Option<Wanted>, CliError> {
        let Some(version) = self.firecracker.as_deref() else {
            return Ok(None);
        };
        let version = Some(version).filter(|version| !version.is_empty());
        let release = Engine::firecracker_release(version, self.sha256.as_deref())?;
        let source = self.from.as_deref();
        Ok(Some(Wanted {
            release,
            source: source.map_or(FirecrackerSource::Upstream, FirecrackerSource::from_text),
        }))
    }
}

/// Prepares the host.
pub(crate) fn run(args: &Args, cx: &Context) -> Result<Outcome, CliError> {
    let began = Instant::now();
    let wanted = args.wanted()?;
    let engine = cx.engine(None)?;
    let mut assets = engine.missing_assets(&args.image, &KernelChoice::Stock, true)?;
    let packages = engine.missing_packages_for(&assets);
    if let Some(Wanted { release, .. }) = &wanted
        && !has(&engine, release)
    {
        assets.push(format!("Firecracker {}", release.version()));
    }
    for missing in &packages {
        cx.out.line(&format!(
            "missing: {} (package {}), {}",
            missing.program, missing.package, missing.why
        ))?;
    }
    if args.check_only {
        for asset in &assets {
            cx.out.line(&format!("missing: {asset}"))?;
        }
        return Ok(check(args, &packages, &assets));
    }
    if !packages.is_empty() {
        may_install(args, cx, &packages)?;
    }
    let installed = names(&packages);
    let phases = block_on(async {
        let mut signals = Signals::install()?;
        let mut phases = install(cx, &engine, &mut signals, installed.clone()).await?;
        if let Some(wanted) = wanted.clone() {
            phases.extend(fetch(cx, &engine, &mut signals, wanted).await?);
        }
        phases.extend(
            prepare::image(
                cx,
                &engine,
                &mut signals,
                &args.image,
                &KernelChoice::Stock,
                true,
            )
            .await?,
        );
        Ok(phases)
    })?;
    for (phase, time) in &phases {
        cx.out
            .line(&format!("{:>8}  {phase}", units::show_duration(*time)))?;
    }
    cx.out.line(&if phases.is_empty() {
        "ready; nothing was missing".to_owned()
    } else {
        format!("ready after {}", units::show_duration(began.elapsed()))
    })?;
    let firecracker = wanted.and_then(|wanted| release(&engine, &wanted.release));
    if let Some(there) = &firecracker {
        let path = there.firecracker.display();
        cx.out
            .line(&format!("Firecracker {}: {path}", there.version))?;
    }
    Ok(json!({
        "ready": true,
        "firecracker": firecracker.map(|there| json!({
            "version": there.version,
            "firecracker": there.firecracker,
            "jailer": there.jailer,
        })),
        "image": args.image,
        "installed_packages": installed,
        "prepared": assets,
        "phases": prepare::phases(&phases),
        "duration_ms": units::millis(began.elapsed()),
    })
    .into())
}

/// The release, if it is in the data directory.
fn release(engine: &Engine, wanted: &FirecrackerRelease) -> Option<FirecrackerInstalled> {
    let mut there = engine.firecracker_releases().into_iter();
    there.find(|one| one.version == wanted.version())
}

fn has(engine: &Engine, wanted: &FirecrackerRelease) -> bool {
    release(engine, wanted).is_some()
}

async fn fetch(
    cx: &Context,
    engine: &Engine,
    signals: &mut Signals,
    wanted: Wanted,
) -> Result<Timed, CliError> {
    if has(engine, &wanted.release) {
        return Ok(Timed::new());
    }
    cx.out.status(&format!(
        "fetching Firecracker {}",
        wanted.release.version()
    ));
    let engine = engine.clone();
    prepare::long(cx, signals, move |meter, cancel| {
        engine
            .install_firecracker(&wanted.release, &wanted.source, meter, cancel)
            .map(drop)
    })
    .await
}

/// The distinct packages, in order.
fn names(packages: &[MissingPackage]) -> Vec<String> {
    let mut names: Vec<String> = packages
        .iter()
        .map(|missing| missing.package.clone())
        .collect();
    names.sort();
    names.dedup();
    names
}

fn command(packages: &[MissingPackage]) -> String {
    format!(
        "sudo apt-get install --yes --no-install-recommends {}",
        names(packages).join(" ")
    )
}

fn check(args: &Args, packages: &[MissingPackage], assets: &[String]) -> Outcome {
    let data = json!({
        "ready": packages.is_empty() && assets.is_empty(),
        "image": args.image,
        "missing_packages": packages
            .iter()
            .map(|missing| json!({
                "program": missing.program,
                "package": missing.package,
                "why": missing.why,
            }))
            .collect::<Vec<Value>>(),
        "missing_assets": assets,
    });
    let hint = match (packages, assets) {
        ([], []) => return data.into(),
        ([], _) => "smolvm setup".to_owned(),
        _ => command(packages),
    };
    let error = CliError::Missing {
        message: "this host is not ready".to_owned(),
        hint,
    };
    Outcome {
        data,
        error: Some(error),
    }
}

/// Whether we can and may install.
fn may_install(args: &Args, cx: &Context, packages: &[MissingPackage]) -> Result<(), CliError> {
    let refused = |message: &str| {
        Err(CliError::Missing {
            message: message.to_owned(),
            hint: command(packages),
        })
    };
    if !rustix::process::geteuid().is_root() {
        return refused("packages are missing, and only root can install them");
    }
    let ask = !args.yes && cx.world.stdin_terminal && cx.world.stderr_terminal && !cx.out.json;
    if ask
        && !cx
            .out
            .confirm(&format!("Install {}?", names(packages).join(", ")))?
    {
        return refused("packages are missing and were not installed");
    }
    Ok(())
}

async fn install(
    cx: &Context,
    engine: &Engine,
    signals: &mut Signals,
    packages: Vec<String>,
) -> Result<Timed, CliError> {
    if packages.is_empty() {
        return Ok(Timed::new());
    }
    cx.out
        .status(&format!("installing {}", packages.join(", ")));
    let engine = engine.clone();
    prepare::long(cx, signals, move |meter, cancel| {
        engine.install_packages(
            &packages,
            &mut |doing| meter.show("installing packages", None, doing),
            cancel,
        )
    })
    .await
}

//! `smolvm setup`: everything a host needs for its first sandbox.

use std::time::Instant;

use serde_json::{Value, json};
use smolvm_engine::{DEFAULT_IMAGE, Engine, KernelChoice, MissingPackage};

use super::{Context, Outcome, block_on};
use crate::prepare::{self, Timed};
use crate::report::CliError;
use crate::signals::Signals;
use crate::units;

/// Arguments of `setup`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  sudo smolvm setup --yes")]
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
}

/// Prepares the host.
pub(crate) fn run(args: &Args, cx: &Context) -> Result<Outcome, CliError> {
    let began = Instant::now();
    let engine = cx.engine(None)?;
    let packages = engine.missing_packages();
    let assets = engine.missing_assets(&args.image, &KernelChoice::Stock, true)?;
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
    Ok(json!({
        "ready": true,
        "image": args.image,
        "installed_packages": installed,
        "prepared": assets,
        "phases": prepare::phases(&phases),
        "duration_ms": units::millis(began.elapsed()),
    })
    .into())
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

//! `smolvm kernel`: the kernels guests boot.

use std::time::Instant;

use serde_json::{Value, json};
use smolvm_engine::KernelInfo;

use super::tally::Tally;
use super::{Context, Outcome, block_on};
use crate::prepare;
use crate::report::CliError;
use crate::signals::Signals;
use crate::units;

/// Arguments of `kernel build`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  smolvm kernel build

Compiles the source package of this distribution's kernel with little in it, as any user and without
installing it, and boots the result once before it is kept. Sandboxes created from then on boot it:
faster, and busy less, which matters most where guests are emulated. It takes minutes, 140 MB of
download and, while it lasts, 1.2 GB of disk.")]
pub(crate) struct BuildArgs {
    /// Also put in what Docker and other container engines need in a guest
    #[arg(long)]
    docker: bool,
    /// Compilers to run at once [default: as many as this host has CPUs]
    #[arg(short, long, value_name = "COUNT")]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=1024))]
    jobs: Option<u16>,
}

/// Arguments of `kernel ls`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  smolvm kernel ls")]
pub(crate) struct ListArgs {}

/// Arguments of `kernel rm`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  smolvm kernel rm small-6.1.192-2-0a1b2c3d")]
pub(crate) struct RemoveArgs {
    /// Its key, as `smolvm kernel ls` shows it
    #[arg(required = true, value_name = "KEY")]
    keys: Vec<String>,
}

/// Builds a small kernel.
pub(crate) fn build(args: &BuildArgs, cx: &Context) -> Result<Outcome, CliError> {
    let began = Instant::now();
    let engine = cx.engine(None)?;
    let cores = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let jobs = args.jobs.map_or_else(cores, usize::from);
    let docker = args.docker;
    let (done, phases) = block_on(async {
        let mut signals = Signals::install()?;
        let (sender, receiver) = std::sync::mpsc::channel();
        let phases = prepare::long(cx, &mut signals, move |meter, cancel| {
            let done = engine.build_kernel(docker, jobs, meter, cancel)?;
            // Received below, when this has ended.
            let _ = sender.send(done);
            Ok(())
        })
        .await?;
        let done = receiver
            .recv()
            .map_err(|error| CliError::io("building the kernel", std::io::Error::other(error)))?;
        Ok((done, phases))
    })?;
    if done.built {
        for (phase, time) in &phases {
            cx.out
                .line(&format!("{:>8}  {phase}", units::show_duration(*time)))?;
        }
    }
    cx.out.line(&if done.built {
        format!(
            "built {} after {}",
            done.kernel.key,
            units::show_duration(began.elapsed())
        )
    } else {
        format!("{} is there already", done.kernel.key)
    })?;
    Ok(json!({
        "built": done.built,
        "kernel": object(&done.kernel),
        "phases": prepare::phases(&phases),
        "duration_ms": units::millis(began.elapsed()),
    })
    .into())
}

/// Lists the kernels on this host.
pub(crate) fn list(_: &ListArgs, cx: &Context) -> Result<Outcome, CliError> {
    let kernels = cx.engine(None)?.kernels()?;
    cx.out.table(
        &["KEY", "RELEASE", "SIZE", "DEFAULT", "SANDBOXES", "SOURCE"],
        kernels
            .iter()
            .map(|kernel| {
                vec![
                    kernel.key.clone(),
                    kernel.release.clone(),
                    units::show_bytes(kernel.size_bytes),
                    if kernel.is_default { "yes" } else { "" }.to_owned(),
                    kernel.used_by.len().to_string(),
                    match &kernel.damage {
                        Some(_) => "damaged: see `smolvm kernel rm`".to_owned(),
                        None => kernel.source.clone(),
                    },
                ]
            })
            .collect(),
    )?;
    let kernels: Vec<_> = kernels.iter().map(object).collect();
    Ok(json!({ "kernels": kernels }).into())
}

/// Removes kernels.
pub(crate) fn remove(args: &RemoveArgs, cx: &Context) -> Result<Outcome, CliError> {
    let engine = cx.engine(None)?;
    let mut tally = Tally::of(&args.keys);
    for key in tally.names() {
        let result = engine.remove_kernel(&key);
        tally.note(cx, key, result)?;
    }
    let data = json!({ "removed": tally.done, "failed": tally.failed });
    Ok(tally.outcome(data, "kernels were not removed"))
}

fn object(kernel: &KernelInfo) -> Value {
    json!({
        "key": kernel.key,
        "release": kernel.release,
        "source": kernel.source,
        "size_bytes": kernel.size_bytes,
        "default": kernel.is_default,
        "sandboxes": kernel.used_by,
        "damage": kernel.damage,
    })
}

//! `smolvm create`: a sandbox that stays.

use std::path::PathBuf;

use serde_json::json;

use super::machine::{self, Machine};
use super::{Context, Outcome, block_on, port};
use crate::prepare;
use crate::report::CliError;
use crate::signals::Signals;

/// Arguments of `create`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  smolvm create --name box --memory 1G

Prints the sandbox's name. With --publish, also on standard error what is published where.")]
pub(crate) struct Args {
    /// Create it only; `smolvm start` starts it
    #[arg(long)]
    no_start: bool,
    /// Do not let it be reached by SSH
    #[arg(long, conflicts_with = "ssh_key", help_heading = "Sandbox")]
    no_ssh: bool,
    /// File of a public key that opens it by SSH, beside yours; can be repeated
    #[arg(long, value_name = "FILE", help_heading = "Sandbox")]
    ssh_key: Vec<PathBuf>,
    #[command(flatten)]
    machine: Machine,
}

/// Creates the sandbox, and starts it.
pub(crate) fn run(args: &Args, cx: &Context) -> Result<Outcome, CliError> {
    let engine = cx.engine_with(args.machine.boot_timeout, &args.machine.plain_http)?;
    let mut spec = args.machine.spec(cx, &engine)?;
    if !args.no_ssh {
        spec.ssh = Some(machine::ssh(&args.ssh_key)?);
    }
    let (info, warnings) = block_on(async {
        let mut signals = Signals::install()?;
        prepare::pull(cx, &engine, &mut signals, &spec.image, args.machine.pull()).await?;
        prepare::image(
            cx,
            &engine,
            &mut signals,
            &spec.image,
            &spec.kernel,
            spec.network.needs_device(),
        )
        .await?;
        if args.no_start {
            return Ok((args.machine.create(&engine, &mut spec)?, Vec::new()));
        }
        prepare::note_emulation(cx, &engine);
        let claimed = args.machine.claim_or_create(&engine, &mut spec).await?;
        let name = spec.name.as_str();
        let mut warnings = Vec::new();
        if claimed.is_none() {
            match signals.or_interrupted(engine.start(name)).await {
                Ok((_, times)) => warnings = times.warnings,
                Err(error) => {
                    // What was asked for is a running sandbox; half of it would only be in the way.
                    // The console is in the error, and what went wrong first is what counts.
                    let _ = signals.or_interrupted(engine.delete(name)).await;
                    return Err(error);
                }
            }
        }
        Ok((engine.info(name)?, warnings))
    })?;
    prepare::warn(cx, &warnings);
    let name = info.name.as_str();
    cx.out.line(name)?;
    port::note(cx, &info.ports);
    Ok(json!({
        "vm": {
            "name": name,
            "status": info.state.as_str(),
            "os": info.image,
            "started_at": info.started_at,
            "ports": port::describe_all(&info.ports),
        },
        "next": {
            "shell_command": format!("smolvm shell {name}"),
            "ssh_command": info.ssh_port.map(|_| format!("smolvm ssh {name}")),
            "desktop_command": null,
            "info_command": format!("smolvm info {name}"),
        },
        "warnings": warnings,
    })
    .into())
}

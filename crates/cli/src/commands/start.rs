//! `smolvm start`: a stopped sandbox runs again.

use std::time::Duration;

use clap_complete::engine::ArgValueCandidates;
use serde_json::json;

use super::{Context, Outcome, block_on};
use crate::report::CliError;
use crate::signals::Signals;
use crate::{complete, prepare, units};

/// Arguments of `start`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  smolvm start box")]
pub(crate) struct Args {
    /// The sandbox
    #[arg(add = ArgValueCandidates::new(complete::sandboxes))]
    name: String,
    /// Most time to boot [default: 1m]
    #[arg(long, value_name = "TIME", value_parser = units::boot_limit)]
    boot_timeout: Option<Duration>,
}

/// Starts the sandbox; one that runs already is left alone.
pub(crate) fn run(args: &Args, cx: &Context) -> Result<Outcome, CliError> {
    let engine = cx.engine(args.boot_timeout)?;
    let name = engine.info(&args.name)?.name;
    let (info, times) = block_on(async {
        let mut signals = Signals::install()?;
        prepare::note_emulation(cx, &engine);
        match signals.or_interrupted(engine.start(name.as_str())).await {
            Ok((_, times)) => Ok((engine.info(name.as_str())?, times)),
            Err(CliError::Interrupted) => {
                // It did not run before, so it does not run now.
                signals
                    .or_interrupted(engine.stop(name.as_str(), Duration::ZERO))
                    .await?;
                Err(CliError::Interrupted)
            }
            Err(error) => Err(error),
        }
    })?;
    prepare::warn(cx, &times.warnings);
    cx.out.line(name.as_str())?;
    Ok(json!({
        "vm": {
            "name": name.as_str(),
            "status": info.state.as_str(),
            "os": info.image,
            "started_at": info.started_at,
        },
        "ready_ms": units::millis(times.ready),
        "warnings": times.warnings,
    })
    .into())
}

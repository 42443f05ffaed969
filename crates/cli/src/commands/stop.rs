//! `smolvm stop`: a sandbox stops and keeps its disk.

use std::time::Duration;

use clap_complete::engine::ArgValueCandidates;
use serde_json::json;

use super::{Context, Outcome, block_on};
use crate::report::CliError;
use crate::{complete, units};

/// Arguments of `stop`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  smolvm stop box --timeout 5s")]
pub(crate) struct Args {
    /// The sandbox
    #[arg(add = ArgValueCandidates::new(complete::sandboxes))]
    name: String,
    /// How long the guest may take before it is killed
    #[arg(long, value_name = "TIME", value_parser = units::duration, default_value = "10s")]
    timeout: Duration,
    /// Kill it at once; what it has not written is lost
    #[arg(long, conflicts_with = "timeout")]
    now: bool,
}

/// Stops the sandbox; one that is stopped already is left alone.
pub(crate) fn run(args: &Args, cx: &Context) -> Result<Outcome, CliError> {
    let engine = cx.engine(None)?;
    let name = engine.info(&args.name)?.name;
    let grace = if args.now {
        Duration::ZERO
    } else {
        args.timeout
    };
    let killed = block_on(async { Ok(engine.stop(name.as_str(), grace).await?) })?;
    if killed && !args.now {
        cx.out.status(&format!(
            "`{name}` did not stop within {} and was killed",
            units::show_duration(grace)
        ));
    }
    cx.out.line(name.as_str())?;
    // An ephemeral sandbox is gone with its stop.
    let status = engine
        .info(name.as_str())
        .map_or("deleted", |info| info.state.as_str());
    Ok(json!({ "vm": { "name": name.as_str(), "status": status }, "killed": killed }).into())
}

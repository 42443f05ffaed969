//! `smolvm sandbox resize`: more room in a sandbox.

use clap_complete::engine::ArgValueCandidates;
use serde_json::json;

use super::{Context, Outcome, block_on};
use crate::report::CliError;
use crate::signals::Signals;
use crate::{complete, units};

/// Arguments of `sandbox resize`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  smolvm sandbox resize box --disk 8G

At once if the sandbox runs, else at its next start. A disk is never made smaller.")]
pub(crate) struct Args {
    /// The sandbox
    #[arg(add = ArgValueCandidates::new(complete::sandboxes))]
    name: String,
    /// Room for changes to its root file system: 8192 (MiB) or 8G
    #[arg(long, alias = "disk-size", value_name = "SIZE", value_parser = units::mib)]
    disk: u32,
}

/// Makes the disk larger.
pub(crate) fn run(args: &Args, cx: &Context) -> Result<Outcome, CliError> {
    let engine = cx.engine(None)?;
    block_on(async {
        let mut signals = Signals::install()?;
        signals
            .or_interrupted(engine.grow_disk(&args.name, args.disk))
            .await
    })?;
    cx.out.line(&args.name)?;
    Ok(json!({ "vm": { "name": args.name, "disk_size": args.disk } }).into())
}

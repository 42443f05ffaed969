//! `smolvm pause` and `smolvm resume`: sandboxes stand still, and go on.

use clap_complete::engine::ArgValueCandidates;
use serde_json::json;

use super::tally::Tally;
use super::{Context, Outcome, block_on};
use crate::complete;
use crate::report::CliError;

/// Arguments of `pause`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  smolvm pause box")]
pub(crate) struct PauseArgs {
    /// The sandboxes
    #[arg(required = true, value_name = "NAME", add = ArgValueCandidates::new(complete::sandboxes))]
    names: Vec<String>,
}

/// Arguments of `resume`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  smolvm resume box")]
pub(crate) struct ResumeArgs {
    /// The sandboxes
    #[arg(required = true, value_name = "NAME", add = ArgValueCandidates::new(complete::sandboxes))]
    names: Vec<String>,
}

/// Pauses the sandboxes; those that are paused already are left alone.
pub(crate) fn pause(args: &PauseArgs, cx: &Context) -> Result<Outcome, CliError> {
    each(cx, &args.names, true)
}

/// Lets the sandboxes go on; those that run already are left alone.
pub(crate) fn resume(args: &ResumeArgs, cx: &Context) -> Result<Outcome, CliError> {
    each(cx, &args.names, false)
}

/// One after the other; one that fails is told, and keeps nobody from the next.
fn each(cx: &Context, names: &[String], pause: bool) -> Result<Outcome, CliError> {
    let engine = cx.engine(None)?;
    let mut tally = Tally::of(names);
    block_on(async {
        for name in tally.names() {
            let result = if pause {
                engine.pause(&name).await
            } else {
                engine.resume(&name).await
            };
            tally.note(cx, name, result)?;
        }
        Ok(())
    })?;
    let status = if pause { "paused" } else { "running" };
    let vms: Vec<_> = tally
        .done
        .iter()
        .map(|name| json!({ "name": name, "status": status }))
        .collect();
    let data = json!({ "vms": vms, "failed": tally.failed });
    let what = format!(
        "sandboxes were not {}",
        if pause { "paused" } else { "resumed" }
    );
    Ok(tally.outcome(data, &what))
}

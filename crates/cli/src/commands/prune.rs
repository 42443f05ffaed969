//! `smolvm prune`: what nothing needs any more, gone.

use serde_json::json;

use super::{Context, Outcome, block_on};
use crate::report::CliError;
use crate::units;

/// Arguments of `prune`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  smolvm prune --dry-run")]
pub(crate) struct Args {
    /// Only say what would be removed
    #[arg(long)]
    dry_run: bool,
    /// Also delete sandboxes that are stopped
    #[arg(long)]
    stopped: bool,
    /// Do not ask whether stopped sandboxes are meant
    #[arg(short, long, alias = "yes")]
    force: bool,
}

/// Removes leftovers.
pub(crate) fn run(args: &Args, cx: &Context) -> Result<Outcome, CliError> {
    let engine = cx.engine(None)?;
    if args.stopped && !args.dry_run && !args.force {
        let asked = cx.world.stdin_terminal && cx.world.stderr_terminal && !cx.out.json;
        if !(asked && cx.out.confirm("Delete every stopped sandbox?")?) {
            return Err(CliError::Refused {
                message: "stopped sandboxes were not deleted".to_owned(),
                hint: "add --force to delete them, or --dry-run to see which".to_owned(),
            });
        }
    }
    let pruned = block_on(async { Ok(engine.prune(args.dry_run, args.stopped).await?) })?;
    for thing in &pruned {
        cx.out.line(&format!(
            "{} {} ({})",
            thing.kind,
            thing.name,
            units::show_bytes(thing.bytes)
        ))?;
    }
    let bytes: u64 = pruned.iter().map(|thing| thing.bytes).sum();
    let verb = if args.dry_run {
        "would be removed"
    } else {
        "removed"
    };
    cx.out.status(&format!(
        "{} {verb}, {}",
        pruned.len(),
        units::show_bytes(bytes)
    ));
    Ok(json!({
        "dry_run": args.dry_run,
        "pruned": pruned
            .iter()
            .map(|thing| json!({ "kind": thing.kind, "name": thing.name, "bytes": thing.bytes }))
            .collect::<Vec<_>>(),
        "bytes": bytes,
    })
    .into())
}

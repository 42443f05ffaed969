//! `smolvm prune`: what nothing needs any more, gone.

use serde_json::json;
use smolvm_engine::Stranger;

use super::{Context, Outcome, block_on};
use crate::report::CliError;
use crate::{prepare, units};

/// Arguments of `prune`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  smolvm prune --dry-run

What a running machine uses stays, also where the database does not know of it; that is told, with
the way to end it.")]
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
    let report = block_on(async { Ok(engine.prune(args.dry_run, args.stopped).await?) })?;
    let pruned = report.pruned;
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
    prepare::warn(cx, &report.strangers.iter().map(kept).collect::<Vec<_>>());
    Ok(json!({
        "dry_run": args.dry_run,
        "pruned": pruned
            .iter()
            .map(|thing| json!({ "kind": thing.kind, "name": thing.name, "bytes": thing.bytes }))
            .collect::<Vec<_>>(),
        "bytes": bytes,
        "kept": report
            .strangers
            .iter()
            .map(|stranger| json!({
                "path": stranger.path,
                "name": stranger.name,
                "keeper_pid": stranger.keeper_pid,
                "because": kept(stranger),
            }))
            .collect::<Vec<_>>(),
    })
    .into())
}

/// Why a directory stays, and what to do.
fn kept(stranger: &Stranger) -> String {
    let name = match &stranger.name {
        Some(name) => format!("sandbox `{name}`"),
        None => "a sandbox".to_owned(),
    };
    let end = match stranger.keeper_pid {
        Some(pid) => format!("`kill {pid}`"),
        None => "the end of the process that holds its lock".to_owned(),
    };
    format!(
        "kept {}: {name} runs there, though the database does not know it; put the database back, or end \
         it by {end} and prune again",
        stranger.path.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stays_is_named_with_the_way_to_end_it() {
        let mut stranger = Stranger {
            path: "/data/sandboxes/1".into(),
            name: Some("box".to_owned()),
            keeper_pid: Some(7),
        };
        assert_eq!(
            kept(&stranger),
            "kept /data/sandboxes/1: sandbox `box` runs there, though the database does not know it; put \
             the database back, or end it by `kill 7` and prune again"
        );
        (stranger.name, stranger.keeper_pid) = (None, None);
        assert!(kept(&stranger).contains("a sandbox runs there"));
    }
}

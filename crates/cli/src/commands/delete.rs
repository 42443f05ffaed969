//! `smolvm rm`: sandboxes and all they own, gone.

use std::rc::Rc;

use clap_complete::engine::ArgValueCandidates;
use serde_json::json;
use tokio::sync::Semaphore;
use tokio::task::{JoinSet, LocalSet};

use super::{Context, Outcome, block_on};
use crate::complete;
use crate::output;
use crate::report::CliError;

/// Sandboxes deleted at the same time.
const AT_ONCE: usize = 8;

/// Arguments of `delete`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  smolvm rm box other\n  smolvm rm --all")]
#[command(group(clap::ArgGroup::new("which").args(["names", "all"]).required(true)))]
pub(crate) struct Args {
    /// The sandboxes
    #[arg(value_name = "NAME")]
    #[arg(add = ArgValueCandidates::new(complete::sandboxes))]
    names: Vec<String>,
    /// All of them
    #[arg(long)]
    all: bool,
    /// Do not ask whether all of them is meant
    #[arg(short, long, alias = "yes")]
    force: bool,
    /// Only say what would be deleted
    #[arg(long)]
    dry_run: bool,
}

/// Deletes the sandboxes.
pub(crate) fn run(args: &Args, cx: &Context) -> Result<Outcome, CliError> {
    let engine = cx.engine(None)?;
    let targets: Vec<String> = if args.all {
        engine
            .list()?
            .into_iter()
            .map(|sandbox| sandbox.name.to_string())
            .collect()
    } else {
        let mut names = Vec::new();
        for name in &args.names {
            if !names.contains(name) {
                names.push(name.clone());
            }
        }
        names
    };
    if args.all && !args.dry_run && !args.force && !targets.is_empty() {
        sure(cx, targets.len())?;
    }
    let results = if args.dry_run {
        targets
            .iter()
            .map(|name| (name.clone(), engine.info(name).map(drop)))
            .collect()
    } else {
        block_on(delete_all(&engine, &targets))?
    };
    let mut deleted = Vec::new();
    let mut failed = Vec::new();
    let mut only = None;
    for (name, result) in results {
        match result {
            Ok(()) => {
                cx.out.line(&name)?;
                deleted.push(name);
            }
            Err(error) => {
                let error = CliError::from(error);
                failed.push(json!({ "name": name, "error": error.json() }));
                if targets.len() == 1 {
                    only = Some(error);
                } else if !cx.out.json {
                    output::stderr_raw(&error.text());
                }
            }
        }
    }
    // Of one, its own error says all there is to say.
    let error = only.or_else(|| {
        (!failed.is_empty()).then(|| {
            CliError::Partly(format!(
                "{} of {} sandboxes were not deleted",
                failed.len(),
                targets.len()
            ))
        })
    });
    Ok(Outcome {
        data: json!({
            "targets": targets,
            "deleted": if args.dry_run { &[][..] } else { &deleted[..] },
            "failed": failed,
            "summary": {
                "requested": targets.len(),
                "deleted": if args.dry_run { 0 } else { deleted.len() },
                "failed": failed.len(),
            },
            "dry_run": args.dry_run,
            "reconciled_stale_ids": [],
        }),
        error,
    })
}

/// Asks whether all of them is meant.
fn sure(cx: &Context, count: usize) -> Result<(), CliError> {
    let asked = cx.world.stdin_terminal && cx.world.stderr_terminal && !cx.out.json;
    if asked && cx.out.confirm(&format!("Delete all {count} sandboxes?"))? {
        return Ok(());
    }
    Err(CliError::Refused {
        message: format!("{count} sandboxes were not deleted"),
        hint: "add --force to delete all of them, or --dry-run to see which".to_owned(),
    })
}

/// Deletes several at a time, and answers in the order they were named.
async fn delete_all(
    engine: &smolvm_engine::Engine,
    names: &[String],
) -> Result<Vec<(String, smolvm_engine::Result<()>)>, CliError> {
    let local = LocalSet::new();
    let turns = Rc::new(Semaphore::new(AT_ONCE));
    let mut jobs = JoinSet::new();
    for (index, name) in names.iter().enumerate() {
        let (engine, name, turns) = (engine.clone(), name.clone(), Rc::clone(&turns));
        jobs.spawn_local_on(
            async move {
                // The semaphore is never closed.
                let _turn = turns.acquire().await;
                let result = engine.delete(&name).await;
                (index, name, result)
            },
            &local,
        );
    }
    let mut done = local.run_until(jobs.join_all()).await;
    done.sort_by_key(|(index, _, _)| *index);
    Ok(done
        .into_iter()
        .map(|(_, name, result)| (name, result))
        .collect())
}

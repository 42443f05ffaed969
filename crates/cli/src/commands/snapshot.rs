//! `smolvm snapshot`: sandboxes saved as they run, to start others from.

use clap_complete::engine::ArgValueCandidates;
use serde_json::{Value, json};
use smolvm_engine::layout::SavedMachine;
use smolvm_engine::{SandboxName, SnapshotInfo};

use super::tally::Tally;
use super::{Context, Outcome, block_on};
use crate::report::CliError;
use crate::signals::Signals;
use crate::{complete, units};

/// Arguments of `snapshot create`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  smolvm snapshot create box --name before

Prints the snapshot's name. The sandbox stands still while what it has written is copied, and goes
on as it was, running or paused.")]
pub(crate) struct CreateArgs {
    /// The sandbox
    #[arg(add = ArgValueCandidates::new(complete::sandboxes))]
    sandbox: String,
    /// Name of the snapshot [default: the sandbox's with a number]
    #[arg(short, long, alias = "snapshot-id")]
    name: Option<String>,
}

/// Arguments of `snapshot list`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  smolvm snapshot ls")]
pub(crate) struct ListArgs {}

/// Arguments of `snapshot restore`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  smolvm snapshot restore before --name again

Prints the new sandbox's name. A snapshot may be restored any number of times, also at once. Where
the sandbox it was taken of had a --ttl, the new one has the same, from its own start.")]
pub(crate) struct RestoreArgs {
    /// The snapshot
    #[arg(add = ArgValueCandidates::new(complete::snapshots))]
    snapshot: String,
    /// Name of the new sandbox [default: generated]
    #[arg(short, long)]
    name: Option<String>,
}

/// Arguments of `snapshot delete`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  smolvm snapshot rm before")]
pub(crate) struct DeleteArgs {
    /// The snapshots
    #[arg(required = true, value_name = "NAME", add = ArgValueCandidates::new(complete::snapshots))]
    names: Vec<String>,
}

/// Takes a snapshot.
pub(crate) fn create(args: &CreateArgs, cx: &Context) -> Result<Outcome, CliError> {
    let engine = cx.engine(None)?;
    let info = block_on(async {
        let mut signals = Signals::install()?;
        let name = args.name.as_deref();
        signals
            .or_interrupted(engine.snapshot(&args.sandbox, name))
            .await
    })?;
    cx.out.line(&info.name)?;
    if let Some(paused) = info.paused {
        cx.out.status(&format!(
            "`{}` stood still for {:.0} ms; the snapshot takes {}",
            info.sandbox,
            units::millis(paused),
            units::show_bytes(info.size_bytes)
        ));
    }
    let mut data = describe(&info);
    data["paused_ms"] = json!(info.paused.map(units::millis));
    Ok(data.into())
}

/// Lists the snapshots.
pub(crate) fn list(_: &ListArgs, cx: &Context) -> Result<Outcome, CliError> {
    let snapshots = cx.engine(None)?.snapshots()?;
    let now = jiff::Timestamp::now();
    cx.out.table(
        &[
            "NAME", "SANDBOX", "IMAGE", "CPUS", "MEMORY", "SIZE", "CREATED",
        ],
        snapshots
            .iter()
            .map(|snapshot| {
                vec![
                    snapshot.name.clone(),
                    snapshot.sandbox.clone(),
                    snapshot.image.clone(),
                    snapshot.cpus.to_string(),
                    units::show_mib(snapshot.memory_mib),
                    units::show_bytes(snapshot.size_bytes),
                    units::show_age(snapshot.created_at, now),
                ]
            })
            .collect(),
    )?;
    let snapshots: Vec<_> = snapshots.iter().map(describe).collect();
    Ok(json!({ "snapshots": snapshots }).into())
}

/// Starts a sandbox from a snapshot.
pub(crate) fn restore(args: &RestoreArgs, cx: &Context) -> Result<Outcome, CliError> {
    let engine = cx.engine(None)?;
    let name: SandboxName = match &args.name {
        Some(name) => name.parse()?,
        None => engine.unused_name()?,
    };
    let times = block_on(async {
        let mut signals = Signals::install()?;
        let restored = engine.restore(&args.snapshot, &name);
        match signals.or_interrupted(restored).await {
            Ok((_, times)) => Ok(times),
            Err(CliError::Interrupted) => {
                // What went wrong first is what counts.
                let _ = signals.or_interrupted(engine.delete(name.as_str())).await;
                Err(CliError::Interrupted)
            }
            Err(error) => Err(error),
        }
    })?;
    cx.out.line(name.as_str())?;
    Ok(json!({
        "snapshot_id": args.snapshot,
        "restored": true,
        "restored_vm_id": name.as_str(),
        "ready_ms": units::millis(times.ready),
    })
    .into())
}

/// Deletes snapshots; one that fails is told, and keeps nobody from the next.
pub(crate) fn delete(args: &DeleteArgs, cx: &Context) -> Result<Outcome, CliError> {
    let engine = cx.engine(None)?;
    let mut tally = Tally::of(&args.names);
    for name in tally.names() {
        let result = engine.remove_snapshot(&name);
        tally.note(cx, name, result)?;
    }
    let data = json!({ "deleted": tally.done, "failed": tally.failed });
    Ok(tally.outcome(data, "snapshots were not deleted"))
}

fn describe(snapshot: &SnapshotInfo) -> Value {
    let files = SavedMachine::new(snapshot.path.clone());
    json!({
        "snapshot_id": snapshot.name,
        "vm_id": snapshot.sandbox,
        "backend": snapshot.engine,
        "snapshot_type": "full",
        "image": snapshot.image,
        "vcpus": snapshot.cpus,
        "memory": snapshot.memory_mib,
        "size_bytes": snapshot.size_bytes,
        "created_at": snapshot.created_at,
        "artifacts": {
            "state_path": files.state(),
            "memory_path": files.memory(),
            "disk_path": files.disk(),
        },
    })
}

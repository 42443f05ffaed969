//! `smolvm volume`: disks that outlive the sandboxes which use them.

use clap_complete::engine::ArgValueCandidates;
use serde_json::{Value, json};
use smolvm_engine::{DISK_MIB_DEFAULT, SandboxName, VolumeInfo};

use super::tally::Tally;
use super::{Context, Outcome};
use crate::report::CliError;
use crate::{complete, units};

/// Arguments of `volume create`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  smolvm volume create data --size 10G
  smolvm create --name box -v data:/srv/data

Prints the volume's name.")]
pub(crate) struct CreateArgs {
    /// Its name: lower-case letters, digits, `-` and `_`
    name: String,
    /// Room in it: 4096 (MiB) or 4G; only what is used takes space
    #[arg(long, value_name = "SIZE", value_parser = units::mib, default_value_t = DISK_MIB_DEFAULT)]
    size: u32,
}

/// Arguments of `volume list`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  smolvm volume ls")]
pub(crate) struct ListArgs {}

/// Arguments of `volume inspect`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  smolvm volume inspect data")]
pub(crate) struct InspectArgs {
    /// The volume
    #[arg(add = ArgValueCandidates::new(complete::volumes))]
    name: String,
}

/// Arguments of `volume delete`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  smolvm volume rm data

A volume that a sandbox has, running or not, is not deleted.")]
pub(crate) struct DeleteArgs {
    /// The volumes
    #[arg(required = true, value_name = "NAME", add = ArgValueCandidates::new(complete::volumes))]
    names: Vec<String>,
}

/// Arguments of `volume prune`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  smolvm volume prune --dry-run

What was in a volume that is deleted cannot be brought back.")]
pub(crate) struct PruneArgs {
    /// Only say what would be deleted
    #[arg(long)]
    dry_run: bool,
}

/// Makes a volume.
pub(crate) fn create(args: &CreateArgs, cx: &Context) -> Result<Outcome, CliError> {
    let name: SandboxName = args.name.parse().map_err(|error: smolvm_engine::Error| {
        smolvm_engine::Error::new(
            error.kind(),
            format!("`{}` is not a volume name", args.name.escape_debug()),
        )
        .hint("use 1 to 64 lower-case letters, digits, `-` and `_`")
    })?;
    let volume = cx.engine(None)?.create_volume(&name, args.size)?;
    cx.out.line(volume.name.as_str())?;
    Ok(describe(&volume).into())
}

/// Lists the volumes.
pub(crate) fn list(_: &ListArgs, cx: &Context) -> Result<Outcome, CliError> {
    let volumes = cx.engine(None)?.volumes()?;
    let now = jiff::Timestamp::now();
    cx.out.table(
        &["NAME", "SIZE", "USED", "SANDBOXES", "CREATED"],
        volumes
            .iter()
            .map(|volume| {
                let users: Vec<&str> = volume
                    .users
                    .iter()
                    .map(|user| user.sandbox.as_str())
                    .collect();
                vec![
                    volume.name.to_string(),
                    units::show_mib(volume.size_mib),
                    units::show_bytes(volume.used_bytes),
                    users.join(", "),
                    units::show_age(volume.created_at, now),
                ]
            })
            .collect(),
    )?;
    let volumes: Vec<_> = volumes.iter().map(describe).collect();
    Ok(json!({ "volumes": volumes }).into())
}

/// Shows one volume.
pub(crate) fn inspect(args: &InspectArgs, cx: &Context) -> Result<Outcome, CliError> {
    let volume = cx.engine(None)?.volume(&args.name)?;
    let mut rows = vec![
        vec!["Name:".to_owned(), volume.name.to_string()],
        vec!["Size:".to_owned(), units::show_mib(volume.size_mib)],
        vec!["Used:".to_owned(), units::show_bytes(volume.used_bytes)],
        vec!["Created:".to_owned(), volume.created_at.to_string()],
        vec!["Disk:".to_owned(), volume.path.display().to_string()],
    ];
    for user in &volume.users {
        let how = if user.read_only { "reads" } else { "writes" };
        let when = if user.running { "running" } else { "off" };
        rows.push(vec![
            "Sandbox:".to_owned(),
            format!("{} at {}, {how}, {when}", user.sandbox, user.target),
        ]);
    }
    cx.out.table(&[], rows)?;
    Ok(json!({ "volume": describe(&volume) }).into())
}

/// Deletes volumes.
pub(crate) fn delete(args: &DeleteArgs, cx: &Context) -> Result<Outcome, CliError> {
    let engine = cx.engine(None)?;
    let mut tally = Tally::of(&args.names);
    for name in tally.names() {
        let result = engine.remove_volume(&name);
        tally.note(cx, name, result)?;
    }
    let data = json!({ "deleted": tally.done, "failed": tally.failed });
    Ok(tally.outcome(data, "volumes were not deleted"))
}

/// Deletes the volumes that no sandbox has.
pub(crate) fn prune(args: &PruneArgs, cx: &Context) -> Result<Outcome, CliError> {
    let pruned = cx.engine(None)?.prune_volumes(args.dry_run)?;
    for volume in &pruned {
        cx.out.line(volume.name.as_str())?;
    }
    let bytes: u64 = pruned.iter().map(|volume| volume.used_bytes).sum();
    let verb = if args.dry_run { "would free" } else { "freed" };
    cx.out
        .status(&format!("{verb} {}", units::show_bytes(bytes)));
    let volumes: Vec<_> = pruned.iter().map(describe).collect();
    Ok(json!({ "volumes": volumes, "bytes": bytes, "dry_run": args.dry_run }).into())
}

fn describe(volume: &VolumeInfo) -> Value {
    let users: Vec<_> = volume
        .users
        .iter()
        .map(|user| {
            json!({
                "sandbox": user.sandbox,
                "target": user.target,
                "read_only": user.read_only,
                "running": user.running,
            })
        })
        .collect();
    json!({
        "id": volume.id,
        "name": volume.name.as_str(),
        "size_mib": volume.size_mib,
        "used_bytes": volume.used_bytes,
        "created_at": volume.created_at,
        "path": volume.path,
        "sandboxes": users,
    })
}

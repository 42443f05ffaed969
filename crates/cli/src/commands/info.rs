//! `smolvm info`: everything about one sandbox, live where it runs.

use std::time::Duration;

use clap_complete::engine::ArgValueCandidates;
use serde_json::json;
use smolvm_engine::ssh::SSH_ADDRESS;
use smolvm_engine::{Engine, GuestFacts, NetworkMode, SandboxInfo, State};

use super::{Context, Outcome, block_on, network, port};
use crate::report::CliError;
use crate::{complete, units};

/// Time the guest has to answer before the rest is shown without it.
const FACTS_TIME: Duration = Duration::from_secs(3);

const MIB: u64 = 1024 * 1024;

/// Arguments of `info`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  smolvm info box")]
pub(crate) struct Args {
    /// The sandbox
    #[arg(add = ArgValueCandidates::new(complete::sandboxes))]
    name: String,
}

/// Shows the sandbox.
pub(crate) fn run(args: &Args, cx: &Context) -> Result<Outcome, CliError> {
    let engine = cx.engine(None)?;
    let info = engine.info(&args.name)?;
    let (facts, silence) = match live_facts(&engine, &info) {
        Some(Ok(facts)) => (Some(facts), None),
        Some(Err(why)) => (None, Some(why)),
        None => (None, None),
    };
    let mut table = rows(&info, facts.as_ref());
    if let Some(why) = &silence {
        table.push(vec!["Guest:".to_owned(), why.clone()]);
    }
    cx.out.table(&[], table)?;
    let memory_used = facts
        .as_ref()
        .map(|facts| used(facts.memory_total_bytes, facts.memory_available_bytes) / MIB);
    let guest = facts.as_ref().map(|facts| {
        json!({
            "uptime_s": facts.uptime.as_secs_f64(),
            "memory_total_bytes": facts.memory_total_bytes,
            "memory_available_bytes": facts.memory_available_bytes,
            "disk_total_bytes": facts.disk_total_bytes,
            "disk_free_bytes": facts.disk_free_bytes,
            "load": facts.load,
            "processes": facts.processes,
        })
    });
    Ok(json!({
        "vm": {
            "name": info.name.as_str(),
            "id": info.id,
            "status": info.state.as_str(),
            "reason": info.reason,
            "os": info.image,
            "kernel": info.kernel,
            "backend": info.engine,
            "accel": info.accel,
            "ip_address": info.address,
            "ssh_port": info.ssh_port,
            "pid": info.vmm_pid,
            "keeper_pid": info.keeper_pid,
            "vcpus": info.cpus,
            "memory": info.memory_mib,
            "memory_used": memory_used,
            "disk_size": info.disk_mib,
            "disk_mode": info.disk_mode.as_str(),
            "disk_used_bytes": info.disk_used_bytes,
            "network_mode": info.network_mode.map(NetworkMode::as_str),
            "network": network::describe(&info.network),
            "ports": port::describe_all(&info.ports),
            "volumes": info.volumes.iter().map(|volume| json!({
                "name": volume.name.as_str(),
                "target": volume.target,
                "read_only": volume.read_only,
            })).collect::<Vec<_>>(),
            "mounts": info.mounts.iter().map(|mount| json!({
                "source": mount.source,
                "target": mount.target,
                "read_only": mount.read_only,
            })).collect::<Vec<_>>(),
            "bridge": null,
            "ephemeral": info.ephemeral,
            // Values may be secrets; names are enough to see what was set.
            "env_names": info.env.iter().map(|(name, _)| name).collect::<Vec<_>>(),
            "workdir": info.workdir,
            "user": info.user,
            "ttl_s": info.ttl.map(|ttl| ttl.as_secs_f64()),
            "created_at": info.created_at,
            "started_at": info.started_at,
            "stopped_at": info.stopped_at,
            "guest": guest,
            "guest_failure": silence,
        },
    })
    .into())
}

/// What the guest of a running sandbox says of itself, or why it does not: no reason to hide the rest.
fn live_facts(engine: &Engine, info: &SandboxInfo) -> Option<Result<GuestFacts, String>> {
    if info.state != State::Running {
        return None;
    }
    let facts = block_on(async {
        let session = engine.connect(info.name.as_str()).await?;
        Ok(session.facts_within(FACTS_TIME).await?)
    });
    Some(facts.map_err(|error| {
        tracing::info!(%error, "no live facts");
        "does not answer".to_owned()
    }))
}

fn used(total: u64, available: u64) -> u64 {
    total.saturating_sub(available)
}

fn rows(info: &SandboxInfo, facts: Option<&GuestFacts>) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    let mut row = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            rows.push(vec![format!("{name}:"), value]);
        }
    };
    let text = |value: &str| Some(value.to_owned());
    row("Name", text(info.name.as_str()));
    row("State", text(info.state.as_str()));
    row("Reason", info.reason.clone());
    row("Image", text(&info.image));
    row("Kernel", text(&info.kernel));
    row("CPUs", Some(info.cpus.to_string()));
    let memory = units::show_mib(info.memory_mib);
    row(
        "Memory",
        Some(match facts {
            Some(facts) => {
                let used = used(facts.memory_total_bytes, facts.memory_available_bytes);
                format!("{memory}, {} used", units::show_bytes(used))
            }
            None => memory,
        }),
    );
    let disk = format!(
        "{}, {}",
        units::show_mib(info.disk_mib),
        info.disk_mode.as_str()
    );
    row(
        "Disk",
        Some(match info.disk_used_bytes {
            Some(used) => format!("{disk}, {} on the host", units::show_bytes(used)),
            None => disk,
        }),
    );
    row(
        "Engine",
        info.engine.as_ref().map(|engine| match &info.accel {
            Some(accel) => format!("{engine}, {accel}"),
            None => engine.clone(),
        }),
    );
    let names: Vec<&str> = info.env.iter().map(|(name, _)| name.as_str()).collect();
    row("Environment", (!names.is_empty()).then(|| names.join(" ")));
    let ports: Vec<String> = info.ports.iter().map(ToString::to_string).collect();
    row("Ports", (!ports.is_empty()).then(|| ports.join(", ")));
    for volume in &info.volumes {
        let mode = if volume.read_only { ", read-only" } else { "" };
        row(
            "Volume",
            Some(format!("{} at {}{mode}", volume.name, volume.target)),
        );
    }
    for mount in &info.mounts {
        let mode = if mount.read_only { ", read-only" } else { "" };
        let source = mount.source.display();
        row("Mount", Some(format!("{source} at {}{mode}", mount.target)));
    }
    row("Directory", info.workdir.clone());
    row("User", info.user.clone());
    row(
        "Network",
        Some(match (info.address, info.network_mode) {
            (Some(address), Some(mode)) => {
                format!("{}, {address} ({})", info.network, mode.as_str())
            }
            _ => info.network.to_string(),
        }),
    );
    row(
        "SSH",
        info.ssh_port
            .map(|port| format!("{SSH_ADDRESS} port {port}")),
    );
    row("Time to live", info.ttl.map(units::show_duration));
    row("Created", Some(info.created_at.to_string()));
    row("Started", info.started_at.map(|time| time.to_string()));
    row("Stopped", info.stopped_at.map(|time| time.to_string()));
    row("VMM", info.vmm_pid.map(|pid| format!("process {pid}")));
    if let Some(facts) = facts {
        row("Up", Some(units::show_duration(facts.uptime)));
        let [one, five, fifteen] = facts.load;
        row("Load", Some(format!("{one:.2} {five:.2} {fifteen:.2}")));
        row("Processes", Some(facts.processes.to_string()));
    }
    rows
}

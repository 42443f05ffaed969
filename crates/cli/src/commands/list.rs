//! `smolvm ls`: the sandboxes there are.

use clap::builder::PossibleValuesParser;
use serde_json::json;
use smolvm_engine::{SandboxInfo, State};

use super::{Context, Outcome, port};
use crate::report::CliError;
use crate::{prepare, units};

/// Arguments of `list`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  smolvm ls --all")]
pub(crate) struct Args {
    /// Also those that do not run
    #[arg(short, long)]
    all: bool,
    /// Only those in this state, running or not
    #[arg(long, value_name = "STATE")]
    #[arg(value_parser = PossibleValuesParser::new(
        ["created", "starting", "running", "paused", "stopping", "stopped", "error"]
    ))]
    status: Option<String>,
    /// Print names only
    #[arg(long)]
    names: bool,
}

impl Args {
    fn wants(&self, state: State) -> bool {
        match &self.status {
            Some(status) => state.as_str() == status,
            None => self.all || alive(state),
        }
    }
}

/// Whether a sandbox in this state has processes on the host.
fn alive(state: State) -> bool {
    match state {
        State::Starting | State::Running | State::Paused | State::Stopping => true,
        State::Created | State::Stopped | State::Error | State::Deleting => false,
    }
}

/// Lists the sandboxes.
pub(crate) fn run(args: &Args, cx: &Context) -> Result<Outcome, CliError> {
    let sandboxes: Vec<SandboxInfo> = cx
        .engine(None)?
        .list()?
        .into_iter()
        .filter(|sandbox| args.wants(sandbox.state))
        .collect();
    if args.names {
        for sandbox in &sandboxes {
            cx.out.line(sandbox.name.as_str())?;
        }
    } else {
        let now = jiff::Timestamp::now();
        cx.out.table(
            &["NAME", "STATE", "IMAGE", "CPUS", "MEMORY", "CREATED"],
            sandboxes
                .iter()
                .map(|sandbox| {
                    vec![
                        sandbox.name.to_string(),
                        sandbox.state.as_str().to_owned(),
                        sandbox.image.clone(),
                        sandbox.cpus.to_string(),
                        units::show_mib(sandbox.memory_mib),
                        units::show_age(sandbox.created_at, now),
                    ]
                })
                .collect(),
        )?;
        let troubles = sandboxes.iter().filter(|sandbox| alive(sandbox.state));
        let troubles = troubles
            .filter_map(|sandbox| prepare::told(sandbox.name.as_str(), sandbox.reason.clone()));
        prepare::warn(cx, &troubles.collect::<Vec<_>>());
    }
    let vms: Vec<_> = sandboxes
        .iter()
        .map(|sandbox| {
            json!({
                "name": sandbox.name.as_str(),
                "preset": null,
                "status": sandbox.state.as_str(),
                "pid": sandbox.vmm_pid,
                "ip_address": sandbox.address,
                "ssh_port": sandbox.ssh_port,
                "ports": port::describe_all(&sandbox.ports),
                "image": sandbox.image,
                "vcpus": sandbox.cpus,
                "memory": sandbox.memory_mib,
                "created_at": sandbox.created_at,
                "warnings": sandbox.reason.iter().collect::<Vec<_>>(),
            })
        })
        .collect();
    Ok(json!({
        "filters": { "all": args.all, "status": args.status, "preset": null },
        "vms": vms,
    })
    .into())
}

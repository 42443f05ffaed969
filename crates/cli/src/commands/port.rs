//! `smolvm port`: ports of the host that lead into a sandbox.

use clap_complete::engine::ArgValueCandidates;
use serde_json::{Value, json};
use smolvm_engine::PublishedPort;

use super::{Context, Outcome, block_on};
use crate::complete;
use crate::report::CliError;
use crate::signals::Signals;

/// Arguments of `port expose`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  smolvm port expose box 8080:80
  smolvm port expose box 80 0.0.0.0:5353:53/udp

Prints each port with the number that was chosen. A sandbox that is off has it from its next start
on. It works in every network mode: the port leads to what listens in the sandbox on 127.0.0.1 or
::1, or on all its addresses.")]
pub(crate) struct ExposeArgs {
    /// The sandbox
    #[arg(add = ArgValueCandidates::new(complete::sandboxes))]
    name: String,
    /// [IP:][HOST:]GUEST[/tcp|/udp]; without IP only this host reaches it, without HOST, or with 0, a
    /// free port is chosen
    #[arg(required = true, value_name = "PORT")]
    ports: Vec<String>,
}

/// Arguments of `port close`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  smolvm port close box 8080
  smolvm port close box 0.0.0.0:5353/udp

Connections that came by the port are cut.")]
pub(crate) struct CloseArgs {
    /// The sandbox
    #[arg(add = ArgValueCandidates::new(complete::sandboxes))]
    name: String,
    /// Port of the host: [IP:]HOST[:GUEST][/tcp|/udp]
    #[arg(required = true, value_name = "PORT", add = ArgValueCandidates::new(complete::ports))]
    ports: Vec<String>,
}

/// Arguments of `port list`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  smolvm port ls box")]
pub(crate) struct ListArgs {
    /// The sandbox
    #[arg(add = ArgValueCandidates::new(complete::sandboxes))]
    name: String,
}

/// Publishes ports; the first that fails ends it, and those before it are told.
pub(crate) fn expose(args: &ExposeArgs, cx: &Context) -> Result<Outcome, CliError> {
    let engine = cx.engine(None)?;
    let wanted: Vec<PublishedPort> = args
        .ports
        .iter()
        .map(|text| text.parse())
        .collect::<smolvm_engine::Result<_>>()?;
    let mut published = Vec::new();
    let done = block_on(async {
        let mut signals = Signals::install()?;
        for port in &wanted {
            let port = signals
                .or_interrupted(engine.publish(&args.name, port))
                .await?;
            cx.out.line(&port.to_string())?;
            published.push(describe(&port));
        }
        Ok(())
    });
    Ok(Outcome {
        data: json!({ "name": args.name, "ports": published }),
        error: done.err(),
    })
}

/// Closes ports; the first that fails ends it, and those before it are told.
pub(crate) fn close(args: &CloseArgs, cx: &Context) -> Result<Outcome, CliError> {
    let engine = cx.engine(None)?;
    let mut closed = Vec::new();
    let done = block_on(async {
        let mut signals = Signals::install()?;
        for text in &args.ports {
            let host = engine.find_port(&args.name, text)?;
            signals
                .or_interrupted(engine.unpublish(&args.name, &host))
                .await?;
            cx.out.line(&host.to_string())?;
            closed.push(host.to_string());
        }
        Ok(())
    });
    Ok(Outcome {
        data: json!({ "name": args.name, "closed": closed }),
        error: done.err(),
    })
}

/// Lists the ports of a sandbox.
pub(crate) fn list(args: &ListArgs, cx: &Context) -> Result<Outcome, CliError> {
    let info = cx.engine(None)?.info(&args.name)?;
    cx.out.table(
        &["HOST", "GUEST", "PROTOCOL"],
        info.ports
            .iter()
            .map(|port| {
                vec![
                    port.host.socket_address().to_string(),
                    port.guest.to_string(),
                    port.host.protocol.to_string(),
                ]
            })
            .collect(),
    )?;
    Ok(json!({ "name": args.name, "ports": describe_all(&info.ports) }).into())
}

/// Published ports, for programs.
pub(crate) fn describe_all(ports: &[PublishedPort]) -> Vec<Value> {
    ports.iter().map(describe).collect()
}

fn describe(port: &PublishedPort) -> Value {
    json!({
        "protocol": port.host.protocol.as_str(),
        "host_address": port.host.address,
        "host_port": port.host.port,
        "guest_port": port.guest,
    })
}

/// Says which ports a new sandbox got.
pub(crate) fn note(cx: &Context, ports: &[PublishedPort]) {
    for port in ports {
        cx.out.status(&format!("published {port}"));
    }
}

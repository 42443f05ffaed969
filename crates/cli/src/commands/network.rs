//! `smolvm network`: what sandboxes reach, and what they use of the host for it.

use clap_complete::engine::ArgValueCandidates;
use serde_json::{Value, json};
use smolvm_engine::{DeniedAttempt, Error, NetworkMode, NetworkSpec};

use super::machine::Network;
use super::{Context, Outcome, block_on};
use crate::complete;
use crate::report::CliError;

/// Arguments of `network show`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  smolvm network show box\n  smolvm network show")]
pub(crate) struct ShowArgs {
    /// The sandbox; the host if left out
    #[arg(add = ArgValueCandidates::new(complete::sandboxes))]
    name: Option<String>,
}

/// Arguments of `network set`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  smolvm network set box --allow pypi.org --allow '*.pythonhosted.org'
  smolvm network set box --network off

It takes effect at once, and replaces what was set before: connections that are not allowed any more
are cut off. A sandbox that runs without a network device has to be stopped first.")]
pub(crate) struct SetArgs {
    /// The sandbox
    #[arg(add = ArgValueCandidates::new(complete::sandboxes))]
    name: String,
    #[command(flatten)]
    network: Network,
}

/// Arguments of `network log`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  smolvm network log box

Shows each destination and each name once, those tried last at the end. A destination is forgotten
an hour after it was tried last.")]
pub(crate) struct LogArgs {
    /// The sandbox
    #[arg(add = ArgValueCandidates::new(complete::sandboxes))]
    name: String,
}

/// Arguments of `network reset`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  smolvm network reset

Removes what stays on the host when the last sandbox with a network has gone: the firewall table
`inet smolvm`, the rules in Docker's chain, and forwarding where it was switched on for sandboxes.
The next one makes them again.")]
pub(crate) struct ResetArgs {}

/// Shows the network of a sandbox, or what networks use of the host.
pub(crate) fn show(args: &ShowArgs, cx: &Context) -> Result<Outcome, CliError> {
    let engine = cx.engine(None)?;
    let Some(name) = &args.name else {
        let usage = engine.network_usage()?;
        let mut rows = vec![
            vec!["Addresses:".to_owned(), usage.prefix.to_string()],
            vec!["Gateway:".to_owned(), usage.gateway.to_string()],
            vec![
                "In use:".to_owned(),
                format!("{} of {}", usage.used, usage.addresses),
            ],
            vec![
                "Mode:".to_owned(),
                match &usage.mode {
                    Ok(mode) => mode.as_str().to_owned(),
                    Err(error) => format!("none: {}", error.in_one_line()),
                },
            ],
        ];
        let help = usage.mode.as_ref().err().and_then(Error::hint_text);
        rows.extend(help.map(|help| vec!["To mend it:".to_owned(), help.to_owned()]));
        let obstacles = usage.obstacles.iter();
        rows.extend(obstacles.map(|obstacle| vec!["In the way:".to_owned(), obstacle.clone()]));
        cx.out.table(&[], rows)?;
        return Ok(json!({
            "network": {
                "prefix": usage.prefix.to_string(),
                "gateway": usage.gateway,
                "addresses": usage.addresses,
                "used": usage.used,
                "permitted": usage.mode.is_ok(),
                "mode": usage.mode.as_ref().ok().map(|mode| mode.as_str()),
                "reason": usage.mode.as_ref().err().map(Error::in_one_line),
                "obstacles": usage.obstacles,
            },
        })
        .into());
    };
    let info = engine.info(name)?;
    let mut rows = vec![vec!["Reaches:".to_owned(), words(&info.network)]];
    let allowed = info.network.allowed.iter();
    rows.extend(allowed.map(|allowed| vec!["Allowed:".to_owned(), allowed.to_string()]));
    if let Some(address) = info.address {
        rows.push(vec!["Address:".to_owned(), address.to_string()]);
    }
    let mode = info.network_mode.map(NetworkMode::as_str);
    rows.extend(mode.map(|mode| vec!["Mode:".to_owned(), mode.to_owned()]));
    cx.out.table(&[], rows)?;
    let mut network = describe(&info.network);
    network["address"] = json!(info.address);
    network["mode"] = json!(mode);
    Ok(json!({ "vm": { "name": name }, "network": network }).into())
}

/// Changes what a sandbox reaches.
pub(crate) fn set(args: &SetArgs, cx: &Context) -> Result<Outcome, CliError> {
    if args.network.is_unsaid() {
        return Err(CliError::usage(
            "what the sandbox may reach is missing",
            "give --allow, or --network off or open",
        ));
    }
    let engine = cx.engine(None)?;
    let spec = args.network.spec()?;
    block_on(async { Ok(engine.set_network(&args.name, &spec).await?) })?;
    cx.out.line(&args.name)?;
    Ok(json!({ "vm": { "name": args.name }, "network": describe(&spec) }).into())
}

/// Shows what was denied to a sandbox.
pub(crate) fn log(args: &LogArgs, cx: &Context) -> Result<Outcome, CliError> {
    let engine = cx.engine(None)?;
    let denied = block_on(async { Ok(engine.denied(&args.name).await?) })?;
    cx.out.table(
        &["LAST", "WHAT", "NAME", "ADDRESS", "PORT", "COUNT"],
        denied
            .iter()
            .map(|attempt| {
                vec![
                    attempt.at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
                    attempt.what(),
                    attempt.name.clone().unwrap_or_default(),
                    attempt.address.map(|a| a.to_string()).unwrap_or_default(),
                    attempt.port.map(|p| p.to_string()).unwrap_or_default(),
                    attempt.count.to_string(),
                ]
            })
            .collect(),
    )?;
    let denied: Vec<_> = denied.iter().map(describe_denied).collect();
    Ok(json!({ "vm": { "name": args.name }, "denied": denied }).into())
}

/// Takes away what networks left on the host.
pub(crate) fn reset(_: &ResetArgs, cx: &Context) -> Result<Outcome, CliError> {
    let engine = cx.engine(None)?;
    block_on(async { Ok(engine.reset_network().await?) })?;
    cx.out
        .status("nothing of sandboxes' networks is left on this host");
    Ok(json!({ "reset": true }).into())
}

/// A sandbox's policy, for programs.
pub(crate) fn describe(spec: &NetworkSpec) -> Value {
    let allowed = spec.allowed.iter().map(ToString::to_string);
    json!({
        "policy": spec.reach.as_str(),
        "allowed": allowed.collect::<Vec<_>>(),
    })
}

fn words(spec: &NetworkSpec) -> String {
    match spec.reach {
        smolvm_engine::Reach::Off => "nothing",
        smolvm_engine::Reach::Listed => "what is allowed",
        smolvm_engine::Reach::Open => "the public Internet",
    }
    .to_owned()
}

fn describe_denied(attempt: &DeniedAttempt) -> Value {
    json!({
        "at": attempt.at,
        "what": attempt.what(),
        "name": attempt.name,
        "address": attempt.address,
        "port": attempt.port,
        "count": attempt.count,
    })
}

//! `smolvm exec`: a command in a sandbox that runs.

use std::ffi::OsString;
use std::path::PathBuf;

use clap_complete::engine::ArgValueCandidates;
use serde_json::json;

use super::join::{self, Join};
use super::{Context, Outcome, block_on, machine};
use crate::attach::Ended;
use crate::report::CliError;
use crate::signals::Signals;
use crate::{attach, complete, prepare, units};

/// Arguments of `exec`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  smolvm exec box -- ls -l /
  smolvm exec -it box bash

The exit code is the command's own; 124 if --timeout ended it, 126 or 127 if it cannot be run,
125 if the sandbox cannot be reached.")]
pub(crate) struct Args {
    /// The sandbox
    #[arg(add = ArgValueCandidates::new(complete::sandboxes))]
    name: String,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<OsString>,
    #[command(flatten)]
    join: Join,
    /// Environment of the command; NAME alone copies ours
    #[arg(short, long, value_name = "NAME[=VALUE]", help_heading = "Command")]
    env: Vec<String>,
    /// File of NAME=VALUE lines for the same
    #[arg(long, value_name = "FILE", help_heading = "Command")]
    env_file: Vec<PathBuf>,
    /// Directory the command starts in
    #[arg(short, long, value_name = "DIR", help_heading = "Command")]
    workdir: Option<String>,
    /// User the command runs as
    #[arg(short, long, help_heading = "Command")]
    user: Option<String>,
    /// Start the sandbox if it does not run
    #[arg(long)]
    start: bool,
    /// Most time to boot [default: 1m]
    #[arg(long, value_name = "TIME", value_parser = units::boot_limit, requires = "start")]
    boot_timeout: Option<std::time::Duration>,
}

/// Runs the command.
pub(crate) fn run(args: &Args, cx: &Context) -> Result<Outcome, CliError> {
    let mut spec = args.join.spec(cx, &args.command)?;
    spec.env = machine::environment(cx, &args.env_file, &args.env)?;
    spec.workdir.clone_from(&args.workdir);
    spec.user.clone_from(&args.user);
    join::add_term(cx, &mut spec, &[]);
    let engine = cx.engine(args.boot_timeout)?;
    let (ended, warnings) = block_on(async {
        let mut signals = Signals::install()?;
        let mut warnings = Vec::new();
        let session = if args.start {
            let (session, times) = signals.or_interrupted(engine.start(&args.name)).await?;
            warnings = times.warnings;
            prepare::warn(cx, &warnings);
            session
        } else {
            signals.or_interrupted(engine.connect(&args.name)).await?
        };
        let ended = attach::run(cx, &session, &spec, &mut signals).await;
        if !ended.as_ref().is_ok_and(Ended::succeeded)
            && let Some(trouble) = prepare::trouble(&engine, &args.name)
        {
            prepare::warn(cx, std::slice::from_ref(&trouble));
            warnings.push(trouble);
        }
        Ok((ended?, warnings))
    })?;
    Ok(join::outcome(
        &ended,
        args.join.timeout,
        json!({ "warnings": warnings }),
    ))
}

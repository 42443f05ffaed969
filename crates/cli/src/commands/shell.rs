//! `smolvm shell`: a login shell on a terminal.

use std::time::Duration;

use clap_complete::engine::ArgValueCandidates;
use smolvm_engine::{ExecSpec, Session};

use super::join;
use super::{Context, Outcome, block_on};
use crate::report::CliError;
use crate::signals::Signals;
use crate::{attach, complete, prepare, terminal, units};

/// The shells tried, best first.
const SHELLS: [&str; 2] = ["/bin/bash", "/bin/sh"];

/// Arguments of `shell`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  smolvm shell box")]
pub(crate) struct Args {
    /// The sandbox
    #[arg(add = ArgValueCandidates::new(complete::sandboxes))]
    name: String,
    /// User of the shell
    #[arg(short, long)]
    user: Option<String>,
    /// Start the sandbox if it does not run
    #[arg(long)]
    start: bool,
    /// Most time to boot [default: 1m]
    #[arg(long, value_name = "TIME", value_parser = units::boot_limit, requires = "start")]
    boot_timeout: Option<Duration>,
}

/// Opens the shell.
pub(crate) fn run(args: &Args, cx: &Context) -> Result<Outcome, CliError> {
    if cx.out.json {
        return Err(CliError::usage(
            "a shell cannot be used with --json: a terminal's output is not data",
            format!("smolvm exec --json {} -- COMMAND", args.name),
        ));
    }
    if !cx.world.stdin_terminal {
        return Err(CliError::usage(
            "a shell needs a terminal, and standard input is none",
            format!("smolvm exec {} -- sh -c 'COMMANDS'", args.name),
        ));
    }
    let engine = cx.engine(args.boot_timeout)?;
    let ended = block_on(async {
        let mut signals = Signals::install()?;
        let session = if args.start {
            let (session, times) = signals.or_interrupted(engine.start(&args.name)).await?;
            prepare::warn(cx, &times.warnings);
            session
        } else {
            signals.or_interrupted(engine.connect(&args.name)).await?
        };
        let shell = signals.or_interrupted(find_shell(&session)).await?;
        let mut spec = ExecSpec {
            terminal: Some(terminal::size()),
            stdin: true,
            user: args.user.clone(),
            ..ExecSpec::new(vec![shell.into(), "-l".into()])
        };
        join::add_term(cx, &mut spec, &[]);
        attach::run(cx, &session, &spec, &mut signals).await
    })?;
    Ok(Outcome {
        error: ended.failure(None),
        ..Outcome::default()
    })
}

/// The best shell the guest has.
async fn find_shell(session: &Session) -> Result<&'static str, CliError> {
    for shell in SHELLS {
        if session.list_dir(shell, true).await.is_ok() {
            return Ok(shell);
        }
    }
    // Whoever looks for it says best that it is not there.
    Ok(SHELLS[1])
}

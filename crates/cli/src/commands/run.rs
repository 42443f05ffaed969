//! `smolvm run`: a command in a sandbox of its own, which is gone afterwards, whatever happens.

use std::ffi::OsString;
use std::path::PathBuf;

use serde_json::json;
use smolvm_engine::{DEFAULT_IMAGE, Engine, ExecSpec, ImageInfo, Session};

use super::join::{self, Join};
use super::machine::{self, Machine};
use super::{Context, Outcome, block_on, port};
use crate::attach::{self, Ended};
use crate::output;
use crate::prepare;
use crate::report::CliError;
use crate::signals::Signals;

/// Arguments of `run`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  smolvm run -- python3 -c 'print(6*7)'
  echo data | smolvm run -- wc -c
  smolvm run -it bash
  smolvm run --image alpine -- cat /etc/alpine-release

Without a COMMAND the image's own is run: its ENTRYPOINT with its CMD. With one, COMMAND takes the
place of CMD.

The exit code is the command's own; 124 if --timeout ended it, 126 or 127 if it cannot be run,
125 if the sandbox failed.")]
pub(crate) struct Args {
    /// The command and its arguments [default: that of the image]
    #[arg(trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<OsString>,
    /// Program that COMMAND is the arguments of, in place of the image's ENTRYPOINT and CMD; empty for
    /// none
    #[arg(long, value_name = "PROGRAM", help_heading = "Command")]
    entrypoint: Option<OsString>,
    #[command(flatten)]
    join: Join,
    /// Do not delete the sandbox afterwards; prints its name on standard error
    #[arg(long, help_heading = "Command")]
    keep: bool,
    /// Let it be reached by SSH while it runs
    #[arg(long, help_heading = "Sandbox")]
    ssh: bool,
    /// File of a public key that opens it by SSH, beside yours; can be repeated
    #[arg(long, value_name = "FILE", requires = "ssh", help_heading = "Sandbox")]
    ssh_key: Vec<PathBuf>,
    #[command(flatten)]
    machine: Machine,
}

/// Runs the command.
pub(crate) fn run(args: &Args, cx: &Context) -> Result<Outcome, CliError> {
    let engine = cx.engine_with(args.machine.boot_timeout, &args.machine.plain_http)?;
    let mut command = args.join.spec(cx, &args.command)?;
    let mut spec = args.machine.spec(cx, &engine)?;
    spec.ephemeral = !args.keep;
    if args.command.is_empty() && args.entrypoint.is_none() && spec.image == DEFAULT_IMAGE {
        return Err(no_command(&spec.image));
    }
    if args.ssh {
        spec.ssh = Some(machine::ssh(&args.ssh_key)?);
    }
    block_on(async {
        let mut signals = Signals::install()?;
        prepare::pull(cx, &engine, &mut signals, &spec.image, args.machine.pull()).await?;
        prepare::image(
            cx,
            &engine,
            &mut signals,
            &spec.image,
            &spec.kernel,
            spec.network.needs_device(),
        )
        .await?;
        let image = engine.image(&spec.image)?;
        command.argv = argv(args, &image)?;
        join::add_term(
            cx,
            &mut command,
            &[&spec.env[..], &image.config.env].concat(),
        );
        let claimed = args.machine.claim_or_create(&engine, &mut spec).await?;
        let name = spec.name.as_str();
        prepare::note_emulation(cx, &engine);
        let live = live(args, cx, &engine, name, claimed, &command, &mut signals);
        let (session, result) = live.await;
        if args.keep && result.is_ok() {
            output::stderr(name);
        } else {
            let deleted = delete(&engine, name, &mut signals).await;
            // Why it did not run says more than that it could not be removed as well; and after a
            // failed start its keeper has removed it already.
            if result.is_ok() {
                deleted?;
            }
        }
        // Only now: a sandbox that is owned dies with its connection.
        drop(session);
        let (ended, warnings) = result?;
        Ok(join::outcome(
            &ended,
            args.join.timeout,
            json!({ "vm": { "name": name }, "warnings": warnings }),
        ))
    })
}

/// What is run: what the user says, and where that is nothing, what the image says, as Docker does.
fn argv(args: &Args, image: &ImageInfo) -> Result<Vec<OsString>, CliError> {
    let of_image = |words: &[String]| words.iter().map(OsString::from).collect::<Vec<_>>();
    let mut argv = match &args.entrypoint {
        Some(program) if program.is_empty() => Vec::new(),
        Some(program) => vec![program.clone()],
        None => of_image(&image.config.entrypoint),
    };
    if !args.command.is_empty() {
        argv.extend(args.command.iter().cloned());
    } else if args.entrypoint.is_none() {
        argv.extend(of_image(&image.config.cmd));
    }
    if argv.is_empty() {
        return Err(no_command(&image.name));
    }
    Ok(argv)
}

fn no_command(image: &str) -> CliError {
    CliError::usage(
        format!("no command was given, and image `{image}` has none of its own"),
        "smolvm run -- COMMAND",
    )
}

/// Starts the sandbox, unless it came running, and runs the command in it. Also gives what the
/// start warned of.
async fn live(
    args: &Args,
    cx: &Context,
    engine: &Engine,
    name: &str,
    claimed: Option<Session>,
    command: &ExecSpec,
    signals: &mut Signals,
) -> (Option<Session>, Result<(Ended, Vec<String>), CliError>) {
    let (session, mut warnings) = match claimed {
        Some(session) => (session, Vec::new()),
        None => match signals.or_interrupted(engine.start(name)).await {
            Ok((session, times)) => (session, times.warnings),
            Err(error) => return (None, Err(error)),
        },
    };
    prepare::warn(cx, &warnings);
    let result = async {
        if args.machine.publishes() {
            port::note(cx, &engine.info(name)?.ports);
        }
        if !args.keep {
            signals.or_interrupted(session.own()).await?;
        }
        let ended = attach::run(cx, &session, command, signals).await;
        if !ended.as_ref().is_ok_and(Ended::succeeded)
            && let Some(trouble) = prepare::trouble(engine, name)
        {
            prepare::warn(cx, std::slice::from_ref(&trouble));
            warnings.push(trouble);
        }
        Ok((ended?, warnings))
    }
    .await;
    (Some(session), result)
}

/// Deletes the sandbox. One more signal leaves that to its keeper, which notices that we are gone.
async fn delete(engine: &Engine, name: &str, signals: &mut Signals) -> Result<(), CliError> {
    signals.or_interrupted(engine.delete(name)).await
}

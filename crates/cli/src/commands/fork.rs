//! `smolvm fork`: copies of a running sandbox that go on where it is.

use std::sync::mpsc;

use clap_complete::engine::ArgValueCandidates;
use serde_json::json;

use super::{Context, Outcome, block_on};
use crate::report::CliError;
use crate::signals::Signals;
use crate::{complete, units};

/// Arguments of `fork`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  smolvm fork box -n 3

Prints the names of the copies: box-1, box-2, box-3. Each goes on with the processes, open files
and memory of `box`, which stands still only while it is copied. Memory is shared until a copy
writes to it. Each copy has a host name and clock of its own, and its kernel other random numbers; a
program that has a generator of its own, such as Python's `random`, goes on with the same numbers in
each. Commands that ran when it was made go on in it, and their output is dropped. Where `box` has a --ttl, each copy has the
same, from its own start. A copy has no published ports.")]
pub(crate) struct Args {
    /// The sandbox
    #[arg(add = ArgValueCandidates::new(complete::sandboxes))]
    name: String,
    /// Copies
    #[arg(short = 'n', long, value_name = "COUNT", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=i64::from(smolvm_engine::FORK_CHILDREN_MAX)))]
    count: u32,
    /// What the copies' names begin with [default: the sandbox's name]
    #[arg(long, value_name = "NAME")]
    prefix: Option<String>,
}

/// Makes the copies. One that does not start is told, and the others stay.
pub(crate) fn run(args: &Args, cx: &Context) -> Result<Outcome, CliError> {
    let engine = cx.engine(None)?;
    let publishes = !engine.info(&args.name)?.ports.is_empty();
    let fork = block_on(async {
        let mut signals = Signals::install()?;
        let prefix = args.prefix.as_deref();
        let (made, names) = mpsc::channel();
        let forked = engine.fork_telling(&args.name, args.count, prefix, &made);
        match signals.or_interrupted(forked).await {
            Err(CliError::Interrupted) => {
                // Nobody was told of them. What went wrong first is what counts.
                for name in names.try_iter() {
                    let _ = signals.or_interrupted(engine.delete(name.as_str())).await;
                }
                Err(CliError::Interrupted)
            }
            other => other,
        }
    })?;
    let mut failed = Vec::new();
    let mut vms = Vec::new();
    for child in &fork.children {
        let name = child.name.as_str();
        match &child.result {
            Ok(times) => {
                cx.out.line(name)?;
                vms.push(json!({
                    "name": name,
                    "status": "running",
                    "ready_ms": units::millis(times.ready),
                }));
            }
            Err(error) => {
                let why = error.in_one_line();
                vms.push(json!({ "name": name, "status": "failed", "error": &why }));
                failed.push(format!("`{name}`: {why}"));
            }
        }
    }
    cx.out.status(&format!(
        "`{}` stood still for {:.0} ms",
        args.name,
        units::millis(fork.paused)
    ));
    if publishes {
        cx.out.status(&format!(
            "the ports that lead to `{}` lead to no copy; give one its own with `smolvm port expose`",
            args.name
        ));
    }
    Ok(Outcome {
        data: json!({
            "source": args.name,
            "paused_ms": units::millis(fork.paused),
            "vms": vms,
        }),
        error: (!failed.is_empty()).then(|| {
            CliError::Partly(format!(
                "{} of {} copies did not start: {}",
                failed.len(),
                args.count,
                failed.join("; ")
            ))
        }),
    })
}

//! The flags that say how a guest's command is joined to our own streams, shared by `run` and
//! `exec`.

use std::ffi::OsString;
use std::time::Duration;

use serde_json::{Value, json};
use smolvm_engine::ExecSpec;

use super::{Context, Outcome};
use crate::attach::Ended;
use crate::report::CliError;
use crate::{terminal, units};

/// How the command is joined to us.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Command")]
pub(crate) struct Join {
    /// Forward standard input even if it is a terminal; anything else is forwarded anyway
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    tty: bool,
    /// Kill the command after this long: 30s, 5m, or seconds
    #[arg(long, value_name = "TIME", value_parser = units::limit)]
    pub(crate) timeout: Option<Duration>,
}

impl Join {
    /// A command that is joined like this.
    ///
    /// # Errors
    ///
    /// [`CliError::Usage`] for a terminal within JSON.
    pub(crate) fn spec(&self, cx: &Context, argv: &[OsString]) -> Result<ExecSpec, CliError> {
        if self.tty && cx.out.json {
            return Err(CliError::usage(
                "--tty and --json cannot be used together: a terminal's output is not data",
                "leave one of them out",
            ));
        }
        // As Docker: whoever types has to have a terminal; a command may have one without.
        if self.tty && self.interactive && !cx.world.stdin_terminal {
            return Err(CliError::usage(
                "--interactive with --tty needs a terminal, and standard input is none",
                "leave one of them out",
            ));
        }
        Ok(ExecSpec {
            terminal: self.tty.then(terminal::size),
            stdin: self.interactive || !cx.world.stdin_terminal,
            timeout: self.timeout,
            ..ExecSpec::new(argv.to_vec())
        })
    }
}

/// Tells a guest's terminal programs what our terminal understands, unless the user said so.
pub(crate) fn add_term(cx: &Context, spec: &mut ExecSpec, known: &[(String, String)]) {
    let said = spec.env.iter().chain(known).any(|(name, _)| name == "TERM");
    if let (true, false, Some(term)) = (spec.terminal.is_some(), said, &cx.world.term) {
        spec.env.push(("TERM".to_owned(), term.clone()));
    }
}

/// What a command that ended is reported as.
pub(crate) fn outcome(ended: &Ended, timeout: Option<Duration>, mut data: Value) -> Outcome {
    if let Value::Object(data) = &mut data {
        data.extend(payload(ended));
    }
    Outcome {
        data,
        error: ended.failure(timeout),
    }
}

fn payload(ended: &Ended) -> serde_json::Map<String, Value> {
    let fields = [
        ("exit_code", json!(ended.exit().code())),
        ("stdout", json!(String::from_utf8_lossy(&ended.stdout))),
        ("stderr", json!(String::from_utf8_lossy(&ended.stderr))),
        ("timed_out", json!(ended.status.timed_out)),
        ("signal", json!(ended.status.signal)),
        ("truncated", json!(ended.truncated)),
        ("duration_ms", json!(units::millis(ended.status.duration))),
    ];
    fields
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

//! `smolvm completion`: the script that lets a shell ask us for completions.

use clap_complete::env::{Bash, EnvCompleter, Fish, Zsh};
use serde_json::json;

use super::{Context, Outcome};
use crate::output;
use crate::report::CliError;
use crate::world::COMPLETE_VARIABLE;

/// Arguments of `completion`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  source <(smolvm completion bash)
  smolvm completion zsh > ~/.zfunc/_smolvm
  smolvm completion fish > ~/.config/fish/completions/smolvm.fish")]
pub(crate) struct Args {
    /// The shell
    shell: Shell,
}

/// Shells we know.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

/// Prints the script.
pub(crate) fn run(args: &Args, cx: &Context) -> Result<Outcome, CliError> {
    let shell: &dyn EnvCompleter = match args.shell {
        Shell::Bash => &Bash,
        Shell::Zsh => &Zsh,
        Shell::Fish => &Fish,
    };
    let mut script = Vec::new();
    shell
        .write_registration(COMPLETE_VARIABLE, "smolvm", "smolvm", "smolvm", &mut script)
        .map_err(|error| CliError::io("writing the script", error))?;
    if !cx.out.json {
        output::stdout_bytes(&script)
            .map_err(|error| CliError::io("writing to standard output", error))?;
    }
    Ok(json!({ "shell": shell.name(), "script": String::from_utf8_lossy(&script) }).into())
}

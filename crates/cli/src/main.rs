//! `smolvm`: the command line of SmolVM.
//!
//! A face and nothing more: it parses, calls `smolvm-engine`, and renders what comes back. The way
//! of a command line is `world` (what is typed and set), `args` (what was written), a file of
//! `commands` (what it means), and back through `output` and `report` to an `exit` code.

mod args;
mod attach;
mod commands;
mod complete;
mod exit;
mod output;
mod prepare;
mod progress;
mod report;
mod signals;
mod terminal;
mod units;
mod world;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};

use crate::args::Cli;
use crate::exit::Exit;
use crate::world::World;

fn main() -> ExitCode {
    let world = World::read();
    if world.completing && complete::answer() {
        return Exit::Success.into();
    }
    match Cli::try_parse_from(&world.args) {
        Ok(cli) => commands::run(cli, world).into(),
        Err(error) => rejected(&error, &world).into(),
    }
}

/// Answers a command line that clap did not turn into a command: help and the version are data, the
/// rest is a mistake.
fn rejected(error: &clap::Error, world: &World) -> Exit {
    if !error.use_stderr() {
        // Also when the reader of a long help has gone away.
        let _ = error.print();
        return Exit::Success;
    }
    // What belongs to the guest's command line is not a flag of ours.
    let ours = world.args.iter().take_while(|arg| *arg != "--");
    if ours.clone().any(|arg| arg == "--json") {
        let command = commands::named(&Cli::command(), ours.skip(1));
        let printed = output::envelope(
            &command,
            Exit::Usage,
            &serde_json::Value::Null,
            Some(report::usage_json(error)),
        );
        // The mistake stays the answer, whether or not anybody reads it.
        drop(printed);
    } else {
        let _ = error.print();
    }
    Exit::Usage
}

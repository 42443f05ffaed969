//! Chores of the repository: `cargo xtask --help`.

mod bench;
mod check;
mod cleanroom;
mod debian;
mod fuzz;
mod kvm_lab;
mod run;
mod tidy;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Chores of the SmolVM repository.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Debug, Subcommand)]
enum Chore {
    /// Everything that has to hold: formatting, lints, the repository's rules, all tests
    Check(check::Args),
    /// The repository's own rules
    Tidy,
    /// The two commands of the README on a fresh Debian without a compiler
    Cleanroom(cleanroom::Args),
    /// Run programs, or the tests of KVM, on a real `/dev/kvm` in an emulated machine
    KvmLab(kvm_lab::Args),
    /// Measure this host and write benchmarks/NAME.json
    Bench(bench::Args),
    /// Throw bytes at the protocol's decoder
    Fuzz(fuzz::Args),
    /// Run one test program and have it report times; `check` makes cargo call this
    #[command(hide = true)]
    TestRunner {
        /// The program and its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<std::ffi::OsString>,
    },
}

fn main() -> ExitCode {
    let result = match Cli::parse().chore {
        Chore::Check(args) => check::run(&args),
        Chore::Tidy => tidy::run(),
        Chore::Cleanroom(args) => cleanroom::run(&args),
        Chore::KvmLab(args) => kvm_lab::run(&args),
        Chore::Bench(args) => bench::run(&args),
        Chore::Fuzz(args) => fuzz::run(&args),
        Chore::TestRunner { command } => check::test_runner(&command),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            run::complain(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

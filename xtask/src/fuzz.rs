//! `cargo xtask fuzz`: the test `fuzz` of the protocol, optimised, for as long as asked.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;

use crate::run;

/// Arguments of `fuzz`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How long
    #[arg(long, default_value_t = 30)]
    seconds: u64,
    /// Where to begin; the same seed makes the same inputs [default: the time]
    #[arg(long)]
    seed: Option<u64>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let seed = match args.seed {
        Some(seed) => seed,
        None => SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs(),
    };
    run::say(&format!(
        "fuzzing the wire for {} s from seed {seed}",
        args.seconds
    ));
    run::succeed(
        run::cargo()
            .args([
                "test",
                "--release",
                "--locked",
                "--package",
                "smolvm-proto",
                "--test",
                "fuzz",
            ])
            .args(["--", "--nocapture"])
            .env("SMOLVM_FUZZ_SECONDS", args.seconds.to_string())
            .env("SMOLVM_FUZZ_SEED", seed.to_string()),
    )
}

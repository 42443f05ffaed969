//! `smolvm commit`: what a sandbox has become, as an image to make others from.

use std::time::Instant;

use clap_complete::engine::ArgValueCandidates;
use serde_json::json;
use smolvm_engine::{CommitOptions, ImageName};

use super::{Context, Outcome, block_on, image};
use crate::complete;
use crate::progress::Meter;
use crate::report::CliError;
use crate::signals::Signals;
use crate::units;

/// Arguments of `commit`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  smolvm commit box tools:v1
  smolvm run --image tools:v1 -- true

The image is the whole root file system, /tmp included; other mounts, sockets and what only is in
memory are not in it. /etc/machine-id is empty in it: each sandbox made from it gets one of its own.")]
pub(crate) struct Args {
    /// The sandbox, which has to run
    #[arg(add = ArgValueCandidates::new(complete::sandboxes))]
    name: String,
    /// Name of the image: NAME or NAME:TAG
    #[arg(value_name = "IMAGE")]
    image: String,
    /// Replace an image of that name; sandboxes made from it keep what they have
    #[arg(short, long)]
    force: bool,
    /// Let the sandbox's commands go on meanwhile; what they are writing may be half in the image
    #[arg(long)]
    no_pause: bool,
}

/// Makes the image.
pub(crate) fn run(args: &Args, cx: &Context) -> Result<Outcome, CliError> {
    let began = Instant::now();
    let engine = cx.engine(None)?;
    let name: ImageName = args.image.parse()?;
    let options = CommitOptions {
        replace: args.force,
        pause: !args.no_pause,
    };
    let committed = block_on(async {
        let mut signals = Signals::install()?;
        let mut meter = Meter::new(cx.out, cx.world.stderr_terminal);
        let stop = async {
            signals.next().await;
        };
        let committed = engine
            .commit(&args.name, &name, &options, &mut meter, stop)
            .await;
        meter.finish();
        match committed {
            Err(error) if error.kind() == smolvm_engine::ErrorKind::Cancelled => {
                Err(CliError::Interrupted)
            }
            other => Ok(other?),
        }
    })?;
    cx.out.status(&format!(
        "committed {} to {name}, {}, in {}",
        args.name,
        units::show_bytes(committed.image.size_bytes),
        units::show_duration(began.elapsed())
    ));
    cx.out.line(name.as_str())?;
    Ok(json!({
        "vm": { "name": args.name },
        "image": image::json(&committed.image),
        "replaced": committed.replaced,
        "duration_ms": units::millis(began.elapsed()),
    })
    .into())
}

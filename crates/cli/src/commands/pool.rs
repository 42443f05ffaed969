//! `smolvm pool`: sandboxes made ahead of demand.

use serde_json::{Value, json};
use smolvm_engine::{ErrorKind, KernelChoice, PoolInfo, PullPolicy};

use super::machine::Shape;
use super::{Context, Outcome, block_on};
use crate::progress::Meter;
use crate::report::CliError;
use crate::signals::Signals;
use crate::{prepare, units};

/// Arguments of `pool set`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  smolvm pool set debian-12 --size 4
  smolvm pool set --size 2 --memory 1G --warm-cmd 'python3 -c \"import json\"'

`smolvm run` and `smolvm create` with the same image and sizes take a member of the pool, which
has run `true` and Python before. The pool is filled up again in the background. Members stand
still: they use memory, and no processor. A size of 0 deletes the pool.")]
pub(crate) struct SetArgs {
    /// Image of the members, as --image
    #[arg(value_name = "IMAGE", conflicts_with = "image")]
    of: Option<String>,
    /// Members to have ready
    #[arg(long, value_name = "COUNT")]
    #[arg(value_parser = clap::value_parser!(u32).range(0..=i64::from(smolvm_engine::POOL_SIZE_MAX)))]
    size: u32,
    /// Shell command that each member runs before it is ready; it has to succeed (can be repeated)
    #[arg(long, value_name = "COMMAND")]
    warm_cmd: Vec<String>,
    /// Members have a network device, for sandboxes that get a network
    #[arg(long)]
    network: bool,
    #[command(flatten)]
    shape: Shape,
}

/// Arguments of `pool list`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  smolvm pool ls")]
pub(crate) struct ListArgs {}

/// Arguments of `pool delete`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  smolvm pool rm debian-12 --memory 1G")]
pub(crate) struct DeleteArgs {
    /// Image of the members, as --image
    #[arg(value_name = "IMAGE", conflicts_with = "image")]
    of: Option<String>,
    /// Delete all pools
    #[arg(long)]
    all: bool,
    /// The one whose members have a network device
    #[arg(long)]
    network: bool,
    #[command(flatten)]
    shape: Shape,
}

/// Makes or changes a pool, and fills it.
pub(crate) fn set(args: &SetArgs, cx: &Context) -> Result<Outcome, CliError> {
    let engine = cx.engine(None)?;
    let spec = args.shape.pool(
        args.of.as_ref(),
        args.size,
        args.warm_cmd.clone(),
        args.network,
    );
    block_on(async {
        let mut signals = Signals::install()?;
        if args.size > 0 {
            let kernel = KernelChoice::Auto;
            prepare::pull(cx, &engine, &mut signals, &spec.image, PullPolicy::Missing).await?;
            prepare::image(cx, &engine, &mut signals, &spec.image, &kernel, spec.nic).await?;
        }
        let mut last = 0;
        let mut meter = Meter::new(cx.out, cx.world.stderr_terminal);
        let phase = match args.warm_cmd.len() {
            0 => "making the members".to_owned(),
            1 => "making the members, each of which runs the warm-up command".to_owned(),
            many => format!("making the members, each of which runs {many} warm-up commands"),
        };
        let mut told = |ready: u32| {
            // There may be more than are wanted until it is done.
            last = ready.min(args.size);
            if args.size > 0 {
                let done = f64::from(last) / f64::from(args.size);
                let detail = format!("{last} of {} ready", args.size);
                meter.show(&phase, Some(done), &detail);
            }
        };
        let filled = signals
            .or_interrupted(engine.set_pool(&spec, &mut told))
            .await;
        meter.finish();
        if matches!(filled, Err(CliError::Interrupted)) && args.size > 0 {
            cx.out.status(&format!(
                "the pool has {last} of {} members, and one more may be on its way; the rest is made in \
                 the background when one is next asked for",
                args.size
            ));
        }
        filled
    })?;
    let pool = engine.pools()?.into_iter().find(|pool| pool.spec == spec);
    Ok(json!({ "pool": pool.as_ref().map(describe) }).into())
}

/// Lists the pools.
pub(crate) fn list(_: &ListArgs, cx: &Context) -> Result<Outcome, CliError> {
    let pools = cx.engine(None)?.pools()?;
    cx.out.table(
        &[
            "IMAGE", "CPUS", "MEMORY", "DISK", "NETWORK", "SIZE", "READY", "COMING", "STALE",
            "HITS", "MISSES", "FAILURE",
        ],
        pools
            .iter()
            .map(|pool| {
                vec![
                    pool.spec.image.clone(),
                    pool.spec.cpus.to_string(),
                    units::show_mib(pool.spec.memory_mib),
                    units::show_mib(pool.spec.disk_mib),
                    if pool.spec.nic { "yes" } else { "no" }.to_owned(),
                    pool.spec.size.to_string(),
                    pool.ready.to_string(),
                    pool.coming.to_string(),
                    pool.stale.to_string(),
                    pool.hits.to_string(),
                    pool.misses.to_string(),
                    pool.failure.clone().unwrap_or_default(),
                ]
            })
            .collect(),
    )?;
    let pools: Vec<_> = pools.iter().map(describe).collect();
    Ok(json!({ "pools": pools }).into())
}

/// Deletes a pool, or all.
pub(crate) fn delete(args: &DeleteArgs, cx: &Context) -> Result<Outcome, CliError> {
    let engine = cx.engine(None)?;
    let wanted = args
        .shape
        .pool(args.of.as_ref(), 0, Vec::new(), args.network);
    let mut specs: Vec<_> = engine.pools()?.into_iter().map(|pool| pool.spec).collect();
    specs.retain(|spec| args.all || wanted.is_of_kind_of(spec));
    if specs.is_empty() && !args.all {
        let error = smolvm_engine::Error::new(ErrorKind::NotFound, "there is no such pool");
        return Err(error.hint("see the pools with `smolvm pool ls`").into());
    }
    block_on(async {
        for spec in &mut specs {
            spec.size = 0;
            engine.set_pool(spec, &mut |_| {}).await?;
            cx.out.line(&spec.image)?;
        }
        Ok(())
    })?;
    let deleted: Vec<_> = specs.iter().map(|spec| &spec.image).collect();
    Ok(json!({ "deleted": deleted }).into())
}

fn describe(pool: &PoolInfo) -> Value {
    json!({
        "image": pool.spec.image,
        "vcpus": pool.spec.cpus,
        "memory": pool.spec.memory_mib,
        "disk_size": pool.spec.disk_mib,
        "disk_mode": pool.spec.disk_mode.as_str(),
        "network": pool.spec.nic,
        "size": pool.spec.size,
        "warm_commands": pool.spec.commands,
        "ready": pool.ready,
        "coming": pool.coming,
        "stale": pool.stale,
        "hits": pool.hits,
        "misses": pool.misses,
        "failure": pool.failure,
        "created_at": pool.created_at,
    })
}

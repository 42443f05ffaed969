//! `smolvm template`: machines booted ahead, which new sandboxes are copies of.

use std::time::{Duration, Instant};

use clap_complete::engine::ArgValueCandidates;
use serde_json::{Value, json};
use smolvm_engine::{DEFAULT_IMAGE, NetworkSpec, PullPolicy, TemplateInfo};

use super::machine::{Kind, kernel_choice};
use super::{Context, Outcome, block_on};
use crate::report::CliError;
use crate::signals::Signals;
use crate::{complete, prepare, units};

/// Arguments of `template build`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  smolvm template build --memory 1G

The first sandbox of a kind builds its template itself; this builds it ahead, so that the first is as
quick as the next. It lasts until the host is started again, or something it is made of changes.")]
pub(crate) struct BuildArgs {
    /// Image of the sandboxes
    #[arg(value_name = "IMAGE", default_value = DEFAULT_IMAGE)]
    #[arg(add = ArgValueCandidates::new(complete::images))]
    image: String,
    #[command(flatten)]
    kind: Kind,
    /// Most time to boot [default: 1m]
    #[arg(long, value_name = "TIME", value_parser = units::boot_limit)]
    boot_timeout: Option<Duration>,
    /// Kernel to boot: small, docker, stock (that of the distribution), or a file (vmlinux or bzImage)
    /// [default: small if it was built, else stock]
    #[arg(long, value_name = "KERNEL")]
    kernel: Option<std::path::PathBuf>,
    /// For sandboxes that get a network
    #[arg(long)]
    network: bool,
}

/// Arguments of `template ls`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  smolvm template ls")]
pub(crate) struct ListArgs {}

/// Arguments of `template rm`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  smolvm template rm 0123456789abcdef

Sandboxes that were started from it keep what they have. The next one of the kind builds it anew.")]
#[command(group(clap::ArgGroup::new("which").args(["ids", "all"]).required(true)))]
pub(crate) struct RemoveArgs {
    /// Its id, as `smolvm template ls` shows it
    #[arg(value_name = "ID")]
    #[arg(add = ArgValueCandidates::new(complete::templates))]
    ids: Vec<String>,
    /// All of them
    #[arg(long)]
    all: bool,
}

/// Builds a template.
pub(crate) fn build(args: &BuildArgs, cx: &Context) -> Result<Outcome, CliError> {
    let began = Instant::now();
    let engine = cx.engine(args.boot_timeout)?;
    let kernel = kernel_choice(args.kernel.as_deref())?;
    let mut spec = args.kind.spec(&args.image, kernel)?;
    if args.network {
        spec.network = NetworkSpec::open();
    }
    let done = block_on(async {
        let mut signals = Signals::install()?;
        let (image, kernel) = (&spec.image, &spec.kernel);
        prepare::pull(cx, &engine, &mut signals, image, PullPolicy::Missing).await?;
        prepare::image(cx, &engine, &mut signals, image, kernel, args.network).await?;
        prepare::note_emulation(cx, &engine);
        let (sender, receiver) = std::sync::mpsc::channel();
        prepare::long(cx, &mut signals, move |meter, cancel| {
            let done = engine.build_template(&spec, meter, cancel)?;
            // Received below, when this has ended.
            let _ = sender.send(done);
            Ok(())
        })
        .await?;
        receiver
            .recv()
            .map_err(|error| CliError::io("building the template", std::io::Error::other(error)))
    })?;
    let id = &done.template.id;
    cx.out.status(&if done.built {
        format!(
            "built {id}, {}, in {}",
            units::show_bytes(done.template.size_bytes),
            units::show_duration(began.elapsed())
        )
    } else {
        format!("{id} is there already")
    });
    cx.out.line(id)?;
    Ok(json!({
        "built": done.built,
        "template": object(&done.template),
        "duration_ms": units::millis(began.elapsed()),
    })
    .into())
}

/// Lists the templates.
pub(crate) fn list(_: &ListArgs, cx: &Context) -> Result<Outcome, CliError> {
    let templates = cx.engine(None)?.templates()?;
    let now = jiff::Timestamp::now();
    cx.out.table(
        &[
            "ID", "IMAGE", "KERNEL", "CPUS", "MEMORY", "DISK", "SIZE", "CREATED", "STATE",
        ],
        templates
            .iter()
            .map(|template| row(template, now))
            .collect(),
    )?;
    let templates: Vec<_> = templates.iter().map(object).collect();
    Ok(json!({ "templates": templates }).into())
}

/// Removes templates; the first that fails ends it, and those before it are told.
pub(crate) fn remove(args: &RemoveArgs, cx: &Context) -> Result<Outcome, CliError> {
    let engine = cx.engine(None)?;
    let ids: Vec<String> = if args.all {
        let all = engine.templates()?;
        all.into_iter().map(|template| template.id).collect()
    } else {
        args.ids.clone()
    };
    let mut deleted = Vec::new();
    let mut error = None;
    for id in ids {
        match engine.remove_template(&id) {
            Ok(()) => {
                cx.out.line(&id)?;
                deleted.push(id);
            }
            // Somebody else was faster with one that nobody named.
            Err(failure) if args.all && failure.kind() == smolvm_engine::ErrorKind::NotFound => {}
            Err(failure) => {
                error = Some(failure.into());
                break;
            }
        }
    }
    Ok(Outcome {
        data: json!({ "deleted": deleted }),
        error,
    })
}

fn row(template: &TemplateInfo, now: jiff::Timestamp) -> Vec<String> {
    let unknown = || "-".to_owned();
    let mut cells = vec![template.id.clone()];
    match &template.shape {
        Some(shape) => cells.extend([
            match shape.images.as_slice() {
                [] => unknown(),
                names => names.join(", "),
            },
            shape.kernel.clone(),
            shape.cpus.to_string(),
            units::show_mib(shape.memory_mib),
            shape
                .disk_mib
                .map_or_else(|| "memory".to_owned(), units::show_mib),
        ]),
        None => cells.extend(std::iter::repeat_with(unknown).take(5)),
    }
    cells.extend([
        units::show_bytes(template.size_bytes),
        units::show_age(template.created_at, now),
        match &template.stale {
            Some(why) => format!("stale: {why}"),
            None => "current".to_owned(),
        },
    ]);
    cells
}

fn object(template: &TemplateInfo) -> Value {
    let shape = template.shape.as_ref();
    json!({
        "id": template.id,
        "images": shape.map(|shape| &shape.images),
        "image_digest": shape.map(|shape| &shape.image_digest),
        "kernel": shape.map(|shape| &shape.kernel),
        "engine": shape.map(|shape| &shape.engine),
        "cpus": shape.map(|shape| shape.cpus),
        "memory_mib": shape.map(|shape| shape.memory_mib),
        "disk_mib": shape.and_then(|shape| shape.disk_mib),
        "network": shape.map(|shape| shape.nic),
        "size_bytes": template.size_bytes,
        "created_at": template.created_at,
        "current": template.stale.is_none(),
        "stale_because": template.stale,
    })
}

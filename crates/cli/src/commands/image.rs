//! `smolvm image`: what sandboxes are made from.

use std::path::PathBuf;

use clap_complete::engine::ArgValueCandidates;
use serde_json::{Value, json};
use smolvm_engine::{ImageInfo, ImageName, Limits, LoadOptions, LoadSource};

use super::{Context, Outcome, block_on};
use crate::report::CliError;
use crate::signals::Signals;
use crate::{complete, prepare, units};

/// Characters of a digest shown in a table; as many as other tools show.
const DIGEST_CHARS: usize = 12;

/// Arguments of `image list`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  smolvm image list")]
pub(crate) struct ListArgs {}

/// Lists the images on this host.
pub(crate) fn list(_: &ListArgs, cx: &Context) -> Result<Outcome, CliError> {
    let images = cx.engine(None)?.images()?;
    let now = jiff::Timestamp::now();
    cx.out.table(
        &["NAME", "DIGEST", "SIZE", "CREATED", "SOURCE"],
        images
            .iter()
            .map(|image| {
                let digest = image
                    .digest
                    .strip_prefix("sha256:")
                    .unwrap_or(&image.digest);
                vec![
                    image.name.clone(),
                    digest.chars().take(DIGEST_CHARS).collect(),
                    units::show_bytes(image.size_bytes),
                    units::show_age(image.created_at, now),
                    image.source.clone(),
                ]
            })
            .collect(),
    )?;
    let images: Vec<_> = images.iter().map(json).collect();
    Ok(json!({ "images": images }).into())
}

/// An image in JSON.
pub(super) fn json(image: &ImageInfo) -> Value {
    json!({
        "name": image.name,
        "digest": image.digest,
        "size_bytes": image.size_bytes,
        "created_at": image.created_at,
        "source": image.source,
        "manifest": image.manifest,
    })
}

/// Arguments of `image inspect`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  smolvm image inspect python:3.12-slim")]
pub(crate) struct InspectArgs {
    /// The image
    #[arg(add = ArgValueCandidates::new(complete::images))]
    name: String,
}

/// Shows everything about an image.
pub(crate) fn inspect(args: &InspectArgs, cx: &Context) -> Result<Outcome, CliError> {
    let image = cx.engine(None)?.image(&args.name)?;
    let config = &image.config;
    let words = |words: &[String]| words.join(" ");
    let said = |text: &Option<String>| text.clone().unwrap_or_default();
    let mut lines = vec![
        ("name", image.name.clone()),
        ("digest", image.digest.clone()),
        ("manifest", said(&image.manifest)),
        ("size", units::show_bytes(image.size_bytes)),
        ("created", image.created_at.to_string()),
        ("source", image.source.clone()),
        ("user", said(&config.user)),
        ("workdir", said(&config.workdir)),
        ("entrypoint", words(&config.entrypoint)),
        ("cmd", words(&config.cmd)),
    ];
    for (name, value) in &config.env {
        lines.push(("env", format!("{name}={value}")));
    }
    for port in &config.ports {
        lines.push(("port", port.clone()));
    }
    for (name, value) in &config.labels {
        lines.push(("label", format!("{name}={value}")));
    }
    for (name, value) in lines.iter().filter(|(_, value)| !value.is_empty()) {
        // An image is a stranger's: its words must not reach the terminal as they are.
        cx.out
            .line(&format!("{name:<12}{}", value.escape_debug()))?;
    }
    let mut data = json(&image);
    data["config"] = json!({
        "user": config.user,
        "workdir": config.workdir,
        "env": config.env.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>(),
        "entrypoint": config.entrypoint,
        "cmd": config.cmd,
        "labels": config.labels.iter().cloned().collect::<std::collections::BTreeMap<_, _>>(),
        "ports": config.ports,
    });
    Ok(json!({ "image": data }).into())
}

/// What an image may come to.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct LimitArgs {
    /// Most an image may unpack to: 65536 (MiB), 64G
    #[arg(long, value_name = "SIZE", value_parser = units::mib)]
    #[arg(default_value_t = 65_536)]
    max_size: u32,
    /// Most entries the layers of an image may have
    #[arg(long, value_name = "COUNT", default_value_t = Limits::default().entries)]
    max_entries: u64,
}

impl LimitArgs {
    /// What was meant.
    pub(crate) fn limits(&self) -> Limits {
        Limits {
            bytes: u64::from(self.max_size) << 20,
            entries: self.max_entries,
        }
    }
}

/// Arguments of `image load`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  docker save app:1 | smolvm image load
  smolvm image load app.tar --name app:2

Takes an OCI image layout, as a directory or archive, and what `docker save` writes; gzip and zstd
are understood. An image of the same name is replaced; sandboxes made from it keep what they have.")]
pub(crate) struct LoadArgs {
    /// The archive, or `-` for standard input
    #[arg(default_value = "-", value_name = "FILE")]
    file: PathBuf,
    /// Name of the image, in place of those in the archive: NAME or NAME:TAG
    #[arg(short, long)]
    name: Option<String>,
    #[command(flatten)]
    limits: LimitArgs,
}

/// Takes images over.
pub(crate) fn load(args: &LoadArgs, cx: &Context) -> Result<Outcome, CliError> {
    let engine = cx.engine(None)?;
    let stdin = args.file.as_os_str() == "-";
    if stdin && cx.world.stdin_terminal {
        return Err(CliError::usage(
            "no archive was given, and standard input is a terminal",
            "docker save IMAGE | smolvm image load",
        ));
    }
    let options = LoadOptions {
        name: args.name.as_deref().map(str::parse).transpose()?,
        limits: args.limits.limits(),
    };
    let (sender, result) = std::sync::mpsc::channel();
    let file = args.file.clone();
    block_on(async {
        let mut signals = Signals::install()?;
        prepare::long(cx, &mut signals, move |meter, cancel| {
            let source = if stdin {
                LoadSource::Stream(rustix::stdio::stdin())
            } else {
                LoadSource::Path(&file)
            };
            let loaded = engine.load_images(source, &options, meter, cancel)?;
            // Somebody waits for it.
            let _ = sender.send(loaded);
            Ok(())
        })
        .await
    })?;
    let loaded = result.try_recv().unwrap_or_default();
    let mut images = Vec::new();
    for one in loaded {
        cx.out.line(&one.image.name)?;
        let mut image = json(&one.image);
        image["replaced"] = json!(one.replaced);
        images.push(image);
    }
    Ok(json!({ "images": images }).into())
}

/// Arguments of `image pull`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  smolvm image pull python:3.12-slim
  smolvm image pull registry.example/me/app@sha256:…

Names are completed as Docker does: `python` is `docker.io/library/python:latest`. Credentials are
those of `docker login` and `podman login`; SMOLVM_REGISTRY_MIRRORS=docker.io=https://mirror.example
names mirrors. What an interrupted pull brought is used by the next.")]
pub(crate) struct PullArgs {
    /// The image: NAME, NAME:TAG or NAME@DIGEST
    image: String,
    /// Registry that may be asked without encryption; those on this host always may
    #[arg(long, value_name = "HOST")]
    plain_http: Vec<String>,
    #[command(flatten)]
    limits: LimitArgs,
}

/// Pulls an image.
pub(crate) fn pull(args: &PullArgs, cx: &Context) -> Result<Outcome, CliError> {
    let engine = cx.engine_with(None, &args.plain_http)?;
    let (name, limits) = (args.image.clone(), args.limits.limits());
    let (sender, result) = std::sync::mpsc::channel();
    let timed = block_on(async {
        let mut signals = Signals::install()?;
        prepare::long(cx, &mut signals, move |meter, cancel| {
            let pulled = engine.pull_image(&name, limits, meter, cancel)?;
            // Somebody waits for it.
            let _ = sender.send(pulled);
            Ok(())
        })
        .await
    })?;
    let Ok(pulled) = result.try_recv() else {
        return Err(CliError::Interrupted);
    };
    if pulled.known {
        cx.out.status("it was there already");
    }
    cx.out.line(&pulled.image.name)?;
    Ok(json!({
        "image": json(&pulled.image),
        "replaced": pulled.replaced,
        "pulled": !pulled.known,
        "phases": prepare::phases(&timed),
    })
    .into())
}

/// Arguments of `image save`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  smolvm image save tools:v1 -o tools.tar
  smolvm image save tools:v1 | docker load

The archive is an OCI image layout, and what `docker load` takes. Each image has one layer.")]
pub(crate) struct SaveArgs {
    /// The images
    #[arg(required = true, add = ArgValueCandidates::new(complete::images))]
    images: Vec<String>,
    /// The archive, or `-` for standard output; one that is there is replaced
    #[arg(short, long, default_value = "-", value_name = "FILE")]
    output: PathBuf,
}

/// Writes images as an archive.
pub(crate) fn save(args: &SaveArgs, cx: &Context) -> Result<Outcome, CliError> {
    let engine = cx.engine(None)?;
    let stdout = args.output.as_os_str() == "-";
    if stdout && (cx.out.json || cx.world.stdout_terminal) {
        return Err(CliError::usage(
            "an archive is nothing for a terminal or for JSON",
            "smolvm image save IMAGE -o FILE",
        ));
    }
    for image in &args.images {
        // Before a file is made.
        engine.image(image)?;
    }
    let (images, output) = (args.images.clone(), args.output.clone());
    block_on(async {
        let mut signals = Signals::install()?;
        prepare::long(cx, &mut signals, move |meter, cancel| {
            if stdout {
                let mut out = std::io::stdout().lock();
                engine.save_images(&images, &mut out, meter, cancel)
            } else {
                engine.save_images_to(&images, &output, meter, cancel)
            }
        })
        .await
    })?;
    Ok(json!({ "images": args.images, "file": args.output }).into())
}

/// Arguments of `image prune`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  smolvm image prune
  smolvm image prune --all --dry-run

Without --all only the layers that builds keep go, and what killed processes and interrupted pulls have
left. The default image stays.")]
pub(crate) struct PruneArgs {
    /// Also every image that no sandbox, snapshot or pool needs
    #[arg(short, long)]
    all: bool,
    /// Only say what would be removed
    #[arg(long)]
    dry_run: bool,
}

/// Removes what is not needed.
pub(crate) fn prune(args: &PruneArgs, cx: &Context) -> Result<Outcome, CliError> {
    let pruned = cx.engine(None)?.prune_images(args.all, args.dry_run)?;
    let bytes: u64 = pruned.iter().map(|one| one.bytes).sum();
    for one in &pruned {
        let size = units::show_bytes(one.bytes);
        cx.out
            .line(&format!("{} {} ({size})", one.kind, one.name))?;
    }
    let things = pruned.iter();
    let things =
        things.map(|one| json!({ "kind": one.kind, "name": one.name, "bytes": one.bytes }));
    Ok(json!({
        "dry_run": args.dry_run,
        "pruned": things.collect::<Vec<_>>(),
        "bytes": bytes,
    })
    .into())
}

/// Arguments of `image tag`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  smolvm image tag python:3.12-slim python:current

Takes the name from an image that has it; sandboxes made from that keep what they have.")]
pub(crate) struct TagArgs {
    /// The image
    #[arg(add = ArgValueCandidates::new(complete::images))]
    image: String,
    /// Its further name: NAME or NAME:TAG
    name: String,
}

/// Gives an image a further name.
pub(crate) fn tag(args: &TagArgs, cx: &Context) -> Result<Outcome, CliError> {
    let name: ImageName = args.name.parse()?;
    let tagged = cx.engine(None)?.tag_image(&args.image, &name)?;
    cx.out.line(name.as_str())?;
    Ok(json!({ "image": json(&tagged.image), "replaced": tagged.replaced }).into())
}

/// Arguments of `image delete`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  smolvm image rm tools:v1

Refused while a sandbox needs it. Its shared disk goes with it.")]
pub(crate) struct DeleteArgs {
    /// The images
    #[arg(required = true, value_name = "NAME")]
    #[arg(add = ArgValueCandidates::new(complete::images))]
    names: Vec<String>,
}

/// Removes images; the first that fails ends it, and those before it are told.
pub(crate) fn delete(args: &DeleteArgs, cx: &Context) -> Result<Outcome, CliError> {
    let engine = cx.engine(None)?;
    let mut deleted = Vec::new();
    let mut digests = Vec::new();
    let mut freed_bytes = 0;
    let mut error = None;
    for name in &args.names {
        match engine.remove_image(name) {
            Ok(removed) => {
                cx.out.line(&removed.name)?;
                deleted.push(removed.name);
                digests.push(removed.digest);
                freed_bytes += removed.freed_bytes;
            }
            Err(failure) => {
                error = Some(failure.into());
                break;
            }
        }
    }
    Ok(Outcome {
        data: json!({
            "deleted": deleted,
            "digests": digests,
            "freed_bytes": freed_bytes,
        }),
        error,
    })
}

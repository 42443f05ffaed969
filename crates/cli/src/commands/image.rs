//! `smolvm image`: what sandboxes are made from.

use clap_complete::engine::ArgValueCandidates;
use serde_json::{Value, json};
use smolvm_engine::ImageInfo;

use super::{Context, Outcome};
use crate::complete;
use crate::report::CliError;
use crate::units;

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
    })
}

/// Arguments of `image delete`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  smolvm image rm tools:v1

Refused while a sandbox needs it. Its shared disk goes with it.")]
pub(crate) struct DeleteArgs {
    /// The image
    #[arg(add = ArgValueCandidates::new(complete::images))]
    name: String,
}

/// Removes an image.
pub(crate) fn delete(args: &DeleteArgs, cx: &Context) -> Result<Outcome, CliError> {
    let removed = cx.engine(None)?.remove_image(&args.name)?;
    cx.out.line(&args.name)?;
    Ok(json!({
        "deleted": [args.name],
        "digest": removed.digest,
        "freed_bytes": removed.freed_bytes,
    })
    .into())
}

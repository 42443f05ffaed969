//! OCI images into the store.

use std::io::Read;
use std::path::Path;

use jiff::Timestamp;
use smolvm_host::cancel::Cancel;
use smolvm_host::image::Limits;
use smolvm_host::oci::{
    Archive, ArchivedImage, ImageConfig, Layer, OciRequest, Platform, unpack_image,
};

use crate::assets::{Assets, Progress, Watcher, unknown_image};
use crate::engine::{Engine, ImageInfo};
use crate::error::{Error, ErrorKind, Result};
use crate::images::{ImageName, Making, Published, Staged, reference};
use crate::store::{ImageRow, Store};

/// Where an archive of images comes from.
pub enum LoadSource<'a> {
    /// A file or directory.
    Path(&'a Path),
    /// A stream.
    Stream(&'a mut (dyn Read + Send)),
}

impl std::fmt::Debug for LoadSource<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Path(path) => f.debug_tuple("Path").field(path).finish(),
            Self::Stream(_) => f.write_str("Stream"),
        }
    }
}

/// How to load.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LoadOptions {
    /// The name the image gets, in place of those it has in the archive. For an archive with one
    /// image only.
    pub name: Option<ImageName>,
    /// What an image may unpack to.
    pub limits: Limits,
}

/// An image that came into the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// The image.
    pub image: ImageInfo,
    /// The digest that the name had before, if another.
    pub replaced: Option<String>,
}

impl From<Published> for Loaded {
    fn from(published: Published) -> Self {
        Self {
            image: published.image.into(),
            replaced: published.replaced,
        }
    }
}

impl Engine {
    /// Takes over the images of an archive: an OCI image layout, as a directory or tar file, or what
    /// `docker save` writes, compressed or not. An image of the same name is replaced; sandboxes that
    /// were made from it keep it. Long; run it on a thread that may block.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidInput`] if it is no such archive, not what its digests say, or more than
    /// the limits allow; [`ErrorKind::NotFound`] if it is not there, or is for other hosts;
    /// [`ErrorKind::NoSpace`], [`ErrorKind::Cancelled`]. The images before the one that failed are
    /// there then, and nothing of the others.
    pub fn load_images(
        &self,
        source: LoadSource<'_>,
        options: &LoadOptions,
        watcher: &mut dyn Watcher,
        cancel: &Cancel,
    ) -> Result<Vec<Loaded>> {
        let mut store = self.store()?;
        let assets = self.assets();
        // Holds what has to be written down before it can be read, and goes with it.
        let making = assets.begin_making()?;
        let spool = making.dir.join("spool");
        watcher.progress(&Progress {
            task: "images".to_owned(),
            phase: "reading the archive".to_owned(),
            fraction: None,
        });
        let most = options.limits.bytes;
        let (archive, from) = match source {
            LoadSource::Path(path) => (
                Archive::open(self.os(), path, &spool, most, cancel),
                format!("loaded from {}", path.display()),
            ),
            LoadSource::Stream(stream) => (
                Archive::spool(self.os(), stream, "standard input", &spool, most, cancel),
                "loaded from standard input".to_owned(),
            ),
        };
        let archive = archive.map_err(input)?;
        let images = archive.images(&Platform::of_guests()).map_err(input)?;
        let names = names(&images, options.name.as_ref())?;
        let mut loaded = Vec::new();
        for (image, names) in images.iter().zip(names) {
            let (first, others) = names.split_first().expect("each has a name");
            let staged = assets.stage_oci(
                assets.begin_making()?,
                archive.layers(image),
                &StageOci {
                    name: first,
                    source: &from,
                    config: &image.config,
                    manifest: image.manifest.map(|digest| digest.to_string()),
                    limits: options.limits,
                },
                watcher,
                cancel,
            )?;
            let published = assets.publish_image(&mut store, staged, first, true)?;
            let row = published.image.clone();
            loaded.push(published.into());
            for name in others {
                loaded.push(assets.name_image(&mut store, &row, name)?.into());
            }
        }
        drop(archive);
        drop(making);
        Ok(loaded)
    }

    /// Gives an image a further name. One that had the name before loses it; sandboxes that were made
    /// from it keep it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`].
    pub fn tag_image(&self, image: &str, name: &ImageName) -> Result<Loaded> {
        let Some(mut store) = Store::open_existing(&self.layout().database())? else {
            return Err(unknown_image(image));
        };
        let row = store.image(image)?.ok_or_else(|| unknown_image(image))?;
        Ok(self.assets().name_image(&mut store, &row, name)?.into())
    }
}

/// What to make of layers.
pub(crate) struct StageOci<'a> {
    pub(crate) name: &'a ImageName,
    pub(crate) source: &'a str,
    pub(crate) config: &'a ImageConfig,
    pub(crate) manifest: Option<String>,
    pub(crate) limits: Limits,
}

impl Assets<'_> {
    /// Makes an image of layers, up to the point where it only needs its name.
    pub(crate) fn stage_oci(
        &self,
        making: Making,
        layers: Vec<Layer<'_>>,
        what: &StageOci<'_>,
        watcher: &mut dyn Watcher,
        cancel: &Cancel,
    ) -> Result<Staged> {
        let created_at = Timestamp::now();
        let task = format!("image {}", what.name);
        let mut told = None;
        let mut progress = |done: u64, total: u64| {
            // A report for each read would be more work than the reading.
            let percent = done * 100 / total.max(1);
            if told == Some(percent) {
                return;
            }
            told = Some(percent);
            #[expect(clippy::cast_precision_loss, reason = "it is at most 100")]
            let fraction = percent as f64 / 100.0;
            watcher.progress(&Progress {
                task: task.clone(),
                phase: "unpacking".to_owned(),
                fraction: Some(fraction),
            });
        };
        let image = unpack_image(
            self.os,
            layers,
            &OciRequest {
                name: what.name.as_str(),
                created: &created_at.to_string(),
                source: what.source,
                config: what.config,
                limits: what.limits,
            },
            &making.dir.join("image"),
            cancel,
            &mut progress,
        )
        .map_err(input)?;
        Ok(Staged {
            making,
            manifest: image.manifest,
            created_at,
            oci: what.manifest.clone(),
            config: what.config.clone(),
        })
    }

    /// Gives an image that is there a further name.
    pub(crate) fn name_image(
        &self,
        store: &mut Store,
        image: &ImageRow,
        name: &ImageName,
    ) -> Result<Published> {
        let turn = self.names_turn()?;
        // Removed since it was looked up: then there is nothing to name.
        let known = store.image(&image.name)?;
        if known.is_none_or(|known| known.digest != image.digest) {
            return Err(unknown_image(&image.name));
        }
        let old = store.image_named(name.as_str())?;
        let image = ImageRow {
            name: name.to_string(),
            ..image.clone()
        };
        store.put_image(&image)?;
        if let Err(error) = self.sweep_images(store, &turn) {
            tracing::warn!(%error, "could not remove what no image needs any more");
        }
        let replaced = old
            .map(|old| old.digest)
            .filter(|digest| *digest != image.digest);
        Ok(Published { image, replaced })
    }
}

/// What a stranger's image was refused for is nothing wrong with our own state.
pub(crate) fn input(error: smolvm_host::HostError) -> Error {
    let corrupt = error.kind() == smolvm_host::HostErrorKind::Corrupt;
    let error = Error::from(error);
    if corrupt {
        error.with_kind(ErrorKind::InvalidInput)
    } else {
        error
    }
}

/// The names each image of an archive gets, at least one.
fn names(images: &[ArchivedImage], wanted: Option<&ImageName>) -> Result<Vec<Vec<ImageName>>> {
    if let Some(name) = wanted {
        return match images {
            [_] => Ok(vec![vec![name.clone()]]),
            _ => Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "the archive has {} images, and one name was given",
                    images.len()
                ),
            )
            .hint("leave --name out to take over the names in the archive")),
        };
    }
    let all = images.iter().map(|image| {
        let mut names = Vec::new();
        for text in &image.names {
            // An OCI layout may have a mere tag there, which is no name.
            let is_name = text.contains([':', '/']);
            if let (true, Ok(reference)) = (is_name, reference(text)) {
                let name = ImageName::from(&reference);
                if !names.contains(&name) {
                    names.push(name);
                }
            }
        }
        if names.is_empty() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "an image in the archive has no name",
            )
            .hint("give it one with --name NAME:TAG"));
        }
        Ok(names)
    });
    all.collect()
}

//! OCI images into the store.

use std::fs::File;
use std::io::Write;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;

use jiff::Timestamp;
use smolvm_host::cancel::Cancel;
use smolvm_host::image::Limits;
use smolvm_host::oci::{
    Archive, ArchivedImage, ImageConfig, Layer, OciRequest, Platform, Remote, RemoteLayer,
    SavedImage, save_images, unpack_image,
};
use smolvm_host::os::{Lock, Os};

use crate::assets::{Assets, Progress, Watcher, unknown_image};
use crate::engine::{Engine, ImageInfo, Pruned, entries, used_below};
use crate::error::{Error, ErrorKind, Result};
use crate::images::{ImageName, Making, Published, Staged, reference};
use crate::store::{ImageRow, Store};

/// Where an archive of images comes from.
pub enum LoadSource<'a> {
    /// A file or directory.
    Path(&'a Path),
    /// A stream. Waiting for it ends when loading is cancelled.
    Stream(BorrowedFd<'a>),
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
                Archive::spool(
                    self.os(),
                    &mut cancel.reader(stream),
                    "standard input",
                    &spool,
                    most,
                    cancel,
                ),
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

// ---- pulling ----

/// When an image is pulled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PullPolicy {
    /// If it is not there.
    #[default]
    Missing,
    /// Each time; what is there already is not brought again.
    Always,
    /// Not at all.
    Never,
}

/// Layers brought at once.
const FETCHERS: usize = 3;

/// What came of a pull.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pulled {
    /// The image.
    pub image: ImageInfo,
    /// The digest that the name had before, if another.
    pub replaced: Option<String>,
    /// Whether the very same image was there already, under this name or another.
    pub known: bool,
}

impl Engine {
    /// Pulls an image from a registry, by tag or digest. One that is there already, by the digest of
    /// its manifest, only gets the name. Of several that pull the same at once, one does the work. What
    /// came before it was interrupted is kept for the next attempt. Long; run it on a thread that may
    /// block.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] if there is no such image, or none for guests of this host;
    /// [`ErrorKind::PermissionDenied`]; [`ErrorKind::Network`]; [`ErrorKind::InvalidInput`] if it is
    /// not what its digests say, or more than the limits allow; [`ErrorKind::NoSpace`];
    /// [`ErrorKind::Cancelled`]. Images are as they were then.
    pub fn pull_image(
        &self,
        name: &str,
        limits: Limits,
        watcher: &mut dyn Watcher,
        cancel: &Cancel,
    ) -> Result<Pulled> {
        let reference = reference(name)?;
        let name = ImageName::from(&reference);
        let task = format!("image {name}");
        watcher.progress(&Progress {
            task: task.clone(),
            phase: format!("asking {}", reference.registry()),
            fraction: None,
        });
        let settings = &self.config().registries;
        let guests = Platform::of_guests();
        let remote =
            Remote::find(&reference, &guests, settings, self.programs(), cancel).map_err(input)?;
        let mut store = self.store()?;
        let assets = self.assets();
        if let Some(pulled) = assets.name_known(&mut store, &remote, &name)? {
            return Ok(pulled);
        }
        let turn = assets.pull_turn(&remote, &task, watcher)?;
        // Whoever had the turn before may have done the work.
        if let Some(pulled) = assets.name_known(&mut store, &remote, &name)? {
            return Ok(pulled);
        }
        let pulled = assets.pull(&mut store, &remote, &name, limits, watcher, cancel);
        drop(turn);
        pulled
    }

    /// Makes sure that an image is there before a sandbox is made of it: pulls it as `policy` says.
    /// The default image is never pulled.
    ///
    /// # Errors
    ///
    /// As [`Engine::pull_image`]; [`ErrorKind::NotFound`] if it is not there and is not to be pulled.
    pub fn require_image(
        &self,
        name: &str,
        policy: PullPolicy,
        watcher: &mut dyn Watcher,
        cancel: &Cancel,
    ) -> Result<()> {
        if self.needs_pull(name, policy)? {
            self.pull_image(name, Limits::default(), watcher, cancel)?;
        }
        Ok(())
    }

    /// Whether [`Engine::require_image`] would pull.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] if it is not there and is not to be pulled.
    pub fn needs_pull(&self, name: &str, policy: PullPolicy) -> Result<bool> {
        if name == crate::spec::DEFAULT_IMAGE {
            return Ok(false);
        }
        let known = self.image(name);
        match (policy, known) {
            (PullPolicy::Never | PullPolicy::Missing, Ok(_)) => Ok(false),
            // What was made on this host is in no registry.
            (PullPolicy::Always, Ok(image)) => Ok(image.manifest.is_some()),
            (PullPolicy::Never, Err(error)) => Err(error.hint(
                "leave `--pull never` out, or get it first with `smolvm image pull` or `load`",
            )),
            (_, Err(error)) if error.kind() == ErrorKind::NotFound => Ok(true),
            (_, Err(error)) => Err(error),
        }
    }

    /// Removes what no image needs: what killed processes and interrupted pulls left, and with `all`
    /// every image that no sandbox, snapshot or pool needs, but for the default one. With `dry_run` it
    /// only says what it would remove.
    pub fn prune_images(&self, all: bool, dry_run: bool) -> Result<Vec<Pruned>> {
        let Some(store) = Store::open_existing(&self.layout().database())? else {
            return Ok(Vec::new());
        };
        let mut pruned = Vec::new();
        if all {
            for image in store.images()? {
                if image.name == crate::spec::DEFAULT_IMAGE || store.needs_image(&image)? {
                    continue;
                }
                let bytes = used_below(&self.layout().image(&image.digest));
                if !dry_run {
                    match self.remove_image(&image.name) {
                        // Used or removed since.
                        Err(error)
                            if matches!(error.kind(), ErrorKind::Busy | ErrorKind::NotFound) =>
                        {
                            continue;
                        }
                        other => drop(other?),
                    }
                }
                pruned.push(Pruned {
                    kind: "image",
                    name: image.name,
                    bytes,
                });
            }
        }
        let assets = self.assets();
        let turn = assets.names_turn()?;
        let mut unused = assets.unused_images(&store, &turn)?;
        unused.extend(assets.idle_downloads()?);
        for path in unused {
            pruned.push(Pruned {
                kind: "leftover",
                name: path.display().to_string(),
                bytes: used_below(&path),
            });
            if !dry_run {
                assets.remove_unused_image(&path, &turn)?;
            }
        }
        Ok(pruned)
    }
}

impl Assets<'_> {
    /// Gives the image of this manifest the name, if it is there.
    fn name_known(
        &self,
        store: &mut Store,
        remote: &Remote,
        name: &ImageName,
    ) -> Result<Option<Pulled>> {
        let Some(image) = store.image_of_manifest(&remote.digest.to_string())? else {
            return Ok(None);
        };
        let published = match self.name_image(store, &image, name) {
            Ok(published) => published,
            // Removed at this moment: then it is to be brought.
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        Ok(Some(Pulled {
            image: published.image.into(),
            replaced: published.replaced,
            known: true,
        }))
    }

    /// Waits until nobody else pulls the same image.
    fn pull_turn(
        &self,
        remote: &Remote,
        task: &str,
        watcher: &mut dyn Watcher,
    ) -> Result<PullTurn> {
        let dir = self.layout.downloads();
        self.os.create_dir_all("make the directory", &dir)?;
        let path = dir.join(format!("pull-{}.lock", remote.digest.hex()));
        let mut told = false;
        loop {
            let lock = match self.os.try_lock("lock the pull", &path)? {
                Some(lock) => lock,
                None => {
                    if !told {
                        watcher.progress(&Progress {
                            task: task.to_owned(),
                            phase: "waiting for another process that pulls it".to_owned(),
                            fraction: None,
                        });
                        told = true;
                    }
                    self.os.lock("lock the pull", &path)?
                }
            };
            // Whoever had it removes the file with it.
            if lock.is_at(&path) {
                return Ok(PullTurn {
                    os: self.os.clone(),
                    path,
                    _lock: lock,
                });
            }
        }
    }

    fn pull(
        &self,
        store: &mut Store,
        remote: &Remote,
        name: &ImageName,
        limits: Limits,
        watcher: &mut dyn Watcher,
        cancel: &Cancel,
    ) -> Result<Pulled> {
        let layers = remote.layers();
        let total: u64 = layers
            .iter()
            .fold(0, |sum, layer| sum.saturating_add(layer.size));
        if total > limits.bytes {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("image `{name}` has {total} bytes as it lies in the registry, more than the limit"),
            )
            .hint("if it comes from somebody you trust, raise the limit with --max-size"));
        }
        let files = self.fetch_layers(remote, &layers, name, watcher);
        let files = match files {
            Ok(files) => files,
            Err(error) => {
                // A full disk is to be as it was; after anything else the next attempt goes on.
                if error.kind() == ErrorKind::NoSpace {
                    self.remove_downloads(&layers)?;
                }
                return Err(error);
            }
        };
        let layers_to_unpack = layers
            .iter()
            .zip(files)
            .map(|(layer, file)| layer.layer(file));
        let staged = self.begin_making().and_then(|making| {
            self.stage_oci(
                making,
                layers_to_unpack.collect(),
                &StageOci {
                    name,
                    source: &format!("pulled as {name}"),
                    config: &remote.config,
                    manifest: Some(remote.digest.to_string()),
                    limits,
                },
                watcher,
                cancel,
            )
        });
        let staged = match staged {
            Ok(staged) => staged,
            Err(error) => {
                if error.kind() != ErrorKind::Cancelled {
                    self.remove_downloads(&layers)?;
                }
                return Err(error);
            }
        };
        let published = self.publish_image(store, staged, name, true)?;
        // What is left of the download is no reason to say that the image is not there.
        if let Err(error) = self.remove_downloads(&layers) {
            tracing::warn!(%error, "could not remove what was downloaded");
        }
        Ok(Pulled {
            image: published.image.into(),
            replaced: published.replaced,
            known: false,
        })
    }

    /// Brings all layers to the disk, some at once, and opens them.
    fn fetch_layers(
        &self,
        remote: &Remote,
        layers: &[RemoteLayer],
        name: &ImageName,
        watcher: &mut dyn Watcher,
    ) -> Result<Vec<File>> {
        let dir = self.layout.downloads();
        let total: u64 = layers.iter().map(|layer| layer.size).sum();
        let next = AtomicUsize::new(0);
        let failed = AtomicBool::new(false);
        let (sender, events) = mpsc::sync_channel::<Fetched>(64);
        let (next, failed, dir) = (&next, &failed, &dir);
        let mut files: Vec<Option<File>> = layers.iter().map(|_| None).collect();
        let mut failure = None;
        std::thread::scope(|scope| {
            for _ in 0..FETCHERS.min(layers.len()) {
                let sender = sender.clone();
                scope.spawn(move || {
                    loop {
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        let Some(layer) = layers.get(at) else { break };
                        if failed.load(Ordering::Relaxed) {
                            break;
                        }
                        let mut told = 0;
                        let mut progress = |bytes: u64| {
                            // A report for each read would be more work than the reading.
                            if bytes.abs_diff(told) >= REPORT_BYTES || bytes == layer.size {
                                told = bytes;
                                let _ = sender.send(Fetched::Part(at, bytes));
                            }
                        };
                        let result = remote.fetch(self.os, layer, dir, &mut progress);
                        failed.fetch_or(result.is_err(), Ordering::Relaxed);
                        let _ = sender.send(Fetched::Whole(at, result));
                    }
                });
            }
            drop(sender);
            let mut have = vec![0; layers.len()];
            for event in events {
                match event {
                    Fetched::Part(at, bytes) => have[at] = bytes,
                    Fetched::Whole(at, Ok(file)) => {
                        files[at] = Some(file);
                        continue;
                    }
                    Fetched::Whole(_, Err(error)) => {
                        failure.get_or_insert(error);
                        continue;
                    }
                }
                let done: u64 = have.iter().sum();
                #[expect(
                    clippy::cast_precision_loss,
                    reason = "a bar does not show the difference"
                )]
                let fraction = (done as f64 / total.max(1) as f64).min(1.0);
                watcher.progress(&Progress {
                    task: format!("image {name}"),
                    phase: "downloading".to_owned(),
                    fraction: Some(fraction),
                });
            }
        });
        if let Some(error) = failure {
            return Err(input(error));
        }
        Ok(files.into_iter().flatten().collect())
    }

    /// Removes what was brought of these layers. Whoever unpacks them at this moment has them open.
    fn remove_downloads(&self, layers: &[RemoteLayer]) -> Result<()> {
        for layer in layers {
            let place = self.layout.downloads().join(layer.file_name());
            self.os.remove_file("remove the downloaded layer", &place)?;
            let partial = place.with_extension("partial");
            if partial.exists()
                && let Some(_lock) = self.os.try_lock("look at the download", &partial)?
            {
                self.os
                    .remove_file("remove the downloaded layer", &partial)?;
            }
        }
        Ok(())
    }

    /// What interrupted pulls left, and nobody brings at this moment.
    pub(crate) fn idle_downloads(&self) -> Result<Vec<PathBuf>> {
        let mut idle = Vec::new();
        for entry in entries(&self.layout.downloads())? {
            let path = entry.path();
            if self.os.try_lock("look at the download", &path)?.is_some() {
                idle.push(path);
            }
        }
        Ok(idle)
    }
}

/// Bytes between two reports of a download.
const REPORT_BYTES: u64 = 256 << 10;

/// What a thread that fetches has to say.
enum Fetched {
    /// So many bytes of this layer are there.
    Part(usize, u64),
    Whole(usize, std::result::Result<File, smolvm_host::HostError>),
}

/// The right to pull an image. The file goes with it.
struct PullTurn {
    os: Os,
    path: PathBuf,
    _lock: Lock,
}

impl Drop for PullTurn {
    fn drop(&mut self) {
        if let Err(error) = self
            .os
            .remove_file("remove the lock of the pull", &self.path)
        {
            tracing::warn!(%error, "left for a prune");
        }
    }
}

// ---- saving ----

impl Engine {
    /// The same to a file, which is replaced if it is there, and is whole or as it was.
    ///
    /// # Errors
    ///
    /// As [`Engine::save_images`].
    pub fn save_images_to(
        &self,
        names: &[String],
        path: &Path,
        watcher: &mut dyn Watcher,
        cancel: &Cancel,
    ) -> Result<()> {
        let Some(name) = path.file_name() else {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{} is no name for a file", path.display()),
            ));
        };
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(".partial");
        let partial = path.with_file_name(hidden);
        let os = self.os();
        os.remove_file("remove the half-written archive", &partial)?;
        let mut file = os.create_file("create the archive", &partial, 0o644)?;
        let written = self
            .save_images(names, &mut file, watcher, cancel)
            .and_then(|()| Ok(os.rename("put the archive in place at", &partial, path)?));
        if written.is_err() {
            os.remove_file("remove the half-written archive", &partial)?;
        }
        written
    }

    /// Writes images as an archive that is both an OCI image layout and what `docker load` takes, each
    /// with one layer. Equal images make equal archives. Long; run it on a thread that may block.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`], [`ErrorKind::Cancelled`], and those of writing.
    pub fn save_images(
        &self,
        names: &[String],
        out: &mut dyn Write,
        watcher: &mut dyn Watcher,
        cancel: &Cancel,
    ) -> Result<()> {
        let mut saved = Vec::new();
        for name in names {
            let image = self.image(name)?;
            watcher.progress(&Progress {
                task: format!("image {}", image.name),
                phase: "saving".to_owned(),
                fraction: None,
            });
            let path = self.layout().image(&image.digest).join("root.erofs");
            let root = File::open(&path).map_err(|error| {
                crate::error::io(format!("could not open {}", path.display()), error)
            })?;
            saved.push(SavedImage {
                name: reference(&image.name)?,
                created: image.created_at.to_string(),
                config: image.config,
                root,
            });
        }
        // The writer of an archive writes its small parts one by one.
        let mut out = std::io::BufWriter::with_capacity(1 << 20, out);
        save_images(&saved, &mut out, cancel)?;
        out.flush()
            .map_err(|error| crate::error::io("could not write the archive", error))
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

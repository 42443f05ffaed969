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
use crate::engine::{Engine, ImageInfo, entries, used_below};
use crate::error::{Error, ErrorKind, Result};
use crate::images::{ImageName, Making, Published, Staged, reference};
use crate::prune::Pruned;
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

    /// Removes what no image needs: layers that builds keep, what killed processes and interrupted pulls left, and with `all`
    /// every image that no sandbox, snapshot or pool needs, but for the default one. With `dry_run` it
    /// only says what it would remove.
    pub fn prune_images(&self, all: bool, dry_run: bool) -> Result<Vec<Pruned>> {
        let Some(mut store) = Store::open_existing(&self.layout().database())? else {
            return Ok(Vec::new());
        };
        let mut pruned = self.assets().prune_layers(&mut store, true, dry_run)?;
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
        let lock = match self.os.try_lock("lock the pull", &path)? {
            Some(lock) => lock,
            None => {
                watcher.progress(&Progress {
                    task: task.to_owned(),
                    phase: "waiting for another process that pulls it".to_owned(),
                    fraction: None,
                });
                self.os.lock("lock the pull", &path)?
            }
        };
        Ok(PullTurn {
            os: self.os.clone(),
            path,
            _lock: lock,
        })
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
        // A device, say, would be replaced by a file.
        if std::fs::metadata(path).is_ok_and(|there| !there.is_file()) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{} is there and is no regular file", path.display()),
            )
            .hint("name another file, or redirect standard output into this one"));
        }
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

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::io::{self, BufRead, BufReader};
    use std::net::TcpListener;
    use std::sync::Arc;
    use std::sync::atomic::AtomicU32;
    use std::time::Duration;

    use smolvm_host::oci::{Digest, RegistrySettings};
    use smolvm_host::os::Faults;

    use super::*;
    use crate::config::{AccelChoice, Config};

    fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, bytes) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            header.set_uid(0);
            header.set_gid(0);
            builder
                .append_data(&mut header, path, *bytes)
                .expect("memory");
        }
        builder.into_inner().expect("memory")
    }

    fn config(layers: &[Vec<u8>]) -> Vec<u8> {
        let diff_ids: Vec<_> = layers.iter().map(|layer| Digest::of(layer)).collect();
        let text = serde_json::json!({
            "config": { "Cmd": ["hello"], "Env": ["A=1"] }, "rootfs": { "diff_ids": diff_ids },
        });
        text.to_string().into_bytes()
    }

    /// What `docker save` writes, of an image with one file.
    fn archive(names: &[&str], content: &str) -> Vec<u8> {
        let layer = tar(&[("file", content.as_bytes())]);
        let config = config(std::slice::from_ref(&layer));
        let manifest = serde_json::json!([
            { "Config": "config.json", "RepoTags": names, "Layers": ["layer.tar"] }
        ]);
        let manifest = manifest.to_string().into_bytes();
        tar(&[
            ("config.json", &config),
            ("layer.tar", &layer),
            ("manifest.json", &manifest),
        ])
    }

    /// A registry with the image `own:1` of these layers. Its name.
    fn registry(layers: &[Vec<u8>]) -> String {
        let mut content: HashMap<String, Vec<u8>> = HashMap::new();
        let mut blob = |bytes: Vec<u8>| {
            let digest = Digest::of(&bytes);
            let descriptor = serde_json::json!({ "digest": digest, "size": bytes.len() });
            content.insert(format!("/v2/own/blobs/{digest}"), bytes);
            descriptor
        };
        let config = blob(config(layers));
        let layers: Vec<_> = layers.iter().cloned().map(&mut blob).collect();
        let manifest = serde_json::json!({ "config": config, "layers": layers });
        content.insert(
            "/v2/own/manifests/1".to_owned(),
            manifest.to_string().into_bytes(),
        );
        content.insert("/v2/".to_owned(), Vec::new());
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let name = format!("{}/own:1", listener.local_addr().expect("an address"));
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let mut lines = BufReader::new(stream.try_clone().expect("a socket")).lines();
                let Some(Ok(first)) = lines.next() else {
                    continue;
                };
                let path = first.split(' ').nth(1).unwrap_or_default();
                let mut from = 0;
                for line in lines.map_while(std::result::Result::ok) {
                    let range = line.to_lowercase();
                    let range = range
                        .strip_prefix("range: bytes=")
                        .and_then(|text| text.strip_suffix('-'));
                    from = range.and_then(|text| text.parse().ok()).unwrap_or(from);
                    if line.is_empty() {
                        break;
                    }
                }
                let body = &content[path][from..];
                let status = if from > 0 { 206 } else { 200 };
                let head = format!(
                    "HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-range: bytes {from}-\r\n\
                     content-length: {}\r\n\r\n",
                    body.len()
                );
                let _ = stream.write_all(&[head.as_bytes(), body].concat());
            }
        });
        name
    }

    struct Host(tempfile::TempDir);

    impl Host {
        fn new() -> Self {
            Self(tempfile::tempdir().expect("a directory"))
        }

        fn engine(&self, os: Os) -> Engine {
            Engine::with_os(
                Config {
                    data_dir: self.0.path().join("data"),
                    keeper: PathBuf::new(),
                    agent: PathBuf::new(),
                    program_dirs: vec!["/usr/bin".into()],
                    accel: AccelChoice::Emulation,
                    engine: crate::EngineChoice::Auto,
                    templates: false,
                    registries: RegistrySettings::default(),
                    network: crate::network::NetworkConfig::default(),
                    settings: crate::settings::Settings::default(),
                    boot_timeout: Duration::ZERO,
                },
                os,
            )
        }

        /// Everything below the directory of images but locks and whole images.
        fn leftovers(&self) -> Vec<String> {
            let images = self.0.path().join("data/images");
            let mut left = Vec::new();
            for dir in [images.join("downloads"), images.clone()] {
                for entry in entries(&dir).expect("a list") {
                    let name = entry.file_name().to_string_lossy().into_owned();
                    let lock = name.ends_with("lock") && !name.starts_with("pull-");
                    let image = dir == images && name.starts_with("sha256-");
                    if !(lock || image || name == "downloads") {
                        left.push(name);
                    }
                }
            }
            left
        }
    }

    fn load(engine: &Engine, archive: &[u8]) -> Result<Vec<Loaded>> {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), archive).expect("written");
        let options = LoadOptions::default();
        let source = LoadSource::Path(file.path());
        engine.load_images(source, &options, &mut |_: &Progress| {}, &Cancel::new()?)
    }

    fn pull(engine: &Engine, name: &str) -> Result<Pulled> {
        engine.pull_image(
            name,
            Limits::default(),
            &mut |_: &Progress| {},
            &Cancel::new()?,
        )
    }

    #[test]
    fn an_image_is_found_by_any_way_to_write_its_name() {
        let host = Host::new();
        let engine = host.engine(Os::new());
        let loaded =
            load(&engine, &archive(&["app:1", "x.example/me/app:2"], "one")).expect("loaded");
        let names: Vec<_> = loaded.iter().map(|one| one.image.name.as_str()).collect();
        assert_eq!(names, ["app:1", "x.example/me/app:2"]);
        let found = engine.image("docker.io/library/app:1").expect("known");
        assert_eq!(
            (found.name.as_str(), &found.config.cmd[0]),
            ("app:1", &"hello".to_owned())
        );
        let error = load(&engine, &archive(&[], "two")).expect_err("no name");
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        // A name that moves on says what it led to.
        let again = load(&engine, &archive(&["app:1"], "two")).expect("loaded");
        assert_eq!(again[0].replaced.as_ref(), Some(&loaded[0].image.digest));
        let tagged = engine
            .tag_image("app:1", &"app:stable".parse().expect("a name"))
            .expect("tagged");
        assert_eq!(tagged.image.digest, again[0].image.digest);
        assert_eq!(tagged.image.config, again[0].image.config);
        let pruned = engine.prune_images(true, false).expect("pruned");
        assert_eq!(pruned.len(), 3);
        assert_eq!(engine.images().expect("read"), []);
        assert_eq!(host.leftovers(), Vec::<String>::new());
    }

    #[test]
    fn what_is_there_already_is_not_brought_again() {
        let host = Host::new();
        let engine = host.engine(Os::new());
        let name = registry(&[tar(&[("file", b"1")])]);
        let first = pull(&engine, &name).expect("pulled");
        assert!(!first.known);
        assert!(pull(&engine, &name).expect("pulled").known);
        engine.remove_image(&name).expect("removed");
        assert!(!pull(&engine, &name).expect("pulled").known);
        let policy = |policy| engine.needs_pull(&name, policy).expect("asked");
        assert!(!policy(PullPolicy::Missing) && policy(PullPolicy::Always));
        assert!(
            engine
                .needs_pull("other:1", PullPolicy::Missing)
                .expect("asked")
        );
        let error = engine
            .needs_pull("other:1", PullPolicy::Never)
            .expect_err("not there");
        assert_eq!(error.kind(), ErrorKind::NotFound);
        // Made on this host: in no registry, and so never asked for.
        load(&engine, &archive(&["app:1"], "x")).expect("loaded");
        assert!(
            !engine
                .needs_pull("app:1", PullPolicy::Always)
                .expect("asked")
        );
        assert_eq!(host.leftovers(), Vec::<String>::new());
    }

    #[test]
    fn more_than_the_limit_is_refused_and_leaves_nothing() {
        let host = Host::new();
        let engine = host.engine(Os::new());
        let name = registry(&[tar(&[("zeros", &[0; 100_000])])]);
        let limits = |bytes| Limits { bytes, entries: 10 };
        for bytes in [1000, 100_500] {
            let cancel = Cancel::new().expect("a handle");
            let pulled = engine.pull_image(&name, limits(bytes), &mut |_: &Progress| {}, &cancel);
            let error = pulled.expect_err("too much");
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error:?}");
            assert!(
                error
                    .hint_text()
                    .is_some_and(|hint| hint.contains("--max-size"))
            );
        }
        assert_eq!(host.leftovers(), Vec::<String>::new());
        assert_eq!(engine.images().expect("read"), []);
    }

    #[derive(Debug)]
    struct Nth {
        nth: u32,
        seen: AtomicU32,
        forever: bool,
    }

    impl Faults for Nth {
        fn before(&self, _op: &'static str, _path: &Path) -> io::Result<()> {
            let now = self.seen.fetch_add(1, Ordering::Relaxed) + 1;
            if now == self.nth || (self.forever && now > self.nth) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            Ok(())
        }
    }

    /// Lets each effect of `get` fail in turn, once or for ever.
    fn fault_loop(least: u32, get: &dyn Fn(&Engine) -> Result<()>) {
        let mut failures = 0;
        for forever in [false, true] {
            for nth in 1.. {
                let host = Host::new();
                let good = host.engine(Os::new());
                load(&good, &archive(&["other:1"], "other")).expect("loaded");
                let before = good.images().expect("read");
                let faults = Arc::new(Nth {
                    nth,
                    seen: AtomicU32::new(0),
                    forever,
                });
                let faulty = host.engine(Os::with_faults(Arc::<Nth>::clone(&faults)));
                let outcome = get(&faulty);
                let failed = outcome.is_err();
                if let Err(error) = outcome {
                    failures += 1;
                    assert_eq!(error.kind(), ErrorKind::NoSpace, "{nth}: {error:?}");
                    assert_eq!(good.images().expect("read"), before, "{nth}");
                }
                get(&good).unwrap_or_else(|error| panic!("{nth}, second try: {error:?}"));
                assert_eq!(good.images().expect("read").len(), 2, "{nth}");
                good.prune_images(false, false).expect("pruned");
                assert_eq!(host.leftovers(), Vec::<String>::new(), "{nth}: left over");
                if !failed && faults.seen.load(Ordering::Relaxed) < nth {
                    break;
                }
            }
        }
        assert!(failures > least, "only {failures} steps failed");
    }

    #[test]
    fn whatever_effect_of_a_load_fails_images_are_as_they_were() {
        let archive = archive(&["app:1"], "new");
        fault_loop(20, &|engine| load(engine, &archive).map(drop));
    }

    #[test]
    fn whatever_effect_of_a_pull_fails_images_are_as_they_were() {
        let name = registry(&[tar(&[("a", b"1")]), tar(&[("b", b"2")])]);
        fault_loop(40, &|engine| pull(engine, &name).map(drop));
    }
}

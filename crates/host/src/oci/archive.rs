//! Images in a directory or a tar archive: the OCI image layout, and what `docker save` writes.
//!
//! Nothing of an archive is unpacked. Its entries are found once, by name, and read where they lie.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use serde::Deserialize;

use super::digest::{Digest, Hashing};
use super::spec::{
    ConfigFile, DOCUMENT_BYTES_MAX, Descriptor, Document, ImageConfig, Platform, choose, corrupt,
};
use super::unpack::{Compression, LIMITS_HINT, Layer, decompress};
use crate::cancel::Cancel;
use crate::error::{HostError, HostErrorKind};
use crate::image::build::Cancellable;
use crate::image::erofs::TooMuch;
use crate::os::Os;

/// Most entries of an archive that are remembered: some three for each layer of each image.
const ENTRIES_MAX: usize = 65_536;
/// Links from one entry to another that are followed.
const LINKS_MAX: u32 = 8;
/// Deepest nesting of indexes.
const INDEXES_MAX: u32 = 4;

/// Where images are, opened.
#[derive(Debug)]
pub struct Archive {
    /// What names it in errors.
    what: String,
    parts: Parts,
}

#[derive(Debug)]
enum Parts {
    /// A directory.
    Directory(PathBuf),
    /// A tar file and its entries.
    Tar(File, HashMap<String, Entry>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Entry {
    /// Where its data is.
    File { at: u64, size: u64 },
    /// Another entry.
    Link(String),
}

/// An image in an [`Archive`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArchivedImage {
    /// Names it has there, as they are written there.
    pub names: Vec<String>,
    /// Digest of its manifest, if it has one.
    pub manifest: Option<Digest>,
    /// What it says of its commands.
    pub config: ImageConfig,
    layers: Vec<Part>,
}

/// A layer in an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Part {
    name: String,
    digest: Option<Digest>,
    size: u64,
    diff_id: Digest,
}

/// One image in the `manifest.json` of `docker save`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

impl Archive {
    /// Opens the directory or file at `path`. What cannot be read where it lies, a compressed file or
    /// a pipe, is written to `spool` first, which must not exist, and of which `most` bytes are
    /// accepted.
    ///
    /// # Errors
    ///
    /// [`NotFound`](HostErrorKind::NotFound), [`NoSpace`](HostErrorKind::NoSpace), and
    /// [`Corrupt`](HostErrorKind::Corrupt) if it is no archive.
    pub fn open(
        os: &Os,
        path: &Path,
        spool: &Path,
        most: u64,
        cancel: &Cancel,
    ) -> Result<Self, HostError> {
        let failed = |error| HostError::io("open", path, error);
        let status = std::fs::metadata(path).map_err(failed)?;
        if status.is_dir() {
            return Ok(Self {
                what: path.display().to_string(),
                parts: Parts::Directory(path.to_owned()),
            });
        }
        let mut file = File::open(path).map_err(failed)?;
        let what = path.display().to_string();
        if !status.is_file() || status.file_type().is_fifo() {
            return Self::spool(os, &mut file, &what, spool, most, cancel);
        }
        let mut magic = [0; 4];
        let known = file.read_at(&mut magic, 0).map_err(failed)?;
        if Compression::of(&magic[..known]) != Compression::None {
            return Self::spool(os, &mut file, &what, spool, most, cancel);
        }
        Self::tar(file, what)
    }

    /// Opens what comes on a stream, compressed or not, by writing it to `spool` first.
    ///
    /// # Errors
    ///
    /// As [`Archive::open`].
    pub fn spool(
        os: &Os,
        stream: &mut dyn Read,
        what: &str,
        spool: &Path,
        most: u64,
        cancel: &Cancel,
    ) -> Result<Self, HostError> {
        let mut file = os.create_file("create the file", spool, 0o600)?;
        let copied = os.effect("write the archive to", spool, || {
            let stream = Cancellable {
                inner: stream,
                cancel,
            };
            let mut plain = decompress(stream)?.take(most.saturating_add(1));
            io::copy(&mut plain, &mut file)?;
            if plain.limit() == 0 {
                let error = HostError::io("read", Path::new(what), TooMuch::error(most, "bytes"));
                return Err(error.hinting(LIMITS_HINT).into());
            }
            file.flush()
        });
        cancel.check("read", what)?;
        copied?;
        Self::tar(file, what.to_owned())
    }

    fn tar(mut file: File, what: String) -> Result<Self, HostError> {
        let failed = |error: io::Error| {
            // The tar crate says `Other` of what is no archive.
            corrupt("read the archive", &what).because(error)
        };
        file.rewind()
            .map_err(|error| HostError::io("read", Path::new(&what), error))?;
        let mut entries = HashMap::new();
        let mut archive = tar::Archive::new(&file);
        for entry in archive.entries_with_seek().map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = |bytes: &[u8]| plain_name(&String::from_utf8_lossy(bytes));
            let part = match entry.header().entry_type() {
                tar::EntryType::Regular | tar::EntryType::Continuous => Entry::File {
                    at: entry.raw_file_position(),
                    size: entry.size(),
                },
                tar::EntryType::Symlink => {
                    let target = entry.link_name_bytes().unwrap_or_default();
                    let target = String::from_utf8_lossy(&target);
                    let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
                    let dir = path.rsplit_once('/').map_or("", |(dir, _)| dir);
                    Entry::Link(plain_name(&format!("{dir}/{target}")))
                }
                tar::EntryType::Link => {
                    Entry::Link(name(&entry.link_name_bytes().unwrap_or_default()))
                }
                _ => continue,
            };
            if entries.len() == ENTRIES_MAX {
                return Err(corrupt("read the archive", &what)
                    .because(format!("it has more than {ENTRIES_MAX} entries")));
            }
            entries.insert(name(&entry.path_bytes()), part);
        }
        Ok(Self {
            what,
            parts: Parts::Tar(file, entries),
        })
    }

    /// The images that guests of this host can run.
    ///
    /// # Errors
    ///
    /// [`Corrupt`](HostErrorKind::Corrupt) if it is no archive of images, or not what its digests
    /// say; [`NotFound`](HostErrorKind::NotFound) if it has images for other hosts only.
    pub fn images(&self, guests: &Platform) -> Result<Vec<ArchivedImage>, HostError> {
        let images = if self.size("manifest.json")?.is_some() {
            self.docker_images(guests)?
        } else if self.size("index.json")?.is_some() {
            self.layout_images(guests)?
        } else {
            return Err(corrupt("find an image in", &self.what).because(
                "it has neither `index.json`, as an OCI image layout, nor `manifest.json`, as an \
                 archive of `docker save`",
            ));
        };
        if images.is_empty() {
            return Err(corrupt("find an image in", &self.what).because("it has none"));
        }
        Ok(images)
    }

    fn docker_images(&self, guests: &Platform) -> Result<Vec<ArchivedImage>, HostError> {
        let bytes = self.document("manifest.json", None)?;
        let wrong = |why: String| corrupt("use `manifest.json` of", &self.what).because(why);
        let found: Vec<DockerImage> =
            serde_json::from_slice(&bytes).map_err(|error| wrong(error.to_string()))?;
        let mut images = Vec::new();
        for image in found {
            // Old ones are called by their digest, newer ones lie under it.
            let name = plain_name(&image.config);
            let digest = name.trim_end_matches(".json").rsplit('/').next();
            let digest = digest.and_then(|hex| format!("sha256:{hex}").parse().ok());
            let bytes = self.document(&name, digest)?;
            let config = ConfigFile::parse(&self.what, &bytes, guests)?;
            if config.diff_ids.len() != image.layers.len() {
                return Err(wrong(format!(
                    "an image has {} layers, and its configuration {}",
                    image.layers.len(),
                    config.diff_ids.len()
                )));
            }
            let mut layers = Vec::new();
            for (name, diff_id) in image.layers.iter().zip(config.diff_ids) {
                let name = plain_name(name);
                let size = self.part_size(&name)?;
                layers.push(Part {
                    name,
                    digest: None,
                    size,
                    diff_id,
                });
            }
            images.push(ArchivedImage {
                names: image.repo_tags.unwrap_or_default(),
                manifest: None,
                config: config.config,
                layers,
            });
        }
        Ok(images)
    }

    fn layout_images(&self, guests: &Platform) -> Result<Vec<ArchivedImage>, HostError> {
        let bytes = self.document("index.json", None)?;
        let Document::Index(entries) = Document::parse(&self.what, &bytes)? else {
            return Err(corrupt("use `index.json` of", &self.what).because("it is no index"));
        };
        // Entries without names are one image for several platforms, as an index inside would be.
        let named = |one: &Descriptor| !names(one).is_empty();
        if entries.len() > 1 && !entries.iter().any(named) {
            let chosen = choose(&self.what, &entries, guests)?.clone();
            return Ok(vec![self.layout_image(&chosen, guests, 0)?]);
        }
        let mut images: BTreeMap<Digest, ArchivedImage> = BTreeMap::new();
        let mut failure = None;
        for entry in entries {
            match self.layout_image(&entry, guests, 0) {
                Ok(image) => {
                    let key = image.manifest.expect("it was found by its digest");
                    let known = images.entry(key).or_insert_with(|| ArchivedImage {
                        names: Vec::new(),
                        // What its name leads to, as in a registry.
                        manifest: Some(entry.digest),
                        ..image
                    });
                    known.names.extend(names(&entry));
                }
                // For other hosts; an error only if there is no other.
                Err(error) if error.kind() == HostErrorKind::NotFound => failure = Some(error),
                Err(error) => return Err(error),
            }
        }
        match failure {
            Some(error) if images.is_empty() => Err(error),
            _ => Ok(images.into_values().collect()),
        }
    }

    fn layout_image(
        &self,
        descriptor: &Descriptor,
        guests: &Platform,
        depth: u32,
    ) -> Result<ArchivedImage, HostError> {
        let bytes = self.blob(descriptor)?;
        match Document::parse(&self.what, &bytes)? {
            Document::Index(_) if depth == INDEXES_MAX => {
                Err(corrupt("use", &self.what).because("its indexes are nested too deeply"))
            }
            Document::Index(manifests) => {
                let chosen = choose(&self.what, &manifests, guests)?;
                self.layout_image(chosen, guests, depth + 1)
            }
            Document::Manifest(manifest) => {
                let bytes = self.blob(&manifest.config)?;
                let config = ConfigFile::parse(&self.what, &bytes, guests)?;
                let diff_ids = config.diff_ids;
                if diff_ids.len() != manifest.layers.len() {
                    return Err(corrupt("use", &self.what).because(format!(
                        "its manifest has {} layers, and its configuration {}",
                        manifest.layers.len(),
                        diff_ids.len()
                    )));
                }
                let layers = manifest.layers.iter().zip(diff_ids);
                Ok(ArchivedImage {
                    names: Vec::new(),
                    manifest: Some(descriptor.digest),
                    config: config.config,
                    layers: layers
                        .map(|(layer, diff_id)| Part {
                            name: blob_name(layer.digest),
                            digest: Some(layer.digest),
                            size: layer.size,
                            diff_id,
                        })
                        .collect(),
                })
            }
        }
    }

    /// The layers of one of its images, the lowest first.
    #[must_use]
    pub fn layers(&self, image: &ArchivedImage) -> Vec<Layer<'_>> {
        let layers = image.layers.iter().cloned();
        layers
            .map(|part| Layer {
                what: part
                    .digest
                    .map_or_else(|| part.name.clone(), |digest| digest.to_string()),
                digest: part.digest,
                size: part.size,
                diff_id: part.diff_id,
                open: Box::new(move || self.reader(&part.name)),
            })
            .collect()
    }

    fn blob(&self, descriptor: &Descriptor) -> Result<Vec<u8>, HostError> {
        self.document(&blob_name(descriptor.digest), Some(descriptor.digest))
    }

    /// Reads a part that is JSON, and checks its digest.
    fn document(&self, name: &str, digest: Option<Digest>) -> Result<Vec<u8>, HostError> {
        let wrong = |why: String| corrupt("use", format!("{name} of {}", self.what)).because(why);
        if self.part_size(name)? > DOCUMENT_BYTES_MAX {
            return Err(wrong(format!(
                "it has more than {DOCUMENT_BYTES_MAX} bytes"
            )));
        }
        let mut bytes = Vec::new();
        let mut reader = Hashing::new(self.reader(name)?, DOCUMENT_BYTES_MAX);
        reader
            .read_to_end(&mut bytes)
            .map_err(|error| HostError::io("read", Path::new(&self.what), error))?;
        match digest.filter(|digest| *digest != Digest::of(&bytes)) {
            Some(_) => Err(wrong(format!(
                "its content has the digest {}",
                Digest::of(&bytes)
            ))),
            None => Ok(bytes),
        }
    }

    fn part_size(&self, name: &str) -> Result<u64, HostError> {
        self.size(name)?.ok_or_else(|| self.missing(name))
    }

    fn missing(&self, name: &str) -> HostError {
        corrupt("use", &self.what).because(format!("it has no `{}`", name.escape_debug()))
    }

    fn find(&self, name: &str) -> Option<(u64, u64)> {
        let Parts::Tar(_, entries) = &self.parts else {
            return None;
        };
        let mut name = name;
        for _ in 0..LINKS_MAX {
            match entries.get(name)? {
                Entry::File { at, size } => return Some((*at, *size)),
                Entry::Link(target) => name = target,
            }
        }
        None
    }

    fn size(&self, name: &str) -> Result<Option<u64>, HostError> {
        match &self.parts {
            Parts::Tar(..) => Ok(self.find(name).map(|(_, size)| size)),
            Parts::Directory(dir) => match open_below(dir, name) {
                Ok(file) => {
                    let status = file.metadata();
                    let status = status.map_err(|error| HostError::io("read", dir, error))?;
                    Ok(status.is_file().then_some(status.len()))
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(HostError::io("open", &dir.join(name), error)),
            },
        }
    }

    fn reader(&self, name: &str) -> Result<Box<dyn Read + '_>, HostError> {
        match &self.parts {
            Parts::Tar(file, _) => {
                let (at, size) = self.find(name).ok_or_else(|| self.missing(name))?;
                Ok(Box::new(Window {
                    file,
                    at,
                    left: size,
                }))
            }
            Parts::Directory(dir) => {
                let file = open_below(dir, name)
                    .map_err(|error| HostError::io("open", &dir.join(name), error))?;
                Ok(Box::new(file))
            }
        }
    }
}

/// Opens a file of a directory, and nothing that a link would lead to outside it (openat2(2)).
fn open_below(dir: &Path, name: &str) -> io::Result<File> {
    use rustix::fs::{CWD, ResolveFlags, openat, openat2};
    let top = openat(
        CWD,
        dir,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let file = openat2(
        &top,
        name,
        // A pipe must not make us wait for somebody to open its other end.
        OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK,
        Mode::empty(),
        ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS,
    )?;
    Ok(file.into())
}

/// The part of a file that is an entry's data.
struct Window<'f> {
    file: &'f File,
    at: u64,
    left: u64,
}

impl Read for Window<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).map_or(buffer.len(), |left| left.min(buffer.len()));
        if most == 0 {
            return Ok(0);
        }
        let n = self.file.read_at(&mut buffer[..most], self.at)?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.at += n as u64;
        self.left -= n as u64;
        Ok(n)
    }
}

fn blob_name(digest: Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// A name without what means nothing in it, so that two ways to write one are the same. It is a key
/// and never a path on this host.
fn plain_name(name: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// The names an index gives an image: Docker's whole one, or what other programs write.
fn names(descriptor: &Descriptor) -> Vec<String> {
    let Some(annotations) = &descriptor.annotations else {
        return Vec::new();
    };
    let name = annotations
        .get("io.containerd.image.name")
        .or_else(|| annotations.get("org.opencontainers.image.ref.name"));
    name.into_iter().cloned().collect()
}

//! Images out again, for other programs to load.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::digest::Digest;
use super::reference::Reference;
use super::spec::{ImageConfig, Platform};
use crate::cancel::Cancel;
use crate::error::HostError;
use crate::image::erofs::export_tar;

/// An image to save.
#[derive(Debug)]
pub struct SavedImage {
    /// Its name.
    pub name: Reference,
    /// When it was made, RFC 3339.
    pub created: String,
    /// What it says of its commands.
    pub config: ImageConfig,
    /// Its root file system, as [`write_erofs`](crate::image::erofs::write_erofs) has made it.
    pub root: File,
}

/// Writes images as an archive that is an OCI image layout, and has what `docker load` looks for. Each
/// has one layer, uncompressed.
///
/// # Errors
///
/// Those of reading and writing; [`Interrupted`](crate::HostErrorKind::Interrupted) if cancelled.
pub fn save_images(
    images: &[SavedImage],
    out: &mut dyn Write,
    cancel: &Cancel,
) -> Result<(), HostError> {
    let saved = save(images, &mut CancellableWrite { inner: out, cancel });
    cancel.check("save", "the image")?;
    saved.map_err(|error| HostError::io("write", Path::new("the archive"), error))
}

fn save(images: &[SavedImage], out: &mut dyn Write) -> io::Result<()> {
    let mut archive = tar::Builder::new(out);
    let mut written = BTreeSet::new();
    let (mut index, mut docker) = (Vec::new(), Vec::new());
    for image in images {
        // Once to know how much it is, which comes first in an archive.
        let mut counter = Counter::default();
        export_tar(&image.root, &mut counter)?;
        let (size, layer) = counter.finish();
        let layer_name = blob_name(&layer);
        if written.insert(layer_name.clone()) {
            append_layer(&mut archive, &layer_name, size, &image.root)?;
        }
        let config = config_file(image, &layer).to_string().into_bytes();
        let mut add = |bytes: &[u8]| -> io::Result<(Digest, String)> {
            let digest = Digest::of(bytes);
            let name = blob_name(&digest);
            if written.insert(name.clone()) {
                append(&mut archive, &name, bytes)?;
            }
            Ok((digest, name))
        };
        let (config_digest, config_name) = add(&config)?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": config_digest,
                "size": config.len(),
            },
            "layers": [{
                "mediaType": "application/vnd.oci.image.layer.v1.tar",
                "digest": layer,
                "size": size,
            }],
        });
        let manifest = manifest.to_string().into_bytes();
        let (manifest_digest, _) = add(&manifest)?;
        index.push(json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": manifest_digest,
            "size": manifest.len(),
            "annotations": {
                "io.containerd.image.name": image.name.canonical(),
                "org.opencontainers.image.ref.name": image.name.canonical(),
            },
        }));
        docker.push(json!({
            "Config": config_name,
            "RepoTags": [image.name.to_string()],
            "Layers": [layer_name],
        }));
    }
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": index,
    });
    append(&mut archive, "index.json", index.to_string().as_bytes())?;
    append(
        &mut archive,
        "oci-layout",
        br#"{"imageLayoutVersion":"1.0.0"}"#,
    )?;
    append(
        &mut archive,
        "manifest.json",
        Value::from(docker).to_string().as_bytes(),
    )?;
    archive.finish()
}

fn config_file(image: &SavedImage, layer: &Digest) -> Value {
    let platform = Platform::of_guests();
    let config = &image.config;
    let env = config
        .env
        .iter()
        .map(|(name, value)| format!("{name}={value}"));
    let mut said = json!({ "Env": env.collect::<Vec<_>>() });
    let words = [("Entrypoint", &config.entrypoint), ("Cmd", &config.cmd)];
    for (key, words) in words {
        if !words.is_empty() {
            said[key] = json!(words);
        }
    }
    if !config.labels.is_empty() {
        let labels = config.labels.iter();
        said["Labels"] = labels
            .map(|(name, value)| (name.clone(), json!(value)))
            .collect::<serde_json::Map<_, _>>()
            .into();
    }
    if !config.ports.is_empty() {
        let ports = config.ports.iter();
        said["ExposedPorts"] = ports
            .map(|port| (port.clone(), json!({})))
            .collect::<serde_json::Map<_, _>>()
            .into();
    }
    let texts = [("User", &config.user), ("WorkingDir", &config.workdir)];
    for (key, text) in texts {
        if let Some(text) = text {
            said[key] = json!(text);
        }
    }
    json!({
        "created": image.created,
        "architecture": platform.architecture,
        "os": platform.os,
        "config": said,
        "rootfs": { "type": "layers", "diff_ids": [layer] },
    })
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn header(size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size);
    header
}

fn append<W: Write>(archive: &mut tar::Builder<W>, name: &str, bytes: &[u8]) -> io::Result<()> {
    archive.append_data(&mut header(bytes.len() as u64), name, bytes)
}

/// The layer is written as it is made: there is no reader of it to hand over.
fn append_layer<W: Write>(
    archive: &mut tar::Builder<W>,
    name: &str,
    size: u64,
    root: &File,
) -> io::Result<()> {
    let mut header = header(size);
    header.set_path(name)?;
    header.set_cksum();
    let out = archive.get_mut();
    out.write_all(header.as_bytes())?;
    export_tar(root, &mut *out)?;
    // A tar stream is whole blocks, so nothing has to be filled up.
    debug_assert!(size.is_multiple_of(512));
    Ok(())
}

/// Counts and hashes what is written to it.
#[derive(Default)]
struct Counter {
    bytes: u64,
    hash: Sha256,
}

impl Counter {
    fn finish(self) -> (u64, Digest) {
        (self.bytes, Digest::from(self.hash))
    }
}

impl Write for Counter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Ends with an error once it is cancelled.
struct CancellableWrite<'a> {
    inner: &'a mut dyn Write,
    cancel: &'a Cancel,
}

impl Write for CancellableWrite<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.cancel.is_cancelled() {
            return Err(io::Error::other("cancelled"));
        }
        self.inner.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

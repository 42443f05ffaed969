//! Layers that builds keep. A layer is a copy of a sandbox's disk with everything that was done to an
//! image so far, so that each is whole by itself and any may be removed. Where the host's file system
//! shares blocks between files, copies share what they have in common.

use std::path::{Path, PathBuf};

use smolvm_host::oci::ImageConfig;

use crate::assets::Assets;
use crate::engine::{Engine, entries, random_u64, used_below};
use crate::error::{Error, Result, io};
use crate::images::{ImageName, Making, Published};
use crate::prune::Pruned;
use crate::store::{BuildLayerRow, ImageRow, Store};

/// Name of the directory in which a layer is made.
const LAYER: &str = "layer";

impl Assets<'_> {
    /// The disk of a layer that is kept.
    pub(super) fn layer_disk(&self, key: &str) -> PathBuf {
        self.layout.build_layer(key).join("disk.ext4")
    }

    /// Copies a disk that nobody writes to, to be kept.
    pub(super) fn copy_layer(&self, disk: &Path) -> Result<Making> {
        let making = self.begin_making()?;
        let dir = making.dir.join(LAYER);
        self.os.create_dir("make the layer's directory", &dir)?;
        self.os
            .copy_sparse("copy the layer", disk, &dir.join("disk.ext4"))?;
        Ok(making)
    }

    /// Keeps a copy under its key, in place of an older one.
    pub(super) fn keep_layer(
        &self,
        store: &mut Store,
        making: &Making,
        row: &BuildLayerRow,
    ) -> Result<()> {
        let place = self.layout.build_layer(&row.key);
        self.os
            .create_dir_all("make the directory", &self.layout.builds())?;
        let turn = self.names_turn()?;
        // Of a build that was told to use nothing of earlier ones, or a leftover.
        self.take_layer_away(&place)?;
        self.os
            .rename("put the layer in place at", &making.dir.join(LAYER), &place)?;
        let recorded = store.put_build_layer(row);
        if recorded.is_err() {
            self.take_layer_away(&place)?;
        }
        drop(turn);
        recorded
    }

    /// Removes a layer's directory, away from its key first.
    fn take_layer_away(&self, place: &Path) -> Result<()> {
        if !place.exists() {
            return Ok(());
        }
        let doomed = self
            .layout
            .images()
            .join(format!(".removed-{:016x}", random_u64()?));
        self.os.rename("take the layer away to", place, &doomed)?;
        Ok(self.os.remove_tree("remove the layer", &doomed)?)
    }

    /// Removes all layers that are kept, or only those that no row knows; or says which these are.
    pub(crate) fn prune_layers(
        &self,
        store: &mut Store,
        all: bool,
        dry_run: bool,
    ) -> Result<Vec<Pruned>> {
        let _turn = self.names_turn()?;
        let mut pruned = Vec::new();
        for entry in entries(&self.layout.builds())? {
            let key = entry.file_name().to_string_lossy().into_owned();
            let row = store.build_layer(&key)?;
            if row.is_some() && !all {
                continue;
            }
            pruned.push(Pruned {
                kind: if row.is_some() { "layer" } else { "leftover" },
                name: row.map_or(entry.path().display().to_string(), |row| row.step),
                bytes: used_below(&entry.path()),
            });
            if !dry_run {
                store.delete_build_layer(&key)?;
                self.take_layer_away(&entry.path())?;
            }
        }
        if all && !dry_run {
            // Of layers whose files somebody removed.
            for row in store.build_layers()? {
                store.delete_build_layer(&row.key)?;
            }
        }
        Ok(pruned)
    }

    /// Gives a root file system that is there a name.
    pub(super) fn name_root(
        &self,
        store: &mut Store,
        name: &ImageName,
        digest: &str,
        source: &str,
        config: &ImageConfig,
    ) -> Result<Option<Published>> {
        let turn = self.names_turn()?;
        let place = self.layout.image(digest);
        // What no name, sandbox or snapshot needs may be gone at any moment, but not while we have the
        // turn.
        let root = place.join("root.erofs");
        let size_bytes = match std::fs::metadata(&root) {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io(format!("could not look at {}", root.display()), error)),
        };
        let old = store.image_named(name.as_str())?;
        let image = ImageRow {
            name: name.to_string(),
            digest: digest.to_owned(),
            size_bytes,
            created_at: jiff::Timestamp::now(),
            source: source.to_owned(),
            manifest: None,
            config: config.clone(),
        };
        store.put_image(&image)?;
        if let Err(error) = self.sweep_images(store, &turn) {
            tracing::warn!(%error, "could not remove what no image needs any more");
        }
        let replaced = old.map(|old| old.digest).filter(|old| old != digest);
        Ok(Some(Published { image, replaced }))
    }
}

impl Engine {
    /// Bytes that layers of builds take on the disk.
    ///
    /// # Errors
    ///
    /// Those of reading the directory.
    pub fn build_cache_bytes(&self) -> Result<u64> {
        Ok(entries(&self.layout().builds())?
            .iter()
            .map(|entry| used_below(&entry.path()))
            .sum())
    }
}

/// A layer that was there when it was looked for, and is not now.
pub(super) fn layer_gone() -> Error {
    Error::new(
        crate::error::ErrorKind::Busy,
        "a layer that the build was to begin from was removed meanwhile",
    )
    .hint("build again; what was done until now is kept")
}

//! Layers that builds keep: rows in and out.

use jiff::Timestamp;
use rusqlite::{OptionalExtension as _, params};

use super::rows::{from_sql, instant, to_sql};
use super::{Store, sql};
use crate::error::Result;

/// A writable layer that is found by what it came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildLayerRow {
    /// 64 hexadecimal digits.
    pub key: String,
    /// Digest of the root file system that it is a layer over.
    pub base_digest: String,
    /// Size of the disk in MiB.
    pub disk_mib: u32,
    /// The instruction, for people.
    pub step: String,
    /// Digest of the image that was made of it, if one was.
    pub image_digest: Option<String>,
    /// When it was made.
    pub created_at: Timestamp,
}

const COLUMNS: &str = "key, base_digest, disk_mib, step, image_digest, created_ms";

fn read(row: &rusqlite::Row<'_>) -> rusqlite::Result<BuildLayerRow> {
    Ok(BuildLayerRow {
        key: row.get(0)?,
        base_digest: row.get(1)?,
        disk_mib: u32::try_from(from_sql(row.get(2)?)).unwrap_or(u32::MAX),
        step: row.get(3)?,
        image_digest: row.get(4)?,
        created_at: instant(row, 5)?,
    })
}

impl Store {
    /// Writes a layer, in place of an older one of its key.
    pub fn put_build_layer(&mut self, layer: &BuildLayerRow) -> Result<()> {
        self.connection
            .execute(
                &format!(
                    "INSERT OR REPLACE INTO build_layers ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)"
                ),
                params![
                    layer.key,
                    layer.base_digest,
                    to_sql(layer.disk_mib.into()),
                    layer.step,
                    layer.image_digest,
                    layer.created_at.as_millisecond(),
                ],
            )
            .map(|_| ())
            .map_err(|error| sql("could not record a layer of a build", error))
    }

    /// The layer of this key.
    pub fn build_layer(&self, key: &str) -> Result<Option<BuildLayerRow>> {
        self.connection
            .prepare_cached(&format!("SELECT {COLUMNS} FROM build_layers WHERE key = ?"))
            .and_then(|mut statement| statement.query_row([key], read).optional())
            .map_err(|error| sql("could not read the layers of builds", error))
    }

    /// All layers, oldest first.
    pub fn build_layers(&self) -> Result<Vec<BuildLayerRow>> {
        self.connection
            .prepare_cached(&format!(
                "SELECT {COLUMNS} FROM build_layers ORDER BY created_ms, key"
            ))
            .and_then(|mut statement| statement.query_map([], read)?.collect())
            .map_err(|error| sql("could not read the layers of builds", error))
    }

    /// Says what image was made of a layer. One that is gone is left so.
    pub fn set_build_image(&mut self, key: &str, digest: &str) -> Result<()> {
        self.connection
            .execute(
                "UPDATE build_layers SET image_digest = ? WHERE key = ?",
                [digest, key],
            )
            .map(|_| ())
            .map_err(|error| sql("could not record the image of a build", error))
    }

    /// Removes a layer's row; nothing if there is none.
    pub fn delete_build_layer(&mut self, key: &str) -> Result<()> {
        self.in_any_case(|connection| {
            connection
                .execute("DELETE FROM build_layers WHERE key = ?", [key])
                .map(|_| ())
        })
        .map_err(|error| sql("could not remove the record of a layer of a build", error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_come_back_as_they_were_written() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut store = Store::open(&dir.path().join("state.db")).expect("a store");
        let mut layer = BuildLayerRow {
            key: "a".repeat(64),
            base_digest: "sha256:1".to_owned(),
            disk_mib: 4096,
            step: "RUN a".to_owned(),
            image_digest: None,
            created_at: Timestamp::UNIX_EPOCH,
        };
        store.put_build_layer(&layer).expect("written");
        assert_eq!(
            store.build_layer(&layer.key).expect("read"),
            Some(layer.clone())
        );
        store
            .set_build_image(&layer.key, "sha256:2")
            .expect("written");
        layer.image_digest = Some("sha256:2".to_owned());
        assert_eq!(store.build_layers().expect("read"), [layer.clone()]);
        layer.image_digest = None;
        store.put_build_layer(&layer).expect("written again");
        assert_eq!(
            store.build_layer(&layer.key).expect("read"),
            Some(layer.clone())
        );
        store.delete_build_layer(&layer.key).expect("removed");
        store.delete_build_layer(&layer.key).expect("removed");
        store
            .set_build_image(&layer.key, "sha256:2")
            .expect("nothing");
        assert_eq!(store.build_layers().expect("read"), []);
    }
}

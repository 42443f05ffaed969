//! Images: rows in and out, which of them are in use, and removing those that are not, in one step with
//! the question.

use rusqlite::{Row, Transaction, TransactionBehavior, params};
use smolvm_host::oci::{ImageConfig, Reference};

use super::rows::{from_sql, instant, to_sql};
use super::{ImageRow, Store, sql};
use crate::error::Result;

/// What removing an image's row came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Removal {
    /// The row is gone.
    Done,
    /// There is no image of this name.
    Unknown,
    /// It is needed.
    UsedBy(Users),
}

/// Who needs an image.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Users {
    /// Names of sandboxes that have its root file system, which no other image has.
    pub(crate) sandboxes: Vec<String>,
    /// Names of snapshots of the same kind.
    pub(crate) snapshots: Vec<String>,
    /// Pools that make their sandboxes from it, by its name.
    pub(crate) pools: u32,
}

const COLUMNS: &str = "name, digest, size_bytes, created_ms, source, manifest, user, workdir";

impl Store {
    /// Writes an image, in place of an older one of its name.
    pub fn put_image(&mut self, image: &ImageRow) -> Result<()> {
        let failed = |error| sql(format!("could not record image `{}`", image.name), error);
        let transaction = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(failed)?;
        insert(&transaction, image).map_err(failed)?;
        transaction.commit().map_err(failed)
    }

    /// All images, by name.
    pub fn images(&self) -> Result<Vec<ImageRow>> {
        self.select_images("ORDER BY name", &[])
    }

    /// An image by its name: as it is written, or else as Docker would complete it.
    pub fn image(&self, name: &str) -> Result<Option<ImageRow>> {
        if let Some(image) = self.image_named(name)? {
            return Ok(Some(image));
        }
        match name.parse::<Reference>() {
            Ok(reference) => self.image_named(&reference.to_string()),
            Err(_) => Ok(None),
        }
    }

    /// An image by its name as it is written.
    pub(crate) fn image_named(&self, name: &str) -> Result<Option<ImageRow>> {
        Ok(self.select_images("WHERE name = ?", &[name])?.pop())
    }

    /// An image that was made of the manifest of this digest.
    pub(crate) fn image_of_manifest(&self, digest: &str) -> Result<Option<ImageRow>> {
        let mut images = self.select_images("WHERE manifest = ? ORDER BY name", &[digest])?;
        images.truncate(1);
        Ok(images.pop())
    }

    fn select_images(&self, clause: &str, values: &[&str]) -> Result<Vec<ImageRow>> {
        let doing = "could not read the images in the state database";
        self.read_images(clause, values)
            .map_err(|error| sql(doing, error))
    }

    fn read_images(&self, clause: &str, values: &[&str]) -> rusqlite::Result<Vec<ImageRow>> {
        let text = format!("SELECT {COLUMNS} FROM images {clause}");
        let mut images: Vec<ImageRow> = self
            .connection
            .prepare_cached(&text)?
            .query_map(rusqlite::params_from_iter(values), read)?
            .collect::<rusqlite::Result<_>>()?;
        for image in &mut images {
            let mut env = self.connection.prepare_cached(
                "SELECT name, value FROM image_env WHERE image = ? ORDER BY name",
            )?;
            image.config.env = env
                .query_map([&image.name], |row| Ok((row.get(0)?, row.get(1)?)))?
                .collect::<rusqlite::Result<_>>()?;
            let mut words = self.connection.prepare_cached(
                "SELECT word FROM image_words WHERE image = ? AND part = ? ORDER BY position",
            )?;
            let mut read = |part: &str| -> rusqlite::Result<Vec<String>> {
                words
                    .query_map([&image.name, part], |row| row.get(0))?
                    .collect()
            };
            (image.config.entrypoint, image.config.cmd) = (read("entrypoint")?, read("cmd")?);
            let mut labels = self.connection.prepare_cached(
                "SELECT name, value FROM image_labels WHERE image = ? ORDER BY name",
            )?;
            image.config.labels = labels
                .query_map([&image.name], |row| Ok((row.get(0)?, row.get(1)?)))?
                .collect::<rusqlite::Result<_>>()?;
            let mut ports = self
                .connection
                .prepare_cached("SELECT port FROM image_ports WHERE image = ? ORDER BY port")?;
            image.config.ports = ports
                .query_map([&image.name], |row| row.get(0))?
                .collect::<rusqlite::Result<_>>()?;
        }
        Ok(images)
    }

    /// Removes an image's row, unless a sandbox or snapshot needs its root file system and no other
    /// image has it, or a pool names it.
    pub(crate) fn remove_image(&mut self, name: &str) -> Result<Removal> {
        let failed = |error| {
            sql(
                format!("could not remove the record of image `{name}`"),
                error,
            )
        };
        // Taken before looking, so that no sandbox is made of it in between.
        let transaction = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(failed)?;
        let named = |table: &str, more: &str| -> rusqlite::Result<Vec<String>> {
            let text = format!(
                "SELECT name FROM {table} WHERE image_digest = (SELECT digest FROM images WHERE name = ?1) \
                 AND NOT EXISTS (SELECT 1 FROM images WHERE digest = {table}.image_digest AND name <> ?1) \
                 {more} ORDER BY name"
            );
            let mut statement = transaction.prepare_cached(&text)?;
            statement.query_map([name], |row| row.get(0))?.collect()
        };
        let users = named("sandboxes", "AND pool_id IS NULL AND state <> 'deleting'")
            .and_then(|sandboxes| {
                Ok(Users {
                    sandboxes,
                    snapshots: named("snapshots", "")?,
                    pools: transaction
                        .prepare_cached("SELECT count(*) FROM pools WHERE image = ?")?
                        .query_row([name], |row| row.get(0))?,
                })
            })
            .map_err(failed)?;
        if users != Users::default() {
            return Ok(Removal::UsedBy(users));
        }
        let removed = transaction
            .execute("DELETE FROM images WHERE name = ?", [name])
            .map_err(failed)?;
        transaction.commit().map_err(failed)?;
        Ok(if removed == 1 {
            Removal::Done
        } else {
            Removal::Unknown
        })
    }

    /// Whether a sandbox, snapshot or pool needs an image, whatever other name it has.
    pub(crate) fn needs_image(&self, image: &ImageRow) -> Result<bool> {
        self.connection
            .prepare_cached(
                "SELECT EXISTS (SELECT 1 FROM sandboxes WHERE image_digest = ?1) \
                 OR EXISTS (SELECT 1 FROM snapshots WHERE image_digest = ?1) \
                 OR EXISTS (SELECT 1 FROM pools WHERE image = ?2)",
            )
            .and_then(|mut statement| {
                statement.query_row([&image.digest, &image.name], |row| row.get(0))
            })
            .map_err(|error| sql("could not read which images are in use", error))
    }

    /// The digests of all root file systems that an image, a sandbox or a snapshot needs.
    pub(crate) fn digests_in_use(&self) -> Result<Vec<String>> {
        self.connection
            .prepare_cached(
                "SELECT digest FROM images \
                 UNION SELECT image_digest FROM sandboxes WHERE state <> 'deleting' \
                 UNION SELECT image_digest FROM snapshots",
            )
            .and_then(|mut statement| statement.query_map([], |row| row.get(0))?.collect())
            .map_err(|error| sql("could not read which images are in use", error))
    }

    /// Whether a root file system is kept by anything but this sandbox.
    pub(crate) fn is_kept_besides(&self, digest: &str, sandbox_id: &str) -> Result<bool> {
        self.connection
            .prepare_cached(
                "SELECT EXISTS (SELECT 1 FROM images WHERE digest = ?1) \
                 OR EXISTS (SELECT 1 FROM snapshots WHERE image_digest = ?1) \
                 OR EXISTS (SELECT 1 FROM sandboxes WHERE image_digest = ?1 AND id <> ?2 \
                     AND state <> 'deleting')",
            )
            .and_then(|mut statement| statement.query_row([digest, sandbox_id], |row| row.get(0)))
            .map_err(|error| sql("could not read which images are in use", error))
    }
}

fn read(row: &Row<'_>) -> rusqlite::Result<ImageRow> {
    Ok(ImageRow {
        name: row.get(0)?,
        digest: row.get(1)?,
        size_bytes: from_sql(row.get(2)?),
        created_at: instant(row, 3)?,
        source: row.get(4)?,
        manifest: row.get(5)?,
        config: ImageConfig {
            user: row.get(6)?,
            workdir: row.get(7)?,
            ..ImageConfig::default()
        },
    })
}

fn insert(transaction: &Transaction<'_>, image: &ImageRow) -> rusqlite::Result<()> {
    transaction.execute("DELETE FROM images WHERE name = ?", [&image.name])?;
    transaction.execute(
        &format!("INSERT INTO images ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"),
        params![
            image.name,
            image.digest,
            to_sql(image.size_bytes),
            image.created_at.as_millisecond(),
            image.source,
            image.manifest,
            image.config.user,
            image.config.workdir,
        ],
    )?;
    for (name, value) in &image.config.env {
        transaction.execute(
            "INSERT INTO image_env (image, name, value) VALUES (?, ?, ?)",
            [&image.name, name, value],
        )?;
    }
    for (name, value) in &image.config.labels {
        transaction.execute(
            "INSERT INTO image_labels (image, name, value) VALUES (?, ?, ?)",
            [&image.name, name, value],
        )?;
    }
    for port in &image.config.ports {
        transaction.execute(
            "INSERT INTO image_ports (image, port) VALUES (?, ?)",
            [&image.name, port],
        )?;
    }
    let parts = [
        ("entrypoint", &image.config.entrypoint),
        ("cmd", &image.config.cmd),
    ];
    for (part, words) in parts {
        for (position, word) in words.iter().enumerate() {
            transaction.execute(
                "INSERT INTO image_words (image, part, position, word) VALUES (?, ?, ?, ?)",
                params![image.name, part, to_sql(position as u64), word],
            )?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::store::rows::tests::row;

    fn image(name: &str, digest: &str) -> ImageRow {
        ImageRow {
            name: name.to_owned(),
            digest: digest.to_owned(),
            size_bytes: 1,
            created_at: Timestamp::UNIX_EPOCH,
            source: "a test".to_owned(),
            manifest: None,
            config: ImageConfig::default(),
        }
    }

    #[test]
    fn an_image_comes_back_as_it_was_written() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut store = Store::open(&dir.path().join("state.db")).expect("a store");
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        let mut full = image("python:3.12", "sha256:1");
        full.manifest = Some("sha256:2".to_owned());
        full.config = ImageConfig {
            user: Some("app".to_owned()),
            workdir: Some("/srv".to_owned()),
            env: vec![pair("A", "1"), pair("PATH", "/bin")],
            entrypoint: vec!["/init".to_owned(), "--".to_owned()],
            cmd: vec!["b".to_owned(), "a".to_owned()],
            labels: vec![pair("org.b", "2"), pair("x", "")],
            ports: vec!["53/udp".to_owned(), "80/tcp".to_owned()],
        };
        store.put_image(&full).expect("written");
        for name in ["python:3.12", "docker.io/library/python:3.12"] {
            assert_eq!(store.image(name).expect("read").as_ref(), Some(&full));
        }
        assert_eq!(store.image("python").expect("read"), None);
        let found = store.image_of_manifest("sha256:2").expect("read");
        assert_eq!(found.as_ref(), Some(&full));
        // One in its place has nothing of it.
        full.config = ImageConfig::default();
        store.put_image(&full).expect("written");
        assert_eq!(store.images().expect("read"), [full]);
        // A name without a tag is a name of its own, and goes before one with the usual tag.
        store
            .put_image(&image("box:latest", "sha256:3"))
            .expect("written");
        let digest = |store: &Store| store.image("box").expect("read").expect("there").digest;
        assert_eq!(digest(&store), "sha256:3");
        store.put_image(&image("box", "sha256:4")).expect("written");
        assert_eq!(digest(&store), "sha256:4");
    }

    #[test]
    fn what_is_in_use_stays() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut store = Store::open(&dir.path().join("state.db")).expect("a store");
        let sandbox = row("a");
        let digest = sandbox.image_digest.clone();
        store.insert_sandbox(&sandbox).expect("written");
        let removal = |store: &mut Store, name: &str| store.remove_image(name).expect("asked");
        let used = |sandboxes: &[&str], snapshots: &[&str], pools| {
            let owned = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
            Removal::UsedBy(Users {
                sandboxes: owned(sandboxes),
                snapshots: owned(snapshots),
                pools,
            })
        };

        assert_eq!(removal(&mut store, "one"), Removal::Unknown);
        assert!(!store.is_kept_besides(&digest, &sandbox.id).expect("read"));
        assert!(store.is_kept_besides(&digest, "other").expect("read"));
        store.put_image(&image("one", &digest)).expect("written");
        assert!(store.is_kept_besides(&digest, &sandbox.id).expect("read"));
        assert_eq!(removal(&mut store, "one"), used(&["a"], &[], 0));
        // Another name keeps it.
        store.put_image(&image("two", &digest)).expect("written");
        assert_eq!(removal(&mut store, "one"), Removal::Done);
        // A name that was given to something else is not what the sandbox needs.
        store.put_image(&image("two", "sha256:9")).expect("written");
        let mut needed = store.digests_in_use().expect("read");
        needed.sort();
        assert_eq!(needed, [digest.clone(), "sha256:9".to_owned()]);
        assert_eq!(removal(&mut store, "two"), Removal::Done);

        // A snapshot and a pool keep it as well.
        store.put_image(&image("one", &digest)).expect("written");
        store.delete_sandbox(&sandbox.id).expect("deleted");
        let execute = |store: &Store, text: &str| {
            store.connection.execute_batch(text).expect("a statement");
        };
        execute(
            &store,
            "INSERT INTO snapshots (id, name, state, sandbox, image, image_digest, kernel, cpus, \
             memory_mib, disk_mib, disk_mode, created_ms) VALUES ('s', 'then', 'ready', 'a', 'one', \
             'sha256:0', 'stock', 1, 512, 4096, 'isolated', 0)",
        );
        assert_eq!(removal(&mut store, "one"), used(&[], &["then"], 0));
        execute(
            &store,
            "DELETE FROM snapshots; INSERT INTO pools (id, image, cpus, memory_mib, disk_mib, \
             disk_mode, size, created_ms) VALUES ('p', 'one', 1, 512, 4096, 'isolated', 0, 0)",
        );
        assert_eq!(removal(&mut store, "one"), used(&[], &[], 1));
        execute(&store, "DELETE FROM pools");
        assert_eq!(removal(&mut store, "one"), Removal::Done);
        assert_eq!(store.digests_in_use().expect("read"), Vec::<String>::new());
    }
}

//! Which images are in use, and removing those that are not, in one step with the question.

use rusqlite::TransactionBehavior;

use super::{Store, sql};
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

impl Store {
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

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::store::ImageRow;
    use crate::store::rows::tests::row;

    fn image(name: &str, digest: &str) -> ImageRow {
        ImageRow {
            name: name.to_owned(),
            digest: digest.to_owned(),
            size_bytes: 1,
            created_at: Timestamp::UNIX_EPOCH,
            source: "a test".to_owned(),
        }
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

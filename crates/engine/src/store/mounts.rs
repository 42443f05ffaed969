//! Directories of the host that sandboxes see, in and out of the store.

use rusqlite::{Connection, Result, Row, Transaction, params};

use crate::mounts::Mount;

/// Records what a new sandbox sees.
pub(super) fn insert_mounts(
    transaction: &Transaction<'_>,
    sandbox: &str,
    mounts: &[Mount],
) -> Result<()> {
    for (position, mount) in (0_u32..).zip(mounts) {
        transaction
            .prepare_cached(
                "INSERT INTO sandbox_mounts (sandbox_id, position, source, target, read_only) \
                 VALUES (?, ?, ?, ?, ?)",
            )?
            .execute(params![
                sandbox,
                position,
                mount.source.to_string_lossy(),
                mount.target,
                mount.read_only,
            ])?;
    }
    Ok(())
}

/// What a sandbox sees, in the order in which it was asked for.
pub(super) fn mounts(connection: &Connection, sandbox: &str) -> Result<Vec<Mount>> {
    connection
        .prepare_cached(
            "SELECT source, target, read_only FROM sandbox_mounts WHERE sandbox_id = ? \
             ORDER BY position",
        )?
        .query_map([sandbox], read)?
        .collect()
}

fn read(row: &Row<'_>) -> Result<Mount> {
    Ok(Mount {
        source: row.get::<_, String>(0)?.into(),
        target: row.get(1)?,
        read_only: row.get(2)?,
    })
}

//! Removing what nothing needs any more.
//!
//! What has no row belongs to nobody, unless somebody uses it: the database may have been moved away, or
//! put back from an older copy, while machines run. Their directories, and the disks they have, stay.

use std::path::{Path, PathBuf};

use crate::engine::{Engine, entries, used_below, wait_for_end};
use crate::error::Result;
use crate::launch::Launch;
use crate::store::{SandboxRow, State, Store};
use crate::teardown;

/// Something [`Engine::prune`] removed, or would.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pruned {
    /// `sandbox`, `template`, `layer` or `leftover`.
    pub kind: &'static str,
    /// Its name, or the leftover's path.
    pub name: String,
    /// Bytes it takes on the disk.
    pub bytes: u64,
}

/// A machine that runs, of which the database knows nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stranger {
    /// Its directory.
    pub path: PathBuf,
    /// The name of its sandbox, if that can be read.
    pub name: Option<String>,
    /// Its keeper, if that is found.
    pub keeper_pid: Option<u32>,
}

/// What a prune came to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PruneReport {
    /// What it removed, or would.
    pub pruned: Vec<Pruned>,
    /// What it let be, with everything these use.
    pub strangers: Vec<Stranger>,
}

/// What strangers have open, so that it is no leftover.
#[derive(Debug, Default)]
struct InUse(Vec<PathBuf>);

impl InUse {
    /// Whether a file or directory is used, or something in it.
    fn covers(&self, path: &Path) -> bool {
        self.0.iter().any(|used| used.starts_with(path))
    }
}

impl Engine {
    /// Removes leftovers that belong to no sandbox and templates that no start would use, and with
    /// `stopped` also every sandbox that is off. With `dry_run` it only says what it would remove.
    ///
    /// Nothing is removed that a running machine uses, whether the database knows of it or not. Where
    /// there is no database, everything is a leftover but that.
    pub async fn prune(&self, dry_run: bool, stopped: bool) -> Result<PruneReport> {
        let mut store = match Store::open_existing(&self.layout().database())? {
            Some(store) => store,
            // It was moved away.
            None if self.layout().sandboxes().is_dir() => self.store()?,
            None => return Ok(PruneReport::default()),
        };
        if !dry_run {
            // Nothing is left afterwards, not even what a keeper is taking away just now.
            let rows = store.sandboxes()?;
            for row in rows.iter().filter(|row| row.state == State::Deleting) {
                wait_for_end(row).await?;
            }
        }
        let rows = teardown::reconcile(self.os(), self.layout(), &mut store)?;
        let mut report = PruneReport::default();
        for row in rows
            .iter()
            .filter(|row| stopped && !row.state.is_held() && !row.spec.name.is_hidden())
        {
            // Shown as off, but another directory's, of which this one is a copy.
            if teardown::check_ours(self.layout(), row).is_err() {
                continue;
            }
            report.pruned.push(Pruned {
                kind: "sandbox",
                name: row.spec.name.to_string(),
                bytes: used_below(self.layout().sandbox(&row.id).path()),
            });
            if !dry_run {
                self.delete(row.spec.name.as_str()).await?;
            }
        }
        let used = self.prune_sandboxes(&store, dry_run, &mut report)?;
        self.prune_members(&mut store, &rows, dry_run, &mut report)
            .await?;
        for row in self.abandoned_snapshots(&store)? {
            let left = leftover(&self.snapshot_dir(&row.id));
            if dry_run || self.remove_abandoned(&mut store, &row) {
                report.pruned.push(left);
            }
        }
        if !dry_run {
            self.reconcile_volumes(&mut store)?;
        }
        let mut strays = self.stray_volumes(&store)?;
        strays.extend(self.stray_snapshots(&store)?);
        strays.extend(self.stray_pool_files(&store)?);
        for path in strays.into_iter().filter(|path| !used.covers(path)) {
            report.pruned.push(leftover(&path));
            if !dry_run {
                self.os().remove_tree("remove the leftover", &path)?;
            }
        }
        for (id, dir) in self.unused_templates(&mut store)? {
            report.pruned.push(Pruned {
                kind: if id.is_some() { "template" } else { "leftover" },
                name: id.unwrap_or_else(|| dir.display().to_string()),
                bytes: used_below(&dir),
            });
            if !dry_run {
                self.remove_found_template(&dir)?;
            }
        }
        let layers = self.assets().prune_layers(&mut store, false, dry_run)?;
        report.pruned.extend(layers);
        let turn = self.assets().names_turn()?;
        let mut unused = self.assets().unused_images(&store, &turn)?;
        unused.extend(self.assets().idle_downloads()?);
        for path in unused.into_iter().filter(|path| !used.covers(path)) {
            report.pruned.push(leftover(&path));
            if !dry_run {
                self.assets().remove_unused_image(&path, &turn)?;
            }
        }
        Ok(report)
    }

    /// Removes members of pools that are not there any more: nobody would get or see them.
    async fn prune_members(
        &self,
        store: &mut Store,
        rows: &[SandboxRow],
        dry_run: bool,
        report: &mut PruneReport,
    ) -> Result<()> {
        // Read after the members: a pool is recorded before the first one, and goes after the last.
        let pools = store.pools()?;
        let is_there = |id: &String| pools.iter().any(|pool| pool.id == *id);
        for row in rows {
            if row.pool.as_ref().is_none_or(is_there) {
                continue;
            }
            report
                .pruned
                .push(leftover(self.layout().sandbox(&row.id).path()));
            if !dry_run {
                self.delete_row(store, row.clone()).await?;
            }
        }
        Ok(())
    }

    /// Removes the directories of no sandbox, and says what those use that are held all the same.
    fn prune_sandboxes(
        &self,
        store: &Store,
        dry_run: bool,
        report: &mut PruneReport,
    ) -> Result<InUse> {
        let mut used = InUse::default();
        for entry in entries(&self.layout().sandboxes())? {
            let id = entry.file_name().to_string_lossy().into_owned();
            // Read again for each: a sandbox may have been made since, and its row comes first.
            if store.sandbox(&id)?.is_some() {
                continue;
            }
            let dir = self.layout().sandbox(&id);
            // Kept until it is removed. What nobody ever locked has no such file, and gets none.
            let lock = match dir.lock().exists() {
                true => self.os().try_lock("lock the sandbox", &dir.lock())?,
                false => None,
            };
            if lock.is_none() && dir.lock().exists() {
                let launch = Launch::read(&dir.launch_file()).ok();
                used.0.push(entry.path());
                if let Some(launch) = &launch {
                    let disks = launch.vm.disks.iter().map(|disk| disk.path.clone());
                    used.0.extend(disks);
                }
                let keepers = smolvm_host::process::with_argument(dir.launch_file().as_os_str())?;
                report.strangers.push(Stranger {
                    path: entry.path(),
                    name: launch.map(|launch| launch.name),
                    keeper_pid: keepers.first().copied(),
                });
                continue;
            }
            report.pruned.push(leftover(&entry.path()));
            if !dry_run {
                self.os()
                    .remove_tree("remove the leftover", &entry.path())?;
            }
        }
        Ok(used)
    }
}

fn leftover(path: &Path) -> Pruned {
    Pruned {
        kind: "leftover",
        name: path.display().to_string(),
        bytes: used_below(path),
    }
}

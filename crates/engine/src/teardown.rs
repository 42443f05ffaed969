//! Removing a sandbox, and repairing what a crash left. The rows say what there is; both read them
//! backwards, and each step may be repeated.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use smolvm_host::ProcessIdentity;
use smolvm_host::os::{Lock, Os};

use crate::error::{Error, ErrorKind, Result};
use crate::jail;
use crate::layout::Layout;
use crate::network;
use crate::store::{SandboxRow, State, Store};

/// Most time a killed process may take to be gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a sandbox is off whose keeper was killed.
pub(crate) const KEEPER_ENDED: &str = "its keeper ended without a word; the files are as they were";

/// Removes everything a sandbox owns, and its row last. Idempotent. Its machine has to be off, or
/// the caller is its keeper and has just killed it.
///
/// Where the row cannot be written because the disk is full, the files go first, which makes room: a
/// row without files is removed as well by whoever tries next.
pub fn destroy(os: &Os, layout: &Layout, store: &mut Store, id: &str) -> Result<()> {
    destroy_as(os, layout, store, id, None)
}

/// As [`destroy`], with the process that does it.
pub fn destroy_as(
    os: &Os,
    layout: &Layout,
    store: &mut Store,
    id: &str,
    holder: Option<&ProcessIdentity>,
) -> Result<()> {
    match store.begin_delete(id, holder) {
        Err(error) if error.kind() == ErrorKind::NoSpace => {
            remove_files(os, layout, id)?;
            store.begin_delete(id, holder)?;
        }
        begun => begun?,
    }
    finish_delete(os, layout, store, id)
}

fn remove_files(os: &Os, layout: &Layout, id: &str) -> Result<()> {
    os.remove_tree("remove the sandbox's directory", layout.sandbox(id).path())
        .map_err(|error| Error::from(error).hint("mend that, then run `smolvm prune`"))
}

/// Says of which sandbox it is that something could not be recorded, and where.
pub fn unrecorded(layout: &Layout, name: &str, what: &str, error: Error) -> Error {
    let kind = error.kind();
    let hint = error.hint_text().map(str::to_owned);
    let full = match kind {
        ErrorKind::NoSpace => format!("; the disk of {} is full", layout.root().display()),
        _ => String::new(),
    };
    let told = Error::new(
        kind,
        format!("sandbox `{name}` {what}, which could not be recorded{full}"),
    )
    .because(error);
    match hint {
        Some(hint) => told.hint(hint),
        None => told,
    }
}

/// The second half of [`destroy`], for a sandbox that is `deleting` already.
pub fn finish_delete(os: &Os, layout: &Layout, store: &mut Store, id: &str) -> Result<()> {
    release_outside(os, layout, store, id)?;
    remove_files(os, layout, id)?;
    store.delete_sandbox(id)
}

/// Gives back what a sandbox has of the host beside its files, whose machine is off: its jail, with
/// whatever is still in it, and its network.
pub fn release_outside(os: &Os, layout: &Layout, store: &mut Store, id: &str) -> Result<()> {
    jail::release(os, layout, store, id)?;
    network::release(os, layout, store, id)
}

/// What a sandbox's row and its processes together say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The row is true.
    Fine,
    /// Whoever held it is gone; it is off.
    Dead,
    /// It is to be removed: its removal was cut short, or it was to live only as long as its maker.
    Remove,
}

/// Decides about one row. Pure.
///
/// `holder_alive` is whether the process in the row runs; `locked` whether any process holds the
/// sandbox's lock. A sandbox is held by either: between a start and the keeper's first word only
/// the starter's number is in the row, and after a crash of the starter only the keeper has the lock.
pub(crate) fn judge(row: &SandboxRow, holder_alive: bool, locked: bool) -> Verdict {
    let held = holder_alive || locked;
    match row.state {
        _ if held => Verdict::Fine,
        State::Deleting => Verdict::Remove,
        // A member of a pool that nobody can claim any more.
        _ if row.pool.is_some() => Verdict::Remove,
        // Whoever made it is gone; and a copy that was never born has lost what it was to go on with.
        _ if row.spec.ephemeral => Verdict::Remove,
        state if state.is_held() => Verdict::Dead,
        State::Created
        | State::Stopped
        | State::Error
        | State::Starting
        | State::Running
        | State::Paused
        | State::Stopping => Verdict::Fine,
    }
}

/// Makes every row true again, and returns them. Cheap where nothing is wrong: rows that nobody is
/// meant to hold are not looked at.
///
/// A row whose repair fails keeps nobody from the others: it is returned as it should be, and the
/// failure is its reason.
pub(crate) fn reconcile(os: &Os, layout: &Layout, store: &mut Store) -> Result<Vec<SandboxRow>> {
    let mut rows = store.sandboxes()?;
    let mut changed = false;
    let mut failed = Vec::new();
    for row in &rows {
        match reconcile_row(os, layout, store, row) {
            Ok(repaired) => changed |= repaired,
            Err(error) => {
                let reason = error.in_one_line();
                tracing::warn!(reason, sandbox = row.spec.name.as_str(), "could not repair");
                failed.push((row.id.clone(), reason));
            }
        }
    }
    if changed {
        rows = store.sandboxes()?;
    }
    for network in store.networks()? {
        let off = |row: &SandboxRow| row.id == network.sandbox_id && !row.state.is_held();
        // Its keeper could not give it back, or is just about to.
        if rows.iter().any(off)
            && let Some(_lock) = try_lock(os, layout, &network.sandbox_id)?
            && let Err(error) = network::release(os, layout, store, &network.sandbox_id)
        {
            let reason = error.in_one_line();
            tracing::warn!(reason, "could not give back a sandbox's network");
            failed.push((network.sandbox_id, reason));
        }
    }
    failed.extend(sweep_jails(os, layout, store, &rows)?);
    for (id, reason) in failed {
        if let Some(row) = rows.iter_mut().find(|row| row.id == id) {
            show_as_off(row, reason);
        }
    }
    Ok(rows)
}

/// Takes down jails of sandboxes that are off, and of templates that nobody makes any more. Says of which
/// it could not, and why.
fn sweep_jails(
    os: &Os,
    layout: &Layout,
    store: &mut Store,
    rows: &[SandboxRow],
) -> Result<Vec<(String, String)>> {
    jail::sweep(os, layout, store, |jail| {
        match rows.iter().find(|row| row.id == jail.id) {
            Some(row) if row.state.is_held() => Ok(true),
            // Its keeper is just about to, or a start has begun since the rows were read.
            Some(row) => Ok(try_lock(os, layout, &row.id)?.is_none()),
            None => Ok(jail.maker.is_alive()?),
        }
    })
}

/// Makes of a row that could not be repaired what it would say.
fn show_as_off(row: &mut SandboxRow, reason: String) {
    if row.state != State::Deleting {
        row.state = State::Error;
    }
    row.reason = Some(reason);
}

/// One row, made true again where that is possible; else what it would say.
pub(crate) fn row_to_show(
    os: &Os,
    layout: &Layout,
    store: &mut Store,
    mut row: SandboxRow,
) -> Result<Option<SandboxRow>> {
    match reconcile_row(os, layout, store, &row) {
        Ok(false) => Ok(Some(row)),
        Ok(true) => store.sandbox(&row.id),
        Err(error) => {
            show_as_off(&mut row, error.in_one_line());
            Ok(Some(row))
        }
    }
}

/// Makes one row true again. Says whether it changed anything.
pub(crate) fn reconcile_row(
    os: &Os,
    layout: &Layout,
    store: &mut Store,
    row: &SandboxRow,
) -> Result<bool> {
    let suspect = row.state.is_held()
        || row.state == State::Deleting
        || row.spec.ephemeral
        || row.pool.is_some();
    if !suspect {
        return Ok(false);
    }
    let holder_alive = match &row.holder {
        Some(holder) => holder.is_alive()?,
        None => false,
    };
    if holder_alive {
        check_ours(layout, row)?;
        return match is_out_of_reach(layout, store, row)? {
            true => Err(out_of_reach(layout, row)),
            false => Ok(false),
        };
    }
    // Held while repairing, so that no start comes in between.
    let lock = try_lock(os, layout, &row.id)?;
    match judge(row, holder_alive, lock.is_none()) {
        Verdict::Fine => Ok(false),
        Verdict::Dead => {
            end_vmm(row)?;
            release_outside(os, layout, store, &row.id)?;
            store
                .transition(
                    &row.id,
                    &[row.state],
                    State::Error,
                    Some(KEEPER_ENDED),
                    Timestamp::now(),
                )
                .map_err(|error| unrecorded(layout, &called(row), "is off", error))
        }
        Verdict::Remove => {
            end_vmm(row)?;
            destroy(os, layout, store, &row.id)
                .map_err(|error| unrecorded(layout, &called(row), "is to be removed", error))?;
            Ok(true)
        }
    }
}

/// Whether somebody removed the directory of a sandbox that runs, and with it the only way to its keeper.
pub(crate) fn is_out_of_reach(layout: &Layout, store: &Store, row: &SandboxRow) -> Result<bool> {
    let dir = layout.sandbox(&row.id);
    let runs =
        |row: &SandboxRow| matches!(row.state, State::Running | State::Paused | State::Stopping);
    if !runs(row) || dir.path().exists() {
        return Ok(false);
    }
    // Its keeper removes the directory too, once its row says so.
    let Some(now) = store.sandbox(&row.id)?.filter(runs) else {
        return Ok(false);
    };
    match &now.holder {
        Some(holder) if row.holder.as_ref() == Some(holder) => Ok(holder.is_alive()?),
        _ => Ok(false),
    }
}

/// Requires that the keeper in the row is not another data directory's, of which this one is a copy: its
/// machine, its network and its jail are not ours to end.
pub(crate) fn check_ours(layout: &Layout, row: &SandboxRow) -> Result<()> {
    let Some(holder) = &row.holder else {
        return Ok(());
    };
    match keeper_elsewhere(&layout.sandbox(&row.id).launch_file(), &holder.arguments()) {
        // Asked after the words were read, which may be another's that has the number since.
        Some(file) if holder.is_alive()? => {
            let name = called(row);
            Err(Error::new(
                ErrorKind::State,
                format!(
                    "sandbox `{name}` runs, but from {}, of which {} is a copy",
                    root_of(&file).display(),
                    layout.root().display()
                ),
            )
            .hint(format!(
                "end it there with `smolvm --data-dir {} rm {name}`, then this one is off and can be removed",
                root_of(&file).display()
            )))
        }
        _ => Ok(()),
    }
}

/// The launch file by which a keeper was started, if it is the same sandbox's in another data directory.
/// One that was moved is still ours, and so is one that is named by way of a link.
fn keeper_elsewhere(ours: &Path, arguments: &[OsString]) -> Option<PathBuf> {
    let end = |path: &Path| {
        let dir = path.parent().and_then(Path::file_name);
        Some((dir?.to_owned(), path.file_name()?.to_owned()))
    };
    let there = arguments
        .iter()
        .map(Path::new)
        .find(|path| end(path) == end(ours))?;
    if there == ours {
        return None;
    }
    let (real, real_ours) = (there.canonicalize().ok()?, ours.canonicalize().ok()?);
    (real != real_ours).then_some(real)
}

/// The data directory of a launch file.
fn root_of(launch_file: &Path) -> &Path {
    launch_file.ancestors().nth(3).unwrap_or(launch_file)
}

fn out_of_reach(layout: &Layout, row: &SandboxRow) -> Error {
    let name = called(row);
    let keeper = row.holder.as_ref().map_or(0, |holder| holder.pid);
    Error::new(
        ErrorKind::State,
        format!(
            "sandbox `{name}` cannot be reached, though its machine runs (keeper {keeper}): its directory {} \
             was removed",
            layout.sandbox(&row.id).path().display()
        ),
    )
    .hint(format!("end it with `smolvm rm {name}`"))
}

/// What to call a sandbox in front of people.
fn called(row: &SandboxRow) -> String {
    if row.spec.name.is_hidden() {
        row.id.clone()
    } else {
        row.spec.name.to_string()
    }
}

/// Takes a sandbox's lock if nobody has it. A sandbox without a directory cannot be held.
fn try_lock(os: &Os, layout: &Layout, id: &str) -> Result<Option<NoOneElse>> {
    let dir = layout.sandbox(id);
    if !dir.path().exists() {
        return Ok(Some(NoOneElse { _lock: None }));
    }
    Ok(os
        .try_lock("lock the sandbox", &dir.lock())?
        .map(|lock| NoOneElse { _lock: Some(lock) }))
}

/// Nobody else holds the sandbox while this lives.
struct NoOneElse {
    _lock: Option<Lock>,
}

/// Kills the VMM if it outlived its keeper. The kernel does that already (`PR_SET_PDEATHSIG`);
/// this is for the moment in which it has not yet.
fn end_vmm(row: &SandboxRow) -> Result<()> {
    if let Some(vmm) = &row.vmm {
        vmm.kill_and_wait(KILL_TIMEOUT)?;
    }
    Ok(())
}

/// Ends a keeper that does not answer, and its machine.
pub(crate) fn end_processes(layout: &Layout, row: &SandboxRow) -> Result<()> {
    check_ours(layout, row)?;
    if let Some(keeper) = &row.holder {
        if keeper.pid == i32::try_from(std::process::id()).unwrap_or(0) {
            return Err(Error::new(
                ErrorKind::Busy,
                format!(
                    "sandbox `{}` is being started by this process",
                    row.spec.name
                ),
            ));
        }
        keeper.kill_and_wait(KILL_TIMEOUT)?;
    }
    end_vmm(row)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::rows::tests::row;

    #[test]
    fn a_keeper_of_another_directory_is_known_by_its_launch_file() {
        let home = tempfile::tempdir().expect("a directory");
        let file = |root: &str| {
            let dir = Layout::new(home.path().join(root)).sandbox("0123");
            std::fs::create_dir_all(dir.path()).expect("a directory");
            std::fs::write(dir.launch_file(), "").expect("a file");
            dir.launch_file()
        };
        let (ours, original) = (file("copy"), file("original"));
        let started = |path: &Path| vec!["smolvm-keeper".into(), path.into()];
        assert_eq!(keeper_elsewhere(&ours, &started(&ours)), None);
        let found = keeper_elsewhere(&ours, &started(&original)).expect("the original's");
        assert_eq!(root_of(&found), home.path().join("original"));
        // Whoever starts it has other arguments.
        let starter = vec!["smolvm".into(), "start".into(), "a".into()];
        assert_eq!(keeper_elsewhere(&ours, &starter), None);
        std::os::unix::fs::symlink(home.path().join("copy"), home.path().join("link"))
            .expect("a link");
        let by_link = Layout::new(home.path().join("link")).sandbox("0123");
        assert_eq!(
            keeper_elsewhere(&ours, &started(&by_link.launch_file())),
            None
        );
        std::fs::remove_file(&original).expect("moved");
        assert_eq!(keeper_elsewhere(&ours, &started(&original)), None);
    }

    #[test]
    fn a_row_is_judged_by_who_holds_it() {
        let mut it = row("a");
        for state in State::ALL {
            it.state = state;
            it.spec.ephemeral = false;
            for (alive, locked) in [(true, false), (false, true), (true, true)] {
                assert_eq!(judge(&it, alive, locked), Verdict::Fine, "{state} is held");
            }
            let expected = match state {
                State::Starting | State::Running | State::Paused | State::Stopping => Verdict::Dead,
                State::Deleting => Verdict::Remove,
                State::Created | State::Stopped | State::Error => Verdict::Fine,
            };
            assert_eq!(judge(&it, false, false), expected, "{state} is not held");
        }
        it.pool = Some("p".to_owned());
        for state in State::ALL {
            it.state = state;
            assert_eq!(
                judge(&it, false, false),
                Verdict::Remove,
                "{state}, of a pool"
            );
        }
        it.pool = None;
        it.spec.ephemeral = true;
        for state in State::ALL {
            it.state = state;
            assert_eq!(
                judge(&it, false, false),
                Verdict::Remove,
                "{state}, ephemeral"
            );
        }
    }
}

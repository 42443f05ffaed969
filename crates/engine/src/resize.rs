//! Making a sandbox's own disk larger, running or not.
//!
//! The row first, then the disk, then the file system on it. Each step finds out what is left to do, so
//! one that was cut short is finished by the same command, or by the next start.

use std::path::Path;

use smolvm_host::os::Os;
use smolvm_proto::keeper::{GrowDiskRequest, KeeperRequest};
use smolvm_proto::message::{Event, GrowRequest, Request};

use crate::engine::{Engine, unknown_sandbox};
use crate::error::{Error, ErrorKind, Result};
use crate::spec::{DISK_MIB_MAX, DiskMode, SandboxName};
use crate::store::{SandboxRow, State, Store};

impl Engine {
    /// Makes a sandbox's own disk larger, and the file system on it, while it runs or at its next start.
    /// Does nothing if it has that size.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidInput`] for less than it has, or more than [`DISK_MIB_MAX`];
    /// [`ErrorKind::Unsupported`] if its changes go to memory or to a shared disk; [`ErrorKind::Busy`]
    /// while it starts, stops or is paused; [`ErrorKind::NotFound`]; [`ErrorKind::GuestFailed`].
    pub async fn grow_disk(&self, name: &str, disk_mib: u32) -> Result<()> {
        let Some(mut store) = Store::open_existing(&self.layout().database())? else {
            return Err(unknown_sandbox(name));
        };
        let row = self.row(&mut store, name)?;
        check(&row, disk_mib)?;
        match row.state {
            State::Created | State::Stopped | State::Error => {
                self.grow_disk_that_is_off(&mut store, &row, disk_mib)
            }
            State::Running => {
                let session = self.connect(name).await?;
                let request = KeeperRequest::GrowDisk(GrowDiskRequest { disk_mib });
                session.keeper(&request).await?;
                let request = Request::Grow(GrowRequest {
                    bytes: u64::from(disk_mib) << 20,
                });
                let told = async { session.client.open(&request)?.answer().await };
                match session.unless_hung(told).await? {
                    Event::Done => Ok(()),
                    other => Err(session.confused(&other)),
                }
            }
            state => Err(Error::new(
                ErrorKind::Busy,
                format!("sandbox `{name}` is {} just now", state.in_words()),
            )
            .hint("its disk grows while it runs, or while it is off")),
        }
    }

    fn grow_disk_that_is_off(
        &self,
        store: &mut Store,
        row: &SandboxRow,
        disk_mib: u32,
    ) -> Result<()> {
        let dir = self.layout().sandbox(&row.id);
        let Some(_lock) = self.os().try_lock("lock the sandbox", &dir.lock())? else {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("sandbox `{}` is being started or stopped", row.spec.name),
            )
            .hint("try again in a moment"));
        };
        store.set_disk_mib(&row.id, disk_mib)?;
        grow_file(self.os(), &dir.disk(), disk_mib)
    }
}

/// Makes a disk's file as large as its row says, if there is one; its file system follows at the next
/// boot.
pub(crate) fn grow_file(os: &Os, disk: &Path, disk_mib: u32) -> Result<()> {
    let bytes = u64::from(disk_mib) << 20;
    match std::fs::metadata(disk) {
        Ok(metadata) if metadata.len() < bytes => {
            os.effect("make the sandbox's disk larger", disk, || {
                std::fs::File::options()
                    .write(true)
                    .open(disk)?
                    .set_len(bytes)
            })?;
            Ok(())
        }
        // It is made at the first start, of that size.
        _ => Ok(()),
    }
}

/// Refuses what cannot be.
fn check(row: &SandboxRow, disk_mib: u32) -> Result<()> {
    check_size(&row.spec.name, row.spec.disk_mib, disk_mib)?;
    let why = match row.spec.disk_mode {
        DiskMode::Isolated => return Ok(()),
        DiskMode::Memory => "its changes go to its memory",
        DiskMode::Shared => "its disk belongs to the image",
    };
    Err(Error::new(
        ErrorKind::Unsupported,
        format!("sandbox `{}` has no disk of its own: {why}", row.spec.name),
    ))
}

/// Refuses to make a disk smaller, or too large.
///
/// # Errors
///
/// [`ErrorKind::InvalidInput`].
pub fn check_size(name: &SandboxName, has: u32, wanted: u32) -> Result<()> {
    let refuse = |what: String| Error::new(ErrorKind::InvalidInput, what);
    if wanted < has {
        return Err(refuse(format!(
            "sandbox `{name}` has a disk of {has} MiB, which cannot be made smaller"
        ))
        .hint("make a new sandbox with a smaller --disk, and copy what you need by `smolvm cp`"));
    }
    if wanted > DISK_MIB_MAX {
        return Err(refuse(format!(
            "disk of {wanted} MiB is above the most, {DISK_MIB_MAX} MiB"
        )));
    }
    Ok(())
}

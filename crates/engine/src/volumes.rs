//! Volumes: disks with a name, which outlive the sandboxes that use them.
//!
//! A volume is a sparse file with an ext4 file system that only guests mount. It has one writer at a
//! time, or any number of readers, and not both: no file system can be mounted twice otherwise.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::engine::{Engine, allocated, myself, random_u64};
use crate::error::{Error, ErrorKind, Result, io};
use crate::spec::{DISK_MIB_MAX, DISK_MIB_MIN, SandboxName};
use crate::store::volumes::unknown;
use crate::store::{SandboxRow, Store, VolumeRow, VolumeState};
use crate::teardown;

/// Most volumes of one sandbox. Each is a device, for which a machine has a few places.
pub const VOLUMES_MAX: usize = 8;

/// Longest path of a mount point in bytes, as Linux has it (`PATH_MAX`) with room for what the guest
/// puts before it.
const TARGET_BYTES_MAX: usize = 4000;

/// A volume of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeUse {
    /// The volume's name; the rule is that of sandboxes.
    pub name: SandboxName,
    /// Where it is in the guest.
    pub target: String,
    /// Whether the sandbox only reads it.
    pub read_only: bool,
}

impl FromStr for VolumeUse {
    type Err = Error;

    /// Understands `NAME:GUEST[:ro|rw]`; it may be written to unless that ends with `:ro`.
    fn from_str(text: &str) -> Result<Self> {
        let (name, rest) = text.split_once(':').ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidInput,
                format!("`{}` does not say where in the guest", text.escape_debug()),
            )
            .hint("write NAME:/path, or NAME:/path:ro to only read it")
        })?;
        let (target, read_only) = target_and_mode(rest)?;
        Ok(Self {
            name: name.parse().map_err(|error: Error| {
                let what = format!("`{}` is not a volume name", name.escape_debug());
                Error::new(error.kind(), what).hint(
                    "use 1 to 64 lower-case letters, digits, `-` and `_`; a directory of this host \
                     begins with `/` or `./`",
                )
            })?,
            target,
            read_only: read_only.unwrap_or(false),
        })
    }
}

/// Understands `GUEST[:ro|rw]`, and checks where that is.
pub(crate) fn target_and_mode(text: &str) -> Result<(String, Option<bool>)> {
    let (target, read_only) = if let Some(target) = text.strip_suffix(":ro") {
        (target, Some(true))
    } else if let Some(target) = text.strip_suffix(":rw") {
        (target, Some(false))
    } else {
        (text, None)
    };
    Ok((check_target(target)?, read_only))
}

/// A mount point in the guest, without what says nothing.
fn check_target(target: &str) -> Result<String> {
    let refuse = |why: &str| {
        Err(Error::new(
            ErrorKind::InvalidInput,
            format!("`{}` cannot be a mount point: {why}", target.escape_debug()),
        )
        .hint("give a path in the guest such as /srv/data, and :ro or :rw after it"))
    };
    let has_control = target.chars().any(char::is_control);
    if !target.starts_with('/') || has_control || target.contains(':') {
        return refuse("it is not an absolute path of the guest, without `:`");
    }
    if target.len() > TARGET_BYTES_MAX {
        return refuse("it is too long");
    }
    let parts: Vec<&str> = target
        .split('/')
        .filter(|part| !matches!(*part, "" | "."))
        .collect();
    match parts.first() {
        None => refuse("the root file system is there"),
        Some(&("proc" | "sys" | "dev" | "run")) => refuse("the kernel's own files are there"),
        Some(_) if parts.contains(&"..") => refuse("it has `..` in it"),
        Some(_) => Ok(format!("/{}", parts.join("/"))),
    }
}

/// Checks what was asked for as a whole: no two at one place, no volume twice, not too many.
pub(crate) fn check<'a>(
    uses: &'a [VolumeUse],
    other_targets: impl Iterator<Item = &'a str>,
) -> Result<()> {
    let refuse = |what: String| Err(Error::new(ErrorKind::InvalidInput, what));
    if uses.len() > VOLUMES_MAX {
        return refuse(format!(
            "{} volumes are above the most, {VOLUMES_MAX}",
            uses.len()
        ));
    }
    let mut targets = std::collections::BTreeSet::new();
    let mut names = std::collections::BTreeSet::new();
    for volume in uses {
        if !names.insert(volume.name.as_str()) {
            return refuse(format!("volume `{}` is asked for twice", volume.name));
        }
    }
    for target in uses
        .iter()
        .map(|volume| volume.target.as_str())
        .chain(other_targets)
    {
        if !targets.insert(target) {
            return refuse(format!("two things are to be mounted on {target}"));
        }
    }
    Ok(())
}

/// A volume as a sandbox's machine has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeLaunch {
    /// Its disk.
    pub path: PathBuf,
    /// Bytes of that, which a machine that was saved with another has to be told.
    pub bytes: u64,
    /// The guest's device.
    pub device: String,
    /// Where it is mounted.
    pub target: String,
    /// Whether it is only read.
    pub read_only: bool,
}

/// A sandbox that has a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeUser {
    /// The sandbox's name.
    pub sandbox: String,
    /// Where the volume is in it.
    pub target: String,
    /// Whether it only reads.
    pub read_only: bool,
    /// Whether it runs, or is starting or stopping.
    pub running: bool,
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeInfo {
    /// Sixteen hexadecimal digits.
    pub id: String,
    /// Its name.
    pub name: SandboxName,
    /// Size of its disk in MiB.
    pub size_mib: u32,
    /// Bytes it takes on the host's disk.
    pub used_bytes: u64,
    /// When it was made.
    pub created_at: Timestamp,
    /// Its disk.
    pub path: PathBuf,
    /// The sandboxes that have it, oldest first.
    pub users: Vec<VolumeUser>,
}

impl Engine {
    // ---- volumes ----

    /// Makes an empty volume.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::AlreadyExists`]; [`ErrorKind::InvalidInput`] for a size out of bounds;
    /// [`ErrorKind::NoSpace`]; [`ErrorKind::MissingDependency`]. Nothing remains after an error.
    pub fn create_volume(&self, name: &SandboxName, size_mib: u32) -> Result<VolumeInfo> {
        if !(DISK_MIB_MIN..=DISK_MIB_MAX).contains(&size_mib) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "a volume of {size_mib} MiB is not within {DISK_MIB_MIN} and {DISK_MIB_MAX} MiB"
                ),
            )
            .hint("give --size another value"));
        }
        let mut store = self.store()?;
        self.reconcile_volumes(&mut store)?;
        let row = VolumeRow {
            id: format!("{:016x}", random_u64()?),
            name: name.clone(),
            state: VolumeState::Making,
            size_mib,
            created_at: Timestamp::now(),
            holder: Some(myself()?),
        };
        store.insert_volume(&row)?;
        let path = self.layout().volume(&row.id);
        let made = (|| {
            let os = self.os();
            let all = self.layout().volumes();
            os.create_dir_all("make the directory", &all)?;
            let empty = self.assets().empty_layer(size_mib)?;
            os.copy_sparse("make the volume's disk", &empty, &path)?;
            os.sync("write the volume to the disk", &path)?;
            os.sync("write the volume's name to the disk", &all)?;
            if store.set_volume_ready(&row.id)? {
                return Ok(());
            }
            Err(Error::new(
                ErrorKind::NotFound,
                format!("volume `{name}` was removed while it was made"),
            ))
        })();
        match made {
            Ok(()) => self.describe_volume(&store, row),
            Err(error) => {
                self.destroy_volume(&mut store, &row.id)?;
                Err(error)
            }
        }
    }

    /// All volumes, by name, with what crashes left removed. Makes nothing on disk.
    pub fn volumes(&self) -> Result<Vec<VolumeInfo>> {
        let Some(mut store) = Store::open_existing(&self.layout().database())? else {
            return Ok(Vec::new());
        };
        teardown::reconcile(self.os(), self.layout(), &mut store)?;
        self.reconcile_volumes(&mut store)?;
        let rows = store.volumes()?.into_iter();
        rows.filter(|row| row.state == VolumeState::Ready)
            .map(|row| self.describe_volume(&store, row))
            .collect()
    }

    /// One volume.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`].
    pub fn volume(&self, name: &str) -> Result<VolumeInfo> {
        self.volumes()?
            .into_iter()
            .find(|volume| volume.name.as_str() == name)
            .ok_or_else(|| unknown(name))
    }

    /// Removes a volume with everything in it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Busy`] if a sandbox has it, running or not.
    pub fn remove_volume(&self, name: &str) -> Result<()> {
        let volume = self.volume(name)?;
        self.destroy_volume(&mut self.store()?, &volume.id)
    }

    /// Removes every volume that no sandbox has, or with `dry_run` only says which.
    ///
    /// # Errors
    ///
    /// What a removal failed with; those before it are gone.
    pub fn prune_volumes(&self, dry_run: bool) -> Result<Vec<VolumeInfo>> {
        let mut pruned = Vec::new();
        for volume in self.volumes()? {
            if !volume.users.is_empty() {
                continue;
            }
            if !dry_run {
                match self.destroy_volume(&mut self.store()?, &volume.id) {
                    // Somebody has begun to use it.
                    Err(error) if error.kind() == ErrorKind::Busy => continue,
                    removed => removed?,
                }
            }
            pruned.push(volume);
        }
        Ok(pruned)
    }

    /// Files that belong to no volume.
    pub(crate) fn stray_volumes(&self, store: &Store) -> Result<Vec<PathBuf>> {
        let mut stray = Vec::new();
        for entry in crate::engine::entries(&self.layout().volumes())? {
            // Read again for each: the row of a new one comes first.
            let rows = store.volumes()?;
            if !rows
                .iter()
                .any(|row| self.layout().volume(&row.id) == entry.path())
            {
                stray.push(entry.path());
            }
        }
        Ok(stray)
    }

    /// The volumes of a sandbox that is about to start, to which it has the right.
    pub(crate) fn volume_launches(
        &self,
        store: &Store,
        row: &SandboxRow,
    ) -> Result<Vec<VolumeLaunch>> {
        let mut launches = Vec::new();
        for volume in &row.spec.volumes {
            let name = volume.name.as_str();
            let found = store.volume_named(name)?.ok_or_else(|| unknown(name))?;
            let path = self.layout().volume(&found.id);
            if volume.read_only {
                refuse_unclean(name, &path)?;
            }
            launches.push(VolumeLaunch {
                bytes: u64::from(found.size_mib) << 20,
                path,
                device: String::new(),
                target: volume.target.clone(),
                read_only: volume.read_only,
            });
        }
        Ok(launches)
    }

    fn describe_volume(&self, store: &Store, row: VolumeRow) -> Result<VolumeInfo> {
        let path = self.layout().volume(&row.id);
        Ok(VolumeInfo {
            users: store.volume_users(&row.id)?,
            used_bytes: allocated(&path).unwrap_or(0),
            id: row.id,
            name: row.name,
            size_mib: row.size_mib,
            created_at: row.created_at,
            path,
        })
    }

    /// Removes a volume's disk, and its row last. Idempotent.
    fn destroy_volume(&self, store: &mut Store, id: &str) -> Result<()> {
        // It is nobody's: if this process fails, any other may go on.
        store.begin_delete_volume(id, None)?;
        self.os()
            .remove_file("remove the volume's disk", &self.layout().volume(id))?;
        store.delete_volume(id)
    }

    /// Removes what processes that are gone left half made or half removed.
    pub(crate) fn reconcile_volumes(&self, store: &mut Store) -> Result<()> {
        for row in store.volumes()? {
            let abandoned = match (row.state, &row.holder) {
                (VolumeState::Ready, _) => false,
                (_, Some(holder)) => !holder.is_alive()?,
                (_, None) => true,
            };
            if abandoned {
                self.destroy_volume(store, &row.id)?;
            }
        }
        Ok(())
    }
}

/// Offset of the superblock in an ext4 image, of its magic number and of the features that a reader
/// has to know (ext4, "The Super Block", in the kernel's documentation).
const SUPERBLOCK: u64 = 1024;
const MAGIC_AT: usize = 0x38;
const MAGIC: [u8; 2] = [0x53, 0xef];
const INCOMPAT_AT: usize = 0x60;
/// The journal has to be played back first.
const INCOMPAT_RECOVER: u32 = 0x4;

/// Refuses a volume that has to be mended before it can be read: its last writer did not go down in
/// order, and what it had written is in the journal still, which a reader may not play back.
fn refuse_unclean(name: &str, path: &Path) -> Result<()> {
    let mut superblock = [0; 0x64];
    let failed = |error| io(format!("could not read volume `{name}`"), error);
    File::open(path)
        .and_then(|file| file.read_exact_at(&mut superblock, SUPERBLOCK))
        .map_err(failed)?;
    let mut incompat = [0; 4];
    incompat.copy_from_slice(&superblock[INCOMPAT_AT..INCOMPAT_AT + 4]);
    let unclean = u32::from_le_bytes(incompat) & INCOMPAT_RECOVER != 0;
    if superblock[MAGIC_AT..MAGIC_AT + 2] == MAGIC && unclean {
        return Err(Error::new(
            ErrorKind::Busy,
            format!("volume `{name}` was not closed in order, and cannot be only read"),
        )
        .hint(format!(
            "have it put in order by a writer, once: smolvm run -v {name}:/mnt -- true"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<VolumeUse> {
        text.parse()
    }

    #[test]
    fn what_is_typed_is_understood_once() {
        let volume = |target: &str, read_only| VolumeUse {
            name: "data".parse().expect("a name"),
            target: target.to_owned(),
            read_only,
        };
        assert_eq!(parse("data:/srv").expect("one"), volume("/srv", false));
        assert_eq!(parse("data:/srv:ro").expect("one"), volume("/srv", true));
        assert_eq!(
            parse("data://a/./b/:rw").expect("one"),
            volume("/a/b", false)
        );
        for bad in [
            "data",
            "data:",
            "data:srv",
            "data:/",
            "data:/./",
            "data:/proc",
            "data:/dev/x",
            "data:/a/../b",
            "data:/a:x",
            "data:/a\nb",
            ":/srv",
            "Data:/srv",
            "/host:/srv",
        ] {
            let error = parse(bad).expect_err(bad);
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{bad}");
        }
        let long = format!("data:/{}", "x".repeat(TARGET_BYTES_MAX));
        assert!(parse(&long).is_err());
    }

    #[test]
    fn no_place_and_no_volume_is_given_twice() {
        let uses = |texts: &[&str]| -> Vec<VolumeUse> {
            texts.iter().map(|text| parse(text).expect("one")).collect()
        };
        let none = std::iter::empty;
        assert!(check(&uses(&["a:/a", "b:/b"]), none()).is_ok());
        assert!(check(&uses(&["a:/a", "b:/a"]), none()).is_err());
        assert!(check(&uses(&["a:/a", "a:/b"]), none()).is_err());
        assert!(check(&uses(&["a:/a"]), std::iter::once("/a")).is_err());
        let many: Vec<String> = (0..=VOLUMES_MAX).map(|n| format!("v{n}:/v{n}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert!(check(&uses(&many), none()).is_err());
        assert!(check(&uses(&many[1..]), none()).is_ok());
    }
}

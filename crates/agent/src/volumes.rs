//! Mounting disks beside the root file system, at the machine's birth.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::mount::MountFlags;
use smolvm_proto::message::{Failure, FailureKind, Volume};

use crate::devices;
use crate::extract::make_all;
use crate::failure::{failure, from_errno, from_io};
use crate::files::absolute;

/// How long a device may take to appear, as at boot.
const DEVICE_WAIT: Duration = Duration::from_secs(30);

/// Bytes of the unit in which sysfs gives a disk's size, whatever its blocks are.
const SECTOR_BYTES: u64 = 512;

/// Mounts each volume, the outer ones first.
pub(crate) fn mount_all(volumes: &[Volume]) -> Result<(), Failure> {
    let mut volumes: Vec<&Volume> = volumes.iter().collect();
    volumes.sort_by_key(|volume| volume.target.iter().filter(|byte| **byte == b'/').count());
    volumes.into_iter().try_for_each(mount)
}

fn mount(volume: &Volume) -> Result<(), Failure> {
    let target = absolute(&volume.target)?;
    make_all(target, None)?;
    let device = Path::new(&volume.device);
    let doing = || format!("mounting the volume of {}", target.display());
    devices::wait_for(
        || device.exists().then_some(()),
        Instant::now().checked_add(DEVICE_WAIT),
    )
    .map_err(|error| {
        let message = format!("{}: {}: {error}", doing(), device.display());
        failure(FailureKind::Io, message)
    })?;
    let device = as_large_as(device, volume.bytes)
        .map_err(|error| from_io(&format!("{}: looking at its disk", doing()), &error))?;
    let mut flags = MountFlags::NOATIME;
    if volume.read_only {
        flags |= MountFlags::RDONLY;
    }
    rustix::mount::mount(&device, target, "ext4", flags, None).map_err(|errno| match errno {
        // Without a journal's end it is not to be read (ext4_load_journal).
        Errno::ROFS => failure(
            FailureKind::InvalidInput,
            format!(
                "{}: it was not closed in order, and has to be written to once",
                doing()
            ),
        ),
        errno => from_errno(&doing(), errno),
    })
}

/// The disk, after the kernel has looked at it again if it is not as large as it should be: a machine
/// that was saved with another disk in this place still goes by what it knew of that. Nothing has it
/// open, so its driver may let go of it and take it up again, by which it may get another name.
fn as_large_as(device: &Path, bytes: u64) -> std::io::Result<PathBuf> {
    let name = device.file_name().unwrap_or_default();
    let block = Path::new("/sys/class/block").join(name);
    if size(&block)? == bytes {
        return Ok(device.to_owned());
    }
    let bus = std::fs::canonicalize(block.join("device"))?;
    let driver = bus.join("driver");
    let driver = std::fs::canonicalize(driver)?;
    let id = bus.file_name().unwrap_or_default().as_encoded_bytes();
    std::fs::write(driver.join("unbind"), id)?;
    std::fs::write(driver.join("bind"), id)?;
    let now = std::fs::read_dir(bus.join("block"))?
        .next()
        .ok_or(std::io::ErrorKind::NotFound)??;
    if size(&now.path())? == bytes {
        Ok(Path::new("/dev").join(now.file_name()))
    } else {
        Err(std::io::Error::other(
            "it has another size than the host says",
        ))
    }
}

fn size(block: &Path) -> std::io::Result<u64> {
    let text = std::fs::read_to_string(block.join("size"))?;
    let sectors: u64 = text
        .trim()
        .parse()
        .map_err(|_| std::io::ErrorKind::InvalidData)?;
    Ok(sectors.saturating_mul(SECTOR_BYTES))
}

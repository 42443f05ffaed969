//! What a state file says of the machine it was written by, behind QEMU's own part, which QEMU reads
//! to its end and no further.
//!
//! QEMU's part has the state of each device and nothing about memory, so a machine of another size
//! would take it and then find less, or other, memory than its guest knows of.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

use crate::VmPlan;

/// Longest description.
const BYTES_MAX: usize = 4096;

/// The parts of a plan that have to be the same in whoever restores.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Shape {
    /// Raised when the same fields come to mean something else.
    format: u32,
    cpus: u8,
    memory_mib: u32,
    /// For each disk whether it is read-only.
    disks: Vec<bool>,
    #[serde(default)]
    nic: bool,
}

impl Shape {
    pub(super) fn of(plan: &VmPlan) -> Shape {
        Shape {
            format: 1,
            cpus: plan.cpus,
            memory_mib: plan.memory_mib,
            disks: plan.disks.iter().map(|disk| disk.read_only).collect(),
            nic: plan.nic.is_some(),
        }
    }

    /// Writes it behind what is in `file`: JSON, and its length.
    pub(super) fn append(&self, file: &mut File) -> io::Result<()> {
        let mut bytes = serde_json::to_vec(self)?;
        let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        bytes.extend(length.to_le_bytes());
        file.seek(SeekFrom::End(0))?;
        file.write_all(&bytes)
    }

    /// Reads it, and leaves `file` at its beginning.
    pub(super) fn read(file: &mut File) -> io::Result<Shape> {
        const LENGTH_BYTES: usize = size_of::<u32>();
        let none = || io::Error::other("it does not end with the description of a machine");
        let size = file.metadata()?.len();
        let at = |from_end: usize| size.checked_sub(from_end as u64).ok_or_else(none);
        let mut length = [0; LENGTH_BYTES];
        file.read_exact_at(&mut length, at(LENGTH_BYTES)?)?;
        let length = usize::try_from(u32::from_le_bytes(length)).map_err(io::Error::other)?;
        if length > BYTES_MAX {
            return Err(none());
        }
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, at(LENGTH_BYTES + length)?)?;
        serde_json::from_slice(&bytes).map_err(|_| none())
    }

    /// Refuses another one.
    pub(super) fn expect(&self, wanted: &Shape) -> io::Result<()> {
        if self == wanted {
            return Ok(());
        }
        Err(io::Error::other(format!(
            "the state is that of another machine: {self:?}, not {wanted:?}"
        )))
    }
}

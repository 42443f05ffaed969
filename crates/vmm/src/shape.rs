//! What a state file says of the machine it was written by, behind the engine's own part.
//!
//! QEMU's part has the state of each device and nothing about memory, so a machine of another size
//! would take it and then find less, or other, memory than its guest knows of. And an engine that is
//! given the state of another one says something that nobody understands.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

use crate::VmPlan;

/// Longest description.
const BYTES_MAX: usize = 4096;

/// The parts of a plan that have to be the same in whoever restores.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Shape {
    /// Raised when the same fields come to mean something else.
    format: u32,
    /// The name of the engine. Absent in what was written when there was one.
    #[serde(default = "first_engine")]
    engine: String,
    cpus: u8,
    memory_mib: u32,
    /// For each disk whether it is read-only.
    disks: Vec<bool>,
    #[serde(default)]
    nic: bool,
}

fn first_engine() -> String {
    "qemu".to_owned()
}

impl Shape {
    pub(crate) fn of(engine: &str, plan: &VmPlan) -> Shape {
        Shape {
            format: 1,
            engine: engine.to_owned(),
            cpus: plan.cpus,
            memory_mib: plan.memory_mib,
            disks: plan.disks.iter().map(|disk| disk.read_only).collect(),
            nic: plan.nic.is_some(),
        }
    }

    /// Writes it behind what is in `file`: JSON, and its length.
    pub(crate) fn append(&self, file: &mut File) -> io::Result<()> {
        let mut bytes = serde_json::to_vec(self)?;
        let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        bytes.extend(length.to_le_bytes());
        file.seek(SeekFrom::End(0))?;
        file.write_all(&bytes)
    }

    /// Reads it, and where it begins, and leaves `file` at its beginning.
    pub(crate) fn read(file: &File) -> io::Result<(Shape, u64)> {
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
        let begins = at(LENGTH_BYTES + length)?;
        file.read_exact_at(&mut bytes, begins)?;
        let shape = serde_json::from_slice(&bytes).map_err(|_| none())?;
        Ok((shape, begins))
    }

    /// Refuses another one.
    pub(crate) fn expect(&self, wanted: &Shape) -> io::Result<()> {
        if self == wanted {
            return Ok(());
        }
        if self.engine != wanted.engine {
            return Err(io::Error::other(format!(
                "the state was written by the engine {}, and {} cannot read it",
                self.engine, wanted.engine
            )));
        }
        Err(io::Error::other(format!(
            "the state is that of another machine: {self:?}, not {wanted:?}"
        )))
    }
}

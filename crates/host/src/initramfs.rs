//! The initial RAM file system: the agent, the modules it loads, and nothing else.

use std::path::{Path, PathBuf};

use crate::error::{HostError, HostErrorKind};
use crate::os::Os;

/// What goes into an initial RAM file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Initramfs {
    /// The program that becomes `/init`.
    pub agent: PathBuf,
    /// Kernel modules in the order in which they are to be loaded. They become
    /// `/modules/<name>.ko`, and `/modules/order` lists their file names, one a line.
    pub modules: Vec<PathBuf>,
}

/// Writes the archive to `dest` in one step, replacing what is there. Equal input makes equal
/// bytes.
///
/// # Errors
///
/// `dest` is as it was after an error.
pub fn write_initramfs(_os: &Os, _content: &Initramfs, dest: &Path) -> Result<(), HostError> {
    Err(HostError::new(
        HostErrorKind::Other,
        "write",
        dest.display().to_string(),
    ))
}

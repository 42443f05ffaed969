//! The guest's kernel: the distribution's own, unpacked without installing it, or a given file.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cancel::Cancel;
use crate::error::{HostError, HostErrorKind};
use crate::os::Os;
use crate::packages::Programs;
use crate::progress::Progress;

/// The package whose dependency is the current kernel for virtual machines.
pub const CLOUD_KERNEL: &str = "linux-image-cloud-amd64";

/// The modules a guest of ours needs, by name. Those the kernel has built in are skipped, and what
/// they depend on is added.
pub const MODULES: &[&str] = &[
    "virtio_mmio",
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "virtio_rng",
    "virtio_net",
    "erofs",
    "overlay",
    "ext4",
];

/// A kernel directory's description of itself, `kernel.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelManifest {
    /// The release, as `uname -r` says it in the guest.
    pub release: String,
    /// Where it came from: package and version, or the path of the imported file.
    pub source: String,
    /// Of the file `vmlinux`: `sha256:` and 64 hexadecimal digits.
    pub digest: String,
    /// File names below `modules`, in the order in which they are to be loaded.
    pub modules: Vec<String>,
}

/// A kernel on the disk: a directory with `vmlinux`, `modules/` and `kernel.json`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// The directory.
    pub dir: PathBuf,
    /// What `kernel.json` says.
    pub manifest: KernelManifest,
}

impl Kernel {
    /// The uncompressed kernel, an ELF file.
    #[must_use]
    pub fn vmlinux(&self) -> PathBuf {
        self.dir.join("vmlinux")
    }

    /// The modules, in the order in which they are to be loaded.
    #[must_use]
    pub fn modules(&self) -> Vec<PathBuf> {
        self.manifest
            .modules
            .iter()
            .map(|name| self.dir.join("modules").join(name))
            .collect()
    }

    /// Reads the description of the kernel in `dir`. The files themselves are not read.
    ///
    /// # Errors
    ///
    /// [`NotFound`](HostErrorKind::NotFound) if there is none.
    pub fn open(os: &Os, dir: &Path) -> Result<Self, HostError> {
        let path = dir.join("kernel.json");
        let bytes = os.read("read the kernel's description", &path)?;
        let manifest = serde_json::from_slice(&bytes)
            .map_err(|e| HostError::io("read the kernel's description", &path, e.into()))?;
        Ok(Self {
            dir: dir.to_owned(),
            manifest,
        })
    }
}

/// Downloads the distribution's kernel for virtual machines, as any user and without installing
/// it, and puts it at `dest`, which must not exist.
///
/// # Errors
///
/// Nothing remains at `dest` after an error or a cancellation.
pub fn fetch_kernel(
    _os: &Os,
    _programs: &Programs,
    dest: &Path,
    _modules: &[&str],
    _cancel: &Cancel,
    _progress: &mut dyn FnMut(Progress),
) -> Result<Kernel, HostError> {
    Err(HostError::new(
        HostErrorKind::Other,
        "fetch the kernel",
        dest.display().to_string(),
    ))
}

/// Takes the user's own kernel, an ELF file or a bzImage, with everything needed built in, and
/// puts it at `dest`, which must not exist.
///
/// # Errors
///
/// [`Corrupt`](HostErrorKind::Corrupt) if the file is neither. Nothing remains at `dest` then.
pub fn import_kernel(_os: &Os, _file: &Path, dest: &Path) -> Result<Kernel, HostError> {
    Err(HostError::new(
        HostErrorKind::Other,
        "import the kernel",
        dest.display().to_string(),
    ))
}

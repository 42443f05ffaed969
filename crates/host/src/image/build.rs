//! Building the default image, and importing others.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cancel::Cancel;
use crate::error::{HostError, HostErrorKind};
use crate::os::Os;
use crate::packages::Programs;
use crate::progress::Progress;

/// What to build, with nothing left to decide.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildRequest {
    /// The image's name, copied into its description.
    pub name: String,
    /// The time, RFC 3339, copied into the image's description.
    pub created: String,
    /// Where packages come from: a mirror's URL or a line of sources.list(5). `None` takes the
    /// host's own sources if the host runs the same release, else mmdebstrap's default.
    pub mirror: Option<String>,
    /// Packages beyond the default ones.
    pub packages: Vec<String>,
}

/// An image's description of itself, `manifest.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageManifest {
    /// The image's name.
    pub name: String,
    /// Of the file `root.erofs`: `sha256:` and 64 hexadecimal digits.
    pub digest: String,
    /// Length of `root.erofs` in bytes.
    pub size: u64,
    /// When it was made, RFC 3339.
    pub created: String,
    /// Where it came from, for people.
    pub source: String,
    /// The Debian packages in it, by name; empty if it has no dpkg.
    pub packages: Vec<Package>,
}

/// An installed package.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
}

/// An image on the disk: a directory with `root.erofs` and `manifest.json`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The directory.
    pub dir: PathBuf,
    /// What `manifest.json` says.
    pub manifest: ImageManifest,
}

impl Image {
    /// The root file system, to be attached read-only.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.dir.join("root.erofs")
    }

    /// Reads the description of the image in `dir`. The image itself is not read.
    ///
    /// # Errors
    ///
    /// [`NotFound`](HostErrorKind::NotFound) if there is none.
    pub fn open(os: &Os, dir: &Path) -> Result<Self, HostError> {
        let path = dir.join("manifest.json");
        let bytes = os.read("read the image's description", &path)?;
        let manifest = serde_json::from_slice(&bytes)
            .map_err(|e| HostError::io("read the image's description", &path, e.into()))?;
        Ok(Self {
            dir: dir.to_owned(),
            manifest,
        })
    }
}

/// Builds the default image and puts it at `dest`, which must not exist.
///
/// # Errors
///
/// Nothing remains at `dest` after an error or a cancellation.
pub fn build_default_image(
    _os: &Os,
    _programs: &Programs,
    _request: &BuildRequest,
    dest: &Path,
    _cancel: &Cancel,
    _progress: &mut dyn FnMut(Progress),
) -> Result<Image, HostError> {
    Err(HostError::new(
        HostErrorKind::Other,
        "build",
        dest.display().to_string(),
    ))
}

/// Makes an image from an uncompressed tar archive and puts it at `dest`, which must not exist.
///
/// # Errors
///
/// Nothing remains at `dest` after an error or a cancellation.
pub fn import_tar(
    _os: &Os,
    _tar: &mut dyn std::io::Read,
    _name: &str,
    _created: &str,
    _source: &str,
    dest: &Path,
) -> Result<Image, HostError> {
    Err(HostError::new(
        HostErrorKind::Other,
        "import",
        dest.display().to_string(),
    ))
}

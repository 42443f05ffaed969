//! Releases of Firecracker that are kept in the data directory.

use smolvm_host::Cancel;
use smolvm_host::firecracker::{self, Installed, Release, Source};

use crate::assets::{self, Watcher};
use crate::engine::Engine;
use crate::error::{Error, ErrorKind, Result};
use crate::oci::input;

impl Engine {
    /// The releases of Firecracker in the data directory, newest first.
    #[must_use]
    pub fn firecracker_releases(&self) -> Vec<Installed> {
        firecracker::installed(&self.layout().engines())
    }

    /// A release of Firecracker by its version, and by the checksum of its archive if it is not a known
    /// one; the recommended one without a version.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) if it is not known and has no checksum;
    /// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput).
    pub fn firecracker_release(version: Option<&str>, sha256: Option<&str>) -> Result<Release> {
        match (version, sha256) {
            (None, None) => Ok(Release::recommended()),
            (Some(version), sha256) => Release::of(version, sha256).map_err(input),
            (None, Some(_)) => Err(Error::new(
                ErrorKind::InvalidInput,
                "a checksum without a version says nothing",
            )
            .hint("name the release: --firecracker=VERSION --sha256 HEX")),
        }
    }

    /// Puts a release of Firecracker into the data directory, unless it is there. Says whether it was
    /// fetched now. Long; run it on a thread that may block.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Network`](crate::ErrorKind::Network); [`ErrorKind::NotFound`](crate::ErrorKind::NotFound)
    /// if the source does not have it; [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) if the
    /// archive is another than it has to be, or for other hosts;
    /// [`ErrorKind::NoSpace`](crate::ErrorKind::NoSpace),
    /// [`ErrorKind::Cancelled`](crate::ErrorKind::Cancelled). Nothing of it is there then.
    pub fn install_firecracker(
        &self,
        release: &Release,
        source: &Source,
        watcher: &mut dyn Watcher,
        cancel: &Cancel,
    ) -> Result<(Installed, bool)> {
        self.make_data_dir()?;
        let task = format!("Firecracker {}", release.version());
        firecracker::install(
            self.os(),
            self.programs(),
            &self.config().registries.proxy,
            release,
            source,
            &self.layout().engines(),
            &mut |progress| assets::report(watcher, &task, progress),
            cancel,
        )
        .map_err(input)
    }
}

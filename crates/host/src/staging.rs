//! Making a directory whole or not at all.

use std::path::{Path, PathBuf};

use crate::error::{HostError, HostErrorKind};
use crate::os::{Lock, Os};

/// A directory that is being filled beside the place it will have. Dropping it without publishing
/// removes it; what a killed process left is removed by the next one that begins.
#[derive(Debug)]
pub(crate) struct Staging<'a> {
    os: &'a Os,
    dir: PathBuf,
    dest: PathBuf,
    published: bool,
    /// Keeps two processes from filling the same directory. `.<name>.lock` stays on the disk.
    _lock: Lock,
}

impl<'a> Staging<'a> {
    /// Waits for any other process that is filling the same directory, then starts with an empty
    /// one of mode 0700.
    pub(crate) fn begin(os: &'a Os, dest: &Path) -> Result<Self, HostError> {
        let (Some(parent), Some(name)) = (dest.parent(), dest.file_name()) else {
            return Err(
                HostError::new(HostErrorKind::Other, "create", dest.display().to_string())
                    .because("the path has no last part"),
            );
        };
        let beside = |suffix: &str| {
            let mut hidden = std::ffi::OsString::from(".");
            hidden.push(name);
            hidden.push(suffix);
            parent.join(hidden)
        };
        os.create_dir_all("create the directory", parent)?;
        let lock = os.lock("lock the directory", &beside(".lock"))?;
        if std::fs::symlink_metadata(dest).is_ok() {
            return Err(HostError::new(
                HostErrorKind::AlreadyExists,
                "create",
                dest.display().to_string(),
            ));
        }
        let dir = beside(".partial");
        os.remove_tree("remove what was left half made", &dir)?;
        os.create_dir("create the temporary directory", &dir)?;
        Ok(Self {
            os,
            dir,
            dest: dest.to_owned(),
            published: false,
            _lock: lock,
        })
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Gives the directory its name, in one step.
    pub(crate) fn publish(mut self) -> Result<(), HostError> {
        self.os
            .rename("put the directory in place", &self.dir, &self.dest)?;
        self.published = true;
        Ok(())
    }
}

impl Drop for Staging<'_> {
    fn drop(&mut self) {
        if self.published {
            return;
        }
        if let Err(error) = self
            .os
            .remove_tree("remove the temporary directory", &self.dir)
        {
            tracing::warn!(%error, dir = %self.dir.display(), "left for the next attempt");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_there_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let (os, dest) = (Os::new(), dir.path().join("images/default"));
        let staging = Staging::begin(&os, &dest).unwrap();
        std::fs::write(staging.dir().join("file"), "x").unwrap();
        let inner = staging.dir().to_owned();
        drop(staging);
        assert!(!inner.exists() && !dest.exists());

        // What a killed process left.
        std::fs::create_dir(&inner).unwrap();
        std::fs::write(inner.join("stale"), "x").unwrap();
        let staging = Staging::begin(&os, &dest).unwrap();
        std::fs::write(staging.dir().join("file"), "x").unwrap();
        staging.publish().unwrap();
        assert!(dest.join("file").exists() && !dest.join("stale").exists());

        let error = Staging::begin(&os, &dest).unwrap_err();
        assert_eq!(error.kind(), HostErrorKind::AlreadyExists);
        assert!(dest.join("file").exists() && !inner.exists());
    }
}

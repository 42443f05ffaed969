//! Directories of the host that a sandbox sees.

use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use smolvm_proto::message::{MountRequest, Request};

use crate::connection::Connection;
use crate::error::{Error, ErrorKind, Result};
use crate::session::Session;
use crate::spec::SandboxName;
use crate::volumes::{VolumeUse, target_and_mode};

/// Most mounts of one sandbox.
pub const MOUNTS_MAX: usize = 32;

/// A directory of the host in a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// The directory; absolute.
    pub source: PathBuf,
    /// Where it is in the guest.
    pub target: String,
    /// Whether the guest only reads.
    pub read_only: bool,
}

impl Mount {
    /// Whether what follows `-v` means a directory of the host, and not a volume.
    #[must_use]
    pub fn is_meant(text: &str) -> bool {
        text.starts_with(['/', '.', '~'])
    }
}

impl FromStr for Mount {
    type Err = Error;

    /// Understands `HOST:GUEST[:ro|rw]`; it is only read unless that ends with `:rw`.
    fn from_str(text: &str) -> Result<Self> {
        // A path of the host may have colons in it; one of the guest has none.
        let parts = text.rfind(":/").filter(|at| *at > 0);
        let (source, rest) = parts.map(|at| (&text[..at], &text[at + 1..])).ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidInput,
                format!("`{}` does not say where in the guest", text.escape_debug()),
            )
            .hint("write HOST:/path to read a directory of this host there, or HOST:/path:rw to write, too")
        })?;
        let (target, read_only) = target_and_mode(rest)?;
        if source.starts_with('~') {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "`{}` is no path: the shell has left `~` as it is",
                    source.escape_debug()
                ),
            )
            .hint("write \"$HOME/...\" in its place"));
        }
        Ok(Self {
            source: source.into(),
            target,
            read_only: read_only.unwrap_or(true),
        })
    }
}

/// Checks what was asked for as a whole. Places are compared with those of volumes by
/// [`volumes::check`](crate::volumes::check).
pub(crate) fn check(mounts: &[Mount], volumes: &[VolumeUse]) -> Result<()> {
    let refuse = |what: String| Err(Error::new(ErrorKind::InvalidInput, what));
    if mounts.len() > MOUNTS_MAX {
        return refuse(format!(
            "{} mounts are above the most, {MOUNTS_MAX}",
            mounts.len()
        ));
    }
    for mount in mounts {
        if !mount.source.is_absolute() || mount.source.to_str().is_none() {
            return refuse(format!(
                "`{}` cannot be mounted: it is no absolute path in UTF-8",
                mount.source.display()
            ));
        }
        // Volumes come first, so it would be hidden.
        let below = format!("{}/", mount.target);
        if let Some(volume) = volumes
            .iter()
            .find(|volume| volume.target.starts_with(&below))
        {
            return refuse(format!(
                "volume `{}` would be hidden by what is mounted on {}",
                volume.name, mount.target
            ));
        }
    }
    Ok(())
}

/// The sources as they are without links. What is not there stays as it is, and is refused at a start.
pub(crate) fn without_links(mounts: &mut [Mount]) {
    for mount in mounts {
        if let Ok(path) = mount.source.canonicalize() {
            mount.source = path;
        }
    }
}

/// Refuses a path into which a link has come since the sandbox was made, as by a guest that may write to a
/// directory above. [`smolvm_host::share::Share::open`] makes sure of it; here the reason can be told.
pub(crate) fn refuse_links(name: &SandboxName, mounts: &[Mount]) -> Result<()> {
    for mount in mounts {
        if let Ok(path) = mount.source.canonicalize()
            && path != mount.source
        {
            let why = format!(
                "there is a link in its path, which leads to {}, and was not there when the sandbox was made",
                path.display()
            );
            return Err(not_mounted(name, mount, ErrorKind::InvalidInput, why).hint(
                "remove the link, or make the sandbox anew with the directory that is meant",
            ));
        }
    }
    Ok(())
}

fn not_mounted(name: &SandboxName, mount: &Mount, kind: ErrorKind, why: String) -> Error {
    let source = mount.source.display();
    Error::new(
        kind,
        format!("could not mount {source} in sandbox `{name}`"),
    )
    .because(why)
}

/// Refuses what is no directory at this moment.
///
/// # Errors
///
/// [`ErrorKind::NotFound`], [`ErrorKind::InvalidInput`], [`ErrorKind::PermissionDenied`].
pub fn check_mounts(name: &SandboxName, mounts: &[Mount]) -> Result<()> {
    for mount in mounts {
        let refuse = |kind, why: String| {
            Err(not_mounted(name, mount, kind, why).hint(
                "give -v a directory of this host that you may read, such as \"$PWD\":/shared",
            ))
        };
        match std::fs::metadata(&mount.source) {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => return refuse(ErrorKind::InvalidInput, "it is no directory".to_owned()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return refuse(ErrorKind::NotFound, "it is not there".to_owned());
            }
            Err(error) => return refuse(ErrorKind::PermissionDenied, error.to_string()),
        }
    }
    Ok(())
}

impl Session {
    /// Begins to mount a directory in the guest. That it is mounted, or why not, is the first thing it
    /// says; then it says what the guest's kernel asks, to be answered by
    /// [`smolvm_host::share::Share`].
    pub fn open_mount(&self, mount: &Mount) -> Result<Connection> {
        let request = Request::Mount(MountRequest {
            target: mount.target.clone().into_bytes().into(),
            read_only: mount.read_only,
        });
        Ok(Connection::of(self.name(), self.client.open(&request)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_read_as_people_write_it() {
        let read = |text: &str| {
            let mount: Mount = text.parse().expect(text);
            (mount.source, mount.target, mount.read_only)
        };
        assert_eq!(read("/a:/b"), ("/a".into(), "/b".into(), true));
        assert_eq!(
            read("/a b:c:/d/./e/:rw"),
            ("/a b:c".into(), "/d/e".into(), false)
        );
        assert_eq!(read("./x:/y:ro"), ("./x".into(), "/y".into(), true));
        assert!(Mount::is_meant("../x:/y") && Mount::is_meant("/x:/y"));
        assert!(!Mount::is_meant("data:/y"));
        for text in [
            "/a",
            "/a:",
            "/a:b",
            ":/b",
            "/a:/",
            "/a:/proc/x",
            "/a:/b/../c",
            "~/a:/b",
        ] {
            let error = text.parse::<Mount>().expect_err(text);
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{text}");
            assert!(error.hint_text().is_some(), "{text}");
        }
    }

    #[test]
    fn a_link_that_came_later_is_refused() {
        let home = tempfile::tempdir().expect("a directory");
        let root = home.path().canonicalize().expect("its path");
        let (name, there) = ("a".parse().expect("a name"), root.join("there"));
        std::fs::create_dir(&there).expect("a directory");
        std::os::unix::fs::symlink(&there, root.join("link")).expect("a link");
        let mut mounts = vec![Mount {
            source: root.join("link"),
            target: "/srv".to_owned(),
            read_only: false,
        }];
        let error = refuse_links(&name, &mounts).expect_err("a link");
        assert!(error.in_one_line().contains("leads to"), "{error:?}");
        without_links(&mut mounts);
        assert_eq!(mounts[0].source, there);
        refuse_links(&name, &mounts).expect("no link");
    }

    #[test]
    fn a_mount_hides_no_volume() {
        let mount: Mount = "/a:/srv".parse().expect("a mount");
        let volume = |text: &str| vec![text.parse::<VolumeUse>().expect("a volume")];
        assert!(check(std::slice::from_ref(&mount), &volume("data:/srvs")).is_ok());
        assert!(check(std::slice::from_ref(&mount), &volume("data:/srv/x")).is_err());
        let many = vec![mount; MOUNTS_MAX + 1];
        assert!(check(&many, &[]).is_err());
    }
}

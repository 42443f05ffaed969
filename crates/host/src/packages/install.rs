//! Installing packages on the host itself.

use super::Programs;
use crate::apt;
use crate::cancel::Cancel;
use crate::error::{HostError, HostErrorKind};

pub(super) fn install(
    programs: &Programs,
    packages: &[&str],
    cancel: &Cancel,
    line: &mut dyn FnMut(&str),
) -> Result<(), HostError> {
    if !rustix::process::geteuid().is_root() {
        return Err(HostError::new(
            HostErrorKind::PermissionDenied,
            "install",
            packages.join(" "),
        )
        .because("only root may install packages")
        .hinting(format!(
            "As root, run: apt-get install --no-install-recommends {}",
            packages.join(" ")
        )));
    }
    match attempt(programs, packages, cancel, line) {
        // There are no lists of packages, or they name files the mirror has replaced since.
        Err(e) if matches!(e.kind(), HostErrorKind::NotFound | HostErrorKind::Network) => {
            update(programs, cancel, line)?;
            attempt(programs, packages, cancel, line)
        }
        result => result,
    }
}

fn attempt(
    programs: &Programs,
    packages: &[&str],
    cancel: &Cancel,
    line: &mut dyn FnMut(&str),
) -> Result<(), HostError> {
    let result = programs
        .tool("apt-get")?
        // debconf(7): ask nothing. The value is for the packages' own scripts.
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(["-q", "-y", "--no-install-recommends", "--no-upgrade"])
        // Another apt may be at work, such as the daily one: wait for it, at most these seconds.
        .args(["-o", "DPkg::Lock::Timeout=120", "-o", "Dpkg::Use-Pty=0"])
        .args(["-o", "APT::Status-Fd=2", "install", "--"])
        .args(packages)
        .run(cancel, &mut |text| report(text, line));
    match result {
        Ok(_) => Ok(()),
        Err(e)
            if apt::says(
                &e,
                &["Unable to locate package", "has no installation candidate"],
            ) =>
        {
            Err(e.with_kind(HostErrorKind::NotFound))
        }
        Err(e) => Err(apt::classify(e)),
    }
}

fn update(
    programs: &Programs,
    cancel: &Cancel,
    line: &mut dyn FnMut(&str),
) -> Result<(), HostError> {
    line("Fetching the lists of packages");
    programs
        .tool("apt-get")?
        .args(["-q", "-o", "APT::Update::Error-Mode=any", "update"])
        .run(cancel, &mut |text| report(text, line))
        .map(drop)
        .map_err(apt::classify)
}

/// apt's status descriptor, `dlstatus:<item>:<percent>:<text>` and `pmstatus:` likewise, says in
/// words what it is doing; the rest of its standard error is warnings.
fn report(text: &str, line: &mut dyn FnMut(&str)) {
    let status = ["dlstatus:", "pmstatus:"]
        .iter()
        .find_map(|prefix| text.strip_prefix(prefix));
    match status {
        Some(status) => {
            if let Some(words) = status.splitn(3, ':').nth(2) {
                line(words);
            }
        }
        None if text.is_empty() => {}
        None => line(text),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    use super::*;

    fn with_apt(dir: &Path, script: &str) -> Programs {
        let path = dir.join("apt-get");
        fs::write(
            &path,
            format!("#!/bin/sh\nhere={}\n{script}\n", dir.display()),
        )
        .unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        Programs::new(
            std::iter::once(dir.to_owned()).chain(crate::packages::SYSTEM_DIRS.map(Into::into)),
        )
    }

    #[test]
    fn lists_are_fetched_when_a_package_is_not_found() {
        let dir = tempfile::tempdir().unwrap();
        let programs = with_apt(
            dir.path(),
            "case \"$*\" in *' update') touch $here/updated; exit;; esac
             [ -e $here/updated ] || { echo 'E: Unable to locate package x' >&2; exit 100; }
             echo \"$*\" >$here/arguments
             echo 'pmstatus:x:50.0:Unpacking x (amd64)' >&2",
        );
        let cancel = Cancel::new().unwrap();
        let mut lines = Vec::new();
        let mut line = |text: &str| lines.push(text.to_owned());
        let result = attempt(&programs, &["x"], &cancel, &mut line);
        assert_eq!(result.unwrap_err().kind(), HostErrorKind::NotFound);
        update(&programs, &cancel, &mut line).unwrap();
        attempt(&programs, &["x", "y"], &cancel, &mut line).unwrap();
        assert_eq!(
            lines,
            [
                "E: Unable to locate package x",
                "Fetching the lists of packages",
                "Unpacking x (amd64)"
            ]
        );
        let arguments = fs::read_to_string(dir.path().join("arguments")).unwrap();
        assert!(arguments.ends_with("install -- x y\n"), "{arguments}");
    }
}

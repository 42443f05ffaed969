//! apt, used without installing anything: which packages there are, and their files.

use std::error::Error as _;
use std::path::{Path, PathBuf};

use crate::cancel::Cancel;
use crate::command::{ProgramFailure, Tool};
use crate::error::{HostError, HostErrorKind};
use crate::os::Os;
use crate::packages::Programs;
use crate::progress::{Meter, Phase};

/// What apt and its kin say when the network, or a mirror, is at fault. Their exit code is 100
/// for everything, so the words are all there is; they are fixed by `LC_ALL=C`.
const NETWORK: &[&str] = &[
    "Failed to fetch",
    "Unable to fetch",
    "Some index files failed to download",
    "Temporary failure resolving",
    "Could not resolve",
    "Could not connect",
    "Cannot initiate the connection",
    "Connection failed",
    "Connection timed out",
    "Network is unreachable",
    "404  Not Found",
    "Could not handshake",
    "Release file",
];

/// The same for a full disk: strerror(3) of `ENOSPC` and `EDQUOT`, and apt's own check.
const NO_SPACE: &[&str] = &[
    "No space left on device",
    "Disk quota exceeded",
    "enough free space",
];

/// Whether the program that failed said any of the phrases in its last lines.
pub(crate) fn says(error: &HostError, phrases: &[&str]) -> bool {
    let failure = error
        .source()
        .and_then(|s| s.downcast_ref::<ProgramFailure>());
    failure.is_some_and(|failure| {
        failure
            .last_lines
            .iter()
            .any(|line| phrases.iter().any(|phrase| line.contains(phrase)))
    })
}

/// Gives a Debian program's failure the kind its last lines speak of.
pub(crate) fn classify(error: HostError) -> HostError {
    if says(&error, NO_SPACE) {
        error.with_kind(HostErrorKind::NoSpace)
    } else if says(&error, NETWORK) {
        error.with_kind(HostErrorKind::Network)
    } else {
        error
    }
}

/// The percentage in a line of apt's status descriptor, `dlstatus:<item>:<percent>:<text>`; see
/// README.progress-reporting of apt.
pub(crate) fn download_percent(line: &str) -> Option<f64> {
    let mut parts = line.strip_prefix("dlstatus:")?.splitn(3, ':');
    parts.next()?;
    parts.next()?.parse().ok()
}

/// Reports a percentage.
pub(crate) fn report(meter: &mut Meter<'_>, phase: Phase, percent: f64) {
    // Saturates, and a NaN becomes 0.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "bounded"
    )]
    meter.at(phase, (percent.clamp(0.0, 100.0) * 100.0) as u64, 10_000);
}

/// apt with the host's sources, and either its lists or our own.
#[derive(Debug)]
pub(crate) struct Apt<'a> {
    pub(crate) programs: &'a Programs,
    pub(crate) cancel: &'a Cancel,
    /// Where our own lists are, once the host's were found wanting.
    private: Option<PathBuf>,
}

impl<'a> Apt<'a> {
    pub(crate) fn new(programs: &'a Programs, cancel: &'a Cancel) -> Self {
        Self {
            programs,
            cancel,
            private: None,
        }
    }

    /// Whether our own lists are in use already.
    pub(crate) fn is_private(&self) -> bool {
        self.private.is_some()
    }

    fn tool(&self, program: &str) -> Result<Tool, HostError> {
        let mut tool = self
            .programs
            .tool(program)?
            .args(["-q", "-o", "APT::Status-Fd=2"])
            // As root apt would download as the user _apt, who cannot enter our directory.
            .args(["-o", "APT::Sandbox::User=root"]);
        if let Some(dir) = &self.private {
            for (option, path) in [
                ("Dir::State", "state"),
                ("Dir::State::status", "state/status"),
                ("Dir::Cache", "cache"),
            ] {
                let mut value = std::ffi::OsString::from(format!("{option}="));
                value.push(dir.join(path));
                tool = tool.arg("-o").arg(value);
            }
        }
        Ok(tool)
    }

    /// From now on uses lists of our own in `dir`, fetched from the host's sources, so that an
    /// ordinary user depends on nobody's `apt-get update`.
    pub(crate) fn update_privately(
        &mut self,
        os: &Os,
        dir: &Path,
        meter: &mut Meter<'_>,
    ) -> Result<(), HostError> {
        let op = "create apt's directories";
        os.create_dir_all(op, &dir.join("state/lists/partial"))?;
        os.create_dir_all(op, &dir.join("cache/archives/partial"))?;
        os.create_file(op, &dir.join("state/status"), 0o600)?;
        self.private = Some(dir.to_owned());
        self.tool("apt-get")?
            .args(["-o", "APT::Update::Error-Mode=any", "update"])
            .run(self.cancel, &mut |line| {
                if let Some(percent) = download_percent(line) {
                    report(meter, Phase::Update, percent);
                }
            })
            .map(drop)
            .map_err(classify)
    }

    /// The control file's paragraph of a package's candidate version, or `None` if no list has it.
    pub(crate) fn show(&self, package: &str) -> Result<Option<String>, HostError> {
        let result = self
            .tool("apt-cache")?
            .args(["show", "--no-all-versions", package])
            .run(self.cancel, &mut |_| {});
        match result {
            Ok(output) => Ok(Some(String::from_utf8_lossy(&output).into_owned())),
            Err(e) if e.kind() == HostErrorKind::Other => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Downloads one package's file into `dir`, which has no other, and returns its path.
    pub(crate) fn download(
        &self,
        package: &str,
        dir: &Path,
        meter: &mut Meter<'_>,
    ) -> Result<PathBuf, HostError> {
        self.tool("apt-get")?
            .args(["download", package])
            .current_dir(dir)
            .run(self.cancel, &mut |line| {
                if let Some(percent) = download_percent(line) {
                    report(meter, Phase::Download, percent);
                }
            })
            .map_err(classify)?;
        let entries = std::fs::read_dir(dir).map_err(|e| HostError::io("read", dir, e))?;
        for entry in entries {
            let path = entry.map_err(|e| HostError::io("read", dir, e))?.path();
            if path.extension().is_some_and(|e| e == "deb") {
                return Ok(path);
            }
        }
        Err(HostError::new(HostErrorKind::Other, "download", package)
            .because("apt-get said it went well, but there is no file"))
    }
}

/// A field of a paragraph in the format of deb-control(5), its first line only.
pub(crate) fn field<'t>(paragraph: &'t str, name: &str) -> Option<&'t str> {
    paragraph.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn percentages_are_read() {
        assert_eq!(
            download_percent("dlstatus:1:98.6667:Retrieving file 1 of 1"),
            Some(98.6667)
        );
        assert_eq!(download_percent("dlstatus:1"), None);
        assert_eq!(download_percent("Get:1 a package"), None);
    }

    #[test]
    fn fields_are_read() {
        let text = "Package: a\nDepends: b (= 1), c\nDescription: d\n more\n";
        assert_eq!(field(text, "Depends"), Some("b (= 1), c"));
        assert_eq!(field(text, "more"), None);
    }

    #[test]
    fn failures_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("apt-get");
        for (says, kind) in [
            (
                "E: Failed to fetch x  Temporary failure",
                HostErrorKind::Network,
            ),
            (
                "E: Write error - write (28: No space left on device)",
                HostErrorKind::NoSpace,
            ),
            ("E: Something else", HostErrorKind::Other),
        ] {
            std::fs::write(&script, format!("#!/bin/sh\necho '{says}' >&2\nexit 100\n")).unwrap();
            std::fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).unwrap();
            let programs = Programs::new(
                std::iter::once(dir.path().to_owned())
                    .chain(crate::packages::SYSTEM_DIRS.map(Into::into)),
            );
            let cancel = Cancel::new().unwrap();
            let mut report = |_| {};
            let mut meter = Meter::new(&[], &mut report);
            let error = Apt::new(&programs, &cancel)
                .download("x", dir.path(), &mut meter)
                .unwrap_err();
            assert_eq!(error.kind(), kind, "{says}");
        }
    }
}

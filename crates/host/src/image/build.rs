//! Building the default image, and importing others.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::erofs::{Special, Written, write_erofs};
use crate::apt;
use crate::cancel::Cancel;
use crate::error::{HostError, HostErrorKind};
use crate::os::{Durability, Os};
use crate::packages::Programs;
use crate::progress::{Meter, Phase, Progress};
use crate::staging::Staging;

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

/// The Debian release of the default image.
pub const RELEASE: &str = "bookworm";

/// What the default image has beyond Debian's minimal system.
pub const PACKAGES: &[&str] = &[
    "bash",
    "ca-certificates",
    "coreutils",
    "curl",
    "git",
    "python3",
];

/// Left out of the image: what only people read. Licences stay, as they must; dpkg(1),
/// `path-exclude`. The rule is kept in the image, so that packages installed in a sandbox are as
/// small.
const DPKG_OPTIONS: &[&str] = &[
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-include=/usr/share/locale/locale.alias",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
];

/// How much of the time each phase takes, in thousandths from the start. Measured: 3, 5, 2, 13 and
/// 3 seconds.
const PHASES: [(Phase, u32); 5] = [
    (Phase::Update, 0),
    (Phase::Download, 110),
    (Phase::Unpack, 300),
    (Phase::Configure, 370),
    (Phase::Write, 880),
];

/// The list of installed packages in a root file system.
pub(crate) const DPKG_STATUS: &str = "var/lib/dpkg/status";

/// Bytes the default image has, roughly: what progress in the last phase is measured by.
const TYPICAL_BYTES: u64 = 220 << 20;

/// Builds the default image, Debian's minimal system with [`PACKAGES`], and puts it at `dest`,
/// which must not exist. Takes about half a minute with a near mirror.
///
/// mmdebstrap does the work, as root or in a user namespace, and its tar stream becomes the image
/// as it comes; nothing but mmdebstrap's own tree, about 500 MB, touches the disk. For root that
/// tree is beside `dest`; for others it is in `/var/tmp`, since the users of their namespace must
/// be able to reach it. A second call for the same `dest` waits for the first, in this process or
/// another.
///
/// # Errors
///
/// [`MissingProgram`](HostErrorKind::MissingProgram) without mmdebstrap, or as an ordinary user
/// without newuidmap; [`PermissionDenied`](HostErrorKind::PermissionDenied) if the user has no
/// subordinate ids; [`Network`](HostErrorKind::Network); [`NoSpace`](HostErrorKind::NoSpace);
/// [`AlreadyExists`](HostErrorKind::AlreadyExists) if `dest` does;
/// [`Interrupted`](HostErrorKind::Interrupted) if cancelled. Nothing remains at `dest` then, nor
/// of mmdebstrap's tree. What a killed process left is removed by the next call for `dest`.
pub fn build_default_image(
    os: &Os,
    programs: &Programs,
    request: &BuildRequest,
    dest: &Path,
    cancel: &Cancel,
    progress: &mut dyn FnMut(Progress),
) -> Result<Image, HostError> {
    let root = rustix::process::geteuid().is_root();
    programs.find("mmdebstrap")?;
    if !root {
        programs.find("newuidmap")?;
    }
    let staging = Staging::begin(os, dest)?;
    let scratch = if root {
        None
    } else {
        Some(Scratch::begin(os, programs, staging.dir())?)
    };
    let tree = scratch.as_ref().map_or(staging.dir(), |s| &s.dir);
    let mirrors = match &request.mirror {
        Some(mirror) => vec![mirror.clone()],
        None => host_sources(programs, cancel)?,
    };
    let mut tool = if root && may_unshare(programs, cancel)? {
        // Its mounts below the tree end with it, however it ends, and are never seen from here,
        // where the tree is about to be removed.
        let mmdebstrap = programs.find("mmdebstrap")?;
        programs
            .tool("unshare")?
            .named("mmdebstrap")
            .arg("--mount")
            .arg(mmdebstrap)
    } else {
        programs.tool("mmdebstrap")?
    };
    tool = tool.env("TMPDIR", tree);
    let mut packages: Vec<&str> = PACKAGES.to_vec();
    packages.extend(request.packages.iter().map(String::as_str));
    tool = tool
        .args([
            "--verbose",
            "--mode=auto",
            "--format=tar",
            "--variant=minbase",
        ])
        .arg(format!("--include={}", packages.join(",")))
        // Not kept in the image: there, apt is as Debian has it.
        .args([
            "--aptopt=APT::Install-Recommends \"false\"",
            "--customize-hook",
        ])
        // An empty machine-id(5) is one that is written at each machine's first start.
        .arg("rm -f \"$1/etc/apt/apt.conf.d/99mmdebstrap\"; : >\"$1/etc/machine-id\"")
        .args(
            DPKG_OPTIONS
                .iter()
                .map(|option| format!("--dpkgopt={option}")),
        )
        .args([RELEASE, "-"])
        .args(&mirrors);

    let meter = RefCell::new(Meter::new(&PHASES, progress));
    let mut log = Log::default();
    let mut line = |text: &str| log.line(text, &mut meter.borrow_mut());
    let mut running = tool.start(cancel, &mut line)?;
    let written = write_image(
        os,
        staging.dir(),
        &mut Counted {
            inner: &mut running,
            meter: &meter,
            bytes: 0,
        },
        &[],
    );
    let written = match written {
        Ok(written) => running.finish().map(|()| written),
        // The stream ended too early: the reason is how mmdebstrap ended.
        Err(e) if e.kind() == HostErrorKind::Corrupt => running.finish().and(Err(e)),
        Err(e) => Err(e),
    }
    .map_err(explain)?;
    let source = if mirrors.is_empty() {
        format!("mmdebstrap, Debian {RELEASE}")
    } else {
        format!("mmdebstrap, Debian {RELEASE} from {}", mirrors.join(", "))
    };
    let image = describe(
        os,
        staging,
        dest,
        &Description {
            name: &request.name,
            created: &request.created,
            source,
        },
        &written,
        cancel,
    )?;
    meter.borrow_mut().at(Phase::Write, 1, 1);
    Ok(image)
}

/// An image to make from a tar archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImportRequest<'a> {
    /// The image's name, copied into its description.
    pub name: &'a str,
    /// The time, RFC 3339, copied into the image's description.
    pub created: &'a str,
    /// Where it came from, for people; copied into the image's description.
    pub source: &'a str,
    /// Files whose content is left out, such as `etc/machine-id`.
    pub empty: &'a [&'a str],
}

/// Makes an image from an uncompressed tar archive and puts it at `dest`, which must not exist. A
/// read that fails ends the import.
///
/// # Errors
///
/// [`Corrupt`](HostErrorKind::Corrupt) if the stream is no tar archive that can be a root file
/// system, see [`write_erofs`]; [`AlreadyExists`](HostErrorKind::AlreadyExists) if `dest` does;
/// [`NoSpace`](HostErrorKind::NoSpace); [`Interrupted`](HostErrorKind::Interrupted) if cancelled,
/// which is noticed at the next read. Nothing remains at `dest` then.
pub fn import_tar(
    os: &Os,
    tar: &mut dyn Read,
    request: &ImportRequest<'_>,
    dest: &Path,
    cancel: &Cancel,
) -> Result<Image, HostError> {
    let staging = Staging::begin(os, dest)?;
    let mut tar = Cancellable { inner: tar, cancel };
    let written = match write_image(os, staging.dir(), &mut tar, request.empty) {
        Err(error) => {
            cancel.check("import", request.name)?;
            return Err(error);
        }
        Ok(written) => written,
    };
    describe(
        os,
        staging,
        dest,
        &Description {
            name: request.name,
            created: request.created,
            source: request.source.to_owned(),
        },
        &written,
        cancel,
    )
}

/// Ends with an error once it is cancelled.
pub(crate) struct Cancellable<'a, R> {
    pub(crate) inner: R,
    pub(crate) cancel: &'a Cancel,
}

impl<R: Read> Read for Cancellable<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.cancel.is_cancelled() {
            // Not `Interrupted`, after which a reader would try again.
            return Err(io::Error::other("cancelled"));
        }
        self.inner.read(buffer)
    }
}

/// Where mmdebstrap works for an ordinary user. Removed when dropped.
struct Scratch<'a> {
    os: &'a Os,
    programs: &'a Programs,
    dir: PathBuf,
}

impl<'a> Scratch<'a> {
    /// The name follows from the user and from what is built, so that what a killed process left
    /// is found again.
    fn begin(os: &'a Os, programs: &'a Programs, dest: &Path) -> Result<Self, HostError> {
        let absolute = std::path::absolute(dest).map_err(|e| HostError::io("find", dest, e))?;
        let digest = crate::kernel::digest(&Sha256::digest(absolute.as_os_str().as_bytes()));
        let scratch = Self {
            os,
            programs,
            dir: Path::new("/var/tmp").join(format!(
                "smolvm-build-{}-{}",
                rustix::process::geteuid(),
                digest.trim_start_matches("sha256:").split_at(16).0
            )),
        };
        scratch.remove()?;
        os.create_dir("create the build directory", &scratch.dir)?;
        // Passable for the users of the namespace, readable by none.
        os.set_mode("open the build directory", &scratch.dir, 0o711)?;
        Ok(scratch)
    }

    fn remove(&self) -> Result<(), HostError> {
        let op = "remove the build directory";
        match self.os.remove_tree(op, &self.dir) {
            // A tree that mmdebstrap could not remove itself belongs to the users of its
            // namespace, so it is emptied from within one. The tree's top is in a directory of
            // ours, which those may not write to, and we may.
            Err(e) if e.kind() == HostErrorKind::PermissionDenied => {
                let entries = std::fs::read_dir(&self.dir);
                let trees: Vec<_> = entries
                    .map_err(|e| HostError::io("read", &self.dir, e))?
                    .filter_map(|entry| Some(entry.ok()?.path()))
                    .collect();
                let emptied = self
                    .programs
                    .tool("mmdebstrap")?
                    .args(["--unshare-helper", "rm", "-rf", "--one-file-system"])
                    .args(&trees)
                    .run(&Cancel::new()?, &mut |_| {});
                if let Err(error) = emptied {
                    tracing::debug!(%error, "expected of the trees' tops");
                }
                for tree in &trees {
                    let _ = std::fs::remove_dir(tree);
                }
                self.os.remove_tree(op, &self.dir)
            }
            result => result,
        }
    }
}

impl Drop for Scratch<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            tracing::warn!(%error, dir = %self.dir.display(), "left for the next attempt");
        }
    }
}

/// Writes `root.erofs`.
fn write_image(
    os: &Os,
    dir: &Path,
    tar: &mut dyn Read,
    empty: &[&str],
) -> Result<Written, HostError> {
    let path = dir.join("root.erofs");
    let file = os.create_file("create the image", &path, 0o600)?;
    os.effect("write the image", &path, || {
        let written = write_erofs(
            BufReader::with_capacity(1 << 16, tar),
            &file,
            Special {
                capture: &[DPKG_STATUS],
                empty,
            },
        )?;
        file.sync_all()?;
        Ok(written)
    })
}

/// What an image's description says beside what follows from the image.
#[derive(Debug)]
pub(crate) struct Description<'a> {
    pub(crate) name: &'a str,
    pub(crate) created: &'a str,
    pub(crate) source: String,
}

/// Writes `manifest.json` and puts the directory in place.
pub(crate) fn describe(
    os: &Os,
    staging: Staging<'_>,
    dest: &Path,
    description: &Description<'_>,
    written: &Written,
    cancel: &Cancel,
) -> Result<Image, HostError> {
    let path = staging.dir().join("root.erofs");
    let digest = os.effect("hash the image", &path, || {
        let mut file = Cancellable {
            inner: File::open(&path)?,
            cancel,
        };
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(crate::kernel::digest(&hash.finalize())),
                n => hash.update(&buffer[..n]),
            }
        }
    });
    cancel.check("hash", "the image")?;
    let digest = digest?;
    let status = written.captured.get(DPKG_STATUS);
    let manifest = ImageManifest {
        name: description.name.to_owned(),
        digest,
        size: written.bytes,
        created: description.created.to_owned(),
        source: description.source.clone(),
        packages: status.map(|s| installed(s)).unwrap_or_default(),
    };
    let mut json = serde_json::to_vec_pretty(&manifest)
        .expect("strings, numbers and lists of them have a JSON form");
    json.push(b'\n');
    os.write_file_atomic(
        "write the image's description",
        &staging.dir().join("manifest.json"),
        &json,
        0o600,
        Durability::Synced,
    )?;
    staging.publish()?;
    Ok(Image {
        dir: dest.to_owned(),
        manifest,
    })
}

/// The installed packages in dpkg's status file, by name; deb-control(5), dpkg(1).
fn installed(status: &[u8]) -> Vec<Package> {
    let status = String::from_utf8_lossy(status);
    let mut packages: Vec<_> = status
        .split("\n\n")
        .filter(|paragraph| {
            apt::field(paragraph, "Status").is_some_and(|s| s.ends_with(" installed"))
        })
        .filter_map(|paragraph| {
            Some(Package {
                name: apt::field(paragraph, "Package")?.to_owned(),
                version: apt::field(paragraph, "Version")?.to_owned(),
            })
        })
        .collect();
    packages.sort();
    packages
}

/// Debian's own archives among the host's package sources, if they have our release, so that a
/// company's mirror is used; else nothing, which means mmdebstrap's default. apt tells them apart
/// by what they say of themselves in the lists it has fetched.
fn host_sources(programs: &Programs, cancel: &Cancel) -> Result<Vec<String>, HostError> {
    let Ok(tool) = programs.tool("apt-get") else {
        return Ok(Vec::new());
    };
    let listing = tool
        .args(["indextargets", "--format"])
        .arg("$(ORIGIN)|$(CODENAME)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)")
        .arg("Created-By: Packages")
        .run(cancel, &mut |_| {});
    match listing {
        Ok(listing) => Ok(sources(&String::from_utf8_lossy(&listing))),
        Err(e) if e.kind() == HostErrorKind::Interrupted => Err(e),
        Err(error) => {
            tracing::debug!(%error, "the host's package sources are not used");
            Ok(Vec::new())
        }
    }
}

fn sources(listing: &str) -> Vec<String> {
    let ours = |codename: &str| {
        codename
            .strip_prefix(RELEASE)
            .is_some_and(|rest| matches!(rest, "" | "-updates" | "-security"))
    };
    let mut found = Vec::new();
    let mut main = false;
    for line in listing.lines() {
        let mut fields = line.split('|');
        let mut next = || fields.next().unwrap_or_default();
        let (origin, codename, uri, suite, component) = (next(), next(), next(), next(), next());
        let reachable = ["http://", "https://"].iter().any(|p| uri.starts_with(p));
        if origin != "Debian" || !ours(codename) || component != "main" || !reachable {
            continue;
        }
        main |= codename == RELEASE;
        let source = format!("deb {uri} {suite} {component}");
        if !found.contains(&source) {
            found.push(source);
        }
    }
    // Updates without what they update are of no use.
    if main { found } else { Vec::new() }
}

/// Whether mounts can be kept to ourselves. In a container without `CAP_SYS_ADMIN` they cannot,
/// but there mmdebstrap cannot mount anything either.
fn may_unshare(programs: &Programs, cancel: &Cancel) -> Result<bool, HostError> {
    let Ok(tool) = programs.tool("unshare") else {
        return Ok(false);
    };
    match tool.args(["--mount", "true"]).run(cancel, &mut |_| {}) {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == HostErrorKind::Interrupted => Err(e),
        Err(_) => Ok(false),
    }
}

/// Gives mmdebstrap's failures their kind, and advice where a user can do something.
fn explain(error: HostError) -> HostError {
    let error = apt::classify(error);
    if !apt::says(
        &error,
        &["unable to pick chroot mode", "/etc/subuid", "newuidmap"],
    ) {
        return error;
    }
    error.with_kind(HostErrorKind::PermissionDenied).hinting(
        "Building as an ordinary user needs user namespaces and subordinate ids: install the \
         package uidmap and give the user a range, as root with \
         `usermod --add-subuids 100000-165535 --add-subgids 100000-165535 <user>`. Or build as root.",
    )
}

/// Follows mmdebstrap by what it says. With `--verbose` it passes on what apt and dpkg print;
/// their machine-readable descriptors it keeps to itself.
#[derive(Debug, Default)]
struct Log {
    phase: Option<Phase>,
    /// Packages to be installed by the run of apt that is on.
    expected: u64,
    done: u64,
}

impl Log {
    fn line(&mut self, text: &str, meter: &mut Meter<'_>) {
        tracing::trace!(line = text, "mmdebstrap");
        let begins = [
            ("I: running apt-get update", Phase::Update),
            ("I: downloading packages", Phase::Download),
            ("I: extracting archives", Phase::Unpack),
            ("I: installing essential packages", Phase::Configure),
            ("I: installing remaining packages", Phase::Configure),
            ("I: creating tarball", Phase::Write),
        ];
        if let Some((_, phase)) = begins.iter().find(|(words, _)| text.starts_with(words)) {
            self.phase = Some(*phase);
            (self.expected, self.done) = (0, 0);
            meter.at(*phase, 0, 1);
            return;
        }
        // "5 upgraded, 60 newly installed, 0 to remove and 0 not upgraded."
        if let Some(count) = text
            .split_once(" newly installed")
            .and_then(|(before, _)| before.rsplit(' ').next()?.parse().ok())
        {
            self.expected = count;
            return;
        }
        let steps = match self.phase {
            // Each package is fetched, unpacked and set up there.
            Some(Phase::Configure) => ["Get:", "Unpacking ", "Setting up "].as_slice(),
            Some(Phase::Download | Phase::Update) => &["Get:"],
            _ => return,
        };
        if steps.iter().any(|words| text.starts_with(words)) {
            self.done += 1;
            let whole = match self.phase {
                // Lists of three archives, each with a signed index; the essential packages are
                // only set up, and the number is not said.
                Some(Phase::Update) => 6,
                _ if self.expected == 0 => 200,
                Some(Phase::Configure) => 3 * self.expected,
                _ => self.expected,
            };
            if let Some(phase) = self.phase {
                meter.at(phase, self.done, whole);
            }
        }
    }
}

/// Reports progress as the image is read.
struct Counted<'c, 'm, R> {
    inner: R,
    meter: &'c RefCell<Meter<'m>>,
    bytes: u64,
}

impl<R: Read> Read for Counted<'_, '_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        // The end alone may only mean that there is no image.
        if n > 0 {
            self.bytes += n as u64;
            let mut meter = self.meter.borrow_mut();
            meter.at(Phase::Write, self.bytes, TYPICAL_BYTES);
        }
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn tar() -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let status = "Package: b\nStatus: install ok installed\nVersion: 2\n\n\
                      Package: gone\nStatus: deinstall ok config-files\nVersion: 1\n\n\
                      Package: a\nStatus: install ok installed\nVersion: 1:1-1\nDescription: x\n y\n";
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(status.len() as u64);
        builder
            .append_data(&mut header, "./var/lib/dpkg/status", status.as_bytes())
            .unwrap();
        builder.into_inner().unwrap()
    }

    fn only_lock_files(dir: &Path) -> bool {
        fs::read_dir(dir).unwrap().all(|entry| {
            let name = entry.unwrap().file_name();
            name.to_string_lossy().ends_with(".lock")
        })
    }

    #[test]
    fn a_tar_archive_becomes_an_image_that_describes_itself() {
        let dir = tempfile::tempdir().unwrap();
        let (os, dest) = (Os::new(), dir.path().join("images/own"));
        let request = ImportRequest {
            name: "own",
            created: "2026-01-02T03:04:05Z",
            source: "own.tar",
            empty: &[],
        };
        let cancel = Cancel::new().unwrap();
        let import = |tar: &mut dyn Read| import_tar(&os, tar, &request, &dest, &cancel);
        let error = import(&mut b"no archive at all".as_slice()).unwrap_err();
        assert_eq!(error.kind(), HostErrorKind::Corrupt);
        assert!(only_lock_files(&dir.path().join("images")));

        let image = import(&mut tar().as_slice()).unwrap();
        let bytes = fs::read(image.root()).unwrap();
        let package = |name: &str, version: &str| Package {
            name: name.to_owned(),
            version: version.to_owned(),
        };
        assert_eq!(
            image.manifest,
            ImageManifest {
                name: "own".to_owned(),
                digest: crate::kernel::digest(&Sha256::digest(&bytes)),
                size: bytes.len() as u64,
                created: "2026-01-02T03:04:05Z".to_owned(),
                source: "own.tar".to_owned(),
                packages: vec![package("a", "1:1-1"), package("b", "2")],
            }
        );
        assert_eq!(Image::open(&os, &dest).unwrap(), image);
        let error = import(&mut tar().as_slice()).unwrap_err();
        assert_eq!(error.kind(), HostErrorKind::AlreadyExists);

        let other = dir.path().join("images/other");
        let empty = ImportRequest {
            empty: &["var/lib/dpkg/status"],
            ..request
        };
        let image = import_tar(&os, &mut tar().as_slice(), &empty, &other, &cancel).unwrap();
        assert_eq!(image.manifest.packages, [], "the list of them is empty");
        fs::remove_dir_all(&other).unwrap();
        cancel.cancel();
        let error = import_tar(&os, &mut tar().as_slice(), &request, &other, &cancel).unwrap_err();
        assert_eq!(error.kind(), HostErrorKind::Interrupted);
        assert!(!other.exists());
    }

    /// A script in the place of mmdebstrap.
    fn programs(dir: &Path, script: &str) -> Programs {
        fs::write(dir.join("image.tar"), tar()).unwrap();
        for (name, body) in [
            ("mmdebstrap", script),
            ("newuidmap", ""),
            ("apt-get", "exit 1"),
            ("unshare", "exit 1"),
        ] {
            let path = dir.join(name);
            fs::write(
                &path,
                format!("#!/bin/sh\nhere={}\n{body}\n", dir.display()),
            )
            .unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        Programs::new(
            std::iter::once(dir.to_owned()).chain(crate::packages::SYSTEM_DIRS.map(Into::into)),
        )
    }

    fn build(
        dir: &Path,
        script: &str,
        cancel: &Cancel,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Image, HostError> {
        let request = BuildRequest {
            name: "default".to_owned(),
            created: "2026-01-02T03:04:05Z".to_owned(),
            mirror: None,
            packages: Vec::new(),
        };
        let programs = programs(dir, script);
        let dest = dir.join("images/default");
        build_default_image(&Os::new(), &programs, &request, &dest, cancel, progress)
    }

    #[test]
    fn the_stream_of_mmdebstrap_becomes_the_image() {
        let dir = tempfile::tempdir().unwrap();
        let mut seen = Vec::new();
        let image = build(
            dir.path(),
            "echo 'I: running apt-get update...' >&2
             echo 'Get:1 a list' >&2
             echo 'I: downloading packages with apt...' >&2
             echo '0 upgraded, 4 newly installed, 0 to remove.' >&2
             echo 'Get:1 a package' >&2
             echo 'I: installing remaining packages inside the chroot...' >&2
             echo '0 upgraded, 2 newly installed, 0 to remove.' >&2
             echo 'Unpacking a' >&2
             echo 'I: creating tarball...' >&2
             cat $here/image.tar",
            &Cancel::new().unwrap(),
            &mut |p| seen.push((p.phase, p.done)),
        )
        .unwrap();
        assert_eq!(image.manifest.packages.len(), 2);
        assert_eq!(
            seen,
            [
                (Phase::Update, 0),
                (Phase::Update, 18),
                (Phase::Download, 110),
                (Phase::Download, 157),
                (Phase::Configure, 370),
                (Phase::Configure, 455),
                (Phase::Write, 880),
                (Phase::Write, 1000),
            ]
        );
    }

    #[test]
    fn failures_have_their_kind_and_leave_nothing() {
        let dir = tempfile::tempdir().unwrap();
        for (script, kind) in [
            (
                "echo 'E: Failed to fetch x  Could not resolve host' >&2; exit 1",
                HostErrorKind::Network,
            ),
            (
                "head -c 2000 $here/image.tar; echo 'No space left on device' >&2; exit 1",
                HostErrorKind::NoSpace,
            ),
            (
                "echo 'E: unable to pick chroot mode automatically' >&2; exit 1",
                HostErrorKind::PermissionDenied,
            ),
            ("cat $here/image.tar; exit 1", HostErrorKind::Other),
            ("head -c 700 $here/image.tar", HostErrorKind::Corrupt),
        ] {
            let cancel = Cancel::new().unwrap();
            let error = build(dir.path(), script, &cancel, &mut |_| {}).unwrap_err();
            assert_eq!(error.kind(), kind, "{script}: {error:?}");
            assert!(only_lock_files(&dir.path().join("images")));
        }
    }

    #[test]
    fn cancelling_stops_it() {
        let dir = tempfile::tempdir().unwrap();
        let cancel = Cancel::new().unwrap();
        let other = cancel.clone();
        let error = build(
            dir.path(),
            "echo 'I: running apt-get update...' >&2; sleep 1000",
            &cancel,
            &mut |_| other.cancel(),
        )
        .unwrap_err();
        assert_eq!(error.kind(), HostErrorKind::Interrupted);
        assert!(only_lock_files(&dir.path().join("images")));
    }

    #[test]
    fn the_hosts_sources_are_used_if_they_are_debians_and_whole() {
        let listing = "Debian|bookworm|http://a/debian/|oldstable|main\n\
                       Debian|bookworm|http://a/debian/|oldstable|contrib\n\
                       Debian|bookworm-security|https://a/security/|bookworm-security|main\n\
                       Debian|trixie|http://a/debian/|trixie|main\n\
                       Other|bookworm|http://b/|bookworm|main\n\
                       Debian|bookworm|file:/mirror|bookworm|main\n";
        assert_eq!(
            sources(listing),
            [
                "deb http://a/debian/ oldstable main",
                "deb https://a/security/ bookworm-security main"
            ]
        );
        let updates_only = "Debian|bookworm-updates|http://a/debian/|bookworm-updates|main\n";
        assert!(sources(updates_only).is_empty());
        assert!(sources("|||").is_empty());
    }
}

//! Releases of Firecracker: downloaded or copied, checked, and put in place whole or not at all.
//!
//! A release is an archive `firecracker-vVERSION-ARCH.tgz` with `firecracker` and its `jailer` below
//! `release-vVERSION-ARCH/`, and a checksum beside it, which says no more than that the transfer was
//! whole. So the checksums of the releases that are known stand here, in the source.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use flate2::read::GzDecoder;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use ureq::http::StatusCode;

use crate::cancel::Cancel;
use crate::error::{HostError, HostErrorKind};
use crate::http::{Http, ProxySettings};
use crate::oci::Digest;
use crate::os::{Durability, Os};
use crate::packages::Programs;
use crate::progress::{Meter, Phase, Progress};
use crate::staging::Staging;

/// Where releases are published.
const UPSTREAM: &str = "https://github.com/firecracker-microvm/firecracker/releases/download";
/// The known releases for `x86_64`, the recommended one first, each with its archive's checksum. Guests
/// of other processors are not made yet.
const KNOWN: &[(&str, &str)] = &[
    (
        "1.16.1",
        "382a02a869e4d6d5cb14c40577f9545e8458021ea8b0b2d3fc10ec14d9c242e6",
    ),
    (
        "1.17.0",
        "06094a1108ae9e82aa4c23a775aa92758f53f1175d422270d9d6162cb9ade558",
    ),
    (
        "1.12.0",
        "392b5f7e4bf12871d1e8377a60ed3b384a46bc2f7d3771caf202aa7a63e32676",
    ),
];
/// The programs of a release that are kept.
const PROGRAMS: [&str; 2] = ["firecracker", "jailer"];
/// Bytes of an archive, and of one program in it. Those of 1.17.0 have 8 and 4 million.
const BYTES_MAX: u64 = 256 << 20;
/// Attempts to download, and the time before the second.
const ATTEMPTS: u32 = 4;
const PAUSE: Duration = Duration::from_millis(250);
const RECORD: &str = "release.json";
const PLAN: [(Phase, u32); 2] = [(Phase::Download, 0), (Phase::Unpack, 900)];

/// A release, and what its archive has to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    version: String,
    sha256: Digest,
}

impl Release {
    /// The known release to take if none is asked for.
    #[must_use]
    pub fn recommended() -> Self {
        let first = Self::known().next();
        first.expect("there is one")
    }

    /// A release by its version, `1.17.0` or `v1.17.0`; with a checksum, in hexadecimal digits, for one
    /// that is not known.
    ///
    /// # Errors
    ///
    /// [`NotFound`](HostErrorKind::NotFound) if it is not known and has no checksum;
    /// [`Corrupt`](HostErrorKind::Corrupt) if the checksum or version is not one.
    pub fn of(version: &str, sha256: Option<&str>) -> Result<Self, HostError> {
        let plain = version.strip_prefix('v').unwrap_or(version);
        let refuse =
            |kind| HostError::new(kind, "use Firecracker", version.escape_debug().to_string());
        if !is_version(plain) {
            return Err(refuse(HostErrorKind::Corrupt)
                .because("a version is three numbers with points between them, as 1.17.0"));
        }
        if let Some(digits) = sha256 {
            let sha256 = Digest::from_str(&format!("sha256:{}", digits.to_ascii_lowercase()))
                .map_err(|error| refuse(HostErrorKind::Corrupt).because(error))?;
            let version = plain.to_owned();
            return Ok(Self { version, sha256 });
        }
        Self::known()
            .find(|release| release.version == plain)
            .ok_or_else(|| {
                let known: Vec<_> = Self::known().map(|release| release.version).collect();
                refuse(HostErrorKind::NotFound)
                    .because("the checksum of that release is not known")
                    .hinting(format!(
                        "Known are {}; for any other give the checksum of its archive with --sha256.",
                        known.join(", ")
                    ))
            })
    }

    /// All that are known, the recommended one first.
    fn known() -> impl Iterator<Item = Self> {
        KNOWN.iter().map(|(version, digits)| Self {
            version: (*version).to_owned(),
            sha256: format!("sha256:{digits}").parse().expect("a checksum"),
        })
    }

    /// Its version, as `1.17.0`.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The checksum its archive has to have.
    #[must_use]
    pub fn sha256(&self) -> Digest {
        self.sha256
    }

    fn archive(&self) -> String {
        format!(
            "firecracker-v{}-{}.tgz",
            self.version,
            std::env::consts::ARCH
        )
    }

    fn what(&self) -> String {
        format!("Firecracker {}", self.version)
    }

    /// The directory of this release below that of all.
    fn dir(&self, all: &Path) -> PathBuf {
        all.join(format!("firecracker-v{}", self.version))
    }
}

fn is_version(text: &str) -> bool {
    let parts: Vec<_> = text.split('.').collect();
    let number = |part: &&str| {
        (1..=4).contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_digit())
    };
    parts.len() == 3 && parts.iter().all(number)
}

/// Where a release comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// The project's own releases.
    Upstream,
    /// An archive's URL, or that of a copy of all releases: then `/vVERSION/ARCHIVE` is added. Need not
    /// be encrypted, because the checksum decides.
    Url(String),
    /// An archive on this host.
    File(PathBuf),
}

impl Source {
    /// What `text` means: a URL if it begins like one, else a path.
    #[must_use]
    pub fn from_text(text: &str) -> Self {
        if text.starts_with("http://") || text.starts_with("https://") {
            Self::Url(text.to_owned())
        } else {
            Self::File(text.into())
        }
    }

    fn url(&self, release: &Release) -> Option<String> {
        let base = match self {
            Self::Upstream => UPSTREAM,
            Self::Url(url) if url.ends_with(".tgz") || url.ends_with(".tar.gz") => {
                return Some(url.clone());
            }
            Self::Url(url) => url.trim_end_matches('/'),
            Self::File(_) => return None,
        };
        Some(format!("{base}/v{}/{}", release.version, release.archive()))
    }
}

/// A release that is in place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installed {
    /// Its version, as `1.17.0`.
    pub version: String,
    /// The VMM.
    pub firecracker: PathBuf,
    /// Its jailer.
    pub jailer: PathBuf,
}

/// What is written down of a release.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    version: String,
    archive: Digest,
}

/// The releases in this directory, newest first. What is no whole release is passed over.
#[must_use]
pub fn installed(all: &Path) -> Vec<Installed> {
    let mut found: Vec<_> = std::fs::read_dir(all)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| look(&entry.path()))
        .collect();
    found.sort_by_key(|one| std::cmp::Reverse(numbers(&one.version)));
    found
}

fn numbers(version: &str) -> Vec<u32> {
    version
        .split('.')
        .filter_map(|part| part.parse().ok())
        .collect()
}

/// The release in this directory, if there is a whole one.
fn look(dir: &Path) -> Option<Installed> {
    let text = std::fs::read(dir.join(RECORD)).ok()?;
    let record: Record = serde_json::from_slice(&text).ok()?;
    let [firecracker, jailer] = PROGRAMS.map(|name| dir.join(name));
    (firecracker.is_file() && jailer.is_file()).then_some(Installed {
        version: record.version,
        firecracker,
        jailer,
    })
}

/// Puts a release in place below `all`, unless it is there. Says whether it was fetched now.
///
/// # Errors
///
/// [`Network`](HostErrorKind::Network) after several attempts; [`NotFound`](HostErrorKind::NotFound) if
/// the source has no such release; [`Corrupt`](HostErrorKind::Corrupt) if the archive is another than
/// it has to be, is no release or one for other hosts; [`NoSpace`](HostErrorKind::NoSpace);
/// [`Interrupted`](HostErrorKind::Interrupted). Nothing of it is there then.
#[expect(clippy::too_many_arguments, reason = "each is a different thing")]
pub fn install(
    os: &Os,
    programs: &Programs,
    proxy: &ProxySettings,
    release: &Release,
    source: &Source,
    all: &Path,
    report: &mut dyn FnMut(Progress),
    cancel: &Cancel,
) -> Result<(Installed, bool), HostError> {
    let dir = release.dir(all);
    if let Some(there) = look(&dir) {
        return Ok((there, false));
    }
    // What has the name and is no release was damaged since.
    os.remove_tree("remove the damaged release", &dir)?;
    let mut meter = Meter::new(&PLAN, report);
    let staging = match Staging::begin(os, &dir) {
        Err(error) if error.kind() == HostErrorKind::AlreadyExists => {
            // Somebody else was faster.
            return look(&dir).map(|there| (there, false)).ok_or(error);
        }
        begun => begun?,
    };
    let archive = staging.dir().join("archive.tgz");
    match source.url(release) {
        Some(url) => {
            let download = Download {
                os,
                http: Http::new(programs, proxy, &[], cancel)?,
                release,
                url,
                to: &archive,
            };
            download.run(&mut meter)?;
        }
        None => {
            let Source::File(path) = source else {
                unreachable!("all others have a URL")
            };
            let file = os.effect("open the archive", path, || File::open(path))?;
            keep(
                os,
                release,
                file,
                &archive,
                &path.display().to_string(),
                cancel,
                &mut |_| {},
            )?;
        }
    }
    meter.at(Phase::Unpack, 0, 1);
    unpack(os, release, &archive, staging.dir(), cancel)?;
    os.remove_file("remove the archive", &archive)?;
    let record = Record {
        version: release.version.clone(),
        archive: release.sha256,
    };
    let text = serde_json::to_vec_pretty(&record)
        .map_err(|error| HostError::io("describe the release in", staging.dir(), error.into()))?;
    os.write_file_atomic(
        "describe the release in",
        &staging.dir().join(RECORD),
        &text,
        0o644,
        Durability::Synced,
    )?;
    os.sync("write out", staging.dir())?;
    meter.at(Phase::Unpack, 1, 1);
    staging.publish()?;
    let there = look(&dir)
        .ok_or_else(|| HostError::new(HostErrorKind::Corrupt, "use", dir.display().to_string()))?;
    Ok((there, true))
}

/// An archive on its way here.
struct Download<'a> {
    os: &'a Os,
    http: Http,
    release: &'a Release,
    url: String,
    to: &'a Path,
}

impl Download<'_> {
    fn run(&self, meter: &mut Meter<'_>) -> Result<(), HostError> {
        let mut attempt = 1;
        loop {
            match self.once(meter) {
                Err(error) if error.kind() == HostErrorKind::Network && attempt < ATTEMPTS => {
                    tracing::info!(%error, attempt, "tried again");
                    self.http.pause(PAUSE * 2_u32.pow(attempt - 1), &self.url)?;
                    attempt += 1;
                }
                other => return other,
            }
        }
    }

    fn once(&self, meter: &mut Meter<'_>) -> Result<(), HostError> {
        let fail = |kind| HostError::new(kind, "download", self.url.clone());
        let response = self.http.agent.get(&self.url).call().map_err(|error| {
            match self.http.cancel().check("download", &self.url) {
                Err(cancelled) => cancelled,
                Ok(()) => fail(HostErrorKind::Network)
                    .because(error)
                    .hinting("Fetch the archive by other means and name it with --from FILE."),
            }
        })?;
        match response.status() {
            StatusCode::OK => {}
            StatusCode::NOT_FOUND | StatusCode::GONE => {
                return Err(fail(HostErrorKind::NotFound).because("the server has no such file"));
            }
            status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                return Err(
                    fail(HostErrorKind::Network).because(format!("the server says {status}"))
                );
            }
            status => {
                return Err(fail(HostErrorKind::Other).because(format!("the server says {status}")));
            }
        }
        let whole = response.body().content_length();
        if whole.is_some_and(|bytes| bytes > BYTES_MAX) {
            return Err(fail(HostErrorKind::Corrupt).because("it is too large for a release"));
        }
        let mut progress = |done| meter.at(Phase::Download, done, whole.unwrap_or(BYTES_MAX));
        let body = response.into_body().into_reader();
        let cancel = self.http.cancel();
        let kept = keep(
            self.os,
            self.release,
            Wire(body),
            self.to,
            &self.url,
            cancel,
            &mut progress,
        );
        kept.map_err(|error| match cancel.check("download", &self.url) {
            Err(cancelled) => cancelled,
            Ok(()) => error,
        })
    }
}

/// Errors of reading from it are those of a network.
struct Wire<R>(R);

impl<R: Read> Read for Wire<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer).map_err(|error| {
            HostError::new(HostErrorKind::Network, "download", "the archive")
                .because(error)
                .into()
        })
    }
}

/// Copies an archive and checks it on the way.
fn keep(
    os: &Os,
    release: &Release,
    mut from: impl Read,
    to: &Path,
    what: &str,
    cancel: &Cancel,
    progress: &mut dyn FnMut(u64),
) -> Result<(), HostError> {
    os.remove_file("remove an earlier attempt", to)?;
    let mut file = os.create_file("create the archive", to, 0o600)?;
    let mut hash = Sha256::new();
    let mut done = 0;
    let mut buffer = vec![0; 1 << 16];
    loop {
        cancel.check("read", what)?;
        let n = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(HostError::io("read", Path::new(what), error)),
        };
        done += n as u64;
        if done > BYTES_MAX {
            return Err(HostError::new(HostErrorKind::Corrupt, "use", what)
                .because("it is too large for a release"));
        }
        hash.update(&buffer[..n]);
        os.effect("write the archive", to, || file.write_all(&buffer[..n]))?;
        progress(done);
    }
    let found = Digest::from(hash);
    if found == release.sha256 {
        return Ok(());
    }
    Err(HostError::new(HostErrorKind::Corrupt, "use", what)
        .because(format!(
            "its checksum is {}, and that of {} for {} is {}",
            found.hex(),
            release.what(),
            std::env::consts::ARCH,
            release.sha256.hex()
        ))
        .hinting("Nothing of it was kept; fetch it again, or name the release it is."))
}

/// Takes the programs out of an archive.
fn unpack(
    os: &Os,
    release: &Release,
    archive: &Path,
    into: &Path,
    cancel: &Cancel,
) -> Result<(), HostError> {
    let bad = |why: String| {
        HostError::new(HostErrorKind::Corrupt, "use the archive of", release.what()).because(why)
    };
    let arch = std::env::consts::ARCH;
    let names = PROGRAMS.map(|program| format!("{program}-v{}-{arch}", release.version));
    let mut found = [false; PROGRAMS.len()];
    let file = os.effect("open the archive", archive, || File::open(archive))?;
    let mut reader = tar::Archive::new(GzDecoder::new(file));
    let entries = reader.entries().map_err(|error| bad(error.to_string()))?;
    for entry in entries {
        cancel.check("unpack", &release.what())?;
        let mut entry = entry.map_err(|error| bad(error.to_string()))?;
        let path = entry
            .path()
            .map_err(|error| bad(error.to_string()))?
            .into_owned();
        let name = path.file_name().and_then(|name| name.to_str());
        let wanted = names
            .iter()
            .position(|wanted| name == Some(wanted.as_str()));
        let Some(wanted) = wanted.filter(|_| entry.header().entry_type().is_file()) else {
            continue;
        };
        if entry.size() > BYTES_MAX || std::mem::replace(&mut found[wanted], true) {
            return Err(bad(format!(
                "{} is in it twice, or too large",
                names[wanted]
            )));
        }
        let to = into.join(PROGRAMS[wanted]);
        let mut file = os.create_file("create the program", &to, 0o755)?;
        let mut head = [0; 20];
        entry
            .read_exact(&mut head)
            .map_err(|error| bad(error.to_string()))?;
        is_for_this_host(&head).map_err(|why| bad(format!("{} {why}", names[wanted])))?;
        os.effect("write the program", &to, || {
            file.write_all(&head)?;
            io::copy(&mut entry, &mut file)?;
            file.sync_all()
        })?;
    }
    match found.iter().position(|found| !found) {
        None => Ok(()),
        Some(missing) => Err(bad(format!("there is no {} in it", names[missing]))),
    }
}

/// Looks at the beginning of a program: elf(5), `e_ident` and `e_machine`.
fn is_for_this_host(head: &[u8; 20]) -> Result<(), &'static str> {
    const LITTLE_64: [u8; 6] = [0x7f, b'E', b'L', b'F', 2, 1];
    let machine = u16::from_le_bytes([head[18], head[19]]);
    let ours = match std::env::consts::ARCH {
        "aarch64" => 183,
        _ => 62,
    };
    if !head.starts_with(&LITTLE_64) {
        return Err("is no program");
    }
    if machine != ours {
        return Err("is for another kind of processor");
    }
    Ok(())
}

#[cfg(test)]
mod tests;

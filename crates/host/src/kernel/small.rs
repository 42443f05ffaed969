//! A small guest kernel, compiled from the source package of the host's distribution with a
//! configuration of ours.
//!
//! It boots in a fraction of the time of the distribution's kernel because it has so little in it;
//! `docs/decisions/0007-small-kernel.md` has the figures. The steps, in the order of their calls:
//! [`Workshop::open`], [`Workshop::find`], [`Workshop::download`], [`Workshop::compile`].

use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::{Devices, Unpublished, bzimage, dependency, manifest, write};
use crate::apt::{self, Apt};
use crate::cancel::Cancel;
use crate::command::Tool;
use crate::error::{HostError, HostErrorKind};
use crate::os::{Durability, Os};
use crate::packages::{Missing, Programs};
use crate::progress::{Meter, Phase, Progress};
use crate::staging::Staging;

/// The package whose dependency is the source of the distribution's current kernel.
pub const KERNEL_SOURCE: &str = "linux-source";

const SMALL: &str = include_str!("small/small.config");
const DOCKER: &str = include_str!("small/docker.config");
const WISHED: &str = include_str!("small/wished.config");
const LAPIC: &str = include_str!("small/lapic.c");
/// To be raised when anything else that decides what comes out of a build changes.
const RECIPE: &[u8] = b"1";

/// Most bytes a build takes on the disk: 780 MB were measured for 6.1, 820 with [`Flavour::Docker`].
const BUILD_BYTES: u64 = 1_200_000_000;

/// What is in a small kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Flavour {
    /// What sandboxes need.
    Small,
    /// Also what container engines need in a guest.
    Docker,
}

impl Flavour {
    /// All flavours.
    pub const ALL: [Self; 2] = [Self::Small, Self::Docker];

    /// Its name, with which the keys of its kernels begin.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Small => "small",
            Self::Docker => "docker",
        }
    }

    /// The flavour of the kernel with this key, if it is one of ours.
    #[must_use]
    pub fn of_key(key: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|flavour| {
            key.strip_prefix(flavour.name())
                .is_some_and(|rest| rest.starts_with('-'))
        })
    }

    /// With what the keys of all kernels of this flavour and of this release's recipe end.
    #[must_use]
    pub fn recipe(self) -> String {
        let mut hash = Sha256::new();
        for part in [self.wanted().as_str(), WISHED, LAPIC] {
            hash.update(part);
            hash.update([0]);
        }
        hash.update(RECIPE);
        super::digest(&hash.finalize())["sha256:".len()..][..8].to_owned()
    }

    /// The options that have to be in its configuration.
    fn wanted(self) -> String {
        match self {
            Self::Small => SMALL.to_owned(),
            Self::Docker => format!("{SMALL}\n{DOCKER}"),
        }
    }

    /// How many lines make prints, one for each file it makes; counted with 6.1.
    fn steps(self) -> u64 {
        match self {
            Self::Small => 1790,
            Self::Docker => 1990,
        }
    }
}

/// A source package, and what is to be made of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Name of the package.
    pub package: String,
    /// Its version.
    pub version: String,
    /// What is to be made.
    pub flavour: Flavour,
}

impl Source {
    /// A directory name for what comes of it: it says of which flavour and version, and differs when
    /// the recipe does.
    #[must_use]
    pub fn key(&self) -> String {
        let version: String = self
            .version
            .chars()
            .map(|c| match c {
                'A'..='Z' | 'a'..='z' | '0'..='9' | '.' | '+' | '~' | '-' => c,
                _ => '-',
            })
            .collect();
        format!(
            "{}-{version}-{}",
            self.flavour.name(),
            self.flavour.recipe()
        )
    }
}

/// How much of the time each phase takes, in thousandths from the start.
const PHASES: [(Phase, u32); 6] = [
    (Phase::Update, 0),
    (Phase::Download, 20),
    (Phase::Unpack, 60),
    (Phase::Configure, 120),
    (Phase::Compile, 140),
    (Phase::Write, 990),
];

/// A directory to build in. Removed when dropped.
#[derive(Debug)]
pub struct Workshop<'a> {
    os: &'a Os,
    programs: &'a Programs,
    cancel: &'a Cancel,
    apt: Apt<'a>,
    dir: PathBuf,
}

impl<'a> Workshop<'a> {
    /// Sets up a directory: `preferred`, or, as the kernel's makefiles cannot work below a path with
    /// spaces and the like, one below `scratch` where that is such. What a killed process left in
    /// either is removed. Nobody else may build there meanwhile, which is up to the caller.
    ///
    /// # Errors
    ///
    /// [`Other`](HostErrorKind::Other) if `scratch` is no better.
    pub fn open(
        os: &'a Os,
        programs: &'a Programs,
        preferred: &Path,
        scratch: &Path,
        cancel: &'a Cancel,
    ) -> Result<Self, HostError> {
        let dir = if make_can_work_in(preferred) {
            preferred.to_owned()
        } else {
            let name = super::digest(&Sha256::digest(preferred.as_os_str().as_bytes()));
            scratch.join(format!("smolvm-kernel-{}", &name["sha256:".len()..][..16]))
        };
        if !make_can_work_in(&dir) {
            return Err(HostError::new(
                HostErrorKind::Other,
                "compile a kernel in",
                dir.display().to_string(),
            )
            .because("the kernel's makefiles do not take a path with such characters")
            .hinting("Use --data-dir with a path of letters, digits and `/._+@-` only."));
        }
        os.remove_tree("remove what an earlier build left in", &dir)?;
        // Without its parents: those of `preferred` are the caller's, those of `scratch` the host's.
        os.create_dir("create the directory to build in", &dir)?;
        Ok(Self {
            os,
            programs,
            cancel,
            apt: Apt::new(programs, cancel),
            dir,
        })
    }

    /// Finds the current source package, in the host's lists of packages or, if they have none, in
    /// fresh ones.
    ///
    /// # Errors
    ///
    /// [`NotFound`](HostErrorKind::NotFound) if no source of packages has it;
    /// [`Network`](HostErrorKind::Network).
    pub fn find(
        &mut self,
        flavour: Flavour,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Source, HostError> {
        let mut meter = Meter::new(&PHASES, progress);
        if let Some(source) = self.look(flavour)? {
            return Ok(source);
        }
        self.update(&mut meter)?;
        self.look(flavour)?.ok_or_else(|| {
            HostError::new(HostErrorKind::NotFound, "find the package", KERNEL_SOURCE)
                .because("none of the host's package sources has it")
                .hinting("Use the distribution's kernel (`--kernel stock`), or one of your own.")
        })
    }

    fn look(&self, flavour: Flavour) -> Result<Option<Source>, HostError> {
        let Some(package) = dependency(&self.apt, KERNEL_SOURCE, "linux-source-")? else {
            return Ok(None);
        };
        let Some(paragraph) = self.apt.show(&package)? else {
            return Ok(None);
        };
        Ok(apt::field(&paragraph, "Version").map(|version| Source {
            version: version.to_owned(),
            package,
            flavour,
        }))
    }

    fn update(&mut self, meter: &mut Meter<'_>) -> Result<(), HostError> {
        let lists = self.dir.join("apt");
        self.apt.update_privately(self.os, &lists, meter)
    }

    /// Downloads the package, and returns its file. If the mirror has another version than the
    /// host's lists say, `source` becomes that one.
    ///
    /// # Errors
    ///
    /// Before anything is downloaded [`MissingProgram`](HostErrorKind::MissingProgram), naming all
    /// that compiling needs and that are missing, and [`NoSpace`](HostErrorKind::NoSpace) if there is
    /// too little for a build. Else as [`Workshop::find`].
    pub fn download(
        &mut self,
        source: &mut Source,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<PathBuf, HostError> {
        let missing = self.programs.missing_for_kernel();
        if !missing.is_empty() {
            return Err(cannot_compile(&missing));
        }
        self.find_room()?;
        let mut meter = Meter::new(&PHASES, progress);
        let dir = self.dir.join("download");
        self.os.create_dir("create the download directory", &dir)?;
        let wanted = |source: &Source| format!("{}={}", source.package, source.version);
        match self.apt.download(&wanted(source), &dir, &mut meter) {
            Err(e) if e.kind() == HostErrorKind::Network && !self.apt.is_private() => {
                tracing::debug!(error = %e, "the host's lists of packages will not do");
            }
            result => return result,
        }
        self.update(&mut meter)?;
        if let Some(newer) = self.look(source.flavour)? {
            *source = newer;
        }
        self.apt.download(&wanted(source), &dir, &mut meter)
    }

    fn find_room(&self) -> Result<(), HostError> {
        let free = self.os.effect("look for free space in", &self.dir, || {
            let file_system = rustix::fs::statvfs(&self.dir)?;
            Ok(file_system.f_bavail.saturating_mul(file_system.f_frsize))
        })?;
        if free >= BUILD_BYTES {
            return Ok(());
        }
        let place = self.dir.display().to_string();
        Err(
            HostError::new(HostErrorKind::NoSpace, "compile a kernel in", place).because(format!(
                "it takes up to {} MB there while it lasts, and {} MB are free",
                BUILD_BYTES / 1_000_000,
                free / 1_000_000
            )),
        )
    }

    /// Compiles the kernel in the downloaded `package`, with `jobs` compilers at once, for `dest`,
    /// which must not exist. Returns it unpublished, so that it can be tried first.
    ///
    /// # Errors
    ///
    /// [`NotFound`](HostErrorKind::NotFound), naming them, if the source lacks options that are
    /// wanted; [`NoSpace`](HostErrorKind::NoSpace); [`Other`](HostErrorKind::Other) with the last
    /// lines of what failed. Nothing remains after an error or a cancellation.
    pub fn compile(
        &mut self,
        source: &Source,
        package: &Path,
        dest: &Path,
        jobs: usize,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Unpublished<'a>, HostError> {
        let mut meter = Meter::new(&PHASES, progress);
        let staging = Staging::begin(self.os, dest)?;
        let tree = self.dir.join("linux");
        self.os.create_dir("create the source directory", &tree)?;
        // GCC's temporary files lie where there was found to be room.
        self.os.create_dir(
            "create the compiler's directory",
            &self.dir.join("temporary"),
        )?;
        let changed_at = self.unpack(package, &tree, &mut meter)?;
        self.os.remove_file("remove the download", package)?;
        adapt(self.os, &tree)?;
        self.configure(source, &tree, &mut meter)?;
        self.make(source, &tree, jobs, changed_at, &mut meter)?;
        meter.at(Phase::Write, 0, 1);
        let built = tree.join("vmlinux");
        let stripped = self.dir.join("vmlinux");
        self.tool("strip")?
            .args(["--strip-all", "-o"])
            .args([&stripped, &built])
            .run(self.cancel, &mut |_| {})
            .map_err(apt::classify)?;
        let elf = self.os.read("read the kernel", &stripped)?;
        let vmlinux =
            bzimage::extract(&elf).map_err(|e| HostError::io("use as a kernel", &stripped, e))?;
        self.os.create_dir(
            "create the module directory",
            &staging.dir().join("modules"),
        )?;
        let from = format!(
            "{} {}, compiled here as {}",
            source.package,
            source.version,
            source.flavour.name()
        );
        let manifest = manifest(&vmlinux, from, Vec::new(), Devices::CommandLine);
        let kernel = write(self.os, staging, dest, &vmlinux, manifest)?;
        meter.at(Phase::Write, 1, 1);
        Ok(kernel)
    }

    /// Unpacks the source in the package, a tar archive in another, without storing either. Returns
    /// when it was last changed, in seconds since 1970.
    fn unpack(&self, package: &Path, tree: &Path, meter: &mut Meter<'_>) -> Result<u64, HostError> {
        let wrap = |e| HostError::io("unpack", package, e);
        let mut ignore = |_: &str| {};
        let running = self
            .tool("dpkg-deb")?
            .arg("--fsys-tarfile")
            .arg(package)
            .start(self.cancel, &mut ignore)?;
        let mut archive = tar::Archive::new(running);
        let mut changed_at = None;
        for entry in archive.entries().map_err(wrap)? {
            let entry = entry.map_err(wrap)?;
            let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            if !path.contains("/linux-source-") || !path.ends_with(".tar.xz") {
                continue;
            }
            let size = entry.size();
            let mut counted = Counted {
                inner: entry,
                done: 0,
                report: &mut |done| meter.at(Phase::Unpack, done, size),
            };
            changed_at = self
                .os
                .effect("unpack the kernel's source into", tree, || {
                    unpack_tree(&mut counted, tree, self.cancel)
                })
                .map(Some)?;
        }
        archive.into_inner().finish()?;
        changed_at.ok_or_else(|| {
            HostError::new(
                HostErrorKind::Corrupt,
                "unpack",
                package.display().to_string(),
            )
            .because("it has no kernel source in it")
        })
    }

    /// Makes the configuration, and sees whether it is what was wanted.
    fn configure(
        &self,
        source: &Source,
        tree: &Path,
        meter: &mut Meter<'_>,
    ) -> Result<(), HostError> {
        meter.at(Phase::Configure, 0, 1);
        let wanted = source.flavour.wanted();
        let fragment = self.dir.join("fragment.config");
        self.os.write_file_atomic(
            "write the wanted options",
            &fragment,
            format!("{wanted}\n{WISHED}").as_bytes(),
            0o600,
            Durability::Cached,
        )?;
        self.make_tool(tree)?
            .env("KCONFIG_ALLCONFIG", &fragment)
            .arg("allnoconfig")
            .run(self.cancel, &mut |_| {})
            .map_err(apt::classify)?;
        let config = self
            .os
            .read("read the kernel's configuration", &tree.join(".config"))?;
        let unmet = unmet(&wanted, &String::from_utf8_lossy(&config));
        if unmet.is_empty() {
            return Ok(());
        }
        Err(HostError::new(
            HostErrorKind::NotFound,
            "configure the kernel of",
            format!("{} {}", source.package, source.version),
        )
        .because(format!(
            "its source does not take these options: {}",
            unmet.join(", ")
        ))
        .hinting("Use the distribution's kernel (`--kernel stock`), and report this version."))
    }

    /// Compiles.
    fn make(
        &self,
        source: &Source,
        tree: &Path,
        jobs: usize,
        changed_at: u64,
        meter: &mut Meter<'_>,
    ) -> Result<(), HostError> {
        meter.at(Phase::Compile, 0, 1);
        // What the kernel says of its build tells nothing of this host, or of now.
        let date = i64::try_from(changed_at)
            .ok()
            .and_then(|seconds| jiff::Timestamp::from_second(seconds).ok())
            .map(|time| time.strftime("%Y-%m-%d").to_string())
            .unwrap_or_default();
        let mut ignore = |_: &str| {};
        let mut running = self
            .make_tool(tree)?
            .arg(format!("--jobs={}", jobs.max(1)))
            .arg(format!("KBUILD_BUILD_TIMESTAMP={date}"))
            .args(["KBUILD_BUILD_USER=smolvm", "KBUILD_BUILD_HOST=smolvm"])
            .args(["KBUILD_BUILD_VERSION=1", "vmlinux"])
            .start(self.cancel, &mut ignore)?;
        // Each file that is made is a line.
        let mut done = 0;
        for line in BufReader::new(&mut running).split(b'\n') {
            line.map_err(|e| HostError::io("read the output of", Path::new("make"), e))?;
            done += 1;
            meter.at(Phase::Compile, done, source.flavour.steps());
        }
        tracing::debug!(lines = done, "make has ended");
        running.finish().map_err(apt::classify)
    }

    fn tool(&self, name: &str) -> Result<Tool, HostError> {
        self.programs.tool(name)
    }

    /// make, in the kernel's tree and with nothing of our environment, much of which it obeys.
    fn make_tool(&self, tree: &Path) -> Result<Tool, HostError> {
        Ok(self
            .programs
            .tool_without_environment("make")?
            .env("TMPDIR", self.dir.join("temporary"))
            .arg("ARCH=x86_64")
            .current_dir(tree))
    }
}

impl Drop for Workshop<'_> {
    fn drop(&mut self) {
        let removed = self
            .os
            .remove_tree("remove the directory that was built in", &self.dir);
        if let Err(error) = removed {
            tracing::warn!(%error, dir = %self.dir.display(), "left for the next build");
        }
    }
}

fn cannot_compile(missing: &[Missing]) -> HostError {
    let list = |of: &dyn Fn(&Missing) -> &'static str| {
        let mut names: Vec<_> = missing.iter().map(of).collect();
        names.dedup();
        names
    };
    HostError::new(
        HostErrorKind::MissingProgram,
        "compile a kernel without",
        list(&|missing| missing.program).join(", "),
    )
    .hinting(format!(
        "Install them: sudo apt-get install --yes --no-install-recommends {}",
        list(&|missing| missing.package).join(" ")
    ))
}

/// Whether the kernel's makefiles work below this path. They refuse spaces and colons, and make and
/// the shell take others for syntax.
fn make_can_work_in(path: &Path) -> bool {
    let plain = |b: &u8| b.is_ascii_alphanumeric() || b"/._+@-".contains(b);
    path.as_os_str().as_bytes().iter().all(plain)
}

/// What a configuration lacks of what was wanted, line by line as it was wanted.
fn unmet(wanted: &str, config: &str) -> Vec<String> {
    let has: std::collections::BTreeSet<&str> = config.lines().map(str::trim_end).collect();
    wanted
        .lines()
        .map(str::trim)
        .filter(|line| line.starts_with("CONFIG_") && !has.contains(line))
        .map(str::to_owned)
        .collect()
}

/// Directories, below the source's own, of which a build of ours takes nothing. Leaving them packed
/// spares two thirds of the space, and of the time.
const UNUSED: &[&str] = &[
    "Documentation",
    "LICENSES",
    "drivers/clk",
    "drivers/gpu",
    "drivers/iio",
    "drivers/infiniband",
    "drivers/media",
    "drivers/net/ethernet",
    "drivers/net/wireless",
    "drivers/pinctrl",
    "drivers/scsi",
    "drivers/staging",
    "drivers/usb",
    "samples",
    "sound",
    "tools/perf",
    "tools/testing",
];

/// Whether a file of the source is needed, by its path below the source's directory.
fn is_needed(path: &str) -> bool {
    let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
    // Every Kconfig is read, and many makefiles, whatever is chosen.
    if ["Kconfig", "Makefile", "Kbuild"]
        .iter()
        .any(|known| name.starts_with(known))
    {
        return true;
    }
    if let Some(rest) = dir.strip_prefix("arch/") {
        return rest == "x86" || rest.starts_with("x86/");
    }
    !UNUSED.iter().any(|unused| {
        dir.strip_prefix(unused)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    })
}

/// Unpacks what is needed of a source, `linux-source-<version>/…` in a tar archive in xz. Returns
/// when its newest file was changed.
fn unpack_tree(packed: &mut dyn Read, tree: &Path, cancel: &Cancel) -> io::Result<u64> {
    let unpacked = BufReader::with_capacity(1 << 16, liblzma::read::XzDecoder::new(packed));
    let mut archive = tar::Archive::new(unpacked);
    archive.set_preserve_mtime(false);
    let mut changed_at = 0;
    for entry in archive.entries()? {
        cancel.check("unpack", "the kernel's source")?;
        let mut entry = entry?;
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let Some((_, below)) = path.trim_start_matches("./").split_once('/') else {
            continue;
        };
        if below.is_empty() || entry.header().entry_type().is_dir() || !is_needed(below) {
            continue;
        }
        changed_at = changed_at.max(entry.header().mtime()?);
        // Refuses to leave `tree`; the first part of the path stays, and is renamed away below.
        if !entry.unpack_in(tree)? {
            let what = format!("it has a file outside its directory: {path:?}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
    }
    lift(tree)?;
    Ok(changed_at)
}

/// Moves what is in the one directory in `tree` up into `tree` itself.
fn lift(tree: &Path) -> io::Result<()> {
    for top in std::fs::read_dir(tree)?.collect::<io::Result<Vec<_>>>()? {
        if !top.file_type()?.is_dir() {
            continue;
        }
        for entry in std::fs::read_dir(top.path())? {
            let entry = entry?;
            std::fs::rename(entry.path(), tree.join(entry.file_name()))?;
        }
        std::fs::remove_dir(top.path())?;
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidData,
        "it has no directory in it",
    ))
}

/// Changes two things in the source.
///
/// * The tool that checks object files and inlines static calls needs libelf, and costs a tenth of
///   the build. x86_64 selects it and no configuration can take it out again, so the selection goes;
///   the kernel has a way without it, for the other architectures.
/// * A parameter of ours comes in, in a file of its own; `small/lapic.c` says what for.
fn adapt(os: &Os, tree: &Path) -> Result<(), HostError> {
    let change = |path: &str, how: &dyn Fn(&str) -> String| {
        let path = tree.join(path);
        let bytes = os.read("read the kernel's source", &path)?;
        let changed = how(&String::from_utf8_lossy(&bytes));
        let op = "adapt the kernel's source";
        os.write_file_atomic(op, &path, changed.as_bytes(), 0o600, Durability::Cached)
    };
    change("arch/x86/Kconfig", &without_objtool)?;
    change("arch/x86/kernel/Makefile", &|makefile| {
        format!("{makefile}\nobj-y += smolvm.o\n")
    })?;
    let path = tree.join("arch/x86/kernel/smolvm.c");
    let op = "adapt the kernel's source";
    os.write_file_atomic(op, &path, LAPIC.as_bytes(), 0o600, Durability::Cached)
}

fn without_objtool(kconfig: &str) -> String {
    let is_selection = |line: &&str| {
        let mut words = line.split_ascii_whitespace();
        (words.next(), words.next()) == (Some("select"), Some("HAVE_OBJTOOL"))
    };
    let lines: Vec<_> = kconfig.lines().filter(|l| !is_selection(l)).collect();
    lines.join("\n") + "\n"
}

/// Reports how much was read.
struct Counted<'a, R> {
    inner: R,
    done: u64,
    report: &'a mut dyn FnMut(u64),
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.done += n as u64;
        (self.report)(self.done);
        Ok(n)
    }
}

#[cfg(test)]
mod tests;

//! The guest's kernel: the distribution's own, unpacked without installing it, or a given file.

mod bzimage;
mod compressed;
mod modules;
pub mod small;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use self::modules::{BuiltIn, ModInfo};
use crate::apt::{self, Apt};
use crate::cancel::Cancel;
use crate::command::Tool;
use crate::error::{HostError, HostErrorKind};
use crate::os::{Durability, Os};
use crate::packages::Programs;
use crate::progress::{Meter, Phase, Progress};
use crate::staging::Staging;

/// The package whose dependency is the current kernel for virtual machines.
pub const CLOUD_KERNEL: &str = "linux-image-cloud-amd64";

/// The modules a guest of ours needs, by name. Those the kernel has built in are skipped, and what
/// they depend on is added.
pub const MODULES: &[&str] = &[
    "virtio_mmio",
    "virtio_blk",
    "virtio_console",
    "virtio_rng",
    "vmw_vsock_virtio_transport",
    "erofs",
    "overlay",
    "ext4",
    "fuse",
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
    /// How it finds a machine's devices. Absent in what was written before there was a choice.
    #[serde(default)]
    pub devices: Devices,
}

/// How a kernel finds a machine's devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Devices {
    /// In ACPI tables.
    #[default]
    Acpi,
    /// On its command line.
    CommandLine,
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

/// How much of the time each phase takes, in thousandths from the start.
const PHASES: [(Phase, u32); 4] = [
    (Phase::Update, 0),
    (Phase::Download, 300),
    (Phase::Unpack, 700),
    (Phase::Write, 950),
];

/// Downloads the distribution's kernel for virtual machines, as any user and without installing
/// it, and puts it at `dest`, which must not exist, with the named `modules` (see [`MODULES`]).
///
/// The host's lists of packages are used if they will do; else fresh ones are fetched from the
/// host's own sources into a temporary directory. A second call for the same `dest` waits for the
/// first, in this process or another.
///
/// # Errors
///
/// [`AlreadyExists`](HostErrorKind::AlreadyExists) if `dest` does;
/// [`NotFound`](HostErrorKind::NotFound) if the host's distribution has no such package, or its
/// kernel lacks a wanted module; [`MissingProgram`](HostErrorKind::MissingProgram) without apt or
/// dpkg; [`Network`](HostErrorKind::Network). Nothing remains at `dest` after an error or a
/// cancellation.
pub fn fetch_kernel(
    os: &Os,
    programs: &Programs,
    dest: &Path,
    modules: &[&str],
    cancel: &Cancel,
    progress: &mut dyn FnMut(Progress),
) -> Result<Kernel, HostError> {
    let mut meter = Meter::new(&PHASES, progress);
    let staging = Staging::begin(os, dest)?;
    // Asked for early, so that a missing program is not found after a download.
    let dpkg_deb = programs.find("dpkg-deb")?;
    let downloads = staging.dir().join("download");
    os.create_dir("create the download directory", &downloads)?;
    let package = download(os, programs, &downloads, cancel, &mut meter)?;

    let source = Tool::new(&dpkg_deb)
        .args(["--show", "--showformat=${Package} ${Version}"])
        .arg(&package)
        .run(cancel, &mut |_| {})?;
    let source = String::from_utf8_lossy(&source).into_owned();
    let contents = survey(&dpkg_deb, &package, cancel)?;
    meter.at(Phase::Unpack, 1, 2);
    let order =
        modules::load_order(modules, &contents.modules, &contents.builtin).map_err(|e| {
            HostError::new(HostErrorKind::NotFound, "use the kernel in", source.clone()).because(e)
        })?;
    let vmlinux = bzimage::extract(&contents.image)
        .map_err(|e| HostError::io("read the kernel in", &package, e))?;
    drop(contents);
    os.create_dir(
        "create the module directory",
        &staging.dir().join("modules"),
    )?;
    unpack_modules(os, &dpkg_deb, &package, &order, staging.dir(), cancel)?;
    meter.at(Phase::Write, 0, 1);
    os.remove_tree("remove the download", &downloads)?;
    let modules = order.iter().map(|name| format!("{name}.ko")).collect();
    let manifest = manifest(&vmlinux, source, modules, Devices::Acpi);
    let kernel = write(os, staging, dest, &vmlinux, manifest)?.publish()?;
    meter.at(Phase::Write, 1, 1);
    Ok(kernel)
}

/// Takes the user's own kernel, an ELF file or a bzImage, with everything needed built in, and
/// puts it at `dest`, which must not exist.
///
/// # Errors
///
/// [`Corrupt`](HostErrorKind::Corrupt) if the file is neither;
/// [`AlreadyExists`](HostErrorKind::AlreadyExists) if `dest` does. Nothing remains at `dest` after
/// an error.
pub fn import_kernel(os: &Os, file: &Path, dest: &Path) -> Result<Kernel, HostError> {
    let image = os.read("read the kernel", file)?;
    let vmlinux =
        bzimage::extract(&image).map_err(|e| HostError::io("use as a kernel", file, e))?;
    let staging = Staging::begin(os, dest)?;
    os.create_dir(
        "create the module directory",
        &staging.dir().join("modules"),
    )?;
    let source = file.display().to_string();
    let manifest = manifest(&vmlinux, source, Vec::new(), Devices::Acpi);
    write(os, staging, dest, &vmlinux, manifest)?.publish()
}

/// Finds the current kernel's package and downloads it into `dir`.
fn download(
    os: &Os,
    programs: &Programs,
    dir: &Path,
    cancel: &Cancel,
    meter: &mut Meter<'_>,
) -> Result<PathBuf, HostError> {
    let mut apt = Apt::new(programs, cancel);
    let current = |apt: &Apt<'_>| dependency(apt, CLOUD_KERNEL, "linux-image-");
    let attempt = |apt: &Apt<'_>, meter: &mut Meter<'_>| match current(apt)? {
        Some(package) => apt.download(&package, dir, meter).map(Some),
        None => Ok(None),
    };
    match attempt(&apt, meter) {
        Ok(Some(path)) => return Ok(path),
        // The host has no lists of packages, or they name a file the mirror has replaced since.
        Ok(None) => {}
        Err(e) if matches!(e.kind(), HostErrorKind::Network | HostErrorKind::Other) => {
            tracing::debug!(error = %e, "the host's lists of packages will not do");
        }
        Err(e) => return Err(e),
    }
    apt.update_privately(os, &dir.join("apt"), meter)?;
    attempt(&apt, meter)?.ok_or_else(|| {
        HostError::new(HostErrorKind::NotFound, "find the package", CLOUD_KERNEL)
            .because("none of the host's package sources has it")
            .hinting(
                "Give SmolVM a kernel file of your own: a vmlinux or bzImage with virtio built in.",
            )
    })
}

/// The package that `package`, which has none but a current version's name in it, stands for: the
/// first it depends on whose name begins with `prefix`.
fn dependency(apt: &Apt<'_>, package: &str, prefix: &str) -> Result<Option<String>, HostError> {
    let Some(paragraph) = apt.show(package)? else {
        return Ok(None);
    };
    Ok(apt::field(&paragraph, "Depends")
        .and_then(|depends| {
            depends
                .split([',', '|'])
                .filter_map(|d| d.split_ascii_whitespace().next())
                .find(|name| name.starts_with(prefix))
        })
        .map(str::to_owned))
}

/// What a kernel package has, but for the modules' code.
#[derive(Default)]
struct Contents {
    image: Vec<u8>,
    modules: BTreeMap<String, ModInfo>,
    builtin: BuiltIn,
}

/// Reads through the package once. Which modules are needed is known only at the end, so their
/// code is read in a second pass rather than held, some 90 MB, in memory.
fn survey(dpkg_deb: &Path, package: &Path, cancel: &Cancel) -> Result<Contents, HostError> {
    let mut contents = Contents::default();
    each_file(dpkg_deb, package, cancel, |path, read| {
        let file = path.rsplit('/').next().unwrap_or_default();
        if path.trim_start_matches("./").starts_with("boot/vmlinuz-") {
            contents.image = read()?;
        } else if file == "modules.builtin" {
            contents.builtin.add_paths(&read()?);
        } else if file == "modules.builtin.modinfo" {
            contents.builtin.add_info(&read()?);
        } else if modules::module_name(path).is_some() {
            let bytes = read()?;
            let info = match compressed::unpack(&bytes) {
                Some(unpacked) => modules::mod_info(&unpacked?),
                None => modules::mod_info(&bytes),
            };
            // The file's name and the module's agree but for '-' and '_', which modprobe(8) relies
            // on too.
            if let Some(info) = info {
                contents.modules.insert(info.name.clone(), info);
            }
        }
        Ok(())
    })?;
    Ok(contents)
}

/// Writes the modules in `order` into `dir/modules`, uncompressed, so that the agent needs no
/// decompressor.
fn unpack_modules(
    os: &Os,
    dpkg_deb: &Path,
    package: &Path,
    order: &[String],
    dir: &Path,
    cancel: &Cancel,
) -> Result<(), HostError> {
    let mut left: BTreeSet<_> = order.iter().cloned().collect();
    if left.is_empty() {
        return Ok(());
    }
    each_file(dpkg_deb, package, cancel, |path, read| {
        let Some(name) = modules::module_name(path).filter(|name| left.remove(name)) else {
            return Ok(());
        };
        let bytes = read()?;
        let bytes = compressed::unpack(&bytes).unwrap_or(Ok(bytes))?;
        let to = dir.join("modules").join(format!("{name}.ko"));
        os.write_file_atomic("write a module", &to, &bytes, 0o600, Durability::Cached)?;
        Ok(())
    })?;
    assert!(left.is_empty(), "the first pass saw every module");
    Ok(())
}

/// Calls `act` with the path of each regular file of a package, and a function that reads it.
fn each_file(
    dpkg_deb: &Path,
    package: &Path,
    cancel: &Cancel,
    mut act: impl FnMut(&str, &mut dyn FnMut() -> io::Result<Vec<u8>>) -> io::Result<()>,
) -> Result<(), HostError> {
    let wrap = |e| HostError::io("unpack", package, e);
    let mut ignore = |_: &str| {};
    let running = Tool::new(dpkg_deb)
        .arg("--fsys-tarfile")
        .arg(package)
        .start(cancel, &mut ignore)?;
    let mut archive = tar::Archive::new(running);
    for entry in archive.entries().map_err(wrap)? {
        let mut entry = entry.map_err(wrap)?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        act(&path, &mut || {
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes)?;
            Ok(bytes)
        })
        .map_err(wrap)?;
    }
    archive.into_inner().finish()
}

fn manifest(
    vmlinux: &bzimage::Vmlinux,
    source: String,
    modules: Vec<String>,
    devices: Devices,
) -> KernelManifest {
    KernelManifest {
        release: vmlinux.release.clone(),
        source,
        digest: digest(&Sha256::digest(&vmlinux.elf)),
        modules,
        devices,
    }
}

/// A whole kernel that does not have its place yet. Dropped, it is gone.
#[derive(Debug)]
pub struct Unpublished<'a> {
    staging: Staging<'a>,
    dest: PathBuf,
    manifest: KernelManifest,
}

impl Unpublished<'_> {
    /// The kernel, where it lies for now.
    #[must_use]
    pub fn kernel(&self) -> Kernel {
        Kernel {
            dir: self.staging.dir().to_owned(),
            manifest: self.manifest.clone(),
        }
    }

    /// Gives it its place, in one step.
    ///
    /// # Errors
    ///
    /// Those of rename(2).
    pub fn publish(self) -> Result<Kernel, HostError> {
        self.staging.publish()?;
        Ok(Kernel {
            dir: self.dest,
            manifest: self.manifest,
        })
    }
}

/// Writes the kernel and its description.
fn write<'a>(
    os: &Os,
    staging: Staging<'a>,
    dest: &Path,
    vmlinux: &bzimage::Vmlinux,
    manifest: KernelManifest,
) -> Result<Unpublished<'a>, HostError> {
    let path = staging.dir().join("vmlinux");
    os.write_file_atomic(
        "write the kernel",
        &path,
        &vmlinux.elf,
        0o600,
        Durability::Synced,
    )?;
    let mut json = serde_json::to_vec_pretty(&manifest)
        .expect("strings and lists of strings have a JSON form");
    json.push(b'\n');
    let path = staging.dir().join("kernel.json");
    os.write_file_atomic(
        "write the kernel's description",
        &path,
        &json,
        0o600,
        Durability::Synced,
    )?;
    Ok(Unpublished {
        staging,
        dest: dest.to_owned(),
        manifest,
    })
}

/// `sha256:` and the hexadecimal digits.
pub(crate) fn digest(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = String::from("sha256:");
    for byte in bytes {
        write!(text, "{byte:02x}").expect("a String takes anything");
    }
    text
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn an_own_kernel_is_imported_packed_or_not() {
        let dir = tempfile::tempdir().unwrap();
        let os = Os::new();
        let elf = bzimage::tests::elf();
        for (name, content) in [
            ("vmlinux", elf.clone()),
            (
                "bzImage",
                bzimage::tests::bzimage(&compressed::tests::pack_lz4(&elf)),
            ),
        ] {
            let file = dir.path().join(name);
            fs::write(&file, content).unwrap();
            let dest = dir.path().join("kernels").join(name);
            let kernel = import_kernel(&os, &file, &dest).unwrap();
            assert_eq!(kernel.manifest.release, "6.1.0-9-test");
            assert_eq!(kernel.manifest.digest, digest(&Sha256::digest(&elf)));
            assert_eq!(fs::read(kernel.vmlinux()).unwrap(), elf);
            assert!(kernel.modules().is_empty());
            assert_eq!(Kernel::open(&os, &dest).unwrap(), kernel);
            let error = import_kernel(&os, &file, &dest).unwrap_err();
            assert_eq!(error.kind(), HostErrorKind::AlreadyExists);
        }
        let file = dir.path().join("text");
        fs::write(&file, "no kernel").unwrap();
        let dest = dir.path().join("kernels/text");
        let error = import_kernel(&os, &file, &dest).unwrap_err();
        assert_eq!(error.kind(), HostErrorKind::Corrupt);
        assert!(!dest.exists());
    }

    /// Programs in the place of apt-cache, apt-get and dpkg-deb: scripts, with a package whose
    /// "file" is a tar archive.
    fn distribution(dir: &Path, modules: &[(&str, Vec<u8>)]) -> Programs {
        let image = bzimage::tests::bzimage(&compressed::tests::pack_lz4(&bzimage::tests::elf()));
        let mut tar = tar::Builder::new(fs::File::create(dir.join("data.tar")).unwrap());
        let mut add = |path: &str, bytes: &[u8]| {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, path, bytes).unwrap();
        };
        add("./boot/vmlinuz-6.1.0-9-test", &image);
        add(
            "./lib/modules/6/modules.builtin",
            b"kernel/fs/ext4/ext4.ko\n",
        );
        for (name, bytes) in modules {
            add(&format!("./lib/modules/6/kernel/x/{name}"), bytes);
        }
        tar.finish().unwrap();
        // The first download fails as with lists that are too old.
        let scripts = [
            (
                "apt-cache",
                "echo 'Package: x\nDepends: linux-image-6-cloud-amd64 (= 1)'",
            ),
            (
                "apt-get",
                "case \"$*\" in *' update') touch $here/updated; exit;; esac
                 [ -e $here/updated ] || { echo 'E: Failed to fetch x  404  Not Found' >&2; exit 100; }
                 echo 'dlstatus:1:50.0:Retrieving' >&2
                 cp $here/data.tar x.deb",
            ),
            (
                "dpkg-deb",
                "case $1 in --show) echo -n 'linux-image-6-cloud-amd64 1';; *) cat \"$2\";; esac",
            ),
        ];
        for (name, body) in scripts {
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

    #[test]
    fn a_kernel_is_fetched_with_its_modules_unpacked_and_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let erofs = modules::tests::module(&["name=erofs", "depends=libcrc32c"]);
        let libcrc32c = modules::tests::module(&["name=libcrc32c", "depends="]);
        let other = modules::tests::module(&["name=other", "depends="]);
        let packed = compressed::tests::pack_all(&erofs);
        let programs = distribution(
            dir.path(),
            &[
                ("erofs.ko.xz", packed[1].clone()),
                ("libcrc32c.ko", libcrc32c.clone()),
                ("other.ko", other),
            ],
        );
        let dest = dir.path().join("kernels/default");
        let mut seen = Vec::new();
        let cancel = Cancel::new().unwrap();
        let kernel = fetch_kernel(
            &Os::new(),
            &programs,
            &dest,
            &["ext4", "erofs"],
            &cancel,
            &mut |p| seen.push(p),
        )
        .unwrap();
        assert_eq!(kernel.manifest.modules, ["libcrc32c.ko", "erofs.ko"]);
        assert_eq!(kernel.manifest.source, "linux-image-6-cloud-amd64 1");
        let contents: Vec<_> = kernel
            .modules()
            .iter()
            .map(|p| fs::read(p).unwrap())
            .collect();
        assert_eq!(contents, [libcrc32c, erofs]);
        assert_eq!(seen.last().unwrap().done, Progress::TOTAL);
        assert!(seen.iter().any(|p| p.phase == Phase::Download));
        let mut names: Vec<_> = fs::read_dir(&dest)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["kernel.json", "modules", "vmlinux"]);

        let dest = dir.path().join("kernels/other");
        let error = fetch_kernel(
            &Os::new(),
            &programs,
            &dest,
            &["overlay"],
            &cancel,
            &mut |_| {},
        )
        .unwrap_err();
        assert_eq!(error.kind(), HostErrorKind::NotFound);
        cancel.cancel();
        let error = fetch_kernel(
            &Os::new(),
            &programs,
            &dest,
            &["erofs"],
            &cancel,
            &mut |_| {},
        )
        .unwrap_err();
        assert_eq!(error.kind(), HostErrorKind::Interrupted);
        let left: Vec<_> = fs::read_dir(dir.path().join("kernels"))
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .filter(|name| !name.to_string_lossy().ends_with(".lock"))
            .collect();
        assert_eq!(left, ["default"]);
    }
}

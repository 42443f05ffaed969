//! The lab's Debian: its root file system, kernel and initial RAM file system, made once.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use super::cpio::Cpio;
use crate::{debian, run};

/// What is installed, a package a line with its reason.
const PACKAGES: &str = include_str!("guest/packages");
/// Puts the kernel in.
const KERNEL: &str = include_str!("guest/kernel.sh");
/// Runs before the root file system is there.
const INITRD: &str = include_str!("guest/initrd.sh");
/// What the kernel needs to reach the root file system. What those need comes by itself.
const MODULES: [&str; 4] = ["virtio_blk", "virtio_pci", "erofs", "overlay"];
/// What is left out: what only people read.
const LEFT_OUT: [&str; 4] = [
    "/usr/share/man/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/doc/*",
];
/// The package whose newest version is the lab's kernel.
const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";

/// A Debian that boots.
#[derive(Debug)]
pub(super) struct Root {
    pub(super) image: PathBuf,
    pub(super) kernel: PathBuf,
    pub(super) initrd: PathBuf,
}

impl Root {
    /// The one that is there, or a new one if its ingredients have changed.
    pub(super) fn get(place: &Path, tar_to_erofs: &Path) -> Result<Self> {
        let lock = File::create(place.join("root.lock")).context("making a lock")?;
        lock.lock()
            .context("waiting for who makes the lab's Debian")?;
        let mut hasher = DefaultHasher::new();
        (
            PACKAGES,
            KERNEL,
            INITRD,
            MODULES,
            LEFT_OUT,
            kernel_version(),
        )
            .hash(&mut hasher);
        let name = format!("root-{:016x}", hasher.finish());
        let dir = place.join(&name);
        if !dir.exists() {
            for entry in fs::read_dir(place).context("listing the lab's directory")? {
                let old = entry?.path();
                if old.is_dir() && file_name(&old).starts_with("root-") {
                    fs::remove_dir_all(&old)
                        .with_context(|| format!("removing {}", old.display()))?;
                }
            }
            let making = place.join(format!("{name}.making"));
            fs::create_dir(&making).with_context(|| format!("making {}", making.display()))?;
            make(&making, tar_to_erofs)?;
            fs::rename(&making, &dir).context("putting the lab's Debian in place")?;
        }
        Ok(Self {
            image: dir.join("root.erofs"),
            kernel: dir.join("vmlinuz"),
            initrd: dir.join("initrd"),
        })
    }
}

/// The version that apt would install, as far as this host's apt knows.
fn kernel_version() -> Option<String> {
    let policy = run::output(Command::new("apt-cache").args(["policy", KERNEL_PACKAGE])).ok()?;
    let line = policy.lines().find(|line| line.contains("Candidate:"))?;
    Some(line.trim().to_owned())
}

fn packages() -> String {
    let names = PACKAGES
        .lines()
        .filter_map(|line| line.split('#').next().map(str::trim));
    names
        .filter(|name| !name.is_empty())
        .collect::<Vec<_>>()
        .join(",")
}

fn make(dir: &Path, tar_to_erofs: &Path) -> Result<()> {
    run::say("kvm-lab: making the lab's Debian; this is done once");
    let tar = dir.join("root.tar");
    let mut command = debian::mmdebstrap()?;
    command
        .args(["--mode=auto", "--format=tar", "--variant=minbase"])
        .arg(format!("--include={}", packages()))
        .arg("--aptopt=APT::Install-Recommends \"false\"")
        .args(LEFT_OUT.map(|path| format!("--dpkgopt=path-exclude={path}")))
        .arg(format!("--customize-hook={KERNEL}"))
        .args([debian::RELEASE, "-"])
        .args(debian::sources())
        .stdin(Stdio::null())
        .stdout(File::create(&tar).context("making an archive")?);
    run::succeed(&mut command)?;

    run::say("kvm-lab: writing its disk");
    let archive = || File::open(&tar).context("opening an archive");
    let image = dir.join("root.erofs");
    run::succeed(Command::new(tar_to_erofs).arg(&image).stdin(archive()?))?;
    let parts = dir.join("parts");
    fs::create_dir(&parts)?;
    run::succeed(
        Command::new("tar")
            .args(["-x", "--wildcards", "--no-same-owner", "-C"])
            .arg(&parts)
            .args(["./boot/vmlinuz-*", "./*bin/busybox", "./*lib/modules/*"])
            .stdin(archive()?),
    )?;
    let kernel = only(&parts.join("boot"))?;
    fs::rename(&kernel, dir.join("vmlinuz"))?;
    let release = file_name(&kernel).trim_start_matches("vmlinuz-").to_owned();
    let under_usr = |path: &str| {
        let plain = parts.join(path);
        if plain.exists() {
            plain
        } else {
            parts.join("usr").join(path)
        }
    };
    let initrd = initrd(
        &under_usr("bin/busybox"),
        &under_usr("lib/modules").join(release),
    )?;
    fs::write(dir.join("initrd"), initrd).context("writing the initial RAM file system")?;
    fs::remove_dir_all(&parts)?;
    fs::remove_file(&tar)?;
    Ok(())
}

fn initrd(busybox: &Path, modules: &Path) -> Result<Vec<u8>> {
    let read = |path: &Path| fs::read(path).with_context(|| format!("reading {}", path.display()));
    let mut archive = Cpio::default();
    for dir in ["bin", "dev", "modules"] {
        archive.directory(dir)?;
    }
    archive.file("bin/busybox", 0o755, &read(busybox)?)?;
    archive.file("init", 0o755, INITRD.as_bytes())?;
    let dependencies = fs::read_to_string(modules.join("modules.dep"))
        .context("reading the list of the kernel's modules")?;
    for (number, path) in load_order(&dependencies, &MODULES)?.iter().enumerate() {
        // Loaded in the order of their names.
        let name = format!("modules/{number:02}-{}", file_name(Path::new(path)));
        archive.file(&name, 0o644, &read(&modules.join(path))?)?;
    }
    archive.finish()
}

/// Files of the wanted modules, each after what it needs, from a `modules.dep`. Pure.
fn load_order(dependencies: &str, wanted: &[&str]) -> Result<Vec<String>> {
    let mut order: Vec<String> = Vec::new();
    for name in wanted {
        let line = dependencies.lines().find_map(|line| {
            let (path, needs) = line.split_once(':')?;
            let found = file_name(Path::new(path)).strip_suffix(".ko") == Some(name);
            found.then_some((path, needs))
        });
        let Some((path, needs)) = line else {
            bail!("the kernel has no module {name}");
        };
        // depmod lists what a module needs with the most basic last.
        let needs = needs.split_whitespace().rev();
        for path in needs.chain([path]) {
            if !order.iter().any(|known| known == path) {
                order.push(path.to_owned());
            }
        }
    }
    Ok(order)
}

/// The one entry of a directory.
fn only(dir: &Path) -> Result<PathBuf> {
    let entries: Vec<_> = fs::read_dir(dir)
        .with_context(|| format!("listing {}", dir.display()))?
        .collect::<std::io::Result<_>>()?;
    match entries.as_slice() {
        [one] => Ok(one.path()),
        _ => bail!(
            "{} has {} entries instead of one",
            dir.display(),
            entries.len()
        ),
    }
}

fn file_name(path: &Path) -> &str {
    path.file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_need() {
        let dependencies = "\
            kernel/fs/erofs/erofs.ko: kernel/lib/crc.ko kernel/lib/lz4.ko\n\
            kernel/lib/crc.ko:\n\
            kernel/drivers/virtio_pci.ko: kernel/virtio_ring.ko kernel/virtio.ko\n";
        let order = load_order(dependencies, &["virtio_pci", "erofs", "crc"]).expect("an order");
        let names: Vec<_> = order
            .iter()
            .map(|path| file_name(Path::new(path)))
            .collect();
        assert_eq!(
            names,
            [
                "virtio.ko",
                "virtio_ring.ko",
                "virtio_pci.ko",
                "lz4.ko",
                "crc.ko",
                "erofs.ko"
            ]
        );
        assert!(load_order(dependencies, &["ext4"]).is_err());
    }

    #[test]
    fn packages_are_named_without_their_reasons() {
        let packages = packages();
        assert!(
            packages.starts_with("qemu-system-x86,nftables,"),
            "{packages}"
        );
        assert!(!packages.contains([' ', '#', '\n']), "{packages}");
    }
}

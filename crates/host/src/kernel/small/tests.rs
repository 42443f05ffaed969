use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::kernel::bzimage;
use crate::packages::SYSTEM_DIRS;

/// A host with a distribution: scripts in the place of apt, dpkg-deb and the compiler's programs, and
/// a source package whose "file" is a tar archive.
struct Host {
    dir: tempfile::TempDir,
    cancel: Cancel,
}

/// Every option is taken as it is wanted.
const MAKE_CONFIG: &str = r#"grep ^CONFIG_ "$KCONFIG_ALLCONFIG" > .config"#;

impl Host {
    /// `config` is what `make allnoconfig` does, `build` what `make vmlinux` does.
    fn new(config: &str, build: &str) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("smolvm-kernel")
            .tempdir()
            .unwrap();
        let here = dir.path().display().to_string();
        fs::write(dir.path().join("data.tar"), package()).unwrap();
        fs::write(dir.path().join("elf"), bzimage::tests::elf()).unwrap();
        let host = Self {
            dir,
            cancel: Cancel::new().unwrap(),
        };
        host.script(
            "apt-cache",
            "case \"$*\" in
             *linux-source-6) echo 'Package: x'; echo 'Version: 6.1.9-1';;
             *) echo 'Package: x'; echo 'Depends: linux-source-6 (= 1)';; esac",
        );
        host.script(
            "apt-get",
            &format!("case \"$*\" in *' download linux-source-6=6.1.9-1') cp {here}/data.tar x.deb;; *) exit 100;; esac"),
        );
        host.script("dpkg-deb", "cat \"$2\"");
        host.script("strip", "cp \"$4\" \"$3\"");
        host.script(
            "make",
            &format!(
                "set -e
                 case \"$*\" in
                 *allnoconfig) [ \"$*\" = 'ARCH=x86_64 allnoconfig' ]; {config};;
                 *) [ -z \"$HOME\" ]; echo \"$*\" > {here}/made; {build}; cp {here}/elf vmlinux;; esac"
            ),
        );
        for program in ["gcc", "ld", "flex", "bison", "bc"] {
            host.script(program, "exit 1");
        }
        host
    }

    fn script(&self, name: &str, body: &str) {
        let path = self.dir.path().join("bin").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn programs(&self) -> Programs {
        Programs::new(
            std::iter::once(self.dir.path().join("bin")).chain(SYSTEM_DIRS.map(Into::into)),
        )
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Builds into `kernels/<key>` and publishes.
    fn build(
        &self,
        os: &Os,
        preferred: &Path,
        seen: &mut Vec<Progress>,
    ) -> Result<super::super::Kernel, HostError> {
        let programs = self.programs();
        let mut shop = Workshop::open(os, &programs, preferred, self.dir.path(), &self.cancel)?;
        let mut source = shop.find(Flavour::Small, &mut |p| seen.push(p))?;
        let package = shop.download(&mut source, &mut |p| seen.push(p))?;
        let dest = self.path("kernels").join(source.key());
        shop.compile(&source, &package, &dest, 3, &mut |p| seen.push(p))?
            .publish()
    }

    /// Everything that is not a lock or was there before.
    fn left(&self) -> Vec<String> {
        let mut left: Vec<String> = fs::read_dir(self.dir.path())
            .unwrap()
            .chain(fs::read_dir(self.path("kernels")).into_iter().flatten())
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| !["bin", "data.tar", "elf", "made", "kernels"].contains(&name.as_str()))
            .filter(|name| !name.ends_with(".lock"))
            .collect();
        left.sort();
        left
    }
}

/// `usr/src/linux-source-6.tar.xz` in a tar archive.
fn package() -> Vec<u8> {
    let mut tree = tar::Builder::new(Vec::new());
    let mut add = |path: &str, text: &str| {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o755);
        header.set_mtime(1_700_000_000);
        tree.append_data(&mut header, path, text.as_bytes())
            .unwrap();
    };
    add("linux-source-6/Makefile", "all:\n");
    add(
        "linux-source-6/arch/x86/Kconfig",
        "config X\n\tselect HAVE_OBJTOOL\t\tif X\n\tselect HAVE_OBJTOOL_MCOUNT if HAVE_OBJTOOL\n",
    );
    add("linux-source-6/arch/x86/kernel/Makefile", "obj-y += a.o\n");
    add("linux-source-6/arch/arm/head.S", "");
    add("linux-source-6/sound/Kconfig", "");
    add("linux-source-6/sound/core.c", "");
    let tree = tree.into_inner().unwrap();
    let mut packed = Vec::new();
    liblzma::read::XzEncoder::new(&tree[..], 1)
        .read_to_end(&mut packed)
        .unwrap();
    let mut package = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(packed.len() as u64);
    package
        .append_data(
            &mut header,
            "usr/src/linux-source-6.tar.xz",
            packed.as_slice(),
        )
        .unwrap();
    package.into_inner().unwrap()
}

#[test]
fn a_kernel_is_compiled_from_the_package_and_its_source_is_adapted() {
    let host = Host::new(
        MAKE_CONFIG,
        "grep -q MCOUNT arch/x86/Kconfig; ! grep -q 'OBJTOOL\t' arch/x86/Kconfig; \
         grep -q 'obj-y += smolvm.o' arch/x86/kernel/Makefile; grep -q lapic_khz arch/x86/kernel/smolvm.c; \
         [ -e sound/Kconfig ]; [ ! -e sound/core.c ]; [ ! -e arch/arm ]; [ -d \"$TMPDIR\" ]; \
         for i in 1 2 3; do echo \"  CC $i.o\"; done",
    );
    let mut seen = Vec::new();
    let kernel = host
        .build(&Os::new(), &host.path("shop"), &mut seen)
        .unwrap();
    let key = kernel.dir.file_name().unwrap().to_str().unwrap().to_owned();
    assert_eq!(
        key,
        format!("small-6.1.9-1-{}", Flavour::Small.recipe()),
        "what it was made of"
    );
    assert_eq!(
        kernel.manifest.source,
        "linux-source-6 6.1.9-1, compiled here as small"
    );
    assert_eq!(kernel.manifest.devices, Devices::CommandLine);
    assert_eq!(
        super::super::Kernel::open(&Os::new(), &kernel.dir).unwrap(),
        kernel
    );
    assert_eq!(fs::read(kernel.vmlinux()).unwrap(), bzimage::tests::elf());
    assert_eq!(
        fs::read_to_string(host.path("made")).unwrap(),
        "ARCH=x86_64 --jobs=3 KBUILD_BUILD_TIMESTAMP=2023-11-14 KBUILD_BUILD_USER=smolvm \
         KBUILD_BUILD_HOST=smolvm KBUILD_BUILD_VERSION=1 vmlinux\n"
    );
    assert_eq!(seen.last().unwrap().done, Progress::TOTAL);
    let phases: std::collections::BTreeSet<_> = seen.iter().map(|p| p.phase).collect();
    assert!(phases.contains(&Phase::Compile) && phases.contains(&Phase::Unpack));
    assert!(seen.windows(2).all(|two| two[0].done <= two[1].done));
    assert_eq!(host.left(), [key]);
}

#[test]
fn options_the_source_does_not_take_are_named() {
    let host = Host::new(
        r#"grep ^CONFIG_ "$KCONFIG_ALLCONFIG" | grep -v -e TUN= -e EROFS_FS_XATTR= -e MITIGATION > .config"#,
        "exit 9",
    );
    let error = host
        .build(&Os::new(), &host.path("shop"), &mut Vec::new())
        .unwrap_err();
    assert_eq!(error.kind(), HostErrorKind::NotFound);
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(
        cause.ends_with("options: CONFIG_TUN=y, CONFIG_EROFS_FS_XATTR=y"),
        "{cause}"
    );
    assert_eq!(host.left(), [""; 0]);
}

#[test]
fn a_compiler_that_fails_is_quoted_and_a_full_disk_recognized() {
    for (says, kind) in [
        ("a.c:1: error: no", HostErrorKind::Other),
        (
            "fatal error: error writing to /x.s: No space left on device",
            HostErrorKind::NoSpace,
        ),
    ] {
        let host = Host::new(MAKE_CONFIG, &format!("echo '{says}' >&2; exit 2"));
        let error = host
            .build(&Os::new(), &host.path("shop"), &mut Vec::new())
            .unwrap_err();
        assert_eq!(error.kind(), kind);
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(cause.contains(says), "{cause}");
        assert_eq!(host.left(), [""; 0]);
    }
}

#[test]
fn a_path_make_cannot_work_in_is_gone_around() {
    let host = Host::new(MAKE_CONFIG, "pwd > ../../pwd");
    let kernel = host
        .build(
            &Os::new(),
            &host.path("with spaces, and commas/shop"),
            &mut Vec::new(),
        )
        .unwrap();
    assert!(kernel.vmlinux().exists());
    let built_in = fs::read_to_string(host.path("pwd")).unwrap();
    assert!(
        make_can_work_in(Path::new(built_in.trim_end())),
        "{built_in}"
    );
    fs::remove_file(host.path("pwd")).unwrap();
    assert_eq!(host.left().len(), 1);

    let programs = host.programs();
    let error = Workshop::open(
        &Os::new(),
        &programs,
        Path::new("/a b"),
        Path::new("/c d"),
        &host.cancel,
    )
    .unwrap_err();
    assert!(error.hint().unwrap().contains("--data-dir"));
}

#[test]
fn cancelling_stops_the_compiler_and_removes_everything() {
    let host = Host::new(MAKE_CONFIG, "echo '  CC 1.o'; exec sleep 1000");
    let os = Os::new();
    let programs = host.programs();
    let mut shop = Workshop::open(
        &os,
        &programs,
        &host.path("shop"),
        Path::new("/"),
        &host.cancel,
    )
    .unwrap();
    let mut source = shop.find(Flavour::Small, &mut |_| {}).unwrap();
    let package = shop.download(&mut source, &mut |_| {}).unwrap();
    let dest = host.path("kernels/small");
    let error = shop
        .compile(&source, &package, &dest, 1, &mut |progress| {
            if progress.phase == Phase::Compile {
                host.cancel.cancel();
            }
        })
        .unwrap_err();
    assert_eq!(error.kind(), HostErrorKind::Interrupted);
    drop(shop);
    assert_eq!(host.left(), [""; 0]);
}

#[test]
fn what_is_missing_is_named_at_once() {
    let host = Host::new(MAKE_CONFIG, "true");
    let empty = tempfile::tempdir().unwrap();
    let nothing = Programs::new([empty.path().to_owned()]);
    let path = host.path("shop");
    let (os, cancel) = (Os::new(), &host.cancel);
    let mut shop = Workshop::open(&os, &nothing, &path, Path::new("/"), cancel).unwrap();
    let mut source = Source {
        package: "linux-source-6".to_owned(),
        version: "6.1.9-1".to_owned(),
        flavour: Flavour::Small,
    };
    let error = shop.download(&mut source, &mut |_| {}).unwrap_err();
    assert_eq!(error.kind(), HostErrorKind::MissingProgram);
    assert!(
        error.to_string().starts_with(
            "cannot compile a kernel without apt-get, apt-cache, dpkg-deb, make, gcc, ld, flex, bison, bc"
        ),
        "{error}"
    );
    let hint = error.hint().unwrap();
    assert!(
        hint.contains("--no-install-recommends apt dpkg make gcc binutils flex bison bc"),
        "{hint}"
    );
    drop(shop);
    assert!(!path.exists());
}

/// Fails the nth effect.
#[derive(Debug)]
struct Nth {
    nth: u32,
    seen: std::sync::atomic::AtomicU32,
}

impl crate::os::Faults for Nth {
    fn before(&self, _: &'static str, _: &Path) -> io::Result<()> {
        let seen = self.seen.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        if seen + 1 == self.nth {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }
}

#[test]
fn whatever_effect_fails_the_next_build_succeeds() {
    let host = Host::new(MAKE_CONFIG, "true");
    let mut failures = 0;
    for nth in 1.. {
        let os = Os::with_faults(std::sync::Arc::new(Nth {
            nth,
            seen: 0.into(),
        }));
        let first = host.build(&os, &host.path("shop"), &mut Vec::new());
        let failed = first.is_err();
        failures += u32::from(failed);
        let kernel = match first {
            Ok(kernel) => kernel,
            Err(_) => host
                .build(&Os::new(), &host.path("shop"), &mut Vec::new())
                .unwrap(),
        };
        // Removing the workshop is what may fail without failing the build; the next one does it.
        if !failed {
            let _ = fs::remove_dir_all(host.path("shop"));
        }
        assert_eq!(host.left().len(), 1, "after effect {nth}");
        fs::remove_dir_all(&kernel.dir).unwrap();
        if !failed && failures > 0 && nth > 20 {
            break;
        }
    }
    assert!(failures >= 12, "{failures} effects failed");
}

#[test]
fn the_options_are_found_missing_line_by_line() {
    let wanted = "# a comment\nCONFIG_A=y\n\n  CONFIG_B=\"x y\"\nCONFIG_C=64\nCONFIG_D=y\n";
    let config = "CONFIG_A=y\nCONFIG_B=\"x y\"\nCONFIG_C=640\n# CONFIG_D is not set\n";
    assert_eq!(unmet(wanted, config), ["CONFIG_C=64", "CONFIG_D=y"]);
    assert_eq!(unmet(SMALL, SMALL), [""; 0]);
}

#[test]
fn our_options_are_given_once_and_switch_something_on() {
    for flavour in Flavour::ALL {
        let wanted = flavour.wanted();
        let mut names = std::collections::BTreeSet::new();
        for line in wanted.lines().chain(WISHED.lines()) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (name, value) = line.split_once('=').expect(line);
            assert!(name.starts_with("CONFIG_") && !value.is_empty(), "{line}");
            assert_ne!(value, "m", "{line}: there are no modules");
            assert!(names.insert(name.to_owned()), "{line} is given twice");
        }
    }
}

#[test]
fn keys_tell_flavour_version_and_recipe() {
    let source = |flavour| Source {
        package: "linux-source-6.1".to_owned(),
        version: "1:6.1.9-1~x/y".to_owned(),
        flavour,
    };
    for flavour in Flavour::ALL {
        let key = source(flavour).key();
        assert_eq!(
            key,
            format!("{}-1-6.1.9-1~x-y-{}", flavour.name(), flavour.recipe())
        );
        assert_eq!(Flavour::of_key(&key), Some(flavour));
    }
    assert_ne!(Flavour::Small.recipe(), Flavour::Docker.recipe());
    assert_eq!(Flavour::of_key("stock"), None);
    assert_eq!(Flavour::of_key("smaller-1"), None);
}

#[test]
fn files_that_no_build_takes_are_left_out() {
    for (path, needed) in [
        ("Makefile", true),
        ("arch/x86/kernel/head_64.S", true),
        ("arch/arm/kernel/head.S", false),
        ("arch/arm/Kconfig.debug", true),
        ("arch/Kconfig", true),
        ("drivers/net/virtio_net.c", true),
        ("drivers/net/ethernet/intel/x.c", false),
        ("drivers/gpu/drm/Kconfig", true),
        ("drivers/gpu/drm/drm.c", false),
        ("sound/core.c", false),
        ("soundness/a.c", true),
        ("tools/include/linux/types.h", true),
    ] {
        assert_eq!(is_needed(path), needed, "{path}");
    }
}

/// A manifest from before there was a choice of where devices are.
#[test]
fn an_older_description_is_read() {
    let old = r#"{"release": "1", "source": "s", "digest": "sha256:0", "modules": []}"#;
    let manifest: super::super::KernelManifest = serde_json::from_str(old).unwrap();
    assert_eq!(manifest.devices, Devices::Acpi);
    let new = serde_json::to_value(&super::super::KernelManifest {
        devices: Devices::CommandLine,
        ..manifest
    })
    .unwrap();
    assert_eq!(new["devices"], "command-line");
}

#[test]
fn a_kernel_that_is_there_is_not_replaced() {
    let host = Host::new(MAKE_CONFIG, "true");
    let os = Os::new();
    let build = || host.build(&os, &host.path("shop"), &mut Vec::new());
    let kernel = build().unwrap();
    assert_eq!(build().unwrap_err().kind(), HostErrorKind::AlreadyExists);
    assert!(kernel.vmlinux().exists());
}

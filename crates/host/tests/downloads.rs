//! What only a real distribution can answer. These download some 90 megabytes and take half a
//! minute together.

use std::path::PathBuf;

use smolvm_host::image::{BuildRequest, Image, build_default_image};
use smolvm_host::kernel::{Kernel, MODULES, fetch_kernel};
use smolvm_host::packages::SYSTEM_DIRS;
use smolvm_host::{Cancel, Os, Programs, Progress};

fn check_progress(seen: &[Progress]) {
    assert!(seen.len() >= 5, "{seen:?}");
    assert!(seen.windows(2).all(|p| p[0].done <= p[1].done), "{seen:?}");
    assert_eq!(seen.last().unwrap().done, Progress::TOTAL);
}

#[test]
fn the_distributions_kernel() {
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("kernel");
    let mut seen = Vec::new();
    let os = Os::new();
    let kernel = fetch_kernel(
        &os,
        &Programs::new(SYSTEM_DIRS.map(PathBuf::from)),
        &dest,
        MODULES,
        &Cancel::new().unwrap(),
        &mut |p| seen.push(p),
    )
    .unwrap();
    check_progress(&seen);
    assert!(
        kernel.manifest.release.ends_with("-cloud-amd64"),
        "{kernel:?}"
    );
    assert!(
        std::fs::read(kernel.vmlinux())
            .unwrap()
            .starts_with(b"\x7fELF")
    );
    let names = &kernel.manifest.modules;
    let position = |name: &str| names.iter().position(|n| n == name).unwrap();
    assert!(
        position("virtio.ko") < position("virtio_blk.ko"),
        "{names:?}"
    );
    for path in kernel.modules() {
        assert!(std::fs::read(path).unwrap().starts_with(b"\x7fELF"));
    }
    assert_eq!(Kernel::open(&os, &dest).unwrap(), kernel);
}

#[test]
fn the_default_image() {
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("image");
    let request = BuildRequest {
        name: "default".to_owned(),
        created: "2026-01-02T03:04:05Z".to_owned(),
        mirror: None,
        packages: Vec::new(),
    };
    let mut seen = Vec::new();
    let os = Os::new();
    let image = build_default_image(
        &os,
        &Programs::new(SYSTEM_DIRS.map(PathBuf::from)),
        &request,
        &dest,
        &Cancel::new().unwrap(),
        &mut |p| seen.push(p),
    )
    .unwrap();
    check_progress(&seen);
    assert!(seen.len() > 50);
    for name in ["python3", "bash", "git", "curl", "ca-certificates", "apt"] {
        let packages = &image.manifest.packages;
        assert!(packages.iter().any(|p| p.name == name), "{name}");
    }
    let length = std::fs::metadata(image.root()).unwrap().len();
    assert_eq!(image.manifest.size, length);
    assert!(length < 350 << 20, "{length} bytes");
    assert_eq!(Image::open(&os, &dest).unwrap(), image);
    let check = std::process::Command::new("fsck.erofs")
        .arg(image.root())
        .output()
        .expect("this test needs fsck.erofs: install the package erofs-utils");
    assert!(check.status.success(), "{check:?}");
    // Nothing but the image and its lock.
    let mut names: Vec<_> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, [".image.lock", "image"]);
}

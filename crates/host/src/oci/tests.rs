//! Images the tests make, good and hostile, from an archive to a root file system.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::*;
use crate::cancel::Cancel;
use crate::error::{HostError, HostErrorKind};
use crate::image::{Image, Limits};
use crate::os::Os;

/// A layer with these files.
fn layer(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        builder.append_data(&mut header, path, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    writer.write_all(bytes).unwrap();
    writer.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
}

type Compress = fn(&[u8]) -> Vec<u8>;

/// Parts of an archive, by name.
type Files = Vec<(String, Vec<u8>)>;

fn add(files: &mut Files, bytes: Vec<u8>) -> Value {
    let digest = Digest::of(&bytes);
    let descriptor = json!({ "mediaType": "x", "digest": digest, "size": bytes.len() });
    files.push((format!("blobs/sha256/{}", digest.hex()), bytes));
    descriptor
}

fn config(layers: &[Vec<u8>]) -> Value {
    let diff_ids: Vec<_> = layers.iter().map(|layer| Digest::of(layer)).collect();
    json!({
        "architecture": Platform::of_guests().architecture, "os": "linux",
        "config": { "WorkingDir": "/made", "Cmd": ["hello"] },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    })
}

/// An OCI image layout with one image, of uncompressed layers and how to compress each.
fn layout(layers: &[(Vec<u8>, Compress)]) -> Files {
    let mut files = Files::new();
    let plain: Vec<_> = layers.iter().map(|(layer, _)| layer.clone()).collect();
    let config = add(&mut files, config(&plain).to_string().into_bytes());
    let blobs: Vec<_> = layers
        .iter()
        .map(|(layer, compress)| add(&mut files, compress(layer)))
        .collect();
    let manifest = json!({ "schemaVersion": 2, "config": config, "layers": blobs });
    let mut manifest = add(&mut files, manifest.to_string().into_bytes());
    manifest["annotations"] = json!({ "org.opencontainers.image.ref.name": "own:1" });
    index(&mut files, &[manifest]);
    files
}

fn index(files: &mut Files, manifests: &[Value]) {
    let index = json!({ "schemaVersion": 2, "manifests": manifests });
    files.push(("index.json".to_owned(), index.to_string().into_bytes()));
}

/// What `docker save` wrote before it took up the layout.
fn docker(layers: &[Vec<u8>]) -> Files {
    let config = config(layers).to_string().into_bytes();
    let name = format!("{}.json", Digest::of(&config).hex());
    let paths: Vec<_> = (0..layers.len())
        .map(|n| format!("{n}/layer.tar"))
        .collect();
    let manifest = json!([{ "Config": name, "RepoTags": ["own:1", "own:2"], "Layers": paths }]);
    let mut files = vec![
        (name, config),
        (
            "manifest.json".to_owned(),
            manifest.to_string().into_bytes(),
        ),
    ];
    files.extend(paths.into_iter().zip(layers.iter().cloned()));
    files
}

fn packed(files: &Files) -> Vec<u8> {
    let files = files.iter();
    let files: Vec<_> = files
        .map(|(name, bytes)| (name.as_str(), bytes.as_slice()))
        .collect();
    layer(&files)
}

fn unpacked(files: &Files, dir: &Path) {
    for (name, bytes) in files {
        let path = dir.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

fn plain(bytes: &[u8]) -> Vec<u8> {
    bytes.to_vec()
}

struct Bench {
    dir: tempfile::TempDir,
    os: Os,
    cancel: Cancel,
    limits: Limits,
}

impl Bench {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            os: Os::new(),
            cancel: Cancel::new().unwrap(),
            limits: Limits::default(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn open(&self, path: &Path) -> Result<Archive, HostError> {
        let spool = self.path("spool");
        let _ = fs::remove_file(&spool);
        Archive::open(&self.os, path, &spool, self.limits.bytes, &self.cancel)
    }

    /// Opens an archive with these parts.
    fn archive(&self, files: &Files) -> Archive {
        fs::write(self.path("archive.tar"), packed(files)).unwrap();
        self.open(&self.path("archive.tar")).unwrap()
    }

    fn make(&self, archive: &Archive) -> Result<(ArchivedImage, Image), HostError> {
        let image = archive.images(&Platform::of_guests())?.remove(0);
        let request = OciRequest {
            name: "own",
            created: "2026-01-02T03:04:05Z",
            source: "a test",
            config: &image.config,
            limits: self.limits,
        };
        let dest = self.path("images/own");
        let _ = fs::remove_dir_all(&dest);
        let made = unpack_image(
            &self.os,
            archive.layers(&image),
            &request,
            &dest,
            &self.cancel,
            &mut |done, total| assert!(done <= total),
        )?;
        Ok((image, made))
    }

    /// How making an image of these parts fails; and that nothing of it is left.
    fn refusal(&self, files: &Files) -> String {
        let _ = fs::remove_dir_all(self.path("images"));
        let error = self.make(&self.archive(files)).unwrap_err();
        assert_eq!(error.kind(), HostErrorKind::Corrupt, "{error:?}");
        let left: Vec<_> = fs::read_dir(self.path("images"))
            .into_iter()
            .flatten()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| !name.ends_with(".lock"))
            .collect();
        assert_eq!(left, Vec::<String>::new());
        let cause = error.to_string();
        match error.into_source() {
            Some(source) => format!("{cause}: {source}"),
            None => cause,
        }
    }
}

#[test]
fn an_image_is_the_same_from_wherever_it_comes() {
    let bench = Bench::new();
    let layers = [
        layer(&[("etc/a", b"1"), ("etc/b", b"2")]),
        layer(&[("etc/.wh.a", b""), ("bin/hello", b"3")]),
        layer(&[]),
    ];
    let [one, two, three] = layers.clone();
    let oci = layout(&[(one, gzip), (two, zstd), (three, plain)]);
    let (image, made) = bench.make(&bench.archive(&oci)).unwrap();
    assert_eq!(image.names, ["own:1"]);
    assert_eq!(image.config.cmd, ["hello"]);
    assert!(image.manifest.is_some());
    let digest = made.manifest.digest.clone();

    let dir = bench.path("layout");
    unpacked(&oci, &dir);
    let (again, made) = bench.make(&bench.open(&dir).unwrap()).unwrap();
    assert_eq!((again, &made.manifest.digest), (image, &digest));

    let docker = docker(&layers);
    let (saved, made) = bench.make(&bench.archive(&docker)).unwrap();
    assert_eq!(saved.names, ["own:1", "own:2"]);
    assert_eq!(saved.manifest, None);
    assert_eq!(made.manifest.digest, digest);

    // Compressed, and from a stream that gives little at once.
    struct Slow<'b>(&'b [u8]);
    impl Read for Slow<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let most = buffer.len().min(3);
            self.0.read(&mut buffer[..most])
        }
    }
    for compress in [plain, gzip, zstd] {
        let bytes = compress(&packed(&docker));
        fs::write(bench.path("compressed"), &bytes).unwrap();
        let (_, made) = bench
            .make(&bench.open(&bench.path("compressed")).unwrap())
            .unwrap();
        assert_eq!(made.manifest.digest, digest);
        let spool = bench.path("stream");
        let archive = Archive::spool(
            &bench.os,
            &mut Slow(&bytes),
            "standard input",
            &spool,
            bench.limits.bytes,
            &bench.cancel,
        );
        assert_eq!(
            bench.make(&archive.unwrap()).unwrap().1.manifest.digest,
            digest
        );
        fs::remove_file(spool).unwrap();
    }
}

#[test]
fn layers_that_are_the_same_may_be_links_to_one() {
    let bench = Bench::new();
    let one = layer(&[("a", b"1")]);
    let files = docker(&[one.clone(), one.clone()]);
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in &files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        if name == "1/layer.tar" {
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_size(0);
            builder
                .append_link(&mut header, name, "../0/layer.tar")
                .unwrap();
        } else {
            header.set_size(bytes.len() as u64);
            builder
                .append_data(&mut header, name, bytes.as_slice())
                .unwrap();
        }
    }
    let path = bench.path("linked.tar");
    fs::write(&path, builder.into_inner().unwrap()).unwrap();
    bench.make(&bench.open(&path).unwrap()).unwrap();
}

#[test]
fn the_manifest_for_this_host_is_taken() {
    let bench = Bench::new();
    let mut files = layout(&[(layer(&[("mine", b"1")]), plain)]);
    let own: Value = serde_json::from_slice(&files.pop().unwrap().1).unwrap();
    let mut own = own["manifests"][0].clone();
    own["annotations"] = json!(null);
    own["platform"] = json!({ "os": "linux", "architecture": Platform::of_guests().architecture });
    // That of the other is not even there.
    let mut other = own.clone();
    other["digest"] = json!(Digest::of(b"not there"));
    other["platform"] = json!({ "os": "linux", "architecture": "s390x" });
    for nested in [false, true] {
        let mut files = files.clone();
        if nested {
            let inner = json!({ "schemaVersion": 2, "manifests": [other, own] });
            let inner = add(&mut files, inner.to_string().into_bytes());
            index(&mut files, &[inner]);
        } else {
            index(&mut files, &[other.clone(), own.clone()]);
        }
        bench.make(&bench.archive(&files)).unwrap();
    }
    index(&mut files, &[other]);
    let error = bench.make(&bench.archive(&files)).unwrap_err();
    assert_eq!(
        error.kind(),
        HostErrorKind::Corrupt,
        "one without a choice is taken: {error:?}"
    );
}

#[test]
fn what_is_not_what_its_digest_says_is_refused() {
    let bench = Bench::new();
    let good = layout(&[(layer(&[("a", b"1")]), gzip)]);
    bench.make(&bench.archive(&good)).unwrap();
    // Configuration, layer and manifest, each with one bit turned somewhere.
    for part in 0..3 {
        for at in [0, 40, 70] {
            let mut bad = good.clone();
            bad[part].1[at] ^= 1;
            let refusal = bench.refusal(&bad);
            assert!(
                refusal.contains("digest sha256:"),
                "{part}, {at}: {refusal}"
            );
        }
        let mut short = good.clone();
        short[part].1.pop();
        let refusal = bench.refusal(&short);
        assert!(
            refusal.contains("digest sha256:") || refusal.contains("bytes, not"),
            "{refusal}"
        );
    }
    // The layer of another image, whose own digest is right.
    let mut files = Files::new();
    let config = add(
        &mut files,
        config(&[layer(&[("a", b"1")])]).to_string().into_bytes(),
    );
    let other = add(&mut files, gzip(&layer(&[("a", b"2")])));
    let manifest = json!({ "schemaVersion": 2, "config": config, "layers": [other] });
    let manifest = add(&mut files, manifest.to_string().into_bytes());
    index(&mut files, &[manifest]);
    assert!(bench.refusal(&files).contains("configuration says"));
    let one = |name: &str, text: &str| vec![(name.to_owned(), text.as_bytes().to_vec())];
    for (files, why) in [
        (one("x", ""), "neither"),
        (one("index.json", "{}"), "neither an index"),
        (one("manifest.json", "[]"), "it has none"),
        (one("manifest.json", "[{}]"), "Config"),
        (
            one(
                "manifest.json",
                r#"[{"Config":"../../etc/passwd","Layers":[]}]"#,
            ),
            "it has no `etc/passwd`",
        ),
    ] {
        let refusal = bench.refusal(&files);
        assert!(refusal.contains(why), "{why}: {refusal}");
    }
}

#[test]
fn a_layer_that_unpacks_to_no_end_is_stopped() {
    let mut bench = Bench::new();
    bench.limits = Limits {
        bytes: 1 << 20,
        entries: 100,
    };
    // One file that says it is huge, and the zeros to go with it.
    let huge = |size: u64, zeros: usize| {
        let mut header = tar::Header::new_gnu();
        header.set_path("zeros").unwrap();
        header.set_size(size);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_cksum();
        let mut bytes = header.as_bytes().to_vec();
        bytes.resize(bytes.len() + zeros, 0);
        bytes
    };
    let refusal = bench.refusal(&layout(&[(huge(1 << 40, 8 << 20), gzip)]));
    assert!(refusal.contains("the limit"), "{refusal}");
    // Zeros behind the archive's end.
    let refusal = bench.refusal(&layout(&[(huge(0, 8 << 20), gzip)]));
    assert!(refusal.contains("more than 1048576 bytes"), "{refusal}");
    // Each layer within the limit, all of them not.
    let half = layer(&[("a", &[1; 600 << 10])]);
    let refusal = bench.refusal(&layout(&[(half.clone(), gzip), (half, zstd)]));
    assert!(
        refusal.contains("limit") || refusal.contains("more than"),
        "{refusal}"
    );
    let many: Vec<_> = (0..101).map(|n| format!("f{n}")).collect();
    let many: Vec<_> = many.iter().map(|name| (name.as_str(), &b""[..])).collect();
    let refusal = bench.refusal(&layout(&[(layer(&many), gzip)]));
    assert!(refusal.contains("100 entries"), "{refusal}");
    // An archive as a whole.
    let path = bench.path("bomb");
    fs::write(&path, gzip(&vec![0; 8 << 20])).unwrap();
    let error = bench.open(&path).unwrap_err();
    assert_eq!(error.kind(), HostErrorKind::Corrupt, "{error:?}");
}

#[test]
fn a_sparse_file_of_absurd_size_takes_no_memory() {
    let mut bench = Bench::new();
    bench.limits = Limits::NONE;
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::GNUSparse);
    header.set_path("holes").unwrap();
    header.set_size(0);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.as_gnu_mut().unwrap().set_real_size(1 << 60);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.resize(bytes.len() + 1024, 0);
    let refusal = bench.refusal(&layout(&[(bytes, gzip)]));
    assert!(refusal.contains("more than a file may have"), "{refusal}");
}

#[test]
fn a_layout_leads_to_nothing_outside_it() {
    let bench = Bench::new();
    let files = layout(&[(layer(&[("a", b"1")]), plain)]);
    let outside = bench.path("outside");
    fs::write(&outside, &files[1].1).unwrap();
    let dir = bench.path("layout");
    unpacked(&files, &dir);
    let blob = dir.join(&files[1].0);
    fs::remove_file(&blob).unwrap();
    std::os::unix::fs::symlink(&outside, &blob).unwrap();
    assert!(bench.make(&bench.open(&dir).unwrap()).is_err());
    // Within it a link may be.
    fs::remove_file(&blob).unwrap();
    fs::write(dir.join("elsewhere"), &files[1].1).unwrap();
    std::os::unix::fs::symlink("../../elsewhere", &blob).unwrap();
    bench.make(&bench.open(&dir).unwrap()).unwrap();
    // A pipe has no size, and nobody waits for it.
    fs::remove_file(&blob).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &blob,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    assert!(bench.make(&bench.open(&dir).unwrap()).is_err());
}

#[test]
fn cancelling_stops_it() {
    let bench = Bench::new();
    let archive = bench.archive(&layout(&[(layer(&[("a", b"1")]), gzip)]));
    bench.cancel.cancel();
    let error = bench.make(&archive).unwrap_err();
    assert_eq!(error.kind(), HostErrorKind::Interrupted);
    assert!(!bench.path("images/own").exists());
}

#[test]
fn what_is_saved_can_be_loaded_and_is_the_same() {
    let bench = Bench::new();
    let long = "deep/".repeat(40) + "file";
    let mut builder = tar::Builder::new(Vec::new());
    let mut add = |kind: tar::EntryType, path: &str, target: &str, data: &[u8], device: u32| {
        builder
            .append_pax_extensions([
                ("mtime", &b"12.000000345"[..]),
                ("SCHILY.xattr.user.a%3Db", &b"1\n\0"[..]),
            ])
            .unwrap();
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o4751);
        header.set_uid(70_000);
        header.set_gid(3);
        header.set_size(data.len() as u64);
        header.set_device_major(device).unwrap();
        header.set_device_minor(device * 300).unwrap();
        if target.is_empty() {
            builder.append_data(&mut header, path, data).unwrap();
        } else {
            builder.append_link(&mut header, path, target).unwrap();
        }
    };
    use tar::EntryType as T;
    let large: Vec<u8> = (0..10_000_u32).map(|n| n.to_le_bytes()[0]).collect();
    add(T::Directory, "a", "", b"", 0);
    add(T::Regular, "a/large", "", &large, 0);
    add(T::Regular, &long, "", b"small", 0);
    add(T::Regular, "a/empty", "", b"", 0);
    // Long enough to be searched for holes.
    add(
        T::Regular,
        "a/holes",
        "",
        &[vec![0; 20 << 20], vec![1]].concat(),
        0,
    );
    add(T::Link, "a/hard", &long, b"", 0);
    add(T::Symlink, "a/link", &"target/".repeat(40), b"", 0);
    add(T::Char, "a/char", "", b"", 7);
    add(T::Block, "a/block", "", b"", 8);
    add(T::Fifo, "a/fifo", "", b"", 0);
    let first = layer(&[]);
    let files = layout(&[(first, plain), (builder.into_inner().unwrap(), gzip)]);
    let (image, made) = bench.make(&bench.archive(&files)).unwrap();
    let save = |made: &Image| {
        let saved = SavedImage {
            name: "own:1".parse().unwrap(),
            created: "2026-01-02T03:04:05Z".to_owned(),
            config: image.config.clone(),
            root: fs::File::open(made.root()).unwrap(),
        };
        let mut bytes = Vec::new();
        save_images(&[saved], &mut bytes, &bench.cancel).unwrap();
        bytes
    };
    let bytes = save(&made);
    let path = bench.path("saved.tar");
    fs::write(&path, &bytes).unwrap();
    let tree = |image: &Image| {
        let mut listing = Vec::new();
        crate::image::erofs::export_tar(&fs::File::open(image.root()).unwrap(), &mut listing)
            .unwrap();
        listing
    };
    let before = tree(&made);
    let (again, loaded) = bench.make(&bench.open(&path).unwrap()).unwrap();
    assert_eq!(
        (again.names, again.config),
        (vec!["own:1".to_owned()], image.config.clone())
    );
    assert!(tree(&loaded) == before, "the trees differ");
    // As the layout it is as well.
    let dir = bench.path("as-layout");
    fs::create_dir(&dir).unwrap();
    tar::Archive::new(bytes.as_slice()).unpack(&dir).unwrap();
    fs::remove_file(dir.join("manifest.json")).unwrap();
    let (again, loaded) = bench.make(&bench.open(&dir).unwrap()).unwrap();
    assert_eq!(again.names, ["docker.io/library/own:1"]);
    assert!(tree(&loaded) == before, "the trees differ");
    // GNU tar understands it.
    let list = std::process::Command::new("tar")
        .args(["-xOf"])
        .arg(&path)
        .arg("manifest.json")
        .output();
    assert!(list.unwrap().status.success());
}

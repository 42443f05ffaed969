//! Against a server that does what a test tells it to, with archives that the tests make.

use std::sync::{Arc, Mutex};

use flate2::Compression;
use flate2::write::GzEncoder;

use super::*;
use crate::os::Faults;
use crate::test_server::{Answer, Server, answer};

const VERSION: &str = "9.8.7";

/// The first bytes of a program, for processors with this `e_machine`.
fn program(machine: u16, rest: &[u8]) -> Vec<u8> {
    let mut bytes = vec![
        0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0,
    ];
    bytes.extend(machine.to_le_bytes());
    bytes.extend(rest);
    bytes
}

fn ours() -> u16 {
    if cfg!(target_arch = "aarch64") {
        183
    } else {
        62
    }
}

fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o755);
        builder.append_data(&mut header, name, *bytes).unwrap();
    }
    builder.into_inner().unwrap().finish().unwrap()
}

fn inside(program: &str) -> String {
    let arch = std::env::consts::ARCH;
    format!("release-v{VERSION}-{arch}/{program}-v{VERSION}-{arch}")
}

/// A release as the project makes them.
fn whole() -> Vec<u8> {
    let (vmm, jailer) = (program(ours(), b"the VMM"), program(ours(), b"its jailer"));
    archive(&[
        ("release/LICENSE", b"a licence"),
        (&inside("firecracker"), &vmm),
        (
            &inside("firecracker").replace("/firecracker", "/seccompiler-bin"),
            b"x",
        ),
        (&inside("jailer"), &jailer),
    ])
}

fn release_of(archive: &[u8]) -> Release {
    Release::of(VERSION, Some(&Digest::of(archive).hex())).unwrap()
}

struct Place {
    dir: tempfile::TempDir,
    os: Os,
    cancel: Cancel,
}

impl Place {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            os: Os::new(),
            cancel: Cancel::new().unwrap(),
        }
    }

    fn all(&self) -> PathBuf {
        self.dir.path().join("engines")
    }

    fn install(&self, release: &Release, source: &Source) -> Result<(Installed, bool), HostError> {
        let proxy = ProxySettings::default();
        let (all, none) = (self.all(), Programs::new([]));
        install(
            &self.os,
            &none,
            &proxy,
            release,
            source,
            &all,
            &mut |_| {},
            &self.cancel,
        )
    }

    /// Nothing but locks is there.
    fn is_empty(&self) {
        let names: Vec<_> = std::fs::read_dir(self.all())
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.file_name().into_string().unwrap())
            .filter(|name| {
                Path::new(name)
                    .extension()
                    .is_none_or(|what| what != "lock")
            })
            .collect();
        assert_eq!(names, Vec::<String>::new());
        assert_eq!(installed(&self.all()), []);
    }
}

fn chain(error: &HostError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text += &format!(": {error}");
        source = error.source();
    }
    text
}

fn serving(body: Vec<u8>) -> Server {
    Server::new(move |_, _| answer(200, body.clone()))
}

fn mirror(server: &Server) -> Source {
    Source::from_text(&format!("http://{}/copy/", server.host()))
}

#[test]
fn a_release_is_fetched_once_and_found_again() {
    let (place, bytes) = (Place::new(), whole());
    let release = release_of(&bytes);
    let server = serving(bytes);
    let (there, fetched) = place.install(&release, &mirror(&server)).unwrap();
    assert!(fetched);
    let arch = std::env::consts::ARCH;
    let asked = server.asked("");
    assert_eq!(asked.len(), 1);
    assert_eq!(
        asked[0].path,
        format!("/copy/v{VERSION}/firecracker-v{VERSION}-{arch}.tgz")
    );
    assert_eq!(
        std::fs::read(&there.jailer).unwrap(),
        program(ours(), b"its jailer")
    );
    assert_eq!(
        std::fs::read(&there.firecracker).unwrap(),
        program(ours(), b"the VMM")
    );
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::metadata(&there.firecracker)
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o755);
    assert_eq!(installed(&place.all()), std::slice::from_ref(&there));

    let again = place.install(&release, &mirror(&server)).unwrap();
    assert_eq!(again, (there.clone(), false));
    assert_eq!(server.asked("").len(), 1);

    // One that was damaged is none, and is made anew.
    std::fs::remove_file(&there.jailer).unwrap();
    assert_eq!(installed(&place.all()), []);
    assert_eq!(
        place.install(&release, &mirror(&server)).unwrap(),
        (there, true)
    );
}

#[test]
fn an_archive_of_this_host_and_one_by_its_url_do_as_well() {
    let (place, bytes) = (Place::new(), whole());
    let release = release_of(&bytes);
    let file = place.dir.path().join("an archive");
    std::fs::write(&file, &bytes).unwrap();
    let source = Source::from_text(file.to_str().unwrap());
    assert!(place.install(&release, &source).unwrap().1);

    let other = Place::new();
    let server = serving(bytes);
    let url = Source::from_text(&format!("http://{}/x/own.tgz", server.host()));
    assert!(other.install(&release, &url).unwrap().1);
    assert_eq!(server.asked("")[0].path, "/x/own.tgz");
}

#[test]
fn another_archive_than_the_known_one_is_refused() {
    let (place, bytes) = (Place::new(), whole());
    let release = Release::of(VERSION, Some(&"0".repeat(64))).unwrap();
    let server = serving(bytes.clone());
    let error = place.install(&release, &mirror(&server)).unwrap_err();
    assert_eq!(error.kind(), HostErrorKind::Corrupt);
    let text = chain(&error);
    assert!(
        text.contains(&Digest::of(&bytes).hex()) && text.contains(&"0".repeat(64)),
        "{text}"
    );
    // It would be the same the next time.
    assert_eq!(server.asked("").len(), 1);
    place.is_empty();
}

#[test]
fn a_cut_connection_is_tried_again_and_given_up_in_the_end() {
    let (place, bytes) = (Place::new(), whole());
    let release = release_of(&bytes);
    let body = bytes.clone();
    let server = Server::new(move |_, before| match before {
        0 => answer(200, body.clone()).cut(body.len() / 2),
        1 => answer(503, "busy"),
        _ => answer(200, body.clone()),
    });
    assert!(place.install(&release, &mirror(&server)).unwrap().1);
    assert_eq!(server.asked("").len(), 3);

    let place = Place::new();
    let server = Server::new(move |_, _| answer(200, bytes.clone()).cut(100));
    let error = place.install(&release, &mirror(&server)).unwrap_err();
    assert_eq!(error.kind(), HostErrorKind::Network, "{}", chain(&error));
    assert_eq!(server.asked("").len(), 4);
    place.is_empty();

    let missing = Server::new(|_, _| answer(404, "no"));
    let error = place.install(&release, &mirror(&missing)).unwrap_err();
    assert_eq!(error.kind(), HostErrorKind::NotFound);
    assert_eq!(missing.asked("").len(), 1);
    place.is_empty();
}

#[test]
fn what_is_no_release_for_this_host_is_refused() {
    let good = program(ours(), b"");
    let foreign = program(if ours() == 62 { 183 } else { 62 }, b"");
    let (vmm, jailer) = (inside("firecracker"), inside("jailer"));
    let cases = [
        (
            archive(&[(&vmm, &foreign), (&jailer, &good)]),
            "another kind of processor",
        ),
        (
            archive(&[
                (&vmm, b"#!/bin/sh\necho not a program at all\n"),
                (&jailer, &good),
            ]),
            "is no program",
        ),
        (archive(&[(&vmm, &good)]), "there is no jailer-"),
        (
            archive(&[(&vmm, &good), (&vmm, &good), (&jailer, &good)]),
            "twice",
        ),
        (
            archive(&[(&vmm, b"short"), (&jailer, &good)]),
            "fill whole buffer",
        ),
        (b"no archive".to_vec(), "gzip"),
    ];
    for (bytes, why) in cases {
        let place = Place::new();
        let error = place.install(&release_of(&bytes), &mirror(&serving(bytes.clone())));
        let error = error.unwrap_err();
        assert_eq!(error.kind(), HostErrorKind::Corrupt);
        assert!(chain(&error).contains(why), "{}", chain(&error));
        place.is_empty();
    }
}

#[test]
fn whatever_effect_fails_leaves_nothing_and_the_next_attempt_succeeds() {
    /// Fails the effect of this number, from 0.
    #[derive(Debug)]
    struct Nth(Mutex<usize>, usize);
    impl Faults for Nth {
        fn before(&self, _: &'static str, _: &Path) -> io::Result<()> {
            let mut count = self.0.lock().unwrap();
            *count += 1;
            if *count == self.1 + 1 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            Ok(())
        }
    }
    let bytes = whole();
    let release = release_of(&bytes);
    let server = serving(bytes);
    let mut nth = 0;
    loop {
        let mut place = Place::new();
        place.os = Os::with_faults(Arc::new(Nth(Mutex::default(), nth)));
        let Err(error) = place.install(&release, &mirror(&server)) else {
            break;
        };
        assert_eq!(error.kind(), HostErrorKind::NoSpace, "{}", chain(&error));
        place.os = Os::new();
        assert_eq!(installed(&place.all()), [], "effect {nth}");
        assert!(
            place.install(&release, &mirror(&server)).unwrap().1,
            "effect {nth}"
        );
        nth += 1;
    }
    assert!(nth > 8, "only {nth} effects were failed");
}

#[test]
fn a_cancelled_download_ends_at_once_and_leaves_nothing() {
    let (place, bytes) = (Place::new(), whole());
    let release = release_of(&bytes);
    let cancel = place.cancel.clone();
    let server = Server::new(move |_, _| {
        cancel.cancel();
        Answer {
            hang: true,
            ..answer(200, bytes.clone()).cut(50)
        }
    });
    let error = place.install(&release, &mirror(&server)).unwrap_err();
    assert_eq!(
        error.kind(),
        HostErrorKind::Interrupted,
        "{}",
        chain(&error)
    );
    place.is_empty();
}

#[test]
fn versions_and_checksums_are_read() {
    let recommended = Release::recommended();
    assert_eq!(
        Release::of(recommended.version(), None).unwrap(),
        recommended
    );
    assert_eq!(
        Release::of(&format!("v{}", recommended.version()), None).unwrap(),
        recommended
    );
    let unknown = Release::of("1.0.0", None).unwrap_err();
    assert_eq!(unknown.kind(), HostErrorKind::NotFound);
    assert!(unknown.hint().unwrap().contains(recommended.version()));
    for bad in ["", "1", "1.2", "1.2.3.4", "1.x.2", "../1.2.3", "1.2.33333"] {
        assert_eq!(
            Release::of(bad, None).unwrap_err().kind(),
            HostErrorKind::Corrupt,
            "{bad}"
        );
    }
    let digits = "A".repeat(64);
    assert_eq!(
        Release::of("1.0.0", Some(&digits)).unwrap().sha256().hex(),
        "a".repeat(64)
    );
    assert!(Release::of("1.0.0", Some("abc")).is_err());
    let url = Source::Upstream.url(&recommended).unwrap();
    assert!(
        url.starts_with("https://github.com/firecracker-microvm/"),
        "{url}"
    );
}

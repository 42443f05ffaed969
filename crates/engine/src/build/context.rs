//! The files a build may copy: a directory of the host, without what its `.dockerignore` leaves out.
//!
//! What a source means is found out, and its content hashed, before anything runs; the content is
//! hashed again when it is sent, so that no layer is kept under the digest of another content. Nothing
//! outside the directory is read, wherever links in it lead.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};
use smolvm_host::cancel::Cancel;
use smolvm_host::oci::uncompressed;

use super::patterns::{Ignored, Pattern};
use crate::error::{Error, ErrorKind, Result, io as io_error};

/// Longest `.dockerignore`, in bytes.
const IGNORE_BYTES_MAX: u64 = 1 << 20;
/// Bytes read at once.
const BUFFER: usize = 1 << 16;
/// Where a tar archive's first header says that it is one (tar(5), "POSIX ustar archives").
const MAGIC: std::ops::Range<usize> = 257..262;

/// A directory to copy from.
#[derive(Debug)]
pub(super) struct Context {
    /// Without links.
    root: PathBuf,
    ignored: Ignored,
}

/// What one source came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) kind: FoundKind,
    /// Its name, without directories.
    pub(super) name: OsString,
    /// Itself if it is a file, and what is in it if it is a directory, each directory before its own.
    items: Vec<Item>,
}

/// What a source is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FoundKind {
    File,
    Directory,
    /// A tar archive that `ADD` unpacks.
    Archive,
}

/// Something to send.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Item {
    /// Below the destination; empty for a file, whose name is chosen when it is sent.
    path: PathBuf,
    mode: u32,
    /// Seconds since 1970-01-01T00:00:00Z.
    modified: u64,
    content: Content,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Content {
    Directory,
    Link(PathBuf),
    File {
        path: PathBuf,
        size: u64,
        digest: [u8; 32],
    },
    /// Text of the Dockerfile.
    Inline(String),
}

impl Context {
    /// Takes a directory, with the first of `ignore_files` that is there.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] if it is not there; [`ErrorKind::InvalidInput`] if it is no directory,
    /// or for a line of the file that says nothing.
    pub(super) fn open(root: &Path, ignore_files: &[PathBuf]) -> Result<Self> {
        let doing = || format!("could not read the build context {}", root.display());
        let root = fs::canonicalize(root).map_err(|error| io_error(doing(), error))?;
        if !root.is_dir() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("the build context {} is no directory", root.display()),
            )
            .hint("give the directory whose files COPY may copy, such as `.`"));
        }
        let mut ignored = Ignored::default();
        for path in ignore_files {
            let doing = || format!("could not read {}", path.display());
            let text = match File::open(path) {
                Ok(file) => {
                    let mut text = String::new();
                    file.take(IGNORE_BYTES_MAX)
                        .read_to_string(&mut text)
                        .map_err(|error| io_error(doing(), error))?;
                    text
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(io_error(doing(), error)),
            };
            ignored = Ignored::parse(&text).map_err(|(line, why)| {
                Error::new(
                    ErrorKind::InvalidInput,
                    format!("{}, line {line}: {why}", path.display()),
                )
            })?;
            break;
        }
        Ok(Self { root, ignored })
    }

    /// Finds what a source means. With `unpack` a tar archive is one, compressed or not.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] if nothing is meant; [`ErrorKind::InvalidInput`] for what is no pattern,
    /// or leads out of the context; those of reading; [`ErrorKind::Cancelled`].
    pub(super) fn find(&self, source: &str, unpack: bool, cancel: &Cancel) -> Result<Vec<Found>> {
        let pattern =
            Pattern::parse(source).map_err(|why| Error::new(ErrorKind::InvalidInput, why))?;
        let mut paths = Vec::new();
        let prefix: PathBuf = pattern.plain_prefix().iter().collect();
        if pattern.is_plain() {
            let is_there = fs::symlink_metadata(self.root.join(&prefix)).is_ok();
            if is_there && !self.leaves_out(&prefix) {
                paths.push(prefix);
            }
        } else if self.root.join(&prefix).is_dir() {
            self.search(&prefix, &pattern, &mut paths)?;
        }
        if paths.is_empty() {
            return Err(self.nothing(source, &pattern));
        }
        paths.sort();
        paths
            .iter()
            .map(|path| self.found(path, unpack, cancel))
            .collect()
    }

    fn nothing(&self, source: &str, pattern: &Pattern) -> Error {
        let plain: PathBuf = pattern.plain_prefix().iter().collect();
        let left_out = pattern.is_plain() && self.root.join(&plain).exists();
        let error = Error::new(
            ErrorKind::NotFound,
            format!(
                "there is no `{}` in the build context {}",
                source.escape_debug(),
                self.root.display()
            ),
        );
        if left_out {
            error.hint("it is left out by the .dockerignore")
        } else {
            error.hint("sources are below the build context, the last word of the command line")
        }
    }

    fn leaves_out(&self, path: &Path) -> bool {
        !path.as_os_str().is_empty() && self.ignored.leaves_out(&path.to_string_lossy())
    }

    /// The names in a directory of the context, in order.
    fn names(&self, directory: &Path) -> Result<Vec<OsString>> {
        let place = self.root.join(directory);
        let doing = || format!("could not list {}", place.display());
        let mut names = fs::read_dir(&place)
            .and_then(|entries| {
                entries
                    .map(|entry| Ok(entry?.file_name()))
                    .collect::<io::Result<Vec<_>>>()
            })
            .map_err(|error| io_error(doing(), error))?;
        names.sort();
        Ok(names)
    }

    fn search(&self, directory: &Path, pattern: &Pattern, paths: &mut Vec<PathBuf>) -> Result<()> {
        for name in self.names(directory)? {
            let path = directory.join(name);
            let text = path.to_string_lossy();
            let out = self.leaves_out(&path);
            if pattern.matches(&text) && !out {
                paths.push(path);
                continue;
            }
            let place = self.root.join(&path);
            let is_directory = fs::symlink_metadata(&place).is_ok_and(|metadata| metadata.is_dir());
            let deep_enough = pattern
                .depth()
                .is_none_or(|depth| path.components().count() < depth);
            if is_directory && deep_enough && !(out && self.ignored.is_final()) {
                self.search(&path, pattern, paths)?;
            }
        }
        Ok(())
    }

    fn found(&self, path: &Path, unpack: bool, cancel: &Cancel) -> Result<Found> {
        let named = self.root.join(path);
        let doing = || format!("could not read {}", named.display());
        // What is named is followed if it is a link; what is below is copied as it is.
        let place = fs::canonicalize(&named).map_err(|error| io_error(doing(), error))?;
        if !place.starts_with(&self.root) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "`{}` leads to {}, out of the build context {}",
                    path.display(),
                    place.display(),
                    self.root.display()
                ),
            ));
        }
        let metadata = fs::metadata(&place).map_err(|error| io_error(doing(), error))?;
        let name = path.file_name().map(OsStr::to_owned).unwrap_or_default();
        if metadata.is_dir() {
            let mut items = Vec::new();
            self.walk(&place, path, Path::new(""), &mut items, cancel)?;
            return Ok(Found {
                kind: FoundKind::Directory,
                name,
                items,
            });
        }
        if !metadata.is_file() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("`{}` is neither a file nor a directory", path.display()),
            ));
        }
        let kind = if unpack && is_archive(&place).map_err(|error| io_error(doing(), error))? {
            FoundKind::Archive
        } else {
            FoundKind::File
        };
        Ok(Found {
            kind,
            name,
            items: vec![file_item(&place, PathBuf::new(), &metadata, cancel)?],
        })
    }

    /// Collects what is in a directory. `shown` is its path as the user knows it.
    fn walk(
        &self,
        place: &Path,
        shown: &Path,
        below: &Path,
        items: &mut Vec<Item>,
        cancel: &Cancel,
    ) -> Result<()> {
        let relative = place.strip_prefix(&self.root).unwrap_or(place);
        for name in self.names(relative)? {
            check(cancel)?;
            let shown = shown.join(&name);
            let out = self.leaves_out(&shown);
            if out && self.ignored.is_final() {
                continue;
            }
            let place = place.join(&name);
            let path = below.join(&name);
            let doing = || format!("could not read {}", place.display());
            let metadata =
                fs::symlink_metadata(&place).map_err(|error| io_error(doing(), error))?;
            let kind = metadata.file_type();
            if kind.is_dir() {
                let before = items.len();
                items.push(item(path.clone(), &metadata, Content::Directory));
                self.walk(&place, &shown, &path, items, cancel)?;
                // One that is left out is there only for what is taken in again.
                if out && items.len() == before + 1 {
                    items.pop();
                }
            } else if out {
            } else if kind.is_symlink() {
                let target = fs::read_link(&place).map_err(|error| io_error(doing(), error))?;
                items.push(item(path, &metadata, Content::Link(target)));
            } else if kind.is_file() {
                items.push(file_item(&place, path, &metadata, cancel)?);
            }
            // Sockets, pipes and devices mean nothing in another machine.
        }
        Ok(())
    }
}

fn check(cancel: &Cancel) -> Result<()> {
    if cancel.is_cancelled() {
        return Err(Error::new(
            ErrorKind::Cancelled,
            "reading the build context was cancelled",
        ));
    }
    Ok(())
}

fn item(path: PathBuf, metadata: &Metadata, content: Content) -> Item {
    Item {
        path,
        mode: metadata.mode() & 0o7777,
        modified: u64::try_from(metadata.mtime()).unwrap_or(0),
        content,
    }
}

fn file_item(place: &Path, path: PathBuf, metadata: &Metadata, cancel: &Cancel) -> Result<Item> {
    let doing = || format!("could not read {}", place.display());
    let mut file = File::open(place).map_err(|error| io_error(doing(), error))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; BUFFER];
    let mut size = 0;
    loop {
        check(cancel)?;
        match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => {
                hash.update(&buffer[..count]);
                size += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(io_error(doing(), error)),
        }
    }
    let content = Content::File {
        path: place.to_owned(),
        size,
        digest: hash.finalize().into(),
    };
    Ok(item(path, metadata, content))
}

/// Whether a file is a tar archive, compressed in a way that is understood.
fn is_archive(path: &Path) -> io::Result<bool> {
    let file = File::open(path)?;
    let mut head = [0; 512];
    let Ok(mut plain) = uncompressed(file) else {
        return Ok(false);
    };
    // What is not compressed as it says is a file like any other.
    Ok(plain.read_exact(&mut head).is_ok() && &head[MAGIC] == b"ustar")
}

impl Found {
    /// A here-document as a file.
    pub(super) fn inline(name: &str, text: String) -> Self {
        Self {
            kind: FoundKind::File,
            name: name.into(),
            items: vec![Item {
                path: PathBuf::new(),
                mode: 0o644,
                modified: 0,
                content: Content::Inline(text),
            }],
        }
    }

    /// Adds everything that makes one copy another: kinds, names, permissions, contents; no times.
    pub(super) fn hash(&self, hash: &mut Hasher) {
        hash.part(&[self.kind as u8]);
        if self.kind == FoundKind::File {
            hash.part(self.name.as_bytes());
        }
        hash.part(&(self.items.len() as u64).to_le_bytes());
        for item in &self.items {
            hash.part(item.path.as_os_str().as_bytes());
            hash.part(&item.mode.to_le_bytes());
            match &item.content {
                Content::Directory => hash.part(b"directory"),
                Content::Link(target) => {
                    hash.part(b"link");
                    hash.part(target.as_os_str().as_bytes());
                }
                Content::File { digest, .. } => {
                    hash.part(b"file");
                    hash.part(digest);
                }
                Content::Inline(text) => {
                    hash.part(b"file");
                    hash.part(&Sha256::digest(text.as_bytes()));
                }
            }
        }
    }

    /// Writes it as a tar stream: a file under `name`, a directory as what is in it, an archive as what
    /// is in that.
    ///
    /// # Errors
    ///
    /// Those of reading and writing; [`ErrorKind::Busy`] if a file is another than it was when it was
    /// found.
    pub(super) fn pack(&self, name: &OsStr, chmod: Option<u32>, out: &mut dyn Write) -> Result<()> {
        if self.kind == FoundKind::Archive {
            return self.unpack(out);
        }
        let sending = |error| io_error("could not send the files to the guest", error);
        let mut builder = tar::Builder::new(out);
        for item in &self.items {
            let mut header = tar::Header::new_gnu();
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(item.modified);
            header.set_mode(chmod.unwrap_or(item.mode));
            header.set_size(0);
            let path = if item.path.as_os_str().is_empty() {
                Path::new(name)
            } else {
                &item.path
            };
            match &item.content {
                Content::Directory => {
                    header.set_entry_type(tar::EntryType::Directory);
                    builder
                        .append_data(&mut header, path, io::empty())
                        .map_err(sending)?;
                }
                Content::Link(target) => {
                    header.set_entry_type(tar::EntryType::Symlink);
                    header.set_mode(0o777);
                    builder
                        .append_link(&mut header, path, target)
                        .map_err(sending)?;
                }
                Content::Inline(text) => {
                    header.set_size(text.len() as u64);
                    builder
                        .append_data(&mut header, path, text.as_bytes())
                        .map_err(sending)?;
                }
                Content::File {
                    path: place,
                    size,
                    digest,
                } => {
                    let file = open_as_found(place)?;
                    header.set_size(*size);
                    let mut reader = Hashing::new(file.take(*size));
                    builder
                        .append_data(&mut header, path, &mut reader)
                        .map_err(|error| match error.kind() {
                            io::ErrorKind::UnexpectedEof => changed(place),
                            _ => sending(error),
                        })?;
                    reader.require(place, *size, digest)?;
                }
            }
        }
        builder.into_inner().and_then(Write::flush).map_err(sending)
    }

    fn unpack(&self, out: &mut dyn Write) -> Result<()> {
        let [
            Item {
                content: Content::File { path, size, digest },
                ..
            },
        ] = &self.items[..]
        else {
            return Err(Error::new(
                ErrorKind::Internal,
                "an archive that is no file was to be unpacked",
            ));
        };
        let mut source = Hashing::new(open_as_found(path)?);
        let copied = uncompressed(&mut source).and_then(|mut plain| {
            io::copy(&mut plain, out)?;
            out.flush()
        });
        copied.map_err(|error| io_error(format!("could not unpack {}", path.display()), error))?;
        io::copy(&mut source, &mut io::sink())
            .map_err(|error| io_error(format!("could not read {}", path.display()), error))?;
        source.require(path, *size, digest)
    }
}

fn open_as_found(path: &Path) -> Result<File> {
    File::open(path).map_err(|error| io_error(format!("could not read {}", path.display()), error))
}

fn changed(path: &Path) -> Error {
    Error::new(
        ErrorKind::Busy,
        format!("{} changed while the image was built", path.display()),
    )
    .hint("build again when nothing writes to the build context")
}

/// Hashes what is read.
struct Hashing<R> {
    inner: R,
    hash: Sha256,
    bytes: u64,
}

impl<R: Read> Hashing<R> {
    fn new(inner: R) -> Self {
        Self {
            inner,
            hash: Sha256::new(),
            bytes: 0,
        }
    }

    fn require(self, path: &Path, size: u64, digest: &[u8; 32]) -> Result<()> {
        let found: [u8; 32] = self.hash.finalize().into();
        if self.bytes == size && found == *digest {
            Ok(())
        } else {
            Err(changed(path))
        }
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hash.update(&buffer[..count]);
        self.bytes += count as u64;
        Ok(count)
    }
}

/// Hashes parts so that no two lists of parts are the same bytes.
#[derive(Clone)]
pub(super) struct Hasher(Sha256);

impl Hasher {
    /// Begins with what is hashed.
    pub(super) fn new(what: &str) -> Self {
        let mut hasher = Self(Sha256::new());
        hasher.part(what.as_bytes());
        hasher
    }

    pub(super) fn part(&mut self, bytes: &[u8]) {
        self.0.update((bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }

    pub(super) fn text(&mut self, text: &str) {
        self.part(text.as_bytes());
    }

    /// 64 hexadecimal digits.
    pub(super) fn finish(self) -> String {
        use std::fmt::Write as _;
        self.0
            .finalize()
            .iter()
            .fold(String::new(), |mut text, byte| {
                // Writing to memory does not fail.
                let _ = write!(text, "{byte:02x}");
                text
            })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    struct Dir(tempfile::TempDir);

    impl Dir {
        fn new(files: &[(&str, &str)]) -> Self {
            let dir = tempfile::tempdir().expect("a directory");
            for (path, text) in files {
                let path = dir.path().join(path);
                fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
                fs::write(path, text).expect("a file");
            }
            Self(dir)
        }

        fn path(&self, path: &str) -> PathBuf {
            self.0.path().join(path)
        }

        fn context(&self) -> Context {
            Context::open(self.0.path(), &[self.path(".dockerignore")]).expect("a context")
        }

        fn key(&self, source: &str) -> String {
            let mut hasher = Hasher::new("test");
            for found in find(&self.context(), source) {
                found.hash(&mut hasher);
            }
            hasher.finish()
        }
    }

    fn find(context: &Context, source: &str) -> Vec<Found> {
        context
            .find(source, true, &Cancel::new().expect("a handle"))
            .expect(source)
    }

    fn names(found: &[Found]) -> Vec<String> {
        let mut names = Vec::new();
        for one in found {
            names.push(format!("{:?} {}", one.kind, one.name.display()));
            names.extend(
                one.items
                    .iter()
                    .filter(|item| !item.path.as_os_str().is_empty())
                    .map(|item| format!("  {}", item.path.display())),
            );
        }
        names
    }

    fn packed(found: &Found) -> Vec<(String, u32, String)> {
        let mut bytes = Vec::new();
        found
            .pack(OsStr::new("new"), None, &mut bytes)
            .expect("packed");
        let mut archive = tar::Archive::new(bytes.as_slice());
        let entries = archive.entries().expect("an archive");
        entries
            .map(|entry| {
                let mut entry = entry.expect("an entry");
                let mut text = String::new();
                let path = entry.path().expect("a path").display().to_string();
                let mode = entry.header().mode().expect("a mode");
                if let Some(link) = entry.link_name().expect("a link") {
                    text = format!("-> {}", link.display());
                } else {
                    entry.read_to_string(&mut text).expect("text");
                }
                (path, mode, text)
            })
            .collect()
    }

    #[test]
    fn sources_are_files_directories_and_patterns() {
        let dir = Dir::new(&[
            ("a.txt", "1"),
            ("b.txt", "2"),
            ("d/x", "3"),
            ("d/e/y", "4"),
            ("d/skip.log", "5"),
            (
                ".dockerignore",
                "**/*.log\nnode_modules\n!node_modules/keep\n",
            ),
            ("node_modules/keep/z", "6"),
            ("node_modules/other/z", "7"),
        ]);
        let context = dir.context();
        assert_eq!(
            names(&find(&context, "*.txt")),
            ["File a.txt", "File b.txt"]
        );
        assert_eq!(names(&find(&context, "d/*/y")), ["File y"]);
        assert_eq!(
            names(&find(&context, "./d/")),
            ["Directory d", "  e", "  e/y", "  x"]
        );
        assert_eq!(
            names(&find(&context, "node_modules/*")),
            ["Directory keep", "  z"]
        );
        assert!(names(&find(&context, ".")).contains(&"  node_modules/keep/z".to_owned()));
        assert!(!names(&find(&context, ".")).contains(&"  node_modules/other".to_owned()));
        let missing = |source: &str| {
            let cancel = Cancel::new().expect("a handle");
            let error = context.find(source, false, &cancel).expect_err(source);
            (error.kind(), error.hint_text().unwrap_or("").to_owned())
        };
        assert_eq!(missing("none").0, ErrorKind::NotFound);
        assert_eq!(missing("*.rs").0, ErrorKind::NotFound);
        assert_eq!(
            missing("d/skip.log").1,
            "it is left out by the .dockerignore"
        );
    }

    #[test]
    fn what_is_sent_is_what_was_found() {
        let dir = Dir::new(&[("d/x", "text"), ("f", "own")]);
        fs::set_permissions(dir.path("d/x"), fs::Permissions::from_mode(0o4755)).expect("mode");
        symlink("/etc/passwd", dir.path("d/link")).expect("a link");
        let context = dir.context();
        assert_eq!(
            packed(&find(&context, "d")[0]),
            [
                ("link".to_owned(), 0o777, "-> /etc/passwd".to_owned()),
                ("x".to_owned(), 0o4755, "text".to_owned())
            ]
        );
        let file = &find(&context, "f")[0];
        assert_eq!(packed(file)[0].0, "new");
        assert_eq!(
            packed(&Found::inline("E", "in it".to_owned()))[0].2,
            "in it"
        );
        for text in ["longer than it was", "", "oWn"] {
            fs::write(dir.path("f"), text).expect("a file");
            let error = file
                .pack(OsStr::new("f"), None, &mut Vec::new())
                .expect_err(text);
            assert_eq!(error.kind(), ErrorKind::Busy, "{text}");
        }
    }

    #[test]
    fn nothing_outside_the_context_is_read() {
        let dir = Dir::new(&[("c/a", "1"), ("secret", "2")]);
        symlink("../secret", dir.path("c/out")).expect("a link");
        symlink("a", dir.path("c/in")).expect("a link");
        symlink("..", dir.path("c/up")).expect("a link");
        let context = Context::open(&dir.path("c"), &[]).expect("a context");
        assert_eq!(names(&find(&context, "in")), ["File in"]);
        let cancel = Cancel::new().expect("a handle");
        for source in ["out", "up", "up/secret"] {
            let error = context.find(source, false, &cancel).expect_err(source);
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{source}");
        }
        // There is nothing above it.
        assert!(context.find("../secret", false, &cancel).is_err());
        assert_eq!(names(&find(&context, "../a")), ["File a"]);
    }

    #[test]
    fn archives_are_told_from_other_files() {
        let dir = Dir::new(&[("plain", "no archive"), ("short.gz", "\u{1f}x")]);
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(2);
        header.set_mode(0o600);
        tar.append_data(&mut header, "in/a", &b"hi"[..])
            .expect("memory");
        let bytes = tar.into_inner().expect("memory");
        fs::write(dir.path("a.tar"), &bytes).expect("a file");
        let context = dir.context();
        assert_eq!(names(&find(&context, "plain")), ["File plain"]);
        assert_eq!(names(&find(&context, "short.gz")), ["File short.gz"]);
        let archive = &find(&context, "a.tar")[0];
        assert_eq!(archive.kind, FoundKind::Archive);
        assert_eq!(
            packed(archive),
            [("in/a".to_owned(), 0o600, "hi".to_owned())]
        );
    }

    #[test]
    fn a_key_is_of_what_would_be_copied() {
        let dir = Dir::new(&[("d/a", "1"), ("d/b", "2"), (".dockerignore", "*.log\n")]);
        let before = dir.key("d");
        assert_eq!(dir.key("d"), before);
        fs::write(dir.path("d/c.log"), "").expect("a file");
        assert_ne!(dir.key("d"), before, "the pattern is of the root only");
        fs::remove_file(dir.path("d/c.log")).expect("it was there");
        // Times do not matter; permissions, names and contents do.
        let file = File::options()
            .write(true)
            .open(dir.path("d/a"))
            .expect("a");
        file.set_modified(std::time::UNIX_EPOCH).expect("a time");
        assert_eq!(dir.key("d"), before);
        fs::set_permissions(dir.path("d/a"), fs::Permissions::from_mode(0o755)).expect("mode");
        let executable = dir.key("d");
        assert_ne!(executable, before);
        fs::rename(dir.path("d/b"), dir.path("d/B")).expect("renamed");
        assert_ne!(dir.key("d"), executable);
    }
}

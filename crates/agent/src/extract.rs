//! Unpacking a tar stream from the host into a directory, and never outside it.
//!
//! The `tar` crate reads the stream and writes files and links. Where they go is decided here, with
//! openat2(2): the kernel itself refuses a path that leaves the directory, also when a program of
//! the guest exchanges a directory for a link at the wrong moment. A symbolic link on the way is
//! followed as long as it stays inside.
//!
//! A file appears whole under its name, or not at all: it is written beside its place and renamed.
//! One that exists is so replaced, not written into, and links to it elsewhere keep their content.
//! A directory that exists stays and gets the mode and time of its entry. An entry for the
//! directory itself (`./`) changes nothing. A stream that ends without the tar trailer is accepted,
//! as tar(1) does, if it ends between two entries.
//!
//! After a failure the session ends at once; input that is still on its way is dropped with the
//! stream, so a host that has seen the failure owes nothing more.

use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;
use smolvm_proto::message::{ExtractRequest, Failure, FailureKind};
use tar::{Archive, Entry, EntryType};

use crate::failure::{failure, from_errno, from_io};
use crate::files::{absolute, path_of};
use crate::stream::{Last, Stop, Stream};
use crate::users;

/// Carries the request out.
pub(crate) fn extract(stream: &Stream, request: &ExtractRequest) -> Result<Last, Stop> {
    let path = absolute(&request.directory)?;
    let owner = request
        .owner
        .as_deref()
        .map(users::look_up)
        .transpose()?
        .map(|identity| (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid)));
    if request.make_parents {
        make_all(path, owner)?;
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(path, flags, Mode::empty())
        .map_err(|errno| from_errno(&format!("opening {}", path.display()), errno))?;
    let mut input = Input {
        stream,
        part: Vec::new(),
        offset: 0,
        gone: false,
    };
    let mut target = Target {
        // Nothing is outside the root, and links to absolute paths are common in it.
        resolve: if path == Path::new("/") {
            ResolveFlags::IN_ROOT
        } else {
            ResolveFlags::BENEATH
        },
        directory,
        shown: path,
        owner,
        privileged: rustix::process::geteuid().is_root(),
        parent: None,
        directories: Vec::new(),
    };
    let unpacked = match &request.file {
        Some(name) => target.receive(&mut input, name),
        None => unpack_all(&mut input, &mut target),
    };
    if input.gone {
        return Err(Stop::Gone);
    }
    unpacked?;
    target.finish()?;
    // The trailer's padding, so that the host never finds that nobody takes its last bytes.
    while stream.next_input()?.is_some() {}
    Ok(Last::done())
}

/// Makes a directory and those above it that are missing.
pub(crate) fn make_all(path: &Path, owner: Option<(Uid, Gid)>) -> Result<(), Failure> {
    let mut made = PathBuf::new();
    for component in path.components() {
        made.push(component);
        let refused =
            |errno| from_errno(&format!("making the directory {}", made.display()), errno);
        match rustix::fs::mkdir(&made, Mode::from_raw_mode(0o755)) {
            Ok(()) => {
                if let Some((uid, gid)) = owner {
                    rustix::fs::chown(&made, Some(uid), Some(gid)).map_err(refused)?;
                }
            }
            Err(Errno::EXIST) => {}
            Err(errno) => return Err(refused(errno)),
        }
    }
    Ok(())
}

/// The stream's input as a reader.
struct Input<'a> {
    stream: &'a Stream,
    part: Vec<u8>,
    offset: usize,
    gone: bool,
}

impl Read for Input<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.offset == self.part.len() {
            match self.stream.next_input() {
                Ok(Some(part)) => self.part = part,
                Ok(None) => return Ok(0),
                Err(_) => {
                    self.gone = true;
                    return Err(io::ErrorKind::ConnectionAborted.into());
                }
            }
            self.offset = 0;
        }
        let rest = &self.part[self.offset..];
        let length = rest.len().min(buffer.len());
        buffer[..length].copy_from_slice(&rest[..length]);
        self.offset += length;
        Ok(length)
    }
}

fn unpack_all(input: &mut Input<'_>, target: &mut Target<'_>) -> Result<(), Failure> {
    let mut archive = Archive::new(input);
    archive.set_preserve_permissions(true);
    archive.set_preserve_mtime(true);
    archive.set_preserve_ownerships(target.privileged && target.owner.is_none());
    let malformed = |error: &io::Error| {
        failure(
            FailureKind::InvalidInput,
            format!("reading the tar stream: {}", with_causes(error)),
        )
    };
    for entry in archive.entries().map_err(|error| malformed(&error))? {
        target.unpack(&mut entry.map_err(|error| malformed(&error))?)?;
    }
    Ok(())
}

/// The `tar` crate's errors say the cause only in their source.
fn with_causes(error: &io::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// A name beside that of a file which is not whole yet. What bears it goes with this.
struct Part<'a> {
    at: BorrowedFd<'a>,
    name: PathBuf,
}

impl<'a> Part<'a> {
    fn new(at: BorrowedFd<'a>) -> rustix::io::Result<Self> {
        let mut seed = [0; 8];
        rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())?;
        let name = format!(".smolvm-part-{:016x}", u64::from_ne_bytes(seed));
        Ok(Self {
            at,
            name: name.into(),
        })
    }

    /// Gives it its own name, in place of what may bear that. A directory stays, and this fails.
    fn put(self, name: &Path) -> rustix::io::Result<()> {
        rustix::fs::renameat(self.at, &self.name, self.at, name)
    }
}

impl Drop for Part<'_> {
    fn drop(&mut self) {
        // Not there any more if it was put in its place.
        let _ = rustix::fs::unlinkat(self.at, &self.name, AtFlags::empty());
    }
}

/// A directory whose mode and time are set when everything is in it.
struct Pending {
    path: PathBuf,
    mode: Mode,
    mtime: u64,
}

struct Target<'a> {
    directory: OwnedFd,
    resolve: ResolveFlags,
    shown: &'a Path,
    owner: Option<(Uid, Gid)>,
    privileged: bool,
    /// The directory of the last entry: the next one is mostly in the same.
    parent: Option<(PathBuf, OwnedFd)>,
    directories: Vec<Pending>,
}

impl Target<'_> {
    fn refused(&self, path: &Path, errno: Errno) -> Failure {
        let shown = self.shown.join(path);
        if errno == Errno::XDEV {
            return failure(
                FailureKind::InvalidInput,
                format!(
                    "unpacking {}: a link on the way leads out of {}",
                    shown.display(),
                    self.shown.display()
                ),
            );
        }
        from_errno(&format!("unpacking {}", shown.display()), errno)
    }

    /// A name of the stream as a path below the directory.
    fn inside(&self, name: &[u8]) -> Result<PathBuf, Failure> {
        let mut path = PathBuf::new();
        for component in path_of(name).components() {
            match component {
                Component::Normal(part) => path.push(part),
                Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
                Component::ParentDir => {
                    return Err(failure(
                        FailureKind::InvalidInput,
                        format!(
                            "unpacking into {}: the name {:?} leads out of it",
                            self.shown.display(),
                            String::from_utf8_lossy(name)
                        ),
                    ));
                }
            }
        }
        Ok(path)
    }

    fn open_directory(&self, path: &Path) -> rustix::io::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        rustix::fs::openat2(
            &self.directory,
            path,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
            self.resolve | ResolveFlags::NO_MAGICLINKS,
        )
    }

    /// The directory at `path`, made with those above it if it is not there.
    fn directory(&self, path: &Path) -> Result<OwnedFd, Failure> {
        match self.open_directory(path) {
            Ok(directory) => return Ok(directory),
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(self.refused(path, errno)),
        }
        let (Some(above), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(self.refused(path, Errno::NOENT));
        };
        let above = self.directory(above)?;
        match rustix::fs::mkdirat(&above, name, Mode::from_raw_mode(0o755)) {
            Ok(()) => self.chown(above.as_fd(), Path::new(name), path)?,
            Err(Errno::EXIST) => {}
            Err(errno) => return Err(self.refused(path, errno)),
        }
        self.open_directory(path)
            .map_err(|errno| self.refused(path, errno))
    }

    /// Gives something unpacked to the owner the request names, if it names one.
    fn chown(&self, at: BorrowedFd<'_>, name: &Path, path: &Path) -> Result<(), Failure> {
        let Some((uid, gid)) = self.owner else {
            return Ok(());
        };
        rustix::fs::chownat(at, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|errno| self.refused(path, errno))
    }

    /// Removes what is in the way of an entry. A directory stays, and the entry then fails.
    fn clear(at: BorrowedFd<'_>, name: &Path) -> rustix::io::Result<()> {
        match rustix::fs::unlinkat(at, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    fn unpack(&mut self, entry: &mut Entry<'_, impl Read>) -> Result<(), Failure> {
        let kind = entry.header().entry_type();
        if matches!(kind, EntryType::XGlobalHeader) {
            return Ok(());
        }
        let path = self.inside(&entry.path_bytes())?;
        let (Some(above), Some(name)) = (path.parent(), path.file_name()) else {
            return Ok(());
        };
        let name = Path::new(name);
        self.refuse_new_sparse(entry, &path)?;
        let at = match self.parent.take() {
            Some((known, at)) if known == above => at,
            _ => self.directory(above)?,
        };
        let refused = |errno| self.refused(&path, errno);
        match kind {
            EntryType::Directory => self.unpack_directory(entry, at.as_fd(), name, &path)?,
            EntryType::Link => {
                let link = entry.link_name_bytes().unwrap_or_default();
                let existing = self.inside(&link)?;
                let from = self.directory(existing.parent().unwrap_or(Path::new("")))?;
                let existing_name = existing.file_name().unwrap_or_default();
                if existing != path {
                    Self::clear(at.as_fd(), name).map_err(refused)?;
                    // Without AT_SYMLINK_FOLLOW a link is linked itself.
                    rustix::fs::linkat(&from, existing_name, &at, name, AtFlags::empty())
                        .map_err(refused)?;
                }
            }
            EntryType::Fifo | EntryType::Char | EntryType::Block => {
                self.unpack_node(entry, at.as_fd(), name, &path)?;
            }
            _ => {
                let part = Part::new(at.as_fd()).map_err(refused)?;
                // Through the descriptor's entry in /proc, the path is this directory and one name,
                // which the crate creates exclusively: no link can lead it elsewhere.
                let through = format!("/proc/self/fd/{}", at.as_raw_fd());
                entry
                    .unpack(Path::new(&through).join(&part.name))
                    .map_err(|error| {
                        let shown = self.shown.join(&path);
                        let mut failure = from_io("", &error);
                        failure.message =
                            format!("unpacking {}: {}", shown.display(), cause(&error));
                        failure
                    })?;
                self.chown(at.as_fd(), &part.name, &path)?;
                // A change of owner takes the set-user-id bit away (chown(2)).
                if self.owner.is_some() && kind != EntryType::Symlink {
                    let mode = entry.header().mode().unwrap_or(0) & 0o7777;
                    if mode & 0o7000 != 0 {
                        let mode = Mode::from_raw_mode(mode);
                        rustix::fs::chmodat(&at, &part.name, mode, AtFlags::empty())
                            .map_err(refused)?;
                    }
                }
                part.put(name).map_err(refused)?;
            }
        }
        self.parent = Some((above.to_path_buf(), at));
        Ok(())
    }

    /// Writes the stream as it stands to the file `name` in the directory.
    fn receive(&self, input: &mut Input<'_>, name: &[u8]) -> Result<(), Failure> {
        let path = self.inside(name)?;
        if path.components().count() != 1 {
            return Err(failure(
                FailureKind::InvalidInput,
                format!(
                    "writing into {}: {:?} is no file's name",
                    self.shown.display(),
                    String::from_utf8_lossy(name)
                ),
            ));
        }
        let shown = self.shown.join(&path);
        let refused = |errno| from_errno(&format!("writing {}", shown.display()), errno);
        let part = Part::new(self.directory.as_fd()).map_err(refused)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o644);
        let file = rustix::fs::openat(&self.directory, &part.name, flags, mode).map_err(refused)?;
        let mut file = std::fs::File::from(file);
        io::copy(input, &mut file)
            .map_err(|error| from_io(&format!("writing {}", shown.display()), &error))?;
        rustix::fs::fchmod(&file, mode).map_err(refused)?;
        self.chown(self.directory.as_fd(), &part.name, &path)?;
        part.put(&path).map_err(refused)
    }

    /// The sparse formats of newer GNU tars, in extended headers, are not read by the `tar` crate,
    /// which would unpack their bytes under another name.
    fn refuse_new_sparse(
        &self,
        entry: &mut Entry<'_, impl Read>,
        path: &Path,
    ) -> Result<(), Failure> {
        let Ok(Some(extensions)) = entry.pax_extensions() else {
            return Ok(());
        };
        let is_sparse = extensions
            .flatten()
            .any(|extension| extension.key_bytes().starts_with(b"GNU.sparse."));
        if !is_sparse {
            return Ok(());
        }
        Err(failure(
            FailureKind::InvalidInput,
            format!(
                "unpacking {}: sparse files in pax format are not understood; use tar --format=gnu",
                self.shown.join(path).display()
            ),
        ))
    }

    fn unpack_directory(
        &mut self,
        entry: &Entry<'_, impl Read>,
        at: BorrowedFd<'_>,
        name: &Path,
        path: &Path,
    ) -> Result<(), Failure> {
        let header = entry.header();
        match rustix::fs::mkdirat(at, name, Mode::from_raw_mode(0o700)) {
            Ok(()) => {}
            Err(Errno::EXIST) => {
                // A link to a directory inside is as good; anything else is replaced.
                if let Err(Errno::NOTDIR | Errno::NOENT) = self.open_directory(path) {
                    Self::clear(at, name)
                        .and_then(|()| rustix::fs::mkdirat(at, name, Mode::from_raw_mode(0o700)))
                        .map_err(|errno| self.refused(path, errno))?;
                }
            }
            Err(errno) => return Err(self.refused(path, errno)),
        }
        let directory = self
            .open_directory(path)
            .map_err(|errno| self.refused(path, errno))?;
        let (uid, gid) = match self.owner {
            Some(owner) => owner,
            None => ids(entry),
        };
        if self.owner.is_some() || self.privileged {
            rustix::fs::fchown(&directory, Some(uid), Some(gid))
                .map_err(|errno| self.refused(path, errno))?;
        }
        self.directories.push(Pending {
            path: path.to_path_buf(),
            mode: Mode::from_raw_mode(header.mode().unwrap_or(0o755) & 0o7777),
            mtime: header.mtime().unwrap_or(0),
        });
        Ok(())
    }

    fn unpack_node(
        &self,
        entry: &Entry<'_, impl Read>,
        at: BorrowedFd<'_>,
        name: &Path,
        path: &Path,
    ) -> Result<(), Failure> {
        let refused = |errno| self.refused(path, errno);
        let header = entry.header();
        let kind = match header.entry_type() {
            EntryType::Char => FileType::CharacterDevice,
            EntryType::Block => FileType::BlockDevice,
            _ => FileType::Fifo,
        };
        let number = |field: io::Result<Option<u32>>| field.ok().flatten().unwrap_or(0);
        let device =
            rustix::fs::makedev(number(header.device_major()), number(header.device_minor()));
        let mode = Mode::from_raw_mode(header.mode().unwrap_or(0o600) & 0o7777);
        Self::clear(at, name).map_err(refused)?;
        rustix::fs::mknodat(at, name, kind, Mode::from_raw_mode(0o600), device).map_err(refused)?;
        let (uid, gid) = match self.owner {
            Some(owner) => owner,
            None => ids(entry),
        };
        if self.owner.is_some() || self.privileged {
            rustix::fs::chownat(at, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
                .map_err(refused)?;
        }
        rustix::fs::chmodat(at, name, mode, AtFlags::empty()).map_err(refused)?;
        let times = times(header.mtime().unwrap_or(0));
        rustix::fs::utimensat(at, name, &times, AtFlags::SYMLINK_NOFOLLOW).map_err(refused)
    }

    /// Sets modes and times of directories, the innermost first: writing into one changes its time,
    /// and a mode may forbid going into it.
    fn finish(&self) -> Result<(), Failure> {
        for pending in self.directories.iter().rev() {
            let refused = |errno| self.refused(&pending.path, errno);
            let directory = match self.open_directory(&pending.path) {
                Ok(directory) => directory,
                // A later entry took its place.
                Err(Errno::NOENT | Errno::NOTDIR) => continue,
                Err(errno) => return Err(refused(errno)),
            };
            rustix::fs::fchmod(&directory, pending.mode).map_err(refused)?;
            rustix::fs::futimens(&directory, &times(pending.mtime)).map_err(refused)?;
        }
        Ok(())
    }
}

fn ids(entry: &Entry<'_, impl Read>) -> (Uid, Gid) {
    let id = |field: io::Result<u64>| {
        field
            .ok()
            .and_then(|id| u32::try_from(id).ok())
            .filter(|id| *id != u32::MAX)
            .unwrap_or(0)
    };
    (
        Uid::from_raw(id(entry.header().uid())),
        Gid::from_raw(id(entry.header().gid())),
    )
}

fn times(mtime: u64) -> Timestamps {
    Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: rustix::fs::UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: i64::try_from(mtime).unwrap_or(i64::MAX),
            tv_nsec: 0,
        },
    }
}

/// The innermost cause of an error of the `tar` crate: its own words name paths in /proc.
fn cause(error: &io::Error) -> String {
    let mut found = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        found = cause.to_string();
        source = cause.source();
    }
    found
}

//! Files and trees between the host and a running sandbox, as tar streams.
//!
//! The tar library works on blocking readers and writers, so packing and unpacking run on a thread
//! of their own, joined to the connection by a short queue: nothing holds more than a few pieces
//! of a file, however large it is.

use std::ffi::{OsStr, OsString};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use smolvm_proto::Channel;
use smolvm_proto::message::{ArchiveRequest, Event, ExtractRequest, Request};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::sync::mpsc;

use crate::client::Heard;
use crate::error::{Error, ErrorKind, Result, io as io_error};
use crate::session::{FileKind, Session};

/// Bytes of one piece on the way between the packing thread and the connection.
const PIECE_BYTES: usize = 64 * 1024;
/// Pieces waiting on that way.
pub(crate) const PIECES_MAX: usize = 8;

/// How to copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyOptions {
    /// Make missing directories on the way to the target.
    pub make_parents: bool,
}

impl Default for CopyOptions {
    fn default() -> Self {
        Self { make_parents: true }
    }
}

/// What was copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Copied {
    /// Files, directories and links.
    pub files: u64,
    /// Bytes of the files' content, holes of sparse files included.
    pub bytes: u64,
    /// Where the file or tree is now.
    pub target: String,
}

/// What a packing or unpacking thread has done.
#[derive(Debug, Default)]
struct Tally {
    files: AtomicU64,
    bytes: AtomicU64,
}

impl Tally {
    fn add(&self, bytes: u64) {
        self.files.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn copied(&self, target: String) -> Copied {
        Copied {
            files: self.files.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            target,
        }
    }
}

/// Told of bytes on the way so far, and of the file's size where it is one file.
pub type CopyProgress<'a> = &'a mut (dyn FnMut(u64, Option<u64>) + Send);

impl Session {
    /// Copies a file or tree into the guest, with modes, times and holes; it belongs to root there.
    ///
    /// As `cp` does: into `guest` if that is a directory or ends with `/`, else under that name.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] for a missing source or directory, [`ErrorKind::NoSpace`] if the
    /// guest's disk is full, [`ErrorKind::Timeout`] if the guest answers nothing any more; what arrived
    /// until then stays.
    pub async fn upload(
        &self,
        local: &Path,
        guest: &str,
        options: &CopyOptions,
        progress: CopyProgress<'_>,
    ) -> Result<Copied> {
        self.unless_hung(self.send(local, guest, options, progress))
            .await
    }

    async fn send(
        &self,
        local: &Path,
        guest: &str,
        options: &CopyOptions,
        progress: CopyProgress<'_>,
    ) -> Result<Copied> {
        absolute(guest)?;
        let metadata = std::fs::metadata(local)
            .map_err(|error| io_error(format!("could not read {}", local.display()), error))?;
        let into_directory = guest.ends_with('/') || self.is_directory(guest).await?;
        let (directory, name) = if into_directory {
            (guest.to_owned(), base_name(local)?)
        } else {
            let (parent, name) = split_guest(guest)?;
            (parent.to_owned(), OsString::from(name))
        };
        let total = metadata.is_file().then_some(metadata.len());

        let mut stream = self.client.open(&Request::Extract(ExtractRequest {
            directory: directory.clone().into_bytes().into(),
            make_parents: options.make_parents,
            owner: Some("0:0".to_owned()),
            file: None,
        }))?;
        let input = stream.input();
        let (sender, mut pieces) = mpsc::channel(PIECES_MAX);
        let tally = Arc::new(Tally::default());
        let packer = tokio::task::spawn_blocking({
            let (local, name, tally) = (local.to_owned(), name.clone(), Arc::clone(&tally));
            move || pack(&local, &name, sender, &tally)
        });
        let mut bytes = 0;
        let send = async {
            while let Some(piece) = pieces.recv().await {
                let piece: Vec<u8> = piece;
                if !input.write(&piece).await? {
                    // The guest gave the stream up; its answer says why.
                    return Ok(());
                }
                bytes += piece.len() as u64;
                progress(bytes, total);
            }
            match packer.await {
                Ok(Ok(())) => input.close(),
                Ok(Err(error)) => Err(error),
                Err(panic) => Err(Error::new(ErrorKind::Internal, "packing failed").because(panic)),
            }
        };
        let answer = async {
            loop {
                match stream.next().await? {
                    Heard::Event(Event::Done) => return Ok(()),
                    Heard::Event(other) => return Err(self.confused(&other)),
                    Heard::Data(..) | Heard::End(_) => {}
                }
            }
        };
        // If the packing fails, the stream is dropped and the guest stops; if the guest refuses,
        // the queue is dropped and the packing stops.
        tokio::try_join!(send, answer)?;
        Ok(tally.copied(join_guest(&directory, &name)))
    }

    /// Writes what `source` gives to a file of the guest, which appears whole or not at all, belongs to
    /// root and has mode 0644. The file's directory is made if `options` say so.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidInput`] if `guest` is a directory; [`ErrorKind::NotFound`] for a missing
    /// directory, [`ErrorKind::NoSpace`] if the guest's disk is full, [`ErrorKind::Timeout`] if the guest
    /// answers nothing any more, and what reading `source` fails with.
    pub async fn upload_stream(
        &self,
        source: impl AsyncRead + Send + Unpin,
        guest: &str,
        options: &CopyOptions,
        progress: CopyProgress<'_>,
    ) -> Result<Copied> {
        self.unless_hung(self.send_stream(source, guest, options, progress))
            .await
    }

    async fn send_stream(
        &self,
        mut source: impl AsyncRead + Send + Unpin,
        guest: &str,
        options: &CopyOptions,
        progress: CopyProgress<'_>,
    ) -> Result<Copied> {
        absolute(guest)?;
        if guest.ends_with('/') || self.is_directory(guest).await? {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("`{}` is a directory in the guest", guest.escape_debug()),
            )
            .hint("say what the file in it is to be called"));
        }
        let (directory, name) = split_guest(guest)?;
        let mut stream = self.client.open(&Request::Extract(ExtractRequest {
            directory: directory.as_bytes().to_vec().into(),
            make_parents: options.make_parents,
            owner: Some("0:0".to_owned()),
            file: Some(name.as_bytes().to_vec().into()),
        }))?;
        let input = stream.input();
        let mut bytes = 0;
        let send = async {
            let mut piece = vec![0; PIECE_BYTES];
            loop {
                let count = source.read(&mut piece).await.map_err(|error| {
                    io_error(format!("could not read what is to be {guest}"), error)
                })?;
                if count == 0 {
                    return input.close();
                }
                if !input.write(&piece[..count]).await? {
                    // The guest gave the stream up; its answer says why.
                    return Ok(());
                }
                bytes += count as u64;
                progress(bytes, None);
            }
        };
        let answer = async {
            loop {
                match stream.next().await? {
                    Heard::Event(Event::Done) => return Ok(()),
                    Heard::Event(other) => return Err(self.confused(&other)),
                    Heard::Data(..) | Heard::End(_) => {}
                }
            }
        };
        tokio::pin!(answer);
        // A guest that refuses ends the wait for a source that may say nothing for long.
        tokio::select! {
            answered = &mut answer => answered?,
            sent = send => {
                sent?;
                answer.await?;
            }
        }
        Ok(Copied {
            files: 1,
            bytes,
            target: guest.to_owned(),
        })
    }

    /// Writes the content of a file of the guest to `sink`, holes as zeros.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] for a missing file; [`ErrorKind::InvalidInput`] for one that is no
    /// regular file; [`ErrorKind::Timeout`] if the guest answers nothing any more; what writing fails
    /// with.
    pub async fn download_stream(
        &self,
        guest: &str,
        sink: impl Write + Send + 'static,
        progress: CopyProgress<'_>,
    ) -> Result<Copied> {
        self.unless_hung(self.receive_stream(guest, sink, progress))
            .await
    }

    async fn receive_stream(
        &self,
        guest: &str,
        mut sink: impl Write + Send + 'static,
        progress: CopyProgress<'_>,
    ) -> Result<Copied> {
        absolute(guest)?;
        // A link is followed, as below.
        let mut through = self.list(guest, true).await?;
        if through
            .first()
            .is_some_and(|file| file.kind == FileKind::Symlink)
        {
            through.clear();
        }
        if through
            .first()
            .is_some_and(|file| file.kind != FileKind::File)
            || self.is_directory(guest).await?
        {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("`{}` is no file in the guest", guest.escape_debug()),
            )
            .hint("a tree goes through tar: `smolvm exec NAME -- tar -C DIRECTORY -c . > FILE`"));
        }
        let total = through.first().map(|file| file.size);
        let name = guest.to_owned();
        let work = move |reader: PieceReader, tally: &Tally| {
            let failed =
                |error: io::Error| io_error(format!("could not write what is {name}"), error);
            let mut reader = reader;
            let mut archive = tar::Archive::new(&mut reader);
            for entry in archive.entries().map_err(failed)? {
                let mut entry = entry.map_err(failed)?;
                let kind = entry.header().entry_type();
                if kind.is_file() || kind.is_gnu_sparse() || kind.is_contiguous() {
                    let bytes = io::copy(&mut entry, &mut sink).map_err(failed)?;
                    tally.add(bytes);
                }
            }
            sink.flush().map_err(failed)?;
            reader.finish().map_err(failed)
        };
        let tally = self.archive(guest, total, false, work, progress).await?;
        Ok(tally.copied("-".to_owned()))
    }

    /// Copies a file or tree out of the guest, with modes, times and holes; it belongs to the caller.
    ///
    /// As `cp` does: into `local` if that is a directory, else under that name. A new file or tree
    /// appears whole or not at all. Nothing outside the target is touched, whatever the guest sends.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] for a missing source or directory; [`ErrorKind::Timeout`] if the guest
    /// answers nothing any more.
    pub async fn download(
        &self,
        guest: &str,
        local: &Path,
        options: &CopyOptions,
        progress: CopyProgress<'_>,
    ) -> Result<Copied> {
        self.unless_hung(self.receive(guest, local, options, progress))
            .await
    }

    async fn receive(
        &self,
        guest: &str,
        local: &Path,
        options: &CopyOptions,
        progress: CopyProgress<'_>,
    ) -> Result<Copied> {
        absolute(guest)?;
        let source = self.list(guest, true).await?;
        let total = source
            .first()
            .filter(|file| file.kind == FileKind::File)
            .map(|file| file.size);
        let name = split_guest(guest).map_or("root", |(_, name)| name);
        let trailing_slash = local.as_os_str().as_bytes().ends_with(b"/");
        let target = if local.is_dir() || trailing_slash {
            local.join(name)
        } else {
            local.to_owned()
        };
        replaceable(&target)?;
        let parent = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        if options.make_parents {
            std::fs::create_dir_all(&parent).map_err(|error| {
                io_error(
                    format!("could not make the directory {}", parent.display()),
                    error,
                )
            })?;
        }

        let work = {
            let target = target.clone();
            move |reader: PieceReader, tally: &Tally| unpack(reader, &parent, &target, tally)
        };
        let tally = self.archive(guest, total, true, work, progress).await?;
        Ok(tally.copied(target.display().to_string()))
    }

    /// Has the guest send a file or tree, and `work` on a thread take it. When this returns, `work` has
    /// ended; with `waits` also when this is dropped.
    async fn archive(
        &self,
        guest: &str,
        total: Option<u64>,
        waits: bool,
        work: impl FnOnce(PieceReader, &Tally) -> Result<()> + Send + 'static,
        progress: CopyProgress<'_>,
    ) -> Result<Arc<Tally>> {
        let mut stream = self.client.open(&Request::Archive(ArchiveRequest {
            path: guest.as_bytes().to_vec().into(),
            follow: true,
            complete: None,
            hold: None,
        }))?;
        let (sender, pieces) = mpsc::channel(PIECES_MAX);
        let tally = Arc::new(Tally::default());
        let (ending, ended) = std::sync::mpsc::channel::<()>();
        let unpacker = tokio::task::spawn_blocking({
            let tally = Arc::clone(&tally);
            move || {
                let _ending = ending;
                work(PieceReader::new(pieces), &tally)
            }
        });
        let mut feeding = Feeding {
            queue: Some(sender),
            ended: waits.then_some(ended),
        };
        let mut bytes = 0;
        let received = loop {
            match stream.next().await {
                Ok(Heard::Data(Channel::Output, piece)) => {
                    bytes += piece.len() as u64;
                    progress(bytes, total);
                    // The unpacking thread may end early: on a local failure, which it reports, or
                    // because the archive's end came before the stream's.
                    if let Some(queue) = &feeding.queue
                        && queue.send(piece).await.is_err()
                    {
                        feeding.queue = None;
                    }
                }
                Ok(Heard::Event(Event::Done)) => break Ok(()),
                Ok(Heard::Event(other)) => break Err(self.confused(&other)),
                Ok(Heard::Data(..) | Heard::End(_)) => {}
                Err(error) => break Err(error),
            }
        };
        // A stream that broke off is told apart from one that ended by a last word on the queue.
        if received.is_ok()
            && let Some(queue) = &feeding.queue
        {
            let _ = queue.send(Vec::new()).await;
        }
        feeding.queue = None;
        let unpacked = unpacker
            .await
            .map_err(|panic| Error::new(ErrorKind::Internal, "unpacking failed").because(panic))?;
        received?;
        unpacked?;
        Ok(tally)
    }

    /// Has the guest unpack, below `directory`, the tar stream that `write` writes, on a thread of its
    /// own. Directories above that are missing are made. What comes belongs to `owner`, or to whom the
    /// stream says.
    pub(crate) async fn put(
        &self,
        directory: &str,
        owner: Option<&str>,
        write: impl FnOnce(&mut dyn Write) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        absolute(directory)?;
        let mut stream = self.client.open(&Request::Extract(ExtractRequest {
            directory: directory.as_bytes().to_vec().into(),
            make_parents: true,
            owner: owner.map(ToOwned::to_owned),
            file: None,
        }))?;
        let input = stream.input();
        let (sender, mut pieces) = mpsc::channel(PIECES_MAX);
        let writer = tokio::task::spawn_blocking(move || {
            write(&mut PieceWriter {
                sender,
                piece: Vec::with_capacity(PIECE_BYTES),
            })
        });
        let send = async {
            while let Some(piece) = pieces.recv().await {
                if !input.write(&piece).await? {
                    // The guest gave the stream up; its answer says why.
                    return Ok(());
                }
            }
            match writer.await {
                Ok(Ok(())) => input.close(),
                Ok(Err(error)) => Err(error),
                Err(panic) => Err(Error::new(ErrorKind::Internal, "packing failed").because(panic)),
            }
        };
        let answer = async {
            loop {
                match stream.next().await? {
                    Heard::Event(Event::Done) => return Ok(()),
                    Heard::Event(other) => return Err(self.confused(&other)),
                    Heard::Data(..) | Heard::End(_) => {}
                }
            }
        };
        tokio::try_join!(send, answer).map(|_| ())
    }

    /// Copies a file or tree of this guest into another one: what `path` is, or with `contents` what is
    /// in that directory. A file is named `name` there. Owners are kept unless one is given.
    pub(crate) async fn copy_to(&self, path: &str, other: &Session, to: CopyTo) -> Result<()> {
        let mut stream = self.client.open(&Request::Archive(ArchiveRequest {
            path: path.as_bytes().to_vec().into(),
            follow: true,
            complete: None,
            hold: None,
        }))?;
        let (sender, pieces) = mpsc::channel(PIECES_MAX);
        let receive = async {
            // Dropped with this block, so that the other side does not wait for more.
            let mut sender = Some(sender);
            loop {
                match stream.next().await? {
                    Heard::Data(Channel::Output, piece) => {
                        // Whoever takes it may have seen the archive's end, or have failed.
                        if let Some(queue) = &sender
                            && queue.send(piece).await.is_err()
                        {
                            sender = None;
                        }
                    }
                    Heard::Event(Event::Done) => {
                        if let Some(queue) = &sender {
                            let _ = queue.send(Vec::new()).await;
                        }
                        return Ok(());
                    }
                    Heard::Event(other) => return Err(self.confused(&other)),
                    Heard::Data(..) | Heard::End(_) => {}
                }
            }
        };
        let (directory, owner) = (to.directory.clone(), to.owner.clone());
        let put = other.put(&directory, owner.as_deref(), move |out| {
            rename_entries(PieceReader::new(pieces), &to, out)
        });
        tokio::try_join!(receive, put).map(|_| ())
    }

    pub(crate) async fn is_directory(&self, guest: &str) -> Result<bool> {
        match self
            .list_dir(&format!("{}/.", guest.trim_end_matches('/')), true)
            .await
        {
            Ok(_) => Ok(true),
            Err(error) => match error.kind() {
                ErrorKind::NotFound | ErrorKind::InvalidInput => Ok(false),
                _ => Err(error),
            },
        }
    }
}

/// The queue to a thread that takes what the guest sends.
struct Feeding {
    queue: Option<mpsc::Sender<Vec<u8>>>,
    /// Ends with the thread. Given up, we wait for that, so that it has taken away what it began; not
    /// where it writes to somebody who may never read.
    ended: Option<std::sync::mpsc::Receiver<()>>,
}

impl Drop for Feeding {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(ended) = &self.ended {
            // Nothing is ever sent; an error is the other end's going.
            let _ = ended.recv();
        }
    }
}

/// Where a copy from guest to guest goes.
#[derive(Debug, Clone)]
pub(crate) struct CopyTo {
    /// Absolute path of a directory.
    pub(crate) directory: String,
    /// Name in it; none for what is in a directory.
    pub(crate) name: Option<OsString>,
    /// Owner of everything.
    pub(crate) owner: Option<String>,
    /// Permission bits of everything.
    pub(crate) chmod: Option<u32>,
}

/// Passes a tar stream on, under other names.
fn rename_entries(mut from: PieceReader, to: &CopyTo, out: &mut dyn Write) -> Result<()> {
    let failed = |error| io_error("could not pass the files on from guest to guest", error);
    let mut archive = tar::Archive::new(&mut from);
    let mut builder = tar::Builder::new(out);
    for entry in archive.entries().map_err(failed)? {
        let mut entry = entry.map_err(failed)?;
        let path = entry.path().map_err(failed)?.into_owned();
        // The first part is the name of what was asked for.
        let below: PathBuf = path.components().skip(1).collect();
        let path = match &to.name {
            // Joined to nothing, a name would get a slash at its end.
            Some(name) if below.as_os_str().is_empty() => PathBuf::from(name),
            Some(name) => Path::new(name).join(below),
            None => below,
        };
        if path.as_os_str().is_empty() {
            continue;
        }
        let kind = entry.header().entry_type();
        let mut header = tar::Header::new_gnu();
        let old = entry.header();
        header.set_uid(old.uid().map_err(failed)?);
        header.set_gid(old.gid().map_err(failed)?);
        header.set_mtime(old.mtime().map_err(failed)?);
        header.set_mode(to.chmod.unwrap_or(old.mode().map_err(failed)?));
        header.set_size(0);
        if kind.is_symlink() {
            let target = entry.link_name().map_err(failed)?.unwrap_or_default();
            header.set_entry_type(tar::EntryType::Symlink);
            builder
                .append_link(&mut header, &path, &target)
                .map_err(failed)?;
        } else if kind.is_dir() {
            header.set_entry_type(tar::EntryType::Directory);
            builder
                .append_data(&mut header, &path, io::empty())
                .map_err(failed)?;
        } else {
            header.set_size(entry.size());
            builder
                .append_data(&mut header, &path, &mut entry)
                .map_err(failed)?;
        }
    }
    builder
        .into_inner()
        .and_then(Write::flush)
        .map_err(failed)?;
    from.finish().map_err(failed)
}

/// A copy takes the place of a file and goes into a directory. Anything else that bears the target's
/// name, such as a device, a pipe or a link, would be lost.
fn replaceable(target: &Path) -> Result<()> {
    match std::fs::symlink_metadata(target) {
        Ok(metadata) if !(metadata.is_file() || metadata.is_dir()) => Err(Error::new(
            ErrorKind::InvalidInput,
            format!(
                "{} is neither a file nor a directory, and would be replaced",
                target.display()
            ),
        )
        .hint("give another target; to write into it use `smolvm exec NAME -- cat PATH`")),
        _ => Ok(()),
    }
}

fn absolute(guest: &str) -> Result<()> {
    if guest.starts_with('/') && !guest.contains('\0') {
        Ok(())
    } else {
        Err(Error::new(
            ErrorKind::InvalidInput,
            format!(
                "`{}` is not an absolute path in the guest",
                guest.escape_debug()
            ),
        )
        .hint("give a path that begins with `/`, for example /root/file"))
    }
}

/// Directory and last component of a guest's path.
fn split_guest(guest: &str) -> Result<(&str, &str)> {
    let trimmed = guest.trim_end_matches('/');
    match trimmed.rsplit_once('/') {
        Some((parent, name)) if !name.is_empty() && name != "." && name != ".." => {
            Ok((if parent.is_empty() { "/" } else { parent }, name))
        }
        _ => Err(Error::new(
            ErrorKind::InvalidInput,
            format!("`{}` does not name a file", guest.escape_debug()),
        )),
    }
}

fn join_guest(directory: &str, name: &OsStr) -> String {
    format!("{}/{}", directory.trim_end_matches('/'), name.display())
}

fn base_name(local: &Path) -> Result<OsString> {
    let named = local.file_name().map(OsStr::to_owned).or_else(|| {
        // `.` and `..` have a name only once they are resolved.
        let resolved = local.canonicalize().ok()?;
        resolved.file_name().map(OsStr::to_owned)
    });
    named.ok_or_else(|| {
        Error::new(
            ErrorKind::InvalidInput,
            format!("`{}` has no name to copy it under", local.display()),
        )
        .hint("give a target that does not end with `/`")
    })
}

/// Writes a tar stream of `local`, named `name`, into the queue.
fn pack(local: &Path, name: &OsStr, sender: mpsc::Sender<Vec<u8>>, tally: &Tally) -> Result<()> {
    let queue = PieceWriter {
        sender,
        piece: Vec::with_capacity(PIECE_BYTES),
    };
    let mut builder = tar::Builder::new(queue);
    builder.follow_symlinks(false);
    let mut pending = vec![(local.to_owned(), PathBuf::from(name), true)];
    while let Some((path, name, top)) = pending.pop() {
        let failed =
            |error: io::Error| io_error(format!("could not read {}", path.display()), error);
        // What the caller named is followed if it is a link; what lies below is copied as it is.
        let metadata = if top {
            std::fs::metadata(&path)
        } else {
            std::fs::symlink_metadata(&path)
        }
        .map_err(failed)?;
        let kind = metadata.file_type();
        if kind.is_dir() {
            builder.append_dir(&name, &path).map_err(failed)?;
            for entry in std::fs::read_dir(&path).map_err(failed)? {
                let entry = entry.map_err(failed)?;
                pending.push((entry.path(), name.join(entry.file_name()), false));
            }
        } else if kind.is_file() {
            let mut file = std::fs::File::open(&path).map_err(failed)?;
            builder.append_file(&name, &mut file).map_err(failed)?;
        } else if kind.is_symlink() {
            builder
                .append_path_with_name(&path, &name)
                .map_err(failed)?;
        } else {
            // A socket or device means nothing in another machine.
            continue;
        }
        tally.add(if kind.is_file() { metadata.len() } else { 0 });
    }
    builder
        .into_inner()
        .and_then(|mut queue| queue.flush())
        .map_err(|error| io_error("could not send the files to the guest", error))
}

/// Unpacks a tar stream whose entries lie below one name, and puts that at `target` in `parent`.
fn unpack(mut reader: PieceReader, parent: &Path, target: &Path, tally: &Tally) -> Result<()> {
    let failed =
        |error: io::Error| io_error(format!("could not write {}", target.display()), error);
    // Unpacked beside the target and renamed, so that the target appears whole.
    let staging = tempdir_in(parent).map_err(failed)?;
    let mut archive = tar::Archive::new(&mut reader);
    // Bits above the permissions, such as set-user-id, do not leave the sandbox.
    archive.set_preserve_permissions(false);
    archive.set_overwrite(true);
    for entry in archive.entries().map_err(failed)? {
        let mut entry = entry.map_err(failed)?;
        let kind = entry.header().entry_type();
        if !(kind.is_file()
            || kind.is_dir()
            || kind.is_symlink()
            || kind.is_hard_link()
            || kind.is_gnu_sparse()
            || kind.is_contiguous())
        {
            continue;
        }
        let size = entry.size();
        if entry.unpack_in(&staging.path).map_err(failed)? {
            tally.add(size);
        }
    }
    reader.finish().map_err(failed)?;
    for entry in std::fs::read_dir(&staging.path).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        put(&entry.path(), target).map_err(failed)?;
    }
    Ok(())
}

/// Moves a file or tree to `target`, into a directory that is there already entry by entry.
fn put(from: &Path, target: &Path) -> io::Result<()> {
    // Links are not followed: the guest may have planted one in an earlier copy, and what it sends
    // next must not go where it points.
    let is_directory =
        |path: &Path| std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir());
    if !(is_directory(from) && is_directory(target)) {
        return std::fs::rename(from, target);
    }
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        put(&entry.path(), &target.join(entry.file_name()))?;
    }
    Ok(())
}

/// A directory that is removed when it goes out of scope.
struct Staging {
    path: PathBuf,
}

impl Drop for Staging {
    fn drop(&mut self) {
        // A directory whose mode forbids it stays, under a name that says whose it is.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

fn tempdir_in(parent: &Path) -> io::Result<Staging> {
    let mut seed = [0; 8];
    rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())?;
    let path = parent.join(format!(
        ".smolvm-download-{:016x}",
        u64::from_ne_bytes(seed)
    ));
    std::fs::create_dir(&path)?;
    Ok(Staging { path })
}

/// The packing thread's end of the queue.
struct PieceWriter {
    sender: mpsc::Sender<Vec<u8>>,
    piece: Vec<u8>,
}

impl Write for PieceWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(PIECE_BYTES - self.piece.len());
        self.piece.extend_from_slice(&bytes[..count]);
        if self.piece.len() == PIECE_BYTES {
            self.flush()?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.piece.is_empty() {
            return Ok(());
        }
        let piece = std::mem::replace(&mut self.piece, Vec::with_capacity(PIECE_BYTES));
        self.sender
            .blocking_send(piece)
            .map_err(|_| io::Error::new(io::ErrorKind::BrokenPipe, "the guest takes no more bytes"))
    }
}

/// The unpacking thread's end of the queue. An empty piece is the end; a queue that closes without
/// one broke off.
pub(crate) struct PieceReader {
    pieces: mpsc::Receiver<Vec<u8>>,
    piece: Vec<u8>,
    at: usize,
    ended: bool,
}

impl PieceReader {
    pub(crate) fn new(pieces: mpsc::Receiver<Vec<u8>>) -> Self {
        Self {
            pieces,
            piece: Vec::new(),
            at: 0,
            ended: false,
        }
    }

    /// Reads what follows the archive's end, so that a cut stream is noticed.
    fn finish(&mut self) -> io::Result<()> {
        io::copy(self, &mut io::sink()).map(|_| ())
    }
}

impl Read for PieceReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.piece.len() {
            if self.ended {
                return Ok(0);
            }
            match self.pieces.blocking_recv() {
                Some(piece) if piece.is_empty() => self.ended = true,
                Some(piece) => {
                    self.piece = piece;
                    self.at = 0;
                }
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
        let count = buffer.len().min(self.piece.len() - self.at);
        buffer[..count].copy_from_slice(&self.piece[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_paths_are_split() {
        assert_eq!(split_guest("/a/b/").expect("a path"), ("/a", "b"));
        assert_eq!(split_guest("/b").expect("a path"), ("/", "b"));
        assert!(split_guest("/").is_err());
        assert!(split_guest("/a/..").is_err());
        assert!(absolute("a").is_err());
    }

    fn pieces(bytes: &[u8], whole: bool) -> PieceReader {
        let (sender, receiver) = mpsc::channel(1000);
        for piece in bytes.chunks(700) {
            sender.try_send(piece.to_vec()).expect("room");
        }
        if whole {
            sender.try_send(Vec::new()).expect("room");
        }
        PieceReader::new(receiver)
    }

    fn archive(entries: &[(&str, tar::EntryType, &str)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, kind, text) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_mode(0o4755);
            let content = if *kind == tar::EntryType::Regular {
                text.as_bytes()
            } else {
                b""
            };
            header.set_size(content.len() as u64);
            // Written as raw bytes, since the library refuses to write hostile names itself.
            header.as_gnu_mut().expect("gnu").name[..name.len()].copy_from_slice(name.as_bytes());
            if content.is_empty() && !text.is_empty() {
                header.as_gnu_mut().expect("gnu").linkname[..text.len()]
                    .copy_from_slice(text.as_bytes());
            }
            header.set_cksum();
            builder.append(&header, content).expect("memory");
        }
        builder.into_inner().expect("memory")
    }

    #[test]
    fn a_hostile_archive_stays_inside_its_target() {
        use tar::EntryType;
        let dir = tempfile::tempdir().expect("a directory");
        let outside = dir.path().join("outside");
        std::fs::create_dir(&outside).expect("a directory");
        let parent = dir.path().join("parent");
        std::fs::create_dir(&parent).expect("a directory");
        let bytes = archive(&[
            ("../outside/a", EntryType::Regular, "x"),
            ("/outside/b", EntryType::Regular, "x"),
            ("t/link", EntryType::Symlink, "../../../outside"),
            ("t/link/c", EntryType::Regular, "x"),
        ]);
        let outcome = unpack(
            pieces(&bytes, true),
            &parent,
            &parent.join("t"),
            &Tally::default(),
        );
        assert!(outcome.is_err(), "{outcome:?}");
        assert_eq!(std::fs::read_dir(&outside).expect("outside").count(), 0);
        assert_eq!(std::fs::read_dir(&parent).expect("parent").count(), 0);
    }

    #[test]
    fn a_link_from_an_earlier_copy_is_not_followed() {
        use tar::EntryType;
        let dir = tempfile::tempdir().expect("a directory");
        let outside = dir.path().join("outside");
        std::fs::create_dir(&outside).expect("a directory");
        let parent = dir.path().join("parent");
        std::fs::create_dir(&parent).expect("a directory");
        let target = parent.join("work");
        let link = outside.to_str().expect("text").to_owned();
        let first = archive(&[
            ("work/", EntryType::Directory, ""),
            ("work/d", EntryType::Symlink, &link),
        ]);
        unpack(pieces(&first, true), &parent, &target, &Tally::default()).expect("a copy");
        assert!(target.join("d").is_symlink());
        let second = archive(&[
            ("work/", EntryType::Directory, ""),
            ("work/d/", EntryType::Directory, ""),
            ("work/d/planted", EntryType::Regular, "x"),
        ]);
        let outcome = unpack(pieces(&second, true), &parent, &target, &Tally::default());
        assert!(outcome.is_err(), "{outcome:?}");
        assert_eq!(std::fs::read_dir(&outside).expect("outside").count(), 0);
    }

    #[test]
    fn what_is_no_file_is_not_replaced() {
        let dir = tempfile::tempdir().expect("a directory");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("/nowhere", &link).expect("a link");
        assert!(replaceable(&link).is_err());
        assert!(replaceable(Path::new("/dev/null")).is_err());
        assert!(replaceable(dir.path()).is_ok());
        assert!(replaceable(&dir.path().join("new")).is_ok());
    }

    #[test]
    fn a_cut_archive_leaves_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let text = "y".repeat(10_000);
        let bytes = archive(&[("f", tar::EntryType::Regular, &text)]);
        for (cut, whole) in [(3000, false), (bytes.len(), false), (3000, true)] {
            let target = dir.path().join("f");
            let outcome = unpack(
                pieces(&bytes[..cut], whole),
                dir.path(),
                &target,
                &Tally::default(),
            );
            assert!(outcome.is_err(), "cut at {cut}");
            assert_eq!(std::fs::read_dir(dir.path()).expect("entries").count(), 0);
        }
        let target = dir.path().join("g");
        let tally = Tally::default();
        unpack(pieces(&bytes, true), dir.path(), &target, &tally).expect("whole");
        let copied = tally.copied(String::new());
        assert_eq!((copied.files, copied.bytes), (1, 10_000));
        assert_eq!(std::fs::read_to_string(&target).expect("text"), text);
        let mode = std::os::unix::fs::PermissionsExt::mode(
            &std::fs::metadata(&target).expect("metadata").permissions(),
        );
        assert_eq!(mode & 0o7000, 0, "set-user-id does not leave the sandbox");
    }
}

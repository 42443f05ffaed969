//! A server of the SSH file transfer protocol, version 3 (draft-ietf-secsh-filexfer-02), and of those
//! extensions of OpenSSH (its file `PROTOCOL`) that its own clients use.
//!
//! It is a process of its own that runs as the user whose files they are, in the user's home: the
//! guest's kernel decides what may be done, as for any other command. It answers in the order in which
//! it is asked, and reads all that has arrived before it writes.
//!
//! Where the draft and OpenSSH differ, it does as OpenSSH, which is what every client was tested
//! with: `SSH_FXP_SYMLINK` names the target first.

mod listing;
mod wire;

use std::collections::HashMap;
use std::ffi::{CStr, OsStr, OsString};
use std::fs::{File, Metadata, ReadDir};
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use rustix::fs::{AtFlags, CWD, Gid, Mode, RenameFlags, StatVfs, Timespec, Timestamps, Uid};
use rustix::io::Errno;

use listing::Names;
use wire::{Attributes, Packet, Reply, Status, open_flags};

/// The argument that makes this program such a server.
pub(crate) const WORD: &CStr = c"--sftp";

/// The version that is spoken.
const VERSION: u32 = 3;

/// Most bytes of a packet, as in OpenSSH (`SFTP_MAX_MSG_LENGTH`).
const PACKET_BYTES_MAX: usize = 256 * 1024;

/// Most bytes of one read or write: a packet less what goes around them.
const DATA_BYTES_MAX: usize = PACKET_BYTES_MAX - 1024;

/// Bytes of answers that are kept before they are written.
const ANSWERS_BYTES: usize = 256 * 1024;

/// Files and directories that may be open at one time. Below the soft limit of descriptors that
/// every command starts with.
const HANDLES_MAX: usize = 512;

/// Directory entries in one answer.
const ENTRIES_MAX: usize = 100;

/// Extensions that are announced, with their versions.
const EXTENSIONS: [(&[u8], &[u8]); 8] = [
    (b"posix-rename@openssh.com", b"1"),
    (b"statvfs@openssh.com", b"2"),
    (b"fstatvfs@openssh.com", b"2"),
    (b"hardlink@openssh.com", b"1"),
    (b"fsync@openssh.com", b"1"),
    (b"lsetstat@openssh.com", b"1"),
    (b"limits@openssh.com", b"1"),
    (b"expand-path@openssh.com", b"1"),
];

/// Serves a user with this home on standard input and output until the client closes its end.
pub(crate) fn run(home: PathBuf) -> ExitCode {
    let mut server = Server::new(home);
    match serve(
        &mut server,
        &mut io::stdin().lock(),
        &mut io::stdout().lock(),
    ) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Standard error is the client's to see.
            let _ = writeln!(io::stderr(), "sftp: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Answers whatever comes from `input`.
fn serve(server: &mut Server, input: &mut impl Read, output: &mut impl Write) -> io::Result<()> {
    let mut waiting = Vec::new();
    let mut chunk = vec![0; 64 * 1024];
    let mut answers = Vec::new();
    loop {
        let count = match input.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        waiting.extend_from_slice(&chunk[..count]);
        let mut at = 0;
        while let Some(length) = wire::length(&waiting[at..]) {
            if length == 0 || length > PACKET_BYTES_MAX {
                return Err(io::Error::other(format!(
                    "a packet of {length} bytes is none: the most is {PACKET_BYTES_MAX}"
                )));
            }
            let Some(packet) = waiting.get(at + 4..at + 4 + length) else {
                break;
            };
            server.answer(packet, &mut answers)?;
            at += 4 + length;
            if answers.len() >= ANSWERS_BYTES {
                output.write_all(&answers)?;
                answers.clear();
            }
        }
        waiting.drain(..at);
        output.write_all(&answers)?;
        output.flush()?;
        answers.clear();
    }
}

/// Something a client has open.
#[derive(Debug)]
enum Handle {
    File { file: File, append: bool },
    Directory { path: PathBuf, entries: ReadDir },
}

/// The state of a conversation.
#[derive(Debug)]
struct Server {
    home: PathBuf,
    greeted: bool,
    handles: HashMap<u64, Handle>,
    next: u64,
    names: Option<Names>,
}

/// What a request came to, when it is not an answer of its own kind.
type Outcome = Result<(), Trouble>;

/// Why a request was not carried out.
#[derive(Debug)]
enum Trouble {
    /// The kernel said no.
    Io(io::Error),
    /// Something of the protocol.
    Status(Status, &'static str),
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Errno> for Trouble {
    fn from(errno: Errno) -> Self {
        Self::Io(errno.into())
    }
}

impl From<wire::Short> for Trouble {
    fn from(_: wire::Short) -> Self {
        Self::Status(Status::BadMessage, "the packet is shorter than it says")
    }
}

const NO_HANDLE: Trouble = Trouble::Status(Status::Failure, "there is no such handle");

impl Server {
    fn new(home: PathBuf) -> Self {
        Self {
            home,
            greeted: false,
            handles: HashMap::new(),
            next: 0,
            names: None,
        }
    }

    /// Carries one packet out and appends its answer. Fails only where there is nobody to answer.
    fn answer(&mut self, bytes: &[u8], answers: &mut Vec<u8>) -> io::Result<()> {
        let mut packet = Packet::new(bytes);
        let no_packet = |_| io::Error::other("a packet without a request number");
        let kind = packet.byte().map_err(no_packet)?;
        if kind == wire::INIT {
            self.greeted = true;
            let mut reply = Reply::new(answers, wire::VERSION);
            reply.number(VERSION);
            for (name, version) in EXTENSIONS {
                reply.string(name);
                reply.string(version);
            }
            return Ok(());
        }
        if !self.greeted {
            return Err(io::Error::other("a request came before the greeting"));
        }
        let id = packet.number().map_err(no_packet)?;
        let begun = answers.len();
        let outcome = self.carry_out(kind, id, &mut packet, answers);
        let (status, words) = match outcome {
            // Some requests have an answer of their own, which is there by now.
            Ok(()) if answers.len() > begun => return Ok(()),
            Ok(()) => (Status::Ok, "done".to_owned()),
            Err(Trouble::Status(status, words)) => (status, words.to_owned()),
            Err(Trouble::Io(error)) => (status_of(&error), words_of(&error)),
        };
        // Of an answer that was begun nothing may remain.
        answers.truncate(begun);
        let mut reply = Reply::new(answers, wire::STATUS);
        reply.number(id);
        reply.number(status as u32);
        reply.string(words.as_bytes());
        reply.string(b"en");
        Ok(())
    }

    fn carry_out(
        &mut self,
        kind: u8,
        id: u32,
        packet: &mut Packet<'_>,
        answers: &mut Vec<u8>,
    ) -> Outcome {
        match kind {
            wire::OPEN => {
                let path = packet.path()?;
                let flags = packet.number()?;
                let attributes = packet.attributes()?;
                let handle = self.open(&path, flags, &attributes)?;
                self.keep(handle, id, answers)
            }
            wire::CLOSE => match self.handles.remove(&packet.handle()?) {
                Some(_) => Ok(()),
                None => Err(NO_HANDLE),
            },
            wire::READ => {
                let handle = packet.handle()?;
                let offset = packet.long()?;
                let length = packet.number()? as usize;
                self.read(handle, offset, length.min(DATA_BYTES_MAX), id, answers)
            }
            wire::WRITE => {
                let handle = packet.handle()?;
                let offset = packet.long()?;
                let data = packet.string()?;
                match self.handles.get_mut(&handle) {
                    Some(Handle::File { file, append: true }) => Ok(file.write_all(data)?),
                    Some(Handle::File { file, .. }) => Ok(file.write_all_at(data, offset)?),
                    _ => Err(NO_HANDLE),
                }
            }
            wire::STAT => {
                let path = packet.path()?;
                attributes(id, &std::fs::metadata(path)?, answers);
                Ok(())
            }
            wire::LSTAT => {
                let path = packet.path()?;
                attributes(id, &std::fs::symlink_metadata(path)?, answers);
                Ok(())
            }
            wire::FSTAT => {
                let metadata = match self.handles.get(&packet.handle()?).ok_or(NO_HANDLE)? {
                    Handle::File { file, .. } => file.metadata()?,
                    Handle::Directory { path, .. } => std::fs::metadata(path)?,
                };
                attributes(id, &metadata, answers);
                Ok(())
            }
            wire::SETSTAT => {
                let path = packet.path()?;
                set_at(&path, &packet.attributes()?, AtFlags::empty())
            }
            wire::FSETSTAT => {
                let handle = packet.handle()?;
                let wanted = packet.attributes()?;
                match self.handles.get(&handle).ok_or(NO_HANDLE)? {
                    Handle::File { file, .. } => set_open(file, &wanted),
                    Handle::Directory { path, .. } => set_at(path, &wanted, AtFlags::empty()),
                }
            }
            wire::OPENDIR => {
                let path = packet.path()?;
                let entries = std::fs::read_dir(&path)?;
                self.keep(Handle::Directory { path, entries }, id, answers)
            }
            wire::READDIR => self.read_directory(packet.handle()?, id, answers),
            wire::REMOVE => Ok(rustix::fs::unlink(packet.path()?)?),
            wire::MKDIR => {
                let path = packet.path()?;
                let mode = packet.attributes()?.permissions.unwrap_or(0o777);
                Ok(rustix::fs::mkdir(path, Mode::from_raw_mode(mode & 0o7777))?)
            }
            wire::RMDIR => Ok(rustix::fs::rmdir(packet.path()?)?),
            wire::REALPATH => {
                let path = packet.path()?;
                name(id, &real_path(&path)?, answers);
                Ok(())
            }
            wire::RENAME => {
                let (from, to) = (packet.path()?, packet.path()?);
                rename_to_new(&from, &to)
            }
            wire::READLINK => {
                let target = std::fs::read_link(packet.path()?)?;
                name(id, &target, answers);
                Ok(())
            }
            wire::SYMLINK => {
                let (target, link) = (packet.path()?, packet.path()?);
                Ok(rustix::fs::symlink(target, link)?)
            }
            wire::EXTENDED => {
                let extension = packet.string()?;
                self.extended(extension, id, packet, answers)
            }
            _ => Err(Trouble::Status(
                Status::OpUnsupported,
                "there is no such request in version 3",
            )),
        }
    }

    fn extended(
        &mut self,
        extension: &[u8],
        id: u32,
        packet: &mut Packet<'_>,
        answers: &mut Vec<u8>,
    ) -> Outcome {
        match extension {
            b"posix-rename@openssh.com" => {
                let (from, to) = (packet.path()?, packet.path()?);
                Ok(rustix::fs::rename(from, to)?)
            }
            b"hardlink@openssh.com" => {
                let (from, to) = (packet.path()?, packet.path()?);
                Ok(rustix::fs::linkat(CWD, from, CWD, to, AtFlags::empty())?)
            }
            b"fsync@openssh.com" => match self.handles.get(&packet.handle()?) {
                Some(Handle::File { file, .. }) => Ok(file.sync_all()?),
                _ => Err(NO_HANDLE),
            },
            b"lsetstat@openssh.com" => {
                let path = packet.path()?;
                set_at(&path, &packet.attributes()?, AtFlags::SYMLINK_NOFOLLOW)
            }
            b"statvfs@openssh.com" => {
                let found = rustix::fs::statvfs(packet.path()?)?;
                file_system(id, &found, answers);
                Ok(())
            }
            b"fstatvfs@openssh.com" => {
                let found = match self.handles.get(&packet.handle()?).ok_or(NO_HANDLE)? {
                    Handle::File { file, .. } => rustix::fs::fstatvfs(file)?,
                    Handle::Directory { path, .. } => rustix::fs::statvfs(path)?,
                };
                file_system(id, &found, answers);
                Ok(())
            }
            b"limits@openssh.com" => {
                let mut reply = Reply::new(answers, wire::EXTENDED_REPLY);
                reply.number(id);
                for limit in [
                    PACKET_BYTES_MAX,
                    DATA_BYTES_MAX,
                    DATA_BYTES_MAX,
                    HANDLES_MAX,
                ] {
                    reply.long(limit as u64);
                }
                Ok(())
            }
            b"expand-path@openssh.com" => {
                let path = self.expand(&packet.path()?)?;
                name(id, &real_path(&path)?, answers);
                Ok(())
            }
            _ => Err(Trouble::Status(
                Status::OpUnsupported,
                "the extension is not known",
            )),
        }
    }

    /// Opens a file as `SSH_FXP_OPEN` says.
    fn open(
        &mut self,
        path: &Path,
        flags: u32,
        attributes: &Attributes,
    ) -> Result<Handle, Trouble> {
        let asked = |flag| flags & flag != 0;
        let append = asked(open_flags::APPEND);
        let mut options = File::options();
        options
            .read(asked(open_flags::READ))
            .write(asked(open_flags::WRITE) && !append)
            .append(append)
            .mode(attributes.permissions.unwrap_or(0o666) & 0o7777);
        // The standard library refuses to create or cut what it may not write, before it asks the
        // kernel; a client that wants that gets the same answer.
        if asked(open_flags::CREATE) && asked(open_flags::EXCLUSIVE) {
            options.create_new(true);
        } else {
            options.create(asked(open_flags::CREATE));
        }
        if asked(open_flags::TRUNCATE) && !append {
            options.truncate(true);
        }
        let file = options.open(path)?;
        if append && asked(open_flags::TRUNCATE) {
            file.set_len(0)?;
        }
        Ok(Handle::File { file, append })
    }

    /// Gives an open thing a number that no other had in this conversation.
    fn keep(&mut self, handle: Handle, id: u32, answers: &mut Vec<u8>) -> Outcome {
        if self.handles.len() >= HANDLES_MAX {
            return Err(Trouble::Status(
                Status::Failure,
                "too many files and directories are open",
            ));
        }
        let number = self.next;
        self.next += 1;
        self.handles.insert(number, handle);
        let mut reply = Reply::new(answers, wire::HANDLE);
        reply.number(id);
        reply.string(&number.to_be_bytes());
        Ok(())
    }

    fn read(
        &mut self,
        handle: u64,
        offset: u64,
        length: usize,
        id: u32,
        answers: &mut Vec<u8>,
    ) -> Outcome {
        let Some(Handle::File { file, .. }) = self.handles.get(&handle) else {
            return Err(NO_HANDLE);
        };
        let mut reply = Reply::new(answers, wire::DATA);
        reply.number(id);
        let read = reply.string_from(length, |buffer| {
            let mut filled = 0;
            // A short read would make a client ask again for what is there; only the end is short.
            while filled < buffer.len() {
                match file.read_at(&mut buffer[filled..], offset.saturating_add(filled as u64)) {
                    Ok(0) => break,
                    Ok(count) => filled += count,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) if filled == 0 => return Err(error),
                    Err(_) => break,
                }
            }
            Ok(filled)
        })?;
        if read == 0 && length > 0 {
            return Err(Trouble::Status(Status::Eof, "end of the file"));
        }
        Ok(())
    }

    fn read_directory(&mut self, handle: u64, id: u32, answers: &mut Vec<u8>) -> Outcome {
        let Some(Handle::Directory { path, entries }) = self.handles.get_mut(&handle) else {
            return Err(NO_HANDLE);
        };
        let mut found = Vec::new();
        while found.len() < ENTRIES_MAX {
            match entries.next() {
                Some(entry) => {
                    let name = entry?.file_name();
                    // One that is gone by now is left out.
                    if let Ok(metadata) = std::fs::symlink_metadata(path.join(&name)) {
                        found.push((name, metadata));
                    }
                }
                None => break,
            }
        }
        if found.is_empty() {
            return Err(Trouble::Status(Status::Eof, "end of the directory"));
        }
        let names = self.names.get_or_insert_with(Names::read);
        let now = seconds_now();
        let mut reply = Reply::new(answers, wire::NAME);
        reply.number(id);
        reply.number(u32::try_from(found.len()).unwrap_or(0));
        for (name, metadata) in found {
            reply.string(name.as_bytes());
            reply.string(&listing::line(name.as_bytes(), &metadata, names, now));
            reply.attributes(&metadata);
        }
        Ok(())
    }

    /// Replaces a leading `~` by the user's home, and `~name` by that of another.
    fn expand(&self, path: &Path) -> Result<PathBuf, Trouble> {
        let bytes = path.as_os_str().as_bytes();
        let Some(rest) = bytes.strip_prefix(b"~") else {
            return Ok(path.to_owned());
        };
        let end = rest.iter().position(|byte| *byte == b'/');
        let (user, below) = rest.split_at(end.unwrap_or(rest.len()));
        let below = OsStr::from_bytes(below.strip_prefix(b"/").unwrap_or(below));
        if user.is_empty() {
            return Ok(self.home.join(below));
        }
        let found = std::str::from_utf8(user)
            .ok()
            .and_then(|user| crate::users::look_up(user).ok());
        match found {
            Some(identity) => Ok(Path::new(&identity.home).join(below)),
            None => Err(Trouble::Status(
                Status::NoSuchFile,
                "there is no such user in the guest",
            )),
        }
    }
}

fn seconds_now() -> i64 {
    rustix::time::clock_gettime(rustix::time::ClockId::Realtime).tv_sec
}

fn attributes(id: u32, metadata: &Metadata, answers: &mut Vec<u8>) {
    let mut reply = Reply::new(answers, wire::ATTRS);
    reply.number(id);
    reply.attributes(metadata);
}

/// Answers with one name and nothing else of it.
fn name(id: u32, path: &Path, answers: &mut Vec<u8>) {
    let bytes = path.as_os_str().as_bytes();
    let mut reply = Reply::new(answers, wire::NAME);
    reply.number(id);
    reply.number(1);
    reply.string(bytes);
    reply.string(bytes);
    reply.number(0);
}

fn file_system(id: u32, found: &StatVfs, answers: &mut Vec<u8>) {
    // ST_RDONLY and ST_NOSUID of statvfs(3) have the numbers of the protocol.
    let flags = found.f_flag.bits() & 0x3;
    let mut reply = Reply::new(answers, wire::EXTENDED_REPLY);
    reply.number(id);
    for number in [
        found.f_bsize,
        found.f_frsize,
        found.f_blocks,
        found.f_bfree,
        found.f_bavail,
        found.f_files,
        found.f_ffree,
        found.f_favail,
        found.f_fsid,
        flags,
        found.f_namemax,
    ] {
        reply.long(number);
    }
}

/// An absolute path without `.`, `..` and links. What is not there yet is allowed at the end, as in
/// OpenSSH: a client asks so for the file it is about to make.
fn real_path(path: &Path) -> Result<PathBuf, Trouble> {
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    match std::fs::canonicalize(path) {
        Ok(real) => Ok(real),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let (Some(above), Some(last)) = (path.parent(), path.file_name()) else {
                return Err(error.into());
            };
            let above = if above.as_os_str().is_empty() {
                Path::new(".")
            } else {
                above
            };
            Ok(std::fs::canonicalize(above)?.join(last))
        }
        Err(error) => Err(error.into()),
    }
}

/// Renames to a name that must be free: so says the draft, and so a client avoids losing a file.
fn rename_to_new(from: &Path, to: &Path) -> Outcome {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // Not every file system knows the flag (rename(2)).
        Err(Errno::INVAL | Errno::NOSYS) => {}
        done => return Ok(done?),
    }
    if std::fs::symlink_metadata(to).is_ok() {
        return Err(Errno::EXIST.into());
    }
    Ok(rustix::fs::rename(from, to)?)
}

/// Changes what is asked for of an open file.
fn set_open(file: &File, wanted: &Attributes) -> Outcome {
    if let Some(size) = wanted.size {
        file.set_len(size)?;
    }
    if let Some(mode) = wanted.permissions {
        file.set_permissions(std::fs::Permissions::from_mode(mode & 0o7777))?;
    }
    if let Some(times) = wanted.times {
        rustix::fs::futimens(file, &timestamps(times))?;
    }
    if let Some((uid, gid)) = wanted.owner {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        rustix::fs::fchown(file, Some(uid), Some(gid))?;
    }
    Ok(())
}

/// Changes what is asked for of a path.
fn set_at(path: &Path, wanted: &Attributes, flags: AtFlags) -> Outcome {
    if let Some(size) = wanted.size {
        File::options().write(true).open(path)?.set_len(size)?;
    }
    if let Some(mode) = wanted.permissions {
        let mode = Mode::from_raw_mode(mode & 0o7777);
        match rustix::fs::chmodat(CWD, path, mode, flags) {
            // Linux knows no permissions of links.
            Err(Errno::OPNOTSUPP) if flags.contains(AtFlags::SYMLINK_NOFOLLOW) => {
                rustix::fs::chmodat(CWD, path, mode, AtFlags::empty())?;
            }
            done => done?,
        }
    }
    if let Some(times) = wanted.times {
        rustix::fs::utimensat(CWD, path, &timestamps(times), flags)?;
    }
    if let Some((uid, gid)) = wanted.owner {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        rustix::fs::chownat(CWD, path, Some(uid), Some(gid), flags)?;
    }
    Ok(())
}

fn timestamps((accessed, modified): (u32, u32)) -> Timestamps {
    let at = |seconds: u32| Timespec {
        tv_sec: seconds.into(),
        tv_nsec: 0,
    };
    Timestamps {
        last_access: at(accessed),
        last_modification: at(modified),
    }
}

/// The protocol's number for what the kernel said.
fn status_of(error: &io::Error) -> Status {
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::NOENT | Errno::NOTDIR | Errno::BADF | Errno::LOOP) => Status::NoSuchFile,
        Some(Errno::PERM | Errno::ACCESS | Errno::FAULT) => Status::PermissionDenied,
        Some(Errno::NAMETOOLONG | Errno::INVAL) => Status::BadMessage,
        Some(Errno::NOSYS | Errno::OPNOTSUPP) => Status::OpUnsupported,
        _ => Status::Failure,
    }
}

/// What the kernel said, in words.
fn words_of(error: &io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}

/// A path of the protocol: bytes.
fn path_of(bytes: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(bytes.to_vec()))
}

#[cfg(test)]
mod tests;

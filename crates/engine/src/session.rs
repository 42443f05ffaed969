//! A connection to a running sandbox.

use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;
use smolvm_proto::keeper::{KeeperEvent, KeeperFailure, KeeperReason, KeeperRequest, Ready};
use smolvm_proto::message::{EntryKind, Event, ListRequest, Request};

use crate::client::{Client, Heard, connect_socket};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::SOCKET_NAME;

/// A connection to a running sandbox. Clones share it, and many commands may run on one.
#[derive(Debug, Clone)]
pub struct Session {
    pub(crate) client: Client,
    name: String,
}

/// The guest's state.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GuestFacts {
    /// Time since the guest's kernel started.
    pub uptime: Duration,
    /// Bytes of memory the guest's kernel manages.
    pub memory_total_bytes: u64,
    /// Bytes of it a new program could have.
    pub memory_available_bytes: u64,
    /// Load averages over 1, 5 and 15 minutes.
    pub load: [f64; 3],
    /// Processes other than kernel threads.
    pub processes: u32,
    /// Bytes of the root file system's writable layer.
    pub disk_total_bytes: u64,
    /// Bytes free there.
    pub disk_free_bytes: u64,
}

/// A file in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileInfo {
    /// Name in its directory; bytes that are no UTF-8 are replaced.
    pub name: String,
    /// What it is.
    pub kind: FileKind,
    /// Permission bits and the three bits above them.
    pub mode: u32,
    /// Bytes.
    pub size: u64,
    /// When its content last changed.
    pub modified: Timestamp,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Where a symbolic link points.
    pub target: Option<String>,
}

/// The kinds of file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// Regular file.
    File,
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink,
    /// Socket, pipe or device.
    Other,
}

impl Session {
    /// Connects to the keeper whose socket is in `directory`.
    pub(crate) fn connect(name: &str, directory: &Path) -> Result<Self> {
        let socket = connect_socket(directory, SOCKET_NAME).map_err(|error| {
            crate::error::io(format!("could not connect to sandbox `{name}`"), error)
        })?;
        Ok(Self::of(name, Client::new(name, socket)?))
    }

    pub(crate) fn of(name: &str, client: Client) -> Self {
        Self {
            client,
            name: name.to_owned(),
        }
    }

    /// The sandbox's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// From now on the sandbox is destroyed when this connection closes, for whatever reason; that
    /// includes this process being killed.
    pub async fn own(&self) -> Result<()> {
        self.keeper(&KeeperRequest::Own).await.map(|_| ())
    }

    /// Waits until the guest serves.
    pub(crate) async fn wait_ready(&self) -> Result<Ready> {
        match self.keeper(&KeeperRequest::WaitReady).await? {
            KeeperEvent::Ready(ready) => Ok(ready),
            other => Err(self.confused(&other)),
        }
    }

    /// Asks the keeper; its refusals are errors.
    pub(crate) async fn keeper(&self, request: &KeeperRequest) -> Result<KeeperEvent> {
        match self.client.ask_keeper(request).await? {
            KeeperEvent::Failed(failure) => Err(refusal(failure)),
            event => Ok(event),
        }
    }

    /// The guest's uptime, memory, load and disk.
    pub async fn facts(&self) -> Result<GuestFacts> {
        match self.client.open(&Request::Facts)?.answer().await? {
            Event::Facts(facts) => Ok(GuestFacts {
                uptime: Duration::from_millis(facts.uptime_ms),
                memory_total_bytes: facts.memory_total,
                memory_available_bytes: facts.memory_available,
                load: facts.load_milli.map(|milli| f64::from(milli) / 1000.0),
                processes: facts.processes,
                disk_total_bytes: facts.disk_total,
                disk_free_bytes: facts.disk_free,
            }),
            other => Err(self.confused(&other)),
        }
    }

    /// Lists a directory of the guest by name, or describes `path` itself.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`], [`ErrorKind::InvalidInput`] for a path that is not absolute.
    pub async fn list_dir(&self, path: &str, itself: bool) -> Result<Vec<FileInfo>> {
        let request = Request::List(ListRequest {
            path: path.as_bytes().to_vec().into(),
            itself,
        });
        let mut stream = self.client.open(&request)?;
        let mut files = Vec::new();
        loop {
            match stream.next().await? {
                Heard::Event(Event::Entries(entries)) => {
                    files.extend(entries.into_iter().map(|entry| {
                        FileInfo {
                            name: String::from_utf8_lossy(&entry.name).into_owned(),
                            kind: match entry.kind {
                                EntryKind::File => FileKind::File,
                                EntryKind::Directory => FileKind::Directory,
                                EntryKind::Symlink => FileKind::Symlink,
                                EntryKind::Other => FileKind::Other,
                            },
                            mode: entry.mode,
                            size: entry.size,
                            modified: Timestamp::from_second(entry.modified_s).unwrap_or_default(),
                            uid: entry.uid,
                            gid: entry.gid,
                            target: entry
                                .target
                                .map(|target| String::from_utf8_lossy(&target).into_owned()),
                        }
                    }));
                }
                Heard::Event(Event::Done) => return Ok(files),
                Heard::Event(other) => return Err(self.confused(&other)),
                Heard::Data(..) | Heard::End(_) => {}
            }
        }
    }

    pub(crate) fn confused(&self, answer: &impl std::fmt::Debug) -> Error {
        confused(&self.name, answer)
    }
}

/// What to say of an answer that does not belong to its question.
pub(crate) fn confused(name: &str, answer: &impl std::fmt::Debug) -> Error {
    Error::new(
        ErrorKind::Internal,
        format!("sandbox `{name}` gave an unexpected answer: {answer:?}"),
    )
}

/// A keeper's refusal as an error.
pub(crate) fn refusal(failure: KeeperFailure) -> Error {
    let kind = match failure.reason {
        Some(KeeperReason::NameTaken) => ErrorKind::AlreadyExists,
        Some(KeeperReason::Busy) => ErrorKind::Busy,
        Some(KeeperReason::NotFound) => ErrorKind::NotFound,
        Some(KeeperReason::InvalidInput) => ErrorKind::InvalidInput,
        Some(KeeperReason::PermissionDenied) => ErrorKind::PermissionDenied,
        Some(KeeperReason::NotParked) | None => ErrorKind::GuestFailed,
    };
    let error = Error::new(kind, failure.message).console(failure.console);
    match failure.hint {
        Some(hint) => error.hint(hint),
        None => error,
    }
}

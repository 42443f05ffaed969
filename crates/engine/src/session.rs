//! A connection to a running sandbox.

use std::future::Future;
use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;
use smolvm_proto::keeper::{KeeperEvent, KeeperFailure, KeeperReason, KeeperRequest, Ready};
use smolvm_proto::message::{EntryKind, Event, ListRequest, Request};
use tokio::time::{Instant, sleep_until};

use crate::client::{Client, Heard, connect_socket};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::SOCKET_NAME;

/// Time between two questions to a guest that something else is waited for from.
const PING_PAUSE: Duration = Duration::from_secs(10);
/// Time a guest has to answer such a question. One that has little of a processor is slow, not gone.
const PING_TIME: Duration = Duration::from_secs(20);

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

    /// The guest's uptime, memory, load and disk, if it answers within `time`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Timeout`] if it does not.
    pub async fn facts_within(&self, time: Duration) -> Result<GuestFacts> {
        tokio::time::timeout(time, self.facts())
            .await
            .unwrap_or_else(|_| Err(self.hung(time)))
    }

    /// The guest's uptime, memory, load and disk. Waits for as long as the guest is silent.
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

    /// Ends what commands have left running, and has everything written to the disk.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Timeout`] if the guest answers nothing.
    pub(crate) async fn settle(&self) -> Result<()> {
        let settled = async {
            match self.client.open(&Request::Settle)?.answer().await? {
                Event::Done => Ok(()),
                other => Err(self.confused(&other)),
            }
        };
        self.unless_hung(settled).await
    }

    /// Waits for `work`, and gives it up when the guest answers nothing any more: when a question that
    /// every guest answers at once is open for 20 s. Asks ten seconds after the last answer.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Timeout`], or what the work failed with.
    pub(crate) async fn unless_hung<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let ping = || async { self.client.open(&Request::Ping)?.answer().await };
        match while_answered(work, ping, PING_PAUSE, PING_TIME).await {
            Some(done) => done,
            None => Err(self.hung(PING_TIME)),
        }
    }

    fn hung(&self, time: Duration) -> Error {
        let name = &self.name;
        Error::new(
            ErrorKind::Timeout,
            format!(
                "the guest of sandbox `{name}` has not answered for {} s",
                time.as_secs()
            ),
        )
        .hint(format!(
            "see its last words with `smolvm logs {name}`; `smolvm stop --now {name}` ends it"
        ))
    }

    /// Lists a directory of the guest by name, or describes `path` itself.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`], [`ErrorKind::InvalidInput`] for a path that is not absolute,
    /// [`ErrorKind::Timeout`] if the guest answers nothing.
    pub async fn list_dir(&self, path: &str, itself: bool) -> Result<Vec<FileInfo>> {
        self.unless_hung(self.list(path, itself)).await
    }

    pub(crate) async fn list(&self, path: &str, itself: bool) -> Result<Vec<FileInfo>> {
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

/// Waits for `work` as long as each `ping`, asked `pause` after the last answer, is answered within
/// `time`; `None` if one is not. What a ping fails with, `work` will say better.
async fn while_answered<T, P>(
    work: impl Future<Output = T>,
    ping: impl Fn() -> P,
    pause: Duration,
    time: Duration,
) -> Option<T>
where
    P: Future<Output = Result<Event>>,
{
    let silence = async {
        loop {
            sleep_until(Instant::now() + pause).await;
            if tokio::time::timeout(time, ping()).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        // Whoever was late himself finds the work done.
        biased;
        done = work => Some(done),
        () = silence => None,
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

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    const SHORT: Duration = Duration::from_millis(1);
    const LONG: Duration = Duration::from_secs(600);

    fn on_a_runtime<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("a runtime")
            .block_on(work)
    }

    #[test]
    fn work_with_a_silent_guest_is_given_up() {
        let given_up = while_answered(pending::<()>(), pending, SHORT, SHORT);
        assert_eq!(on_a_runtime(given_up), None);
    }

    #[test]
    fn work_with_a_guest_that_answers_goes_on() {
        let asked = AtomicU32::new(0);
        let ping = || async {
            asked.fetch_add(1, Ordering::Relaxed);
            Ok(Event::Done)
        };
        let work = async {
            while asked.load(Ordering::Relaxed) < 3 {
                tokio::task::yield_now().await;
            }
            "done"
        };
        let done = while_answered(work, ping, SHORT, LONG);
        assert_eq!(on_a_runtime(done), Some("done"));
    }
}

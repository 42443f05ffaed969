//! The VMM's control socket: a small typed client of the QEMU Machine Protocol.
//!
//! See QEMU's `docs/interop/qmp-spec.rst`. The protocol starts with a greeting and a negotiation;
//! both are left for the first command, or for whoever wants to hear of events, so that they cost a
//! booting machine nothing, and because QEMU sends no events before, which could pile up while nobody
//! reads.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;

use super::cmdline::node_of;
use crate::CONTROL_TIMEOUT;

/// Longest message; those of the commands below have some hundred bytes.
const MESSAGE_BYTES_MAX: usize = 1 << 20;

/// Most events kept; the older ones go first.
const EVENTS_MAX: usize = 16;

/// Every command that is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    /// Leave the negotiation.
    Capabilities,
    /// Stop the virtual CPUs.
    Stop,
    /// Let them go on.
    Cont,
    /// Write the state of CPUs and devices, without memory, to the descriptor that comes along.
    KeepSaveFile,
    /// Do that.
    SaveDevices,
    /// Let go of that descriptor.
    DropSaveFile,
    /// Tell the end of a transfer without being asked for.
    SetMigration,
    /// Keep the descriptor that comes along under a name.
    KeepFile,
    /// Load the state from there.
    MigrateIncoming,
    /// How the last loading went.
    QueryMigrate,
    /// Where in the VMM's own memory the guest's begins.
    AddressOfMemory,
    /// Give a disk this size, its file and its device.
    GrowDisk { index: usize, bytes: u64 },
}

/// The name of the descriptor that is loaded from. Not a digit first, which would be a number of
/// QEMU's.
const FILE: &str = "state";

/// The set of one descriptor that is saved to, and its name as a path.
const SAVE_SET: u32 = 1;
const SAVE_PATH: &str = "/dev/fdset/1";

impl Command {
    fn name(self) -> &'static str {
        match self {
            Command::Capabilities => "qmp_capabilities",
            Command::Stop => "stop",
            Command::Cont => "cont",
            Command::KeepSaveFile => "add-fd",
            Command::SaveDevices => "xen-save-devices-state",
            Command::DropSaveFile => "remove-fd",
            Command::SetMigration => "migrate-set-capabilities",
            Command::KeepFile => "getfd",
            Command::MigrateIncoming => "migrate-incoming",
            Command::QueryMigrate => "query-migrate",
            Command::AddressOfMemory => "human-monitor-command",
            Command::GrowDisk { .. } => "block_resize",
        }
    }

    fn arguments(self) -> Option<Value> {
        match self {
            Command::Capabilities | Command::Stop | Command::Cont | Command::QueryMigrate => None,
            Command::KeepSaveFile | Command::DropSaveFile => Some(json!({ "fdset-id": SAVE_SET })),
            // Not `live`, which would take the disks away from this machine.
            Command::SaveDevices => Some(json!({ "filename": SAVE_PATH, "live": false })),
            Command::SetMigration => Some(json!({ "capabilities": [
                { "capability": "events", "state": true },
            ] })),
            Command::KeepFile => Some(json!({ "fdname": FILE })),
            Command::MigrateIncoming => Some(json!({ "uri": format!("fd:{FILE}") })),
            Command::AddressOfMemory => Some(json!({ "command-line": "gpa2hva 0" })),
            Command::GrowDisk { index, bytes } => {
                Some(json!({ "node-name": node_of(index), "size": bytes }))
            }
        }
    }
}

/// What happened to the machine unasked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Event {
    /// It ends. The reason is QEMU's word, for example `guest-reset`.
    Shutdown { reason: String },
    /// The guest's kernel said that it panicked.
    GuestPanicked,
    /// The host could not read or write a disk image; `full` if there was no room.
    DiskError { node: String, full: bool },
}

/// Why a command had no success.
#[derive(Debug, thiserror::Error)]
pub(super) enum QmpError {
    /// The VMM closed the socket, as it does when it dies.
    #[error("the control socket was closed")]
    Closed,
    /// No answer in time.
    #[error("no answer within {} s", CONTROL_TIMEOUT.as_secs())]
    Timeout,
    /// The VMM said no.
    #[error("it answered: {desc} ({class})")]
    Refused { class: String, desc: String },
    /// The VMM could not save its state, and says why.
    #[error("it could not save its state: {0}")]
    Unsaved(String),
    /// The VMM said something that is not in the protocol.
    #[error("it said something unexpected: {0}")]
    Garbage(String),
}

/// The client. Its futures may be dropped without loss: what was half sent or half received is kept
/// here, and answers nobody waits for any more are known by their numbers.
#[derive(Debug)]
pub(super) struct Monitor {
    link: Link,
    phase: Phase,
    sent: u64,
    unsent: Vec<u8>,
    /// Goes with the bytes that are sent next. The VMM keeps it until a command asks for it.
    unsent_file: Option<OwnedFd>,
    unread: Vec<u8>,
    events: VecDeque<Event>,
    /// Whether the state was transferred, once that has ended.
    transferred: Option<bool>,
}

/// The socket, given to tokio only when needed.
#[derive(Debug)]
enum Link {
    Idle(StdUnixStream),
    Open(UnixStream),
    Closed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The greeting has not been read.
    Greeting,
    /// The greeting has been answered by the command with this number.
    Negotiating(u64),
    /// Commands are accepted.
    Ready,
}

/// A message of the VMM; which fields are there says which kind it is.
#[derive(Debug, Deserialize)]
struct Message {
    #[serde(rename = "QMP")]
    greeting: Option<Value>,
    #[serde(rename = "return")]
    result: Option<Value>,
    error: Option<Refusal>,
    id: Option<u64>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
}

#[derive(Debug, Deserialize)]
struct Refusal {
    class: String,
    desc: String,
}

/// The answer to the command with this number.
type Answer = (u64, Result<Value, QmpError>);

impl Monitor {
    pub(super) fn new(socket: StdUnixStream) -> Monitor {
        Monitor {
            link: Link::Idle(socket),
            phase: Phase::Greeting,
            sent: 0,
            unsent: Vec::new(),
            unsent_file: None,
            unread: Vec::new(),
            events: VecDeque::new(),
            transferred: None,
        }
    }

    /// Sends a command and waits for its answer, at most [`CONTROL_TIMEOUT`].
    pub(super) async fn execute(&mut self, command: Command) -> Result<Value, QmpError> {
        in_time(self.converse(command)).await
    }

    /// Stops the virtual CPUs and writes the state of CPUs and devices to `file`, all within
    /// [`CONTROL_TIMEOUT`].
    ///
    /// The command is named after its first user, but needs no Xen: it is the one that leaves
    /// memory out (QEMU's `qapi/migration.json`). `migrate` would read all of memory, and send every
    /// page that is not shared with a file. It notes in the state that the machine ran, so whoever
    /// loads it runs at once, whether this one was paused before or not.
    pub(super) async fn save(&mut self, file: OwnedFd) -> Result<(), QmpError> {
        in_time(async {
            self.converse(Command::Stop).await?;
            self.unsent_file = Some(file);
            self.converse(Command::KeepSaveFile).await?;
            let saved = self.converse(Command::SaveDevices).await;
            self.converse(Command::DropSaveFile).await?;
            match saved {
                Err(QmpError::Refused { desc, .. }) => Err(QmpError::Unsaved(desc)),
                other => other.map(drop),
            }
        })
        .await
    }

    /// Reads the state that [`Monitor::save`] wrote and lets the virtual CPUs run, all within
    /// [`CONTROL_TIMEOUT`]. The VMM must have been started to wait for it. It exits if it cannot
    /// make sense of the state.
    pub(super) async fn load(&mut self, file: OwnedFd) -> Result<(), QmpError> {
        in_time(async {
            self.converse(Command::SetMigration).await?;
            self.unsent_file = Some(file);
            self.converse(Command::KeepFile).await?;
            self.transferred = None;
            self.converse(Command::MigrateIncoming).await?;
            let done = loop {
                match self.transferred {
                    Some(done) => break done,
                    None => drop(self.step().await?),
                }
            };
            if done {
                return Ok(());
            }
            // One that cannot load exits instead of answering.
            let report = self.converse(Command::QueryMigrate).await?;
            let why = report["error-desc"].as_str();
            let why = why.unwrap_or("it does not say why");
            Err(QmpError::Garbage(format!("a state it cannot load: {why}")))
        })
        .await
    }

    /// Where in the VMM's own memory the guest's begins.
    pub(super) async fn address_of_memory(&mut self) -> Result<u64, QmpError> {
        let answer = self.execute(Command::AddressOfMemory).await?;
        let text = answer.as_str().unwrap_or_default();
        address_in(text).ok_or_else(|| QmpError::Garbage(text.to_owned()))
    }

    /// Sends a command and waits for its answer.
    async fn converse(&mut self, command: Command) -> Result<Value, QmpError> {
        while self.phase != Phase::Ready {
            self.step().await?;
        }
        let id = self.queue(command);
        loop {
            match self.step().await? {
                Some((answered, result)) if answered == id => return result,
                _ => {}
            }
        }
    }

    /// Whether events may arrive, for which somebody has to call [`Monitor::listen`]; or, if somebody
    /// `wants` to hear of them, whether they could.
    pub(super) fn listens(&self, wants: bool) -> bool {
        (wants || self.phase == Phase::Ready) && !matches!(self.link, Link::Closed)
    }

    /// Takes in events until there is one to tell, after the negotiation if there was none yet.
    ///
    /// # Errors
    ///
    /// If the socket closes or something is wrong with it.
    pub(super) async fn listen(&mut self) -> Result<(), QmpError> {
        while self.events.is_empty() {
            if let Err(error) = self.step().await {
                self.link = Link::Closed;
                return Err(error);
            }
        }
        Ok(())
    }

    /// The events that have not been asked for yet, oldest first.
    pub(super) fn take_events(&mut self) -> Vec<Event> {
        self.events.drain(..).collect()
    }

    fn queue(&mut self, command: Command) -> u64 {
        self.sent += 1;
        let mut line = json!({ "execute": command.name(), "id": self.sent });
        if let Some(arguments) = command.arguments() {
            line["arguments"] = arguments;
        }
        self.unsent.extend_from_slice(line.to_string().as_bytes());
        self.unsent.push(b'\n');
        self.sent
    }

    /// Sends what waits to be sent, receives one message, and acts on it.
    async fn step(&mut self) -> Result<Option<Answer>, QmpError> {
        let message = loop {
            if let Some(message) = self.next_message()? {
                break message;
            }
            self.transfer().await?;
        };
        self.accept(message)
    }

    /// Writes if there is something to write, else reads. Either may do a part only.
    async fn transfer(&mut self) -> Result<(), QmpError> {
        let Monitor {
            link,
            unsent,
            unsent_file,
            unread,
            ..
        } = self;
        let stream = link.open()?;
        if !unsent.is_empty() {
            let written = match unsent_file {
                None => stream.write(unsent).await,
                Some(file) => write_with(stream, unsent, file).await,
            };
            let written = written.map_err(closed)?;
            *unsent_file = None;
            unsent.drain(..written);
            return Ok(());
        }
        match stream.read_buf(unread).await.map_err(closed)? {
            0 => Err(QmpError::Closed),
            _ if unread.len() > MESSAGE_BYTES_MAX => {
                Err(QmpError::Garbage("a message without an end".to_owned()))
            }
            _ => Ok(()),
        }
    }

    /// Takes the next whole line out of what was read.
    fn next_message(&mut self) -> Result<Option<Message>, QmpError> {
        let Some(end) = self.unread.iter().position(|&byte| byte == b'\n') else {
            return Ok(None);
        };
        let line: Vec<u8> = self.unread.drain(..=end).collect();
        serde_json::from_slice(&line).map(Some).map_err(|error| {
            QmpError::Garbage(format!("{error} in {}", String::from_utf8_lossy(&line)))
        })
    }

    fn accept(&mut self, message: Message) -> Result<Option<Answer>, QmpError> {
        if let Some(name) = &message.event {
            self.note(name, &message.data);
            return Ok(None);
        }
        if message.greeting.is_some() {
            if self.phase != Phase::Greeting {
                return Err(QmpError::Garbage("a second greeting".to_owned()));
            }
            self.phase = Phase::Negotiating(self.queue(Command::Capabilities));
            return Ok(None);
        }
        let result = match (message.result, message.error) {
            (Some(value), None) => Ok(value),
            (None, Some(Refusal { class, desc })) => Err(QmpError::Refused { class, desc }),
            _ => {
                return Err(QmpError::Garbage(
                    "neither answer, event nor greeting".into(),
                ));
            }
        };
        // An answer without a number is to something that QEMU could not read.
        let Some(id) = message.id else {
            return Err(result
                .err()
                .unwrap_or(QmpError::Garbage("an answer to nothing".into())));
        };
        if self.phase == Phase::Negotiating(id) {
            result?;
            self.phase = Phase::Ready;
            return Ok(None);
        }
        Ok(Some((id, result)))
    }

    /// Keeps the events that say something about the machine's health. The others (pauses that were
    /// asked for, the guest opening its port) are many and tell nothing.
    fn note(&mut self, name: &str, data: &Value) {
        let word = |key: &str| data[key].as_str().unwrap_or_default().to_owned();
        let event = match name {
            "MIGRATION" => {
                match data["status"].as_str() {
                    Some("completed") => self.transferred = Some(true),
                    Some("failed" | "cancelled") => self.transferred = Some(false),
                    // On its way.
                    _ => {}
                }
                return;
            }
            "SHUTDOWN" => Event::Shutdown {
                reason: word("reason"),
            },
            "GUEST_PANICKED" => Event::GuestPanicked,
            "BLOCK_IO_ERROR" => Event::DiskError {
                node: word("node-name"),
                // Its `nospace` is there only for disks that were made with `-drive`. The reason is what
                // strerror(3) says without a locale, of ENOSPC and EDQUOT.
                full: ["No space left on device", "Disk quota exceeded"]
                    .contains(&word("reason").as_str()),
            },
            _ => return,
        };
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }
}

impl Link {
    fn open(&mut self) -> Result<&mut UnixStream, QmpError> {
        if let Link::Idle(socket) = self {
            socket.set_nonblocking(true).map_err(closed)?;
            let socket = socket.try_clone().map_err(closed)?;
            *self = Link::Open(UnixStream::from_std(socket).map_err(closed)?);
        }
        match self {
            Link::Open(stream) => Ok(stream),
            Link::Idle(_) | Link::Closed => Err(QmpError::Closed),
        }
    }
}

/// Writes a part of `bytes`, at least one, and passes `file` along with it (unix(7), `SCM_RIGHTS`).
async fn write_with(stream: &UnixStream, bytes: &[u8], file: &OwnedFd) -> io::Result<usize> {
    let send = || {
        let files = [file.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&files));
        let sent = sendmsg(
            stream,
            &[IoSlice::new(bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        );
        Ok(sent?)
    };
    stream.async_io(Interest::WRITABLE, send).await
}

async fn in_time<T>(work: impl Future<Output = Result<T, QmpError>>) -> Result<T, QmpError> {
    let timed = tokio::time::timeout(CONTROL_TIMEOUT, work).await;
    timed.unwrap_or(Err(QmpError::Timeout))
}

/// The address in QEMU's answer, `Host virtual address for 0x0 (ram) is 0x7f12c7e00000`.
fn address_in(text: &str) -> Option<u64> {
    let word = text.trim_end().rsplit_once(" is 0x")?.1;
    u64::from_str_radix(word, 16).ok()
}

/// A socket pair fails when the other end is gone, and for no other reason that a caller could do
/// something about. tokio has repeated what a signal interrupted.
fn closed(_: io::Error) -> QmpError {
    QmpError::Closed
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::thread;

    const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"major": 7}}, "capabilities": []}}"#;

    /// A VMM that says `first`, then answers each line with what `answer` makes of its number and
    /// command, until that is `None`.
    fn vmm(
        first: &'static str,
        answer: impl Fn(u64, &str) -> Option<String> + Send + 'static,
    ) -> (Monitor, thread::JoinHandle<Vec<String>>) {
        let (here, there) = StdUnixStream::pair().expect("sockets");
        let peer = thread::spawn(move || {
            let mut commands = Vec::new();
            let mut out = there.try_clone().expect("a socket");
            write!(out, "{first}\r\n").expect("write");
            for line in BufReader::new(there).lines() {
                let Ok(line) = line else { break };
                let request: Value = serde_json::from_str(&line).expect("JSON");
                let command = request["execute"].as_str().expect("a command").to_owned();
                let id = request["id"].as_u64().expect("a number");
                let Some(text) = answer(id, &command) else {
                    break;
                };
                commands.push(command);
                // In two pieces, as a stream may deliver it.
                let (head, tail) = text.split_at(text.len() / 2);
                for piece in [head, tail, "\r\n"] {
                    out.write_all(piece.as_bytes()).expect("write");
                }
            }
            commands
        });
        (Monitor::new(here), peer)
    }

    fn done(id: u64) -> String {
        format!(r#"{{"return": {{}}, "id": {id}}}"#)
    }

    fn run<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.expect("a runtime").block_on(future)
    }

    #[test]
    fn it_negotiates_once_and_executes() {
        let (mut monitor, peer) = vmm(GREETING, |id, _| Some(done(id)));
        assert!(!monitor.listens(false));
        run(async {
            monitor.execute(Command::Stop).await.expect("stop");
            monitor.execute(Command::Cont).await.expect("cont");
        });
        assert!(monitor.listens(false));
        drop(monitor);
        let commands = peer.join().expect("the peer");
        assert_eq!(commands, ["qmp_capabilities", "stop", "cont"]);
    }

    #[test]
    fn events_do_not_disturb_and_the_telling_ones_are_kept() {
        let (mut monitor, _peer) = vmm(GREETING, |id, command| {
            let events = match command {
                "stop" => concat!(
                    r#"{"event": "STOP", "timestamp": {}}"#,
                    "\r\n",
                    r#"{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}"#,
                    "\r\n",
                    r#"{"event": "BLOCK_IO_ERROR", "data": {"node-name": "disk1", "reason": "No space left on device"}}"#,
                    "\r\n",
                    r#"{"event": "BLOCK_IO_ERROR", "data": {"node-name": "disk2"}}"#,
                    "\r\n",
                ),
                _ => "",
            };
            Some(format!("{events}{}", done(id)))
        });
        run(monitor.execute(Command::Stop)).expect("stop");
        let expected = [
            Event::Shutdown {
                reason: "guest-reset".into(),
            },
            Event::DiskError {
                node: "disk1".into(),
                full: true,
            },
            Event::DiskError {
                node: "disk2".into(),
                full: false,
            },
        ];
        assert_eq!(monitor.take_events(), expected);
        assert_eq!(monitor.take_events(), []);
    }

    #[test]
    fn whoever_wants_to_hear_of_events_needs_no_command_before() {
        let (ours, mut theirs) = StdUnixStream::pair().expect("a socket pair");
        let mut monitor = Monitor::new(ours);
        assert!(!monitor.listens(false));
        assert!(monitor.listens(true));
        let peer = std::thread::spawn(move || {
            let greeting = format!("{GREETING}\r\n");
            theirs.write_all(greeting.as_bytes()).expect("a greeting");
            let mut line = String::new();
            BufReader::new(theirs.try_clone().expect("a copy"))
                .read_line(&mut line)
                .expect("the negotiation");
            let event = r#"{"event": "BLOCK_IO_ERROR", "data": {"node-name": "disk1"}}"#;
            let text = format!("{}\r\n{event}\r\n", done(1));
            theirs.write_all(text.as_bytes()).expect("an event");
            line
        });
        run(monitor.listen()).expect("heard");
        assert!(peer.join().expect("the peer").contains("qmp_capabilities"));
        assert_eq!(monitor.take_events().len(), 1);
    }

    #[test]
    fn a_refusal_is_passed_on() {
        let (mut monitor, _peer) = vmm(GREETING, |id, command| {
            Some(match command {
                "cont" => format!(
                    r#"{{"error": {{"class": "GenericError", "desc": "not now"}}, "id": {id}}}"#
                ),
                _ => done(id),
            })
        });
        let error = run(monitor.execute(Command::Cont)).expect_err("refused");
        assert_eq!(error.to_string(), "it answered: not now (GenericError)");
    }

    #[test]
    fn an_answer_that_nobody_waits_for_is_dropped() {
        let (mut monitor, _peer) = vmm(GREETING, |id, command| {
            Some(match command {
                // Also answers a command that was never sent, first.
                "cont" => format!("{}\r\n{}", done(7777), done(id)),
                _ => done(id),
            })
        });
        run(async {
            let given_up = monitor.execute(Command::Stop);
            // Given up after a few steps, wherever that leaves it.
            let few = tokio::time::timeout(std::time::Duration::from_micros(50), given_up);
            let _ = few.await;
            monitor.execute(Command::Cont).await.expect("cont");
        });
    }

    #[test]
    fn a_vmm_that_dies_closes_the_socket() {
        let (mut monitor, _peer) = vmm(GREETING, |id, command| {
            (command == "qmp_capabilities").then(|| done(id))
        });
        let error = run(monitor.execute(Command::Stop)).expect_err("closed");
        assert!(matches!(error, QmpError::Closed), "{error:?}");
    }

    fn file() -> OwnedFd {
        std::fs::File::open("/dev/null").expect("a file").into()
    }

    fn migration(status: &str) -> String {
        format!(r#"{{"event": "MIGRATION", "data": {{"status": "{status}"}}}}"#)
    }

    #[test]
    fn the_state_is_moved_when_the_vmm_says_so() {
        // The end may be told before the answer, or after it.
        for early in [true, false] {
            let (mut monitor, peer) = vmm(GREETING, move |id, command| {
                let (setup, completed) = (migration("setup"), migration("completed"));
                Some(match command {
                    "migrate-incoming" if early => {
                        format!("{setup}\r\n{completed}\r\n{}", done(id))
                    }
                    "migrate-incoming" => format!("{setup}\r\n{}\r\n{completed}", done(id)),
                    _ => done(id),
                })
            });
            run(async {
                monitor.save(file()).await.expect("save");
                monitor.load(file()).await.expect("load");
            });
            drop(monitor);
            let commands = peer.join().expect("the peer");
            let expected = [
                "qmp_capabilities",
                "stop",
                "add-fd",
                "xen-save-devices-state",
                "remove-fd",
                "migrate-set-capabilities",
                "getfd",
                "migrate-incoming",
            ];
            assert_eq!(commands, expected);
        }
    }

    #[test]
    fn a_state_that_cannot_be_moved_is_told_with_the_reason() {
        let (mut monitor, peer) = vmm(GREETING, |id, command| {
            Some(match command {
                "xen-save-devices-state" => format!(
                    r#"{{"error": {{"class": "GenericError", "desc": "disk full"}}, "id": {id}}}"#
                ),
                _ => done(id),
            })
        });
        let error = run(monitor.save(file())).expect_err("failed");
        assert_eq!(error.to_string(), "it could not save its state: disk full");
        drop(monitor);
        let commands = peer.join().expect("the peer");
        assert_eq!(commands.last().map(String::as_str), Some("remove-fd"));

        // One that cannot load its state is gone with the next question.
        let (mut monitor, _peer) = vmm(GREETING, |id, command| match command {
            "migrate-incoming" => Some(format!("{}\r\n{}", done(id), migration("failed"))),
            "query-migrate" => None,
            _ => Some(done(id)),
        });
        let error = run(monitor.load(file())).expect_err("failed");
        assert!(matches!(error, QmpError::Closed), "{error:?}");
    }

    #[test]
    fn the_address_of_memory_is_read() {
        let (mut monitor, _peer) = vmm(GREETING, |id, command| {
            Some(match command {
                "human-monitor-command" => format!(
                    r#"{{"return": "Host virtual address for 0x0 (ram) is 0x7f12c7e00000\r\n", "id": {id}}}"#
                ),
                _ => done(id),
            })
        });
        let address = run(monitor.address_of_memory()).expect("an address");
        assert_eq!(address, 0x7f12_c7e0_0000);
        for wrong in [
            "",
            "No memory is mapped at address 0x0",
            "it is 0x",
            "is 0xg",
        ] {
            assert_eq!(address_in(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_vmm_that_never_ends_a_transfer_is_given_up() {
        let paused = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .expect("a runtime");
        let (here, _there) = StdUnixStream::pair().expect("sockets");
        let mut silent = Monitor::new(here);
        for saved in [
            paused.block_on(silent.save(file())),
            paused.block_on(silent.load(file())),
        ] {
            assert!(matches!(saved, Err(QmpError::Timeout)), "{saved:?}");
        }
    }

    #[test]
    fn a_vmm_that_says_nothing_is_given_up() {
        let (mut monitor, _peer) = vmm("", |id, _| Some(done(id)));
        let paused = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .expect("a runtime");
        let (here, _there) = StdUnixStream::pair().expect("sockets");
        let mut silent = Monitor::new(here);
        let error = paused.block_on(silent.execute(Command::Stop));
        assert!(matches!(error, Err(QmpError::Timeout)), "{error:?}");

        let error = run(monitor.execute(Command::Stop)).expect_err("an empty line");
        assert!(matches!(error, QmpError::Garbage(_)), "{error:?}");
    }
}

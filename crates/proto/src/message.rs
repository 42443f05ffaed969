//! What a host may ask of the agent, and what it may answer: closed enums.
//!
//! Encoded as CBOR (RFC 8949) with a number for each field. An unknown field is skipped by a
//! decoder and an absent optional one is `None`, so a struct may gain optional fields. A new
//! variant needs a new protocol version once a release speaks this one; until then an agent that does
//! not know a request refuses it ([`FailureKind::InvalidInput`]).

use minicbor::bytes::{ByteArray, ByteVec};
use minicbor::{Decode, Encode};

use crate::socket::{
    AcceptRequest, Accepted, ConnectRequest, Connected, DatagramsRequest, ListenRequest, Listening,
};

/// Asked by the host; opens a stream.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Request {
    /// Runs a command. Answered by [`Event::Started`], then [`Event::Exited`] or [`Event::Failed`].
    #[n(0)]
    Exec(#[n(0)] ExecRequest),
    /// Sends a file or tree as a tar stream on [`crate::Channel::Output`], then [`Event::Done`].
    #[n(1)]
    Archive(#[n(0)] ArchiveRequest),
    /// Takes a tar stream on [`crate::Channel::Input`] and unpacks it, then [`Event::Done`].
    #[n(2)]
    Extract(#[n(0)] ExtractRequest),
    /// Lists a directory, or one file: [`Event::Entries`] as often as needed, then [`Event::Done`].
    #[n(3)]
    List(#[n(0)] ListRequest),
    /// Uptime, memory, load: [`Event::Facts`].
    #[n(4)]
    Facts,
    /// Gives a machine its identity, clock and randomness: sent before any other request, and again
    /// when it becomes another one or time has passed it by. [`Event::Done`].
    #[n(5)]
    Birth(#[n(0)] Birth),
    /// Ends every process, writes everything to the disk and unmounts it, then [`Event::Done`].
    /// After that the machine may be switched off; no other request is served.
    #[n(6)]
    Shutdown(#[n(0)] ShutdownRequest),
    /// Answered by [`Event::Done`] at once.
    #[n(7)]
    Ping,
    /// Opens a connection in the guest: [`Event::Connected`] or [`Event::Failed`], then bytes both
    /// ways until [`Event::Done`] ([`crate::socket`]).
    #[n(8)]
    Connect(#[n(0)] ConnectRequest),
    /// Listens in the guest: [`Event::Listening`] or [`Event::Failed`], then [`Event::Accepted`] for
    /// each connection.
    #[n(9)]
    Listen(#[n(0)] ListenRequest),
    /// Takes up a connection that was accepted in the guest; goes on as [`Request::Connect`] does.
    #[n(10)]
    Accept(#[n(0)] AcceptRequest),
    /// Opens a socket for datagrams in the guest: [`Event::Connected`] or [`Event::Failed`], then
    /// datagrams both ways, until the host ends the input: [`Event::Done`].
    #[n(11)]
    Datagrams(#[n(0)] DatagramsRequest),
    /// Makes the writable layer's file system as large as its disk, which has been made larger:
    /// [`Event::Done`].
    #[n(12)]
    Grow(#[n(0)] GrowRequest),
    /// Ends what commands have left running, and writes everything to the disk, so that a copy of it
    /// has all of it. Other requests go on being served. [`Event::Done`].
    #[n(13)]
    Settle,
    /// Mounts a directory that the host serves: [`Event::Connected`] once it is, or [`Event::Failed`].
    /// Then requests of the guest's kernel come on [`crate::Channel::Output`] and answers go on
    /// [`crate::Channel::Input`], each a whole message of the FUSE protocol (`linux/fuse.h`), which
    /// begins with its length in bytes. [`Event::Done`] when it was unmounted; the end of the input or a
    /// reset breaks the mount, whose files then are errors.
    #[n(14)]
    Mount(#[n(0)] MountRequest),
}

/// A directory of the host's to mount in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct MountRequest {
    /// Absolute path in the guest; made if it is not there.
    #[n(0)]
    pub target: ByteVec,
    /// Whether the guest's kernel refuses writing by itself.
    #[n(1)]
    pub read_only: bool,
}

/// A command to run.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ExecRequest {
    /// Program and arguments, at least one unless [`ExecRequest::program`] says what runs. A program
    /// without a slash is searched in the command's own `PATH`.
    #[n(0)]
    pub argv: Vec<ByteVec>,
    /// Set on top of the agent's default environment.
    #[n(1)]
    pub env: Vec<EnvVar>,
    /// Working directory; the user's home, or `/`, if absent.
    #[n(2)]
    pub cwd: Option<ByteVec>,
    /// `name`, `uid`, `name:group` or `uid:gid`, looked up in the guest; root if absent.
    #[n(3)]
    pub user: Option<String>,
    /// Milliseconds after which the command and all its descendants are killed.
    #[n(4)]
    pub timeout_ms: Option<u64>,
    /// A terminal of this size instead of three pipes; its output is on [`crate::Channel::Output`].
    #[n(5)]
    pub terminal: Option<WindowSize>,
    /// Whether [`crate::Channel::Input`] feeds standard input; `/dev/null` does otherwise.
    #[n(6)]
    pub stdin: bool,
    /// What runs if it is not the program that [`ExecRequest::argv`] names.
    #[n(7)]
    pub program: Option<Program>,
}

/// A program that the guest knows better than the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum Program {
    /// The user's own shell (passwd(5)), or `/bin/sh` if that is not there.
    /// [`ExecRequest::argv`] are its arguments; without any it is a login shell.
    #[n(0)]
    Shell,
    /// A server of the SSH file transfer protocol, version 3, on standard input and output. It
    /// comes with the agent, so that an image needs none.
    #[n(1)]
    Sftp,
}

/// One variable of an environment.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct EnvVar {
    /// Name, not empty, without `=` and NUL.
    #[n(0)]
    pub name: ByteVec,
    /// Value, without NUL.
    #[n(1)]
    pub value: ByteVec,
}

impl EnvVar {
    /// A variable whose name and value are text.
    #[must_use]
    pub fn text((name, value): &(String, String)) -> Self {
        Self {
            name: name.clone().into_bytes().into(),
            value: value.clone().into_bytes().into(),
        }
    }
}

impl ExecRequest {
    /// A command with no input, in the environment, directory and user that every command has.
    #[must_use]
    pub fn plain(argv: Vec<ByteVec>) -> Self {
        Self {
            argv,
            env: Vec::new(),
            cwd: None,
            user: None,
            timeout_ms: None,
            terminal: None,
            stdin: false,
            program: None,
        }
    }
}

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct WindowSize {
    /// Lines.
    #[n(0)]
    pub rows: u16,
    /// Characters in a line.
    #[n(1)]
    pub columns: u16,
}

/// A file or tree to send as a tar stream.
///
/// The entries are named relative to the path's last component: archiving `/var/log` gives `log`,
/// `log/syslog` and so on; archiving `/` gives entries below `.`.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ArchiveRequest {
    /// Absolute path in the guest.
    #[n(0)]
    pub path: ByteVec,
    /// Whether a symbolic link at the path itself is followed.
    #[n(1)]
    pub follow: bool,
    /// Whether the stream is to hold everything that makes a root file system: times to the
    /// nanosecond, extended attributes, several names of one file as such, devices and pipes; and of
    /// the path's own file system only, what is hidden below mounts included. It then begins with a
    /// global pax header, by which the host knows that the agent understood. No if absent.
    #[n(2)]
    pub complete: Option<bool>,
    /// Whether commands stand still while it is read, and new ones wait. No if absent.
    #[n(3)]
    pub hold: Option<bool>,
}

/// A tar stream to unpack.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ExtractRequest {
    /// Absolute path of the directory to unpack into. Nothing is written outside it.
    #[n(0)]
    pub directory: ByteVec,
    /// Whether missing directories on the way to `directory` are made.
    #[n(1)]
    pub make_parents: bool,
    /// Owner of everything unpacked, as in [`ExecRequest::user`]; the owners in the stream if absent.
    #[n(2)]
    pub owner: Option<String>,
    /// Name of one file in `directory`, of mode 0644, whose content the stream is as it stands; it is
    /// a tar stream if absent.
    #[n(3)]
    pub file: Option<ByteVec>,
}

/// A directory to list.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ListRequest {
    /// Absolute path in the guest. A file is listed as itself.
    #[n(0)]
    pub path: ByteVec,
    /// Whether to describe the path itself, not what a directory holds.
    #[n(1)]
    pub itself: bool,
}

/// What makes a machine this one and no other.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Birth {
    /// Host name.
    #[n(0)]
    pub hostname: String,
    /// Environment of every command that follows.
    #[n(1)]
    pub env: Vec<EnvVar>,
    /// Nanoseconds since 1970-01-01T00:00:00Z on the host.
    #[n(2)]
    pub wall_clock_ns: u64,
    /// Fresh random bytes for the guest's pool.
    #[n(3)]
    pub entropy: ByteVec,
    /// Default working directory of commands.
    #[n(4)]
    pub cwd: Option<ByteVec>,
    /// Default user of commands.
    #[n(5)]
    pub user: Option<String>,
    /// Whether the machine is the one it was, and only time has passed: then its name and identifiers
    /// stay. Not, if absent.
    #[n(6)]
    pub same: Option<bool>,
    /// What its network device is to be. The device is left alone if absent; there may be none.
    #[n(7)]
    pub network: Option<Network>,
    /// Disks to mount before anything else happens. None if absent.
    #[n(8)]
    pub volumes: Option<Vec<Volume>>,
    /// Its machine-id(5), 32 hexadecimal digits; a random one if absent.
    #[n(9)]
    pub machine_id: Option<String>,
}

/// A disk that is mounted beside the root file system.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Volume {
    /// The device, such as `/dev/vdc`.
    #[n(0)]
    pub device: String,
    /// Bytes of it. A machine that was saved with another disk in its place finds out.
    #[n(1)]
    pub bytes: u64,
    /// Absolute path of its mount point, which is made.
    #[n(2)]
    pub target: ByteVec,
    /// Whether it is only read.
    #[n(3)]
    pub read_only: bool,
}

/// The one network device of a machine: a link to its host and nobody else.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Network {
    /// The guest's IPv4 address, with no other on its link.
    #[n(0)]
    pub address: ByteArray<4>,
    /// The host's end of the link, through which everything else is reached.
    #[n(1)]
    pub gateway: ByteArray<4>,
    /// The guest's MAC address.
    #[n(2)]
    pub mac: ByteArray<6>,
    /// The host's.
    #[n(3)]
    pub gateway_mac: ByteArray<6>,
    /// The name server.
    #[n(4)]
    pub name_server: ByteArray<4>,
}

/// A disk that was made larger.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct GrowRequest {
    /// Bytes the disk has now. The guest's kernel may learn of it a moment later.
    #[n(0)]
    pub bytes: u64,
}

/// How to go down.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ShutdownRequest {
    /// Milliseconds processes have between SIGTERM and SIGKILL.
    #[n(0)]
    pub grace_ms: u64,
}

/// Sent by the host about a stream that is open.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Control {
    /// Sends a signal, by its Linux number, to the command's process group.
    #[n(0)]
    Signal(#[n(0)] i32),
    /// The terminal has a new size.
    #[n(1)]
    Resize(#[n(0)] WindowSize),
}

/// Said by the guest about a stream.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Event {
    /// The command runs.
    #[n(0)]
    Started(#[n(0)] Started),
    /// The command ended, and all it wrote has been sent. Terminal.
    #[n(1)]
    Exited(#[n(0)] Exited),
    /// The request could not be carried out. Terminal.
    #[n(2)]
    Failed(#[n(0)] Failure),
    /// A part of a listing.
    #[n(3)]
    Entries(#[n(0)] Vec<Entry>),
    /// The guest's state. Terminal.
    #[n(4)]
    Facts(#[n(0)] Facts),
    /// Carried out. Terminal.
    #[n(5)]
    Done,
    /// The connection is open.
    #[n(6)]
    Connected(#[n(0)] Connected),
    /// The listener listens.
    #[n(7)]
    Listening(#[n(0)] Listening),
    /// A connection waits to be taken up.
    #[n(8)]
    Accepted(#[n(0)] Accepted),
}

impl Event {
    /// Whether this is the last frame of its stream.
    #[must_use]
    pub fn is_terminal(&self) -> bool {
        match self {
            Self::Started(_)
            | Self::Entries(_)
            | Self::Connected(_)
            | Self::Listening(_)
            | Self::Accepted(_) => false,
            Self::Exited(_) | Self::Failed(_) | Self::Facts(_) | Self::Done => true,
        }
    }
}

/// A command that runs.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Started {
    /// Its process number in the guest.
    #[n(0)]
    pub pid: u32,
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Exited {
    /// Exit code, if it exited.
    #[n(0)]
    pub code: Option<i32>,
    /// Signal that ended it, by its Linux number, if one did.
    #[n(1)]
    pub signal: Option<i32>,
    /// Whether it was killed because its time was up.
    #[n(2)]
    pub timed_out: bool,
    /// Microseconds it ran, by the guest's monotonic clock.
    #[n(3)]
    pub duration_us: u64,
}

/// Why a request could not be carried out.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Failure {
    /// For programs.
    #[n(0)]
    pub kind: FailureKind,
    /// For people: what failed, on what, and why.
    #[n(1)]
    pub message: String,
}

/// The kinds of [`Failure`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum FailureKind {
    /// A path or program that does not exist.
    #[n(0)]
    NotFound,
    /// The guest's kernel refused.
    #[n(1)]
    PermissionDenied,
    /// A program that exists and cannot be run.
    #[n(2)]
    NotExecutable,
    /// A directory was needed.
    #[n(3)]
    NotADirectory,
    /// Something else than a directory was needed.
    #[n(4)]
    IsADirectory,
    /// The target exists and must not.
    #[n(5)]
    AlreadyExists,
    /// No such user or group in the guest.
    #[n(6)]
    NoSuchUser,
    /// The request itself makes no sense.
    #[n(7)]
    InvalidInput,
    /// The guest's disk is full.
    #[n(8)]
    NoSpace,
    /// Too much at once: streams, processes, descriptors, memory.
    #[n(9)]
    TooMany,
    /// The machine is going down.
    #[n(10)]
    ShuttingDown,
    /// Anything else the guest's kernel said.
    #[n(11)]
    Io,
    /// Nothing listens there.
    #[n(12)]
    Refused,
    /// There is no way there, or no answer in time.
    #[n(13)]
    Unreachable,
    /// Something else listens there already.
    #[n(14)]
    AddressInUse,
}

/// A file, as a listing shows it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Entry {
    /// Name in its directory.
    #[n(0)]
    pub name: ByteVec,
    /// What it is.
    #[n(1)]
    pub kind: EntryKind,
    /// Permission bits and the three bits above them.
    #[n(2)]
    pub mode: u32,
    /// Bytes.
    #[n(3)]
    pub size: u64,
    /// Seconds since 1970-01-01T00:00:00Z of the last change of content.
    #[n(4)]
    pub modified_s: i64,
    /// Owner.
    #[n(5)]
    pub uid: u32,
    /// Group.
    #[n(6)]
    pub gid: u32,
    /// Where a symbolic link points.
    #[n(7)]
    pub target: Option<ByteVec>,
}

/// The kinds of file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum EntryKind {
    /// Regular file.
    #[n(0)]
    File,
    /// Directory.
    #[n(1)]
    Directory,
    /// Symbolic link.
    #[n(2)]
    Symlink,
    /// Socket, pipe or device.
    #[n(3)]
    Other,
}

/// The guest's state.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Facts {
    /// Milliseconds since the guest's kernel started.
    #[n(0)]
    pub uptime_ms: u64,
    /// Bytes of memory the guest's kernel manages.
    #[n(1)]
    pub memory_total: u64,
    /// Bytes it could give to a new program (`MemAvailable` of proc(5)).
    #[n(2)]
    pub memory_available: u64,
    /// Load averages over 1, 5 and 15 minutes, in thousandths.
    #[n(3)]
    pub load_milli: [u32; 3],
    /// Processes other than kernel threads.
    #[n(4)]
    pub processes: u32,
    /// Bytes of the root file system's writable layer.
    #[n(5)]
    pub disk_total: u64,
    /// Bytes free there for root.
    #[n(6)]
    pub disk_free: u64,
    /// Nanoseconds since 1970-01-01T00:00:00Z by the guest's clock.
    #[n(7)]
    pub wall_clock_ns: u64,
}

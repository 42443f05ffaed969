//! The agent's own program, run on this machine, and a host to talk to it.

#![expect(
    dead_code,
    reason = "each test program uses a part of what both have in common"
)]

use std::collections::{HashMap, VecDeque};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use smolvm_proto::limits::NONCE_BYTES;
use smolvm_proto::message::{
    ArchiveRequest, Event, ExecRequest, Exited, ExtractRequest, Failure, FailureKind,
};
use smolvm_proto::version::{Hello, Nonce};
use smolvm_proto::{Channel, Decoder, Frame, Kind, Rejoin, Request};

/// How long anything may take before a test gives up. No test waits for it when all is well.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The agent, and the host's end of its socket.
pub(crate) struct Guest {
    agent: Child,
    socket: Option<UnixStream>,
    decoder: Decoder,
    frames: HashMap<u32, VecDeque<Frame>>,
    next: u32,
    cgroups: Option<PathBuf>,
}

/// What a stream came to.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) output: Vec<u8>,
    pub(crate) error: Vec<u8>,
    /// All events, the terminal one last; none if the agent reset the stream.
    pub(crate) events: Vec<Event>,
}

impl Outcome {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.output).into_owned()
    }

    pub(crate) fn exited(&self) -> &Exited {
        match self.events.last() {
            Some(Event::Exited(exited)) => exited,
            other => panic!("the command did not run: {other:?}"),
        }
    }

    pub(crate) fn failure(&self) -> &Failure {
        match self.events.last() {
            Some(Event::Failed(failure)) => failure,
            other => panic!("it did not fail: {other:?}"),
        }
    }

    pub(crate) fn kind(&self) -> FailureKind {
        self.failure().kind
    }

    pub(crate) fn done(&self) {
        assert_eq!(self.events.last(), Some(&Event::Done));
    }
}

impl Guest {
    /// Starts an agent with control groups, if this machine lets us have them.
    pub(crate) fn start() -> Self {
        Self::with_cgroups(cgroup_directory())
    }

    /// Lets the agent have no new descriptor of this number or above (`RLIMIT_NOFILE`), and says what
    /// the limit was.
    pub(crate) fn limit_descriptors(&self, below: u64) -> u64 {
        let pid = i32::try_from(self.agent.id()).ok();
        let pid = pid.and_then(rustix::process::Pid::from_raw);
        let before = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        let limit = rustix::process::Rlimit {
            current: Some(below),
            maximum: before.maximum,
        };
        rustix::process::prlimit(pid, rustix::process::Resource::Nofile, limit)
            .expect("a limit")
            .current
            .expect("there is one")
    }

    /// Starts an agent that has to do without control groups.
    pub(crate) fn without_cgroups() -> Self {
        Self::with_cgroups(None)
    }

    fn with_cgroups(cgroups: Option<PathBuf>) -> Self {
        let (ours, theirs) = UnixStream::pair().expect("socket pair");
        ours.set_read_timeout(Some(PATIENCE)).expect("timeout");
        ours.set_write_timeout(Some(PATIENCE)).expect("timeout");
        let mut command = Command::new(env!("CARGO_BIN_EXE_smolvm-agent"));
        command
            .arg("--serve-stdin")
            .stdin(Stdio::from(OwnedFd::from(theirs)));
        if let Some(directory) = &cgroups {
            command.arg("--cgroups").arg(directory);
        }
        let mut guest = Self {
            agent: command.spawn().expect("the agent starts"),
            socket: Some(ours),
            decoder: Decoder::new(),
            frames: HashMap::new(),
            next: 1,
            cgroups,
        };
        guest.hello();
        guest
    }

    /// Whether commands run in control groups.
    pub(crate) fn has_cgroups(&self) -> bool {
        self.cgroups.is_some()
    }

    pub(crate) fn hello(&mut self) -> Hello {
        let frame = self.frame(0);
        assert_eq!(frame.kind, Kind::Hello);
        frame.decode().expect("a Hello")
    }

    /// Becomes another host, which has heard nothing so far, and hears the answer to its Hello.
    /// Returns how many bytes came before that.
    pub(crate) fn rejoin(&mut self, keep_commands: bool) -> usize {
        let mut nonce = Nonce::from([0; NONCE_BYTES]);
        rustix::rand::getrandom(&mut nonce[..], rustix::rand::GetRandomFlags::empty())
            .expect("random bytes");
        self.frames.clear();
        let hello = Hello::of_host(nonce, keep_commands);
        self.send(&Frame::message(0, Kind::Hello, &hello));
        let mut rejoin = Rejoin::new(nonce);
        let mut before = 0;
        loop {
            let bytes = self.read();
            before += bytes.len();
            if let Some((answer, decoder)) = rejoin.feed(&bytes) {
                assert_eq!(decoder.pending(), 0, "nothing is said unasked");
                self.decoder = decoder;
                return before - answer.to_bytes().len();
            }
        }
    }

    fn read(&mut self) -> Vec<u8> {
        self.read_at_most(64 * 1024)
    }

    /// Reads `step` bytes at a time until some of a frame were read, but not all of it.
    pub(crate) fn read_into_a_frame(&mut self, step: usize) {
        loop {
            let bytes = self.read_at_most(step);
            self.decoder.feed(&bytes);
            while self.decoder.next_frame().expect("a frame").is_some() {}
            if self.decoder.pending() > 0 {
                return;
            }
        }
    }

    fn read_at_most(&mut self, bytes: usize) -> Vec<u8> {
        let mut buffer = vec![0; bytes];
        let socket = self.socket.as_mut().expect("open");
        let length = socket.read(&mut buffer).expect("the agent answers");
        assert_ne!(length, 0, "the agent closed the socket");
        buffer.truncate(length);
        buffer
    }

    pub(crate) fn send_bytes(&mut self, bytes: &[u8]) {
        let socket = self.socket.as_mut().expect("open");
        socket.write_all(bytes).expect("the agent reads");
    }

    pub(crate) fn send(&mut self, frame: &Frame) {
        self.send_bytes(&frame.to_bytes());
    }

    pub(crate) fn open(&mut self, request: &Request) -> u32 {
        let stream = self.next;
        self.next += 1;
        self.send(&Frame::message(stream, Kind::Open, request));
        stream
    }

    pub(crate) fn data(&mut self, stream: u32, bytes: &[u8]) {
        let frame = Frame::new(stream, Kind::Data, Channel::Input, bytes.to_vec());
        self.send(&frame);
    }

    pub(crate) fn end_input(&mut self, stream: u32) {
        self.send(&Frame::bare(stream, Kind::Eof, Channel::Input));
    }

    pub(crate) fn reset(&mut self, stream: u32) {
        self.send(&Frame::bare(stream, Kind::Reset, Channel::Input));
    }

    /// The next frame of a stream. Those of other streams are kept for later.
    pub(crate) fn frame(&mut self, stream: u32) -> Frame {
        loop {
            if let Some(frame) = self.frames.get_mut(&stream).and_then(VecDeque::pop_front) {
                return frame;
            }
            self.receive();
        }
    }

    fn receive(&mut self) {
        let bytes = self.read();
        self.decoder.feed(&bytes);
        while let Some(frame) = self.decoder.next_frame().expect("a frame") {
            self.frames
                .entry(frame.stream)
                .or_default()
                .push_back(frame);
        }
    }

    /// Follows a stream to its end, granting credit for all that comes.
    pub(crate) fn finish(&mut self, stream: u32) -> Outcome {
        self.finish_with(
            stream,
            Outcome {
                output: Vec::new(),
                error: Vec::new(),
                events: Vec::new(),
            },
        )
    }

    pub(crate) fn finish_with(&mut self, stream: u32, mut outcome: Outcome) -> Outcome {
        let mut ended = Vec::new();
        loop {
            let frame = self.frame(stream);
            match frame.kind {
                Kind::Data => {
                    assert!(!ended.contains(&frame.channel), "data after the end");
                    let length = u32::try_from(frame.payload.len()).expect("bounded");
                    match frame.channel {
                        Channel::Output => outcome.output.extend(&frame.payload),
                        Channel::Error => outcome.error.extend(&frame.payload),
                        Channel::Input => panic!("data from the guest on the input"),
                    }
                    self.send(&Frame::credit(stream, frame.channel, length));
                }
                Kind::Eof => ended.push(frame.channel),
                Kind::Event => {
                    let event: Event = frame.decode().expect("an event");
                    let last = event.is_terminal();
                    outcome.events.push(event);
                    if last {
                        return outcome;
                    }
                }
                Kind::Reset => return outcome,
                Kind::Credit => {}
                other => panic!("unexpected frame: {other:?}"),
            }
        }
    }

    /// Runs a request to its end.
    pub(crate) fn ask(&mut self, request: &Request) -> Outcome {
        let stream = self.open(request);
        self.finish(stream)
    }

    /// Runs a shell script to its end.
    pub(crate) fn shell(&mut self, script: &str) -> Outcome {
        self.ask(&shell(script))
    }

    /// Reads standard output up to and including the first newline.
    pub(crate) fn first_line(&mut self, stream: u32) -> String {
        let mut line = Vec::new();
        while !line.contains(&b'\n') {
            let frame = self.frame(stream);
            match frame.kind {
                Kind::Data if frame.channel == Channel::Output => line.extend(frame.payload),
                Kind::Event => match frame.decode().expect("an event") {
                    Event::Started(_) => {}
                    other => panic!("it ended early: {other:?}"),
                },
                other => panic!("unexpected frame: {other:?}"),
            }
        }
        String::from_utf8(line).expect("text").trim().to_owned()
    }

    /// Downloads a path as a tar stream.
    pub(crate) fn archive(&mut self, path: &Path) -> Outcome {
        self.ask(&Request::Archive(ArchiveRequest {
            path: bytes_of(path).into(),
            follow: false,
            complete: None,
            hold: None,
        }))
    }

    /// Uploads a tar stream into a directory.
    pub(crate) fn extract(&mut self, directory: &Path, tar: &[u8]) -> Outcome {
        let stream = self.open(&Request::Extract(ExtractRequest {
            directory: bytes_of(directory).into(),
            make_parents: false,
            owner: None,
            file: None,
        }));
        self.upload(stream, tar);
        self.finish(stream)
    }

    /// Sends input as the agent grants credit for it, until the end or the agent's refusal.
    pub(crate) fn upload(&mut self, stream: u32, bytes: &[u8]) {
        let mut credit = smolvm_proto::limits::WINDOW_BYTES as usize;
        let mut rest = bytes;
        while !rest.is_empty() {
            while credit == 0 {
                let frame = self.frame(stream);
                match frame.kind {
                    Kind::Credit => credit += frame.credit_bytes().expect("a grant") as usize,
                    Kind::Event => {
                        self.frames.entry(stream).or_default().push_front(frame);
                        return;
                    }
                    other => panic!("unexpected frame: {other:?}"),
                }
            }
            let (now, later) = rest.split_at(rest.len().min(credit).min(60_000));
            self.data(stream, now);
            credit -= now.len();
            rest = later;
        }
        self.end_input(stream);
    }

    /// Closes the socket and returns the agent's exit code.
    pub(crate) fn close(&mut self) -> Option<i32> {
        self.socket = None;
        self.agent.wait().expect("the agent ends").code()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.socket = None;
        if std::thread::panicking() {
            let _ = self.agent.kill();
        }
        let _ = self.agent.wait();
        if let Some(directory) = &self.cgroups {
            for group in std::fs::read_dir(directory).into_iter().flatten().flatten() {
                let _ = std::fs::remove_dir(group.path());
            }
            let _ = std::fs::remove_dir(directory);
        }
    }
}

/// A directory for control groups of our own, if this machine has version 2 and lets us write.
fn cgroup_directory() -> Option<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").ok()?;
    let mount = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let target = fields.next()?;
        (fields.next()? == "cgroup2").then(|| PathBuf::from(target))
    })?;
    let name = format!("smolvm-agent-{}", unique());
    let directory = mount.join(name);
    std::fs::create_dir(&directory).ok()?;
    if directory.join("cgroup.kill").exists() {
        Some(directory)
    } else {
        let _ = std::fs::remove_dir(&directory);
        None
    }
}

fn unique() -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{}-{number}", std::process::id())
}

/// The user the tests run as: only root may run commands as somebody else.
pub(crate) fn me() -> String {
    let (uid, gid) = (rustix::process::getuid(), rustix::process::getgid());
    format!("{}:{}", uid.as_raw(), gid.as_raw())
}

pub(crate) fn bytes_of(path: &Path) -> Vec<u8> {
    std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str()).to_vec()
}

/// A command, to be changed where a test needs it.
pub(crate) fn command(argv: &[&str]) -> ExecRequest {
    ExecRequest {
        argv: argv
            .iter()
            .map(|part| part.as_bytes().to_vec().into())
            .collect(),
        env: Vec::new(),
        cwd: Some(b"/".to_vec().into()),
        user: Some(me()),
        timeout_ms: None,
        terminal: None,
        stdin: false,
        program: None,
    }
}

pub(crate) fn shell(script: &str) -> Request {
    Request::Exec(command(&["sh", "-c", script]))
}

/// A process that is watched for its end.
pub(crate) struct Watched(OwnedFd);

impl Watched {
    pub(crate) fn new(pid: &str) -> Self {
        let pid: i32 = pid.parse().expect("a process number");
        let pid = rustix::process::Pid::from_raw(pid).expect("not zero");
        let fd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty());
        Self(fd.expect("the process is there"))
    }

    fn ends_within(&self, time: Duration) -> bool {
        let mut fds = [rustix::event::PollFd::new(
            &self.0,
            rustix::event::PollFlags::IN,
        )];
        let time = rustix::time::Timespec {
            tv_sec: i64::try_from(time.as_secs()).expect("short"),
            tv_nsec: 0,
        };
        rustix::event::poll(&mut fds, Some(&time)).expect("poll") == 1
    }

    pub(crate) fn assert_ends(&self) {
        assert!(self.ends_within(PATIENCE), "the process is still there");
    }

    pub(crate) fn assert_alive(&self) {
        assert!(!self.ends_within(Duration::ZERO), "the process is gone");
    }

    pub(crate) fn kill(&self) {
        rustix::process::pidfd_send_signal(&self.0, rustix::process::Signal::KILL)
            .expect("ours to kill");
    }
}

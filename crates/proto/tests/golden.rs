//! The bytes of protocol version 1, recorded.
//!
//! An agent lives on in templates and snapshots, so what it says and understands may not change
//! under its version number. `golden/v1.txt` has one line for each message and each form it takes:
//! a name and the bytes in hexadecimal. Lines are added when a message gains a variant or a field;
//! a line that is there is never changed, because an agent somewhere speaks it.

use std::collections::BTreeMap;
use std::fmt::{Debug, Write as _};

use minicbor::bytes::ByteVec;
use minicbor::{Decode, Encode};
use smolvm_proto::keeper::{
    CaptureRequest, Captured, ClaimRequest, Done, GrowDiskRequest, KeeperEvent, KeeperFailure,
    KeeperReason, KeeperRequest, NetworkPolicy, PortMapping, PortPlace, Ready, Starter,
    StopRequest,
};
use smolvm_proto::message::{
    ArchiveRequest, Birth, Control, Entry, EntryKind, EnvVar, Event, ExecRequest, Exited,
    ExtractRequest, Facts, Failure, FailureKind, GrowRequest, ListRequest, MountRequest, Network,
    Program, Request, ShutdownRequest, Started, Volume, WindowSize,
};
use smolvm_proto::socket::{
    AcceptRequest, Accepted, ConnectRequest, Connected, DatagramsRequest, Endpoint, Internet,
    ListenRequest, Listening,
};
use smolvm_proto::version::{Hello, Nonce};
use smolvm_proto::{Channel, Decoder, Frame, Kind};

const RECORDED: &str = include_str!("golden/v1.txt");

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to memory");
        text
    })
}

fn unhex(text: &str) -> Vec<u8> {
    assert!(text.len().is_multiple_of(2), "half a byte in `{text}`");
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).expect("hexadecimal"))
        .collect()
}

fn recorded() -> BTreeMap<&'static str, Vec<u8>> {
    let mut lines = BTreeMap::new();
    for line in RECORDED
        .lines()
        .filter(|l| !l.is_empty() && !l.starts_with('#'))
    {
        let (name, bytes) = line.split_once(' ').expect("a name, a space, hexadecimal");
        assert!(
            lines.insert(name, unhex(bytes)).is_none(),
            "`{name}` is recorded twice"
        );
    }
    lines
}

/// What is compared, and what was found wrong.
struct Check {
    recorded: BTreeMap<&'static str, Vec<u8>>,
    wrong: Vec<String>,
}

impl Check {
    /// The recorded bytes mean `value`, and `value` is written as the recorded bytes.
    fn message<M>(&mut self, name: &str, value: &M)
    where
        M: for<'b> Decode<'b, ()> + Encode<()> + PartialEq + Debug,
    {
        let bytes = minicbor::to_vec(value).expect("writing to memory");
        let Some(expected) = self.bytes(name, &bytes) else {
            return;
        };
        match minicbor::decode::<M>(&expected) {
            Ok(decoded) if decoded == *value => {}
            other => self
                .wrong
                .push(format!("{name}: the recorded bytes mean {other:?}")),
        }
    }

    /// The recorded bytes are this frame, header and all.
    fn frame(&mut self, name: &str, frame: &Frame) {
        let Some(expected) = self.bytes(name, &frame.to_bytes()) else {
            return;
        };
        let mut decoder = Decoder::new();
        decoder.feed(&expected);
        match decoder.next_frame() {
            Ok(Some(decoded)) if decoded == *frame && decoder.pending() == 0 => {}
            other => self
                .wrong
                .push(format!("{name}: the recorded bytes mean {other:?}")),
        }
    }

    fn bytes(&mut self, name: &str, bytes: &[u8]) -> Option<Vec<u8>> {
        let Some(expected) = self.recorded.remove(name) else {
            self.wrong.push(format!(
                "not recorded, add this line:\n{name} {}",
                hex(bytes)
            ));
            return None;
        };
        if expected != bytes {
            self.wrong.push(format!(
                "{name}: recorded as {}, written as {}",
                hex(&expected),
                hex(bytes)
            ));
        }
        Some(expected)
    }
}

fn bytes(text: &str) -> ByteVec {
    ByteVec::from(text.as_bytes().to_vec())
}

fn env(name: &str, value: &str) -> EnvVar {
    EnvVar {
        name: bytes(name),
        value: bytes(value),
    }
}

const SIZE: WindowSize = WindowSize {
    rows: 24,
    columns: 80,
};

fn internet() -> Internet {
    Internet {
        host: "::1".to_owned(),
        port: 65_535,
    }
}

/// Every form a request takes. The `match` has no wildcard: a new variant does not compile until
/// it has a name, and a name without a recorded line fails.
fn requests() -> Vec<(&'static str, Request)> {
    let bare = ExecRequest {
        argv: vec![bytes("true")],
        env: Vec::new(),
        cwd: None,
        user: None,
        timeout_ms: None,
        terminal: None,
        stdin: false,
        program: None,
    };
    let full = ExecRequest {
        argv: vec![bytes("sh"), bytes("-c"), ByteVec::from(vec![0xff, 0xfe])],
        env: vec![env("A", "1"), env("EMPTY", "")],
        cwd: Some(bytes("/tmp")),
        user: Some("1000:1000".to_owned()),
        timeout_ms: Some(u64::MAX),
        terminal: Some(SIZE),
        stdin: true,
        program: None,
    };
    let inside = |program| ExecRequest {
        program: Some(program),
        ..bare.clone()
    };
    let (shell, sftp) = (inside(Program::Shell), inside(Program::Sftp));
    let birth = Birth {
        hostname: "box".to_owned(),
        env: vec![env("LANG", "C.UTF-8")],
        wall_clock_ns: 1_700_000_000_000_000_000,
        entropy: ByteVec::from(vec![0, 1, 2, 255]),
        cwd: Some(bytes("/srv")),
        user: Some("nobody".to_owned()),
        same: None,
        network: None,
        volumes: None,
        machine_id: None,
    };
    let network = Network {
        address: [172, 16, 0, 2].into(),
        gateway: [172, 16, 0, 1].into(),
        mac: [6, 0x73, 172, 16, 0, 2].into(),
        gateway_mac: [2, 0x73, 0x6d, 0, 0, 1].into(),
        name_server: [172, 16, 0, 1].into(),
    };
    let forms = vec![
        Request::Exec(bare),
        Request::Exec(full),
        Request::Exec(shell),
        Request::Exec(sftp),
        Request::Archive(ArchiveRequest {
            path: bytes("/etc"),
            follow: true,
            complete: None,
            hold: None,
        }),
        Request::Archive(ArchiveRequest {
            path: bytes("/"),
            follow: false,
            complete: Some(true),
            hold: Some(false),
        }),
        Request::Extract(ExtractRequest {
            directory: bytes("/tmp"),
            make_parents: true,
            owner: None,
            file: None,
        }),
        Request::Extract(ExtractRequest {
            directory: bytes("/tmp"),
            make_parents: false,
            owner: Some("root".to_owned()),
            file: None,
        }),
        Request::Extract(ExtractRequest {
            directory: bytes("/tmp"),
            make_parents: false,
            owner: Some("root".to_owned()),
            file: Some(bytes("a")),
        }),
        Request::List(ListRequest {
            path: bytes("/"),
            itself: false,
        }),
        Request::Facts,
        Request::Birth(Birth {
            cwd: None,
            user: None,
            ..birth.clone()
        }),
        Request::Birth(Birth {
            same: Some(true),
            ..birth.clone()
        }),
        Request::Birth(Birth {
            network: Some(network),
            ..birth.clone()
        }),
        Request::Birth(Birth {
            volumes: Some(vec![Volume {
                device: "/dev/vdc".to_owned(),
                bytes: 1 << 30,
                target: bytes("/srv"),
                read_only: true,
            }]),
            ..birth.clone()
        }),
        Request::Birth(Birth {
            machine_id: Some("0123456789abcdef0123456789abcdef".to_owned()),
            ..birth.clone()
        }),
        Request::Birth(birth),
        Request::Shutdown(ShutdownRequest { grace_ms: 10_000 }),
        Request::Ping,
        Request::Connect(ConnectRequest {
            to: Endpoint::localhost(8080),
            timeout_ms: None,
        }),
        Request::Connect(ConnectRequest {
            to: Endpoint::Local(bytes("/run/x.sock")),
            timeout_ms: Some(5_000),
        }),
        Request::Listen(ListenRequest {
            on: Endpoint::Internet(internet()),
            owner: None,
        }),
        Request::Listen(ListenRequest {
            on: Endpoint::Local(bytes("/run/x.sock")),
            owner: Some("nobody".to_owned()),
        }),
        Request::Accept(AcceptRequest { connection: 7 }),
        Request::Datagrams(DatagramsRequest { to: internet() }),
        Request::Grow(GrowRequest { bytes: 8 << 30 }),
        Request::Settle,
        Request::Mount(MountRequest {
            target: b"/srv/data".to_vec().into(),
            read_only: true,
        }),
    ];
    let name = |request: &Request| match request {
        Request::Exec(exec) if exec.stdin => "request.exec.full",
        Request::Exec(exec) if exec.program == Some(Program::Shell) => "request.exec.shell",
        Request::Exec(exec) if exec.program == Some(Program::Sftp) => "request.exec.sftp",
        Request::Exec(_) => "request.exec.bare",
        Request::Archive(archive) if archive.complete.is_some() => "request.archive.complete",
        Request::Archive(_) => "request.archive",
        Request::Extract(extract) if extract.file.is_some() => "request.extract.file",
        Request::Extract(extract) if extract.owner.is_some() => "request.extract.owner",
        Request::Extract(_) => "request.extract",
        Request::List(_) => "request.list",
        Request::Facts => "request.facts",
        Request::Birth(birth) if birth.same.is_some() => "request.birth.same",
        Request::Birth(birth) if birth.machine_id.is_some() => "request.birth.machine-id",
        Request::Birth(birth) if birth.volumes.is_some() => "request.birth.volumes",
        Request::Birth(birth) if birth.network.is_some() => "request.birth.network",
        Request::Birth(birth) if birth.user.is_some() => "request.birth.full",
        Request::Birth(_) => "request.birth.bare",
        Request::Shutdown(_) => "request.shutdown",
        Request::Ping => "request.ping",
        Request::Connect(connect) if connect.timeout_ms.is_some() => "request.connect.local",
        Request::Connect(_) => "request.connect",
        Request::Listen(listen) if listen.owner.is_some() => "request.listen.local",
        Request::Listen(_) => "request.listen",
        Request::Accept(_) => "request.accept",
        Request::Datagrams(_) => "request.datagrams",
        Request::Grow(_) => "request.grow",
        Request::Settle => "request.settle",
        Request::Mount(_) => "request.mount",
    };
    forms.into_iter().map(|form| (name(&form), form)).collect()
}

fn controls() -> Vec<(&'static str, Control)> {
    let name = |control: &Control| match control {
        Control::Signal(number) if *number < 0 => "control.signal.negative",
        Control::Signal(_) => "control.signal",
        Control::Resize(_) => "control.resize",
    };
    [
        Control::Signal(15),
        Control::Signal(-1),
        Control::Resize(SIZE),
    ]
    .into_iter()
    .map(|form| (name(&form), form))
    .collect()
}

const FAILURE_KINDS: [FailureKind; 15] = [
    FailureKind::NotFound,
    FailureKind::PermissionDenied,
    FailureKind::NotExecutable,
    FailureKind::NotADirectory,
    FailureKind::IsADirectory,
    FailureKind::AlreadyExists,
    FailureKind::NoSuchUser,
    FailureKind::InvalidInput,
    FailureKind::NoSpace,
    FailureKind::TooMany,
    FailureKind::ShuttingDown,
    FailureKind::Io,
    FailureKind::Refused,
    FailureKind::Unreachable,
    FailureKind::AddressInUse,
];

fn failure_name(kind: FailureKind) -> &'static str {
    match kind {
        FailureKind::NotFound => "event.failed.not-found",
        FailureKind::PermissionDenied => "event.failed.permission-denied",
        FailureKind::NotExecutable => "event.failed.not-executable",
        FailureKind::NotADirectory => "event.failed.not-a-directory",
        FailureKind::IsADirectory => "event.failed.is-a-directory",
        FailureKind::AlreadyExists => "event.failed.already-exists",
        FailureKind::NoSuchUser => "event.failed.no-such-user",
        FailureKind::InvalidInput => "event.failed.invalid-input",
        FailureKind::NoSpace => "event.failed.no-space",
        FailureKind::TooMany => "event.failed.too-many",
        FailureKind::ShuttingDown => "event.failed.shutting-down",
        FailureKind::Io => "event.failed.io",
        FailureKind::Refused => "event.failed.refused",
        FailureKind::Unreachable => "event.failed.unreachable",
        FailureKind::AddressInUse => "event.failed.address-in-use",
    }
}

fn entry(name: &str, kind: EntryKind, target: Option<&str>) -> Entry {
    Entry {
        name: bytes(name),
        kind,
        mode: 0o644,
        size: 5_000_000_000,
        modified_s: -1,
        uid: 0,
        gid: 1000,
        target: target.map(bytes),
    }
}

fn events() -> Vec<(&'static str, Event)> {
    let exited = |code, signal, timed_out| {
        Event::Exited(Exited {
            code,
            signal,
            timed_out,
            duration_us: 1_234_567,
        })
    };
    let mut forms = vec![
        Event::Started(Started { pid: 4_000_000_000 }),
        exited(Some(0), None, false),
        exited(None, Some(9), true),
        Event::Entries(Vec::new()),
        Event::Entries(vec![
            entry("a", EntryKind::File, None),
            entry("b", EntryKind::Directory, None),
            entry("c", EntryKind::Symlink, Some("a")),
            entry("d", EntryKind::Other, None),
        ]),
        Event::Facts(Facts {
            uptime_ms: 1,
            memory_total: 2,
            memory_available: 3,
            load_milli: [4, 5, 60_000],
            processes: 6,
            disk_total: u64::MAX,
            disk_free: 8,
            wall_clock_ns: 9,
        }),
        Event::Done,
        Event::Connected(Connected {
            peer: "[::1]:80".to_owned(),
        }),
        Event::Listening(Listening { port: 40_000 }),
        Event::Accepted(Accepted {
            connection: u64::MAX,
            peer: Some(internet()),
        }),
        Event::Accepted(Accepted {
            connection: 0,
            peer: None,
        }),
    ];
    forms.extend(FAILURE_KINDS.map(|kind| {
        Event::Failed(Failure {
            kind,
            message: "why".to_owned(),
        })
    }));
    let name = |event: &Event| match event {
        Event::Started(_) => "event.started",
        Event::Exited(exited) if exited.timed_out => "event.exited.signal",
        Event::Exited(_) => "event.exited.code",
        Event::Failed(failure) => failure_name(failure.kind),
        Event::Entries(entries) if entries.is_empty() => "event.entries.none",
        Event::Entries(_) => "event.entries.some",
        Event::Facts(_) => "event.facts",
        Event::Done => "event.done",
        Event::Connected(_) => "event.connected",
        Event::Listening(_) => "event.listening",
        Event::Accepted(accepted) if accepted.peer.is_some() => "event.accepted",
        Event::Accepted(_) => "event.accepted.local",
    };
    forms.into_iter().map(|form| (name(&form), form)).collect()
}

fn mapping() -> PortMapping {
    PortMapping {
        host: PortPlace {
            datagrams: true,
            address: "127.0.0.1".to_owned(),
            port: 5353,
        },
        guest: 53,
    }
}

fn keeper_requests() -> Vec<(&'static str, KeeperRequest)> {
    let name = |request: &KeeperRequest| match request {
        KeeperRequest::WaitReady => "keeper-request.wait-ready",
        KeeperRequest::Own => "keeper-request.own",
        KeeperRequest::Stop(_) => "keeper-request.stop",
        KeeperRequest::Destroy => "keeper-request.destroy",
        KeeperRequest::Pause => "keeper-request.pause",
        KeeperRequest::Resume => "keeper-request.resume",
        KeeperRequest::Capture(_) => "keeper-request.capture",
        KeeperRequest::Publish(_) => "keeper-request.publish",
        KeeperRequest::Unpublish(_) => "keeper-request.unpublish",
        KeeperRequest::Claim(claim) if claim.ports.is_some() => "keeper-request.claim.ports",
        KeeperRequest::Claim(claim) if claim.network.is_some() => "keeper-request.claim.network",
        KeeperRequest::Claim(claim) if claim.ssh_keys.is_some() => "keeper-request.claim.ssh",
        KeeperRequest::Claim(claim) if claim.ephemeral => "keeper-request.claim.full",
        KeeperRequest::Claim(_) => "keeper-request.claim.bare",
        KeeperRequest::SetNetwork(_) => "keeper-request.set-network",
        KeeperRequest::WriteDenied => "keeper-request.write-denied",
        KeeperRequest::GrowDisk(_) => "keeper-request.grow-disk",
    };
    let policy = NetworkPolicy {
        reach: "listed".to_owned(),
        allowed: vec!["*.example.com".to_owned(), "10.0.0.0/8".to_owned()],
    };
    let claim = ClaimRequest {
        name: "box".to_owned(),
        env: Vec::new(),
        cwd: None,
        user: None,
        ttl_ms: None,
        ephemeral: false,
        starter: None,
        ports: None,
        network: None,
        ssh_keys: None,
    };
    [
        KeeperRequest::WaitReady,
        KeeperRequest::Own,
        KeeperRequest::Stop(StopRequest { grace_ms: 5_000 }),
        KeeperRequest::Destroy,
        KeeperRequest::Pause,
        KeeperRequest::Resume,
        KeeperRequest::Capture(CaptureRequest {
            directory: bytes("/srv/\u{e9}"),
        }),
        KeeperRequest::Claim(claim.clone()),
        KeeperRequest::Claim(ClaimRequest {
            network: Some(policy.clone()),
            ..claim.clone()
        }),
        KeeperRequest::SetNetwork(policy),
        KeeperRequest::WriteDenied,
        KeeperRequest::GrowDisk(GrowDiskRequest { disk_mib: 8192 }),
        KeeperRequest::Claim(ClaimRequest {
            env: vec![env("LANG", "C.UTF-8")],
            cwd: Some("/srv".to_owned()),
            user: Some("nobody".to_owned()),
            ttl_ms: Some(60_000),
            ephemeral: true,
            starter: Some(Starter {
                pid: 4_194_304,
                start_time_ticks: 123_456,
                boot_id: "b".to_owned(),
            }),
            ..claim.clone()
        }),
        KeeperRequest::Claim(ClaimRequest {
            ports: Some(vec![mapping()]),
            ..claim.clone()
        }),
        KeeperRequest::Claim(ClaimRequest {
            ssh_keys: Some(vec!["key".to_owned()]),
            ..claim
        }),
        KeeperRequest::Publish(mapping()),
        KeeperRequest::Unpublish(mapping().host),
    ]
    .into_iter()
    .map(|form| (name(&form), form))
    .collect()
}

const KEEPER_REASONS: [KeeperReason; 6] = [
    KeeperReason::NameTaken,
    KeeperReason::NotParked,
    KeeperReason::Busy,
    KeeperReason::NotFound,
    KeeperReason::InvalidInput,
    KeeperReason::PermissionDenied,
];

fn failed_with(reason: Option<KeeperReason>) -> &'static str {
    match reason {
        None => "keeper-event.failed.hint",
        Some(KeeperReason::NameTaken) => "keeper-event.failed.name-taken",
        Some(KeeperReason::NotParked) => "keeper-event.failed.not-parked",
        Some(KeeperReason::Busy) => "keeper-event.failed.busy",
        Some(KeeperReason::NotFound) => "keeper-event.failed.not-found",
        Some(KeeperReason::InvalidInput) => "keeper-event.failed.invalid-input",
        Some(KeeperReason::PermissionDenied) => "keeper-event.failed.permission-denied",
    }
}

fn keeper_events() -> Vec<(&'static str, KeeperEvent)> {
    let name = |event: &KeeperEvent| match event {
        KeeperEvent::Ready(ready) if ready.booted_because.is_some() => "keeper-event.ready.booted",
        KeeperEvent::Ready(_) => "keeper-event.ready",
        KeeperEvent::Done(_) => "keeper-event.done",
        KeeperEvent::Failed(failure) if failure.hint.is_some() => failed_with(failure.reason),
        KeeperEvent::Failed(failure) if failure.reason.is_some() => "keeper-event.failed.reason",
        KeeperEvent::Failed(_) => "keeper-event.failed",
        KeeperEvent::Captured(_) => "keeper-event.captured",
        KeeperEvent::Published(_) => "keeper-event.published",
    };
    [
        KeeperEvent::Ready(Ready {
            kernel: "6.1.0".to_owned(),
            vmm_us: 1,
            hello_us: 2_000_000,
            ready_us: 2_000_001,
            booted_because: None,
        }),
        KeeperEvent::Ready(Ready {
            kernel: String::new(),
            vmm_us: 1,
            hello_us: 2,
            ready_us: 3,
            booted_because: Some("why".to_owned()),
        }),
        KeeperEvent::Done(Done { forced: true }),
        KeeperEvent::Failed(KeeperFailure {
            message: "why".to_owned(),
            console: vec!["last".to_owned(), "words".to_owned()],
            reason: None,
            hint: None,
        }),
        KeeperEvent::Failed(KeeperFailure {
            message: "why".to_owned(),
            console: Vec::new(),
            reason: Some(KeeperReason::NotParked),
            hint: None,
        }),
        KeeperEvent::Captured(Captured { paused_us: 12_345 }),
        KeeperEvent::Published(mapping()),
    ]
    .into_iter()
    .chain(KEEPER_REASONS.map(|reason| {
        KeeperEvent::Failed(KeeperFailure {
            message: "why".to_owned(),
            console: Vec::new(),
            reason: Some(reason),
            hint: Some("do".to_owned()),
        })
    }))
    .map(|form| (name(&form), form))
    .collect()
}

fn hello() -> Hello {
    Hello {
        version_min: 1,
        version_max: 1,
        agent: "0.1.0".to_owned(),
        kernel: "6.1.0".to_owned(),
        uptime_ms: 1_500,
        nonce: None,
        keep_commands: None,
    }
}

/// What a host says to a guest that runs already, and the guest's answer.
fn rejoining() -> [(&'static str, Hello); 3] {
    let nonce = Nonce::from(*b"\x00\x01not guessable\xff");
    [
        ("hello.host.keep", Hello::of_host(nonce, true)),
        ("hello.host.kill", Hello::of_host(nonce, false)),
        (
            "hello.answer",
            Hello {
                nonce: Some(nonce),
                ..hello()
            },
        ),
    ]
}

fn frames() -> Vec<(&'static str, Frame)> {
    let kinds = [
        Kind::Hello,
        Kind::Open,
        Kind::Event,
        Kind::Data,
        Kind::Eof,
        Kind::Credit,
        Kind::Control,
        Kind::Reset,
        Kind::KeeperOpen,
        Kind::KeeperEvent,
    ];
    let form = |kind| match kind {
        Kind::Hello => ("frame.hello", Frame::message(0, kind, &hello())),
        Kind::Open => ("frame.open", Frame::message(1, kind, &Request::Ping)),
        Kind::Event => ("frame.event", Frame::message(1, kind, &Event::Done)),
        Kind::Data => (
            "frame.data",
            Frame::new(7, kind, Channel::Error, b"oops\n".to_vec()),
        ),
        Kind::Eof => ("frame.eof", Frame::bare(u32::MAX, kind, Channel::Output)),
        Kind::Credit => ("frame.credit", Frame::credit(7, Channel::Input, 131_072)),
        Kind::Control => (
            "frame.control",
            Frame::message(7, kind, &Control::Signal(2)),
        ),
        Kind::Reset => ("frame.reset", Frame::bare(7, kind, Channel::Input)),
        Kind::KeeperOpen => (
            "frame.keeper-open",
            Frame::message(3, kind, &KeeperRequest::Own),
        ),
        Kind::KeeperEvent => (
            "frame.keeper-event",
            Frame::message(3, kind, &KeeperEvent::Done(Done::default())),
        ),
    };
    kinds.into_iter().map(form).collect()
}

#[test]
fn version_1_is_as_recorded() {
    let mut check = Check {
        recorded: recorded(),
        wrong: Vec::new(),
    };
    check.message("hello", &hello());
    for (name, value) in rejoining() {
        check.message(name, &value);
    }
    for (name, value) in requests() {
        check.message(name, &value);
    }
    for (name, value) in controls() {
        check.message(name, &value);
    }
    for (name, value) in events() {
        check.message(name, &value);
    }
    for (name, value) in keeper_requests() {
        check.message(name, &value);
    }
    for (name, value) in keeper_events() {
        check.message(name, &value);
    }
    for (name, value) in frames() {
        check.frame(name, &value);
    }
    for name in check.recorded.keys() {
        check.wrong.push(format!(
            "{name}: recorded, and nothing here says it any more"
        ));
    }
    assert!(check.wrong.is_empty(), "\n{}", check.wrong.join("\n"));
}

/// The same message from a peer that has one field more: a CBOR array one longer.
fn with_a_field_more(bytes: &[u8]) -> Vec<u8> {
    let mut longer = bytes.to_vec();
    assert!(
        (0x80..0x97).contains(&longer[0]),
        "a short array: {}",
        hex(bytes)
    );
    longer[0] += 1;
    longer.extend_from_slice(b"\x63new");
    longer
}

/// Decodes as the same value when the sender knows a field more.
fn skips_a_field_more<M>(value: &M)
where
    M: for<'b> Decode<'b, ()> + Encode<()> + PartialEq + Debug,
{
    let bytes = with_a_field_more(&minicbor::to_vec(value).expect("writing to memory"));
    match minicbor::decode::<M>(&bytes) {
        Ok(decoded) => assert_eq!(decoded, *value),
        Err(error) => panic!("{value:?} with a field more: {error}"),
    }
}

#[test]
fn a_field_this_version_does_not_know_is_skipped() {
    let [(_, host), ..] = rejoining();
    skips_a_field_more(&host);
    skips_a_field_more(&SIZE);
    skips_a_field_more(&Started { pid: 1 });
    skips_a_field_more(&Exited {
        code: Some(1),
        signal: None,
        timed_out: false,
        duration_us: 2,
    });
    skips_a_field_more(&entry("c", EntryKind::Symlink, Some("a")));
    skips_a_field_more(&Failure {
        kind: FailureKind::Io,
        message: "why".to_owned(),
    });
    skips_a_field_more(&ArchiveRequest {
        path: bytes("/"),
        follow: false,
        complete: Some(true),
        hold: Some(true),
    });
    skips_a_field_more(&StopRequest { grace_ms: 1 });
    skips_a_field_more(&Done { forced: false });
    for (_, request) in requests() {
        match request {
            Request::Exec(exec) if exec.program.is_some() => skips_a_field_more(&exec),
            Request::Birth(birth) if birth.machine_id.is_some() => skips_a_field_more(&birth),
            Request::Extract(extract) if extract.file.is_some() => skips_a_field_more(&extract),
            _ => {}
        }
    }
}

#[test]
fn an_optional_field_a_peer_does_not_know_is_absent() {
    // Four fields of `Birth`: what a host would send that never heard of the last two.
    let mut short = minicbor::Encoder::new(Vec::new());
    short
        .array(4)
        .and_then(|e| e.str("box"))
        .and_then(|e| e.array(0))
        .and_then(|e| e.u64(1))
        .and_then(|e| e.bytes(&[7]))
        .expect("writing to memory");
    let birth: Birth = minicbor::decode(&short.into_writer()).expect("well formed");
    assert_eq!(birth.hostname, "box");
    assert_eq!(birth.cwd, None);
    assert_eq!(birth.user, None);
    assert_eq!(birth.same, None);
    assert_eq!(birth.network, None);
    // A Hello from before hosts gave a nonce.
    let bare = &recorded()["hello"];
    assert_eq!(
        minicbor::decode::<Hello>(bare).expect("well formed"),
        hello()
    );
}

#[test]
fn a_variant_this_version_does_not_know_is_an_error() {
    // Variant 99 of a request with no fields; the frame is refused, nothing is guessed.
    let frame = Frame::new(1, Kind::Open, Channel::Input, vec![0x82, 0x18, 99, 0x80]);
    assert!(frame.decode::<Request>().is_err());
}

//! A conversation without a process: requests as bytes in, answers as bytes out.

use std::os::unix::fs::MetadataExt;

use super::*;

/// What a server answered.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Status(u32, String),
    Handle(Vec<u8>),
    Data(Vec<u8>),
    Names(Vec<(String, String)>),
    Attributes(Attributes),
    Other(u8, Vec<u8>),
}

struct Client {
    server: Server,
    next: u32,
    dir: tempfile::TempDir,
}

/// Builds the fields of a request.
#[derive(Default)]
struct Fields(Vec<u8>);

impl Fields {
    fn number(mut self, number: u32) -> Self {
        self.0.extend_from_slice(&number.to_be_bytes());
        self
    }

    fn long(mut self, number: u64) -> Self {
        self.0.extend_from_slice(&number.to_be_bytes());
        self
    }

    fn string(self, bytes: impl AsRef<[u8]>) -> Self {
        let bytes = bytes.as_ref();
        let mut fields = self.number(u32::try_from(bytes.len()).expect("short"));
        fields.0.extend_from_slice(bytes);
        fields
    }
}

fn fields() -> Fields {
    Fields::default()
}

impl Client {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let mut server = Server::new(dir.path().to_owned());
        let mut answers = Vec::new();
        server
            .answer(&[wire::INIT, 0, 0, 0, 3], &mut answers)
            .expect("a greeting");
        assert_eq!(answers[4..9], [wire::VERSION, 0, 0, 0, 3]);
        Self {
            server,
            next: 7,
            dir,
        }
    }

    fn path(&self, name: &str) -> Vec<u8> {
        self.dir.path().join(name).into_os_string().into_vec()
    }

    fn ask(&mut self, kind: u8, fields: Fields) -> Answer {
        self.next += 1;
        let mut request = vec![kind];
        request.extend_from_slice(&self.next.to_be_bytes());
        request.extend_from_slice(&fields.0);
        let mut answers = Vec::new();
        self.server
            .answer(&request, &mut answers)
            .expect("an answer");
        let length = wire::length(&answers).expect("a length");
        assert_eq!(length + 4, answers.len(), "one whole packet");
        let mut packet = Packet::new(&answers[4..]);
        let kind = packet.byte().expect("a kind");
        assert_eq!(packet.number(), Ok(self.next), "the request's number");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match kind {
            wire::STATUS => Answer::Status(
                packet.number().expect("a status"),
                text(packet.string().expect("words")),
            ),
            wire::HANDLE => Answer::Handle(packet.string().expect("a handle").to_vec()),
            wire::DATA => Answer::Data(packet.string().expect("data").to_vec()),
            wire::ATTRS => Answer::Attributes(packet.attributes().expect("attributes")),
            wire::NAME => {
                let count = packet.number().expect("a count");
                let names = (0..count).map(|_| {
                    let name = text(packet.string().expect("a name"));
                    let line = text(packet.string().expect("a line"));
                    packet.attributes().expect("attributes");
                    (name, line)
                });
                Answer::Names(names.collect())
            }
            other => Answer::Other(other, answers[9..].to_vec()),
        }
    }

    fn open(&mut self, name: &str, flags: u32) -> Vec<u8> {
        let fields = fields().string(self.path(name)).number(flags).number(0);
        match self.ask(wire::OPEN, fields) {
            Answer::Handle(handle) => handle,
            other => panic!("not open: {other:?}"),
        }
    }

    fn status(&mut self, kind: u8, fields: Fields) -> u32 {
        match self.ask(kind, fields) {
            Answer::Status(status, _) => status,
            other => panic!("no status: {other:?}"),
        }
    }

    /// The one name of an answer.
    fn name(&mut self, kind: u8, fields: Fields) -> String {
        match self.ask(kind, fields) {
            Answer::Names(mut names) if names.len() == 1 => names.remove(0).0,
            other => panic!("not one name: {other:?}"),
        }
    }
}

const NEW: u32 = open_flags::WRITE | open_flags::CREATE | open_flags::TRUNCATE;

#[test]
fn a_file_is_written_and_read_at_any_offset() {
    let mut client = Client::new();
    let handle = client.open("f", NEW | open_flags::READ);
    for (offset, text) in [(3, "def"), (0, "abc")] {
        let request = fields().string(&handle).long(offset).string(text);
        assert_eq!(client.status(wire::WRITE, request), 0);
    }
    let read = |offset, length| fields().string(&handle).long(offset).number(length);
    let answer = client.ask(wire::READ, read(2, 3));
    assert_eq!(answer, Answer::Data(b"cde".to_vec()));
    let answer = client.ask(wire::READ, read(4, u32::MAX));
    assert_eq!(
        answer,
        Answer::Data(b"ef".to_vec()),
        "only the end is short"
    );
    assert_eq!(client.status(wire::READ, read(6, 1)), Status::Eof as u32);
    assert_eq!(client.status(wire::CLOSE, fields().string(&handle)), 0);
    let closed = client.status(wire::READ, read(0, 1));
    assert_eq!(closed, Status::Failure as u32, "a handle ends with CLOSE");
    let content = std::fs::read(client.dir.path().join("f"));
    assert_eq!(content.expect("a file"), b"abcdef");
}

#[test]
fn flags_and_modes_of_open_are_kept_to() {
    let mut client = Client::new();
    std::fs::write(client.dir.path().join("there"), "old").expect("a file");
    let open = |client: &Client, name: &str, flags, mode: u32| {
        fields()
            .string(client.path(name))
            .number(flags)
            .number(4)
            .number(mode)
    };
    let exclusive = open(&client, "there", NEW | open_flags::EXCLUSIVE, 0o600);
    assert_eq!(
        client.status(wire::OPEN, exclusive),
        Status::Failure as u32,
        "it exists"
    );
    let missing = open(&client, "none", open_flags::READ, 0o600);
    let answer = client.ask(wire::OPEN, missing);
    let Answer::Status(2, words) = answer else {
        panic!("{answer:?}")
    };
    assert_eq!(words, "No such file or directory");
    let made = open(&client, "made", NEW, 0o640);
    assert!(matches!(client.ask(wire::OPEN, made), Answer::Handle(_)));
    let mode = std::fs::metadata(client.dir.path().join("made")).expect("a file");
    assert_eq!(mode.permissions().mode() & 0o777, 0o640);
    let append = client.open("there", open_flags::WRITE | open_flags::APPEND);
    let request = fields().string(&append).long(0).string("+new");
    assert_eq!(client.status(wire::WRITE, request), 0);
    let content = std::fs::read(client.dir.path().join("there"));
    assert_eq!(content.expect("a file"), b"old+new");
    client.open("there", NEW);
    let content = std::fs::read(client.dir.path().join("there"));
    assert_eq!(content.expect("a file"), b"", "cut");
}

#[test]
fn directories_are_listed_whole_with_lines_for_people() {
    let mut client = Client::new();
    let mut wanted = Vec::new();
    for number in 0..ENTRIES_MAX * 2 + 1 {
        let name = format!("f{number}");
        std::fs::write(client.dir.path().join(&name), "x").expect("a file");
        wanted.push(name);
    }
    let path = client.path("");
    let handle = match client.ask(wire::OPENDIR, fields().string(path)) {
        Answer::Handle(handle) => handle,
        other => panic!("{other:?}"),
    };
    let mut seen = Vec::new();
    let mut answers = 0;
    let end = loop {
        match client.ask(wire::READDIR, fields().string(&handle)) {
            Answer::Names(names) => {
                answers += 1;
                for (name, line) in names {
                    assert!(line.starts_with("-rw-r--r--   1 "), "{line}");
                    assert!(line.ends_with(&format!(" {name}")), "{line}");
                    seen.push(name);
                }
            }
            other => break other,
        }
    };
    assert!(matches!(end, Answer::Status(1, _)), "{end:?}");
    assert_eq!(answers, 3);
    seen.sort();
    wanted.sort();
    assert_eq!(seen, wanted);
    let file = client.path("f0");
    let no_directory = client.status(wire::OPENDIR, fields().string(file));
    assert_eq!(no_directory, Status::NoSuchFile as u32);
}

#[test]
fn attributes_are_told_and_set() {
    let mut client = Client::new();
    std::fs::write(client.dir.path().join("f"), "12345").expect("a file");
    std::os::unix::fs::symlink("f", client.dir.path().join("l")).expect("a link");
    let set = fields()
        .string(client.path("f"))
        .number(1 | 4 | 8)
        .long(3)
        .number(0o604)
        .number(1_000)
        .number(2_000);
    assert_eq!(client.status(wire::SETSTAT, set), 0);
    let path = client.path("l");
    let Answer::Attributes(found) = client.ask(wire::STAT, fields().string(&path)) else {
        panic!("no attributes")
    };
    assert_eq!(found.size, Some(3), "the link is followed");
    assert_eq!(found.permissions, Some(0o100_604));
    assert_eq!(found.times, Some((1_000, 2_000)));
    let Answer::Attributes(found) = client.ask(wire::LSTAT, fields().string(&path)) else {
        panic!("no attributes")
    };
    assert_eq!(
        found.permissions.map(|mode| mode & 0o170_000),
        Some(0o120_000)
    );
    let times = |path| {
        fields()
            .string("lsetstat@openssh.com")
            .string(path)
            .number(8)
            .number(5)
            .number(6)
    };
    assert_eq!(client.status(wire::EXTENDED, times(&path)), 0);
    let link = std::fs::symlink_metadata(client.dir.path().join("l")).expect("a link");
    assert_eq!((link.atime(), link.mtime()), (5, 6));
    let file = std::fs::metadata(client.dir.path().join("f")).expect("a file");
    assert_eq!(file.mtime(), 2_000, "the file is not touched");
    let handle = client.open("f", open_flags::READ | open_flags::WRITE);
    let cut = fields().string(&handle).number(1).long(1);
    assert_eq!(client.status(wire::FSETSTAT, cut), 0);
    let Answer::Attributes(found) = client.ask(wire::FSTAT, fields().string(&handle)) else {
        panic!("no attributes")
    };
    assert_eq!(found.size, Some(1));
}

#[test]
fn names_change_as_the_draft_says() {
    let mut client = Client::new();
    for name in ["a", "b"] {
        std::fs::write(client.dir.path().join(name), name).expect("a file");
    }
    let two = |client: &Client, from: &str, to: &str| {
        fields().string(client.path(from)).string(client.path(to))
    };
    let request = two(&client, "a", "b");
    assert_eq!(
        client.status(wire::RENAME, request),
        Status::Failure as u32,
        "the target exists"
    );
    let request = two(&client, "a", "c");
    assert_eq!(client.status(wire::RENAME, request), 0);
    let request = fields()
        .string("posix-rename@openssh.com")
        .string(client.path("c"))
        .string(client.path("b"));
    assert_eq!(client.status(wire::EXTENDED, request), 0);
    let content = std::fs::read(client.dir.path().join("b"));
    assert_eq!(content.expect("a file"), b"a");
    let request = fields()
        .string("hardlink@openssh.com")
        .string(client.path("b"))
        .string(client.path("h"));
    assert_eq!(client.status(wire::EXTENDED, request), 0);
    let request = fields().string("target").string(client.path("s"));
    assert_eq!(client.status(wire::SYMLINK, request), 0);
    let request = fields().string(client.path("s"));
    assert_eq!(client.name(wire::READLINK, request), "target");
    let request = fields().string(client.path("d")).number(4).number(0o700);
    assert_eq!(client.status(wire::MKDIR, request), 0);
    let request = fields().string(client.path("d"));
    assert_eq!(client.status(wire::RMDIR, request), 0);
    for name in ["b", "h", "s"] {
        let request = fields().string(client.path(name));
        assert_eq!(client.status(wire::REMOVE, request), 0);
    }
    assert_eq!(
        std::fs::read_dir(client.dir.path()).expect("there").count(),
        0
    );
}

#[test]
fn paths_are_made_absolute() {
    let mut client = Client::new();
    let real = std::fs::canonicalize(client.dir.path()).expect("a directory");
    let real = real.to_str().expect("utf-8").to_owned();
    let request = fields().string(client.path("none/new"));
    assert_eq!(
        client.status(wire::REALPATH, request),
        Status::NoSuchFile as u32
    );
    let request = fields().string(client.path("./new"));
    assert_eq!(client.name(wire::REALPATH, request), format!("{real}/new"));
    assert_eq!(client.name(wire::REALPATH, fields().string("/")), "/");
    let here = std::env::current_dir().expect("a directory");
    let here = here.to_str().expect("utf-8");
    assert_eq!(client.name(wire::REALPATH, fields().string("")), here);
    let expand = |path: &str| fields().string("expand-path@openssh.com").string(path);
    assert_eq!(client.name(wire::EXTENDED, expand("~")), real);
    assert_eq!(
        client.name(wire::EXTENDED, expand("~/f")),
        format!("{real}/f")
    );
    assert_eq!(client.name(wire::EXTENDED, expand("~root/")), "/root");
    assert_eq!(
        client.status(wire::EXTENDED, expand("~nobody-has-this/")),
        2
    );
}

#[test]
fn limits_and_file_systems_are_told() {
    let mut client = Client::new();
    let Answer::Other(wire::EXTENDED_REPLY, limits) =
        client.ask(wire::EXTENDED, fields().string("limits@openssh.com"))
    else {
        panic!("no limits")
    };
    assert_eq!(limits[..8], (PACKET_BYTES_MAX as u64).to_be_bytes());
    assert_eq!(limits.len(), 32);
    let request = fields()
        .string("statvfs@openssh.com")
        .string(client.path(""));
    let Answer::Other(wire::EXTENDED_REPLY, found) = client.ask(wire::EXTENDED, request) else {
        panic!("no file system")
    };
    assert_eq!(found.len(), 11 * 8);
}

#[test]
fn what_is_wrong_or_unknown_is_said_so() {
    let mut client = Client::new();
    assert_eq!(client.status(99, fields()), Status::OpUnsupported as u32);
    let unknown = fields().string("vendor@example.com");
    assert_eq!(
        client.status(wire::EXTENDED, unknown),
        Status::OpUnsupported as u32
    );
    let short = fields().number(100).number(0);
    assert_eq!(client.status(wire::STAT, short), Status::BadMessage as u32);
    for handle in ["", "x", "12345678", "123456789"] {
        let request = fields().string(handle);
        assert_eq!(client.status(wire::CLOSE, request), Status::Failure as u32);
    }
}

#[test]
fn handles_are_bounded() {
    let mut client = Client::new();
    std::fs::write(client.dir.path().join("f"), "").expect("a file");
    for _ in 0..HANDLES_MAX {
        client.open("f", open_flags::READ);
    }
    let one_more = fields().string(client.path("f")).number(1).number(0);
    assert_eq!(client.status(wire::OPEN, one_more), Status::Failure as u32);
    let first = fields().string(0_u64.to_be_bytes());
    assert_eq!(client.status(wire::CLOSE, first), 0);
    client.open("f", open_flags::READ);
}

#[test]
fn a_conversation_survives_any_cutting() {
    struct Slow<'a>(&'a [u8], usize);
    impl Read for Slow<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = self.1.min(self.0.len()).min(buffer.len());
            buffer[..count].copy_from_slice(&self.0[..count]);
            self.0 = &self.0[count..];
            Ok(count)
        }
    }
    let mut wire = vec![0, 0, 0, 5, wire::INIT, 0, 0, 0, 3];
    for id in 0..50_u32 {
        let mut packet = vec![wire::REALPATH];
        packet.extend_from_slice(&id.to_be_bytes());
        packet.extend_from_slice(&fields().string("/").0);
        wire.extend_from_slice(&u32::try_from(packet.len()).expect("short").to_be_bytes());
        wire.extend_from_slice(&packet);
    }
    let mut whole = Vec::new();
    serve(&mut Server::new("/".into()), &mut &wire[..], &mut whole).expect("served");
    for cut in [1, 3, 7, 64] {
        let mut output = Vec::new();
        let mut input = Slow(&wire, cut);
        serve(&mut Server::new("/".into()), &mut input, &mut output).expect("served");
        assert_eq!(output, whole);
    }
}

#[test]
fn a_stream_that_is_none_ends_the_conversation() {
    let end = |bytes: &[u8]| {
        let mut input = bytes;
        serve(&mut Server::new("/".into()), &mut input, &mut Vec::new())
    };
    assert!(end(&[0, 0, 0, 0]).is_err(), "a packet without a kind");
    assert!(end(&[0xff; 8]).is_err(), "a packet over the limit");
    assert!(
        end(&[0, 0, 0, 5, wire::STAT, 0, 0, 0, 1]).is_err(),
        "no greeting"
    );
    assert!(end(&[0, 0, 0]).is_ok(), "cut off");
}

proptest::proptest! {
    #[test]
    fn arbitrary_packets_never_panic(
        packets in proptest::collection::vec(
            proptest::collection::vec(proptest::prelude::any::<u8>(), 1..80), 1..20),
    ) {
        // Only requests that change nothing, whatever the bytes say.
        let harmless = [wire::CLOSE, wire::READ, wire::LSTAT, wire::FSTAT, wire::READDIR,
            wire::REALPATH, wire::STAT, wire::READLINK, wire::OPENDIR];
        let mut server = Server::new("/".into());
        server.greeted = true;
        for mut packet in packets {
            packet[0] = harmless[usize::from(packet[0]) % harmless.len()];
            let _ = server.answer(&packet, &mut Vec::new());
        }
    }
}

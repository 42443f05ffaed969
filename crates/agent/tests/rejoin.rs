//! A host that joins an agent in the middle of its work, as after a restore or a fork.

mod support;

use std::path::Path;

use smolvm_proto::message::{ExecRequest, ExtractRequest, WindowSize};
use smolvm_proto::{Frame, Kind, Request};
use support::{Guest, Watched, bytes_of, command, shell};

/// More than the agent may send without being granted more, on every channel together.
const MUCH: usize = 5_000_000;

/// A stream number of the host before, used again by the new one.
fn assert_number_is_free(guest: &mut Guest, stream: u32) {
    guest.send(&Frame::message(stream, Kind::Open, &Request::Ping));
    guest.finish(stream).done();
}

fn feeding(script: &str) -> Request {
    Request::Exec(ExecRequest {
        stdin: true,
        ..command(&["sh", "-c", script])
    })
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).expect("the command wrote it")
}

#[test]
fn a_command_of_the_host_before_writes_on_to_nobody_and_ends_in_its_own_time() {
    let mut guest = Guest::start();
    let directory = tempfile::tempdir().expect("a directory");
    let mark = directory.path().join("mark");
    // It stands still when the window is full, and must not in front of the new host.
    let script = format!(
        "echo $$; head -c {MUCH} /dev/zero; head -c {MUCH} /dev/zero >&2; echo over > {}",
        mark.display()
    );
    let stream = guest.open(&shell(&script));
    let process = Watched::new(
        guest
            .first_line(stream)
            .split('\0')
            .next()
            .expect("a first line")
            .trim(),
    );
    guest.rejoin(true);
    process.assert_ends();
    assert_eq!(read(&mark), "over\n");
    // Nothing of it came, not even its end.
    assert_number_is_free(&mut guest, stream);
    assert_eq!(guest.shell("echo fine").output, b"fine\n");
}

#[test]
fn standard_input_stays_open_and_keeps_what_had_arrived() {
    let mut guest = Guest::start();
    let directory = tempfile::tempdir().expect("a directory");
    let at = |name: &str| directory.path().join(name).display().to_string();
    let (go, seen, mark) = (at("go"), at("seen"), at("mark"));
    let script =
        format!("mkfifo {go} {seen}; echo $$; read wait < {go}; cat > {seen}; echo over > {mark}");
    let stream = guest.open(&feeding(&script));
    let process = Watched::new(&guest.first_line(stream));
    // A part fills the pipe and the rest waits in the agent.
    for _ in 0..4 {
        guest.data(stream, &[b'x'; 50_000]);
    }
    guest.rejoin(true);
    let seen = guest.shell(&format!("echo > {go}; head -c 200000 {seen} | wc -c"));
    assert_eq!(seen.text(), "200000\n");
    // It waits for more, now.
    process.assert_alive();
    process.kill();
    process.assert_ends();
    assert!(!Path::new(&mark).exists(), "the input was ended");
}

#[test]
fn a_terminal_stays() {
    let mut guest = Guest::start();
    let directory = tempfile::tempdir().expect("a directory");
    let fifo = directory.path().join("fifo");
    let script = format!(
        "trap '' HUP; mkfifo {fifo}; echo $$; read wait < {fifo}; echo still > /dev/tty; \
         echo $? > {fifo}",
        fifo = fifo.display()
    );
    let stream = guest.open(&Request::Exec(ExecRequest {
        terminal: Some(WindowSize {
            rows: 24,
            columns: 80,
        }),
        ..command(&["sh", "-c", &script])
    }));
    let process = Watched::new(&guest.first_line(stream));
    guest.rejoin(true);
    process.assert_alive();
    let status = guest.shell(&format!("echo > {fifo}; cat {fifo}", fifo = fifo.display()));
    assert_eq!(status.text(), "0\n", "the terminal was gone");
    process.assert_ends();
}

#[test]
fn a_deadline_holds_though_nobody_hears() {
    let mut guest = Guest::start();
    let stream = guest.open(&Request::Exec(ExecRequest {
        timeout_ms: Some(1000),
        ..command(&["sh", "-c", "sleep 1000 & echo $!; wait"])
    }));
    let grandchild = Watched::new(&guest.first_line(stream));
    guest.rejoin(true);
    grandchild.assert_ends();
}

#[test]
fn without_the_wish_commands_are_killed() {
    let mut guest = Guest::start();
    let stream = guest.open(&shell("sleep 1000 & echo $!; wait"));
    let grandchild = Watched::new(&guest.first_line(stream));
    guest.rejoin(false);
    grandchild.assert_ends();
    assert_number_is_free(&mut guest, stream);
}

#[test]
fn a_transfer_ends_with_its_host() {
    let mut guest = Guest::start();
    let directory = tempfile::tempdir().expect("a directory");
    let stream = guest.open(&Request::Extract(ExtractRequest {
        directory: bytes_of(directory.path()).into(),
        make_parents: false,
        owner: None,
        file: None,
    }));
    guest.data(stream, &[0; 100]);
    guest.rejoin(true);
    assert_number_is_free(&mut guest, stream);
    assert_eq!(guest.shell("echo fine").output, b"fine\n");
}

#[test]
fn a_frame_that_was_half_written_is_passed_over() {
    // Within the header, and at two places of the payload.
    for step in [5, 1000, 30_011] {
        let mut guest = Guest::start();
        let much = shell(&format!("echo $$; exec head -c {MUCH} /dev/zero"));
        let stream = guest.open(&much);
        let line = guest.first_line(stream);
        let process = Watched::new(line.split('\0').next().expect("a first line").trim());
        for _ in 0..3 {
            guest.open(&much);
        }
        // More than the socket holds: the agent waits within a frame, and others wait behind it.
        guest.read_into_a_frame(step);
        let before = guest.rejoin(true);
        assert!(before > 0, "nothing had to be passed over");
        process.assert_ends();
        assert_eq!(guest.shell("echo fine").output, b"fine\n");
    }
}

//! Commands, run by the agent's own program on this machine.

mod support;

use smolvm_proto::limits::{STREAMS_MAX, WINDOW_BYTES};
use smolvm_proto::message::{
    Control, EnvVar, Event, ExecRequest, ExtractRequest, FailureKind, Program, ShutdownRequest,
    WindowSize,
};
use smolvm_proto::version::{Hello, negotiate};
use smolvm_proto::{Channel, Frame, Kind, Request};
use support::{Guest, Outcome, Watched, command, shell};

#[test]
fn the_guest_speaks_first() {
    let mut guest = Guest::start();
    // The first Hello was taken by `start`; garbage brings another.
    guest.send_bytes(&[0xff; 12]);
    let hello = guest.hello();
    assert_eq!(negotiate(hello.version_min, hello.version_max), Ok(1));
    assert!(hello.uptime_ms > 0);
    assert!(!hello.kernel.is_empty());
    assert_eq!(guest.close(), Some(0));
}

#[test]
fn output_error_and_exit_code_come_back() {
    let mut guest = Guest::start();
    let outcome = guest.shell("echo out; echo err >&2; exit 7");
    assert_eq!(outcome.output, b"out\n");
    assert_eq!(outcome.error, b"err\n");
    let exited = outcome.exited();
    assert_eq!((exited.code, exited.signal), (Some(7), None));
    assert!(!exited.timed_out);
    assert!(matches!(outcome.events[0], Event::Started(_)));
    assert_eq!(outcome.events.len(), 2);
}

#[test]
fn the_users_own_shell_runs_a_command_line() {
    let mut guest = Guest::start();
    let shell = |words: &[&str]| {
        Request::Exec(ExecRequest {
            program: Some(Program::Shell),
            ..command(words)
        })
    };
    let outcome = guest.ask(&shell(&["-c", "echo \"$0 $SHELL\" | tr / _; exit 3"]));
    assert_eq!(outcome.exited().code, Some(3));
    let name = outcome.text();
    assert!(name.contains(" _bin_") || name.contains(" _usr_"), "{name}");
    // Without words it is a login shell, which its name tells it.
    let stream = guest.open(&Request::Exec(ExecRequest {
        stdin: true,
        program: Some(Program::Shell),
        ..command(&[])
    }));
    guest.data(stream, b"echo $0\n");
    guest.end_input(stream);
    let outcome = guest.finish(stream);
    assert!(outcome.text().starts_with('-'), "{}", outcome.text());
}

#[test]
fn files_are_served_in_a_process_of_the_user() {
    let mut guest = Guest::start();
    let stream = guest.open(&Request::Exec(ExecRequest {
        stdin: true,
        program: Some(Program::Sftp),
        ..command(&[])
    }));
    // SSH_FXP_INIT of version 3, and SSH_FXP_REALPATH of where it runs.
    guest.data(stream, &[0, 0, 0, 5, 1, 0, 0, 0, 3]);
    guest.data(stream, &[0, 0, 0, 10, 16, 0, 0, 0, 9, 0, 0, 0, 1, b'.']);
    guest.end_input(stream);
    let outcome = guest.finish(stream);
    assert_eq!(outcome.exited().code, Some(0), "{outcome:?}");
    assert_eq!(outcome.output[4..9], [2, 0, 0, 0, 3], "SSH_FXP_VERSION");
    let name = [104, 0, 0, 0, 9, 0, 0, 0, 1, 0, 0, 0, 1, b'/'];
    let answers = &outcome.output;
    assert!(
        answers.windows(name.len()).any(|part| part == name),
        "{answers:?}"
    );
}

#[test]
fn a_signal_is_told_apart_from_a_code() {
    let outcome = Guest::start().shell("kill -TERM $$");
    assert_eq!(
        (outcome.exited().code, outcome.exited().signal),
        (None, Some(15))
    );
}

#[test]
fn input_is_fed_and_its_end_is_seen() {
    let mut guest = Guest::start();
    let stream = guest.open(&Request::Exec(ExecRequest {
        stdin: true,
        ..command(&["cat"])
    }));
    let text: Vec<u8> = (0..3_000_000u32).flat_map(u32::to_le_bytes).collect();
    // The output is taken meanwhile: `cat` would otherwise stop reading.
    let mut sent = 0;
    let mut credit = WINDOW_BYTES as usize;
    let mut seen = Outcome {
        output: Vec::new(),
        error: Vec::new(),
        events: Vec::new(),
    };
    while sent < text.len() {
        if credit > 0 {
            let end = text.len().min(sent + credit.min(65_536));
            guest.data(stream, &text[sent..end]);
            credit -= end - sent;
            sent = end;
            continue;
        }
        let frame = guest.frame(stream);
        match frame.kind {
            Kind::Credit => credit += frame.credit_bytes().expect("a grant") as usize,
            Kind::Data => {
                let length = u32::try_from(frame.payload.len()).expect("bounded");
                seen.output.extend(frame.payload);
                guest.send(&Frame::credit(stream, frame.channel, length));
            }
            _ => {}
        }
    }
    guest.end_input(stream);
    let outcome = guest.finish_with(stream, seen);
    assert_eq!(outcome.exited().code, Some(0));
    assert!(outcome.output == text, "the bytes came back changed");
}

#[test]
fn without_input_there_is_nothing_to_read() {
    assert_eq!(Guest::start().shell("wc -c").text().trim(), "0");
}

#[test]
fn a_command_that_does_not_read_its_input_takes_the_stream_nowhere() {
    let mut guest = Guest::start();
    let stream = guest.open(&Request::Exec(ExecRequest {
        stdin: true,
        ..command(&[
            "sh",
            "-c",
            "exec <&-; echo closed; while :; do sleep 1000; done",
        ])
    }));
    assert_eq!(guest.first_line(stream), "closed");
    // Four windows: credit keeps coming although nobody reads.
    let mut credit = WINDOW_BYTES;
    for _ in 0..64 {
        while credit < 16_384 {
            let frame = guest.frame(stream);
            assert_eq!(frame.kind, Kind::Credit);
            credit += frame.credit_bytes().expect("a grant");
        }
        guest.data(stream, &[0; 16_384]);
        credit -= 16_384;
    }
    guest.send(&Frame::message(stream, Kind::Control, &Control::Signal(9)));
    assert_eq!(guest.finish(stream).exited().signal, Some(9));
}

#[test]
fn a_stalled_reader_holds_up_its_own_stream_only() {
    const BYTES: usize = 5_000_000;
    let mut guest = Guest::start();
    let stalled = guest.open(&shell(&format!("head -c {BYTES} /dev/zero")));
    assert_eq!(guest.shell("echo other").output, b"other\n");
    // All the guest may send without a grant is here or on its way.
    let mut outcome = Outcome {
        output: Vec::new(),
        error: Vec::new(),
        events: Vec::new(),
    };
    while outcome.output.len() < WINDOW_BYTES as usize {
        let frame = guest.frame(stalled);
        if frame.kind == Kind::Data {
            outcome.output.extend(frame.payload);
        }
    }
    assert_eq!(outcome.output.len(), WINDOW_BYTES as usize);
    assert_eq!(guest.shell("echo again").output, b"again\n");
    guest.send(&Frame::credit(stalled, Channel::Output, WINDOW_BYTES));
    let outcome = guest.finish_with(stalled, outcome);
    assert_eq!(outcome.output.len(), BYTES);
    assert_eq!(outcome.exited().code, Some(0));
}

#[test]
fn many_commands_at_once_do_not_mix() {
    let mut guest = Guest::start();
    let streams: Vec<(u32, u32)> = (0..50)
        .map(|number| {
            let script = format!(
                "i=0; while [ $i -lt 200 ]; do echo {number}-$i; echo e{number} >&2; \
                 i=$((i+1)); done; exit {number}"
            );
            (number, guest.open(&shell(&script)))
        })
        .collect();
    for (number, stream) in streams {
        let outcome = guest.finish(stream);
        let expected: String = (0..200).map(|i| format!("{number}-{i}\n")).collect();
        assert_eq!(outcome.text(), expected);
        assert_eq!(
            outcome.error,
            format!("e{number}\n").repeat(200).into_bytes()
        );
        assert_eq!(outcome.exited().code, i32::try_from(number).ok());
    }
}

fn grandchild_dies(mut guest: Guest, spawn: &str) {
    let bystander = guest.open(&Request::Exec(ExecRequest {
        stdin: true,
        ..command(&["cat"])
    }));
    let script = format!("{spawn} sleep 1000 & echo $!; wait");
    let stream = guest.open(&Request::Exec(ExecRequest {
        timeout_ms: Some(1500),
        ..command(&["sh", "-c", &script])
    }));
    let grandchild = Watched::new(&guest.first_line(stream));
    let outcome = guest.finish(stream);
    assert!(outcome.exited().timed_out);
    assert_eq!(outcome.exited().signal, Some(9));
    grandchild.assert_ends();
    guest.data(bystander, b"still here");
    guest.end_input(bystander);
    assert_eq!(guest.finish(bystander).output, b"still here");
}

#[test]
fn a_timeout_kills_the_tree_and_nothing_else() {
    grandchild_dies(Guest::start(), "");
}

#[test]
fn a_timeout_kills_the_process_group_where_there_are_no_control_groups() {
    grandchild_dies(Guest::without_cgroups(), "");
}

#[test]
fn a_descendant_cannot_leave_its_control_group() {
    let guest = Guest::start();
    // Only control groups reach a process in a session of its own.
    if guest.has_cgroups() {
        grandchild_dies(guest, "setsid");
    }
}

#[test]
fn a_reset_kills_the_tree() {
    let mut guest = Guest::start();
    let stream = guest.open(&shell("sleep 1000 & echo $!; wait"));
    let grandchild = Watched::new(&guest.first_line(stream));
    guest.reset(stream);
    grandchild.assert_ends();
    assert_eq!(guest.shell("echo fine").output, b"fine\n");
}

#[test]
fn a_host_that_goes_away_takes_its_commands_along() {
    let mut guest = Guest::start();
    let stream = guest.open(&shell("sleep 1000 & echo $!; wait"));
    let grandchild = Watched::new(&guest.first_line(stream));
    assert_eq!(guest.close(), Some(0));
    grandchild.assert_ends();
}

#[test]
fn a_child_in_the_background_holds_nothing_up_and_lives_on() {
    let mut guest = Guest::start();
    let outcome = guest.shell("sleep 1000 & echo $!; echo done");
    let (pid, rest) = outcome
        .output
        .split_at(outcome.text().find('\n').expect("a line"));
    assert_eq!(rest, b"\ndone\n");
    assert_eq!(outcome.exited().code, Some(0));
    let child = Watched::new(&String::from_utf8_lossy(pid));
    child.assert_alive();
    child.kill();
    // An orphan: only the agent can have reaped it.
    child.assert_ends();
}

#[test]
fn a_child_that_writes_for_ever_does_not_keep_its_parents_stream() {
    let mut guest = Guest::start();
    let stream = guest.open(&shell("yes & echo $! >&2; exit 3"));
    let outcome = guest.finish(stream);
    assert_eq!(outcome.exited().code, Some(3));
    let pid = String::from_utf8_lossy(&outcome.error).trim().to_owned();
    // Nobody reads its pipe any more, which ends it.
    if let Ok(number) = pid.parse::<i32>()
        && std::path::Path::new(&format!("/proc/{number}")).exists()
    {
        Watched::new(&pid).assert_ends();
    }
}

#[test]
fn all_output_written_before_the_end_is_sent() {
    let mut guest = Guest::start();
    for _ in 0..20 {
        let outcome = guest.shell("head -c 900000 /dev/zero");
        assert_eq!(outcome.output.len(), 900_000);
    }
}

#[test]
fn a_terminal_has_a_size_that_changes() {
    let mut guest = Guest::start();
    let stream = guest.open(&Request::Exec(ExecRequest {
        terminal: Some(WindowSize {
            rows: 33,
            columns: 99,
        }),
        stdin: true,
        ..command(&[
            "sh",
            "-c",
            "stty size; read line; stty size; tty; echo \"$TERM:$line\"",
        ])
    }));
    assert_eq!(guest.first_line(stream), "33 99");
    let size = WindowSize {
        rows: 40,
        columns: 120,
    };
    guest.send(&Frame::message(
        stream,
        Kind::Control,
        &Control::Resize(size),
    ));
    guest.data(stream, b"typed\n");
    let outcome = guest.finish(stream);
    let text = outcome.text();
    assert!(text.contains("40 120\r\n"), "{text}");
    assert!(text.contains("/dev/pts/"), "{text}");
    assert!(text.contains("xterm-256color:typed"), "{text}");
    assert_eq!(outcome.exited().code, Some(0));
}

#[test]
fn a_terminals_foreground_job_gets_the_signal() {
    let mut guest = Guest::start();
    let stream = guest.open(&Request::Exec(ExecRequest {
        terminal: Some(WindowSize {
            rows: 24,
            columns: 80,
        }),
        ..command(&[
            "sh",
            "-c",
            "trap 'echo got; exit 5' INT; echo ready; while :; do :; done",
        ])
    }));
    assert_eq!(guest.first_line(stream), "ready");
    guest.send(&Frame::message(stream, Kind::Control, &Control::Signal(2)));
    let outcome = guest.finish(stream);
    assert!(outcome.text().contains("got"), "{}", outcome.text());
    assert_eq!(outcome.exited().code, Some(5));
}

#[test]
fn the_end_of_input_is_typed_at_a_terminal() {
    let mut guest = Guest::start();
    let stream = guest.open(&Request::Exec(ExecRequest {
        terminal: Some(WindowSize {
            rows: 24,
            columns: 80,
        }),
        stdin: true,
        ..command(&["sh", "-c", "echo ready; cat; echo over"])
    }));
    assert_eq!(guest.first_line(stream), "ready");
    guest.end_input(stream);
    assert!(guest.finish(stream).text().contains("over"));
}

#[test]
fn what_cannot_run_is_refused_with_its_reason() {
    let mut guest = Guest::start();
    let mut kind = |request: ExecRequest| {
        let outcome = guest.ask(&Request::Exec(request));
        assert_eq!(outcome.events.len(), 1, "nothing was started");
        outcome.kind()
    };
    let directory = tempfile::tempdir().expect("directory");
    let file = directory.path().join("data");
    std::fs::write(&file, "no program").expect("written");
    let path = |path: &std::path::Path| path.to_str().expect("text").to_owned();

    assert_eq!(
        kind(command(&["no-such-program-here"])),
        FailureKind::NotFound
    );
    assert_eq!(kind(command(&["/no/such/program"])), FailureKind::NotFound);
    assert_eq!(kind(command(&[&path(&file)])), FailureKind::NotExecutable);
    assert_eq!(kind(command(&[])), FailureKind::InvalidInput);
    assert_eq!(kind(command(&["a\0b"])), FailureKind::InvalidInput);
    let elsewhere = |cwd: &str| ExecRequest {
        cwd: Some(cwd.as_bytes().to_vec().into()),
        ..command(&["true"])
    };
    assert_eq!(kind(elsewhere("/no/such/directory")), FailureKind::NotFound);
    assert_eq!(kind(elsewhere(&path(&file))), FailureKind::NotADirectory);
    let nobody = ExecRequest {
        user: Some("no-such-user-here".to_owned()),
        ..command(&["true"])
    };
    assert_eq!(kind(nobody), FailureKind::NoSuchUser);

    let script = directory.path().join("script");
    std::fs::write(&script, "#!/no/such/interpreter\n").expect("written");
    make_executable(&script);
    assert_eq!(kind(command(&[&path(&script)])), FailureKind::NotFound);
    let noise = directory.path().join("noise");
    std::fs::write(&noise, [1u8, 2, 3, 4]).expect("written");
    make_executable(&noise);
    assert_eq!(kind(command(&[&path(&noise)])), FailureKind::NotExecutable);
}

fn make_executable(path: &std::path::Path) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("mode");
}

#[test]
fn environment_and_directory_are_the_requests() {
    let mut guest = Guest::start();
    let directory = tempfile::tempdir().expect("directory");
    let program = directory.path().join("greet");
    std::fs::write(&program, "#!/bin/sh\necho \"$GREETING $PWD\"\n").expect("written");
    make_executable(&program);
    let variable = |name: &str, value: &str| EnvVar {
        name: name.as_bytes().to_vec().into(),
        value: value.as_bytes().to_vec().into(),
    };
    let search = format!("{}:/usr/bin:/bin", directory.path().display());
    let outcome = guest.ask(&Request::Exec(ExecRequest {
        env: vec![variable("GREETING", "hello"), variable("PATH", &search)],
        cwd: Some(b"/usr".to_vec().into()),
        ..command(&["greet"])
    }));
    assert_eq!(outcome.text(), "hello /usr\n");
}

#[test]
fn commands_get_no_descriptor_of_the_agent() {
    let outcome = Guest::start().shell("ls /proc/self/fd");
    // The fourth is the directory `ls` reads.
    assert_eq!(outcome.text(), "0\n1\n2\n3\n");
}

#[test]
fn commands_start_with_default_signals() {
    let outcome = Guest::start().shell("grep -E '^Sig(Blk|Ign)' /proc/self/status");
    for line in outcome.text().lines() {
        let (_, mask) = line.split_once(":\t").expect("a mask");
        let mask = u64::from_str_radix(mask, 16).expect("a number");
        // The real-time signals are as whoever runs this test left them.
        assert_eq!(mask & 0x7fff_ffff, 0, "{line}");
    }
}

#[test]
fn a_host_that_sends_more_than_it_may_is_reset() {
    let mut guest = Guest::start();
    let stream = guest.open(&Request::Exec(ExecRequest {
        stdin: true,
        ..command(&["sh", "-c", "echo $$; exec sleep 1000"])
    }));
    let process = Watched::new(&guest.first_line(stream));
    for _ in 0..6 {
        guest.data(stream, &[0; 65_536]);
    }
    assert!(guest.finish(stream).events.is_empty(), "it was reset");
    process.assert_ends();
    assert_eq!(guest.shell("echo fine").output, b"fine\n");
}

#[test]
fn a_stream_number_used_twice_is_reset() {
    let mut guest = Guest::start();
    let stream = guest.open(&shell("echo $$; exec sleep 1000"));
    let process = Watched::new(&guest.first_line(stream));
    guest.send(&Frame::message(stream, Kind::Open, &Request::Ping));
    assert!(guest.finish(stream).events.is_empty(), "it was reset");
    process.assert_ends();
}

#[test]
fn garbage_ends_all_streams_and_not_the_agent() {
    let mut guest = Guest::start();
    let header = |length: u32, kind: u8, channel: u8, reserved: u8| {
        let mut bytes = [0; 12];
        bytes[0..4].copy_from_slice(&length.to_le_bytes());
        bytes[4] = 9;
        bytes[8..11].copy_from_slice(&[kind, channel, reserved]);
        bytes
    };
    for garbage in [
        header(u32::MAX, 2, 0, 0),
        header(0, 200, 0, 0),
        header(0, 4, 9, 0),
        header(0, 4, 0, 1),
    ] {
        let stream = guest.open(&shell("echo $$; exec sleep 1000"));
        let process = Watched::new(&guest.first_line(stream));
        guest.send_bytes(&garbage);
        guest.hello();
        process.assert_ends();
        assert_eq!(guest.shell("echo fine").output, b"fine\n");
    }
    // Well-formed frames with nonsense in them concern their stream only.
    let nonsense = Frame::new(4000, Kind::Open, Channel::Input, vec![0xff; 40]);
    guest.send(&nonsense);
    assert_eq!(guest.finish(4000).kind(), FailureKind::InvalidInput);
    for kind in [
        Kind::Data,
        Kind::Credit,
        Kind::Control,
        Kind::Event,
        Kind::Reset,
    ] {
        guest.send(&Frame::new(4001, kind, Channel::Error, vec![1, 2]));
    }
    let stream = guest.open(&shell("exec sleep 1000"));
    guest.send(&Frame::new(
        stream,
        Kind::Control,
        Channel::Input,
        vec![0xff],
    ));
    assert!(!matches!(
        guest.finish(stream).events.last(),
        Some(Event::Exited(_))
    ));
    guest.ask(&Request::Ping).done();
}

#[test]
fn a_hosts_hello_is_answered_and_starts_afresh() {
    let mut guest = Guest::start();
    let hello = Frame::message(
        0,
        Kind::Hello,
        &Hello {
            version_min: 1,
            version_max: 1,
            agent: "a host".to_owned(),
            kernel: String::new(),
            uptime_ms: 0,
            nonce: None,
            keep_commands: None,
        },
    );
    // A host that finds the guest running, as after a restore, has heard nothing yet.
    guest.send(&hello);
    guest.hello();
    let stream = guest.open(&shell("echo $$; exec sleep 1000"));
    let process = Watched::new(&guest.first_line(stream));
    guest.send(&hello);
    guest.hello();
    process.assert_ends();
    // Numbers may be used again.
    guest.send(&Frame::message(stream, Kind::Open, &Request::Ping));
    guest.finish(stream).done();
}

#[test]
fn streams_are_bounded() {
    let mut guest = Guest::start();
    let directory = tempfile::tempdir().expect("directory");
    let wait = Request::Extract(ExtractRequest {
        directory: support::bytes_of(directory.path()).into(),
        make_parents: false,
        owner: None,
        file: None,
    });
    let streams: Vec<u32> = (0..STREAMS_MAX).map(|_| guest.open(&wait)).collect();
    let outcome = guest.shell("true");
    assert_eq!(outcome.kind(), FailureKind::TooMany);
    for stream in streams {
        guest.reset(stream);
    }
    assert_eq!(guest.shell("echo fine").output, b"fine\n");
}

#[test]
fn facts_are_plausible() {
    let outcome = Guest::start().ask(&Request::Facts);
    let Some(Event::Facts(facts)) = outcome.events.last() else {
        panic!("no facts: {outcome:?}");
    };
    assert!(facts.memory_available > 0 && facts.memory_available <= facts.memory_total);
    assert!(facts.disk_free <= facts.disk_total);
    assert!(facts.processes >= 2);
    assert!(facts.wall_clock_ns > 1_700_000_000_000_000_000);
}

#[test]
fn a_shutdown_ends_every_process_and_takes_no_more_requests() {
    let mut guest = Guest::start();
    // One that ends when asked, one that has to be killed, and an orphan.
    let polite = guest.open(&shell("trap 'exit 4' TERM; echo $$; while :; do :; done"));
    guest.first_line(polite);
    let stubborn = guest.open(&shell(
        "trap '' TERM; echo $$; while :; do sleep 1000; done",
    ));
    let stubborn_process = Watched::new(&guest.first_line(stubborn));
    let orphan = guest.shell("setsid sleep 1000 > /dev/null 2>&1 & echo $!");
    let orphan = Watched::new(orphan.text().trim());
    let shutdown = guest.open(&Request::Shutdown(ShutdownRequest { grace_ms: 1000 }));
    assert_eq!(guest.finish(polite).exited().code, Some(4));
    guest.finish(shutdown).done();
    stubborn_process.assert_ends();
    orphan.assert_ends();
    assert_eq!(guest.finish(stubborn).exited().signal, Some(9));
    assert_eq!(guest.shell("true").kind(), FailureKind::ShuttingDown);
}

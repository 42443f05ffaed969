//! The keeper on the fake backend, for tests of the engine and keeper without a virtual machine.
//!
//! Its guest answers each request as the real agent does, with the least it can do: every command
//! prints its arguments, except `hang`, which never ends, `crash`, which takes the machine down, and
//! `freeze`, after which it answers nothing any more, and `fill`, which finds no room on the host's disk.
//! One that becomes `…-deaf` freezes then.
//! At port 7 it gives back what it gets, as connections and as datagrams; other ports are refused.

use std::collections::HashSet;
use std::io::{Read, Write};
use std::process::ExitCode;

use smolvm_proto::message::{Event, Exited, Failure, FailureKind, Started};
use smolvm_proto::socket::{ConnectRequest, Connected, DatagramsRequest, Endpoint};
use smolvm_proto::version::{Hello, VERSION_MAX, VERSION_MIN};
use smolvm_proto::{Channel, Decoder, Frame, Kind, Request};
use smolvm_vmm::fake::{Fake, FakeGuest, GuestEnd};
use smolvm_vmm::{Backend, DiskError, Exit};

fn main() -> ExitCode {
    smolvm_keeper::main(|_| Some(Box::new(Fake::new(guest)) as Box<dyn Backend>))
}

fn guest(mut machine: FakeGuest) -> GuestEnd {
    if machine.plan.name.ends_with("-mute") {
        // A guest that never becomes ready, and says so where only an error shows it.
        let _ = machine.console.write_all(b"no root file system\n");
        let _ = machine.channel.read(&mut [0]);
        return GuestEnd::Off;
    }
    let hello = Hello {
        version_min: VERSION_MIN,
        version_max: VERSION_MAX,
        agent: "fake".to_owned(),
        kernel: "fake".to_owned(),
        uptime_ms: 0,
        nonce: None,
        keep_commands: None,
    };
    let say = |frame: Frame, channel: &mut std::os::unix::net::UnixStream| {
        let _ = channel.write_all(&frame.to_bytes());
    };
    say(Frame::message(0, Kind::Hello, &hello), &mut machine.channel);
    let mut decoder = Decoder::new();
    let mut echoing = HashSet::new();
    let mut frozen = false;
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = machine.channel.read(&mut buffer) {
        decoder.feed(&buffer[..count]);
        while let Ok(Some(frame)) = decoder.next_frame() {
            if frame.kind == Kind::Hello {
                let answer = Hello {
                    nonce: frame.decode::<Hello>().ok().and_then(|hello| hello.nonce),
                    ..hello.clone()
                };
                say(
                    Frame::message(0, Kind::Hello, &answer),
                    &mut machine.channel,
                );
            }
            let stream = frame.stream;
            if echoing.contains(&stream) {
                for answer in echo(&frame) {
                    say(answer, &mut machine.channel);
                }
                if matches!(frame.kind, Kind::Eof | Kind::Reset) {
                    echoing.remove(&stream);
                }
            }
            if frame.kind != Kind::Open || frozen {
                continue;
            }
            let mut event = |event| {
                say(
                    Frame::message(stream, Kind::Event, &event),
                    &mut machine.channel,
                )
            };
            match frame.decode::<Request>() {
                Ok(Request::Birth(birth)) if birth.hostname.ends_with("-deaf") => frozen = true,
                Ok(Request::Exec(exec)) => {
                    event(Event::Started(Started { pid: 7 }));
                    match exec.argv[0].as_slice() {
                        b"hang" => continue,
                        b"freeze" => {
                            frozen = true;
                            continue;
                        }
                        b"fill" => {
                            let error = DiskError {
                                disk: 1,
                                full: true,
                            };
                            let _ = machine.disk_errors.try_send(error);
                        }
                        b"crash" => {
                            return GuestEnd::Crash(Exit {
                                code: None,
                                signal: Some(11),
                                stderr: "out of luck".to_owned(),
                            });
                        }
                        _ => {}
                    }
                    let text: Vec<u8> = exec.argv.iter().flat_map(|word| word.to_vec()).collect();
                    say(
                        Frame::new(stream, Kind::Data, Channel::Output, text),
                        &mut machine.channel,
                    );
                    let exited = Exited {
                        code: Some(0),
                        signal: None,
                        timed_out: false,
                        duration_us: 1,
                    };
                    say(
                        Frame::message(stream, Kind::Event, &Event::Exited(exited)),
                        &mut machine.channel,
                    );
                }
                Ok(Request::Connect(ConnectRequest {
                    to: Endpoint::Internet(to),
                    ..
                }))
                | Ok(Request::Datagrams(DatagramsRequest { to })) => {
                    if to.port == 7 {
                        echoing.insert(stream);
                        event(Event::Connected(Connected { peer: to.host }));
                    } else {
                        event(Event::Failed(Failure {
                            kind: FailureKind::Refused,
                            message: "nobody is there".to_owned(),
                        }));
                    }
                }
                Ok(Request::Shutdown(_)) => {
                    let _ = machine.console.write_all(b"going down\n");
                    event(Event::Done);
                }
                _ => event(Event::Done),
            }
        }
    }
    GuestEnd::Off
}

/// What a stream that gives everything back says to a frame.
fn echo(frame: &Frame) -> Vec<Frame> {
    let stream = frame.stream;
    match frame.kind {
        Kind::Data => vec![
            Frame::credit(stream, Channel::Input, frame.header().length),
            Frame::new(stream, Kind::Data, Channel::Output, frame.payload.clone()),
        ],
        Kind::Eof => vec![
            Frame::bare(stream, Kind::Eof, Channel::Output),
            Frame::message(stream, Kind::Event, &Event::Done),
        ],
        _ => Vec::new(),
    }
}

//! Directories of the host, mounted in the guest.
//!
//! The guest's kernel asks in its own protocol (FUSE), and this carries its messages to the host and the
//! answers back, whole and unread.

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use smolvm_proto::Channel;
use smolvm_proto::message::{Event, Failure, FailureKind, MountRequest};
use smolvm_proto::socket::Connected;

use crate::extract::make_all;
use crate::failure::{failure, from_errno};
use crate::files::absolute;
use crate::port::DATA_BYTES_MAX;
use crate::stream::{Last, Stop, Stream};

/// Where the guest's kernel asks.
const DEVICE: &str = "/dev/fuse";

/// Most bytes of one message: 128 KiB of a file's, and what goes with them. The kernel wants room for the
/// largest that was agreed on, or gives none (`fuse_dev_do_read`).
const MESSAGE_BYTES_MAX: usize = 128 * 1024 + 4096;
/// Most bytes that one read of the guest's kernel asks for.
const READ_BYTES_MAX: usize = 128 * 1024;

/// Mounts a directory, and carries messages until it is unmounted.
pub(crate) fn mount(stream: &Stream, request: &MountRequest) -> Result<Last, Stop> {
    let target = absolute(&request.target)?;
    let mut relay = Relay {
        stream,
        device: attach(target, request.read_only)?,
        buffer: vec![0; MESSAGE_BYTES_MAX],
        asked: 0..0,
        answers: Vec::new(),
    };
    let peer = target.display().to_string();
    let result = match stream.send_event(&Event::Connected(Connected { peer })) {
        Ok(()) => relay.serve(),
        Err(gone) => Err(gone.into()),
    };
    if result.is_err() {
        // Nobody answers any more. What is open there gets errors, and the place is free.
        let _ = rustix::mount::unmount(target, UnmountFlags::DETACH);
    }
    result
}

/// Mounts, and returns where the guest's kernel asks.
fn attach(target: &Path, read_only: bool) -> Result<OwnedFd, Failure> {
    let doing = || format!("mounting a directory of the host on {}", target.display());
    make_all(target, None)?;
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let device = rustix::fs::open(DEVICE, flags, Mode::empty()).map_err(|errno| match errno {
        // The first without the file system, the others without what is behind the device.
        Errno::NOENT | Errno::NODEV | Errno::NXIO => failure(
            FailureKind::InvalidInput,
            format!(
                "{}: the guest's kernel has no FUSE, by which it is done; those that come \
                 with smolvm have it",
                doing()
            ),
        ),
        errno => from_errno(&format!("{}: opening {DEVICE}", doing()), errno),
    })?;
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,max_read={READ_BYTES_MAX}",
        device.as_raw_fd()
    );
    let options = std::ffi::CString::new(options)
        .map_err(|error| failure(FailureKind::InvalidInput, error.to_string()))?;
    // What the host says of owners and bits is no promise of this guest's.
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOATIME;
    if read_only {
        flags |= MountFlags::RDONLY;
    }
    rustix::mount::mount("host", target, "fuse", flags, Some(options.as_c_str()))
        .map_err(|errno| from_errno(&doing(), errno))?;
    Ok(device)
}

/// A mount that is served: one thread, one poll(2) loop, two directions.
struct Relay<'a> {
    stream: &'a Stream,
    device: OwnedFd,
    buffer: Vec<u8>,
    /// Where in the buffer the rest of a message is that the host has not been sent.
    asked: Range<usize>,
    /// Answers of which a part has arrived.
    answers: Vec<u8>,
}

impl Relay<'_> {
    fn serve(&mut self) -> Result<Last, Stop> {
        loop {
            let mut mailbox = self.stream.mailbox();
            if mailbox.reset {
                return Err(Stop::Gone);
            }
            // None means anything here.
            mailbox.controls.clear();
            let part = mailbox.input.pop_front();
            let ended = mailbox.input_ended;
            let credit = mailbox.credit(Channel::Output);
            drop(mailbox);
            // First: an answer may be what somebody waits for who holds up everything else.
            if let Some(part) = part {
                self.stream.consumed(part.len())?;
                self.answers.extend_from_slice(&part);
                self.answer()?;
                continue;
            }
            if ended {
                let what = "the host serves the directory no more";
                return Err(failure(FailureKind::Io, what).into());
            }
            if self.asked.is_empty() {
                match rustix::io::read(&self.device, &mut self.buffer[..]) {
                    Ok(length) => self.asked = 0..length,
                    // What it was about was given up meanwhile (`fuse_dev_do_read`).
                    Err(Errno::INTR | Errno::NOENT) => {}
                    Err(Errno::AGAIN) => {
                        self.stream.wait_beside(Some(self.device.as_fd()), None);
                    }
                    // It was unmounted.
                    Err(_) => return Ok(Last::done()),
                }
            } else if credit == 0 {
                self.stream.wait_beside(None, None);
            } else {
                let now = self.asked.len().min(credit).min(DATA_BYTES_MAX);
                let part = self.asked.start..self.asked.start + now;
                self.stream.send_data(Channel::Output, &self.buffer[part])?;
                self.asked.start += now;
            }
        }
    }

    /// Gives the guest's kernel the whole answers that have arrived, each by itself.
    fn answer(&mut self) -> Result<(), Stop> {
        let mut done = 0;
        while let Some(length) = self.answers[done..].first_chunk() {
            let length = u32::from_ne_bytes(*length) as usize;
            if length < size_of::<u32>() || length > MESSAGE_BYTES_MAX {
                let what = "the host's answer to the guest's kernel is none";
                return Err(failure(FailureKind::InvalidInput, what).into());
            }
            let Some(message) = self.answers[done..].get(..length) else {
                break;
            };
            // Whoever asked may have given up; that all is over, the next read tells.
            let _ = rustix::io::write(&self.device, message);
            done += length;
        }
        self.answers.drain(..done);
        Ok(())
    }
}

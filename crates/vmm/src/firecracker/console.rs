//! The guest's serial port. Firecracker has it on its standard input and output, takes input only from a
//! terminal or a pipe, and never waits for room in its output: what does not fit is lost. So both are
//! pipes, of which nobody but us is slow: a pipe holds 64 KiB (pipe(7)), where a socket is full after a
//! few hundred single bytes, each of which counts for the buffer that it is in.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;

use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::pipe::{Receiver, Sender};

/// The VMM's standard streams.
pub(super) struct Streams {
    pub(super) input: OwnedFd,
    pub(super) output: OwnedFd,
}

/// Our ends of them.
pub(super) struct Console {
    input: OwnedFd,
    output: OwnedFd,
}

/// Makes both pipes.
pub(super) fn pipes() -> io::Result<(Console, Streams)> {
    let (input, ours) = pipe_with(PipeFlags::CLOEXEC)?;
    let (our_output, output) = pipe_with(PipeFlags::CLOEXEC)?;
    for fd in [&ours, &our_output] {
        rustix::io::ioctl_fionbio(fd, true)?;
    }
    let console = Console {
        input: ours,
        output: our_output,
    };
    Ok((console, Streams { input, output }))
}

impl Console {
    /// Joins the pipes to one stream and returns that, in blocking mode. It ends when the VMM does.
    ///
    /// Must be called within a tokio runtime, whose tasks pass on what is said.
    pub(super) fn serve(self) -> io::Result<StdUnixStream> {
        let (here, there) = StdUnixStream::pair()?;
        there.set_nonblocking(true)?;
        let (mut reader, mut writer) = UnixStream::from_std(there)?.into_split();
        let mut input = Sender::from_owned_fd(self.input)?;
        let mut output = Receiver::from_owned_fd(self.output)?;
        tokio::spawn(async move {
            // Either end closes it.
            let _ = tokio::io::copy(&mut reader, &mut input).await;
        });
        tokio::spawn(async move {
            let mut chunk = vec![0; 16 * 1024];
            let mut heard = true;
            while let Ok(count @ 1..) = output.read(&mut chunk).await {
                // Read on when nobody listens any more: an output that is closed is an error to the
                // VMM for each byte.
                heard = heard && writer.write_all(&chunk[..count]).await.is_ok();
            }
        });
        Ok(here)
    }
}

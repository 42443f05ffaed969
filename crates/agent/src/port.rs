//! The one byte stream to the host: whole frames out, from any thread.
//!
//! The descriptor is non-blocking, and a full port is waited for with poll(2): the kernel's
//! virtio_console spins in `__send_to_port` until the host has consumed a blocking write
//! (drivers/char/virtio_console.c).
//!
//! Sessions write their own frames and wait while the host is slow. The reader of the port never
//! waits for room: if host and reader both waited for the other to read, neither would. What it has
//! to say goes through [`Port::send_soon`].

use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use smolvm_proto::limits::HEADER_BYTES;
use smolvm_proto::{Channel, Frame, Header, Kind};

use crate::serve::OnLoss;

/// Bytes of payload in one data frame. With its header it is 32 KiB, which is what virtio_console
/// takes in one write, and little enough that another stream's frame does not wait long.
pub(crate) const DATA_BYTES_MAX: usize = 32 * 1024 - HEADER_BYTES;

/// Bytes the reader may have waiting; over that it stops reading until the host has taken some.
const LATE_BYTES_MAX: usize = 256 * 1024;

/// The host is not there any more, or the connection was given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gone;

/// The writing half of one connection with the host.
#[derive(Debug)]
pub(crate) struct Port {
    fd: Arc<OwnedFd>,
    /// Held while a frame is written, so that frames do not mix.
    writing: Mutex<()>,
    /// Frames of [`Port::send_soon`] that were not written yet. Always written before others.
    late: Mutex<Vec<u8>>,
    closed: AtomicBool,
    /// Whether the connection was given up, for those who wait for that.
    over: (Mutex<bool>, Condvar),
    on_loss: OnLoss,
}

/// What became of the late frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Late {
    /// Written, or another thread is about to.
    Done,
    /// The port is full: call [`Port::flush_late`] when it can be written again.
    Full,
}

impl Port {
    pub(crate) fn new(fd: Arc<OwnedFd>, on_loss: OnLoss) -> Self {
        Self {
            fd,
            writing: Mutex::new(()),
            late: Mutex::new(Vec::new()),
            closed: AtomicBool::new(false),
            over: (Mutex::new(false), Condvar::new()),
            on_loss,
        }
    }

    /// The host cannot be written to. Where commands outlive that, the reader has to say so first: it
    /// tells their sessions that nobody listens, and gives the connection up then.
    fn lost(&self) -> Gone {
        if self.on_loss == OnLoss::KeepCommands {
            let over = self.over.0.lock().unwrap_or_else(PoisonError::into_inner);
            let waited = self.over.1.wait_while(over, |over| !*over);
            drop(waited.unwrap_or_else(PoisonError::into_inner));
        }
        Gone
    }

    fn give_up(&self) {
        self.closed.store(true, Ordering::Release);
        *self.over.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.over.1.notify_all();
    }

    fn late(&self) -> MutexGuard<'_, Vec<u8>> {
        self.late.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn writing(&self) -> MutexGuard<'_, ()> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes bytes that are whole frames, and waits while the port is full.
    pub(crate) fn send(&self, frames: &[u8]) -> Result<(), Gone> {
        self.send_parts(frames, &[])
    }

    /// Writes a data frame without copying its payload.
    pub(crate) fn send_data(
        &self,
        stream: u32,
        channel: Channel,
        payload: &[u8],
    ) -> Result<(), Gone> {
        debug_assert!(payload.len() <= DATA_BYTES_MAX);
        let Ok(length) = u32::try_from(payload.len()) else {
            unreachable!("at most DATA_BYTES_MAX");
        };
        let header = Header {
            length,
            stream,
            kind: Kind::Data,
            channel,
        };
        self.send_parts(&header.to_bytes(), payload)
    }

    /// Writes the first frame of a connection. For the reader, who is not told of a loss by anybody.
    pub(crate) fn send_hello(&self, frame: &[u8]) -> Result<(), Gone> {
        let guard = self.writing();
        self.write_parts(&guard, frame, &[])
    }

    fn send_parts(&self, first: &[u8], second: &[u8]) -> Result<(), Gone> {
        let guard = self.writing();
        let written = self.write_parts(&guard, first, second);
        drop(guard);
        written.map_err(|Gone| self.lost())?;
        // The reader may have queued something while the port was ours, and relied on us.
        let _ = self.flush_late();
        Ok(())
    }

    fn write_parts(
        &self,
        guard: &MutexGuard<'_, ()>,
        mut first: &[u8],
        mut second: &[u8],
    ) -> Result<(), Gone> {
        self.flush_all(guard)?;
        while !first.is_empty() || !second.is_empty() {
            if self.closed.load(Ordering::Acquire) {
                return Err(Gone);
            }
            let parts = [IoSlice::new(first), IoSlice::new(second)];
            match rustix::io::writev(&*self.fd, &parts) {
                Ok(written) => {
                    let of_first = written.min(first.len());
                    first = &first[of_first..];
                    second = &second[written - of_first..];
                }
                Err(Errno::AGAIN) => self.wait_for_room()?,
                Err(Errno::INTR) => {}
                Err(_) => return Err(Gone),
            }
        }
        Ok(())
    }

    /// Queues a frame and writes it now if that needs no waiting.
    pub(crate) fn send_soon(&self, frame: &Frame) -> Late {
        frame.write_to(&mut self.late());
        self.flush_late()
    }

    /// Whether so much is queued that the reader should not cause more.
    pub(crate) fn is_late(&self) -> bool {
        self.late().len() > LATE_BYTES_MAX
    }

    /// Writes what [`Port::send_soon`] queued, as far as the port takes it.
    pub(crate) fn flush_late(&self) -> Late {
        // The loop closes the gap in which a frame is queued after the flush below and before the
        // lock is free again: whoever frees the lock looks once more.
        while !self.late().is_empty() {
            let Ok(guard) = self.writing.try_lock() else {
                return Late::Done;
            };
            let done = self.flush_some(&guard);
            drop(guard);
            match done {
                Ok(true) => {}
                Ok(false) => return Late::Full,
                Err(Gone) => return Late::Done,
            }
        }
        Late::Done
    }

    /// Whether everything was written; `false` means the port is full.
    fn flush_some(&self, _guard: &MutexGuard<'_, ()>) -> Result<bool, Gone> {
        let mut late = self.late();
        while !late.is_empty() {
            if self.closed.load(Ordering::Acquire) {
                late.clear();
                return Err(Gone);
            }
            match rustix::io::write(&*self.fd, &late) {
                Ok(written) => drop(late.drain(..written)),
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(_) => {
                    late.clear();
                    return Err(Gone);
                }
            }
        }
        Ok(true)
    }

    fn flush_all(&self, guard: &MutexGuard<'_, ()>) -> Result<(), Gone> {
        while !self.flush_some(guard)? {
            self.wait_for_room()?;
        }
        Ok(())
    }

    /// Waits until the port can be written or the host is gone.
    fn wait_for_room(&self) -> Result<(), Gone> {
        let mut ports = [PollFd::new(&*self.fd, PollFlags::OUT)];
        match rustix::event::poll(&mut ports, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return Err(Gone),
        }
        // virtio_console reports HUP, and never OUT, while the host's end is closed.
        let events = ports[0].revents();
        if events.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL) {
            return Err(Gone);
        }
        Ok(())
    }

    /// Gives the connection up after the frame being written now: every later send fails.
    pub(crate) fn close(&self) {
        let guard = self.writing();
        // Bytes of a frame that is half out must follow, or the host loses the frame boundaries.
        let _ = self.flush_all(&guard);
        self.give_up();
    }

    /// Gives the connection up at once: the host is gone.
    pub(crate) fn abandon(&self) {
        self.give_up();
    }
}

//! A handle by which one thread stops a long operation that another is blocked in.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::error::{HostError, HostErrorKind};

/// Cancels a long operation. Clones are the same handle; cancelling is for ever.
///
/// It is a file descriptor (eventfd(2)) so that an operation waiting for a child process wakes at
/// once, without polling.
#[derive(Debug, Clone)]
pub struct Cancel {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    cancelled: AtomicBool,
    event: OwnedFd,
}

impl Cancel {
    /// A handle that nobody has cancelled yet.
    ///
    /// # Errors
    ///
    /// Only if the process or the host has no file descriptors left.
    pub fn new() -> Result<Self, HostError> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| HostError::io("create", Path::new("an eventfd"), e.into()))?;
        Ok(Self {
            inner: Arc::new(Inner {
                cancelled: AtomicBool::new(false),
                event,
            }),
        })
    }

    /// Asks the operation to stop. It kills its children, removes what it half made and returns
    /// [`HostErrorKind::Interrupted`]. Idempotent, from any thread, returns at once.
    pub fn cancel(&self) {
        self.inner.cancelled.store(true, Ordering::Release);
        // Fails only when the counter is full, in which case the descriptor is readable anyway.
        let _ = rustix::io::write(&self.inner.event, &1_u64.to_ne_bytes());
    }

    /// Whether [`Cancel::cancel`] was called.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.inner.cancelled.load(Ordering::Acquire)
    }

    /// Readable once cancelled; never to be read from, so that it stays readable.
    #[must_use]
    pub fn event(&self) -> BorrowedFd<'_> {
        self.inner.event.as_fd()
    }

    /// Reads `fd`, and ends with an error as soon as it is cancelled, also while it waits for more.
    #[must_use]
    pub fn reader<'a>(&'a self, fd: BorrowedFd<'a>) -> CancelReader<'a> {
        CancelReader { fd, cancel: self }
    }

    pub(crate) fn check(&self, doing: &'static str, thing: &str) -> Result<(), HostError> {
        if self.is_cancelled() {
            return Err(HostError::new(HostErrorKind::Interrupted, doing, thing)
                .because("it was cancelled"));
        }
        Ok(())
    }
}

/// See [`Cancel::reader`].
#[derive(Debug)]
pub struct CancelReader<'a> {
    fd: BorrowedFd<'a>,
    cancel: &'a Cancel,
}

impl Read for CancelReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut fds = [
            PollFd::from_borrowed_fd(self.fd, PollFlags::IN),
            PollFd::from_borrowed_fd(self.cancel.event(), PollFlags::IN),
        ];
        rustix::io::retry_on_intr(|| poll(&mut fds, None))?;
        if self.cancel.is_cancelled() {
            // Not `Interrupted`, after which a reader would try again.
            return Err(io::Error::other("cancelled"));
        }
        Ok(rustix::io::read(self.fd, buffer)?)
    }
}

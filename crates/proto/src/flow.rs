//! Flow control: credit in bytes for each channel of a stream, in one direction.
//!
//! Each side starts with [`WINDOW_BYTES`] of credit on each channel. The receiver grants more as it
//! passes bytes on, so a reader that stalls holds its own stream up and nothing else.

use crate::limits::WINDOW_BYTES;

/// What the sender of a channel may still send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SendWindow {
    available: u32,
}

impl Default for SendWindow {
    fn default() -> Self {
        Self {
            available: WINDOW_BYTES,
        }
    }
}

impl SendWindow {
    /// Bytes that may be sent now.
    #[must_use]
    pub fn available(&self) -> u32 {
        self.available
    }

    /// Notes that `bytes` were sent.
    ///
    /// # Panics
    ///
    /// If that is more than [`SendWindow::available`]: the sender broke its own rule.
    pub fn sent(&mut self, bytes: u32) {
        assert!(bytes <= self.available, "sent over the window");
        self.available -= bytes;
    }

    /// Notes a grant. A grant that would pass the window is cut to it, so a hostile peer cannot
    /// make the count overflow.
    pub fn granted(&mut self, bytes: u32) {
        self.available = self.available.saturating_add(bytes).min(WINDOW_BYTES);
    }
}

/// What the receiver of a channel has taken in and not yet granted again.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ReceiveWindow {
    /// Received and not passed on.
    held: u32,
    /// Passed on and not yet granted.
    owed: u32,
}

/// The peer sent more than it was granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("peer sent more bytes than it was granted")]
pub struct Overrun;

impl ReceiveWindow {
    /// Notes that `bytes` arrived.
    ///
    /// # Errors
    ///
    /// [`Overrun`] if the peer had no credit for them.
    pub fn received(&mut self, bytes: u32) -> Result<(), Overrun> {
        let held = self.held.checked_add(bytes).ok_or(Overrun)?;
        if held.checked_add(self.owed).ok_or(Overrun)? > WINDOW_BYTES {
            return Err(Overrun);
        }
        self.held = held;
        Ok(())
    }

    /// Notes that `bytes` were passed on, and says how much credit to grant now.
    ///
    /// Grants come in halves of a window, so that a stream of small reads does not cost a frame each.
    ///
    /// # Panics
    ///
    /// If more is passed on than was received.
    #[must_use]
    pub fn consumed(&mut self, bytes: u32) -> Option<u32> {
        assert!(bytes <= self.held, "passed on more than was received");
        self.held -= bytes;
        self.owed += bytes;
        if self.owed >= WINDOW_BYTES / 2 {
            Some(std::mem::take(&mut self.owed))
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever the two sides do in whatever order, the sender is never stuck once the receiver
        /// has passed everything on, and the receiver never holds more than a window.
        #[test]
        fn sender_and_receiver_agree(steps in prop::collection::vec((any::<bool>(), 1u32..100_000), 1..200)) {
            let mut sender = SendWindow::default();
            let mut receiver = ReceiveWindow::default();
            let mut held = 0u32;
            for (send, size) in steps {
                if send {
                    let size = size.min(sender.available());
                    sender.sent(size);
                    prop_assert!(receiver.received(size).is_ok());
                    held += size;
                } else {
                    let size = size.min(held);
                    held -= size;
                    if let Some(grant) = receiver.consumed(size) {
                        sender.granted(grant);
                    }
                }
                prop_assert!(held <= WINDOW_BYTES);
            }
            if let Some(grant) = receiver.consumed(held) {
                sender.granted(grant);
            }
            prop_assert!(sender.available() > WINDOW_BYTES / 2 - 1);
        }
    }

    #[test]
    fn a_peer_that_ignores_the_window_is_noticed() {
        let mut receiver = ReceiveWindow::default();
        assert_eq!(receiver.received(WINDOW_BYTES), Ok(()));
        assert_eq!(receiver.received(1), Err(Overrun));
        assert_eq!(receiver.received(u32::MAX), Err(Overrun));
    }
}

//! How many machines the tests of this process run at once.

use std::sync::{Condvar, Mutex, PoisonError};

/// More only makes each slower: an emulated machine that boots takes a whole core.
const AT_ONCE: usize = 3;

static FREE: Mutex<usize> = Mutex::new(AT_ONCE);
static FREED: Condvar = Condvar::new();

/// The right to run some machines.
#[derive(Debug)]
pub(crate) struct Permit(usize);

impl Permit {
    /// Waits until so many may be run. A test takes all it needs at once, so none waits for another
    /// that waits for it.
    pub(crate) fn take(machines: usize) -> Self {
        let machines = machines.min(AT_ONCE);
        let free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        let mut free = FREED
            .wait_while(free, |free| *free < machines)
            .unwrap_or_else(PoisonError::into_inner);
        *free -= machines;
        Self(machines)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        *FREE.lock().unwrap_or_else(PoisonError::into_inner) += self.0;
        FREED.notify_all();
    }
}

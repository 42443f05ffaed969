//! The caller's terminal: its size, and raw mode that never outlives us.

use std::sync::Mutex;

use rustix::termios::{self, OptionalActions, Termios};
use smolvm_engine::TerminalSize;

/// The settings to go back to while the terminal is raw. Global because a panic hook has no other
/// way to know.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// The size assumed when nothing tells: that of the terminals everything is written for.
const SIZE_DEFAULT: TerminalSize = TerminalSize {
    rows: 24,
    columns: 80,
};

/// The terminal in raw mode; the settings before come back when this is dropped, when the program
/// panics, and when it is told to end.
#[derive(Debug)]
pub(crate) struct Raw(());

impl Raw {
    /// Puts the terminal on standard input into raw mode.
    ///
    /// # Errors
    ///
    /// If it refuses.
    pub(crate) fn enter() -> std::io::Result<Self> {
        let before = termios::tcgetattr(rustix::stdio::stdin())?;
        if let Ok(mut saved) = BEFORE.lock() {
            saved.get_or_insert_with(|| before.clone());
        }
        let raw = Self(());
        raw.again()?;
        Ok(raw)
    }

    /// Puts it into raw mode again, after the shell that stopped us took it back.
    ///
    /// # Errors
    ///
    /// If it refuses.
    pub(crate) fn again(&self) -> std::io::Result<()> {
        let mut settings = termios::tcgetattr(rustix::stdio::stdin())?;
        settings.make_raw();
        // Now, not after draining output: a terminal stopped with ^S would hang us here.
        termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &settings)?;
        Ok(())
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

/// Gives the terminal back its settings, if it was raw.
pub(crate) fn restore() {
    let before = BEFORE.lock().ok().and_then(|mut saved| saved.take());
    if let Some(before) = before {
        // Nothing can be done if the terminal is gone.
        let _ = termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &before);
    }
}

/// Makes a panic restore the terminal before it is reported.
pub(crate) fn restore_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        restore();
        report(panic);
    }));
}

/// The terminal's size.
pub(crate) fn size() -> TerminalSize {
    let ask = |size: rustix::io::Result<termios::Winsize>| {
        size.ok().filter(|size| size.ws_row > 0 && size.ws_col > 0)
    };
    ask(termios::tcgetwinsize(rustix::stdio::stdout()))
        .or_else(|| ask(termios::tcgetwinsize(rustix::stdio::stdin())))
        .or_else(|| ask(termios::tcgetwinsize(rustix::stdio::stderr())))
        .map_or(SIZE_DEFAULT, |size| TerminalSize {
            rows: size.ws_row,
            columns: size.ws_col,
        })
}

//! Everything that is written: data to standard output, words about it to standard error.
//!
//! Standard output is data: a table, a name, a guest's output, or exactly one JSON object. With
//! `--json` the human methods write nothing, so a command need not ask which it is.

use std::io::{self, Write as _};
use std::os::fd::BorrowedFd;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use serde_json::{Value, json};

use crate::exit::Exit;
use crate::report::CliError;

/// How to write.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    /// One JSON object instead of text.
    pub(crate) json: bool,
    /// No words on standard error but failures.
    pub(crate) quiet: bool,
}

impl Output {
    /// Writes a line of data.
    ///
    /// # Errors
    ///
    /// [`CliError::BrokenPipe`] if nobody reads, [`CliError::Io`] if it cannot be written.
    pub(crate) fn line(self, text: &str) -> Result<(), CliError> {
        if self.json {
            return Ok(());
        }
        let mut stdout = io::stdout().lock();
        writeln!(stdout, "{text}").map_err(stdout_failed)
    }

    /// Writes a table of data; nothing at all if it has no rows and no header is wanted.
    ///
    /// # Errors
    ///
    /// As [`Output::line`].
    pub(crate) fn table(self, header: &[&str], rows: Vec<Vec<String>>) -> Result<(), CliError> {
        if self.json {
            return Ok(());
        }
        let mut table = comfy_table::Table::new();
        table.load_style(comfy_table::presets::NOTHING);
        if !header.is_empty() {
            table.set_header(header);
        }
        // Cells may hold what a guest chose; it must not drive the terminal.
        table.add_rows(rows.into_iter().map(|row| {
            row.into_iter()
                .map(|cell| cell.replace(char::is_control, "?"))
                .collect::<Vec<_>>()
        }));
        for column in table.column_iter_mut() {
            column.set_padding((0, 3));
        }
        self.line(&table.trim_fmt())
    }

    /// Says something about the work to a person.
    pub(crate) fn status(self, text: &str) {
        if !self.quiet && !self.json {
            stderr(text);
        }
    }

    /// Asks a person a question that only `y` answers with yes.
    ///
    /// # Errors
    ///
    /// [`CliError::Io`] if the terminal cannot be read.
    pub(crate) fn confirm(self, question: &str) -> Result<bool, CliError> {
        let failed = |error| CliError::io("reading the answer", error);
        let mut stderr = io::stderr().lock();
        write!(stderr, "{question} [y/N] ")
            .and_then(|()| stderr.flush())
            .map_err(failed)?;
        let mut answer = String::new();
        io::stdin().read_line(&mut answer).map_err(failed)?;
        Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
    }
}

/// Writes a line to standard error. A failure to complain is not worth complaining about.
pub(crate) fn stderr(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Writes text as it is to standard error.
pub(crate) fn stderr_raw(text: &str) {
    let _ = io::stderr().lock().write_all(text.as_bytes());
}

/// Writes bytes as they are to standard output, now: a guest's half line has to appear at once, so
/// the standard library's line buffer is not used.
///
/// # Errors
///
/// What write(2) fails with.
pub(crate) fn stdout_bytes(bytes: &[u8]) -> io::Result<()> {
    write_all(rustix::stdio::stdout(), bytes)
}

/// Writes bytes as they are to standard error.
///
/// # Errors
///
/// What write(2) fails with.
pub(crate) fn stderr_bytes(bytes: &[u8]) -> io::Result<()> {
    write_all(rustix::stdio::stderr(), bytes)
}

fn write_all(to: BorrowedFd<'_>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(to, bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            // Whoever shares this pipe or terminal with us made it non-blocking.
            Err(Errno::AGAIN) => {
                let mut ready = [PollFd::from_borrowed_fd(to, PollFlags::OUT)];
                rustix::event::poll(&mut ready, None)?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Prints the one JSON object of a command.
///
/// # Errors
///
/// As [`Output::line`].
pub(crate) fn envelope(
    command: &str,
    exit: Exit,
    data: &Value,
    error: Option<Value>,
) -> Result<(), CliError> {
    let object = json!({
        "ok": error.is_none(),
        "command": command,
        "exit_code": exit.code(),
        "data": data,
        "error": error,
    });
    let mut text = serde_json::to_vec_pretty(&object)
        .map_err(|error| CliError::io("writing JSON", error.into()))?;
    text.push(b'\n');
    stdout_bytes(&text).map_err(stdout_failed)
}

fn stdout_failed(error: io::Error) -> CliError {
    CliError::io("writing to standard output", error)
}

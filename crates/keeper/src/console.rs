//! The guest's console: kept in a log of limited size, with the last lines at hand for an error.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

/// Bytes of one log file. A guest writes what it likes; of two files the older is dropped.
const LOG_BYTES_MAX: u64 = 1024 * 1024;
/// Lines kept for an error.
const TAIL_LINES: usize = 20;
/// Most characters of one of them.
const TAIL_LINE_CHARS: usize = 400;

/// The last lines a guest wrote.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tail {
    inner: Arc<Mutex<TailLines>>,
}

#[derive(Debug, Default)]
struct TailLines {
    lines: VecDeque<String>,
    partial: Vec<u8>,
}

impl Tail {
    /// The last lines, oldest first, without control characters.
    pub(crate) fn lines(&self) -> Vec<String> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let partial = printable(&inner.partial);
        inner
            .lines
            .iter()
            .cloned()
            .chain((!partial.is_empty()).then_some(partial))
            .collect()
    }

    fn add(&self, bytes: &[u8]) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        for byte in bytes {
            if *byte == b'\n' {
                let line = printable(&std::mem::take(&mut inner.partial));
                if !line.is_empty() {
                    if inner.lines.len() == TAIL_LINES {
                        inner.lines.pop_front();
                    }
                    inner.lines.push_back(line);
                }
            } else if inner.partial.len() < 4 * TAIL_LINE_CHARS {
                inner.partial.push(*byte);
            }
        }
    }
}

/// A line as it may be shown on somebody's terminal: a guest must not steer that.
fn printable(line: &[u8]) -> String {
    String::from_utf8_lossy(line)
        .chars()
        .filter(|c| !c.is_control())
        .take(TAIL_LINE_CHARS)
        .collect::<String>()
        .trim_end()
        .to_owned()
}

/// Reads the console until the machine is gone.
pub(crate) async fn record(
    console: std::os::unix::net::UnixStream,
    path: PathBuf,
    tail: Tail,
) -> std::io::Result<()> {
    console.set_nonblocking(true)?;
    let mut console = UnixStream::from_std(console)?;
    // There from the first moment, so that it can be followed before the guest says anything. A full
    // disk must not stop the guest's console, and so the guest: then it is tried again with each piece.
    let mut log = Log::open(&path).ok();
    let mut told = false;
    let mut buffer = vec![0; 8192];
    loop {
        let count = console.read(&mut buffer).await?;
        if count == 0 {
            return Ok(());
        }
        tail.add(&buffer[..count]);
        match write(&mut log, &path, &buffer[..count]) {
            Ok(()) => told = false,
            // Once, not for each of a guest's lines.
            Err(error) if !told => {
                told = true;
                tracing::warn!(%error, "could not write the console log");
            }
            Err(_) => {}
        }
    }
}

/// Writes to a log, which is opened if it could not be before.
fn write(log: &mut Option<Log>, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    if log.is_none() {
        *log = Some(Log::open(path)?);
    }
    log.as_mut().map_or(Ok(()), |log| log.write(bytes))
}

struct Log {
    path: PathBuf,
    file: File,
    written: u64,
}

impl Log {
    fn open(path: &Path) -> std::io::Result<Self> {
        let file = File::options()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)?;
        Ok(Self {
            path: path.to_owned(),
            written: file.metadata()?.len(),
            file,
        })
    }

    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        if self.written + bytes.len() as u64 > LOG_BYTES_MAX {
            std::fs::rename(&self.path, self.path.with_extension("log.old"))?;
            *self = Self::open(&self.path)?;
        }
        self.file.write_all(bytes)?;
        self.written += bytes.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_short_and_harmless() {
        let tail = Tail::default();
        for line in 0..100 {
            tail.add(format!("line {line}\r\n\n").as_bytes());
        }
        tail.add(b"\x1b[31mred\x07 without an end");
        let lines = tail.lines();
        assert_eq!(lines.len(), TAIL_LINES + 1);
        assert_eq!(lines[0], "line 80");
        assert_eq!(lines[TAIL_LINES], "[31mred without an end");
        tail.add(&vec![b'x'; 1 << 20]);
        assert!(tail.lines()[TAIL_LINES].len() <= TAIL_LINE_CHARS);
    }

    #[tokio::test]
    async fn a_console_whose_log_cannot_be_written_is_read_on() {
        use std::io::Write as _;

        let dir = tempfile::tempdir().expect("a directory");
        // Every write to this device fails with ENOSPC (full(4)); nothing can be made in a directory
        // that is not there.
        for path in ["/dev/full".into(), dir.path().join("gone/console.log")] {
            let (mut guest, console) = std::os::unix::net::UnixStream::pair().expect("a pair");
            let tail = Tail::default();
            let reading = tokio::spawn(record(console, path, tail.clone()));
            for lines in 1..=3 {
                guest.write_all(b"a line\n").expect("written");
                while tail.lines().len() < lines {
                    assert!(!reading.is_finished(), "the console is read no more");
                    tokio::task::yield_now().await;
                }
            }
            drop(guest);
            reading.await.expect("no panic").expect("read to its end");
        }
    }

    #[test]
    fn the_log_never_passes_its_limit() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("console.log");
        let mut log = Log::open(&path).expect("a log");
        for _ in 0..50 {
            log.write(&vec![b'x'; 100_000]).expect("written");
        }
        for entry in std::fs::read_dir(dir.path()).expect("a directory") {
            let entry = entry.expect("an entry");
            assert!(entry.metadata().expect("metadata").len() <= LOG_BYTES_MAX);
        }
        assert_eq!(
            std::fs::read_dir(dir.path()).expect("a directory").count(),
            2
        );
    }
}

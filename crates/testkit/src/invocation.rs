//! Running a program, and what came of it.

use std::ffi::{OsStr, OsString};
use std::io::{Read, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use rustix::process::Signal;
use serde_json::Value;

use crate::watch::{PATIENCE, Process};

/// A command line about to be run.
#[derive(Debug)]
pub struct Invocation {
    command: Command,
    /// The program that runs it, if not we.
    around: Vec<OsString>,
    user: Option<u32>,
    stdin: Option<Vec<u8>>,
}

impl Invocation {
    /// Nothing of the test's own environment but the program path is passed on.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        let mut command = Command::new(program);
        command.env_clear();
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
        Self {
            command,
            around: Vec::new(),
            user: None,
            stdin: Some(Vec::new()),
        }
    }

    /// Adds arguments.
    #[must_use]
    pub fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.command.args(args);
        self
    }

    /// Sets a variable of its environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Has another program run it, which is given its own words, then those of this one.
    #[must_use]
    pub fn within(mut self, words: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        let words = words.into_iter().map(|word| word.as_ref().to_owned());
        // Around what is around it already.
        self.around.splice(..0, words);
        self
    }

    /// Runs it as another user and group. What [runs it](Invocation::within) does not.
    #[must_use]
    pub fn user(mut self, id: u32) -> Self {
        self.user = Some(id);
        self
    }

    /// Feeds its standard input, which then ends.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(bytes.into());
        self
    }

    /// Leaves its standard input open, to be written while it runs.
    #[must_use]
    pub fn open_stdin(mut self) -> Self {
        self.stdin = None;
        self
    }

    /// The command as it would be typed.
    fn line(&self) -> String {
        let mut line = String::new();
        for word in std::iter::once(self.command.get_program()).chain(self.command.get_args()) {
            let word = word.to_string_lossy();
            let name = word.rsplit('/').next().unwrap_or_default();
            // Full paths of programs only hide what was run.
            let word = if line.is_empty() { name } else { &word };
            line.push_str(if line.is_empty() { "" } else { " " });
            line.push_str(word);
        }
        line
    }

    /// Runs it to its end.
    ///
    /// # Panics
    ///
    /// If it does not end.
    #[track_caller]
    pub fn run(self) -> Finished {
        self.spawn().wait()
    }

    /// Starts it, and reads what it writes.
    ///
    /// # Panics
    ///
    /// If it cannot be started.
    #[must_use]
    #[track_caller]
    pub fn spawn(self) -> Running {
        let (mut running, stdout) = self.spawn_unread();
        running.stdout = Some(Output::read(stdout));
        running
    }

    /// Starts it; its standard output is the caller's to read.
    ///
    /// # Panics
    ///
    /// If it cannot be started.
    #[track_caller]
    pub fn spawn_unread(mut self) -> (Running, ChildStdout) {
        use std::os::unix::process::CommandExt as _;

        let line = self.line();
        if let Some(user) = self.user {
            self.command.current_dir("/");
            if self.around.is_empty() {
                self.command.uid(user).gid(user);
            } else {
                let user = user.to_string();
                let words = ["setpriv", "--reuid", &user, "--regid", &user];
                self.around.extend(words.map(OsString::from));
                self.around.push("--clear-groups".into());
            }
        }
        if let Some((program, words)) = self.around.split_first() {
            let mut command = Command::new(program);
            command.args(words).arg(self.command.get_program());
            command.args(self.command.get_args()).env_clear();
            for (name, value) in self.command.get_envs() {
                command.env(name, value.unwrap_or_default());
            }
            self.command = command;
        }
        let mut child = self
            .command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("`{line}` could not be started: {error}"));
        let process = Process::open(child.id()).expect("a child that was not waited for");
        let mut pipe = child.stdin.take().expect("piped");
        let stdin = match self.stdin {
            // On a thread, because more than a pipe holds would wait for the program's output to be
            // read; a program that does not read all of it is no failure.
            Some(bytes) => {
                std::thread::spawn(move || pipe.write_all(&bytes));
                None
            }
            None => Some(pipe),
        };
        let stdout = child.stdout.take().expect("piped");
        let stderr = Output::read(child.stderr.take().expect("piped"));
        let running = Running {
            line,
            child,
            process,
            stdin,
            stdout: None,
            stderr,
        };
        (running, stdout)
    }
}

/// A program that runs. Killed if the test forgets it.
#[derive(Debug)]
pub struct Running {
    line: String,
    child: Child,
    process: Process,
    stdin: Option<ChildStdin>,
    stdout: Option<Output>,
    stderr: Output,
}

impl Running {
    /// Its process number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Whether it has not ended.
    #[must_use]
    pub fn is_running(&self) -> bool {
        !self.process.ends_within(std::time::Duration::ZERO)
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Writes to its standard input.
    ///
    /// # Panics
    ///
    /// If that was not left open.
    #[track_caller]
    pub fn write(&mut self, bytes: &[u8]) {
        let stdin = self.stdin.as_mut().expect("standard input was left open");
        stdin.write_all(bytes).expect("a program that reads");
    }

    /// Ends its standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Waits until its standard output contains `text`.
    ///
    /// # Panics
    ///
    /// If it ends or time passes without.
    #[track_caller]
    pub fn wait_for(&self, text: &str) {
        let stdout = self.stdout.as_ref().expect("standard output is read here");
        self.wait_in(stdout, text);
    }

    /// Waits until `text` has appeared on standard error.
    ///
    /// # Panics
    ///
    /// If it does not, with all that did.
    #[track_caller]
    pub fn wait_for_error(&self, text: &str) {
        self.wait_in(&self.stderr, text);
    }

    #[track_caller]
    fn wait_in(&self, output: &Output, text: &str) {
        let seen = output.wait(Instant::now() + PATIENCE, |bytes, _| {
            contains(bytes, text.as_bytes())
        });
        let stdout = self.stdout.as_ref().map(Output::bytes).unwrap_or_default();
        assert!(
            seen,
            "`{}` did not say {text:?}\n{}",
            self.line,
            shown(&stdout, &self.stderr.bytes()),
        );
    }

    /// Waits for its end and the end of both its outputs.
    ///
    /// # Panics
    ///
    /// If one does not come.
    #[track_caller]
    pub fn wait(mut self) -> Finished {
        let deadline = Instant::now() + PATIENCE;
        let ended = self.process.ends_within(PATIENCE);
        let said = |running: &Self| {
            let stdout = running
                .stdout
                .as_ref()
                .map(Output::bytes)
                .unwrap_or_default();
            shown(&stdout, &running.stderr.bytes())
        };
        assert!(
            ended,
            "`{}` did not end within {PATIENCE:?}\n{}",
            self.line,
            said(&self)
        );
        let status = self.child.wait().expect("a child that ended");
        for output in [self.stdout.as_ref(), Some(&self.stderr)]
            .into_iter()
            .flatten()
        {
            assert!(
                output.wait(deadline, |_, ended| ended),
                "`{}` ended, and something it started still holds its outputs open\n{}",
                self.line,
                said(&self)
            );
        }
        Finished {
            line: std::mem::take(&mut self.line),
            code: status.code(),
            signal: status.signal(),
            stdout: self.stdout.as_ref().map(Output::bytes).unwrap_or_default(),
            stderr: self.stderr.bytes(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both do nothing if it was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A pipe that is read on a thread.
#[derive(Debug)]
pub(crate) struct Output {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    read: Mutex<(Vec<u8>, bool)>,
    changed: Condvar,
}

impl Output {
    pub(crate) fn read(mut from: impl Read + Send + 'static) -> Self {
        let shared = Arc::new(Shared::default());
        let writer = Arc::clone(&shared);
        std::thread::spawn(move || {
            let mut buffer = vec![0; 64 * 1024];
            loop {
                // The end of a terminal is an error.
                let count = from.read(&mut buffer).unwrap_or(0);
                let mut read = writer.read.lock().unwrap_or_else(PoisonError::into_inner);
                read.0.extend_from_slice(&buffer[..count]);
                read.1 = count == 0;
                writer.changed.notify_all();
                if count == 0 {
                    return;
                }
            }
        });
        Self { shared }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.shared
            .read
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .0
            .clone()
    }

    /// Waits until what was read is as wanted, or ended; says whether it is as wanted.
    pub(crate) fn wait(&self, deadline: Instant, wanted: impl Fn(&[u8], bool) -> bool) -> bool {
        let read = self
            .shared
            .read
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let left = deadline.saturating_duration_since(Instant::now());
        let (read, _) = self
            .shared
            .changed
            .wait_timeout_while(read, left, |(bytes, ended)| {
                !*ended && !wanted(bytes, *ended)
            })
            .unwrap_or_else(PoisonError::into_inner);
        wanted(&read.0, read.1)
    }
}

pub(crate) fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|window| window == wanted)
}

/// A program that ended.
#[derive(Debug, Clone)]
pub struct Finished {
    line: String,
    /// Its exit code, if it exited.
    pub code: Option<i32>,
    /// The signal that ended it, if one did.
    pub signal: Option<i32>,
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: Vec<u8>,
}

impl Finished {
    /// Insists on an exit code.
    ///
    /// # Panics
    ///
    /// If it is another, with everything the program wrote.
    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert!(self.code == Some(code), "expected code {code}\n{self}");
        self
    }

    /// Insists on success.
    ///
    /// # Panics
    ///
    /// If it failed, with everything it wrote.
    #[track_caller]
    pub fn ok(self) -> Self {
        self.expect(0)
    }

    /// Insists that standard error mentions each of these.
    ///
    /// # Panics
    ///
    /// If one is missing.
    #[track_caller]
    pub fn complains_of(self, words: &[&str]) -> Self {
        for word in words {
            assert!(
                self.err().contains(word),
                "expected {word:?} on standard error\n{self}"
            );
        }
        self
    }

    /// Standard output as text.
    #[must_use]
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    #[must_use]
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Standard output as JSON.
    ///
    /// # Panics
    ///
    /// If it is none.
    #[must_use]
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.stdout)
            .unwrap_or_else(|error| panic!("standard output is no JSON: {error}\n{self}"))
    }
}

impl std::fmt::Display for Finished {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}` ended with ", self.line)?;
        match (self.code, self.signal) {
            (Some(code), _) => writeln!(f, "code {code}")?,
            (None, signal) => writeln!(f, "signal {signal:?}")?,
        }
        f.write_str(&shown(&self.stdout, &self.stderr))
    }
}

fn shown(stdout: &[u8], stderr: &[u8]) -> String {
    let short = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(&bytes[..bytes.len().min(8192)]).into_owned();
        if bytes.len() > 8192 {
            format!("{text}… ({} bytes)", bytes.len())
        } else {
            text
        }
    };
    format!(
        "--- standard output\n{}\n--- standard error\n{}",
        short(stdout),
        short(stderr)
    )
}

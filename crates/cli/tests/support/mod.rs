//! A hermetic home for the real binary, and its whole answer as text.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

/// A directory that is the whole world of the commands run in it: no environment, no programs, no
/// state but its own.
pub(crate) struct Home {
    dir: tempfile::TempDir,
}

impl Home {
    pub(crate) fn new() -> Self {
        Self {
            dir: tempfile::tempdir().expect("a directory"),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_smolvm"));
        command
            .args(args)
            .env_clear()
            .env("HOME", self.dir.path())
            .env("SMOLVM_DATA_DIR", self.path("data"))
            .env("SMOLVM_PROGRAM_PATH", self.path("programs"))
            .current_dir(self.dir.path())
            .stdin(Stdio::null());
        command
    }

    /// Runs a command and gives everything its caller can see.
    pub(crate) fn run(&self, args: &[&str]) -> String {
        let output = self.command(args).output().expect("smolvm runs");
        self.transcript(args, &output)
    }

    /// As a person would paste it; what differs between hosts and releases is redacted.
    pub(crate) fn transcript(&self, args: &[&str], output: &Output) -> String {
        let mut text = format!("$ smolvm {}\n", args.join(" "));
        text += &String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        if !errors.is_empty() {
            text += "--- stderr\n";
            text += &errors;
        }
        let code = output
            .status
            .code()
            .map_or("by a signal".to_owned(), |code| code.to_string());
        writeln!(text, "--- exit {code}").expect("a string grows");
        let programs = PathBuf::from(env!("CARGO_BIN_EXE_smolvm"));
        let programs = programs
            .parent()
            .expect("a directory")
            .display()
            .to_string();
        text.replace(&self.dir.path().display().to_string(), "[HOME]")
            .replace(&programs, "[PROGRAMS]")
            .replace(env!("CARGO_PKG_VERSION"), "[VERSION]")
    }
}

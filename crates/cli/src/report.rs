//! A failure, told to a person or to a program.
//!
//! [`CliError`] says what failed; this file alone decides how that looks: the `error:` line, its
//! `caused by:` lines, the guest's last console lines, the `hint:`, and the JSON `error` object.

use std::error::Error as _;
use std::fmt::Write as _;
use std::io;
use std::time::Duration;

use serde_json::{Value, json};
use smolvm_engine::ErrorKind;

use crate::exit::Exit;
use crate::units;

/// Everything a command may fail with.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    /// The engine says so.
    #[error(transparent)]
    Engine(#[from] smolvm_engine::Error),
    /// Flags or arguments that parse one by one and make no sense together.
    #[error("{message}")]
    Usage {
        /// What is wrong.
        message: String,
        /// What to write instead.
        hint: String,
    },
    /// We will not do that without being told twice.
    #[error("{message}")]
    Refused {
        /// What was asked.
        message: String,
        /// How to insist.
        hint: String,
    },
    /// Something has to be installed first.
    #[error("{message}")]
    Missing {
        /// What is missing.
        message: String,
        /// The command that installs it.
        hint: String,
    },
    /// A local file or stream failed.
    #[error("{doing}")]
    Io {
        /// What was being done, to what.
        doing: String,
        /// Why it failed.
        source: io::Error,
    },
    /// Ctrl-C, or a signal of that meaning.
    #[error("interrupted")]
    Interrupted,
    /// Nobody reads our standard output any more.
    #[error("standard output is closed")]
    BrokenPipe,
    /// Several things were to be done, and some were not; each has been named.
    #[error("{0}")]
    Partly(String),
    /// The guest has no such program.
    #[error(transparent)]
    CommandNotFound(smolvm_engine::Error),
    /// The guest has the program and cannot execute it.
    #[error(transparent)]
    NotExecutable(smolvm_engine::Error),
    /// The guest did not even start the command within its time.
    #[error(transparent)]
    CommandTimedOut(smolvm_engine::Error),
    /// The guest's command ended with other than success. Not a failure of ours.
    #[error("the command {}", ending(*.exit, *.timeout))]
    Command {
        /// What it ended with.
        exit: Exit,
        /// The limit it ran into.
        timeout: Option<Duration>,
    },
}

/// The JSON error codes. Scripts written for earlier releases know these eight and no others; the
/// finer kind is in `details.kind`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Code {
    /// The command line does not parse.
    UsageError,
    /// A value cannot be used.
    InvalidInput,
    /// It failed.
    RuntimeError,
    /// Something is not installed.
    MissingDependency,
    /// The sandbox does not run.
    NotRunning,
    /// No such thing.
    NotFound,
    /// It could be done, and is not: something stands against it.
    Refused,
    /// The guest's command did not succeed.
    CommandFailed,
}

impl Code {
    fn as_str(self) -> &'static str {
        match self {
            Self::UsageError => "usage_error",
            Self::InvalidInput => "invalid_input",
            Self::RuntimeError => "runtime_error",
            Self::MissingDependency => "missing_dependency",
            Self::NotRunning => "not_running",
            Self::NotFound => "not_found",
            Self::Refused => "refused",
            Self::CommandFailed => "command_failed",
        }
    }

    fn of(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::NotFound => Self::NotFound,
            ErrorKind::InvalidInput => Self::InvalidInput,
            ErrorKind::NotRunning => Self::NotRunning,
            ErrorKind::MissingDependency => Self::MissingDependency,
            // Nothing is broken: the host or another sandbox stands against it.
            ErrorKind::AlreadyExists | ErrorKind::Busy | ErrorKind::Unsupported => Self::Refused,
            ErrorKind::Timeout
            | ErrorKind::GuestFailed
            | ErrorKind::NoSpace
            | ErrorKind::PermissionDenied
            | ErrorKind::Network
            | ErrorKind::Cancelled
            | ErrorKind::State
            | ErrorKind::Internal => Self::RuntimeError,
        }
    }
}

/// The kind's name in `details.kind`.
fn kind_name(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::NotFound => "not_found",
        ErrorKind::AlreadyExists => "already_exists",
        ErrorKind::InvalidInput => "invalid_input",
        ErrorKind::NotRunning => "not_running",
        ErrorKind::Busy => "busy",
        ErrorKind::MissingDependency => "missing_dependency",
        ErrorKind::Unsupported => "unsupported",
        ErrorKind::Timeout => "timeout",
        ErrorKind::GuestFailed => "guest_failed",
        ErrorKind::NoSpace => "no_space",
        ErrorKind::PermissionDenied => "permission_denied",
        ErrorKind::Network => "network",
        ErrorKind::Cancelled => "cancelled",
        ErrorKind::State => "state",
        ErrorKind::Internal => "internal",
    }
}

fn ending(exit: Exit, timeout: Option<Duration>) -> String {
    match (exit, timeout) {
        (Exit::TimedOut, Some(limit)) => {
            format!(
                "was killed: it ran longer than {}",
                units::show_duration(limit)
            )
        }
        (Exit::TimedOut, None) => "was killed: it ran longer than allowed".to_owned(),
        (exit, _) => format!("ended with code {}", exit.code()),
    }
}

impl CliError {
    /// A failed local file or stream; `doing` is a sentence without its full stop.
    pub(crate) fn io(doing: impl Into<String>, source: io::Error) -> Self {
        if source.kind() == io::ErrorKind::BrokenPipe {
            return Self::BrokenPipe;
        }
        Self::Io {
            doing: doing.into(),
            source,
        }
    }

    /// A command line that makes no sense.
    pub(crate) fn usage(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Usage {
            message: message.into(),
            hint: hint.into(),
        }
    }

    /// The exit code. `guest`: see [`Exit::of`].
    pub(crate) fn exit(&self, guest: bool) -> Exit {
        match self {
            Self::Engine(error) => Exit::of(error.kind(), guest),
            Self::Usage { .. } => Exit::Usage,
            Self::Refused { .. } | Self::Missing { .. } | Self::Io { .. } | Self::Partly(_) => {
                Exit::failure(guest)
            }
            Self::Interrupted => Exit::Interrupted,
            Self::BrokenPipe => Exit::BrokenPipe,
            Self::CommandNotFound(_) => Exit::CommandNotFound,
            Self::NotExecutable(_) => Exit::NotExecutable,
            Self::CommandTimedOut(_) => Exit::TimedOut,
            Self::Command { exit, .. } => *exit,
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::Engine(error) => Code::of(error.kind()),
            Self::Usage { .. } => Code::UsageError,
            Self::Refused { .. } => Code::Refused,
            Self::Missing { .. } => Code::MissingDependency,
            Self::Io { .. } | Self::Interrupted | Self::BrokenPipe | Self::Partly(_) => {
                Code::RuntimeError
            }
            Self::CommandNotFound(_)
            | Self::NotExecutable(_)
            | Self::CommandTimedOut(_)
            | Self::Command { .. } => Code::CommandFailed,
        }
    }

    fn engine(&self) -> Option<&smolvm_engine::Error> {
        match self {
            Self::Engine(error)
            | Self::CommandNotFound(error)
            | Self::NotExecutable(error)
            | Self::CommandTimedOut(error) => Some(error),
            _ => None,
        }
    }

    fn hint(&self) -> Option<&str> {
        match self {
            Self::Usage { hint, .. } | Self::Refused { hint, .. } | Self::Missing { hint, .. } => {
                Some(hint)
            }
            _ => self.engine().and_then(smolvm_engine::Error::hint_text),
        }
    }

    fn causes(&self) -> Vec<String> {
        let mut causes = Vec::new();
        let mut source = self.source();
        while let Some(cause) = source {
            let text = cause.to_string();
            // A wrapper often repeats its source word for word.
            if causes.last() != Some(&text) {
                causes.push(text);
            }
            source = cause.source();
        }
        causes
    }

    fn console(&self) -> &[String] {
        self.engine()
            .map_or(&[], smolvm_engine::Error::console_lines)
    }

    /// Whether there is nothing to say about it: the user did it, or the guest's command has said
    /// it already.
    fn is_silent(&self) -> bool {
        match self {
            Self::BrokenPipe => true,
            Self::Command { exit, .. } => *exit != Exit::TimedOut,
            _ => false,
        }
    }

    /// The report for people; ends with a line feed, or is empty.
    pub(crate) fn text(&self) -> String {
        if self.is_silent() {
            return String::new();
        }
        let mut text = format!("error: {self}\n");
        for cause in self.causes() {
            push_line(&mut text, format_args!("caused by: {cause}"));
        }
        if !self.console().is_empty() {
            push_line(&mut text, format_args!("the guest's last console lines:"));
            for line in self.console() {
                // A guest must not be able to drive the terminal it is reported on.
                let line: String = line.chars().filter(|c| !c.is_control()).collect();
                push_line(&mut text, format_args!("    {line}"));
            }
        }
        if let Some(hint) = self.hint() {
            push_line(&mut text, format_args!("hint: {hint}"));
        }
        text
    }

    /// The `error` object of the JSON envelope.
    pub(crate) fn json(&self) -> Value {
        let mut error = serde_json::Map::new();
        error.insert("code".to_owned(), json!(self.code().as_str()));
        error.insert("message".to_owned(), json!(self.to_string()));
        if let Some(hint) = self.hint() {
            error.insert("recovery".to_owned(), json!(hint));
        }
        let mut details = serde_json::Map::new();
        if let Some(engine) = self.engine() {
            details.insert("kind".to_owned(), json!(kind_name(engine.kind())));
        }
        let causes = self.causes();
        if !causes.is_empty() {
            details.insert("causes".to_owned(), json!(causes));
        }
        if !self.console().is_empty() {
            details.insert("console".to_owned(), json!(self.console()));
        }
        if !details.is_empty() {
            error.insert("details".to_owned(), Value::Object(details));
        }
        Value::Object(error)
    }
}

/// The `error` object for a command line that does not parse.
pub(crate) fn usage_json(error: &clap::Error) -> Value {
    let rendered = error.render().to_string();
    // Up to the usage: what is missing may be named on lines of its own.
    let lines: Vec<&str> = rendered
        .lines()
        .map(str::trim)
        .take_while(|line| !line.is_empty())
        .collect();
    let message = lines.join(" ");
    json!({
        "code": Code::UsageError.as_str(),
        "message": message.strip_prefix("error: ").unwrap_or(&message),
        "recovery": "add --help for the arguments of a command",
    })
}

fn push_line(text: &mut String, line: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_report_of_a_failed_guest() {
        let error = CliError::Engine(
            smolvm_engine::Error::new(ErrorKind::GuestFailed, "starting sandbox `box`")
                .because(io::Error::other("the guest's kernel panicked"))
                .console(vec!["[    1.0] \u{1b}[31mKernel panic".to_owned()])
                .hint("`smolvm logs box` shows the whole console"),
        );
        insta::assert_snapshot!(error.text(), @r"
        error: starting sandbox `box`
        caused by: the guest's kernel panicked
        the guest's last console lines:
            [    1.0] [31mKernel panic
        hint: `smolvm logs box` shows the whole console
        ");
        insta::assert_json_snapshot!(error.json(), @r#"
        {
          "code": "runtime_error",
          "message": "starting sandbox `box`",
          "recovery": "`smolvm logs box` shows the whole console",
          "details": {
            "kind": "guest_failed",
            "causes": [
              "the guest's kernel panicked"
            ],
            "console": [
              "[    1.0] \u001b[31mKernel panic"
            ]
          }
        }
        "#);
    }

    #[test]
    fn a_commands_own_failure_is_not_reported_again() {
        let ended = |exit| CliError::Command {
            exit,
            timeout: Some(Duration::from_secs(5)),
        };
        assert_eq!(ended(Exit::Guest(3)).text(), "");
        assert_eq!(
            ended(Exit::Guest(3)).json()["message"],
            "the command ended with code 3"
        );
        assert_eq!(
            ended(Exit::TimedOut).text(),
            "error: the command was killed: it ran longer than 5s\n"
        );
    }
}

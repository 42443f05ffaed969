//! What went wrong, in two halves: a small kind for programs, a sentence with its causes for people.

use std::fmt;

/// The kinds of failure a caller may branch on.
///
/// Kept exhaustive on purpose: every face maps each kind to a status of its own, and the compiler
/// lists what a new kind needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// No sandbox, image or file of that name.
    NotFound,
    /// The name is taken, or the thing is there already.
    AlreadyExists,
    /// A value the caller gave cannot be used.
    InvalidInput,
    /// The sandbox has to run for this, and does not.
    NotRunning,
    /// Another sandbox or process holds what this needs.
    Busy,
    /// A program, package or image this needs is not on the host.
    MissingDependency,
    /// This host or engine cannot do it.
    Unsupported,
    /// It took longer than allowed.
    Timeout,
    /// The guest did not come up, or is gone.
    GuestFailed,
    /// The host's or guest's disk is full.
    NoSpace,
    /// The host's kernel refused.
    PermissionDenied,
    /// The network, or a server on it, failed.
    Network,
    /// The caller cancelled it.
    Cancelled,
    /// The state on disk was written by a newer SmolVM, or is damaged.
    State,
    /// Anything else; a defect, or a failure of the host.
    Internal,
}

/// What was being done, to what, why it failed, and what to do about it.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    doing: String,
    hint: Option<String>,
    console: Vec<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// Result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A failure without a deeper cause. `doing` is a sentence without its full stop.
    pub fn new(kind: ErrorKind, doing: impl Into<String>) -> Self {
        Self {
            kind,
            doing: doing.into(),
            hint: None,
            console: Vec::new(),
            source: None,
        }
    }

    /// Adds the cause.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Adds what the user can do; names a command or flag.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same error as another kind.
    pub(crate) fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.kind = kind;
        self
    }

    /// Adds the last lines of a guest's console.
    #[must_use]
    pub fn console(mut self, lines: Vec<String>) -> Self {
        self.console = lines;
        self
    }

    /// The error with its causes on one line.
    #[must_use]
    pub fn in_one_line(&self) -> String {
        in_one_line(self)
    }

    /// What kind of failure this is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// What the user can do about it.
    #[must_use]
    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// The last lines of the guest's console, if the guest is the cause.
    #[must_use]
    pub fn console_lines(&self) -> &[String] {
        &self.console
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.doing)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source
            .as_deref()
            .map(|source| source as &(dyn std::error::Error + 'static))
    }
}

/// An error with its causes on one line.
#[must_use]
pub fn in_one_line(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        text = format!("{text}: {source}");
        cause = source.source();
    }
    text
}

/// Maps an I/O error to the kind a caller would branch on.
#[must_use]
pub(crate) fn io_kind(error: &std::io::Error) -> ErrorKind {
    use std::io::ErrorKind as Io;
    match error.kind() {
        Io::StorageFull | Io::QuotaExceeded | Io::FileTooLarge => ErrorKind::NoSpace,
        Io::PermissionDenied | Io::ReadOnlyFilesystem => ErrorKind::PermissionDenied,
        Io::NotFound => ErrorKind::NotFound,
        Io::AlreadyExists => ErrorKind::AlreadyExists,
        Io::TimedOut => ErrorKind::Timeout,
        Io::NotADirectory | Io::IsADirectory | Io::InvalidFilename => ErrorKind::InvalidInput,
        _ => ErrorKind::Internal,
    }
}

/// An I/O failure with what was being done.
pub(crate) fn io(doing: impl Into<String>, error: std::io::Error) -> Error {
    Error::new(io_kind(&error), doing).because(error)
}

impl From<smolvm_host::HostError> for Error {
    fn from(error: smolvm_host::HostError) -> Self {
        use smolvm_host::HostErrorKind as Host;
        let kind = match error.kind() {
            Host::NotFound => ErrorKind::NotFound,
            Host::PermissionDenied => ErrorKind::PermissionDenied,
            Host::NoSpace => ErrorKind::NoSpace,
            Host::MissingProgram => ErrorKind::MissingDependency,
            Host::AlreadyExists => ErrorKind::AlreadyExists,
            Host::Corrupt => ErrorKind::State,
            Host::Network => ErrorKind::Network,
            Host::Interrupted => ErrorKind::Cancelled,
            Host::Other => ErrorKind::Internal,
        };
        // The sentence is taken over and the cause kept, so that the chain says nothing twice.
        let text = error.to_string();
        let hint = error.hint().map(str::to_owned);
        let mut mapped = Self::new(kind, text);
        mapped.hint = hint;
        mapped.source = error.into_source();
        mapped
    }
}

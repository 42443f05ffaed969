//! What went wrong on the host: a small kind for code, a sentence and a cause chain for people.

use std::error::Error as StdError;
use std::io;
use std::path::Path;

/// What kind of thing went wrong, for code that has to branch. Exhaustive on purpose: a new kind
/// makes the compiler list every place that must think about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HostErrorKind {
    /// The thing is not there.
    NotFound,
    /// The host's user may not do this.
    PermissionDenied,
    /// The disk is full, or a quota is reached.
    NoSpace,
    /// A program is not installed; [`HostError::hint`] names the package that brings it.
    MissingProgram,
    /// The thing is there already.
    AlreadyExists,
    /// Data that was read is not what it should be.
    Corrupt,
    /// A download failed; trying again later may help.
    Network,
    /// The caller cancelled.
    Interrupted,
    /// Anything else; the cause chain says what.
    Other,
}

impl From<io::ErrorKind> for HostErrorKind {
    fn from(kind: io::ErrorKind) -> Self {
        match kind {
            io::ErrorKind::NotFound => Self::NotFound,
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                Self::PermissionDenied
            }
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace,
            io::ErrorKind::AlreadyExists => Self::AlreadyExists,
            io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => Self::Corrupt,
            _ => Self::Other,
        }
    }
}

/// A host effect that failed.
///
/// `Display` says what was being done to which thing; the cause is in
/// [`source`](StdError::source), so that printing the chain says nothing twice.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing} {thing}")]
pub struct HostError {
    kind: HostErrorKind,
    doing: &'static str,
    thing: String,
    hint: Option<String>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl HostError {
    /// An error without a cause below it. `doing` is a verb phrase that reads well after "cannot".
    #[must_use]
    pub fn new(kind: HostErrorKind, doing: &'static str, thing: impl Into<String>) -> Self {
        Self {
            kind,
            doing,
            thing: thing.into(),
            hint: None,
            source: None,
        }
    }

    /// A failed system call or file operation on `path`; the kind follows from the cause.
    #[must_use]
    pub fn io(doing: &'static str, path: &Path, source: io::Error) -> Self {
        // An error of ours may have travelled through a `Read` or `Write` implementation.
        match source.downcast::<Self>() {
            Ok(inner) => inner,
            Err(source) => Self {
                kind: source.kind().into(),
                doing,
                thing: path.display().to_string(),
                hint: None,
                source: Some(Box::new(source)),
            },
        }
    }

    /// The same error with a cause.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// The same error with advice: a whole sentence naming a command or setting that helps.
    #[must_use]
    pub fn hinting(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same error as another kind.
    pub(crate) fn with_kind(mut self, kind: HostErrorKind) -> Self {
        self.kind = kind;
        self
    }

    /// What kind of thing went wrong.
    #[must_use]
    pub fn kind(&self) -> HostErrorKind {
        self.kind
    }

    /// What was being done: a verb phrase.
    #[must_use]
    pub fn doing(&self) -> &'static str {
        self.doing
    }

    /// The path, program or process it was being done to.
    #[must_use]
    pub fn thing(&self) -> &str {
        &self.thing
    }

    /// The cause below this error, for a caller that takes its sentence over.
    #[must_use]
    pub fn into_source(self) -> Option<Box<dyn StdError + Send + Sync>> {
        self.source
    }

    /// A sentence that tells the user what would help, if something is known to.
    #[must_use]
    pub fn hint(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}

impl From<HostError> for io::Error {
    fn from(error: HostError) -> Self {
        let kind = match error.kind {
            HostErrorKind::NotFound | HostErrorKind::MissingProgram => io::ErrorKind::NotFound,
            HostErrorKind::PermissionDenied => io::ErrorKind::PermissionDenied,
            HostErrorKind::NoSpace => io::ErrorKind::StorageFull,
            HostErrorKind::AlreadyExists => io::ErrorKind::AlreadyExists,
            HostErrorKind::Corrupt => io::ErrorKind::InvalidData,
            // Not `ErrorKind::Interrupted`: readers answer that one by trying again.
            HostErrorKind::Network | HostErrorKind::Interrupted | HostErrorKind::Other => {
                io::ErrorKind::Other
            }
        };
        Self::new(kind, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_follow_from_the_system_call() {
        let kind = |errno| HostErrorKind::from(io::Error::from_raw_os_error(errno).kind());
        assert_eq!(kind(libc::ENOSPC), HostErrorKind::NoSpace);
        assert_eq!(kind(libc::EDQUOT), HostErrorKind::NoSpace);
        assert_eq!(kind(libc::ENOENT), HostErrorKind::NotFound);
        assert_eq!(kind(libc::EACCES), HostErrorKind::PermissionDenied);
        assert_eq!(kind(libc::EROFS), HostErrorKind::PermissionDenied);
        assert_eq!(kind(libc::EEXIST), HostErrorKind::AlreadyExists);
        assert_eq!(kind(libc::EIO), HostErrorKind::Other);
    }

    #[test]
    fn an_error_survives_travelling_as_an_io_error() {
        let inner = HostError::new(HostErrorKind::Network, "download", "a package");
        let outer = HostError::io("read", Path::new("/x"), io::Error::from(inner));
        assert_eq!(outer.kind(), HostErrorKind::Network);
        assert_eq!(outer.to_string(), "cannot download a package");
    }

    #[test]
    fn the_sentence_names_the_thing_and_leaves_the_cause_to_the_chain() {
        let error = HostError::io(
            "create the directory",
            Path::new("/proc/nope"),
            io::Error::from_raw_os_error(libc::ENOENT),
        );
        assert_eq!(error.to_string(), "cannot create the directory /proc/nope");
        assert!(error.source().is_some());
    }
}

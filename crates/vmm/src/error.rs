//! Errors, and how a VMM's end is told.

use std::error::Error;
use std::fmt;

use crate::{Exit, VmError, VmErrorKind};

type Source = Box<dyn Error + Send + Sync>;

impl VmError {
    /// An error with a cause.
    pub(crate) fn new(
        kind: VmErrorKind,
        doing: impl Into<String>,
        source: impl Into<Source>,
    ) -> Self {
        VmError {
            kind,
            doing: doing.into(),
            source: Some(source.into()),
        }
    }

    /// The VMM was gone when it was needed.
    pub(crate) fn exited(doing: impl Into<String>, exit: &Exit) -> Self {
        VmError::new(VmErrorKind::Exited, doing, ExitedEarly(exit.clone()))
    }
}

/// An [`Exit`] as the cause of an error.
#[derive(Debug, thiserror::Error)]
#[error("the virtual machine monitor is gone: {0}")]
struct ExitedEarly(Exit);

/// One line with the way it ended, then what it said.
impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.code, self.signal) {
            (Some(code), _) => write!(f, "it ended with exit code {code}")?,
            (None, Some(libc::SIGBUS)) => write!(
                f,
                "it was ended by signal {} (SIGBUS), as when the disk or tmpfs that holds its memory is \
                 full",
                libc::SIGBUS
            )?,
            (None, Some(signal)) => write!(f, "it was ended by signal {signal}")?,
            (None, None) => write!(f, "it ended")?,
        }
        match self.stderr.trim() {
            "" => Ok(()),
            said => write!(f, ", saying: {said}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_reads_as_a_sentence() {
        let mut exit = Exit {
            code: Some(1),
            signal: None,
            stderr: "could not open kernel\n".into(),
        };
        let error = VmError::exited("pause the machine m", &exit);
        assert_eq!(error.to_string(), "pause the machine m");
        assert_eq!(
            error.source().map(ToString::to_string).as_deref(),
            Some(
                "the virtual machine monitor is gone: it ended with exit code 1, saying: \
                 could not open kernel"
            )
        );
        exit = Exit {
            code: None,
            signal: Some(9),
            stderr: String::new(),
        };
        assert_eq!(exit.to_string(), "it was ended by signal 9");
        exit.signal = Some(7);
        assert_eq!(
            exit.to_string(),
            "it was ended by signal 7 (SIGBUS), as when the disk or tmpfs that holds its memory is full"
        );
    }
}

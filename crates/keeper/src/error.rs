//! Why a keeper gives up. Written to its log; what a client should know travels as an answer.

/// Why a keeper gives up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeeperError {
    /// The state or the launch file.
    #[error(transparent)]
    Engine(#[from] smolvm_engine::Error),
    /// The machine.
    #[error(transparent)]
    Vm(#[from] smolvm_vmm::VmError),
    /// The host.
    #[error("could not {doing}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A guest that did not come up.
    #[error("{}{}", failure.chain(), said(console))]
    Guest {
        /// What was being done, and why it failed, with all its causes.
        failure: Box<KeeperError>,
        /// The last lines of the console.
        console: Vec<String>,
    },
    /// No engine of that name.
    #[error("there is no engine named `{0}`")]
    UnknownEngine(String),
    /// Another process repaired the sandbox's record while the keeper was coming up.
    #[error("the sandbox was declared dead while it was starting")]
    Declared,
}

fn said(console: &[String]) -> String {
    if console.is_empty() {
        String::new()
    } else {
        format!("; its console ends with: {}", console.join(" | "))
    }
}

impl KeeperError {
    /// It and its causes on one line.
    pub(crate) fn chain(&self) -> String {
        smolvm_engine::in_one_line(self)
    }

    /// Whether it is for want of room on the disk.
    pub(crate) fn is_full(&self) -> bool {
        if let Self::Guest { failure, .. } = self {
            return failure.is_full();
        }
        let mut cause: Option<&dyn std::error::Error> = Some(self);
        while let Some(error) = cause {
            let full = match error.downcast_ref::<std::io::Error>() {
                Some(error) => matches!(
                    error.kind(),
                    std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded
                ),
                None => error
                    .downcast_ref::<smolvm_engine::Error>()
                    .is_some_and(|error| error.kind() == smolvm_engine::ErrorKind::NoSpace),
            };
            if full {
                return true;
            }
            cause = error.source();
        }
        false
    }

    pub(crate) fn io(doing: &'static str, source: std::io::Error) -> Self {
        Self::Io { doing, source }
    }
}
